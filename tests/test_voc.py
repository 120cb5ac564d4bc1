import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from jaxssl.contracts import UnreadableError, UserError
from jaxssl.data import loading, splits, voc
from jaxssl.data.voc import Voc

ROOT = Path(__file__).parents[1]
TRAIN = tuple(f"2007_{i:06d}" for i in range(1, 5))
VAL = ("2007_000010", "2007_000011")
SBD = tuple(f"2008_{i:06d}" for i in range(1, 7))
SIZES = ((30, 41), (41, 30), (33, 33), (28, 37))  # height and width, as odd as VOC's

# Of the devkit's documentation.
COLORS = {0: (0, 0, 0), 1: (128, 0, 0), 8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128)}


def size_of(image_id):
    return SIZES[int(image_id[-6:]) % len(SIZES)]


def label_of(image_id, *, fine):
    """Blocks of classes; fine labels have borders of 255 between them, coarse ones are shifted."""
    height, width = size_of(image_id)
    y, x = np.mgrid[:height, :width]
    label = ((y // 8 + 3 * (x // 8) + int(image_id[-6:]) + (not fine)) % 21).astype(np.uint8)
    return np.where((y % 8 == 0) | (x % 8 == 0), 255, label).astype(np.uint8) if fine else label


def save_image(tree, image_id):
    path = tree / "JPEGImages" / f"{image_id}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(int(image_id[-6:]))
    Image.fromarray(rng.integers(0, 256, (*size_of(image_id), 3), np.uint8)).save(path)
    return path


def save_png(folder, image_id, label, *, palette=True):
    folder.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(label)
    if palette:
        image.putpalette([channel for value in range(256) for channel in voc.color(value)])
    path = folder / f"{image_id}.png"
    image.save(path)
    return path


def save_mat(folder, image_id, label):
    """As SBD stores it: a 1x1 struct, with more in it than the segmentation."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{image_id}.mat"
    content = {"Segmentation": label, "CategoriesPresent": np.unique(label)[:, None]}
    scipy.io.savemat(path, {"GTcls": content}, do_compression=True)
    return path


def save_list(tree, name, lines):
    path = tree / "ImageSets" / "Segmentation" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def tree(tmp_path):
    """VOC's archive unpacked in a folder: fine labels, and images that SBD has labels of."""
    tree = tmp_path / "VOCdevkit" / "VOC2012"
    for image_id in (*TRAIN, *VAL, *SBD):
        save_image(tree, image_id)
    for image_id in (*TRAIN, *VAL):
        save_png(tree / "SegmentationClass", image_id, label_of(image_id, fine=True))
    save_list(tree, "train", TRAIN)
    save_list(tree, "val", VAL)
    save_list(tree, "trainval", (*TRAIN, *VAL))
    return tree


def add_mats(tree):
    """SBD's archive unpacked beside VOC's; it has labels of VOC's images, too."""
    folder = tree.parents[1] / "benchmark_RELEASE" / "dataset" / "cls"
    for image_id in (TRAIN[0], VAL[0], *SBD):
        save_mat(folder, image_id, label_of(image_id, fine=False))
    return folder


def add_pngs(tree):
    for i, image_id in enumerate((*TRAIN, *VAL, *SBD)):
        label = label_of(image_id, fine=image_id not in SBD)
        save_png(tree / "SegmentationClassAug", image_id, label, palette=i % 2 == 0)


def open_all(tree, split="train", image_set="blender", labels=True, ids=None):
    return Voc(tree, image_set, split, labels, ids)


def data_of(tree, **changes):
    data = {"name": "voc", "root": str(tree), "set": "classic", "split": "2", "seed": 0}
    return data | changes


def assert_reads(source):
    for i, image_id in enumerate(source.ids):
        record = source[i]
        assert record["id"] == image_id
        assert Path(record["file"]).name == f"{image_id}.jpg"
        stored = np.asarray(Image.open(record["file"]))
        np.testing.assert_array_equal(record["image"], stored)
        np.testing.assert_array_equal(record["label"], label_of(image_id, fine=image_id not in SBD))
        assert record["image"].dtype == record["label"].dtype == np.uint8


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_the_classic_set_is_read_from_each_folder_above_the_images(tree, levels):
    root = [tree, *tree.parents][levels]
    train, val = (open_all(root, split, "classic") for split in ("train", "val"))
    assert (train.ids, val.ids) == (TRAIN, VAL)
    assert_reads(train)
    assert_reads(val)
    assert 255 in train[0]["label"]
    assert train.note == "4 labels: 4 fine, 0 coarse"


@pytest.mark.parametrize("add", [add_mats, add_pngs])
@pytest.mark.parametrize("levels", [0, 1, 2])
def test_blender_takes_fine_labels_before_coarse_ones(tree, add, levels):
    add(tree)
    train = open_all([tree, *tree.parents][levels])
    assert train.ids == tuple(sorted((*TRAIN, *SBD)))  # and no image of val.txt
    assert_reads(train)
    assert train.note == "10 labels: 4 fine, 6 coarse"
    assert open_all(tree, ids=(SBD[1], TRAIN[2], SBD[0])).note == "3 labels: 1 fine, 2 coarse"


def test_pngs_of_coarse_labels_come_before_mats(tree):
    add_pngs(tree)
    save_mat(tree / "benchmark_RELEASE/dataset/cls", SBD[0], label_of(SBD[1], fine=False))
    assert_reads(open_all(tree, ids=SBD[:1]))


def test_a_folder_with_all_labels_has_as_many_fine_ones_as_the_lists_name(tree):
    for image_id in SBD:
        save_png(tree / "SegmentationClass", image_id, label_of(image_id, fine=False))
    train = open_all(tree)
    assert train.ids == tuple(sorted((*TRAIN, *SBD)))
    assert_reads(train)
    assert train.note == "10 labels: 4 fine, 6 coarse"


@pytest.mark.parametrize("name", ["train_aug", "trainaug"])
@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "JPEGImages/{0}.jpg SegmentationClassAug/{0}.png",
        "/JPEGImages/{0}.jpg\t/SegmentationClassAug/{0}.png",
    ],
)
def test_a_list_says_which_images_are_training_images(tree, name, line):
    add_mats(tree)
    save_list(tree, name, [line.format(i) for i in (*TRAIN, *SBD[:3], *SBD[:1], VAL[0])])
    assert open_all(tree, labels=False).ids == (*TRAIN, *SBD[:3])
    assert open_all(tree, "train_extra", "classic", labels=False).ids == SBD[:3]


