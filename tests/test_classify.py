"""Classes of whole images as `predict` and `label` write them: those of the network, in a table."""

import csv
import json
import os
import shutil
import time

import conftest
import jax
import numpy as np
import pytest
from PIL import Image
from test_trained import contents

from jaxssl import classify, label, predict, trained
from jaxssl.classify import Table
from jaxssl.data import class_folders, loading


@pytest.fixture
def saved(digits_run, monkeypatch):
    conftest.digits_config(monkeypatch)
    return digits_run


@pytest.fixture
def images(tmp_path):
    """Digits of the validation set as files, one of them large, and one that is broken."""
    folder = tmp_path / "in"
    (folder / "sub dir").mkdir(parents=True)
    source = loading.load({"name": "digits", "root": "", "size": 8}, "val", labels=False)
    for i in range(40):
        image = Image.fromarray(source[9 * i]["image"])
        image = image.resize((40, 32), Image.Resampling.NEAREST) if i == 7 else image
        image.save(folder / ("sub dir" if i % 2 else "") / f"{i:02d}.png")
    (folder / "broken.png").write_text("no image")
    return folder


def seen(path):
    """An image as the network is shown it: its middle, as large as covers 8x8."""
    image = Image.open(path).convert("RGB")
    if image.size != (8, 8):
        image = image.resize((10, 8), Image.Resampling.BILINEAR).crop((1, 0, 9, 8))
    return np.array(image)


def probabilities(workdir, paths):
    run = trained.open_trained(workdir)
    batch = jax.numpy.stack([seen(path) for path in paths])
    logits = run.net().apply(*run.variables(), batch, batch_stats=False)[0].logits
    return conftest.softmax(np.asarray(logits, np.float64))


def table(path):
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


def call(command, workdir, images, out, *more):
    return command.main([f"--workdir={workdir}", f"--input={images}", f"--output={out}", *more])


def test_a_folder_is_classified(saved, images, tmp_path, capsys):
    out, before = tmp_path / "out", contents(images)
    assert call(predict, saved, images, out, "--probabilities") == 1
    printed = capsys.readouterr().out
    assert "broken.png cannot be read" in printed
    assert "labeled 40 of 41 images" in printed
    assert "images are shown: center_crop 8x8" in printed
    rows = table(out / "predictions.csv")
    names = [row["image"] for row in rows]
    assert names == sorted(p.relative_to(images).as_posix() for p in images.rglob("[0-9]*.png"))
    p = probabilities(saved, [images / name for name in names])
    assert len({*p.argmax(1)}) > 3
    for row, shares in zip(rows, p, strict=True):
        assert row["class"] == str(shares.argmax())
        assert float(row["confidence"]) == pytest.approx(shares.max(), abs=1e-4)
        found = [float(row[f"probability/{c}"]) for c in range(10)]
        np.testing.assert_allclose(found, shares, atol=1e-4)
    names = {path.name for path in out.iterdir()}
    assert names == {"predictions.csv", "predictions.json", "sheet.png"}
    assert np.asarray(Image.open(out / "sheet.png")).shape == (8 + 5 * 160, 8 + 8 * 136, 3)
    assert contents(images) == before


@pytest.fixture
def counting(monkeypatch):
    """Names of the images that networks are shown."""
    shown, read = [], classify.read_image

    def reading(path):
        shown.append(path.name)
        return read(path)

    monkeypatch.setattr(classify, "read_image", reading)
    return shown


def test_a_rerun_classifies_what_is_new_or_changed(saved, images, tmp_path, capsys, counting):
    (images / "broken.png").unlink()
    out = tmp_path / "out"
    for i in range(3):
        (images / f"0{2 * i}.png").rename(images / f"later{i}")
    assert call(predict, saved, images, out) == 0
    assert len(table(out / "predictions.csv")) == 37
    for i in range(3):
        (images / f"later{i}").rename(images / f"0{2 * i}.png")
    later = time.time() + 1
    os.utime(images / "10.png", (later, later))
    counting.clear()
    assert call(predict, saved, images, out) == 0
    assert sorted(counting) == ["00.png", "02.png", "04.png", "10.png"]
    assert "36 of them labeled before" in capsys.readouterr().out
    assert call(predict, saved, images, tmp_path / "fresh") == 0
    first, second = (path / "predictions.csv" for path in (out, tmp_path / "fresh"))
    assert first.read_bytes() == second.read_bytes()
    counting.clear()
    assert call(predict, saved, images / "06.png", out, "--overwrite") == 0  # the same folder
    assert counting == ["06.png"]
    assert first.read_bytes() == second.read_bytes()
    counting.clear()
    assert call(predict, saved, images, out, "--probabilities") == 0  # which were not stored
    assert len(counting) == 40


