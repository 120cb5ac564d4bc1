"""The report of a small run: its numbers against the files that they come from, its pictures, and
calibration against a forward pass and rankings in NumPy.
"""

import contextlib
import dataclasses
import functools
import io
import json
import math
import shutil

import conftest
import jax
import numpy as np
import pytest
from conftest import Linear
from ml_collections import ConfigDict
from PIL import Image
from sklearn.metrics import log_loss

from jaxssl import config as configs
from jaxssl import models, phases, report, sharding, trained
from jaxssl.contracts import DataInfo, UnreadableError
from jaxssl.data import cityscapes, loading
from jaxssl.data.splits import Split
from jaxssl.logs import Console
from jaxssl.report import CITYSCAPES_TAIL, class_figure, main, quality_figure, tail_classes

MAKE_MESH = sharding.make_mesh
HEAD = ("road", "sidewalk", "building", "vegetation", "sky", "car")


def prepare(patch):
    """DARS on streets, with a network that compiles in no time."""
    patch.setattr(models, "load", lambda config, num_classes: Linear(num_classes))
    patch.setattr(
        sharding, "make_mesh", lambda devices=None: MAKE_MESH((devices or jax.devices())[:1])
    )
    config = configs.default()
    configs.use_streets(config, None)
    with config.unlocked():
        config.data.update(size=(16, 32), train_count=20, val_count=5)
    config.update(crop=(16, 32), warmup=60, steps=30, distributed="off", compilation_cache="")
    config.method = ConfigDict({"name": "dars", "ratios": (0.3, 0.5), "label_mode": "whole"})
    config.optimizer.update(name="sgd", learning_rate=0.5)
    config.log.update(every=2, tensorboard=False)
    config.eval.update(every=15, batch=3, panels=0, bucket=24, unlabeled_truth=True)
    return config


@pytest.fixture(autouse=True)
def _networks(monkeypatch):
    prepare(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "w"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        assert phases.run(prepare(patch), workdir) == 0
    return workdir


@pytest.fixture
def workdir(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "w")


def read(workdir, name):
    return json.loads((workdir / "report" / name).read_text())


def logged(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def reported(whole, tmp_path_factory):
    """The workdir after a report, and what that printed."""
    workdir = shutil.copytree(whole, tmp_path_factory.mktemp("reported") / "w")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        prepare(patch)
        assert main([f"--workdir={workdir}"]) == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    return workdir, out.getvalue()


def test_numbers_are_those_that_the_run_wrote(reported):
    workdir, printed = reported
    found = read(workdir, "report.json")
    assert [one["phase"] for one in found["scores"]] == ["supervised", "round_1", "round_2"]
    for one in found["scores"]:
        lines = [line for line in logged(workdir) if line["phase"] == one["phase"]]
        scores = {line["step"]: line["val/miou"] for line in lines if "val/miou" in line}
        assert len(scores) == (4 if one["phase"] == "supervised" else 2)
        assert one["network"] == "a"
        assert (one["last"]["step"], one["last"]["miou"]) == max(scores.items())
        assert one["best"]["miou"] == max(scores.values()) == scores[one["best"]["step"]]
        last = next(line for line in lines[::-1] if "val/miou" in line)
        tail = [last[f"val/a/iou/{n}"] for n in CITYSCAPES_TAIL if f"val/a/iou/{n}" in last]
        assert one["last"]["tail"] == pytest.approx(np.mean(tail))
        assert one["last"]["iou"]["road"] == last["val/a/iou/road"]
        assert f"{100 * one['best']['miou']:.2f}" in printed
    stored = [
        json.loads((workdir / "pseudo_labels" / name / "summary.json").read_text())
        for name in ("round_1", "round_2")
    ]
    assert found["labelings"] == stored
    for one in stored:
        (row,) = (line for line in printed.splitlines() if f"{100 * one['kept']:.2f}" in line)
        labeler = one["labeler"]
        assert row.split() == [
            *(one["phase"], labeler["network"], "of", labeler["phase"], str(labeler["step"])),
            *("12", f"{100 * one['kept']:.2f}", f"{one['kl']:.4f}"),
            f"{100 * one['accuracy']:.2f}",
        ]


def test_pictures_are_written(reported):
    for name in ("classes.png", "pseudo_labels.png"):
        picture = Image.open(reported[0] / "report" / name).convert("RGB")
        assert min(picture.size) > 400
        assert len(picture.getcolors(2**24)) > 10
    assert len([*(reported[0] / "report").iterdir()]) == 3


def test_a_run_that_labels_nothing(workdir, capsys):
    shutil.rmtree(workdir / "pseudo_labels")
    assert main([f"--workdir={workdir}"]) == 0
    assert "No phase of this run has learned from stored pseudo-labels." in capsys.readouterr().out
    assert [path.name for path in (workdir / "report").iterdir()] == ["report.json"]
    assert read(workdir, "report.json")["labelings"] == []


def test_a_run_in_progress(workdir, capsys):
    (workdir / "pseudo_labels" / "round_2" / "summary.json").unlink()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] <= 90]
    (workdir / "metrics.jsonl").write_text("\n".join([*kept, lines[-1][:50]]))
    assert main([f"--workdir={workdir}"]) == 0
    found = read(workdir, "report.json")
    assert [one["phase"] for one in found["scores"]] == ["supervised", "round_1"]
    assert [one["phase"] for one in found["labelings"]] == ["round_1"]


