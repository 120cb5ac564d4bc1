import io
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxssl import prepare
from jaxssl.contracts import DataInfo, Record, Stream, UserError
from jaxssl.data import cityscapes, loading, packing
from jaxssl.data.packing import Part, Size
from jaxssl.data.pipeline import Feed, batches
from jaxssl.data.transforms import Augment

# ml_collections loads config files in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

IDS = tuple(f"{city}_{i:06d}_000019" for city in ("aachen", "ulm") for i in range(5))
EXTRA = tuple(f"bamberg_{i:06d}_000000" for i in range(3))
SPLITS = {"train": IDS, "val": ("bonn_000000_000019",), "train_extra": EXTRA}


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def tree(tmp_path):
    """Cityscapes with ten training images, of which one is gray, one to validate on, three more."""
    root = tmp_path / "tree"
    rng = np.random.default_rng(0)
    for split, ids in SPLITS.items():
        for image_id in ids:
            place = f"{split}/{image_id.partition('_')[0]}/{image_id}"
            image = rng.integers(0, 256, (12, 20, 3), np.uint8)
            image = image[..., 0] if image_id == IDS[2] else image
            write(root / f"leftImg8bit/{place}_leftImg8bit.png", image)
            if split != "train_extra":
                label = rng.integers(0, 34, (12, 20), np.uint8)
                write(root / f"gtFine/{place}_gtFine_labelIds.png", label)
    return root


def pack(root, out, *arguments):
    config = "--config=configs/mkd_cityscapes.py"
    return prepare.main(
        ["pack", config, f"--config.data.root={root}", f"--out={out}", *map(str, arguments)]
    )


def data(root, name="cityscapes"):
    return {"name": name, "root": str(root), "split": "3", "seed": 1, "extra": True}


def read(root):
    """The set as TFDS itself gives it, images as they are stored."""
    raw = {"image": tfds.decode.SkipDecoding()}
    builder = tfds.builder_from_directory(str(root))
    return {split: builder.as_data_source(split, decoders=raw) for split in builder.info.splits}


def assert_same(one, other):
    assert one.ids == other.ids
    assert one.info == other.info
    for i in range(len(one)):
        mine, theirs = one[i], other[i]
        assert mine.keys() - {"file"} == theirs.keys() - {"file"}
        for name in mine.keys() - {"file"}:
            np.testing.assert_array_equal(mine[name], theirs[name])


def first_batches(config_data):
    split, sources = loading.training_sets(config_data)
    feeds = [
        Feed(Stream("labeled", 2), sources["labeled"], Augment((8, 8), (0.5, 2.0))),
        Feed(Stream("unlabeled", 2, labels=None), sources["unlabeled"], Augment((8, 8))),
    ]
    with batches(feeds, seed=3, phase_index=0, start=0, steps=4) as iterator:
        return split, list(iterator)


def test_training_from_the_packed_set_equals_training_from_the_files(tree, tmp_path, capsys):
    assert pack(tree, tmp_path / "set", "--config.data.extra") == 0
    printed = capsys.readouterr().out
    for line in ("train: 10 images, 10 labels", "train_extra: 3 images, 0 labels"):
        assert line in printed
    files, packed = data(tree), data(tmp_path / "set", "tfds")
    for split in ("train", "val"):
        for labels in (True, False):
            mine = loading.load(packed, split, labels)
            assert_same(mine, loading.load(files, split, labels))
    (split, mine), (expected_split, expected) = first_batches(packed), first_batches(files)
    assert split == expected_split
    assert len(split.unlabeled) == 10
    for batch, other in zip(mine, expected, strict=True):
        for stream in ("labeled", "unlabeled"):
            assert batch[stream].keys() == other[stream].keys()
            for name in batch[stream]:
                np.testing.assert_array_equal(batch[stream][name], other[stream][name])


def test_files_keep_their_bytes_and_others_read_them(tree, tmp_path):
    assert pack(tree, tmp_path / "set") == 0
    stored = read(tmp_path / "set")["train"]
    for i, image_id in enumerate(IDS):
        path = tree / f"leftImg8bit/train/{image_id.partition('_')[0]}/{image_id}_leftImg8bit.png"
        assert stored[i]["id"] == image_id.encode()
        assert (stored[i]["image"] == path.read_bytes()) == (image_id != IDS[2])
        with Image.open(io.BytesIO(stored[i]["image"])) as image:
            assert image.mode == "RGB"
        assert stored[i]["label"].shape == (12, 20, 1)


