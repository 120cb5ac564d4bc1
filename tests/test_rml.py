import functools
import itertools
import json

import conftest
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
    plan,
    random_batch,
)

from jaxssl import config as configs
from jaxssl import contracts, methods, mixing, models, optim, phases, sharding, sweep, views
from jaxssl.checkpoint import Checkpoints
from jaxssl.contracts import Weights
from jaxssl.data import loading
from jaxssl.inference import make_predict
from jaxssl.methods import rml
from jaxssl.models import mlp
from jaxssl.state import create
from jaxssl.step import Clock, make_train_step

C, SIZE = 4, (16, 24)
MASK = np.random.default_rng(1).random((4, *SIZE)) < 0.5
OTHER = {"a": "b", "b": "a"}
FACTORS = {"a": 0.5, "b": 0.8}


class Coarse(Linear):
    """At half the resolution."""

    def apply(self, *args, **kwargs):
        outputs, stats = super().apply(*args, **kwargs)
        logits, features = outputs.logits[:, ::2, ::2], outputs.features[:, ::2, ::2]
        return outputs._replace(logits=logits, features=features), stats


NETS = {"a": Linear(), "b": Coarse(channels=7)}


def seen_by(name, variables, image, valid, batch_stats=False):
    """What a network of `NETS` makes of images, in NumPy."""
    logits, features, stats = forward(variables, image, valid, batch_stats)
    step = 2 if name == "b" else 1
    return logits[:, ::step, ::step], features[:, ::step, ::step], stats


def softmax(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def direct_distances(features, prototypes):
    """Of `[...,D]` to `[C,D]`, by the definition, in float64."""
    features, prototypes = np.float64(features), np.float64(prototypes)
    return np.stack([np.linalg.norm(features - eta, axis=-1) for eta in prototypes], -1)


def rectify(p, distance):
    """Equations 6 and 9."""
    omega = np.exp(-distance) / np.exp(-distance).sum(-1, keepdims=True)
    return omega * p / (omega * p).sum(-1, keepdims=True)


@pytest.mark.parametrize(("offset", "width"), [(0, 3), (0, 2048), (1000, 2048)])
def test_distances_are_those_of_the_definition(offset, width):
    """Far from the origin, too, where squares are a million times as large as distances."""
    rng = np.random.default_rng(0)
    features = np.float32(offset + rng.normal(size=(2, 5, 3, width)))
    prototypes = np.float32(offset + rng.normal(size=(C, width)) * rng.uniform(0.2, 2, (C, 1)))
    found = jax.jit(rml.distances)(features, prototypes)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, direct_distances(features, prototypes), rtol=1e-4)


@pytest.mark.parametrize("offset", [0, 1000])
def test_distance_at_a_prototype(offset):
    prototypes = np.float32(offset + np.random.default_rng(0).normal(size=(C, 2048)))
    found = np.asarray(rml.distances(prototypes, prototypes))
    between = direct_distances(prototypes, prototypes)
    np.testing.assert_allclose(found, between, rtol=1e-4, atol=1e-3 * between.max())
    assert np.isfinite(found).all()


def test_classes_without_a_prototype_are_infinitely_far():
    rng = np.random.default_rng(0)
    features, prototypes = rng.normal(size=(5, 3)), np.float32(rng.normal(size=(C, 3)))
    prototypes[[0, 2]] = 0
    found = np.asarray(rml.distances(np.float32(features), prototypes))
    np.testing.assert_allclose(
        found[:, [1, 3]], direct_distances(features, prototypes)[:, [1, 3]], rtol=1e-4
    )
    assert np.isinf(found[:, [0, 2]]).all()
    logits = jnp.float32(rng.normal(size=(5, C)))
    p = np.asarray(rml.rectified(logits, found))
    assert (p[:, [0, 2]] == 0).all()
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-6)
    none = rml.distances(jnp.float32(features), jnp.zeros((C, 3)))
    np.testing.assert_array_equal(rml.rectified(logits, none), jax.nn.softmax(logits))


def test_rectified_probabilities_are_equations_6_and_9():
    rng = np.random.default_rng(0)
    logits, distance = 3 * rng.normal(size=(6, 7, C)), rng.uniform(0, 8, (6, 7, C))
    found = rml.rectified(jnp.float32(logits), jnp.float32(distance))
    expected = rectify(softmax(logits), distance)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert (expected.argmax(-1) != logits.argmax(-1)).any()


def test_ties_are_decided_by_the_other_factor():
    even, p, d = jnp.zeros((1, 3)), jnp.array([[1.0, 3.0, 2.0]]), jnp.array([[2.0, 1.0, 0.5]])
    assert int(rml.rectified(p, even).argmax()) == 1
    assert int(rml.rectified(even, d).argmax()) == 2
    assert int(rml.rectified(even, even).argmax()) == 0
    assert float(rml.rectified(jnp.zeros((1, 1)), jnp.ones((1, 1)))[0, 0]) == 1  # one class


def test_far_features_and_sure_networks_do_not_underflow():
    p = rml.rectified(jnp.array([200.0, 0.0, 0.0]), jnp.array([700.0, 400.0, 401.0]))
    np.testing.assert_allclose(p, softmax(np.array([-500.0, -400, -401])), rtol=1e-5, atol=1e-30)


