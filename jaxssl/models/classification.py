"""What the networks that classify whole images share: a mean over the image and a classifier."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxssl.contracts import Outputs
from jaxssl.models import layers, network


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationNetwork(network.LinenNetwork):
    """A backbone, the mean over its last stage, and a linear classifier.

    Logits are `[B,C]`, features `[B,D]`.
    """

    task = "classification"

    @abc.abstractmethod
    def body(self, norm: layers.NormDef) -> nn.Module:
        """The backbone: normalized `[B,H,W,3]` -> outputs of its stages."""

    def module(self, *, batch_stats: bool) -> nn.Module:
        """The linen module in one of its two modes."""
        head = Head(self.num_classes, self.dropout)
        return WholeImage(self.body(self.norm(batch_stats)), head)

    def inputs(self, image: jax.Array, valid: jax.Array | None) -> tuple[Any, ...]:
        """What `module` is called with: the normalized image, and which pixels to average over."""
        return (*super().inputs(image, valid), valid)


class WholeImage(nn.Module):
    """A backbone and what reads its last stage.

    Attributes:
      backbone: `[B,H,W,3]` -> outputs of its stages.
      head: output of the last stage and `valid` -> `Outputs`.
    """

    backbone: nn.Module
    head: nn.Module

    def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> Outputs:
        """Runs both."""
        return self.head(self.backbone(x)[-1], valid)


class Head(nn.Module):
    """The mean over the image, dropout, and a classifier that starts as a linear layer of PyTorch
    does, with a standard deviation of `1 / sqrt(3 D)`.
    """

    num_classes: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array | None) -> Outputs:
        """`[B,h,w,D]` -> logits `[B,C]` and features `[B,D]`."""
        x, std = average(x, valid)[:, None, None], 1 / math.sqrt(3 * x.shape[-1])
        outputs = layers.classify(x, self.num_classes, self.dropout, std)
        return jax.tree.map(lambda x: x[:, 0, 0], outputs)


def average(x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """The mean of `[B,h,w,D]` over places: at least float32 `[B,D]`.

    Args:
      x: what to average.
      valid: bool `[B,H,W]`, at the size of the image; a place counts as much as it sees of it.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if valid is None:
        return x.mean((1, 2))
    seen = layers.adaptive_average_pool(valid[..., None].astype(x.dtype), x.shape[1:3])
    return (seen * x).sum((1, 2)) / jnp.maximum(seen.sum((1, 2)), 1e-6)
