"""Pseudo-labels against their definitions, dead losses, and runs in which nothing is finite."""

import dataclasses
import json
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Linear, forward, make_state, nearest

from jaxssl import config as configs
from jaxssl import methods, models, phases, sharding, watch
from jaxssl.checkpoint import Checkpoints
from jaxssl.contracts import DataInfo, UnreadableError, UserError
from jaxssl.evaluate import Evaluation, Evaluator
from jaxssl.methods import mkd, supervised
from jaxssl.signals import StopSignal

SUPERVISED = Path(__file__).parent.parent / "configs" / "supervised_cityscapes.py"
CLASSES = ("road", "car", "sky", "train")


def softmax(logits):
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def random_maps(seed=0, shape=(3, 5, 7)):
    """Truth and pseudo-labels of 4 classes; 255 in both, a class that never occurs in each."""
    rng = np.random.default_rng(seed)
    truth, taught = rng.choice([0, 1, 2, 255], shape), rng.choice([0, 2, 3, 255], shape)
    return truth.astype(np.uint8), taught.astype(np.uint8), rng.random(shape) < 0.8


def pseudo(truth, taught, valid=None):
    truth, taught = np.asarray(truth, np.uint8), np.asarray(taught, np.uint8)
    valid = np.ones(truth.shape, bool) if valid is None else valid
    counts = watch.pseudo_label_counts(truth, taught, valid, len(CLASSES))
    return watch.PseudoLabels(np.asarray(counts, np.int64))


def test_pseudo_labels_against_their_definitions():
    truth, taught, valid = random_maps()
    found = pseudo(truth, taught, valid)
    known, kept = valid & (truth != 255), valid & (taught != 255)
    assert found.accuracy == pytest.approx((truth == taught)[known & kept].mean())
    assert found.coverage == pytest.approx(kept[known].mean())
    assert found.kept == pytest.approx(kept[valid].mean())
    for c in range(4):
        chosen, true = known & (taught == c), known & (truth == c)
        precision = (truth[chosen] == c).mean() if chosen.any() else np.nan
        coverage = kept[true].mean() if true.any() else np.nan
        np.testing.assert_allclose(found.precision[c], precision)
        np.testing.assert_allclose(found.class_coverage[c], coverage)
        assert found.per_class[c] == chosen.sum()


def test_perfect_labels():
    truth = [0, 0, 1, 2, 2, 2]
    watched = watch.Watched("b", pseudo(truth, truth), np.array([20, 10, 30, 0]), {}, 1, "whole")
    values = watched.values(CLASSES)
    assert values["watch/pseudo/accuracy"] == values["watch/pseudo/coverage"] == 1
    assert values["watch/pseudo/kl"] == pytest.approx(0, abs=1e-12)
    assert values["watch/pseudo/share/sky"] == 0.5
    assert "watch/pseudo/precision/train" not in values
    assert "watch/pseudo/coverage/train" not in values
    assert [row[0] for row in watched.rows(CLASSES)] == ["road", "car", "sky"]


def test_nothing_kept():
    watched = watch.Watched("b", pseudo([0, 1], [255, 255]), np.array([1, 1, 0, 0]), {}, 1, "slide")
    values = watched.values(CLASSES)
    assert values["watch/pseudo/coverage"] == values["watch/pseudo/kept"] == 0
    assert all(np.isfinite(v) for v in values.values())
    for name in ("accuracy", "kl", "precision/road", "share/road"):
        assert f"watch/pseudo/{name}" not in values
    assert watched.line().startswith(
        "pseudo-labels of b on 1 images, slide: accuracy -, coverage 0"
    )
    assert ("road", "-", "0.0", "-", "50.0") in watched.rows(CLASSES)


class Images:
    """A source of noise in which every third image is larger."""

    info = DataInfo(CLASSES, ((0, 0, 0),) * 4)

    def __init__(self, count, damaged=()):
        self.ids = tuple(f"image{i:02}" for i in range(count))
        self.damaged = damaged

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        if index in self.damaged:
            raise UnreadableError("damaged")
        rng = np.random.default_rng(index)
        size = (24, 40) if index % 3 == 0 else (16, 24)
        label = rng.choice([0, 1, 2, 255], size, p=[0.6, 0.2, 0.1, 0.1]).astype(np.uint8)
        image = rng.integers(0, 256, (*size, 3), np.uint8)
        return {"image": image, "label": label, "id": self.ids[index]}


def make_watcher(method, nets, sources, images, say=None):
    config = configs.default()
    config.crop = (16, 24)
    config.eval.watch = images
    evaluator = Evaluator(nets, sources["val"], sharding.make_mesh(), config, say=say)
    return watch.Watcher(method, evaluator, sources, config)


