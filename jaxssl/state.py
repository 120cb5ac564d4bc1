"""The training state: arrays, and nothing else."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxssl.contracts import Method, Network, Params, Stats, Variables

TEACHER = "teacher_"
"""Prefix that turns a student's name into its teacher's: the teacher of "a" is "teacher_a"."""


class TrainState(flax.struct.PyTreeNode):
    """Everything that a training step reads and writes; donated, sharded and saved as it is.

    Randomness is not stored: a step's key is a function of (seed, step).

    Attributes:
      step: int32, updates since the run began, over all phases, skipped ones included.
      skipped: int32, updates dropped because a loss or gradient was not finite.
      params: by student.
      stats: BatchNorm running statistics, by student.
      teacher_params: moving averages, by the student's name.
      teacher_stats: likewise.
      opt_state: by student, for those that the phase trains.
      extra: the method's own arrays.
    """

    step: jax.Array
    skipped: jax.Array
    params: Mapping[str, Params]
    stats: Mapping[str, Stats]
    teacher_params: Mapping[str, Params]
    teacher_stats: Mapping[str, Stats]
    opt_state: Mapping[str, optax.OptState]
    extra: Mapping[str, Any]

    def network(self, name: str) -> Variables:
        """Variables of a student ("a") or a teacher ("teacher_a")."""
        if name.startswith(TEACHER):
            student = name.removeprefix(TEACHER)
            return Variables(self.teacher_params[student], self.teacher_stats[student])
        return Variables(self.params[name], self.stats[name])

    def with_network(self, name: str, variables: Variables) -> TrainState:
        """This state with other variables for one student or teacher."""
        prefix, student = (
            (TEACHER, name.removeprefix(TEACHER)) if name.startswith(TEACHER) else ("", name)
        )
        params, stats = f"{prefix}params", f"{prefix}stats"
        changed = {
            params: {**getattr(self, params), student: variables.params},
            stats: {**getattr(self, stats), student: variables.stats},
        }
        return self.replace(**changed)


def draw(
    nets: Mapping[str, Network],
    key: jax.Array,
    size: tuple[int, int],
    sharding: jax.sharding.Sharding,
) -> dict[str, Variables]:
    """Random variables of each student, for images of `size`; student i draws from `fold_in(key,
    i)`.
    """
    # Compiling an initialization takes seconds; students of one architecture share it.
    draws = {
        net: jax.jit(functools.partial(net.init, size=size), out_shardings=sharding)
        for net in set(nets.values())
    }
    return {
        name: draws[net](jax.random.fold_in(key, i)) for i, (name, net) in enumerate(nets.items())
    }


def create(
    method: Method,
    nets: Mapping[str, Network],
    optimizer: optax.GradientTransformation,
    train: tuple[str, ...],
    variables: Mapping[str, Variables],
) -> TrainState:
    """Builds the state a run starts with. Call it inside jit, so that no two leaves share a buffer.

    Args:
      method: names students and teachers and makes `extra`.
      nets: by student.
      optimizer: one per student, over that student's parameters.
      train: students of the first phase.
      variables: by student; teachers start as copies.
    """
    params = {name: variables[name].params for name in method.students}
    stats = {name: variables[name].stats for name in method.students}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=params,
        stats=stats,
        teacher_params={name: jax.tree.map(jnp.copy, params[name]) for name in method.teachers},
        teacher_stats={name: jax.tree.map(jnp.copy, stats[name]) for name in method.teachers},
        opt_state={name: optimizer.init(params[name]) for name in train},
        extra=method.init_extra(nets, params),
    )


def ema(average: Any, new: Any, decay: jax.Array | float) -> Any:
    """Moving average of two trees, leaf by leaf: `decay * average + (1 - decay) * new`."""

    def leaf(old: jax.Array, value: jax.Array) -> jax.Array:
        d = jnp.asarray(decay, old.dtype)
        return d * old + (1 - d) * value

    return jax.tree.map(leaf, average, new)
