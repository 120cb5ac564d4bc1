"""DeepLabv3+ on ResNets and EfficientNet-Lite0.

Chen et al., Encoder-decoder with atrous separable convolution for semantic image segmentation,
ECCV 2018. Defaults are MKD's network. The one that U2PL names so has `separable=False,
aspp_rates=(12, 24, 36), low_level_channels=256, output_stride=8, multi_grid=(2, 2, 4),
stem_width=64, zero_init=True, align_corners=True`.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxssl.models import efficientnet_lite, layers, network, pretrained, resnet

EFFICIENTNET = "efficientnet_lite0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(network.LinenNetwork):
    """DeepLabv3+.

    Attributes:
      backbone: "resnet10", "resnet18", "resnet34", "resnet50", "resnet101" or
        "efficientnet_lite0".
      pretrained: weights that the backbone starts with, by a name that `pretrained.FILES` has for
        it; "": random ones.
      width: channels of a ResNet's first stage, before the bottlenecks' factor of 4.
      stem: of a ResNet, "deep" (three 3x3 convolutions) or "conv7".
      stem_width: channels of the deep stem's first two convolutions; None: half of `width`.
      output_stride: of the backbone, 8, 16 or 32.
      multi_grid: factors of the dilations in a ResNet's last stage, block by block.
      zero_init: a ResNet's residual blocks start as identity.
      separable: depthwise separable 3x3 convolutions in the head.
      aspp_rates: dilations of atrous spatial pyramid pooling.
      channels: of the head.
      low_level_channels: of the decoder's input from the first stage.
      auxiliary: a second, small head on the third stage, computed where BatchNorm uses the
        batch's statistics.
      dropout: probability that a channel of a classifier's input is dropped.
      stochastic_depth: probability that a residual branch is kept.
      stochastic_depth_schedule: "constant", or "linear" in depth.
      remat: trades time for memory in the backbone.
    """

    backbone: str = "resnet50"
    pretrained: str = ""
    width: int = 64
    stem: str = "deep"
    stem_width: int | None = None
    output_stride: int = 16
    multi_grid: tuple[int, ...] = (1, 1, 1)
    zero_init: bool = False
    separable: bool = True
    aspp_rates: tuple[int, ...] = (6, 12, 18)
    channels: int = 256
    low_level_channels: int = 48
    auxiliary: bool = False
    dropout: float = 0.0
    stochastic_depth: float = 1.0
    stochastic_depth_schedule: str = "constant"
    remat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        network.check_choice("backbone", self.backbone, (*resnet.DEPTHS, EFFICIENTNET))
        network.check_choice("pretrained", self.pretrained, pretrained.names(self.backbone))
        network.check_choice("stem", self.stem, ("deep", "conv7"))
        network.check_choice("output_stride", self.output_stride, (8, 16, 32))
        schedule, survival = self.stochastic_depth_schedule, self.stochastic_depth
        network.check_choice("stochastic_depth_schedule", schedule, ("constant", "linear"))
        network.check("stochastic_depth", survival, 0 < survival <= 1, "in (0, 1]")
        network.check("dropout", self.dropout, 0 <= self.dropout < 1, "in [0, 1)")
        if self.backbone in resnet.DEPTHS:
            grid, last = self.multi_grid, resnet.DEPTHS[self.backbone][1][-1]
            network.check("multi_grid", grid, len(grid) >= last, f"at least {last} factors")

    @property
    def mean(self) -> tuple[float, float, float]:
        """The color that becomes 0: the backbone's."""
        return efficientnet_lite.MEAN if self.backbone == EFFICIENTNET else super().mean

    @property
    def std(self) -> tuple[float, float, float]:
        """The distance from `mean` that becomes 1: the backbone's."""
        return efficientnet_lite.STD if self.backbone == EFFICIENTNET else super().std

    def module(self, *, batch_stats: bool) -> nn.Module:
        """The linen module in one of its two modes."""
        norm = self.norm(batch_stats)
        return network.EncoderDecoder(
            backbone=self._backbone(norm),
            head=Head(
                num_classes=self.num_classes,
                norm=norm,
                separable=self.separable,
                rates=self.aspp_rates,
                channels=self.channels,
                low_level_channels=self.low_level_channels,
                dropout=self.dropout,
                align_corners=self.align_corners,
            ),
            auxiliary=FCNHead(self.num_classes, norm, self.channels, self.dropout)
            if self.auxiliary and batch_stats
            else None,
        )

    def _backbone(self, norm: layers.NormDef) -> nn.Module:
        shared = {
            "norm": norm,
            "output_stride": self.output_stride,
            "survival": self.stochastic_depth,
            "schedule": self.stochastic_depth_schedule,
            "remat": self.remat,
        }
        if self.backbone == EFFICIENTNET:
            return efficientnet_lite.EfficientNetLite0(**shared)
        bottleneck, depths = resnet.DEPTHS[self.backbone]
        return resnet.ResNet(
            depths=depths,
            bottleneck=bottleneck,
            width=self.width,
            stem=self.stem,
            stem_width=self.stem_width,
            multi_grid=self.multi_grid,
            zero_init=self.zero_init,
            **shared,
        )


class Head(nn.Module):
    """Atrous spatial pyramid pooling and the decoder at stride 4."""

    num_classes: int
    norm: layers.NormDef
    separable: bool
    rates: tuple[int, ...]
    channels: int
    low_level_channels: int
    dropout: float
    align_corners: bool

    @nn.compact
    def __call__(self, stages: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        """Outputs of four stages -> logits `[B,h,w,C]` and features `[B,h,w,channels]`."""
        conv = functools.partial(layers.ConvBNReLU, norm=self.norm)
        conv3x3 = functools.partial(
            layers.SeparableConv if self.separable else layers.ConvBNReLU, norm=self.norm
        )
        low, x = stages[0], stages[-1]

        pooled = conv(self.channels, size=1, name="pool")(x.mean((1, 2), keepdims=True))
        branches = [jnp.broadcast_to(pooled, (*x.shape[:3], self.channels))]
        branches.append(conv(self.channels, size=1, name="aspp0")(x))
        for i, rate in enumerate(self.rates, 1):
            branches.append(conv3x3(self.channels, dilation=rate, name=f"aspp{i}")(x))
        x = conv(self.channels, name="bottleneck")(jnp.concatenate(branches, -1))

        _, height, width, _ = low.shape
        x = layers.resize_bilinear(x, (height, width), align_corners=self.align_corners)
        low = conv(self.low_level_channels, size=1, name="low_level")(low)
        x = conv3x3(self.channels, name="decoder1")(jnp.concatenate([x, low], -1))
        x = conv3x3(self.channels, name="decoder2")(x)
        return layers.classify(x, self.num_classes, self.dropout)


class FCNHead(nn.Module):
    """A 3x3 convolution and a classifier."""

    num_classes: int
    norm: layers.NormDef
    channels: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`[B,h,w,I]` -> logits `[B,h,w,C]` and features `[B,h,w,channels]`."""
        x = layers.ConvBNReLU(self.channels, self.norm, name="conv")(x)
        return layers.classify(x, self.num_classes, self.dropout)