def means_of(features, labels, classes):
    """Mean feature of each class by itself, and which there are."""
    groups = [np.float64(features)[labels == c] for c in range(classes)]
    width = features.shape[-1]
    return (
        np.stack([g.mean(0) if len(g) else np.zeros(width) for g in groups]),
        np.array([len(g) > 0 for g in groups]),
    )


@pytest.mark.parametrize("case", ["some ignored", "absent class", "one class", "nothing"])
def test_class_means(case):
    rng = np.random.default_rng(0)
    features = np.float32(rng.normal(5, 2, (3, 4, 5, 6)))
    labels = rng.integers(0, C, (3, 4, 5)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.3] = 255
    labels = {
        "some ignored": labels,
        "absent class": np.where(labels == 2, 255, labels),
        "one class": np.where(labels == 255, 255, 0),
        "nothing": np.full_like(labels, 255),
    }[case]
    classes = 1 if case == "one class" else C
    means, present = rml.class_means(jnp.asarray(features), jnp.asarray(labels), classes)
    expected, there = means_of(features, labels, classes)
    np.testing.assert_allclose(means, expected, rtol=1e-5)
    np.testing.assert_array_equal(present, there)


def test_moving_prototypes_is_equation_11():
    rng = np.random.default_rng(0)
    old, means = rng.normal(size=(2, C, 5)).astype(np.float32)
    old[1] = old[2] = 0
    present = np.array([True, True, False, False])
    new = np.asarray(rml.moved(old, means, present, 0.9))
    np.testing.assert_allclose(new[0], 0.9 * old[0] + 0.1 * means[0], rtol=1e-5)
    np.testing.assert_array_equal(new[1], means[1])  # it had none
    np.testing.assert_array_equal(new[2:], old[2:])


def strengthen(image, name):
    return FACTORS[name] * image + 10.0


@pytest.fixture
def fixed_views(monkeypatch):
    """Views and a CutMix mask that NumPy can repeat."""
    names = itertools.cycle("ab")

    def box_mask(key, batch, size, *, boxes, area):
        assert (batch, size, boxes, area) == (4, SIZE, 1, (0.5, 0.5))
        return jnp.asarray(MASK)

    monkeypatch.setattr(
        views, "rand_augment", lambda key, image, *, valid: strengthen(image, next(names))
    )
    monkeypatch.setattr(mixing, "box_mask", box_mask)


def cutmix(x):
    return np.where(MASK.reshape(MASK.shape + (1,) * (x.ndim - 3)), x, np.roll(x, -1, 0))


def taught_by(method, name, state, frozen, images):
    """The labels of a network's images, its softmax, prototypes and statistics, and how much of
    the labels the rectification changed.
    """
    image, valid = images["image"], images["valid"]
    own = name if method.supervision == "direct" else f"teacher_{name}"
    batch_stats = own != name and method.teacher_stats == "own"
    logits, features, stats = seen_by(name, state.network(own), image, valid, batch_stats)
    p = softmax(nearest(logits, SIZE))
    if not method.rectification:
        return np.where(valid, p.argmax(-1), 255), p, None, stats, None
    seen = nearest(valid, logits.shape[1:3])
    means, present = means_of(features, np.where(seen, logits.argmax(-1), 255), C)
    old = np.float64(state.extra["prototypes"][name])
    new = np.where(present[:, None], method.momentum * old + (1 - method.momentum) * means, old)
    if method.p0 == "stage":
        logits, _, _ = seen_by(name, frozen[name], image, valid)
    q = rectify(softmax(logits), direct_distances(features, new))
    changed = (q.argmax(-1) != logits.argmax(-1))[seen].mean()
    return np.where(valid, nearest(q, SIZE).argmax(-1), 255), p, new, stats, changed


def reference(method, state, frozen, batch, taught=None):
    """The loss in NumPy, its metrics, the prototypes and all new statistics; labels that `taught`
    gives are held fixed.
    """
    weak, truth = batch["unlabeled"], batch["labeled"]["label"]
    found = {name: taught_by(method, name, state, frozen, weak) for name in "ab"}
    labels = taught or {name: one[0] for name, one in found.items()}
    teachers = {"both": {"a": "ab", "b": "ab"}}.get(method.supervision, OTHER)
    loss_s, loss_u, stats = 0.0, 0.0, {}
    for name in "ab":
        params, own = state.network(name)
        logits, _, own = seen_by(
            name, (params, own), batch["labeled"]["image"], batch["labeled"]["valid"], True
        )
        loss_s += cross_entropy(nearest(logits, SIZE), truth)
        image, valid = weak["image"], weak["valid"]
        if method.input_noise:
            image, valid = cutmix(strengthen(image, name)), cutmix(valid)
        logits, _, stats[name] = seen_by(name, (params, own), image, valid, True)
        for teacher in teachers[name]:
            target = cutmix(labels[teacher]) if method.input_noise else labels[teacher]
            loss_u += cross_entropy(nearest(logits, SIZE), target)
    apart = (np.abs(found["a"][1] - found["b"][1]).sum(-1) / 2)[weak["valid"]].mean()
    metrics = {"loss_supervised": loss_s, "loss_unsupervised": loss_u, "coupling": apart, "kept": 1}
    prototypes = {}
    for name, (_, _, new, own, changed) in found.items():
        if method.supervision != "direct":
            stats[f"teacher_{name}"] = own
        if method.rectification:
            prototypes[name] = new
            step = np.linalg.norm(new - state.extra["prototypes"][name], axis=-1)
            metrics |= {f"rectified_{name}": changed, f"prototype_step_{name}": step.mean()}
    return loss_s + method.weight * loss_u, metrics, prototypes, stats, labels


