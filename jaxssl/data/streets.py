"""Streets: rendered street scenes with Cityscapes' classes and palette, made on first use."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from jaxssl.contracts import Record, UserError
from jaxssl.data import streets_scene as scene
from jaxssl.data.cityscapes import INFO
from jaxssl.data.streets_scene import (
    FAR,
    NEAR,
    TOWARD,
    UP,
    Camera,
    Canvas,
    Color,
    Dice,
    Facade,
    Face,
    Light,
    Plants,
    Thing,
)

RENDERER_VERSION = 1


class District(NamedTuple):
    """What a part of town is like.

    Attributes:
      lots: kinds to choose from.
      floors: least and greatest number in a building.
      facades: families of colors.
      shops: share of buildings with shops.
      roofs: chance of pitched roofs.
      trees: chance of a tree at each place for one.
      verge: chance of a strip of grass at the curb.
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


_B, _H, _P, _Y = ("building",), ("house",), ("park",), ("yard",)
_DISTRICTS = (
    District(_B * 12 + _P, (3, 7), (0, 0, 1, 2, 3, 6), 0.7, 0.2, 0.35, 0.15, 6, True),
    District(_B * 8 + _P * 2, (2, 5), (0, 1, 3, 6), 0.3, 0.5, 0.5, 0.35, 3, True),
    District(_H * 5 + _P * 3 + _B, (2, 3), (0, 1, 3, 6), 0.05, 0.9, 0.7, 0.5, 1.5, False),
    District(_P * 6 + _H + _B, (2, 4), (0, 1, 2, 6), 0.1, 0.5, 0.8, 0.6, 1, False),
    District(_B * 4 + _Y * 4 + _P * 2, (2, 5), (2, 4, 5, 6), 0.1, 0.05, 0.35, 0.4, 1, False),
    District(_B * 10 + _Y, (6, 12), (2, 4, 4, 5, 6), 0.5, 0.0, 0.4, 0.2, 5, True),
)


