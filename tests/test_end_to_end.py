"""Whole runs of the shrunk demo: resume, signals, refusals, and what they leave on disk."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_same_run
from PIL import Image

from jaxssl.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]
TINY = {
    "data.size": "32,64",
    "data.train_count": 20,
    "data.val_count": 4,
    "data.split": 8,
    "crop": "32,64",
    "warmup": 4,
    "steps": 8,
    "model.width": 8,
    "model.channels": 16,
    "log.every": 1,
    "eval.every": 6,
    "eval.batch": 8,
    "checkpoint.every": 3,
}


def command(
    workdir: Path, config: str = "configs/mkd_cityscapes.py:streets", **overrides
) -> list[str]:
    flags = [f"--config.{key}={value}" for key, value in (TINY | overrides).items()]
    return [
        sys.executable,
        "-m",
        "jaxssl.main",
        f"--config={config}",
        f"--workdir={workdir}",
        *flags,
    ]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    cache = tmp_path_factory.mktemp("cache")
    return os.environ | {"XDG_CACHE_HOME": str(cache), "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}


def run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=900,
        check=False,
    )


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, environment) -> tuple[Path, str]:
    """An uninterrupted run, and what it printed."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    done = run(command(workdir), environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return workdir, done.stdout


def start(
    arguments: list[str], environment: dict[str, str], until: int, workdir: Path
) -> subprocess.Popen:
    """Starts a run and waits until it has logged a step."""
    process = subprocess.Popen(
        arguments,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics, deadline = workdir / "metrics.jsonl", time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and any(line["step"] >= until for line in lines_so_far(metrics)):
            return process
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"the run did not reach step {until}: {process.communicate()[1]}")


def lines_so_far(path: Path) -> list[dict]:
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def test_a_run_says_its_result_and_writes_its_files(finished):
    workdir, printed = finished
    last = [line for line in lines(workdir) if "val/miou" in line][-1]
    assert last["step"] == 12
    assert f"mIoU {100 * last['val/miou']:.2f} at the end" in printed
    assert str(workdir / "panels" / "0000012.png") in printed
    assert (workdir / "panels" / "0000012.png").stat().st_size > 1000
    assert list((workdir / "tensorboard").iterdir())
    for name in ("a", "b", "teacher_a", "teacher_b"):
        assert 0 <= last[f"val/{name}/miou"] <= 1
    for name in ("pseudo/coverage", "pseudo/kept", "coupling", "gap/a"):
        assert 0 <= last[f"watch/{name}"] <= 1
    assert last["watch/pseudo/kl"] >= 0
    assert last["eval/mode"] == last["watch/mode"] == "whole"
    assert "main: a on val, whole, step 12: mean" in printed
    assert printed.count("main: pseudo-labels of teacher_b on 4 images, whole") == 3
    gap = last["val/teacher_a/miou"] - last["val/a/miou"]
    assert last["watch/gap/a/miou"] == pytest.approx(gap)
    stored = json.loads((workdir / "config.json").read_text())
    assert stored["method"]["name"] == "mkd"
    split = json.loads((workdir / "splits.json").read_text())
    assert len(split["labeled"]) == 8
    assert len(split["unlabeled"]) == 12
    assert not set(split["labeled"]) & set(split["unlabeled"])


