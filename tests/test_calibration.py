"""Fits and measures against NumPy, scikit-learn and rankings of every single position."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from jaxssl import calibration, metrics, selection
from jaxssl.calibration import Binning, Matrix, Sample, Temperature
from jaxssl.contracts import Selection


def softmax(logits):
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def simulated(count=20_000, *, classes=4, seed=0):
    """Logits of a network that is right about itself, and labels drawn from its softmax."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(np.arange(classes)[::-1] / 2, 2, (count, classes))
    labels = (softmax(logits).cumsum(1) > rng.random((count, 1))).argmax(1)
    return logits, labels.astype(np.uint8)


def loss(logits, labels):
    return log_loss(labels, softmax(logits), labels=range(logits.shape[1]))


@pytest.mark.parametrize("true", [0.4, 1.0, 1.27, 5.0])
def test_a_temperature_is_found_again(true):
    logits, labels = simulated()
    found = calibration.fit_temperature(true * logits, labels).value
    assert found == pytest.approx(true, rel=0.03)
    # There the mean logit of the labels is what the softmax lets expect.
    p, one_hot = softmax(true * logits / found), np.eye(4)[labels]
    assert ((p - one_hot) * true * logits).sum(1).mean() == pytest.approx(0, abs=1e-7)
    for other in (0.98 * found, 1.02 * found):
        assert loss(true * logits / other, labels) > loss(true * logits / found, labels)


def test_a_temperature_stays_finite():
    logits = np.eye(3) * 4
    assert calibration.fit_temperature(logits, np.arange(3)).value == pytest.approx(math.exp(-5))
    wrong = calibration.fit_temperature(logits, np.array([1, 2, 0])).value
    assert wrong == pytest.approx(math.exp(5))


def distorted():
    """What a matrix undoes, and no temperature."""
    logits, labels = simulated()
    rng = np.random.default_rng(1)
    return logits @ (1.5 * np.eye(4) + rng.normal(0, 0.3, (4, 4))) + rng.normal(0, 1, 4), labels


def test_matrix_scaling_is_logistic_regression():
    logits, labels = distorted()
    found = calibration.fit_matrix(logits, labels)
    scaled = logits @ found.weight.T + found.bias
    model = LogisticRegression(C=np.inf, tol=1e-8, max_iter=2000).fit(logits, labels)
    np.testing.assert_allclose(softmax(scaled), model.predict_proba(logits), atol=1e-3)
    assert loss(scaled, labels) == pytest.approx(
        log_loss(labels, model.predict_proba(logits)), rel=1e-7
    )
    gradient = (softmax(scaled) - np.eye(4)[labels]).T @ logits / len(logits)
    np.testing.assert_allclose(gradient, 0, atol=1e-3)
    temperature = calibration.fit_temperature(logits, labels).value
    true, _ = simulated()
    assert loss(scaled, labels) < loss(true, labels)  # it has parameters to fit
    assert loss(scaled, labels) > loss(true, labels) - 1e-3
    assert loss(logits / temperature, labels) > loss(scaled, labels) + 0.03


def test_matrix_scaling_leaves_calibrated_logits_alone():
    logits, labels = simulated(40_000)
    found = calibration.fit_matrix(logits, labels)
    # A vector added to all rows changes no probability.
    weight = found.weight - found.weight.mean(0) + 1 / 4
    np.testing.assert_allclose(weight, np.eye(4), atol=0.05)
    np.testing.assert_allclose(found.bias - found.bias.mean(), 0, atol=0.1)


def test_matrix_scaling_takes_a_class_that_never_occurs():
    logits, labels = simulated(3000)
    found = calibration.fit_matrix(logits, np.where(labels == 2, 1, labels))
    scaled = logits @ found.weight.T + found.bias
    assert np.isfinite(scaled).all()
    assert softmax(scaled)[:, 2].max() < 0.01


def test_bins_hold_the_share_of_each_class():
    logits, labels = simulated()
    found = calibration.fit_binning(1.5 * logits, labels)
    assert found.shares.shape == (4, 15)
    p = softmax(1.5 * logits)
    for j, shares in enumerate(found.shares):
        expected, _ = calibration_curve(labels == j, p[:, j], n_bins=15)
        filled = np.histogram(p[:, j], np.linspace(0, 1, 16))[0] > 0
        np.testing.assert_allclose(shares[filled], expected, rtol=1e-12)
    # A position has its bins' shares, over their sum.
    some = p[:200]
    rows = np.array([found.shares[np.arange(4), np.int64(np.ceil(15 * x)) - 1] for x in some])
    logits = jnp.asarray(1.5 * logits[:200], jnp.float32)
    np.testing.assert_allclose(
        jax.nn.softmax(found(logits)), rows / rows.sum(1, keepdims=True), rtol=1e-5, atol=1e-6
    )


