"""Reads pickles as data: nothing that a file says is imported, called or evaluated.

A pickle is a program, and Python's own reader lets it import and call anything. Here `pickletools`
takes it apart, and the few operations that dicts, lists, numbers, texts and arrays need act on a
stack. What a file names, a `Reader` knows by its text alone.
"""

from __future__ import annotations

import io
import os
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from jaxssl.contracts import UnreadableError, UserError

T = TypeVar("T")


class Refused(Exception):  # noqa: N818
    """The file asks for something that arrays do not need."""


class Name(NamedTuple):
    """A Python object that a file names, as "module name"."""

    name: str


class Reader:
    """Reads pickles of the protocols up to 2, which Python 2 wrote too; texts of its become `str`.

    Subclasses say which names may occur and what they stand for.
    """

    names: frozenset[str] = frozenset()
    """What a file may name."""

    def read(self, file: IO[bytes]) -> Any:
        """The next pickle of a file.

        Raises:
          Refused: it asks for something unknown.
          ValueError, TypeError, LookupError, AttributeError, OverflowError: it is damaged.
        """
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
                    set_items(stack[-1], items)
                case "SETITEM":
                    items, stack = stack[-2:], stack[:-2]
                    set_items(stack[-1], items)
                case "GLOBAL":
                    stack.append(self._name(str(argument)))
                case "BINPERSID":
                    stack.append(self.persistent(stack.pop()))
                case "REDUCE":
                    arguments = stack.pop()
                    stack.append(self.call(stack.pop().name, arguments))
                case "BUILD":
                    state = stack.pop()
                    stack.append(self.build(stack.pop(), state))
                case other:
                    raise Refused(f"uses the pickle operation {other}, which arrays do not need")
        raise ValueError("it ends early")

    def call(self, name: str, arguments: Any) -> Any:
        """What a call of one of the names stands for."""
        raise ValueError(f"{name} is called")

    def build(self, value: Any, state: Any) -> Any:
        """What a value is when it is given a state; here states are dropped."""
        del state
        return value

    def persistent(self, identifier: Any) -> Any:
        """What a persistent identifier stands for."""
        raise ValueError(f"{identifier} stands for something outside")

    def _name(self, name: str) -> Name:
        if name not in self.names:
            raise Refused(f"would call {name.replace(' ', '.')}, which arrays do not need")
        return Name(name)


def parse(
    path: str | os.PathLike[str], parse: Callable[[IO[bytes]], T], kind: str, advice: str
) -> T:
    """What a function that reads pickles makes of a file.

    Args:
      path: of the file.
      parse: may raise what `Reader.read` raises.
      kind: what the file should be, for messages.
      advice: what to do about another one.

    Raises:
      UnreadableError: the file is missing, truncated or of another format.
      UserError: it asks for something that arrays do not need.
    """
    try:
        # In memory, so that no length in the file can make us allocate more than there is.
        return parse(io.BytesIO(Path(path).read_bytes()))
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror}. {advice}") from None
    except Refused as refused:
        raise UserError(f"{path} {refused}. It was not run; get the file elsewhere.") from None
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise UnreadableError(f"{path} is damaged, or no {kind} ({error}). {advice}") from None


def set_items(target: dict[str | int, Any], items: list[Any]) -> None:
    """Fills a dict with keys and values in turn."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int):
            raise ValueError("a key is neither text nor number")
        target[key] = value


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_TEXTS = {"BINUNICODE", "BINSTRING", "SHORT_BINSTRING"}  # the latter two from Python 2
_LITERALS = _NUMBERS | _TEXTS
