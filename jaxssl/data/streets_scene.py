"""The painter of `jaxssl.data.streets`: what a street consists of, and how each thing is drawn.

The world is measured in meters: x to the right of the camera, y up from the road, z ahead along the
street. Everything is drawn far to near on a `Canvas`, which keeps image and label together. Choices
depend on the world alone, never on the size of the picture, so that any size shows the same scene.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import sqrt
from operator import mul
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
from PIL import Image, ImageDraw

from jaxssl.contracts import IGNORE_LABEL
from jaxssl.data.cityscapes import INFO

T = TypeVar("T")
Color: TypeAlias = tuple[float, float, float]
"""Red, green, blue in [0,255], as they look in white light."""
Point: TypeAlias = tuple[float, float, float]
"""x, y, z in the world; also a direction."""

Ring: TypeAlias = tuple[tuple[float, float], ...]
"""An outline around the origin, about one unit away."""

UP: Point = (0.0, 1.0, 0.0)
TOWARD: Point = (0.0, 0.0, -1.0)

_CLASS = {name: index for index, name in enumerate(INFO.classes)} | {"ignore": IGNORE_LABEL}
NEAR, FAR = 1.2, 130.0
_SLICES = (NEAR, 2.5, 4.0, 6.0, 9.0, 14.0, 21.0, 32.0, 48.0, 72.0, FAR)
RING: Ring = (
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
_FOLIAGE: tuple[Color, ...] = (
    (84, 120, 50), (66, 104, 48), (104, 136, 58), (48, 84, 48), (128, 132, 60), (170, 112, 44),
    (150, 84, 40), (104, 92, 76),
)  # fmt: skip
ASPHALT: tuple[Color, ...] = ((96, 96, 98), (112, 110, 108), (82, 82, 86), (124, 118, 112))
MASONRY: tuple[Color, ...] = (
    (150, 146, 138), (110, 92, 74), (170, 160, 150), (84, 88, 92), (128, 78, 62),
)  # fmt: skip
GRASS: tuple[Color, ...] = (
    (104, 140, 66), (88, 122, 58), (126, 138, 78), (160, 148, 98), (132, 112, 86), (112, 128, 84),
)  # fmt: skip
PAVING: tuple[Color, ...] = (
    (164, 160, 152), (178, 174, 166), (150, 118, 104), (128, 126, 124), (142, 136, 124),
)  # fmt: skip
CAR_PAINT: tuple[Color, ...] = (
    (228, 228, 226), (30, 31, 34), (150, 154, 158), (92, 96, 102), (168, 32, 36), (40, 62, 120),
    (190, 190, 186), (52, 56, 60), (62, 84, 74), (176, 158, 124), (112, 40, 44), (88, 120, 160),
    (220, 190, 60),
)  # fmt: skip
CLOTHES: tuple[Color, ...] = (
    (34, 36, 44), (60, 66, 92), (120, 118, 116), (176, 48, 48), (204, 200, 190), (52, 84, 140),
    (96, 80, 62), (72, 96, 70), (196, 160, 60), (140, 84, 120), (228, 230, 232),
)  # fmt: skip
_SKIN: tuple[Color, ...] = ((224, 180, 152), (196, 144, 112), (140, 96, 72), (92, 62, 48))
_GLASS: Color = (46, 54, 64)
_RUBBER: Color = (26, 26, 28)
_METAL: Color = (124, 126, 128)


class Dice:
    """The choices of a scene. Only uniform numbers are drawn, whose stream every NumPy shares."""

    def __init__(self, *entropy: int):
        self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
        self._random = self._generator.random

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self._random()

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self._random() * len(items))]

    def vary(self, color: Color, spread: float) -> Color:
        """Changes the brightness, and each channel by a third as much."""
        gain = self.between(1 - spread, 1 + spread)
        red, green, blue = (c * gain * self.between(1 - spread / 3, 1 + spread / 3) for c in color)
        return red, green, blue

    def noise(self, *shape: int) -> np.ndarray:
        """Uniform bytes."""
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
      sun: light on a surface that faces the sun.
      direction: towards the sun.
      visibility: meters after which half of a color is haze.
      clouds: share of the sky that is covered, about.
      lamps: whether lamps and windows are lit.
    """

    zenith: Color
    horizon: Color
    ambient: Color
    sun: Color
    direction: Point
    visibility: float
    clouds: float
    lamps: bool

    def on(self, color: Color, normal: Point | None, z: float) -> tuple[int, int, int]:
        """Color of a surface z meters away; one without normal shines by itself."""
        fog = z / (z + self.visibility)
        keep = 1 - fog
        haze_r, haze_g, haze_b = self.horizon
        r, g, b = color
        if normal is not None:
            facing = sum(map(mul, normal, self.direction))
            facing = max(0.0, facing)
            r *= self.ambient[0] + self.sun[0] * facing
            g *= self.ambient[1] + self.sun[1] * facing
            b *= self.ambient[2] + self.sun[2] * facing
        return (
            min(255, int(r * keep + haze_r * fog)),
            min(255, int(g * keep + haze_g * fog)),
            min(255, int(b * keep + haze_b * fog)),
        )