def distinct_state(method, nets=NETS):
    """A state in which every network differs, with prototypes, and frozen networks."""
    state = make_state(method, nets)
    names = ("a", "b", *(f"teacher_{name}" for name in method.teachers))
    drawn = {}
    for i, name in enumerate((*names, "frozen_a", "frozen_b")):
        params, stats = nets[name[-1]].init(jax.random.key(10 + i), SIZE)
        stats = jax.tree.map(lambda x, i=i: x + 0.1 * i, stats)
        drawn[name] = contracts.Variables(params, stats)
    for name in names:
        state = state.with_network(name, drawn[name])
    frozen = {name: drawn[f"frozen_{name}"] for name in nets}
    if not method.rectification:
        return state, {}
    prototypes = {
        name: jax.random.normal(jax.random.key(i), x.shape)
        for i, (name, x) in enumerate(state.extra["prototypes"].items())
    }
    return state.replace(extra={"prototypes": prototypes}), frozen


def loss_of(method, batch, frozen, nets=NETS):
    """`method.loss` in the last stage as a function of the parameters and the state."""
    phase = method.phases(plan())[-1]

    def loss(params, state):
        key = jax.random.key(0)
        return method.loss(nets, params, state, frozen, batch, key, phase=phase, progress=0.3)

    return loss


SETTINGS = [
    {},
    {"supervision": "peer"},
    {"supervision": "direct"},
    {"supervision": "direct", "rectification": False},
    {"rectification": False},
    {"p0": "online"},
    {"momentum": 0.5},
    {"model_noise": False},
    {"input_noise": False},
    {"weight": 0.3},
    {"teacher_stats": "own"},
    {"teacher_stats": "own", "p0": "online", "supervision": "peer", "input_noise": False},
]


def name_of(settings):
    return "-".join(f"{key}={value}" for key, value in settings.items()) or "default"


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
@pytest.mark.usefixtures("fixed_views")
def test_loss_is_that_of_the_paper(settings):
    """Equations 1, 3 to 6, 9 and 11, with students of two architectures."""
    method, batch = rml.Method(**settings), random_batch()
    state, frozen = distinct_state(method)
    loss, aux = loss_of(method, batch, frozen)(state.params, state)
    expected, metrics, prototypes, stats, _ = reference(method, state, frozen, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert set(aux.metrics) == set(metrics)
    for name, value in metrics.items():
        total, count = aux.metrics[name]
        np.testing.assert_allclose(total / count, value, rtol=1e-3, err_msg=name)
    assert set(aux.extra.get("prototypes", {})) == set(prototypes)
    for name, new in prototypes.items():
        np.testing.assert_allclose(aux.extra["prototypes"][name], new, rtol=1e-4, atol=1e-6)
    assert {*aux.stats, *(f"teacher_{name}" for name in aux.teacher_stats)} == set(stats)
    for name, own in stats.items():
        found = (aux.teacher_stats if name.startswith("teacher_") else aux.stats)[name[-1]]
        np.testing.assert_allclose(found["mean"], own["mean"], rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("fixed_views")
def test_rectification_changes_labels_and_is_not_all_that_matters():
    method, batch = rml.Method(), random_batch()
    state, frozen = distinct_state(method)
    _, metrics, *_ = reference(method, state, frozen, batch)
    assert all(0.02 < metrics[f"rectified_{name}"] < 0.98 for name in "ab")
    assert 0.02 < metrics["coupling"] < 0.98


@pytest.mark.parametrize("supervision", ["both", "peer", "direct"])
@pytest.mark.usefixtures("fixed_views")
def test_gradients_reach_students_and_nothing_else(supervision):
    method, batch = rml.Method(supervision=supervision), random_batch()
    state, frozen = distinct_state(method)

    def of_everything(params, state, frozen):
        return loss_of(method, batch, frozen)(params, state)[0]

    fixed = state.replace(opt_state={})
    grads = jax.grad(of_everything, (0, 1, 2), allow_int=True)(state.params, fixed, frozen)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads[0]))
    for leaf in jax.tree.leaves(grads[1].replace(stats={}, step=(), skipped=())):
        assert np.abs(leaf).max() == 0
    assert all(np.abs(leaf).max() == 0 for leaf in jax.tree.leaves(grads[2]))