@pytest.mark.parametrize(("workers", "kill_at"), [(0, 8), (2, 5)])
def test_killed_and_resumed_equals_uninterrupted(finished, environment, tmp_path, workers, kill_at):
    workdir = tmp_path / "killed"
    arguments = command(workdir, **{"data.workers": workers})
    process = start(arguments, environment, kill_at, workdir)
    process.kill()
    process.communicate()
    resumed = run(arguments, environment)
    assert resumed.returncode == 0, resumed.stderr
    assert "Resumed at step" in resumed.stdout
    assert_same_run(workdir, finished[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(environment, tmp_path, number):
    workdir = tmp_path / "stopped"
    process = start(command(workdir, steps=500), environment, 5, workdir)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + number, stderr
    assert "Traceback" not in stderr
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        assert checkpoints.latest()[0] == lines(workdir)[-1]["step"]


def test_a_diverging_run_stops_and_names_images(environment, tmp_path):
    workdir, config = tmp_path / "diverging", "configs/supervised_cityscapes.py:streets"
    rate = {"optimizer.learning_rate": 1e30, "max_skipped": 3, "log.every": 5}
    done = run(command(workdir, config, **rate), environment)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "steps 2 to 4, 3 updates in a row were skipped" in done.stderr
    labeled = json.loads((workdir / "splits.json").read_text())["labeled"]
    assert any(image_id in done.stderr for image_id in labeled)
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == ()


def test_finished_run_says_its_result_again(finished, environment):
    workdir, printed = finished
    again = run(command(workdir), environment)
    assert again.returncode == 0, again.stderr
    result = next(line for line in printed.splitlines() if line.startswith("Done: "))
    assert result.partition("Network")[2] in again.stdout


def test_images_of_ones_own_are_labeled(finished, environment, tmp_path):
    images, out = tmp_path / "in", tmp_path / "out"
    images.mkdir()
    Image.fromarray(np.full((30, 70, 3), 90, np.uint8)).save(images / "gray.jpg")
    (images / "broken.jpg").write_text("no picture")
    predict = [sys.executable, "-m", "jaxssl.predict", f"--workdir={finished[0]}"]
    done = run([*predict, f"--input={images}", f"--output={out}"], environment)
    assert done.returncode == 1, done.stderr
    assert "broken.jpg cannot be read" in done.stdout
    assert not done.stderr
    assert np.asarray(Image.open(out / "labels" / "gray.png")).shape == (30, 70)


def test_training_from_a_written_tree_equals_training_from_memory(finished, environment, tmp_path):
    tree = tmp_path / "tree"
    prepare = [sys.executable, "-m", "jaxssl.prepare", "streets", f"--out={tree}", "--size=32,64"]
    written = run([*prepare, "--train=20", "--val=4"], environment)
    assert written.returncode == 0, written.stderr
    unlabeled = json.loads((finished[0] / "splits.json").read_text())["unlabeled"]
    for image_id in unlabeled:  # their label files must never be opened
        (
            tree / "gtFine" / "train" / image_id.split("_")[0] / f"{image_id}_gtFine_labelIds.png"
        ).unlink()
    workdir = tmp_path / "from_tree"
    done = run(command(workdir, **{"data.name": "cityscapes", "data.root": tree}), environment)
    assert done.returncode == 0, done.stderr
    assert_same_run(workdir, finished[0])


def test_damaged_files_are_named_and_others_stand_in(finished, environment, tmp_path):
    tree, workdir = tmp_path / "tree", tmp_path / "w"
    prepare = [sys.executable, "-m", "jaxssl.prepare", "streets", f"--out={tree}", "--size=32,64"]
    assert run([*prepare, "--train=20", "--val=4"], environment).returncode == 0
    split = json.loads((finished[0] / "splits.json").read_text())
    label = next(tree.glob(f"gtFine/train/*/{split['labeled'][0]}_gtFine_labelIds.png"))
    image = next(tree.glob(f"leftImg8bit/train/*/{split['unlabeled'][0]}_*.png"))
    shown = next(tree.glob("leftImg8bit/val/*/*.png"))  # others cannot stand in for this one
    whole = shown.read_bytes()
    for path in (label, image, shown):
        path.write_bytes(path.read_bytes()[:-50])
    data = {"data.name": "cityscapes", "data.root": tree}
    refused = run(command(workdir, **data), environment)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert "1 of 4 image(s) of 'val' or their labels cannot be read" in refused.stderr
    assert str(shown) in refused.stderr
    assert not (workdir / "metrics.jsonl").exists()
    shown.write_bytes(whole)
    refused = run(command(workdir, **data, **{"data.max_damaged": 0}), environment)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert str(label) in refused.stderr or str(image) in refused.stderr
    done = run(command(workdir, **data), environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("another image stands in") == 2
    noted = [json.loads(line) for line in (workdir / "quarantine.jsonl").read_text().splitlines()]
    assert {(line["stream"], line["id"]) for line in noted} == {
        ("labeled", split["labeled"][0]),
        ("unlabeled", split["unlabeled"][0]),
    }


REFUSED = {
    "missing data": ({"data.name": "cityscapes", "data.root": "/nowhere"}, "Cityscapes is missing"),
    "unknown key": ({"optimizer.lr": 1}, "The config has no key 'lr'"),
    "wrong type": ({"steps": "many"}, "many"),
    "unknown method": ({"method.name": "mdk"}, "There are: cps, cutmix_seg, dars, dml, dmt"),
    "unknown network": ({"model.name": "unet"}, "There are: classifier, deeplab_v2"),
    "unknown data set": ({"data.name": "city"}, "cityscapes"),
    "empty split": ({"data.split": 0}, "leaves 0 labeled"),
    "too many labels": ({"data.split": 21}, "there are 20"),
    "batch larger than the data": ({"batch.labeled": 16}, "8"),
    "no crop": ({"crop": "32"}, "Give height and width"),
    "evaluation mode": ({"eval.mode": "half"}, "There are: whole"),
    "schedule": ({"optimizer.schedule": "step"}, "cosine"),
}


@pytest.mark.parametrize(("overrides", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_a_mistake_is_one_message(environment, tmp_path, overrides, words):
    done = run(command(tmp_path / "w", **overrides), environment)
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("Rendering")]
    assert "Traceback" not in done.stderr
    assert said[0].startswith("error: ")
    assert words in done.stderr
    assert not (tmp_path / "w" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("configs/mkd_cityscape.py", "There is no config file"),
        ("configs/mkd_cityscapes.py:1_3", "Unknown variant '1_3'. There are: 1_16"),
        ("configs/mkd_cityscapes.py:1_8,1_4", "exclude each other"),
    ],
)
def test_a_wrong_config_is_one_message(environment, tmp_path, config, words):
    done = run(command(tmp_path / "w", config), environment)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_another_config_in_the_workdir_is_refused(finished, environment):
    done = run(
        command(finished[0], **{"optimizer.learning_rate": 0.2, "log.every": 3}), environment
    )
    assert done.returncode == 2
    assert "optimizer.learning_rate: 0.01 -> 0.2" in done.stderr
    assert "log.every" not in done.stderr
