"""Wide residual networks for small images, as DMT's released code has WRN-28-2 for CIFAR-10.

Zagoruyko and Komodakis, Wide residual networks, BMVC 2016: normalization and ReLU before each
convolution, and before the 1x1 convolution of a shortcut too. ReLU does not leak and BatchNorm's
momentum is 0.1: DMT took the network from a port of that paper's, not from MixMatch's.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax

from jaxssl.models import classification, network
from jaxssl.models.layers import Conv, NormDef


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(classification.ClassificationNetwork):
    """WRN-28-2. The first of its three stages has the size of the image, the last a quarter.

    Attributes:
      depth: layers with parameters, of which 4 are in no block: 10, 16, 22, 28, 40, ...
      widen: factor of the channels, which without it are 16, 32 and 64.
    """

    preprocessing: str = "cifar10"
    depth: int = 28
    widen: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.depth >= 10 and self.depth % 6 == 4
        network.check("depth", self.depth, fits, "4 more than a multiple of 6, such as 28")
        network.check("widen", self.widen, self.widen >= 1, "1 or more")

    def body(self, norm: NormDef) -> nn.Module:
        """The backbone: normalized `[B,H,W,3]` -> outputs of three stages."""
        return WideResNet(self.depth, self.widen, norm)


class WideResNet(nn.Module):
    """A wide ResNet without its classifier."""

    depth: int
    widen: int
    norm: NormDef

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """`[B,H,W,3]` -> outputs of three stages at strides 1, 2 and 4; the last is normalized."""
        x, outputs = Conv(16, name="stem")(x), []
        for stage in range(3):
            for i in range((self.depth - 4) // 6):
                stride = 2 if stage > 0 and i == 0 else 1
                block = Block(
                    16 * 2**stage * self.widen, self.norm, stride, name=f"layer{stage + 1}_{i}"
                )
                x = block(x)
            outputs.append(x)
        outputs[-1] = nn.relu(self.norm(name="bn")(x))
        return tuple(outputs)


class Block(nn.Module):
    """A residual block whose sum nothing follows. Where channels differ the shortcut is a 1x1
    convolution of what the branch sees, elsewhere it is the input.
    """

    features: int
    norm: NormDef
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B,H,W,I]` -> `[B, ceil(H/stride), ceil(W/stride), features]`."""
        y = nn.relu(self.norm(name="bn1")(x))
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, self.stride, name="shortcut")(y)
        y = Conv(self.features, 3, self.stride, name="conv1")(y)
        y = nn.relu(self.norm(name="bn2")(y))
        return x + Conv(self.features, 3, name="conv2")(y)
