import colorsys
import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from PIL import Image, ImageEnhance, ImageOps
from scipy.ndimage import gaussian_filter1d

from jaxssl import views
from jaxssl.sharding import batched, make_mesh

RNG = np.random.default_rng(0)
PHOTO = np.asarray(  # smooth, colorful, with black and white, and no channel like another
    np.clip(
        127 + 150 * np.sin(np.add.outer(np.arange(20.0) / 3, np.arange(28.0) / 5))[..., None]
        + [10, -20, 0] + RNG.normal(0, 25, (20, 28, 3)), 0, 255,
    ),
    np.uint8,
)  # fmt: skip
NOISE = RNG.integers(0, 256, (20, 28, 3), np.uint8)
FLAT = np.full_like(PHOTO, 77)
DARK = PHOTO // 8
BLACK_AND_WHITE = NOISE // 128 * 255
TWO_VALUES = NOISE // 128 * 3 + 100
CASES = {  # one image of each kind that an operation may stumble over
    "photo": PHOTO,
    "noise": NOISE,
    "dark": DARK,
    "flat": FLAT,
    "white": np.full_like(PHOTO, 255),
    "black and white": BLACK_AND_WHITE,
    "two values": TWO_VALUES,
    "column": NOISE[:, :1],
    "row": NOISE[:1],
}
IMAGES = pytest.mark.parametrize("image", CASES.values(), ids=CASES.keys())
BATCH = np.stack([PHOTO, NOISE, DARK, BLACK_AND_WHITE] * 2)
VALID = np.ones(BATCH.shape[:3], bool)
VALID[:, 15:] = VALID[:, :, :9] = False  # as in a flipped crop
BATCH[~VALID] = 0
CROPS = BATCH[:, :15, 9:]
RANDOM = pytest.mark.parametrize(  # the strong view includes color jitter and blur
    "change",
    [jax.jit(views.strong), jax.jit(views.photometric_distortion), jax.jit(views.rand_augment)],
    ids=["strong", "weak", "rand_augment"],
)
BRANCHING = pytest.mark.parametrize(
    "change", [views.strong, views.rand_augment], ids=["strong", "rand_augment"]
)


def truncated(image):
    """What Pillow stores: it rounds down, where rounding has left a whole number."""
    return np.floor(np.asarray(image) + 1e-3)


def gaussian(image, sigma, radius):
    image = image.astype(float)
    for axis in (0, 1):
        image = gaussian_filter1d(image, sigma, axis, mode="mirror", radius=radius)
    return image


def copies(count, pixels):
    """`count` images of one row with the given pixels."""
    return np.tile(np.array(pixels, np.float32), (count, 1, 1, 1))


def hsv(image):
    """Hue in turns, saturation in [0,1] and value in [0,255] of each pixel."""
    pixels = np.reshape(image, (-1, 3)) / 255
    return np.reshape([colorsys.rgb_to_hsv(*p) for p in pixels], np.shape(image)) * [1, 1, 255]


def rgb(image):
    pixels = np.reshape(image / np.array([1, 1, 255]), (-1, 3))
    return 255 * np.reshape([colorsys.hsv_to_rgb(h % 1, s, v) for h, s, v in pixels], image.shape)


def turned(turns):
    """The same hue difference, in [-1/2, 1/2)."""
    return (turns + 0.5) % 1 - 0.5


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize(
    ("adjust", "enhance"),
    [
        (views.brightness, ImageEnhance.Brightness),
        (views.contrast, ImageEnhance.Contrast),
        (views.saturation, ImageEnhance.Color),
        (views.sharpness, ImageEnhance.Sharpness),
    ],
)
@IMAGES
def test_adjustments_are_pillows_within_a_level(image, adjust, enhance, factor):
    expected = np.asarray(enhance(Image.fromarray(image)).enhance(factor), int)
    assert abs(truncated(jax.jit(adjust)(image, factor)) - expected).max() <= 1