@pytest.mark.parametrize("settings", [{}, {"supervision": "peer", "weight": 0.5}], ids=name_of)
@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.usefixtures("fixed_views")
def test_slope_along_a_direction(settings, name):
    """With the labels held fixed."""
    method, batch = rml.Method(**settings), random_batch()
    state, frozen = distinct_state(method)
    grads, _ = jax.grad(loss_of(method, batch, frozen), has_aux=True)(state.params, state)
    labels = reference(method, state, frozen, batch)[-1]
    rng = np.random.default_rng(0)
    params, stats = jax.tree.map(np.float64, tuple(state.network(name)))
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)

    def moved(step):
        there = jax.tree.map(lambda p, d: p + step * d, params, direction)
        moved = state.with_network(name, contracts.Variables(there, stats))
        return reference(method, moved, frozen, batch, labels)[0]

    pairs = zip(jax.tree.leaves(grads[name]), jax.tree.leaves(direction), strict=True)
    slope = sum((g * d).sum() for g, d in pairs)
    np.testing.assert_allclose(slope, (moved(1e-6) - moved(-1e-6)) / 2e-6, rtol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"p0": "online", "input_noise": False}], ids=name_of)
@pytest.mark.usefixtures("fixed_views")
def test_what_stands_in_padding_changes_nothing(settings):
    method, batch, other = rml.Method(**settings), random_batch(), random_batch(seed=1)
    state, frozen = distinct_state(method)
    painted = {
        name: {
            **stream,
            "image": np.where(stream["valid"][..., None], stream["image"], other[name]["image"]),
        }
        for name, stream in batch.items()
    }
    assert (painted["unlabeled"]["image"] != batch["unlabeled"]["image"]).any()
    run = [
        jax.value_and_grad(loss_of(method, b, frozen), has_aux=True)(state.params, state)
        for b in (batch, painted)
    ]
    jax.tree.map(np.testing.assert_array_equal, *run)


@pytest.mark.usefixtures("fixed_views")
def test_batch_without_any_valid_pixel():
    method, batch = rml.Method(), random_batch()
    batch["labeled"]["label"][:] = 255
    for stream in batch.values():
        stream["valid"][:] = False
    state, frozen = distinct_state(method)
    run = jax.value_and_grad(loss_of(method, batch, frozen), has_aux=True)
    (value, aux), grads = run(state.params, state)
    assert float(value) == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))
    jax.tree.map(np.testing.assert_array_equal, aux.extra, state.extra)
    assert all(np.isfinite(total) for total, _ in aux.metrics.values())


class Pooled(Linear):
    """Logits `[B,C]` and features `[B,D]`."""

    def apply(self, *args, **kwargs):
        outputs, stats = super().apply(*args, **kwargs)
        logits, features = (x.mean((1, 2)) for x in (outputs.logits, outputs.features))
        return outputs._replace(logits=logits, features=features), stats


def test_images_with_a_label_each():
    """Nothing but the network knows of height and width."""
    nets = {"a": Pooled(), "b": Pooled(channels=7)}
    method, images = rml.Method(input_noise=False, p0="online"), random_batch()
    batch = {name: {"image": arrays["image"]} for name, arrays in images.items()}
    batch["labeled"]["label"] = label = np.array([0, 3, 1, 2], np.uint8)
    state, _ = distinct_state(method, nets)
    value, aux = loss_of(method, batch, {}, nets)(state.params, state)
    whole = np.ones(images["labeled"]["valid"].shape, bool)
    targets, expected = {}, 0.0
    for name in nets:
        logits, features, _ = (
            x if isinstance(x, dict) else x.mean((1, 2))
            for x in forward(
                state.network(f"teacher_{name}"), batch["unlabeled"]["image"], whole, False
            )
        )
        means, present = means_of(features, logits.argmax(-1), C)
        old = np.float64(state.extra["prototypes"][name])
        new = np.where(present[:, None], 0.9999 * old + 0.0001 * means, old)
        np.testing.assert_allclose(aux.extra["prototypes"][name], new, rtol=1e-5)
        targets[name] = rectify(softmax(logits), direct_distances(features, new)).argmax(-1)
    for name in nets:
        variables = state.network(name)
        logits, _, stats = forward(variables, batch["labeled"]["image"], whole)
        expected += cross_entropy(logits.mean((1, 2)), label)
        logits, *_ = forward((variables.params, stats), batch["unlabeled"]["image"], whole)
        expected += sum(cross_entropy(logits.mean((1, 2)), t) for t in targets.values())
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    noisy = rml.Method(p0="online")
    assert np.isfinite(loss_of(noisy, batch, {}, nets)(state.params, state)[0])


def image_set(count, seed):
    """Images of two sizes in batches of three, as a sweep meets them: padded, some rows empty."""
    rng = np.random.default_rng(seed)
    images = [
        # Dark and bright images, so that no class is sure everywhere.
        (rng.random((16 - 4 * (i % 2), 24, 3)) * rng.uniform(50, 256)).astype(np.uint8)
        for i in range(count)
    ]
    batches = []
    for first in range(0, count, 3):
        batch = {
            "image": rng.integers(0, 256, (3, *SIZE, 3), np.uint8),
            "valid": np.zeros((3, *SIZE), bool),
            "index": np.full(3, -1, np.int32),
        }
        for row, image in enumerate(images[first : first + 3]):
            batch["image"][row, : len(image)], batch["valid"][row, : len(image)] = image, True
            batch["index"][row] = first + row
        batches.append(batch)
    return images, batches


