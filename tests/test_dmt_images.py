import dataclasses
import importlib.util
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import (
    OPTIMIZER,
    Pooled,
    assert_gradient,
    assert_same_run,
    cross_entropy,
    forward,
    leaves,
    make_state,
    run_until,
    softmax,
    use_devices,
)
from PIL import Image

from jaxssl import config as configs
from jaxssl import methods, mixing, models, optim, phases, selection, sharding
from jaxssl.contracts import Labeling, Plan, UserError, Variables, Weights
from jaxssl.data import digits
from jaxssl.data.pseudo_labels import Store
from jaxssl.inference import WHOLE
from jaxssl.methods import dmt_images
from jaxssl.selection import TopShare, confidence
from jaxssl.step import Clock, make_train_step

C = 4
CONFIGS = Path(__file__).parents[1] / "configs"
ROUNDS = [f"round_{number}" for number in (1, 2, 3, 4, 5)]


def plan(**changes):
    sizes, batch = {"labeled": 20, "unlabeled": 60}, {"labeled": 3, "unlabeled": 5}
    return Plan(**{"sizes": sizes, "batch": batch, "num_classes": C, "steps": 100, **changes})


def random_batch(labeled=3, unlabeled=5):
    """Images of noise; of pseudo-labels the labeler is sure to any degree."""
    rng, batch = np.random.default_rng(0), {}
    for name, count in (("labeled", labeled), ("unlabeled", unlabeled)):
        image = rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
        batch[name] = {"image": image, "label": rng.integers(0, C, count, np.uint8)}
    sure = np.linspace(0.3, 1, unlabeled).astype(np.float32)
    batch["unlabeled"]["confidence"] = rng.permutation(sure)
    return batch


def weight_of(method, p, y, c, gamma):
    """Of one pseudo-label y of confidence c: equation 6, or what replaces it."""
    g1, g2 = gamma * method.gamma_1, gamma * method.gamma_2
    if method.weight == "none":
        return 1.0
    if method.weight == "naive" or p.argmax() == y:
        return p[y] ** g1
    if c >= p.max():
        return p[y] ** g2
    return (1 - c) ** g2 if method.weight == "flip" else 0.0


def label_of(method, p, y, c):
    return p.argmax() if method.weight == "flip" and c < p.max() else y


def reference(method, variables, batch, mixed, progress, taught=None):
    """The loss in NumPy, statistics after it, and what was taught; `taught` holds that fixed."""
    image, label = (np.concatenate([batch[s][n] for s in batch]) for n in ("image", "label"))
    valid, n = np.ones(image.shape[:3], bool), len(batch["labeled"]["label"])
    if method.weight != "none":
        plain, _, stats = forward(variables, image, valid)
        variables = Variables(variables.params, stats)
    if taught is None:
        p = softmax(plain.mean((1, 2)))[n:] if method.weight != "none" else np.ones((5, C))
        gamma = np.exp(-5 * (1 - progress) ** 2)
        found = list(zip(p, label[n:], batch["unlabeled"].get("confidence", p), strict=True))
        weights = [weight_of(method, *one, gamma) for one in found]
        labels = [label_of(method, *one) for one in found]
        taught = np.array([1.0] * n + weights), np.array([*label[:n], *labels])
    weights, label = taught
    share, partner = float(mixed.share), np.asarray(mixed.partner)
    logits, _, stats = forward(variables, share * image + (1 - share) * image[partner], valid)
    target = share * np.eye(C)[label] + (1 - share) * np.eye(C)[label[partner]]
    terms = -(target * np.log(softmax(logits.mean((1, 2))))).sum(-1)
    return ((share * weights + (1 - share) * weights[partner]) * terms).mean(), stats, taught


@pytest.mark.parametrize("weight", ["dynamic", "naive", "flip", "none"])
def test_loss_is_the_mixed_sum(weight, monkeypatch):
    mixed = mixing.Mixup(np.float32(0.7), np.random.default_rng(1).permutation(8))
    monkeypatch.setattr(mixing, "mixup", lambda key, batch, *, alpha: mixed)
    method = dmt_images.Method(weight=weight, gamma_1=1.0, gamma_2=2.0)
    batch, nets, progress = random_batch(), {"a": Pooled()}, 0.8
    if weight == "none":
        del batch["unlabeled"]["confidence"]
    state, phase = make_state(method, nets), method.phases(plan())[-1]

    def loss(params):
        rest = state, {}, batch, jax.random.key(0)
        return method.loss(nets, params, *rest, phase=phase, progress=progress)

    (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    variables = state.network("a")
    expected, stats, taught = reference(method, variables, batch, mixed, progress)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["loss_mixed"][0], expected, rtol=1e-5)
    np.testing.assert_allclose(aux.stats["a"]["mean"], stats["mean"], rtol=1e-4)
    if weight == "dynamic":
        assert 0 == taught[0].min() < np.median(taught[0]) < 1  # every case occurs
        np.testing.assert_allclose(aux.metrics["weight"][0], taught[0][3:].sum(), rtol=1e-4)

    def moved(params):
        there = Variables(params, variables.stats)
        return reference(method, there, batch, mixed, progress, taught)[0]

    assert_gradient(gradient["a"], variables.params, moved)


