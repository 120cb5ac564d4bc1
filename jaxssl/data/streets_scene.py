"""The painter of `jaxssl.data.streets`: how each thing in a street is drawn.

The world is measured in meters: x to the right of the camera, y up from the road, z ahead along the
street. A `Canvas` keeps image and label together, and things are drawn on it from far to near.
Choices depend on the world alone, never on the size of the picture, so that every size shows the
same scene; only correctly rounded arithmetic (+ - * / sqrt) enters, so that every machine does too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from math import sqrt
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
from PIL import Image, ImageDraw

from jaxssl.contracts import IGNORE_LABEL
from jaxssl.data.cityscapes import INFO

T = TypeVar("T")
Color: TypeAlias = tuple[float, float, float]
"""Red, green and blue, 0 to 255, as they look in white light."""
Point: TypeAlias = tuple[float, float, float]
"""x, y and z in the world; also a direction."""
Heading: TypeAlias = tuple[float, float]
"""Unit vector (x, z) along the ground."""
Ring: TypeAlias = tuple[tuple[float, float], ...]
"""An outline around the origin, about one unit away."""

UP: Point = (0.0, 1.0, 0.0)
TOWARD: Point = (0.0, 0.0, -1.0)
"""Normal of what faces the camera."""
NEAR, FAR = 1.2, 130.0
"""Where the world begins and ends, in z."""
CIRCLE: Ring = (
    (1.0, 0.0), (0.866, 0.5), (0.5, 0.866), (0.0, 1.0), (-0.5, 0.866), (-0.866, 0.5),
    (-1.0, 0.0), (-0.866, -0.5), (-0.5, -0.866), (0.0, -1.0), (0.5, -0.866), (0.866, -0.5),
)  # fmt: skip

FACADES: tuple[tuple[Color, ...], ...] = (
    ((214, 196, 160), (226, 214, 190), (201, 178, 140), (190, 160, 130)),
    ((150, 84, 66), (170, 100, 80), (128, 74, 62), (184, 130, 104)),
    ((160, 160, 158), (140, 142, 146), (178, 176, 170), (118, 120, 124)),
    ((220, 180, 170), (180, 200, 190), (230, 215, 160), (170, 190, 215)),
    ((110, 130, 150), (90, 110, 130), (140, 160, 175)),
    ((90, 80, 76), (104, 98, 96), (76, 74, 80)),
    ((238, 236, 230), (220, 220, 216), (205, 208, 212)),
)
"""Families of colors: plaster, brick, concrete, pastel, glass, dark, white."""
TILES: tuple[Color, ...] = ((150, 74, 56), (96, 84, 80), (120, 92, 76))
MASONRY: tuple[Color, ...] = (
    (150, 146, 138), (110, 92, 74), (170, 160, 150), (84, 88, 92), (128, 78, 62),
)  # fmt: skip
ASPHALT: tuple[Color, ...] = ((96, 96, 98), (112, 110, 108), (82, 82, 86), (124, 118, 112))
PAVING: tuple[Color, ...] = (
    (164, 160, 152), (178, 174, 166), (150, 118, 104), (128, 126, 124), (142, 136, 124),
)  # fmt: skip
GRASS: tuple[Color, ...] = (
    (104, 140, 66), (88, 122, 58), (126, 138, 78), (160, 148, 98), (132, 112, 86), (112, 128, 84),
)  # fmt: skip
_BARE: Color = (104, 92, 76)
_FOLIAGE: tuple[Color, ...] = (
    (84, 120, 50), (66, 104, 48), (104, 136, 58), (48, 84, 48), (128, 132, 60), (170, 112, 44),
    (150, 84, 40), _BARE,
)  # fmt: skip
_CAR_PAINT: tuple[Color, ...] = (
    (228, 228, 226), (30, 31, 34), (150, 154, 158), (92, 96, 102), (52, 56, 60), (168, 32, 36),
    (40, 62, 120), (190, 190, 186), (62, 84, 74), (176, 158, 124), (112, 40, 44), (88, 120, 160),
    (220, 190, 60),
)  # fmt: skip
_COACH_PAINT: tuple[Color, ...] = (
    (196, 44, 40), (222, 186, 60), (236, 236, 232), (52, 92, 150), (70, 130, 90),
)  # fmt: skip
_CLOTHES: tuple[Color, ...] = (
    (34, 36, 44), (60, 66, 92), (120, 118, 116), (176, 48, 48), (204, 200, 190), (52, 84, 140),
    (96, 80, 62), (72, 96, 70), (196, 160, 60), (140, 84, 120), (228, 230, 232),
)  # fmt: skip
_SKIN: tuple[Color, ...] = ((224, 180, 152), (196, 144, 112), (140, 96, 72), (92, 62, 48))
_HAIR: tuple[Color, ...] = ((40, 32, 28), (90, 66, 44), (160, 140, 110))
_WHITE: Color = (236, 236, 232)
_RED: Color = (196, 36, 36)
_BLUE: Color = (36, 78, 160)
_GLASS: Color = (46, 54, 64)
_RUBBER: Color = (26, 26, 28)
_METAL: Color = (124, 126, 128)
_SHADOW: Color = (12, 12, 16)

_CLASS = {name: index for index, name in enumerate(INFO.classes)} | {"ignore": IGNORE_LABEL}


class Dice:
    """Makes the choices of a scene. Draws only uniform numbers, whose stream no NumPy changes."""

    def __init__(self, *entropy: int):
        self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
        self._random = self._generator.random

    def between(self, low: float, high: float) -> float:
        """A uniform number."""
        return low + (high - low) * self._random()

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._random() < probability

    def pick(self, items: Sequence[T]) -> T:
        """One of the items, each as likely."""
        return items[int(self._random() * len(items))]

    def vary(self, color: Color, spread: float) -> Color:
        """Changes the brightness by up to `spread`, and each channel by a third of that."""
        gain = self.between(1 - spread, 1 + spread)
        red, green, blue = (c * gain * self.between(1 - spread / 3, 1 + spread / 3) for c in color)
        return red, green, blue

    def noise(self, *shape: int) -> np.ndarray:
        """Uniform bytes: uint8 `[*shape]`."""
        return np.frombuffer(self._generator.bytes(int(np.prod(shape))), np.uint8).reshape(shape)


class Camera(NamedTuple):
    """A pinhole camera. Its unit on the picture is the picture's height.

    Attributes:
      height: meters above the road.
      focal: focal length.
      horizon: distance of the horizon from the top.
      yaw: distance of the vanishing point from the middle, to the right.
      roll: slope of the horizon.
      bend: how far the street has turned aside after z meters, over z squared.
    """

    height: float
    focal: float
    horizon: float
    yaw: float
    roll: float
    bend: float


class Light(NamedTuple):
    """What colors the scene.

    Attributes:
      zenith: color of the sky above.
      horizon: color of the sky below, and of haze.
      ambient: light from everywhere, per channel; 1 shows a color as it is.
      sun: light added where a surface faces the sun.
      direction: towards the sun.
      visibility: meters after which half of a color is haze.
    """

    zenith: Color
    horizon: Color
    ambient: Color
    sun: Color
    direction: Point
    visibility: float

    @property
    def clouds(self) -> float:
        """About the share of the sky that is covered, in [0,1]."""
        return 1 - self.sun[0]

    @property
    def lamps(self) -> bool:
        """Whether lamps and windows are lit."""
        return self.ambient[0] < 0.42

    def on(self, color: Color, normal: Point | None, z: float) -> tuple[int, int, int]:
        """The look of a surface z meters away; one without normal shines by itself."""
        r, g, b = color
        if normal is not None:
            # Not sum(): it rounds otherwise since Python 3.12.
            (nx, ny, nz), (sx, sy, sz) = normal, self.direction
            facing = max(0.0, nx * sx + ny * sy + nz * sz)
            r *= self.ambient[0] + self.sun[0] * facing
            g *= self.ambient[1] + self.sun[1] * facing
            b *= self.ambient[2] + self.sun[2] * facing
        haze = z / (z + self.visibility)
        r += (self.horizon[0] - r) * haze
        g += (self.horizon[1] - g) * haze
        b += (self.horizon[2] - b) * haze
        return min(255, int(r)), min(255, int(g)), min(255, int(b))


class Canvas:
    """A picture and its label, drawn on together in world coordinates.

    Both are `oversampling` times as large as the final picture. A color of None marks the label
    alone, a label of None paints the picture alone.
    """

    def __init__(self, camera: Camera, light: Light, size: tuple[int, int], oversampling: int):
        self.camera, self.light = camera, light
        self._oversampling = oversampling
        self._height, self._width = size[0] * oversampling, size[1] * oversampling
        self._image = Image.new("RGB", (self._width, self._height))
        self._label = Image.new("L", (self._width, self._height), IGNORE_LABEL)
        self._opaque = ImageDraw.Draw(self._image)
        self._glaze = ImageDraw.Draw(self._image, "RGBA")
        self._mark = ImageDraw.Draw(self._label)
        self._focal = camera.focal * self._height
        self._middle = self._width / 2 + camera.yaw * self._height

    def polygon(
        self,
        points: Iterable[Point],
        color: Color | None,
        label: str | None = None,
        normal: Point | None = UP,
        opacity: float = 1.0,
    ) -> None:
        """Fills a polygon; its first point decides how hazy it is."""
        points = tuple(points)
        self._fill(self._project(points), color, label, normal, points[0][2], opacity)

    def disc(
        self,
        center: Point,
        radius: float,
        color: Color,
        label: str | None = None,
        normal: Point | None = TOWARD,
        opacity: float = 1.0,
        ring: Ring = CIRCLE,
        squash: float = 1.0,
    ) -> None:
        """Fills a circle, or another ring, that faces the camera."""
        u, v = self._project((center,))
        wide = radius * self._focal / center[2]
        high = wide * squash
        corners = [value for a, b in ring for value in (u + wide * a, v - high * b)]
        self._fill(corners, color, label, normal, center[2], opacity)

    def line(
        self,
        start: Point,
        end: Point,
        width: float,
        color: Color,
        label: str | None = None,
        normal: Point | None = TOWARD,
    ) -> None:
        """Draws a bar, at least about one pixel of the final picture wide."""
        ends = self._project((start, end))
        pixels = round(max(width * self._focal / max(start[2], 0.6), 1.1 * self._oversampling))
        self._opaque.line(ends, self.light.on(color, normal, start[2]), pixels)
        if label is not None:
            self._mark.line(ends, _CLASS[label], pixels)

    def backdrop(self, picture: Image.Image, label: str) -> None:
        """Covers everything down to a little below the horizon."""
        size = (self._width, int(self._height * (self.camera.horizon + 0.05)))
        self._image.paste(picture.resize(size, Image.Resampling.BICUBIC), (0, 0))
        self._label.paste(_CLASS[label], (0, 0, *size))

    def shrink(self) -> tuple[np.ndarray, np.ndarray]:
        """The final picture, uint8 `[h,w,3]`, averaged, and its label, uint8 `[h,w]`, sampled."""
        n = self._oversampling
        label = np.asarray(self._label)[n // 2 :: n, n // 2 :: n]
        return np.asarray(self._image.reduce(n)), np.ascontiguousarray(label)

    def outward(self, points: Sequence[Point], inside: Point) -> Point | None:
        """The normal that points away from `inside`; None where the camera sees the back."""
        (x0, y0, z0), (x1, y1, z1), (x2, y2, z2) = points[0], points[1], points[-1]
        ax, ay, az, bx, by, bz = x1 - x0, y1 - y0, z1 - z0, x2 - x0, y2 - y0, z2 - z0
        nx, ny, nz = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
        norm = sqrt(nx * nx + ny * ny + nz * nz) or 1.0
        if nx * (x0 - inside[0]) + ny * (y0 - inside[1]) + nz * (z0 - inside[2]) < 0:
            norm = -norm
        # A bent street swings around the camera.
        away = (x0 + self.camera.bend * z0 * z0) * nx + (y0 - self.camera.height) * ny + z0 * nz
        return None if away / norm >= 0 else (nx / norm, ny / norm, nz / norm)

    def _project(self, points: Iterable[Point]) -> list[float]:
        """Column and row of every point on the canvas, in one list."""
        camera, focal, middle = self.camera, self._focal, self._middle
        bend, top = camera.bend * focal, camera.horizon * self._height
        corners = []
        for x, y, z in points:
            z = max(z, 0.6)
            u = middle + x * focal / z + bend * z
            v = top + (camera.height - y) * focal / z + camera.roll * (u - self._width / 2)
            corners += (u, v)
        return corners

    def _fill(
        self,
        corners: list[float],
        color: Color | None,
        label: str | None,
        normal: Point | None,
        z: float,
        opacity: float,
    ) -> None:
        columns = corners[::2]
        if max(columns) < 0 or min(columns) > self._width:
            return
        if color is not None:
            ink = self.light.on(color, normal, z)
            if opacity < 1:
                self._glaze.polygon(corners, (*ink, int(255 * opacity)))
            else:
                self._opaque.polygon(corners, ink)
        if label is not None:
            self._mark.polygon(corners, _CLASS[label])


class Thing(NamedTuple):
    """What stands in the street, z meters away; `draw` takes a canvas and dice."""

    z: float
    draw: Callable[[Canvas, Dice], Any]


class Face(NamedTuple):
    """An upright rectangle over a line on the ground, from (x0, z0) to (x1, z1)."""

    x0: float
    z0: float
    x1: float
    z1: float
    height: float
    normal: Point

    @property
    def length(self) -> float:
        """In meters, along the ground."""
        return sqrt((self.x1 - self.x0) ** 2 + (self.z1 - self.z0) ** 2)

    def at(self, a: float, y: float) -> Point:
        """The point a meters along the ground and y meters up."""
        s = a / self.length
        return self.x0 + s * (self.x1 - self.x0), y, self.z0 + s * (self.z1 - self.z0)

    def patch(self, a0: float, a1: float, y0: float, y1: float) -> tuple[Point, ...]:
        """Corners of a part."""
        (xa, _, za), (xb, _, zb) = self.at(a0, y0), self.at(a1, y0)
        return (xa, y0, za), (xb, y0, zb), (xb, y1, zb), (xa, y1, za)

    def band(self, y0: float, y1: float) -> tuple[Point, ...]:
        """Corners of a part of full length."""
        return self.patch(0, self.length, y0, y1)


class Frame(NamedTuple):
    """The box that a vehicle fills: its middle on the ground, its heading, its size."""

    x: float
    z: float
    ahead: Heading
    length: float
    width: float
    height: float

    @property
    def near_end(self) -> float:
        """The end closer to the camera: 0 for the rear, 1 for the front."""
        return 0.0 if self.ahead[1] > 0 else 1.0

    def at(self, s: float, t: float, side: float = 0.0) -> Point:
        """The point at s, rear 0 to front 1, t, ground 0 to top 1, and side, left -1 to right 1."""
        a, b = (s - 0.5) * self.length, side * self.width / 2
        dx, dz = self.ahead
        return self.x + a * dx + b * dz, t * self.height, self.z + a * dz - b * dx

    def flank(self, side: float, s0: float, s1: float, t0: float, t1: float) -> tuple[Point, ...]:
        """Corners of a part of one side."""
        return tuple(self.at(s, t, side) for s, t in ((s0, t0), (s1, t0), (s1, t1), (s0, t1)))

    def end(self, s: float, b0: float, b1: float, y0: float, y1: float) -> tuple[Point, ...]:
        """Corners of a part of one end, between two heights in meters."""
        t0, t1 = y0 / self.height, y1 / self.height
        return tuple(self.at(s, t, b) for t, b in ((t0, b0), (t0, b1), (t1, b1), (t1, b0)))

    def part(self, s0: float, s1: float, height: float) -> Frame:
        """The box from s0 to s1 only, with another height."""
        x, _, z = self.at((s0 + s1) / 2, 0)
        return Frame(x, z, self.ahead, (s1 - s0) * self.length, self.width, height)


class Outline(NamedTuple):
    """A vehicle from the side.

    Attributes:
      corners: (s, t) from the rear over the roof to the front.
      materials: what lies between corners: b for body, g for glass.
      taper: how much narrower the roof is than the body.
    """

    corners: tuple[tuple[float, float], ...]
    materials: str
    taper: float = 0.0


class CarModel(NamedTuple):
    """A kind of car; `pane` is the outline of its side windows, as (s, t)."""

    outline: Outline
    pane: tuple[tuple[float, float], ...]
    length: float
    height: float


_SEDAN = CarModel(
    Outline(
        ((0, 0.2), (0, 0.58), (0.03, 0.66), (0.15, 0.69), (0.29, 0.97), (0.34, 1), (0.58, 1),
         (0.62, 0.97), (0.75, 0.67), (0.96, 0.56), (1, 0.46), (1, 0.2)),
        "bbbgbbbgbbb", taper=0.22,
    ),
    ((0.19, 0.68), (0.7, 0.68), (0.61, 0.93), (0.31, 0.93)), 4.5, 1.45,
)  # fmt: skip
_HATCHBACK = CarModel(
    Outline(
        ((0, 0.2), (0, 0.55), (0.03, 0.64), (0.13, 0.95), (0.18, 1), (0.55, 1), (0.61, 0.97),
         (0.77, 0.65), (0.96, 0.55), (1, 0.44), (1, 0.2)),
        "bbgbbbgbbb", taper=0.22,
    ),
    ((0.09, 0.68), (0.72, 0.68), (0.6, 0.93), (0.16, 0.93)), 3.9, 1.5,
)  # fmt: skip
_WAGON = CarModel(
    Outline(
        ((0, 0.2), (0, 0.58), (0.06, 0.96), (0.1, 1), (0.66, 1), (0.7, 0.97), (0.82, 0.62),
         (0.97, 0.54), (1, 0.42), (1, 0.2)),
        "bgbbbgbbb", taper=0.18,
    ),
    ((0.06, 0.68), (0.77, 0.68), (0.69, 0.93), (0.09, 0.93)), 4.6, 1.55,
)  # fmt: skip
_VAN = _WAGON._replace(length=4.9, height=1.95)
_COACH = Outline(
    ((0, 0.1), (0, 0.5), (0.005, 0.86), (0.01, 0.98), (0.02, 1), (0.975, 1), (0.99, 0.9),
     (1, 0.42), (1, 0.1)),
    "bgbbbbgb",
)  # fmt: skip
_BOX = Outline(((0, 0.18), (0, 1), (1, 1), (1, 0.18)), "bbb")
_CAB = Outline(((0, 0.2), (0, 1), (0.8, 1), (0.96, 0.56), (1, 0.2)), "bbgb")


def draw_car(canvas: Canvas, dice: Dice, x: float, z: float, ahead: Heading) -> None:
    """Draws a sedan, hatchback, wagon or van."""
    model = dice.pick((_SEDAN, _SEDAN, _HATCHBACK, _HATCHBACK, _WAGON, _VAN))
    frame = Frame(x, z, ahead, model.length, 1.8, model.height * dice.between(0.96, 1.05))
    paint = dice.vary(dice.pick(_CAR_PAINT), 0.1)
    _draw_underside(canvas, frame, "car")
    if seen := _draw_body(canvas, frame, model.outline, paint, "car"):
        _draw_car_side(canvas, frame, model, *seen)
        _draw_wheels(canvas, frame, seen[0], (0.2, 0.8), 0.33, "car")
    _draw_lamps(canvas, frame, 0.72)


def draw_bus(canvas: Canvas, dice: Dice, x: float, z: float, ahead: Heading) -> None:
    """Draws a city bus."""
    frame = Frame(x, z, ahead, dice.between(9.5, 12.5), 2.5, dice.between(2.9, 3.3))
    paint = dice.vary(dice.pick(_COACH_PAINT), 0.1)
    stripe = dice.vary(dice.pick(_CAR_PAINT), 0.1)
    _draw_underside(canvas, frame, "bus")
    if seen := _draw_body(canvas, frame, _COACH, paint, "bus"):
        _draw_coach_side(canvas, frame, stripe, *seen)
        _draw_wheels(canvas, frame, seen[0], (0.2, 0.76), 0.48, "bus")
    _draw_route(canvas, frame)
    _draw_lamps(canvas, frame, 0.75)


def draw_train(canvas: Canvas, dice: Dice, x: float, z: float, ahead: Heading) -> None:
    """Draws a tram of two or three cars."""
    count = dice.pick((2, 3))
    length, height = count * dice.between(8.5, 10.5), dice.between(3.3, 3.7)
    paint = dice.vary(dice.pick(_COACH_PAINT), 0.1)
    stripe = dice.vary(dice.pick(_CAR_PAINT), 0.1)
    whole = Frame(x, z, ahead, length, 2.4, height)
    _draw_underside(canvas, whole, "train")
    cars = [whole.part(i / count, (i + 0.96) / count, height) for i in range(count)]
    for car in sorted(cars, key=lambda car: -car.z):
        if seen := _draw_body(canvas, car, _COACH, paint, "train"):
            _draw_coach_side(canvas, car, stripe, *seen)
    first = cars[int(whole.near_end) * (count - 1)]
    canvas.line(first.at(0.5, 1), first.at(0.65, 1.3), 0.08, _RUBBER, "train")
    _draw_route(canvas, first)
    _draw_lamps(canvas, first, 0.85)


def draw_truck(canvas: Canvas, dice: Dice, x: float, z: float, ahead: Heading) -> None:
    """Draws a truck with a high box or a low bed."""
    length, height = dice.between(5.8, 10.0), dice.between(2.6, 3.6)
    paint = dice.vary(dice.pick(_CAR_PAINT), 0.1)
    cargo = dice.vary(dice.pick((_WHITE, _WHITE, _BLUE, (190, 120, 50), (92, 110, 92))), 0.15)
    whole = Frame(x, z, ahead, length, 2.35, height)
    joint = 1 - 2.1 / length
    bed = whole.part(0, joint - 0.03, height if dice.chance(0.75) else 1.7)
    cab = whole.part(joint, 1, min(height, 2.7))
    _draw_underside(canvas, whole, "truck")
    for part in sorted((bed, cab), key=lambda part: -part.z):
        outline, color = (_BOX, cargo) if part is bed else (_CAB, paint)
        if seen := _draw_body(canvas, part, outline, color, "truck"):
            side, normal = seen
            if part is cab:
                window = part.flank(side, 0.25, 0.75, 0.58, 0.9)
                canvas.polygon(window, _GLASS, None, normal)
            _draw_wheels(canvas, part, side, (0.5,) if part is cab else (0.15, 0.33), 0.48, "truck")
    _draw_lamps(canvas, whole, 0.8)


def _draw_underside(canvas: Canvas, frame: Frame, label: str) -> None:
    """Draws the shadow on the road, and the tires as seen from either end."""
    flat = frame._replace(width=frame.width * 1.15, length=frame.length * 1.04)
    drift = 1.2 * canvas.light.direction[0] * canvas.light.sun[0]
    for reach, opacity in ((0.0, 0.5), (drift, 0.35)):
        corners = (flat.at(s, 0, side) for s, side in ((0, -1), (1, -1), (1, 1), (0, 1)))
        canvas.polygon(((x - reach, y, z) for x, y, z in corners), _SHADOW, None, UP, opacity)
    for s in sorted((0.06, 0.94), key=lambda s: -frame.at(s, 0)[2]):
        canvas.polygon(frame.end(s, -0.9, 0.9, 0.0, 0.5), _RUBBER, label)


def _draw_body(
    canvas: Canvas, frame: Frame, outline: Outline, paint: Color, label: str
) -> tuple[float, Point] | None:
    """Draws an outline, as wide as its frame.

    Returns:
      The side, -1 or 1, that the camera sees, and its normal; None where it sees no side.
    """
    inside = frame.at(0.5, 0.4)

    def edge(side: float) -> list[Point]:
        return [
            frame.at(s, t, side * (1 - outline.taper * max(0.0, t - 0.6) / 0.4))
            for s, t in outline.corners
        ]

    left, right = edge(-1), edge(1)
    pairs = itertools.pairwise(zip(left, right, strict=True))
    strips = [
        ((a, c, d, b), _GLASS if material == "g" else paint)
        for material, ((a, b), (c, d)) in zip(outline.materials, pairs, strict=True)
    ]
    for points, color in sorted(strips, key=lambda strip: -strip[0][0][2] - strip[0][1][2]):
        if normal := canvas.outward(points, inside):
            canvas.polygon(points, color, label, normal)
    for side, points in ((-1.0, left), (1.0, right)):
        if normal := canvas.outward(points, inside):
            canvas.polygon(points, paint, label, normal)
            return side, normal
    return None


def _draw_wheels(
    canvas: Canvas, frame: Frame, side: float, places: Sequence[float], radius: float, label: str
) -> None:
    for s, (share, color) in itertools.product(places, ((1.0, _RUBBER), (0.58, _METAL))):
        wide, high = radius * share / frame.length, radius * share / frame.height
        hub = radius / frame.height
        rim = (frame.at(s + wide * a, hub + high * b, side * 1.01) for a, b in CIRCLE)
        canvas.polygon(rim, color, label, (0.0, 0.6, -0.5))


def _draw_lamps(canvas: Canvas, frame: Frame, y: float) -> None:
    """Draws lamps, plate and grille of the end that the camera sees, y meters up."""
    s = frame.near_end
    if not canvas.outward(frame.end(s, -1, 1, 0.3, y), frame.at(0.5, 0.2)):
        return
    color: Color = (226, 226, 214) if s else (176, 24, 28)
    canvas.polygon(frame.end(s, -0.2, 0.2, y - 0.25, y - 0.12), (214, 214, 200), None, TOWARD)
    if s:
        canvas.polygon(frame.end(s, -0.55, 0.55, y - 0.07, y + 0.06), _RUBBER, None, TOWARD)
    for b in (-0.8, 0.8):
        lamp = frame.end(s, b - 0.15, b + 0.15, y - 0.08, y + 0.08)
        canvas.polygon(lamp, color, None, None if canvas.light.lamps else (0.0, 0.6, -0.6))
        _draw_glow(canvas, frame.at(s, y / frame.height, b), 0.5, color)


def _draw_car_side(
    canvas: Canvas, frame: Frame, model: CarModel, side: float, normal: Point
) -> None:
    """Draws the side windows with their pillars, and the sill."""
    lower, upper = side * 0.97, side * (1 - 0.8 * model.outline.taper)
    pane = [frame.at(s, t, lower if t < 0.8 else upper) for s, t in model.pane]
    canvas.polygon(pane, _GLASS, None, normal)
    (back, bottom), (front, _), (_, top), _ = model.pane
    for share in (0.5, 0.15) if model.length > 4.5 else (0.5,):
        s = back + share * (front - back)
        canvas.line(frame.at(s, bottom, lower), frame.at(s, top, upper), 0.06, _RUBBER)
    canvas.polygon(frame.flank(side, 0.1, 0.9, 0.2, 0.27), (40, 40, 42), None, normal)


def _draw_coach_side(
    canvas: Canvas, frame: Frame, stripe: Color, side: float, normal: Point
) -> None:
    """Draws a window band with pillars, a stripe, doors and a skirt."""
    parts: list[tuple[float, float, float, float, Color]] = [
        (0.0, 1.0, 0.26, 0.36, stripe),
        (0.03, 0.97, 0.48, 0.82, _GLASS),
        *((i / 7 - 0.006, i / 7 + 0.006, 0.48, 0.82, (84, 86, 88)) for i in range(1, 7)),
        *((s, s + 0.09, 0.12, 0.8, (58, 66, 74)) for s in (0.3, 0.86)),
        (0.0, 1.0, 0.1, 0.15, (44, 44, 46)),
    ]
    for s0, s1, t0, t1, color in parts:
        canvas.polygon(frame.flank(side, s0, s1, t0, t1), color, None, normal)


def _draw_route(canvas: Canvas, frame: Frame) -> None:
    """Draws the lit name of the line above the window."""
    top, s = frame.height, frame.near_end
    board = frame.end(s, -0.5, 0.5, 0.87 * top, 0.95 * top)
    if canvas.outward(board, frame.at(0.5, 0.9)):
        canvas.polygon(board, _RUBBER, None, TOWARD)
        canvas.polygon(frame.end(s, -0.3, 0.3, 0.9 * top, 0.92 * top), (250, 180, 60), None, None)


def draw_bicycle(canvas: Canvas, dice: Dice, x: float, z: float, ahead: Heading) -> Frame:
    """Draws a bicycle; its label also covers what one sees through it."""
    frame = Frame(x, z, ahead, 1.75, 0.5, 1.0)
    paint = dice.vary(dice.pick(_CAR_PAINT), 0.2)
    for s in (0.2, 0.8):
        rim = [frame.at(s + 0.34 * a / 1.75, 0.34 + 0.34 * b) for a, b in CIRCLE]
        canvas.polygon(rim, None, "bicycle")
        for start, end in itertools.pairwise((*rim, rim[0])):
            canvas.line(start, end, 0.05, _RUBBER, "bicycle")
    joints = ((0.2, 0.34), (0.38, 0.8), (0.7, 0.85), (0.8, 0.34), (0.48, 0.32))
    hub, saddle, stem, fork, pedal = (frame.at(s, t) for s, t in joints)
    canvas.polygon((hub, saddle, stem, fork, pedal), None, "bicycle")
    tubes = (
        (hub, saddle),
        (hub, pedal),
        (pedal, saddle),
        (pedal, stem),
        (saddle, stem),
        (stem, fork),
    )
    for start, end in tubes:
        canvas.line(start, end, 0.06, paint, "bicycle")
    canvas.line(frame.at(0.7, 1.0, -1), frame.at(0.7, 1.0, 1), 0.06, _RUBBER, "bicycle")
    canvas.line(frame.at(0.34, 0.88), frame.at(0.43, 0.88), 0.12, _RUBBER, "bicycle")
    return frame


def draw_motorcycle(canvas: Canvas, dice: Dice, x: float, z: float, ahead: Heading) -> Frame:
    """Draws a motorcycle."""
    frame = Frame(x, z, ahead, 2.0, 0.7, 1.05)
    paint = dice.vary(dice.pick(_CAR_PAINT), 0.15)
    shadow = (frame.at(s, 0, b) for s, b in ((0, -0.8), (1, -0.8), (1, 0.8), (0, 0.8)))
    canvas.polygon(shadow, _SHADOW, None, UP, 0.5)
    for s in (0.17, 0.83):
        canvas.line(frame.at(s, 0.0), frame.at(s, 0.6), 0.16, _RUBBER, "motorcycle")
    _draw_wheels(canvas, frame, 0.0, (0.17, 0.83), 0.31, "motorcycle")
    outline = (
        (0.02, 0.72), (0.3, 0.68), (0.5, 0.86), (0.66, 0.9), (0.78, 0.62), (0.66, 0.24),
        (0.36, 0.2), (0.24, 0.5),
    )  # fmt: skip
    for side in (-0.35, 0.35):
        body = (frame.at(s, t, side) for s, t in outline)
        canvas.polygon(body, paint, "motorcycle", (0.0, 0.5, -0.6))
    canvas.polygon(frame.flank(0.36, 0.42, 0.62, 0.2, 0.5), (60, 60, 64), None, TOWARD)
    canvas.line(frame.at(0.05, 0.74), frame.at(0.36, 0.72), 0.2, _RUBBER, "motorcycle")
    canvas.line(frame.at(0.83, 0.3), frame.at(0.7, 0.98), 0.1, _METAL, "motorcycle")
    canvas.line(frame.at(0.68, 0.98, -1), frame.at(0.68, 0.98, 1), 0.08, _RUBBER, "motorcycle")
    lamp, color = ((0.8, 0.8), _WHITE) if frame.near_end else ((0.0, 0.66), _RED)
    canvas.disc(frame.at(*lamp), 0.09, color, None, None)
    return frame


def draw_rider(canvas: Canvas, dice: Dice, x: float, z: float, ahead: Heading, motor: bool) -> None:
    """Draws someone on a bicycle or, with `motor`, on a motorcycle."""
    frame = (draw_motorcycle if motor else draw_bicycle)(canvas, dice, x, z, ahead)
    jacket, trousers = dice.pick(_CLOTHES), dice.pick(_CLOTHES[:8])
    top = dice.between(1.42, 1.55)
    for side in (-0.5, 0.5):
        knee = frame.at(0.58, 0.62 - 0.2 * side, side)
        canvas.line(frame.at(0.38, 0.86, side * 0.6), knee, 0.17, trousers, "rider")
        canvas.line(knee, frame.at(0.48, 0.28, side), 0.14, trousers, "rider")
    canvas.line(frame.at(0.38, 0.86), frame.at(0.55, top), 0.4, jacket, "rider")
    for side in (-0.7, 0.7):
        hand = frame.at(0.7, 1.02, side)
        canvas.line(frame.at(0.54, top - 0.08, side), hand, 0.11, jacket, "rider")
    canvas.disc(frame.at(0.6, top + 0.2), 0.14, dice.pick(_SKIN), "rider")
    if motor or dice.chance(0.5):
        helmet = dice.pick(_CAR_PAINT)
        canvas.disc(frame.at(0.6, top + 0.25), 0.17 if motor else 0.15, helmet, "rider")


def draw_person(canvas: Canvas, dice: Dice, x: float, z: float) -> None:
    """Draws someone on foot."""
    tall = dice.between(1.55, 1.9) if dice.chance(0.88) else dice.between(1.0, 1.4)
    coat, trousers = dice.pick(_CLOTHES), dice.pick(_CLOTHES[:8])
    hem, build = dice.pick((0.47, 0.47, 0.3)), dice.between(0.115, 0.14)
    stride, lean = dice.between(-0.16, 0.16), dice.between(-0.02, 0.02)

    def at(a: float, y: float) -> Point:
        return x + a * tall, y * tall, z

    shadow = ((x + 0.3 * a, 0.0, z + 0.35 * b) for a, b in CIRCLE)
    canvas.polygon(shadow, _SHADOW, None, UP, 0.4)
    for side in (-1, 1):
        foot = at(side * (0.04 + stride), 0.01)
        canvas.line(at(side * 0.05, 0.5), foot, 0.09 * tall, trousers, "person")
    torso = (
        at(-0.8 * build, hem), at(0.8 * build, hem), at(lean + build, 0.82), at(lean, 0.86),
        at(lean - build, 0.82),
    )  # fmt: skip
    canvas.polygon(torso, coat, "person", TOWARD)
    for side in (-1, 1):
        shoulder = at(lean + side * build * 0.95, 0.8)
        hand = at(side * (build + 0.02) - stride * 0.6, 0.48)
        canvas.line(shoulder, hand, 0.055 * tall, _scale(coat, 0.85), "person")
    canvas.disc(at(lean, 0.935), 0.068 * tall, dice.pick(_HAIR), "person")
    canvas.disc(at(lean, 0.915), 0.055 * tall, dice.pick(_SKIN), "person")


def _scale(color: Color, gain: float) -> Color:
    return color[0] * gain, color[1] * gain, color[2] * gain


class Tuft(NamedTuple):
    """A few leaves: how bright, where within the unit circle, how wide, their outline."""

    brightness: float
    a: float
    b: float
    radius: float
    ring: Ring


class Plants(NamedTuple):
    """What grows in a scene.

    Attributes:
      leaf: color.
      clumps: crowns to choose from, of tufts in no order.
      bare: whether one sees through a crown.
    """

    leaf: Color
    clumps: tuple[tuple[Tuft, ...], ...]
    bare: bool


def grow(dice: Dice) -> Plants:
    """Chooses season and species."""
    leaf = dice.pick(_FOLIAGE)
    rings = [_ragged(dice) for _ in range(8)]
    clumps = tuple(tuple(_tuft(dice, rings) for _ in range(22)) for _ in range(4))
    return Plants(dice.vary(leaf, 0.12), clumps, bare=leaf == _BARE)


def _ragged(dice: Dice) -> Ring:
    radii = [dice.between(0.75, 1.12) for _ in CIRCLE]
    return tuple((a * r, b * r) for (a, b), r in zip(CIRCLE, radii, strict=True))


def _tuft(dice: Dice, rings: Sequence[Ring]) -> Tuft:
    a, b = dice.between(-0.72, 0.72), dice.between(-0.72, 0.72)
    brightness = 0.8 + 0.32 * b + dice.between(-0.14, 0.14)
    return Tuft(brightness, a * sqrt(1 - 0.6 * b * b), b, dice.between(0.3, 0.5), dice.pick(rings))


def draw_tree(
    canvas: Canvas, dice: Dice, plants: Plants, x: float, z: float, height: float
) -> None:
    """Draws a tree, broad or slender."""
    bark = dice.vary((92, 76, 62), 0.2)
    width, crown = dice.pick(((0.72, 0.62), (0.6, 0.66), (0.9, 0.6), (0.3, 0.84)))
    canvas.line((x, 0, z), (x, 0.6 * height, z), 0.035 * height, bark, "vegetation")
    reach = 0.45 * width * height
    shadow = ((x + reach * a, 0.0, z + 0.6 * reach * b) for a, b in CIRCLE)
    canvas.polygon(shadow, _SHADOW, None, UP, 0.25)
    middle = (x, height * (1 - crown / 2), z)
    _draw_clump(canvas, dice, plants, middle, width * height, crown * height)


def draw_bush(canvas: Canvas, dice: Dice, plants: Plants, x: float, z: float) -> None:
    """Draws a bush."""
    height = dice.between(0.8, 2.2)
    width = height * dice.between(1.1, 2.0)
    _draw_clump(canvas, dice, plants, (x, height * 0.42, z), width, height)


def _draw_clump(
    canvas: Canvas, dice: Dice, plants: Plants, center: Point, width: float, height: float
) -> None:
    """Draws leaves within an ellipse, dark below and bright above, fewer far away."""
    x, y, z = center
    leaf, clump = dice.vary(plants.leaf, 0.12), dice.pick(plants.clumps)
    count = 22 if z < 12 else 11 if z < 24 else 5 if z < 45 else 3
    core = Tuft(0.6, 0.0, -0.06, 0.84, clump[0].ring)
    for tuft in (core, *sorted(clump[:count])):
        middle = (x + tuft.a * width / 2, y + tuft.b * height / 2, z)
        color, radius = _scale(leaf, tuft.brightness), tuft.radius * width / 2
        opacity = 0.55 if plants.bare else 1.0
        canvas.disc(
            middle, radius, color, "vegetation", UP, opacity, tuft.ring, squash=height / width
        )


def draw_treetops(canvas: Canvas, dice: Dice, plants: Plants, x: float, width: float) -> None:
    """Draws a wood on the horizon."""
    ring, color = dice.pick(plants.clumps)[0].ring, dice.vary(plants.leaf, 0.15)
    canvas.disc((x, 2.0, FAR), width * 0.7, color, "vegetation", UP, ring=ring)


def draw_hedge(canvas: Canvas, dice: Dice, plants: Plants, face: Face) -> None:
    """Draws a trimmed hedge."""
    leaf = dice.vary(plants.leaf, 0.12)
    steps = max(3, int(face.length / 0.7))
    places = [i * face.length / steps for i in range(steps + 1)]
    tops = [face.at(a, face.height * dice.between(0.88, 1.06)) for a in places]
    outline = (face.at(0, 0), *tops, face.at(face.length, 0))
    canvas.polygon(outline, leaf, "vegetation", face.normal)
    for a in places:
        middle = face.at(a, dice.between(0.2, 0.7) * face.height)
        ring = dice.pick(plants.clumps)[0].ring
        canvas.disc(middle, 0.35, _scale(leaf, 0.6), None, face.normal, 0.5, ring)


def draw_lamp(canvas: Canvas, dice: Dice, x: float, z: float) -> None:
    """Draws a street lamp, the higher ones with an arm."""
    height, color = dice.between(4.5, 8.5), dice.vary(_METAL, 0.35)
    canvas.line((x, 0, z), (x, height, z), 0.16, color, "pole")
    reach = 0.0 if height < 6 else -1.6 if x > 0 else 1.6
    bulb = (x + reach, height + 0.3, z)
    canvas.line((x, height, z), bulb, 0.1, color, "pole")
    lit = canvas.light.lamps
    canvas.disc(bulb, 0.28, (255, 226, 170) if lit else color, "pole", None if lit else UP)
    _draw_glow(canvas, bulb, 1.2, (255, 214, 150))


def _draw_glow(canvas: Canvas, center: Point, radius: float, color: Color) -> None:
    """Draws the light around a lamp that is lit."""
    for share in (1.0, 0.65, 0.4) if canvas.light.lamps else ():
        canvas.disc(center, radius * share, color, None, None, 0.14)


def draw_traffic_light(canvas: Canvas, dice: Dice, x: float, z: float) -> None:
    """Draws a traffic light, sometimes with a second one on an arm."""
    color, signal = dice.vary(_METAL, 0.3), dice.pick((0, 1, 2, 2))
    canvas.line((x, 0, z), (x, 3.6, z), 0.14, color, "pole")
    heads = [(x, 2.6)]
    if dice.chance(0.35):
        reach = x + (-3.2 if x > 0 else 3.2)
        canvas.line((x, 3.6, z), (x, 5.8, z), 0.16, color, "pole")
        canvas.line((x, 5.8, z), (reach, 5.8, z), 0.12, color, "pole")
        heads.append((reach, 5.2))
    lenses: tuple[Color, ...] = ((40, 220, 110), (255, 190, 40), (255, 50, 40))
    for middle, y in heads:
        case = Face(middle - 0.2, z, middle + 0.2, z, y + 1.1, TOWARD)
        canvas.polygon(case.band(y, y + 1.1), (28, 30, 30), "traffic light", TOWARD)
        for i, lens in enumerate(lenses):
            shine = lens if i == signal else _scale(lens, 0.25)
            canvas.disc((middle, y + 0.2 + 0.35 * i, z), 0.13, shine, None, None)


def draw_sign(canvas: Canvas, dice: Dice, x: float, z: float) -> None:
    """Draws a traffic sign on its pole."""
    canvas.line((x, 0, z), (x, 2.7, z), 0.08, dice.vary(_METAL, 0.2), "pole")
    kind, middle = dice.pick(("round", "triangle", "board", "square", "square")), (x, 2.6, z)
    if kind == "round":
        rim, inner = dice.pick(((_RED, _WHITE), (_BLUE, _BLUE), (_RED, _BLUE)))
        canvas.disc(middle, 0.38, rim, "traffic sign")
        canvas.disc(middle, 0.27, inner)
    elif kind == "triangle":
        up = dice.pick((1, -1))
        ring: Ring = ((-0.9, -0.6 * up), (0.9, -0.6 * up), (0.0, 0.9 * up))
        canvas.disc(middle, 0.5, _RED, "traffic sign", ring=ring)
        canvas.disc(middle, 0.3, _WHITE, ring=ring)
    else:
        width, height = (1.8, 1.0) if kind == "board" else (0.65, 0.65)
        color = dice.pick((_BLUE, _WHITE, (226, 184, 40), (40, 110, 70)))
        board = Face(x - width / 2, z, x + width / 2, z, height, TOWARD)
        plate = board.band(2.6 - height / 2, 2.6 + height / 2)
        canvas.polygon(plate, color, "traffic sign", TOWARD)
        text = board.patch(width * 0.2, width * 0.8, 2.5, 2.72)
        canvas.polygon(text, _BLUE if color == _WHITE else _WHITE, None, TOWARD)


class Facade(NamedTuple):
    """What the buildings of a scene have in common.

    Attributes:
      colors: to choose from.
      storey: its height in meters.
      pitch: meters from window to window.
      pane: share of pitch and storey that a window takes.
      roof: color; None for flat roofs.
      floors: least and greatest number.
      shops: share of buildings with shops.
    """

    colors: tuple[Color, ...]
    storey: float
    pitch: float
    pane: tuple[float, float]
    roof: Color | None
    floors: tuple[int, int]
    shops: float


def draw_building(
    canvas: Canvas, dice: Dice, style: Facade, x: float, z0: float, z1: float
) -> None:
    """Draws a building along the street, with its front at x."""
    outward = 1.0 if x > 0 else -1.0
    floors = int(dice.between(style.floors[0], style.floors[1] + 1))
    height = floors * style.storey + dice.between(0.6, 1.2)
    color, shop = dice.vary(dice.pick(style.colors), 0.12), dice.chance(style.shops)
    flank = Face(x, z0, x + outward * 11, z0, height, TOWARD)
    front = Face(x, z0, x, z1, height, (-outward, 0.0, 0.0))
    if style.roof is not None:
        _draw_roof(canvas, dice.vary(style.roof, 0.1), front, outward)
    for face in (flank, front):
        canvas.polygon(face.band(0, height), color, "building", face.normal)
    if dice.chance(0.6):
        _draw_windows(canvas, dice, style, flank, range(floors))
    _draw_trim(canvas, dice, style, front, color)
    if shop:
        _draw_shop(canvas, dice, style, front)
    _draw_windows(canvas, dice, style, front, range(1 if shop else 0, floors))


def draw_block(canvas: Canvas, dice: Dice, style: Facade, x0: float, x1: float, z: float) -> None:
    """Draws a building that stands across the street."""
    floors = int(dice.between(style.floors[0], style.floors[1] + 1))
    height = floors * style.storey + dice.between(0.6, 1.2)
    face = Face(x0, z, x1, z, height, TOWARD)
    color = dice.vary(dice.pick(style.colors), 0.12)
    canvas.polygon(face.band(0, height), color, "building", TOWARD)
    _draw_windows(canvas, dice, style, face, range(floors))


def _draw_roof(canvas: Canvas, color: Color, front: Face, outward: float) -> None:
    x, y, z0, z1 = front.x0, front.height, front.z0, front.z1
    ridge, rise = x + outward * 4.5, y + 3.0
    slope = ((x, y, z0), (x, y, z1), (ridge, rise, z1), (ridge, rise, z0))
    canvas.polygon(slope, color, "building", (-outward * 0.55, 0.83, 0.0))
    gable = ((x, y, z0), (ridge, rise, z0), (x + outward * 9, y, z0))
    canvas.polygon(gable, color, "building", TOWARD)


def _draw_trim(canvas: Canvas, dice: Dice, style: Facade, front: Face, color: Color) -> None:
    """Draws cornice and plinth, and sometimes a ledge below every floor."""
    trim = dice.vary(dice.pick(((230, 226, 216), color, (96, 90, 86))), 0.1)
    ledges = range(1, int(front.height / style.storey)) if dice.chance(0.3) else ()
    for y in ledges:
        ledge = front.band(y * style.storey - 0.1, y * style.storey + 0.1)
        canvas.polygon(ledge, trim, None, front.normal)
    cornice = front.band(front.height - 0.35, front.height)
    canvas.polygon(cornice, trim, None, front.normal)
    canvas.polygon(front.band(0.0, 0.6), _scale(color, 0.75), None, front.normal)


def _draw_shop(canvas: Canvas, dice: Dice, style: Facade, front: Face) -> None:
    board, inside = dice.vary(dice.pick(_CLOTHES), 0.2), dice.vary((70, 74, 78), 0.3)
    lit = canvas.light.lamps and dice.chance(0.6)
    length, top = front.length, style.storey
    pane = front.patch(0.5, length - 0.5, 0.5, top - 0.7)
    canvas.polygon(pane, (240, 210, 150) if lit else inside, None, None if lit else front.normal)
    canvas.polygon(front.band(top - 0.6, top - 0.05), board, None, front.normal)
    door = front.patch(length * 0.45, length * 0.45 + 1.1, 0, top - 0.7)
    canvas.polygon(door, (50, 46, 44), None, front.normal)
    if dice.chance(0.3):
        high = front.band(top, top)[:2]
        low = [(x + 1.2 * front.normal[0], y - 0.7, z) for x, y, z in reversed(high)]
        canvas.polygon((*high, *low), dice.pick(_CLOTHES), "building")


def _draw_windows(
    canvas: Canvas, dice: Dice, style: Facade, face: Face, floors: Iterable[int]
) -> None:
    """Draws rows of windows: framed when near, wider and fewer far away."""
    near, pitch = face.z0 < 20, style.pitch if face.z0 < 50 else 3 * style.pitch
    pitch = face.length / max(1, int(face.length / pitch))
    width, height = style.pane[0] * pitch, style.pane[1] * style.storey
    glass = dice.vary((70, 80, 92), 0.3)
    frame = dice.vary(dice.pick(((236, 234, 228), (90, 78, 68), (60, 62, 66))), 0.1)
    balcony = dice.chance(0.2)

    def draw(left: float, right: float, low: float, high: float, color: Color, lit: bool) -> None:
        patch = face.patch(left, right, low, high)
        canvas.polygon(patch, color, None, None if lit else face.normal)

    for floor, column in itertools.product(floors, range(round(face.length / pitch))):
        low, left = (floor + 0.3) * style.storey, (column + 0.5) * pitch - width / 2
        high, right = low + height, left + width
        lit = canvas.light.lamps and dice.chance(0.35)
        pane = dice.vary((250, 206, 130) if lit else glass, 0.12)
        if near:
            draw(left - 0.12, right + 0.12, low - 0.1, high + 0.1, frame, False)
        draw(left, right, low, high, pane, lit)
        if near and width > 0.8:
            middle = left + width / 2
            draw(middle - 0.05, middle + 0.05, low, high, frame, False)
        if balcony:
            draw(left - 0.3, right + 0.3, low - 0.3, low + 0.6, frame, False)


def draw_wall(canvas: Canvas, dice: Dice, color: Color, face: Face) -> None:
    """Draws a wall of bricks or slabs, sometimes daubed."""
    canvas.polygon(face.band(0, face.height), color, "wall", face.normal)
    bricks, dark = dice.chance(0.5), _scale(color, 0.8)
    courses = int(face.height / (0.35 if bricks else 0.9)) + 1
    for i in range(1, courses):
        y = i * face.height / courses
        canvas.polygon(face.band(y, y + 0.06), dark, None, face.normal)
    for i in range(int(face.length / 3)):
        joint = face.patch(3 * i, 3 * i + (0.4 if bricks else 0.1), 0, face.height)
        canvas.polygon(joint, dark, None, face.normal)
    canvas.polygon(face.band(face.height - 0.15, face.height + 0.1), _scale(color, 1.1), "wall")
    if dice.chance(0.3):
        a = dice.between(0, face.length * 0.6)
        daub = face.patch(a, a + 2.2, face.height * 0.25, face.height * 0.65)
        canvas.polygon(daub, dice.pick(_CLOTHES), None, face.normal, 0.6)


def draw_fence(canvas: Canvas, dice: Dice, color: Color, kind: str, face: Face) -> None:
    """Draws a fence; its label also covers what one sees through it.

    Args:
      canvas: to draw on.
      dice: not used.
      color: of all parts.
      kind: "boards", "mesh", "pickets" or "rail".
      face: the ground it stands on, and its height.
    """
    del dice
    spacing, cover = {
        "boards": (0.5, 1.0), "mesh": (2.2, 0.35), "pickets": (0.3, 0.0), "rail": (2.5, 0.0),
    }[kind]  # fmt: skip
    canvas.polygon(face.band(0, face.height), color, "fence", face.normal, cover)
    bar = _scale(color, 0.75) if kind == "boards" else color
    for i in range(int(face.length / spacing)):
        foot, head = face.at(i * spacing, 0), face.at(i * spacing, face.height)
        if foot[2] < 30:
            canvas.line(foot, head, 0.07, bar, None, face.normal)
    for share in (0.25, 0.6, 0.92) if kind == "rail" else (0.2, 0.92):
        y = share * face.height
        canvas.polygon(face.band(y, y + 0.09), color, None, face.normal)


_SLICES = (NEAR, 2.5, 4.0, 6.0, 9.0, 14.0, 21.0, 32.0, 48.0, 72.0, FAR)


def draw_strip(
    canvas: Canvas,
    xs: tuple[float, float],
    zs: tuple[float, float],
    color: Color,
    label: str | None = None,
    opacity: float = 1.0,
) -> None:
    """Draws a strip of ground between two x and two z; it bends with the street."""
    (x0, x1), (z0, z1) = xs, zs
    for near, far in itertools.pairwise((z0, *(z for z in _SLICES if z0 < z < z1), z1)):
        points = ((x0, 0.0, near), (x1, 0.0, near), (x1, 0.0, far), (x0, 0.0, far))
        canvas.polygon(points, color, label, UP, opacity)


def draw_hood(canvas: Canvas, dice: Dice) -> None:
    """Draws the car that carries the camera, which has no class."""
    camera, depth = canvas.camera, dice.between(0.02, 0.09)
    unit = NEAR / camera.focal
    paint = dice.vary(dice.pick(_CAR_PAINT[1:5]), 0.3)
    for drop, color in ((0.0, paint), (0.012, dice.vary(paint, 0.15))):
        y = camera.height - (1.25 - depth + drop - camera.horizon) * unit
        x = -camera.yaw * unit
        canvas.disc((x, y, NEAR), 1.05 * unit, color, "ignore", UP, squash=0.24)
