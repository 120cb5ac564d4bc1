"""What the segmentation networks share: a backbone with its fields, and heads."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxssl.contracts import Outputs
from jaxssl.models import backbones, layers, network


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationNetwork(backbones.BackboneNetwork):
    """A backbone and heads on its four stages.

    Attributes:
      auxiliary: a second, small head on the third stage, computed where BatchNorm uses the
        batch's statistics.
      embedding: E, channels of what a representation head gives out, beside the classifier, for a
        method that compares pixels; 0: there is none.
      decoder_dropout: probability that a channel is dropped after the other 3x3 convolutions of
        the head.
    """

    auxiliary: bool = False
    embedding: int = 0
    decoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        network.check("embedding", self.embedding, self.embedding >= 0, "0 or more channels")
        network.check_rate("decoder_dropout", self.decoder_dropout)

    @abc.abstractmethod
    def head(self, norm: layers.NormDef) -> nn.Module:
        """Outputs of four stages -> `Outputs`; `representation` is a part of it."""

    @abc.abstractmethod
    def auxiliary_head(self, norm: layers.NormDef) -> nn.Module:
        """Output of the third stage -> `Outputs`."""

    def representation(self, norm: layers.NormDef) -> Representation:
        """What the head calls on the features that its classifier's branch starts from."""
        conv = functools.partial(layers.ConvBNReLU, norm=norm)
        return Representation(self.embedding, conv, self.decoder_dropout)

    def module(self, *, batch_stats: bool) -> nn.Module:
        """The linen module in one of its two modes."""
        norm = self.norm(batch_stats)
        return network.EncoderDecoder(
            backbone=self.body(norm),
            head=self.head(norm),
            auxiliary=self.auxiliary_head(norm) if self.auxiliary and batch_stats else None,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvolutionalNetwork(backbones.ConvolutionalNetwork, SegmentationNetwork):
    """With a ResNet or EfficientNet-Lite0; a network's own file gives the heads."""


class FCNHead(nn.Module):
    """A 3x3 convolution and a classifier."""

    num_classes: int
    norm: layers.NormDef
    channels: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array) -> Outputs:
        """`[B,h,w,I]` -> logits `[B,h,w,C]` and features `[B,h,w,channels]`."""
        x = layers.ConvBNReLU(self.channels, self.norm, name="conv")(x)
        return layers.classify(x, self.num_classes, self.dropout)


class Representation(nn.Module):
    """Two 3x3 convolutions and a linear 1x1 one, as a classifier's branch would have them.

    Attributes:
      channels: E, of all three; 0: no convolution and no output.
      conv: makes the former two, with normalization and ReLU.
      dropout: probability that a channel is dropped after either.
    """

    channels: int
    conv: Callable[..., nn.Module]
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array | None:
        """`[B,h,w,I]` -> at least float32 `[B,h,w,E]`, not normalized."""
        if not self.channels:
            return None
        for i in (1, 2):
            x = self.conv(self.channels, name=f"conv{i}")(x)
            x = layers.Dropout(self.dropout)(x)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return layers.Conv(self.channels, 1, use_bias=True, name="projection")(x)