class Side(NamedTuple):
    """One side of the road, in meters.

    Attributes:
      sign: -1 left, 1 right.
      curb: x of the curb.
      parking: whether cars park along the curb.
      verge: width of a strip of grass next to the curb.
      walk: width of the sidewalk behind it.
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


class Materials(NamedTuple):
    """What the things of a street are made of."""

    road: Color
    paving: Color
    grass: Color
    plants: Plants
    facade: Facade
    border: str
    border_color: Color
    fence: str


class Street(NamedTuple):
    """The plan of a street.

    Attributes:
      district: it runs through.
      sides: left and right.
      lanes: x of the middle, and 1 for the camera's direction or -1.
      crossing: z where a side street begins and ends.
      rails: x of the tracks.
      tram: whether one is on its way.
      end: z of the last lot.
      closed: whether a building stands across the end.
      made_of: materials.
    """

    district: District
    sides: tuple[Side, Side]
    lanes: tuple[tuple[float, int], ...]
    crossing: tuple[float, float] | None
    rails: tuple[float, ...]
    tram: bool
    end: float
    closed: bool
    made_of: Materials


def _lay_out(dice: Dice) -> Street:
    district = dice.pick(_DISTRICTS)
    width, offset = dice.between(2.9, 3.6), dice.between(-0.35, 0.35)
    ahead, oncoming = dice.pick((1, 1, 1, 2)), dice.pick((0, 1, 1, 1, 2))
    lanes = [(offset + i * width, 1) for i in range(ahead)]
    lanes += [(offset - (i + 1) * width, -1) for i in range(oncoming)]
    left = _lay_side(dice, district, -1, offset - (oncoming + 0.5) * width)
    right = _lay_side(dice, district, 1, offset + (ahead - 0.5) * width)
    tram, corner = dice.chance(0.09), dice.between(9, 45)
    rails = tuple(x for x, _ in lanes[:1] + lanes[ahead : ahead + 1])
    return Street(
        district=district,
        sides=(left, right),
        lanes=tuple(lanes),
        crossing=(corner, corner + dice.between(6, 10)) if dice.chance(0.45) else None,
        rails=rails if tram or dice.chance(0.04) else (),
        tram=tram,
        end=dice.between(35, 90) if dice.chance(0.35) else FAR,
        closed=dice.chance(0.6),
        made_of=_choose_materials(dice, district),
    )


def _lay_side(dice: Dice, district: District, sign: int, edge: float) -> Side:
    parking = dice.chance(0.5)
    curb = edge + sign * (2.2 if parking else dice.between(0.1, 0.8))
    verge = dice.between(0.8, 2.5) if dice.chance(district.verge) else 0.0
    return Side(sign, curb, parking, verge, dice.between(2.0, 6.0))


def _choose_materials(dice: Dice, district: District) -> Materials:
    colors = scene.FACADES[dice.pick(district.facades)] * 3
    colors += scene.FACADES[dice.pick(district.facades)]
    tiles = dice.pick(((150, 74, 56), (96, 84, 80), (120, 92, 76)))
    facade = Facade(
        colors=colors,
        storey=dice.between(2.8, 3.6),
        pitch=dice.between(1.7, 3.4),
        pane=(dice.between(0.35, 0.8), dice.between(0.4, 0.62)),
        roof=tiles if dice.chance(district.roofs) else None,
        floors=district.floors,
        shops=district.shops,
    )
    return Materials(
        road=dice.vary(dice.pick(scene.ASPHALT), 0.15),
        paving=dice.vary(dice.pick(scene.PAVING), 0.12),
        grass=dice.vary(dice.pick(scene.GRASS), 0.12),
        plants=scene.grow(dice),
        facade=facade,
        border=dice.pick(("hedge", "hedge", "fence", "fence", "none", "wall")),
        border_color=dice.vary(dice.pick(scene.MASONRY), 0.15),
        fence=dice.pick(("boards", "mesh", "pickets", "rail")),
    )


def _aim(dice: Dice) -> Camera:
    return Camera(
        height=dice.between(1.2, 2.1),
        focal=dice.between(1.3, 2.2),
        horizon=dice.between(0.38, 0.5),
        yaw=dice.between(-0.22, 0.22),
        roll=dice.between(-0.02, 0.02),
        bend=dice.between(-0.0025, 0.0025) if dice.chance(0.6) else 0.0,
    )


_SKIES: tuple[tuple[Color, Color, Color, Color, float], ...] = (
    ((88, 138, 206), (196, 216, 234), (0.55, 0.58, 0.64), (0.62, 0.58, 0.50), 0.35),
    ((172, 178, 186), (214, 217, 220), (0.78, 0.79, 0.82), (0.10, 0.10, 0.10), 0.95),
    ((128, 156, 190), (246, 222, 180), (0.42, 0.44, 0.52), (0.85, 0.68, 0.46), 0.30),
    ((128, 134, 142), (168, 172, 176), (0.52, 0.54, 0.58), (0.05, 0.05, 0.05), 1.00),
    ((44, 56, 98), (206, 150, 128), (0.33, 0.35, 0.44), (0.12, 0.08, 0.06), 0.40),
    ((200, 204, 206), (232, 230, 224), (0.70, 0.68, 0.64), (0.30, 0.28, 0.24), 0.60),
)
"""Zenith, horizon, ambient light, sunlight and clouds; a scene is a mixture of two."""

_SUNS = (
    (-0.61, 0.61, -0.5), (0.61, 0.61, -0.5), (-0.7, 0.5, 0.5), (0.7, 0.5, 0.5), (0.0, 0.7, -0.7),
    (-0.87, 0.4, -0.3), (0.87, 0.4, -0.3), (0.2, 0.5, 0.84),
)  # fmt: skip


def _illuminate(dice: Dice) -> Light:
    one, two, t = dice.pick(_SKIES), dice.pick(_SKIES), dice.between(0, 1)

    def mix(i: int) -> Color:
        red, green, blue = (a + t * (b - a) for a, b in zip(one[i], two[i], strict=True))
        return red, green, blue

    ambient = mix(2)
    return Light(
        zenith=mix(0),
        horizon=mix(1),
        ambient=ambient,
        sun=mix(3),
        direction=dice.pick(_SUNS),
        visibility=dice.pick((120.0, 250.0, 400.0, 600.0, 800.0)),
        clouds=one[4] + t * (two[4] - one[4]),
        lamps=ambient[0] < 0.42,
    )


def _draw_sky(canvas: Canvas, dice: Dice) -> None:
    zenith, horizon = np.array(canvas.light.zenith), np.array(canvas.light.horizon)
    rows = np.linspace(0, 1, 48)[:, None, None]
    sky = zenith + rows * (horizon - zenith)
    octaves = (dice.noise(8, 6), dice.noise(16, 12), dice.noise(32, 24))
    noise = sum(w * _smooth(n, (48, 96)) for n, w in zip(octaves, (0.5, 0.3, 0.2), strict=True))
    cover = np.clip((noise[..., None] / 255 - 0.68 + 0.3 * canvas.light.clouds) * 4, 0, 1)
    clouds = horizon + 0.5 * (255 - horizon) * (1 - rows)
    sky = sky + cover * 0.8 * (clouds - sky)
    canvas.backdrop(Image.fromarray(sky.astype(np.uint8)), "sky")


def _smooth(noise: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Enlarges noise: float32 `[*size]` in [0,255]."""
    image = Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(image, np.float32)