def test_train_extra_is_the_rest_of_all_training_images(tree):
    add_mats(tree)
    assert open_all(tree, "train_extra", "classic", labels=False).ids == SBD
    assert open_all(tree, "train_extra", "blender", labels=False).ids == ()
    assert open_all(tree, "train+train_extra", "classic", labels=False).ids == (*TRAIN, *SBD)
    with pytest.raises(UserError, match=r"no split 'test'. Choose one of: train, train_extra, val"):
        open_all(tree, "test")


def test_the_classic_protocol_needs_the_labels_of_the_labeled_images_alone(tree):
    save_list(tree, "train_aug", (*TRAIN, *SBD))
    split, sources = loading.training_sets(data_of(tree, extra=True))
    assert len(split.labeled) == 2
    assert set(split.labeled) < set(TRAIN)
    assert {*split.labeled, *split.unlabeled} == {*TRAIN, *SBD}
    for image_id in {*TRAIN, *VAL} - set(split.labeled):
        (tree / "SegmentationClass" / f"{image_id}.png").unlink()
    _, sources = loading.training_sets(data_of(tree, extra=True))
    assert sources["labeled"].note == "2 labels: 2 fine, 0 coarse"
    assert sources["unlabeled"].note == ""
    assert [set(sources["unlabeled"][i]) for i in range(8)] == 8 * [{"image", "id", "file"}]
    alone, sources = loading.training_sets(data_of(tree))
    assert alone.labeled == split.labeled
    assert set(alone.unlabeled) == set(TRAIN) - set(split.labeled)


def test_all_fine_labels_go_with_the_images_of_sbd(tree):
    save_list(tree, "train_aug", (*TRAIN, *SBD))
    split, _ = loading.training_sets(data_of(tree, split="all", extra=True))
    assert (split.labeled, split.unlabeled) == (TRAIN, SBD)


def test_shares_are_of_the_blender_set(tree):
    add_pngs(tree)
    split, sources = loading.training_sets(data_of(tree, set="blender", split="1_2"))
    assert (len(split.labeled), len(split.unlabeled)) == (5, 5)
    fine = len(set(split.labeled) & set(TRAIN))
    assert sources["labeled"].note == f"5 labels: {fine} fine, {5 - fine} coarse"
    assert loading.load({"name": "voc", "root": str(tree)}, "train", False).ids == (*TRAIN, *SBD)


