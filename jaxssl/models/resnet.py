"""ResNets as backbones: outputs of all stages, strides exchanged for dilation.

He et al., Deep residual learning for image recognition, CVPR 2016, with the stride in the 3x3
convolution of a bottleneck (v1.5) and, with the deep stem, He et al., Bag of tricks, CVPR 2019
(ResNet-C, called v1c).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import flax.linen as nn
import jax

from jaxssl.models.layers import (
    Conv,
    ConvBNReLU,
    Dropout,
    NormDef,
    max_pool,
    survival_probability,
)

DEPTHS: dict[str, tuple[bool, tuple[int, int, int, int]]] = {
    "resnet10": (False, (1, 1, 1, 1)),
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)),
}
"""Name -> (bottleneck blocks or basic ones, blocks of each stage)."""


class BlockPlan(NamedTuple):
    """Where a residual block stands and how it strides."""

    name: str
    stage: int
    stride: int
    dilation: int
    survival: float


def plan(
    depths: tuple[int, ...],
    output_stride: int = 32,
    multi_grid: tuple[int, ...] = (1, 1, 1),
    survival: float = 1.0,
    schedule: str = "constant",
    *,
    dilate_first: bool = False,
) -> Iterator[BlockPlan]:
    """Lays out the blocks of a ResNet.

    Where a stage's stride would exceed `output_stride`, it gives way to dilation. The first block
    of such a stage keeps the dilation of the stage before, as in torchvision and in mmseg's v1c,
    or has that of the others, as in semseg. `multi_grid` multiplies the dilations of the last
    stage, block by block.

    Args:
      depths: blocks of each stage.
      output_stride: 8, 16 or 32.
      multi_grid: at least one factor per block of the last stage.
      survival: probability that a residual branch is kept.
      schedule: of that probability, as in `layers.survival_probability`.
      dilate_first: dilates the first block of a stage like the others.
    """
    reached, dilation, done = 4, 1, 0
    for stage, depth in enumerate(depths):
        stride, previous = (1 if stage == 0 else 2), dilation
        if reached * stride > output_stride:
            dilation, stride = dilation * stride, 1
        reached *= stride
        for i in range(depth):
            done += 1
            yield BlockPlan(
                name=f"layer{stage + 1}_{i}",
                stage=stage,
                stride=stride if i == 0 else 1,
                dilation=(dilation if i > 0 or dilate_first else previous)
                * (multi_grid[i] if stage == len(depths) - 1 else 1),
                survival=survival_probability(done, sum(depths), survival, schedule),
            )


class Block(nn.Module):
    """A residual block. With a key, its branch is kept per image, and divided by `survival`.

    Attributes:
      features: of the 3x3 convolution; a bottleneck gives out four times as many.
      norm: makes normalization layers.
      bottleneck: 1x1, 3x3, 1x1 instead of 3x3, 3x3. Of the latter only the first is dilated.
      stride: of the block, taken by the 3x3 convolution.
      dilation: of that convolution.
      zero_init: gamma of the last normalization starts at 0, so that the block starts as identity.
      survival: probability that the branch is kept.
    """

    features: int
    norm: NormDef
    bottleneck: bool
    stride: int = 1
    dilation: int = 1
    zero_init: bool = False
    survival: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B,H,W,I]` -> `[B, ceil(H/stride), ceil(W/stride), O]`."""
        features = 4 * self.features if self.bottleneck else self.features
        last_init = nn.initializers.zeros if self.zero_init else nn.initializers.ones
        if self.bottleneck:
            y = nn.relu(self.norm(name="bn1")(Conv(self.features, 1, name="conv1")(x)))
            middle = Conv(self.features, 3, self.stride, self.dilation, name="conv2")
            y = nn.relu(self.norm(name="bn2")(middle(y)))
            y = self.norm(scale_init=last_init, name="bn3")(Conv(features, 1, name="conv3")(y))
        else:
            first = Conv(features, 3, self.stride, self.dilation, name="conv1")
            y = nn.relu(self.norm(name="bn1")(first(x)))
            y = self.norm(scale_init=last_init, name="bn2")(Conv(features, 3, name="conv2")(y))
        if self.stride > 1 or x.shape[-1] != features:
            x = Conv(features, 1, self.stride, name="downsample_conv")(x)
            x = self.norm(name="downsample_bn")(x)
        return nn.relu(x + Dropout(1 - self.survival, shared=(1, 2, 3))(y))


class ResNet(nn.Module):
    """A ResNet without its classifier.

    Attributes:
      depths: blocks of each stage.
      bottleneck: kind of the blocks.
      norm: makes normalization layers.
      width: channels of the first stage's 3x3 convolutions.
      stem: "conv7": one 7x7 convolution; "deep": three 3x3 ones.
      stem_width: channels of the deep stem's first two convolutions; the stem gives out twice as
        many. 0: half of `width`.
      output_stride: 8, 16 or 32.
      multi_grid: factors of the last stage's dilations.
      dilate_first: dilates the first block of a stage like the others.
      zero_init: residual blocks start as identity.
      survival: probability that a residual branch is kept (stochastic depth).
      schedule: of the survival probability, "constant" or "linear".
      remat: computes a block's activations again in the backward pass instead of keeping them.
    """

    depths: tuple[int, int, int, int]
    bottleneck: bool
    norm: NormDef
    width: int = 64
    stem: str = "conv7"
    stem_width: int = 0
    output_stride: int = 32
    multi_grid: tuple[int, ...] = (1, 1, 1)
    dilate_first: bool = False
    zero_init: bool = False
    survival: float = 1.0
    schedule: str = "constant"
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """`[B,H,W,3]` -> outputs of the four stages, the first at stride 4."""
        half = self.stem_width or self.width // 2
        if self.stem == "conv7":
            x = ConvBNReLU(2 * half, self.norm, size=7, stride=2, name="stem1")(x)
        else:
            x = ConvBNReLU(half, self.norm, stride=2, name="stem1")(x)
            x = ConvBNReLU(half, self.norm, name="stem2")(x)
            x = ConvBNReLU(2 * half, self.norm, name="stem3")(x)
        x = max_pool(x)
        block = nn.remat(Block) if self.remat else Block
        outputs: dict[int, jax.Array] = {}
        blocks = plan(
            self.depths,
            self.output_stride,
            self.multi_grid,
            self.survival,
            self.schedule,
            dilate_first=self.dilate_first,
        )
        for b in blocks:
            x = block(
                self.width * 2**b.stage,
                self.norm,
                self.bottleneck,
                b.stride,
                b.dilation,
                self.zero_init,
                b.survival,
                name=b.name,
            )(x)
            outputs[b.stage] = x
        return tuple(outputs.values())
