"""What happens to training images on the host: scale, rotate, crop, flip; blur, which has to come
before the crop; and where labels are of whole images, RandAugment and Cutout, which run in Pillow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from jaxssl.contracts import IGNORE_LABEL, UserError
from jaxssl.data import randaugment

GRAY = 128
"""What is around an image whose network is not told where it ends."""


@dataclasses.dataclass(frozen=True)
class Augment:
    """What `augment` and `augment_whole` do to an image.

    Attributes:
      crop: (height, width) of the result.
      scale: bounds (low, high) of the resize factor.
      scale_median: half of the factors are below it and half above, uniform on either side; None:
        uniform from low to high.
      flip: whether to mirror half of the images.
      rotate: bound of the angle, in degrees, by which half of the images are turned.
      blur: share of the images that are blurred.
      pad: pixels around the scaled image that the crop may take in.
      randaugment: operations of RandAugment, one after another (`augment_whole` alone).
      operations: what they are drawn from, one of `randaugment.OPERATIONS`.
      cutout: side of the square that is cut out at last, 0 for none (`augment_whole` alone).

    Raises:
      UserError: the crop or the scale is no pair of positive numbers, low exceeds high, the median
        is not between them, the angle is none from 0 to 180, the share none from 0 to 1, or another
        number or word does not do.
    """

    crop: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    scale_median: float | None = None
    flip: bool = True
    rotate: float = 0.0
    blur: float = 0.0
    pad: int = 0
    randaugment: int = 0
    operations: str = "paper"
    cutout: int = 0

    def __post_init__(self) -> None:
        if len(self.crop) != 2 or min(self.crop) < 1:
            raise UserError(f"crop={self.crop} is no size. Give height and width: 512,1024.")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise UserError(f"scale={self.scale} is no range. Give low and high: 0.5,2.0.")
        low, high = self.scale
        if self.scale_median is not None and not low <= self.scale_median <= high:
            raise UserError(
                f"scale_median={self.scale_median} is not within scale={self.scale}. Give a number "
                "between, or none."
            )
        if not 0 <= self.rotate <= 180:
            raise UserError(f"rotate={self.rotate} is no angle. Give degrees from 0 to 180.")
        if not 0 <= self.blur <= 1:
            raise UserError(f"blur={self.blur} is no share of the images. Give one from 0 to 1.")
        if not 0 <= self.pad < min(self.crop):
            raise UserError(f"pad={self.pad} is not from 0 to less than a side of the crop.")
        if self.randaugment < 0 or self.cutout < 0:
            raise UserError(
                f"randaugment={self.randaugment}, cutout={self.cutout}: give numbers from 0 on."
            )
        if self.operations not in randaugment.OPERATIONS:
            raise UserError(
                f"operations={self.operations!r} are unknown. There are: "
                f"{', '.join(randaugment.OPERATIONS)}."
            )

    def factor(self, drawn: float) -> float:
        """The resize factor that a number from [0,1) stands for, half of them below the median."""
        low, high = self.scale
        if self.scale_median is None:
            return low + (high - low) * drawn
        return float(np.interp(drawn, (0, 0.5, 1), (low, self.scale_median, high)))


def augment(
    record: Mapping[str, Any],
    settings: Augment,
    rng: np.random.Generator,
    *,
    unit: float = 1.0,
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
      unit: size of the image to which the scale 1 belongs, as a factor of its own size.

    Returns:
      `image` uint8 `[h,w,3]`, `valid` bool `[h,w]`, and `label` and `confidence` where given.
      Padding is 0 in the image, 255 in the label, 0 in the confidence and False in `valid`.
    """
    factor, top, left, mirror, turn, angle, smooth = rng.random(7)
    factor = unit * settings.factor(factor)
    rows, columns = (
        _Span.draw(side, crop, factor, where, settings.pad)
        for side, crop, where in zip(
            record["image"].shape, settings.crop, (top, left), strict=False
        )
    )
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
        result[name] = _pad(array, settings.crop, fill, (rows.before, columns.before))
    if settings.flip and mirror < 0.5:
        result = {name: np.ascontiguousarray(array[:, ::-1]) for name, array in result.items()}
    return result


def augment_whole(
    record: Mapping[str, Any], settings: Augment, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """As `augment`, then RandAugment and Cutout, for an image whose label is a class of the whole.

    A scale of 1 is that of the smallest image that covers the crop, whatever size it comes in.
    Around images there is gray, of 128.

    Args:
      record: `image` uint8 `[H,W,3]`; optional `label` and `confidence`, which stay as they are.
      settings: with crop size (h, w).
      rng: gives the seven numbers of `augment`, and after them, if there is need, two for Cutout
        and five for each operation.

    Returns:
      `image` uint8 `[h,w,3]`, and `label` and `confidence` where given.
    """
    unit = _covering(record["image"], settings.crop)
    found = augment({"image": record["image"]}, settings, rng, unit=unit)
    image = np.where(found["valid"][..., None], found["image"], np.uint8(GRAY))
    if settings.randaugment or settings.cutout:
        place = rng.random(2)
        numbers = rng.random((settings.randaugment, randaugment.NUMBERS))
        image = randaugment.change(image, settings.operations, numbers)
        image = randaugment.cut_out(image, settings.cutout, place)
    return {"image": image} | {n: record[n] for n in ("label", "confidence") if n in record}


def fit(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle of an image that covers a size: what `augment_whole` does without chance, for
    evaluation; uint8 `[H,W,3]` -> `[*size,3]`.
    """
    factor = _covering(image, size)
    rows, columns = (
        _Span.middle(side, crop, factor) for side, crop in zip(image.shape, size, strict=False)
    )
    return _resize(image, rows, columns)


def _covering(image: np.ndarray, size: tuple[int, int]) -> float:
    """Factor by which an image is resized to be as high and wide as a size, or more in one way."""
    return max(crop / side for crop, side in zip(size, image.shape, strict=False))


@dataclasses.dataclass(frozen=True)
class _Span:
    """`size` pixels from `start` on, along an axis resized from `source` to `scaled` pixels; in the
    crop `before` pixels of padding stand before them.
    """

    source: int
    scaled: int
    start: int
    size: int
    before: int = 0

    @classmethod
    def draw(cls, source: int, crop: int, factor: float, where: float, pad: int) -> _Span:
        scaled = max(1, round(source * factor))
        window = min(crop, scaled + 2 * pad)
        first = int(where * (scaled + 2 * pad - window + 1)) - pad
        start, end = max(first, 0), min(first + window, scaled)
        return cls(source, scaled, start, end - start, start - first)

    @classmethod
    def middle(cls, source: int, crop: int, factor: float) -> _Span:
        scaled = max(crop, round(source * factor))
        return cls(source, scaled, (scaled - crop) // 2, crop)

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
    if rows.source == rows.scaled and columns.source == columns.scaled:
        resized = image[rows.start :, columns.start :][: rows.size, : columns.size].copy()
    else:
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


def _pad(
    array: np.ndarray, size: tuple[int, int], fill: int, corner: tuple[int, int]
) -> np.ndarray:
    """Puts an array with its top left at `corner` of a larger one."""
    if array.shape[:2] == tuple(size):
        return array
    padded = np.full((*size, *array.shape[2:]), fill, array.dtype)
    (top, left), (height, width) = corner, array.shape[:2]
    padded[top : top + height, left : left + width] = array
    return padded
