"""Contact sheets: what is drawn where, in which color."""

import numpy as np
import pytest
from PIL import Image

from jaxssl import panels
from jaxssl.contracts import DataInfo

INFO = DataInfo(
    classes=("road", "car", "sky"), palette=((128, 64, 128), (0, 0, 142), (70, 130, 180))
)


def labels(h, w, classes=3):
    return np.random.default_rng(0).integers(0, classes, (h, w)).astype(np.uint8)


def grown(tile, factor):
    return tile.repeat(factor, 0).repeat(factor, 1)


def contains(sheet, tile):
    """Whether `tile` is found in the sheet, pixel by pixel."""
    h, w, _ = tile.shape
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (h, w, 3))[:, :, 0]
    corners = np.argwhere((windows[..., 0, 0, :] == tile[0, 0]).all(-1))
    return any((windows[y, x] == tile).all() for y, x in corners)


def colors(pixels):
    return {tuple(color) for color in pixels.reshape(-1, 3).tolist()}


def test_small_tiles_grow_pixel_by_pixel():
    label = labels(32, 64)
    image = np.random.default_rng(1).integers(0, 256, (32, 64, 3)).astype(np.uint8)
    sheet = panels.panel([[image, label]], INFO, ["image", "truth"])
    assert sheet.dtype == np.uint8
    assert contains(sheet, grown(image, 4))
    assert contains(sheet, grown(np.array(INFO.palette, np.uint8)[label], 4))


def test_large_tiles_shrink():
    image = np.full((1024, 2048, 3), (9, 99, 199), np.uint8)
    label = np.zeros((1024, 2048), np.uint8)
    label[:, 1024:] = 1
    sheet = panels.panel([[image, label]], INFO, ["image", "truth"])
    assert contains(sheet, np.full((256, 512, 3), (9, 99, 199), np.uint8))
    half = np.array(INFO.palette, np.uint8)[[[0] * 256 + [1] * 256] * 256]
    assert contains(sheet, half)
    assert sheet.shape[1] < 1100


def test_ignored_pixels_are_dark_and_hatched():
    label = np.full((32, 64), 255, np.uint8)
    label[:, :32] = 1
    sheet = panels.panel([[label]], INFO, ["kept"])
    left, _, _ = np.argwhere((sheet == INFO.palette[1]).all(-1)[..., None])[0]
    tile = sheet[left : left + 128, -8 - 128 : -8]
    assert len(colors(tile)) == 2
    assert tile.max() < 128
    assert INFO.palette[1] not in colors(tile)


@pytest.mark.parametrize("present", [{0}, {0, 2}, {0, 1, 2}])
def test_legend_shows_the_classes_present(present):
    image = np.full((64, 256, 3), 255, np.uint8)
    label = np.full((64, 256), min(present), np.uint8)
    label[0, : len(present)] = sorted(present)
    sheet = panels.panel([[image, label]], INFO, ["image", "truth"])
    legend = sheet[-40:]
    assert {c for c in range(3) if INFO.palette[c] in colors(legend)} == present


def test_long_legend_takes_more_lines():
    many = DataInfo(
        classes=tuple(f"a class with number {i}" for i in range(12)),
        palette=tuple((20 * i, 100, 200) for i in range(12)),
    )
    label = np.arange(12, dtype=np.uint8).repeat(8)[None].repeat(48, 0)
    sheet = panels.panel([[label]], many, ["truth"])
    below = colors(sheet[-24 * 12 :])
    assert all(color in below for color in many.palette)
    assert sheet.shape[0] > 24 * 12


def test_rows_of_several_sizes_captions_and_titles():
    rows = [[labels(64, 128), labels(64, 128)], [labels(300, 200), labels(300, 200)]]
    plain = panels.panel(rows, INFO, ["student", "teacher"])
    captioned = panels.panel(rows, INFO, ["student", "teacher"], captions=["first", "second"])
    assert captioned.shape[0] > plain.shape[0]
    assert plain.shape[1] == 2 * 400 + 3 * 8
    title = plain[8:32]
    for column in (title[:, :400], title[:, 416:]):
        assert column.min() < 100  # there is ink


def test_tiles_and_titles_must_match():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        panels.panel([[labels(8, 8)]], INFO, ["image", "truth"])


def test_write(tmp_path):
    path = tmp_path / "panels" / "0000600.png"
    rows = [[labels(64, 128)]]
    for _ in range(2):
        picture = panels.write(path, rows, INFO, ["truth"])
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), picture)
    np.testing.assert_array_equal(picture, panels.panel(rows, INFO, ["truth"]))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_confusions_are_shaded_by_their_share():
    info = DataInfo(("a", "b", "c" * 90), ((0, 0, 0),) * 3, "classification")
    counts = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    picture = panels.confusion(counts, info)
    assert picture.dtype == np.uint8
    side = 44
    top, left = 8, picture.shape[1] - 8 - 3 * side
    cells = [[picture[top + side * i + 3, left + side * j + 3] for j in range(3)] for i in range(3)]
    darkest = np.array([8, 48, 107])
    for cell, share in zip(np.reshape(cells, (9, 3)), (counts / 4).ravel(), strict=True):
        np.testing.assert_allclose(cell, 255 + np.sqrt(share) * (darkest - 255.0), atol=1)


@pytest.mark.parametrize(("classes", "side"), [(20, 44), (100, 14)])
def test_confusions_fit_their_picture(classes, side):
    info = DataInfo(tuple(f"name {i}" for i in range(classes)), ((0, 0, 0),) * classes)
    picture = panels.confusion(np.eye(classes, dtype=int), info)
    assert classes * side < min(picture.shape[:2]) < classes * side + 120
    assert (picture[-24:] < 255).any()  # "predicted"
    beside, below = picture[8 : 8 + classes * side, 24:72], picture[8 + classes * side : -24]
    assert (beside < 200).any((1, 2)).reshape(classes, side).any(1).all()  # a name each
    assert (below < 200).any((0, 2))[-8 - classes * side : -8].reshape(classes, side).any(1).all()


def test_images_stand_side_by_side():
    small, large = np.full((8, 4, 3), 7, np.uint8), np.full((100, 512, 3), 9, np.uint8)
    picture = panels.sheet([small, large, small], ["a", "b" * 99, "c"], columns=2)
    assert picture.shape == (8 + 2 * 160, 8 + 2 * 136, 3)
    for top, left, height, width, value in (
        (8, 8, 128, 64, 7),
        (8, 144, 25, 128, 9),
        (168, 8, 128, 64, 7),
    ):
        assert (picture[top : top + height, left : left + width] == value).all()
        assert (picture[top : top + height, left + width : left + 136] == 255).all()
        below = picture[top + 128 : top + 152, left : left + 128]
        assert (below < 100).any()
