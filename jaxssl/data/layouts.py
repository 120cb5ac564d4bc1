"""Which files of a folder are images, masks, unlabeled and validation images, by their names.

Nothing is opened but list files.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from jaxssl.contracts import UserError
from jaxssl.data.splits import seeded_order

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "JPEGImages")
# Annotations last: beside SegmentationClass/, PASCAL VOC keeps boxes there.
LABEL_FOLDERS = ("labels", "label", "masks", "mask", "SegmentationClass", "annotations")
PAIR_ENDS = ("annot", "_labels", "_label", "_masks", "_mask")
TRAIN, VAL, UNLABELED = "train", "val", "unlabeled"
PARTS = {
    TRAIN: ("train", "training"),
    VAL: ("val", "valid", "validation"),
    UNLABELED: ("unlabeled",),
}
"""Part -> names of its folder; with ".txt" behind, of its list."""
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
  train/ and trainannot/, val/ and valannot/, and unlabeled/.
A list train.txt, val.txt or unlabeled.txt counts before the folders of its part: with a line
"IMAGE MASK" or "IMAGE" for each image, paths in the folder; or with names of files in images/ and
labels/, a line each."""

Files: TypeAlias = dict[str, str]
"""Id -> path in the root."""

_Entry: TypeAlias = tuple[str, str, str | None]  # id, image, mask
_Folders: TypeAlias = tuple[str, str | None]  # of images, of masks

_PART_OF = {
    f"{name}{end}": part
    for part, names in PARTS.items()
    for name in names
    for end in ("", ".txt", *PAIR_ENDS)
}
_EXPECTED = {
    VAL: "expected are val/images/ and val/labels/, val/ and valannot/, images/val/ and "
    "labels/val/, or a list val.txt",
    UNLABELED: "expected are images in unlabeled/, or a list unlabeled.txt",
}


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


@dataclasses.dataclass(frozen=True)
class _Part:
    """Images, masks of those that have one, and where both were found."""

    images: Files
    labels: Files
    where: str


def find(root: str | Path) -> Tree:
    """Finds the files of a data set.

    Training, validation and unlabeled images each come from their list, or where there is none,
    from their folders, less what another part has; what is named like a list or folder of a part
    and is not used gets a note. Where nothing is there for validation, a tenth of the labeled
    images is held out, always the same.

    An id is an image's path in its folder, without suffix; behind "unlabeled/" or "val/" for images
    there; with list files of paths, the path in the root.

    Raises:
      UserError: there is no such folder or no layout is recognized; a mask has no image, or two
        files have one id, or one that is not UTF-8; nothing is labeled.
    """
    if not str(root):
        raise UserError(f"Where are the images? Add --config.data.root=DIR.\n{HELP}")
    path = Path(root).expanduser()
    if not path.is_dir():
        raise UserError(f"There is no folder {path}. Set --config.data.root=DIR.\n{HELP}")
    parts = _parts(path)
    if TRAIN not in parts:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise UserError(f"No images and masks were recognized in {path}: there is {found}.\n{HELP}")
    tree = _tree(path, parts)
    return tree if tree.val_images else _hold_out(tree)


def _parts(root: Path) -> dict[str, _Part]:
    folders = {part: found for part in PARTS if (found := _folders(root, part))}
    parts: dict[str, _Part] = {}
    for part in PARTS:
        if name := first_named(root, (f"{name}.txt" for name in PARTS[part]), Path.is_file):
            parts[part] = _read_list(root, name, part, folders.get(part))
    for part in (VAL, UNLABELED, TRAIN):  # in images/ of training may be the others
        if part in folders and part not in parts:
            taken = {path for other in parts.values() for path in other.images.values()}
            found = _read_folders(root, part, folders[part], taken)
            if found.images or part == TRAIN:
                parts[part] = found
    return parts


