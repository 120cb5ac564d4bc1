"""SETR on vision transformers, with the decoder that its paper calls naive.

Zheng et al., Rethinking semantic segmentation from a sequence-to-sequence perspective with
transformers, CVPR 2021. Which one RML trains with its DeepLabv2 the paper does not say; defaults
are the larger of SETR's own, ViT-Large with the colors that its ImageNet weights were trained on.
DeiT's weights, the other ones of SETR, want `backbone="vit_base", preprocessing="imagenet"`.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax

from jaxssl.contracts import Outputs
from jaxssl.models import layers, network, segmentation, vit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(segmentation.SegmentationNetwork):
    """SETR. Logits have one position per patch, whatever the size of the image (see `vit`).

    Attributes:
      backbone: "vit_tiny", "vit_small", "vit_base" or "vit_large"; "vit_mini" on CPUs.
      patch: side of a patch: the stride of the logits.
      tokens: beside the patches: 1, the class token; 2, with the distillation token of DeiT's
        distilled weights; 0 for weights that have none.
      channels: of the heads.
    """

    preprocessing: str = "inception"
    backbone: str = "vit_large"
    patch: int = 16
    tokens: int = 1
    channels: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        network.check("patch", self.patch, self.patch > 0, "1 or more")
        network.check_choice("tokens", self.tokens, (0, 1, 2))

    def backbones(self) -> tuple[str, ...]:
        """Names of the backbones that there are."""
        return tuple(vit.SIZES)

    def body(self, norm: layers.NormDef) -> nn.Module:
        """The backbone: normalized `[B,H,W,3]` -> outputs after each quarter of the blocks."""
        del norm
        return vit.VisionTransformer(
            vit.SIZES[self.backbone],
            self.patch,
            self.tokens,
            survival=self.stochastic_depth,
            schedule=self.stochastic_depth_schedule,
            remat=self.remat,
        )

    def head(self, norm: layers.NormDef) -> nn.Module:
        """Outputs of the quarters -> `Outputs`."""
        return Head(self.num_classes, norm, self.channels, self.dropout, self.representation(norm))

    def auxiliary_head(self, norm: layers.NormDef) -> nn.Module:
        """Output of the third quarter -> `Outputs`."""
        return AuxiliaryHead(self.num_classes, norm, self.channels, self.dropout)


class Head(nn.Module):
    """A 1x1 convolution and a classifier. Of SETR's layer normalization before them the backbone's
    last is the one, so that it starts from the file's.
    """

    num_classes: int
    norm: layers.NormDef
    channels: int
    dropout: float
    representation: nn.Module

    @nn.compact
    def __call__(self, stages: tuple[jax.Array, ...]) -> Outputs:
        """Outputs of the quarters -> logits `[B,h,w,C]` and features `[B,h,w,channels]`."""
        x = layers.ConvBNReLU(self.channels, self.norm, size=1, name="conv")(stages[-1])
        outputs = layers.classify(x, self.num_classes, self.dropout)
        return outputs._replace(embedding=self.representation(stages[-1]))


class AuxiliaryHead(nn.Module):
    """Layer normalization, a 1x1 convolution and a classifier."""

    num_classes: int
    norm: layers.NormDef
    channels: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array) -> Outputs:
        """`[B,h,w,D]` -> logits `[B,h,w,C]` and features `[B,h,w,channels]`."""
        x = vit.layer_norm(x, "norm")
        x = layers.ConvBNReLU(self.channels, self.norm, size=1, name="conv")(x)
        return layers.classify(x, self.num_classes, self.dropout)
