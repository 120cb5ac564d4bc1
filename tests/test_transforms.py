import hashlib
import itertools

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from jaxssl.contracts import UserError
from jaxssl.data import randaugment
from jaxssl.data.transforms import Augment, augment, augment_whole, fit

H, W = 24, 40


class Fixed:
    """A generator that draws what it is told: scale, top, left, mirror, turn, angle, blur."""

    def __init__(self, top=0.0, left=0.0, *, angle=0.5, blur=0.9):
        self.numbers = np.array([0.0, top, left, 0.9, 0.0, angle, blur])

    def random(self, count):
        assert count == 7
        return self.numbers


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


@pytest.mark.parametrize(
    "more", [{"flip": False}, {}, {"blur": 1.0}, {"rotate": 40.0}, {"rotate": 40.0, "blur": 0.5}]
)
def test_image_label_and_confidence_stay_aligned(more):
    """On ramps the image tells where each pixel came from: the label's pixel holds that place."""
    y, x = np.mgrid[:H, :W]
    image = np.stack([6 * x, 10 * y, 0 * x], -1).astype(np.uint8)
    for channel, step, label in ((0, 6, x), (1, 10, y)):
        record = {"image": image, "label": label.astype(np.uint8), "confidence": label / 64}
        for result in draws(record, Augment((30, 30), (0.5, 2.0), **more), 40):
            valid = result["valid"]
            place = result["image"][valid][:, channel] / step
            error, plain = abs(place - result["label"][valid]), more.keys() <= {"flip"}
            # Half a pixel from taking the nearest, half from antialiasing at the border; blur bends
            # a ramp there.
            assert error.max() <= (1.01 if plain else 2.5)
            edge = 2 if plain else 6
            inside = (place > edge) & (place < label.max() - edge)
            # Colors are rounded when they are resized, turned, and blurred.
            assert error[inside].max() <= 0.5 + 0.5 / step * (1 if plain else 3)
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


def test_as_many_images_shrink_as_grow():
    """U(.5,1) or U(1,2) with equal chance."""
    record, settings = random_record(), Augment((2 * H, 2 * W), (0.5, 2.0), 1.0, flip=False)
    heights = [result["valid"].any(1).sum() for result in draws(record, settings, 600)]
    quarters = np.histogram(heights, (H / 2, 0.75 * H, H, 1.5 * H, 2 * H + 1))[0]
    assert abs(quarters / 600 - 0.25).max() < 0.06


def test_the_middle_as_median_changes_nothing():
    plain, even = (Augment((8, 8), (0.5, 2.0), median) for median in (None, 1.25))
    for drawn in (0.0, 0.3, 0.5, 0.99):
        assert even.factor(drawn) == pytest.approx(plain.factor(drawn))


def test_label_is_optional():
    result = augment({"image": random_record()["image"]}, Augment((8, 8)), np.random.default_rng(0))
    assert set(result) == {"image", "valid"}


@pytest.mark.parametrize(
    "fields",
    [
        {"crop": (32,)},
        {"crop": (0, 8)},
        {"scale": (2.0, 0.5)},
        {"scale_median": 1.1},
        {"rotate": -1.0},
        {"rotate": 181.0},
        {"blur": 1.5},
        {"blur": float("nan")},
    ],
)
def test_impossible_settings_are_refused(fields):
    (name,) = fields
    with pytest.raises(UserError, match=f"{name}="):
        Augment(**{"crop": (8, 8), **fields})


def test_settings_of_old_give_the_bytes_of_old():
    """Hashes of what was drawn before images could be turned and blurred."""
    digest = hashlib.sha256()
    for result in draws(random_record(), Augment((20, 30)), 50):
        for name in ("image", "valid", "label", "confidence"):
            digest.update(result[name].tobytes())
    # Of scaled images the labels alone: bytes of the image are Pillow's.
    for result in draws(random_record(), Augment((30, 50), (0.5, 2.0)), 50):
        for name in ("valid", "label", "confidence"):
            digest.update(result[name].tobytes())
    assert digest.hexdigest() == "ae08673a731beda67fb83ec2d1881785fed95710e98a738be4b0407771ddc220"


