"""Masks as people store them: ids, palettes, colors, black and white; and the table of classes that
says what they mean.

A class table is text, a class a line: `[VALUE] NAME [COLOR]`, such as `road`, `7 road`,
`road 128 64 128` or `7 road #804080`; spaces, commas or colons separate. VALUE is what the masks
hold; without it, the lines are the values 0, 1, 2, ... that `data.ignore` leaves. COLOR is shown in
pictures, and is what masks in RGB hold, and masks whose palette gives it to the value of another
class: some programs make a palette for each mask anew. A line with the name `ignore` is no class:
its value and color count nowhere. Empty lines, and lines that begin with `#`, say nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxssl.contracts import IGNORE_LABEL, DataInfo, UnreadableError, UserError
from jaxssl.data.files import listed, open_image

MOST_CLASSES = 254
"""Labels are bytes: 255 is the pixel to ignore, and 254 is kept for values that are no class."""

MOST_COLORS = 64
"""More colors are not taken for classes: they are smoothed edges, or a photograph; nor are more
values in one mask, where they stand as smoothing makes them.
"""

MOST_IDS = 200
"""More ids are not taken for classes: black and white that was smoothed holds them all."""

MOST_VALUE = 65535
"""The highest value that a mask of 16 bits holds."""

_FOREIGN = 254
_THIN = 0.25  # see _smoothed
_RGB = tuple[int, int, int]
_Palettes = Mapping[tuple[int, _RGB], Path]
_LINE = re.compile(
    r"(?:(?P<value>\d+)[\s,:]+)?(?P<name>.*?\S)"
    r"(?:[\s,:]+(?:#(?P<hex>[0-9a-fA-F]{6})|(?P<r>\d+)[\s,]+(?P<g>\d+)[\s,]+(?P<b>\d+)))?"
)


class ForeignValuesError(UserError):
    """A mask holds values that are no class.

    Attributes:
      counts: value (an id, or a color as "#rrggbb") -> pixels.
    """

    def __init__(self, message: str, counts: Mapping[int | str, int]):
        super().__init__(message, dict(counts))  # both, so that it survives pickling
        self.counts = dict(counts)

    def __str__(self) -> str:
        return self.args[0]


@dataclasses.dataclass(frozen=True)
class ClassTable:
    """What the values of masks mean.

    Attributes:
      names: of the classes; position = label.
      values: what masks hold, by label.
      colors: by label; None where the table gives none.
      ignore: values to ignore, as the config gives them.
      void: (value, color) of the table's lines with the name "ignore".
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    colors: tuple[_RGB | None, ...]
    ignore: tuple[int, ...] = (IGNORE_LABEL,)
    void: tuple[tuple[int, _RGB | None], ...] = ()

    @property
    def info(self) -> DataInfo:
        """Names and palette; classes without a color get one of the default palette."""
        default = default_palette(len(self.names))
        palette = (own or other for own, other in zip(self.colors, default, strict=True))
        return DataInfo(self.names, tuple(palette))

    @property
    def lines(self) -> tuple[str, ...]:
        """The table as text, with a value in each line."""
        rows = [*zip(self.values, self.names, self.colors, strict=True)]
        rows += [(value, "ignore", color) for value, color in self.void]
        return tuple(
            f"{value} {name} {_hex(rgb) if rgb else ''}".strip() for value, name, rgb in rows
        )

    @property
    def uncolored(self) -> tuple[str, ...]:
        """Names of the classes without a color."""
        return tuple(n for n, rgb in zip(self.names, self.colors, strict=True) if rgb is None)

    def labels_of_values(self) -> dict[int, int]:
        """Value -> label; a class stands above a value to ignore."""
        ignored = dict.fromkeys((*self.ignore, *(value for value, _ in self.void)), IGNORE_LABEL)
        return ignored | {value: label for label, value in enumerate(self.values)}

    def labels_of_colors(self) -> dict[_RGB, int]:
        """Color -> label, of those that the table gives."""
        ignored = {rgb: IGNORE_LABEL for _, rgb in self.void if rgb is not None}
        return ignored | {c: label for label, c in enumerate(self.colors) if c is not None}


