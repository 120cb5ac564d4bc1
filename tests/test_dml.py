import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    Linear,
    Pooled,
    assert_gradient,
    cross_entropy,
    forward,
    make_state,
    nearest,
    plan,
    random_batch,
    softmax,
)

from jaxssl.methods import dml

SIZE = (16, 24)


def loss_and_gradient(method, nets, batch):
    state = make_state(method, nets)
    (phase,), key = method.phases(plan()), jax.random.key(0)

    def loss(params):
        zero = jnp.zeros(())
        return method.loss(nets, params, state, {}, batch, key, phase=phase, progress=zero)

    return state, *jax.value_and_grad(loss, has_aux=True)(state.params)


def divergence(q, p):
    """KL(q || p) by position."""
    return (q * (np.log(q) - np.log(p))).sum(-1)


def test_loss_and_gradient():
    method, batch = dml.Method(weight=0.5), random_batch()
    nets = {"a": Linear(), "b": Linear(channels=3)}
    state, (value, aux), grads = loss_and_gradient(method, nets, batch)
    labeled, unlabeled = batch["labeled"], batch["unlabeled"]
    valid = np.concatenate([labeled["valid"], unlabeled["valid"]])

    def run(params, name):
        first, _, stats = forward((params, state.stats[name]), labeled["image"], labeled["valid"])
        second, _, stats = forward((params, stats), unlabeled["image"], unlabeled["valid"])
        supervised = cross_entropy(nearest(first, SIZE), labeled["label"])
        return supervised, nearest(softmax(np.concatenate([first, second])), SIZE), stats

    found = {name: run(state.params[name], name) for name in "ab"}
    sums = {"supervised": 0.0, "students": 0.0}
    for name, other in ("ab", "ba"):
        supervised, p, stats = found[name]
        q = found[other][1]
        sums["supervised"] += supervised
        sums["students"] += divergence(q, p)[valid].mean()
        np.testing.assert_allclose(aux.stats[name]["mean"], stats["mean"], rtol=1e-3)

        def learned(params, name=name, q=q):
            supervised, p, _ = run(params, name)
            return supervised + 0.5 * divergence(q, p)[valid].mean()

        assert_gradient(grads[name], state.params[name], learned)
    np.testing.assert_allclose(value, sums["supervised"] + 0.5 * sums["students"], rtol=1e-5)
    for name, expected in sums.items():
        np.testing.assert_allclose(aux.metrics[f"loss_{name}"][0], expected, rtol=1e-5)


def test_classification():
    method, batch = dml.Method(), random_batch(padded=False)
    for images in batch.values():
        del images["valid"]
    batch["labeled"]["label"] = np.array([0, 255, 3, 1], np.uint8)
    state, (value, _), _ = loss_and_gradient(method, {"a": Pooled(), "b": Pooled()}, batch)
    expected, p = 0.0, {}
    for name in "ab":
        logits = [
            forward(state.network(name), images["image"], np.ones((4, *SIZE), bool))[0].mean((1, 2))
            for images in batch.values()
        ]
        expected += cross_entropy(logits[0], batch["labeled"]["label"])
        p[name] = softmax(np.concatenate(logits))
    expected += (divergence(p["b"], p["a"]) + divergence(p["a"], p["b"])).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_nothing_valid(nets):
    batch = random_batch()
    for images in batch.values():
        images["valid"][:] = False
    _, (value, aux), grads = loss_and_gradient(dml.Method(), nets, batch)
    assert value == aux.metrics["loss_supervised"][0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("auxiliary", [0.0, 0.3])
def test_labels_alone_reach_auxiliary_heads(auxiliary, nets):
    method = dml.Method(auxiliary_weight=auxiliary)
    with_head = {name: dataclasses.replace(net, auxiliary=True) for name, net in nets.items()}
    _, (without, _), _ = loss_and_gradient(method, nets, random_batch())
    state, (value, _), _ = loss_and_gradient(method, with_head, random_batch())
    labeled, expected = random_batch()["labeled"], 0.0
    for name in "ab":
        logits, _, _ = forward(state.network(name), labeled["image"], labeled["valid"])
        expected += auxiliary * cross_entropy(2 * nearest(logits, SIZE), labeled["label"])
    np.testing.assert_allclose(value - without, expected, rtol=1e-4, atol=1e-6)
