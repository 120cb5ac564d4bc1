import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    assert_gradient,
    cross_entropy,
    forward,
    make_state,
    nearest,
    plan,
    random_batch,
)

from jaxssl import contracts, mixing
from jaxssl.methods import cps

SIZE = (16, 24)
BOXES = np.random.default_rng(1).random((4, *SIZE)) < 0.4


@pytest.fixture(autouse=True)
def fixed_boxes(monkeypatch):
    monkeypatch.setattr(mixing, "box_mask", lambda key, batch, size: jnp.asarray(BOXES))


def fill(x):
    """Fills the boxes from the next image of the batch."""
    return np.where(BOXES.reshape(BOXES.shape + (1,) * (x.ndim - 3)), np.roll(x, -1, 0), x)


def reference(method, variables, batch):
    """The loss, its two parts and the students' statistics, in NumPy."""
    labeled, unlabeled = batch["labeled"], batch["unlabeled"]
    logits, targets, new_stats, supervised = {}, {}, {}, 0.0
    for name, (params, stats) in variables.items():
        on_labeled, _, stats = forward((params, stats), labeled["image"], labeled["valid"])
        supervised += cross_entropy(nearest(on_labeled, SIZE), labeled["label"])
        image, valid = unlabeled["image"], unlabeled["valid"]
        on_unlabeled, _, stats = forward((params, stats), image, valid)
        logits[name] = target = nearest(np.concatenate([on_labeled, on_unlabeled]), SIZE)
        seen = np.concatenate([labeled["valid"], valid])
        if method.cutmix:
            target, seen = fill(nearest(on_unlabeled, SIZE)), fill(valid)
            mixed, _, stats = forward((params, stats), fill(image), seen)
            logits[name] = nearest(mixed, SIZE)
        targets[name] = np.where(seen, target.argmax(-1), 255)
        new_stats[name] = stats
    cross = cross_entropy(logits["a"], targets["b"]) + cross_entropy(logits["b"], targets["a"])
    return supervised + method.weight * cross, supervised, cross, new_stats


def loss_of(method, nets, state, batch):
    phase = method.phases(plan())[-1]

    def loss(params):
        key = jax.random.key(0)
        return method.loss(nets, params, state, {}, batch, key, phase=phase, progress=0.0)

    return loss


@pytest.mark.parametrize("cutmix", [False, True])
def test_loss_and_gradient(cutmix, nets):
    method, batch = cps.Method(cutmix=cutmix, weight=1.5), random_batch()
    state = make_state(method, nets)
    loss = loss_of(method, nets, state, batch)
    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(state.params)

    variables = {name: state.network(name) for name in "ab"}
    expected, supervised, cross, stats = reference(method, variables, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(aux.metrics["loss_supervised"][0], supervised, rtol=1e-4)
    np.testing.assert_allclose(aux.metrics["loss_students"][0], cross, rtol=1e-4)
    for name in "ab":
        np.testing.assert_allclose(aux.stats[name]["mean"], stats[name]["mean"], rtol=1e-4)

    def moved(params):
        variables = {name: contracts.Variables(params[name], state.stats[name]) for name in "ab"}
        return reference(method, variables, batch)[0]

    assert_gradient(grads, state.params, moved)


def test_phases():
    warmup, main = cps.Method().phases(plan(steps=7, warmup=3))
    assert (warmup.name, warmup.steps, main.name, main.steps) == ("warmup", 3, "main", 7)
    assert warmup.train == main.train == ("a", "b")
    assert [stream.labels for stream in main.streams] == ["truth", None]
