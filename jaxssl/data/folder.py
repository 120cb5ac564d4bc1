"""Your own images: a folder of images and masks, read in place; see `layouts` and `masks`."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import ExifTags, Image

from jaxssl.contracts import Record, UnreadableError, UserError
from jaxssl.data import layouts, masks, splits
from jaxssl.data.files import open_image, opened, stamp
from jaxssl.data.layouts import Files, Tree
from jaxssl.data.masks import ClassTable

CLASSES_FILE = "classes.txt"
SAMPLE = 200
"""Images whose size is looked at, and masks whose palette is, or whether they hold 0 and 1."""

_T = TypeVar("_T")
_ANNOUNCED = 300  # so many masks take a second or more

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Orientation tag -> what makes the image upright."""


def load(
    config_data: Mapping[str, Any], split: str, labels: bool, ids: Iterable[str] | None = None
) -> Folder:
    """Opens a part of the folder `config_data["root"]`.

    Args:
      config_data: `classes` is the class table, a line an item; where empty, the file classes.txt
        in the root, or else the masks, say what the classes are. `ignore`: values of masks that
        count nowhere.
      split: "train", images with a mask; "train_extra", images without; "val"; several are joined
        by "+".
      labels: False never opens a mask of an image.
      ids: images to keep; None keeps all.

    Raises:
      UserError: as `layouts.find`, `masks.parse` and `masks.infer`; or an id is unknown.
    """
    tree = layouts.find(config_data["root"] or "")
    table, _ = class_table(config_data, tree)
    return Folder(tree, split, table, labels, ids)


