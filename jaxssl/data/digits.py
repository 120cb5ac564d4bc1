"""Handwritten digits in the package, to try classification without a download.

The 1797 images of 8x8 pixels are the test set of "Optical Recognition of Handwritten Digits"
(E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, https://doi.org/10.24432/C50P49,
licensed under CC BY 4.0), those of scikit-learn's `load_digits`. `digits.npz` holds them as arrays
`images` uint8 `[1797,8,8]`, 0 to 16, and `labels` uint8 `[1797]`.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxssl.contracts import UserError
from jaxssl.data import splits
from jaxssl.data.arrays import ArraySource, Stored, info_of, parts_of

SIDE = 8

VAL_COUNT = 360
"""Images for validation, 36 of each digit, drawn once for all; the 1437 others are for training."""

INFO = info_of("0123456789")


def load(
    config_data: Mapping[str, Any], split: str, labels: bool, ids: Iterable[str] | None = None
) -> ArraySource:
    """Opens a part of the digits.

    An id is such as "digit_0042", the image's place in scikit-learn's arrays.

    Args:
      config_data: `size`, the side of the images, 8 where no config says it, or a multiple of 8:
        each pixel becomes a square.
      split: "train" or "val"; several are joined by "+".
      labels: whether records have a label.
      ids: images to keep; None keeps all.

    Raises:
      UserError: the size, the split or an id does not do.
    """
    size = config_data.get("size") or SIDE
    if not isinstance(size, int) or size < SIDE or size % SIDE:
        raise UserError(
            f"data.size={size} does not do: digits have {SIDE}x{SIDE} pixels, and become larger by "
            f"a whole factor. Set --config.data.size={4 * SIDE}, say."
        )
    parts = tuple(parts_of(split, ("train", "val"), "The set of digits"))
    names = [f"digit_{place:04d}" for place in _places(parts)]
    return ArraySource(INFO, names, functools.partial(_read, parts, size, labels), ids)


@functools.lru_cache(maxsize=4)
def _read(parts: tuple[str, ...], size: int, labels: bool) -> Stored:
    images, classes = (array[_places(parts)] for array in _arrays())
    factor = size // SIDE
    bright = np.round(images * (255 / 16)).astype(np.uint8)
    return Stored(bright.repeat(factor, 1).repeat(factor, 2), classes if labels else None)


def _places(parts: tuple[str, ...]) -> list[int]:
    """Where the images of some parts stand."""
    _, labels = _arrays()
    classes = {str(place): label for place, label in enumerate(labels.tolist())}
    val = {int(place) for place in splits.hold_out(classes, VAL_COUNT, 0, classes)}
    places = {"train": sorted(set(range(len(labels))) - val), "val": sorted(val)}
    return [place for part in parts for place in places[part]]


@functools.cache
def _arrays() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 `[n,8,8]`, 0 to 16, and labels uint8 `[n]`."""
    path = importlib.resources.files("jaxssl.data").joinpath("digits.npz")
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        return stored["images"], stored["labels"]