@pytest.mark.parametrize("supervision", ["both", "direct"])
def test_sweeps_make_prototypes_of_all_images(supervision):
    """Equation 10: each image has one mean of each class that its network predicts in it."""
    method = rml.Method(supervision=supervision)
    stage, (state, _) = method.phases(plan())[1], distinct_state(method)
    sets = {"labeled": image_set(4, 0), "unlabeled": image_set(7, 1)}
    assert [one.source for one in stage.sweeps] == list(sets)
    mesh, extra, sums = sharding.make_mesh(jax.devices()[:1]), method.init_extra(NETS, {}), {}
    for one in stage.sweeps:
        networks = {name: state.network(w.network) for name, w in one.networks.items()}
        update = functools.partial(one.update, NETS, networks, extra)
        sums[one.name] = sweep.add_up(jax.jit(update), sets[one.source][1], mesh)
        extra = one.finish(sums, extra)
    for name in "ab":
        variables, means = (
            state.network(stage.sweeps[0].networks[name].network),
            [[] for _ in "0123"],
        )
        for image in itertools.chain(*(images for images, _ in sets.values())):
            logits, features, _ = seen_by(
                name, variables, image[None], np.ones((1, *image.shape[:2]), bool)
            )
            of_image, present = means_of(features, logits.argmax(-1), C)
            for c in np.flatnonzero(present):
                means[c].append(of_image[c])
        assert min(map(len, means)) < 11  # not every image has every class
        expected = [np.mean(m, 0) if m else np.zeros(features.shape[-1]) for m in means]
        np.testing.assert_allclose(extra["prototypes"][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_sweeps_of_images_with_a_label_each(scale):
    """Each counts for the class that it is taken for; a row of padding for none."""
    net, colors = Pooled(), np.random.default_rng(0).integers(0, 256, (6, 1, 1, 3), np.uint8)
    variables, index = net.init(jax.random.key(0), SIZE), np.array([0, 1, 2, 3, 4, -1], np.int32)
    image = np.broadcast_to(colors, (6, *SIZE, 3))
    of_set = rml.Prototypes("labeled", {"a": Weights("warmup", "teacher_a")}, scale)
    batch = {"image": image, "valid": index >= 0, "index": index}
    total, count = of_set.update({"a": net}, {"a": variables}, {}, batch)["a"]
    logits, features, _ = forward(variables, colors[:5], np.ones((5, 1, 1), bool), False)
    labels = logits[:, 0, 0].argmax(-1)
    assert len(set(labels)) > 1
    np.testing.assert_array_equal(count, np.bincount(labels, minlength=C))
    expected = [features[labels == c, 0, 0].sum(0) for c in range(C)]
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-5)


def test_sweeps_show_images_at_the_size_of_training():
    shown = []

    class Recording(Linear):
        def apply(self, params, stats, image, **kwargs):
            shown.append((image.shape, kwargs["valid"].shape, kwargs["batch_stats"]))
            return super().apply(params, stats, image, **kwargs)

    net = Recording()
    variables = net.init(jax.random.key(0), SIZE)
    color = np.array([200, 90, 30], np.uint8)
    batch = {
        "image": np.broadcast_to(color, (2, *SIZE, 3)),
        "valid": np.arange(SIZE[0])[:, None] < np.full(SIZE, 10),
        "index": np.array([0, 1], np.int32),
    }
    batch["valid"] = np.broadcast_to(batch["valid"], (2, *SIZE))
    batch["image"] = np.where(batch["valid"][..., None], batch["image"], 0)
    of_set = rml.Prototypes("labeled", {"a": Weights("warmup", "teacher_a")}, scale=0.5)
    sums = of_set.update({"a": net}, {"a": variables}, {}, batch)
    assert shown[-1] == ((2, 8, 12, 3), (2, 8, 12), False)
    logits, features, _ = forward(
        variables, color[None, None, None], np.ones((1, 1, 1), bool), False
    )
    means, images = (np.zeros((C, 5)), np.zeros(C))
    means[logits.argmax()], images[logits.argmax()] = 2 * features[0, 0, 0], 2
    np.testing.assert_allclose(sums["a"][0], means, rtol=1e-4)
    np.testing.assert_array_equal(sums["a"][1], images)


def test_phases():
    method = rml.Method(prototype_scale=0.5)
    warmup, first, second = method.phases(plan(steps=50))
    steps = [(phase.name, phase.steps) for phase in (warmup, first, second)]
    assert steps == [("warmup", 10), ("stage_1", 50), ("stage_2", 50)]
    assert not warmup.sweeps
    assert [(s.name, s.labels) for s in warmup.streams] == [("labeled", "truth")]
    for stage, before in ((first, "warmup"), (second, "stage_1")):
        teachers = {name: Weights(before, f"teacher_{name}") for name in "ab"}
        assert stage.frozen == teachers
        assert {one.source for one in stage.sweeps} == {"labeled", "unlabeled"}
        assert all(one.networks == teachers for one in stage.sweeps)
        assert all(one.scale == 0.5 for one in stage.sweeps)
        assert [(s.name, s.labels) for s in stage.streams] == [
            ("labeled", "truth"),
            ("unlabeled", None),
        ]
    for stage in (warmup, first, second):
        assert (stage.train, stage.optimizer, stage.schedule) == (("a", "b"), "fresh", None)
        assert not stage.start
    assert [phase.steps for phase in method.phases(plan(50, warmup=7))] == [7, 50, 50]
    assert [phase.steps for phase in method.phases(plan(3))] == [1, 3, 3]


@pytest.mark.parametrize(
    ("settings", "frozen", "sweeps"),
    [
        ({"rectification": False}, {}, 0),
        ({"p0": "online"}, {}, 2),
        ({"supervision": "direct"}, {name: Weights("warmup", name) for name in "ab"}, 2),
    ],
)
def test_what_a_stage_begins_with(settings, frozen, sweeps):
    _, stage, _ = rml.Method(**settings).phases(plan())
    assert stage.frozen == frozen
    assert len(stage.sweeps) == sweeps


def test_without_stages_the_baseline_is_left():
    (alone,) = rml.Method(stages=0).phases(plan(steps=50))
    assert (alone.name, alone.steps) == ("warmup", 50)
    (alone,) = rml.Method(stages=0).phases(plan(steps=50, warmup=7))
    assert alone.steps == 57  # as many updates as a run of one stage
    assert len(rml.Method(stages=1).phases(plan())) == 2


@pytest.mark.parametrize(
    ("supervision", "networks"),
    [
        ("both", ("teacher_a", "teacher_b", ("a", "b"))),
        ("peer", ("teacher_a", "teacher_b", ("a", "b"))),
        ("direct", ("a", "b", ())),
    ],
)
def test_who_teaches_and_who_is_reported(supervision, networks):
    method = rml.Method(supervision=supervision)
    assert (method.headline, method.labeler, method.teachers) == networks


def test_teachers_average_from_the_first_stage_on():
    method = rml.Method(ema_decay_max=0.9)
    warmup, first, second = method.phases(plan(steps=6))
    k = jnp.arange(3)
    assert method.ema_decay(warmup, k) == 0
    np.testing.assert_allclose(method.ema_decay(first, k), [0, 1 / 2, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(method.ema_decay(second, k), [6 / 7, 7 / 8, 8 / 9], rtol=1e-6)
    assert float(method.ema_decay(second, jnp.int32(5))) == pytest.approx(0.9)


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("settings", [{}, {"p0": "online"}, {"supervision": "direct"}], ids=name_of)
def test_forward_passes(settings, noise):
    """Labeled and unlabeled images apart; only students see noise, and only if they shall."""
    calls = []

    class Recording(Linear):
        def apply(self, params, stats, image, *, valid=None, batch_stats, key=None):
            calls.append((image.shape[0], batch_stats, key is not None))
            return super().apply(params, stats, image, valid=valid, batch_stats=batch_stats)

    method, nets = rml.Method(model_noise=noise, **settings), {"a": Recording(), "b": Recording()}
    batch = random_batch()
    batch["unlabeled"] = jax.tree.map(lambda x: x[:3], batch["unlabeled"])
    state, frozen = distinct_state(method, {"a": Linear(), "b": Linear()})
    jax.eval_shape(loss_of(method, batch, frozen, nets), state.params, state)
    labelers = 2 if settings.get("p0") == "online" else 4
    students = [(4, True, noise), (3, True, noise)] * 2
    assert sorted(calls) == sorted(students + labelers * [(3, False, False)])
    calls.clear()
    warmup = method.phases(plan())[0]
    jax.eval_shape(
        lambda: method.loss(
            nets, state.params, state, {}, batch, jax.random.key(0), phase=warmup, progress=0
        )
    )
    assert calls == [(4, True, noise)] * 2


def test_students_see_the_images_each_in_its_own_way():
    method, batch, seen = rml.Method(), random_batch(padded=False), []

    class Recording(Linear):
        def apply(self, params, stats, image, *, valid=None, batch_stats, key=None):
            if batch_stats:
                seen.append((np.asarray(image, np.float64), np.asarray(valid)))
            return super().apply(params, stats, image, valid=valid, batch_stats=batch_stats)

    state, frozen = distinct_state(method, {"a": Linear(), "b": Linear()})
    loss_of(method, batch, frozen, {"a": Recording(), "b": Recording()})(state.params, state)
    (one, valid), (other, valid_too) = seen[2:]
    np.testing.assert_array_equal(valid, valid_too)
    differ = [(x != y).mean() for x, y in zip(one, other, strict=True)]
    assert sum(share > 0.3 for share in differ) >= 3


def test_network_without_features_is_refused():
    class NoFeatures(Linear):
        def apply(self, *args, **kwargs):
            outputs, stats = super().apply(*args, **kwargs)
            return outputs._replace(features=None), stats

    nets = {"a": Linear(), "b": NoFeatures()}
    with pytest.raises(contracts.UserError, match="input of its classifier"):
        make_state(rml.Method(), nets)
    make_state(rml.Method(rectification=False), nets)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"supervision": "self"}, "both, peer, direct"),
        ({"p0": "offline"}, "stage, online"),
        ({"stages": -1}, "stages=-1"),
        ({"momentum": 1.1}, r"momentum=1\.1"),
        ({"prototype_scale": 0.0}, r"prototype_scale=0\.0"),
    ],
)
def test_what_is_not_known_is_refused(settings, words):
    with pytest.raises(contracts.UserError, match=words):
        methods.load({"name": "rml", **settings})


