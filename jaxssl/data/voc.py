"""PASCAL VOC 2012: 20 classes and background, with the coarse labels of SBD, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from jaxssl.contracts import DataInfo, Record, UnreadableError, UserError
from jaxssl.data.files import check_ids, read_ids, read_record
from jaxssl.data.splits import known_ids

CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)


def color(label: int) -> tuple[int, int, int]:
    """The color of a label, as the devkit's VOClabelcolormap.m computes it: its bits 0, 3 and 6
    are the highest ones of red, its bits 1, 4 and 7 of green, its bits 2 and 5 of blue.
    """
    red, green, blue = (
        sum(((label >> (3 * place + channel)) & 1) << (7 - place) for place in range(3))
        for channel in range(3)
    )
    return red, green, blue


INFO = DataInfo(classes=CLASSES, palette=tuple(color(label) for label in range(len(CLASSES))))

SETS = ("classic", "blender")

_IMAGES = "JPEGImages"
_LISTS = "ImageSets/Segmentation"
_AUGMENTED = ("train_aug.txt", "trainaug.txt")
_SBD = ("benchmark_RELEASE/dataset/cls", "VOCaug/dataset/cls")
_DOWNLOAD = (
    "Download VOCtrainval_11-May-2012.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2012 and, "
    "for the 10582 images of the set blender and for unlabeled images, SBD's benchmark.tgz from "
    "http://home.bharathh.info/pubs/codes/SBD/download.html; unpack both into one folder DIR and "
    "add --config.data.root=DIR. Labels of SBD as PNG do as well: "
    "DIR/VOCdevkit/VOC2012/SegmentationClassAug."
)


def load(
    config_data: Mapping[str, Any], split: str, labels: bool, ids: Iterable[str] | None = None
) -> Voc:
    """Opens the tree under `config_data["root"]`; `set` is one of `SETS`, "blender" where no config
    says it. See `Voc`.
    """
    image_set = config_data.get("set", "blender")
    return Voc(config_data["root"] or "", image_set, split, labels, ids)


class Voc:
    """The trees that VOC's and SBD's archives unpack to, read in place.

    Images are `JPEGImages/<id>.jpg`. Of several labels the fine one is taken, the first of

    - `SegmentationClass/<id>.png`, VOC's own: fine, with 255 at the borders of objects. Those of
      images that are neither in train.txt nor in val.txt, which some archives add, are coarse;
    - `SegmentationClassAug/<id>.png`: SBD's, coarse, as PNG;
    - `benchmark_RELEASE/dataset/cls/<id>.mat`, or `VOCaug/dataset/cls/<id>.mat`, in the tree or up
      to two folders above: SBD's own files.

    The set "classic" trains on the 1464 images of train.txt, and has the others of the 10582 as
    train_extra. "blender" trains on all 10582: those of train_aug.txt, or, without such a list, of
    train.txt and those that have a label. In neither an image of val.txt is a training image.

    Args:
      root: folder with `VOCdevkit/VOC2012`, with `VOC2012`, or with `JPEGImages` itself.
      image_set: "classic" or "blender".
      split: train, val or train_extra; several are joined by "+".
      labels: False opens no label file, and looks for their names only where no list says which
        images the 10582 are.
      ids: images to keep; None keeps all. Only these need labels.

    Raises:
      UserError: the tree, a list, an id, an image or a label is missing; on reading, a file is
        damaged or has another format than expected.

    Attributes:
      note: how many labels are fine and how many coarse, for people; "" without labels. Results
        of blender splits compare only where this is alike.
    """

    info = INFO

    def __init__(
        self,
        root: str | Path,
        image_set: str,
        split: str,
        labels: bool = True,
        ids: Iterable[str] | None = None,
    ):
        if image_set not in SETS:
            raise UserError(
                f"data.set={image_set!r} is unknown. Set --config.data.set to one of: "
                f"{', '.join(SETS)}."
            )
        self.root = _find_tree(Path(root).expanduser().absolute())
        images: set[str] = set()
        for name in split.split("+"):
            images |= _image_ids(self.root, image_set, name)
        _refuse_missing_images(self.root, images)
        self.ids = tuple(sorted(images)) if ids is None else known_ids(ids, images)
        self._labels = _find_labels(self.root, self.ids) if labels else None
        self.note = "" if self._labels is None else _count(self.root, self.ids, self._labels)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Record:
        path = self.root / _IMAGES / f"{self.ids[index]}.jpg"
        label_path = None
        if self._labels is not None:
            label_path = self._labels[index].path(self.ids[index])
        return read_record(self.ids[index], path, label_path, _read_label)


class _Labels(NamedTuple):
    """A folder of label files."""

    folder: Path
    end: str

    def path(self, image_id: str) -> Path:
        return self.folder / f"{image_id}{self.end}"

    def ids(self) -> set[str]:
        return _names(self.folder, self.end)


def _find_tree(root: Path) -> Path:
    for tree in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (tree / _IMAGES).is_dir():
            return tree
    raise UserError(
        f"PASCAL VOC 2012 is missing: {root} holds neither {_IMAGES} nor VOC2012/{_IMAGES} nor "
        f"VOCdevkit/VOC2012/{_IMAGES}. {_DOWNLOAD} configs/mkd_cityscapes.py:streets needs no "
        "download."
    )


def _image_ids(tree: Path, image_set: str, split: str) -> set[str]:
    val = _read_list(tree / _LISTS / "val.txt")
    if split == "val":
        return val
    if split not in ("train", "train_extra"):
        raise UserError(f"VOC has no split {split!r}. Choose one of: train, train_extra, val.")
    train = _read_list(tree / _LISTS / "train.txt") - val
    if image_set == "classic":
        return train if split == "train" else _augmented_ids(tree, train, val) - train
    return _augmented_ids(tree, train, val) if split == "train" else set()


def _augmented_ids(tree: Path, train: set[str], val: set[str]) -> set[str]:
    lists = (tree / _LISTS / name for name in _AUGMENTED)
    if path := next((path for path in lists if path.exists()), None):
        ids = _read_list(path)
    else:
        ids = train.union(*(labels.ids() for labels in _label_folders(tree)))
    if not ids - val - train:
        raise UserError(
            f"Nothing in {tree} says which images SBD adds to train.txt: there are no labels of "
            f"SBD, nor does {_LISTS}/{_AUGMENTED[0]} name others. {_DOWNLOAD} Without them: "
            "--config.data.set=classic --config.data.extra=False."
        )
    return ids - val


def _read_list(path: Path) -> set[str]:
    """Ids of a list, whose lines hold an id or an image's path, and maybe the label's behind it."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"The list {path} cannot be read as text: {error}. Unpack "
            "VOCtrainval_11-May-2012.tar again; its ImageSets belong beside its JPEGImages."
        ) from error
    return {PurePosixPath(line.split()[0]).stem for line in lines if line.strip()}