@pytest.mark.parametrize("more", [{"rotate": 10.0}, {"blur": 0.5}, {"rotate": 10.0, "blur": 0.5}])
def test_one_setting_changes_nothing_of_the_others(more):
    """Half of the images are turned, half blurred; these stay as they would be without."""
    record, settings = random_record(), {"crop": (20, 30), "scale": (0.5, 2.0)}
    plain = draws(record, Augment(**settings), 200)
    changed = draws(record, Augment(**settings, **more), 200)
    same = [np.array_equal(a["image"], b["image"]) for a, b in zip(plain, changed, strict=True)]
    assert np.mean(same) == pytest.approx(0.5 ** len(more), abs=0.1)
    if "rotate" not in more:
        for a, b in zip(plain, changed, strict=True):
            np.testing.assert_array_equal(a["label"], b["label"])
            np.testing.assert_array_equal(a["valid"], b["valid"])


@pytest.mark.parametrize(("angle", "quarters"), [(1.0, 1), (0.0, 3)])
@pytest.mark.parametrize("side", [24, 25])
def test_a_quarter_turn_moves_pixels_to_new_places(angle, quarters, side):
    record = {name: array[:side, :side] for name, array in random_square(side).items()}
    settings = Augment((side, side), rotate=90.0)
    result = augment(record, settings, Fixed(angle=angle))
    for name, array in record.items():
        np.testing.assert_array_equal(result[name], np.rot90(array, quarters))
    assert result["valid"].all()


def random_square(side):
    rng = np.random.default_rng(1)
    label = rng.integers(0, 19, (side, side), np.uint8)
    image = rng.integers(0, 256, (side, side, 3), np.uint8)
    return {"image": image, "label": label, "confidence": label / np.float32(32)}


def scipy_turned(array, degrees, order):
    """Turned counter-clockwise about the center; beyond the border the nearest pixel goes on."""
    turn = np.exp(1j * np.deg2rad(degrees))
    matrix = np.array([[turn.real, turn.imag], [-turn.imag, turn.real]])
    middle = (np.array(array.shape[:2]) - 1) / 2
    offset = middle - matrix @ middle

    def one(band):
        return scipy.ndimage.affine_transform(band, matrix, offset, order=order, mode="nearest")

    if array.ndim == 2:
        return one(array)
    return np.stack([one(array[..., i].astype(float)) for i in range(3)], -1)


@pytest.mark.parametrize("degrees", [-31.0, 2.0, 10.0, 137.0])
def test_rotation_is_scipys(degrees):
    record, settings = random_record(), Augment((H, W), rotate=180.0)
    result = augment(record, settings, Fixed(angle=(degrees / 180 + 1) / 2))
    valid = result["valid"]
    # SciPy's border runs through the centers of the outermost pixels.
    wide = np.zeros((3 * H, 3 * W), np.uint8)
    wide[H : 2 * H, W : 2 * W] = 1
    np.testing.assert_array_equal(
        valid, scipy_turned(wide, degrees, 0)[H : 2 * H, W : 2 * W].astype(bool)
    )
    assert 0.3 < valid.mean() < 1
    for name in ("label", "confidence"):
        expected = scipy_turned(record[name], degrees, 0)
        np.testing.assert_array_equal(result[name][valid], expected[valid])
    near = np.pad(record["image"], ((1, 1), (1, 1), (0, 0)), "reflect")
    expected = scipy_turned(near, degrees, 1)[1:-1, 1:-1]
    assert abs(result["image"][valid] - expected[valid]).max() <= 0.5 + 1e-3
    assert (result["image"][~valid] == 0).all()
    assert (result["label"][~valid] == 255).all()
    assert (result["confidence"][~valid] == 0).all()