class Folder:
    """Images with their masks as labels.

    Images may have any size and most formats: 8 bits a channel, gray, palette or CMYK as well;
    transparency is dropped. A camera's orientation tag is obeyed, so that images stand as viewers
    show them, and masks have to stand so too.

    Args:
      tree: the files.
      split: as `load` takes it.
      table: what values of masks mean.
      labels: whether to read masks.
      ids: images to keep; None keeps all.

    Raises:
      UserError: the split or an id is unknown; on reading, a file is damaged, has a format that
        does not do, or an image and its mask differ in size.
    """

    def __init__(
        self,
        tree: Tree,
        split: str,
        table: ClassTable,
        labels: bool = True,
        ids: Iterable[str] | None = None,
    ):
        images: Files = {}
        for name in split.split("+"):
            images |= _images(tree, name)
        self.info = table.info
        self.ids = tuple(sorted(images)) if ids is None else splits.known_ids(ids, images)
        self._root, self._table = tree.root, table
        self._images = tuple(images[image_id] for image_id in self.ids)
        self._labels = _masks(tree, self.ids) if labels else None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Record:
        path = self._root / self._images[index]
        image = read_image(path)
        if self._labels is None:
            return Record(image=image, id=self.ids[index], file=str(path))
        label_path = self._root / self._labels[index]
        label = masks.read(label_path, self._table)
        if label.shape != image.shape[:2]:
            raise _sizes_differ(path, image, label_path, label)
        return Record(image=image, label=label, id=self.ids[index], file=str(path))


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a folder holds, for settings that follow from it.

    Attributes:
      labeled: number of labeled training images, as `data.split` chooses them.
      unlabeled: number of the others.
      sizes: (height, width) of some training and validation images, at least one.
      classes: the class table, a line each.
      notes: sentences for people.
    """

    labeled: int
    unlabeled: int
    sizes: tuple[tuple[int, int], ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def look(config_data: Mapping[str, Any]) -> Facts:
    """Looks at a folder: its files, the first bytes of some images, and masks if need be.

    Raises:
      UserError: as `load`; or no image can be read.
    """
    tree = layouts.find(config_data["root"] or "")
    table, notes = class_table(config_data, tree)
    split = _split(config_data, tree)
    chosen = (*split.labeled, *split.unlabeled)
    paths = [*_some([tree.images[i] for i in chosen]), *_some([*tree.val_images.values()])]
    sizes = tuple(size for path in paths if (size := _size(tree.root / path)))
    if not sizes:
        raise UserError(f"None of {len(paths)} images in {tree.root} can be read. Copy them again.")
    notes += masks.check_palettes(_some(_mask_paths(config_data, tree)), table)
    return Facts(
        labeled=len(split.labeled),
        unlabeled=len(split.unlabeled),
        sizes=sizes,
        classes=table.lines,
        notes=(f"{tree.root}: {tree.layout}", *tree.notes, *notes),
    )


def class_table(config_data: Mapping[str, Any], tree: Tree) -> tuple[ClassTable, tuple[str, ...]]:
    """The class table of a folder, and sentences about it for people.

    Masks are looked at where nothing else says what the classes are; only those of labeled and of
    validation images.
    """
    ignore = tuple(config_data["ignore"])
    path = tree.root / CLASSES_FILE
    if config_data["classes"]:
        lines, where = config_data["classes"], "data.classes"
    elif path.exists():
        lines, where = _read_lines(path), str(path)
    else:
        what = f"what the classes are. A {CLASSES_FILE} saves this"
        lines, note = masks.infer(_scan(_mask_paths(config_data, tree), what), ignore)
        return masks.parse(lines, ignore, f"the masks in {tree.root}"), (note,)
    table = masks.parse(lines, ignore, where)
    void = {value for value, _ in table.void}
    black_and_white = table.values == (0, 1) and 255 not in void
    if black_and_white and _black_and_white(_mask_paths(config_data, tree), ignore):
        note = f"the masks hold 0 and 255 alone: 255 is {table.names[1]}"
        return dataclasses.replace(table, values=(0, 255)), (note,)
    if masks.parse(lines, (), where).values != table.values:
        named = zip(table.values[:8], table.names, strict=False)
        shown = ", ".join(f"{value} is {name}" for value, name in named)
        ignored = ", ".join(map(str, ignore))
        return table, (f"{where} gives no values, and the names pass over {ignored}: {shown}",)
    return table, ()


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}. Save it as UTF-8.") from error


def read_image(path: Path) -> np.ndarray:
    """Reads an image as uint8 `[h,w,3]`, as viewers show it: an orientation tag is obeyed.
    Transparency is dropped.

    Raises:
      UnreadableError: the file cannot be read.
      UserError: it has a single channel of more than 8 bits.
    """
    image = open_image(path)
    if image.mode.startswith(("I", "F")):
        raise UserError(
            f"The image {path} has mode {image.mode}, more than 8 bits. Which contrast shows what "
            "matters is for you to say: convert it to 8 bits."
        )
    # Not Pillow's exif_transpose: it writes all tags anew, and fails where one is of a wrong type.
    if (turn := _TURNS.get(_orientation(image))) is not None:
        image = image.transpose(turn)
    if "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of a palette's transparency otherwise
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _images(tree: Tree, split: str) -> Files:
    if split == "val":
        return tree.val_images
    if split == "train":
        return {i: tree.images[i] for i in tree.labels}
    if split == "train_extra":
        return {i: path for i, path in tree.images.items() if i not in tree.labels}
    raise UserError(f"A folder has no split {split!r}. Choose one of: train, train_extra, val.")


def _masks(tree: Tree, ids: Sequence[str]) -> tuple[str, ...]:
    known = tree.labels | tree.val_labels
    if missing := [image_id for image_id in ids if image_id not in known]:
        raise UserError(
            f"{len(missing)} of {len(ids)} images in {tree.root} have no mask, such as "
            f"{', '.join(missing[:3])}. Add them, or leave these images unlabeled."
        )
    return tuple(known[image_id] for image_id in ids)


def _split(config_data: Mapping[str, Any], tree: Tree) -> splits.Split:
    extra = [i for i in tree.images if i not in tree.labels] if config_data.get("extra") else []
    return splits.choose(config_data, list(tree.labels), extra)


def _mask_paths(config_data: Mapping[str, Any], tree: Tree) -> list[Path]:
    paths = [tree.labels[image_id] for image_id in _split(config_data, tree).labeled]
    return [tree.root / path for path in (*paths, *tree.val_labels.values())]


def _black_and_white(paths: Sequence[Path], ignore: Sequence[int]) -> bool:
    """Whether masks hold 0 and 255 alone. All are looked at only if a sample does."""
    what = f"whether 255 is a class. The values 0 and 255 in {CLASSES_FILE} save this"
    sample = _scan(_some(paths), what)
    return sample.ids.keys() <= {0, 255} and masks.is_binary(_scan(paths, what), ignore)


def _scan(paths: Sequence[Path], what: str) -> masks.Seen:
    """Looks at masks to see `what`; once in a process, as long as they stay as they are."""
    return _scan_stamped(tuple(stamp(path) for path in paths), what)


@functools.lru_cache(maxsize=2)
def _scan_stamped(stamped: tuple[tuple[Path, int, int], ...], what: str) -> masks.Seen:
    if len(stamped) >= _ANNOUNCED:
        print(f"Looking at {len(stamped)} masks to see {what}.", file=sys.stderr, flush=True)
    return masks.scan([path for path, _, _ in stamped])


def _some(paths: Sequence[_T]) -> Sequence[_T]:
    return paths[:: max(1, -(-len(paths) // SAMPLE))]


def _size(path: Path) -> tuple[int, int] | None:
    """Height and width as `read_image` gives them, from the first bytes; None if unreadable."""
    try:
        with opened(path) as image:
            width, height = image.size if _orientation(image) <= 4 else image.size[::-1]
            return height, width
    except UnreadableError:
        return None


def _orientation(image: Image.Image) -> int:
    """The tag that says how to turn an image; 1 in TIFF, where Pillow obeys it by itself."""
    return 1 if image.format == "TIFF" else image.getexif().get(ExifTags.Base.Orientation, 1)


def _sizes_differ(path: Path, image: np.ndarray, label_path: Path, label: np.ndarray) -> UserError:
    hint = ""
    with opened(path) as stored:
        if label.shape == image.shape[1::-1] and _orientation(stored) > 4:
            hint = " The image has an orientation tag that the mask does not follow: turn one."
    return UserError(
        f"The mask {label_path} is {label.shape[1]}x{label.shape[0]} pixels, its image {path} is "
        f"{image.shape[1]}x{image.shape[0]}. Give both the same size.{hint}"
    )
