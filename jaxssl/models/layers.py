"""Convolution, batch normalization and resizing as PyTorch defines them, for NHWC arrays.

Every layer computes in the dtype of its input; parameters and statistics keep their own.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Form: TypeAlias = Literal["plain", "shifted", "matmul"]

NormDef: TypeAlias = Callable[..., nn.Module]
"""Makes a normalization layer: `BatchNorm` with its mode bound."""


def convolution(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    form: Form | None = None,
) -> jax.Array:
    """Convolves with symmetric zero padding of `dilation * (size // 2)`, as PyTorch networks do.

    Args:
      x: `[B,H,W,I]`.
      kernel: `[kh,kw,I/groups,O]`, kh and kw odd, of the same dtype.
      stride: of the output.
      dilation: distance of the kernel's taps.
      groups: 1, or I for a depthwise convolution.
      form: how to compute it: "plain" is XLA's convolution; "shifted" (depthwise only) adds up
        shifted, multiplied copies of the input; "matmul" (one group only) adds up a matrix
        product per tap. None takes the one that is fastest here.

    Returns:
      `[B, ceil(H/stride), ceil(W/stride), O]`, of x's dtype.
    """
    form = form or fastest_form(kernel.shape, dilation=dilation, groups=groups)
    if form == "plain":
        return _plain(x, kernel, stride, dilation, groups)
    if form == "shifted" and (kernel.shape[2] != 1 or groups != kernel.shape[3]):
        raise ValueError("The shifted form is for depthwise convolutions.")
    if form == "matmul" and groups != 1:
        raise ValueError("The matmul form is for convolutions of one group.")
    wide = jnp.promote_types(x.dtype, jnp.float32)
    taps = _taps(x.astype(wide), kernel.astype(wide), stride, dilation)
    product = jnp.multiply if form == "shifted" else jnp.matmul
    return functools.reduce(jnp.add, (product(*tap) for tap in taps)).astype(x.dtype)


def fastest_form(shape: tuple[int, ...], *, dilation: int, groups: int) -> Form:
    """The form that is fastest on this backend for a kernel of `shape` `[kh,kw,I/groups,O]`.

    XLA's CPU convolutions are slow where they are depthwise, 1x1, or wide and far dilated: there
    the other forms take between a tenth and two thirds of the time, with the gradient.
    """
    height, width, inputs, outputs = shape
    if jax.default_backend() != "cpu":
        return "plain"
    if groups > 1:
        return "shifted" if inputs == 1 and groups == outputs else "plain"
    wide_and_dilated = dilation >= 4 and min(inputs, outputs) >= 256
    return "matmul" if wide_and_dilated or height * width == 1 else "plain"


def _plain(x: jax.Array, kernel: jax.Array, stride: int, dilation: int, groups: int) -> jax.Array:
    top, left = (dilation * (size // 2) for size in kernel.shape[:2])
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((top, top), (left, left)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _taps(
    x: jax.Array, kernel: jax.Array, stride: int, dilation: int
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Pairs of (what a tap of the kernel sees, the tap `[I/groups,O]`)."""
    batch, height, width, channels = x.shape
    top, left = (dilation * (size // 2) for size in kernel.shape[:2])
    padded = jnp.pad(x, ((0, 0), (top, top), (left, left), (0, 0)))
    for i, j in itertools.product(*map(range, kernel.shape[:2])):
        row, column = i * dilation, j * dilation
        if abs(row - top) >= height or abs(column - left) >= width:
            continue  # sees padding only
        begin = (0, row, column, 0)
        end = (batch, row + height, column + width, channels)
        yield jax.lax.slice(padded, begin, end, (1, stride, stride, 1)), kernel[i, j]


class Conv(nn.Module):
    """A convolution with parameters `kernel` and, where asked for, `bias`.

    The kernel's initial value is its standard deviation throughout: `network.LinenNetwork.init`
    multiplies it by normal numbers.

    Attributes:
      features: O, channels of the output.
      size: height and width of the kernel.
      stride: of the output.
      dilation: distance of the kernel's taps.
      groups: 1, or the number of input channels for a depthwise convolution.
      use_bias: adds a bias, initially 0.
      std: standard deviation of the initial kernel; None: `sqrt(2 / (size^2 O))` (He et al.,
        Delving deep into rectifiers, ICCV 2015, eq. 14).
    """

    features: int
    size: int = 3
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    use_bias: bool = False
    std: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B,H,W,I]` -> `[B, ceil(H/stride), ceil(W/stride), features]`."""
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
        std = math.sqrt(2 / (self.size**2 * self.features)) if self.std is None else self.std
        kernel = self.param("kernel", nn.initializers.constant(std), shape)
        y = convolution(
            x,
            kernel.astype(x.dtype),
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
        )
        if not self.use_bias:
            return y
        return y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)


class BatchNorm(nn.Module):
    """Batch normalization with statistics and arithmetic in at least float32.

    Attributes:
      batch_stats: normalizes with the batch's statistics and updates the running ones.
      momentum: share of the batch in the new running statistics, as in PyTorch.
      axis_name: of a `jax.pmap` over whose devices statistics are taken.
      scale_init: initializes gamma.
    """

    batch_stats: bool
    momentum: float = 0.1
    axis_name: str | None = None
    scale_init: Callable[..., Any] = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes `[...,C]` over all axes but the last."""
        norm = nn.BatchNorm(
            use_running_average=not self.batch_stats,
            momentum=1 - self.momentum,
            epsilon=1e-5,
            dtype=x.dtype,
            axis_name=self.axis_name,
            use_fast_variance=False,
            scale_init=self.scale_init,
        )
        nn.share_scope(self, norm)
        return norm(x)


class Dropout(nn.Module):
    """Inverted dropout of whole channels, or of whole images; acts where the network has a key.

    Attributes:
      rate: probability of a zero.
      shared: axes along which the same is dropped.
    """

    rate: float
    shared: tuple[int, ...] = (1, 2)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Keeps shape and dtype."""
        drop = nn.Dropout(self.rate, broadcast_dims=self.shared)
        return drop(x, deterministic=not self.has_rng("dropout"))


class ConvBNReLU(nn.Module):
    """Convolution, batch normalization, ReLU."""

    features: int
    norm: NormDef
    size: int = 3
    stride: int = 1
    dilation: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B,H,W,I]` -> `[B, ceil(H/stride), ceil(W/stride), features]`."""
        conv = Conv(self.features, self.size, self.stride, self.dilation, self.groups, name="conv")
        return nn.relu(self.norm(name="bn")(conv(x)))


class SeparableConv(nn.Module):
    """A depthwise 3x3 and a pointwise convolution, each with batch normalization and ReLU."""

    features: int
    norm: NormDef
    dilation: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B,H,W,I]` -> `[B,H,W,features]`."""
        channels = x.shape[-1]
        x = ConvBNReLU(
            channels, self.norm, dilation=self.dilation, groups=channels, name="depthwise"
        )(x)
        return ConvBNReLU(self.features, self.norm, size=1, name="pointwise")(x)


def classify(x: jax.Array, num_classes: int, dropout: float) -> tuple[jax.Array, jax.Array]:
    """Ends a head, inside its `__call__`: dropout, then the 1x1 convolution `classifier`.

    Returns:
      Logits `[B,h,w,C]` and the features that were multiplied, both at least float32.
    """
    features = Dropout(dropout)(x).astype(jnp.promote_types(x.dtype, jnp.float32))
    conv = Conv(num_classes, 1, use_bias=True, std=0.01, name="classifier")
    return conv(features), features


def max_pool(x: jax.Array) -> jax.Array:
    """Maximum over 3x3 windows with stride 2: `[B,H,W,C]` -> `[B, ceil(H/2), ceil(W/2), C]`."""
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


def resize_bilinear(x: jax.Array, size: tuple[int, ...], *, align_corners: bool) -> jax.Array:
    """Resizes `[B,h,w,C]` to `[B,*size,C]` bilinearly, without antialiasing.

    Equals PyTorch's `interpolate(mode="bilinear")`. Computed in at least float32.

    Args:
      x: what to resize.
      size: height and width of the result.
      align_corners: True: the centers of the corner pixels stay where they are; False: the
        outer edges of the image do.
    """
    if x.shape[1:3] == tuple(size):
        return x
    wide = jnp.promote_types(x.dtype, jnp.float32)
    rows, columns = (
        _interpolation(old, new, align_corners, wide)
        for old, new in zip(x.shape[1:3], size, strict=True)
    )
    # TensorFloat-32 products would be visible in the logits.
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    y = einsum("Yy,byxc->bYxc", rows, x.astype(wide))
    return einsum("Xx,byxc->byXc", columns, y).astype(x.dtype)


def _interpolation(old: int, new: int, align_corners: bool, dtype: Any) -> jax.Array:
    """`[new,old]`: row i holds the weights of the old pixels in new pixel i."""
    i = np.arange(new)
    if align_corners:
        position = i * ((old - 1) / max(new - 1, 1))
    else:
        position = np.clip((i + 0.5) * (old / new) - 0.5, 0, old - 1)
    low = np.minimum(position.astype(int), old - 1)
    high, weight = np.minimum(low + 1, old - 1), jnp.asarray(position - low, dtype)[:, None]
    pixel = jnp.arange(old)
    return (pixel == low[:, None]) * (1 - weight) + (pixel == high[:, None]) * weight
