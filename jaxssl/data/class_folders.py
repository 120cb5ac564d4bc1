"""Your own images for classification, read in place.

train/CLASS/      images of a class, in more folders if need be; the names of these folders,
                  sorted, are the classes
val/CLASS/        likewise; without val/, a tenth of each class of train/ is held out, always the
                  same
test/CLASS/       likewise; never opened unless asked for
unlabeled/        more images, in folders or not
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jaxssl.contracts import Record, UserError
from jaxssl.data import layouts, splits
from jaxssl.data.arrays import info_of, parts_of
from jaxssl.data.folder import read_image
from jaxssl.data.layouts import Files
from jaxssl.data.masks import MOST_CLASSES

PARTS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "train_extra": ("unlabeled",),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""Split -> names of its folder."""

HELP = """A folder may hold train/CLASS/, val/CLASS/ and test/CLASS/, images in a folder for each
class, of which train/ alone is needed; and unlabeled/, with more images."""


def load(
    config_data: Mapping[str, Any], split: str, labels: bool, ids: Iterable[str] | None = None
) -> ClassFolders:
    """Opens a part of the folder `config_data["root"]`.

    An id is an image's path in the root, without suffix, such as "train/cat/0042".

    Args:
      config_data: `root`.
      split: "train"; "train_extra", the images in unlabeled/; "val"; "test"; several are joined by
        "+".
      labels: whether records have a label.
      ids: images to keep; None keeps all. Only these need labels.

    Raises:
      UserError: there is no such folder; a class is missing or too many are there; two files have
        one id; or a split or an id is unknown.
    """
    return ClassFolders(find(config_data["root"] or ""), split, labels, ids)


@dataclasses.dataclass(frozen=True)
class Tree:
    """The images of a data set.

    Attributes:
      root: the folder.
      classes: names, sorted.
      images: split -> id -> path in the root.
      note: what people should know; "" for nothing.
    """

    root: Path
    classes: tuple[str, ...]
    images: Mapping[str, Files]
    note: str = ""


class ClassFolders:
    """Images with the class whose folder they are in; of any size, and what `folder` reads.

    Args:
      tree: the files.
      split: as `load` takes it.
      labels: whether records have a label.
      ids: images to keep; None keeps all.

    Raises:
      UserError: the split or an id is unknown, or an image with a label is in no class's folder.
    """

    def __init__(
        self, tree: Tree, split: str, labels: bool = True, ids: Iterable[str] | None = None
    ):
        images: Files = {}
        for part in parts_of(split, PARTS, "A folder of classes"):
            if part == "test" and not tree.images[part]:
                raise UserError(f"There is no test/ in {tree.root}.\n{HELP}")
            images |= tree.images[part]
        self.info, self.note = info_of(tree.classes), tree.note
        self.ids = tuple(sorted(images)) if ids is None else splits.known_ids(ids, images)
        self._root = tree.root
        self._images = tuple(images[image_id] for image_id in self.ids)
        self.class_ids = _class_ids(tree, self.ids) if labels else None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Record:
        path = self._root / self._images[index]
        record = Record(image=read_image(path), id=self.ids[index], file=str(path))
        if self.class_ids is not None:
            record["label"] = self.class_ids[index]
        return record


def find(root: str | Path) -> Tree:
    """Finds the images of a folder; nothing is opened.

    Raises:
      UserError: as `load`.
    """
    if not str(root):
        raise UserError(f"Where are the images? Add --config.data.root=DIR.\n{HELP}")
    path = Path(root).expanduser()
    if not path.is_dir():
        raise UserError(f"There is no folder {path}. Set --config.data.root=DIR.\n{HELP}")
    images = {part: _images(path, names) for part, names in PARTS.items()}
    if not images["train"]:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise UserError(f"No train/CLASS/ with images is in {path}: there is {found}.\n{HELP}")
    classes = tuple(sorted({_class_name(path, image) for image in images["train"].values()}))
    if not 2 <= len(classes) <= MOST_CLASSES:
        raise UserError(
            f"{path} has {len(classes)} class(es) in train/; 2 to {MOST_CLASSES} are possible.\n"
            f"{HELP}"
        )
    for part in ("val", "test"):
        used = {_class_name(path, image) for image in images[part].values()}
        if strangers := sorted(used - set(classes)):
            raise UserError(
                f"{part}/ in {path} has {len(strangers)} class(es) that train/ has not, such as "
                f"{strangers[0]}. Names must be the same."
            )
    tree = Tree(path, classes, images)
    return tree if images["val"] else _hold_out(tree)


def _images(root: Path, names: Iterable[str]) -> Files:
    folder = layouts.first_named(root, names)
    found = layouts.list_files(root, folder) if folder else {}
    return {f"{folder}/{inner}": path for inner, path in found.items()}


def _class_name(root: Path, image: str) -> str:
    """The folder that an image is in, below that of its part."""
    _, name, *rest = PurePosixPath(image).parts
    if not rest:
        raise UserError(
            f"The image {root / image} is in no class. Move it into the folder of its class, or to "
            f"{root / 'unlabeled'}.\n{HELP}"
        )
    return name


def _hold_out(tree: Tree) -> Tree:
    of_class: dict[str, list[str]] = {}
    for image_id, image in tree.images["train"].items():
        of_class.setdefault(_class_name(tree.root, image), []).append(image_id)
    held = {
        image_id
        for ids in of_class.values()
        if len(ids) > 1
        for image_id in splits.seeded_order(ids, 0)[: max(1, len(ids) // layouts.HELD_OUT)]
    }
    if not held:
        raise UserError(
            f"{tree.root} has one image of each class and no val/. Add images for validation."
        )
    train = tree.images["train"]
    parts = {
        "train": {i: image for i, image in train.items() if i not in held},
        "val": {i: image for i, image in train.items() if i in held},
    }
    note = (
        f"no val/ was found: {len(held)} of {len(train)} images in train/, about one in "
        f"{layouts.HELD_OUT} of each class, are held out for it"
    )
    return dataclasses.replace(tree, images={**tree.images, **parts}, note=note)


def _class_ids(tree: Tree, ids: Sequence[str]) -> np.ndarray:
    """Class of images, uint8 `[n]`."""
    if missing := [image_id for image_id in ids if image_id in tree.images["train_extra"]]:
        raise UserError(
            f"{len(missing)} of {len(ids)} images in {tree.root} are in no class, such as "
            f"{', '.join(missing[:3])}. Leave these images unlabeled."
        )
    place = {name: label for label, name in enumerate(tree.classes)}
    return np.array([place[_class_name(tree.root, image_id)] for image_id in ids], np.uint8)
