import jax
import numpy as np
import pytest
from conftest import (
    OPTIMIZER,
    Linear,
    cross_entropy,
    forward,
    make_state,
    nearest,
    plan,
    random_batch,
)

from jaxssl import contracts, methods, optim, selection, sharding
from jaxssl.contracts import Labeling, Plan, UserError, Weights
from jaxssl.inference import Presentation
from jaxssl.methods import dars
from jaxssl.step import Clock, make_train_step

SIZE = (16, 24)


def pseudo_batch(seed=0, *, images=4, kept=0.6):
    """Noise with labels, and with pseudo-labels that are left out of a part of the pixels."""
    batch, rng = random_batch(seed, images=images), np.random.default_rng(seed + 100)
    valid = batch["unlabeled"]["valid"]
    label = rng.integers(0, 4, valid.shape, np.uint8)
    label[~valid | (rng.random(valid.shape) >= kept)] = 255
    confidence = rng.random(valid.shape, np.float32)
    return {**batch, "unlabeled": {**batch["unlabeled"], "label": label, "confidence": confidence}}


def published(split="1_8", **changes):
    """A plan of the paper's Cityscapes rows: 200 epochs of the unlabeled images, 8 at a time."""
    sizes = {
        "1_8": {"labeled": 372, "unlabeled": 2603},
        "1_16": {"labeled": 186, "unlabeled": 2789},
    }
    given = {"batch": {"labeled": 8, "unlabeled": 8}, "epochs": 200.0, "scale": (0.25, 1.0)}
    return Plan(sizes[split], num_classes=19, crop=(361, 361), **{**given, **changes})


def loss_of(method, nets, batch, phase):
    """`method.loss` as a function of the parameters and the state."""

    def loss(params, state):
        return method.loss(
            nets, params, state, {}, batch, jax.random.key(0), phase=phase, progress=0.3
        )

    return loss


def reference(variables, batch, weight):
    """The losses on labeled images and on pseudo-labels, and the new statistics, in NumPy."""
    params, stats = variables
    losses = []
    for images in batch.values():
        logits, _, stats = forward((params, stats), images["image"], images["valid"])
        logits = nearest(logits, SIZE)
        losses.append(
            cross_entropy(logits, images["label"])
            + weight * cross_entropy(2 * logits, images["label"])
        )
    return losses, stats


@pytest.mark.parametrize("auxiliary", [False, True])
def test_loss_is_equation_2(auxiliary):
    method, nets = dars.Method(auxiliary_weight=0.3), {"a": Linear(auxiliary=auxiliary)}
    state, batch = make_state(method, nets), pseudo_batch()
    phases = method.phases(plan(images=4))
    run = jax.value_and_grad(loss_of(method, nets, batch, phases[1]), has_aux=True)
    (loss, aux), grads = run(state.params, state)

    (labeled, pseudo), stats = reference(state.network("a"), batch, 0.3 * auxiliary)
    np.testing.assert_allclose(loss, labeled + pseudo, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["loss_labeled"][0], labeled, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["loss_pseudo"][0], pseudo, rtol=1e-5)
    np.testing.assert_allclose(aux.stats["a"]["mean"], stats["mean"], rtol=1e-5)
    kept, valid = aux.metrics["kept"]
    assert int(valid) == batch["unlabeled"]["valid"].sum()
    assert int(kept) == (batch["unlabeled"]["label"] != 255).sum()

    # The slope along a random direction of the classifier.
    direction = np.random.default_rng(0).normal(size=(5, 4))
    params = jax.tree.map(np.float64, state.params["a"])

    def moved(step):
        head = {**params["head"], "kernel": params["head"]["kernel"] + step * direction}
        there = contracts.Variables({**params, "head": head}, state.stats["a"])
        return sum(reference(there, batch, 0.3 * auxiliary)[0])

    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    np.testing.assert_allclose((grads["a"]["head"]["kernel"] * direction).sum(), slope, rtol=1e-3)


