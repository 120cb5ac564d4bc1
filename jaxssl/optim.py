"""Optimizers and learning-rate schedules.

The learning rate is not part of the optimizer: a step multiplies the optimizer's direction by it.
So phases that restart, continue or stretch a schedule need no counters in the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxssl.contracts import UserError

Schedule = Callable[[jax.Array, jax.Array], jax.Array]
"""(updates behind it, updates it covers) -> factor of the base learning rate, float."""


def make_optimizer(config: Mapping[str, Any]) -> optax.GradientTransformation:
    """The direction of descent for one network, before the learning rate.

    Args:
      config: `name` "sgd" (momentum as in PyTorch: decay joins the gradient before it) or "adamw";
        `momentum`, `nesterov`, `weight_decay`; `decay_norm_and_bias`, whether parameters with fewer
        than two axes decay too; `head_factor`, by which everything outside "backbone" learns
        faster; `clip_norm`, 0 for none.
    """
    mask = None if config["decay_norm_and_bias"] else _kernels
    decay = optax.add_decayed_weights(config["weight_decay"], mask)
    clip = (
        optax.clip_by_global_norm(config["clip_norm"]) if config["clip_norm"] else optax.identity()
    )
    match config["name"]:
        case "sgd":
            direction = optax.chain(decay, optax.trace(config["momentum"], config["nesterov"]))
        case "adamw":
            direction = optax.chain(optax.scale_by_adam(), decay)
        case name:
            raise UserError(f"Unknown optimizer.name {name!r}. There are: adamw, sgd.")
    return optax.chain(clip, direction, _scale_head(config["head_factor"]))


def make_schedule(config: Mapping[str, Any]) -> Schedule:
    """The learning rate over a schedule's span, as a factor of the base rate.

    Args:
      config: `schedule` "poly", (1 - t)^power; "cosine", (1 + cos(pi t)) / 2; or "constant";
        `power`; `warmup_steps`, over which the factor also rises linearly, from 1/warmup_steps.
    """
    shapes = {
        "poly": lambda t: (1 - t) ** config["power"],
        "cosine": lambda t: (1 + jnp.cos(jnp.pi * t)) / 2,
        "constant": jnp.ones_like,
    }
    name, warmup = config["schedule"], config["warmup_steps"]
    if name not in shapes:
        raise UserError(
            f"Unknown optimizer.schedule {name!r}. There are: {', '.join(sorted(shapes))}."
        )

    def schedule(done: jax.Array, total: jax.Array) -> jax.Array:
        factor = shapes[name](jnp.clip(done / total, 0.0, 1.0))
        return factor * jnp.minimum(1.0, (done + 1) / warmup) if warmup else factor

    return schedule


def _kernels(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _scale_head(factor: float) -> optax.GradientTransformation:
    if factor == 1.0:
        return optax.identity()

    def scale(updates: Any, params: Any) -> Any:
        del params
        return {
            part: tree if part == "backbone" else jax.tree.map(lambda leaf: factor * leaf, tree)
            for part, tree in updates.items()
        }

    return optax.stateless(scale)