@pytest.mark.parametrize("scale", [0.7, 1.0, 1.9])
@pytest.mark.parametrize("blur", [0.0, 1.0])
def test_a_crop_of_a_turned_image_is_cut_from_the_whole(scale, blur):
    record = random_record()
    fields = {"scale": (scale, scale), "rotate": 20.0, "blur": blur}
    size = round(H * scale), round(W * scale)
    drawn = {"angle": 0.9, "blur": 0.5}
    whole = augment(record, Augment(size, **fields), Fixed(**drawn))
    h, w = 9, 14
    for top, left in itertools.product((0.0, 0.3, 0.999), repeat=2):
        result = augment(record, Augment((h, w), **fields), Fixed(top, left, **drawn))
        y, x = int(top * (size[0] - h + 1)), int(left * (size[1] - w + 1))
        for name, array in result.items():
            expected = whole[name][y : y + h, x : x + w]
            if name == "image":
                assert abs(array.astype(int) - expected).max() <= 2  # Pillow rounds its weights
            else:
                np.testing.assert_array_equal(array, expected)


def test_half_are_turned_and_every_angle_is_drawn():
    """The confidence is the column that a pixel comes from."""
    column = np.broadcast_to(np.arange(101, dtype=np.float32), (101, 101))
    record = {"image": np.zeros((101, 101, 3), np.uint8), "confidence": column}
    settings = Augment((101, 101), rotate=30.0, flip=False)
    columns = np.stack([r["confidence"][50] for r in draws(record, settings, 300)])
    cosines = (columns[:, 90] - columns[:, 10]) / 80
    rows = np.stack([r["confidence"][:, 50] for r in draws(record, settings, 300)])
    sines = (rows[:, 90] - rows[:, 10]) / -80
    angles = np.rad2deg(np.arctan2(sines, cosines))
    turned = angles[angles != 0]
    assert 120 < len(turned) < 180
    assert abs(turned).max() <= 31
    np.testing.assert_allclose(np.quantile(turned, [0.1, 0.5, 0.9]), [-24, 0, 24], atol=6)


@pytest.mark.parametrize("size", [(H, W), (2, 3), (1, 1)])
def test_blur_is_a_binomial_of_five_taps(size):
    """What OpenCV's GaussianBlur gives for a size of five and no width."""
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    result = augment({"image": image}, Augment(size, blur=1.0), Fixed(blur=0.0))
    expected = image.astype(float)
    for axis in (0, 1):
        weights = np.array([0.0625, 0.25, 0.375, 0.25, 0.0625])
        expected = scipy.ndimage.correlate1d(expected, weights, axis, mode="mirror")
    assert abs(result["image"] - expected).max() <= 0.5
    assert result["valid"].all()


def test_no_color_of_the_padding_gets_into_a_blurred_image():
    record = {"image": np.full((H, W, 3), 200, np.uint8)}
    for result in draws(record, Augment((40, 50), (0.5, 2.0), rotate=45.0, blur=1.0), 30):
        assert (result["image"][result["valid"]] == 200).all()
        assert (result["image"][~result["valid"]] == 0).all()


def test_a_padded_image_is_cropped_anywhere():
    y, x = np.mgrid[:6, :7]
    record = {"image": random_record()["image"][:6, :7], "label": (7 * y + x).astype(np.uint8)}
    wide = {
        "image": np.pad(record["image"], ((2, 2), (2, 2), (0, 0))),
        "label": np.pad(record["label"], 2, constant_values=255),
        "valid": np.pad(np.ones((6, 7), bool), 2),
    }
    seen = set()
    for result in draws(record, Augment((6, 7), flip=False, pad=2), 300):
        (place,) = [
            (top, left)
            for top, left in itertools.product(range(5), repeat=2)
            if np.array_equal(result["label"], wide["label"][top : top + 6, left : left + 7])
        ]
        window = np.s_[place[0] : place[0] + 6, place[1] : place[1] + 7]
        for name, array in wide.items():
            np.testing.assert_array_equal(result[name], array[window])
        seen.add(place)
    assert len(seen) == 25


@pytest.mark.parametrize("scale", [0.4, 0.7])
def test_an_image_smaller_than_the_crop_is_padded_by_as_much_as_there_is(scale):
    for result in draws(random_record(), Augment((H, W), (scale, scale), flip=False, pad=3), 20):
        rows, columns = (result["valid"].any(axis).nonzero()[0] for axis in (1, 0))
        assert (len(rows), len(columns)) == (round(H * scale), round(W * scale))
        assert 0 <= rows[0] <= 6
        assert 0 <= columns[0] <= 6


WHOLE = {"scale": (1.0, 1.4), "pad": 3}


