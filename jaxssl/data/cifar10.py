"""CIFAR-10, from the files of its Python version, of which nothing is run."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxssl import pickles
from jaxssl.contracts import UnreadableError, UserError
from jaxssl.data.arrays import ArraySource, Stored, info_of, numbered, parts_of
from jaxssl.data.files import stamp

FILES: Mapping[str, tuple[str, ...]] = {
    "train": tuple(f"data_batch_{i}" for i in range(1, 6)),
    "val": ("test_batch",),
}
"""Split -> its files, in order; "val" is the test set."""

SIDE = 32

_META = "batches.meta"
_FOLDER = "cifar-10-batches-py"
_ARCHIVE = "cifar-10-python.tar.gz"
_AGAIN = f"Unpack {_ARCHIVE} again, or download it again from https://www.cs.toronto.edu/~kriz/cifar.html."


def load(
    config_data: Mapping[str, Any], split: str, labels: bool, ids: Iterable[str] | None = None
) -> ArraySource:
    """Opens a part of CIFAR-10.

    An id is the image's number in its part, such as "train_00042" or "test_00007": counted over
    the files in order, as TensorFlow Datasets does.

    Args:
      config_data: `root` is the folder `cifar-10-batches-py`, or the one that it is in.
      split: "train", the 50000 images of data_batch_1 to 5; "val", the 10000 of test_batch; several
        are joined by "+".
      labels: False drops them; they stand in the same files.
      ids: images to keep; None keeps all.

    Raises:
      UserError: the folder or a file is missing, damaged, or of another data set; or a split or an
        id is unknown.
    """
    folder = _find(Path(config_data["root"] or ".").expanduser())
    info = info_of(_class_names(stamp(folder / _META)))
    paths, names = [], []
    for part in parts_of(split, FILES, "CIFAR-10"):
        stamps = tuple(stamp(folder / name) for name in FILES[part])
        count = len(_read(stamps, info.num_classes, True).images)
        names += numbered("test" if part == "val" else part, count)
        paths += stamps
    read = functools.partial(_read, tuple(paths), info.num_classes, labels)
    return ArraySource(info, names, read, ids)


def _find(root: Path) -> Path:
    for folder in (root, root / _FOLDER):
        if (folder / _META).is_file() or (folder / FILES["train"][0]).is_file():
            return folder
    archive = next((p for p in (root, root / _ARCHIVE) if p.name.endswith(".tar.gz")), root)
    if archive.is_file():
        raise UserError(
            f"CIFAR-10 is still packed in {archive}. Unpack it: tar -xzf {archive} -C "
            f"{archive.parent}, and set --config.data.root={archive.parent}."
        )
    raise UserError(
        f"CIFAR-10 is missing: {root} holds neither {_META} nor {_FOLDER}/{_META}. Download the "
        f"Python version, {_ARCHIVE}, from https://www.cs.toronto.edu/~kriz/cifar.html, unpack it, "
        f"tar -xzf {_ARCHIVE} -C DIR, and add --config.data.root=DIR. --config.data.name=digits "
        "needs no download."
    )


@functools.lru_cache(maxsize=2)
def _class_names(file: tuple[Path, int, int]) -> tuple[str, ...]:
    path = file[0]
    names = _open(path).get("label_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UnreadableError(f"{path} holds no label_names. {_AGAIN}")
    return tuple(names)


@functools.lru_cache(maxsize=4)
def _read(files: tuple[tuple[Path, int, int], ...], num_classes: int, labels: bool) -> Stored:
    """The arrays of some files; what was read last is kept."""
    if not labels:
        return Stored(_read(files, num_classes, True).images, None)
    parts = [_read_batch(path, num_classes) for path, _, _ in files]
    images, classes = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    return Stored(images, classes)


def _read_batch(path: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    content = _open(path)
    data, labels = content.get("data"), content.get("labels")
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3 * SIDE**2:
        raise UnreadableError(f"{path} holds no rows of {SIDE}x{SIDE} colors as data. {_AGAIN}")
    if not isinstance(labels, list) or len(labels) != len(data):
        raise UnreadableError(f"{path} does not hold {len(data)} labels, one a row. {_AGAIN}")
    if wrong := [x for x in labels if not (isinstance(x, int) and 0 <= x < num_classes)]:
        raise UserError(
            f"{path} holds the label {wrong[0]!r}. Known are 0 to {num_classes - 1}, the names in "
            f"{_META}. {_AGAIN}"
        )
    images = data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return images, np.array(labels, np.uint8)


def _open(path: Path) -> dict[str, Any]:
    def read(file: IO[bytes]) -> dict[str, Any]:
        content = _Reader().read(file)
        if not isinstance(content, dict):
            raise ValueError("it holds no dict")
        return content

    return pickles.parse(path, read, "file of CIFAR-10's Python version", _AGAIN)


class _Reader(pickles.Reader):
    """Reads arrays of bytes as NumPy pickles them."""

    names = frozenset(
        (
            "numpy.core.multiarray _reconstruct",
            "numpy._core.multiarray _reconstruct",
            "numpy ndarray",
            "numpy dtype",
        )
    )

    def call(self, name: str, arguments: Any) -> Any:
        if name == "numpy dtype":
            if arguments[0] != "u1":
                raise ValueError(f"numbers are of type {arguments[0]}, not bytes")
            return np.dtype(np.uint8)
        if not name.endswith("_reconstruct"):
            return super().call(name, arguments)
        return _Unfilled()

    def build(self, value: Any, state: Any) -> Any:
        if not isinstance(value, _Unfilled):
            return value
        _, shape, dtype, by_columns, content = state
        if dtype != np.uint8 or by_columns:
            raise ValueError("an array is stored in another way")
        # Python 2's texts are bytes.
        return np.frombuffer(content.encode("latin-1"), np.uint8).reshape(shape)


class _Unfilled:
    """An array that its state will fill."""
