"""The geometry of training images on the host: scale, rotate, crop, flip; and blur, which has to
come before the crop.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from jaxssl.contracts import IGNORE_LABEL, UserError


@dataclasses.dataclass(frozen=True)
class Augment:
    """What `augment` does to an image.

    Attributes:
      crop: (height, width) of the result.
      scale: bounds (low, high) of the uniform resize factor.
      flip: whether to mirror half of the images.
      rotate: bound of the angle, in degrees, by which half of the images are turned.
      blur: share of the images that are blurred.

    Raises:
      UserError: the crop or the scale is no pair of positive numbers, low exceeds high, the angle
        is none from 0 to 180, or the share none from 0 to 1.
    """

    crop: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    flip: bool = True
    rotate: float = 0.0
    blur: float = 0.0

    def __post_init__(self) -> None:
        if len(self.crop) != 2 or min(self.crop) < 1:
            raise UserError(f"crop={self.crop} is no size. Give height and width: 512,1024.")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise UserError(f"scale={self.scale} is no range. Give low and high: 0.5,2.0.")
        if not 0 <= self.rotate <= 180:
            raise UserError(f"rotate={self.rotate} is no angle. Give degrees from 0 to 180.")
        if not 0 <= self.blur <= 1:
            raise UserError(f"blur={self.blur} is no share of the images. Give one from 0 to 1.")


def augment(
    record: Mapping[str, Any], settings: Augment, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Scales, rotates, blurs, crops and flips an image together with everything known per pixel.

    The image is resized bilinearly (antialiased, as Pillow does), turned bilinearly about its
    center, and blurred by a Gaussian of 5x5 taps; label and confidence take the nearest pixel.
    Where the scaled image is smaller than the crop, it stands at the top left. What a turned image
    leaves empty is padding too.

    Args:
      record: `image` uint8 `[H,W,3]`; optional `label` uint8 and `confidence` float32 `[H,W]`.
      settings: with crop size (h, w).
      rng: always gives seven numbers, whatever the settings are, so that each of them changes
        what it names and nothing else.

    Returns:
      `image` uint8 `[h,w,3]`, `valid` bool `[h,w]`, and `label` and `confidence` where given.
      Padding is 0 in the image, 255 in the label, 0 in the confidence and False in `valid`.
    """
    factor, top, left, mirror, turn, angle, smooth = rng.random(7)
    low, high = settings.scale
    factor = low + (high - low) * factor
    height, width = record["image"].shape[:2]
    rows = _Span.draw(height, settings.crop[0], factor, top)
    columns = _Span.draw(width, settings.crop[1], factor, left)
    blur = smooth < settings.blur

    if settings.rotate and turn < 0.5:
        turned = _Turned(rows, columns, math.radians(settings.rotate * (2 * angle - 1)))
        image = turned.image(record["image"], blur=blur)
        valid, nearest = turned.nearest()
    else:
        image = _resize(record["image"], rows, columns, blur=blur)
        valid = np.ones(image.shape[:2], bool)
        nearest = np.ix_(rows.nearest(), columns.nearest())
    arrays = {"image": (image, 0), "valid": (valid, False)}
    if "label" in record:
        arrays["label"] = (record["label"][nearest], IGNORE_LABEL)
    if "confidence" in record:
        arrays["confidence"] = (record["confidence"][nearest], 0)

    result = {}
    for name, (array, fill) in arrays.items():
        array[~valid] = fill
        result[name] = _pad(array, settings.crop, fill)
    if settings.flip and mirror < 0.5:
        result = {name: np.ascontiguousarray(array[:, ::-1]) for name, array in result.items()}
    return result


@dataclasses.dataclass(frozen=True)
class _Span:
    """`size` pixels from `start` on, along an axis resized from `source` to `scaled` pixels."""

    source: int
    scaled: int
    start: int
    size: int

    @classmethod
    def draw(cls, source: int, crop: int, factor: float, where: float) -> _Span:
        scaled = max(1, round(source * factor))
        size = min(crop, scaled)
        return cls(source, scaled, int(where * (scaled - size + 1)), size)

    def box(self) -> tuple[float, float]:
        """The same span in source pixels."""
        ratio = self.source / self.scaled
        return self.start * ratio, min((self.start + self.size) * ratio, self.source)

    def nearest(self) -> np.ndarray:
        """Source pixel under the center of each scaled pixel, in exact integers."""
        center = 2 * np.arange(self.start, self.start + self.size) + 1
        return center * self.source // (2 * self.scaled)

    def centers(self) -> np.ndarray:
        """Of the pixels, from the middle of the axis on, in scaled pixels."""
        return np.arange(self.start, self.start + self.size) + 0.5 - self.scaled / 2

    def around(self, places: np.ndarray) -> _Span:
        """The pixels that hold some places; the nearest one where these are beyond the axis."""
        low, high = np.clip(np.floor([places.min(), places.max()]), 0, self.scaled - 1).astype(int)
        return dataclasses.replace(self, start=int(low), size=int(high - low + 1))

    def widened(self, margin: int) -> tuple[_Span, tuple[int, int]]:
        """With as many pixels more at either end; and how many of these the axis does not have."""
        start, end = self.start - margin, self.start + self.size + margin
        inside = max(start, 0), min(end, self.scaled)
        wider = dataclasses.replace(self, start=inside[0], size=inside[1] - inside[0])
        return wider, (inside[0] - start, end - inside[1])


