"""Pictures of what the networks see and say: a sheet with a row per image, a column per view; and
which classes they take for which.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxssl.contracts import IGNORE_LABEL, DataInfo

_MIN_WIDTH, _MAX_WIDTH = (
    256,
    512,
)  # of a tile; smaller ones grow by a whole factor, larger ones shrink
_GAP, _LINE, _SWATCH = 8, 24, 14
_PAPER, _INK, _GRAY = (255, 255, 255), (28, 30, 34), (110, 114, 122)
_DARKEST = (8, 48, 107)
_HATCH = np.array([[20, 21, 25], [92, 96, 106]], np.uint8)


def panel(
    rows: Sequence[Sequence[np.ndarray]],
    info: DataInfo,
    titles: Sequence[str],
    *,
    captions: Sequence[str] = (),
) -> np.ndarray:
    """Draws a contact sheet with column titles and a legend of the classes that it shows.

    Args:
      rows: for each row one tile per title: an image, uint8 `[h,w,3]`, or labels, uint8 `[h,w]`,
        whose 255 (ignored in the truth, dropped by a threshold) is drawn dark and hatched.
      info: class names and palette.
      titles: of the columns.
      captions: a line above each row, such as the id of its image.

    Returns:
      uint8 `[H,W,3]`.
    """
    tiles = [[_draw(tile, info) for tile, _ in zip(row, titles, strict=True)] for row in rows]
    widths = [max(tile.width for tile in column) for column in zip(*tiles, strict=True)]
    heights = [max(tile.height for tile in row) for row in tiles]
    lefts = [_GAP + sum(widths[:i]) + i * _GAP for i in range(len(widths))]
    width = sum(widths) + (len(widths) + 1) * _GAP
    above = _LINE if captions else _GAP
    body = _GAP + _LINE + sum(heights) + len(heights) * above
    entries, legend_lines = _legend(_shown(rows, info), info, width)
    sheet = Image.new("RGB", (width, body + _GAP + legend_lines * _LINE + _GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for title, left in zip(titles, lefts, strict=True):
        _write(pen, (left, _GAP + _LINE // 2), title, _INK, 15)
    top = _GAP + _LINE
    for i, row in enumerate(tiles):
        if captions:
            _write(pen, (_GAP, top + _LINE // 2), captions[i], _GRAY, 12)
        top += above
        for tile, left in zip(row, lefts, strict=True):
            sheet.paste(tile, (left, top))
        top += heights[i]
    for (x, line), name, swatch in entries:
        y = body + _GAP + line * _LINE
        sheet.paste(swatch, (x, y + (_LINE - _SWATCH) // 2))
        _write(pen, (x + _SWATCH + 6, y + _LINE // 2), name, _INK, 13)
    return np.array(sheet)


def sheet(images: Sequence[np.ndarray], captions: Sequence[str], *, columns: int = 8) -> np.ndarray:
    """Draws images side by side, at most 128 pixels large, with a line below each.

    Args:
      images: uint8 `[h,w,3]`, at least one.
      captions: as many.
      columns: how many stand in a row.

    Returns:
      uint8 `[H,W,3]`.
    """
    side, columns = 128, min(columns, len(images))
    rows, step = -(-len(images) // columns), (side + _GAP, side + _LINE + _GAP)
    paper = Image.new("RGB", (_GAP + columns * step[0], _GAP + rows * step[1]), _PAPER)
    pen = ImageDraw.Draw(paper)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = _GAP + i % columns * step[0], _GAP + i // columns * step[1]
        tile = Image.fromarray(image)
        if (factor := side // max(tile.size)) > 1:
            size = tile.width * factor, tile.height * factor
            tile = tile.resize(size, Image.Resampling.NEAREST)
        tile.thumbnail((side, side))
        paper.paste(tile, (x, y))
        while _font(13).getlength(caption) > side and len(caption) > 2:
            caption = f"{caption[:-2]}…"
        _write(pen, (x, y + side + _LINE // 2), caption, _INK, 13)
    return np.array(paper)


def write(
    path: str | os.PathLike[str],
    rows: Sequence[Sequence[np.ndarray]],
    info: DataInfo,
    titles: Sequence[str],
    *,
    captions: Sequence[str] = (),
) -> np.ndarray:
    """Writes `panel(...)` as a PNG file, whole or not at all, and returns it."""
    picture, path = panel(rows, info, titles, captions=captions), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    Image.fromarray(picture).save(part, format="PNG")
    part.replace(path)
    return picture


def confusion(counts: np.ndarray, info: DataInfo) -> np.ndarray:
    """Draws which classes are taken for which: a row for each true class, the darker the larger the
    share of it that is taken for the class of the column; in percent where classes are few.

    Shades follow the square root of the share, so that what is rare can be seen.

    Args:
      counts: confusion matrix `[C,C]`, rows are the truth.
      info: class names.

    Returns:
      uint8 `[H,W,3]`.
    """
    C, few = info.num_classes, info.num_classes <= 20
    cell, size = (44, 14) if few else (14, 11)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [name if len(name) <= 24 else f"{name[:23]}…" for name in info.classes]
    margin = math.ceil(max(map(_font(size).getlength, names))) + _GAP
    corner, side = (_LINE + margin, _GAP), C * cell
    sheet = Image.new("RGB", (corner[0] + side + _GAP, corner[1] + side + margin + _LINE), _PAPER)
    shade = np.sqrt(shares)
    colors = _PAPER + shade[..., None] * (np.array(_DARKEST) - _PAPER)
    matrix = Image.fromarray(colors.astype(np.uint8))
    sheet.paste(matrix.resize((side, side), Image.Resampling.NEAREST), corner)
    # What stands beside the rows stands below the columns, turned.
    beside = Image.new("RGB", (margin, side), _PAPER)
    pen = ImageDraw.Draw(beside)
    for i, name in enumerate(names):
        _write(pen, (margin - _GAP // 2, round((i + 0.5) * cell)), name, _INK, size, "rm")
    sheet.paste(beside, (_LINE, corner[1]))
    sheet.paste(beside.transpose(Image.Transpose.ROTATE_90), (corner[0], corner[1] + side))
    pen = ImageDraw.Draw(sheet)
    if few:
        for row, column in np.argwhere(counts).tolist():
            x, y = (corner[i] + round((at + 0.5) * cell) for i, at in enumerate((column, row)))
            share = shares[row, column]
            text = f"{100 * share:.0f}" if share >= 0.005 else "<1"
            _write(pen, (x, y), text, _PAPER if shade[row, column] > 0.5 else _INK, size, "mm")
    title = Image.new("RGB", (side, _LINE), _PAPER)
    for name, turn in (("predicted", 0), ("true", 90)):
        pen = ImageDraw.Draw(title)
        pen.rectangle((0, 0, side, _LINE), fill=_PAPER)
        _write(pen, (side // 2, _LINE // 2), name, _GRAY, 13, "mm")
        place = (0, corner[1]) if turn else (corner[0], sheet.height - _LINE)
        sheet.paste(title.rotate(turn, expand=True), place)
    return np.array(sheet)


def _draw(tile: np.ndarray, info: DataInfo) -> Image.Image:
    """The tile in color, at a size for looking at."""
    size = _size(tile.shape[1], tile.shape[0])
    if tile.ndim == 3:
        # A small image grows pixel by pixel, as its labels do, so that one can compare them.
        filter_ = Image.Resampling.NEAREST if size[0] > tile.shape[1] else Image.Resampling.BOX
        return Image.fromarray(tile).resize(size, filter_)
    label = np.array(Image.fromarray(tile).resize(size, Image.Resampling.NEAREST))
    palette = np.zeros((256, 3), np.uint8)
    palette[: info.num_classes] = info.palette
    y, x = np.indices(label.shape)
    hatch = _HATCH[((x + y) % 8 < 2).astype(int)]
    return Image.fromarray(np.where((label == IGNORE_LABEL)[..., None], hatch, palette[label]))


def _size(width: int, height: int) -> tuple[int, int]:
    if width > _MAX_WIDTH:
        return _MAX_WIDTH, max(1, round(height * _MAX_WIDTH / width))
    factor = math.ceil(_MIN_WIDTH / width)
    return width * factor, height * factor


def _shown(rows: Sequence[Sequence[np.ndarray]], info: DataInfo) -> list[int]:
    labels = [np.unique(tile) for row in rows for tile in row if tile.ndim == 2]
    shown = np.unique(np.concatenate(labels)).tolist() if labels else []
    return [label for label in shown if label < info.num_classes or label == IGNORE_LABEL]


def _legend(
    labels: Sequence[int], info: DataInfo, width: int
) -> tuple[list[tuple[tuple[int, int], str, Image.Image]], int]:
    """((x, line), name, swatch) of each label, and how many lines they take."""
    entries, x, line = [], _GAP, 0
    for label in labels:
        name = "ignored or dropped" if label == IGNORE_LABEL else info.classes[label]
        step = _SWATCH + 6 + math.ceil(_font(13).getlength(name)) + 18
        if x + step > width and x > _GAP:
            x, line = _GAP, line + 1
        swatch = _draw(np.full((1, 1), label, np.uint8), info).crop((0, 0, _SWATCH, _SWATCH))
        entries.append(((x, line), name, swatch))
        x += step
    return entries, line + 1 if entries else 0


def _write(
    pen: ImageDraw.ImageDraw,
    at: tuple[int, int],
    text: str,
    color: tuple[int, int, int],
    size: int,
    anchor: str = "lm",
) -> None:
    pen.text(at, text, fill=color, font=_font(size), anchor=anchor)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # every wheel of Pillow has FreeType
    return font
