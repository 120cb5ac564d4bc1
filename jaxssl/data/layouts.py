"""Which files of a folder are images, masks, unlabeled and validation images, by their names.

Nothing is opened but list files.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from jaxssl.contracts import UserError
from jaxssl.data.splits import seeded_order

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "JPEGImages")
LABEL_FOLDERS = ("labels", "label", "masks", "mask", "annotations", "SegmentationClass")
PAIR_ENDS = ("annot", "_labels", "_label", "_masks", "_mask")
TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation")
UNLABELED = "unlabeled"
SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp", ".ppm", ".pgm"}
)
LABEL_ENDS = (
    "_gtFine_labelTrainIds",
    "_gtFine_labelIds",
    "_labelTrainIds",
    "_labelIds",
    "_segmentation",
    "_annotation",
    "_labels",
    "_label",
    "_masks",
    "_mask",
    "_seg",
    "_gt",
    "_L",
)
IMAGE_ENDS = ("_leftImg8bit", "_image", "_img", "_rgb", "_sat")
HELD_OUT = 10
"""One labeled image of so many is for validation where nothing else is."""

HELP = """A folder may hold
  images/ and labels/ with the same file names, for validation val/images/ and val/labels/ (or
    images/train/, images/val/, labels/train/, labels/val/), and unlabeled/ with more images; or
  train/ and trainannot/, val/ and valannot/, and unlabeled/; or
  train.txt, val.txt and unlabeled.txt with a line "IMAGE MASK" or "IMAGE" for each, paths in the
    folder; or with names of files in images/ and labels/, a line each."""

Files: TypeAlias = dict[str, str]
"""Id -> path in the root."""

_Entry: TypeAlias = tuple[str, str, str | None]  # id, image, mask


@dataclasses.dataclass(frozen=True)
class Tree:
    """The files of a data set; all paths are in `root`.

    Attributes:
      root: the folder.
      layout: where the files were found, for people.
      images: every training image, labeled or not.
      labels: masks of the training images that have one.
      val_images: validation images, all with a mask.
      val_labels: their masks.
      notes: what people should know, a sentence each.
    """

    root: Path
    layout: str
    images: Files
    labels: Files
    val_images: Files
    val_labels: Files
    notes: tuple[str, ...] = ()


def find(root: str | Path) -> Tree:
    """Finds the files of a data set.

    An id is an image's path in its folder, without suffix; behind "unlabeled/" or "val/" for images
    there; with list files of paths, the path in the root. Where nothing is there for validation, a
    tenth of the labeled images is held out, always the same.

    Raises:
      UserError: there is no such folder or no layout is recognized; a mask has no image, or two
        files have one id, or one that is not UTF-8; nothing is labeled.
    """
    if not str(root):
        raise UserError(f"Where are the images? Add --config.data.root=DIR.\n{HELP}")
    path = Path(root).expanduser()
    if not path.is_dir():
        raise UserError(f"There is no folder {path}. Set --config.data.root=DIR.\n{HELP}")
    tree = _train_pair(path) or _lists(path) or _image_folders(path)
    if tree is None:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise UserError(f"No images and masks were recognized in {path}: there is {found}.\n{HELP}")
    if not tree.labels:
        raise UserError(f"No training image in {path} has a mask ({tree.layout}).\n{HELP}")
    return tree if tree.val_images else _hold_out(tree)


def _hold_out(tree: Tree) -> Tree:
    if len(tree.labels) < 2:
        raise UserError(
            f"{tree.root} has one labeled image alone. One more is needed, for validation."
        )
    held = set(seeded_order(tree.labels, 0)[: max(1, len(tree.labels) // HELD_OUT)])
    note = f"no validation images were found: {len(held)} of the labeled ones are held out for it"
    return dataclasses.replace(
        tree,
        images={i: path for i, path in tree.images.items() if i not in held},
        labels={i: path for i, path in tree.labels.items() if i not in held},
        val_images={i: tree.images[i] for i in sorted(held)},
        val_labels={i: tree.labels[i] for i in sorted(held)},
        notes=(*tree.notes, note),
    )


def _train_pair(root: Path) -> Tree | None:
    """`train/` beside `trainannot/`, and the same for validation."""
    labels = _first(root, (f"train{end}" for end in PAIR_ENDS))
    images = _first(root, TRAIN_NAMES)
    if images is None or labels is None:
        return None
    val = _first(root, VAL_NAMES)
    val_labels = val and _first(root, (f"{val}{end}" for end in PAIR_ENDS))
    return _tree(root, (images, labels), (val, val_labels) if val and val_labels else None)


def _image_folders(root: Path) -> Tree | None:
    """`images/` beside `labels/`, in the root or in `train/`, or with `train/` in each."""
    train = _first(root, TRAIN_NAMES)
    pair = _pair(root, "") or (_pair(root, train) if train else None)
    if pair is None:
        return None
    inner = [_first(root / part, TRAIN_NAMES) for part in pair]
    if all(inner):
        val = [_first(root / part, VAL_NAMES) for part in pair]
        val_pair = (f"{pair[0]}/{val[0]}", f"{pair[1]}/{val[1]}") if all(val) else None
        return _tree(root, (f"{pair[0]}/{inner[0]}", f"{pair[1]}/{inner[1]}"), val_pair)
    val = _first(root, VAL_NAMES)
    return _tree(root, pair, _pair(root, val) if val else None)


def _tree(root: Path, train: tuple[str, str], val: tuple[str, str] | None) -> Tree:
    images, labels = _match(root, *train)
    layout = f"{train[0]}/ with masks in {train[1]}/"
    beside = (PurePosixPath(UNLABELED), PurePosixPath(train[0]).parent / UNLABELED)
    folder = next((str(f) for f in beside if (root / f).is_dir()), None)
    if folder is not None:
        inner = _first(root / folder, IMAGE_FOLDERS)
        folder = f"{folder}/{inner}" if inner else folder
        found = _list_files(root, folder)
        images = images | {f"{UNLABELED}/{i}": path for i, path in found.items()}
        layout += f", unlabeled images in {folder}/"
    tree = Tree(root, layout, images, labels, {}, {})
    return tree if val is None else _with_val(tree, *_match(root, *val), f"{val[0]}/")


def _with_val(tree: Tree, images: Files, labels: Files, where: str) -> Tree:
    """Adds validation; its images without a mask are of no use."""
    notes = tree.notes
    if left_out := len(images) - len(labels):
        notes = (*notes, f"{left_out} images in {where} have no mask and are left out")
    if not labels:
        raise UserError(f"No image in {tree.root / where} has a mask. Add them, or rename it.")
    prefix = "" if where.endswith(".txt") else "val/"
    return dataclasses.replace(
        tree,
        layout=f"{tree.layout}, validation in {where}",
        val_images={f"{prefix}{i}": images[i] for i in labels},
        val_labels={f"{prefix}{i}": path for i, path in labels.items()},
        notes=notes,
    )


def _lists(root: Path) -> Tree | None:
    """`train.txt` and its like, with a line for each image."""
    if not (root / "train.txt").is_file():
        return None
    named = _named(root, "train.txt")
    images, labels = _read_list(root, "train.txt", named)
    layout = "the list train.txt"
    if (root / f"{UNLABELED}.txt").is_file():
        more, _ = _read_list(root, f"{UNLABELED}.txt", named)
        images, layout = images | more, f"{layout}, unlabeled images in {UNLABELED}.txt"
    tree = Tree(root, layout, images, labels, {}, {})
    val = next((f"{name}.txt" for name in VAL_NAMES if (root / f"{name}.txt").is_file()), None)
    return tree if val is None else _with_val(tree, *_read_list(root, val, named), val)


def _lines(path: Path) -> dict[int, str]:
    """The lines of a text by their number, without the empty ones."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The list {path} cannot be read as text: {error}.") from error
    return {number: line.strip() for number, line in enumerate(lines, 1) if line.strip()}


