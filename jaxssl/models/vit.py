"""Vision transformers as backbones: what they know of each patch, at four depths.

Dosovitskiy et al., An image is worth 16x16 words, ICLR 2021, and Touvron et al., Training
data-efficient image transformers (DeiT), ICML 2021, which is the same network. Normalization comes
before attention and before the perceptron, as in timm, whose weights fit.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxssl.models import layers

STD = 0.02
"""Standard deviation of everything that is drawn."""


class Size(NamedTuple):
    """Channels of a patch, blocks, and heads of attention."""

    width: int
    depth: int
    heads: int


SIZES: dict[str, Size] = {
    "vit_mini": Size(96, 4, 3),
    "vit_tiny": Size(192, 12, 3),
    "vit_small": Size(384, 12, 6),
    "vit_base": Size(768, 12, 12),
    "vit_large": Size(1024, 24, 16),
}
"""Those with published weights, and a smaller one for CPUs. Depths are multiples of 4."""


class VisionTransformer(nn.Module):
    """A vision transformer without its classifier.

    An image whose sides are no multiples of the patch is enlarged to the next ones, so that its
    patches cover it and nothing else. The position embedding belongs to the grid of the images
    that parameters were drawn for, and is resized bilinearly to any other.

    Attributes:
      size: channels, blocks and heads.
      patch: side of a patch.
      tokens: how many tokens there are that stand for no patch, such as the class token. Patches
        attend to them; they are not given out.
      survival: probability that a residual branch is kept (stochastic depth).
      schedule: of that probability, "constant" or "linear".
      remat: computes a block's activations again in the backward pass instead of keeping them.
    """

    size: Size
    patch: int = 16
    tokens: int = 1
    survival: float = 1.0
    schedule: str = "constant"
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """`[B,H,W,3]` -> `[B, ceil(H/patch), ceil(W/patch), width]` after each quarter of the
        blocks; the last is normalized.
        """
        x = PatchEmbedding(self.size.width, self.patch, name="patch")(x)
        batch, *grid, width = x.shape
        x = x + self._positions((grid[0], grid[1])).astype(x.dtype)
        x = x.reshape(batch, -1, width)
        if self.tokens:
            tokens = self.param("tokens", nn.initializers.constant(STD), (1, self.tokens, width))
            tokens = jnp.broadcast_to(tokens.astype(x.dtype), (batch, self.tokens, width))
            x = jnp.concatenate([tokens, x], 1)
        block, outputs = nn.remat(Block) if self.remat else Block, []
        for i in range(self.size.depth):
            survival = layers.survival_probability(
                i + 1, self.size.depth, self.survival, self.schedule
            )
            x = block(self.size.heads, survival, name=f"block{i}")(x)
            if (i + 1) % (self.size.depth // 4) == 0:
                outputs.append(x)
        outputs[-1] = layer_norm(x, "norm")
        return tuple(x[:, self.tokens :].reshape(batch, *grid, width) for x in outputs)

    def _positions(self, grid: tuple[int, int]) -> jax.Array:
        """`[1,h,w,width]`."""
        if self.is_initializing():
            shape = (*grid, self.size.width)
            return self.param("positions", nn.initializers.constant(STD), shape)[None]
        # Not `param`, which insists on the shape that this image would give it.
        return resize_positions(self.get_variable("params", "positions"), grid)[None]


class PatchEmbedding(nn.Module):
    """A linear map of patches that do not overlap."""

    width: int
    patch: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B,H,W,I]` -> `[B, ceil(H/patch), ceil(W/patch), width]`."""
        p, (batch, *sides, channels) = self.patch, x.shape
        height, width = (-(-side // p) for side in sides)
        if sides != [height * p, width * p]:
            x = layers.resize_bilinear(x, (height * p, width * p), align_corners=False)
        shape = (p, p, channels, self.width)
        kernel = self.param("kernel", nn.initializers.constant(STD), shape).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.width,)).astype(x.dtype)
        patches = x.reshape(batch, height, p, width, p, channels)
        return jnp.einsum("bhiwjc,ijcd->bhwd", patches, kernel) + bias


class Block(nn.Module):
    """Self-attention and a perceptron with four times as many channels, each a residual branch.

    With a key, a branch is kept per image, and divided by `survival`. The softmax of attention is
    float32 whatever the dtype.
    """

    heads: int
    survival: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Keeps shape `[B,N,D]` and dtype."""
        batch, count, width = x.shape
        dense = functools.partial(
            nn.Dense, dtype=x.dtype, kernel_init=nn.initializers.constant(STD)
        )
        keep = layers.Dropout(1 - self.survival, shared=(1, 2))
        y = dense(3 * width, name="qkv")(layer_norm(x, "norm1"))
        query, key, value = jnp.moveaxis(y.reshape(batch, count, 3, self.heads, -1), 2, 0)
        y = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
        x = x + keep(dense(width, name="proj")(y))
        y = dense(4 * width, name="fc1")(layer_norm(x, "norm2"))
        return x + keep(dense(width, name="fc2")(nn.gelu(y, approximate=False)))


def layer_norm(x: jax.Array, name: str) -> jax.Array:
    """Normalizes the channels at each place, inside a module's `__call__`."""
    return nn.LayerNorm(epsilon=1e-6, dtype=x.dtype, use_fast_variance=False, name=name)(x)


def resize_positions(positions: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """A position embedding `[h,w,D]` for another grid, bilinearly, as mmseg does for SETR."""
    if positions.shape[:2] == grid:
        return positions
    return layers.resize_bilinear(positions[None], grid, align_corners=False)[0]
