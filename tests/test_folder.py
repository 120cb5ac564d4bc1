import pickle
import shutil
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from jaxssl.contracts import Stream, UnreadableError, UserError
from jaxssl.data import folder, layouts, loading, masks
from jaxssl.data.files import open_image
from jaxssl.data.pipeline import Feed, batches
from jaxssl.data.transforms import Augment

DATA = {
    "name": "folder",
    "split": "all",
    "seed": 0,
    "extra": True,
    "classes": (),
    "ignore": (255,),
}


def picture(seed, size=(9, 13)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def ids_of(seed, size=(9, 13)):
    return np.random.default_rng(seed).choice(np.array([0, 1, 2, 255], np.uint8), size)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def add(root, image, mask, seed):
    """Writes an image, and a mask where it has a name."""
    save(root / image, picture(seed))
    if mask:
        save(root / mask, ids_of(seed))


def data(root, **changes):
    return DATA | {"root": str(root)} | changes


# Layout -> (image, mask) of: two labeled images, an unlabeled one, and one for validation; and ids.
LAYOUTS = {
    "images and labels": (
        [
            ("images/a b.png", "labels/a b.png"),
            ("images/in/c.PNG", "labels/in/c_mask.png"),
            ("unlabeled/a b.png", ""),
            ("val/images/a b.png", "val/labels/a b.png"),
        ],
        (["a b", "in/c"], ["unlabeled/a b"], ["val/a b"]),
    ),
    "an image without a mask": (
        [
            ("imgs/a_img.png", "Masks/a_gt.PNG"),
            ("imgs/b_img.png", "Masks/b_gt.png"),
            ("imgs/u_img.png", ""),
            ("validation/imgs/v.png", "validation/masks/v_labelIds.png"),
        ],
        (["a_img", "b_img"], ["u_img"], ["val/v"]),
    ),
    "training and validation": (
        [
            ("images/training/a.png", "annotations/training/a.png"),
            ("images/training/b.png", "annotations/training/b.png"),
            ("unlabeled/c.png", ""),
            ("images/validation/v.png", "annotations/validation/v.png"),
        ],
        (["a", "b"], ["unlabeled/c"], ["val/v"]),
    ),
    "pairs of folders": (
        [
            ("train/0001.png", "trainannot/0001.png"),
            ("train/0002.png", "trainannot/0002_L.png"),
            ("unlabeled/x/0003.png", ""),
            ("val/0009.png", "valannot/0009.png"),
        ],
        (["0001", "0002"], ["unlabeled/x/0003"], ["val/0009"]),
    ),
    "parts in images and labels": (
        [
            ("images/train/a.png", "labels/train/a.png"),
            ("images/train/b.png", "labels/train/b.png"),
            ("images/unlabeled/c.png", ""),
            ("images/val/a.png", "labels/val/a.png"),
        ],
        (["a", "b"], ["unlabeled/c"], ["val/a"]),
    ),
    "images and labels in parts": (
        [
            ("train/images/a.png", "train/masks/a.png"),
            ("train/images/b.png", "train/masks/b.png"),
            ("unlabeled/images/c.png", ""),
            ("valid/images/a.png", "valid/masks/a.png"),
        ],
        (["a", "b"], ["unlabeled/c"], ["val/a"]),
    ),
    "pascal voc": (
        [
            ("JPEGImages/2007_000032.png", "SegmentationClass/2007_000032.png"),
            ("JPEGImages/2007_000039.png", "SegmentationClass/2007_000039.png.png"),
            ("JPEGImages/2007_000027.png", ""),
            ("val/images/v.png", "val/labels/v.png"),
        ],
        (["2007_000032", "2007_000039"], ["2007_000027"], ["val/v"]),
    ),
    "lists": (
        [
            ("x/a b.png", "y/a m.png"),
            ("x/c.png", "y/c.png"),
            ("x/d.png", ""),
            ("z/v.png", "y/v.png"),
        ],
        (["x/a b", "x/c"], ["x/d"], ["z/v"]),
    ),
}


def build(root, layout):
    files, _ = LAYOUTS[layout]
    for seed, (image, mask) in enumerate(files):
        add(root, image, mask, seed)
    if layout == "lists":
        (root / "train.txt").write_text("x/a b.png y/a m.png\n\nx/c.png\ty/c.png\n")
        (root / "unlabeled.txt").write_text("x/d.png\n")
        (root / "val.txt").write_text("z/v.png y/v.png\n")
    return root


def pairs(images, labels, names):
    return [(f"{images}/{name}.png", f"{labels}/{name}.png") for name in names]


WHOLE = pairs("images", "labels", "abc")
BESIDE = [*pairs("train", "trainannot", "ab"), *pairs("val", "valannot", "vw")]
VAL_IMAGES = [(image, "") for image, _ in BESIDE[2:]]


def plant(root, files, lists):
    for seed, (image, mask) in enumerate(files):
        add(root, image, mask, seed)
    for name, lines in lists.items():
        (root / f"{name}.txt").write_text("\n".join(lines))
    return root


@pytest.mark.parametrize(
    ("files", "lists", "expected"),
    [
        (
            BESIDE,
            {"train": ["train/b.png trainannot/b.png"], "val": ["val/w.png valannot/w.png"]},
            (["train/b"], [], ["val/w"]),
        ),
        (BESIDE, {"train": ["b"], "val": ["w.png"]}, (["b"], [], ["val/w"])),
        (
            BESIDE,  # as CamVid is published
            {"train": ["/SegNet/CamVid/train/b.png /SegNet/CamVid/trainannot/b.png"]},
            (["train/b"], [], ["val/v", "val/w"]),
        ),
        ([*WHOLE, *BESIDE[2:]], {"train": ["a", "b"]}, (["a", "b"], [], ["val/v", "val/w"])),
        (
            [*WHOLE, *pairs("val/images", "val/labels", "a"), ("unlabeled/a.png", "")],
            {"train": ["a", "b"]},
            (["a", "b"], ["unlabeled/a"], ["val/a"]),
        ),
        (WHOLE, {"val": ["c"]}, (["a", "b"], [], ["c"])),
        (WHOLE, {"valid": ["c"], "unlabeled": ["a"]}, (["b"], ["a"], ["c"])),
        (
            [*WHOLE, ("unlabeled/a.png", ""), ("unlabeled/u.png", "")],
            {"unlabeled": ["u"], "val": ["images/c.png labels/c.png"]},
            (["a", "b"], ["unlabeled/u"], ["images/c"]),
        ),
        ([*WHOLE, *BESIDE[2:]], {}, (["a", "b", "c"], [], ["val/v", "val/w"])),
        (
            [*WHOLE, *pairs("images/val", "labels/val", "ab"), ("images/unlabeled/u.png", "")],
            {},
            (["a", "b", "c"], ["unlabeled/u"], ["val/a", "val/b"]),
        ),
    ],
)
def test_each_part_comes_from_its_list_or_else_from_its_folders(tmp_path, files, lists, expected):
    tree = layouts.find(plant(tmp_path, files, lists))
    unlabeled = sorted(tree.images.keys() - tree.labels.keys())
    assert (list(tree.labels), unlabeled, list(tree.val_images)) == expected
    used = [(path, tree.labels[i]) for i, path in tree.images.items() if i in tree.labels]
    used += [(path, tree.val_labels[i]) for i, path in tree.val_images.items()]
    assert {*used} <= {*files}


@pytest.mark.parametrize(
    ("files", "lists", "note"),
    [
        ([*WHOLE, *VAL_IMAGES], {}, "val/ is not used: expected are val/images/ and"),
        ([*WHOLE, *((mask, "") for _, mask in BESIDE[2:])], {}, "valannot/ is not used: expected "),
        ([*BESIDE[:2], *VAL_IMAGES], {}, "val/ is not used: expected are "),
        ([*WHOLE, ("images/val/v.png", "")], {}, None),  # an image of training, without a mask
        (
            [*pairs("images/train", "labels/train", "ab"), ("images/val/v.png", "")],
            {},
            "images/val/ is not used: expected are ",
        ),
        ([*WHOLE, *pairs("masks", "x", "a")], {}, "masks/ is not used: the train images are in im"),
        ([*WHOLE, *BESIDE[2:]], {"val": ["c"]}, "valannot/ is not used: the val images are in val"),
        (WHOLE, {"val": ["c"], "valid": ["b"]}, "valid.txt is not used: the val images are in val"),
        (
            [*WHOLE, ("unlabeled/u.png", ""), ("v.png", "")],
            {"unlabeled": ["v.png"]},
            "unlabeled/ is not used: the unlabeled images are in unlabeled.txt",
        ),
    ],
)
def test_what_is_named_like_a_part_and_not_used_is_said(tmp_path, files, lists, note):
    notes = layouts.find(plant(tmp_path, files, lists)).notes
    assert any(line.startswith(note) for line in notes) if note else "not used" not in str(notes)


def test_boxes_of_pascal_voc_are_no_masks(tmp_path):
    root = build(tmp_path, "pascal voc")
    (root / "Annotations").mkdir()
    (root / "Annotations/2007_000032.xml").write_text("<annotation/>")
    tree = layouts.find(root)
    assert len(tree.labels) == 2
    assert tree.notes[0].startswith("Annotations/ is not used")


@pytest.mark.parametrize("suffix", ["", ".png"])
def test_lists_may_name_files_in_images_and_labels(tmp_path, suffix):
    for seed, name in enumerate(["a b", "in/c", "d", "v"]):
        add(tmp_path, f"images/{name}.png", f"labels/{name}_mask.png", seed)
    save(tmp_path / "labels/stranger.txt.png", ids_of(0))
    for part, names in (("train", ["a b", "in/c"]), ("unlabeled", ["d"]), ("val", ["v"])):
        (tmp_path / f"{part}.txt").write_text("".join(f"{name}{suffix}\n" for name in names))
    with pytest.raises(UserError, match="stranger"):
        layouts.find(tmp_path)
    (tmp_path / "labels/stranger.txt.png").unlink()
    split, sources = loading.training_sets(data(tmp_path))
    assert split.labeled == ("a b", "in/c")
    assert split.unlabeled == ("d",)
    np.testing.assert_array_equal(sources["labeled"][1]["label"], ids_of(1))
    assert loading.load(data(tmp_path), "val", labels=True)[0]["id"] == "v"


def test_a_name_in_another_encoding_is_shown(tmp_path):
    root = build(tmp_path, "images and labels")
    try:
        save(root / "unlabeled/caf\udce9.png", picture(0))
    except OSError:
        pytest.skip("this file system has UTF-8 names alone")
    with pytest.raises(UserError, match=r"b'unlabeled/caf\\xe9\.png' is not UTF-8"):
        layouts.find(root)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_recognized(tmp_path, layout):
    root, expected = build(tmp_path, layout), LAYOUTS[layout][1]
    assert layouts.find(root).notes == ()
    (root / LAYOUTS[layout][0][0][0]).with_name("._hidden.png").write_bytes(b"")
    split, sources = loading.training_sets(data(root))
    val = loading.load(data(root), "val", labels=True)
    assert (list(split.labeled), list(split.unlabeled), list(val.ids)) == expected
    places = [(sources["labeled"], 0), (sources["labeled"], 1), (sources["unlabeled"], 0), (val, 0)]
    for seed, (source, index) in enumerate(places):
        record = source[index]
        np.testing.assert_array_equal(record["image"], picture(seed))
        assert record["id"] == source.ids[index]
        assert ("label" in record) == (source is not sources["unlabeled"])
        if "label" in record:
            np.testing.assert_array_equal(record["label"], ids_of(seed))
    assert val.info.classes == ("class 0", "class 1", "class 2")


def test_a_tenth_is_held_out_where_there_is_no_validation(tmp_path):
    for seed in range(25):
        add(tmp_path, f"images/{seed}.png", f"labels/{seed}.png", seed)
    held = [loading.load(data(tmp_path, seed=seed), "val", labels=True).ids for seed in (0, 1)]
    split, _ = loading.training_sets(data(tmp_path))
    assert len(held[0]) == 2
    assert held[0] == held[1]
    assert not set(held[0]) & {*split.labeled, *split.unlabeled}
    assert len(split.labeled) == 23
    assert "2 of the labeled ones are held out" in " ".join(folder.look(data(tmp_path)).notes)


def test_masks_of_unlabeled_images_are_never_opened(tmp_path, monkeypatch):
    for seed in range(40):
        add(tmp_path, f"images/{seed}.png", f"labels/{seed}.png", seed)
    opened = []
    monkeypatch.setattr(masks, "open_image", lambda path: opened.append(path) or open_image(path))
    config = data(tmp_path, split="1_8")
    split, sources = loading.training_sets(config)
    val = loading.load(config, "val", labels=True)
    assert (len(split.labeled), len(split.unlabeled), len(val)) == (5, 31, 4)
    folder.look(config)
    feeds = [
        Feed(Stream("labeled", 2), sources["labeled"], Augment((8, 8))),
        Feed(Stream("unlabeled", 2, labels=None), sources["unlabeled"], Augment((8, 8))),
    ]
    with batches(feeds, seed=0, phase_index=0, start=0, steps=20) as iterator:
        for batch in iterator:
            assert "label" in batch["labeled"]
            assert "label" not in batch["unlabeled"]
    assert {path.stem for path in opened} == {*split.labeled, *val.ids}


def test_a_folder_without_unlabeled_images_says_what_to_do(tmp_path):
    for seed in range(4):
        add(tmp_path, f"images/{seed}.png", f"labels/{seed}.png", seed)
    _, sources = loading.training_sets(data(tmp_path))
    assert len(sources["unlabeled"]) == 0
    feed = Feed(Stream("unlabeled", 2, labels=None), sources["unlabeled"], Augment((8, 8)))
    with pytest.raises(UserError, match=r"no images.*data\.split.*supervised"):
        batches([feed], seed=0, phase_index=0, start=0, steps=1)


def test_classes_file_names_and_numbers_classes(tmp_path):
    root = build(tmp_path, "images and labels")
    (root / "classes.txt").write_text("\ufeff2 car 9 8 7\n0 sky\n1 ignore\n", encoding="utf-8")
    source = loading.load(data(root), "train", labels=True)
    assert source.info.classes == ("car", "sky")
    assert source.info.palette == ((9, 8, 7), (128, 0, 0))
    expected = np.select([ids_of(0) == 2, ids_of(0) == 0], [0, 1], 255)
    np.testing.assert_array_equal(source[0]["label"], expected)
    settled = data(root, classes=folder.look(data(root)).classes)
    (root / "classes.txt").unlink()
    np.testing.assert_array_equal(loading.load(settled, "train", labels=True)[0]["label"], expected)
    (root / "classes.txt").write_text("sky\ncar\n")
    notes = " ".join(folder.look(data(root, ignore=(0, 255))).notes)
    assert "the names pass over 0, 255: 1 is sky, 2 is car" in notes
    assert "pass over" not in " ".join(folder.look(data(root)).notes)
    (root / "classes.txt").unlink()
    ignoring = loading.load(data(root, ignore=(0, 255)), "train", labels=True)
    assert ignoring.info.classes == ("class 1", "class 2")


@pytest.mark.parametrize("in_config", [False, True])
def test_two_names_for_black_and_white(tmp_path, in_config):
    mask = np.array([[0, 255]], np.uint8).repeat(9, 0).repeat(4, 1)
    for name in "ab":
        save(tmp_path / f"images/{name}.jpg", picture(0, (9, 8)))
        save(tmp_path / f"labels/{name}.png", mask)
    config_data = data(tmp_path)
    if in_config:
        config_data["classes"] = ("background", "cell")
    else:
        (tmp_path / "classes.txt").write_text("background\ncell\n")
    source = loading.load(config_data, "train", labels=True)
    np.testing.assert_array_equal(source[0]["label"], mask // 255)
    assert "255 is cell" in " ".join(folder.look(config_data).notes)


@pytest.mark.parametrize(
    ("value", "lines", "opened", "words"),
    [
        (1, ["background", "cell"], 2, None),  # a sample shows that 255 is no class
        (255, ["background", "cell"], 8, "6 masks to see whether 255 is a class. The values 0 and"),
        (255, ["0 background", "255 cell"], 0, None),
        (255, None, 6, "6 masks to see what the classes are. A classes.txt saves this"),
    ],
)
def test_masks_are_looked_at_only_where_need_be(
    tmp_path, monkeypatch, capsys, value, lines, opened, words
):
    for number in range(6):
        save(tmp_path / f"images/{number}.png", picture(0))
        save(tmp_path / f"labels/{number}.png", np.array([[0, value]], np.uint8))
    if lines:
        (tmp_path / "classes.txt").write_text("\n".join(lines))
    calls = []
    monkeypatch.setattr(masks, "open_image", lambda path: calls.append(path) or open_image(path))
    monkeypatch.setattr(folder, "SAMPLE", 2)
    monkeypatch.setattr(folder, "_ANNOUNCED", 6)
    for _ in range(2):
        loading.load(data(tmp_path), "train", labels=True)
    assert len(calls) == opened
    error = capsys.readouterr().err
    assert words in error if words else not error


@pytest.mark.parametrize("named", [False, True])
def test_150_classes_of_which_a_mask_shows_most(tmp_path, named):
    ids = {
        "images/a.png": np.arange(0, 97),
        "images/b.png": np.arange(50, 150),
        "images/c.png": np.array([0, 7, 149, 255]),
        "val/images/v.png": np.arange(149, -1, -1),
    }
    arrays = {}
    for name, values in ids.items():
        arrays[name] = np.kron(np.resize(values, (10, 15)), np.ones((6, 6))).astype(np.uint8)
        save(tmp_path / name, picture(0, (60, 90)))
        save(tmp_path / name.replace("images", "labels"), arrays[name])
    lines = [f"{149 - i} thing {i}" for i in range(150)]  # the label is 149 less the value
    if named:
        (tmp_path / "classes.txt").write_text("\n".join(lines))
    config_data = data(tmp_path)
    assert len(folder.look(config_data).classes) == 150
    train = loading.load(config_data, "train", labels=True)
    val = loading.load(config_data, "val", labels=True)
    assert train.info.classes[42] == ("thing 42" if named else "class 42")
    assert len({*train.info.palette}) == 150
    assert (*train.ids, *val.ids) == ("a", "b", "c", "val/v")
    records = [train[0], train[1], train[2], val[0]]
    for array, record in zip(arrays.values(), records, strict=True):
        label = np.where(array == 255, 255, 149 - array) if named else array
        np.testing.assert_array_equal(record["label"], label)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "palette transparency"])
