"""Streets: rendered street scenes with Cityscapes' classes and palette, made on first use."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from jaxssl.contracts import Record, Source, UserError
from jaxssl.data import streets_scene as scene
from jaxssl.data.cityscapes import INFO
from jaxssl.data.loading import Subset
from jaxssl.data.streets_scene import FAR, NEAR, TOWARD, Camera, Canvas, Color, Dice, Light, Thing

RENDERER_VERSION = 3
"""Part of the cache's path: increase it whenever a scene would look different."""

_SPLITS = {"train": ("streets", 0), "val": ("streetsval", 1_000_000)}
"""City in the ids, and index of the first scene; so many scenes fit before the next split's."""
_MOST = 1_000_000


def load(
    config_data: Mapping[str, Any], split: str, labels: bool, ids: Iterable[str] | None = None
) -> Source:
    """Opens the scenes that `train_count`, `val_count`, `size` and `scene_seed` ask for."""
    count = config_data.get(f"{split}_count", 0)  # an unknown split gets its message below
    height, width = config_data["size"]
    seed = config_data["scene_seed"]
    source = Streets(split, count, (height, width), seed, labels=labels, progress=_announce)
    return source if ids is None else Subset(source, ids)


def _announce(done: int, total: int) -> None:
    if done == 1:
        print(f"Rendering {total} street scenes into the cache, once.", file=sys.stderr, flush=True)


class Streets:
    """Street scenes, rendered on first use into a cache and read from there.

    Ids are `<city>_<number>_000019`; image i of a split is the same whatever `count` is.

    Args:
      split: "train" or "val"; they share no scene.
      count: number of images, up to a million.
      size: height and width; the scenes are the same at every size.
      seed: another seed gives other scenes.
      labels: False never opens the file of labels.
      cache: folder to keep pictures in; None takes `jaxssl` in `$XDG_CACHE_HOME` or `~/.cache`.
      progress: called with (images rendered, images to render); not called where the cache has all.

    Raises:
      UserError: the split is unknown, a number makes no sense, or the cache cannot be written; on
        reading, the cache is damaged.
    """

    info = INFO

    def __init__(
        self,
        split: str,
        count: int,
        size: tuple[int, int] = (64, 128),
        seed: int = 0,
        labels: bool = True,
        cache: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ):
        if split not in _SPLITS:
            raise UserError(f"Streets has no split {split!r}. Choose one of: {', '.join(_SPLITS)}.")
        if not (1 <= count <= _MOST and min(size) >= 1 and seed >= 0):
            raise UserError(
                f"Streets cannot render {count} images of size {tuple(size)} with seed {seed}. "
                f"Ask for 1 to {_MOST} images, at least one pixel, and a seed of 0 or more."
            )
        city, first = _SPLITS[split]
        self.ids = tuple(f"{city}_{i:06d}_000019" for i in range(count))
        folder = _cache_folder(cache)
        stem = f"{split}-{count}-{size[0]}x{size[1]}-seed{seed}"
        self._image_path = folder / f"{stem}-image.npy"
        self._label_path = folder / f"{stem}-label.npy"
        self._has_labels = labels
        if not self._image_path.exists() or (labels and not self._label_path.exists()):
            scenes = range(first, first + count)
            _fill_cache(self._image_path, self._label_path, seed, scenes, size, progress)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Record:
        record = Record(image=np.array(self._images[index]), id=self.ids[index])
        if self._has_labels:
            record["label"] = np.array(self._labels[index])
        return record

    def __getstate__(self) -> dict[str, Any]:
        # Other processes open the files themselves.
        return {k: v for k, v in self.__dict__.items() if k not in ("_images", "_labels")}

    @functools.cached_property
    def _images(self) -> np.ndarray:
        return _open(self._image_path)

    @functools.cached_property
    def _labels(self) -> np.ndarray:
        return _open(self._label_path)


def _cache_folder(cache: str | None) -> Path:
    if cache is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache = os.fspath(Path(home) / "jaxssl")
    return Path(cache).expanduser() / f"streets-{RENDERER_VERSION}"