def test_labels_alone_are_mixed_too():
    method, nets = dmt_images.Method(), {"a": Pooled()}
    state, phase, key = make_state(method, nets), method.phases(plan())[0], jax.random.key(3)
    labeled = random_batch()["labeled"]
    batch = {"labeled": labeled}
    loss, _ = method.loss(nets, state.params, state, {}, batch, key, phase=phase, progress=0.0)
    mixed = mixing.mixup(jax.random.split(key)[0], 3)
    image = np.asarray(mixed(labeled["image"]))
    logits, _, _ = forward(state.network("a"), image, np.ones(image.shape[:3], bool))
    own, others = (
        cross_entropy(logits.mean((1, 2)), labels)
        for labels in (labeled["label"], labeled["label"][mixed.partner])
    )
    share = float(mixed.share)
    np.testing.assert_allclose(loss, share * own + (1 - share) * others, rtol=1e-5)


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.9, 0.999])
def test_gamma_rises_as_in_the_paper(progress):
    expected = 4 * np.exp(-5 * (1 - progress) ** 2)
    np.testing.assert_allclose(dmt_images.gamma(progress, 4.0), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("labels", "batch", "supervised", "steps"),
    [
        # 300 sqrt(50000 / 4000) = 1060.66 epochs of 4000 images, 512 at a time: 8286.4.
        # 750 epochs of a fifth, two fifths, ... of 46000 images, 448 at a time: 77008.9 for all.
        (4000, (64, 448), 8286, (15_402, 30_804, 46_205, 61_607, 77_009)),
        # 2121.32 epochs of 1000 images: 4143.2; as in the released script, 2120 epochs.
        # Of 49000 images, 496 at a time: 74092.7.
        (1000, (16, 496), 4143, (14_819, 29_637, 44_456, 59_274, 74_093)),
    ],
)
def test_rounds_take_the_epochs_of_the_paper(labels, batch, supervised, steps):
    sizes = {"labeled": labels, "unlabeled": 50_000 - labels}
    batch = dict(zip(("labeled", "unlabeled"), batch, strict=True))
    found = dmt_images.Method().phases(plan(sizes=sizes, batch=batch, steps=None, epochs=750))
    assert found[0].streams[0].batch == 512
    assert {phase.name: phase.steps for phase in found} == {
        "supervised": supervised,
        **dict(zip(ROUNDS, steps, strict=True)),
    }


@pytest.mark.parametrize("labeled_by", ["best", "last"])
def test_a_network_begins_anew_from_labels_of_the_round_before(labeled_by):
    method = dmt_images.Method(supervised_rate=0.2, labeled_by=labeled_by)
    found = method.phases(plan())
    assert [phase.name for phase in found] == ["supervised", *ROUNDS]
    assert [phase.steps for phase in found[1:]] == [20, 40, 60, 80, 100]
    assert (found[0].learning_rate, found[1].learning_rate) == (0.2, None)
    for number, (before, phase) in enumerate(itertools.pairwise(found), 1):
        assert (phase.reinitialize, phase.start, phase.optimizer) == (("a",), {}, "fresh")
        assert phase.labeling == Labeling(
            Weights(before.name, "teacher_a", labeled_by),
            TopShare(number / 5, per_class=False),
            WHOLE,
            seed=number,
        )


@pytest.mark.parametrize("labeled_by", ["best", "last"])
def test_a_network_may_go_on_from_the_weights_that_labeled(labeled_by):
    found = dmt_images.Method(restart=False, labeled_by=labeled_by).phases(plan())
    for before, phase in itertools.pairwise(found):
        assert phase.start == {"a": Weights(before.name, "a", labeled_by)}
        assert (phase.reinitialize, phase.optimizer) == ((), "fresh")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("top", [0.2, 0.0]), ("balanced", [0.1, 0.1]), ("aligned", [0.05, 0.15])],
)
def test_rules_choose_by_class_or_not(rule, expected):
    """Of 100 images of a class that the network is sure of and 100 of another; the latter are three
    quarters of the labels.
    """
    counts = np.zeros((2, selection.LEVELS), np.int64)
    counts[0, 20_000:20_100], counts[1, 10_000:10_100] = 1, 1
    found = dmt_images.Method(rule=rule).phases(plan())[1].labeling.rule
    kept = [
        (row[chosen:].sum() / 200).item()
        for row, chosen in zip(counts, found(counts, np.array([1, 3])).lowest, strict=True)
    ]
    assert kept == pytest.approx(expected)