def _draw_skyline(canvas: Canvas, dice: Dice, street: Street) -> None:
    """Draws what stands around far away: roofs and treetops."""
    trees = 0.25 if street.district.paved else 0.7
    x = -FAR
    while x < FAR:
        width, leafy = dice.between(8, 20), dice.chance(trees)
        if leafy:
            center = (x + width / 2, 2.0, FAR)
            ring = dice.pick(street.made_of.plants.clumps)[0].ring
            color = dice.vary(street.made_of.plants.leaf, 0.15)
            canvas.disc(center, width * 0.7, color, "vegetation", UP, ring=ring)
        else:
            height = dice.between(6, 16)
            face = Face(x, FAR, x + width, FAR, height, TOWARD)
            color = dice.vary(dice.pick(street.made_of.facade.colors), 0.1)
            canvas.polygon(face.whole(), color, "building", TOWARD)
        x += width * 0.8


def _draw_ground(canvas: Canvas, dice: Dice, street: Street) -> None:
    made_of, left, right = street.made_of, *street.sides
    around = (made_of.paving, "sidewalk") if street.district.paved else (made_of.grass, "terrain")
    scene.draw_strip(canvas, -3 * FAR, 3 * FAR, NEAR, 2 * FAR, *around)
    for side in street.sides:
        scene.draw_strip(canvas, side.curb, side.front, NEAR, FAR, made_of.paving, "sidewalk")
        _draw_slabs(canvas, side, made_of.paving)
        verge = side.curb + side.sign * side.verge
        scene.draw_strip(canvas, side.curb, verge, NEAR, FAR, made_of.grass, "terrain")
    scene.draw_strip(canvas, left.curb, right.curb, NEAR, FAR, made_of.road, "road")
    if street.crossing:
        scene.draw_strip(canvas, -60, 60, *street.crossing, made_of.road, "road")
    _draw_wear(canvas, dice, street)
    for side in street.sides:
        _draw_curb(canvas, side, street)
    _draw_markings(canvas, dice, street)
    _draw_building_shadows(canvas, dice, street)


def _draw_slabs(canvas: Canvas, side: Side, paving: Color) -> None:
    joint: Color = (paving[0] * 0.84, paving[1] * 0.84, paving[2] * 0.84)
    for i in range(26):
        z = 2.0 + i
        scene.draw_strip(canvas, side.curb, side.front, z, z + 0.06, joint, None)


def _draw_wear(canvas: Canvas, dice: Dice, street: Street) -> None:
    """Draws tracks, patches and manholes on the road."""
    road, left, right = street.made_of.road, *street.sides
    strength = dice.between(0.05, 0.3)
    dark: Color = (road[0] * 0.7, road[1] * 0.7, road[2] * 0.7)
    for x, _ in street.lanes:
        for track in (x - 0.75, x + 0.75):
            scene.draw_strip(canvas, track - 0.25, track + 0.25, NEAR, 48, dark, None, strength)
    for _ in range(int(dice.between(0, 7))):
        x, z = dice.between(left.curb, right.curb - 1), dice.between(3, 30)
        reach, color = dice.between(0.4, 2.0), dice.vary(road, 0.3)
        scene.draw_strip(canvas, x, min(x + reach, right.curb), z, z + reach * 2, color, None, 0.6)
    for _ in range(int(dice.between(0, 3))):
        x, z = dice.between(left.curb + 0.5, right.curb - 0.5), dice.between(4, 25)
        lid = [(x + 0.35 * a, 0.0, z + 0.35 * b) for a, b in scene.RING]
        canvas.polygon(lid, dark)


