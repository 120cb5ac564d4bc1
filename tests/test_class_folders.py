import os

import numpy as np
import pytest
from PIL import ExifTags, Image

from jaxssl.contracts import UnreadableError, UserError
from jaxssl.data import loading
from jaxssl.data.pipeline import Feed, Stream, batches
from jaxssl.data.transforms import Augment


def pixels(seed, size=(9, 12)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


@pytest.fixture
def root(tmp_path):
    """Three classes, of 20, 12 and 1 images, four images for validation and three unlabeled."""
    for name, count in {"dog": 20, "Cat": 12, "eel": 1}.items():
        for i in range(count):
            save(tmp_path / f"train/{name}/{i}.png", pixels(i + 100 * len(name), (8 + i, 9)))
    for i, name in enumerate(("dog", "Cat", "dog", "eel")):
        save(tmp_path / f"val/{name}/v{i}.png", pixels(i))
    for i, name in enumerate(("x.png", "more/y.png", "dog/z.png")):
        save(tmp_path / "unlabeled" / name, pixels(50 + i))
    return tmp_path


def config(root, **changes):
    return {"name": "class_folders", "root": str(root), "split": "6", "seed": 0, **changes}


def test_reads_images_and_the_class_of_their_folder(root):
    source = loading.load(config(root), "train", labels=True)
    assert source.info.classes == ("Cat", "dog", "eel")
    assert source.info.task == "classification"
    assert len(source) == 33
    for i, image_id in enumerate(source.ids):
        record = source[i]
        _, name, number = image_id.split("/")
        assert record["file"] == str(root / f"{image_id}.png")
        assert record["id"] == image_id
        expected = pixels(int(number) + 100 * len(name), (8 + int(number), 9))
        np.testing.assert_array_equal(record["image"], expected)
        assert record["label"] == ("Cat", "dog", "eel").index(name)
        assert record["label"].dtype == np.uint8
        assert source.class_ids[i] == record["label"]
    val = loading.load(config(root), "val", labels=True)
    assert val.ids == ("val/Cat/v1", "val/dog/v0", "val/dog/v2", "val/eel/v3")
    assert val.class_ids.tolist() == [0, 1, 1, 2]


def test_unlabeled_images_and_splits(root):
    data = config(root, split="5", extra=True)
    split, sources = loading.training_sets(data)
    assert np.bincount(sources["labeled"].class_ids).tolist() == [2, 2, 1]
    extra = {"unlabeled/x", "unlabeled/more/y", "unlabeled/dog/z"}
    assert extra < set(split.unlabeled)
    assert len(split.unlabeled) == 33 - 5 + 3
    assert set(sources["unlabeled"][0]) == {"image", "id", "file"}
    with pytest.raises(UserError, match=r"3 of 31 images .* in no class, such as unlabeled/dog/z"):
        loading.truth(data, split)
    assert len(loading.training_sets(data | {"extra": False})[0].unlabeled) == 28
    assert split.note == ""


def test_a_tenth_of_each_class_is_held_out_where_nothing_else_is(root):
    (root / "val").rename(root / "test")
    for name in ("train", "val"):
        source = loading.load(config(root), name, labels=True)
        assert np.bincount(source.class_ids).tolist() == {"train": [11, 18, 1], "val": [1, 2]}[name]
        assert source.ids == loading.load(config(root), name, labels=False).ids
    split, _ = loading.training_sets(config(root))
    assert split.note.startswith("no val/ was found: 3 of 33 images in train/")
    assert len(loading.load(config(root), "test", labels=True)) == 4


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_images_of_any_mode(root, mode):
    path = root / f"train/dog/new.{'jpg' if mode == 'CMYK' else 'png'}"
    Image.fromarray(pixels(7)).convert(mode).save(path)
    (record,) = loading.load(config(root), "train", labels=True, ids=["train/dog/new"])
    expected = np.asarray(Image.open(path).convert("RGB"))
    np.testing.assert_array_equal(record["image"], expected)


def test_a_camera_held_upright(root):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    save(root / "train/dog/0.png", pixels(7), exif=exif)
    (record,) = loading.load(config(root), "train", labels=False, ids=["train/dog/0"])
    np.testing.assert_array_equal(record["image"], np.rot90(pixels(7), -1))


def test_batches_of_images_of_any_size(root):
    _, sources = loading.training_sets(config(root))
    feeds = [Feed(Stream("labeled", 6), sources["labeled"], Augment((16, 16), (1.0, 1.5)))]
    with batches(feeds, seed=0, phase_index=0, start=0, steps=2) as iterator:
        for batch in iterator:
            assert set(batch["labeled"]) == {"image", "label", "index"}
            assert batch["labeled"]["image"].shape == (6, 16, 16, 3)
            expected = sources["labeled"].class_ids[batch["labeled"]["index"]]
            np.testing.assert_array_equal(batch["labeled"]["label"], expected)


def spoil_loose(root):
    save(root / "train/loose.png", pixels(0))


def spoil_stranger(root):
    save(root / "val/fox/0.png", pixels(0))


def spoil_classes(root):
    for name in ("dog", "Cat"):
        (root / "train" / name).rename(root / name)


def spoil_train(root):
    (root / "train").rename(root / "images")


def spoil_twin(root):
    save(root / "train/dog/0.jpg", pixels(0))


def spoil_name(root):
    save(root / "train/dog/a.png", pixels(0))
    os.rename(root / "train/dog/a.png", os.fsencode(root) + b"/train/dog/\xff.png")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_loose, r"train/loose\.png is in no class\. Move it .*unlabeled"),
        (spoil_stranger, r"val/ in .* has 1 class\(es\) that train/ has not, such as fox"),
        (spoil_classes, r"has 1 class\(es\) in train/; 2 to 254 are possible"),
        (spoil_train, r"No train/CLASS/ with images is in .*: there is images, unlabeled, val"),
        (spoil_twin, r"train/dog/0\.(jpg|png) and train/dog/0\.(jpg|png) have the same name"),
        (spoil_name, r"is not UTF-8"),
    ],
)
def test_mistakes_say_what_to_do(root, spoil, words):
    spoil(root)
    with pytest.raises(UserError, match=words):
        loading.load(config(root), "train", labels=True)


def test_missing_folders_and_damaged_files(root, tmp_path):
    with pytest.raises(UserError, match=r"Where are the images\?.*data\.root=DIR"):
        loading.load(config(""), "train", labels=True)
    with pytest.raises(UserError, match=r"There is no folder .*nowhere"):
        loading.load(config(tmp_path / "nowhere"), "train", labels=True)
    with pytest.raises(UserError, match=r"There is no test/ in"):
        loading.load(config(root), "test", labels=True)
    path = root / "train/dog/3.png"
    path.write_bytes(path.read_bytes()[:60])
    (image_id,) = (i for i in loading.load(config(root), "train", True).ids if i.endswith("dog/3"))
    with pytest.raises(UnreadableError, match=r"dog/3\.png cannot be read"):
        loading.load(config(root), "train", True, [image_id])[0]
