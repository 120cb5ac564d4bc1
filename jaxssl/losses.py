"""Losses that several methods share."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax

from jaxssl.contracts import IGNORE_LABEL
from jaxssl.mixing import Mixup
from jaxssl.quantile import kth_smallest


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
    terms, valid = _cross_entropies(logits, labels, ignore_label)
    if weights is not None:
        terms = weights * terms
    return _mean(terms, valid)


def mixup_cross_entropy(
    logits: jax.Array, labels: jax.Array, mixed: Mixup, *, weights: jax.Array | None = None
) -> jax.Array:
    """Mean of lambda CE(own label) + (1 - lambda) CE(partner's label): the cross entropy with
    targets that are mixed as the images were.

    Args:
      logits: float `[B,...,C]`, of mixed images.
      labels: integer `[B,...]`, of the images before.
      mixed: how.
      weights: `[B,...]`, as for `cross_entropy`; of the pairs.
    """
    own, others = (
        cross_entropy(logits, target, weights=weights) for target in (labels, labels[mixed.partner])
    )
    return mixed.share * own + (1 - mixed.share) * others


def ohem_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    threshold: float = 0.7,
    min_kept: int = 50_000,
    ignore_label: int = IGNORE_LABEL,
) -> jax.Array:
    """Mean of the cross entropy over hard positions: online hard example mining, as CPS and U2PL
    released it for Cityscapes.

    Hard are those whose label has at most the probability `threshold`; or, where these are fewer
    than `min_kept` per image of the batch, that many with the lowest probabilities, and what equals
    the last of them. If not even that many positions have a label, all of these count.

    Args:
      logits: float `[B,...,C]`.
      labels: integer `[B,...]`, as for `cross_entropy`.
      threshold: in (0,1].
      min_kept: as many times B.
      ignore_label: as for `cross_entropy`.
    """
    terms, valid = _cross_entropies(logits, labels, ignore_label)
    limit, least = jnp.asarray(-math.log(threshold), terms.dtype), min_kept * len(labels)
    if least:
        hardest_first = jnp.where(valid, -terms, jnp.inf)
        limit = jnp.minimum(limit, -kth_smallest(hardest_first, least - 1))
    few = valid.sum() < least
    return _mean(terms, valid & (few | (terms >= limit)))


def squared_distance(
    logits: jax.Array, target: jax.Array, *, valid: jax.Array | None = None
) -> jax.Array:
    """Mean of ||softmax(logits) - softmax(target)||^2, the sum over the classes.

    Args:
      logits: float `[...,C]`.
      target: logits, likewise; no gradient flows.
      valid: bool `[...]`, False where a position does not count.

    Returns:
      Scalar in [0,2], of the precision of `cross_entropy`; 0 where no position counts.
    """
    p, q = (jax.nn.softmax(x) for x in _compared(logits, target, valid))
    return _mean(jnp.square(p - q).sum(-1), valid)


def kl_divergence(
    logits: jax.Array, target: jax.Array, *, valid: jax.Array | None = None
) -> jax.Array:
    """Mean of KL(softmax(target) || softmax(logits)), in nats.

    Args and result are those of `squared_distance`, but for the range: from 0 on.
    """
    p, q = (jax.nn.log_softmax(x) for x in _compared(logits, target, valid))
    return _mean((jnp.exp(q) * (q - p)).sum(-1), valid)


def _cross_entropies(
    logits: jax.Array, labels: jax.Array, ignore_label: int
) -> tuple[jax.Array, jax.Array]:
    """That of each position, and which of them have a label."""
    valid = labels != ignore_label
    terms = optax.softmax_cross_entropy_with_integer_labels(
        _at_least_float32(logits), jnp.where(valid, labels, 0)
    )
    return terms, valid


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _compared(logits: jax.Array, target: jax.Array, valid: jax.Array | None) -> list[jax.Array]:
    """Both as they are compared: 0 where they do not count, lest an infinity there reach the
    gradient.
    """
    both = [_at_least_float32(x) for x in (logits, jax.lax.stop_gradient(target))]
    return both if valid is None else [jnp.where(valid[..., None], x, 0) for x in both]


def _mean(terms: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Over the positions that count; 0 where none does."""
    if valid is None:
        return terms.mean()
    return jnp.where(valid, terms, 0).sum() / jnp.maximum(valid.sum(), 1)