def test_scores_of_another_mode_do_not_compare(workdir):
    lines = logged(workdir)
    first = next(line for line in lines if line["phase"] == "round_2" and "val/miou" in line)
    first |= {"eval/mode": "slide", "val/miou": 0.99, "val/a/miou": 0.99}
    # Other networks are scored at the end of a phase alone; what is not finite is null.
    lines[-1] |= {"val/b/miou": None, "val/b/iou/wall": 0.25, "val/b/iou/road": 0.5}
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = trained.open_trained(workdir)
    *_, one, other = report.read_scores(run, ("wall", "pole"))
    assert one["best"] == one["last"]
    assert one["best"]["miou"] < 0.99
    assert (other["network"], other["best"], other["best"]["tail"]) == ("b", other["last"], 0.25)


# Shares of the labeled pixels in Cityscapes' train set, in %.
CITYSCAPES = {
    "road": 36.88, "building": 22.82, "vegetation": 15.93, "car": 7.00, "sidewalk": 6.08,
    "sky": 4.02, "pole": 1.23, "person": 1.22, "terrain": 1.16, "fence": 0.88, "wall": 0.66,
    "traffic sign": 0.55, "bicycle": 0.41, "truck": 0.27, "bus": 0.24, "train": 0.23,
    "traffic light": 0.21, "rider": 0.14, "motorcycle": 0.10,
}  # fmt: skip


def test_tail_classes_of_cityscapes_are_those_of_the_rule():
    shares = np.array([*CITYSCAPES.values()])
    assert shares.sum() == pytest.approx(100, abs=0.1)
    assert {*CITYSCAPES} == {*cityscapes.INFO.classes}
    names = tuple(name.replace("a", "b") for name in CITYSCAPES)  # not Cityscapes' names
    prior = dict(zip(names, shares / 100, strict=True))
    found = tail_classes(DataInfo(names, ((0, 0, 0),) * 19), prior)
    expected = {name.replace("a", "b") for name in CITYSCAPES_TAIL}
    assert {*found} == expected
    assert {*cityscapes.INFO.classes} - {*CITYSCAPES_TAIL} == {*HEAD}
    assert tail_classes(cityscapes.INFO, {}) == CITYSCAPES_TAIL


def test_tail_classes_of_tables_mean():
    """IoU and Tail mIoU as printed in Table 4, rows Baseline, ST, DARS and DARS + IT."""
    rows = """
        96.7 75.4 88.2 35.2 35.0 45.8 50.3 63.0 89.6 53.9 92.3 72.1 46.7 90.0 38.4 47.9 33.0 33.7 67.0
        97.4 78.3 89.5 43.4 38.1 47.6 55.7 68.1 90.9 56.6 93.3 75.1 51.4 91.7 49.0 67.9 38.0 46.5 69.9
        97.1 77.7 89.8 50.2 46.3 50.8 58.6 69.5 90.7 57.4 92.8 75.0 52.6 91.8 57.6 70.3 44.3 49.9 69.7
        97.2 78.5 90.1 49.3 47.7 50.9 59.9 70.1 90.8 59.6 92.9 75.2 54.4 92.5 67.7 73.0 48.7 54.7 69.9
    """  # noqa: E501
    iou = np.array(rows.split(), float).reshape(4, 19)
    tail = [cityscapes.INFO.classes.index(name) for name in CITYSCAPES_TAIL]
    assert len(tail) == 13
    np.testing.assert_allclose(iou[:, tail].mean(1), [47.2, 54.0, 57.9, 60.6], atol=0.65)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({"a": 0.02, "b": 0.9, "c": 0.08}, ("a", "c")),
        ({"a": 0.02, "b": 0.88, "c": 0.1}, ("a",)),
        ({"a": 0.5, "b": 0.5, "c": 0.0}, ("c",)),
        ({"a": 0.3, "b": 0.3, "c": 0.4}, ()),
        ({}, ()),
    ],
)
def test_tail_classes_are_the_rarest(shares, expected):
    assert tail_classes(DataInfo(("a", "b", "c"), ((0, 0, 0),) * 3), shares) == expected