@dataclasses.dataclass(frozen=True)
class Seen:
    """What some masks hold, and the first file that holds each.

    Attributes:
      values: of masks with one channel, where no palette gives them a color of their own.
      colors: of masks with three.
      palettes: (value, color), of masks whose palette does.
    """

    values: Mapping[int, Path] = dataclasses.field(default_factory=dict)
    colors: Mapping[_RGB, Path] = dataclasses.field(default_factory=dict)
    palettes: _Palettes = dataclasses.field(default_factory=dict)

    @property
    def ids(self) -> dict[int, Path]:
        """All values, where palettes are for show and all colors are gray."""
        shown = {value: path for (value, _), path in self.palettes.items()}
        return {red: path for (red, _, _), path in self.colors.items()} | shown | {**self.values}


def default_palette(count: int) -> tuple[_RGB, ...]:
    """The colors of PASCAL VOC, up to 256: bit k of every three of a label's bits is bit 7, 6, ...
    of red, green, blue.
    """
    return tuple(
        tuple(sum((i >> 3 * k + channel & 1) << 7 - k for k in range(3)) for channel in range(3))
        for i in range(count)
    )  # pyright: ignore[reportReturnType]  # three channels each


def parse(lines: Iterable[str], ignore: Sequence[int], where: str) -> ClassTable:
    """Reads a class table; the module's docstring has its grammar.

    Args:
      lines: of the table.
      ignore: values that count nowhere.
      where: what holds the lines, for messages.

    Raises:
      UserError: a line is not understood, or two say the same.
    """
    if not all(0 <= value <= MOST_VALUE for value in ignore):
        raise UserError(f"data.ignore={tuple(ignore)}: values of masks are 0 to {MOST_VALUE}.")
    rows = [_parse_line(line, where) for line in lines if line.strip() and line.strip()[0] != "#"]
    given = [value for value, _, _ in rows if value is not None]
    if given and len(given) < len(rows):
        raise UserError(
            f"{where}: {len(given)} of {len(rows)} lines begin with a value. Give one to every "
            "line, or to none."
        )
    counted = iter(sorted(set(range(len(rows) + len(ignore))) - set(ignore)))
    rows = [(next(counted) if value is None else value, name, rgb) for value, name, rgb in rows]
    classes = [row for row in rows if row[1].lower() != "ignore"]
    others = [row for row in rows if row[1].lower() == "ignore"]
    for what, items in (
        ("value", [value for value, _, _ in rows]),
        ("name", [name for _, name, _ in classes]),
        ("color", [rgb for _, _, rgb in rows if rgb]),
    ):
        if twice := [item for item, n in collections.Counter(items).items() if n > 1]:
            raise UserError(f"{where}: two lines have the {what} {twice[0]}. Mend one of them.")
    if not 2 <= len(classes) <= MOST_CLASSES:
        raise UserError(
            f"{where}: there are {len(classes)} classes. Between 2 and {MOST_CLASSES} can be told "
            "apart."
        )
    values, names, colors = zip(*classes, strict=True)
    void = tuple((value, rgb) for value, _, rgb in others)
    return ClassTable(names, values, colors, tuple(ignore), void)


def infer(seen: Seen, ignore: Sequence[int]) -> tuple[list[str], str]:
    """Makes a class table from what masks hold.

    Values 0 and 255 alone are background and foreground. Other values are ids: each from 0 to the
    highest is a class, or, where those seen lie far apart like gray levels, only those seen.
    Colors are classes in their order, black first; also those of palettes that differ.

    Returns:
      The lines of the table, and a sentence that says what was found.

    Raises:
      UserError: the masks mix ids and colors, have too many of them, or tell no two classes apart;
        or the highest of some gray levels is one to ignore, and may be a class.
    """
    if not _gray(seen.colors) or _differing(seen.palettes):
        return _infer_colors(seen)
    if is_binary(seen, ignore):
        lines = ["0 background #000000", "255 foreground #ffffff"]
        return lines, "the masks hold 0 and 255 alone: 0 is background, 255 foreground"
    found = sorted(seen.ids.keys() - set(ignore))
    _refuse_ids(found, seen.ids, ignore)
    apart = _far_apart(found)
    kept = found if apart else [i for i in range(found[-1] + 1) if i not in ignore]
    colors = {} if _gray(color for _, color in seen.palettes) else dict(seen.palettes.keys())
    lines = [f"{i} class {i} {_hex(colors[i]) if i in colors else ''}".strip() for i in kept]
    if apart:
        return lines, f"the values in the masks are the classes: {_listed(found)}"
    return lines, f"the masks hold ids up to {found[-1]}: the classes are {kept[0]} to {kept[-1]}"


