"""Photometric change of images on the device.

Images are RGB in [0,255]. Random functions take a batch `[B,H,W,3]` and draw for each image anew;
what they make of one image does not depend on the others, so a batch may be split over devices.
They draw in float32 whatever the precision of the images, so that all precisions see one change.
Functions without a key take `[...,H,W,3]` in floating point and one amount for all images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np


def brightness(image: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Multiply by `factor`; 0 gives black (torchvision's `adjust_brightness`)."""
    return _clip(factor * image)


def contrast(image: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Blend with the mean of each image's gray values; 0 gives that (`adjust_contrast`)."""
    return _blend(image, grayscale(image).mean((-3, -2, -1), keepdims=True), factor)


def saturation(image: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Blend with the grayscale image; 0 gives that (`adjust_saturation`)."""
    return _blend(image, grayscale(image), factor)


def hue(image: jax.Array, turns: jax.Array | float) -> jax.Array:
    """Turn the hue in the HSV color circle; 1 is all the way around (`adjust_hue`)."""
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    value = image.max(-1)
    chroma = value - image.min(-1)
    divisor = jnp.where(chroma > 0, chroma, 1)
    # Not value == red: a compiler may round the two differently, and the hue would jump.
    sixths = 6 * turns + jnp.where(
        (red >= green) & (red >= blue),
        (green - blue) / divisor,
        jnp.where(green >= blue, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )

    def channel(offset: int) -> jax.Array:
        # The operator % would become a call of fmod for each pixel on the CPU: four times slower.
        k = sixths + offset - 6 * jnp.floor((sixths + offset) / 6)
        return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)

    return jnp.stack([channel(5), channel(3), channel(1)], -1)


def grayscale(image: jax.Array) -> jax.Array:
    """ITU-R 601 luma in all three channels: Pillow's mode "L" without its rounding."""
    luma = 0.299 * image[..., 0] + 0.587 * image[..., 1] + 0.114 * image[..., 2]
    return jnp.broadcast_to(_clip(luma)[..., None], image.shape)


def solarize(image: jax.Array, threshold: float = 128) -> jax.Array:
    """Invert the values at and above `threshold` (Pillow's `ImageOps.solarize`)."""
    return jnp.where(image < threshold, image, 255 - image)


def equalize(image: jax.Array) -> jax.Array:
    """Flatten each channel's histogram over the integers 0 to 255 (Pillow's `ImageOps.equalize`).

    Values are rounded to integers first.
    """
    levels = jnp.moveaxis(image.round().astype(jnp.int32), -1, -3)
    flat = levels.reshape(*levels.shape[:-2], -1)
    table = jnp.vectorize(_equalizing_table, signature="(n)->(k)")(flat)
    equal = jnp.take_along_axis(table, flat, -1).reshape(levels.shape)
    return jnp.moveaxis(equal, -3, -1).astype(image.dtype)


def color_jitter(
    key: jax.Array,
    image: jax.Array,
    *,
    brightness: float = 0.5,
    contrast: float = 0.5,
    saturation: float = 0.5,
    hue: float = 0.25,
) -> jax.Array:
    """Adjust brightness, contrast, saturation and hue (torchvision's `ColorJitter`).

    The order of the four is drawn for each image, too.

    Args:
      key: randomness.
      image: uint8 or float `[B,H,W,3]` in [0,255].
      brightness: the factor is uniform in [max(0, 1 - brightness), 1 + brightness].
      contrast: likewise.
      saturation: likewise.
      hue: the turn is uniform in [-hue, hue].

    Returns:
      float32 `[B,H,W,3]` in [0,255] (float64 with `jax_enable_x64`).
    """
    spread = np.array([brightness, contrast, saturation, hue], np.float32)
    low = np.append(np.maximum(0, 1 - spread[:3]), -spread[3])
    high = np.append(1 + spread[:3], spread[3])

    def jitter(key: jax.Array, image: jax.Array) -> jax.Array:
        order_key, amount_key = jax.random.split(key)
        amounts = jax.random.uniform(amount_key, (4,), jnp.float32, low, high)
        # Unrolled: as a scan over the order it is three times slower on the CPU.
        for i in jax.random.permutation(order_key, 4):
            image = jax.lax.switch(i, _ADJUSTMENTS, image, amounts[i])
        return image

    return _per_image(jitter, key, image)


def gaussian_blur(
    key: jax.Array,
    image: jax.Array,
    *,
    kernel: tuple[int, int] = (3, 7),
    sigma: tuple[float, float] = (0.1, 2.0),
) -> jax.Array:
    """Blur with a Gaussian kernel; images are mirrored at the middle of their border pixels.

    Args:
      key: randomness.
      image: uint8 or float `[B,H,W,3]` in [0,255].
      kernel: smallest and largest size, odd; all odd sizes from one to the other are as likely.
      sigma: range of the standard deviation in pixels, uniform.

    Returns:
      float32 `[B,H,W,3]` in [0,255] (float64 with `jax_enable_x64`).
    """
    smallest, largest = kernel
    radii = (smallest // 2, largest // 2 + 1)

    def blur(key: jax.Array, image: jax.Array) -> jax.Array:
        radius_key, sigma_key = jax.random.split(key)
        radius = jax.random.randint(radius_key, (), *radii, jnp.int32)
        deviation = jax.random.uniform(sigma_key, (), jnp.float32, *sigma)
        return _convolve(image, _gaussian_kernel(radius, deviation.astype(image.dtype), largest))

    return _per_image(blur, key, image)


def strong(
    key: jax.Array, image: jax.Array, *, weights: Sequence[float] = (3, 5, 1, 1, 5)
) -> jax.Array:
    """Change each image by one operation drawn at random: the strong view of MKD.

    Args:
      key: randomness.
      image: uint8 or float `[B,H,W,3]` in [0,255].
      weights: relative frequencies of color jitter, Gaussian blur, equalize, solarize, grayscale.

    Returns:
      float32 `[B,H,W,3]` in [0,255] (float64 with `jax_enable_x64`).
    """
    choice_key, jitter_key, blur_key = jax.random.split(key, 3)
    image = jnp.asarray(image, float)
    views = (
        color_jitter(jitter_key, image),
        gaussian_blur(blur_key, image),
        equalize(image),
        solarize(image),
        grayscale(image),
    )
    # A select would be fused with the table lookup of equalize: twice slower on the CPU.
    pick = jax.vmap(lambda i, *views: jnp.stack(views)[i])
    return pick(choose(choice_key, image.shape[0], weights), *views)


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
      image: uint8 or float `[B,H,W,3]` in [0,255].

    Returns:
      float32 `[B,H,W,3]` in [0,255] (float64 with `jax_enable_x64`).
    """
    low = np.array([-32, 0.5, 0.5, -0.1], np.float32)
    high = np.array([32, 1.5, 1.5, 0.1], np.float32)
    neutral = np.array([0, 1, 1, 0], np.float32)

    def distort(key: jax.Array, image: jax.Array) -> jax.Array:
        coin_key, amount_key = jax.random.split(key)
        coins = jax.random.uniform(coin_key, (5,), jnp.float32) < 0.5
        amounts = jax.random.uniform(amount_key, (4,), jnp.float32, low, high)
        return _distort(image, jnp.where(coins[:4], amounts, neutral), coins[4])

    return _per_image(distort, key, image)


_ADJUSTMENTS = (brightness, contrast, saturation, hue)


def _per_image(
    change: Callable[[jax.Array, jax.Array], jax.Array], key: jax.Array, image: jax.Array
) -> jax.Array:
    keys = jax.random.split(key, image.shape[0])
    return jax.vmap(change)(keys, jnp.asarray(image, float))


def _clip(image: jax.Array) -> jax.Array:
    return jnp.clip(image, 0, 255)


def _blend(image: jax.Array, other: jax.Array, factor: jax.Array | float) -> jax.Array:
    return _clip(factor * image + (1 - factor) * other)


def _equalizing_table(levels: jax.Array) -> jax.Array:
    """The new value of each of the 256 levels, given int32 `[n]`."""
    counts = jnp.bincount(levels, length=256)
    below = jnp.cumsum(counts) - counts
    step = (levels.size - counts[levels.max()]) // 255
    equal = (step // 2 + below) // jnp.maximum(step, 1)
    return jnp.where(step > 0, jnp.minimum(equal, 255), jnp.arange(256))


def _gaussian_kernel(radius: jax.Array, sigma: jax.Array, taps: int) -> jax.Array:
    """exp(-x^2 / 2 sigma^2) where |x| <= radius, else 0; sums to 1; `[taps]`."""
    x = jnp.arange(taps) - taps // 2
    weight = jnp.where(abs(x) <= radius, jnp.exp(-((x / sigma) ** 2) / 2), 0)
    return weight / weight.sum()


def _convolve(image: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve `[H,W,3]` with a symmetric kernel `[taps]` along H, then W."""
    radius = kernel.size // 2
    for axis, size in enumerate(image.shape[:2]):
        border = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        padded = jnp.pad(image, border, mode="reflect")
        image = jnp.zeros_like(image)
        for i in range(kernel.size):
            image += kernel[i] * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
    return _clip(image)


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
