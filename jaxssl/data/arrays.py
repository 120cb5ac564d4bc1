"""Images of one size with a class each, from a few files that are read whole."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from jaxssl.contracts import DataInfo, Record, UserError
from jaxssl.data.masks import default_palette
from jaxssl.data.splits import known_ids


class Stored(NamedTuple):
    """What files hold.

    Attributes:
      images: uint8 `[n,h,w,3]`, or `[n,h,w]` where they are gray.
      labels: uint8 `[n]`; None where they are not to be read.
    """

    images: np.ndarray
    labels: np.ndarray | None


class ArraySource:
    """A part of a data set, in memory once in a process, whichever sources are of it.

    Args:
      info: classes.
      ids: of all images of the part, in the order of the arrays.
      read: gives the arrays, and keeps them; other processes call it anew.
      wanted: ids of images to keep; None keeps all.

    Raises:
      UserError: an id is unknown; or what `read` raises.
    """

    def __init__(
        self,
        info: DataInfo,
        ids: Iterable[str],
        read: Callable[[], Stored],
        wanted: Iterable[str] | None = None,
    ):
        place = {image_id: i for i, image_id in enumerate(ids)}
        self.info = info
        self.ids = tuple(sorted(place)) if wanted is None else known_ids(wanted, place)
        self._read = read
        self._places = np.array([place[image_id] for image_id in self.ids], np.int32)

    @property
    def class_ids(self) -> np.ndarray | None:
        """Class of each image, uint8 `[len(self)]`; None without labels."""
        labels = self._stored.labels
        return None if labels is None else labels[self._places]

    @functools.cached_property
    def _stored(self) -> Stored:
        return self._read()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_stored"}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Record:
        stored, place = self._stored, self._places[index]
        image = stored.images[place]
        image = np.repeat(image[..., None], 3, -1) if image.ndim == 2 else image.copy()
        if stored.labels is None:
            return Record(image=image, id=self.ids[index])
        return Record(image=image, label=stored.labels[place], id=self.ids[index])


def parts_of(split: str, known: Iterable[str], name: str) -> list[str]:
    """The parts that a split, joined by "+", consists of; UserError where one is not known."""
    parts, known = split.split("+"), tuple(known)
    for part in parts:
        if part not in known:
            extra = " Set --config.data.extra=False." if part == "train_extra" else ""
            raise UserError(
                f"{name} has no split {part!r}. Choose one of: {', '.join(known)}.{extra}"
            )
    return parts


def numbered(name: str, count: int) -> list[str]:
    """Ids by place, such as "train_00042", as TensorFlow Datasets has them for CIFAR-10."""
    return [f"{name}_{i:05d}" for i in range(count)]


def info_of(classes: Iterable[str]) -> DataInfo:
    """Classes of images, in colors that tell them apart."""
    names = tuple(classes)
    return DataInfo(names, default_palette(len(names)), "classification")