def _named(root: Path, name: str) -> dict[str, _Entry]:
    """What names in `images/` mean, with and without suffix, if a list begins with one."""
    pair, first = _pair(root, ""), next(iter(_lines(root / name).values()), "")
    if pair is None or (root / first).is_file():
        return {}

    def names(files: Files) -> dict[str, str]:
        paths = {str(PurePosixPath(path).relative_to(pair[0])): i for i, path in files.items()}
        return paths | {i: i for i in files}

    if first not in names(_list_files(root, pair[0])):
        return {}
    images, labels = _match(root, *pair)
    return {name: (i, images[i], labels.get(i)) for name, i in names(images).items()}


def _read_list(root: Path, name: str, named: Mapping[str, _Entry]) -> tuple[Files, Files]:
    images: Files = {}
    labels: Files = {}
    for number, line in _lines(root / name).items():
        where = f"{root / name}, line {number}"
        image_id, image, label = named.get(line) or _split_line(root, line, where)
        _add(images, image_id, image)
        if label:
            labels[image_id] = label
    if not images:
        raise UserError(f"The list {root / name} names no image. Delete it, or add lines.")
    return dict(sorted(images.items())), dict(sorted(labels.items()))


def _split_line(root: Path, line: str, where: str) -> _Entry:
    """Image and mask of a line; names may hold spaces, so the files decide where it is split."""
    if (root / line).is_file():
        return _entry(line, None, where)
    places = [i for i, character in enumerate(line) if character in " \t,"]
    for i in places:
        image, label = line[:i].strip(), line[i + 1 :].strip()
        if image and label and (root / image).is_file() and (root / label).is_file():
            return _entry(image, label, where)
    missing = next((w for w in line.split() if not (root / w).is_file()), line)
    raise UserError(
        f'{where}: there is no file {missing!r} in {root}. A line is "IMAGE MASK" or "IMAGE", as '
        "paths in that folder; or, in all lines, the name of a file in images/ and labels/."
    )


