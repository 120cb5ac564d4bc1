"""Labeling before a phase: its passes, and whole runs that are stopped anywhere."""

import contextlib
import io
import json
import shutil

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Killed, assert_same_run, run_until, use_devices
from ml_collections import ConfigDict

from jaxssl import config as configs
from jaxssl import labeling, models, phases, selection
from jaxssl.contracts import DataInfo, Selection, UnreadableError, UserError
from jaxssl.data import streets
from jaxssl.data.pseudo_labels import Store
from jaxssl.signals import StopSignal

INFO = DataInfo(("road", "sky", "car"), ((1, 1, 1), (2, 2, 2), (3, 3, 3)))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_most_probable_class_and_its_confidence(temperature):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (2, 5, 7, 4)) * np.array([0.1, 1, 10])[:, None, None, None, None]
    label, level = labeling.most_probable(jnp.asarray(logits, jnp.float32), temperature)
    assert (label.dtype, level.dtype) == (jnp.uint8, jnp.uint16)
    scaled = np.float32(logits).astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_array_equal(label, scaled.argmax(-1))
    doubt = np.sort(p, -1)[..., :-1].sum(-1)
    expected = np.minimum(-2048 * np.log2(doubt), 65535)
    # float32's logarithms of probabilities: a level is 3e-4 of the doubt.
    np.testing.assert_allclose(level, expected, atol=1.01)


def test_confidence_near_one_keeps_its_order():
    logits = jnp.stack([jnp.array([x, 0.0]) for x in (15.0, 15.1, 16.0, 20.0, 80.0)])
    assert float(jax.nn.softmax(logits[2])[0]) == pytest.approx(1, abs=2e-7)
    _, level = labeling.most_probable(logits)
    assert (np.diff(np.asarray(level, np.int64)) > 0).all()
    np.testing.assert_allclose(level[:4], 2048 * np.log2(1 + np.exp([15, 15.1, 16, 20])), atol=1)
    assert level[4] == 65535


def test_one_class_is_beyond_doubt():
    label, level = labeling.most_probable(jnp.zeros((3, 1)))
    assert label.tolist() == [0, 0, 0]
    assert level.tolist() == [65535] * 3


class Truth:
    info = INFO

    def __init__(self, labels):
        self.ids, self._labels = tuple(sorted(labels)), labels

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        image_id = self.ids[index]
        return {"image": None, "label": self._labels[image_id], "id": image_id}


@pytest.fixture
def filled(tmp_path):
    """A store of three images of different sizes, its arrays and a ground truth."""
    rng, store = np.random.default_rng(0), Store(tmp_path, INFO)
    arrays, truth = {}, {}
    for name, size in {"b": (30, 40), "a": (25, 10), "c/d": (1, 300)}.items():
        labels = rng.choice(np.array([0, 0, 1, 255], np.uint8), size)
        levels = rng.integers(0, 100, size).astype(np.uint16)
        arrays[name] = labels, levels
        truth[name] = rng.choice(np.array([0, 1, 2, 255], np.uint8), size)
        store.write(name, labels, levels)
    return store, arrays, truth


