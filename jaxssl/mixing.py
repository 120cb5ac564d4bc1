"""CutMix: each image of a batch takes parts of the next one. CutOut: it loses a part. mixup: all of
it becomes a mean with another one.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def box_mask(
    key: jax.Array,
    batch: int,
    size: tuple[int, ...],
    *,
    boxes: int = 3,
    area: tuple[float, float] = (0.25, 0.5),
) -> jax.Array:
    """Draw CutMix masks of boxes (French et al., arXiv:1906.01916).

    Several boxes are those of CPS and MKD. One of exactly half of the image (`boxes=1,
    area=(.5,.5)`) is that of U2PL and RML; U2PL's released code draws its width uniformly.

    With p from U(area) and u from U(0,1), a box is H p^u / sqrt(boxes) high and W p^(1-u) /
    sqrt(boxes) wide: its share of the image is p / boxes and its aspect log-uniform. The width is
    rounded, then the height is what gives the share best, so the box is at most half a row of its
    own too large or too small. Its place is uniform inside the image. Where boxes overlap they
    toggle, so with the defaults a mask is True on .250 of the image on average, with a standard
    deviation of .070.

    Args:
      key: randomness.
      batch: B.
      size: (H, W).
      boxes: boxes per mask.
      area: range of the boxes' summed area as a share of the image, within (0,1].

    Returns:
      bool `[B,H,W]`, True inside an odd number of boxes.
    """
    H, W = size
    area_key, aspect_key, place_key = jax.random.split(key, 3)
    p = jax.random.uniform(area_key, (batch, boxes), jnp.float32, *area)
    u = jax.random.uniform(aspect_key, (batch, boxes), jnp.float32)
    top, left = jax.random.uniform(place_key, (2, batch, boxes), jnp.float32)
    pixels = p / boxes * (H * W)
    # Not less than pixels / H, or the height would have to exceed H.
    width = jnp.maximum(jnp.round(W * p ** (1 - u) / boxes**0.5), jnp.ceil(pixels / H))
    rows = _interval(jnp.round(pixels / width), top, H)
    columns = _interval(width, left, W)
    inside = rows[:, :, :, None] & columns[:, :, None, :]
    return inside.sum(1) % 2 == 1


def cutout_mask(
    key: jax.Array, batch: int, size: tuple[int, ...], *, side: float = 0.5
) -> jax.Array:
    """Draw CutOut masks (DeVries & Taylor, arXiv:1708.04552): a square around a random pixel.

    What of the square is beyond the image's border is lost.

    Args:
      key: randomness.
      batch: B.
      size: (H, W).
      side: of the square, as a share of the image's shorter side; in pixels it becomes even.

    Returns:
      bool `[B,H,W]`, True inside the square.
    """
    reach = round(side * min(size) / 2)
    rows, columns = (
        jnp.abs(jnp.arange(n) + 0.5 - jax.random.randint(axis_key, (batch, 1), 0, n)) < reach
        for axis_key, n in zip(jax.random.split(key), size, strict=True)
    )
    return rows[:, :, None] & columns[:, None, :]


def mix(mask: jax.Array, x: jax.Array, *, partner: jax.Array | None = None) -> jax.Array:
    """Keep `x` where the mask is True and take the partner elsewhere.

    Args:
      mask: bool `[B,H,W]`.
      x: labels `[B,H,W]`, or images, logits, features `[B,H,W,D]`.
      partner: as `x`; by default the next image of the batch, for the last the first (so a batch of
        one meets itself).

    Returns:
      Shape and dtype of `x`.
    """
    partner = jnp.roll(x, -1, axis=0) if partner is None else partner
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, partner)


class Mixup(NamedTuple):
    """How images of a batch are paired, and how much each keeps of its own.

    Attributes:
      share: lambda, a scalar in [.5,1].
      partner: int32 `[B]`, a permutation of the batch.
    """

    share: jax.Array
    partner: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """The mean of each `x` and its partner's, float32 `[B,...]`."""
        return self.share * x + (1 - self.share) * x[self.partner]


def mixup(key: jax.Array, batch: int, *, alpha: float = 0.75) -> Mixup:
    """Draw how to mix a batch (Zhang et al., arXiv:1710.09412): one lambda, as DMT's released code.

    lambda = max(l, 1 - l), l ~ Beta(alpha, alpha), so that an image is rather itself than its
    partner (MixMatch).

    Args:
      key: randomness.
      batch: B.
      alpha: from 0, where every image stays itself, to infinity, where all are halves.
    """
    share_key, partner_key = jax.random.split(key)
    share = jax.random.beta(share_key, alpha, alpha) if alpha else jnp.ones(())
    return Mixup(jnp.maximum(share, 1 - share), jax.random.permutation(partner_key, batch))


def resize_nearest(mask: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Resize a mask or labels `[B,H,W]` to `[B,*size]` by nearest neighbor.

    Row i takes row floor(i * H / size[0]), columns likewise: PyTorch's `interpolate` with mode
    "nearest", in exact arithmetic.
    """
    rows = np.arange(size[0]) * mask.shape[1] // size[0]
    columns = np.arange(size[1]) * mask.shape[2] // size[1]
    return mask[:, rows][:, :, columns]


def _interval(length: jax.Array, place: jax.Array, size: int) -> jax.Array:
    """Mark `length` of `size` positions, from first to last as `place` goes from 0 to 1.

    float `[B,boxes]` each -> bool `[B,boxes,size]`.
    """
    start = jnp.round(place * (size - length))
    position = jnp.arange(size)[None, None]
    return (position >= start[..., None]) & (position < (start + length)[..., None])
