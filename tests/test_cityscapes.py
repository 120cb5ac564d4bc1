import numpy as np
import pytest
from PIL import Image

from jaxssl.contracts import Stream, UserError
from jaxssl.data import cityscapes, loading
from jaxssl.data.cityscapes import Cityscapes
from jaxssl.data.loading import Subset, evenly_spaced
from jaxssl.data.pipeline import Feed, batches
from jaxssl.data.transforms import Augment

IDS = tuple(f"{city}_{i:06d}_000019" for city in ("aachen", "ulm") for i in range(3))
# Of the data set's published label table: (label id, train id); 255 means not evaluated.
TRAIN_IDS = {0: 255, 6: 255, 7: 0, 8: 1, 11: 2, 14: 255, 17: 5, 23: 10, 26: 13, 29: 255, 33: 18}


def picture(seed, size=(8, 16)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def save(root, kind, split, image_id, end, array):
    path = root / kind / split / image_id.split("_")[0] / f"{image_id}_{end}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def label_ids(seed, size=(8, 16)):
    return np.random.default_rng(seed).choice(np.array(list(TRAIN_IDS), np.uint8), size)


@pytest.fixture
def root(tmp_path):
    """Six training images with labels, two for validation, two in train_extra."""
    for split, kind, ids in (
        ("train", "gtFine", IDS),
        ("val", "gtFine", ("bonn_000000_000019", "bonn_000001_000019")),
        ("train_extra", "gtCoarse", ("bad-honnef_000000_000000", "konigswinter_000000_000000")),
    ):
        for seed, image_id in enumerate(ids):
            save(tmp_path, "leftImg8bit", split, image_id, "leftImg8bit", picture(seed))
            save(tmp_path, kind, split, image_id, f"{kind}_labelIds", label_ids(seed))
            save(tmp_path, kind, split, image_id, f"{kind}_instanceIds", label_ids(seed))
    return tmp_path


@pytest.mark.parametrize("split", ["train", "val", "train_extra"])
def test_reads_images_and_maps_label_ids(root, split):
    source = Cityscapes(root, split)
    assert len(source) == len(source.ids) == (6 if split == "train" else 2)
    assert list(source.ids) == sorted(source.ids)
    for seed, record in enumerate(source[i] for i in range(len(source))):
        np.testing.assert_array_equal(record["image"], picture(seed))
        expected = np.vectorize(TRAIN_IDS.get)(label_ids(seed))
        np.testing.assert_array_equal(record["label"], expected)
        assert record["image"].dtype == record["label"].dtype == np.uint8
        assert record["id"] == source.ids[seed]


def test_train_ids_are_taken_as_they_are(root):
    path = root / f"gtFine/train/aachen/{IDS[0]}_gtFine_labelIds.png"
    path.unlink()
    with pytest.raises(UserError, match=f"1 of 6 images have no label.*{IDS[0]}"):
        Cityscapes(root, "train")
    label = np.array([[0, 18], [255, 3]], np.uint8).repeat(4, 0).repeat(8, 1)
    palette = Image.fromarray(label, "L")
    palette.putpalette(list(range(256)) * 3)
    palette.save(root / f"gtFine/train/aachen/{IDS[0]}_gtFine_labelTrainIds.png")
    np.testing.assert_array_equal(Cityscapes(root, "train")[0]["label"], label)
    label[0, 0] = 19
    wrong = save(root, "gtFine", "train", IDS[0], "gtFine_labelTrainIds", label)
    with pytest.raises(UserError, match=f"{wrong.name} holds the class id 19"):
        Cityscapes(root, "train")[0]


def test_splits_are_joined(root):
    source = Cityscapes(root, "train+train_extra")
    assert source.ids == (
        *IDS[:3],
        "bad-honnef_000000_000000",
        "konigswinter_000000_000000",
        *IDS[3:],
    )
    np.testing.assert_array_equal(source[4]["image"], picture(1))
    np.testing.assert_array_equal(source[4]["label"], np.vectorize(TRAIN_IDS.get)(label_ids(1)))
    np.testing.assert_array_equal(source[5]["image"], picture(3))


def test_select_restricts(root):
    subset = Subset(Cityscapes(root, "train"), [IDS[4], IDS[1]])
    assert subset.ids == (IDS[1], IDS[4])
    assert len(subset) == 2
    assert subset[1]["id"] == IDS[4]
    np.testing.assert_array_equal(subset[1]["image"], picture(4))
    with pytest.raises(UserError, match=r"1 of 1 image ids.*bonn"):
        Subset(Cityscapes(root, "train"), ["bonn"])
    ids = Cityscapes(root, "train").ids
    for most, places in ((1, [0]), (2, [0, 3]), (4, [0, 1, 3, 4]), (6, range(6)), (9, range(6))):
        chosen = evenly_spaced(Cityscapes(root, "train"), most).ids
        assert chosen == tuple(ids[i] for i in places), most
    assert evenly_spaced(subset, 0).ids == ()


def test_unlabeled_images_need_no_label_files(root, tmp_path_factory):
    """Training runs with labels of the labeled images only."""
    labels = root / "labeled.txt"
    labels.write_text("\n".join(IDS[:2]))
    for image_id in IDS[2:]:
        (root / f"gtFine/train/{image_id.split('_')[0]}/{image_id}_gtFine_labelIds.png").unlink()
    data = {"name": "cityscapes", "root": str(root), "split": "1_8", "seed": 0}
    split, sources = loading.training_sets(data | {"labeled_list": labels, "extra": True})
    assert split.labeled == IDS[:2]
    assert set(split.unlabeled) == {
        *IDS[2:],
        "bad-honnef_000000_000000",
        "konigswinter_000000_000000",
    }
    feeds = [
        Feed(Stream("labeled", 2), sources["labeled"], Augment((8, 8))),
        Feed(Stream("unlabeled", 2, labels=None), sources["unlabeled"], Augment((8, 8))),
    ]
    with batches(feeds, seed=0, phase_index=0, start=0, steps=6) as iterator:
        for batch in iterator:
            assert set(batch["labeled"]) == {"image", "label", "valid", "index"}
            assert set(batch["unlabeled"]) == {"image", "valid", "index"}
    with pytest.raises(UserError, match="4 of 6 images have no label"):
        loading.load(data, "train", labels=True)
    assert loading.load(data, "train", labels=True, ids=IDS[:2]).ids == IDS[:2]


@pytest.mark.parametrize("split", ["train", "train_extra"])
def test_missing_tree_says_what_to_do(tmp_path, split):
    with pytest.raises(UserError) as error:
        Cityscapes(tmp_path, split)
    archives = {"train": "trainvaltest", "train_extra": "trainextra"}
    for part in (str(tmp_path), archives[split], "--config.data.root=DIR", ":streets"):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["cityscape", "loading", "splits"])
