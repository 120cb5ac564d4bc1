"""Reads the arrays of a PyTorch file without PyTorch, and without running what the file says.

A .pth file of the format that PyTorch wrote before 1.6 is a sequence of pickles and then raw
arrays. A pickle is a program, and Python's own reader lets it import and call anything. Here
it is read as data: `pickletools` takes it apart, and the few operations that state dicts, numbers
and texts need act on a stack. Nothing of the file is ever imported, called or evaluated.
"""

from __future__ import annotations

import io
import os
import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxssl.contracts import UnreadableError, UserError

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


class _Name(NamedTuple):
    """A Python object that a file names."""

    name: str


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
    try:
        # In memory, so that no length in the file can make us allocate more than there is.
        return _read(io.BytesIO(Path(path).read_bytes()))
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror}.") from None
    except _Refused as refused:
        raise UserError(f"{path} {refused}. It was not run; get the file elsewhere.") from None
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise UnreadableError(
            f"{path} is damaged, or no PyTorch file of the format before 1.6 ({error}). "
            "Install or download it again."
        ) from None


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


class _Refused(Exception):  # noqa: N818
    """The file asks for something that arrays do not need."""


def _read(file: io.BytesIO) -> dict[str, np.ndarray]:
    storages: dict[str, _Storage] = {}
    if (_unpickle(file, storages), _unpickle(file, storages)) != (MAGIC, PROTOCOL):
        raise ValueError("it begins differently")
    _unpickle(file, storages)  # what C's types measured on the machine that wrote it
    state, order = _unpickle(file, storages), _unpickle(file, storages)
    values = {key: _values(file, storages[key]) for key in order}
    tensors = flatten(state, _Tensor)
    return {name: _view(values[tensor.storage.key], tensor) for name, tensor in tensors.items()}


def _values(file: io.BytesIO, storage: _Storage) -> np.ndarray:
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


def _unpickle(file: io.BytesIO, storages: dict[str, _Storage]) -> Any:
    """The next pickle of a file, read as data; fills `storages` with those that it names."""
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under the marks
    memo: dict[Any, Any] = {}
    for operation, argument, _ in pickletools.genops(file):
        match operation.name:
            case "PROTO":
                pass
            case "STOP":
                return stack.pop()
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case name if name in _EMPTY:
                stack.append(_EMPTY[name]())
            case name if name in _LITERALS:
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(operation.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "MARK":
                below.append(stack)
                stack = []
            case "TUPLE":
                items, stack = stack, below.pop()
                stack.append(tuple(items))
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items, stack = stack, below.pop()
                stack[-1].extend(items)
            case "SETITEMS":
                items, stack = stack, below.pop()
                _set_items(stack[-1], items)
            case "SETITEM":
                items, stack = stack[-2:], stack[:-2]
                _set_items(stack[-1], items)
            case "GLOBAL":
                stack.append(_name(str(argument)))
            case "BINPERSID":
                storage = _storage(*stack.pop())
                storages[storage.key] = storage
                stack.append(storage)
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_call(stack.pop(), arguments))
            case "BUILD":
                stack.pop()  # attributes of the state dict: versions of its layers
            case other:
                raise _Refused(f"uses the pickle operation {other}, which arrays do not need")
    raise ValueError("it ends early")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_TEXTS = {"BINUNICODE", "BINSTRING", "SHORT_BINSTRING"}  # the latter two from Python 2
_LITERALS = _NUMBERS | _TEXTS


def _set_items(target: dict[str | int, Any], items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int):
            raise ValueError("a key is neither text nor number")
        target[key] = value


def _name(name: str) -> _Name:
    if name not in (DICT, *TENSORS, *PARAMETERS, *STORAGES):
        raise _Refused(f"would call {name.replace(' ', '.')}, which arrays do not need")
    return _Name(name)


def _storage(kind: str, of: _Name, key: str, location: str, size: int, view: None) -> _Storage:
    """What a persistent identifier stands for."""
    del location
    if kind != "storage" or view is not None:
        raise ValueError("a storage is of an unknown kind")
    return _Storage(key, STORAGES[of.name], size)


def _call(function: _Name, arguments: tuple[Any, ...]) -> Any:
    """What the known functions would return."""
    if function.name == DICT:
        filled: dict[str | int, Any] = {}
        _set_items(filled, [part for pairs in arguments for pair in pairs for part in pair])
        return filled
    if function.name in PARAMETERS and isinstance(arguments[0], _Tensor):
        return arguments[0]
    if function.name not in TENSORS:
        raise ValueError(f"{function.name} is called")
    storage, offset, shape, strides, *_ = arguments
    if not isinstance(storage, _Storage) or min((offset, *shape, *strides)) < 0:
        raise ValueError("an array has no sensible shape")
    return _Tensor(storage, offset, shape, strides)
