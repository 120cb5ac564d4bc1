"""EfficientNet-Lite0 as a backbone: outputs of its stages, strides exchanged for dilation.

Tan and Le, EfficientNet, ICML 2019 (Table 1), in the variant "Lite" of TensorFlow's TPU models:
ReLU6 instead of swish, no squeeze-and-excitation. Zero padding, BatchNorm's epsilon and the scale
of the colors are those of TensorFlow, because ImageNet's weights were trained with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import flax.linen as nn
import jax

from jaxssl.models import layers
from jaxssl.models.layers import NormDef

MEAN = (127.0, 127.0, 127.0)
"""The color that becomes 0."""

STD = (128.0, 128.0, 128.0)
"""What becomes 1."""

GROUPS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Blocks, kernel size, stride of the first block, expansion and channels, from input to output."""


class BlockPlan(NamedTuple):
    """Where a block stands and what it does."""

    name: str
    stage: int
    size: int
    stride: int
    dilation: int
    expansion: int
    features: int
    survival: float


def plan(
    output_stride: int = 32, survival: float = 1.0, schedule: str = "constant"
) -> Iterator[BlockPlan]:
    """Lays out the blocks.

    Where a stride would exceed `output_stride`, it gives way to dilation, and the block that had it
    keeps the dilation of the block before: so the output holds that of the strided network, in
    every second row and column.

    Args:
      output_stride: 8, 16 or 32.
      survival: probability that a residual branch is kept.
      schedule: of that probability, as in `layers.survival_probability`.
    """
    reached, dilation, stage, done = 2, 1, -1, 0
    total = sum(count for count, *_ in GROUPS)
    for count, size, stride, expansion, features in GROUPS:
        step = stride if reached * stride <= output_stride else 1
        widened, stage = dilation * stride // step, stage + stride - 1
        for i in range(count):
            yield BlockPlan(
                name=f"block{done}",
                stage=stage,
                size=size,
                stride=step if i == 0 else 1,
                dilation=dilation if i == 0 else widened,
                expansion=expansion,
                features=features,
                survival=layers.survival_probability(done + 1, total, survival, schedule),
            )
            done += 1
        reached, dilation = reached * step, widened


class ConvBN(nn.Module):
    """Convolution, batch normalization and, unless `linear`, ReLU6."""

    features: int
    norm: NormDef
    size: int = 1
    stride: int = 1
    dilation: int = 1
    depthwise: bool = False
    linear: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B,H,W,I]` -> `[B, ceil(H/stride), ceil(W/stride), features]`."""
        x = layers.Conv(
            self.features,
            self.size,
            self.stride,
            self.dilation,
            groups=self.features if self.depthwise else 1,
            padding="same",
            std=math.sqrt(2 / self.size**2 / (1 if self.depthwise else self.features)),
            name="conv",
        )(x)
        x = self.norm(epsilon=1e-3, name="bn")(x)
        return x if self.linear else nn.relu6(x)


class Block(nn.Module):
    """An inverted residual: 1x1 expansion, depthwise convolution, linear 1x1 projection.

    With a key, its branch is kept per image, and divided by `plan.survival`.
    """

    plan: BlockPlan
    norm: NormDef

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B,H,W,I]` -> `[B, ceil(H/stride), ceil(W/stride), features]`."""
        p, y = self.plan, x
        wide = p.expansion * x.shape[-1]
        if p.expansion > 1:
            y = ConvBN(wide, self.norm, name="expand")(y)
        place = (p.size, p.stride, p.dilation)
        y = ConvBN(wide, self.norm, *place, depthwise=True, name="depthwise")(y)
        y = ConvBN(p.features, self.norm, linear=True, name="project")(y)
        if x.shape != y.shape:
            return y
        return x + layers.Dropout(1 - p.survival, shared=(1, 2, 3))(y)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 without its classifier.

    Attributes:
      norm: makes normalization layers.
      output_stride: 8, 16 or 32.
      survival: probability that a residual branch is kept (stochastic depth).
      schedule: of the survival probability, "constant" or "linear".
      remat: computes a block's activations again in the backward pass instead of keeping them.
      last: adds the 1x1 convolution that ImageNet's classifier reads.
    """

    norm: NormDef
    output_stride: int = 32
    survival: float = 1.0
    schedule: str = "constant"
    remat: bool = False
    last: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """`[B,H,W,3]` -> outputs of four stages with 24, 40, 112 and 320 channels, the first at
        stride 4; then, if there is one, of the last convolution, with 1280.
        """
        x = ConvBN(32, self.norm, size=3, stride=2, name="stem")(x)
        block = nn.remat(Block) if self.remat else Block
        outputs: dict[int, jax.Array] = {}
        for b in plan(self.output_stride, self.survival, self.schedule):
            outputs[b.stage] = x = block(b, self.norm, name=b.name)(x)
        if self.last:
            outputs[4] = ConvBN(1280, self.norm, name="last")(x)
        return tuple(x for stage, x in outputs.items() if stage >= 0)


def torch_name(path: tuple[str, ...]) -> str:
    """What the port to PyTorch calls a parameter or statistic.

    Args:
      path: in the trees of a network that classifies images, such as ("backbone", "block3",
        "expand", "bn", "mean").
    """
    *_, scope, layer, leaf = path
    block = next((name[5:] for name in path if name.startswith("block")), None)
    prefix = "" if block is None else f"_blocks.{block}."
    return f"{prefix}{_LAYERS[scope, layer]}.{_LEAVES[leaf]}"


_LAYERS = {
    ("stem", "conv"): "_conv_stem",
    ("stem", "bn"): "_bn0",
    ("expand", "conv"): "_expand_conv",
    ("expand", "bn"): "_bn0",
    ("depthwise", "conv"): "_depthwise_conv",
    ("depthwise", "bn"): "_bn1",
    ("project", "conv"): "_project_conv",
    ("project", "bn"): "_bn2",
    ("last", "conv"): "_conv_head",
    ("last", "bn"): "_bn1",
    ("head", "classifier"): "_fc",
}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
