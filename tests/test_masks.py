import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from jaxssl.contracts import UnreadableError, UserError
from jaxssl.data import masks
from jaxssl.data.masks import ClassTable, ForeignValuesError, Seen, infer, parse, read, scan

IDS = np.array([[0, 1, 2], [2, 255, 0]], np.uint8)
LABELS = IDS  # of three classes that masks hold as they are
NAMES = ClassTable(("sky", "road", "car"), (0, 1, 2), (None, None, None))
COLORED = parse(["sky 0 0 255", "road 128 64 128", "car #ff0000", "ignore 0 0 0"], [255], "x")
RGB = np.array([[0, 0, 255], [128, 64, 128], [255, 0, 0]], np.uint8)


def save(path, array, mode=None, **options):
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def paletted(ids, colors):
    image = Image.fromarray(ids).convert("L")
    image.putpalette(np.array(colors, np.uint8).ravel().tolist())
    return image


def with_alpha(array):
    return np.dstack([array, np.full(array.shape[:2], 77, np.uint8)])


@pytest.mark.parametrize(
    ("line", "value", "name", "color"),
    [
        ("road", 0, "road", None),
        ("  traffic light ", 0, "traffic light", None),
        ("7 road", 7, "road", None),
        ("7: road, 128, 64, 128", 7, "road", (128, 64, 128)),
        ("road\t128 64 128", 0, "road", (128, 64, 128)),
        ("255,traffic light #0aFf00", 255, "traffic light", (10, 255, 0)),
        ("class 1", 0, "class 1", None),
        ("3d model", 0, "3d model", None),
    ],
)
def test_lines_of_a_class_table(line, value, name, color):
    other = "9 other" if line[0] in "72" else "other"
    table = parse(["", "# a comment", line, other], [], "classes.txt")
    assert (table.values[0], table.names[0], table.colors[0]) == (value, name, color)


def test_values_count_past_what_is_ignored():
    table = parse(["sky", "ignore", "road"], [0, 2], "x")
    assert table.values == (1, 4)  # the line "ignore" takes 3
    assert table.labels_of_values() == {0: 255, 1: 0, 2: 255, 3: 255, 4: 1}
    assert parse(table.lines, [0, 2], "x") == table
    assert parse(COLORED.lines, [255], "x") == COLORED


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["1 a", "b"], "1 of 2 lines begin with a value"),
        (["1 a", "1 b"], "two lines have the value 1"),
        (["a", "a"], "two lines have the name a"),
        (["a #000000", "b 0 0 0"], "two lines have the color"),
        (["a"], "there are 1 classes"),
        ([f"class{i}" for i in range(255)], "there are 255 classes"),
        (["64 128 64 Animal", "b"], "'64 128 64 Animal' is not understood"),
        (["a 0 0 256", "b"], "not understood"),
        (["70000 a", "1 b"], "not understood"),
    ],
)
def test_wrong_class_tables_are_refused(lines, words):
    with pytest.raises(UserError, match=words) as error:
        parse(lines, [255], "FILE")
    assert str(error.value).startswith("FILE")


def test_default_palette_is_that_of_pascal_voc():
    # aeroplane, bicycle, bird, boat, ..., tv/monitor as the development kit's images show them.
    palette = masks.default_palette(256)
    assert palette[:5] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))
    assert palette[20] == (0, 64, 128)
    assert palette[255] == (224, 224, 192)
    assert len(set(palette)) == 256


@pytest.mark.parametrize("kind", ["L", "P", "LA", "I;16", "gray RGB", "RGBA", "tiff", "bmp"])
def test_ids_are_read_from_every_format_that_keeps_them(tmp_path, kind):
    path = tmp_path / {"tiff": "m.TIF", "bmp": "m.bmp"}.get(kind, "m.png")
    image = {
        "P": paletted(IDS, [[9, 9, 200]] * 256),
        "LA": Image.fromarray(IDS).convert("LA"),
        "I;16": Image.fromarray(IDS.astype(np.uint16)),
        "gray RGB": Image.fromarray(np.dstack([IDS] * 3)),
        "RGBA": Image.fromarray(with_alpha(np.dstack([IDS] * 3))),
    }.get(kind, Image.fromarray(IDS))
    image.save(path)
    labels = read(path, NAMES)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, LABELS)


