import jax
import numpy as np
import pytest
from jax import numpy as jnp
from sklearn.metrics import log_loss

from jaxssl.losses import cross_entropy

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
