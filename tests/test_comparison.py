"""Calibrations and rules on a small run against a forward pass and rankings in NumPy."""

import dataclasses
import json
import math
import shutil

import conftest
import jax
import numpy as np
import pytest
from sklearn.metrics import log_loss

from jaxssl import phases, report, trained
from jaxssl.comparison import compare
from jaxssl.contracts import UnreadableError, UserError
from jaxssl.data import loading
from jaxssl.data.splits import Split
from jaxssl.logs import Console


def read(workdir):
    return json.loads((workdir / "report" / "calibration.json").read_text())


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
    assert report.main([f"--workdir={workdir}", "--calibration"]) == 0
    found, printed = read(workdir), capsys.readouterr().out
    run = trained.open_trained(workdir)
    # What labeled first: the network at the end of the first phase.
    assert (found["network"], found["step"]) == ("a", 60)
    assert run.step("best") != 60
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


def test_whole_images_are_compared(digits_run, tmp_path, monkeypatch, capsys):
    workdir = shutil.copytree(digits_run, tmp_path / "w")
    conftest.digits_config(monkeypatch)
    assert report.main([f"--workdir={workdir}", "--calibration"]) == 0
    found, run = read(workdir), trained.open_trained(workdir)
    assert (found["network"], found["step"], found["ratio"]) == ("teacher_a", 60, 0.3)
    sources = sources_of(run, workdir)
    truth, variables = labels_of(sources["val"]), run.variables("teacher_a", 60)

    def probabilities(source):
        images = jax.numpy.stack([one["image"] for one in source])
        return softmax(np.asarray(run.net().apply(*variables, images, batch_stats=False)[0].logits))

    assert found["pixels"] == len(truth) == 360
    expected = log_loss(truth, probabilities(sources["val"]), labels=range(10))
    assert found["calibrations"]["none"]["cross_entropy"] == pytest.approx(expected, rel=1e-4)
    p = probabilities(sources["unlabeled"])
    surest = p.max(1) >= np.sort(p.max(1))[::-1][math.ceil(0.3 * len(p)) - 1]
    shares = np.bincount(p.argmax(1)[surest], minlength=10) / surest.sum()
    single = [*found["rules"]["ST"]["classes"].values()]
    np.testing.assert_allclose(single, shares, atol=0.01)


def test_another_network_is_taken_where_what_labeled_first_is_not_kept(workdir, capsys):
    path = workdir / "pseudo_labels" / "round_1" / "summary.json"
    stored = json.loads(path.read_text())
    stored["labeler"]["step"] = 59
    path.write_text(json.dumps(stored))
    options = [f"--workdir={workdir}", "--calibration", "--pixels=300", "--images=5"]
    assert report.main([*options, "--ratio=0.5"]) == 0
    assert "labeled before round_1 (step 59) is not kept any more" in capsys.readouterr().out
    found = read(workdir)
    assert found["step"] == trained.open_trained(workdir).step("best")
    assert (found["ratio"], found["pixels"], found["images"]) == (0.5, 300, 5)
    assert report.main([*options, "--network=a", "--step=last"]) == 0
    assert (read(workdir)["step"], read(workdir)["ratio"]) == (120, 0.3)


class Damaged:
    """A source some of whose images cannot be read."""

    def __init__(self, source, *damaged):
        self.info, self.ids, self._source, self._damaged = source.info, source.ids, source, damaged

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        if index in self._damaged:
            raise UnreadableError("half of it is missing")
        return self._source[index]


def test_a_run_that_labels_nothing_is_calibrated_as_it_evaluates(workdir, monkeypatch):
    config = json.loads((workdir / "config.json").read_text())
    config["method"] |= {"ratios": [], "beta_min": [], "beta_max": []}
    config["eval"] |= {"mode": "center_crop", "flip": True}
    (workdir / "config.json").write_text(json.dumps(config))
    split, sources = phases.open_sources(trained.open_trained(workdir).config.data)
    sources["unlabeled"] = Damaged(sources["unlabeled"], 0, 1)
    monkeypatch.setattr(phases, "open_sources", lambda data: (split, sources))
    run = trained.open_trained(workdir)
    found = compare(run, Console(), pixels=500)
    assert found == read(workdir)
    assert (found["step"], found["shown"]) == (run.step("best"), "whole, flip")
    assert (found["ratio"], found["precision"]) == (0.2, "float16")
    assert (found["images"], found["left_out"]) == (10, [*split.unlabeled[:2]])
    with pytest.raises(UserError, match=f"such as {split.unlabeled[0]}"):
        compare(run, Console(), pixels=500, images=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--network=c", "There are: a"),
        ("--step=3", "keeps no checkpoint of step 3"),
        ("--ratio=20", "share of 20.0 is not from 0 to 1"),
        ("--pixels=0", "--pixels=0 is too small"),
        ("--images=0", "--images=0 is too small"),
    ],
)
def test_a_mistake_is_one_message(workdir, capsys, arguments, words):
    shutil.rmtree(workdir / "pseudo_labels")  # pictures take the time
    assert report.main([f"--workdir={workdir}", "--calibration", arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert words in errors


def test_data_that_changed_are_refused(workdir):
    path = workdir / "splits.json"
    split = Split.from_json(path.read_text())
    path.write_text(dataclasses.replace(split, labeled=split.labeled[1:]).to_json())
    with pytest.raises(UserError, match="the data changed since the run"):
        compare(trained.open_trained(workdir), Console())
