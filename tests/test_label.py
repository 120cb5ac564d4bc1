"""Labels of a folder: those of the network that the rule keeps, however often it was stopped."""

import json
import os
import shutil
import time

import jax
import numpy as np
import pytest
from conftest import Linear, make_state
from ml_collections import ConfigDict
from PIL import Image
from test_predict import logits_of, noise
from test_trained import CLASSES, INFO, contents

from jaxssl import config as configs
from jaxssl import models, predictions
from jaxssl.checkpoint import Checkpoints
from jaxssl.contracts import DataInfo, Selection
from jaxssl.data import cityscapes, folder, loading, masks, voc
from jaxssl.data.pseudo_labels import Store
from jaxssl.label import class_lines, main
from jaxssl.methods import supervised
from jaxssl.predict import Job
from jaxssl.predictions import Prediction, read_image

NAMES = {"a": "a.PNG", "sub dir/b.v2": "sub dir/b.v2.jpg", "gray": "gray.bmp"}
PRIOR = (300, 0, 100, 200)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run on a folder with three masks, and the state of its network."""
    root = tmp_path_factory.mktemp("run")
    drawn = np.repeat(np.array([0, 2, 3, 255], np.uint8), (*PRIOR[:1], *PRIOR[2:], 60))
    for i, part in enumerate(np.random.default_rng(0).permutation(drawn).reshape(3, 10, 22)):
        save(root / f"data/images/{i}.png", noise(10, 22, i))
        save(root / f"data/labels/{i}.png", part)
    shutil.copytree(root / "data/images", root / "data/val/images")
    shutil.copytree(root / "data/labels", root / "data/val/labels")
    config = configs.folder("small")
    config.crop, config.method = (16, 24), ConfigDict({"name": "supervised"})
    config.eval.update(mode="whole", batch=1)
    config.data.update(root=str(root / "data"), classes=CLASSES["classes"])
    (root / "w").mkdir()
    (root / "w/config.json").write_text(config.to_json_best_effort())
    (root / "w/classes.json").write_text(json.dumps(CLASSES))
    state = make_state(supervised.Method(), {"a": Linear()})
    record = {"step": 3, "score": 0.5, "choice": 0.5, "network": "a", "last": 0.5}
    meta = {"phase": "main", "phases": [["main", 3]], "best": {"main": record}}
    with Checkpoints(root / "w/checkpoints") as checkpoints:
        checkpoints.save(3, state, meta)
    return root / "w", state


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(models, "load", lambda config, num_classes, **_: Linear(num_classes))
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: first)


@pytest.fixture
def images(tmp_path):
    root = tmp_path / "in"
    save(root / "a.PNG", noise(16, 24))
    save(root / "sub dir/b.v2.jpg", noise(20, 31, 1), quality=95)
    save(root / "gray.bmp", noise(9, 30, 2)[..., 0])
    return root


@pytest.fixture
def fake(monkeypatch):
    """A network that reads class and confidence from the colors; counts the images it sees."""
    seen = []

    def predict(image):
        seen.append(image.shape)
        levels = 8 * (image[..., 1].astype(np.uint16) // 8)  # some are equally sure
        return Prediction(image[..., 0] % 4, levels=levels)

    monkeypatch.setattr(Job, "predictor", lambda self, read: predict)
    return seen


def run(workdir, images, out, *more):
    return main([f"--workdir={workdir}", f"--input={images}", f"--output={out}", *more])


def read(path):
    return np.asarray(Image.open(path))


def files(out):
    """What the command made but its settings, which name the folders."""
    found = {path: data for path, (_, data) in contents(out).items() if data}
    return {path: data for path, data in found.items() if path.name != "predictions.json"}


def surest(labels, levels, share):
    """What is kept of each class, by sorting: all as sure as the last of the share."""
    kept = {name: np.full_like(label, 255) for name, label in labels.items()}
    for c in range(4):
        ranked = np.sort(np.concatenate([levels[n][labels[n] == c] for n in labels]))[::-1]
        if len(ranked):
            lowest = ranked[int(np.ceil(share * len(ranked))) - 1]
            for name, label in labels.items():
                kept[name][(label == c) & (levels[name] >= lowest)] = c
    return kept


def test_labels_are_the_surest_of_the_network(saved, images, tmp_path, capsys):
    (workdir, state), out = saved, tmp_path / "out"
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    before = contents(images), contents(workdir)
    assert run(workdir, images, out, "--rule=balanced:0.3", "--temperature=2") == 1
    labels, levels = {}, {}
    for name, file in NAMES.items():
        logits = logits_of(state.network("a"), read_image(images / file)) / 2
        labels[name] = logits.argmax(-1)
        np.testing.assert_array_equal(read(out / f"predicted/{name}.png"), labels[name])
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        doubt = np.sort(shares, -1)[..., :-1].sum(-1) / shares.sum(-1)
        levels[name] = read(out / f"confidence/{name}.png").astype(int)
        np.testing.assert_allclose(levels[name], -2048 * np.log2(doubt), atol=2)
    expected = surest(labels, levels, 0.3)
    assert len({*np.concatenate([x.ravel() for x in expected.values()])}) > 3
    colors = np.vstack([INFO.palette, np.full((252, 3), 255)])
    for name, label in expected.items():
        found = Image.open(out / f"labels/{name}.png")
        np.testing.assert_array_equal(np.asarray(found), label)
        np.testing.assert_array_equal(np.asarray(found.convert("RGB")), colors[label])
    summary = json.loads((out / "summary.json").read_text())
    kept = [sum((x == c).sum() for x in expected.values()) for c in range(4)]
    assert [one["kept"] for one in summary["classes"].values()] == kept
    assert (summary["rule"], summary["images"], summary["left_out"]) == ("balanced:0.3", 4, 1)
    assert (contents(images), contents(workdir)) == before
    printed = capsys.readouterr().out
    assert "broken.png cannot be read" in printed
    assert "3 of 4 images have labels in" in printed
    assert "Failed, for the reasons above: 1." in printed
    assert "accuracy" not in printed  # nothing is known of it


def test_a_finished_folder_is_left_alone(saved, images, tmp_path, capsys, fake):
    out = tmp_path / "out"
    assert run(saved[0], images, out) == 0
    before, printed = contents(out), capsys.readouterr().out.splitlines()
    (images / "broken.png").write_text("no image")
    assert run(saved[0], images, out) == 1
    after = contents(out)
    folders = "labels", "predicted", "confidence", "summary.json", "selection.json"
    assert all(after[path] == before[path] for path in before if path.parts[0] in folders)
    assert after.keys() == before.keys()
    again = capsys.readouterr().out.splitlines()
    table = [line for line in printed if line.startswith("  ")]
    assert len(table) == 5
    assert [line for line in again if line.startswith("  ")] == table
    assert len(fake) == 3


def count_labels(workdir, prior):
    """What a run leaves that labeled images itself."""
    chosen = Selection(np.zeros(4, np.int64), np.ones(4))
    Store(workdir / "pseudo_labels/round1", INFO).write_selection(chosen, prior, prior)


def stop_at(monkeypatch, number):
    """Ctrl-C comes instead of the file of that number, if so many are written."""
    begun = []

    def whole(path):
        begun.append(path)
        if len(begun) == number:
            raise KeyboardInterrupt
        return writing(path)

    writing = predictions.whole
    for module in ("label", "predictions", "data.pseudo_labels", "data.files"):
        monkeypatch.setattr(f"jaxssl.{module}.whole", whole)
    return begun


def test_stopped_anywhere_it_goes_on_to_the_same(saved, images, tmp_path, fake):
    workdir = shutil.copytree(saved[0], tmp_path / "w")
    count_labels(workdir, np.array(PRIOR))  # so that both rules know them, whichever came first
    rules = "--rule=aligned:0.4", "--rule=balanced:0.3"
    expected = {}
    for rule in rules:
        assert run(workdir, images, tmp_path / rule, rule) == 0
        expected[rule] = files(tmp_path / rule)
    for first in (rules[0], None):
        number = 0
        while True:
            out, number = tmp_path / f"{first} {number}", number + 1
            if first is None:  # selects by the second rule when it is stopped
                shutil.copytree(tmp_path / rules[1], out, symlinks=True)
            with pytest.MonkeyPatch.context() as patch:
                begun = stop_at(patch, number)
                code = run(workdir, images, out, rules[0])
            assert code == (130 if len(begun) >= number else 0)
            if code == 0:
                break
            assert not list(out.rglob("*.part"))
            done = len(list(out.glob("predicted/**/*.png")))
            second = rules[number % 2] if first is None else rules[0]
            fake.clear()
            assert run(workdir, images, out, second) == 0
            assert len(fake) == 3 - done  # no image is labeled twice
            assert files(out) == expected[second], number
        assert number > 10


def test_another_rule_selects_anew_without_the_network(saved, images, tmp_path, fake):
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(saved[0], images, one, "--rule=top:0.1") == 0
    assert run(saved[0], images, two, "--rule=threshold:0.03") == 0
    assert files(one) != files(two)
    fake.clear()
    assert run(saved[0], images, one, "--rule=threshold:0.03") == 0
    assert files(one) == files(two)
    assert not fake
    assert run(saved[0], images, one, "--rule=threshold:0.03", "--overwrite") == 0
    assert files(one) == files(two)
    assert len(fake) == 3


def test_new_and_changed_images_are_labeled_and_all_selected_anew(saved, images, tmp_path, fake):
    out = tmp_path / "out"
    assert run(saved[0], images, out) == 0
    fake.clear()
    save(images / "new.png", noise(12, 8, 5))
    save(images / "a.PNG", noise(16, 24, 6))
    later = time.time() + 1
    os.utime(images / "a.PNG", (later, later))
    assert run(saved[0], images, out) == 0
    assert sorted(fake) == [(12, 8, 3), (16, 24, 3)]
    assert run(saved[0], images, tmp_path / "fresh") == 0
    assert files(out) == files(tmp_path / "fresh")


def test_aligned_keeps_classes_as_the_labels_of_training_have_them(
    saved, images, tmp_path, capsys, fake
):
    out = tmp_path / "out"
    assert run(saved[0], images, out, "--rule=aligned:0.2") == 0
    assert json.loads((out / "selection.json").read_text())["prior"] == list(PRIOR)
    summary = json.loads((out / "summary.json").read_text())
    pixels = 16 * 24 + 20 * 31 + 9 * 30
    for found, prior in zip(summary["classes"].values(), PRIOR, strict=True):
        wanted = 0.2 * pixels * prior / sum(PRIOR)
        assert found["predicted"] > wanted
        assert abs(found["kept"] - wanted) <= 4 * np.sqrt(wanted)  # some are drawn
    assert "of labels %" in capsys.readouterr().out


def test_what_a_run_counted_is_taken_over_and_else_asked_for(saved, images, tmp_path, capsys, fake):
    workdir, out = shutil.copytree(saved[0], tmp_path / "w"), tmp_path / "out"
    config = json.loads((workdir / "config.json").read_text())
    data, config["data"]["root"] = config["data"]["root"], str(tmp_path / "gone")
    (workdir / "config.json").write_text(json.dumps(config))
    assert run(workdir, images, out, "--rule=aligned:0.2") == 2
    error = capsys.readouterr().err
    assert f"There is no folder {tmp_path / 'gone'}" in error
    assert "Say where they are, --config.data.root=DIR, or take another rule" in error
    assert not out.exists()
    assert run(workdir, images, out, "--rule=aligned:0.2", f"--config.data.root={data}") == 0
    assert json.loads((out / "selection.json").read_text())["prior"] == list(PRIOR)
    for rule in ("--rule=top:0.2", "--rule=aligned:0.2"):  # from what the output has
        assert run(workdir, images, out, rule) == 0
        assert json.loads((out / "selection.json").read_text())["prior"] == list(PRIOR)
    count_labels(workdir, np.array([1, 2, 3, 4]))
    assert run(workdir, images, tmp_path / "other", "--rule=aligned:0.2") == 0
    assert json.loads((tmp_path / "other/selection.json").read_text())["prior"] == [1, 2, 3, 4]


def test_masks_of_other_classes_are_not_counted(saved, images, tmp_path, capsys):
    workdir = shutil.copytree(saved[0], tmp_path / "w")
    other = {**CLASSES, "classes": ["sky", "ground", "tree", "bus"]}
    (workdir / "classes.json").write_text(json.dumps(other))
    assert run(workdir, images, tmp_path / "out", "--rule=aligned:0.2") == 2
    assert "The data have the classes sky, ground, tree, car, but" in capsys.readouterr().err


def test_the_folder_is_one_to_train_on(saved, images, tmp_path, capsys, fake):
    out = tmp_path / "my out"
    (images / "broken.png").write_text("no image")
    assert run(saved[0], images, out, "--rule=top:0.4") == 1
    assert f"--config.data.root='{out}'" in capsys.readouterr().out
    save(out / "val/images/v.png", noise(10, 10))
    save(out / "val/labels/v.png", np.full((10, 10), 3, np.uint8))
    data = configs.folder().data
    data.root = str(out)
    facts = folder.look(data)
    assert (facts.labeled, facts.unlabeled) == (3, 1)
    source = loading.training_sets(data)[1]["labeled"]
    assert source.info == INFO
    assert set(source.ids) == set(NAMES)
    for i, name in enumerate(source.ids):
        record = source[i]
        label = read(out / f"labels/{name}.png")
        assert {*np.unique(label)} > {255}
        np.testing.assert_array_equal(record["label"], label)
        np.testing.assert_array_equal(record["image"], read_image(images / NAMES[name]))
    val = loading.load(data, "val", labels=True)
    assert [(val[i]["id"], val[i]["label"].mean()) for i in range(len(val))] == [("val/v", 3)]


def test_a_link_never_holds_itself(saved, images, capsys, fake):
    for _ in range(2):
        assert run(saved[0], images, images / "out") == 0
        assert "must not lie in images/" in capsys.readouterr().out
    assert not (images / "out/images").exists()
    assert len(fake) == 3  # its labels are no images


def test_one_image_or_one_class_is_nothing_to_train_on(saved, images, tmp_path, capsys, fake):
    assert run(saved[0], images / "a.PNG", tmp_path / "one") == 0
    assert "To train" not in capsys.readouterr().out
    assert run(saved[0], images, tmp_path / "none", "--rule=threshold:1") == 0
    printed = capsys.readouterr().out
    assert "No label is kept of: sky, ground, tree, car." in printed
    assert "To train" not in printed
    assert (read(tmp_path / "none/labels/a.png") == 255).all()


def test_images_that_cannot_be_read_alone_fail_alone(saved, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/broken.png").write_text("no image")
    assert run(saved[0], tmp_path / "in", tmp_path / "out") == 1
    assert "0 of 1 images have labels" in capsys.readouterr().out


REFUSED = {
    "rule": (["--rule=best:0.5"], "There are threshold:C"),
    "share": (["--rule=top:50"], "not from 0 to 1"),
    "temperature": (["--temperature=0"], "--temperature=0"),
    "seed": (["--seed=-1"], "--seed=-1"),
    "network": (["--network=b"], "no network 'b'"),
    "step": (["--step=4"], "one of 3"),
    "foreign output": (["--output={images}/sub dir"], "files that this command did not make"),
    "window": (["--config.eval.mode=slide", "--window=8"], "Give height and width"),
    "one name twice": ([], "A.jpeg and a.PNG would both be written to"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_message_and_writes_nothing(saved, images, tmp_path, capsys, case):
    flags, words = REFUSED[case]
    if case == "one name twice":
        shutil.copy(images / "a.PNG", images / "A.jpeg")
    before = contents(tmp_path)
    more = [flag.format(images=images) for flag in flags]
    assert run(saved[0], images, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert contents(tmp_path) == before


@pytest.mark.parametrize("flag", ["--temperature=2", "--mode=half_res"])
def test_what_was_labeled_otherwise_does_not_mix(saved, images, tmp_path, capsys, fake, flag):
    assert run(saved[0], images, tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    assert run(saved[0], images, tmp_path / "out", flag) == 2
    assert "belongs to another input, network or mode" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    "info",
    [
        cityscapes.INFO,
        voc.INFO,
        DataInfo(("background", "foreground"), ((0, 0, 0), (255, 255, 255))),
        DataInfo(("a b", "c 1", "d"), ((9, 9, 9), (9, 9, 9), (1, 2, 3))),
    ],
)
def test_class_lines_say_what_numbers_mean(info):
    table = masks.parse(class_lines(info), (), "classes.txt")
    assert table.names == info.classes
    assert table.values == tuple(range(info.num_classes))
    assert table.labels_of_values()[255] == 255
    for found, color in zip(table.colors, info.palette, strict=True):
        assert found == (color if info.palette.count(color) == 1 else None)
