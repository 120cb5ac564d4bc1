import itertools

import numpy as np
import pytest
from PIL import Image

from jaxssl.contracts import UserError
from jaxssl.data.transforms import Augment, augment

H, W = 24, 40


def random_record(seed=0):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 19, (H, W), np.uint8)
    return {
        "image": rng.integers(0, 256, (H, W, 3), np.uint8),
        "label": label,
        "confidence": (label / 32).astype(np.float32),
    }


def draws(record, settings, count):
    return [augment(record, settings, np.random.default_rng(seed)) for seed in range(count)]


def test_identity_keeps_pixels():
    record = random_record()
    result = augment(record, Augment((H, W), flip=False), np.random.default_rng(0))
    for name, array in record.items():
        np.testing.assert_array_equal(result[name], array)
        assert result[name].dtype == array.dtype
    assert result["valid"].all()
    assert result["valid"].dtype == bool


@pytest.mark.parametrize("scale", [0.5, 0.77, 1.0, 1.37, 2.0])
def test_crop_equals_resizing_everything_first(scale):
    # Of an odd size no pixel's center falls between two pixels, so that the nearest is definite.
    record, crop = {name: array[1:, 1:] for name, array in random_record().items()}, (11, 17)
    size = round((W - 1) * scale), round((H - 1) * scale)
    whole = {
        name: np.asarray(Image.fromarray(record[name]).resize(size, how))
        for name, how in (
            ("image", Image.Resampling.BILINEAR),
            ("label", Image.Resampling.NEAREST),
        )
    }
    for seed in range(10):
        settings = Augment(crop, (scale, scale), flip=False)
        result = augment(record, settings, np.random.default_rng(seed))
        tops, lefts = range(size[1] - crop[0] + 1), range(size[0] - crop[1] + 1)
        windows = [
            np.s_[y : y + crop[0], x : x + crop[1]] for y, x in itertools.product(tops, lefts)
        ]
        (window,) = [w for w in windows if np.array_equal(whole["label"][w], result["label"])]
        difference = whole["image"][window].astype(int) - result["image"]
        assert abs(difference).max() <= 1  # Pillow rounds its weights


@pytest.mark.parametrize("flip", [False, True])
def test_image_label_and_confidence_stay_aligned(flip):
    """On ramps the image tells where each pixel came from: the label's pixel holds that place."""
    y, x = np.mgrid[:H, :W]
    image = np.stack([6 * x, 10 * y, 0 * x], -1).astype(np.uint8)
    for channel, step, label in ((0, 6, x), (1, 10, y)):
        record = {"image": image, "label": label.astype(np.uint8), "confidence": label / 64}
        for result in draws(record, Augment((30, 30), (0.5, 2.0), flip), 40):
            valid = result["valid"]
            place = result["image"][valid][:, channel] / step
            # Half a pixel from taking the nearest, half from antialiasing at the border.
            assert abs(place - result["label"][valid]).max() <= 1.01
            inside = (place > 2) & (place < label.max() - 2)
            assert abs(place - result["label"][valid])[inside].max() <= 0.5 + 0.5 / step
            np.testing.assert_array_equal(result["confidence"][valid], result["label"][valid] / 64)


def test_smaller_image_is_padded():
    settings = Augment((H, W), (0.5, 0.5), flip=False)
    result = augment(random_record(), settings, np.random.default_rng(0))
    expected = np.zeros((H, W), bool)
    expected[: H // 2, : W // 2] = True
    np.testing.assert_array_equal(result["valid"], expected)
    assert (result["label"][~expected] == 255).all()
    assert (result["image"][~expected] == 0).all()
    assert (result["confidence"][~expected] == 0).all()
    assert (result["label"][expected] != 255).all()


def test_half_are_mirrored():
    record = random_record()
    mirrored = 0
    for result in draws(record, Augment((H, W)), 200):
        flipped = not np.array_equal(result["image"], record["image"])
        step = -1 if flipped else 1
        for name, array in record.items():
            np.testing.assert_array_equal(result[name], array[:, ::step])
        mirrored += flipped
    assert 70 < mirrored < 130


def test_every_place_and_scale_is_drawn():
    y, x = np.mgrid[:12, :12]
    record = {"image": np.zeros((12, 12, 3), np.uint8), "label": (12 * y + x).astype(np.uint8)}
    corners = [int(r["label"][0, 0]) for r in draws(record, Augment((9, 9), flip=False), 300)]
    assert set(corners) == {12 * top + left for top in range(4) for left in range(4)}

    results = draws(record, Augment((24, 24), (0.5, 2.0)), 300)
    heights = [int(r["valid"].any(1).sum()) for r in results]
    assert min(heights) == 6
    assert max(heights) in (23, 24)
    assert np.mean(heights) == pytest.approx(15, abs=1)


def test_label_is_optional():
    result = augment({"image": random_record()["image"]}, Augment((8, 8)), np.random.default_rng(0))
    assert set(result) == {"image", "valid"}


@pytest.mark.parametrize(
    "fields", [{"crop": (32,)}, {"crop": (0, 8)}, {"crop": (8, 8), "scale": (2.0, 0.5)}]
)
def test_impossible_settings_are_refused(fields):
    with pytest.raises(UserError, match=r"(crop|scale)="):
        Augment(**fields)