@dataclasses.dataclass(frozen=True)
class _Turned:
    """A span of rows and columns of an image that was turned counter-clockwise about its center."""

    rows: _Span
    columns: _Span
    radians: float

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of the scaled image under each pixel's center, both `[h,w]`."""
        sin, cos = math.sin(self.radians), math.cos(self.radians)
        y, x = self.rows.centers()[:, None], self.columns.centers()[None]
        return (
            cos * y + sin * x + self.rows.scaled / 2,
            cos * x - sin * y + self.columns.scaled / 2,
        )

    def nearest(self) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """Which pixels are of the image, and the source pixel under each, or a near one."""
        spans, places = (self.rows, self.columns), self.places()
        inside = [(place >= 0) & (place < s.scaled) for s, place in zip(spans, places, strict=True)]
        row, column = (
            np.clip(place * s.source // s.scaled, 0, s.source - 1).astype(int)
            for s, place in zip(spans, places, strict=True)
        )
        return inside[0] & inside[1], (row, column)

    def image(self, image: np.ndarray, *, blur: bool) -> np.ndarray:
        """The pixels, each between the four of the scaled image around its place."""
        y, x = self.places()
        rows, columns = self.rows.around(y), self.columns.around(x)
        # Blurred first: a round blur and a turn commute, and no color of the padding gets in.
        # The ring of pixels is for places less than half a pixel from the border.
        scaled = _resize(image, rows, columns, blur=blur, ring=1)
        sin, cos = math.sin(self.radians), math.cos(self.radians)
        corner = [
            place[0, 0] - (cos + slope) / 2 - span.start + 1
            for place, slope, span in ((x, -sin, columns), (y, sin, rows))
        ]
        matrix = (cos, -sin, corner[0], sin, cos, corner[1])
        size = (self.columns.size, self.rows.size)
        # Of whole numbers Pillow would cut off the fractions.
        bands = (Image.fromarray(np.float32(scaled[..., i])) for i in range(3))
        turned = [
            band.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
            for band in bands
        ]
        return np.rint(np.stack([np.asarray(band) for band in turned], -1)).astype(np.uint8)


def _resize(
    image: np.ndarray, rows: _Span, columns: _Span, *, blur: bool = False, ring: int = 0
) -> np.ndarray:
    """The span of the scaled image, blurred if asked for, with `ring` pixels around it.

    Where the image ends, it is mirrored at the centers of its outermost pixels.
    """
    margin = ring + (2 if blur else 0)
    (rows, above), (columns, beside) = rows.widened(margin), columns.widened(margin)
    # Resizing only the crop's box gives the pixels of resizing everything, then cropping.
    (top, bottom), (left, right) = rows.box(), columns.box()
    resized = np.array(
        Image.fromarray(image).resize(
            (columns.size, rows.size), Image.Resampling.BILINEAR, box=(left, top, right, bottom)
        )
    )
    padded = np.pad(resized, (above, beside, (0, 0)), "reflect") if margin else resized
    return _blur(padded) if blur else padded


TAPS = (1, 4, 6, 4, 1)
"""A Gaussian along an axis in sixteenths, that of OpenCV where nothing but the size is given."""


def _blur(image: np.ndarray) -> np.ndarray:
    """`[H,W,3]` -> `[H-4,W-4,3]`."""
    kernel = ImageFilter.Kernel((5, 5), np.outer(TAPS, TAPS).ravel().tolist())
    # Pillow leaves two pixels at each border as they are.
    return np.array(Image.fromarray(image).filter(kernel))[2:-2, 2:-2]


def _pad(array: np.ndarray, size: tuple[int, int], fill: int) -> np.ndarray:
    if array.shape[:2] == tuple(size):
        return array
    padded = np.full((*size, *array.shape[2:]), fill, array.dtype)
    padded[: array.shape[0], : array.shape[1]] = array
    return padded