def test_devices_that_lack_a_class_do_not_pull_its_prototype_to_zero():
    before = np.float32(np.random.default_rng(0).normal(size=(2, C, 3)))
    before[0, 1] = before[:, 2] = 0  # one of the devices, both of them
    method = rml.Method()

    def reduced(prototypes):
        return method.reduce_extra({}, {"prototypes": {"a": prototypes}}, "data")

    found = jax.pmap(reduced, axis_name="data")(before)["prototypes"]["a"]
    expected = [before[:, 0].mean(0), before[1, 1], np.zeros(3), before[:, 3].mean(0)]
    for device in found:
        np.testing.assert_allclose(device, expected, rtol=1e-5)


def test_a_step_of_two_architectures_and_devices_do_not_matter():
    """Teachers follow their own students; prototypes move; statistics are copied."""
    nets = {"a": Small(), "b": Coarse(channels=7)}
    method = rml.Method(ema_decay_max=0.9)
    phase = method.phases(plan(steps=30))[-1]
    step = make_train_step(
        method,
        nets,
        phase,
        optim.make_optimizer(OPTIMIZER),
        optim.make_schedule(OPTIMIZER),
        learning_rate=0.1,
        seed=0,
    )
    start, frozen = distinct_state(method, nets)
    batch = random_batch(images=8)

    def train(devices):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        everywhere, rows = sharding.replicated(mesh), sharding.batched(mesh)
        run = jax.jit(
            step,
            in_shardings=(everywhere, everywhere, rows, everywhere),
            out_shardings=everywhere,
        )
        given = jax.device_put((start, frozen, Clock.of(phase, 0)), everywhere)
        state, frozen_there, clock = given
        return jax.tree.map(
            np.asarray, run(state, frozen_there, sharding.to_devices(batch, mesh), clock)
        )

    (one, measured), (eight, measured_by_eight) = train(1), train(8)
    for name in measured:
        np.testing.assert_allclose(measured_by_eight[name], measured[name], rtol=1e-4, err_msg=name)
    for x, y in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * max(np.abs(y).max(), 1e-3))
    assert int(one.skipped) == 0
    for name in nets:
        jax.tree.map(
            lambda new, old, student: np.testing.assert_allclose(
                new, 0.9 * old + 0.1 * student, rtol=1e-4, atol=1e-6
            ),
            one.teacher_params[name],
            start.teacher_params[name],
            one.params[name],
        )
        jax.tree.map(np.testing.assert_array_equal, one.teacher_stats[name], one.stats[name])
        assert (one.extra["prototypes"][name] != start.extra["prototypes"][name]).any()


