"""Readers by name, and the image sets that training reads."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

import jaxssl.data
from jaxssl.contracts import IGNORE_LABEL, Record, Source, UnreadableError, UserError
from jaxssl.data import splits


def load(
    config_data: Mapping[str, Any],
    split: str,
    labels: bool,
    ids: Iterable[str] | None = None,
) -> Source:
    """Opens a data set with the reader `jaxssl/data/<name>.py`.

    Args:
      config_data: the config's `data` section; `name` picks the reader, the rest is the reader's.
      split: part of the data set, such as "train" or "val".
      labels: False never opens a label file.
      ids: images to keep; None keeps all. A reader looks for labels of these only.

    Raises:
      UserError: the name is unknown, the data are missing, or an id is not among them.
    """
    name = config_data["name"]
    reader = _reader(name)
    if reader is None:
        names = [m.name for m in pkgutil.iter_modules(jaxssl.data.__path__) if _reader(m.name)]
        raise UserError(
            f"There is no data set {name!r}. Set --config.data.name to one of: {', '.join(names)}."
        )
    return reader.load(config_data, split, labels, ids)


def training_sets(config_data: Mapping[str, Any]) -> tuple[splits.Split, dict[str, Source]]:
    """Splits the training images and opens the parts.

    Returns:
      The split, and the sources "labeled" and "unlabeled"; the latter has no labels, and may be
      empty where every image is labeled. "holdout" is a third one, with labels, where
      `data.validation` is a number of images to hold out.

    Raises:
      UserError: as `load` and `splits.choose`.
    """
    train = load(config_data, "train", labels=False)
    extra = load(config_data, "train_extra", labels=False).ids if config_data.get("extra") else ()
    split = splits.choose(config_data, train.ids, extra, _known_classes(config_data, train))
    labeled = load(config_data, "train", True, split.labeled)
    split = dataclasses.replace(split, note=getattr(labeled, "note", ""))
    sources = {
        "labeled": labeled,
        "unlabeled": load(config_data, _unlabeled(config_data), False, split.unlabeled),
    }
    if split.holdout:
        sources["holdout"] = load(config_data, "train", True, split.holdout)
    return split, sources


def class_ids(source: Source) -> np.ndarray:
    """Class of each image of a source with labels of whole images, uint8 `[n]`, 255 where it has
    none, or cannot be read.

    From the source's `class_ids`, if it has these, without decoding an image; else every one is
    read.
    """
    if (known := getattr(source, "class_ids", None)) is not None:
        return known
    found = np.full(len(source), IGNORE_LABEL, np.uint8)
    for i in range(len(source)):
        with contextlib.suppress(UnreadableError):
            found[i] = source[i].get("label", IGNORE_LABEL)
    return found


def truth(config_data: Mapping[str, Any], split: splits.Split) -> Source:
    """The unlabeled images with the labels that they have all the same, to measure pseudo-labels.

    Raises:
      UserError: as `load`, where an image has no label.
    """
    return load(config_data, _unlabeled(config_data), True, split.unlabeled)


def _known_classes(config_data: Mapping[str, Any], train: Source) -> dict[str, int] | None:
    """Class of each training image that has one as a whole, where a split is to heed them."""
    listed = config_data.get("labeled_list") and not config_data.get("validation")
    if train.info.task != "classification" or listed:
        return None
    source = load(config_data, "train", labels=True)
    found = zip(source.ids, class_ids(source).tolist(), strict=True)
    return {image_id: label for image_id, label in found if label != IGNORE_LABEL}


def _unlabeled(config_data: Mapping[str, Any]) -> str:
    """The parts of the data set that unlabeled images come from."""
    return "train+train_extra" if config_data.get("extra") else "train"


class Subset:
    """The images of a source that have the given ids, sorted.

    Raises:
      UserError: an id is not in the source.
    """

    def __init__(self, source: Source, ids: Iterable[str]):
        self.info = source.info
        self.ids = splits.known_ids(ids, source.ids)
        position = {image_id: i for i, image_id in enumerate(source.ids)}
        self._source = source
        self._positions = tuple(position[image_id] for image_id in self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Record:
        return self._source[self._positions[index]]


def evenly_spaced(source: Source, most: int) -> Subset:
    """At most so many images of a source, from the first one on at equal distances."""
    count = min(most, len(source))
    return Subset(source, [source.ids[i * len(source) // count] for i in range(count)])


def _reader(name: str) -> ModuleType | None:
    """The module of that name, if it reads a data set: it has a function `load`."""
    modules = [module.name for module in pkgutil.iter_modules(jaxssl.data.__path__)]
    if name not in modules or name == "loading":
        return None
    module = importlib.import_module(f"jaxssl.data.{name}")
    return module if hasattr(module, "load") else None
