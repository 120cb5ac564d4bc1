"""One file per network; the file name is the network's name in a config."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, cast

from jaxssl import contracts


def available() -> tuple[str, ...]:
    """Names of all networks: the modules here that define a `Model`."""
    return tuple(name for name in _modules() if _model(name) is not None)


def load(
    config: Mapping[str, Any],
    num_classes: int,
    *,
    task: contracts.Task | None = None,
    axis_name: str | None = None,
) -> contracts.Network:
    """Builds the network that `config["name"]` names; the other keys are fields of its `Model`.

    Args:
      config: the name and what differs from the defaults.
      num_classes: C, the channels of the logits.
      task: what it has to do; None does not ask.
      axis_name: of a `jax.pmap` over whose devices BatchNorm takes its statistics.

    Raises:
      UserError: there is no such network, it does another task, has no such field, or refuses the
        field's value.
    """
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    name = fields.pop("name", None)
    model = _model(name) if name in _modules() else None
    if model is None:
        raise contracts.UserError(
            f"Unknown model.name {name!r}. There are: {', '.join(available())}."
        )
    if task not in (None, model.task):
        others = [one for one in available() if _model(one).task == task]
        raise contracts.UserError(
            f"The network {name!r} is for {model.task}, and the data are for {task}. Set "
            f"--config.model.name to one of: {', '.join(others)}."
        )
    given = {"num_classes": num_classes, "axis_name": axis_name}
    accepted = [f.name for f in dataclasses.fields(model) if f.name not in given]
    for field in fields:
        if field not in accepted:
            raise contracts.UserError(
                f"Network {name!r} has no field {field!r}. Its fields: {', '.join(accepted)}."
            )
    return model(**given, **fields)


def over_devices(net: contracts.Network, axis_name: str | None) -> contracts.Network:
    """The network with BatchNorm's statistics taken over the devices of a `jax.pmap` of this name,
    or with None as it was.
    """
    return net if axis_name is None else dataclasses.replace(cast(Any, net), axis_name=axis_name)


def _modules() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def _model(name: str) -> Any:
    return getattr(importlib.import_module(f"{__name__}.{name}"), "Model", None)
