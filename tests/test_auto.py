import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxssl import auto
from jaxssl import config as configs
from jaxssl.contracts import UserError
from jaxssl.data import packing
from jaxssl.data.folder import Facts

CLASSES = ("0 sky", "1 road")


def facts(labeled=40, unlabeled=100, sizes=((240, 320), (480, 640)), classes=CLASSES):
    return Facts(labeled, unlabeled, tuple(sizes), classes, ("a note",))


def chosen(key, given, network="small", devices=1, **settings):
    config = configs.folder(network)
    config.update_from_flattened_dict(settings)
    return auto._get(auto.choose(config, given, devices)[0], key)


@pytest.mark.parametrize(
    ("sizes", "network", "crop"),
    [
        ([(360, 480)], "small", (256, 256)),
        ([(360, 480)], "r50", (352, 480)),
        ([(1024, 2048)], "r50", (512, 512)),
        ([(64, 128)], "small", (64, 128)),
        ([(20, 33)], "small", (20, 32)),
        ([(300, 300)] * 19 + [(50, 50)], "r50", (288, 288)),
        ([(300, 300)] * 5 + [(50, 70)] * 5, "r50", (32, 64)),
    ],
)
def test_crop_fits_nine_of_ten_images(sizes, network, crop):
    assert chosen("crop", facts(sizes=sizes), network) == crop


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "network", "batch"),
    [
        (40, 100, "small", 4),
        (40, 100, "r50", 8),
        (3, 100, "r50", 2),
        (1, 9, "r50", 1),
        (40, 5, "r50", 8),
        (7, 0, "r50", 4),
    ],
)
def test_batch_takes_no_more_images_than_there_are(labeled, unlabeled, network, batch):
    assert chosen("batch.labeled", facts(labeled, unlabeled), network) == batch
    unlabeled_batch = 4 if unlabeled == 5 else batch
    assert chosen("batch.unlabeled", facts(labeled, unlabeled), network) == unlabeled_batch


@pytest.mark.parametrize(
    ("devices", "accumulate", "labeled", "unlabeled", "batches"),
    [
        (2, 1, 40, 100, (4, 4)),
        (3, 1, 40, 100, (6, 6)),
        (8, 1, 40, 100, (8, 8)),
        (16, 1, 40, 100, (16, 16)),
        (1, 3, 40, 100, (6, 6)),
        (3, 2, 40, 100, (6, 6)),
        (3, 1, 5, 100, (3, 3)),  # there are no six images
        (3, 1, 40, 5, (6, 3)),
        (8, 1, 7, 100, (4, 4)),  # not one for each device: refused where batches are split
        (8, 1, 40, 5, (8, 4)),
    ],
)
def test_devices_share_a_batch_evenly(devices, accumulate, labeled, unlabeled, batches):
    settings = {"devices": devices, "batch.accumulate": accumulate}
    for key, batch in zip(("labeled", "unlabeled"), batches, strict=True):
        assert chosen(f"batch.{key}", facts(labeled, unlabeled), **settings) == batch


def test_a_batch_for_the_devices_is_said():
    _, lines = auto.choose(configs.folder("small"), facts(), 3)
    assert lines[1].endswith(
        "batch.labeled 6 (there are 40 labeled images, and multiples of 3 split evenly)"
    )


@pytest.mark.parametrize(("images", "steps"), [(10, 250), (30, 750), (1000, 1000)])
def test_steps_are_a_hundred_passes_within_limits(images, steps):
    assert chosen("steps", facts(4, images)) == steps
    assert chosen("warmup", facts(4, images)) == steps
    assert chosen("eval.every", facts(4, images)) == 2 * steps // 20
    assert chosen("warmup", facts(4, images), **{"model.pretrained": "some"}) == 0
    assert chosen("steps", facts(4, images), epochs=7.0) is None


@pytest.mark.parametrize(
    ("sizes", "crop", "mode"),
    [
        ([(256, 512)], (128, 256), "whole"),
        ([(256, 512), (257, 300)], (128, 256), "slide"),
        ([(100, 513)], (128, 256), "slide"),
    ],
)
def test_large_images_are_evaluated_by_windows(sizes, crop, mode):
    assert chosen("eval.mode", facts(sizes=sizes), crop=crop) == mode


def test_evaluation_batches_hold_a_bounded_number_of_logits():
    # 2**26 / (1024 * 1024 * 2 classes) = 32; / 150 classes: less than one image
    assert chosen("eval.batch", facts(sizes=[(1024, 1024)])) == 16
    assert chosen("eval.batch", facts(sizes=[(1024, 2048)], classes=numbered(16))) == 2
    assert chosen("eval.batch", facts(sizes=[(1024, 1024)], classes=numbered(150))) == 1


def numbered(count):
    return tuple(f"{i} class{i}" for i in range(count))


def test_a_line_that_says_what_to_ignore_is_no_class():
    found = facts(classes=(*numbered(3), "255 ignore"))
    _, lines = auto.choose(configs.folder("small"), found)
    assert any("3 classes" in line for line in lines)


