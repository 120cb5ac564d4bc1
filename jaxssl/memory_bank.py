"""A memory bank of representations by class: a ring for each, in arrays of fixed shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bank:
    """The newest keys of each class; the oldest make room.

    Attributes:
      keys: `[C,L,E]`, L being the longest ring's length.
      position: int32 `[C]`, where the next one goes.
      fill: int32 `[C]`, how many there are, the first ones.
      length: int32 `[C]`, how many there may be.
    """

    keys: jax.Array
    position: jax.Array
    fill: jax.Array
    length: jax.Array


def empty(lengths: Sequence[int], channels: int, dtype: DTypeLike) -> Bank:
    """A bank before the first keys `[channels]`, with a ring of these lengths for each class."""
    C = len(lengths)
    return Bank(
        keys=jnp.zeros((C, max(lengths), channels), dtype),
        position=jnp.zeros(C, jnp.int32),
        fill=jnp.zeros(C, jnp.int32),
        length=jnp.array(lengths, jnp.int32),
    )


def of(keys: jax.Array, count: jax.Array) -> Bank:
    """A bank of nothing but these keys `[C,K,E]`, the first `count` `[C]` of each class."""
    return Bank(keys, position=jnp.zeros_like(count), fill=count, length=count)


def push(bank: Bank, keys: jax.Array, count: jax.Array) -> Bank:
    """The bank after new keys went in; no gradient flows.

    Args:
      bank: before.
      keys: `[C,K,E]`, K being less than any length.
      count: int32 `[C]`, how many of them go in, the first ones.
    """
    new = jnp.arange(keys.shape[1])[None]
    slots = (bank.position[:, None] + new) % bank.length[:, None]
    slots = jnp.where(new < count[:, None], slots, bank.keys.shape[1])  # outside: not written
    old, keys = jax.lax.stop_gradient((bank.keys, keys))
    return dataclasses.replace(
        bank,
        keys=old.at[jnp.arange(len(count))[:, None], slots].set(
            keys.astype(old.dtype), mode="drop"
        ),
        position=(bank.position + count) % bank.length,
        fill=jnp.minimum(bank.fill + count, bank.length),
    )


def push_of_devices(before: Bank, after: Bank, most: int, axis_name: str) -> Bank:
    """A bank with what each device of a `jax.pmap` pushed, device by device; the same on all.

    Args:
      before: the bank that all had.
      after: what this device made of it.
      most: keys of a class that count as pushed, the newest.
      axis_name: of the devices.
    """
    count = jnp.minimum((after.position - before.position) % after.length, most)
    slots = (after.position - count)[:, None] + jnp.arange(most)[None]
    keys = jnp.take_along_axis(after.keys, (slots % after.length[:, None])[..., None], 1)

    def take(bank: Bank, pushed: tuple[jax.Array, jax.Array]) -> tuple[Bank, None]:
        return push(bank, *pushed), None

    return jax.lax.scan(take, before, jax.lax.all_gather((keys, count), axis_name))[0]


def draw(bank: Bank, c: jax.Array | int, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Keys of class c with replacement, `[*shape,E]` in at least float32; without meaning where
    there are none.
    """
    slots = jax.random.randint(key, shape, 0, jnp.maximum(bank.fill[c], 1))
    keys = jax.lax.stop_gradient(bank.keys)[c, slots]
    return keys.astype(jnp.promote_types(keys.dtype, jnp.float32))