def test_passes_over_a_store(filled):
    store, arrays, truth = filled
    labels, levels = (np.concatenate([x[i].ravel() for x in arrays.values()]) for i in (0, 1))
    counts = labeling.counted(store, arrays)
    assert counts.sum() == (labels != 255).sum()
    for c in range(3):
        expected = np.bincount(levels[labels == c], minlength=100)
        np.testing.assert_array_equal(counts[c, :100], expected)

    chosen = Selection(np.array([50, 20, 0]), np.array([1.0, 0.5, 1.0]))
    pairs = labeling.selected(store, arrays, chosen, 3, Truth(truth))
    after = {name: store.read(name)[0] for name in arrays}
    for name, (before, level) in arrays.items():
        kept = after[name] != 255
        np.testing.assert_array_equal(after[name][kept], before[kept])
        np.testing.assert_array_equal(store.read(name)[1], level)
        np.testing.assert_array_equal(kept[before == 0], (level >= 50)[before == 0])
        assert not kept[(before == 1) & (level < 20)].any()
        assert not kept[before == 255].any()
    drawn = np.concatenate([(x != 255)[(arrays[n][0] == 1)] for n, x in after.items()])
    reached = (levels[labels == 1] >= 20).sum()
    assert abs(drawn.sum() - reached / 2) < 4 * np.sqrt(reached) / 2
    flat = np.concatenate([x.ravel() for x in after.values()])
    known = np.concatenate([truth[name].ravel() for name in after])
    for i, t in enumerate((0, 1, 2, 255)):
        for j, p in enumerate((0, 1, 2, 255)):
            assert pairs[i, j] == ((known == t) & (flat == p)).sum()

    # Nothing changes when it is done again, in whatever order, and of what was dropped.
    again = labeling.selected(store, reversed(list(arrays)), chosen, 3)
    np.testing.assert_array_equal(again.sum(0), pairs.sum(0))
    for name, mine in after.items():
        np.testing.assert_array_equal(store.read(name)[0], mine)


def test_errors_are_counted_where_the_truth_is_known(filled):
    store, arrays, truth = filled
    known, wrong = labeling.judged(store, arrays, Truth(truth))
    labels, levels = (np.concatenate([x[i].ravel() for x in arrays.values()]) for i in (0, 1))
    true = np.concatenate([truth[name].ravel() for name in arrays])
    for c in range(3):
        mine = (labels == c) & (true != 255)
        np.testing.assert_array_equal(known[c, :100], np.bincount(levels[mine], minlength=100))
        mine &= true != c
        np.testing.assert_array_equal(wrong[c, :100], np.bincount(levels[mine], minlength=100))
    found = labeling.error_rates(np.stack([known, wrong]), INFO)
    assert found["all"][-1] == pytest.approx(wrong.sum() / known.sum())
    assert found["classes"]["sky"][-1] == pytest.approx(wrong[1].sum() / known[1].sum())
    assert found["classes"]["car"] == [None] * 5  # never predicted
    json.dumps(found, allow_nan=False)


def test_passes_over_classes_of_whole_images(tmp_path):
    """They are those over an image of as many pixels, but that each image draws its own number."""
    rng = np.random.default_rng(0)
    info = DataInfo(INFO.classes, INFO.palette, "classification")
    store, ids = Store.of(tmp_path, "round", info), [f"{i:04d}" for i in range(3000)]
    labels = rng.choice(np.array([0, 0, 1, 2], np.uint8), 3000)
    levels, truth = rng.integers(0, 100, 3000).astype(np.uint16), rng.integers(0, 3, 3000)
    for image_id, label, level in zip(ids, labels, levels, strict=True):
        store.write(image_id, label, level)
    store.flush()
    counts = labeling.counted(store, ids)
    for c in range(3):
        expected = np.bincount(levels[labels == c], minlength=selection.LEVELS)
        np.testing.assert_array_equal(counts[c], expected)
    chosen = Selection(np.array([50, 20, selection.LEVELS]), np.array([1.0, 0.5, 1.0]))
    known = Truth({i: np.uint8(t) for i, t in zip(ids, truth, strict=True)})
    pairs = labeling.selected(store, ids, chosen, 3, known)
    drawn = np.array([labeling.image_rng(3, i).random() < 0.5 for i in ids])
    kept = ((labels == 0) & (levels >= 50)) | ((labels == 1) & (levels >= 20) & drawn)
    reopened = Store.of(tmp_path, "round", info)
    after = np.array([reopened.read(i)[0] for i in ids])
    np.testing.assert_array_equal(after, np.where(kept, labels, 255))
    for i, j in np.ndindex(3, 3):
        assert pairs[i, j] == ((truth == i) & (after == j)).sum()
    assert pairs[:3, 3].sum() == (~kept).sum()
    again = labeling.selected(reopened, reversed(ids), chosen, 3)
    np.testing.assert_array_equal(again.sum(0), pairs.sum(0))
    summary = labeling.summarize(pairs, chosen, counts.sum(1), np.ones(3, np.int64), store)
    assert summary["kept"] == pytest.approx(kept.mean())
    assert summary["accuracy"] == pytest.approx((labels == truth)[kept].mean())


