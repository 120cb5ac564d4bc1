"""The geometry of training images: scale, crop, flip, on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from jaxssl.contracts import IGNORE_LABEL, UserError


@dataclasses.dataclass(frozen=True)
class Augment:
    """What `augment` does to an image.

    Attributes:
      crop: (height, width) of the result.
      scale: bounds (low, high) of the uniform resize factor.
      flip: whether to mirror half of the images.

    Raises:
      UserError: the crop or the scale is no pair of positive numbers, or low exceeds high.
    """

    crop: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    flip: bool = True

    def __post_init__(self) -> None:
        if len(self.crop) != 2 or min(self.crop) < 1:
            raise UserError(f"crop={self.crop} is no size. Give height and width: 512,1024.")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise UserError(f"scale={self.scale} is no range. Give low and high: 0.5,2.0.")


def augment(
    record: Mapping[str, Any], settings: Augment, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Scales, crops and flips an image together with everything known per pixel.

    The image is resized bilinearly (antialiased, as Pillow does), label and confidence take the
    nearest pixel. Where the scaled image is smaller than the crop, it stands at the top left.

    Args:
      record: `image` uint8 `[H,W,3]`; optional `label` uint8 and `confidence` float32 `[H,W]`.
      settings: with crop size (h, w).
      rng: always gives four numbers, whatever the settings are.

    Returns:
      `image` uint8 `[h,w,3]`, `valid` bool `[h,w]`, and `label` and `confidence` where given.
      Padding is 0 in the image, 255 in the label, 0 in the confidence and False in `valid`.
    """
    factor, top, left, mirror = rng.random(4)
    low, high = settings.scale
    factor = low + (high - low) * factor
    height, width = record["image"].shape[:2]
    rows = _Span.draw(height, settings.crop[0], factor, top)
    columns = _Span.draw(width, settings.crop[1], factor, left)

    image = _resize(record["image"], rows, columns)
    arrays = {"image": (image, 0), "valid": (np.ones(image.shape[:2], bool), False)}
    nearest = np.ix_(rows.nearest(), columns.nearest())
    if "label" in record:
        arrays["label"] = (record["label"][nearest], IGNORE_LABEL)
    if "confidence" in record:
        arrays["confidence"] = (record["confidence"][nearest], 0)

    result = {name: _pad(array, settings.crop, fill) for name, (array, fill) in arrays.items()}
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


def _resize(image: np.ndarray, rows: _Span, columns: _Span) -> np.ndarray:
    # Resizing only the crop's box gives the pixels of resizing everything, then cropping.
    (top, bottom), (left, right) = rows.box(), columns.box()
    resized = Image.fromarray(image).resize(
        (columns.size, rows.size), Image.Resampling.BILINEAR, box=(left, top, right, bottom)
    )
    return np.asarray(resized)


def _pad(array: np.ndarray, size: tuple[int, int], fill: int) -> np.ndarray:
    if array.shape[:2] == tuple(size):
        return array
    padded = np.full((*size, *array.shape[2:]), fill, array.dtype)
    padded[: array.shape[0], : array.shape[1]] = array
    return padded
