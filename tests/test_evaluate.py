import copy
import dataclasses
import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OPTIMIZER, make_state
from ml_collections import ConfigDict
from PIL import Image
from sklearn import metrics as sklearn

from jaxssl import config as configs
from jaxssl import methods, models, optim, trained
from jaxssl.checkpoint import Checkpoints
from jaxssl.contracts import IGNORE_LABEL, DataInfo, Outputs, Record, UserError, Variables
from jaxssl.data import cityscapes, loading
from jaxssl.evaluate import Evaluation, Evaluator, main
from jaxssl.sharding import make_mesh

C, ABSENT = 6, 4
INFO = DataInfo(tuple("abcdef"), ((0, 0, 0),) * C)
SIZES = ((20, 28), (33, 17), (20, 28), (8, 40), (21, 28), (33, 17), (20, 28), (20, 28), (9, 9))
traces = []


@dataclasses.dataclass(frozen=True)
class Painted:
    """Predicts the class that is nearest to the red channel, so every prediction is known."""

    num_classes: int = C

    def apply(self, params, stats, image, *, valid=None, batch_stats, key=None):
        traces.append(image.shape)
        distance = jnp.abs(image[..., :1] - jnp.arange(self.num_classes) * params["one"])
        return Outputs(-distance.astype(jnp.float32)), stats

    def resize(self, logits, size):
        return logits


PAINTED = Variables({"one": np.float32(1)}, {})


@dataclasses.dataclass(frozen=True)
class Painting:
    """Random predictions and labels, a fifth of them ignored; the class `ABSENT` is neither
    predicted nor true, 0 never true, 1 never predicted.
    """

    sizes: tuple[tuple[int, int], ...] = SIZES
    labels: str = "some"
    info = INFO

    @property
    def ids(self):
        return tuple(f"{i:03d}" for i in range(len(self.sizes)))

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        size = self.sizes[index]
        label = rng.choice([1, 2, 3, 5], size).astype(np.uint8)
        guess = np.where(
            (rng.random(size) < 0.5) & (label != 1), label, rng.choice([0, 2, 3, 5], size)
        )
        image = np.zeros((*size, 3), np.uint8)
        image[..., 0] = guess
        label[rng.random(size) < 0.2] = IGNORE_LABEL
        record = Record(image=image, id=self.ids[index])
        if self.labels != "none":
            record["label"] = (
                np.full_like(label, IGNORE_LABEL) if self.labels == "ignored" else label
            )
        return record


def make(source=Painting(), mesh=None, say=None, **changes):
    config = configs.default()
    config.eval.update(changes)
    nets = {"a": Painted(source.info.num_classes)}
    return Evaluator(nets, source, mesh or make_mesh(), config, say=say)


def truth_and_guess(source=Painting(), cut=lambda x: x):
    """All counted pixels."""
    records = [source[i] for i in range(len(source))]
    truth = np.concatenate([cut(record["label"]).ravel() for record in records])
    guess = np.concatenate([cut(record["image"][..., 0]).ravel() for record in records])
    return truth[truth != IGNORE_LABEL], guess[truth != IGNORE_LABEL]


def assert_sklearns(score: Evaluation, truth, guess):
    """The same matrix, and the same scores over the classes that occur, to 1e-9."""
    expected = sklearn.confusion_matrix(truth, guess, labels=range(C))
    np.testing.assert_array_equal(score.confusion, expected)
    present = np.union1d(truth, guess)
    np.testing.assert_array_equal(np.flatnonzero(score.present), present)
    per_class = sklearn.jaccard_score(truth, guess, labels=present, average=None, zero_division=0)
    np.testing.assert_allclose(score.per_class[present], per_class, rtol=1e-9)
    named = dict(zip((INFO.classes[c] for c in present), per_class, strict=True))
    written = score.to_json(INFO.classes)
    assert written["iou"] == pytest.approx(named, rel=1e-9)
    assert written["absent"] == [name for name in INFO.classes if name not in named]
    assert score.score == pytest.approx(per_class.mean(), rel=1e-9)


@pytest.mark.parametrize(
    "changes",
    [
        {"bucket": 1},
        {},
        {"bucket": 64, "batch": 3},
        {"mode": "slide", "window": (16, 16), "flip": True},
    ],
    ids=str,
)
def test_scores_are_sklearns_on_images_of_many_sizes(changes):
    score = make(**changes)("a", PAINTED)
    assert score.confusion.dtype == np.int64
    assert not score.present[ABSENT]
    assert ("padded" in score.mode) == (changes.get("bucket") != 1)
    assert_sklearns(score, *truth_and_guess())


def test_one_device_scores_as_eight():
    one = make(mesh=make_mesh(jax.devices()[:1]))("a", PAINTED)
    np.testing.assert_array_equal(one.confusion, make()("a", PAINTED).confusion)


