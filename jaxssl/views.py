"""Photometric change of images on the device.

Images are RGB in [0,255], of any dtype. All functions compute and return float32 (float64 with
`jax_enable_x64`), so that every precision sees one change; they may be jitted and vmapped.

Functions without a key take `[...,H,W,3]` and one amount for all images. They follow Pillow's
`ImageOps` and `ImageEnhance` without the rounding of results to integers.

Functions with a key take a batch `[B,H,W,3]` and draw for each image anew; what they make of one
image does not depend on the others, so a batch may be split over devices.

`valid` bool `[...,H,W]`, where a function takes it, is False in padding. Then an image's pixels
become what they would be without its padding; what becomes of the padding is not specified.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np


def brightness(image: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Multiply by `factor`; 0 gives black (`ImageEnhance.Brightness`)."""
    return _clip(factor * _as_float(image))


def contrast(
    image: jax.Array, factor: jax.Array | float, *, valid: jax.Array | None = None
) -> jax.Array:
    """Blend with the mean of each image's gray values; 0 gives that (`ImageEnhance.Contrast`).

    Pillow rounds gray values and their mean, this does not.
    """
    image = _as_float(image)
    seen = _seen(image, valid)
    total = jnp.where(seen, _luma(image), 0).sum((-3, -2), keepdims=True)
    return _blend(image, total / jnp.maximum(seen.sum((-3, -2), keepdims=True), 1), factor)