@IMAGES
def test_autocontrast_is_pillows(image):
    expected = np.asarray(ImageOps.autocontrast(Image.fromarray(image)), int)
    assert abs(truncated(jax.jit(views.autocontrast)(image)) - expected).max() <= 1


@pytest.mark.parametrize("bits", [1, 3, 8])
@IMAGES
def test_posterize_is_pillows(image, bits):
    expected = ImageOps.posterize(Image.fromarray(image), bits)
    np.testing.assert_array_equal(jax.jit(views.posterize)(image, bits), expected)


@pytest.mark.parametrize("turns", [-0.25, 0.0, 0.1, 0.5])
@IMAGES
def test_hue_turns_hsv(image, turns):
    """Pillow keeps hue in 8 bits, whole levels off in RGB; the standard library does not."""
    expected = rgb(hsv(image) + np.array([turns, 0, 0]))
    np.testing.assert_allclose(jax.jit(views.hue)(image, turns), expected, atol=1e-3)


@IMAGES
def test_grayscale_is_pillows_luma(image):
    expected = np.asarray(ImageOps.grayscale(Image.fromarray(image)), float)
    result = np.asarray(jax.jit(views.grayscale)(image))
    assert result.shape == image.shape
    assert abs(result - expected[..., None]).max() <= 0.51


@IMAGES
def test_equalize_is_pillows(image):
    expected = ImageOps.equalize(Image.fromarray(image))
    np.testing.assert_array_equal(jax.jit(views.equalize)(image), expected)


@pytest.mark.parametrize("threshold", [0, 100, 128, 256])
@IMAGES
def test_solarize_is_pillows(image, threshold):
    expected = ImageOps.solarize(Image.fromarray(image), threshold)
    np.testing.assert_array_equal(jax.jit(views.solarize)(image, threshold), expected)


@pytest.mark.parametrize("change", [views.equalize, lambda image: views.posterize(image, 3)])
def test_levels_are_rounded_first(change):
    off = RNG.uniform(-0.4, 0.4, NOISE.shape)
    change = jax.jit(change)
    np.testing.assert_array_equal(change(np.float32(NOISE + off)), change(np.float32(NOISE)))


OPERATIONS = {  # a number and an image, as RandAugment calls them
    "brightness": lambda x, image, valid: views.brightness(image, 0.5 + x),
    "contrast": lambda x, image, valid: views.contrast(image, 0.5 + x, valid=valid),
    "saturation": lambda x, image, valid: views.saturation(image, 0.5 + x),
    "sharpness": lambda x, image, valid: views.sharpness(image, 0.5 + x, valid=valid),
    "autocontrast": lambda x, image, valid: views.autocontrast(image, valid=valid),
    "equalize": lambda x, image, valid: views.equalize(image, valid=valid),
    "posterize": lambda x, image, valid: views.posterize(image, (8 - 4 * x).astype(int)),
    "solarize": lambda x, image, valid: views.solarize(image, 256 * (1 - x)),
    "hue": lambda x, image, valid: views.hue(image, x - 0.5),
    "grayscale": lambda x, image, valid: views.grayscale(image),
}
OPERATIONS = {name: jax.jit(operation) for name, operation in OPERATIONS.items()}
EACH = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())


@EACH
def test_every_precision_sees_one_change(operation):
    expected = operation(jnp.float32(0.7), NOISE, None)
    assert expected.dtype == np.float32
    for dtype in (jnp.float32, jnp.bfloat16):
        result = operation(jnp.float32(0.7), jnp.asarray(NOISE, dtype), None)
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, expected)


@EACH
def test_padding_does_not_count(operation):
    """And leading axes are those of a batch."""
    padded, valid = BATCH.reshape(2, 4, 20, 28, 3), VALID.reshape(2, 4, 20, 28)
    result = np.asarray(operation(jnp.float32(0.2), padded, valid))[:, :, :15, 9:]
    for image, crop in zip(result.reshape(CROPS.shape), CROPS, strict=True):
        expected = operation(jnp.float32(0.2), crop, None)
        np.testing.assert_allclose(image, expected, atol=1e-3)