def is_binary(seen: Seen, ignore: Sequence[int]) -> bool:
    """Whether masks are black and white: they hold the values 0 and 255 and no other."""
    return seen.ids.keys() == {0, 255} and _gray(seen.colors) and 0 not in ignore


def check_palettes(paths: Sequence[Path], table: ClassTable) -> tuple[str, ...]:
    """Makes sure that palettes of masks say the same of a value, or the table knows their colors.

    Args:
      paths: of masks; those without a palette, and those that cannot be read, do not count.
      table: of classes.

    Returns:
      A sentence for people where colors decide, as `read` says, or where masks hold colors and
      some classes have none; else none.

    Raises:
      UserError: palettes differ, and some of their colors are not in the table.
    """
    palettes: dict[tuple[int, _RGB], Path] = {}
    colored = False
    with ThreadPoolExecutor() as pool:
        for path, (palette, colors) in zip(paths, pool.map(_colors_of, paths), strict=True):
            palettes = dict.fromkeys(palette.items(), path) | palettes
            colored |= colors
    _refuse_differing(palettes, table.labels_of_colors().keys())
    if _shows_other_classes(palettes, table):
        return ("palettes of masks number the classes in their own ways: their colors count",)
    if colored and table.uncolored:
        names = _listed(table.uncolored)
        return (f"masks hold colors, in which classes without one are not found: {names}",)
    return ()


def read(path: Path, table: ClassTable) -> np.ndarray:
    """Reads a mask as labels, uint8 `[h,w]`, 255 = ignore.

    Masks with one channel (8 or 16 bits, palette, or one bit) hold values; where a palette gives a
    value the color of another class, its colors count. Masks in RGB hold colors, or, where all of
    them are gray and not all colors of the table, values. Transparency is dropped.

    Raises:
      ForeignValuesError: a value is no class.
      UnreadableError: the file cannot be read.
      UserError: the format keeps no exact values.
    """
    pixels = _pixels(path, table)
    if pixels.ndim == 3:
        gray = (pixels == pixels[..., :1]).all()
        labels = _from_colors(pixels, table)
        if gray and (labels == _FOREIGN).any():
            labels, pixels = _from_values(pixels[..., 0], table), pixels[..., 0]
    else:
        labels = _from_values(pixels, table)
    if (foreign := labels == _FOREIGN).any():
        raise _foreign(path, pixels[foreign], table)
    return labels


def scan(paths: Sequence[Path]) -> Seen:
    """Looks at masks, several at a time. Those that cannot be read are left out.

    Raises:
      UserError: masks have a format that keeps no exact values, or far too many values or colors;
        or none can be read.
    """
    values, colors, palettes, unreadable, refused = {}, {}, {}, [], []
    with ThreadPoolExecutor() as pool:
        for seen in pool.map(_look, paths):
            if isinstance(seen, UserError):
                (unreadable if isinstance(seen, UnreadableError) else refused).append(seen)
                continue
            values = {**seen.values, **values}
            colors = {**seen.colors, **colors}
            palettes = {**seen.palettes, **palettes}
    if refused:
        raise UserError(f"{len(refused)} of {len(paths)} masks are refused:{listed(refused)}")
    if unreadable and len(unreadable) == len(paths):
        raise UserError(f"None of {len(paths)} masks can be read. {unreadable[0]}")
    return Seen(values, colors, palettes)


def _infer_colors(seen: Seen) -> tuple[list[str], str]:
    colors = {color: path for (_, color), path in seen.palettes.items()} | {**seen.colors}
    if seen.values:
        gray, color = next(iter(seen.values.values())), next(iter(colors.values()))
        raise UserError(
            f"Some masks hold ids in one channel, such as {gray}, some hold colors, such as "
            f"{color}. Write classes.txt, with a value and a color in each line: 7 road 128 64 128."
        )
    if _gray(colors):  # ids or colors? Some programs store gray levels in palettes to save space
        _refuse_differing(seen.palettes, ())
    if len(colors) > MOST_COLORS:
        raise UserError(_too_many(f"The masks hold {len(colors)} colors", "road 128 64 128"))
    names = [_hex(color) for color in sorted(colors)]
    lines = [f"{i} color {name[1:]} {name}" for i, name in enumerate(names)]
    return lines, f"the {len(names)} colors in the masks are the classes"