def test_colors_are_looked_up(tmp_path):
    picture = np.array([[RGB[2], RGB[0]], [[0, 0, 0], RGB[1]]], np.uint8)
    expected = [[2, 0], [255, 1]]
    np.testing.assert_array_equal(read(save(tmp_path / "a.png", picture), COLORED), expected)
    picture = with_alpha(picture)
    np.testing.assert_array_equal(read(save(tmp_path / "b.png", picture), COLORED), expected)
    black = np.zeros((2, 2, 3), np.uint8)  # gray, and a color of the table
    np.testing.assert_array_equal(read(save(tmp_path / "c.png", black), COLORED), 255)
    np.testing.assert_array_equal(read(save(tmp_path / "d.png", IDS), COLORED), LABELS)


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "P"])
def test_black_and_white_is_background_and_foreground(tmp_path, mode):
    expected = np.array([[0, 1], [1, 0]])
    path = save(tmp_path / "m.png", (255 * expected).astype(np.uint8), mode)
    table = parse(infer(scan([path]), [255])[0], [255], "x")
    assert table.names == ("background", "foreground")
    np.testing.assert_array_equal(read(path, table), expected)


def test_one_bit_is_an_id_among_ids(tmp_path):
    bits = save(tmp_path / "bits.png", np.array([[0, 255]], np.uint8), "1")
    ids = save(tmp_path / "ids.png", np.array([[0, 1]], np.uint8))
    lines, _ = infer(scan([bits, ids]), [255])
    np.testing.assert_array_equal(read(bits, parse(lines, [255], "x")), [[0, 1]])


@pytest.mark.parametrize(
    ("array", "table", "counts", "words"),
    [
        (np.array([[0, 3], [3, 9]], np.uint8), NAMES, {3: 2, 9: 1}, "class id 3, 9"),
        (np.array([[0, 300]], np.uint16), NAMES, {300: 1}, "class id 300"),
        (np.array([[0, 70000]], np.int32), NAMES, {70000: 1}, "class id 70000. Export it"),
        (np.array([[0, -1]], np.int32), NAMES, {-1: 1}, "class id -1. Export it"),
        (np.array([[RGB[0], [1, 2, 3]]], np.uint8), COLORED, {"#010203": 1}, "color #010203"),
        (np.full((1, 2, 3), 7, np.uint8), NAMES, {7: 2}, "class id 7"),
    ],
)
def test_values_of_no_class_name_the_file(tmp_path, array, table, counts, words):
    path = save(tmp_path / "m.tif", array)
    with pytest.raises(ForeignValuesError, match=words) as error:
        read(path, table)
    assert error.value.counts == counts
    assert str(path) in str(error.value)
    again = pickle.loads(pickle.dumps(error.value))  # as worker processes send it
    assert (str(again), again.counts) == (str(error.value), counts)


def test_what_keeps_no_exact_values_is_refused(tmp_path):
    jpeg = save(tmp_path / "m.png", IDS, format="JPEG")
    with pytest.raises(UserError, match=r"m\.png is a JPEG file.*blends values"):
        read(jpeg, NAMES)
    with pytest.raises(UserError, match="JPEG"):
        scan([jpeg])
    depth = save(tmp_path / "f.tif", IDS.astype(np.float32))
    with pytest.raises(UserError, match="mode F"):
        read(depth, NAMES)
    torn = save(tmp_path / "torn.png", IDS)
    torn.write_bytes(torn.read_bytes()[:45])
    with pytest.raises(UnreadableError, match=r"torn\.png"):
        read(torn, NAMES)
    with pytest.raises(UserError, match=r"None of 2 masks can be read.*torn\.png"):
        scan([torn, torn])
    assert scan([torn, save(tmp_path / "ids.png", IDS)]).values.keys() == {0, 1, 2, 255}


def test_all_masks_that_are_refused_are_counted_and_ten_named(tmp_path):
    ids, torn = save(tmp_path / "ids.png", IDS), tmp_path / "torn.png"
    torn.write_bytes(ids.read_bytes()[:45])
    bad = [save(tmp_path / f"{i}.png", IDS, format="JPEG") for i in range(11)]
    bad.append(save(tmp_path / "f.tif", IDS.astype(np.float32)))
    with pytest.raises(UserError, match=r"^12 of 14 masks are refused:\n") as error:
        scan([ids, bad[-1], torn, *bad[:-1]])
    lines = str(error.value).splitlines()[1:]
    assert "f.tif has mode F" in lines[0]
    assert [line.split(" is a")[0] for line in lines[1:10]] == [f"  The mask {p}" for p in bad[:9]]
    assert lines[10:] == ["  and 2 more"]