def test_padding_alone_stays_finite():
    for operation in OPERATIONS.values():
        assert np.isfinite(
            operation(jnp.float32(0.2), NOISE, np.zeros(NOISE.shape[:2], bool))
        ).all()


def test_operations_are_branches_of_one_switch():
    """For each image of a batch another, as RandAugment draws them."""
    amounts, images = np.linspace(0.1, 0.9, 10, dtype=np.float32), np.stack([PHOTO, NOISE] * 5)
    change = jax.jit(jax.vmap(lambda i, *given: jax.lax.switch(i, [*OPERATIONS.values()], *given)))
    result = change(np.arange(10), amounts, images, np.ones(images.shape[:3], bool))
    for i, operation in enumerate(OPERATIONS.values()):
        expected = operation(jnp.float32(amounts[i]), images[i], None)
        np.testing.assert_allclose(result[i], expected, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "size", "sigma"),
    [("photo", 3, 0.1), ("photo", 5, 0.8), ("photo", 7, 2.0), ("column", 7, 2.0), ("row", 7, 2.0)],
)
def test_blur_is_a_gaussian_filter(name, size, sigma):
    """Pillow's GaussianBlur is made of boxes, so SciPy's is the one to compare with."""
    blur = functools.partial(views.gaussian_blur, kernel=(size, size), sigma=(sigma, sigma))
    blurred = jax.jit(blur)(jax.random.key(0), CASES[name][None])
    np.testing.assert_allclose(blurred[0], gaussian(CASES[name], sigma, size // 2), atol=1e-3)


def test_blur_shares_weights_at_padding():
    blur = jax.jit(functools.partial(views.gaussian_blur, kernel=(7, 7), sigma=(1.5, 1.5)))
    result = blur(jax.random.key(5), np.where(VALID[..., None], BATCH, 255), valid=VALID)
    weights = gaussian(VALID[0, ..., None], 1.5, 3)
    for blurred, image in zip(result, BATCH, strict=True):
        expected = gaussian(image, 1.5, 3) / np.maximum(weights, 1e-9)
        np.testing.assert_allclose(blurred[:15, 9:], expected[:15, 9:], atol=1e-3)


def test_blur_draws_size_and_sigma():
    impulse = np.zeros((1500, 9, 9, 3), np.float32)
    impulse[:, 4, 4] = 255
    blur = jax.jit(functools.partial(views.gaussian_blur, sigma=(1.0, 2.0)))
    response = np.asarray(blur(jax.random.key(1), impulse))
    row = response[:, 4, :, 0]
    sizes, counts = np.unique((row > 0).sum(1), return_counts=True)
    np.testing.assert_array_equal(sizes, [3, 5, 7])
    assert abs(counts - 500).max() < 75  # four standard deviations
    sigma = np.sqrt(0.5 / np.log(row[:, 4] / row[:, 5]))
    np.testing.assert_allclose(np.quantile(sigma, [0, 0.5, 1]), [1, 1.5, 2], atol=0.05)


@pytest.mark.parametrize(
    ("name", "spread", "low", "high", "measure"),
    [
        ("brightness", 0.5, 0.5, 1.5, lambda images: images[:, 0, 1, 0] / 80),
        ("brightness", 1.2, 0.0, 2.2, lambda images: images[:, 0, 1, 0] / 80),
        ("contrast", 0.5, 0.5, 1.5, lambda images: np.ptp(images[:, 0, :, 1], axis=1) / 50),
        ("saturation", 0.5, 0.5, 1.5, lambda images: np.ptp(images[:, 0, 0], axis=1) / 10),
        ("hue", 0.25, -0.25, 0.25, lambda images: turned(hsv(images[:, 0, 0])[:, 0])),
    ],
)
def test_jitter_amounts_are_uniform(name, spread, low, high, measure):
    spreads = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0} | {name: spread}
    images = copies(2000, [[30, 20, 20], [80, 70, 70]])
    amounts = measure(np.asarray(views.color_jitter(jax.random.key(2), images, **spreads)))
    quantiles = np.quantile(amounts, np.linspace(0, 1, 5))
    np.testing.assert_allclose(quantiles, np.linspace(low, high, 5), atol=0.05 * (high - low))


@pytest.mark.parametrize("name", ["saturation", "contrast"])
def test_jitter_order_is_random(name):
    """Images of one color have it as their mean, so saturation and contrast change them alike."""
    color = np.array([200, 50, 50])
    images = copies(2000, [color, color])  # shaped as above: compiled once
    spreads = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.5} | {name: 0.25}
    result = views.color_jitter(jax.random.key(3), images, **spreads)
    pixels = np.asarray(result, float)[:, 0, 0]
    factor = np.ptp(pixels, axis=1) / 150
    gray_blended = (pixels.max(1) - 200 * factor) / (1 - factor)
    before_hue = abs(gray_blended - color @ [0.299, 0.587, 0.114]) < 0.5
    assert abs(before_hue.mean() - 0.5) < 0.05