def _refuse_missing_images(tree: Path, ids: set[str]) -> None:
    missing = sorted(ids - _names(tree / _IMAGES, ".jpg"))
    if missing:
        raise UserError(
            f"{len(missing)} of {len(ids)} listed images are not in {tree / _IMAGES}, such as "
            f"{', '.join(f'{image_id}.jpg' for image_id in missing[:3])}. Unpack "
            "VOCtrainval_11-May-2012.tar again; it holds those of SBD, too."
        )


def _label_folders(tree: Path) -> tuple[_Labels, ...]:
    """Where labels may be, the best first; the folders need not be there."""
    own = (_Labels(tree / name, ".png") for name in ("SegmentationClass", "SegmentationClassAug"))
    near = (tree, tree.parent, tree.parent.parent)
    return *own, *(_Labels(folder / name, ".mat") for folder in near for name in _SBD)


def _find_labels(tree: Path, ids: tuple[str, ...]) -> tuple[_Labels, ...]:
    """The folder that each image's label is taken from."""
    found: dict[str, _Labels] = {}
    for labels in reversed(_label_folders(tree)):
        found |= dict.fromkeys(labels.ids(), labels)
    missing = [image_id for image_id in ids if image_id not in found]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(ids)} images have no label in {tree}, such as "
            f"{', '.join(missing[:3])}. {_DOWNLOAD} Or leave these images unlabeled."
        )
    return tuple(found[image_id] for image_id in ids)


def _count(tree: Path, ids: tuple[str, ...], labels: tuple[_Labels, ...]) -> str:
    official = _read_list(tree / _LISTS / "train.txt") | _read_list(tree / _LISTS / "val.txt")
    own = tree / "SegmentationClass"
    fine = sum(
        image_id in official and label.folder == own
        for image_id, label in zip(ids, labels, strict=True)
    )
    return f"{len(ids)} labels: {fine} fine, {len(ids) - fine} coarse"


def _names(folder: Path, end: str) -> set[str]:
    return {path.name.removesuffix(end) for path in folder.glob(f"[!.]*{end}")}


def _read_label(path: Path) -> np.ndarray:
    label = _read_mat(path) if path.suffix == ".mat" else read_ids(path)
    check_ids(label, INFO.num_classes, path)
    return label


def _read_mat(path: Path) -> np.ndarray:
    from scipy.io import loadmat  # for SBD's files alone

    try:
        label = loadmat(path, variable_names=("GTcls",))["GTcls"][0, 0]["Segmentation"]
    except Exception as error:  # by what a damaged file raises, SciPy does not tell it from others
        raise UnreadableError(
            f"The file {path} cannot be read as a label of SBD: {error!r}. Unpack benchmark.tgz "
            "again."
        ) from error
    if label.ndim != 2 or label.dtype != np.uint8:
        raise UserError(
            f"The label {path} has shape {label.shape} and type {label.dtype}. SBD's hold one "
            "8-bit class id a pixel in GTcls.Segmentation: unpack benchmark.tgz again."
        )
    return label
