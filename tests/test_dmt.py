import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    OPTIMIZER,
    Linear,
    Small,
    cross_entropy,
    forward,
    make_state,
    nearest,
    random_batch,
)

from jaxssl import contracts, methods, optim, sharding
from jaxssl.contracts import Labeling, Plan, Weights
from jaxssl.inference import Presentation
from jaxssl.methods import dmt
from jaxssl.selection import TopShare
from jaxssl.step import Clock, make_train_step

C, SIZE = 4, (16, 24)


def random_pixels(seed, count=400, classes=C):
    """Softmaxes of one network, and labels and confidences of another; some are exactly alike."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, classes)) * rng.uniform(0.1, 4, (count, 1))
    p = np.float32(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    label = rng.integers(0, max(1, classes - 1), count).astype(np.uint8)
    confidence = rng.uniform(1 / classes, 1, count).astype(np.float32)
    confidence[::5] = p.max(-1)[::5]
    label[::7] = 255
    return p, label, confidence


def weight_of(p, y, c, gamma_1, gamma_2):
    """Equation 6 for one pixel."""
    if y == 255:
        return 0.0
    if p.argmax() == y:
        return float(p[y]) ** gamma_1
    return float(p[y]) ** gamma_2 if c >= p.max() else 0.0


@pytest.mark.parametrize(("gamma_1", "gamma_2"), [(5.0, 5.0), (3.0, 1.5), (0.0, 0.0)])
def test_weight_is_equation_6(gamma_1, gamma_2):
    p, label, confidence = random_pixels(0)
    shape = (20, 20)
    found = dmt.dynamic_weight(
        jnp.asarray(p).reshape(*shape, C),
        jnp.asarray(label).reshape(shape),
        jnp.asarray(confidence).reshape(shape),
        gamma_1,
        gamma_2,
    )
    pixels = zip(p, label, confidence, strict=True)
    expected = [weight_of(*pixel, gamma_1, gamma_2) for pixel in pixels]
    np.testing.assert_allclose(np.ravel(found), expected, rtol=1e-5, atol=1e-7)


def test_as_sure_as_the_labeler_is_not_surer():
    p = jnp.array([[0.7, 0.2, 0.1]])
    for confidence, weight in ((0.7, 0.2), (np.nextafter(np.float32(0.7), np.float32(0)), 0.0)):
        sure = jnp.float32(confidence)[None]
        found = dmt.dynamic_weight(p, jnp.array([1], jnp.uint8), sure, 3.0, 1.0)
        np.testing.assert_allclose(found, [weight], rtol=1e-6)


def test_cases_share_out_what_is_labeled():
    p, label, confidence = random_pixels(1)
    cases = dmt.compare(*(jnp.asarray(x) for x in (p, label, confidence)))
    agree = (label != 255) & (p.argmax(-1) == label)
    np.testing.assert_array_equal(cases.agreement, agree)
    np.testing.assert_array_equal(np.sum(cases, 0), label != 255)
    assert min(np.sum(case) for case in cases) > 10
    assert (confidence[np.array(cases.negative)] >= p.max(-1)[np.array(cases.negative)]).all()


def test_flip_takes_the_own_prediction_where_it_is_surer():
    p, label, confidence = random_pixels(2)
    found, weight = dmt.flip(*(jnp.asarray(x) for x in (p, label, confidence)), 2.0, 3.0)
    assert found.dtype == jnp.uint8
    for i, (q, y, c) in enumerate(zip(p, label, confidence, strict=True)):
        expected = int(y), weight_of(q, y, c, 2.0, 3.0)
        if y not in (255, q.argmax()) and c < q.max():
            expected = q.argmax(), (1 - float(c)) ** 3
        assert int(found[i]) == expected[0]
        np.testing.assert_allclose(weight[i], expected[1], rtol=1e-4, atol=1e-6)


def test_one_class_is_always_agreed_on():
    p, label, confidence = random_pixels(0, classes=1)
    weight = dmt.dynamic_weight(jnp.asarray(p), jnp.asarray(label), jnp.asarray(confidence), 5, 5)
    np.testing.assert_array_equal(weight, label != 255)


def test_difference_maximized_parts():
    first, second = dmt.difference_maximized_parts(0.8)
    assert (*first, *second) == pytest.approx((0, 0.8, 0.2, 1))


def test_supervised_epochs_are_those_of_appendix_b():
    # An eighth of 2975 images: 60 sqrt(8); the released scripts take 170.
    assert dmt.supervised_epochs(60, 372, 2975) == pytest.approx(169.7, abs=0.1)
    # 1464 of the 10582 images of VOC; a share of all trains for N epochs.
    assert dmt.supervised_epochs(30, 1464, 10582) == pytest.approx(80.66, abs=0.01)
    assert dmt.supervised_epochs(30, 10582, 10582) == 30


def labeled_batch(seed=0, *, classes=C, **kwargs):
    """A batch with pseudo-labels, some of them dropped, of a labeler that is sure of some."""
    batch = random_batch(seed, **kwargs)
    rng, unlabeled = np.random.default_rng(seed + 100), batch["unlabeled"]
    label = rng.integers(0, classes, unlabeled["valid"].shape, np.uint8)
    label[(rng.random(label.shape) < 0.3) | ~unlabeled["valid"]] = 255
    confidence = rng.uniform(0.3, 1, label.shape).astype(np.float32)
    batch["unlabeled"] = {**unlabeled, "label": label, "confidence": confidence}
    return batch


def plan(**changes):
    sizes = {"labeled": 20, "unlabeled": 60}
    batch = {"labeled": 4, "unlabeled": 4}
    return Plan(**{"sizes": sizes, "batch": batch, "num_classes": C, "steps": 7, **changes})


def teach(method, p, images):
    """Targets and weights of unlabeled pixels, one by one."""
    label, weight = np.full(p.shape[:3], 255), np.zeros(p.shape[:3])
    for at in np.ndindex(label.shape):
        if method.labels == "online":
            sure = images["valid"][at] and p[at].max() > method.threshold
            y, c = p[at].argmax() if sure else 255, p[at].max()
        else:
            y, c = int(images["label"][at]), float(images["confidence"][at])
        w = weight_of(p[at], y, c, method.gamma_1, method.gamma_2)
        if method.weight == "none":
            w = 1.0
        elif method.weight == "naive":
            w = p[at][y] ** method.gamma_1 if y != 255 else 0.0
        elif method.weight == "flip" and y not in (255, p[at].argmax()) and c < p[at].max():
            y, w = p[at].argmax(), (1 - c) ** method.gamma_2
        label[at], weight[at] = y, w
    return label, weight


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def reference(method, variables, batch, taught=None, auxiliary=False):
    """Equations 7, 9 and 10 in NumPy: the terms, and what was taught; `taught` holds that fixed."""
    image, valid = (
        np.concatenate([batch[s][name] for s in ("labeled", "unlabeled")])
        for name in ("image", "valid")
    )
    logits, _, stats = forward(variables, image, valid)
    logits, n = nearest(logits, SIZE), len(batch["labeled"]["image"])
    label, weight = taught or teach(method, softmax(logits[n:]), batch["unlabeled"])
    known = (batch["labeled"]["label"] != 255).sum() + (label != 255).sum()
    heads = [(1.0, logits), *([(method.auxiliary_weight, 2 * logits)] if auxiliary else [])]
    truth, terms = batch["labeled"]["label"], {"loss_labeled": 0.0, "loss_pseudo": 0.0}
    for factor, values in heads:
        mean = cross_entropy(values[:n], truth)
        terms["loss_labeled"] += factor * mean * (truth != 255).sum() / max(known, 1)
        found = -np.log(softmax(values[n:]))[label != 255]
        single = found[np.arange(len(found)), label[label != 255]]
        terms["loss_pseudo"] += factor * (weight[label != 255] * single).sum() / max(known, 1)
    return terms, (label, weight), stats


def loss_of(method, nets, batch):
    """`method.loss` in the last phase as a function of the parameters and the state."""
    phase = method.phases(plan())[-1]

    def loss(params, state):
        key = jax.random.key(0)
        return method.loss(nets, params, state, {}, batch, key, phase=phase, progress=0.5)

    return loss, phase.train[0]


SETTINGS = [
    {},
    {"gamma_1": 1.0, "gamma_2": 3.0},
    {"weight": "naive"},
    {"weight": "flip", "gamma_2": 2.0},
    {"weight": "none"},
    {"labels": "own"},
    {"labels": "own", "weight": "none"},
    {"labels": "online", "weight": "none", "threshold": 0.6},
    {"labels": "online", "threshold": 0.6},
]


def name_of(settings):
    return "-".join(f"{key}={value}" for key, value in settings.items()) or "default"


@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_loss_is_equation_10(settings, auxiliary):
    method, batch = dmt.Method(**settings), labeled_batch()
    nets = {name: Linear(auxiliary=auxiliary) for name in method.students}
    state = make_state(method, nets)
    loss, name = loss_of(method, nets, batch)
    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(state.params, state)

    variables = state.network(name)
    terms, taught, stats = reference(method, variables, batch, auxiliary=auxiliary)
    np.testing.assert_allclose(value, sum(terms.values()), rtol=1e-4)
    for term, expected in terms.items():
        np.testing.assert_allclose(aux.metrics[term][0], expected, rtol=1e-4, err_msg=term)
    np.testing.assert_allclose(aux.stats[name]["mean"], stats["mean"], rtol=1e-4)
    assert set(aux.stats) == {name}

    # The slope along a random direction, targets and weights held fixed.
    rng = np.random.default_rng(0)
    params = jax.tree.map(np.float64, variables.params)
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)

    def moved(step):
        there = jax.tree.map(lambda p, d: p + step * d, params, direction)
        moved = contracts.Variables(there, variables.stats)
        return sum(reference(method, moved, batch, taught, auxiliary)[0].values())

    slope = sum(
        (g * d).sum()
        for g, d in zip(jax.tree.leaves(grads[name]), jax.tree.leaves(direction), strict=True)
    )
    np.testing.assert_allclose(slope, (moved(1e-6) - moved(-1e-6)) / 2e-6, rtol=1e-3)


def changed(batch, label):
    """The batch with other pseudo-labels."""
    return {**batch, "unlabeled": {**batch["unlabeled"], "label": label}}


def test_metrics_say_what_is_kept_and_how_it_compares(nets):
    method, batch = dmt.Method(), labeled_batch()
    state = make_state(method, nets)
    loss, name = loss_of(method, nets, batch)
    _, aux = loss(state.params, state)
    image = np.concatenate([batch[s]["image"] for s in batch])
    valid = np.concatenate([batch[s]["valid"] for s in batch])
    p = softmax(nearest(forward(state.network(name), image, valid)[0], SIZE)[4:])
    label, confidence = (batch["unlabeled"][key] for key in ("label", "confidence"))
    known, agree = label != 255, p.argmax(-1) == label
    surer = p.max(-1) > confidence
    _, weight = teach(method, p, batch["unlabeled"])
    expected = {
        "kept": known.sum() / batch["unlabeled"]["valid"].sum(),
        "weight": weight[known].mean(),
        "agreement": agree[known].mean(),
        "negative_disagreement": (~agree & ~surer)[known].mean(),
        "positive_disagreement": (~agree & surer)[known].mean(),
    }
    for metric, value in expected.items():
        total, count = aux.metrics[metric]
        np.testing.assert_allclose(total / count, value, rtol=1e-4, err_msg=metric)
        assert 0 < value < 1
    assert set(aux.metrics) == {*expected, "loss_labeled", "loss_pseudo"}


def test_what_no_label_is_kept_of_changes_nothing_but_statistics(nets):
    method, batch = dmt.Method(), labeled_batch()
    dropped = changed(batch, np.full_like(batch["unlabeled"]["label"], 255))
    state = make_state(method, nets)
    loss, name = loss_of(method, nets, dropped)
    value, aux = loss(state.params, state)
    image = np.concatenate([batch[s]["image"] for s in batch])
    valid = np.concatenate([batch[s]["valid"] for s in batch])
    logits = nearest(forward(state.network(name), image, valid)[0], SIZE)
    labels = batch["labeled"]["label"]
    np.testing.assert_allclose(value, cross_entropy(logits[:4], labels), rtol=1e-4)
    assert float(aux.metrics["loss_pseudo"][0]) == 0


def test_batch_without_any_label(nets):
    method, batch = dmt.Method(), labeled_batch()
    nothing = changed(batch, np.full_like(batch["unlabeled"]["label"], 255))
    nothing["labeled"]["label"][:] = 255
    state = make_state(method, nets)
    loss, _ = loss_of(method, nets, nothing)
    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(state.params, state)
    assert float(value) == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))
    assert all(np.isfinite(total) for total, _ in aux.metrics.values())


@pytest.mark.parametrize("settings", [{}, {"labels": "online"}], ids=name_of)
def test_what_stands_in_padding_changes_nothing(settings):
    method, batch, other = dmt.Method(**settings, threshold=0.5), labeled_batch(), random_batch(1)
    nets = {name: Linear() for name in method.students}
    state = make_state(method, nets)
    painted = {
        name: {
            **arrays,
            "image": np.where(arrays["valid"][..., None], arrays["image"], other[name]["image"]),
        }
        for name, arrays in batch.items()
    }
    assert (painted["unlabeled"]["image"] != batch["unlabeled"]["image"]).any()
    run = [
        jax.value_and_grad(lambda p, b=b: loss_of(method, nets, b)[0](p, state)[0])(state.params)
        for b in (batch, painted)
    ]
    jax.tree.map(np.testing.assert_array_equal, *run)


def test_images_with_a_label_each(nets):
    """Logits `[B,C]` meet labels `[B]`: nothing but the network knows of height and width."""

    class Pooled(Linear):
        def apply(self, *args, **kwargs):
            outputs, stats = super().apply(*args, **kwargs)
            return outputs._replace(logits=outputs.logits.mean((1, 2))), stats

    batch, rng = random_batch(), np.random.default_rng(0)
    batch = {name: {"image": arrays["image"]} for name, arrays in batch.items()}
    batch["labeled"]["label"] = rng.integers(0, C, 4, np.uint8)
    batch["unlabeled"] |= {
        "label": np.array([0, 1, 255, 2], np.uint8),
        "confidence": rng.uniform(0.3, 1, 4).astype(np.float32),
    }
    method, nets = dmt.Method(gamma_1=1.0, gamma_2=1.0), dict.fromkeys("ab", Pooled())
    state = make_state(method, nets)
    loss, name = loss_of(method, nets, batch)
    value, aux = loss(state.params, state)
    image = np.concatenate([batch[s]["image"] for s in batch])
    logits = forward(state.network(name), image, np.ones(image.shape[:3], bool))[0].mean((1, 2))
    label = np.concatenate([batch[s]["label"] for s in batch])
    weights = [1.0] * 4 + [
        weight_of(*pixel, 1.0, 1.0)
        for pixel in zip(
            softmax(logits[4:]), label[4:], batch["unlabeled"]["confidence"], strict=True
        )
    ]
    terms = [
        w * cross_entropy(x[None], y[None]) for w, x, y in zip(weights, logits, label, strict=True)
    ]
    np.testing.assert_allclose(value, sum(terms) / 7, rtol=1e-4)
    assert tuple(map(float, aux.metrics["kept"])) == (3.0, 4.0)


def test_labels_of_the_moment_have_to_surpass_the_threshold():
    logits = jnp.log(jnp.array([[0.85, 0.05, 0.1], [0.04, 0.92, 0.04], [0.1, 0.3, 0.6]]))
    online = dmt.Method(labels="online")
    assert online.pseudo_labels(logits).tolist() == [255, 1, 255]
    assert online.pseudo_labels(logits).dtype == jnp.uint8
    exactly = dataclasses.replace(online, threshold=float(jax.nn.softmax(logits)[1].max()))
    assert exactly.pseudo_labels(logits).tolist() == [255, 255, 255]
    assert dmt.Method().pseudo_labels(logits).tolist() == [0, 1, 2]
    assert (online.labeler, dmt.Method().labeler) == ("a", None)


CITYSCAPES = {"sizes": {"labeled": 186, "unlabeled": 2789, "val": 500}, "num_classes": 19}
ROUNDS = [f"round_{number}" for number in (1, 2, 3, 4, 5)]


@pytest.mark.parametrize(
    ("settings", "batch", "epochs", "supervised", "steps"),
    [
        # 60 sqrt(2975 / 186) = 239.96 epochs of 186 images, 8 at a time: 5579.1.
        # 10 epochs of 2789 images, 6 at a time: 4648.3.
        ({}, (2, 6), 10, 5579, 4648),
        # Of .8 * 186 images: 4463.2. 8 epochs of 2789 images, 7 at a time: 3187.4.
        ({"start": "sampling"}, (1, 7), 8, 4463, 3187),
    ],
)
def test_phases_take_the_updates_of_the_paper(settings, batch, epochs, supervised, steps):
    method = dmt.Method(oracle_epochs=60, **settings)
    batch = dict(zip(("labeled", "unlabeled"), batch, strict=True))
    phases = method.phases(Plan(**CITYSCAPES, batch=batch, epochs=epochs))
    assert {phase.name: phase.steps for phase in phases} == {
        "supervised_a": supervised,
        "supervised_b": supervised,
        **{f"{name}_{student}": steps for name in ROUNDS for student in "ba"},
    }
    assert {phase.schedule for phase in phases} == {None}
    assert {phase.optimizer for phase in phases} == {"fresh"}


def labeling_of(phase):
    (stream,) = [stream for stream in phase.streams if stream.name == "unlabeled"]
    assert isinstance(stream.labels, Labeling)
    return stream.labels


def test_networks_label_for_each_other_as_they_were_a_round_before():
    phases = {phase.name: phase for phase in dmt.Method().phases(plan())}
    assert list(phases)[:4] == ["supervised_a", "supervised_b", "round_1_b", "round_1_a"]
    before = {1: "supervised", **{i: f"round_{i - 1}" for i in (2, 3, 4, 5)}}
    for number, last in before.items():
        for name, other in ("ab", "ba"):
            phase = phases[f"round_{number}_{name}"]
            assert (phase.train, phase.headline) == ((name,), name)
            assert phase.start == {name: Weights(f"{last}_{name}", name, "best")}
            assert labeling_of(phase).network == Weights(f"{last}_{other}", other, "best")
            assert labeling_of(phase).rule == TopShare(number / 5)
            assert labeling_of(phase).seed == number
    first = phases["supervised_b"]
    assert (first.train, first.headline, first.start) == (("b",), "b", {})


@pytest.mark.parametrize(
    ("start", "parts"), [("weights", (0, 1, 0, 1)), ("sampling", (0, 0.8, 0.2, 1))]
)
def test_networks_learn_from_parts_of_the_labels_before_the_rounds(start, parts):
    method = dmt.Method(start=start, supervised_rate=2e-3)
    first, second, *rounds = method.phases(plan())
    found = [*first.streams[0].part, *second.streams[0].part]
    assert found == pytest.approx(parts)
    assert {phase.streams[0].part for phase in rounds} == {(0.0, 1.0)}
    assert (first.learning_rate, rounds[0].learning_rate) == (2e-3, None)


def test_one_network_labels_for_itself():
    method = dmt.Method(labels="own", start="sampling")
    phases = method.phases(plan())
    assert method.students == ("a",)
    assert [phase.name for phase in phases] == ["supervised_a", *(f"{r}_a" for r in ROUNDS)]
    for before, phase in itertools.pairwise(phases):
        newest = Weights(before.name, "a", "best")
        assert (labeling_of(phase).network, phase.start) == (newest, {"a": newest})
    assert phases[0].streams[0].part == (0.0, 1.0)
    (alone,) = dmt.Method(labels="own", ratios=()).phases(plan())
    assert alone == phases[0]


def test_online_training_takes_as_many_updates_as_all_rounds():
    first, online = dmt.Method(labels="online").phases(plan(steps=None, epochs=4))
    # Table 7: 20 epochs of 60 images, 4 at a time.
    assert (first.name, online.name, online.steps) == ("supervised_a", "online_a", 300)
    assert [(s.name, s.labels) for s in online.streams] == [
        ("labeled", "truth"),
        ("unlabeled", None),
    ]
    assert online.start == {"a": Weights("supervised_a", "a", "best")}


@pytest.mark.parametrize(
    ("labeled", "start", "batch"),
    [
        (20, "weights", 8),
        (8, "weights", 8),
        (8, "sampling", 4),
        (7, "weights", 4),
        (1, "weights", 1),
    ],
)
def test_few_labels_make_smaller_batches(labeled, start, batch):
    sizes = {"labeled": labeled, "unlabeled": 60}
    first, *_ = dmt.Method(start=start).phases(plan(sizes=sizes))
    assert first.streams[0].batch == batch


def test_a_warm_up_says_how_long_supervised_phases_are():
    phases = dmt.Method().phases(plan(warmup=11))
    assert [phase.steps for phase in phases[:3]] == [11, 11, 7]


@pytest.mark.parametrize(
    ("settings", "crop", "shown"),
    [
        ({}, (321, 321), Presentation("slide", (321, 321), (214, 214))),
        (
            {"label_scale": 0.5},
            (256, 512),
            Presentation("slide", (256, 512), (171, 342), scales=(0.5,)),
        ),
        ({"label_at": "full", "label_flip": True}, (256, 512), Presentation(flip=True)),
        ({}, None, Presentation()),
    ],
)
def test_how_images_are_shown_to_the_labeler(settings, crop, shown):
    phases = dmt.Method(**settings).phases(plan(crop=crop))
    assert {labeling_of(phase).shown for phase in phases[2:]} == {shown}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight": "dinamic"}, "method.weight 'dinamic'.*dynamic, naive, flip, none"),
        ({"labels": "both"}, "mutual, own, online"),
        ({"start": "random"}, "weights, sampling"),
        ({"label_at": "whole"}, "crop, full"),
        ({"alpha": 0.5}, "alpha=0.5 is no number above 0.5 to below 1"),
    ],
)
def test_what_is_not_known_is_refused(settings, words):
    with pytest.raises(contracts.UserError, match=words):
        methods.load({"name": "dmt", **settings})


def test_devices_do_not_matter():
    method, nets = dmt.Method(), dict.fromkeys("ab", Small())
    phase = method.phases(plan())[2]
    optimizer = optim.make_optimizer(OPTIMIZER)
    step = make_train_step(
        method,
        nets,
        phase,
        optimizer,
        optim.make_schedule(OPTIMIZER),
        learning_rate=0.1,
        seed=0,
    )
    drawn = make_state(method, nets)
    drawn = drawn.replace(opt_state={"b": optimizer.init(drawn.params["b"])})

    def train(devices):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        everywhere, rows = sharding.replicated(mesh), sharding.batched(mesh)
        run = jax.jit(
            step,
            in_shardings=(everywhere, everywhere, rows, everywhere),
            out_shardings=everywhere,
        )
        state, clock = jax.device_put((drawn, Clock.of(phase, 0)), everywhere)
        batch = sharding.to_devices(labeled_batch(images=8), mesh)
        return jax.tree.map(np.asarray, run(state, {}, batch, clock))

    (one, measured), (eight, measured_by_eight) = train(1), train(8)
    for name in measured:
        np.testing.assert_allclose(measured_by_eight[name], measured[name], rtol=1e-4, err_msg=name)
    for x, y in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(np.abs(y).max(), 1e-3))
    jax.tree.map(np.testing.assert_array_equal, one.network("a"), drawn.network("a"))
