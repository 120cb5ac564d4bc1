"""RandAugment (Cubuk et al., arXiv:1909.13719) and Cutout (DeVries and Taylor, arXiv:1708.04552).

Everything is Pillow's own, by nearest pixels and with black where nothing of the image is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

LEVELS = 10
"""A strength is 1 to 10 tenths of an operation's range."""

NUMBERS = 5
"""That an operation is drawn with: which, how strong, in which direction; and a place."""

MEAN_COLOR = (125, 123, 114)
"""Of CIFAR-10's images; what is cut out becomes it."""

_Place: TypeAlias = tuple[float, float]
_Apply: TypeAlias = Callable[[Image.Image, float, _Place], Image.Image]


class Operation(NamedTuple):
    """Something that is done to an image.

    Attributes:
      apply: takes the image, a value, and a place as shares of height and width.
      weak: value that strength 0 would have.
      strong: value of the greatest strength.
      signed: whether half of the values are negative.
    """

    apply: _Apply
    weak: float = 0.0
    strong: float = 0.0
    signed: bool = False


def change(image: np.ndarray, operations: str, numbers: np.ndarray) -> np.ndarray:
    """Does some operations one after another, each drawn anew.

    Args:
      image: uint8 `[H,W,3]`.
      operations: what to draw from, one of `OPERATIONS`.
      numbers: `[n,5]` in [0,1), for n operations.
    """
    known = list(OPERATIONS[operations].values())
    picture = Image.fromarray(image)
    for which, strength, direction, *place in numbers.tolist():
        operation = known[int(which * len(known))]
        share = (1 + int(strength * LEVELS)) / LEVELS
        value = operation.weak + share * (operation.strong - operation.weak)
        value = -value if operation.signed and direction < 0.5 else value
        picture = operation.apply(picture, value, (place[0], place[1]))
    return np.array(picture)


def cut_out(image: np.ndarray, side: int, place: np.ndarray) -> np.ndarray:
    """Paints over a square about a pixel, as far as it is inside the image.

    Args:
      image: uint8 `[H,W,3]`.
      side: of the square; 0 leaves the image as it is.
      place: of the pixel, two numbers in [0,1) as shares of height and width.
    """
    slices = [
        slice(max(0, int(share * length) - side // 2), int(share * length) - side // 2 + side)
        for share, length in zip(place, image.shape, strict=False)
    ]
    image = image.copy()
    image[slices[0], slices[1]] = MEAN_COLOR
    return image


def _simple(function: Callable[[Image.Image], Image.Image]) -> Operation:
    return Operation(lambda image, value, place: function(image))


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return Operation(lambda image, value, place: kind(image).enhance(value), 0.1, 1.9)


def _moved(image: Image.Image, *matrix: float) -> Image.Image:
    """Each pixel (x, y) from (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def _solarize_add(image: Image.Image, value: float, place: _Place) -> Image.Image:
    added = np.minimum(np.asarray(image, np.int64) + int(value), 255)
    return ImageOps.solarize(Image.fromarray(added.astype(np.uint8)), 128)


def _cutout(image: Image.Image, value: float, place: _Place) -> Image.Image:
    top, left = (
        int(max(0.0, share * length - value / 2))
        for share, length in zip(place, (image.height, image.width), strict=True)
    )
    image = image.copy()
    corner = min(image.width, left + value), min(image.height, top + value)
    ImageDraw.Draw(image).rectangle(((left, top), corner), MEAN_COLOR)
    return image


_COMMON: Mapping[str, Operation] = {
    "autocontrast": _simple(ImageOps.autocontrast),
    "equalize": _simple(ImageOps.equalize),
    "rotate": Operation(lambda image, value, place: image.rotate(value), 0, 30, signed=True),
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": Operation(lambda i, v, place: _moved(i, 1, v, 0, 0, 1, 0), 0, 0.3, signed=True),
    "shear_y": Operation(lambda i, v, place: _moved(i, 1, 0, 0, v, 1, 0), 0, 0.3, signed=True),
}


def _posterize(image: Image.Image, value: float, place: _Place) -> Image.Image:
    kept = 0xFF << (8 - int(value)) & 0xFF
    return image.point([level & kept for level in range(256)] * 3)  # Pillow's refuses 0 bits


def _solarize(image: Image.Image, value: float, place: _Place) -> Image.Image:
    return ImageOps.solarize(image, math.ceil(value))  # of whole numbers the same are below both


OPERATIONS: Mapping[str, Mapping[str, Operation]] = {
    "paper": {
        "identity": _simple(lambda image: image),
        **_COMMON,
        "posterize": Operation(_posterize, 8, 4),
        "solarize": Operation(_solarize, 256, 0),
        "translate_x": Operation(
            lambda i, v, place: _moved(i, 1, 0, v * i.width, 0, 1, 0), 0, 0.45, signed=True
        ),
        "translate_y": Operation(
            lambda i, v, place: _moved(i, 1, 0, 0, 0, 1, v * i.height), 0, 0.45, signed=True
        ),
    },
    "released": {
        **_COMMON,
        "invert": _simple(ImageOps.invert),
        "posterize": Operation(_posterize, 0, 4),
        "solarize": Operation(_solarize, 0, 256),
        "solarize_add": Operation(_solarize_add, 0, 110),
        "cutout": Operation(_cutout, 0, 40),
        "translate_x": Operation(
            lambda i, v, place: _moved(i, 1, 0, v, 0, 1, 0), 0, 100, signed=True
        ),
        "translate_y": Operation(
            lambda i, v, place: _moved(i, 1, 0, 0, 0, 1, v), 0, 100, signed=True
        ),
    },
}
"""Which operations are drawn from, each as likely.

paper: the fourteen of RandAugment, with the ranges that it took over from AutoAugment.
released: the sixteen that DMT's released code draws from. They were set for larger images: a part
  of the translations leaves nothing of 32x32 pixels, and 0 bits are black.
"""