def test_unknown_reader_lists_what_exists(name):
    with pytest.raises(UserError, match=f"no data set '{name}'") as error:
        loading.load({"name": name}, "train", labels=True)
    listed = str(error.value).rpartition(": ")[2]
    assert "cityscapes" in listed
    assert "splits" not in listed


def test_grayscale_images_become_rgb(root):
    gray = picture(0)[..., 0]
    save(root, "leftImg8bit", "train", IDS[0], "leftImg8bit", gray)
    np.testing.assert_array_equal(Cityscapes(root, "train")[0]["image"], np.stack([gray] * 3, -1))


@pytest.mark.parametrize(
    "array",
    [np.zeros((8, 16), np.uint16), np.zeros((8, 16, 4), np.uint8), np.zeros((8, 16), bool)],
)
def test_other_image_formats_are_refused(root, array):
    path = save(root, "leftImg8bit", "train", IDS[0], "leftImg8bit", array)
    with pytest.raises(UserError, match=f"{path.name} has mode"):
        Cityscapes(root, "train")[0]


@pytest.mark.parametrize("array", [picture(0), np.zeros((8, 16), np.uint16)])
def test_other_label_formats_are_refused(root, array):
    path = save(root, "gtFine", "train", IDS[0], "gtFine_labelIds", array)
    with pytest.raises(UserError, match=f"{path.name} has mode"):
        Cityscapes(root, "train")[0]


def test_sizes_that_differ_are_named(root):
    path = save(root, "gtFine", "train", IDS[0], "gtFine_labelIds", label_ids(0, (4, 8)))
    with pytest.raises(UserError, match=f"{path.name} is 8x4 pixels.* is 16x8"):
        Cityscapes(root, "train")[0]


@pytest.mark.parametrize("kept", [0, 5, 40, 200])
def test_damaged_file_is_named(root, kept):
    path = root / f"leftImg8bit/train/aachen/{IDS[0]}_leftImg8bit.png"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=path.name):
        Cityscapes(root, "train")[0]


def test_label_table():
    assert cityscapes.INFO.num_classes == len(cityscapes.INFO.palette) == 19
    assert {i: cityscapes.TRAIN_IDS[i] for i in TRAIN_IDS} == TRAIN_IDS
    assert sorted(cityscapes.TRAIN_IDS[cityscapes.LABEL_IDS]) == list(range(19))
    assert (cityscapes.TRAIN_IDS == 255).sum() == 256 - 19