@pytest.mark.slow
def test_overfits_eight_images():
    """From a warm-up on, with prototypes, frozen teachers and all noise."""
    images, nets = conftest.shapes(), dict.fromkeys("ab", Small(num_classes=3))
    unlabeled = {name: images[name] for name in ("image", "valid")}
    batch = {"labeled": images, "unlabeled": unlabeled}
    whole = {**unlabeled, "index": np.arange(8, dtype=np.int32)}
    method = methods.load({"name": "rml", "ema_decay_max": 0.9})
    state, frozen, scores = make_state(method, nets, size=(64, 64)), {}, []
    predict = jax.jit(make_predict(nets["a"]))
    for phase in method.phases(plan(60, warmup=60, images=8)):
        sums, extra = {}, state.extra
        for one in phase.sweeps:
            networks = {name: state.network(w.network) for name, w in one.networks.items()}
            sums[one.name] = jax.jit(functools.partial(one.update, nets))(networks, extra, whole)
            extra = one.finish(sums, extra)
        frozen = {name: state.network(w.network) for name, w in phase.frozen.items()}
        state, clock = state.replace(extra=extra), Clock.of(phase, int(state.step))
        optimizer, schedule = optim.make_optimizer(OPTIMIZER), optim.make_schedule(OPTIMIZER)
        step = jax.jit(
            make_train_step(method, nets, phase, optimizer, schedule, learning_rate=0.1, seed=0)
        )
        for _ in range(phase.steps):
            state, _ = step(state, frozen, batch, clock)
        logits = predict(state.network("teacher_a"), images["image"], images["valid"])
        scores.append(conftest.mean_iou(images["label"], np.argmax(logits, -1)))
    assert min(scores) > 0.9, scores


@pytest.fixture
def config(monkeypatch):
    """A short run on streets with two networks that compile in no time."""
    config = conftest.dars_config(monkeypatch)
    monkeypatch.setattr(
        models,
        "load",
        lambda config, num_classes, **_: Linear(num_classes, 5 if config["width"] == 16 else 7),
    )
    config.model_b.width = 8
    config.method = configs.rml(momentum=0.9)
    config.update(warmup=3, steps=5)
    config.log.every, config.eval.every, config.checkpoint.every = 1, 5, 2
    return config