@pytest.mark.parametrize(
    "line",
    [
        "{0}",
        "JPEGImages/{0}.jpg",
        "JPEGImages/{0}.jpg SegmentationClassAug/{0}.png",
        "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png",
        "VOC2012/JPEGImages/{0}.jpg\tVOC2012/SegmentationClass/{0}.png",
    ],
)
def test_published_lists_are_read_and_recognized(tree, line, monkeypatch):
    add_mats(tree)
    labeled = save_list(tree, "labeled", [line.format(i) for i in (*TRAIN[:2], SBD[0], SBD[0])])
    unlabeled = save_list(tree, "unlabeled", [line.format(i) for i in SBD[1:]])
    published = {splits.fingerprint((*TRAIN[:2], SBD[0])): "family 3 labeled (file)"}
    monkeypatch.setattr(splits, "_published", lambda: published)
    lists = {"labeled_list": str(labeled), "unlabeled_list": str(unlabeled)}
    split, sources = loading.training_sets(data_of(tree, set="blender", **lists))
    assert split.labeled == (*TRAIN[:2], SBD[0])
    assert split.unlabeled == SBD[1:]
    assert split.family == "family 3 labeled (file)"
    assert sources["labeled"].note == "3 labels: 2 fine, 1 coarse"
    with pytest.raises(UserError, match=rf"labeled\.txt: 1 of 3 .*{SBD[0]}"):
        loading.training_sets(data_of(tree, **lists))


def test_sources_are_small_to_pickle(tree):
    add_mats(tree)
    source = open_all(tree, split="train+val")
    again = pickle.loads(pickle.dumps(source))
    assert again.ids == source.ids
    np.testing.assert_array_equal(again[0]["label"], source[0]["label"])
    assert len(pickle.dumps(source)) < 1500 + 25 * len(source)


def test_colors_and_names():
    assert (voc.INFO.num_classes, len(voc.INFO.palette)) == (21, 21)
    assert {i: voc.INFO.palette[i] for i in COLORS} == COLORS
    assert voc.color(255) == (224, 224, 192)
    assert voc.INFO.classes[0] == "background"
    assert list(voc.INFO.classes[1:]) == sorted(voc.INFO.classes[1:])
    assert (voc.INFO.classes[15], voc.INFO.classes[20]) == ("person", "tvmonitor")


@pytest.mark.parametrize("image_set", voc.SETS)
def test_missing_data_says_what_to_do(tmp_path, image_set):
    with pytest.raises(UserError) as error:
        open_all(tmp_path, image_set=image_set)
    for part in (
        "VOCtrainval_11-May-2012.tar",
        "benchmark.tgz",
        "SegmentationClassAug",
        "--config.data.root=DIR",
        ":streets",
        str(tmp_path),
    ):
        assert part in str(error.value)


def test_nothing_of_sbd_says_what_to_do(tree):
    for split, image_set in (("train", "blender"), ("train_extra", "classic")):
        with pytest.raises(UserError, match=r"which images SBD adds.*benchmark\.tgz.*extra=False"):
            open_all(tree, split, image_set)
    save_list(tree, "train_aug", TRAIN)
    with pytest.raises(UserError, match="which images SBD adds"):
        open_all(tree)


@pytest.mark.parametrize("name", ["train", "val"])
def test_missing_list_is_named(tree, name):
    (tree / "ImageSets" / "Segmentation" / f"{name}.txt").unlink()
    with pytest.raises(UserError, match=rf"Segmentation/{name}\.txt cannot be read.*Unpack"):
        open_all(tree, image_set="classic")


def test_missing_images_are_named(tree):
    (tree / "JPEGImages" / f"{TRAIN[1]}.jpg").unlink()
    with pytest.raises(UserError, match=rf"1 of 4 listed images .*{TRAIN[1]}\.jpg.*Unpack"):
        open_all(tree, image_set="classic")


def test_missing_labels_are_named(tree):
    save_list(tree, "train_aug", (*TRAIN, *SBD))
    with pytest.raises(UserError, match=rf"6 of 10 images have no label.*{SBD[0]}.*benchmark\.tgz"):
        open_all(tree)
    (tree / "SegmentationClass" / f"{TRAIN[0]}.png").unlink()
    with pytest.raises(UserError, match=f"1 of 4 images have no label.*{TRAIN[0]}"):
        open_all(tree, image_set="classic")


def test_unknown_sets_and_ids_are_refused(tree):
    with pytest.raises(UserError, match=r"data\.set='aug' is unknown.*classic, blender"):
        open_all(tree, image_set="aug")
    with pytest.raises(UserError, match=r"1 of 1 image ids.*2009_000001"):
        open_all(tree, image_set="classic", ids=["2009_000001"])