def test_what_a_user_sets_stays():
    config = configs.folder("small")
    own = {"crop": (40, 50), "batch.labeled": 3, "steps": 9, "warmup": 0, "eval.mode": "slide"}
    own |= {"batch.unlabeled": 5, "eval.batch": 2, "eval.every": 7, "data.classes": ("x", "y")}
    config.update_from_flattened_dict(own)
    result, lines = auto.choose(config, facts())
    assert lines == []
    assert result.to_dict() == config.to_dict()
    config.batch.labeled = None
    result, (line,) = auto.choose(config, facts())
    assert result.batch.labeled == 4
    assert line.startswith("chosen from the data: batch.labeled 4 (")
    assert config.batch.labeled is None


def test_every_choice_is_said():
    config, lines = auto.choose(configs.folder("small"), facts())
    assert len(lines) == len(auto.RULES)
    assert "crop 224x256 (images are 240x320 to 480x640)" in lines[0]
    assert not any(auto._is_open(auto._get(config, key)) for key in auto.RULES)


@pytest.mark.parametrize("text", ["", '{"data": {"name": "streets"}}'])
def test_a_workdir_of_another_run_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is not of a run with such a config"):
        auto.resolve(configs.folder(), tmp_path, print)


def test_a_resumed_run_goes_on_as_it_began(tmp_path):
    began, _ = auto.choose(configs.folder("small"), facts())
    (tmp_path / "config.json").write_text(began.to_json_best_effort())
    config = configs.folder("small")  # its data.root is not there: nothing is looked at
    config.eval.mode = "whole"
    resumed = auto.resolve(config, tmp_path, print)
    assert resumed.eval.mode == "whole"
    assert resumed.crop == (224, 256)
    stored = json.loads(began.to_json_best_effort())
    assert configs.differences(stored, json.loads(resumed.to_json_best_effort())) == []


@pytest.fixture
def three(tmp_path):
    """A config for three images, two of which have a mask, of classes that a file names."""
    for i in range(3):
        for kind, shape in (("images", (20, 30, 3)), ("labels", (20, 30))):
            (tmp_path / kind).mkdir(exist_ok=True)
            if kind == "images" or i:
                Image.fromarray(np.full(shape, i, np.uint8)).save(tmp_path / kind / f"{i}.png")
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    config = configs.folder("small")
    config.data.root = str(tmp_path)
    return config


def test_edited_classes_are_refused_when_a_run_goes_on(three, tmp_path):
    config, table = three, tmp_path / "classes.txt"
    began = auto.resolve(config, None, print)
    (tmp_path / "config.json").write_text(began.to_json_best_effort())
    assert auto.resolve(config, tmp_path, print).to_dict() == began.to_dict()
    table.write_text("sky\nroad\nbus\n")
    with pytest.raises(UserError, match=r"classes\.txt now says 2 bus.*began with 2 car"):
        auto.resolve(config, tmp_path, print)
    assert auto.resolve(config, None, print).data.classes == ("0 sky", "1 road", "2 bus")
    table.unlink()
    assert auto.resolve(config, tmp_path, print).to_dict() == began.to_dict()


def test_packed_images_are_trained_on_as_the_folder_they_come_from(three, tmp_path):
    began = auto.resolve(three, None, print)
    packing.pack(packing.parts_of(three.data), tmp_path / "packed")
    three.data.update(name="tfds", root=str(tmp_path / "packed"))
    found = auto.resolve(three, None, print)
    began.data.update(name="tfds", root=three.data.root)
    lines = [line.partition(" #")[0] for line in found.data.classes]  # masks name no colors
    assert lines == list(began.data.classes)
    began.data.classes = found.data.classes
    assert found.to_dict() == began.to_dict()


def test_other_configs_set_everything_themselves():
    config = configs.default()
    assert auto.resolve(config, None, print) is config


@pytest.mark.parametrize(
    ("key", "value"),
    [("steps", 0), ("batch.accumulate", 0), ("batch.labeled", -4), ("warmup", -1)],
)
def test_numbers_that_are_too_small_are_refused(key, value):
    config = configs.folder()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=rf"{key}={value} is too small.*--config.{key}"):
        auto.resolve(config, None, print)


def test_size_range():
    assert auto.size_range([(3, 9), (5, 7)]) == "3x7 to 5x9"
    assert auto.size_range([(3, 9)]) == "3x9"
    assert auto.size_range([]) == "-"


@pytest.mark.slow  # compiles a step
def test_a_folder_with_black_and_white_masks_trains_and_resumes(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(8):
        size = (40 + i, 60 - i)
        for kind, array in (
            ("images", rng.integers(0, 256, (*size, 3), np.uint8)),
            ("labels", 255 * rng.integers(0, 2, size, np.uint8)),
        ):
            (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(tmp_path / "data" / kind / f"image {i}.png")
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "jaxssl.main", f"--workdir={workdir}"]
    command += ["--config=configs/supervised_folder.py:small", "--config.model.width=8"]
    command += [f"--config.data.root={tmp_path / 'data'}"]
    command += ["--config.steps=2", "--config.warmup=0"]
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    environment["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=3"
    )
    printed = []
    for _ in range(2):
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=root, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert "0 is background, 255 foreground" in printed[0]
    assert "chosen from the data: crop 32x32 (images are 40x53 to 47x60)" in printed[0]
    assert "chosen" not in printed[1]
    assert "Resumed at step 2 of 2" in printed[1]
    stored = json.loads((workdir / "config.json").read_text())
    assert (stored["crop"], stored["batch"]["labeled"], stored["steps"]) == ([32, 32], 6, 2)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {"val/a/iou/background", "val/a/iou/foreground"} <= lines[-1].keys()