def test_first_phase_learns_from_the_labels_alone():
    method, nets = dars.Method(), {"a": Linear()}
    batch = {"labeled": random_batch()["labeled"]}
    state = make_state(method, nets)
    supervised = method.phases(plan())[0]
    loss, aux = loss_of(method, nets, batch, supervised)(state.params, state)
    (expected,), stats = reference(state.network("a"), batch, 0)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(aux.stats["a"]["mean"], stats["mean"], rtol=1e-5)
    assert set(aux.metrics) == {"loss_labeled"}


def test_a_batch_without_pseudo_labels_teaches_nothing_more():
    method, nets = dars.Method(), {"a": Linear()}
    batch, state = pseudo_batch(kept=0), make_state(method, nets)
    phase = method.phases(plan())[1]
    run = jax.value_and_grad(loss_of(method, nets, batch, phase), has_aux=True)
    (loss, aux), grads = run(state.params, state)
    (labeled, _), _ = reference(state.network("a"), batch, 0)
    np.testing.assert_allclose(loss, labeled, rtol=1e-5)
    assert (float(aux.metrics["loss_pseudo"][0]), float(aux.metrics["kept"][0])) == (0, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_forward_passes_are_one_for_each_stream():
    """In batches of their own, with dropout of their own."""
    calls = []

    class Recording(Linear):
        def apply(self, params, stats, image, *, valid=None, batch_stats, key=None):
            calls.append((image.shape[0], batch_stats, jax.random.key_data(key).tolist()))
            return super().apply(params, stats, image, valid=valid, batch_stats=batch_stats)

    method, nets, batch = dars.Method(), {"a": Recording()}, pseudo_batch()
    batch["unlabeled"] = jax.tree.map(lambda x: x[:3], batch["unlabeled"])
    state = make_state(method, nets)
    loss_of(method, nets, batch, method.phases(plan())[1])(state.params, state)
    labeled, unlabeled = calls
    assert (labeled[:2], unlabeled[:2]) == ((4, True), (3, True))
    assert labeled[2] != unlabeled[2]


@pytest.mark.parametrize("schedule", ["restart", "stretched"])
def test_phases_take_the_steps_of_the_paper(schedule):
    # 200 epochs of 2789 images, 8 at a time: 69725; 16 labeled at a time: half as many steps.
    phases = dars.Method(schedule=schedule).phases(published("1_16"))
    assert [(phase.name, phase.steps) for phase in phases] == [
        ("supervised", 34_862),
        ("round_1", 69_725),
        ("round_2", 69_725),
    ]
    assert all(phase.train == ("a",) and not phase.start for phase in phases)
    streams = [[(s.name, s.batch) for s in phase.streams] for phase in phases]
    assert streams == [[("labeled", 16)], *2 * [[("labeled", 8), ("unlabeled", 8)]]]
    assert [phase.optimizer for phase in phases[1:]] == 2 * [
        {"restart": "fresh", "stretched": "continue"}[schedule]
    ]


def test_warm_up_is_the_length_of_the_first_phase():
    phases = dars.Method().phases(published(warmup=123, steps=45, epochs=None))
    assert [phase.steps for phase in phases] == [123, 45, 45]


def test_few_labeled_images_make_a_smaller_batch():
    small = Plan({"labeled": 5, "unlabeled": 90}, {"labeled": 4, "unlabeled": 4}, 3, steps=30)
    supervised = dars.Method().phases(small)[0]
    assert supervised.streams[0].batch == 4
    assert supervised.steps == 30


# 0.00536 and 0.00372 of 0.01 are the rates at which the released rounds begin.
@pytest.mark.parametrize(
    ("schedule", "rates"), [("restart", (1.0, 1.0, 1.0)), ("stretched", (1.0, 0.536, 0.372))]
)
def test_learning_rates_at_which_phases_begin(schedule, rates):
    factor = optim.make_schedule(OPTIMIZER)
    for phase, rate in zip(dars.Method(schedule=schedule).phases(published()), rates, strict=True):
        clock = Clock.of(phase, begin=12_345)
        begin, total = clock.schedule_begin, clock.schedule_steps
        assert factor(begin, total) == pytest.approx(rate, abs=1e-3)
        # Each ends at 0.
        assert int(begin) + phase.steps == int(total)


def test_rounds_label_more_and_see_a_wider_range_of_scales():
    method = dars.Method(temperature=1.27, label_scale=0.5)
    before = "supervised"
    windows = Presentation("slide", (361, 361), (241, 241), flip=True, scales=(0.5,))
    # Released: [.25,1] in the first round, [.2,1.5] in the second.
    rounds, scales = method.phases(published(seed=5))[1:], ((0.25, 1.0), (0.2, 1.5))
    for number, (phase, scale) in enumerate(zip(rounds, scales, strict=True), 1):
        ratio, (labeled, unlabeled) = (0.2, 0.5)[number - 1], phase.streams
        assert labeled.labels == "truth"
        assert unlabeled.labels == Labeling(
            Weights(before, "a", "last"),
            selection.Aligned(ratio),
            windows,
            temperature=1.27,
            seed=5 + number,
            confidence=False,
        )
        for stream in phase.streams:
            assert set(stream.augment) == {"scale"}
            np.testing.assert_allclose(stream.augment["scale"], scale, rtol=1e-6)
        assert phase.pseudo_labeled is unlabeled
        before = phase.name


@pytest.mark.parametrize(
    ("settings", "planned", "shown"),
    [
        ({"label_mode": "whole"}, {}, Presentation()),
        ({"label_mode": "whole", "label_scale": 0.8}, {}, Presentation(scales=(0.8,))),
        ({}, {"crop": None}, Presentation()),
        ({}, {"crop": (3, 7)}, Presentation("slide", (3, 7), (2, 5), flip=True)),
    ],
)
def test_how_images_are_shown_to_be_labeled(settings, planned, shown):
    sizes = {"labeled": 4, "unlabeled": 8}
    small = Plan(sizes, {"labeled": 2, "unlabeled": 2}, 3, steps=5, **planned)
    phases = dars.Method(**settings).phases(small)
    assert all(phase.pseudo_labeled.labels.shown == shown for phase in phases[1:])


# [(1 - beta_min) s_min, (1 + beta_max) s_max], the ranges of the released configurations.
@pytest.mark.parametrize(
    ("scale", "betas", "wider"),
    [
        ((0.25, 1.0), (0.0, 0.0), (0.25, 1.0)),
        ((0.25, 1.0), (0.2, 0.5), (0.2, 1.5)),
        ((0.5, 2.0), (0.0, 0.5), (0.5, 3.0)),
        ((0.5, 2.0), (0.2, 0.25), (0.4, 2.5)),
        ((0.5, 1.5), (0.0, 1 / 3), (0.5, 2.0)),
    ],
)
def test_widened(scale, betas, wider):
    np.testing.assert_allclose(dars.widened(scale, *betas), wider, rtol=1e-6)


def test_without_rounds_it_is_the_baseline():
    method = dars.Method(ratios=(), beta_min=(), beta_max=())
    (phase,) = method.phases(published())
    assert phase.pseudo_labeled is None


def many_positions():
    """Twelve positions predicted 0, of which eight are as sure as can be; three predicted 1, one
    predicted 2; none 3. The labels have these classes at 50, 25, 12.5 and 12.5 percent.
    """
    doubt = [0.0] * 8 + [1e-2, 2e-2, 0.1, 0.2] + [1e-3, 0.3, 0.4] + [0.45]
    labels = np.array([0] * 12 + [1] * 3 + [2], np.uint8)
    return labels, selection.to_level(1 - np.array(doubt)), np.array([400, 200, 100, 100])


# Half of the 16 positions are 8: 4 of class 0, 2 of class 1, 1 of class 2, and 1 of class 3, which
# nothing is predicted to be. In class 0 eight are equally sure, so each is kept by a half.
@pytest.mark.parametrize(
    ("rule", "reached", "shares"),
    [
        ("dars", (8, 2, 1), (0.5, 1.0, 1.0)),
        ("da", (8, 2, 1), (1.0, 1.0, 1.0)),
        ("cbst", (8, 2, 1), (1.0, 1.0, 1.0)),  # 6, 1.5 and .5 of 12, 3 and 1, rounded up
        ("st", (8, 0, 0), (1.0, 1.0, 1.0)),
    ],
)
def test_rules_of_the_ablation(rule, reached, shares):
    labels, levels, prior = many_positions()
    chosen = dars.Method(rule=rule).labeling_rule(0.5)(selection.count(labels, levels, 4), prior)
    above = levels >= chosen.lowest[labels]
    assert tuple(np.bincount(labels[above], minlength=3)) == reached
    there = np.unique(labels[above])
    np.testing.assert_allclose(chosen.share[there], np.array(shares)[there])


@pytest.mark.parametrize(("precision", "kept"), [("float16", 2), ("stored", 1)])
def test_precision_says_which_confidences_are_alike(precision, kept):
    """Of 0.9999 and 0.99993 half precision makes 1: the spacing below that is 2^-11."""
    levels = selection.to_level(np.array([0.9999, 0.99993, 0.9]))
    labels, prior = np.zeros(3, np.uint8), np.array([1])
    counts = selection.count(labels, levels, 1)
    chosen = dars.Method(precision=precision, rule="da").labeling_rule(1 / 3)(counts, prior)
    assert (levels >= chosen.lowest[0]).sum() == kept
    sampled = dars.Method(precision=precision).labeling_rule(1 / 3)(counts, prior)
    assert sampled.share[0] == pytest.approx(1 / kept)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rule": "alignment"}, "Unknown method.rule 'alignment'. There are: dars, da, cbst, st"),
        ({"precision": "float32"}, "method.precision"),
        ({"schedule": "poly"}, "There are: restart, stretched"),
        ({"label_mode": "full"}, "There are: slide, whole"),
        ({"ratios": (0.2,)}, "differ in length. Give a number for each round"),
        ({"beta_min": (0.0, 1.0)}, "is no number from 0 to below 1"),
        ({"beta_max": (0.0, -0.5)}, "is no number from 0 on"),
        ({"temperature": 0.0}, "method.temperature=0.0 is no number above 0"),
    ],
)
def test_wrong_fields_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        methods.load({"name": "dars", **fields})


