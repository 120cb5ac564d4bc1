import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from sklearn.metrics import log_loss

from jaxssl.losses import (
    cross_entropy,
    kl_divergence,
    mixup_cross_entropy,
    ohem_cross_entropy,
    squared_distance,
)
from jaxssl.mixing import Mixup

SHAPES = [(6,), (2, 5, 7)]
loss_and_gradient = jax.jit(jax.value_and_grad(cross_entropy))


def example(shape, classes=5, ignored=0.3, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (*shape, classes)).astype(np.float32)
    labels = rng.integers(0, classes, shape).astype(np.uint8)
    labels[rng.random(shape) < ignored] = 255
    weights = rng.random(shape, np.float32) * (rng.random(shape) < 0.7)
    return logits, labels, weights


def softmax(logits):
    odds = np.exp(np.asarray(logits, float) - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def reference(logits, labels, weights):
    """The definition, one position after the other."""
    terms = [
        -weights[i] * np.log(softmax(logits[i])[labels[i]])
        for i in np.ndindex(labels.shape)
        if labels[i] != 255
    ]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_definition(shape, weighted):
    logits, labels, weights = example(shape)
    loss = jax.jit(cross_entropy)(logits, labels, weights=weights if weighted else None)
    expected = reference(logits, labels, weights if weighted else np.ones(shape))
    assert loss.shape == ()
    assert loss.dtype == np.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_is_sklearns_log_loss():
    logits, labels, _ = example((3, 8, 9))
    kept = labels != 255
    expected = log_loss(labels[kept], softmax(logits)[kept], labels=range(5))
    np.testing.assert_allclose(cross_entropy(logits, labels), expected, rtol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("shape", SHAPES)
def test_is_torchs_cross_entropy(shape):
    torch = pytest.importorskip("torch")
    logits, labels, _ = example(shape)
    inputs = torch.tensor(logits, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(
        inputs.movedim(-1, 1), torch.tensor(labels).long(), ignore_index=255
    )
    expected.backward()
    loss, gradient = loss_and_gradient(logits, labels)
    np.testing.assert_allclose(loss, expected.detach(), rtol=1e-5)
    np.testing.assert_allclose(gradient, inputs.grad, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_mixup_is_cross_entropy_with_soft_targets(shape, weighted):
    logits, labels, weights = example(shape, ignored=0.0)
    partner = np.random.default_rng(1).permutation(shape[0])
    hard = np.eye(5)[labels]
    targets = 0.7 * hard + 0.3 * hard[partner]
    terms = -(targets * np.log(softmax(logits))).sum(-1)
    loss = mixup_cross_entropy(
        logits, labels, Mixup(np.float32(0.7), partner), weights=weights if weighted else None
    )
    expected = (terms * weights if weighted else terms).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_softmax_minus_one_hot(shape):
    logits, labels, weights = example(shape)
    kept = labels != 255
    one_hot = labels[..., None] == np.arange(5)
    expected = (weights * kept)[..., None] * (softmax(logits) - one_hot) / kept.sum()
    _, gradient = loss_and_gradient(logits, labels, weights=weights)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_to_learn_from(shape):
    logits, labels, _ = example(shape, ignored=1.1)
    loss, gradient = loss_and_gradient(logits, labels)
    assert loss == 0
    assert not np.asarray(gradient).any()


@pytest.mark.parametrize("extreme", [1e4, 3e38, -3e38])
def test_ignored_logits_do_not_matter(extreme):
    logits, labels, _ = example((4, 6))
    shouting = logits.copy()
    shouting[labels == 255] = [extreme, -extreme, 0, extreme, 1]
    loss, gradient = loss_and_gradient(shouting, labels)
    np.testing.assert_array_equal(loss, cross_entropy(logits, labels))
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient)[labels == 255].any()


def test_another_ignore_label():
    logits, labels, _ = example((4, 6))
    other = np.where(labels == 255, -1, labels.astype(int))
    np.testing.assert_array_equal(
        cross_entropy(logits, other, ignore_label=-1), cross_entropy(logits, labels)
    )


def test_precision():
    """bfloat16 logits are summed in float32; float64 stays."""
    logits, labels, weights = example((40, 50), classes=19)
    half = jnp.asarray(logits, jnp.bfloat16)
    loss = cross_entropy(half, labels)
    assert loss.dtype == np.float32
    expected = reference(np.asarray(half, float), labels, np.ones(labels.shape))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    with jax.enable_x64(True):
        loss = cross_entropy(logits.astype(float), labels, weights=weights.astype(float))
    assert loss.dtype == np.float64
    np.testing.assert_allclose(loss, reference(logits.astype(float), labels, weights), rtol=1e-12)


def squared(p, q):
    return ((p - q) ** 2).sum(-1)


def kl(p, q):
    """Cross entropy minus entropy; q is the target."""
    return (q * np.log(q)).sum(-1) - (q * np.log(p)).sum(-1)


DIVERGENCES = [(squared_distance, squared), (kl_divergence, kl)]


def two_logits(shape):
    rng = np.random.default_rng(1)
    logits, target = rng.normal(0, 3, (2, *shape, 5)).astype(np.float32)
    return logits, target, rng.random(shape) < 0.6


@pytest.mark.parametrize(("loss", "definition"), DIVERGENCES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_distances_of_softmaxes(loss, definition, masked, shape):
    logits, target, valid = two_logits(shape)
    terms = definition(softmax(logits), softmax(target))
    value = jax.jit(loss)(logits, target, valid=valid if masked else None)
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, terms[valid].mean() if masked else terms.mean(), rtol=1e-4)
    np.testing.assert_allclose(loss(logits, logits + 2), 0, atol=1e-6)


@pytest.mark.parametrize(("loss", "definition"), DIVERGENCES)
def test_gradients_of_distances_reach_the_logits_alone(loss, definition):
    logits, target, valid = two_logits((3, 4))
    to_logits, to_target = jax.grad(loss, (0, 1))(logits, target, valid=valid)
    assert not np.asarray(to_target).any()
    direction = np.random.default_rng(2).normal(size=logits.shape)

    def moved(step):
        terms = definition(softmax(logits + step * direction), softmax(target))
        return terms[valid].mean()

    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    np.testing.assert_allclose((to_logits * direction).sum(), slope, rtol=1e-4)


@pytest.mark.parametrize("loss", [squared_distance, kl_divergence])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_is_not_valid_does_not_matter(loss, share):
    logits, target, _ = two_logits((4, 6))
    valid = np.random.default_rng(3).random((4, 6)) < share
    shouting, nothing = logits.copy(), np.where(valid[..., None], target, np.nan)
    shouting[~valid] = [np.inf, -np.inf, 0, 3e38, np.nan]
    value, gradient = jax.value_and_grad(loss)(shouting, nothing, valid=valid)
    np.testing.assert_array_equal(value, loss(logits, target, valid=valid))
    assert (value > 0) == valid.any()
    assert not np.asarray(gradient)[~valid].any()


@pytest.mark.torch
def test_kl_is_torchs():
    torch = pytest.importorskip("torch")
    logits, target, _ = two_logits((3, 4))
    expected = torch.nn.functional.kl_div(
        torch.tensor(logits).log_softmax(-1), torch.tensor(target).softmax(-1), reduction="sum"
    )
    np.testing.assert_allclose(kl_divergence(logits, target), expected / 12, rtol=1e-5)


def mined(logits, labels, threshold, least):
    """What the released code keeps: it sorts probabilities, 1 where there is no label."""
    p = softmax(logits)
    p = np.take_along_axis(p, np.where(labels == 255, 0, labels)[..., None], -1)[..., 0]
    p, valid = np.where(labels == 255, 1.0, p), labels != 255
    if least > valid.sum():
        return valid
    limit = max(threshold, np.sort(p.ravel())[least - 1]) if least else threshold
    return valid & (p <= limit)


@pytest.mark.parametrize("ignored", [0.0, 0.3, 0.8, 1.1])
@pytest.mark.parametrize("min_kept", [0, 1, 9, 17, 35, 36])
@pytest.mark.parametrize("threshold", [0.7, 0.05])
def test_hard_examples_are_those_of_the_released_code(threshold, min_kept, ignored):
    logits, labels, _ = example((2, 5, 7), ignored=ignored)
    kept = mined(logits, labels, threshold, 2 * min_kept)
    loss = functools.partial(ohem_cross_entropy, threshold=threshold, min_kept=min_kept)
    with jax.enable_x64(True):
        value, gradient = jax.jit(jax.value_and_grad(loss))(logits.astype(float), labels)
    taught = np.where(kept, labels, 255)
    expected = reference(logits, taught, np.ones(labels.shape)) if kept.any() else 0
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_array_equal(np.asarray(gradient).any(-1), kept)


def test_equally_hard_examples_are_all_kept():
    logits = np.log(np.array([[0.9, 0.8, 0.8, 0.8, 0.95]]))[..., None] * [1.0, 0.0]
    logits[..., 1] = np.log(1 - np.exp(logits[..., 0]))
    value = ohem_cross_entropy(jnp.float32(logits), jnp.zeros((1, 5), jnp.uint8), min_kept=2)
    np.testing.assert_allclose(value, -np.log(0.8), rtol=1e-5)