def test_watcher_equals_numpy(nets):
    """Two sizes, padding, a threshold, teachers unlike their students."""
    method = mkd.Method(threshold=0.9, feature_augmentation=False)
    state = make_state(method, nets)
    for i, name in enumerate(("teacher_a", "teacher_b")):
        state = state.with_network(name, Linear().init(jax.random.key(7 + i), (16, 24)))
    sources = {"val": Images(20), "labeled": Images(5, damaged=(1,))}
    said = []
    found = make_watcher(method, nets, sources, 9, say=said.append)(state, 0.5)
    assert ["2 image sizes, 2 compilations of a network" in line for line in said] == [True]

    counts, distances, pixels = np.zeros((5, 5), np.int64), np.zeros(3), 0
    for i in (0, 2, 4, 6, 8, 11, 13, 15, 17):
        record = sources["val"][i]
        image, size = record["image"][None], record["label"].shape
        logits = {
            name: nearest(forward(state.network(name), image, np.ones((1, *size)), False)[0], size)
            for name in ("a", "b", "teacher_a", "teacher_b")
        }
        p = {name: softmax(value)[0] for name, value in logits.items()}
        taught = p["teacher_b"].argmax(-1)
        taught[p["teacher_b"].max(-1) < 0.9] = 4
        truth = np.where(record["label"] == 255, 4, record["label"])
        np.add.at(counts, (truth, taught), 1)
        pairs = [("teacher_a", "teacher_b"), ("teacher_a", "a"), ("teacher_b", "b")]
        distances += [np.abs(p[x] - p[y]).sum() / 2 for x, y in pairs]
        pixels += truth.size
    assert 0 < counts[:, 4].sum() < pixels
    np.testing.assert_array_equal(found.pseudo.counts, counts)
    assert list(found.distances) == ["coupling", "gap/a", "gap/b"]
    np.testing.assert_allclose(list(found.distances.values()), distances / pixels, rtol=1e-4)
    labels = np.concatenate([sources["labeled"][i]["label"].ravel() for i in (0, 2, 3, 4)])
    np.testing.assert_array_equal(found.prior, [(labels == c).sum() for c in range(4)])
    assert (found.labeler, found.images, found.mode) == ("teacher_b", 9, "whole")


@pytest.mark.parametrize(("method", "images"), [(mkd.Method(), 0), (supervised.Method(), 5)])
def test_nothing_to_look_at(nets, method, images):
    nets = {name: nets[name] for name in method.students}
    sources = {"val": Images(4), "labeled": Images(4)}
    watcher = make_watcher(method, nets, sources, images)
    assert watcher(make_state(method, nets), 0.0) is None


def test_students_are_coupled_where_there_are_no_teachers(nets):
    method = mkd.Method(teacher="none", feature_augmentation=False)
    sources = {"val": Images(3), "labeled": Images(3)}
    found = make_watcher(method, nets, sources, 8)(make_state(method, nets), 0.0)
    assert list(found.distances) == ["coupling"]
    assert found.images == 3
    assert found.pseudo.kept == 1


def skips_after(flags, limit=3, every=100):
    skips = watch.SkippedUpdates(limit, {"labeled": Images(9)})
    for step, flag in enumerate(flags, 1):
        index = np.array([step % 9, 0], np.int32)
        metrics = {"skipped": (jnp.float32(flag), jnp.ones(()))}
        skips.add(step, metrics, {"labeled": {"image": np.zeros(1), "index": index}})
        if step % every == 0:
            skips.in_a_row()
    return skips.in_a_row()


@pytest.mark.parametrize("every", [1, 2, 100])
def test_skipped_in_a_row(every):
    assert skips_after([1, 1, 0, 1, 1], every=every) == 2
    assert skips_after([1, 1, 0], every=every) == 0
    assert skips_after([1] * 50, limit=0, every=every) == 50
    with pytest.raises(UserError) as error:  # though the last ones are fine again
        skips_after([0, 1, 1, 1, 0, 0], every=every)
    text = str(error.value)
    assert "steps 2 to 4, 3 updates in a row" in text
    assert "step 4, labeled: image04, image00" in text


def test_zero_losses():
    zeros = watch.ZeroLosses("main", reports=2)
    assert zeros.add({"loss_students": 0.0, "loss_supervised": 1.0, "kept": 0.0}) == []
    assert zeros.add({}) == []  # every step of the interval was skipped
    (warning,) = zeros.add({"loss_students": 0.0, "loss_supervised": 0.0})
    assert "loss_students was exactly zero in the last 2 reports of main" in warning
    assert zeros.add({"loss_students": 0.0, "loss_supervised": 1e-9}) == []
    for value in (1.0, 0.0, 0.0):
        assert zeros.add({"loss_students": value}) == []