def test_an_empty_bin_keeps_its_middle():
    logits = np.log([[0.95, 0.05], [0.95, 0.05], [0.95, 0.05], [0.3, 0.7]])
    found = calibration.fit_binning(logits, np.array([0, 0, 1, 0]), count=5)
    np.testing.assert_allclose(found.shares[0], [0.1, 1, 0.5, 0.7, 2 / 3])
    np.testing.assert_allclose(found.shares[1], [1 / 3, 0.3, 0.5, 0, 0.9])
    # No share is so small that its logarithm is not finite.
    assert jnp.isfinite(found(jnp.asarray(logits))).all()
    sure = jax.nn.softmax(found(jnp.asarray(logits[3:])))
    np.testing.assert_allclose(sure, [[1, 0]], atol=1e-6)


def test_calibrations_of_logits_on_devices():
    logits = np.random.default_rng(0).normal(0, 3, (2, 5, 7, 3))
    weight, bias = np.array([[1.0, 2, 3], [0, 1, 0], [4, 0, -1]]), np.array([1.0, -1, 0])
    on_device = jnp.asarray(logits, jnp.float32)
    for one, expected in (
        (Temperature(1.27), logits / 1.27),
        (Matrix(weight, bias), np.einsum("ij,bhwj->bhwi", weight, logits) + bias),
        (Binning(np.full((3, 15), 0.25)), np.full(logits.shape, np.log(0.25))),
    ):
        found = jax.jit(lambda one, x: one(x))(one, on_device)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_cross_entropy_is_sklearns():
    logits, labels = simulated(500)
    assert calibration.cross_entropy(5 * logits, labels) == pytest.approx(
        loss(5 * logits, labels), rel=1e-6
    )


def test_calibration_error_by_hand():
    logits = np.log([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.62, 0.38], [0.4, 0.6]])
    # In ].867, .933] one of two is right, in ]0.6, 0.667] the one there is right, in ].533, .6]
    # one of two.
    expected = (2 * abs(0.9 - 0.5) + abs(0.62 - 1) + 2 * abs(0.6 - 0.5)) / 5
    labels = np.array([0, 0, 0, 0, 0])
    assert calibration.calibration_error(logits, labels) == pytest.approx(expected)
    assert calibration.calibration_error(logits, labels, 1) == pytest.approx(
        abs((0.9 + 0.9 + 0.6 + 0.62 + 0.6) / 5 - 3 / 5)
    )


def test_calibration_error_falls_with_the_right_temperature():
    logits, labels = simulated()
    assert calibration.calibration_error(logits, labels) < 0.012
    assert calibration.calibration_error(2 * logits, labels) > 0.05


OTHER = "matrix scaling"