def test_center_crop_counts_the_central_window_alone():
    def cut(x):
        top, left = (max(0, side - 16) // 2 for side in x.shape)
        return x[top : top + 16, left : left + 16]

    score = make(mode="center_crop", window=(16, 16))("a", PAINTED)
    assert_sklearns(score, *truth_and_guess(cut=cut))
    assert score.mode == "center_crop 16x16"


def test_half_res_scores_at_half_the_size():
    source, truth, guess = Painting(((20, 28), (32, 64))), [], []
    for i in range(2):
        record = source[i]
        half = tuple(side // 2 for side in record["label"].shape[::-1])
        red = Image.fromarray(np.float32(record["image"][..., 0]))
        red = np.asarray(red.resize(half, Image.Resampling.BILINEAR)).ravel()
        guess.append(np.abs(red[:, None] - 1.01 * np.arange(C)).argmin(1))
        label = Image.fromarray(record["label"]).resize(half, Image.Resampling.NEAREST)
        truth.append(np.asarray(label).ravel())
    truth, guess = np.concatenate(truth), np.concatenate(guess)
    variables = Variables({"one": np.float32(1.01)}, {})  # classes never tie
    score = make(source, mode="half_res", bucket=1)("a", variables)
    assert_sklearns(score, truth[truth != IGNORE_LABEL], guess[truth != IGNORE_LABEL])
    assert score.mode == "half_res"


@pytest.mark.parametrize("mode", ["whole", "center_crop", "half_res"])
def test_maps_come_in_order_and_at_the_size_of_the_image(mode):
    source = Painting()
    evaluator = make(source, mode=mode, window=(8, 8))
    read = jax.jit(lambda logits, valid: {"classes": logits.argmax(-1).astype(jnp.uint8)})
    found = [maps["classes"] for maps in evaluator.maps("a", PAINTED, source, read)]
    assert [(classes.shape, classes.dtype) for classes in found] == [(s, np.uint8) for s in SIZES]
    if mode != "half_res":
        for i, classes in enumerate(found):
            np.testing.assert_array_equal(classes, source[i]["image"][..., 0])


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [({"bucket": 1}, 5), ({}, 3), ({"bucket": 64}, 1), ({"mode": "center_crop"}, 1)],
    ids=str,
)
def test_compilations_are_counted_and_said_once(changes, sizes):
    said, before = [], len(traces)
    evaluator = make(say=said.append, **changes)
    for _ in range(2):
        evaluator("a", PAINTED)
    assert len(traces) - before == sizes
    assert len(said) == (sizes > 1)
    assert all(f"{sizes} image sizes, {sizes} compilations of a network" in line for line in said)


@pytest.mark.parametrize("labels", ["none", "ignored"])
def test_images_without_labels_are_refused(labels):
    with pytest.raises(UserError, match="no labeled pixel"):
        make(Painting(labels=labels))("a", PAINTED)


def process(rank, port, path):
    """One of two: writes what it counts over images of many sizes."""
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    everywhere = jax.sharding.NamedSharding(make_mesh(), jax.sharding.PartitionSpec())
    variables = jax.jit(lambda: Variables({"one": jnp.ones(())}, {}), out_shardings=everywhere)()
    np.save(path, make()("a", variables).confusion)


@pytest.mark.slow
def test_two_processes_count_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folders = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    files = [tmp_path / f"{rank}.npy" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import test_evaluate as t; t.process({rank}, {port}, '{path}')",
            ],
            env=os.environ | {"PYTHONPATH": folders, "XLA_FLAGS": ""},
        )
        for rank, path in enumerate(files)
    ]
    try:
        assert [each.wait(timeout=180) for each in processes] == [0, 0]
    finally:
        for each in processes:
            each.kill()
            each.wait()
    expected = make()("a", PAINTED).confusion
    for path in files:
        np.testing.assert_array_equal(np.load(path), expected)