def test_ratios_are_shares():
    with pytest.raises(UserError, match=r"method\.ratios=\(20, 50\) is no number from 0 to 1"):
        dars.Method(ratios=(20, 50))


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}], ids=str)
def test_state_is_a_fixed_point(options):
    method, nets = dars.Method(), {"a": Linear()}
    state = make_state(method, nets)
    batches = {"labeled": random_batch()["labeled"]}, pseudo_batch()
    for phase, batch in zip(method.phases(plan())[:2], batches, strict=True):
        step = step_of(method, nets, phase, **options)
        after, _ = jax.eval_shape(step, state, {}, batch, Clock.of(phase, 0))
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, after)


def step_of(method, nets, phase, **options):
    optimizer, schedule = optim.make_optimizer(OPTIMIZER), optim.make_schedule(OPTIMIZER)
    return make_train_step(
        method, nets, phase, optimizer, schedule, learning_rate=0.1, seed=0, **options
    )


def train(devices):
    """The state after a step of a round, its batch split over the devices."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    method, nets = dars.Method(), {"a": Linear(auxiliary=True)}
    phase = method.phases(plan(images=8))[1]
    everywhere, rows = sharding.replicated(mesh), sharding.batched(mesh)
    step = jax.jit(
        step_of(method, nets, phase),
        in_shardings=(everywhere, everywhere, rows, everywhere),
        out_shardings=everywhere,
    )
    state = jax.device_put(make_state(method, nets, size=SIZE), everywhere)
    batch = sharding.to_devices(pseudo_batch(images=8), mesh)
    state, metrics = step(state, {}, batch, jax.device_put(Clock.of(phase, 0), everywhere))
    return jax.tree.map(np.asarray, (state, metrics))


def test_devices_do_not_matter():
    one, eight = train(1), train(8)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max()),
        eight,
        one,
    )
    assert one[1]["loss_pseudo"][0] > 0