def test_sweeps_leave_out_what_cannot_be_read(config, tmp_path, monkeypatch):
    _, sources = phases.open_sources(config.data)
    kind, broken = type(sources["unlabeled"]), sources["unlabeled"].ids[5]
    read = kind.__getitem__

    def reading(self, index):
        if self.ids[index] == broken:
            raise contracts.UnreadableError(f"{broken} is broken.")
        return read(self, index)

    monkeypatch.setattr(kind, "__getitem__", reading)
    assert phases.run(config, tmp_path / "w") == 0
    lines = (tmp_path / "w" / "quarantine.jsonl").read_text().splitlines()
    noted = [json.loads(line) for line in lines]
    assert [(line["id"], line["phase"]) for line in noted] == [(broken, "stage_1")]
    config.data.max_damaged = 0
    with pytest.raises(contracts.UserError, match="max_damaged allows 0"):
        phases.run(config, tmp_path / "strict")


def leaves(workdir):
    """Of the newest checkpoint, by name."""
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        step, _ = checkpoints.latest()
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one),
            dict(checkpoints._manager.item_metadata(step)["state"].tree),
        )
        state = checkpoints.restore(step, shapes)
    found = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found}


class Killed(BaseException):
    pass


def test_killed_in_the_second_stage_it_goes_on_as_it_was(config, tmp_path, monkeypatch):
    """Prototypes come from the checkpoint, frozen networks from that of the first stage's end."""
    whole, killed, save = tmp_path / "whole", tmp_path / "killed", phases.train.save
    assert phases.run(config, whole) == 0

    def saving(run, index, state, step):
        save(run, index, state, step)
        if step == 10:  # 3 of warm-up, 5 of the first stage, 2 of the second
            run.checkpoints.wait()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(phases.train, "save", saving)
        with pytest.raises(Killed):
            phases.run(config, killed)
    half = leaves(killed)
    assert phases.run(config, killed) == 0
    mine, theirs = leaves(killed), leaves(whole)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    names = [name for name in mine if "prototypes" in name]
    assert {mine[name].shape[-1] for name in names} == {5, 7}
    assert all((mine[name] != half[name]).any() for name in names)
    texts = [(folder / "metrics.jsonl").read_text() for folder in (whole, killed)]
    assert texts[0] == texts[1]
    for metric in ("train/coupling", "watch/coupling", "train/rectified_b", "val/teacher_b/miou"):
        assert metric in texts[0]


def coupling(supervision, seeds, *, model_noise=False):
    """How far the labelers of two perceptrons are apart, `[seeds,steps of the stage]`, as
    configs/rml_digits.py trains larger ones.
    """
    _, sources = loading.training_sets({"name": "digits", "root": "", "split": "1_60", "seed": 0})
    labeled, unlabeled = (
        {name: np.stack([one[name] for one in sources[stream]]) for name in names}
        for stream, names in (("labeled", ("image", "label")), ("unlabeled", ("image",)))
    )
    net = mlp.Model(num_classes=10, hidden=(32, 32), dropout=0.5)
    nets, settings = {"a": net, "b": net}, {**OPTIMIZER, "name": "adamw"}
    optimizer, schedule = optim.make_optimizer(settings), optim.make_schedule(settings)
    method = rml.Method(
        supervision=supervision,
        rectification=False,
        stages=1,
        model_noise=model_noise,
        input_noise=False,
    )
    warmup, stage = method.phases(plan(150, warmup=100))

    def draw(arrays, key, size):
        rows = jax.random.choice(key, len(arrays["image"]), (size,), replace=False)
        return {name: jnp.asarray(array)[rows] for name, array in arrays.items()}

    def train(state, phase, key):
        clock = Clock.of(phase, 0)._replace(begin=state.step)
        step = make_train_step(method, nets, phase, optimizer, schedule, learning_rate=1e-3, seed=0)

        def update(state, k):
            one, other = jax.random.split(jax.random.fold_in(key, k))
            batch = {"labeled": draw(labeled, one, 8), "unlabeled": draw(unlabeled, other, 32)}
            state, metrics = step(state, {}, batch, clock)
            return state, metrics.get("coupling")

        return jax.lax.scan(update, state, state.step + jnp.arange(phase.steps))

    def run(seed):
        key_a, key_b, key = jax.random.split(jax.random.key(seed), 3)
        drawn = {"a": net.init(key_a, (8, 8)), "b": net.init(key_b, (8, 8))}
        state, _ = train(create(method, nets, optimizer, "ab", drawn), warmup, key)
        _, (total, count) = train(state, stage, key)
        return total / count

    return np.asarray(jax.jit(jax.vmap(run))(jnp.arange(seeds)))


def test_direct_mutual_learning_couples_faster_and_noise_keeps_networks_apart():
    """Figure 2. Over ten seeds, distances had ratios of 0.68 to 0.76 where 0.85 is asked for; what
    was left of them late was 0.51 to 0.60 without noise, and 0.91 to 1.21 with it.
    """
    direct, indirect = coupling("direct", 5), coupling("peer", 5)
    noisy = coupling("peer", 5, model_noise=True)
    np.testing.assert_array_equal(direct[:, 0], indirect[:, 0])  # what both begin with
    early, late = slice(0, 5), slice(50, None)
    assert (direct[:, late].mean(1) < 0.85 * indirect[:, late].mean(1)).all()
    assert (indirect[:, late].mean(1) < 0.7 * indirect[:, early].mean(1)).all()
    assert (noisy[:, late].mean(1) > 0.8 * noisy[:, early].mean(1)).all()