def test_images_become_rgb(tmp_path, mode):
    image = Image.fromarray(picture(0))
    if mode == "palette transparency":
        image.convert("P").save(tmp_path / "i.png", transparency=bytes(range(256)))
        expected = image.convert("P").convert("RGB")
    elif mode == "RGBA":
        expected = image  # transparency is dropped, not blended
        image.putalpha(Image.fromarray(picture(1)[..., 0]))
        image.save(tmp_path / "i.png")
        expected = Image.fromarray(picture(0))
    else:
        path = tmp_path / ("i.tif" if mode == "CMYK" else "i.png")
        image.convert(mode).save(path)
        expected = image.convert(mode).convert("RGB")
    read = folder.read_image(next(tmp_path.iterdir()))
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, np.asarray(expected))


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_orientation_tags_are_obeyed(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    stored = np.zeros((4, 6, 3), np.uint8)
    stored[0, 0] = 255
    path = save(
        tmp_path / f"i.{suffix}",
        stored,
        exif=exif,
        **({} if suffix != "webp" else {"lossless": True}),
    )
    image = folder.read_image(path)
    assert image.shape == (6, 4, 3)
    assert image[0, 3].tolist() == [255] * 3
    assert folder._size(path) == (6, 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_does(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "i.png", picture(0), exif=exif)
    np.testing.assert_array_equal(
        folder.read_image(path), ImageOps.exif_transpose(Image.open(path))
    )


def test_a_tag_of_a_wrong_type_does_not_matter(tmp_path):
    # ImageWidth as text, where a number belongs; then the orientation.
    tags = struct.pack("<HHI4s", 0x0100, 2, 4, b"ten") + struct.pack("<HHII", 0x0112, 3, 1, 6)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    path = save(tmp_path / "i.png", picture(0), exif=exif)
    np.testing.assert_array_equal(folder.read_image(path), np.rot90(picture(0), -1))


def test_wrong_images_are_refused(tmp_path):
    deep = save(tmp_path / "deep.png", np.zeros((4, 4), np.uint16))
    with pytest.raises(UserError, match=r"deep\.png has mode I;16.*8 bits"):
        folder.read_image(deep)
    root = build(tmp_path / "data", "images and labels")
    source = pickle.loads(pickle.dumps(loading.load(data(root), "train", labels=True)))
    save(root / "labels/a b.png", ids_of(0, (13, 9)))
    with pytest.raises(UserError, match=r"a b\.png is 9x13 pixels.*a b\.png is 13x9"):
        source[0]
    jpeg = save(root / "images/a b.jpg", picture(0, (80, 80)))
    (root / "images/a b.png").write_bytes(jpeg.read_bytes()[:-200])
    with pytest.raises(UnreadableError, match=r"a b\.png"):
        source[0]


def test_images_too_large_to_decode_at_once_are_named(tmp_path, monkeypatch):
    root = build(tmp_path, "images and labels")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9 * 13 // 3)
    with pytest.raises(UserError, match=r"\.png is larger .*tiles") as error:
        folder.look(data(root, classes=("0 a", "1 b", "2 c")))
    assert not isinstance(error.value, UnreadableError)  # which training would put up with


def test_palettes_of_masks_are_compared_in_a_new_run(tmp_path):
    for name, palette in (("a", [9, 9, 9, 7, 0, 0]), ("b", [7, 0, 0])):
        for kind in ("images", "labels"):
            file = save(tmp_path / f"{kind}/{name}.png", picture(0))
        mask = Image.fromarray(np.zeros((9, 13), np.uint8))
        mask.putpalette(palette)
        mask.save(file)
    with pytest.raises(UserError, match=r"[ab]\.png and .*[ab]\.png differ"):
        folder.look(data(tmp_path, classes=("sky", "car")))
    notes = folder.look(data(tmp_path, classes=("sky #070000", "car #090909"))).notes
    assert "their colors count" in " ".join(notes)


def test_a_mask_that_ignores_an_orientation_tag_gets_a_hint(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    for name in "ab":
        save(tmp_path / f"images/{name}.jpg", picture(0), exif=exif)
        save(tmp_path / f"labels/{name}.png", ids_of(0))
    with pytest.raises(UserError, match="orientation tag"):
        loading.load(data(tmp_path), "train", labels=True)[0]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["labels/stranger.png"], r"1 of 3 masks .* have no image .*labels/stranger\.png"),
        (["images/a b.jpg"], r"images/a b\.(jpg|png) and images/a b\.(jpg|png) have the same name"),
        (["labels/a b_mask.png"], r"labels/a b.* and labels/a b.* have the same name"),
        (
            ["val/images/q.png", "-val/labels/a b.png"],
            r"No validation image in .* has a mask \(val/images/",
        ),
        (["-labels/a b.png", "-labels/in/c_mask.png"], "No training image in .* has a mask"),
        (["-labels"], "No images and masks were recognized.*there is images, unlabeled, val"),
    ],
)
def test_files_that_fit_nowhere_are_named(tmp_path, files, words):
    root = build(tmp_path, "images and labels")
    for name in files:
        if name == "-labels":
            shutil.rmtree(root / "labels")
        elif name.startswith("-"):
            (root / name[1:]).unlink()
        else:
            save(root / name, ids_of(0))
    with pytest.raises(UserError, match=words):
        layouts.find(root)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("x/d.png y/gone.png", r"train\.txt, line 2: there is no file 'y/gone\.png'"),
        ("x/gone.png", r"'x/gone\.png'"),
        ("x/c.png y/c.png", "have the same name"),
        ("/a/x/gone.png", "'/a/x/gone.png'"),
        ("/a/x/d.png /a/y/gone.png", "'/a/y/gone.png'"),
        ("/a/x/gone.png /a/y/c.png", "'/a/x/gone.png'"),
    ],
)
def test_wrong_lines_of_a_list_are_named(tmp_path, line, words):
    root = build(tmp_path, "lists")
    (root / "train.txt").write_text(f"x/c.png y/c.png\n{line}\n")
    with pytest.raises(UserError, match=words):
        layouts.find(root)


@pytest.mark.parametrize("root", ["", "missing"])
def test_a_missing_folder_says_what_it_may_hold(tmp_path, root):
    with pytest.raises(UserError, match=r"--config\.data\.root=DIR") as error:
        layouts.find(root and tmp_path / root)
    for part in ("images/", "trainannot/", "train.txt", "unlabeled/"):
        assert part in str(error.value)


def test_look_says_what_a_folder_holds(tmp_path):
    root = build(tmp_path, "images and labels")
    save(root / "unlabeled/wide.png", picture(5, (9, 40)))
    facts = folder.look(data(root))
    assert (facts.labeled, facts.unlabeled) == (2, 2)
    assert set(facts.sizes) == {(9, 13), (9, 40)}
    assert [line.split(" #")[0] for line in facts.classes] == [
        "0 class 0",
        "1 class 1",
        "2 class 2",
    ]
    assert (
        "images/ with masks in labels/, unlabeled images in unlabeled/, validation in val/images/"
        in facts.notes[0]
    )