def test_images_draw_numbers_of_their_own():
    def draw(seed, name):
        return labeling.image_rng(seed, name).random(4).tolist()

    assert draw(1, "x") == draw(1, "x")
    assert draw(1, "x") != draw(1, "y")
    assert draw(1, "x") != draw(2, "x")


def test_summary():
    #  truth by kept label; the last row has no truth, the last column is not kept
    pairs = np.array([[6, 2, 0, 1], [1, 3, 0, 1], [0, 0, 0, 0], [4, 0, 0, 2]])
    chosen = Selection(np.array([2048, 4096, selection.LEVELS]), np.array([1.0, 0.5, 1.0]))
    predicted, prior = np.array([12, 8, 0]), np.array([30, 10, 0])
    found = labeling.summarize(pairs, chosen, predicted, prior, Store(None, INFO))
    assert found["kept"] == pytest.approx(16 / 20)
    assert found["accuracy"] == pytest.approx(9 / 12)
    q = np.array([11, 5]) / 16
    assert found["kl"] == pytest.approx(np.sum([0.75, 0.25] * np.log([0.75, 0.25] / q)))
    assert found["classes"]["road"] == {
        "lowest_confidence": 0.5,
        "share_of_those": 1.0,
        "predicted": 12,
        "kept": 11,
        "of_predicted": pytest.approx(11 / 12),
        "of_kept": pytest.approx(11 / 16),
        "of_labels": 0.75,
        "accuracy": pytest.approx(6 / 7),
    }
    car = found["classes"]["car"]
    assert (car["lowest_confidence"], car["of_predicted"], car["accuracy"]) == (None, None, None)
    json.dumps(found, allow_nan=False)
    table = labeling.rows(found)
    assert table[0] == ("road", "0.50000", "91.7", "68.8", "75.0", "85.7")
    assert table[2] == ("car", "", "", "0.0", "0.0", "")
    assert len(table[0]) == len(labeling.COLUMNS)
    assert labeling.line(found).startswith("80.0 % kept, KL(labels || pseudo) 0.0")


def prepare(monkeypatch):
    """DMT in two rounds on twelve unlabeled images, with a network that compiles in no time."""
    monkeypatch.setattr(
        models, "load", lambda config, num_classes, **_: conftest.Linear(num_classes=num_classes)
    )
    use_devices(monkeypatch, 1)
    config = configs.default()
    configs.use_streets(config, None)
    with config.unlocked():
        config.data.update(size=(16, 32), train_count=20, val_count=4)
    config.update(crop=(16, 32), warmup=3, steps=4, distributed="off")
    config.method = ConfigDict({"name": "dmt", "ratios": (0.4, 1.0), "label_at": "full"})
    config.log.update(every=1, tensorboard=False)
    config.eval.update(every=2, batch=5, panels=0, bucket=16, unlabeled_truth=True)
    config.checkpoint.every = 2
    return config


