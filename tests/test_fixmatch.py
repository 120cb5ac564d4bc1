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

from jaxssl import mixing, views
from jaxssl.methods import fixmatch

SIZE = (16, 24)
CUT = np.zeros((4, *SIZE), bool)
CUT[:, 5:13, :8] = True


@pytest.fixture(autouse=True)
def fixed_views(monkeypatch):
    monkeypatch.setattr(views, "rand_augment", lambda key, image, *, valid: 255.0 - image)
    monkeypatch.setattr(mixing, "cutout_mask", lambda key, batch, size: jnp.asarray(CUT))


def loss_and_gradient(method, net, batch):
    state = make_state(method, {"a": net})
    (phase,), key = method.phases(plan()), jax.random.key(0)

    def loss(params):
        zero = jnp.zeros(())
        return method.loss({"a": net}, params, state, {}, batch, key, phase=phase, progress=zero)

    return state, *jax.value_and_grad(loss, has_aux=True)(state.params)


def test_loss_and_gradient():
    method, batch = fixmatch.Method(weight=3.0, threshold=0.9), random_batch()
    state, (value, aux), grads = loss_and_gradient(method, Linear(), batch)
    labeled, (image, valid) = batch["labeled"], (batch["unlabeled"][n] for n in ("image", "valid"))
    seen = valid & ~CUT

    def reference(params):
        first, _, stats = forward((params, state.stats["a"]), labeled["image"], labeled["valid"])
        weak, _, stats = forward((params, stats), image, valid)
        strong, _, stats = forward((params, stats), 255.0 - image, seen)
        p, logits = softmax(nearest(weak, SIZE)), nearest(strong, SIZE)
        kept = seen & (p.max(-1) >= 0.9)
        taught = np.where(kept, p.argmax(-1), 255)
        # The mean over the kept ones, times their share, divides by all.
        consistency = cross_entropy(logits, taught) * kept.sum() / seen.sum()
        supervised = cross_entropy(nearest(first, SIZE), labeled["label"])
        return supervised + 3 * consistency, supervised, consistency, kept, stats

    expected, supervised, consistency, kept, stats = reference(state.params["a"])
    assert 0.2 < kept.sum() / seen.sum() < 0.8
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["loss_supervised"][0], supervised, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["loss_consistency"][0], consistency, rtol=1e-5)
    assert aux.metrics["kept"] == (kept.sum(), seen.sum())
    np.testing.assert_allclose(aux.stats["a"]["mean"], stats["mean"], rtol=1e-3)
    assert_gradient(grads["a"], state.params["a"], lambda params: reference(params)[0])


@pytest.mark.parametrize("threshold", [0.94, 1.0])
def test_classification(threshold):
    """Images are cut, and all are taught."""
    method, batch = fixmatch.Method(threshold=threshold), random_batch(padded=False)
    for images in batch.values():
        del images["valid"]
    batch["labeled"]["label"] = np.array([0, 255, 3, 1], np.uint8)
    batch["unlabeled"]["image"] //= np.arange(1, 5, dtype=np.uint8)[:, None, None, None]
    state, (value, aux), grads = loss_and_gradient(method, Pooled(), batch)

    def logits(image, valid=None):
        valid = np.ones(image.shape[:3], bool) if valid is None else valid
        return forward(state.network("a"), image, valid)[0].mean((1, 2))

    image = batch["unlabeled"]["image"]
    p = softmax(logits(image))
    kept = p.max(-1) >= threshold
    assert kept.sum() == 0 if threshold == 1 else 0 < kept.sum() < 4
    taught = np.where(kept, p.argmax(-1), 255)
    expected = cross_entropy(logits(batch["labeled"]["image"]), batch["labeled"]["label"])
    expected += cross_entropy(logits(255.0 - image, ~CUT), taught) * kept.mean()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert aux.metrics["kept"] == (kept.sum(), 4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_nothing_valid():
    batch = random_batch()
    batch["unlabeled"]["valid"][:] = False
    _, (value, aux), grads = loss_and_gradient(fixmatch.Method(threshold=0.0), Linear(), batch)
    assert value == aux.metrics["loss_supervised"][0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_the_network_teaches_what_reaches_the_threshold_and_its_average_is_evaluated():
    method = fixmatch.Method(threshold=0.5)
    logits = jnp.log(jnp.array([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]]))
    assert method.pseudo_labels(logits).tolist() == [0, 2, 255]
    assert (method.labeler, method.headline) == ("a", "teacher_a")
