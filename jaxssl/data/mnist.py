"""MNIST and Fashion-MNIST, from their IDX files as they are published, packed or not."""

from __future__ import annotations

import functools
import gzip
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxssl.contracts import UnreadableError, UserError
from jaxssl.data.arrays import ArraySource, Stored, info_of, numbered, parts_of
from jaxssl.data.files import stamp

SETS: Mapping[str, tuple[str, ...]] = {
    "mnist": tuple("0123456789"),
    "fashion": (
        "T-shirt/top",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    ),
}
"""Name -> classes; the files of both are called the same."""

PARTS: Mapping[str, str] = {"train": "train", "val": "t10k"}
"""Split -> what the names of its files begin with; "val" is the test set."""

IMAGES, LABELS = ("images", 3), ("labels", 1)
"""Kind of a file and its number of dimensions, as its name tells both."""

_AGAIN = "Download it again."


def load(
    config_data: Mapping[str, Any], split: str, labels: bool, ids: Iterable[str] | None = None
) -> ArraySource:
    """Opens a part of a set. Gray becomes RGB.

    The files of a part are such as `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, with
    `.gz` behind or a dot in the place of the second hyphen. An id is the image's number in its
    part, such as "train_00042" or "test_00007".

    Args:
      config_data: `root` is the folder of the files; `set` is one of `SETS`, "mnist" where no
        config says it.
      split: "train", 60000 images; "val", the 10000 called t10k; several are joined by "+".
      labels: False opens no file of labels.
      ids: images to keep; None keeps all.

    Raises:
      UserError: the set, a split or an id is unknown; or a file is missing, damaged, or another one
        than its name says.
    """
    name = config_data.get("set", "mnist")
    if name not in SETS:
        raise UserError(
            f"data.set={name!r} is unknown. Set --config.data.set to one of: {', '.join(SETS)}."
        )
    info = info_of(SETS[name])
    root = Path(config_data["root"] or ".").expanduser()
    files, names = [], []
    for part in parts_of(split, PARTS, "MNIST"):
        images = stamp(_find(root, PARTS[part], IMAGES))
        classes = stamp(_find(root, PARTS[part], LABELS)) if labels else None
        files.append((images, classes))
        count = len(_read((files[-1],), info.num_classes).images)
        names += numbered("test" if part == "val" else part, count)
    read = functools.partial(_read, tuple(files), info.num_classes)
    return ArraySource(info, names, read, ids)


def _find(root: Path, part: str, kind: tuple[str, int]) -> Path:
    name = f"{part}-{kind[0]}-idx{kind[1]}-ubyte"
    names = [f"{stem}{end}" for stem in (name, name.replace("-idx", ".idx")) for end in ("", ".gz")]
    for path in (root / name for name in names):
        if path.is_file():
            return path
    raise UserError(
        f"There is no {name}.gz in {root}, nor {name}. Download the four files of MNIST, from "
        "https://yann.lecun.com/exdb/mnist or a mirror, or of Fashion-MNIST, from "
        "https://github.com/zalandoresearch/fashion-mnist (--config.data.set=fashion), into a "
        "folder DIR and add --config.data.root=DIR. --config.data.name=digits needs no download."
    )


_Stamp = tuple[Path, int, int]


@functools.lru_cache(maxsize=4)
def _read(files: tuple[tuple[_Stamp, _Stamp | None], ...], num_classes: int) -> Stored:
    """The arrays of files of images, and of their labels where these are given; what was read last
    is kept.
    """
    images, labels = [], []
    for pixels, classes in files:
        images.append(_read_idx(pixels[0], IMAGES[1]))
        if classes is not None:
            labels.append(_read_labels(classes[0], len(images[-1]), num_classes))
    return Stored(np.concatenate(images), np.concatenate(labels) if labels else None)


def _read_labels(path: Path, count: int, num_classes: int) -> np.ndarray:
    labels = _read_idx(path, LABELS[1])
    if len(labels) != count:
        raise UnreadableError(f"{path} holds {len(labels)} labels for {count} images. {_AGAIN}")
    if labels.size and labels.max() >= num_classes:
        raise UserError(
            f"{path} holds the label {labels.max()}. Known are 0 to {num_classes - 1}. {_AGAIN}"
        )
    return labels


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An array of bytes: their number in each dimension stands before them."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UnreadableError(f"{path} cannot be read: {error}. {_AGAIN}") from error
    header = 4 * (1 + dimensions)
    if len(content) < header or content[:4] != bytes((0, 0, 8, dimensions)):
        raise UnreadableError(
            f"{path} does not begin as an IDX file of bytes in {dimensions} dimension(s) does. "
            f"{_AGAIN} If it is packed, its name must end with .gz."
        )
    shape = np.frombuffer(content[4:header], ">u4").tolist()
    if len(content) != header + math.prod(shape):
        raise UnreadableError(
            f"{path} has {len(content)} bytes; {header + math.prod(shape)} are right for "
            f"{' x '.join(map(str, shape))} values. {_AGAIN}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