def _entry(image: str, label: str | None, where: str) -> _Entry:
    for path in (image, label or ""):
        if PurePosixPath(path).is_absolute():
            raise UserError(f"{where}: {path} is absolute. Give paths in the folder of the list.")
    path = PurePosixPath(image)
    return str(path.with_suffix("")), str(path), label and str(PurePosixPath(label))


def _match(root: Path, image_folder: str, label_folder: str) -> tuple[Files, Files]:
    """Images, and masks by the id of the image of the same name, less what ends of names say."""
    images, masks = _list_files(root, image_folder), _list_files(root, label_folder)
    if not images:
        raise UserError(f"{root / image_folder} holds no image. {_suffixes()}")
    short = collections.defaultdict(list)
    for image_id, path in images.items():
        for name in {_without(image_id, IMAGE_ENDS), image_id + PurePosixPath(path).suffix}:
            short[name].append(image_id)
    labels: Files = {}
    strangers = []
    for mask_id, path in masks.items():
        name = _without(mask_id, LABEL_ENDS)
        found = [mask_id] if mask_id in images else short.get(mask_id, []) + short.get(name, [])
        if len(set(found)) == 1:
            _add(labels, found[0], path)
        else:
            strangers.append(path)
    if strangers:
        raise UserError(
            f"{len(strangers)} of {len(masks)} masks in {root / label_folder} have no image in "
            f"{root / image_folder}, such as {', '.join(strangers[:3])}. Names must be the same, "
            "but for the suffix and an end such as _mask. Add the images, or move the "
            "masks away."
        )
    return images, dict(sorted(labels.items()))


def _list_files(root: Path, folder: str) -> Files:
    """Path in the folder without suffix -> path in the root, of all files that may be images."""
    found: Files = {}
    for place, folders, names in os.walk(root / folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(place, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith("."):
                inner = path.relative_to(root / folder).with_suffix("").as_posix()
                _add(found, inner, path.relative_to(root).as_posix())
    return dict(sorted(found.items()))


def _add(files: Files, key: str, path: str) -> None:
    try:
        key.encode()
    except UnicodeEncodeError:  # as Python reads names of another encoding
        raise UserError(
            f"The name of the file {os.fsencode(path)} is not UTF-8. Rename it, in ASCII say."
        ) from None
    if key in files:
        raise UserError(
            f"{files[key]} and {path} have the same name. Rename one, or move it away: a name "
            "stands for one image and one mask."
        )
    files[key] = path


def _pair(root: Path, folder: str) -> tuple[str, str] | None:
    """The folders of images and of masks in a folder, if both are there."""
    images = _first(root / folder, IMAGE_FOLDERS)
    labels = _first(root / folder, LABEL_FOLDERS)
    if images is None or labels is None:
        return None
    return str(PurePosixPath(folder) / images), str(PurePosixPath(folder) / labels)


def _first(folder: Path, names: Iterable[str]) -> str | None:
    """The first of some names that is a folder, as it is spelled on disk; case does not matter."""
    if not folder.is_dir():
        return None
    there = {entry.name.lower(): entry.name for entry in folder.iterdir() if entry.is_dir()}
    return next((there[name.lower()] for name in names if name.lower() in there), None)


def _without(name: str, ends: tuple[str, ...]) -> str:
    """A name less the first of some ends that it has; a name is never nothing."""
    stem = name.rpartition("/")[2]
    return next((name[: -len(e)] for e in ends if stem.endswith(e) and stem != e), name)


def _suffixes() -> str:
    return f"Images are files with the suffixes {', '.join(sorted(SUFFIXES))}."