@pytest.mark.parametrize(
    ("values", "ignore", "names", "kept"),
    [
        ({0, 2}, [255], ["class 0", "class 1", "class 2"], (0, 1, 2)),
        ({0, 1, 255}, [255], ["class 0", "class 1"], (0, 1)),
        ({0, 255}, [255], ["background", "foreground"], (0, 255)),
        ({0, 1, 2}, [0], ["class 1", "class 2"], (1, 2)),
        ({0, 127, 255}, [], ["class 0", "class 127", "class 255"], (0, 127, 255)),
        ({0, 90, 200}, [255], ["class 0", "class 90", "class 200"], (0, 90, 200)),
        (range(150), [255], [f"class {i}" for i in range(150)], tuple(range(150))),
    ],
)
def test_classes_are_inferred_from_values(tmp_path, values, ignore, names, kept):
    lines, _ = infer(Seen(values=dict.fromkeys(values, tmp_path)), ignore)
    table = parse(lines, ignore, "x")
    assert (list(table.names), table.values) == (names, kept)


def test_black_that_is_ignored_is_no_background(tmp_path):
    lines, _ = infer(Seen(values=dict.fromkeys((0, 255), tmp_path)), [0])
    with pytest.raises(UserError, match="there are 1 classes"):
        parse(lines, [0], "x")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (range(255), "255 values up to 254: 0, 1, 2, 3, 4, 5, 6, 7 and 247 more. .*FILE.*smoothed"),
        ([0, 1, 2, 3, 90], "5 values up to 90: .*FILE"),
        ([*range(9), *range(240, 256)], r"smoothed[^!]*7 road\.$"),  # a JPEG's traces
        ([0, 127, 255], 'Is 255 a class.*: "0 NAME" and so on, and "255 NAME" or "255 ignore"'),
    ],
)
def test_values_that_are_hardly_classes_are_refused(values, words):
    with pytest.raises(UserError, match=words):
        infer(Seen(values=dict.fromkeys(values, Path("FILE"))), [255])


@pytest.mark.parametrize("above", [[254], [250, 254], [200], [65534, 65535]])
def test_advice_for_values_above_the_classes_works(tmp_path, above):
    seen = Seen(values=dict.fromkeys((0, 1, 3, *above, 255), tmp_path))
    with pytest.raises(UserError) as error:
        infer(seen, [255])
    ignore = [int(i) for i in re.findall(r"ignore=([\d,]+)", str(error.value))[0].split(",")]
    assert ignore == [255, *above]
    lines, _ = infer(seen, ignore)
    assert parse(lines, ignore, "x").values == (0, 1, 2, 3)


def test_advice_for_classes_without_a_color_works(tmp_path):
    path = save(tmp_path / "m.png", np.array([[RGB[0], RGB[1], RGB[2]]], np.uint8))
    table = parse(["sky", "road"], [255], "x")
    with pytest.raises(ForeignValuesError, match=r"0 colors .* sky, road: append") as error:
        read(path, table)
    assert all(f"#{bytes(color).hex()}" in str(error.value) for color in RGB.tolist())
    assert re.findall(r'"([^"]+)"', str(error.value)) == ["sky #0000ff", "ignore #0000ff"]
    lines = ["sky #0000ff", "road"]
    with pytest.raises(ForeignValuesError, match=r"1 colors .* for road: append") as error:
        read(path, parse(lines, [255], "x"))
    assert re.findall(r'"([^"]+)"', str(error.value)) == ["road #804080", "ignore #804080"]
    lines = ["sky #0000ff", "road #804080", "ignore #ff0000"]
    assert read(path, parse(lines, [255], "x")).tolist() == [[0, 1, 255]]


