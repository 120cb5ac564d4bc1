"""Convolution, batch normalization and resizing as PyTorch defines them, for NHWC arrays.

Every layer computes in the dtype of its input; parameters and statistics keep their own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxssl.contracts import Outputs

Form: TypeAlias = Literal["plain", "shifted", "matmul"]

Padding: TypeAlias = Literal["symmetric", "same"]
"""Zeros around a convolution's input: as many on each side, as in PyTorch networks; or as few as
the taps reach and the odd one behind, as TensorFlow's "SAME". They differ where a stride is taken.
"""

Zeros: TypeAlias = tuple[tuple[int, int], ...]
"""Before and behind each of the two axes."""

NormDef: TypeAlias = Callable[..., nn.Module]
"""Makes a normalization layer: `BatchNorm` with its mode bound."""


def convolution(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    padding: Padding = "symmetric",
    form: Form | None = None,
) -> jax.Array:
    """Convolves with zero padding.

    Args:
      x: `[B,H,W,I]`.
      kernel: `[kh,kw,I/groups,O]`, kh and kw odd, of the same dtype.
      stride: of the output.
      dilation: distance of the kernel's taps.
      groups: 1, or I for a depthwise convolution.
      padding: "symmetric": `dilation * (size // 2)` zeros on each side; "same": TensorFlow's.
      form: how to compute it: "plain" is XLA's convolution; "shifted" (depthwise only) adds up
        shifted, multiplied copies of the input; "matmul" (one group only) adds up a matrix
        product per tap. None takes the one that is fastest here.

    Returns:
      `[B, ceil(H/stride), ceil(W/stride), O]`, of x's dtype.
    """
    form = form or fastest_form(kernel.shape, dilation=dilation, groups=groups)
    zeros = tuple(
        _zeros(length, size, stride, dilation, padding)
        for length, size in zip(x.shape[1:3], kernel.shape[:2], strict=True)
    )
    if form == "plain":
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            zeros,
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
    if form == "shifted" and (kernel.shape[2] != 1 or groups != kernel.shape[3]):
        raise ValueError("The shifted form is for depthwise convolutions.")
    if form == "matmul" and groups != 1:
        raise ValueError("The matmul form is for convolutions of one group.")
    wide = jnp.promote_types(x.dtype, jnp.float32)
    add_up = _depthwise if form == "shifted" else _matmul
    return add_up(x.astype(wide), kernel.astype(wide), stride, dilation, zeros).astype(x.dtype)


def fastest_form(shape: tuple[int, ...], *, dilation: int, groups: int) -> Form:
    """The form that is fastest on this backend for a kernel of `shape` `[kh,kw,I/groups,O]`.

    XLA's CPU convolutions are slow where they are depthwise, 1x1, or wide and far dilated: there
    the gradients of the other forms take about a thirtieth, three quarters and (from a dilation
    of 8; at 4 they are even) a quarter of the time (benchmarks/convolutions.py). Elsewhere XLA's
    own is taken, unmeasured; the gradient of grouped convolutions has been slow on GPUs
    (jax-ml/jax#13800).
    """
    height, width, inputs, outputs = shape
    if jax.default_backend() != "cpu":
        return "plain"
    if groups > 1:
        return "shifted" if inputs == 1 and groups == outputs else "plain"
    wide_and_dilated = dilation >= 4 and min(inputs, outputs) >= 256
    return "matmul" if wide_and_dilated or height * width == 1 else "plain"


def _zeros(length: int, size: int, stride: int, dilation: int, padding: Padding) -> tuple[int, int]:
    """Zeros before and behind an axis of `length` for a kernel of `size` taps."""
    if padding == "symmetric":
        return dilation * (size // 2), dilation * (size // 2)
    last = (-(-length // stride) - 1) * stride + (size - 1) * dilation
    total = max(last + 1 - length, 0)
    return total // 2, total - total // 2


def _matmul(x: jax.Array, kernel: jax.Array, stride: int, dilation: int, zeros: Zeros) -> jax.Array:
    taps = _taps(x, kernel.shape, stride, dilation, zeros)
    return functools.reduce(jnp.add, (seen @ kernel[at] for at, seen in taps))


def _shifted(
    x: jax.Array, kernel: jax.Array, stride: int, dilation: int, zeros: Zeros
) -> jax.Array:
    taps = _taps(x, kernel.shape, stride, dilation, zeros)
    return functools.reduce(jnp.add, (seen * kernel[at] for at, seen in taps))


def _shifted_forward(
    x: jax.Array, kernel: jax.Array, *settings: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _shifted(x, kernel, *settings), (x, kernel)


def _shifted_backward(
    stride: int,
    dilation: int,
    zeros: Zeros,
    saved: tuple[jax.Array, jax.Array],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The gradient in x is a convolution too: of the gradient, spread by the stride, with the
    kernel turned around. Left to itself, JAX adds up a padded copy per tap.
    """
    x, kernel = saved
    batch, *counts, channels = gradient.shape
    apart = (0, 0, stride - 1)
    spread = jax.lax.pad(gradient, jnp.zeros((), x.dtype), ((0, 0, 0), apart, apart, (0, 0, 0)))
    behind = tuple(
        ((size - 1) * dilation - before, before + length - 1 - (count - 1) * stride)
        for size, (before, _), length, count in zip(
            kernel.shape[:2], zeros, x.shape[1:3], counts, strict=True
        )
    )
    in_x = _shifted(spread, kernel[::-1, ::-1], 1, dilation, behind)

    padded = jnp.pad(x, ((0, 0), *zeros, (0, 0)))
    height, width = ((count - 1) * stride + 1 for count in counts)

    def in_tap(begin: jax.Array) -> jax.Array:
        seen = jax.lax.dynamic_slice(padded, list(begin), (batch, height, width, channels))
        return (seen[:, ::stride, ::stride] * gradient).sum((0, 1, 2))

    # A loop, because unrolled sums take half of the time to compile a network.
    begins = [(0, i * dilation, j * dilation, 0) for i, j in np.ndindex(kernel.shape[:2])]
    return in_x, jax.lax.map(in_tap, jnp.asarray(begins, jnp.int32)).reshape(kernel.shape)


_differentiable = jax.custom_vjp(_shifted, nondiff_argnums=(2, 3, 4))
_differentiable.defvjp(_shifted_forward, _shifted_backward)
_depthwise: Callable[..., jax.Array] = _differentiable


def _taps(
    x: jax.Array, shape: tuple[int, ...], stride: int, dilation: int, zeros: Zeros
) -> Iterator[tuple[tuple[int, int], jax.Array]]:
    """Pairs of (a tap of a kernel of `shape`, what it sees of x)."""
    batch, height, width, channels = x.shape
    (top, _), (left, _) = zeros
    padded = jnp.pad(x, ((0, 0), *zeros, (0, 0)))
    # How far a tap moves from the first output to the last.
    down, across = (
        (length - (size - 1) * dilation - 1) // stride * stride
        for length, size in zip(padded.shape[1:3], shape[:2], strict=True)
    )
    for i, j in np.ndindex(shape[:2]):
        row, column = i * dilation, j * dilation
        if not (-down <= row - top < height and -across <= column - left < width):
            continue  # sees padding only
        begin = (0, row, column, 0)
        end = (batch, row + down + 1, column + across + 1, channels)
        yield (i, j), jax.lax.slice(padded, begin, end, (1, stride, stride, 1))


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
      padding: as in `convolution`.
      std: standard deviation of the initial kernel; None: `sqrt(2 / (size^2 O))` (He et al.,
        Delving deep into rectifiers, ICCV 2015, eq. 14).
    """

    features: int
    size: int = 3
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    use_bias: bool = False
    padding: Padding = "symmetric"
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
            padding=self.padding,
        )
        if not self.use_bias:
            return y
        return y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)


class BatchNorm(nn.Module):
    """Batch normalization with statistics and arithmetic in at least float32.

    A channel that has one value in the whole batch, as behind the mean over a lone image, is
    normalized with the running statistics, which stay. By its own it would be 0, and the running
    variance would go there: PyTorch refuses such a batch.

    Attributes:
      batch_stats: normalizes with the batch's statistics and updates the running ones.
      momentum: share of the batch in the new running statistics, as in PyTorch.
      epsilon: added to the variance.
      axis_name: of a `jax.pmap` over whose devices statistics are taken.
      scale_init: initializes gamma.
    """

    batch_stats: bool
    momentum: float = 0.1
    epsilon: float = 1e-5
    axis_name: str | None = None
    scale_init: Callable[..., Any] = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes `[...,C]` over all axes but the last."""
        alone = self.axis_name is None and x.size == x.shape[-1]
        norm = nn.BatchNorm(
            use_running_average=alone or not self.batch_stats,
            momentum=1 - self.momentum,
            epsilon=self.epsilon,
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


def survival_probability(block: int, blocks: int, least: float, schedule: str) -> float:
    """How probable it is that a residual branch is kept (stochastic depth).

    Args:
      block: which one from the input on, 1 the first.
      blocks: how many there are.
      least: the probability of the last block.
      schedule: "constant", or "linear" from 1 at the input to `least` at the last block (Huang et
        al., Deep networks with stochastic depth, ECCV 2016, eq. 4).
    """
    share = block / blocks if schedule == "linear" else 1.0
    return 1 - share * (1 - least)


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


def classify(x: jax.Array, num_classes: int, dropout: float, std: float = 0.01) -> Outputs:
    """Ends a head, inside its `__call__`: dropout, then the 1x1 convolution `classifier`.

    Args:
      x: `[B,h,w,D]`.
      num_classes: C.
      dropout: probability that a channel is dropped.
      std: standard deviation of the initial kernel.

    Returns:
      Logits `[B,h,w,C]` and the features that were multiplied, both at least float32.
    """
    features = Dropout(dropout)(x).astype(jnp.promote_types(x.dtype, jnp.float32))
    conv = Conv(num_classes, 1, use_bias=True, std=std, name="classifier")
    return Outputs(conv(features), features)


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
    return _weighted(x, rows, columns)


def adaptive_average_pool(x: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Means over `size` windows that cover `[B,h,w,C]`: `[B,*size,C]`.

    Equals PyTorch's `adaptive_avg_pool2d`: of n windows along an axis of length h, window i begins
    at floor(i h / n) and ends before ceil((i + 1) h / n), so that neighbors may overlap. Computed
    in at least float32.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    rows, columns = (
        jnp.asarray(_windows(old, new), wide) for old, new in zip(x.shape[1:3], size, strict=True)
    )
    return _weighted(x, rows, columns)


def _weighted(x: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Weighted sums of `[B,h,w,C]` along two axes, by weights `[H,h]` and `[W,w]`: `[B,H,W,C]`."""
    # TensorFloat-32 products would be visible in the logits.
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    y = einsum("Yy,byxc->bYxc", rows, x.astype(rows.dtype))
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


def _windows(old: int, new: int) -> np.ndarray:
    """`[new,old]`: row i holds the weights of the old pixels in the mean of window i."""
    i, pixel = np.arange(new)[:, None], np.arange(old)
    inside = (i * old // new <= pixel) & (pixel < -((i + 1) * -old // new))
    return inside / inside.sum(1, keepdims=True)