@pytest.mark.parametrize("size", [(30, 40), (60, 50), (13, 19)])
def test_whole_images_are_cut_from_what_covers_the_crop(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    record = {"image": image, "label": np.uint8(7), "confidence": np.float32(0.5)}
    factor = max(12 / size[0], 16 / size[1])
    scaled = round(size[1] * factor), round(size[0] * factor)
    assert min(scaled[1] / 12, scaled[0] / 16) == 1
    whole = np.asarray(Image.fromarray(image).resize(scaled, Image.Resampling.BILINEAR)).astype(int)
    windows = [
        whole[y : y + 12, x : x + 16]
        for y, x in itertools.product(range(scaled[1] - 11), range(scaled[0] - 15))
    ]
    for seed in range(8):
        result = augment_whole(record, Augment((12, 16), flip=False), np.random.default_rng(seed))
        assert set(result) == {"image", "label", "confidence"}
        assert (result["label"], result["confidence"]) == (7, 0.5)
        assert min(abs(window - result["image"]).max() for window in windows) <= 1
    middle = whole[(scaled[1] - 12) // 2 :, (scaled[0] - 16) // 2 :][:12, :16]
    assert abs(fit(image, (12, 16)) - middle).max() <= 1
    np.testing.assert_array_equal(fit(image[:12, :16], (12, 16)), image[:12, :16])


def whole_draws(settings, count=200, record=None):
    record = record or {"image": random_record()["image"]}
    return [
        augment_whole(record, settings, np.random.default_rng(seed))["image"]
        for seed in range(count)
    ]


def test_gray_is_around_whole_images():
    record = {"image": np.full((H, W, 3), 200, np.uint8)}
    images = np.stack(whole_draws(Augment((H, W), pad=4, rotate=30.0), record=record))
    assert set(np.unique(images)) == {128, 200}
    assert 0.02 < (images == 128).mean() < 0.3


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({"randaugment": 1}, {}),
        ({"cutout": 8}, {}),
        ({"randaugment": 1, "cutout": 8}, {"cutout": 8}),
        ({"randaugment": 1, "cutout": 8}, {"randaugment": 1}),
        (
            {"randaugment": 2, "operations": "released"},
            {"randaugment": 1, "operations": "released"},
        ),
    ],
)
def test_operations_come_after_the_geometry_that_would_be_without_them(more, less):
    """What is not cut out, and images that the drawn operation leaves alone, stay as they were."""
    plain = whole_draws(Augment((20, 30), **WHOLE, **less))
    changed = whole_draws(Augment((20, 30), **WHOLE, **more))
    if "cutout" in more and "cutout" not in less:
        for a, b in zip(plain, changed, strict=True):
            different = (a != b).any(-1)
            cut = (b == randaugment.MEAN_COLOR).all(-1)
            assert (cut | ~different).all()
            assert 16 <= cut.sum() <= 64
    if "cutout" in less:
        for a, b in zip(plain, changed, strict=True):
            cut_before, cut = ((x == randaugment.MEAN_COLOR).all(-1) for x in (a, b))
            np.testing.assert_array_equal(cut, cut_before)
    same = np.mean([np.array_equal(a, b) for a, b in zip(plain, changed, strict=True)])
    assert same < 0.5
    if more.get("operations") is None and "cutout" not in more:
        assert same > 1 / 14 - 0.06  # "identity"


def test_a_flip_changes_no_draw_of_an_operation():
    """An image of one color shows it."""
    record = {"image": np.full((20, 30, 3), (70, 120, 160), np.uint8)}
    settings = {"randaugment": 1, "cutout": 6, "operations": "paper"}
    plain = whole_draws(Augment((20, 30), flip=False, **settings), record=record)
    flipped = whole_draws(Augment((20, 30), **settings), record=record)
    np.testing.assert_array_equal(plain, flipped)


@pytest.mark.parametrize(
    "fields",
    [{"pad": -1}, {"pad": 8}, {"randaugment": -1}, {"cutout": -2}, {"operations": "mine"}],
)
def test_impossible_operations_are_refused(fields):
    (name,) = fields
    with pytest.raises(UserError, match=f"{name}="):
        Augment(**{"crop": (8, 9), **fields})
