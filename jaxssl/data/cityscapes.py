"""Cityscapes: 19 evaluated classes, and the tree they are stored in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jaxssl.contracts import IGNORE_LABEL, DataInfo, Record, UserError
from jaxssl.data.files import check_ids, read_ids, read_record
from jaxssl.data.splits import known_ids

# label id in the files, name, color; the position in this table is the train id.
_EVALUATED = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)

INFO = DataInfo(
    classes=tuple(name for _, name, _ in _EVALUATED),
    palette=tuple(color for _, _, color in _EVALUATED),
)

LABEL_IDS = np.array([label_id for label_id, _, _ in _EVALUATED], np.uint8)
"""Train id -> label id."""

TRAIN_IDS = np.full(256, IGNORE_LABEL, np.uint8)
"""Label id -> train id; 255 for everything that is not evaluated."""
TRAIN_IDS[LABEL_IDS] = np.arange(len(LABEL_IDS), dtype=np.uint8)

_IMAGE_END = "_leftImg8bit.png"


def load(
    config_data: Mapping[str, Any], split: str, labels: bool, ids: Iterable[str] | None = None
) -> Cityscapes:
    """Opens the tree under `config_data["root"]`; see `Cityscapes`."""
    return Cityscapes(config_data["root"] or "", split, labels, ids)


class Cityscapes:
    """The tree that the data set's archives unpack to, read in place.

    Images are `leftImg8bit/<split>/<city>/<id>_leftImg8bit.png`, ids `<city>_<seq>_<frame>`.
    Labels are `gtFine/<split>/<city>/<id>_gtFine_labelIds.png`, mapped to train ids, or else
    `..._labelTrainIds.png`, taken as they are; train_extra has its labels under `gtCoarse`.

    Args:
      root: folder with `leftImg8bit` and, for labels, `gtFine` or `gtCoarse`.
      split: train, val, train_extra or test; several are joined by "+".
      labels: False neither opens nor looks for a label file.
      ids: images to keep; None keeps all. Only these need labels.

    Raises:
      UserError: the tree, an id or a label is missing; on reading, a file is damaged or has
        another format than expected.
    """

    info = INFO

    def __init__(
        self,
        root: str | Path,
        split: str,
        labels: bool = True,
        ids: Iterable[str] | None = None,
    ):
        self.root = Path(root).expanduser()
        images: dict[str, str] = {}
        for name in split.split("+"):
            images |= _list_images(self.root, name)
        self.ids = tuple(sorted(images)) if ids is None else known_ids(ids, images)
        self._images = tuple(images[image_id] for image_id in self.ids)
        self._labels = _find_labels(self.root, self._images) if labels else None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Record:
        path = self.root / self._images[index]
        label_path = None if self._labels is None else self.root / self._labels[index]
        return read_record(self.ids[index], path, label_path, _read_label)


def _list_images(root: Path, split: str) -> dict[str, str]:
    folder = root / "leftImg8bit" / split
    paths = _list(root, f"leftImg8bit/{split}/*/*{_IMAGE_END}")
    if paths:
        return {PurePosixPath(path).name.removesuffix(_IMAGE_END): path for path in paths}
    archives = (
        "leftImg8bit_trainextra.zip and gtCoarse.zip"
        if split == "train_extra"
        else "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip"
    )
    raise UserError(
        f"Cityscapes is missing: there is no {folder}/<city>/*{_IMAGE_END}. Download {archives} "
        "from https://www.cityscapes-dataset.com, unpack both into one folder DIR and add "
        "--config.data.root=DIR. The config's variant :streets needs no download."
    )


def _find_labels(root: Path, images: tuple[str, ...]) -> tuple[str, ...]:
    """The label file of every image, all paths relative to `root`."""
    folders = {_label_folder(image) for image in images}
    present = {file for folder in folders for file in _list(root, f"{folder}/*_label*Ids.png")}
    labels = {image: _label_file(image, present) for image in images}
    missing = [image for image, label in labels.items() if label is None]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(images)} images have no label under {root}, such as "
            f"{', '.join(missing[:3])}. Unpack the label archive there, or leave these images "
            "unlabeled."
        )
    return tuple(label for label in labels.values() if label)


def _label_folder(image: str) -> str:
    _, split, city, _ = image.split("/")
    return f"{'gtCoarse' if split == 'train_extra' else 'gtFine'}/{split}/{city}"


def _label_file(image: str, present: set[str]) -> str | None:
    folder = _label_folder(image)
    name = PurePosixPath(image).name.removesuffix(_IMAGE_END)
    stem = f"{folder}/{name}_{folder.partition('/')[0]}"
    candidates = (f"{stem}_labelIds.png", f"{stem}_labelTrainIds.png")
    return next((file for file in candidates if file in present), None)


def _list(root: Path, pattern: str) -> list[str]:
    return [path.relative_to(root).as_posix() for path in root.glob(pattern)]


def _read_label(path: Path) -> np.ndarray:
    label = read_ids(path)
    if path.name.endswith("_labelIds.png"):
        return TRAIN_IDS.take(label)
    check_ids(label, INFO.num_classes, path)
    return label
