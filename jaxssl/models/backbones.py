"""Backbones as fields of a network, and the weights they start with."""

from __future__ import annotations

import abc
import dataclasses

import flax.linen as nn

from jaxssl.models import efficientnet_lite, layers, network, pretrained, resnet

EFFICIENTNET = "efficientnet_lite0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneNetwork(network.LinenNetwork):
    """A backbone of one of several architectures; what reads its stages is a subclass's.

    Attributes:
      backbone: its name.
      pretrained: weights to start with: a name that `pretrained.FILES` has for the backbone, or
        what else `pretrained.check_name` lets pass; "": random ones.
      stochastic_depth: probability that a residual branch is kept.
      stochastic_depth_schedule: "constant", or "linear" in depth.
      remat: trades time for memory in the backbone.
    """

    backbone: str
    pretrained: str = ""
    stochastic_depth: float = 1.0
    stochastic_depth_schedule: str = "constant"
    remat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        network.check_choice("backbone", self.backbone, self.backbones())
        pretrained.check_name(self.backbone, self.pretrained)
        schedule, survival = self.stochastic_depth_schedule, self.stochastic_depth
        network.check_choice("stochastic_depth_schedule", schedule, ("constant", "linear"))
        network.check("stochastic_depth", survival, 0 < survival <= 1, "in (0, 1]")

    @abc.abstractmethod
    def backbones(self) -> tuple[str, ...]:
        """Names of the backbones that there are."""

    @abc.abstractmethod
    def body(self, norm: layers.NormDef) -> nn.Module:
        """The backbone: normalized `[B,H,W,3]` -> outputs of four stages."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvolutionalNetwork(BackboneNetwork):
    """A ResNet or EfficientNet-Lite0.

    Attributes:
      backbone: "resnet10", "resnet18", "resnet34", "resnet50", "resnet101" or
        "efficientnet_lite0".
      width: channels of a ResNet's first stage, before the bottlenecks' factor of 4.
      stem: of a ResNet, "deep" (three 3x3 convolutions) or "conv7".
      stem_width: channels of the deep stem's first two convolutions, half of those that any stem
        gives out; 0: half of `width`.
      output_stride: of the backbone, 8, 16 or 32.
      multi_grid: factors of the dilations in a ResNet's last stage, block by block.
      dilate_first: in a ResNet, the first block of a dilated stage has that stage's dilation, not
        that of the stage before.
      zero_init: a ResNet's residual blocks start as identity.
    """

    backbone: str = "resnet50"
    width: int = 64
    stem: str = "deep"
    stem_width: int = 0
    output_stride: int = 16
    multi_grid: tuple[int, ...] = (1, 1, 1)
    dilate_first: bool = False
    zero_init: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        network.check_choice("stem", self.stem, ("deep", "conv7"))
        network.check_choice("output_stride", self.output_stride, (8, 16, 32))
        if self.backbone in resnet.DEPTHS:
            grid, last = self.multi_grid, resnet.DEPTHS[self.backbone][1][-1]
            network.check("multi_grid", grid, len(grid) >= last, f"at least {last} factors")

    def backbones(self) -> tuple[str, ...]:
        """Names of the backbones that there are."""
        return (*resnet.DEPTHS, EFFICIENTNET)

    @property
    def mean(self) -> tuple[float, float, float]:
        """The color that becomes 0: the backbone's."""
        return efficientnet_lite.MEAN if self.backbone == EFFICIENTNET else super().mean

    @property
    def std(self) -> tuple[float, float, float]:
        """The distance from `mean` that becomes 1: the backbone's."""
        return efficientnet_lite.STD if self.backbone == EFFICIENTNET else super().std

    def body(self, norm: layers.NormDef) -> nn.Module:
        """The backbone: normalized `[B,H,W,3]` -> outputs of four stages."""
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
            dilate_first=self.dilate_first,
            zero_init=self.zero_init,
            **shared,
        )