def _far_apart(values: Sequence[int]) -> bool:
    gaps = (high - low for low, high in itertools.pairwise(values))
    return values[-1] >= 8 * len(values) and min(gaps, default=8) >= 8


def _refuse_ids(found: Sequence[int], files: Mapping[int, Path], ignore: Sequence[int]) -> None:
    """Refuses values of masks if what is left of them, less those to ignore, cannot be classes."""
    if not found or found == [0]:
        raise UserError(
            f"The masks hold {_listed(sorted(files)) or 'nothing'}, which makes no two classes. "
            "Check that they are masks, and --config.data.ignore."
        )
    if found[-1] > 255:
        raise UserError(
            f"The mask {files[found[-1]]} holds the value {found[-1]}. Ids of classes are 0 to "
            f"{MOST_CLASSES - 1}. If these are instances, export masks of classes; if they are "
            "classes, write classes.txt with a line for each: 1000 road."
            f"{_suggest_ignore(found, ignore)}"
        )
    last, apart = max(files), _far_apart(found)
    if apart and last != found[-1]:
        raise UserError(
            f"The masks hold the values {_listed(sorted(files))}. Is {last} a class, or to be "
            f'ignored, as data.ignore says? Write classes.txt with a line for each: "{found[0]} '
            f'NAME" and so on, and "{last} NAME" or "{last} ignore".'
        )
    if not apart and not _dense(found):
        what = f"The masks hold {len(found)} values up to {found[-1]}: {_listed(found)}"
        what = f"{what}. The last is in {files[found[-1]]}"
        raise UserError(_too_many(what, "7 road") + _suggest_ignore(found, ignore))


def _dense(found: Sequence[int]) -> bool:
    """Whether ids are few, or most of those up to the highest are there."""
    return found[-1] < MOST_COLORS or found[-1] / 2 < len(found) <= MOST_IDS


def _suggest_ignore(found: Sequence[int], ignore: Sequence[int]) -> str:
    """What to ignore, where the highest values stand alone above ids of classes."""
    for count in (1, 2, 3):  # compression leaves more of them
        ids, above = found[:-count], found[-count:]
        if len(ids) > 1 and _dense(ids):
            wanted = ",".join(map(str, (*ignore, *above)))
            return f" To ignore {_listed(above)}, add --config.data.ignore={wanted}."
    return ""


def _too_many(what: str, line: str) -> str:
    return (
        f"{what}. If masks were smoothed, scaled or compressed, export them anew as PNG, without "
        f"that. If these are classes, write classes.txt with a line for each: {line}."
    )


def _differing(palettes: _Palettes) -> tuple[Path, Path] | None:
    """Two masks whose palettes give one value two colors, or one color two values."""
    first: dict[int | _RGB, tuple[tuple[int, _RGB], Path]] = {}
    for entry, path in palettes.items():
        for part in entry:
            other, other_path = first.setdefault(part, (entry, path))
            if other != entry:
                return other_path, path
    return None


def _refuse_differing(palettes: _Palettes, known: Collection[_RGB]) -> None:
    """Refuses palettes that differ unless all of their colors are known."""
    two = _differing(palettes)
    if two and (unknown := sorted({color for _, color in palettes} - set(known))):
        raise UserError(
            f"The palettes of the masks {two[0]} and {two[1]} differ, so that one value stands for "
            "two things. Their colors can tell: write the color of each class behind its name in "
            f'classes.txt, "NAME #RRGGBB", and "ignore #RRGGBB" for others. Missing are '
            f"{_listed([_hex(color) for color in unknown])}."
        )


def _shows_other_classes(entries: Iterable[tuple[int, _RGB]], table: ClassTable) -> bool:
    """Whether one of (value, color) has the color of another class."""
    values, colors = table.labels_of_values(), table.labels_of_colors()
    return any(c in colors and values.get(value) != colors[c] for value, c in entries)


def _gray(colors: Iterable[_RGB]) -> bool:
    return all(r == g == b for r, g, b in colors)


def _hex(color: _RGB) -> str:
    return f"#{bytes(color).hex()}"