class Photos:
    """JPEG files, some of them turned as they are read; two classes."""

    info = DataInfo(("no", "yes"), ((0, 0, 0), (9, 9, 9)))

    def __init__(self, folder, count=5, task="segmentation", labels=True, fail_at=None):
        self.info = DataInfo(("no", "yes"), ((0, 0, 0), (9, 9, 9)), task)
        self.ids = tuple(f"p{i:02d}" for i in range(count))
        self._folder, self._labels, self._fail_at = folder, labels, fail_at

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        if index == self._fail_at:
            raise UserError("the disk went away")
        path = self._folder / f"{index}.jpg"
        if not path.exists():
            write(path, np.random.default_rng(index).integers(0, 256, (9 + index, 30, 3), np.uint8))
        image = np.asarray(Image.open(path))
        image = image[::-1] if index == 1 else image
        label = np.random.default_rng(index).integers(0, 2, image.shape[:2], np.uint8)
        label = np.uint8(index % 2) if self.info.task == "classification" else label
        record = Record(image=image, id=self.ids[index], file=str(path))
        return record | {"label": label} if self._labels else record


@pytest.fixture
def photos(tmp_path):
    source = Photos(tmp_path / "photos")
    return {"train": Part(source, source)}


def test_jpeg_stays_jpeg_where_its_pixels_are_the_image(photos, tmp_path):
    packing.pack(photos, tmp_path / "set")
    stored = [example["image"] for example in read(tmp_path / "set")["train"]]
    for i, content in enumerate(stored):
        same = content == (tmp_path / f"photos/{i}.jpg").read_bytes()
        assert same == (i != 1)
    mine = loading.load(data(tmp_path / "set", "tfds"), "train", labels=True)
    assert_same(mine, photos["train"].labeled)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (Size(exact=(6, 10)), [(6, 10)] * 5),
        (Size(short_side=10), [(9, 30), (10, 30), (10, 27), (10, 25), (10, 23)]),
    ],
)
def test_images_are_resized_with_their_labels(photos, tmp_path, size, expected):
    packing.pack(photos, tmp_path / "set", size)
    mine = loading.load(data(tmp_path / "set", "tfds"), "train", labels=True)
    for i, (height, width) in enumerate(expected):
        record, original = mine[i], photos["train"][i]
        picture = Image.fromarray(original["image"]).resize((width, height), Image.BILINEAR)
        np.testing.assert_array_equal(record["image"], np.asarray(picture))
        rows, columns = original["label"].shape
        centers = np.ix_(
            (np.arange(height) + 0.5) * rows // height, (np.arange(width) + 0.5) * columns // width
        )
        nearest = original["label"][tuple(index.astype(int) for index in centers)]
        np.testing.assert_array_equal(record["label"], nearest)


def test_class_ids_are_packed_too(tmp_path):
    source = Photos(tmp_path / "photos", task="classification")
    none = Photos(tmp_path / "photos", task="classification", labels=False)
    packing.pack({"train": Part(source, source), "more": Part(none)}, tmp_path / "set")
    mine = loading.load(data(tmp_path / "set", "tfds"), "train", labels=True)
    assert_same(mine, source)
    assert {example["label"] for example in read(tmp_path / "set")["more"]} == {-1}