def summary(name, kept, accuracy, labels, pseudo):
    classes = {
        label: {"of_labels": one, "of_kept": other}
        for label, one, other in zip(("sky", "sea", "boat"), labels, pseudo, strict=True)
    }
    return {"phase": name, "kept": kept, "accuracy": accuracy, "classes": classes}


INFO = DataInfo(("sky", "sea", "boat"), ((70, 130, 180), (0, 60, 100), (255, 255, 255)))
LABELINGS = [
    summary("round_1", 0.2, 0.9, (0.3, 0.69, 0.01), (0.25, 0.75, 0.0)),
    summary("round_2", 0.5, 0.8, (0.3, 0.69, 0.01), (0.29, 0.7, 0.01)),
]


def test_bars_are_the_shares_of_classes():
    axes = class_figure(INFO, LABELINGS).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["sea", "sky", "boat"]
    tops = [bar.get_y() + bar.get_height() for bar in axes.patches]
    assert tops[:3] == pytest.approx([69, 30, 1])
    assert tops[3:5] == pytest.approx([75, 25])
    assert tops[6:] == pytest.approx([70, 29, 1])
    assert axes.get_ylim()[0] <= 1 / 1.5
    assert axes.patches[5].get_height() == 0
    (cross,) = (line for line in axes.lines if len(line.get_xdata()) == 1)
    assert cross.get_xdata() == axes.patches[5].get_x() + axes.patches[5].get_width() / 2
    assert axes.patches[0].get_facecolor()[:3] == pytest.approx((0, 60 / 255, 100 / 255))
    legend = axes.figure.legends[0]
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["labels", "round_1", "round_2", "none"]