def test_classes_that_colors_cannot_show_are_said(tmp_path):
    color = save(tmp_path / "c.png", np.array([[RGB[0], RGB[1]]], np.uint8))
    ids = save(tmp_path / "i.png", np.array([[0, 2]], np.uint8))
    table = parse(["sky 0 0 255", "road 128 64 128", "car", "bus"], [255], "x")
    (note,) = masks.check_palettes([color], table)
    assert note.endswith("without one are not found: car, bus")
    assert masks.check_palettes([ids], table) == ()
    assert masks.check_palettes([color], COLORED) == ()


def test_advice_for_foreign_values_works(tmp_path):
    ids = save(tmp_path / "ids.png", np.array([[0, 9, 3]], np.uint8))
    with pytest.raises(ForeignValuesError, match='"3 NAME"') as error:
        read(ids, NAMES)
    ignore = [int(i) for i in re.findall(r"ignore=([\d,]+)", str(error.value))[0].split(",")]
    assert read(ids, parse(NAMES.lines, ignore, "x")).tolist() == [[0, 255, 255]]
    assert read(ids, parse([*NAMES.lines, "3 x", "9 y"], [255], "x")).tolist() == [[0, 4, 3]]
    rgb = save(tmp_path / "rgb.png", np.array([[RGB[1], [1, 2, 3]]], np.uint8))
    with pytest.raises(ForeignValuesError) as error:
        read(rgb, COLORED)
    for line, label in zip(re.findall(r'"(\w+ #\w+)"', str(error.value)), (3, 255), strict=True):
        assert read(rgb, parse([*COLORED.lines, f"9 {line}"], [255], "x")).tolist() == [[1, label]]


R, G, B, K, W = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255)


@pytest.mark.parametrize(
    ("palettes", "lines", "expected"),
    [
        ([[K, R], [G, K, R], [R]], None, [[0, 2], [1, 0, 2], [2]]),
        ([[K, R], [G, K, R]], ["a #ff0000", "ignore #00ff00", "b #000000"], [[1, 0], [255, 1, 0]]),
        ([[W, K], [K]], ["dark #000000", "light #ffffff"], [[1, 0], [0]]),
        ([[K, R, G]], ["a #00ff00", "b #ff0000", "c #000000"], [[2, 1, 0]]),
        # Values count where palettes agree, have colors that the table has not, or say nothing.
        ([[K, R, G], [K, R]], None, [[0, 1, 2], [0, 1]]),
        ([[K, R, G], [K, R]], ["a #0000ff", "b #ffffff", "c #010203"], [[0, 1, 2], [0, 1]]),
        ([[K, K, K]], ["a #ff0000", "b #00ff00", "c #000000"], [[0, 1, 2]]),
        ([[(i,) * 3 for i in range(3)]], ["a #020202", "b", "c #000000"], [[0, 1, 2]]),
    ],
)
def test_palettes_that_differ_are_read_by_their_colors(tmp_path, palettes, lines, expected):
    paths = [tmp_path / f"{i}.png" for i in range(len(palettes))]
    for path, palette in zip(paths, palettes, strict=True):
        ids = np.arange(len(palette), dtype=np.uint8)[None]
        paletted(ids, palette).save(path, transparency=bytes(len(palette)))
    table = parse(lines or infer(scan(paths), [255])[0], [255], "x")
    by_color = any(e != [*range(len(e))] for e in expected)
    assert bool(masks.check_palettes(paths, table)) == by_color
    assert [read(path, table)[0].tolist() for path in paths] == expected
    assert parse(table.lines, [255], "x") == table


@pytest.mark.parametrize(
    ("palettes", "lines"),
    [
        ([[K, R], [G, R]], ["a", "b"]),  # value 0 in two colors
        ([[K, R], [K, G, R]], ["a #000000", "b #ff0000", "c #0000ff"]),  # and red by two values
        ([[W, K], [K, W]], None),  # gray levels, or black and white?
    ],
)
def test_palettes_that_differ_need_all_colors_in_the_table(tmp_path, palettes, lines):
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path, palette in zip(paths, palettes, strict=True):
        paletted(np.arange(len(palette), dtype=np.uint8)[None], palette).save(path)
    with pytest.raises(UserError, match=r'[01]\.png and .*[01]\.png differ.*"NAME #RRGGBB"'):
        masks.check_palettes(paths, parse(lines or infer(scan(paths), [255])[0], [255], "x"))


