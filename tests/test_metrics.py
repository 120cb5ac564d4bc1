import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sklearn

from jaxssl import metrics
from jaxssl.sharding import batched, make_mesh

C = 6


def example(shape=(8, 9, 11), absent=(), seed=0):
    """Labels with ignored pixels and predictions that are often right; `absent` never occurs."""
    rng = np.random.default_rng(seed)
    present = np.setdiff1d(np.arange(C), absent)
    labels = rng.choice(present, shape).astype(np.uint8)
    predictions = np.where(rng.random(shape) < 0.6, labels, rng.choice(present, shape))
    labels[rng.random(shape) < 0.2] = 255
    return labels, predictions.astype(np.int32)


def counted(labels, predictions):
    kept = labels != 255
    return labels[kept], predictions[kept]


def matrix(*args):
    return np.asarray(metrics.confusion_matrix(*args, C), np.int64)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
@pytest.mark.parametrize("shape", [(50,), (8, 9, 11)])
@pytest.mark.parametrize("absent", [(), (0, 5), (1, 2, 3, 4)])
def test_confusion_matrix_is_sklearns(shape, absent, dtype):
    labels, predictions = example(shape, absent)
    confusion = jax.jit(metrics.confusion_matrix, static_argnums=2)(
        labels, predictions.astype(dtype), C
    )
    assert confusion.dtype == np.int32
    expected = sklearn.confusion_matrix(*counted(labels, predictions), labels=range(C))
    np.testing.assert_array_equal(confusion, expected)


def test_many_classes_do_not_wrap_around_in_uint8():
    labels = np.arange(200, dtype=np.uint8)
    confusion = metrics.confusion_matrix(labels, labels[::-1], 200)
    np.testing.assert_array_equal(confusion, np.eye(200, dtype=int)[::-1])


def test_ignored_predictions_and_empty_maps():
    labels = np.array([0, 1, 255, 255], np.uint8)
    predictions = np.array([0, 255, 1, 255], np.uint8)
    confusion = np.asarray(metrics.confusion_matrix(labels, predictions, 2))
    np.testing.assert_array_equal(confusion, [[1, 0], [0, 0]])
    assert not np.asarray(metrics.confusion_matrix(labels[2:], predictions[2:], 2)).any()


def test_confusion_matrix_over_devices():
    labels, predictions = example()
    split = jax.device_put((labels, predictions), batched(make_mesh()))
    confusion = jax.jit(metrics.confusion_matrix, static_argnums=2)(*split, C)
    expected = sklearn.confusion_matrix(*counted(labels, predictions), labels=range(C))
    np.testing.assert_array_equal(confusion, expected)


@pytest.mark.parametrize("absent", [(), (0, 5), (1, 2, 3, 4)])
def test_scores_are_sklearns(absent):
    labels, predictions = example(absent=absent)
    confusion = matrix(labels, predictions)
    truth, guess = counted(labels, predictions)
    present = np.setdiff1d(np.arange(C), absent)
    expected = np.full(C, np.nan)
    expected[present] = sklearn.jaccard_score(truth, guess, labels=present, average=None)
    np.testing.assert_allclose(metrics.iou(confusion), expected, rtol=1e-12)
    assert metrics.iou(confusion).dtype == np.float64
    np.testing.assert_allclose(metrics.mean_iou(confusion), expected[present].mean(), rtol=1e-12)
    np.testing.assert_allclose(
        metrics.accuracy(confusion), sklearn.accuracy_score(truth, guess), rtol=1e-12
    )
    expected[present] = sklearn.recall_score(truth, guess, labels=present, average=None)
    np.testing.assert_allclose(metrics.class_accuracy(confusion), expected, rtol=1e-12)


def test_classes_that_occur_on_one_side_only():
    """By hand: class 1 is predicted but never true, class 2 true but never predicted, 3 neither."""
    confusion = np.array([[6, 2, 0, 0], [0, 0, 0, 0], [4, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(metrics.iou(confusion), [6 / 12, 0, 0, np.nan])
    assert metrics.mean_iou(confusion) == pytest.approx(0.5 / 3)
    assert metrics.accuracy(confusion) == 0.5
    np.testing.assert_array_equal(metrics.class_accuracy(confusion), [6 / 8, np.nan, 0, np.nan])


def test_nothing_counted():
    empty = np.zeros((C, C), np.int64)
    assert np.isnan(metrics.iou(empty)).all()
    assert np.isnan(metrics.class_accuracy(empty)).all()
    assert np.isnan(metrics.mean_iou(empty))
    assert np.isnan(metrics.accuracy(empty))


def test_counts_beyond_int32():
    confusion = np.full((2, 2), 2**40, np.int64)
    np.testing.assert_allclose(metrics.iou(confusion), 1 / 3)


@pytest.mark.parametrize(
    ("prior", "counts", "expected"),
    [
        ([1, 3], [30, 10], 0.25 * np.log(1 / 3) + 0.75 * np.log(3)),
        ([1, 3, 0], [1, 3, 4], np.log(2)),  # a class that no label has: others lose their share
        ([1, 1], [8, 0], 0.5 * np.log(0.5 / (8 / 8.5)) + 0.5 * np.log(0.5 / (0.5 / 8.5))),
        ([0, 0], [1, 1], np.nan),
        ([1, 1], [0, 0], np.nan),
    ],
)
def test_kl_divergence(prior, counts, expected):
    np.testing.assert_allclose(metrics.kl_divergence(np.array(prior), np.array(counts)), expected)


def test_total_variation():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6, 5, 4)).astype(np.float32)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    expected = np.abs(p - q).sum(-1) / 2
    np.testing.assert_allclose(metrics.total_variation(a, b), expected, rtol=1e-5)
    sure = np.array([[100.0, 0.0], [0.0, 100.0]])
    np.testing.assert_allclose(metrics.total_variation(sure[0], sure), [0, 1])


def test_reliability_sums_up_confidences_in_bins():
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(300, 4))
    labels = rng.integers(0, 4, 300).astype(np.uint8)
    labels[:40] = 255
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    found = metrics.reliability(jnp.asarray(labels), jnp.asarray(logits), bins=10)
    known = labels != 255
    p, truth = p[known], labels[known].astype(int)
    best, right = p.max(-1), p.argmax(-1) == truth
    error = 0.0
    for low in np.arange(10) / 10:
        inside = (best >= low) & (best < low + 0.1)
        if inside.any():
            error += inside.mean() * abs(best[inside].mean() - right[inside].mean())
    assert np.sum(found.all) == known.sum()
    assert metrics.calibration_error(found) == pytest.approx(error, abs=1e-5)
    true = p[np.arange(len(p)), truth].mean()
    assert metrics.true_probability(found) == pytest.approx(true, abs=1e-5)


def test_reliability_of_nothing_is_undefined():
    found = metrics.reliability(jnp.full(3, 255), jnp.zeros((3, 2)))
    assert np.isnan([metrics.calibration_error(found), metrics.true_probability(found)]).all()


def test_a_sure_network_is_counted_in_the_last_bin():
    found = metrics.reliability(jnp.zeros(2, int), jnp.array([[99.0, 0.0]] * 2), bins=5)
    np.testing.assert_array_equal(found.all, [0, 0, 0, 0, 2])
    assert metrics.calibration_error(found) == pytest.approx(0, abs=1e-6)