def test_curriculum_labeling_needs_no_confidence():
    found = dmt_images.Method(weight="none").phases(plan())
    assert not any(phase.labeling.confidence for phase in found[1:])


def test_too_few_pseudo_labels_are_refused():
    with pytest.raises(UserError, match=r"Round 1 learns from 12 .*fewer than the 13 of a batch"):
        dmt_images.Method().phases(plan(batch={"labeled": 3, "unlabeled": 13}))
    with pytest.raises(UserError, match=r"mixup=-1.0 is no number from 0 on"):
        methods.load({"name": "dmt_images", "mixup": -1.0})


def make_step(method, nets):
    phase = method.phases(plan(batch={"labeled": 8, "unlabeled": 8}))[-1]
    optimizer, schedule = optim.make_optimizer(OPTIMIZER), optim.make_schedule(OPTIMIZER)
    step = make_train_step(method, nets, phase, optimizer, schedule, learning_rate=0.1, seed=0)
    return phase, step


@pytest.mark.parametrize(("done", "kept"), [(0, 0.0), (3, 0.75), (4000, 0.999)])
def test_the_average_keeps_of_itself_what_it_should(done, kept):
    method, nets = dmt_images.Method(), {"a": Pooled()}
    phase, step = make_step(method, nets)
    state = make_state(method, nets)
    other = Pooled().init(jax.random.key(9), (8, 8))
    state = state.with_network("teacher_a", other)
    after, _ = jax.jit(step)(state, {}, random_batch(8, 8), Clock.of(phase, -done))
    for mean, old, new in zip(
        jax.tree.leaves(after.network("teacher_a")),
        jax.tree.leaves(other),
        jax.tree.leaves(after.network("a")),
        strict=True,
    ):
        np.testing.assert_allclose(mean, kept * old + (1 - kept) * new, rtol=1e-4, atol=1e-5)


def test_devices_do_not_matter():
    method, nets = dmt_images.Method(), {"a": Pooled()}
    phase, step = make_step(method, nets)
    drawn = make_state(method, nets)

    def train(devices):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        everywhere, rows = sharding.replicated(mesh), sharding.batched(mesh)
        run = jax.jit(
            step,
            in_shardings=(everywhere, everywhere, rows, everywhere),
            out_shardings=everywhere,
        )
        state, clock = jax.device_put((drawn, Clock.of(phase, 0)), everywhere)
        batch = sharding.to_devices(random_batch(8, 8), mesh)
        return jax.tree.map(np.asarray, run(state, {}, batch, clock))

    for eight, one in zip(jax.tree.leaves(train(8)), jax.tree.leaves(train(1)), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-4, atol=1e-6)


def prepare(patch):
    """Two rounds on digits of a few updates each, with a network that compiles in no time."""
    patch.setattr(models, "load", lambda config, num_classes, **_: Pooled(num_classes))
    use_devices(patch, 1)
    config = configs.cifar10({"labels": "20", "data": "digits"})
    config.method = configs.dmt_images(ratios=(0.4, 1.0), supervised_rate=None)
    config.update(warmup=4, steps=10, distributed="off", compilation_cache="")
    config.batch.update(labeled=8, unlabeled=8)
    config.optimizer.update(name="sgd", learning_rate=0.3)
    config.log.update(every=1, tensorboard=False)
    config.eval.update(every=3, panels=2)
    config.checkpoint.every = 2
    return config