def distorted(image, shift, gain, saturation_gain, turns, contrast_first):
    """PhotoMetricDistortion of an image, given its draws."""
    image = np.clip(image + shift, 0, 255)
    if contrast_first:
        image = np.clip(image * gain, 0, 255)
    hue, saturation, value = np.moveaxis(hsv(image), -1, 0)
    saturation = np.minimum(saturation * saturation_gain, 1)
    image = rgb(np.stack([hue + turns, saturation, value], -1))
    return image if contrast_first else np.clip(image * gain, 0, 255)


@pytest.fixture(scope="module")
def distortion():
    """Images, their distortions and the draws recovered from two pixels that are never clipped."""
    images = copies(1500, [[100, 100, 100], [120, 100, 80], [250, 120, 30]])
    result = np.asarray(jax.jit(views.photometric_distortion)(jax.random.key(4), images), float)
    gray, color = result[:, 0, 0, 0], result[:, 0, 1]
    gain = (color.max(1) - gray) / 20
    shift = gray / gain - 100
    saturation_gain = np.ptp(color, axis=1) / (40 * gain)
    turns = turned(hsv(color)[:, 0] - 30 / 360)
    return images, result, (shift, gain, saturation_gain, turns)


@pytest.mark.parametrize(
    ("draw", "neutral", "low", "high"),
    [(0, 0, -32, 32), (1, 1, 0.5, 1.5), (2, 1, 0.5, 1.5), (3, 0, -0.1, 0.1)],
    ids=["brightness", "contrast", "saturation", "hue"],
)
def test_distortion_amounts(distortion, draw, neutral, low, high):
    amounts = distortion[2][draw]
    changed = abs(amounts - neutral) > 1e-5 * (high - low)
    assert abs(changed.mean() - 0.5) < 0.05
    quantiles = np.quantile(amounts[changed], np.linspace(0, 1, 5))
    np.testing.assert_allclose(quantiles, np.linspace(low, high, 5), atol=0.05 * (high - low))


def test_distortion_order(distortion):
    images, result, draws = distortion
    off = []
    for contrast_first in (True, False):
        expected = [
            distorted(image, *amounts, contrast_first)
            for image, *amounts in zip(images, *draws, strict=True)
        ]
        off.append(abs(result - expected).max((1, 2, 3)))
    first, last = off
    assert np.minimum(first, last).max() < 0.05
    differ = abs(first - last) > 1
    assert abs((first < last)[differ].mean() - 0.5) < 0.1


