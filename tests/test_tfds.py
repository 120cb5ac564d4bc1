import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxssl.contracts import UnreadableError, UserError
from jaxssl.data import loading, packing
from jaxssl.data import tfds as reader
from jaxssl.data.masks import ForeignValuesError
from jaxssl.data.pipeline import Feed, Stream, batches, in_order
from jaxssl.data.transforms import Augment

# As the config has it: theirs are 1 pet, 2 background, 3 border; ours 0 background, 1 pet.
PETS = {
    "name": "tfds",
    "tfds_name": "oxford_iiit_pet:4.*.*",
    "splits": {"val": "test"},
    "label_key": "segmentation_mask",
    "id_key": "file_name",
    "classes": ("2 background", "1 pet #ff8000", "3 ignore"),
    "ignore": (255,),
}
FEATURES = {
    "image": tfds.features.Image(encoding_format="jpeg"),
    "label": tfds.features.ClassLabel(num_classes=37),
    "file_name": tfds.features.Text(),
    "segmentation_mask": tfds.features.Image(shape=(None, None, 1), use_colormap=True),
}
NAMES = {"train": [f"Bengal_{i}" for i in (10, 9, 1, 33)], "test": ["pug_2", "pug_11", "boxer_5"]}


def file(array, kind="png"):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


def size(name):
    number = int(name.split("_")[1])
    return 12 + number % 5, 9 + number % 7


def photograph(name):
    rng = np.random.default_rng(len(name) + int(name.split("_")[1]))
    return file(rng.integers(0, 256, (*size(name), 3), np.uint8), "jpeg")


def trimap(name):
    rng = np.random.default_rng(int(name.split("_")[1]))
    return rng.integers(1, 4, size(name), np.uint8)


def example(name):
    return {
        "image": io.BytesIO(photograph(name)),
        "label": 5,
        "file_name": f"{name}.jpg",
        "segmentation_mask": io.BytesIO(file(trimap(name))),
    }


