"""Losses that several methods share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jaxssl.contracts import IGNORE_LABEL


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    weights: jax.Array | None = None,
    ignore_label: int = IGNORE_LABEL,
) -> jax.Array:
    """Mean of -log softmax(logits)[label] over the positions that have a label.

    Args:
      logits: float `[...,C]`.
      labels: integer `[...]`, below C or `ignore_label`.
      weights: `[...]`; multiply the terms but not the number of positions that divides their sum.
      ignore_label: label of positions that do not count.

    Returns:
      Scalar in float32 (float64 for float64 logits); 0 where no position has a label.
    """
    valid = labels != ignore_label
    terms = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), jnp.where(valid, labels, 0)
    )
    if weights is not None:
        terms = weights * terms
    return jnp.where(valid, terms, 0).sum() / jnp.maximum(valid.sum(), 1)