def test_stopped_it_goes_on(saved, images, tmp_path, counting, monkeypatch):
    (images / "broken.png").unlink()
    each = classify.sweep.each

    def stopped(update, batches, mesh, sink):
        def two(batch, found):
            sink(batch, found)
            two.calls += 1
            if two.calls == 2:
                raise KeyboardInterrupt

        two.calls = 0
        each(update, batches, mesh, two)

    config = json.loads((saved / "config.json").read_text())
    workdir = shutil.copytree(saved, tmp_path / "w")
    config["eval"]["batch"] = 8
    (workdir / "config.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classify.sweep, "each", stopped)
        assert call(predict, workdir, images, tmp_path / "out") == 130
    assert len(table(tmp_path / "out/predictions.csv")) == 16
    counting.clear()
    assert call(predict, workdir, images, tmp_path / "out") == 0
    assert len(counting) == 24
    assert len(table(tmp_path / "out/predictions.csv")) == 40


def test_names_of_any_kind_are_kept(tmp_path):
    one = Table(tmp_path / "t.csv", ("class",))
    names = ["a, b.png", 'quo"te.png', "é.png", "line\nbreak.png", os.fsdecode(b"\xff.png")]
    one.rows = {name: (f"class of {name!r}",) for name in names}
    one.write()
    assert Table(tmp_path / "t.csv", ("class",)).rows == one.rows
    assert Table(tmp_path / "t.csv", ("class", "confidence")).rows == {}


def test_labels_are_the_surest_and_a_folder_to_train_on(saved, images, tmp_path, capsys):
    out, before = tmp_path / "my out", contents(images)
    assert call(label, saved, images, out, "--rule=top:0.5", "--temperature=2") == 1
    rows = table(out / "labels.csv")
    p = probabilities(saved, [images / row["image"] for row in rows])
    p = p**0.5 / (p**0.5).sum(1, keepdims=True)
    surest = p.max(1) >= np.sort(p.max(1))[20]
    for row, shares, kept in zip(rows, p, surest, strict=True):
        assert row["class"] == str(shares.argmax())
        assert row["label"] == (row["class"] if kept else "")
        assert int(row["level"]) == pytest.approx(-2048 * np.log2(1 - shares.max()), abs=3)
    summary = json.loads((out / "summary.json").read_text())
    assert [summary[key] for key in ("images", "left_out", "rule")] == [41, 1, "top:0.5"]
    assert sum(one["kept"] for one in summary["classes"].values()) == 20
    assert contents(images) == before
    printed = capsys.readouterr().out
    assert f"--config.data.root='{out}'" in printed

    tree = class_folders.find(out)
    labels = {row["image"]: row["label"] for row in rows}
    source = class_folders.ClassFolders(tree, "train+val")
    assert len(source) == 20
    for i, image_id in enumerate(source.ids):
        part, name, inner = image_id.split("/", 2)
        assert (part, name) == ("train", labels[f"{inner}.png"])
        record = source[i]
        assert source.info.classes[record["label"]] == name
        found = np.array(Image.open(images / f"{inner}.png"))
        np.testing.assert_array_equal(record["image"], found)
    others = class_folders.ClassFolders(tree, "train_extra", labels=False)
    expected = {name.removesuffix(".png") for name, word in labels.items() if not word}
    assert {image_id.removeprefix("unlabeled/") for image_id in others.ids} == expected


def test_another_rule_selects_anew_and_leaves_other_files(saved, images, tmp_path, counting):
    (images / "broken.png").unlink()
    one, two = tmp_path / "one", tmp_path / "two"
    assert call(label, saved, images, one, "--rule=top:0.9") == 0
    mine, link = one / "train/3/mine.png", one / "unlabeled/link.png"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    link.symlink_to(tmp_path / "elsewhere.png")
    counting.clear()
    assert call(label, saved, images, one, "--rule=balanced:0.3") == 0
    assert not counting
    assert mine.read_text() == "mine"
    assert link.is_symlink()
    assert call(label, saved, images, two, "--rule=balanced:0.3") == 0
    mine.unlink()
    link.unlink()

    def made(out):
        links = {path.relative_to(out): os.readlink(path) for path in out.rglob("*.png")}
        return links, (out / "labels.csv").read_bytes(), (out / "summary.json").read_bytes()

    assert made(one) == made(two)


def test_aligned_keeps_classes_as_training_has_them(saved, images, tmp_path):
    assert call(label, saved, images, tmp_path / "out", "--rule=aligned:0.5") == 1
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    for found in summary["classes"].values():
        assert found["of_labels"] == 0.1
        assert found["kept"] <= min(2, found["predicted"])


REFUSED = {
    "overlays": (predict, ["--nooverlay"], "--nooverlay is for labels of pixels"),
    "label ids": (predict, ["--label_ids"], "--label_ids is for labels of pixels"),
    "windows": (predict, ["--mode=slide"], "eval.mode=slide is for labels of pixels"),
    "half": (label, ["--mode=half_res"], "eval.mode=half_res is for labels of pixels"),
    "one name twice": (label, [], "A.jpeg and a.png have the same name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_message_and_writes_nothing(saved, images, tmp_path, capsys, case):
    command, flags, words = REFUSED[case]
    if case == "one name twice":
        for name in ("a.png", "A.jpeg"):
            shutil.copy(images / "00.png", images / name)
    before = contents(tmp_path)
    assert call(command, saved, images, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert contents(tmp_path) == before


def test_output_among_the_images_is_no_input(saved, images):
    (images / "broken.png").unlink()
    for _ in range(2):
        assert call(label, saved, images, images / "out", "--rule=top:0.5") == 0
    rows = table(images / "out/labels.csv")
    assert len(rows) == 40
    assert len([*(images / "out").rglob("*.png")]) == 40