def _listed(items: Sequence[object]) -> str:
    """Such as "3, 5, 9 and 12 more"."""
    shown = ", ".join(map(str, items[:8]))
    return f"{shown} and {len(items) - 8} more" if len(items) > 8 else shown


def _parse_line(line: str, where: str) -> tuple[int | None, str, _RGB | None]:
    found = _LINE.fullmatch(line.strip())
    assert found is not None  # a name matches anything
    value, name = found["value"], found["name"]
    rgb = None
    if found["hex"]:
        rgb = tuple(bytes.fromhex(found["hex"]))
    elif found["r"]:
        rgb = (int(found["r"]), int(found["g"]), int(found["b"]))
    numbers = (int(value or 0), MOST_VALUE), *((channel, 255) for channel in rgb or ())
    if re.match(r"#|\d+([\s,:]|$)", name) or any(number > most for number, most in numbers):
        raise UserError(
            f"{where}: the line {line.strip()!r} is not understood. A line is a name, with the "
            "mask's value before it and a color behind it if you like: 7 road 128 64 128."
        )
    return (None if value is None else int(value)), name, rgb  # pyright: ignore[reportReturnType]


def _pixels(path: Path, table: ClassTable) -> np.ndarray:
    """Values `[h,w]` or colors `[h,w,3]`."""
    image = _open(path)
    if image.mode == "1":
        white = 255 if 255 in table.values else 1
        return np.asarray(image).astype(np.uint8) * np.uint8(white)
    if image.mode in ("LA", "PA", "La"):
        return np.asarray(image)[..., 0]
    if image.mode == "P" and _shows_other_classes(_palette(image).items(), table):
        image = image.convert("RGBA")  # not RGB: Pillow warns of a palette's transparency
    if image.mode == "RGBA":
        return np.asarray(image)[..., :3]
    return np.asarray(image)


def _open(path: Path) -> Image.Image:
    image = open_image(path)
    if image.format in ("JPEG", "MPO", "JPEG2000"):
        raise UserError(
            f"The mask {path} is a {image.format} file. Its compression blends values at every "
            "border, so it no longer says which class a pixel is. Export the masks as PNG."
        )
    if image.mode not in ("1", "L", "P", "LA", "PA", "RGB", "RGBA", "I", "I;16", "I;16B"):
        raise UserError(
            f"The mask {path} has mode {image.mode}. Give a PNG with class ids in one channel, or "
            "with a color per class."
        )
    return image


def _from_values(values: np.ndarray, table: ClassTable) -> np.ndarray:
    # What is below 0 or above the table falls on its two ends, which no value owns.
    return _value_lookup(table).take(values.astype(np.int32) + 1, mode="clip")


def _from_colors(pixels: np.ndarray, table: ClassTable) -> np.ndarray:
    return _color_lookup(table).take(_pack(pixels))


@functools.lru_cache(maxsize=8)
def _value_lookup(table: ClassTable) -> np.ndarray:
    """Value + 1 -> label."""
    known = table.labels_of_values()
    lookup = np.full(max(known) + 3, _FOREIGN, np.uint8)
    lookup[np.array([*known]) + 1] = [*known.values()]
    return lookup


@functools.lru_cache(maxsize=2)
def _color_lookup(table: ClassTable) -> np.ndarray:
    """Packed color -> label, 16 MB."""
    lookup = np.full(1 << 24, _FOREIGN, np.uint8)
    for color, label in table.labels_of_colors().items():
        lookup[_pack(np.array(color))] = label
    return lookup