class OxfordIiitPet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What the published set holds, in small."""

    VERSION = tfds.core.Version("4.0.0")
    make = staticmethod(example)
    features = tfds.features.FeaturesDict(FEATURES)

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=self.features)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(names) for split, names in NAMES.items()}

    def _generate_examples(self, names):
        yield from ((name, self.make(name)) for name in names)


def prepare(root, make=example, **features):
    """Writes the set; `features` replace some of its features."""
    features = tfds.features.FeaturesDict(FEATURES | features)
    members = {"make": staticmethod(make), "features": features}
    kind = type("OxfordIiitPet", (OxfordIiitPet,), members, skip_registration=True)
    kind(data_dir=root).download_and_prepare(file_format="array_record")
    return PETS | {"root": str(root)}


def folder_of(data):
    return Path(data["root"], "oxford_iiit_pet", "4.0.0")


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def own_pets(tmp_path):
    return prepare(tmp_path)


@pytest.mark.parametrize(("split", "theirs"), [("train", "train"), ("val", "test")])
def test_reads_what_the_set_was_made_from(pets, split, theirs):
    source = loading.load(pets, split, labels=True)
    assert source.ids == tuple(sorted(NAMES[theirs]))
    assert source.info.classes == ("background", "pet")
    assert source.info.palette[1] == (255, 128, 0)
    for i, name in enumerate(source.ids):
        record = source[i]
        photo = np.asarray(Image.open(io.BytesIO(photograph(name))))
        np.testing.assert_array_equal(record["image"], photo)
        label = np.array([255, 1, 0, 255], np.uint8)[trimap(name)]
        np.testing.assert_array_equal(record["label"], label)
        assert record["label"].dtype == record["image"].dtype == np.uint8
        assert record["id"] == name


def test_tensorflow_is_not_imported(pets):
    loading.load(pets, "train", labels=True)[0]
    assert "tensorflow" not in sys.modules


def test_other_readers_do_not_import_tfds():
    code = "import sys, jaxssl.data.loading as l; "
    code += "l._reader('streets'), l._reader('folder'); print('tensorflow_datasets' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_folder_of_the_set_and_places_as_ids(pets):
    data = pets | {"root": f"{pets['root']}/oxford_iiit_pet/4.0.0", "tfds_name": "", "id_key": ""}
    source = loading.load(data, "train", labels=False)
    assert source.ids == tuple(f"train_{i:06d}" for i in range(4))
    stored = tfds.builder_from_directory(data["root"]).as_data_source("train")
    for i in range(4):
        np.testing.assert_array_equal(source[i]["image"], stored[i]["image"])


def test_splits_are_joined_sliced_and_selected(pets):
    joined = loading.load(pets, "train+val", labels=True, ids=["pug_2", "Bengal_9"])
    assert joined.ids == ("Bengal_9", "pug_2")
    for i, name in enumerate(joined.ids):
        assert joined[i]["label"].shape == size(name)
    part = loading.load(pets | {"splits": {"val": "train[75%:]"}}, "val", labels=True)
    assert len(part) == 1
    assert part.ids[0] in NAMES["train"]
    with pytest.raises(UserError, match=r"1 of 1 image ids.*poodle_1"):
        loading.load(pets, "train", labels=False, ids=["poodle_1"])


def test_class_ids_are_labels_too(pets):
    data = pets | {"label_key": "label", "classes": ()}
    source = loading.load(data, "train", labels=True)
    assert (source.info.task, source.info.num_classes) == ("classification", 37)
    assert source[0]["label"].shape == ()
    assert source[0]["label"] == 5


def test_images_without_a_class(tmp_path):
    data = prepare(tmp_path, lambda name: example(name) | {"label": -1})
    source = loading.load(data | {"label_key": "label", "classes": ()}, "train", labels=True)
    assert source[0]["label"] == 255


def breed(name):
    """Of the training images two have class 3, one class 8, and one has none."""
    return {"Bengal_10": 3, "Bengal_9": 8, "Bengal_1": -1, "Bengal_33": 3}.get(name, 0)


def test_class_ids_are_split_and_trained_on(tmp_path):
    data = prepare(tmp_path, lambda name: example(name) | {"label": breed(name)})
    data |= {"label_key": "label", "classes": (), "split": "2", "seed": 0}
    split, sources = loading.training_sets(data)
    assert "Bengal_9" in split.labeled
    assert "Bengal_1" in split.unlabeled
    labels = sources["labeled"].class_ids
    assert labels.tolist() == [breed(name) for name in split.labeled]
    assert "label" not in sources["unlabeled"][0]
    assert sources["unlabeled"].class_ids is None
    feeds = [
        Feed(Stream("labeled", 2), sources["labeled"], Augment((8, 8), randaugment=1)),
        Feed(Stream("unlabeled", 2, labels=None), sources["unlabeled"], Augment((8, 8))),
    ]
    with batches(feeds, seed=0, phase_index=0, start=0, steps=2) as iterator:
        for batch in iterator:
            assert set(batch["labeled"]) == {"image", "label", "index"}
            assert set(batch["unlabeled"]) == {"image", "index"}
            np.testing.assert_array_equal(
                batch["labeled"]["label"], labels[batch["labeled"]["index"]]
            )
    everything, _ = loading.training_sets(data | {"split": "all"})
    assert len(everything.labeled) == 3
    (batch,) = in_order(loading.load(data, "val", labels=True), 4, center=(8, 8))
    assert batch["image"].shape == (4, 8, 8, 3)
    assert batch["label"].tolist() == [0, 0, 0, 255]


def test_packed_digits_read_as_they_were(tmp_path):
    data = {"name": "digits", "root": "", "split": "20", "seed": 0, "size": 8}
    packing.pack(packing.parts_of(data), tmp_path / "digits")
    packed = data | {"name": "tfds", "root": str(tmp_path / "digits")}
    split, sources = loading.training_sets(packed | {"validation": 30})
    assert split == loading.training_sets(data | {"validation": 30})[0]
    digits = loading.load(data, "train", labels=True, ids=split.labeled)
    assert sources["labeled"].info.classes == digits.info.classes
    for i in range(20):
        for name in ("image", "label", "id"):
            np.testing.assert_array_equal(sources["labeled"][i][name], digits[i][name])


@pytest.mark.parametrize("shape", [(None, None), (None, None, 1)])
def test_masks_may_be_arrays(tmp_path, shape):
    def make(name):
        label = trimap(name)
        return example(name) | {"segmentation_mask": label[..., None] if shape[2:] else label}

    mask = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="zlib")
    source = loading.load(prepare(tmp_path, make, segmentation_mask=mask), "train", labels=True)
    expected = np.array([255, 1, 0, 255])[trimap(source.ids[2])]
    np.testing.assert_array_equal(source[2]["label"], expected)


def test_labels_of_unlabeled_images_are_never_decoded(tmp_path):
    data = prepare(tmp_path, lambda name: example(name) | {"segmentation_mask": io.BytesIO(b"no")})
    assert set(loading.load(data, "train", labels=False)[0]) == {"image", "id"}
    with pytest.raises(UnreadableError, match=r"Bengal_1 in .*oxford_iiit_pet"):
        loading.load(data, "train", labels=True)[0]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_images_become_rgb(tmp_path, mode):
    def make(name):
        stream = io.BytesIO()
        Image.open(io.BytesIO(photograph(name))).convert(mode).save(stream, "png")
        return example(name) | {"image": io.BytesIO(stream.getvalue())}

    source = loading.load(prepare(tmp_path, make), "train", labels=False)
    photo = Image.open(io.BytesIO(photograph(source.ids[0]))).convert(mode).convert("RGB")
    np.testing.assert_array_equal(source[0]["image"], np.asarray(photo))


def test_a_copy_in_another_process_reads_the_same(pets):
    source = loading.load(pets, "train", labels=True)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.ids == source.ids
    np.testing.assert_array_equal(copy[1]["image"], source[1]["image"])
    feeds = [Feed(Stream("labeled", 2), source, Augment((8, 8)))]
    with batches(feeds, seed=0, phase_index=0, start=0, steps=3, threads=4) as iterator:
        assert [b["labeled"]["image"].shape for b in iterator] == [(2, 8, 8, 3)] * 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"root": "/nowhere"}, ("no prepared set oxford_iiit_pet", "tfds build oxford_iiit_pet")),
        ({"tfds_name": "no_such_set"}, ("no prepared set no_such_set", "jaxssl.prepare pack")),
        ({"tfds_name": ""}, ("no prepared set in", "dataset_info.json")),
        ({"splits": {}}, ("no split 'val'", "train, test", "data.splits.val=")),
        ({"splits": {"val": "test[:x]"}}, ("no split 'test[:x]'",)),
        ({"label_key": "mask"}, ("no feature 'mask'", "segmentation_mask", "label_key")),
        ({"image_key": "label"}, ("'label'", "no image", "image_key")),
        ({"id_key": "name"}, ("no feature 'name'", "id_key")),
        ({"id_key": "label"}, ("2 images", "the label of another one")),
        ({"classes": ()}, ("names 0 classes", "data.classes")),
    ],
)
def test_mistakes_say_what_to_do(pets, change, words):
    with pytest.raises(UserError) as error:
        loading.load(pets | change, "val", labels=True)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_values_that_are_no_class_are_named(pets):
    data = pets | {"classes": ("2 background", "1 pet")}
    name = next(n for n in sorted(NAMES["train"]) if (trimap(n) == 3).any())
    with pytest.raises(ForeignValuesError, match=rf"{name} in .* holds the value 3") as error:
        loading.load(data, "train", labels=True, ids=[name])[0]
    assert error.value.counts == {3: (trimap(name) == 3).sum()}
    label = loading.load(data | {"ignore": (3,)}, "train", labels=True, ids=[name])[0]["label"]
    np.testing.assert_array_equal(label == 255, trimap(name) == 3)


@pytest.mark.parametrize("mask", [np.ones((3, 4), np.uint8), np.ones((12, 9, 3), np.uint8)])
def test_masks_of_another_shape_are_refused(tmp_path, mask):
    data = prepare(tmp_path, lambda n: example(n) | {"segmentation_mask": io.BytesIO(file(mask))})
    with pytest.raises(UserError, match=r"Bengal_1 in .*: the label has shape \(\d+, \d+"):
        loading.load(data, "train", labels=True)[0]


def test_a_damaged_record_is_named_and_the_others_are_read(own_pets):
    source = loading.load(own_pets, "train", labels=True)  # before the damage, as ids are stored
    (path,) = folder_of(own_pets).glob("*-train.array_record*")
    content = bytearray(path.read_bytes())
    content[200] ^= 255
    path.write_bytes(bytes(content))
    damaged = {}
    for i, name in enumerate(source.ids):
        try:
            assert source[i]["label"].shape == size(name)
        except UnreadableError as error:
            damaged[name] = str(error)
    ((name, message),) = damaged.items()
    assert message.startswith(f"{name} in {own_pets['root']}")
    reader._stored_ids.cache_clear()
    with pytest.raises(UnreadableError, match=r"record \d of train in .*cannot be read"):
        loading.load(own_pets, "train", labels=False)


def test_formats_without_random_access_are_refused(own_pets):
    folder = folder_of(own_pets)
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match=r"stored as tfrecord.*--file_format=array_record"):
        loading.load(own_pets | {"id_key": ""}, "train", labels=True)
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="cannot be opened"):
        loading.load(own_pets | {"tfds_name": "", "root": str(folder)}, "train", labels=True)
