"""Order statistics of large arrays, exact and without a sort.

A sort of all pixels of a batch takes longer than all the rest of a loss, and gathers them on one
device. Bisection only counts: a pass over the array for each bit of its numbers, and between
devices one integer a pass (benchmarks/u2pl_contrast.py).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def kth_smallest(values: jax.Array, k: jax.Array | int) -> jax.Array:
    """The element that a sort would put at position k, from 0; no gradient flows.

    Args:
      values: float `[...]` without nan; infinities are numbers like others.
      k: from 0 to below `values.size`.
    """
    values = jax.lax.stop_gradient(values)
    width = 8 * values.dtype.itemsize
    kind = jnp.dtype(f"uint{width}")
    bits = jax.lax.bitcast_convert_type(values, kind)
    sign = jnp.array(1 << (width - 1), kind)
    # Unsigned integers that rank as the numbers do: the bits of negative ones count backward.
    keys = jnp.where(bits < sign, bits | sign, ~bits)

    def narrow(i: jax.Array, found: jax.Array) -> jax.Array:
        """The largest number that at most k keys are below, from its highest bit down."""
        candidate = found | (sign >> i.astype(kind))
        return jnp.where((keys < candidate).sum(dtype=jnp.int32) <= k, candidate, found)

    key = jax.lax.fori_loop(0, width, narrow, jnp.zeros((), kind))
    return jax.lax.bitcast_convert_type(jnp.where(key < sign, ~key, key ^ sign), values.dtype)


def percentile(
    values: jax.Array, percent: jax.Array | float, *, valid: jax.Array | None = None
) -> jax.Array:
    """`np.percentile(values[valid], percent)`, between two elements in proportion.

    Args:
      values: float `[...]`; no gradient flows.
      percent: in [0,100].
      valid: bool `[...]`, which of them count; None: all.

    Returns:
      Scalar of their dtype; infinity where none counts.
    """
    valid = jnp.ones(values.shape, bool) if valid is None else valid
    x = jnp.where(valid, jax.lax.stop_gradient(values), jnp.inf)
    last = jnp.maximum(valid.sum(dtype=jnp.int32) - 1, 0)
    position = jnp.clip(jnp.asarray(percent, x.dtype) / 100 * last, 0, last.astype(x.dtype))
    k = jnp.floor(position).astype(jnp.int32)
    low = kth_smallest(x, k)
    high = jnp.where(
        (x <= low).sum(dtype=jnp.int32) > k + 1, low, x.min(where=x > low, initial=jnp.inf)
    )
    share = position - k
    return jnp.where(share > 0, low + share * (high - low), low)