@dataclasses.dataclass(frozen=True)
class Poisoned(supervised.Method):
    """Its loss is nan in some steps, counted from 1, and a term of it is always zero."""

    bad: tuple[int, int] = (0, 0)
    traces: list = dataclasses.field(default_factory=list, compare=False)

    def loss(self, nets, params, state, *args, **kwargs):
        self.traces.append(1)
        loss, aux = super().loss(nets, params, state, *args, **kwargs)
        first, last = self.bad
        bad = (first <= state.step + 1) & (state.step + 1 <= last)
        metrics = {**aux.metrics, "loss_idle": (jnp.zeros(()), jnp.ones(()))}
        return jnp.where(bad, jnp.nan, loss), aux._replace(metrics=metrics)


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Runs ten steps of a tiny network that are not finite in some of them."""

    def run(bad, *, code=0, **overrides):
        method = Poisoned(bad=bad)
        monkeypatch.setattr(methods, "load", lambda config: method)
        monkeypatch.setattr(models, "load", lambda config, num_classes, **_: Linear(num_classes))
        config = runpy.run_path(str(SUPERVISED))["get_config"]("streets")
        config.data.update(size=(16, 32), train_count=16, val_count=4, split="8")
        config.batch.labeled = 8
        config.update(crop=(16, 32), steps=10, warmup=0)
        config.checkpoint.every, config.eval.every, config.log.every = 2, 5, 5
        config.update_from_flattened_dict(overrides)
        assert phases.run(config, tmp_path) == code
        assert len(method.traces) <= 1  # none where nothing is left to do
        return config

    return run


def checkpoint_steps(workdir):
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.steps()


def test_a_run_that_stays_not_finite_stops(train, tmp_path):
    with pytest.raises(UserError, match="steps 4 to 7, 4 updates in a row") as error:
        train((4, 99), max_skipped=4)
    ids = json.loads((tmp_path / "splits.json").read_text())["labeled"]
    named = re.findall(r"step (\d), labeled: (.*)", str(error.value))
    assert [step for step, _ in named] == ["5", "6", "7"]
    assert all(sorted(words.split(", ")) == ids for _, words in named)
    # Neither at step 4 and 6 nor after the evaluation at step 5.
    assert checkpoint_steps(tmp_path) == (2,)


def test_a_run_goes_on_after_a_few_bad_steps(train, tmp_path, capsys):
    train((4, 6), max_skipped=4)
    printed = capsys.readouterr().out
    assert "[main 5/10]" in printed
    assert "skipped 2" in printed
    assert "Skipped:  3 updates" in printed
    assert 10 in checkpoint_steps(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/skipped"] for line in lines if "train/loss" in line] == [0.4, 0.2]


def test_a_stop_waits_for_a_finite_step_and_another_mode_has_a_best_of_its_own(
    train, tmp_path, capsys, monkeypatch
):
    def stop_at_6(self, step):
        self.received = 15 if step >= 6 else None
        return step >= 6

    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "should_stop", stop_at_6)
        # Step 5 is the best; 6 and 7 are skipped.
        patch.setattr(Evaluation, "score", 0.5)
        train((6, 7), code=128 + 15)
    assert checkpoint_steps(tmp_path) == (5, 8)
    monkeypatch.setattr(Evaluation, "score", 0.25)
    train((0, 0), **{"eval.mode": "slide"})
    assert checkpoint_steps(tmp_path) == (10,)
    printed = capsys.readouterr().out
    assert "goes on from step 8" in printed
    mode = "slide 16x32 stride 11x22, padded to multiples of 32"
    assert f"{mode}: mIoU 25.00 at the end, 25.00 at its best (step 10)" in printed
    train((0, 0), **{"eval.mode": "whole"})  # which has nothing left to do
    assert f"{mode}: mIoU 25.00 at the end" in capsys.readouterr().out


def test_a_run_says_its_size_where_its_time_went_and_what_is_idle(train, tmp_path, capsys):
    train((0, 0), **{"log.every": 2})
    printed = capsys.readouterr().out
    assert printed.count("warning: loss_") == 1
    assert "warning: loss_idle was exactly zero in the last 5 reports of main" in printed
    channels, classes = 5, 19
    head = channels * classes + classes
    assert re.search(rf"\n  a +{15 + head} +15 +{head} +", printed)
    assert re.search(r"main: a step takes about [\d.]+ kB of memory on each device", printed)
    assert "Skipped" not in printed
    shares = re.findall(r"(\d+) %", next(x for x in printed.splitlines() if x.startswith("Time:")))
    assert sum(map(int, shares)) == 100
    (line,) = map(json.loads, (tmp_path / "time.jsonl").read_text().splitlines())
    assert line["step"] == 10
    names = {"training", "data wait", "evaluation", "checkpoint", "compilation", "other"}
    assert line["seconds"].keys() == names