def simulated_levels(seed=0, classes=5, count=3000):
    rng = np.random.default_rng(seed)
    prior = rng.dirichlet(np.full(classes, 4))
    labels = rng.choice(classes, count, p=prior**1.5 / (prior**1.5).sum()).astype(np.uint8)
    levels = np.minimum(rng.gamma(2, 9000, count) // 3000 * 3000, 65535).astype(np.int64)
    return labels, levels, (10**6 * prior).astype(np.int64)


def divergence(prior, kept):
    p, q = prior / prior.sum(), kept / kept.sum()
    return (p * np.log(p / q)).sum()


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.6])
def test_rules_keep_what_a_ranking_of_all_positions_keeps(ratio):
    labels, levels, prior = simulated_levels()
    scaled = np.random.default_rng(5).permutation(levels)
    counts = {
        name: selection.count(labels, x, 5) for name, x in (("none", levels), (OTHER, scaled))
    }
    rules = calibration.make_rules(ratio)
    assert list(rules) == [
        *("ST", "ST + temperature scaling", "ST + matrix scaling", "ST + histogram binning"),
        *("CBST", "DA", "DARS"),
    ]
    assert {by for by, _ in rules.values()} == {"none", *calibration.FITS}
    found = {
        name: calibration.expected_counts(counts[by], rule(counts[by], prior))
        for name, (by, rule) in rules.items()
        if by in counts
    }

    def from_above(sure, wanted):
        return sure >= np.sort(sure)[::-1][wanted - 1]

    expected = {name: np.zeros(5) for name in found}
    for name, sure in (("ST", levels), (f"ST + {OTHER}", scaled)):
        kept = from_above(sure, math.ceil(ratio * len(sure)))
        expected[name] += np.bincount(labels[kept], minlength=5)
    for j in range(5):
        mine = levels[labels == j]
        expected["CBST"][j] = from_above(mine, math.ceil(round(ratio * len(mine), 6))).sum()
        wanted = round(ratio * len(labels) * prior[j] / prior.sum())
        half = selection.confidence(mine).astype(np.float16)
        expected["DA"][j] = from_above(half, min(wanted, len(mine))).sum()
        expected["DARS"][j] = min(wanted, len(mine))
    for name, kept in found.items():
        np.testing.assert_allclose(kept, expected[name], rtol=1e-12)
        assert metrics.kl_divergence(prior, kept) == pytest.approx(
            divergence(prior, expected[name]), abs=1e-12
        )
    assert divergence(prior, found["DARS"]) < divergence(prior, found["DA"])


def test_expected_counts_are_the_mean_of_what_is_drawn():
    labels, levels, _ = simulated_levels()
    lowest = np.array([0, 6000, 9000, selection.LEVELS, 3000])
    chosen = Selection(lowest, np.array([0.1, 1, 0.5, 1, 0]))
    expected = calibration.expected_counts(selection.count(labels, levels, 5), chosen)
    drawn = np.zeros(5)
    for seed in range(200):
        kept = selection.select(labels, levels, chosen, np.random.default_rng(seed))
        drawn += np.bincount(kept[kept != 255], minlength=5) / 200
    np.testing.assert_allclose(drawn, expected, rtol=0.03)
    assert expected[3] == expected[4] == 0
    assert expected[1] == ((labels == 1) & (levels >= 6000)).sum()


def images(seed=0, count=6):
    rng = np.random.default_rng(seed)
    return rng.choice(np.array([0, 1, 2, 255], np.uint8), (count, 5, 8))


def sampled(labels, size, order, batch=1):
    """Positions that are drawn, as numbers over all images, in the order of their keys."""
    sample = Sample(np.zeros(0, np.uint32), np.zeros((0, 1), np.float32), np.zeros(0, np.uint8))
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        rngs = [np.random.default_rng([7, row]) for row in rows]
        positions, keys = calibration.draw(labels[rows], rngs, size)
        assert positions.shape == keys.shape == (len(rows), min(size, 40))
        found = np.take_along_axis(labels[rows].reshape(len(rows), -1), positions, 1)
        numbers = np.float32(40 * np.array(rows)[:, None] + positions)[..., None]
        known = found != 255
        new = Sample(keys[known], numbers[known], found[known])
        sample = sample.merged(new, size)
    assert (np.diff(sample.keys.astype(np.int64)) >= 0).all()
    return sample.logits[:, 0].astype(int).tolist(), sample.labels.tolist()


def test_a_sample_does_not_depend_on_batches_or_their_order():
    labels = images()
    one = sampled(labels, 30, list(range(6)))
    assert one == sampled(labels, 30, [3, 1, 5, 0, 2, 4], batch=2)
    numbers, found = one
    assert len(set(numbers)) == 30
    assert found == labels.ravel()[numbers].tolist()
    everything, _ = sampled(labels, 1000, list(range(6)))
    assert sorted(everything) == np.flatnonzero(labels.ravel() != 255).tolist()
    assert everything[:30] == numbers


def test_a_sample_takes_all_labeled_positions_alike():
    labels = images(count=400)
    labels[::2] = 255  # images may have none
    labels[1::4, :3] = 255  # or fewer
    numbers, _ = sampled(labels, 3000, list(range(400)), batch=50)
    per_image = np.bincount(np.array(numbers) // 40, minlength=400)
    known = (labels != 255).sum((1, 2))
    share = 3000 / known.sum()
    assert per_image[::2].sum() == 0
    for kind in (1, 3):
        expected = known[kind::4].sum() * share
        assert per_image[kind::4].sum() == pytest.approx(expected, abs=4 * np.sqrt(expected))
