"""DeepLabv3+ on ResNets and EfficientNet-Lite0.

Chen et al., Encoder-decoder with atrous separable convolution for semantic image segmentation,
ECCV 2018. Defaults are MKD's network. The one that U2PL names so has `separable=False,
aspp_rates=(12, 24, 36), low_level_channels=256, output_stride=8, multi_grid=(2, 2, 4),
stem_width=64, zero_init=True, align_corners=True, embedding=256, dropout=0.1, decoder_dropout=0.1`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxssl.contracts import Outputs
from jaxssl.models import layers, segmentation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(segmentation.ConvolutionalNetwork):
    """DeepLabv3+.

    Attributes:
      separable: depthwise separable 3x3 convolutions in the head.
      aspp_rates: dilations of atrous spatial pyramid pooling.
      channels: of both heads.
      low_level_channels: of the decoder's input from the first stage.
    """

    separable: bool = True
    aspp_rates: tuple[int, ...] = (6, 12, 18)
    channels: int = 256
    low_level_channels: int = 48

    def head(self, norm: layers.NormDef) -> nn.Module:
        """Outputs of four stages -> `Outputs`."""
        return Head(
            num_classes=self.num_classes,
            conv=functools.partial(layers.ConvBNReLU, norm=norm),
            conv3x3=self._conv3x3(norm),
            representation=self.representation(norm),
            rates=self.aspp_rates,
            channels=self.channels,
            low_level_channels=self.low_level_channels,
            dropout=self.dropout,
            decoder_dropout=self.decoder_dropout,
            align_corners=self.align_corners,
        )

    def auxiliary_head(self, norm: layers.NormDef) -> nn.Module:
        """Output of the third stage -> `Outputs`."""
        return segmentation.FCNHead(self.num_classes, norm, self.channels, self.dropout)

    def representation(self, norm: layers.NormDef) -> segmentation.Representation:
        """What the head calls on the features that its classifier's branch starts from."""
        conv3x3, dropout = self._conv3x3(norm), self.decoder_dropout
        return segmentation.Representation(self.embedding, conv3x3, dropout)

    def _conv3x3(self, norm: layers.NormDef) -> Callable[..., nn.Module]:
        kind = layers.SeparableConv if self.separable else layers.ConvBNReLU
        return functools.partial(kind, norm=norm)


class Head(nn.Module):
    """Atrous spatial pyramid pooling and the decoder at stride 4."""

    num_classes: int
    conv: Callable[..., nn.Module]
    conv3x3: Callable[..., nn.Module]
    representation: nn.Module
    rates: tuple[int, ...]
    channels: int
    low_level_channels: int
    dropout: float
    decoder_dropout: float
    align_corners: bool

    @nn.compact
    def __call__(self, stages: tuple[jax.Array, ...]) -> Outputs:
        """Outputs of four stages -> logits `[B,h,w,C]` and features `[B,h,w,channels]`."""
        conv, conv3x3, drop = self.conv, self.conv3x3, layers.Dropout(self.decoder_dropout)
        low, x = stages[0], stages[-1]

        pooled = conv(self.channels, size=1, name="pool")(x.mean((1, 2), keepdims=True))
        branches = [jnp.broadcast_to(pooled, (*x.shape[:3], self.channels))]
        branches.append(conv(self.channels, size=1, name="aspp0")(x))
        for i, rate in enumerate(self.rates, 1):
            branches.append(conv3x3(self.channels, dilation=rate, name=f"aspp{i}")(x))
        x = drop(conv(self.channels, name="bottleneck")(jnp.concatenate(branches, -1)))

        _, height, width, _ = low.shape
        x = layers.resize_bilinear(x, (height, width), align_corners=self.align_corners)
        low = conv(self.low_level_channels, size=1, name="low_level")(low)
        seen = jnp.concatenate([x, low], -1)
        x = drop(conv3x3(self.channels, name="decoder1")(seen))
        x = conv3x3(self.channels, name="decoder2")(x)
        outputs = layers.classify(x, self.num_classes, self.dropout)
        return outputs._replace(embedding=self.representation(seen))
