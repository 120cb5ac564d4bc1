"""PSPNet on ResNets and EfficientNet-Lite0.

Zhao et al., Pyramid scene parsing network, CVPR 2017. Defaults are DARS's network, which is that
of the paper's PyTorch code (semseg), but for `align_corners=True`.
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
    """PSPNet.

    Attributes:
      pool_bins: windows along each axis, for each level of the pyramid.
      channels: of the head.
      auxiliary_channels: of the auxiliary head.
    """

    stem_width: int = 64
    output_stride: int = 8
    dilate_first: bool = True
    pool_bins: tuple[int, ...] = (1, 2, 3, 6)
    channels: int = 512
    auxiliary: bool = True
    auxiliary_channels: int = 256
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        bins = self.pool_bins
        good = len(bins) > 0 and min(bins) > 0
        network.check("pool_bins", bins, good, "one or more positive numbers")

    def head(self, norm: layers.NormDef) -> nn.Module:
        """Outputs of four stages -> `Outputs`."""
        return Head(
            num_classes=self.num_classes,
            norm=norm,
            representation=self.representation(norm),
            bins=self.pool_bins,
            channels=self.channels,
            dropout=self.dropout,
            align_corners=self.align_corners,
        )

    def auxiliary_head(self, norm: layers.NormDef) -> nn.Module:
        """Output of the third stage -> `Outputs`."""
        return segmentation.FCNHead(self.num_classes, norm, self.auxiliary_channels, self.dropout)


class Head(nn.Module):
    """Pyramid pooling, a 3x3 convolution and a classifier."""

    num_classes: int
    norm: layers.NormDef
    representation: nn.Module
    bins: tuple[int, ...]
    channels: int
    dropout: float
    align_corners: bool

    @nn.compact
    def __call__(self, stages: tuple[jax.Array, ...]) -> Outputs:
        """Outputs of four stages -> logits `[B,h,w,C]` and features `[B,h,w,channels]`.

        The levels of the pyramid have together about as many channels as the last stage.
        """
        conv = functools.partial(layers.ConvBNReLU, norm=self.norm)
        x = stages[-1]
        _, height, width, depth = x.shape
        levels = [x]
        for i, bins in enumerate(self.bins, 1):
            y = layers.adaptive_average_pool(x, (bins, bins))
            y = conv(depth // len(self.bins), size=1, name=f"pool{i}")(y)
            y = layers.resize_bilinear(y, (height, width), align_corners=self.align_corners)
            levels.append(y)
        x = conv(self.channels, name="bottleneck")(jnp.concatenate(levels, -1))
        outputs = layers.classify(x, self.num_classes, self.dropout)
        return outputs._replace(embedding=self.representation(x))