def test_strong_applies_one_operation():
    """Each leaves its mark in a corner far from the edge of two colors; jitter is the rest."""
    image = np.full((16, 32, 3), [200, 90, 30], np.uint8)
    image[:, 16:] = [20, 220, 140]
    marks = {
        "blur": image[0, 0],
        "equalize": np.asarray(ImageOps.equalize(Image.fromarray(image)))[0, 0],
        "solarize": np.asarray(ImageOps.solarize(Image.fromarray(image)))[0, 0],
        "grayscale": np.full(3, np.dot(image[0, 0], [0.299, 0.587, 0.114])),
    }
    batch = np.repeat(image[None], 1500, axis=0)
    corners = np.asarray(jax.jit(views.strong)(jax.random.key(12), batch)[:, 0, 0])
    counts = [(abs(corners - mark) < 1e-2).all(-1).sum() for mark in marks.values()]
    counts = np.array([1500 - sum(counts), *counts])
    expected = 1500 * np.array([3, 5, 1, 1, 5]) / 15
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # chi-square, 4 degrees, p = .001


PILLOW = {  # what RandAugment's operations make of an image at each of some strengths
    "posterize": ImageOps.posterize,  # first, because 8 bits are what others only rarely leave
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
    "sharpness": ImageEnhance.Sharpness,
    "solarize": ImageOps.solarize,
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
}
FACTORS = ["brightness", "contrast", "saturation", "sharpness"]


def strengths_of(name):
    """All that may be drawn, factors in steps that change no value by more than one."""
    if name in FACTORS:
        return np.linspace(0, 2, 501)
    return {"posterize": np.arange(1, 9), "solarize": np.arange(257)}.get(name, np.zeros(1))


@pytest.fixture(scope="module")
def rand_augmented():
    """By operation, the strengths at which Pillow's image is nearest to one of 4000; and how far
    from it the images are, in levels.
    """
    pixels, made, drawn = np.maximum(PHOTO, 8), [], []  # so that autocontrast has to stretch
    image = Image.fromarray(pixels)
    for name, change in PILLOW.items():
        for strength in strengths_of(name):
            with_factor = name in FACTORS
            one = change(image).enhance(strength) if with_factor else change(image, int(strength))
            made.append(np.asarray(one, np.int16)[::3, ::4].reshape(-1))
            drawn.append((name, strength))
    augment = jax.jit(functools.partial(views.rand_augment, operations=1))
    results = augment(jax.random.key(16), np.repeat(pixels[None], 4000, axis=0))[:, ::3, ::4]
    made, results = np.stack(made), truncated(results).reshape(4000, -1).astype(np.int16)
    distance = [abs(made - result).max(1) for result in results]
    nearest = [drawn[row.argmin()] for row in distance]
    found = {name: np.array([x for n, x in nearest if n == name]) for name in PILLOW}
    return found, np.min(distance, axis=1)


def test_rand_augment_makes_what_pillow_makes(rand_augmented):
    found, distance = rand_augmented
    assert distance.max() <= 2
    counts = np.array([len(strengths) for strengths in found.values()])
    assert ((counts - 500) ** 2 / 500).sum() < 24.3  # chi-square, 7 degrees, p = .001


@pytest.mark.parametrize(
    ("name", "low", "high", "tolerance"),
    [*((name, 0.1, 1.9, 0.1) for name in FACTORS), ("solarize", 0, 256, 16)],
)
def test_rand_augment_draws_strengths_from_the_whole_range(
    rand_augmented, name, low, high, tolerance
):
    quantiles = np.quantile(rand_augmented[0][name], np.linspace(0, 1, 5))
    np.testing.assert_allclose(quantiles, np.linspace(low, high, 5), atol=tolerance)


def test_rand_augment_keeps_four_bits_or_more(rand_augmented):
    bits, counts = np.unique(rand_augmented[0]["posterize"], return_counts=True)
    np.testing.assert_array_equal(bits, [4, 5, 6, 7, 8])
    assert abs(counts / counts.sum() - 0.2).max() < 0.08


