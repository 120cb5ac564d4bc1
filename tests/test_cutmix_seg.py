import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    Linear,
    assert_gradient,
    cross_entropy,
    forward,
    make_state,
    nearest,
    plan,
    random_batch,
    softmax,
)

from jaxssl import mixing
from jaxssl.methods import cutmix_seg

SIZE = (16, 24)
BOX = np.zeros((4, *SIZE), bool)
BOX[:, 3:11, 2:10] = True


@pytest.fixture(autouse=True)
def fixed_box(monkeypatch):
    def box_mask(key, batch, size, *, boxes, area):
        assert (batch, size, boxes, area) == (4, SIZE, 1, (0.5, 0.5))
        return jnp.asarray(BOX)

    monkeypatch.setattr(mixing, "box_mask", box_mask)


def mix(x):
    return np.where(BOX.reshape(BOX.shape + (1,) * (x.ndim - 3)), x, np.roll(x, -1, 0))


def loss_and_gradient(method, batch):
    net = Linear()
    state = make_state(method, {"a": net})
    state = state.with_network("teacher_a", net.init(jax.random.key(7), SIZE))
    (phase,), key = method.phases(plan()), jax.random.key(0)

    def loss(params):
        zero = jnp.zeros(())
        return method.loss({"a": net}, params, state, {}, batch, key, phase=phase, progress=zero)

    return state, *jax.value_and_grad(loss, has_aux=True)(state.params)


@pytest.mark.parametrize("teacher_stats", ["ema", "own"])
def test_loss_and_gradient(teacher_stats):
    method = cutmix_seg.Method(weight=3.0, threshold=0.9, teacher_stats=teacher_stats)
    batch = random_batch()
    state, (value, aux), grads = loss_and_gradient(method, batch)

    labeled, (image, valid) = batch["labeled"], (batch["unlabeled"][n] for n in ("image", "valid"))
    own = teacher_stats == "own"
    source, _, teacher = forward(state.network("teacher_a"), image, valid, batch_stats=own)
    taught = mix(nearest(softmax(source), SIZE))
    seen = mix(valid)
    share = (taught.max(-1) >= 0.9)[seen].mean()
    assert 0.2 < share < 0.8

    def reference(params):
        first, _, stats = forward((params, state.stats["a"]), labeled["image"], labeled["valid"])
        second, _, stats = forward((params, stats), mix(image), seen)
        distance = ((nearest(softmax(second), SIZE) - taught) ** 2).sum(-1)
        supervised = cross_entropy(nearest(first, SIZE), labeled["label"])
        consistency = share * distance[seen].mean()
        return supervised + 3 * consistency, supervised, consistency, stats

    expected, supervised, consistency, stats = reference(state.params["a"])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["loss_supervised"][0], supervised, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["loss_consistency"][0], consistency, rtol=1e-5)
    sure, count = aux.metrics["confident"]
    assert (sure / count, count) == (pytest.approx(share), seen.sum())
    np.testing.assert_allclose(aux.stats["a"]["mean"], stats["mean"], rtol=1e-3)
    np.testing.assert_allclose(aux.teacher_stats["a"]["mean"], teacher["mean"], rtol=1e-3)
    assert_gradient(grads["a"], state.params["a"], lambda params: reference(params)[0])


@pytest.mark.parametrize("case", ["nothing valid", "nobody sure"])
def test_without_confidence_labels_alone_are_learned(case):
    batch = random_batch()
    if case == "nothing valid":
        batch["unlabeled"]["valid"][:] = False
    method = cutmix_seg.Method(threshold=1.0 if case == "nobody sure" else 0.0)
    _, (value, aux), grads = loss_and_gradient(method, batch)
    assert value == aux.metrics["loss_supervised"][0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_all_pixels_are_taught_whatever_the_confidence():
    logits = jnp.array([[0.1, 0.0], [0.0, 9.0]])
    method = cutmix_seg.Method()
    assert method.pseudo_labels(logits).tolist() == [0, 1]
    assert method.headline == method.labeler == "teacher_a"


def test_it_is_for_segmentation():
    assert cutmix_seg.Method.tasks == ("segmentation",)
