"""DeepLabv2 on ResNets and EfficientNet-Lite0, without the CRF and the fusion of scales.

Chen et al., DeepLab: semantic image segmentation with deep convolutional nets, atrous convolution,
and fully connected CRFs, TPAMI 2018. Defaults are DMT's network but for `backbone="resnet101",
align_corners=True`. What DMT and DARS released sums the first two branches: `aspp_branches=2`.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxssl.contracts import Outputs
from jaxssl.models import layers, network, segmentation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(segmentation.ConvolutionalNetwork):
    """DeepLabv2. Its features are the output of the backbone; no single 1x1 convolution follows.

    Attributes:
      aspp_rates: dilations of atrous spatial pyramid pooling.
      aspp_branches: how many of them are used, from the first on.
      auxiliary_channels: of the auxiliary head.
    """

    stem: str = "conv7"
    output_stride: int = 8
    aspp_rates: tuple[int, ...] = (6, 12, 18, 24)
    aspp_branches: int = 4
    auxiliary_channels: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        count, most = self.aspp_branches, len(self.aspp_rates)
        wanted = f"from 1 to {most}, the number of aspp_rates"
        network.check("aspp_branches", count, 1 <= count <= most, wanted)

    def head(self, norm: layers.NormDef) -> nn.Module:
        """Outputs of four stages -> `Outputs`."""
        rates = self.aspp_rates[: self.aspp_branches]
        return Head(self.num_classes, rates, self.dropout, self.representation(norm))

    def auxiliary_head(self, norm: layers.NormDef) -> nn.Module:
        """Output of the third stage -> `Outputs`."""
        return segmentation.FCNHead(self.num_classes, norm, self.auxiliary_channels, self.dropout)


class Head(nn.Module):
    """The sum of atrous convolutions that give logits."""

    num_classes: int
    rates: tuple[int, ...]
    dropout: float
    representation: nn.Module

    @nn.compact
    def __call__(self, stages: tuple[jax.Array, ...]) -> Outputs:
        """Outputs of four stages -> logits `[B,h,w,C]` and features `[B,h,w,D]`."""
        x = layers.Dropout(self.dropout)(stages[-1])
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        conv = functools.partial(layers.Conv, self.num_classes, use_bias=True, std=0.01)
        branches = (conv(dilation=r, name=f"aspp{i}")(x) for i, r in enumerate(self.rates, 1))
        logits = functools.reduce(jnp.add, branches)
        return Outputs(logits, x, self.representation(stages[-1]))