def _tree(root: Path, parts: Mapping[str, _Part]) -> Tree:
    nothing = _Part({}, {}, "")
    train, val, more = (parts.get(part, nothing) for part in (TRAIN, VAL, UNLABELED))
    for what, part in (("training", train), ("validation", val)):
        if part.where and not part.labels:
            raise UserError(
                f"No {what} image in {root} has a mask ({part.where}). Add masks.\n{HELP}"
            )
    images, layout, notes = train.images, train.where, _unused(root, parts)
    if more.images:
        images, layout = images | more.images, f"{layout}, unlabeled images in {more.where}"
    if val.images:
        layout = f"{layout}, validation in {val.where}"
    if left_out := len(val.images) - len(val.labels):
        notes.append(f"{left_out} images in {val.where} have no mask and are left out")
    val_images = {image_id: val.images[image_id] for image_id in val.labels}
    return Tree(root, layout, images, train.labels, val_images, val.labels, tuple(notes))


def _unused(root: Path, parts: Mapping[str, _Part]) -> list[str]:
    """A sentence for each list and folder with a name that means something, in the root or in
    images/ and labels/, of which no file is used.
    """
    files = [p for part in parts.values() for p in (*part.images.values(), *part.labels.values())]
    used = {str(place) for file in files for place in PurePosixPath(file).parents}
    used |= {part.where for part in parts.values()}  # lists
    halves = dict.fromkeys((name.lower() for name in (*IMAGE_FOLDERS, *LABEL_FOLDERS)), TRAIN)
    notes = []
    for folder in ("", *(_pair(root, "") or ())):
        known = _PART_OF if folder else _PART_OF | halves
        for inner in sorted(n for n in os.listdir(root / folder) if n.lower() in known):
            part, name = known[inner.lower()], str(PurePosixPath(folder, inner))
            listed = name.endswith(".txt")
            if name not in used and (root / name).is_file() == listed:
                found = parts.get(part)
                where = f"the {part} images are in {found.where}" if found else _EXPECTED[part]
                notes.append(f"{name}{'' if listed else '/'} is not used: {where}")
    return notes


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


def _folders(root: Path, part: str) -> _Folders | None:
    """The folders of a part.

    Of "train", they are `train/` and `trainannot/`, `images/train/` and `labels/train/`,
    `train/images/` and `train/labels/`, or `images/` and `labels/`; "val" is named likewise.
    Unlabeled images stand in the root, or beside those for training.
    """
    names = PARTS[part]
    folder, whole = first_named(root, names), _pair(root, "")
    if part == UNLABELED:
        for place in ("", *(whole or ())[:1], first_named(root, PARTS[TRAIN]) or ""):
            if found := first_named(root / place, names):
                images = first_named(root / place / found, IMAGE_FOLDERS) or ""
                return str(PurePosixPath(place, found, images)), None
        return None
    beside = first_named(root, (f"{name}{end}" for name in names for end in PAIR_ENDS))
    if folder and beside:
        return folder, beside
    inner = [f"{half}/{name}" for half in whole or () if (name := first_named(root / half, names))]
    if len(inner) == 2:
        return inner[0], inner[1]
    return (folder and _pair(root, folder)) or (whole if part == TRAIN else None)


def _read_folders(root: Path, part: str, folders: _Folders, taken: Collection[str] = ()) -> _Part:
    image_folder, label_folder = folders
    if label_folder is None:
        images, labels, where = list_files(root, image_folder), {}, f"{image_folder}/"
    else:
        images, labels = _match(root, image_folder, label_folder)
        where = f"{image_folder}/ with masks in {label_folder}/"
    prefix = "" if part == TRAIN else f"{part}/"
    left = {i: path for i, path in images.items() if path not in taken}
    return _Part(
        {f"{prefix}{i}": path for i, path in left.items()},
        {f"{prefix}{i}": path for i, path in labels.items() if i in left},
        where,
    )


