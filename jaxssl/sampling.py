"""Draws among the True of a mask, in fixed shapes and few random numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def draw(
    key: jax.Array, mask: jax.Array, number: int, *, replace: bool
) -> tuple[jax.Array, jax.Array]:
    """Draws positions where a mask is True, each as likely as the others.

    By their ranks among these: a random number for each draw, not for each position
    (benchmarks/u2pl_contrast.py).

    Args:
      key: randomness.
      mask: bool `[N]`.
      number: of draws.
      replace: whether a position may be drawn again.

    Returns:
      int32 `[number]`, and how many of them, the first ones, are drawn: all, or without replacement
      as many as there are; 0 where there are none.
    """
    cumulative = jnp.cumsum(mask, dtype=jnp.int32)
    there = cumulative[-1]
    if replace:
        ranks = jax.random.randint(key, (number,), 0, jnp.maximum(there, 1))
        drawn = jnp.where(there > 0, number, 0)
    else:
        ranks, drawn = distinct(key, there, number), jnp.minimum(there, number)
    positions = jnp.searchsorted(cumulative, ranks, side="right").astype(jnp.int32)
    return jnp.minimum(positions, len(mask) - 1), drawn


def distinct(key: jax.Array, count: jax.Array | int, number: int) -> jax.Array:
    """Draws `number` different integers from 0 to below `count`, each sequence as likely.

    The first steps of a shuffle by Fisher and Yates: step i takes what lies at a place from i on,
    and puts there what lies at place i. Where that came from is followed back for all steps at
    once, in memory for `number` squared.

    Returns:
      int32 `[number]`. If count is less, the first `count` are all of them.
    """
    step = jnp.arange(number, dtype=jnp.int32)
    place = jax.random.randint(key, (number,), step, jnp.maximum(count, step + 1))

    def last(places: jax.Array) -> jax.Array:
        """For each step and place the last step before it that took from there; -1: none."""
        took = (place[None] == places[:, None]) & (step[None] < step[:, None])
        return jnp.where(took, step[None], -1).max(1)

    before = last(step)
    origin = jnp.where(before < 0, step, before)
    for _ in range(number.bit_length()):
        origin = origin[origin]
    before = last(place)
    return jnp.where(before < 0, place, origin[before])
