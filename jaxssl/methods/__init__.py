"""One file per method; the file name is the method's name in a config."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping
from typing import Any

from jaxssl import contracts


def available() -> tuple[str, ...]:
    """Names of all methods."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(config: Mapping[str, Any]) -> contracts.Method:
    """Builds the method that `config["name"]` names; the other keys are its fields.

    Raises:
      UserError: there is no such method, or it has no such field.
    """
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    name = fields.pop("name")
    if name not in available():
        raise contracts.UserError(
            f"Unknown method.name {name!r}. There are: {', '.join(available())}."
        )
    method = importlib.import_module(f"{__name__}.{name}").Method
    accepted = [field.name for field in dataclasses.fields(method)]
    for field in fields:
        if field not in accepted:
            raise contracts.UserError(
                f"Method {name!r} has no field {field!r}. Its fields: {', '.join(accepted)}."
            )
    return method(**fields)