def _pack(colors: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(colors.astype(np.int32), -1, 0)
    return (red << 16) | (green << 8) | blue


def _foreign(path: Path, pixels: np.ndarray, table: ClassTable) -> ForeignValuesError:
    """What to say of values `[n]`, or colors `[n,3]`, that are no class."""
    values, numbers = np.unique(pixels if pixels.ndim == 1 else _pack(pixels), return_counts=True)
    names: list[Any] = values.tolist()
    if pixels.ndim == 1:
        ignored = ",".join(map(str, (*table.ignore, *names[:8])))
        text = (
            f"class id {_listed(names)}. The classes are {_listed(table.values)}; "
            f"{_listed(table.ignore)} is ignored. Write a line for each into classes.txt: "
            f'"{names[0]} NAME", where each line begins with its value. Or '
            f"--config.data.ignore={ignored} ignores such values."
        )
        if names[0] < 0 or names[-1] > MOST_VALUE:
            text = f"class id {_listed(names)}. Export it with ids from 0 to {MOST_VALUE}."
    else:
        names = [f"#{value:06x}" for value in values]
        advice = f'Write a line for each into classes.txt: "NAME {names[0]}"'
        if bare := table.uncolored:  # a new line would be a new class
            advice = (
                f"None is given for {_listed(bare)}: append it to the line of each in classes.txt, "
                f'such as "{bare[0]} {names[0]}"'
            )
        text = (
            f"color {_listed(names)}. {len(table.labels_of_colors())} colors are known. {advice}; "
            f'or "ignore {names[0]}" if it is no class. Begin a new line with a free value where '
            "the others begin with values."
        )
    counts = dict(zip(names, numbers.tolist(), strict=True))
    return ForeignValuesError(f"The mask {path} holds the {text}", counts)


def _look(path: Path) -> Seen | UserError:
    try:
        image = _open(path)
    except UserError as error:
        return error
    if image.mode.startswith("I"):
        return Seen(values=dict.fromkeys(np.unique(np.asarray(image)).tolist(), path))
    if image.mode in ("LA", "PA"):
        image = image.getchannel(0)
    if image.mode == "RGBA":
        image = image.convert("RGB")
    counted = image.getcolors(256)
    found: list[Any] = [value for _, value in counted or ()]
    if counted is None or (len(found) > MOST_COLORS and _smoothed(np.asarray(image))):
        values, colors = f"{len(found)} values, {_listed(found)}", f"more than {MOST_COLORS} colors"
        what, line = (colors, "road 128 64 128") if image.mode == "RGB" else (values, "7 road")
        return UserError(_too_many(f"The mask {path} holds {what}", line))
    if image.mode == "RGB":
        return Seen(colors=dict.fromkeys(found, path))
    palette = _palette(image)
    values = [value for value in found if value not in palette]
    return Seen(dict.fromkeys(values, path), palettes=dict.fromkeys(palette.items(), path))


def _smoothed(pixels: np.ndarray) -> bool:
    """Whether values `[h,w]`, or colors `[h,w,3]`, pass into one another at borders.

    Objects have an extent, while smoothing, scaling and compression draw lines of other values
    around them. So of the pixels at a border, those in no block of 2x2 equal ones are counted, but
    for the most frequent value of these, which may outline objects. In masks they are a fifth at
    most, even where a hundred objects share 64x64 pixels; in smoothed ones a third and more.
    """
    values = pixels if pixels.ndim == 2 else _pack(pixels)
    padded = np.pad(values, 1, mode="edge")
    same, below = padded[:, 1:] == padded[:, :-1], padded[1:] == padded[:-1]
    blocks = same[1:] & same[:-1] & below[:, 1:]
    height, width = values.shape
    around = np.stack([blocks[y : y + height, x : x + width] for y in (0, 1) for x in (0, 1)])
    _, thin = np.unique(values[~around.any(0)], return_counts=True)
    return thin.sum() - thin.max(initial=0) > _THIN * (~around.all(0)).sum()


def _colors_of(path: Path) -> tuple[dict[int, _RGB], bool]:
    """The palette of a mask, and whether it holds colors itself."""
    try:
        image = _open(path)
    except UserError:
        return {}, False
    pixels = np.asarray(image)
    gray = image.mode not in ("RGB", "RGBA") or (pixels[..., 1:3] == pixels[..., :1]).all()
    return _palette(image), not gray


def _palette(image: Image.Image) -> dict[int, _RGB]:
    """The color of each value in an image, where its palette has one for that value alone.

    Palettes are often filled up with black, which then says nothing; nor does one of the gray
    levels in order.
    """
    if image.mode != "P":
        return {}
    colors = [*zip(*[iter(image.getpalette("RGB") or ())] * 3, strict=True)]
    if len(colors) > 1 and colors == [(i, i, i) for i in range(len(colors))]:
        return {}
    used: set[Any] = {value for _, value in image.getcolors(256) or ()}
    colors = colors[: max(used) + 1]
    times = collections.Counter(colors)
    return {v: color for v, color in enumerate(colors) if v in used and times[color] == 1}
