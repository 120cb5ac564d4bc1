"""One file per method; the file name is the method's name in a config.

A method may also stand outside the package: its name is then that of its module with a dot in it,
such as "my_methods.entropy" for my_methods/entropy.py in a folder on Python's path.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping
from typing import Any

from jaxssl import contracts


def available() -> tuple[str, ...]:
    """Names of all methods in the package."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(config: Mapping[str, Any]) -> contracts.Method:
    """Builds the method that `config["name"]` names; the other keys are its fields.

    Raises:
      UserError: there is no such method, or it has no such field.
    """
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    name = fields.pop("name")
    method = _outside(name) if "." in name.strip(".") else _inside(name)
    accepted = [field.name for field in dataclasses.fields(method)]
    for field in fields:
        if field not in accepted:
            raise contracts.UserError(
                f"Method {name!r} has no field {field!r}. Its fields: {', '.join(accepted)}."
            )
    return method(**fields)


def for_task(task: contracts.Task) -> tuple[str, ...]:
    """Names of the methods in the package that learn it."""
    return tuple(name for name in available() if task in _inside(name).tasks)


def _inside(name: str) -> type[contracts.Method]:
    if name not in available():
        raise contracts.UserError(
            f"Unknown method.name {name!r}. There are: {', '.join(available())}; or, outside of "
            "this package, a module with a dot in its name, such as my_methods.entropy."
        )
    return importlib.import_module(f"{__name__}.{name}").Method


def _outside(name: str) -> type[contracts.Method]:
    """The method of any module; errors of the module's own pass."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise
        raise contracts.UserError(
            f"There is no module {name!r}, which method.name says holds the method. Run where "
            f"the folder {name.partition('.')[0]} is, or name that place in PYTHONPATH. A run "
            "needs the module whenever its workdir is opened: to go on, evaluate and predict."
        ) from None
    method = getattr(module, "Method", None)
    if not (isinstance(method, type) and issubclass(method, contracts.Method)):
        raise contracts.UserError(
            f"{module.__file__ or name} has no class Method(contracts.Method). See 'A method' in "
            "CONTRIBUTING.md."
        )
    return method