@pytest.fixture
def config(monkeypatch):
    return prepare(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of an uninterrupted run, what it printed, and what it labeled, in order."""
    workdir, printed = tmp_path_factory.mktemp("whole"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        config, labeled = prepare(patch), noting(patch, "write")
        assert phases.run(config, workdir) == 0
    return workdir, printed.getvalue(), labeled


def files(workdir):
    """Content of all that a run leaves of labels."""
    paths = (workdir / "pseudo_labels").rglob("*.*")
    return {path.relative_to(workdir): path.read_bytes() for path in paths if path.is_file()}


def assert_same(workdir, other):
    assert files(workdir) == files(other)
    assert_same_run(workdir, other)


def noting(patch, name, last=10**9):
    """Which calls of a method of Store came to their end, of which there are `last` at most."""
    method, begun, done = getattr(Store, name), [], []

    def call(self, *arguments):
        begun.append(0)
        if len(begun) > last:
            raise Killed
        method(self, *arguments)
        done.append((self.folder.name, str(arguments[0])))

    patch.setattr(Store, name, call)
    return done


@pytest.mark.parametrize(
    ("where", "last"),
    [
        ("write", 3),  # labeling for the first round
        ("write", 29),  # for a later one
        ("write_labels", 13),  # selecting: twelve calls are part of `write`
        ("write_selection", 2),
        ("write_summary", 1),
    ],
)
def test_killed_anywhere_nothing_is_labeled_twice(config, whole, tmp_path, where, last):
    with pytest.MonkeyPatch.context() as patch:
        first = noting(patch, "write")
        noting(patch, where, last)
        with pytest.raises(Killed):
            phases.run(config, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        second = noting(patch, "write")
        assert phases.run(config, tmp_path) == 0
    assert first
    assert second
    assert sorted(first + second) == sorted(whole[2])
    assert len(set(whole[2])) == len(whole[2]) == 4 * 12
    assert_same(tmp_path, whole[0])


@pytest.mark.parametrize("step", [8, 10, 16])
def test_killed_in_a_round_or_at_its_end(config, whole, tmp_path, step):
    """Rounds of four updates after two supervised phases of three, saved after each second one."""
    run_until(step, config, tmp_path)
    assert phases.run(config, tmp_path) == 0
    assert_same(tmp_path, whole[0])


def test_a_signal_while_labeling_leaves_and_goes_on(config, whole, tmp_path, monkeypatch):
    write, signals = Store.write, []
    monkeypatch.setattr(
        StopSignal, "__enter__", lambda self: signals.append(self) or self
    )  # without handlers

    def interrupting(self, *arrays):
        signals[-1].received = 15
        write(self, *arrays)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", interrupting)
        assert phases.run(config, tmp_path) == 128 + 15
    some = len([*(tmp_path / "pseudo_labels").rglob("labels/*.png")])
    assert 0 < some < 12
    assert phases.run(config, tmp_path) == 0
    assert_same(tmp_path, whole[0])


def test_what_a_run_says_of_its_labels(config, whole):
    workdir, printed, _ = whole
    names = ["round_1_b", "round_1_a", "round_2_b", "round_2_a"]
    for name, labeler in zip(
        names, ["supervised_a", "supervised_b", "round_1_a", "round_1_b"], strict=True
    ):
        found = json.loads((workdir / "pseudo_labels" / name / "summary.json").read_text())
        assert found["labeler"]["phase"] == labeler
        assert found["images"] == 12
        assert found["left_out"] == 0
        assert 0 < found["kept"] <= 1
        assert (
            f"{name}: labeling 12 images with {labeler[-1]} of {labeler} (best), whole" in printed
        )
        assert f"{name}: pseudo-labels of {labeler[-1]}, {labeling.line(found)}" in printed
    assert found["kept"] == 1  # the last round keeps all
    # The accuracy is that of these labels on the images' own truth.
    split = json.loads((workdir / "splits.json").read_text())
    source = phases.loading.load(config.data, "train", True, split["unlabeled"])
    store = Store(workdir / "pseudo_labels" / names[-1], source.info)
    right, total = 0, 0
    for i, image_id in enumerate(source.ids):
        labels, truth = store.read(image_id)[0], source[i]["label"]
        known = (labels != 255) & (truth != 255)
        right, total = right + (labels == truth)[known].sum(), total + known.sum()
    assert found["accuracy"] == pytest.approx(right / total)
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in logged if "pseudo_labels/kept" in line] == names
    # Two networks are reported, the better one first; it is what the run's result is.
    lines = printed.splitlines()
    done = next(line for line in lines if line.startswith("Done: "))
    also = next(line for line in lines if line.startswith("Also: "))
    scores = [float(line.split("at the end, ")[1].split()[0]) for line in (done, also)]
    assert scores == sorted(scores, reverse=True)
    assert {"Network a", "Network b"} == {
        line[line.index("Network") :][:9] for line in (done, also)
    }
    opened = phases.trained.open_trained(workdir)
    assert f"Network {opened.headline}" in done
    assert opened.variables().params["head"]["bias"].shape == (19,)


def test_a_run_that_got_worse_keeps_its_best_phase_and_says_so(
    config, tmp_path, monkeypatch, capsys
):
    note = phases.train._note_best
    monkeypatch.setattr(
        phases.train,
        "_note_best",
        lambda run, phase, network, step, score, _: note(
            run, phase, network, step, score, 1 / (step + 1)
        ),
    )
    assert phases.run(config, tmp_path) == 0
    opened = phases.trained.open_trained(tmp_path)
    (line,) = [one for one in capsys.readouterr().out.splitlines() if one.startswith("Earlier: ")]
    first = int(line.split("--step=")[1].split()[0])
    assert "in phase supervised_" in line
    assert first < opened.step("best")
    assert opened.variables(step=first).params["head"]["bias"].shape == (19,)


def test_labels_of_another_config_are_not_taken_over(config, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "checkpoints")
    (tmp_path / "w" / "metrics.jsonl").unlink()
    config.method.ratios = (0.8, 1.0)
    with pytest.raises(UserError, match=r"method\.ratios: \[0\.4, 1\.0\] -> \[0\.8, 1\.0\]"):
        phases.run(config, tmp_path / "w")


def test_truth_that_cannot_be_read_is_unknown(filled):
    store, arrays, truth = filled

    class Broken(Truth):
        def __getitem__(self, index):
            if self.ids[index] == "a":
                raise UnreadableError("a is broken.")
            return super().__getitem__(index)

    everything = Selection(np.zeros(3, np.int64), np.ones(3))
    pairs = labeling.selected(store, arrays, everything, 0, Broken(truth))
    known = sum((label != 255).sum() for name, label in truth.items() if name != "a")
    assert pairs[:-1].sum() == known
    assert pairs.sum() == sum(label.size for label in truth.values())


def test_truth_is_not_opened_unless_asked_for(config, tmp_path, monkeypatch):
    config.eval.unlabeled_truth = False
    opened, load = set(), streets.load

    def watching(config_data, split, labels, ids=None):
        if labels and split == "train":
            opened.update(ids)
        return load(config_data, split, labels, ids)

    monkeypatch.setattr(streets, "load", watching)
    assert phases.run(config, tmp_path) == 0
    split = json.loads((tmp_path / "splits.json").read_text())
    assert opened == set(split["labeled"])
    found = json.loads((tmp_path / "pseudo_labels" / "round_1_b" / "summary.json").read_text())
    assert found["accuracy"] is None


def test_labels_that_are_gone_in_the_middle_of_a_phase_are_missed(config, tmp_path):
    config.steps, config.eval.every = 6, 100
    run_until(3 + 3 + 4, config, tmp_path)
    (tmp_path / "pseudo_labels" / "round_1_b" / "summary.json").unlink()
    with pytest.raises(UserError, match=r"round_1_b are not complete, though training"):
        phases.run(config, tmp_path)


def test_eight_devices_label_as_one_does(config, tmp_path, monkeypatch):
    config.batch.update(labeled=8, unlabeled=8)
    for name, count in (("eight", 8), ("one", 1)):
        use_devices(monkeypatch, count)
        assert phases.run(config, tmp_path / name) == 0
    first = [
        Store(tmp_path / name / "pseudo_labels" / "round_1_b", INFO) for name in ("eight", "one")
    ]
    for image_id in sorted(p.stem for p in (first[0].folder / "labels").iterdir()):
        (labels, levels), (others, other_levels) = (one.read(image_id) for one in first)
        near = np.abs(levels.astype(int) - other_levels) <= 2
        assert near.mean() > 0.99
        assert (labels == others).mean() > 0.98  # ties, and thresholds between them
    mine, theirs = (json.loads((s.folder / "summary.json").read_text()) for s in first)
    assert mine["kept"] == pytest.approx(theirs["kept"], abs=0.01)


METHODS = {
    "dmt": {"name": "dmt", "ratios": (0.4,), "label_at": "full"},
    "dars": {"name": "dars", "ratios": (0.5,), "beta_min": (0,), "beta_max": (0,)},
}


@pytest.mark.parametrize("method", METHODS)
def test_labels_are_those_that_a_sort_of_all_pixels_chooses(config, tmp_path, monkeypatch, method):
    """The paper's selection, from the labeler's forward pass in NumPy."""
    config.method, networks, read = ConfigDict(METHODS[method]), {}, phases.train.read_weights

    def noting(run, weights):
        networks[weights.phase] = read(run, weights)
        return networks[weights.phase]

    monkeypatch.setattr(phases.train, "read_weights", noting)
    assert phases.run(config, tmp_path) == 0
    name = {"dmt": "round_1_b", "dars": "round_1"}[method]
    labeler = {"dmt": "supervised_a", "dars": "supervised"}[method]
    _, sources = phases.open_sources(config.data)
    store = Store(tmp_path / "pseudo_labels" / name, sources["labeled"].info)
    images = np.stack([record["image"] for record in sources["unlabeled"]])
    logits, _, _ = conftest.forward(
        networks[labeler], images, np.ones(images.shape[:3], bool), batch_stats=False
    )
    # The network sees every second pixel, and mirror images begin with the other ones.
    if method == "dars":
        mirrored, _, _ = conftest.forward(
            networks[labeler],
            images[:, :, ::-1],
            np.ones(images.shape[:3], bool),
            batch_stats=False,
        )
        logits = (
            conftest.nearest(logits, (16, 32)) + conftest.nearest(mirrored, (16, 32))[:, :, ::-1]
        ) / 2
    logits = conftest.nearest(logits, (16, 32))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    predicted, confidence = p.argmax(-1), p.max(-1)
    labels, levels = (
        np.stack(x) for x in zip(*(store.read(i) for i in sources["unlabeled"].ids), strict=True)
    )
    np.testing.assert_allclose(selection.confidence(levels), confidence, atol=2e-4)
    kept, surest = labels != 255, np.float16(selection.confidence(levels))
    np.testing.assert_array_equal(labels[kept], predicted[kept])
    truths = np.stack([record["label"] for record in sources["labeled"]])
    prior = np.bincount(truths.ravel(), minlength=256)[:19]
    wanted = np.round(0.5 * predicted.size * prior / prior.sum()).astype(int)
    for c in np.unique(predicted):
        mine = predicted == c
        if method == "dmt":
            lowest = np.sort(levels[mine])[::-1][int(np.ceil(0.4 * mine.sum() - 1e-9)) - 1]
            np.testing.assert_array_equal(kept[mine], levels[mine] >= lowest)
            continue
        if mine.sum() <= wanted[c]:
            assert kept[mine].all()
        elif wanted[c]:
            lowest = np.sort(surest[mine])[::-1][wanted[c] - 1]
            assert not kept[mine & (surest < lowest)].any()
            reached = (mine & (surest >= lowest)).sum()
            share = wanted[c] / reached
            spread = np.sqrt(reached * share * (1 - share))
            assert abs(kept[mine].sum() - wanted[c]) <= 4 * spread + 1e-9
        else:
            assert not kept[mine].any()


def test_what_cannot_be_read_is_left_out_of_labeling_too(config, tmp_path, monkeypatch, capsys):
    config.eval.unlabeled_truth = False
    _, sources = phases.open_sources(config.data)
    broken = sources["unlabeled"].ids[5]
    read = type(sources["unlabeled"]).__getitem__

    def reading(self, index):
        if self.ids[index] == broken:
            raise UnreadableError(f"{broken} is broken.")
        return read(self, index)

    monkeypatch.setattr(type(sources["unlabeled"]), "__getitem__", reading)
    assert phases.run(config, tmp_path) == 0
    noted = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["id"], line["phase"]) for line in noted] == [(broken, "round_1_b")]
    for name in ("round_1_b", "round_2_a"):
        found = json.loads((tmp_path / "pseudo_labels" / name / "summary.json").read_text())
        assert (found["images"], found["left_out"]) == (12, 1)
    config.data.max_damaged = 0
    with pytest.raises(UserError, match=rf"max_damaged allows 0[\s\S]*{broken} is broken"):
        phases.run(config, tmp_path / "strict")