def _draw_curb(canvas: Canvas, side: Side, street: Street) -> None:
    paving = street.made_of.paving
    bright: Color = (paving[0] * 1.15, paving[1] * 1.15, paving[2] * 1.15)
    start, stop = street.crossing or (FAR, FAR)
    for z0, z1 in ((NEAR, start), (stop, FAR)):
        if z0 < z1:
            outer = side.curb + side.sign * 0.2
            scene.draw_strip(canvas, side.curb, outer, z0, z1, bright, "sidewalk")


def _draw_markings(canvas: Canvas, dice: Dice, street: Street) -> None:
    paint = dice.vary((222, 222, 214), 0.12)
    opacity, dash, gap = dice.between(0.35, 1), dice.between(2, 4), dice.between(3, 7)
    xs = sorted(x for x, _ in street.lanes)
    solid = dice.chance(0.3)
    for x in [(a + b) / 2 for a, b in zip(xs[:-1], xs[1:], strict=True)]:
        z = NEAR
        while z < 70:
            length = gap + dash if solid else dash
            scene.draw_strip(canvas, x - 0.07, x + 0.07, z, z + length, paint, None, opacity)
            z += dash + gap
    if dice.chance(0.4):
        for side in street.sides:
            edge = side.curb - side.sign * (2.15 if side.parking else 0.35)
            scene.draw_strip(canvas, edge - 0.06, edge + 0.06, NEAR, 70, paint, None, opacity)
    if dice.chance(0.15):
        side = street.sides[1]
        lane = side.curb - (3.6 if side.parking else 1.6), side.curb - (2.2 if side.parking else 0.2)
        scene.draw_strip(canvas, *lane, NEAR, 60, (168, 76, 66), None, 0.55)
    for x in street.rails:
        for rail in (x - 0.72, x + 0.72):
            scene.draw_strip(canvas, rail - 0.06, rail + 0.06, NEAR, FAR, (66, 66, 70), None)
    _draw_zebra(canvas, dice, street, paint, opacity)


def _draw_zebra(
    canvas: Canvas, dice: Dice, street: Street, paint: Color, opacity: float
) -> None:
    left, right = street.sides
    if not (street.crossing or dice.chance(0.15)):
        return
    z = street.crossing[0] - 4 if street.crossing else dice.between(7, 25)
    x = left.curb + 0.4
    striped = dice.chance(0.65)
    while striped and x < right.curb - 0.4:
        scene.draw_strip(canvas, x, x + 0.5, z, z + 3, paint, None, opacity)
        x += 1.0
    scene.draw_strip(canvas, -0.2, right.curb, z - 1.2, z - 0.8, paint, None, opacity)


def _draw_building_shadows(canvas: Canvas, dice: Dice, street: Street) -> None:
    sun_x = canvas.light.direction[0]
    strength = 0.5 * canvas.light.sun[0]
    if not sun_x or strength < 0.12:
        return
    side = street.sides[0 if sun_x < 0 else 1]
    z = NEAR
    while z < 60:
        length, reach = dice.between(6, 15), dice.between(0, 12)
        if dice.chance(0.8):
            inner = side.front - side.sign * reach
            scene.draw_strip(
                canvas, side.front, inner, z, z + length, (10, 12, 20), None, min(0.5, strength)
            )
        z += length


def _lots(dice: Dice, street: Street, side: Side) -> Iterator[Thing]:
    z = NEAR
    while z < street.end:
        stop = z + dice.between(9, 18)
        if street.crossing and z < street.crossing[1] and stop > street.crossing[0]:
            if street.crossing[0] - z > 4:
                yield from _lot(dice, street, side, z, street.crossing[0])
            z = street.crossing[1]
        else:
            yield from _lot(dice, street, side, z, stop)
            z = stop


