"""Reads the arrays of a PyTorch file without PyTorch, and without running what the file says.

A .pth file of the format that PyTorch wrote before 1.6 is a sequence of pickles and then raw
arrays. These are read as data, see `pickles`: nothing of the file is imported, called or evaluated.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np

from jaxssl import pickles

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
STORAGES = {
    "torch DoubleStorage": "<f8",
    "torch FloatStorage": "<f4",
    "torch HalfStorage": "<f2",
    "torch LongStorage": "<i8",
    "torch IntStorage": "<i4",
    "torch ShortStorage": "<i2",
    "torch CharStorage": "<i1",
    "torch ByteStorage": "<u1",
    "torch BoolStorage": "?",
}
"""Name in the file -> dtype of its little-endian values."""

DICT = "collections OrderedDict"
TENSORS = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor")
PARAMETERS = ("torch._utils _rebuild_parameter", "torch.nn.parameter Parameter")

T = TypeVar("T")


class _Storage(NamedTuple):
    """Values at the end of the file."""

    key: str
    dtype: str
    size: int


class _Tensor(NamedTuple):
    """A view of a storage; strides count values."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a state dict, by name; those of nested ones as `flatten` names them.

    Raises:
      UnreadableError: the file is missing, truncated or of another format.
      UserError: it asks for something that arrays do not need.
    """
    kind = "PyTorch file of the format before 1.6"
    return pickles.parse(path, _read, kind, "Install or download it again.")


def flatten(tree: Any, kind: type[T]) -> dict[str, T]:
    """What is of one type in a dict and the dicts inside it, by the keys on the way, with dots.

    A dict that stands in several places counts where it is met first.
    """
    found: dict[str, T] = {}
    seen: set[int] = set()
    left = [("", tree)]
    while left:
        prefix, node = left.pop()
        if not isinstance(node, Mapping) or id(node) in seen:
            continue
        seen.add(id(node))
        named = [(f"{prefix}{key}", value) for key, value in node.items()]
        found.update((name, value) for name, value in named if isinstance(value, kind))
        left += [(f"{name}.", value) for name, value in reversed(named)]
    return found


def _read(file: IO[bytes]) -> dict[str, np.ndarray]:
    reader = _Reader()
    if (reader.read(file), reader.read(file)) != (MAGIC, PROTOCOL):
        raise ValueError("it begins differently")
    reader.read(file)  # what C's types measured on the machine that wrote it
    state, order = reader.read(file), reader.read(file)
    values = {key: _values(file, reader.storages[key]) for key in order}
    tensors = flatten(state, _Tensor)
    return {name: _view(values[tensor.storage.key], tensor) for name, tensor in tensors.items()}


def _values(file: IO[bytes], storage: _Storage) -> np.ndarray:
    dtype = np.dtype(storage.dtype)
    if file.read(8) != storage.size.to_bytes(8, "little"):
        raise ValueError(f"storage {storage.key} has another size than said")
    data = file.read(storage.size * dtype.itemsize)
    if len(data) != storage.size * dtype.itemsize:
        raise ValueError("it ends early")
    return np.frombuffer(data, dtype)


def _view(values: np.ndarray, tensor: _Tensor) -> np.ndarray:
    # By indices, which NumPy checks; strides it would follow to anywhere in memory.
    index = np.array(tensor.offset)
    for length, stride in zip(tensor.shape, tensor.strides, strict=True):
        if index.size * length > values.size:
            raise ValueError("an array exceeds its storage")
        index = index[..., None] + stride * np.arange(length)
    return values[index]


class _Reader(pickles.Reader):
    """Reads state dicts, whose attributes, the versions of layers, are dropped; notes the storages
    that they name.
    """

    names = frozenset((DICT, *TENSORS, *PARAMETERS, *STORAGES))

    def __init__(self):
        self.storages: dict[str, _Storage] = {}

    def persistent(self, identifier: Any) -> _Storage:
        storage = _storage(*identifier)
        self.storages[storage.key] = storage
        return storage

    def call(self, name: str, arguments: Any) -> Any:
        if name == DICT:
            filled: dict[str | int, Any] = {}
            pickles.set_items(filled, [x for pairs in arguments for pair in pairs for x in pair])
            return filled
        if name in PARAMETERS and isinstance(arguments[0], _Tensor):
            return arguments[0]
        if name not in TENSORS:
            return super().call(name, arguments)
        storage, offset, shape, strides, *_ = arguments
        if not isinstance(storage, _Storage) or min((offset, *shape, *strides)) < 0:
            raise ValueError("an array has no sensible shape")
        return _Tensor(storage, offset, shape, strides)


def _storage(
    kind: str, of: pickles.Name, key: str, location: str, size: int, view: None
) -> _Storage:
    del location
    if kind != "storage" or view is not None:
        raise ValueError("a storage is of an unknown kind")
    return _Storage(key, STORAGES[of.name], size)