def _fill_cache(
    image_path: Path,
    label_path: Path,
    seed: int,
    scenes: range,
    size: tuple[int, int],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Renders scenes into both files; whoever else does so at the same time writes the same."""
    count = len(scenes)
    try:
        image_path.parent.mkdir(parents=True, exist_ok=True)
        with (
            _new_array(image_path, (count, *size, 3)) as images,
            _new_array(label_path, (count, *size)) as labels,
        ):
            for done, index in enumerate(scenes, start=1):
                image, label = render(seed, index, size)
                images.write(image.tobytes())
                labels.write(label.tobytes())
                if progress is not None:
                    progress(done, count)
    except OSError as error:
        raise UserError(
            f"The rendered streets cannot be stored in {image_path.parent}: {error}. Set "
            "XDG_CACHE_HOME to a folder with enough space that you may write to."
        ) from error


@contextlib.contextmanager
def _new_array(path: Path, shape: tuple[int, ...]) -> Iterator[BinaryIO]:
    """Opens a `.npy` file of uint8 to write row after row; it gets its name when it is whole."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    try:
        with open(unfinished, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            yield file
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _open(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"The rendered streets in {path} cannot be read: {error}. Delete that file; the next "
            "start renders it again."
        ) from error


def render(seed: int, index: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Renders a scene; the result depends on the arguments alone.

    Args:
      seed: 0 or more.
      index: 0 or more; another one gives another scene.
      size: height and width; one scene looks the same at every size.

    Returns:
      Image, uint8 `[*size, 3]`, and label, uint8 `[*size]`: 0 to 18, or 255 for the hood of the car
      that carries the camera.
    """
    dice = Dice(seed, index)
    street, camera, light = _plan_street(dice), _aim(dice), _illuminate(dice)
    canvas = Canvas(camera, light, size, oversampling=max(2, min(4, 512 // size[0])))
    _draw_sky(canvas, dice)
    _draw_skyline(canvas, dice, street)
    _draw_ground(canvas, dice, street)
    for thing in sorted(_things(dice, street), key=lambda thing: -thing.z):
        thing.draw(canvas, dice)
    if dice.chance(0.8):
        scene.draw_hood(canvas, dice)
    image, label = canvas.shrink()
    return _photograph(image, label, camera, dice), label


class District(NamedTuple):
    """What a part of town is like.

    Attributes:
      lots: "building", "house", "park" or "yard", to choose from.
      floors: least and greatest number in a building.
      facades: families of colors to choose from.
      shops: share of buildings with shops.
      roofs: chance of pitched roofs.
      trees: chance of a tree wherever one could stand.
      verge: chance of a strip of grass at a curb.
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
    District(12 * _B + _P, (3, 7), (0, 0, 1, 2, 3, 6), 0.7, 0.2, 0.35, 0.15, 10.0, True),
    District(8 * _B + 2 * _P, (2, 5), (0, 1, 3, 6), 0.3, 0.5, 0.5, 0.35, 5.0, True),
    District(5 * _H + 3 * _P + _B, (2, 3), (0, 1, 3, 6), 0.05, 0.9, 0.7, 0.5, 2.5, False),
    District(6 * _P + _H + _B, (2, 4), (0, 1, 2, 6), 0.1, 0.5, 0.8, 0.6, 1.5, False),
    District(4 * _B + 4 * _Y + 2 * _P, (2, 5), (2, 4, 5, 6), 0.1, 0.05, 0.35, 0.4, 1.5, False),
    District(10 * _B + _Y, (6, 12), (2, 4, 4, 5, 6), 0.5, 0.0, 0.4, 0.2, 8.0, True),
)


class Side(NamedTuple):
    """One side of the road, in meters.

    Attributes:
      sign: -1 left, 1 right.
      curb: x of the curb.
      parking: whether cars park along it.
      verge: width of the grass next to it.
      walk: width of the sidewalk behind that.
    """

    sign: int
    curb: float
    parking: bool
    verge: float
    walk: float

    @property
    def front(self) -> float:
        """The x of the line where the lots begin."""
        return self.out(self.verge + self.walk)

    def out(self, distance: float) -> float:
        """The x that lies so many meters outward from the curb."""
        return self.curb + self.sign * distance


class Materials(NamedTuple):
    """What a street is made of."""

    road: Color
    paving: Color
    grass: Color
    plants: scene.Plants
    facade: scene.Facade
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
      tram: whether one comes along.
      end: z of the last lot.
      closed: whether buildings stand across the end.
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

    def blocks(self, z: float) -> bool:
        """Whether z is in or before the side street, where nobody may park."""
        return self.crossing is not None and self.crossing[0] - 4 < z < self.crossing[1] + 1


def _plan_street(dice: Dice) -> Street:
    district = dice.pick(_DISTRICTS)
    width, offset = dice.between(2.9, 3.6), dice.between(-0.35, 0.35)
    ahead, oncoming = dice.pick((1, 1, 1, 2)), dice.pick((0, 1, 1, 1, 2))
    lanes = [(offset + i * width, 1) for i in range(ahead)]
    lanes += [(offset - (i + 1) * width, -1) for i in range(oncoming)]
    left = _plan_side(dice, district, -1, offset - (oncoming + 0.5) * width)
    right = _plan_side(dice, district, 1, offset + (ahead - 0.5) * width)
    tram, corner = dice.chance(0.25), dice.between(9, 45)
    tracks = tuple(x for x, _ in lanes[:1] + lanes[ahead : ahead + 1])
    return Street(
        district=district,
        sides=(left, right),
        lanes=tuple(lanes),
        crossing=(corner, corner + dice.between(6, 10)) if dice.chance(0.45) else None,
        rails=tracks if tram or dice.chance(0.04) else (),
        tram=tram,
        end=dice.between(35, 90) if dice.chance(0.35) else FAR,
        closed=dice.chance(0.6),
        made_of=_choose_materials(dice, district),
    )


def _plan_side(dice: Dice, district: District, sign: int, edge: float) -> Side:
    parking = dice.chance(0.5)
    curb = edge + sign * (2.2 if parking else dice.between(0.1, 0.8))
    verge = dice.between(0.8, 2.5) if dice.chance(district.verge) else 0.0
    return Side(sign, curb, parking, verge, dice.between(2.0, 6.0))


def _choose_materials(dice: Dice, district: District) -> Materials:
    main, other = (scene.FACADES[dice.pick(district.facades)] for _ in range(2))
    facade = scene.Facade(
        colors=3 * main + other,
        storey=dice.between(2.8, 3.6),
        pitch=dice.between(1.7, 3.4),
        pane=(dice.between(0.35, 0.8), dice.between(0.4, 0.62)),
        roof=dice.pick(scene.TILES) if dice.chance(district.roofs) else None,
        floors=district.floors,
        shops=district.shops,
    )
    return Materials(
        road=dice.vary(dice.pick(scene.ASPHALT), 0.15),
        paving=dice.vary(dice.pick(scene.PAVING), 0.12),
        grass=dice.vary(dice.pick(scene.GRASS), 0.12),
        plants=scene.grow(dice),
        facade=facade,
        border=dice.pick(("hedge", "hedge", "fence", "fence", "wall", "none")),
        border_color=dice.vary(dice.pick(scene.MASONRY), 0.15),
        fence=dice.pick(("boards", "mesh", "pickets", "rail")),
    )


def _aim(dice: Dice) -> Camera:
    return Camera(
        height=dice.between(1.2, 2.1),
        focal=dice.between(1.3, 2.2),
        horizon=dice.between(0.36, 0.48),
        yaw=dice.between(-0.22, 0.22),
        roll=dice.between(-0.02, 0.02),
        bend=dice.between(-0.0025, 0.0025) if dice.chance(0.6) else 0.0,
    )


_SKIES: tuple[tuple[Color, Color, Color, Color], ...] = (
    ((88, 138, 206), (196, 216, 234), (0.55, 0.58, 0.64), (0.62, 0.58, 0.50)),
    ((172, 178, 186), (214, 217, 220), (0.78, 0.79, 0.82), (0.10, 0.10, 0.10)),
    ((128, 156, 190), (246, 222, 180), (0.42, 0.44, 0.52), (0.85, 0.68, 0.46)),
    ((128, 134, 142), (168, 172, 176), (0.52, 0.54, 0.58), (0.05, 0.05, 0.05)),
    ((44, 56, 98), (206, 150, 128), (0.33, 0.35, 0.44), (0.12, 0.08, 0.06)),
    ((200, 204, 206), (232, 230, 224), (0.70, 0.68, 0.64), (0.30, 0.28, 0.24)),
)
"""Zenith, horizon, ambient light and sunlight at noon, below clouds, in the evening, in rain, at
dusk, in haze; a scene is a mixture of two."""
_SUNS = (
    (-0.61, 0.61, -0.5), (0.61, 0.61, -0.5), (-0.7, 0.5, 0.5), (0.7, 0.5, 0.5), (0.0, 0.7, -0.7),
    (-0.87, 0.4, -0.3), (0.87, 0.4, -0.3), (0.2, 0.5, 0.84),
)  # fmt: skip


def _illuminate(dice: Dice) -> Light:
    one, two, t = dice.pick(_SKIES), dice.pick(_SKIES), dice.between(0, 1)
    zenith, horizon, ambient, sun = (_mix(a, b, t) for a, b in zip(one, two, strict=True))
    visibility = dice.pick((120.0, 250.0, 400.0, 600.0, 800.0))
    return Light(zenith, horizon, ambient, sun, dice.pick(_SUNS), visibility)


def _mix(a: Color, b: Color, t: float) -> Color:
    return a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1]), a[2] + t * (b[2] - a[2])