def test_bars_are_the_quality_of_pseudo_labels():
    axes = quality_figure(LABELINGS).axes[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([20, 50, 90, 80])
    assert {"20.0", "50.0", "90.0", "80.0"} == {text.get_text() for text in axes.texts}
    unknown = [{**one, "accuracy": None} for one in LABELINGS]
    axes = quality_figure(unknown).axes[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([20, 50])


def logits_of(run, step, source):
    """In NumPy, float64 `[N,h,w,C]`, as the small network is shown whole images of 16x32."""
    variables = jax.device_get(run.variables("a", step))
    images = np.stack([source[i]["image"] for i in range(len(source))])
    logits = conftest.forward(variables, images, np.ones(images.shape[:3], bool), False)[0]
    return conftest.nearest(logits, (16, 32))


def softmax(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def sources_of(run, workdir):
    split = json.loads((workdir / "splits.json").read_text())
    data = run.config.data
    return {
        "labeled": loading.load(data, "train", True, split["labeled"]),
        "unlabeled": loading.load(data, "train", False, split["unlabeled"]),
        "val": loading.load(data, "val", True),
    }


def labels_of(source):
    return np.stack([source[i]["label"] for i in range(len(source))]).ravel()


def test_calibration_is_that_of_all_pixels(workdir, capsys):
    assert main([f"--workdir={workdir}", "--calibration"]) == 0
    found, printed = read(workdir, "calibration.json"), capsys.readouterr().out
    run = trained.open_trained(workdir)
    # The network that labeled first is not kept; the best one is, and that is said.
    assert (found["network"], found["step"]) == ("a", run.step("best"))
    assert "labeled before round_1 (step 60) is not kept any more" in printed
    assert (found["ratio"], found["precision"], found["shown"]) == (0.3, "float16", "whole")
    assert (found["images"], found["left_out"]) == (12, [])

    sources = sources_of(run, workdir)
    truth = labels_of(sources["val"])
    known = truth != 255
    logits = logits_of(run, found["step"], sources["val"]).reshape(-1, 19)[known]
    assert found["pixels"] == known.sum()
    scores, T = found["calibrations"], found["temperature"]
    for name, scaled in (("none", logits), ("temperature scaling", logits / T)):
        expected = log_loss(truth[known], softmax(scaled), labels=range(19))
        assert scores[name]["cross_entropy"] == pytest.approx(expected, rel=1e-4)
    order = ("matrix scaling", "temperature scaling", "none")
    losses = [scores[name]["cross_entropy"] for name in order]
    assert losses == sorted(losses)
    for factor in (0.97, 1.03):
        other = log_loss(truth[known], softmax(logits / (factor * T)), labels=range(19))
        assert other > scores["temperature scaling"]["cross_entropy"]

    p = softmax(logits_of(run, found["step"], sources["unlabeled"]).reshape(-1, 19))
    predicted, doubt = p.argmax(1), np.sort(p, 1)[:, :-1].sum(1)
    levels = np.minimum(np.round(-2048 * np.log2(doubt)), 65535)
    labels = labels_of(sources["labeled"])
    prior = np.bincount(labels[labels != 255], minlength=19)
    surest = levels >= np.sort(levels)[::-1][math.ceil(0.3 * len(levels)) - 1]
    kept = {"ST": np.bincount(predicted[surest], minlength=19)}
    wanted = np.round(0.3 * len(levels) * prior / prior.sum())
    kept["DARS"] = np.minimum(wanted, np.bincount(predicted, minlength=19))
    names = [*kept, *(f"ST + {name}" for name in order[:2]), "ST + histogram binning"]
    assert {*found["rules"]} == {*names, "CBST", "DA"}
    for name, counts in kept.items():
        one = found["rules"][name]
        shares = [one["classes"][label] for label in run.info.classes]
        # A confidence that float32 rounds to another level may be on the other side.
        np.testing.assert_allclose(shares, counts / counts.sum(), atol=0.01)
        assert one["kept"] == pytest.approx(counts.sum() / len(levels), abs=0.005)
        q = np.maximum(counts, 0.5) / np.maximum(counts, 0.5).sum()
        r = prior / prior.sum()
        expected = np.sum(r[r > 0] * np.log(r[r > 0] / q[r > 0]))
        assert one["kl"] == pytest.approx(expected, abs=0.03)
        assert f"{one['kl']:.4f}" in printed
    assert found["rules"]["DARS"]["kl"] < found["rules"]["ST"]["kl"]


def test_the_network_that_labeled_first_is_taken_where_it_is_kept(workdir):
    path = workdir / "pseudo_labels" / "round_1" / "summary.json"
    stored = json.loads(path.read_text())
    stored["labeler"]["step"] = trained.open_trained(workdir).kept[-1]
    path.write_text(json.dumps(stored))
    calibrate = functools.partial(
        report.calibrate, trained.open_trained(workdir), Console(), pixels=300, images=5
    )
    found = calibrate(ratio=0.5)
    assert found == read(workdir, "calibration.json")
    assert found["step"] == stored["labeler"]["step"]
    assert (found["ratio"], found["pixels"], found["images"]) == (0.5, 300, 5)
    assert calibrate(network="a", step="last")["ratio"] == 0.3


class Damaged:
    """A source whose second image cannot be read."""

    def __init__(self, source):
        self.info, self.ids, self._source = source.info, source.ids, source

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        if index == 1:
            raise UnreadableError("half of it is missing")
        return self._source[index]


def test_a_run_that_labels_nothing_is_calibrated_as_it_evaluates(workdir, monkeypatch):
    config = json.loads((workdir / "config.json").read_text())
    config["method"] |= {"ratios": [], "beta_min": [], "beta_max": []}
    config["eval"] |= {"mode": "center_crop", "flip": True}
    (workdir / "config.json").write_text(json.dumps(config))
    opened = phases.open_sources

    def damaged(data):
        split, sources = opened(data)
        return split, sources | {"unlabeled": Damaged(sources["unlabeled"])}

    monkeypatch.setattr(phases, "open_sources", damaged)
    run = trained.open_trained(workdir)
    found = report.calibrate(run, Console(), pixels=500)
    assert (found["step"], found["shown"]) == (run.step("best"), "whole, flip")
    assert (found["ratio"], found["precision"]) == (0.2, "float16")
    split = json.loads((workdir / "splits.json").read_text())
    assert (found["images"], found["left_out"]) == (11, split["unlabeled"][1:2])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workdir=/nowhere"], "/nowhere"),
        (["--calibration", "--network=c"], "There are: a"),
        (["--calibration", "--step=3"], "keeps no checkpoint of step 3"),
        (["--calibration", "--ratio=20"], "share of 20.0 is not from 0 to 1"),
        (["--calibration", "--pixels=0"], "--pixels=0 is too small"),
        (["--calibration", "--images=0"], "--images=0 is too small"),
    ],
)
def test_a_mistake_is_one_message(workdir, capsys, arguments, words):
    shutil.rmtree(workdir / "pseudo_labels")  # pictures take the time
    assert main([f"--workdir={workdir}", *arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert words in errors


def test_data_that_changed_are_refused(workdir, capsys):
    path = workdir / "splits.json"
    split = Split.from_json(path.read_text())
    path.write_text(dataclasses.replace(split, labeled=split.labeled[1:]).to_json())
    assert main([f"--workdir={workdir}", "--calibration"]) == 2
    assert "the data changed since the run" in capsys.readouterr().err