def test_labels_that_are_missing_are_not_looked_for(tree, tmp_path):
    listed = tmp_path / "labeled.txt"
    listed.write_text("\n".join(IDS[:4]))
    for image_id in IDS[4:]:
        city = image_id.partition("_")[0]
        (tree / f"gtFine/train/{city}/{image_id}_gtFine_labelIds.png").unlink()
    assert pack(tree, tmp_path / "set", f"--config.data.labeled_list={listed}") == 0
    packed = data(tmp_path / "set", "tfds")
    assert_same(
        loading.load(packed, "train", True, IDS[:4]),
        loading.load(data(tree), "train", True, IDS[:4]),
    )
    assert loading.load(packed, "train", False).ids == IDS
    with pytest.raises(UserError, match=f"6 of 10 images have no label .* {IDS[4]}"):
        loading.load(packed, "train", True)
    assert (read(tmp_path / "set")["train"][9]["label"] == 255).all()


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_an_interrupted_packing_goes_on(tmp_path, monkeypatch, task):
    monkeypatch.setattr(packing, "SHARD", 2)
    out, unfinished = tmp_path / "set", tmp_path / "set.incomplete"
    made = []
    for fail_at in (1, 3, 4, None):
        source = Photos(tmp_path / "photos", task=task, fail_at=fail_at)
        parts = {"train": Part(source, source), "val": Part(source, source)}
        assert not out.exists()
        if fail_at is None:
            packing.pack(parts, out, progress=made.append)
        else:
            with pytest.raises(UserError, match="the disk went away"):
                packing.pack(parts, out)
            assert unfinished.exists()
    assert made == [5, 6, 7, 8, 9, 10]  # four of the first five were packed before
    assert not unfinished.exists()
    for split in ("train", "val"):
        mine = loading.load(data(out, "tfds"), split, labels=True)
        assert_same(mine, Photos(tmp_path / "photos", task=task))
    assert len(list(out.glob("packed-*"))) == 2 * 3
    with pytest.raises(UserError, match=r"set holds a finished set.*--config.data.name=tfds"):
        packing.pack(parts, out)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metadata.json", None, "beginning of another set"),
        ("dataset_info.json", "{", "was interrupted while it was described"),
        ("notes.txt", "mine", "holds other files"),
    ],
)
def test_other_beginnings_are_refused(tmp_path, name, content, words):
    source = Photos(tmp_path / "photos", fail_at=2)
    unfinished = tmp_path / "set.incomplete"
    with pytest.raises(UserError, match="the disk went away"):
        packing.pack({"train": Part(source)}, tmp_path / "set")
    path = unfinished / name
    path.write_text(json.dumps({"ids": {}}) if content is None else content)
    before = sorted(unfinished.iterdir())
    with pytest.raises(UserError, match=words):
        packing.pack({"train": Part(source)}, tmp_path / "set")
    assert sorted(unfinished.iterdir()) == before


def test_keys_of_another_set_do_no_harm(photos, tmp_path):
    packing.pack(photos, tmp_path / "set")
    keys = {"tfds_name": "pets", "splits": {"train": "all"}, "label_key": "mask", "id_key": "name"}
    keys |= {"classes": ("3 one", "4 two"), "ignore": (0,)}
    mine = loading.load(data(tmp_path / "set", "tfds") | keys, "train", labels=True)
    assert_same(mine, photos["train"].labeled)


def test_empty_splits_are_empty_again(tmp_path):
    source, none = Photos(tmp_path / "photos"), Photos(tmp_path / "photos", count=0)
    packing.pack({"train": Part(source, source), "train_extra": Part(none)}, tmp_path / "set")
    packed = data(tmp_path / "set", "tfds")
    assert loading.load(packed, "train_extra", False).ids == ()
    assert len(loading.load(packed, "train+train_extra", False)) == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size=12"], "no size"),
        (["--size=12,0"], "positive"),
        (["--size=2,2", "--short_side=3"], "not both"),
        (["--short_side=0"], "positive"),
        (["--config.data.rot=x"], "no key 'rot'"),
        (["--config.data.seed=x"], "config.data.seed"),
        (["--config.data.extra"], "train_extra"),
        (["more"], "'more'"),
        (["--unknown=3"], "unknown"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tree, tmp_path, capsys, arguments, words):
    if "--config.data.extra" in arguments:
        for path in tree.glob("leftImg8bit/train_extra/*/*"):
            path.unlink()
    assert pack(tree, tmp_path / "set", *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert words in error
    assert "\n" not in error
    assert not list(tmp_path.glob("set*"))


@pytest.mark.parametrize("config", ["", "nowhere.py", "configs/mkd_cityscapes.py:r7"])
def test_config_files_that_are_not_there(tmp_path, capsys, config):
    assert prepare.main(["pack", f"--config={config}", f"--out={tmp_path / 'set'}"]) == 2
    assert config.rpartition(":")[2] in capsys.readouterr().err


def test_folders_in_use_are_left_alone(tree, tmp_path, capsys):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/mine.txt").write_text("mine")
    assert pack(tree, tmp_path / "set") == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["mine.txt"]
    (tmp_path / "set/mine.txt").unlink()
    assert pack(tree, tmp_path / "set") == 0
    assert Path(tmp_path, "set", "dataset_info.json").exists()
    packed = loading.load(data(tmp_path / "set", "tfds"), "val", labels=False)
    assert packed.info == cityscapes.INFO