def test_classes_are_inferred_from_palettes_and_colors(tmp_path):
    path = tmp_path / "p.png"
    paletted(IDS, [[5, 6, 7], [1, 2, 3], [9, 8, 7]] + [[0, 0, 0]] * 253).save(path)
    lines, _ = infer(scan([path]), [255])
    assert parse(lines, [255], "x").info.palette == ((5, 6, 7), (1, 2, 3), (9, 8, 7))
    path = save(tmp_path / "c.png", RGB[IDS % 3])
    lines, _ = infer(scan([path]), [255])
    table = parse(lines, [255], "x")
    assert table.colors == ((0, 0, 255), (128, 64, 128), (255, 0, 0))
    np.testing.assert_array_equal(read(path, table), IDS % 3)


def test_what_cannot_be_inferred_is_refused_with_the_reason(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    ids, color = save(tmp_path / "ids.png", IDS), save(tmp_path / "rgb.png", RGB[IDS % 3])
    for paths, words in (
        ([save(tmp_path / "n.png", noise)], "n.png holds more than 64 colors"),
        ([save(tmp_path / "s.png", noise[..., 0])], r"s.png holds \d+ values, .*smoothed"),
        ([ids, color], "ids.png, some hold colors, such as .*rgb.png"),
        ([save(tmp_path / "i.png", np.array([[0, 26001]], np.uint16))], "i.png holds the value 26"),
        ([save(tmp_path / "0.png", 0 * IDS)], "no two classes"),
    ):
        with pytest.raises(UserError, match=words):
            infer(scan(paths), [255])


def regions(ids, size, seed=0):
    """A mask of as many objects as ids, each the place nearest to its point."""
    points = np.random.default_rng(seed).random((len(ids), 2)) * size
    places = np.stack(np.mgrid[:size, :size], axis=-1)[:, :, None]
    return np.asarray(ids, np.uint8)[((places - points) ** 2).sum(-1).argmin(-1)]


def outlined(mask):
    """With the border of 255 that PASCAL VOC draws around objects."""
    edge = (np.diff(mask, axis=0, prepend=0) != 0) | (np.diff(mask, axis=1, prepend=0) != 0)
    return np.where(edge, 255, mask).astype(np.uint8)


def disks(size):
    places, centers = np.mgrid[:size, :size], [(0.3, 0.3, 0.2), (0.7, 0.6, 0.25), (0.2, 0.8, 0.1)]
    inside = [
        np.hypot(places[0] - y * size, places[1] - x * size) < r * size for y, x, r in centers
    ]
    return np.where(np.any(inside, 0), 255, 0).astype(np.uint8)


@pytest.mark.parametrize(
    ("mask", "size"),
    [
        (regions(np.arange(97), 64), 64),
        (regions(np.arange(150), 128), 128),
        (regions(np.arange(600) % 150, 160), 90),
        (outlined(regions(np.arange(90), 128)), 128),
    ],
)
def test_many_classes_in_a_mask_are_told_from_smoothing(tmp_path, mask, size):
    image = Image.fromarray(mask)
    image.resize((size, size), Image.Resampling.NEAREST).save(tmp_path / "m.png")
    found = scan([tmp_path / "m.png"]).values.keys()
    assert found <= {*np.unique(mask)}
    assert len(found) > masks.MOST_COLORS


@pytest.mark.parametrize("how", ["BILINEAR", "BICUBIC", "LANCZOS", "enlarged", "blurred", "JPEG"])
@pytest.mark.parametrize(
    "mask",
    [disks(300), outlined(regions(np.arange(120) % 21, 300)), regions(np.arange(300) % 150, 300)],
    ids=["black and white", "21 ids and their border", "150 ids"],
)
def test_smoothed_masks_are_refused(tmp_path, mask, how):
    image, path = Image.fromarray(mask), tmp_path / "m.png"
    if how == "JPEG":
        image.save(tmp_path / "m.jpg", quality=50)
        image = Image.open(tmp_path / "m.jpg")
    elif how == "blurred":
        image = image.filter(ImageFilter.GaussianBlur(1))
    elif how == "enlarged":
        image = image.resize((731, 731), Image.Resampling.BILINEAR)
    else:
        image = image.resize((170, 170), Image.Resampling[how])
    image.save(path)
    assert len(np.unique(np.asarray(image))) > masks.MOST_COLORS
    with pytest.raises(UserError, match=r"m\.png holds \d+ values, .*smoothed"):
        scan([path])