def _lines(path: Path) -> dict[int, str]:
    """The lines of a text by their number, without the empty ones."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The list {path} cannot be read as text: {error}.") from error
    return {number: line.strip() for number, line in enumerate(lines, 1) if line.strip()}


def _named(root: Path, name: str, part: str, folders: _Folders | None) -> dict[str, _Entry]:
    """What names of files, with and without suffix, mean if a list begins with one: in the folders
    of its part, or in `images/`.
    """
    first = next(iter(_lines(root / name).values()), "")
    if _inside(root, first):
        return {}
    for owner, pair in dict.fromkeys(((part, folders), (TRAIN, _pair(root, "")))):
        paths = list_files(root, pair[0]).values() if pair else ()
        if pair and any(first in _names(path, pair[0]) for path in paths):
            found = _read_folders(root, owner, pair)
            return {
                name: (image_id, path, found.labels.get(image_id))
                for image_id, path in found.images.items()
                for name in _names(path, pair[0])
            }
    return {}


def _names(path: str, folder: str) -> tuple[str, str]:
    inner = PurePosixPath(path).relative_to(folder)
    return str(inner), str(inner.with_suffix(""))


def _read_list(root: Path, name: str, part: str, folders: _Folders | None) -> _Part:
    images: Files = {}
    labels: Files = {}
    named = _named(root, name, part, folders)
    for number, line in _lines(root / name).items():
        where = f"{root / name}, line {number}"
        image_id, image, label = named.get(line) or _split_line(root, line, where)
        _add(images, image_id, image)
        if label:
            labels[image_id] = label
    if not images:
        raise UserError(f"The list {root / name} names no image. Delete it, or add lines.")
    return _Part(dict(sorted(images.items())), dict(sorted(labels.items())), name)


def _split_line(root: Path, line: str, where: str) -> _Entry:
    """Image and mask of a line; names may hold spaces, so the files decide where it is split."""
    ends = [len(line), *(i for i, character in enumerate(line) if character in " \t,")]
    for i in ends:
        image, label = _inside(root, line[:i].strip()), _inside(root, line[i + 1 :].strip())
        if image and (label or i == len(line)):
            return str(PurePosixPath(image).with_suffix("")), image, label
    missing = next((w for w in line.split() if not _inside(root, w)), line)
    raise UserError(
        f'{where}: there is no file {missing!r} in {root}. A line is "IMAGE MASK" or "IMAGE", as '
        "paths in that folder; or, in all lines, the name of a file in images/ and labels/. "
        "Without the list, folders count."
    )


def _inside(root: Path, path: str) -> str | None:
    """The file in the root that a path of a list means.

    Of an absolute path it is the longest end that is there: published lists begin with the folders
    of another machine.
    """
    ends = [path]
    if path.startswith("/"):
        head = re.split(r"[\s,]", path)[0]  # behind it, another path may begin
        ends = [path[i:].lstrip("/") for i, character in enumerate(head) if character == "/"]
    return next((str(PurePosixPath(end)) for end in ends if (root / end).is_file()), None)


def _match(root: Path, image_folder: str, label_folder: str) -> tuple[Files, Files]:
    """Images, and masks by the id of the image of the same name, less what ends of names say."""
    images, masks = list_files(root, image_folder), list_files(root, label_folder)
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


def list_files(root: Path, folder: str) -> Files:
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
    images = first_named(root / folder, IMAGE_FOLDERS)
    labels = first_named(root / folder, LABEL_FOLDERS)
    if images is None or labels is None:
        return None
    return str(PurePosixPath(folder) / images), str(PurePosixPath(folder) / labels)


def first_named(
    folder: Path, names: Iterable[str], kind: Callable[[Path], bool] = Path.is_dir
) -> str | None:
    """The first of some names that is a folder, as it is spelled on disk; case does not matter."""
    if not folder.is_dir():
        return None
    there = {name.lower(): name for name in os.listdir(folder)}
    found = (there[name.lower()] for name in names if name.lower() in there)
    return next((name for name in found if kind(folder / name)), None)


def _without(name: str, ends: tuple[str, ...]) -> str:
    """A name less the first of some ends that it has; a name is never nothing."""
    stem = name.rpartition("/")[2]
    return next((name[: -len(e)] for e in ends if stem.endswith(e) and stem != e), name)


def _suffixes() -> str:
    return f"Images are files with the suffixes {', '.join(sorted(SUFFIXES))}."
