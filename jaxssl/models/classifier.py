"""A backbone that photographs are classified with, from ImageNet's weights if there are some.

ResNets as torchvision has them, but for the class count; EfficientNet-Lite0 with the convolution to
1280 channels, which counts as backbone: its weights are ImageNet's too.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn

from jaxssl.models import backbones, classification, layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(backbones.ConvolutionalNetwork, classification.ClassificationNetwork):
    """A ResNet or EfficientNet-Lite0, the mean over the image, and a linear classifier."""

    stem: str = "conv7"
    output_stride: int = 32

    def body(self, norm: layers.NormDef) -> nn.Module:
        """The backbone: normalized `[B,H,W,3]` -> outputs of its stages."""
        body = super().body(norm)
        return body.clone(last=True) if self.backbone == backbones.EFFICIENTNET else body