@pytest.mark.parametrize("operations", [1, 3, 8])
def test_rand_augment_draws_with_replacement(operations):
    """Of the eight, only brightness leads to a gray that is not one of a few."""
    augment = jax.jit(functools.partial(views.rand_augment, operations=operations))
    grays = np.asarray(augment(jax.random.key(17), np.full((4000, 1, 1, 3), 128, np.uint8)))
    share = 1 - np.isin(grays[:, 0, 0, 0], [128, 127, 126, 124, 120, 112]).mean()
    assert abs(share - (1 - (7 / 8) ** operations)) < 0.04


@pytest.mark.parametrize(
    "change",
    [functools.partial(views.strong, weights=(4, 0, 2, 1, 1)), views.rand_augment],
    ids=["strong without blur, which has a test of its own", "rand_augment"],
)
def test_padding_does_not_count_in_random_views(change):
    change = jax.jit(change)
    result = change(jax.random.key(13), BATCH, valid=VALID)[:, :15, 9:]
    np.testing.assert_allclose(result, change(jax.random.key(13), CROPS), atol=1e-2)


@BRANCHING
def test_the_same_branches_are_taken_in_a_loop_and_together(change):
    """A CPU changes images one by one; under vmap they go together, as on other devices."""
    keys = jax.random.split(jax.random.key(14), 8)
    images = [*zip(keys, BATCH[:, None], VALID[:, None], strict=True)]
    jitted = jax.jit(lambda key, image, valid: change(key, image, valid=valid))
    expected = np.stack([jitted(*given) for given in images])
    result = jax.vmap(jitted)(keys, BATCH[:, None], VALID[:, None])
    np.testing.assert_allclose(result, expected, atol=1e-2)


@BRANCHING
def test_branching_is_the_same_on_other_devices(change, monkeypatch):
    """They take the branch of `platform_dependent` that a CPU does not, and split the images."""

    def changed(image, valid):
        return change(jax.random.key(15), image, valid=valid)

    def other(*rows, cpu, default):
        return default(*rows)

    expected = jax.jit(changed)(BATCH, VALID)
    monkeypatch.setattr(jax.lax, "platform_dependent", other)
    split = jax.device_put((BATCH, VALID), batched(make_mesh()))
    together = jax.jit(lambda *rows: changed(*rows))  # anew: jax keeps what it traced
    np.testing.assert_allclose(together(*split), expected, atol=1e-2)


@pytest.mark.parametrize("weights", [(3, 5, 1, 1, 5), (1, 0, 2)])
def test_choose_follows_weights(weights):
    counts = np.bincount(views.choose(jax.random.key(6), 50000, weights), minlength=len(weights))
    np.testing.assert_allclose(counts / 50000, np.divide(weights, sum(weights)), atol=0.01)


@RANDOM
def test_random_functions_keep_shape_and_range(change):
    result = np.asarray(change(jax.random.key(7), BATCH))
    assert (result.shape, result.dtype) == (BATCH.shape, np.float32)
    assert result.min() >= 0
    assert result.max() <= 255
    assert (result != change(jax.random.key(8), BATCH)).any()
    assert (result[0] != result[4]).any()  # the same image


@RANDOM
def test_images_do_not_depend_on_each_other(change):
    other = BATCH.copy()
    other[1::2] = 255 - other[1::2]
    result = change(jax.random.key(9), BATCH)
    np.testing.assert_array_equal(change(jax.random.key(9), other)[::2], result[::2])


@RANDOM
def test_split_over_devices(change):
    split = jax.device_put(BATCH, batched(make_mesh()))
    expected = change(jax.random.key(10), BATCH)
    np.testing.assert_allclose(change(jax.random.key(10), split), expected, atol=1e-3)


@RANDOM
def test_double_precision_draws_the_same(change):
    single = change(jax.random.key(11), BATCH)
    with jax.enable_x64(True):
        double = change(jax.random.key(11), BATCH)
    assert double.dtype == np.float64
    np.testing.assert_allclose(single, double, atol=1e-2)