def _lot(dice: Dice, street: Street, side: Side, z0: float, z1: float) -> Iterator[Thing]:
    kind = dice.pick(street.district.lots)
    made_of, front = street.made_of, side.front
    if kind == "building":
        draw = partial(scene.draw_building, style=made_of.facade, x=front, z0=z0, z1=z1, setback=0)
        yield Thing(z1, draw)
        return
    # All of a lot is as far as its far end: then whatever stands before it is drawn later.
    ground = (made_of.paving, None) if kind == "yard" else (made_of.grass, "terrain")
    ends = (front, front + side.sign * 12)
    yield Thing(z1, partial(_draw_lawn, ends=ends, z0=z0, z1=z1, cover=ground))
    if kind != "park":
        gap = 0.0 if kind == "yard" else dice.between(0.5, 2.0)
        building = partial(scene.draw_building, style=made_of.facade, x=front)
        setback = dice.between(4, 7)
        yield Thing(z1, partial(building, z0=z0 + gap, z1=z1 - gap, setback=setback))
    for plant in sorted(_garden(dice, street, side, z0, z1, depth=10.0 if kind == "park" else 4.0), key=lambda plant: -plant.z):
        yield plant._replace(z=z1)
    yield from _border(dice, street, side, z0, z1, kind)


def _draw_lawn(
    canvas: Canvas, dice: Dice, ends: tuple[float, float], z0: float, z1: float,
    cover: tuple[Color, str | None],
) -> None:
    del dice
    scene.draw_strip(canvas, *ends, z0, z1, *cover)


def _garden(
    dice: Dice, street: Street, side: Side, z0: float, z1: float, depth: float
) -> Iterator[Thing]:
    plants = street.made_of.plants
    places = int((z1 - z0) * depth / 20)
    for _ in range(places):
        x, z = side.front + side.sign * dice.between(1, depth), dice.between(z0, z1)
        if dice.chance(street.district.trees):
            height = dice.between(4, 11)
            yield Thing(z, partial(scene.draw_tree, plants=plants, x=x, z=z, height=height))
        if dice.chance(0.35):
            yield Thing(z, partial(scene.draw_bush, plants=plants, x=x, z=z))


def _border(
    dice: Dice, street: Street, side: Side, z0: float, z1: float, kind: str
) -> Iterator[Thing]:
    made_of, border = street.made_of, street.made_of.border
    if kind == "yard" and border in ("hedge", "none"):
        border = "fence"
    if border == "none" or (kind == "park" and border != "hedge" and dice.chance(0.4)):
        return
    height = {"hedge": 1.3, "fence": 1.3, "wall": 2.0}[border] * dice.between(0.7, 1.4)
    face = Face(side.front, z0, side.front, z1, height, (-float(side.sign), 0.0, 0.0))
    color = made_of.border_color
    draw = {
        "hedge": partial(scene.draw_hedge, plants=made_of.plants, face=face),
        "fence": partial(scene.draw_fence, color=color, kind=made_of.fence, face=face),
        "wall": partial(scene.draw_wall, color=color, face=face),
    }[border]
    yield Thing(z1, draw)


def _street_end(dice: Dice, street: Street) -> Iterator[Thing]:
    if street.end == FAR or not street.closed:
        return
    x = -40.0
    while x < 40:
        stop = x + dice.between(9, 18)
        draw = partial(
            scene.draw_block, style=street.made_of.facade, x0=x, x1=stop, z=street.end + 12
        )
        yield Thing(street.end + 12, draw)
        x = stop


def _furniture(dice: Dice, street: Street, side: Side) -> Iterator[Thing]:
    """Yields what stands along the curb."""
    x = side.curb + side.sign * 0.6
    z, spacing = dice.between(5, 20), dice.between(18, 36)
    while z < 80:
        if not _in_crossing(street, z):
            yield Thing(z, partial(scene.draw_lamp, x=x, z=z))
        z += spacing
    for _ in range(dice.pick((0, 1, 1, 2, 3))):
        z = dice.between(5, 40)
        yield Thing(z, partial(scene.draw_sign, x=x, z=z))
    if street.crossing and dice.chance(0.75):
        for z in (street.crossing[0] - 0.8, street.crossing[1] + 0.8):
            yield Thing(z, partial(scene.draw_traffic_light, x=x, z=z))
    z, spacing = dice.between(4, 12), dice.between(6, 12)
    planted = dice.chance(street.district.trees)
    while planted and z < 80:
        height, tree_x = dice.between(5, 10), side.curb + side.sign * 1.2
        if not _in_crossing(street, z):
            draw = partial(
                scene.draw_tree, plants=street.made_of.plants, x=tree_x, z=z, height=height
            )
            yield Thing(z, draw)
        z += spacing