@pytest.fixture
def config(monkeypatch):
    return prepare(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of an uninterrupted run, and what each batch held."""
    workdir, seen = tmp_path_factory.mktemp("whole"), []
    with pytest.MonkeyPatch.context() as patch:
        config, to_devices = prepare(patch), sharding.to_devices

        def noting(batch, *rest):
            if "unlabeled" in batch:
                seen.append({name: x.copy() for name, x in batch["unlabeled"].items()})
            return to_devices(batch, *rest)

        patch.setattr(sharding, "to_devices", noting)
        assert phases.run(config, workdir) == 0
    return workdir, seen


def test_rounds_learn_from_the_surest_images_alone(config, whole):
    """Against a sort of the labeler's confidences, from its forward pass in NumPy."""
    workdir, seen = whole
    _, sources = phases.open_sources(config.data)
    unlabeled = sources["unlabeled"]
    assert [len(seen[i]["label"]) for i in (0, 13)] == [8, 8]
    for name, batches, share in (("round_1", seen[:4], 0.4), ("round_2", seen[4:], 1.0)):
        store = Store.of(workdir, name, digits.INFO)
        labels, levels = zip(*map(store.read, unlabeled.ids), strict=True)
        kept = np.array(labels) != 255
        least = sorted(levels)[::-1][int(np.ceil(share * len(levels))) - 1]
        np.testing.assert_array_equal(kept, np.array(levels) >= least)
        for batch in batches:
            np.testing.assert_array_equal(batch["label"], np.array(labels)[batch["index"]])
            np.testing.assert_array_equal(
                batch["confidence"], confidence(np.array(levels)[batch["index"]])
            )
            assert kept[batch["index"]].all()
    summary = json.loads((workdir / "pseudo_labels" / "round_1" / "summary.json").read_text())
    labeler = {"phase": "supervised", "network": "teacher_a", "which": "best"}
    assert labeler.items() <= summary["labeler"].items()


@pytest.mark.parametrize("step", [6, 12])
def test_killed_inside_a_round_it_goes_on_as_it_was(config, whole, tmp_path, step):
    """Four updates on labels, four in the first round, ten in the second."""
    run_until(step, config, tmp_path)
    assert phases.run(config, tmp_path) == 0
    assert_same_run(tmp_path, whole[0])


def test_eight_devices_run_as_one_does(config, tmp_path, monkeypatch):
    config.method.ratios = (1.0,)  # where a few are chosen, rounding may choose another one
    for count in (1, 8):
        use_devices(monkeypatch, count)
        assert phases.run(config, tmp_path / str(count)) == 0
    one, eight = (leaves(tmp_path / name) for name in "18")
    for name, value in one.items():
        np.testing.assert_allclose(eight[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_each_round_begins_with_a_network_of_its_own(config, tmp_path, monkeypatch):
    enter, starts = phases.enter, []

    def noting(run, index, state):
        state = enter(run, index, state)
        starts.append(jax.tree.leaves(state.params)[0].copy())
        return state

    monkeypatch.setattr(phases, "enter", noting)
    assert phases.run(config, tmp_path) == 0
    first, second = map(np.asarray, starts)
    drawn = phases.draw(
        {"a": Pooled(10)},
        jax.random.fold_in(jax.random.key(0), 8),
        (8, 8),
        sharding.replicated(sharding.make_mesh()),
    )
    assert (first != second).all()
    np.testing.assert_array_equal(second, jax.tree.leaves(drawn["a"].params)[0])


def test_the_holdout_chooses_who_labels(config, tmp_path):
    config.data.validation = 40
    assert phases.run(config, tmp_path) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    chosen = [line for line in lines if "holdout/teacher_a/choice" in line]
    before = [line for line in chosen if line["phase"] == "supervised"]
    best = max(before, key=lambda line: line["holdout/teacher_a/choice"])
    summary = json.loads((tmp_path / "pseudo_labels" / "round_1" / "summary.json").read_text())
    assert len(before) == 2
    assert summary["labeler"]["step"] == best["step"]


def test_images_of_ones_own_have_any_size(tmp_path, monkeypatch):
    """Two classes in folders, and images without one; the labeler sees the middle of each."""
    config, rng = prepare(monkeypatch), np.random.default_rng(0)
    spec = importlib.util.spec_from_file_location("own", CONFIGS / "dmt_class_folders.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    own = module.get_config("small")
    for name in ("train/cat", "train/dog", "val/cat", "val/dog", "unlabeled"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(6):
            image = rng.integers(0, 256, (9 + i, 20 - i, 3), np.uint8)
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
    own.update(crop=(8, 8), warmup=4, steps=10, distributed="off", compilation_cache="")
    own.data.root, own.batch, own.log = str(tmp_path), {"labeled": 4, "unlabeled": 2}, config.log
    own.batch.accumulate = 1
    assert phases.run(own, tmp_path / "w") == 0
    summary = json.loads((tmp_path / "w/pseudo_labels/round_5/summary.json").read_text())
    assert (summary["images"], summary["left_out"], summary["kept"]) == (6, 0, 1.0)


def test_panels_show_images_beside_their_classes(whole):
    assert sorted((whole[0] / "panels").glob("*.png"))


def test_fields_of_the_config_are_those_of_the_method():
    section = configs.dmt_images().to_dict()
    fields = {field.name for field in dataclasses.fields(dmt_images.Method)}
    assert fields - {"auxiliary_weight"} == section.keys() - {"name"}  # no network here has one
    assert methods.load(section) == dmt_images.Method(supervised_rate=0.2)