def _draw_sky(canvas: Canvas, dice: Dice) -> None:
    zenith, horizon = np.array(canvas.light.zenith), np.array(canvas.light.horizon)
    down = (np.arange(48.0) / 47)[:, None, None]
    cover = _clouds(dice, (48, 96))[..., None] / 255 - 0.68 + 0.3 * canvas.light.clouds
    bright = horizon + 0.5 * (255 - horizon) * (1 - down)
    sky = zenith + down * (horizon - zenith)
    sky = sky + 0.8 * np.clip(4 * cover, 0, 1) * (bright - sky)
    canvas.backdrop(Image.fromarray(sky.astype(np.uint8)), "sky")


def _clouds(dice: Dice, size: tuple[int, int]) -> np.ndarray:
    coarse, middle, fine = (_smooth(dice.noise(8 * n, 6 * n), size) for n in (1, 2, 4))
    return 0.5 * coarse + 0.3 * middle + 0.2 * fine


def _smooth(noise: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Noise at another size, interpolated: float32 `[*size]` in [0,255]."""
    height, width = size
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float32)


def _draw_skyline(canvas: Canvas, dice: Dice, street: Street) -> None:
    """Draws buildings and trees on the horizon."""
    x = -FAR
    while x < FAR:
        width = dice.between(8, 20)
        if dice.chance(0.25 if street.district.paved else 0.7):
            scene.draw_treetops(canvas, dice, street.made_of.plants, x, width)
        else:
            face = scene.Face(x, FAR, x + width, FAR, dice.between(6, 16), TOWARD)
            color = dice.vary(dice.pick(street.made_of.facade.colors), 0.1)
            canvas.polygon(face.band(0, face.height), color, "building", TOWARD)
        x += 0.8 * width


def _draw_ground(canvas: Canvas, dice: Dice, street: Street) -> None:
    road, paving, grass, *_ = street.made_of
    around = (paving, "sidewalk") if street.district.paved else (grass, "terrain")
    scene.draw_strip(canvas, (-3 * FAR, 3 * FAR), (NEAR, 2 * FAR), *around)
    for side in street.sides:
        _draw_sidewalk(canvas, side, paving, grass)
    left, right = street.sides
    scene.draw_strip(canvas, (left.curb, right.curb), (NEAR, FAR), road, "road")
    _draw_wear(canvas, dice, street)
    for side in street.sides:
        edge = (side.curb, side.out(0.2))
        bright = _mix(paving, (255, 255, 255), 0.25)
        scene.draw_strip(canvas, edge, (NEAR, FAR), bright, "sidewalk")
    if street.crossing:
        scene.draw_strip(canvas, (-60, 60), street.crossing, road, "road")
    _draw_markings(canvas, dice, street)
    _draw_building_shadows(canvas, dice, street)


def _draw_sidewalk(canvas: Canvas, side: Side, paving: Color, grass: Color) -> None:
    """Draws the slabs of a sidewalk, and the verge."""
    width, verge = (side.curb, side.front), (side.curb, side.out(side.verge))
    scene.draw_strip(canvas, width, (NEAR, FAR), paving, "sidewalk")
    for z in range(2, 20):
        scene.draw_strip(canvas, width, (z, z + 0.06), _mix(paving, (0, 0, 0), 0.16))
    if side.verge:
        scene.draw_strip(canvas, verge, (NEAR, FAR), grass, "terrain")


def _draw_wear(canvas: Canvas, dice: Dice, street: Street) -> None:
    """Draws tracks, patches and manholes on the road."""
    road, (left, right) = street.made_of.road, street.sides
    track, hole = _mix(road, (0, 0, 0), dice.between(0.02, 0.1)), _mix(road, (0, 0, 0), 0.3)
    for (x, _), wheel in itertools.product(street.lanes, (-0.75, 0.75)):
        scene.draw_strip(canvas, (x + wheel - 0.25, x + wheel + 0.25), (NEAR, 48), track)
    for _ in range(int(dice.between(0, 7))):
        x, z = dice.between(left.curb, right.curb - 2), dice.between(3, 30)
        reach, patch = dice.between(0.4, 2), dice.vary(road, 0.18)
        scene.draw_strip(canvas, (x, x + reach), (z, z + 2 * reach), patch)
    for _ in range(int(dice.between(0, 3))):
        x, z = dice.between(left.curb + 0.5, right.curb - 0.5), dice.between(4, 25)
        canvas.polygon(((x + 0.35 * a, 0.0, z + 0.35 * b) for a, b in scene.CIRCLE), hole)


def _draw_markings(canvas: Canvas, dice: Dice, street: Street) -> None:
    fresh, worn = dice.vary((222, 222, 214), 0.12), dice.between(0, 0.65)
    draw = partial(scene.draw_strip, canvas, color=_mix(fresh, street.made_of.road, worn))
    dash, gap = FAR if dice.chance(0.3) else dice.between(2, 4), dice.between(3, 7)
    centers = sorted(x for x, _ in street.lanes)
    for a, b in itertools.pairwise(centers):
        z, middle = NEAR, (a + b) / 2
        while z < 70:
            draw((middle - 0.07, middle + 0.07), (z, z + dash))
            z += dash + gap
    if dice.chance(0.4):
        for side in street.sides:
            x = side.out(-2.15 if side.parking else -0.35)
            draw((x - 0.06, x + 0.06), (NEAR, 70))
    _draw_tracks(canvas, dice, street)
    if street.crossing or dice.chance(0.15):
        z = street.crossing[0] - 4 if street.crossing else dice.between(7, 25)
        _draw_stop(draw, dice, street, z)


def _draw_tracks(canvas: Canvas, dice: Dice, street: Street) -> None:
    """Draws a cycle path and rails, which are road."""
    side = street.sides[1]
    if dice.chance(0.15):
        edge = side.out(-2.2 if side.parking else -0.2)
        red = _mix(street.made_of.road, (168, 76, 66), 0.55)
        scene.draw_strip(canvas, (edge - 1.4, edge), (NEAR, 60), red)
    for x, rail in itertools.product(street.rails, (-0.72, 0.72)):
        scene.draw_strip(canvas, (x + rail - 0.06, x + rail + 0.06), (NEAR, FAR), (66, 66, 70))


def _draw_stop(draw: Callable[..., None], dice: Dice, street: Street, z: float) -> None:
    """Draws a stop line and, mostly, a zebra crossing behind it."""
    left, right = street.sides
    draw((-0.2, right.curb), (z - 1.2, z - 0.8))
    if dice.chance(0.65):
        for stripe in range(int(right.curb - left.curb - 0.5)):
            x = left.curb + 0.4 + stripe
            draw((x, x + 0.5), (z, z + 3))


def _draw_building_shadows(canvas: Canvas, dice: Dice, street: Street) -> None:
    light, z = canvas.light, NEAR
    side = street.sides[0 if light.direction[0] < 0 else 1]
    while z < 60:
        stop, reach = z + dice.between(6, 15), dice.between(0, 12)
        if dice.chance(0.8) and light.direction[0] and light.sun[0] > 0.24:
            shadow, opacity = (side.front, side.front - side.sign * reach), 0.5 * light.sun[0]
            scene.draw_strip(canvas, shadow, (z, stop), (10, 12, 20), opacity=opacity)
        z = stop


def _things(dice: Dice, street: Street) -> Iterator[Thing]:
    """Yields what stands in the street, in any order."""
    yield from _street_end(dice, street)
    for side in street.sides:
        yield from _lots(dice, street, side)
        yield from _furniture(dice, street, side)
        yield from _parked_cars(dice, street, side)
    yield from _traffic(dice, street)
    yield from _people(dice, street)
    yield from _riders(dice, street)
    yield from _parked_cycles(dice, street)


def _street_end(dice: Dice, street: Street) -> Iterator[Thing]:
    x, z = -40.0, street.end + 12
    while x < 40 and z < FAR and street.closed:
        stop = x + dice.between(9, 18)
        block = partial(scene.draw_block, style=street.made_of.facade, x0=x, x1=stop, z=z)
        yield Thing(z, block)
        x = stop


def _lots(dice: Dice, street: Street, side: Side) -> Iterator[Thing]:
    """Yields what lines the street, before a side street and behind it."""
    corner = street.crossing or (street.end, street.end)
    for start, end in ((NEAR, corner[0]), (corner[1], street.end)):
        z = start
        while z < end - 4:
            stop = min(z + dice.between(9, 18), end)
            # All of a lot counts as far as its far end, so that whatever is before it covers it.
            for thing in _lot(dice, street, side, z, stop):
                yield thing._replace(z=stop)
            z = stop


def _lot(dice: Dice, street: Street, side: Side, z0: float, z1: float) -> Iterator[Thing]:
    kind, made_of = dice.pick(street.district.lots), street.made_of
    building = partial(scene.draw_building, style=made_of.facade)
    if kind == "building":
        yield Thing(z1, partial(building, x=side.front, z0=z0, z1=z1))
        return
    if kind != "yard":
        garden = ((side.front, side.front + side.sign * 12), (z0, z1), made_of.grass, "terrain")
        yield Thing(z1, lambda canvas, _: scene.draw_strip(canvas, *garden))
    if kind != "park":
        x, gap = side.front + side.sign * dice.between(4, 7), dice.between(0, 2)
        yield Thing(z1, partial(building, x=x, z0=z0 + gap, z1=z1 - gap))
    depth = 10.0 if kind == "park" else 4.0
    yield from sorted(_plants(dice, street, side, z0, z1, depth), key=lambda plant: -plant.z)
    yield from _border(dice, street, side, z0, z1, kind)


def _plants(
    dice: Dice, street: Street, side: Side, z0: float, z1: float, depth: float
) -> Iterator[Thing]:
    """Yields trees and bushes in a garden."""
    plants = street.made_of.plants
    for _ in range(int((z1 - z0) * depth / 20)):
        x, z = side.front + side.sign * dice.between(1, depth), dice.between(z0, z1)
        if dice.chance(street.district.trees):
            height = dice.between(4, 11)
            yield Thing(z, partial(scene.draw_tree, plants=plants, x=x, z=z, height=height))
        if dice.chance(0.35):
            yield Thing(z, partial(scene.draw_bush, plants=plants, x=x, z=z))


def _border(
    dice: Dice, street: Street, side: Side, z0: float, z1: float, kind: str
) -> Iterator[Thing]:
    """Yields the hedge, fence or wall in front of a lot."""
    _, _, _, plants, _, border, color, fence = street.made_of
    if kind == "yard" and border in ("hedge", "none"):
        border = "fence"
    if border == "none" or (kind == "park" and border != "hedge" and dice.chance(0.4)):
        return
    height = dice.between(1.4, 2.8) if border == "wall" else dice.between(0.9, 1.8)
    face = scene.Face(side.front, z0, side.front, z1, height, (-float(side.sign), 0.0, 0.0))
    draw = {
        "hedge": partial(scene.draw_hedge, plants=plants, face=face),
        "fence": partial(scene.draw_fence, color=color, kind=fence, face=face),
        "wall": partial(scene.draw_wall, color=color, face=face),
    }[border]
    yield Thing(z1, draw)


def _furniture(dice: Dice, street: Street, side: Side) -> Iterator[Thing]:
    """Yields what stands along the curb: lamps, signs, traffic lights, trees."""
    x = side.out(0.6)
    for z in _places(dice, street, dice.between(18, 36)):
        yield Thing(z, partial(scene.draw_lamp, x=x, z=z))
    for _ in range(dice.pick((0, 1, 1, 2))):
        z = dice.between(5, 40)
        yield Thing(z, partial(scene.draw_sign, x=x, z=z))
    if street.crossing and dice.chance(0.75):
        for z in (street.crossing[0] - 0.8, street.crossing[1] + 0.8):
            yield Thing(z, partial(scene.draw_traffic_light, x=x, z=z))
    if dice.chance(street.district.trees):
        tree = partial(scene.draw_tree, plants=street.made_of.plants, x=side.out(1.2))
        for z in _places(dice, street, dice.between(6, 12)):
            yield Thing(z, partial(tree, z=z, height=dice.between(5, 10)))


def _places(dice: Dice, street: Street, spacing: float) -> Iterator[float]:
    """Yields every z of a row along the street, free of the side street."""
    z = dice.between(4, 4 + spacing)
    while z < 80:
        if not street.blocks(z):
            yield z
        z += spacing


def _parked_cars(dice: Dice, street: Street, side: Side) -> Iterator[Thing]:
    share, spacing = dice.between(0.2, 0.9), dice.between(5.6, 6.4)
    for z in _places(dice, street, spacing) if side.parking else ():
        if z > 5 and dice.chance(share):
            draw = scene.draw_truck if dice.chance(0.006) else scene.draw_car
            direction = side.sign if dice.chance(0.85) else -side.sign
            x = side.out(-dice.between(1.0, 1.15))
            yield Thing(z, partial(draw, x=x, z=z, ahead=(0.0, direction)))


def _traffic(dice: Dice, street: Street) -> Iterator[Thing]:
    """Yields what moves on the lanes, and sometimes a car that crosses."""
    chances = ((scene.draw_truck, 0.3), (scene.draw_bus, 0.3))
    rare = [draw for draw, chance in chances if dice.chance(chance)]
    rare += [scene.draw_train] * street.tram
    for x, direction in street.lanes:
        z = dice.between(7, 24)
        while z < 75:
            draw = rare.pop() if rare and dice.chance(0.6) else scene.draw_car
            room = {scene.draw_car: 2.5, scene.draw_train: 16.0}.get(draw, 6.0)
            z += room
            yield Thing(z, partial(draw, x=x, z=z, ahead=(0.0, float(direction))))
            z += room + dice.between(8, 40)
    if street.crossing and dice.chance(0.35):
        x, z = dice.between(-7, 7), street.crossing[0] + 3
        draw = dice.pick((scene.draw_car,) * 6 + (scene.draw_bus, scene.draw_truck))
        yield Thing(z, partial(draw, x=x, z=z, ahead=(dice.pick((-1.0, 1.0)), 0.0)))


def _people(dice: Dice, street: Street) -> Iterator[Thing]:
    for _ in range(int(dice.between(0, 2 * street.district.crowd + 1))):
        side = dice.pick(street.sides)
        x = side.out(dice.between(0.5, side.verge + side.walk - 0.4))
        z = 4 + 20 * dice.between(0, 1) * dice.between(0, 1)
        yield Thing(z, partial(scene.draw_person, x=x, z=z))
    if street.crossing and dice.chance(0.3):
        for _ in range(dice.pick((1, 2, 3))):
            x, z = dice.between(-5, 4), street.crossing[0] - dice.between(1.5, 3.5)
            yield Thing(z, partial(scene.draw_person, x=x, z=z))


_HEADINGS = ((0.0, 1.0), (0.0, -1.0), (0.6, 0.8), (-0.6, -0.8), (1.0, 0.0), (-1.0, 0.0))


def _riders(dice: Dice, street: Street) -> Iterator[Thing]:
    for chance, motor in ((0.4, False), (0.25, True)):
        if dice.chance(chance):
            side, z, ahead = dice.pick(street.sides), dice.between(5, 13), dice.pick(_HEADINGS)
            x = side.out(-3.0 if side.parking else -dice.between(0.8, 1.6))
            yield Thing(z, partial(scene.draw_rider, x=x, z=z, ahead=ahead, motor=motor))


def _parked_cycles(dice: Dice, street: Street) -> Iterator[Thing]:
    for chance, draw, most in ((0.5, scene.draw_bicycle, 7), (0.25, scene.draw_motorcycle, 3)):
        if dice.chance(chance):
            side, z, ahead = dice.pick(street.sides), dice.between(4.5, 11), dice.pick(_HEADINGS)
            x = side.front - side.sign * dice.between(0.5, side.walk - 0.4)
            for _ in range(int(dice.between(1, most + 1))):
                yield Thing(z, partial(draw, x=x, z=z, ahead=ahead))
                z += dice.between(0.6, 1.2)


_GRAIN = {
    "road": 0.10, "sidewalk": 0.12, "terrain": 0.30, "vegetation": 0.50, "building": 0.10,
    "wall": 0.16, "fence": 0.10, "sky": 0.01,
}  # fmt: skip
"""How much the brightness of a class varies from place to place; others, by 0.04."""
_FLAT = ("road", "sidewalk", "terrain")


def _photograph(image: np.ndarray, label: np.ndarray, camera: Camera, dice: Dice) -> np.ndarray:
    """Adds what paint lacks: texture, the camera's colors, blur and noise."""
    size = (label.shape[0], label.shape[1])
    grain, flat = np.full(256, 0.04, np.float32), np.zeros(256, bool)
    for position, name in enumerate(INFO.classes):
        grain[position], flat[position] = _GRAIN.get(name, 0.04), name in _FLAT
    texture = np.where(flat[label], _ground_noise(dice, camera, size), _upright_noise(dice, size))
    picture = image * (1 + grain[label] * (texture / 127.5 - 1))[..., None]
    contrast, brightness = dice.between(0.85, 1.2), dice.between(98, 122)
    cast = np.array([dice.between(0.9, 1.1) for _ in range(3)], np.float32)
    picture = ((picture - 110) * contrast + brightness) * cast
    blur, strength = size[0] * dice.between(0, 0.005), dice.between(0.01, 0.055)
    sharp = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    blurred = np.asarray(sharp.filter(ImageFilter.GaussianBlur(blur)))
    speckle = dice.noise(*size, 3).astype(np.float32) - dice.noise(*size, 3)
    noisy = blurred + strength * speckle + 0.5
    return np.clip(noisy, 0, 255).astype(np.uint8)


def _upright_noise(dice: Dice, size: tuple[int, int]) -> np.ndarray:
    """float32 `[*size]` in [0,255]."""
    scales = ((0.2, 16), (0.3, 32), (0.3, 64), (0.2, 128))
    noise = np.zeros(size, np.float32)
    for weight, rows in scales:
        noise += np.float32(weight) * _smooth(dice.noise(rows, 2 * rows), size)
    return noise


def _ground_noise(dice: Dice, camera: Camera, size: tuple[int, int]) -> np.ndarray:
    """Noise that lies on the ground: float32 `[*size]` in [0,255].

    A pixel (u, v), in picture heights, shows the ground at x = (u - yaw) d and z = focal d, where
    d = height / (v - horizon).
    """
    tile, texels_x, texels_z = Image.fromarray(dice.noise(512, 512)), 20.0, 8.0
    h, w = size
    middle, horizon = w / 2 + camera.yaw * h, camera.horizon * h
    columns = (camera.height * texels_x, 256.0, -middle * camera.height * texels_x - 256 * horizon)
    rows = (0.0, 0.0, camera.focal * camera.height * texels_z * h)
    # Pillow wants the denominator v - horizon as c v + 1.
    data = (*(c / -horizon for c in (*columns, *rows)), 0.0, 1 / -horizon)
    noise = tile.transform(
        (w, h), Image.Transform.PERSPECTIVE, data, Image.Resampling.BILINEAR, fillcolor=128
    )
    return np.asarray(noise, np.float32)