def saturation(image: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Blend with the grayscale image; 0 gives that (`ImageEnhance.Color`)."""
    image = _as_float(image)
    return _blend(image, _luma(image), factor)


def sharpness(
    image: jax.Array, factor: jax.Array | float, *, valid: jax.Array | None = None
) -> jax.Array:
    """Blend with a smooth image; 0 gives that (`ImageEnhance.Sharpness`).

    In the smooth image a pixel counts five times and its eight neighbors once. Where not all of
    them are in the image, the pixel stays as it is.
    """
    image = _as_float(image)
    window = functools.partial(_convolve, kernel=jnp.ones(3, image.dtype), border="constant")
    inner = window(_seen(image, valid).astype(image.dtype)) == 9
    return _blend(image, jnp.where(inner, (window(image) + 4 * image) / 13, image), factor)


def hue(image: jax.Array, turns: jax.Array | float) -> jax.Array:
    """Turn the hue in the HSV color circle; 1 is all the way around.

    torchvision's `adjust_hue` on float images; Pillow's 8-bit HSV is too coarse to be compared.
    """
    image = _as_float(image)
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    # Not value == red: a compiler may round the two differently, and the hue would jump.
    red_is_max, green_is_max = (red >= green) & (red >= blue), green >= blue
    start = jnp.where(red_is_max, 0, jnp.where(green_is_max, 2, 4))
    offset = jnp.where(red_is_max, green - blue, jnp.where(green_is_max, blue - red, red - green))
    sixths = 6 * turns + start + offset / jnp.where(chroma > 0, chroma, 1)
    k = sixths[..., None] + np.array([5, 3, 1], image.dtype)
    # The operator % would become a call of fmod for each pixel on the CPU: four times slower.
    k -= 6 * jnp.floor(k / 6)
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def grayscale(image: jax.Array) -> jax.Array:
    """ITU-R 601 luma in all three channels (`ImageOps.grayscale`)."""
    return jnp.broadcast_to(_luma(_as_float(image)), image.shape)


def solarize(image: jax.Array, threshold: jax.Array | float = 128) -> jax.Array:
    """Invert the values at and above `threshold` (`ImageOps.solarize`)."""
    image = _as_float(image)
    return jnp.where(image < threshold, image, 255 - image)


def posterize(image: jax.Array, bits: jax.Array | int) -> jax.Array:
    """Keep the highest `bits`, an integer from 0 to 8, of each value (`ImageOps.posterize`).

    Values are rounded to integers first.
    """
    lost = 8 - jnp.asarray(bits, jnp.int32)
    return ((_levels(image) >> lost) << lost).astype(float)


def autocontrast(image: jax.Array, *, valid: jax.Array | None = None) -> jax.Array:
    """Stretch each channel's values to [0,255] (`ImageOps.autocontrast` without a cutoff).

    A channel of one value stays as it is.
    """
    image = _as_float(image)
    seen = _seen(image, valid)
    low = jnp.where(seen, image, 255).min((-3, -2), keepdims=True)
    span = jnp.where(seen, image, 0).max((-3, -2), keepdims=True) - low
    stretched = _clip((image - low) * (255 / jnp.where(span > 0, span, 1)))
    return jnp.where(span > 0, stretched, image)


def equalize(image: jax.Array, *, valid: jax.Array | None = None) -> jax.Array:
    """Flatten each channel's histogram over the integers 0 to 255 (`ImageOps.equalize`).

    Values are rounded to integers first.
    """
    change = jnp.vectorize(_equalize, signature="(h,w,c),(h,w,k)->(h,w,c)")
    return change(_levels(image), _seen(image, valid)).astype(float)


def color_jitter(
    key: jax.Array,
    image: jax.Array,
    *,
    valid: jax.Array | None = None,
    brightness: float = 0.5,
    contrast: float = 0.5,
    saturation: float = 0.5,
    hue: float = 0.25,
) -> jax.Array:
    """Adjust brightness, contrast, saturation and hue (torchvision's `ColorJitter`).

    The order of the four is drawn for each image, too.

    Args:
      key: randomness.
      image: `[B,H,W,3]` in [0,255].
      valid: bool `[B,H,W]`, False in padding; None where there is none.
      brightness: the factor is uniform in [max(0, 1 - brightness), 1 + brightness].
      contrast: likewise.
      saturation: likewise.
      hue: the turn is uniform in [-hue, hue].

    Returns:
      float32 `[B,H,W,3]` in [0,255] (float64 with `jax_enable_x64`).
    """
    spread = (brightness, contrast, saturation, hue)
    return _per_image_branching(functools.partial(_jitter, spread=spread), key, image, valid)


def gaussian_blur(
    key: jax.Array,
    image: jax.Array,
    *,
    valid: jax.Array | None = None,
    kernel: tuple[int, int] = (3, 7),
    sigma: tuple[float, float] = (0.1, 2.0),
) -> jax.Array:
    """Blur with a Gaussian kernel; images are mirrored at the middle of their border pixels.

    Where the kernel reaches into padding, the pixels inside the image share its weight: the one
    place where `valid` does not give what the image would be without its padding, but is close.

    Args:
      key: randomness.
      image: `[B,H,W,3]` in [0,255].
      valid: bool `[B,H,W]`, False in padding; None where there is none.
      kernel: smallest and largest size, odd; all odd sizes from one to the other are as likely.
      sigma: range of the standard deviation in pixels, uniform.

    Returns:
      float32 `[B,H,W,3]` in [0,255] (float64 with `jax_enable_x64`).
    """
    return _per_image(functools.partial(_blur, size=kernel, sigma=sigma), key, image, valid)


def strong(
    key: jax.Array,
    image: jax.Array,
    *,
    valid: jax.Array | None = None,
    weights: Sequence[float] = (3, 5, 1, 1, 5),
) -> jax.Array:
    """Change each image by one operation drawn at random: the strong view of MKD.

    Args:
      key: randomness.
      image: `[B,H,W,3]` in [0,255].
      valid: bool `[B,H,W]`, False in padding; None where there is none.
      weights: relative frequencies of color jitter, Gaussian blur, equalize, solarize, grayscale.

    Returns:
      float32 `[B,H,W,3]` in [0,255] (float64 with `jax_enable_x64`).
    """
    choice_key, key = jax.random.split(key)
    choice = choose(choice_key, image.shape[0], weights)
    return _per_image_branching(_strong, key, image, valid, choice)


def rand_augment(
    key: jax.Array,
    image: jax.Array,
    *,
    valid: jax.Array | None = None,
    operations: int = 2,
) -> jax.Array:
    """Change each image by operations drawn at random, one after another: the students' views of
    RML.

    The photometric ones of RandAugment (Cubuk et al., arXiv:1909.13719), each as likely and with
    replacement: brightness, contrast, saturation, sharpness, autocontrast, equalize, posterize,
    solarize. Instead of one strength for all, each time a strength is drawn from what RandAugment's
    levels span: factors from U(.1, 1.9), the threshold of solarize from U(0, 256), and 4 to 8 bits
    for posterize, as torchvision has it, because the original's 0 to 4 leave next to nothing.

    Args:
      key: randomness.
      image: `[B,H,W,3]` in [0,255].
      valid: bool `[B,H,W]`, False in padding; None where there is none.
      operations: how many for each image.

    Returns:
      float32 `[B,H,W,3]` in [0,255] (float64 with `jax_enable_x64`).
    """
    change = functools.partial(_rand_augment, operations=operations)
    return _per_image_branching(change, key, image, valid)


def choose(key: jax.Array, batch: int, weights: Sequence[float]) -> jax.Array:
    """Draw from 0, 1, ... with probabilities proportional to `weights`; int32 `[batch]`."""
    share = np.array(weights, np.float32) / np.float32(sum(weights))
    return jax.random.choice(key, len(weights), (batch,), p=share).astype(jnp.int32)


def photometric_distortion(key: jax.Array, image: jax.Array) -> jax.Array:
    """Change brightness, contrast, saturation and hue, each with probability 1/2.

    mmsegmentation's `PhotoMetricDistortion` without its rounding between the steps. In order: add
    U(-32, 32) to all values; multiply them by U(.5, 1.5), either now or last with equal chance;
    multiply the saturation of HSV by U(.5, 1.5), up to 1; turn the hue by U(-.1, .1), which is 18
    of OpenCV's 180 steps around the circle.

    Args:
      key: randomness.
      image: `[B,H,W,3]` in [0,255].

    Returns:
      float32 `[B,H,W,3]` in [0,255] (float64 with `jax_enable_x64`).
    """
    low = np.array([-32, 0.5, 0.5, -0.1], np.float32)
    high = np.array([32, 1.5, 1.5, 0.1], np.float32)
    neutral = np.array([0, 1, 1, 0], np.float32)

    def distort(key: jax.Array, image: jax.Array) -> jax.Array:
        image = _as_float(image)
        coin_key, amount_key = jax.random.split(key)
        coins = jax.random.uniform(coin_key, (5,), jnp.float32) < 0.5
        amounts = jax.random.uniform(amount_key, (4,), jnp.float32, low, high)
        return _distort(image, jnp.where(coins[:4], amounts, neutral), coins[4])

    return _per_image(distort, key, image)


def _per_image(
    change: Callable[..., jax.Array], key: jax.Array, image: jax.Array, *more: jax.Array | None
) -> jax.Array:
    """`change(key, image, ...)` of each image of a batch, with a key of its own."""
    keys = jax.random.split(key, image.shape[0])
    return jax.vmap(change)(keys, image, *more)


def _per_image_branching(
    change: Callable[..., jax.Array], key: jax.Array, image: jax.Array, *more: jax.Array | None
) -> jax.Array:
    """`_per_image` for a change that draws one of several branches.

    Together, images take all branches and choose; one by one, each takes its own. On a CPU that is
    several times faster; elsewhere images stay together, and split over devices.
    """
    keys = jax.random.split(key, image.shape[0])
    return jax.lax.platform_dependent(
        keys,
        image,
        *more,
        cpu=lambda *rows: jax.lax.map(lambda row: change(*row), rows),
        default=jax.vmap(change),
    )


def _jitter(
    key: jax.Array,
    image: jax.Array,
    valid: jax.Array | None,
    *,
    spread: tuple[float, float, float, float] = (0.5, 0.5, 0.5, 0.25),
) -> jax.Array:
    order_key, amount_key = jax.random.split(key)
    width = np.array(spread, np.float32)
    low = np.append(np.maximum(0, 1 - width[:3]), -width[3])
    high = np.append(1 + width[:3], width[3])
    amounts = jax.random.uniform(amount_key, (4,), jnp.float32, low, high)
    order = jax.random.permutation(order_key, 4)
    adjustments = (brightness, functools.partial(contrast, valid=valid), saturation, hue)

    def adjust(k: jax.Array, image: jax.Array) -> jax.Array:
        return jax.lax.switch(order[k], adjustments, image, amounts[order[k]])

    # Unrolled, the compiler would fuse the four and compute early ones again and again.
    return jax.lax.fori_loop(0, 4, adjust, _as_float(image))


def _blur(
    key: jax.Array,
    image: jax.Array,
    valid: jax.Array | None,
    *,
    size: tuple[int, int] = (3, 7),
    sigma: tuple[float, float] = (0.1, 2.0),
) -> jax.Array:
    radius_key, sigma_key = jax.random.split(key)
    smallest, largest = size
    radius = jax.random.randint(radius_key, (), smallest // 2, largest // 2 + 1, jnp.int32)
    deviation = jax.random.uniform(sigma_key, (), jnp.float32, *sigma)
    image = _as_float(image)
    kernel = _gaussian_kernel(radius, deviation.astype(image.dtype), largest)
    if valid is None:
        return _clip(_convolve(image, kernel, "reflect"))
    seen = valid[..., None].astype(image.dtype)
    blurred = _convolve(seen * image, kernel, "reflect")
    share = _convolve(seen, kernel, "reflect")
    return _clip(jnp.where(share > 0, blurred / share, image))


def _strong(
    key: jax.Array, image: jax.Array, valid: jax.Array | None, choice: jax.Array
) -> jax.Array:
    operations = (
        lambda: _jitter(key, image, valid),
        lambda: _blur(key, image, valid),
        lambda: equalize(image, valid=valid),
        lambda: solarize(image),
        lambda: grayscale(image),
    )
    return jax.lax.switch(choice, operations)


def _rand_augment(
    key: jax.Array, image: jax.Array, valid: jax.Array | None, *, operations: int
) -> jax.Array:
    branches = (
        lambda strength, image: brightness(image, 0.1 + 1.8 * strength),
        lambda strength, image: contrast(image, 0.1 + 1.8 * strength, valid=valid),
        lambda strength, image: saturation(image, 0.1 + 1.8 * strength),
        lambda strength, image: sharpness(image, 0.1 + 1.8 * strength, valid=valid),
        lambda _, image: autocontrast(image, valid=valid),
        lambda _, image: equalize(image, valid=valid),
        lambda strength, image: posterize(image, 4 + (5 * strength).astype(jnp.int32)),
        lambda strength, image: solarize(image, 256 * strength),
    )
    choice_key, strength_key = jax.random.split(key)
    choices = jax.random.randint(choice_key, (operations,), 0, len(branches), jnp.int32)
    strengths = jax.random.uniform(strength_key, (operations,), jnp.float32)

    def change(k: jax.Array, image: jax.Array) -> jax.Array:
        return jax.lax.switch(choices[k], branches, strengths[k], image)

    # A loop, not one switch after another: half the program to compile.
    return jax.lax.fori_loop(0, operations, change, _as_float(image))


def _as_float(image: jax.Array) -> jax.Array:
    return jnp.asarray(image, float)


def _levels(image: jax.Array) -> jax.Array:
    return _clip(_as_float(image)).round().astype(jnp.int32)


def _seen(image: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Which pixels count, bool `[...,H,W,1]`."""
    return jnp.ones((*image.shape[-3:-1], 1), bool) if valid is None else valid[..., None]


def _clip(image: jax.Array) -> jax.Array:
    return jnp.clip(image, 0, 255)


def _luma(image: jax.Array) -> jax.Array:
    """ITU-R 601 luma `[...,H,W,1]`."""
    red, green, blue = image[..., :1], image[..., 1:2], image[..., 2:]
    return _clip(0.299 * red + 0.587 * green + 0.114 * blue)


def _blend(image: jax.Array, other: jax.Array, factor: jax.Array | float) -> jax.Array:
    return _clip(factor * image + (1 - factor) * other)


def _equalize(levels: jax.Array, seen: jax.Array) -> jax.Array:
    """int32 `[H,W,3]` in 0 to 255, bool `[H,W,1]` -> `[H,W,3]`."""
    index = levels + 256 * jnp.arange(3)
    counts = jnp.zeros(3 * 256, jnp.uint32).at[index].add(seen.astype(jnp.uint32))
    table = jax.vmap(_equalizing_table)(counts.reshape(3, 256)).reshape(-1)
    return table.at[index].get(mode="promise_in_bounds")


def _equalizing_table(counts: jax.Array) -> jax.Array:
    """The new value of each of the 256 levels, given how many pixels have it."""
    below = jnp.cumsum(counts) - counts
    step = jnp.where(counts > 0, below, 0).max() // 255
    equal = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, equal, jnp.arange(256, dtype=equal.dtype))


def _gaussian_kernel(radius: jax.Array, sigma: jax.Array, taps: int) -> jax.Array:
    """exp(-x^2 / 2 sigma^2) where |x| <= radius, else 0; sums to 1; `[taps]`."""
    x = jnp.arange(taps) - taps // 2
    weight = jnp.where(abs(x) <= radius, jnp.exp(-((x / sigma) ** 2) / 2), 0)
    return weight / weight.sum()


def _convolve(image: jax.Array, kernel: jax.Array, border: str) -> jax.Array:
    """Convolve `[...,H,W,D]` with a symmetric kernel `[taps]` along H, then W.

    `border` is a mode of `jnp.pad`.
    """
    radius = kernel.size // 2
    for axis in (image.ndim - 3, image.ndim - 2):
        margins = [(radius, radius) if a == axis else (0, 0) for a in range(image.ndim)]
        padded, size = jnp.pad(image, margins, mode=border), image.shape[axis]
        image = jnp.zeros_like(image)
        for i in range(kernel.size):
            image += kernel[i] * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
    return image


def _distort(image: jax.Array, amounts: jax.Array, contrast_first: jax.Array) -> jax.Array:
    shift, gain, saturation_gain, turns = amounts
    image = brightness(_clip(image + shift), jnp.where(contrast_first, gain, 1))
    image = hue(_multiply_saturation(image, saturation_gain), turns)
    return brightness(image, jnp.where(contrast_first, 1, gain))


def _multiply_saturation(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiply the saturation of HSV, which is at most 1 after it."""
    value = image.max(-1, keepdims=True)
    chroma = value - image.min(-1, keepdims=True)
    limit = value / jnp.where(chroma > 0, chroma, 1)
    return _clip(value - jnp.minimum(factor, limit) * (value - image))