class Canvas:
    """A picture and its label, drawn on together in world coordinates.

    Both are `oversampling` times larger than the final picture. A color of None draws the label
    alone, a label of None the picture alone.
    """

    def __init__(self, camera: Camera, light: Light, size: tuple[int, int], oversampling: int):
        self.camera, self.light = camera, light
        self._pixel = oversampling
        self._height, self._width = size[0] * oversampling, size[1] * oversampling
        self.image = Image.new("RGB", (self._width, self._height))
        self.label = Image.new("L", (self._width, self._height), IGNORE_LABEL)
        self._opaque = ImageDraw.Draw(self.image)
        self._glaze = ImageDraw.Draw(self.image, "RGBA")
        self._mark = ImageDraw.Draw(self.label)
        self._meter = camera.focal * self._height
        self._middle = self._width / 2 + camera.yaw * self._height

    def polygon(
        self,
        points: Sequence[Point],
        color: Color | None,
        label: str | None = None,
        normal: Point | None = UP,
        opacity: float = 1.0,
    ) -> None:
        corners: list[float] = []
        for point in points:
            corners += self._place(point)
        columns = corners[::2]
        if max(columns) < 0 or min(columns) > self._width:
            return
        self._fill(corners, color, label, normal, points[0][2], opacity)

    def line(
        self,
        start: Point,
        end: Point,
        width: float,
        color: Color | None,
        label: str | None = None,
        normal: Point | None = TOWARD,
    ) -> None:
        """Draws a bar `width` meters wide, and at least about one pixel of the final picture."""
        ends = (*self._place(start), *self._place(end))
        pixels = round(max(width * self._meter / start[2], 1.1 * self._pixel))
        if color is not None:
            self._opaque.line(ends, self.light.on(color, normal, start[2]), pixels)
        if label is not None:
            self._mark.line(ends, _CLASS[label], pixels)

    def disc(
        self,
        center: Point,
        radius: float,
        color: Color | None,
        label: str | None = None,
        normal: Point | None = TOWARD,
        opacity: float = 1.0,
        ring: Ring = RING,
        squash: float = 1.0,
    ) -> None:
        """Draws what faces the camera: a circle, or another outline about the center."""
        u, v = self._place(center)
        reach = radius * self._meter / center[2]
        if u + 2 * reach < 0 or u - 2 * reach > self._width:
            return
        rise = reach * squash
        corners: list[float] = []
        for a, b in ring:
            corners += (u + reach * a, v - rise * b)
        self._fill(corners, color, label, normal, center[2], opacity)

    def backdrop(self, picture: Image.Image, label: str) -> None:
        """Covers everything above the horizon."""
        rows = int(self._height * (self.camera.horizon + 0.05))
        size = (self._width, rows)
        self.image.paste(picture.resize(size, Image.Resampling.BICUBIC), (0, 0))
        self.label.paste(_CLASS[label], (0, 0, *size))

    def shrink(self) -> tuple[np.ndarray, np.ndarray]:
        """The final picture, uint8 `[h,w,3]`, and its label, uint8 `[h,w]`."""
        n = self._pixel
        label = np.ascontiguousarray(np.asarray(self.label)[n // 2 :: n, n // 2 :: n])
        return np.asarray(self.image.reduce(n)), label

    def outward(self, points: Sequence[Point], inside: Point) -> Point | None:
        """The normal that points away from `inside`; None where the camera sees the back."""
        (x0, y0, z0), (x1, y1, z1), (x2, y2, z2) = points[:3]
        ax, ay, az, bx, by, bz = x1 - x0, y1 - y0, z1 - z0, x2 - x0, y2 - y0, z2 - z0
        nx, ny, nz = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
        norm = sqrt(nx * nx + ny * ny + nz * nz) or 1.0
        if nx * (x0 - inside[0]) + ny * (y0 - inside[1]) + nz * (z0 - inside[2]) < 0:
            norm = -norm
        # A bent street swings around the camera.
        away = (x0 + self.camera.bend * z0 * z0) * nx + (y0 - self.camera.height) * ny + z0 * nz
        return None if away / norm >= 0 else (nx / norm, ny / norm, nz / norm)

    def _fill(
        self,
        corners: list[float],
        color: Color | None,
        label: str | None,
        normal: Point | None,
        z: float,
        opacity: float,
    ) -> None:
        if color is not None:
            ink = self.light.on(color, normal, z)
            if opacity < 1:
                self._glaze.polygon(corners, (*ink, int(255 * opacity)))
            else:
                self._opaque.polygon(corners, ink)
        if label is not None:
            self._mark.polygon(corners, _CLASS[label])

    def _place(self, point: Point) -> tuple[float, float]:
        """Column and row on the canvas."""
        x, y, z = point
        z = max(z, 0.6)
        camera, scale = self.camera, self._meter / z
        u = self._middle + x * scale + camera.bend * self._meter * z
        v = camera.horizon * self._height + (camera.height - y) * scale
        return u, v + camera.roll * (u - self._width / 2)


class Face(NamedTuple):
    """An upright rectangle over the line on the ground from (x0, z0) to (x1, z1)."""

    x0: float
    z0: float
    x1: float
    z1: float
    height: float
    normal: Point

    @property
    def length(self) -> float:
        return sqrt((self.x1 - self.x0) ** 2 + (self.z1 - self.z0) ** 2)

    def at(self, a: float, y: float) -> Point:
        """The point a meters along the ground and y meters up."""
        s = a / self.length
        return self.x0 + s * (self.x1 - self.x0), y, self.z0 + s * (self.z1 - self.z0)

    def patch(self, a0: float, a1: float, y0: float, y1: float) -> tuple[Point, ...]:
        return self.at(a0, y0), self.at(a1, y0), self.at(a1, y1), self.at(a0, y1)

    def whole(self) -> tuple[Point, ...]:
        return self.patch(0, self.length, 0, self.height)


class Frame(NamedTuple):
    """The space that a vehicle fills: where it stands, where it points to, how large it is."""

    x: float
    z: float
    ahead: tuple[float, float]
    length: float
    width: float
    height: float

    def at(self, s: float, t: float, side: float = 0.0) -> Point:
        """s from rear 0 to front 1, t from the ground 0 to the top 1, side from -1 to 1."""
        a, b = (s - 0.5) * self.length, side * self.width / 2
        dx, dz = self.ahead
        return self.x + a * dx + b * dz, t * self.height, self.z + a * dz - b * dx

    def part(self, s0: float, s1: float, height: float) -> Frame:
        """The same vehicle from s0 to s1 only, with another height."""
        x, _, z = self.at((s0 + s1) / 2, 0)
        return Frame(x, z, self.ahead, (s1 - s0) * self.length, self.width, height)


class Thing(NamedTuple):
    """What stands in the street, z meters away."""

    z: float
    draw: Callable[[Canvas, Dice], Any]


# The outline of a vehicle from the rear over the roof to the front, as (s, t); "g" is a pane.
_Outline: TypeAlias = tuple[tuple[tuple[float, float], ...], str]
_SEDAN: _Outline = (
    ((0, 0.2), (0, 0.58), (0.03, 0.66), (0.15, 0.69), (0.29, 0.97), (0.34, 1), (0.58, 1),
     (0.62, 0.97), (0.75, 0.67), (0.96, 0.56), (1, 0.46), (1, 0.2)),
    "bbbgbbbgbbb",
)  # fmt: skip
_HATCHBACK: _Outline = (
    ((0, 0.2), (0, 0.55), (0.03, 0.64), (0.13, 0.95), (0.18, 1), (0.55, 1), (0.61, 0.97),
     (0.77, 0.65), (0.96, 0.55), (1, 0.44), (1, 0.2)),
    "bbgbbbgbbb",
)  # fmt: skip
_WAGON: _Outline = (
    ((0, 0.2), (0, 0.58), (0.06, 0.96), (0.1, 1), (0.66, 1), (0.7, 0.97), (0.82, 0.62),
     (0.97, 0.54), (1, 0.42), (1, 0.2)),
    "bgbbbgbbb",
)  # fmt: skip
_COACH: _Outline = (
    ((0, 0.1), (0, 0.5), (0.005, 0.86), (0.01, 0.98), (0.02, 1), (0.975, 1), (0.99, 0.9),
     (1, 0.42), (1, 0.1)),
    "bgbbbbgb",
)  # fmt: skip
_BOX: _Outline = (((0, 0.18), (0, 1), (1, 1), (1, 0.18)), "bbb")
_CAB: _Outline = (((0, 0.2), (0, 1), (0.8, 1), (0.96, 0.56), (1, 0.2)), "bbgb")


def _draw_body(
    canvas: Canvas, frame: Frame, outline: _Outline, paint: Color, label: str, taper: float = 0.0
) -> tuple[float, Point] | None:
    """Draws a vehicle's outline, as wide as its frame.

    Args:
      canvas: to draw on.
      frame: of the vehicle.
      outline: from the rear over the roof to the front.
      paint: color of the body.
      label: class.
      taper: how much narrower the roof is.

    Returns:
      The side (-1 or 1) that the camera sees, and its normal, if it sees one.
    """
    corners, materials = outline
    inside = frame.at(0.5, 0.4)

    def at(corner: tuple[float, float], side: float) -> Point:
        return frame.at(*corner, side * (1 - taper * max(0.0, corner[1] - 0.6) / 0.4))

    strips = []
    for material, one, two in zip(materials, corners[:-1], corners[1:], strict=True):
        points = (at(one, -1), at(two, -1), at(two, 1), at(one, 1))
        strips.append((points, _GLASS if material == "g" else paint))
    for points, color in sorted(strips, key=lambda strip: -strip[0][0][2] - strip[0][1][2]):
        if normal := canvas.outward(points, inside):
            canvas.polygon(points, color, label, normal)
    for side in (-1.0, 1.0):
        points = [at(corner, side) for corner in corners]
        if normal := canvas.outward((points[0], points[1], points[-1]), inside):
            canvas.polygon(points, paint, label, normal)
            return side, normal
    return None


def _draw_shadow(canvas: Canvas, frame: Frame) -> None:
    flat = frame._replace(width=frame.width * 1.15, length=frame.length * 1.04)
    sun_x = canvas.light.direction[0] * canvas.light.sun[0]
    for reach, opacity in ((0.0, 0.5), (1.2 * sun_x, 0.35)):
        points = [flat.at(s, 0, side) for s, side in ((0, -1), (1, -1), (1, 1), (0, 1))]
        canvas.polygon([(x - reach, y, z) for x, y, z in points], (12, 12, 16), None, UP, opacity)


def _draw_wheels(
    canvas: Canvas, frame: Frame, side: float, places: Sequence[float], radius: float, label: str
) -> None:
    for s in places:
        for share, color in ((1.0, _RUBBER), (0.58, _METAL)):
            r = radius * share
            points = [
                frame.at(s + r * a / frame.length, (radius + r * b) / frame.height, side * 1.01)
                for a, b in RING
            ]
            canvas.polygon(points, color, label, (0.0, 0.6, -0.5))


def _draw_undercarriage(canvas: Canvas, frame: Frame, label: str) -> None:
    """Draws axle and tires as seen from the end."""
    for s in (0.06, 0.94):
        points = [frame.at(s, t, b) for t, b in ((0.0, -0.9), (0.0, 0.9), (0.3, 0.9), (0.3, -0.9))]
        canvas.polygon(points, _RUBBER, label, UP)


def _draw_lamps(canvas: Canvas, frame: Frame, height: float) -> None:
    """Draws the lamps and the plate of the end that the camera sees."""
    rear = frame.at(0, 0)[2] < frame.at(1, 0)[2]
    s = 0.0 if rear else 1.0
    edge = [frame.at(s, height, -1), frame.at(s, height, 1), frame.at(s, height * 0.8, 1)]
    if not canvas.outward(edge, frame.at(0.5, height)):
        return
    color: Color = (176, 24, 28) if rear else (226, 226, 214)
    shining = canvas.light.lamps
    low, high = height - 0.06, height + 0.05
    for b0, b1 in ((-0.96, -0.66), (0.66, 0.96)):
        points = [frame.at(s, t, b) for t, b in ((low, b0), (low, b1), (high, b1), (high, b0))]
        canvas.polygon(points, color, None, None if shining else (0.0, 0.6, -0.6))
        if shining:
            canvas.disc(points[0], 0.35, color, None, None, 0.25)
    plate = ((low - 0.1, -0.2), (low - 0.1, 0.2), (low, 0.2), (low, -0.2))
    canvas.polygon([frame.at(s, t, b) for t, b in plate], (214, 214, 200), None, TOWARD)
    if not rear:
        grille = ((low, -0.55), (low, 0.55), (high, 0.55), (high, -0.55))
        canvas.polygon([frame.at(s, t, b) for t, b in grille], _RUBBER, None, TOWARD)


def draw_car(canvas: Canvas, dice: Dice, x: float, z: float, ahead: tuple[float, float]) -> None:
    outline, length, height = dice.pick(
        ((_SEDAN, 4.5, 1.45), (_HATCHBACK, 3.9, 1.5), (_WAGON, 4.6, 1.55), (_WAGON, 4.9, 1.95))
    )
    frame = Frame(x, z, ahead, length, 1.8, height * dice.between(0.96, 1.05))
    paint = dice.vary(dice.pick(CAR_PAINT), 0.1)
    _draw_shadow(canvas, frame)
    _draw_undercarriage(canvas, frame, "car")
    seen = _draw_body(canvas, frame, outline, paint, "car", taper=0.22)
    if seen:
        side, normal = seen
        _draw_car_side(canvas, frame, outline, side, normal)
        _draw_wheels(canvas, frame, side, (0.2, 0.8), 0.33, "car")
    _draw_lamps(canvas, frame, 0.5)


def _draw_car_side(
    canvas: Canvas, frame: Frame, outline: _Outline, side: float, normal: Point
) -> None:
    """Draws the side windows with their pillars, and the sill."""
    upper = [s for s, t in outline[0] if t > 0.9]
    lower = [s for s, t in outline[0] if 0.5 < t < 0.7]
    back = max([s for s in lower if s < upper[0]], default=0.05)
    front = min([s for s in lower if s > upper[-1]], default=0.95)
    top, bottom, inset = 0.93, 0.68, 0.82
    pane = (
        (back + 0.04, bottom, 0.97), (front - 0.05, bottom, 0.97),
        (upper[-1] + 0.01, top, inset), (upper[0] + 0.02, top, inset),
    )  # fmt: skip
    canvas.polygon([frame.at(s, t, side * b) for s, t, b in pane], _GLASS, None, normal)
    middle = (back + front) / 2
    for s in (middle, middle - 0.19 if upper[0] < 0.2 else middle):
        pillar = (frame.at(s, bottom, side), frame.at(s, top, side * inset))
        canvas.line(*pillar, 0.06, (20, 22, 24), None, normal)
    sill = [frame.at(s, t, side) for s, t in ((0.1, 0.2), (0.9, 0.2), (0.9, 0.27), (0.1, 0.27))]
    canvas.polygon(sill, (40, 40, 42), None, normal)


def draw_bus(canvas: Canvas, dice: Dice, x: float, z: float, ahead: tuple[float, float]) -> None:
    frame = Frame(x, z, ahead, dice.between(9.5, 12.5), 2.5, dice.between(2.9, 3.3))
    colors = ((196, 44, 40), (222, 186, 60), (236, 236, 232), (52, 92, 150), (70, 130, 90))
    paint = dice.vary(dice.pick(colors), 0.1)
    stripe = dice.vary(dice.pick(CAR_PAINT), 0.1)
    _draw_shadow(canvas, frame)
    _draw_undercarriage(canvas, frame, "bus")
    if seen := _draw_body(canvas, frame, _COACH, paint, "bus"):
        _draw_coach_side(canvas, frame, seen, stripe, doors=(0.3, 0.86))
        _draw_wheels(canvas, frame, seen[0], (0.2, 0.76), 0.48, "bus")
    _draw_route(canvas, frame)
    _draw_lamps(canvas, frame, 0.24)


def draw_train(canvas: Canvas, dice: Dice, x: float, z: float, ahead: tuple[float, float]) -> None:
    """Draws a tram of several cars."""
    count = dice.pick((2, 3, 3))
    length = dice.between(8.5, 11.0)
    colors = ((214, 190, 80), (230, 230, 224), (178, 44, 44), (60, 110, 150), (88, 140, 96))
    paint = dice.vary(dice.pick(colors), 0.1)
    stripe = dice.vary(dice.pick(CAR_PAINT), 0.1)
    whole = Frame(x, z, ahead, length * count, 2.4, dice.between(3.3, 3.7))
    _draw_shadow(canvas, whole)
    edges = [i / count for i in range(count)]
    parts = [whole.part(s, s + 1 / count - 0.015, whole.height) for s in edges]
    for part in sorted(parts, key=lambda part: -part.z):
        if seen := _draw_body(canvas, part, _COACH, paint, "train"):
            _draw_coach_side(canvas, part, seen, stripe, doors=(0.25, 0.7))
    bow = whole.at(0.5, 1), whole.at(0.5 + 1 / whole.length, 1.35)
    canvas.line(*bow, 0.08, (40, 40, 44), "train")
    _draw_route(canvas, whole)
    _draw_lamps(canvas, whole, 0.22)


def _draw_coach_side(
    canvas: Canvas, frame: Frame, seen: tuple[float, Point], stripe: Color, doors: Sequence[float]
) -> None:
    """Draws a window band with pillars, a stripe and doors."""
    side, normal = seen

    def patch(s0: float, s1: float, t0: float, t1: float, color: Color) -> None:
        points = [frame.at(s, t, side) for s, t in ((s0, t0), (s1, t0), (s1, t1), (s0, t1))]
        canvas.polygon(points, color, None, normal)

    patch(0.0, 1.0, 0.26, 0.36, stripe)
    patch(0.03, 0.97, 0.48, 0.82, _GLASS)
    for i in range(1, 7):
        patch(i / 7 - 0.006, i / 7 + 0.006, 0.48, 0.82, (84, 86, 88))
    for s in doors:
        patch(s, s + 0.09, 0.12, 0.8, (58, 66, 74))
    patch(0.0, 1.0, 0.1, 0.15, (44, 44, 46))


def _draw_route(canvas: Canvas, frame: Frame) -> None:
    s = 0.0 if frame.at(0, 0)[2] < frame.at(1, 0)[2] else 0.985
    points = [frame.at(s, t, b) for t, b in ((0.87, -0.5), (0.87, 0.5), (0.95, 0.5), (0.95, -0.5))]
    if canvas.outward(points, frame.at(0.5, 0.9)):
        canvas.polygon(points, (24, 22, 20), None, TOWARD)
        inner = [frame.at(s, t, b) for t, b in ((0.9, -0.3), (0.9, 0.3), (0.92, 0.3), (0.92, -0.3))]
        canvas.polygon(inner, (250, 180, 60), None, None)


def draw_truck(canvas: Canvas, dice: Dice, x: float, z: float, ahead: tuple[float, float]) -> None:
    length = dice.between(5.8, 10.0)
    height = dice.between(2.6, 3.6)
    frame = Frame(x, z, ahead, length, 2.35, height)
    paint = dice.vary(dice.pick(CAR_PAINT), 0.1)
    white = dice.vary((226, 226, 222), 0.08)
    cargo = dice.vary(dice.pick((white, white, (58, 96, 150), (190, 120, 50), (92, 110, 92))), 0.1)
    loaded = dice.chance(0.75)
    joint = 1 - 2.1 / length
    box = frame.part(0, joint - 0.03, height if loaded else 1.7)
    cab = frame.part(joint, 1, min(height, 2.7))
    _draw_shadow(canvas, frame)
    _draw_undercarriage(canvas, frame._replace(height=2.4), "truck")
    for part, outline, color in sorted(
        ((box, _BOX, cargo), (cab, _CAB, paint)), key=lambda item: -item[0].z
    ):
        if seen := _draw_body(canvas, part, outline, color, "truck"):
            _draw_truck_side(canvas, part, seen, is_cab=part is cab)
    if seen := _side_seen(canvas, frame):
        _draw_wheels(canvas, frame, seen, (0.12, 0.26, 0.86), 0.48, "truck")
    _draw_lamps(canvas, frame, 0.26)


def _side_seen(canvas: Canvas, frame: Frame) -> float | None:
    for side in (-1.0, 1.0):
        points = (frame.at(0, 0.2, side), frame.at(0, 0.5, side), frame.at(1, 0.2, side))
        if canvas.outward(points, frame.at(0.5, 0.3)):
            return side
    return None


def _draw_truck_side(
    canvas: Canvas, part: Frame, seen: tuple[float, Point], *, is_cab: bool
) -> None:
    side, normal = seen
    if is_cab:
        window = ((0.25, 0.58), (0.85, 0.58), (0.72, 0.9), (0.25, 0.9))
        canvas.polygon([part.at(s, t, side) for s, t in window], _GLASS, None, normal)
        return
    for i in range(1, 6):
        canvas.line(part.at(i / 6, 0.2, side), part.at(i / 6, 1, side), 0.04, (150, 150, 150))
    skirt = ((0.0, 0.12), (1.0, 0.12), (1.0, 0.2), (0.0, 0.2))
    canvas.polygon([part.at(s, t, side) for s, t in skirt], (40, 40, 42), "truck", normal)


def draw_bicycle(
    canvas: Canvas, dice: Dice, x: float, z: float, ahead: tuple[float, float]
) -> Frame:
    frame = Frame(x, z, ahead, 1.75, 0.5, 1.0)
    paint = dice.vary(dice.pick(CAR_PAINT), 0.2)
    for s in (0.2, 0.8):
        rim = [frame.at(s + 0.34 * a / 1.75, 0.34 + 0.34 * b) for a, b in RING]
        canvas.polygon(rim, None, "bicycle")
        for one, two in zip(rim, (*rim[1:], rim[0]), strict=True):
            canvas.line(one, two, 0.05, _RUBBER, "bicycle")
    joints = ((0.2, 0.34), (0.38, 0.8), (0.48, 0.32), (0.7, 0.85), (0.8, 0.34))
    hub, saddle, pedal, stem, fork = (frame.at(s, t) for s, t in joints)
    canvas.polygon((hub, saddle, stem, fork, pedal), None, "bicycle")
    for one, two in ((hub, saddle), (hub, pedal), (pedal, saddle), (pedal, stem), (saddle, stem)):
        canvas.line(one, two, 0.06, paint, "bicycle")
    canvas.line(stem, fork, 0.06, paint, "bicycle")
    canvas.line(frame.at(0.7, 1.0, -1), frame.at(0.7, 1.0, 1), 0.06, _RUBBER, "bicycle")
    canvas.line(frame.at(0.34, 0.88), frame.at(0.43, 0.88), 0.12, _RUBBER, "bicycle")
    return frame


def draw_motorcycle(
    canvas: Canvas, dice: Dice, x: float, z: float, ahead: tuple[float, float]
) -> Frame:
    frame = Frame(x, z, ahead, 2.0, 0.7, 1.05)
    paint = dice.vary(dice.pick(CAR_PAINT), 0.15)
    _draw_shadow(canvas, frame)
    for s in (0.17, 0.83):
        for share, color in ((1.0, _RUBBER), (0.5, _METAL)):
            rim = [frame.at(s + 0.31 * share * a / 2, 0.3 + 0.3 * share * b) for a, b in RING]
            canvas.polygon(rim, color, "motorcycle", TOWARD)
        canvas.line(frame.at(s, 0.0), frame.at(s, 0.6), 0.16, _RUBBER, "motorcycle")
    outline = (
        (0.02, 0.72), (0.3, 0.68), (0.5, 0.86), (0.66, 0.9), (0.78, 0.62), (0.66, 0.24),
        (0.36, 0.2), (0.24, 0.5),
    )  # fmt: skip
    for side in (-0.35, 0.35):
        body = [frame.at(s, t, side) for s, t in outline]
        canvas.polygon(body, paint, "motorcycle", (0.0, 0.5, -0.6))
    engine = [frame.at(s, t, 0.36) for s, t in ((0.4, 0.2), (0.64, 0.2), (0.6, 0.5), (0.42, 0.5))]
    canvas.polygon(engine, (60, 60, 64), None, TOWARD)
    canvas.line(frame.at(0.05, 0.74), frame.at(0.36, 0.72), 0.2, _RUBBER, "motorcycle")
    canvas.line(frame.at(0.83, 0.3), frame.at(0.7, 0.98), 0.1, _METAL, "motorcycle")
    canvas.line(frame.at(0.68, 0.98, -1), frame.at(0.68, 0.98, 1), 0.08, _RUBBER, "motorcycle")
    end = frame.at(0, 0.66) if frame.at(0, 0)[2] < frame.at(1, 0)[2] else frame.at(0.8, 0.8)
    canvas.disc(end, 0.09, (200, 40, 40) if end[2] < z else (240, 240, 230), None, None)
    return frame


def draw_rider(
    canvas: Canvas, dice: Dice, x: float, z: float, ahead: tuple[float, float], motor: bool
) -> None:
    """Draws someone on a bicycle or, with `motor`, on a motorcycle."""
    frame = (draw_motorcycle if motor else draw_bicycle)(canvas, dice, x, z, ahead)
    jacket, trousers = dice.pick(CLOTHES), dice.pick(CLOTHES[:8])
    top, skin = dice.between(1.42, 1.55), dice.pick(_SKIN)
    seat, shoulder = frame.at(0.38, 0.86), frame.at(0.55, top)
    for side in (-0.5, 0.5):
        knee, foot = frame.at(0.58, 0.62 - 0.2 * side, side), frame.at(0.48, 0.28, side)
        canvas.line(frame.at(0.38, 0.86, side * 0.6), knee, 0.17, trousers, "rider")
        canvas.line(knee, foot, 0.14, trousers, "rider")
    canvas.line(seat, shoulder, 0.4, jacket, "rider")
    for side in (-0.7, 0.7):
        hand = frame.at(0.7, 1.02, side)
        canvas.line(frame.at(0.54, top - 0.08, side), hand, 0.11, jacket, "rider")
    head = frame.at(0.6, top + 0.2)
    canvas.disc(head, 0.14, skin, "rider")
    if motor or dice.chance(0.5):
        helmet = (head[0], head[1] + 0.05, head[2])
        canvas.disc(helmet, 0.17 if motor else 0.15, dice.pick(CAR_PAINT), "rider")


def draw_person(canvas: Canvas, dice: Dice, x: float, z: float) -> None:
    height = dice.between(1.55, 1.9) if dice.chance(0.88) else dice.between(1.0, 1.4)
    top, trousers = dice.pick(CLOTHES), dice.pick(CLOTHES[:8])
    skin, hair = dice.pick(_SKIN), dice.pick(((40, 32, 28), (90, 66, 44), (160, 140, 110)))
    stride, lean = dice.between(-0.16, 0.16) * height, dice.between(-0.03, 0.03)
    hem = dice.pick((0.47, 0.47, 0.3)) * height
    build = height * dice.between(0.115, 0.14)
    shadow = [(x + 0.3 * a, 0.0, z + 0.35 * b) for a, b in RING]
    canvas.polygon(shadow, (12, 12, 16), None, UP, 0.4)
    for side in (-1, 1):
        hip = (x + side * 0.05 * height, 0.5 * height, z)
        foot = (x + side * (0.04 * height + stride), 0.02, z)
        canvas.line(hip, foot, 0.09 * height, trousers, "person")
    shoulders = 0.82 * height
    torso = (
        (x - build * 0.8, hem, z), (x + build * 0.8, hem, z), (x + lean + build, shoulders, z),
        (x + lean, shoulders + 0.04 * height, z), (x + lean - build, shoulders, z),
    )  # fmt: skip
    canvas.polygon(torso, top, "person", TOWARD)
    sleeve: Color = (top[0] * 0.85, top[1] * 0.85, top[2] * 0.85)
    for side in (-1, 1):
        hand = (x + side * (build + 0.02 * height) - stride * 0.6, 0.48 * height, z)
        arm = (x + lean + side * build * 0.95, shoulders - 0.02 * height, z)
        canvas.line(arm, hand, 0.055 * height, sleeve, "person")
    canvas.disc((x + lean, 0.935 * height, z), 0.068 * height, hair, "person")
    canvas.disc((x + lean, 0.915 * height, z), 0.055 * height, skin, "person")


class Tuft(NamedTuple):
    """A few leaves, placed within the unit circle."""

    brightness: float
    a: float
    b: float
    radius: float
    ring: Ring


class Plants(NamedTuple):
    """What grows in a scene.

    Attributes:
      leaf: color.
      clumps: leaves to choose from, each in no order.
      bare: whether branches show.
    """

    leaf: Color
    clumps: tuple[tuple[Tuft, ...], ...]
    bare: bool


def grow(dice: Dice) -> Plants:
    """Chooses the season and the species."""
    leaf = dice.pick(_FOLIAGE)
    rings = [_ragged(dice) for _ in range(8)]
    clumps = tuple(tuple(_tuft(dice, rings) for _ in range(22)) for _ in range(4))
    return Plants(dice.vary(leaf, 0.12), clumps, bare=leaf is _FOLIAGE[-1])


def _ragged(dice: Dice) -> Ring:
    radii = [dice.between(0.7, 1.15) for _ in RING]
    return tuple((a * r, b * r) for (a, b), r in zip(RING, radii, strict=True))


def _tuft(dice: Dice, rings: Sequence[Ring]) -> Tuft:
    a, b = dice.between(-0.72, 0.72), dice.between(-0.72, 0.72)
    brightness = 0.8 + 0.32 * b + dice.between(-0.14, 0.14)
    return Tuft(brightness, a * sqrt(1 - 0.6 * b * b), b, dice.between(0.3, 0.5), dice.pick(rings))


def _draw_clump(
    canvas: Canvas, dice: Dice, plants: Plants, center: Point, width: float, height: float
) -> None:
    """Draws leaves within an ellipse, dark below and inside, bright above."""
    x, y, z = center
    leaf, clump = dice.vary(plants.leaf, 0.12), dice.pick(plants.clumps)
    count = 22 if z < 14 else 12 if z < 28 else 6 if z < 55 else 3
    opacity, squash = 0.55 if plants.bare else 1.0, height / width
    core = (x, y - 0.06 * height, z)
    canvas.disc(core, width * 0.42, _shade(leaf, 0.6), "vegetation", UP, opacity, clump[0].ring, squash)
    for brightness, a, b, radius, ring in sorted(clump[:count]):
        tuft = (x + a * width / 2, y + b * height / 2, z)
        color = _shade(leaf, brightness)
        canvas.disc(tuft, radius * width / 2, color, "vegetation", UP, opacity, ring, squash)


def _shade(color: Color, gain: float) -> Color:
    return color[0] * gain, color[1] * gain, color[2] * gain


def draw_tree(
    canvas: Canvas, dice: Dice, plants: Plants, x: float, z: float, height: float
) -> None:
    bark = dice.vary((92, 76, 62), 0.2)
    shape = dice.pick(((0.72, 0.62), (0.6, 0.66), (0.9, 0.6), (0.3, 0.84)))
    width, crown = shape[0] * height, shape[1] * height
    for s in (0.0, 0.45) if plants.bare else (0.0,):
        top = (x + s, 0.6 * height, z)
        canvas.line((x, 0, z), top, 0.035 * height, bark, "vegetation")
    shadow = [(x + width * 0.45 * a, 0.0, z + width * 0.3 * b) for a, b in RING]
    canvas.polygon(shadow, (12, 14, 16), None, UP, 0.25)
    _draw_clump(canvas, dice, plants, (x, height - crown / 2, z), width, crown)


def draw_bush(canvas: Canvas, dice: Dice, plants: Plants, x: float, z: float) -> None:
    height = dice.between(0.8, 2.2)
    width = height * dice.between(1.1, 2.0)
    _draw_clump(canvas, dice, plants, (x, height * 0.42, z), width, height)


def draw_hedge(canvas: Canvas, dice: Dice, plants: Plants, face: Face) -> None:
    leaf = dice.vary(plants.leaf, 0.12)
    steps = max(3, int(face.length / 0.7))
    ends = [i * face.length / steps for i in range(steps + 1)]
    tops = [face.at(a, face.height * dice.between(0.88, 1.06)) for a in ends]
    canvas.polygon((face.at(0, 0), *tops, face.at(ends[-1], 0)), leaf, "vegetation", face.normal)
    dark: Color = (leaf[0] * 0.6, leaf[1] * 0.6, leaf[2] * 0.6)
    for a in ends:
        y, ring = dice.between(0.2, 0.7) * face.height, dice.pick(plants.clumps)[0].ring
        canvas.disc(face.at(a, y), 0.35, dark, None, face.normal, 0.5, ring)


def draw_lamp(canvas: Canvas, dice: Dice, x: float, z: float) -> None:
    height, color = dice.between(4.5, 8.5), dice.vary(_METAL, 0.35)
    reach = -1.6 if x > 0 else 1.6
    canvas.line((x, 0, z), (x, height, z), 0.16, color, "pole")
    if height > 6:
        canvas.line((x, height, z), (x + reach, height + 0.3, z), 0.1, color, "pole")
    bulb = (x + reach if height > 6 else x, height + 0.2, z)
    canvas.disc(bulb, 0.28, (255, 226, 170) if canvas.light.lamps else color, "pole", None)
    if canvas.light.lamps:
        canvas.disc(bulb, 1.0, (255, 214, 150), None, None, 0.25)


def draw_traffic_light(canvas: Canvas, dice: Dice, x: float, z: float) -> None:
    color = dice.vary(_METAL, 0.3)
    signal = dice.pick((0, 1, 2, 2))
    canvas.line((x, 0, z), (x, 3.6, z), 0.14, color, "pole")
    heads = [(x, 2.6)]
    if dice.chance(0.35):
        reach = x + (-3.2 if x > 0 else 3.2)
        canvas.line((x, 3.6, z), (x, 5.8, z), 0.16, color, "pole")
        canvas.line((x, 5.8, z), (reach, 5.8, z), 0.12, color, "pole")
        heads.append((reach, 5.2))
    lenses: tuple[Color, ...] = ((40, 220, 110), (255, 190, 40), (255, 50, 40))
    for head_x, y in heads:
        case = Face(head_x - 0.2, z, head_x + 0.2, z, 0, TOWARD).patch(0, 0.4, y, y + 1.1)
        canvas.polygon(case, (28, 30, 30), "traffic light", TOWARD)
        for i, lens in enumerate(lenses):
            dim: Color = (lens[0] * 0.25, lens[1] * 0.25, lens[2] * 0.25)
            center = (head_x, y + 0.2 + 0.35 * i, z)
            canvas.disc(center, 0.13, lens if i == signal else dim, None, None)


def draw_sign(canvas: Canvas, dice: Dice, x: float, z: float) -> None:
    canvas.line((x, 0, z), (x, 2.7, z), 0.08, dice.vary(_METAL, 0.2), "pole")
    kind = dice.pick(("round", "triangle", "board", "square", "square"))
    red: Color = (196, 36, 36)
    white: Color = (236, 236, 232)
    blue: Color = (36, 78, 160)
    y = 2.6
    if kind == "round":
        rim, inner = dice.pick(((red, white), (blue, blue), (red, blue)))
        canvas.disc((x, y, z), 0.38, rim, "traffic sign")
        canvas.disc((x, y, z), 0.27, inner)
    elif kind == "triangle":
        up = dice.pick((1, -1))
        for size, color in ((0.5, red), (0.3, white)):
            ring = ((-0.9, -0.6 * up), (0.9, -0.6 * up), (0.0, 0.9 * up))
            canvas.disc((x, y, z), size, color, "traffic sign", ring=ring)
    else:
        width, height = (1.8, 1.0) if kind == "board" else (0.65, 0.65)
        color = dice.pick((blue, white, (226, 184, 40), (40, 110, 70)))
        board = Face(x - width / 2, z, x + width / 2, z, 0, TOWARD)
        canvas.polygon(board.patch(0, width, y - height / 2, y + height / 2), color, "traffic sign")
        mark = white if color != white else blue
        canvas.polygon(board.patch(width * 0.2, width * 0.8, y - 0.1, y + 0.12), mark)


class Facade(NamedTuple):
    """How the buildings of a scene differ from those of others.

    Attributes:
      colors: to choose from, one a building.
      storey: height in meters.
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
    canvas: Canvas, dice: Dice, style: Facade, x: float, z0: float, z1: float, setback: float
) -> None:
    """Draws a house at the side of the street, whose front stands `setback` meters behind x."""
    outward = 1.0 if x > 0 else -1.0
    x += outward * setback
    floors = int(dice.between(style.floors[0], style.floors[1] + 1))
    height = floors * style.storey + dice.between(0.6, 1.2)
    color = dice.vary(dice.pick(style.colors), 0.12)
    shop = dice.chance(style.shops)
    flank = Face(x, z0, x + outward * 11, z0, height, TOWARD)
    front = Face(x, z0, x, z1, height, (-outward, 0.0, 0.0))
    if style.roof is not None:
        _draw_roof(canvas, dice.vary(style.roof, 0.1), front, outward)
    canvas.polygon(flank.whole(), color, "building", flank.normal)
    if dice.chance(0.6):
        _draw_windows(canvas, dice, style, flank, floors, first=0)
    canvas.polygon(front.whole(), color, "building", front.normal)
    trim = dice.vary(dice.pick(((230, 226, 216), color, (96, 90, 86))), 0.1)
    bands = [(height - 0.35, height), (0.0, 0.6)]
    if dice.chance(0.3) and z0 < 40:
        bands += [(i * style.storey - 0.1, i * style.storey + 0.1) for i in range(1, floors)]
    for y0, y1 in bands:
        band = front.patch(0, front.length, y0, y1)
        canvas.polygon(band, trim if y0 else _shade(color, 0.75), "building", front.normal)
    if shop:
        _draw_shop(canvas, dice, style, front)
    _draw_windows(canvas, dice, style, front, floors, first=1 if shop else 0)


def _draw_roof(canvas: Canvas, color: Color, front: Face, outward: float) -> None:
    y, rise, depth = front.height, 3.0, outward * 4.5
    (x, z0), z1 = (front.x0, front.z0), front.z1
    slope = ((x, y, z0), (x, y, z1), (x + depth, y + rise, z1), (x + depth, y + rise, z0))
    canvas.polygon(slope, color, "building", (-outward * 0.55, 0.83, 0.0))
    gable = ((x, y, z0), (x + depth, y + rise, z0), (x + 2 * depth, y, z0))
    canvas.polygon(gable, color, "building", TOWARD)


def _draw_shop(canvas: Canvas, dice: Dice, style: Facade, front: Face) -> None:
    board, inside = dice.vary(dice.pick(CLOTHES), 0.2), dice.vary((70, 74, 78), 0.3)
    lit = canvas.light.lamps and dice.chance(0.6)
    length, top = front.length, style.storey
    pane = front.patch(0.5, length - 0.5, 0.5, top - 0.7)
    canvas.polygon(pane, (240, 210, 150) if lit else inside, None, None if lit else front.normal)
    canvas.polygon(front.patch(0, length, top - 0.6, top - 0.05), board, None, front.normal)
    doors = front.patch(length * 0.45, length * 0.45 + 1.1, 0, top - 0.7)
    canvas.polygon(doors, (50, 46, 44), None, front.normal)
    if dice.chance(0.3):
        reach = 1.2 if front.x0 < 0 else -1.2
        (x, z0), z1 = (front.x0, front.z0), front.z1
        awning = ((x, top, z0), (x, top, z1), (x + reach, top - 0.7, z1), (x + reach, top - 0.7, z0))
        canvas.polygon(awning, dice.pick(CLOTHES), "building", UP)


def _draw_windows(
    canvas: Canvas, dice: Dice, style: Facade, face: Face, floors: int, first: int
) -> None:
    """Draws rows of windows; far away, where they run together, as bands."""
    far = face.z0 > 55
    count = 1 if far else max(1, int(face.length / style.pitch))
    pitch = face.length / count
    width, height = style.pane[0] * pitch, style.pane[1] * style.storey
    glass = dice.vary((70, 80, 92), 0.3)
    frame = dice.vary(dice.pick(((236, 234, 228), (90, 78, 68), (60, 62, 66))), 0.1)
    balconies = dice.chance(0.2) and not far
    for floor in range(first, floors):
        low = floor * style.storey + 0.3 * style.storey
        for column in range(count):
            left = (column + 0.5) * pitch - width / 2
            lit = canvas.light.lamps and dice.chance(0.35)
            pane = dice.vary((250, 206, 130), 0.1) if lit else dice.vary(glass, 0.15)
            if face.z0 < 25:
                border = face.patch(left - 0.12, left + width + 0.12, low - 0.1, low + height + 0.1)
                canvas.polygon(border, frame, None, face.normal)
            window = face.patch(left, left + width, low, low + height)
            canvas.polygon(window, pane, None, None if lit else face.normal)
            if face.z0 < 25 and width > 0.8:
                middle = left + width / 2
                mullion = face.patch(middle - 0.05, middle + 0.05, low, low + height)
                canvas.polygon(mullion, frame, None, face.normal)
            if balconies:
                rail = face.patch(left - 0.3, left + width + 0.3, low - 0.3, low + 0.6)
                canvas.polygon(rail, frame, None, face.normal)


def draw_wall(canvas: Canvas, dice: Dice, color: Color, face: Face) -> None:
    canvas.polygon(face.whole(), color, "wall", face.normal)
    dark: Color = (color[0] * 0.8, color[1] * 0.8, color[2] * 0.8)
    bricks = dice.chance(0.5)
    courses = int(face.height / (0.35 if bricks else 0.9))
    for i in range(1, courses + 1):
        y = i * face.height / (courses + 1)
        strip = face.patch(0, face.length, y, y + 0.06)
        canvas.polygon(strip, dark, None, face.normal)
    for i in range(int(face.length / 3)):
        joint = face.patch(i * 3.0, i * 3.0 + (0.4 if bricks else 0.1), 0, face.height)
        canvas.polygon(joint, dark if i % 2 else color, None, face.normal)
    bright: Color = (color[0] * 1.1, color[1] * 1.1, color[2] * 1.1)
    coping = face.patch(0, face.length, face.height - 0.15, face.height + 0.1)
    canvas.polygon(coping, bright, "wall", UP)
    if dice.chance(0.3):
        a, paint = dice.between(0, face.length * 0.6), dice.pick(CLOTHES)
        daub = face.patch(a, a + 2.2, face.height * 0.25, face.height * 0.65)
        canvas.polygon(daub, paint, None, face.normal, 0.6)


def draw_fence(canvas: Canvas, dice: Dice, color: Color, kind: str, face: Face) -> None:
    """Draws a fence, which is labeled whole although one sees through it."""
    canvas.polygon(face.whole(), None, "fence")
    if kind == "boards":
        canvas.polygon(face.whole(), color, None, face.normal)
    elif kind == "mesh":
        canvas.polygon(face.whole(), color, None, face.normal, 0.35)
    spacing = {"boards": 0.5, "mesh": 2.2, "pickets": 0.3, "rail": 2.5}[kind]
    shade: Color = (color[0] * 0.75, color[1] * 0.75, color[2] * 0.75)
    bar = shade if kind == "boards" else color
    for i in range(int(face.length / spacing)):
        a = i * spacing
        if face.at(a, 0)[2] < 30:
            canvas.line(face.at(a, 0), face.at(a, face.height), 0.07, bar, None, face.normal)
    for y in (0.25, 0.6, 0.92) if kind == "rail" else (0.2, 0.92):
        rail = face.patch(0, face.length, y * face.height, y * face.height + 0.09)
        canvas.polygon(rail, color, None, face.normal)


def draw_block(
    canvas: Canvas, dice: Dice, style: Facade, x0: float, x1: float, z: float
) -> None:
    """Draws a building that stands across the end of the street."""
    floors = int(dice.between(style.floors[0], style.floors[1] + 1))
    face = Face(x0, z, x1, z, floors * style.storey + dice.between(0.6, 1.2), TOWARD)
    canvas.polygon(face.whole(), dice.vary(dice.pick(style.colors), 0.12), "building", TOWARD)
    _draw_windows(canvas, dice, style, face, floors, first=0)


def draw_strip(
    canvas: Canvas, x0: float, x1: float, z0: float, z1: float, color: Color,
    label: str | None, opacity: float = 1.0,
) -> None:
    """Draws a strip of ground that follows the street."""
    stops = [z0, *(z for z in _SLICES if z0 < z < z1), z1]
    for near, far in reversed(list(zip(stops[:-1], stops[1:], strict=True))):
        points = ((x0, 0.0, near), (x1, 0.0, near), (x1, 0.0, far), (x0, 0.0, far))
        canvas.polygon(points, color, label, UP, opacity)


def draw_hood(canvas: Canvas, dice: Dice) -> None:
    """Draws the car that carries the camera, which has no class."""
    camera = canvas.camera
    depth, z = dice.between(0.02, 0.09), NEAR
    top = camera.height - (1 - depth - camera.horizon) * z / camera.focal
    x = -camera.yaw * z / camera.focal
    paint = dice.vary(dice.pick(CAR_PAINT[1:5]), 0.3)
    unit = z / camera.focal
    for drop, color in ((0.0, paint), (0.012, dice.vary(paint, 0.15))):
        center = (x, top - (0.25 + drop) * unit, z)
        canvas.disc(center, 1.05 * unit, color, "ignore", UP, squash=0.25 / 1.05)
