"""Streets: rendered street scenes with Cityscapes' classes and palette, made on first use."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from jaxssl.contracts import IGNORE_LABEL, Record, UserError
from jaxssl.data import streets_scene as scene
from jaxssl.data.cityscapes import INFO
from jaxssl.data.streets_scene import (
    FAR, NEAR, TOWARD, UP, Camera, Canvas, Color, Dice, Face, Facade, Light, Plants, Point, Thing,
)

RENDERER_VERSION = 1


class Side(NamedTuple):
    """One side of the road, from the curb outward. Distances in meters, x signed.

    Attributes:
      sign: -1 left, 1 right.
      curb: x of the curb.
      parking: whether cars park along the curb.
      verge: width of a strip of grass next to the curb.
      walk: width of the sidewalk.
    """

    sign: int
    curb: float
    parking: bool
    verge: float
    walk: float

    @property
    def front(self) -> float:
        """x of the line where the lots begin."""
        return self.curb + self.sign * (self.verge + self.walk)


class District(NamedTuple):
    """What a part of town is like.

    Attributes:
      lots: kinds to choose from.
      floors: of its buildings.
      facades: families of colors.
      shops: share of buildings with shops.
      roofs: share of scenes with pitched roofs.
      trees: chance of a tree at each place for one.
      verge: chance of a verge.
      crowd: people, on average.
      paved: whether the ground behind the sidewalk is paved.
    """

    lots: tuple[str, ...]
    floors: tuple[int, int]
    facades: tuple[int, ...]
    shops: float
    roofs: float
    trees: float
    verge: float
    crowd: float
    paved: bool


_DISTRICTS = (
    District(("building",) * 12 + ("park",), (3, 7), (0, 0, 1, 2, 3, 6), 0.7, 0.2, 0.35, 0.15, 6, True),
    District(("building",) * 8 + ("park",) * 2, (2, 5), (0, 1, 3, 6), 0.3, 0.5, 0.5, 0.35, 3, True),
    District(("house",) * 5 + ("park",) * 3 + ("building",), (2, 3), (0, 1, 3, 6), 0.05, 0.9, 0.7, 0.5, 1.5, False),
    District(("park",) * 6 + ("house", "building"), (2, 4), (0, 1, 2, 6), 0.1, 0.5, 0.8, 0.6, 1, False),
    District(("building",) * 4 + ("yard",) * 4 + ("park",) * 2, (2, 5), (2, 4, 5, 6), 0.1, 0.05, 0.35, 0.4, 1, False),
    District(("building",) * 10 + ("yard",), (6, 12), (2, 4, 4, 5, 6), 0.5, 0.0, 0.4, 0.2, 5, True),
)


class Street(NamedTuple):
    """A street and what it is made of."""

    sides: tuple[Side, Side]
    lanes: tuple[tuple[float, int], ...]
    crossing: tuple[float, float] | None
    zebra: bool
    end: float
    closed: bool
    rails: tuple[float, ...]
    district: District
    facade: Facade
    plants: Plants
    road: Color
    paving: Color
    grass: Color
    border: str
    border_color: Color
    fence: str
    tram: bool


def _lay_out(dice: Dice) -> Street:
    district = dice.pick(_DISTRICTS)
    lane = dice.between(2.9, 3.6)
    right_lanes, left_lanes = dice.pick((1, 1, 1, 2)), dice.pick((0, 1, 1, 1, 2))
    offset = dice.between(-0.35, 0.35)
    tram = dice.chance(0.09)
    lanes = [(i * lane + offset, 1) for i in range(right_lanes)]
    lanes += [(offset - (i + 1) * lane, -1) for i in range(left_lanes)]
    edges = (offset - (left_lanes + 0.5) * lane, offset + (right_lanes - 0.5) * lane)
    sides = (_draw_up_side(dice, district, -1, edges[0]), _draw_up_side(dice, district, 1, edges[1]))
    rails = dice.pick(tuple(x for x, _ in lanes)),
    crossing = dice.between(9, 45)
    families = scene.FACADES
    colors = families[dice.pick(district.facades)] * 3 + families[dice.pick(district.facades)]
    return Street(
        sides=sides,
        lanes=tuple(lanes),
        crossing=(crossing, crossing + dice.between(6, 10)) if dice.chance(0.45) else None,
        zebra=dice.chance(0.5),
        end=dice.between(35, 90) if dice.chance(0.35) else FAR,
        closed=dice.chance(0.6),
        rails=rails if tram or dice.chance(0.04) else (),
        district=district,
        facade=Facade(
            colors=colors,
            storey=dice.between(2.8, 3.6),
            pitch=dice.between(1.7, 3.4),
            pane=(dice.between(0.35, 0.8), dice.between(0.4, 0.62)),
            roof=dice.pick(((150, 74, 56), (96, 84, 80), (120, 92, 76))) if dice.chance(district.roofs) else None,
            floors=district.floors,
            shops=district.shops,
        ),
        plants=scene.grow(dice),
        road=dice.vary(dice.pick(((96, 96, 98), (112, 110, 108), (82, 82, 86), (124, 118, 112))), 0.15),
        paving=dice.vary(dice.pick(scene.PAVING), 0.12),
        grass=dice.vary(dice.pick(scene.GRASS), 0.12),
        border=dice.pick(("hedge", "hedge", "fence", "fence", "none", "wall")),
        border_color=dice.vary(dice.pick(((150, 146, 138), (110, 92, 74), (170, 160, 150), (84, 88, 92), (128, 78, 62))), 0.15),
        fence=dice.pick(("boards", "mesh", "pickets", "rail")),
        tram=tram,
    )


def _draw_up_side(dice: Dice, district: District, sign: int, edge: float) -> Side:
    parking = dice.chance(0.6)
    verge = dice.between(0.8, 2.5) if dice.chance(district.verge) else 0.0
    curb = edge + sign * (2.2 if parking else dice.between(0.1, 0.8))
    return Side(sign, curb, parking, verge, dice.between(1.6, 4.5))


def _illuminate(dice: Dice) -> Light: ...