def _in_crossing(street: Street, z: float) -> bool:
    return street.crossing is not None and street.crossing[0] - 4 < z < street.crossing[1] + 1


def _traffic(dice: Dice, street: Street) -> Iterator[Thing]:
    rare = [(scene.draw_truck, 0.09), (scene.draw_bus, 0.11)]
    special = [draw for draw, chance in rare if dice.chance(chance)]
    if street.tram:
        special.append(scene.draw_train)
    for x, direction in street.lanes:
        z = dice.between(11, 40) if direction > 0 else dice.between(8, 35)
        while z < 75:
            draw = scene.draw_car
            room = 2.5
            if special and dice.chance(0.6):
                draw = special.pop()
                room = 16.0 if draw is scene.draw_train else 6.0
            z += room
            yield Thing(z, partial(draw, x=x, z=z, ahead=(0.0, float(direction))))
            z += room + dice.between(8, 40)
    if street.crossing and dice.chance(0.35):
        x, z = dice.between(-7, 7), (street.crossing[0] + street.crossing[1]) / 2
        ahead = (dice.pick((-1.0, 1.0)), 0.0)
        yield Thing(z, partial(scene.draw_car, x=x, z=z, ahead=ahead))


def _parked(dice: Dice, street: Street, side: Side) -> Iterator[Thing]:
    z, share = dice.between(5, 12), dice.between(0.2, 0.9)
    while side.parking and z < 75:
        if dice.chance(share) and not _in_crossing(street, z):
            x = side.curb - side.sign * dice.between(1.0, 1.15)
            draw = scene.draw_truck if dice.chance(0.006) else scene.draw_car
            ahead = (0.0, float(side.sign) if dice.chance(0.85) else -float(side.sign))
            yield Thing(z, partial(draw, x=x, z=z, ahead=ahead))
        z += dice.between(5.3, 6.3)


def _people(dice: Dice, street: Street) -> Iterator[Thing]:
    for _ in range(int(dice.between(0, 3.2 * street.district.crowd + 1))):
        side = dice.pick(street.sides)
        x = side.curb + side.sign * dice.between(0.5, side.verge + side.walk - 0.4)
        z = 4.5 + 30 * dice.between(0, 1) * dice.between(0, 1)
        yield Thing(z, partial(scene.draw_person, x=x, z=z))
    if street.crossing and dice.chance(0.25):
        for _ in range(dice.pick((1, 2, 3))):
            x, z = dice.between(-5, 4), street.crossing[0] - dice.between(1.5, 3.5)
            yield Thing(z, partial(scene.draw_person, x=x, z=z))


_HEADINGS = ((0.0, 1.0), (0.0, -1.0), (0.6, 0.8), (-0.6, -0.8), (1.0, 0.0), (-1.0, 0.0))


def _two_wheelers(dice: Dice, street: Street) -> Iterator[Thing]:
    for chance, motor in ((0.12, False), (0.06, True)):
        if dice.chance(chance):
            side, z = dice.pick(street.sides), dice.between(6, 22)
            x = side.curb - side.sign * (3.0 if side.parking else dice.between(0.8, 1.6))
            ahead = dice.pick(_HEADINGS)
            draw = partial(scene.draw_rider, x=x, z=z, ahead=ahead, motor=motor)
            yield Thing(z, draw)
    for chance, draw, most in ((0.36, scene.draw_bicycle, 7), (0.07, scene.draw_motorcycle, 2)):
        if dice.chance(chance):
            side, z, ahead = dice.pick(street.sides), dice.between(5, 18), dice.pick(_HEADINGS)
            x = side.front - side.sign * dice.between(0.5, side.walk - 0.4)
            for _ in range(int(dice.between(1, most + 1))):
                yield Thing(z, partial(_draw_parked_cycle, cycle=draw, x=x, z=z, ahead=ahead))
                z += dice.between(0.6, 1.2)