def test_scores_are_those_of_the_cityscapes_scripts(tmp_path):
    """On a tree of images whose red channel is what a network predicts of them."""
    scripts = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    rng, files = np.random.default_rng(0), []
    for i in range(3):
        # Train ids 15 and up never occur; 14 is never true, 0 never predicted.
        label = rng.integers(0, 14, (32, 64))
        guess = np.where(rng.random(label.shape) < 0.5, label, rng.integers(0, 15, label.shape))
        guess[guess == 0] = 14
        label = cityscapes.LABEL_IDS[label]
        ignored = rng.random(label.shape) < 0.2
        label[ignored] = rng.choice([0, 4, 9, 29], ignored.sum())
        stem = f"aachen/aachen_{i:06d}_000019"
        image, truth, prediction = (
            tmp_path / folder / f"{stem}_{end}.png"
            for folder, end in (
                ("leftImg8bit/val", "leftImg8bit"),
                ("gtFine/val", "gtFine_labelIds"),
                ("predictions", "prediction"),
            )
        )
        for path, array in (
            (image, np.stack([guess] * 3, -1).astype(np.uint8)),
            (truth, label.astype(np.uint8)),
            (prediction, cityscapes.LABEL_IDS[guess]),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
        files.append((str(prediction), str(truth)))
    args = copy.copy(scripts.args)
    args.quiet, args.JSONOutput, args.evalInstLevelScore = True, False, False
    theirs = scripts.evaluateImgLists(*map(list, zip(*files, strict=True)), args)

    source = loading.load({"name": "cityscapes", "root": str(tmp_path)}, "val", labels=True)
    score = make(source)("a", PAINTED)
    names = cityscapes.INFO.classes
    expected = {name: theirs["classScores"][name] for name in names}
    np.testing.assert_allclose(
        score.per_class, [*expected.values()], rtol=1e-9
    )  # nan where theirs is
    assert score.score == pytest.approx(theirs["averageScoreClasses"], rel=1e-9)
    assert score.to_json(names)["absent"] == list(names[15:])


TINY = {
    "data.size": (16, 32),
    "data.val_count": 4,
    "data.train_count": 12,
    "crop": (16, 32),
    "model.width": 8,
    "model.channels": 8,
    "model.low_level_channels": 8,
    "model.aspp_rates": (1, 2),
    "eval.batch": 8,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run that learned nothing: steps 3 and 5 are kept, 5 is the best."""
    workdir = tmp_path_factory.mktemp("run")
    config = configs.default()
    config.method = ConfigDict({"name": "cps"})
    configs.use_streets(config, None)
    config.update_from_flattened_dict(TINY)
    method = methods.load(config.method)
    info = loading.load(config.data, "val", labels=True).info
    nets = {n: models.load(configs.model_of(config, n), info.num_classes) for n in method.students}
    state = make_state(method, nets, optimizer=optim.make_optimizer(OPTIMIZER), size=(16, 32))
    (workdir / "config.json").write_text(config.to_json_best_effort())
    trained.write_classes(workdir, info)
    best = {"main": {"step": 5, "score": 0.1, "choice": 0.1, "network": "a", "last": 0.1}}
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        for step, phase in ((3, "warmup"), (5, "main")):
            meta = {"phase": phase, "phases": [["warmup", 3], ["main", 2]], "best": best}
            checkpoints.keep = {3, 5}
            checkpoints.save(step, state.replace(step=jnp.int32(step)), meta)
    return workdir


def lines(workdir):
    return [json.loads(line) for line in (workdir / "evaluations.jsonl").read_text().splitlines()]


def test_the_command_evaluates_all_networks_of_a_run(run, capsys):
    words = ("mode=slide", "window=16,16", "stride=16,16", "bucket=1")
    assert main([f"--workdir={run}", *(f"--config.eval.{word}" for word in words)]) == 0
    opened, printed = trained.open_trained(run), capsys.readouterr().out
    source = loading.load(opened.config.data, "val", labels=True)
    records = [source[i] for i in range(len(source))]
    images, labels = (np.stack([record[key] for record in records]) for key in ("image", "label"))
    windows, counted = np.concatenate(np.split(images, 2, axis=2)), labels != IGNORE_LABEL

    @jax.jit
    def forward(variables):
        outputs, _ = opened.net().apply(*variables, windows, batch_stats=False)
        return opened.net().resize(outputs.logits, (16, 16)).argmax(-1)

    found = lines(run)[-2:]
    for line, name in zip(found, "ab", strict=True):
        guess = np.concatenate(np.split(forward(opened.variables(name)), 2), axis=2)[counted]
        present = np.union1d(labels[counted], guess)
        expected = sklearn.jaccard_score(
            labels[counted], guess, labels=present, average=None, zero_division=0
        )
        names = [source.info.classes[c] for c in present]
        expected = dict(zip(names, expected, strict=True))
        assert line.pop("iou") == pytest.approx(expected, abs=1e-3)
        assert line.pop("miou") == pytest.approx(np.mean([*expected.values()]), abs=1e-3)
        assert {*line.pop("absent"), *names} == {*source.info.classes}
        assert line == {
            "step": 5,
            "phase": "main",
            "network": name,
            "split": "val",
            "images": 4,
            "mode": "slide 16x16 stride 16x16",
        }
        assert f"{name} on val, slide 16x16 stride 16x16, step 5" in printed
    assert "absent" in printed
    assert "nan" not in (run / "evaluations.jsonl").read_text().lower() + printed.lower()


@pytest.mark.parametrize(
    ("flags", "words"), [(["--config.eval.flip"], ", flip"), (["--noconfig.eval.flip"], "")]
)
def test_the_command_takes_a_network_a_step_a_split_and_flags(run, flags, words):
    before = lines(run) if (run / "evaluations.jsonl").exists() else []
    assert main([f"--workdir={run}", "--network=b", "--step=3", "--split=train", *flags]) == 0
    (line,) = lines(run)[len(before) :]
    assert (line["network"], line["step"], line["phase"]) == ("b", 3, "warmup")
    assert (line["split"], line["images"]) == ("train", 12)
    assert line["mode"] == f"whole{words}, padded to multiples of 32"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.crop=8,8"], "--config.crop cannot be changed"),
        (["--config.data.split=8"], "--config.data.split cannot be changed"),
        (["--config.eval.mode=sliding"], "There are: whole, slide, center_crop, half_res"),
        (["--config.eval.modus=slide"], "modus"),
        (["--config.eval.batch=0"], "eval.batch=0 is too small"),
        (["--config.eval.bucket"], "eval.bucket=true"),
        (["--noconfig.eval.flip=true"], "Unexpected argument '--noconfig.eval.flip=true'"),
        (["--network=c"], "There are: a, b"),
        (["--step=4"], "3, 5"),
        (["--step=first"], "3, 5"),
        (["--split=test"], "test"),
        (["slide"], "Unexpected argument 'slide'"),
        (["--workdir=/nowhere"], "/nowhere"),
    ],
)
def test_a_mistake_is_one_message(run, capsys, arguments, words):
    assert main([f"--workdir={run}", *arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert words in errors


@dataclasses.dataclass(frozen=True)
class Photographs:
    """Images of two sizes with a class as a whole, which their red channel tells, often wrongly;
    the last one has no class.
    """

    info = dataclasses.replace(INFO, task="classification")
    ids = tuple(f"{i:02d}" for i in range(19))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        size = (8, 8) if index % 3 else (12, 20)
        label, guess = rng.choice([1, 2, 3], 2)
        image = np.full((*size, 3), guess if index % 2 else label, np.uint8)
        if index == len(self) - 1:
            label = IGNORE_LABEL
        return Record(image=image, label=np.uint8(label), id=self.ids[index])


@dataclasses.dataclass(frozen=True)
class Classifier(Painted):
    """`Painted` of whole images."""

    def apply(self, params, stats, image, *, valid=None, batch_stats, key=None):
        outputs, stats = super().apply(params, stats, image, batch_stats=batch_stats)
        return Outputs(outputs.logits.mean((1, 2))), stats


def classified(**changes):
    config = configs.default()
    config.update(crop=(8, 8))
    config.eval.update(mode="center_crop", **changes)
    source = Photographs()
    return Evaluator({"a": Classifier()}, source, make_mesh(), config), source


@pytest.mark.parametrize("changes", [{}, {"flip": True}, {"scales": (0.5, 1.0)}])
def test_whole_images_are_scored_by_accuracy(changes):
    evaluator, source = classified(**changes)
    score = evaluator("a", PAINTED)
    records = [source[i] for i in range(len(source) - 1)]
    truth = [int(record["label"]) for record in records]
    guess = [int(record["image"][0, 0, 0]) for record in records]
    np.testing.assert_array_equal(
        score.confusion, sklearn.confusion_matrix(truth, guess, labels=range(C))
    )
    assert score.score == pytest.approx(sklearn.accuracy_score(truth, guess))
    assert 0.3 < score.score < 1
    logits = -np.abs(np.array(guess)[:, None] - np.arange(C))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    true = p[np.arange(len(p)), truth].mean()
    assert score.choice == pytest.approx(true, rel=1e-5)
    written = score.to_json(INFO.classes)
    assert (written["accuracy"], written["true_probability"]) == (score.score, score.choice)
    assert written["class_accuracy"].keys() == {"b", "c", "d"}
    assert np.sum(written["confusion"]) == np.sum(written["reliability"]["all"]) == len(records)


def test_whole_images_are_seen_one_by_one():
    evaluator, source = classified()
    seen = evaluator.maps("a", PAINTED, source, lambda logits, _: {"best": logits.argmax(-1)})
    expected = [source[i]["image"][0, 0, 0] for i in range(len(source))]
    assert [int(one["best"]) for one in seen] == expected


@pytest.mark.parametrize("mode", ["slide", "half_res"])
def test_modes_of_pixels_are_refused_for_whole_images(mode):
    config = configs.default()
    config.eval.mode = mode
    with pytest.raises(UserError, match="center_crop"):
        Evaluator({"a": Classifier()}, Photographs(), make_mesh(), config)
