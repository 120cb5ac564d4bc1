"""Each operation beside its definition in NumPy, or beside Pillow's own."""

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image, ImageEnhance, ImageOps

from jaxssl.data import randaugment
from jaxssl.data.randaugment import OPERATIONS

H, W = 24, 32
IMAGE = np.random.default_rng(0).integers(10, 230, (H, W, 3), np.uint8)
PAPER = (
    *("identity", "autocontrast", "equalize", "rotate", "solarize", "color", "posterize"),
    *("contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"),
)
RELEASED = (*PAPER[1:], "invert", "solarize_add", "cutout")


def apply(which, name, level=10, direction=0.9, place=(0.5, 0.5)):
    """An operation at one of the strengths 1 to 10."""
    names = list(OPERATIONS[which])
    numbers = [(names.index(name) + 0.5) / len(names), (level - 0.5) / 10, direction, *place]
    return randaugment.change(IMAGE, which, np.array([numbers]))


def test_there_are_the_fourteen_and_the_sixteen():
    assert sorted(OPERATIONS["paper"]) == sorted(PAPER)
    assert sorted(OPERATIONS["released"]) == sorted(RELEASED)
    assert (len(PAPER), len(RELEASED)) == (14, 16)


@pytest.mark.parametrize("which", ["paper", "released"])
@pytest.mark.parametrize("level", [1, 4, 10])
def test_colors_follow_their_definitions(which, level):
    pixels = IMAGE.astype(int)
    np.testing.assert_array_equal(
        apply(which, "autocontrast", level), np.asarray(ImageOps.autocontrast(picture()))
    )
    np.testing.assert_array_equal(
        apply(which, "equalize", level), np.asarray(ImageOps.equalize(picture()))
    )
    threshold = 256 * (1 - level / 10 if which == "paper" else level / 10)
    expected = np.where(pixels < threshold, pixels, 255 - pixels)
    np.testing.assert_array_equal(apply(which, "solarize", level), expected)
    bits = int(8 - 4 * level / 10) if which == "paper" else int(4 * level / 10)
    expected = pixels >> (8 - bits) << (8 - bits)
    np.testing.assert_array_equal(apply(which, "posterize", level), expected)
    factor = 0.1 + 1.8 * level / 10
    gray = np.asarray(picture().convert("L")).astype(int)
    mean = int(gray.mean() + 0.5)
    for name, base in (("brightness", 0), ("contrast", mean), ("color", gray[..., None])):
        expected = np.clip(base + factor * (pixels - base), 0, 255)
        assert abs(apply(which, name, level) - expected).max() < 1 + 1e-3, name
    sharper = ImageEnhance.Sharpness(picture()).enhance(factor)
    np.testing.assert_array_equal(apply(which, "sharpness", level), np.asarray(sharper))


def picture():
    return Image.fromarray(IMAGE)


def moved(matrix, offset):
    """Pixel centers by nearest pixels in SciPy; black outside. x before y."""
    matrix, offset = np.array(matrix)[::-1, ::-1], np.array(offset)[::-1]
    offset = offset + (matrix - np.eye(2)) @ np.array([0.5, 0.5])  # of corners, not of centers
    return np.stack(
        [
            scipy.ndimage.affine_transform(IMAGE[..., i], matrix, offset, order=0, cval=0)
            for i in range(3)
        ],
        -1,
    )


@pytest.mark.parametrize("which", ["paper", "released"])
@pytest.mark.parametrize(("level", "direction"), [(1, 0.9), (3, 0.1), (7, 0.9), (10, 0.2)])
def test_places_follow_their_definitions(which, level, direction):
    sign, share = (1 if direction > 0.5 else -1), level / 10
    shear = sign * 0.3 * share
    far = {"paper": (0.45 * W, 0.45 * H), "released": (100, 100)}[which]
    turn = np.deg2rad(-sign * 30 * share)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    middle = np.array([W / 2, H / 2])
    for name, matrix, offset in (
        ("shear_x", [[1, shear], [0, 1]], (0, 0)),
        ("shear_y", [[1, 0], [shear, 1]], (0, 0)),
        ("translate_x", np.eye(2), (sign * share * far[0], 0)),
        ("translate_y", np.eye(2), (0, sign * share * far[1])),
        ("rotate", rotation, middle - rotation @ middle),
    ):
        found, expected = apply(which, name, level, direction), moved(matrix, offset)
        same = (found == expected).all(-1).mean()
        assert same > 0.93, (name, same)  # SciPy leaves a border of half a pixel black
        assert (found != IMAGE).any()


def test_what_the_released_code_has_more():
    np.testing.assert_array_equal(apply("released", "invert"), 255 - IMAGE)
    for level in (2, 10):
        added = np.minimum(IMAGE.astype(int) + int(11 * level), 255)
        expected = np.where(added < 128, added, 255 - added)
        np.testing.assert_array_equal(apply("released", "solarize_add", level), expected)
    found = apply("released", "cutout", 3, place=(0.5, 0.25))  # 12 pixels about row 12, column 8
    expected = IMAGE.copy()
    expected[6:19, 2:15] = (125, 123, 114)  # with its far edges
    np.testing.assert_array_equal(found, expected)
    at_corner = apply("released", "cutout", 1, place=(0.0, 0.0))
    expected = IMAGE.copy()
    expected[:5, :5] = (125, 123, 114)
    np.testing.assert_array_equal(at_corner, expected)


def test_identity_changes_nothing_and_operations_follow_one_another():
    np.testing.assert_array_equal(apply("paper", "identity"), IMAGE)
    names = list(OPERATIONS["released"])
    twice = [[(names.index("invert") + 0.5) / 16, 0, 0, 0, 0]] * 2
    np.testing.assert_array_equal(randaugment.change(IMAGE, "released", np.array(twice)), IMAGE)
    nothing = randaugment.change(IMAGE, "paper", np.zeros((0, 5)))
    np.testing.assert_array_equal(nothing, IMAGE)


def test_each_operation_is_as_likely():
    rng, counts = np.random.default_rng(0), {}
    expected = {
        name: randaugment.change(IMAGE, "released", np.array([[(i + 0.5) / 16, 0.95, 0.9, 0, 0]]))
        for i, name in enumerate(OPERATIONS["released"])
    }
    for _ in range(1600):
        numbers = rng.random((1, 5))
        numbers[0, 1:] = 0.95, 0.9, 0, 0
        found = randaugment.change(IMAGE, "released", numbers)
        # Both translations leave nothing but black, and count as one.
        name = next(n for n, array in expected.items() if np.array_equal(array, found))
        counts[name] = counts.get(name, 0) + 1
    assert counts.pop("translate_x") == pytest.approx(200, abs=60)
    assert min(counts.values()) > 60
    assert max(counts.values()) < 140


@pytest.mark.parametrize(
    ("place", "rows", "columns"),
    [
        ((0.5, 0.5), slice(4, 20), slice(8, 24)),
        ((0.0, 0.999), slice(0, 8), slice(23, 32)),
        ((0.999, 0.0), slice(15, 24), slice(0, 8)),
    ],
)
def test_cutout_is_a_square_about_a_pixel_inside_the_image(place, rows, columns):
    expected = IMAGE.copy()
    expected[rows, columns] = (125, 123, 114)
    np.testing.assert_array_equal(randaugment.cut_out(IMAGE, 16, np.array(place)), expected)
    np.testing.assert_array_equal(randaugment.cut_out(IMAGE, 0, np.array(place)), IMAGE)