def _draw_parked_cycle(
    canvas: Canvas, dice: Dice, cycle: Callable, x: float, z: float, ahead: tuple[float, float]
) -> None:
    cycle(canvas, dice, x, z, ahead)


def _things(dice: Dice, street: Street) -> list[Thing]:
    things = [*_street_end(dice, street)]
    for side in street.sides:
        things += _lots(dice, street, side)
        things += _furniture(dice, street, side)
        things += _parked(dice, street, side)
    things += _traffic(dice, street)
    things += _people(dice, street)
    things += _two_wheelers(dice, street)
    return sorted(things, key=lambda thing: -thing.z)


def render(seed: int, index: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    dice = Dice(seed, index)
    street, camera, light = _lay_out(dice), _aim(dice), _illuminate(dice)
    canvas = Canvas(camera, light, size, oversampling=max(2, min(4, 512 // size[0])))
    _draw_sky(canvas, dice)
    _draw_skyline(canvas, dice, street)
    _draw_ground(canvas, dice, street)
    for thing in _things(dice, street):
        thing.draw(canvas, dice)
    if dice.chance(0.8):
        scene.draw_hood(canvas, dice)
    image, label = canvas.shrink()
    return _photograph(image, label, camera, dice), label


_GRAIN = {
    "road": 0.10, "sidewalk": 0.12, "terrain": 0.3, "vegetation": 0.5, "building": 0.1,
    "wall": 0.16, "fence": 0.1, "pole": 0.05, "sky": 0.01,
}  # fmt: skip


def _photograph(image: np.ndarray, label: np.ndarray, camera: Camera, dice: Dice) -> np.ndarray:
    h, w = label.shape
    grain = np.full(256, 0.04, np.float32)
    for name, amount in _GRAIN.items():
        grain[INFO.classes.index(name)] = amount
    octaves = (dice.noise(16, 32), dice.noise(32, 64), dice.noise(64, 128), dice.noise(128, 256))
    texture = sum(
        (weight * _smooth(noise, (h, w)) for noise, weight in zip(octaves, (0.2, 0.3, 0.3, 0.2), strict=True))
    )
    ground = _ground_texture(camera, (h, w), dice)
    on_ground = np.isin(label, [0, 1, 9])
    texture = np.where(on_ground, ground, texture) / 127.5 - 1
    picture = image * (1 + grain[label] * texture)[..., None]
    cast = np.array([dice.between(0.9, 1.1) for _ in range(3)], np.float32)
    contrast, brightness = dice.between(0.85, 1.2), dice.between(-12, 12)
    picture = ((picture - 110) * contrast + 110 + brightness) * cast
    blurred = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).filter(
        ImageFilter.GaussianBlur(h * dice.between(0.0, 0.006))
    )
    strength = dice.between(1.0, 7.0) / 128
    sensor = dice.noise(h, w, 3).astype(np.float32) - dice.noise(h, w, 3)
    return np.clip(np.asarray(blurred) + strength * sensor + 0.5, 0, 255).astype(np.uint8)


def _ground_texture(camera: Camera, size: tuple[int, int], dice: Dice) -> np.ndarray:
    """Noise that lies on the ground: float32 `[*size]` in [0,255]."""
    tile = Image.fromarray(dice.noise(512, 512))
    h, w = size
    f, c = camera.focal, camera.height
    # Picture (u, v) in heights; ground x = (u-yaw) c / (v-horizon), z = f c / (v-horizon), in meters
    per_x, per_z = 20.0, 8.0
    k = -camera.horizon * h
    x = (c * per_x, 256.0, (-(w / 2 + camera.yaw * h)) * c * per_x + 256.0 * k)
    z = (0.0, 0.0, f * c * per_z * h)
    data = (*(value / k for value in x), *(value / k for value in z), 0.0, 1 / k)
    flat = tile.transform((w, h), Image.Transform.PERSPECTIVE, data, Image.Resampling.BILINEAR, fillcolor=128)
    return np.asarray(flat, np.float32)