@pytest.mark.parametrize("value", [21, 200, 254])
@pytest.mark.parametrize("save", [save_png, save_mat])
def test_other_class_ids_are_refused(tree, save, value):
    label = label_of(SBD[0], fine=False)
    label[3, 4] = value
    path = save(tree / ("SegmentationClassAug" if save is save_png else voc._SBD[0]), SBD[0], label)
    with pytest.raises(UserError, match=f"{path.name} holds the class id {value}. .* 0 to 20"):
        open_all(tree, ids=SBD[:1])[0]


@pytest.mark.parametrize("save", [save_png, save_mat])
def test_sizes_that_differ_are_named(tree, save):
    label = np.zeros((30, 7), np.uint8)
    path = save(tree / ("SegmentationClassAug" if save is save_png else voc._SBD[1]), SBD[0], label)
    with pytest.raises(UserError, match=f"{path.name} is 7x30 pixels.* is 30x41"):
        open_all(tree, ids=SBD[:1])[0]


@pytest.mark.parametrize(
    "array",
    [np.zeros((30, 41, 3), np.uint8), np.zeros((30, 41), np.uint16), np.zeros((4, 4), bool)],
)
def test_labels_of_other_modes_are_refused(tree, array):
    path = save_png(tree / "SegmentationClass", TRAIN[0], array, palette=False)
    with pytest.raises(UserError, match=f"{path.name} has mode .* not colors"):
        open_all(tree, image_set="classic")[0]


def test_images_of_other_modes_are_refused(tree):
    path = tree / "JPEGImages" / f"{TRAIN[0]}.jpg"
    Image.new("CMYK", (41, 30)).save(path)
    with pytest.raises(UserError, match=f"{path.name} has mode CMYK"):
        open_all(tree, image_set="classic")[0]
    Image.new("L", (30, 41), 7).save(path)
    assert (open_all(tree, image_set="classic")[0]["image"] == np.full((41, 30, 3), 7)).all()


@pytest.mark.parametrize("kept", [0, 60, 200])
def test_damaged_files_are_named(tree, kept):
    add_mats(tree)
    mat = tree.parents[1] / voc._SBD[0] / f"{SBD[0]}.mat"
    for path in (
        tree / "JPEGImages" / f"{TRAIN[0]}.jpg",
        tree / "SegmentationClass" / f"{TRAIN[1]}.png",
        mat,
    ):
        path.write_bytes(path.read_bytes()[:kept])
        source = open_all(tree, ids=[path.stem])
        with pytest.raises(UnreadableError, match=path.name):
            source[0]
    scipy.io.savemat(mat, {"GTinst": {"Segmentation": np.zeros((3, 3), np.uint8)}})
    with pytest.raises(UnreadableError, match=f"{mat.name} cannot be read as a label of SBD"):
        open_all(tree, ids=[mat.stem])[0]
    save_mat(mat.parent, SBD[0], np.zeros((3, 3, 2)))
    with pytest.raises(UserError, match=rf"{mat.name} has shape \(3, 3, 2\) and type float64"):
        open_all(tree, ids=[mat.stem])[0]


TINY = {
    "crop": "32,32",
    "batch.labeled": 2,
    "batch.unlabeled": 2,
    "model.backbone": "resnet10",
    "model.width": 4,
    "model.stem": "conv7",
    "model.channels": 8,
    "model.low_level_channels": 8,
    "model.aspp_rates": "1,",
    "steps": 2,
    "log.every": 1,
    "eval.every": 2,
    "eval.panels": 0,
    "eval.watch": 0,
    "eval.bucket": 64,
    "log.tensorboard": False,
}


def test_a_tree_trains(tree, tmp_path):
    add_mats(tree)
    workdir = tmp_path / "run"
    changes = TINY | {"data.root": tree, "data.split": 4, "data.seed": 1}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "jaxssl.main", f"--workdir={workdir}"),
            "--config=configs/supervised_voc.py:1_8,r50",
            *(f"--config.{key}={value}" for key, value in changes.items()),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
        cwd=ROOT,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    split = json.loads((workdir / "splits.json").read_text())
    assert {*split["labeled"], *split["unlabeled"]} == {*TRAIN, *SBD}
    assert split["note"].startswith(f"{len(split['labeled'])} labels:")
    assert split["note"] in done.stdout
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([line["train/loss"] for line in lines if "train/loss" in line]).all()
    assert "val/a/iou/tvmonitor" in lines[-1]
