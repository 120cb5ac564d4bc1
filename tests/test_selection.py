"""Rules over histograms against rankings of every single position, written from the papers."""

import math
import tracemalloc

import numpy as np
import pytest

from jaxssl import selection
from jaxssl.contracts import Selection, UserError
from jaxssl.selection import LEVELS, SHARES, Aligned, Threshold, TopShare

RATIOS = (0.0, 0.03, 0.2, 0.5, 0.97, 1.0)


def simulated(seed=0, *, classes=5, count=4000, step=1):
    """Labels, levels of confidence and a prior; most positions are very sure, some are ignored.

    `step` makes levels coarser, so that many are alike.
    """
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, count, p=rng.dirichlet(np.ones(classes))).astype(np.uint8)
    levels = np.minimum(rng.gamma(2, 6000, count), LEVELS - 1).astype(np.int64)
    labels[rng.random(count) < 0.05] = 255
    return labels, levels // step * step, 1 + rng.integers(0, 10**9, classes)


def cases():
    labels, levels, prior = simulated()
    yield "distinct", (labels, np.random.default_rng(1).permutation(LEVELS)[: labels.size], prior)
    yield "few ties", (labels, levels, prior)
    yield "many ties", simulated(1, step=3000)
    yield "all alike", (labels, np.full_like(levels, 12_345), prior)
    yield "never predicted", (np.where(labels == 2, np.uint8(1), labels), levels, prior)
    yield "not in the prior", (labels, levels, np.where(np.arange(5) == 3, 0, prior))
    yield "no prior", (labels, levels, np.zeros(5, np.int64))
    yield "more wanted than there are", (labels, levels, np.array([1, 1, 10**6, 1, 1]))
    yield "one class", simulated(2, classes=1)
    yield "nothing", (np.full_like(labels, 255), levels, prior)


CASES = dict(cases())


def sureness(levels, precision):
    """What ranks positions, larger for surer ones."""
    if precision == "float16":
        return selection.confidence(levels).astype(np.float16)
    return -(2.0 ** (-levels / 2048))  # float64 tells all levels apart


def algorithm_1(labels, levels, prior, ratio, precision):
    """DARS by ranking every position (eq. 4 and Algorithm 1): bool, what reaches the threshold of
    its class, and by class s_j, the share of that to keep.
    """
    sure, known = sureness(levels, precision), labels != 255
    reached, shares = np.zeros(labels.shape, bool), np.ones(len(prior))
    for j in range(len(prior)):
        n = round(ratio * known.sum() * prior[j] / max(prior.sum(), 1))
        mine = np.sort(sure[labels == j])[::-1]
        if n and len(mine):
            threshold = mine[min(n, len(mine)) - 1]
            reached |= (labels == j) & (sure >= threshold)
            shares[j] = min(1.0, n / (mine >= threshold).sum())
    return reached, shares


def reached_by(chosen, labels, levels):
    """Which labeled positions a selection takes into account, before it draws among them."""
    classes = np.minimum(labels, len(chosen.lowest) - 1)
    return (labels != 255) & (levels >= chosen.lowest[classes])


@pytest.mark.parametrize("precision", ["float16", "stored"])
@pytest.mark.parametrize("case", CASES)
def test_dars_is_a_ranking_of_all_positions(case, precision):
    labels, levels, prior = CASES[case]
    counts = selection.count(labels, levels, len(prior))
    for ratio in RATIOS:
        chosen = Aligned(ratio, precision=precision)(counts, prior)
        reached, shares = algorithm_1(labels, levels, prior, ratio, precision)
        np.testing.assert_array_equal(reached_by(chosen, labels, levels), reached)
        there = np.unique(labels[reached])
        np.testing.assert_allclose(chosen.share[there], shares[there], rtol=1e-12)
        # Distribution alignment alone has the same thresholds, and keeps all above them.
        alone = Aligned(ratio, sample=False, precision=precision)(counts, prior)
        np.testing.assert_array_equal(alone.lowest, chosen.lowest)
        assert (alone.share == 1).all()


@pytest.mark.parametrize("per_class", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_surest_share_is_a_ranking_of_all_positions(case, per_class):
    labels, levels, prior = CASES[case]
    counts, known = selection.count(labels, levels, len(prior)), labels != 255
    for ratio in RATIOS:
        chosen = TopShare(ratio, per_class=per_class)(counts, prior)
        groups = [labels == j for j in range(len(prior))] if per_class else [known]
        expected = np.zeros(labels.shape, bool)
        for group in groups:
            ranked, n = np.sort(levels[group])[::-1], math.ceil(round(ratio * group.sum(), 6))
            if n:
                expected |= group & (levels >= ranked[n - 1])
        np.testing.assert_array_equal(reached_by(chosen, labels, levels), expected)
        assert (chosen.share == 1).all()


@pytest.mark.parametrize(
    ("ratio", "count", "kept"), [(0.6, 5, 3), (0.2, 5, 1), (0.21, 5, 2), (0.7, 10, 7), (1.0, 7, 7)]
)
def test_shares_are_of_whole_positions(ratio, count, kept):
    levels = 100 * np.arange(count)
    labels = np.zeros(count, np.uint8)
    chosen = TopShare(ratio)(selection.count(labels, levels, 2), np.zeros(2, np.int64))
    assert reached_by(chosen, labels, levels).sum() == kept


@pytest.mark.parametrize("limit", [0.0, 0.5, 0.95, 0.999, 1.0])
def test_threshold_keeps_what_is_as_sure(limit):
    counts, prior = np.zeros((3, LEVELS), np.int64), np.zeros(3, np.int64)
    chosen = Threshold(limit)(counts, prior)
    assert (chosen.share == 1).all()
    assert len(set(chosen.lowest)) == 1
    doubt = 1 - limit
    above, below = selection.to_level(1 - doubt * 0.9996), selection.to_level(1 - doubt * 1.0004)
    assert above >= chosen.lowest[0]
    assert below < chosen.lowest[0] or limit in (0.0, 1.0)
    assert limit == 1.0 or chosen.lowest[0] < LEVELS - 1


def test_levels_rank_like_confidences():
    confidence = selection.confidence(np.arange(LEVELS))
    assert confidence.dtype == np.float32
    assert (confidence[0], confidence[-1]) == (0.0, 1.0)
    assert (np.diff(confidence) >= 0).all()
    # From a doubt of 2e-4 on float32 tells the levels apart.
    coarse = np.arange(25_000)
    np.testing.assert_array_equal(selection.to_level(confidence[coarse]), coarse)
    assert selection.to_level(np.float32([0, 1])).tolist() == [0, LEVELS - 1]


def test_a_level_is_a_fixed_share_of_the_doubt():
    doubt = np.geomspace(1, 2.0**-31.9, 5000)
    levels = selection.to_level(1 - doubt[doubt > 1e-9])
    found = 2.0 ** (-levels / 2048)
    # Half a level is half of 0.034 %; float64 confidences near 1 add their own rounding.
    assert abs(found / doubt[doubt > 1e-9] - 1).max() < 0.000_17 + 1e-6
    assert selection.to_level(1 - 2.0**-31) == 31 * 2048


def test_counts_are_of_each_class_and_level():
    labels = np.array([[0, 2, 2], [255, 2, 0]], np.uint8)
    levels = np.array([[5, 7, 7], [7, 8, LEVELS - 1]], np.uint16)
    counts = selection.count(labels, levels, 3)
    assert (counts.shape, counts.dtype) == ((3, LEVELS), np.int64)
    found = {(int(c), int(b)): int(counts[c, b]) for c, b in np.argwhere(counts)}
    assert found == {(0, 5): 1, (0, LEVELS - 1): 1, (2, 7): 2, (2, 8): 1}


def test_what_is_drawn_is_as_large_as_the_share():
    shape, shares = (300, 400), np.array([0.0, 0.37, 0.9, 1.0])
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, shape, np.uint8)
    levels = rng.integers(0, 100, shape)
    chosen = Selection(np.array([0, 50, 20, 0]), shares)
    reached = reached_by(chosen, labels, levels)
    drawn = [
        selection.select(labels, levels, chosen, np.random.default_rng(seed)) for seed in range(5)
    ]
    for kept in drawn:
        assert kept.dtype == np.uint8
        known = kept != 255
        np.testing.assert_array_equal(kept[known], labels[known])
        assert reached[known].all()
        for j, share in enumerate(shares):
            n = (reached & (labels == j)).sum()
            spread = math.sqrt(n * share * (1 - share))
            assert abs((kept == j).sum() - n * share) <= 5 * spread
    # Seeds are independent: two keep together what chance lets expect.
    n = (reached & (labels == 1)).sum()
    both = ((drawn[0] == 1) & (drawn[1] == 1)).sum()
    assert both == pytest.approx(n * 0.37**2, abs=5 * math.sqrt(n * 0.37**2))


def test_selecting_twice_changes_nothing():
    labels, levels, prior = simulated(step=3000)
    chosen = Aligned(0.3)(selection.count(labels, levels, 5), prior)
    assert ((chosen.share > 0) & (chosen.share < 1)).any()
    once = selection.select(labels, levels, chosen, np.random.default_rng(7))
    twice = selection.select(once, levels, chosen, np.random.default_rng(7))
    np.testing.assert_array_equal(twice, once)
    assert (once != labels).any()
    other = selection.select(labels, levels, chosen, np.random.default_rng(8))
    assert (other != once).any()


def test_pseudo_labels_of_dars_are_distributed_like_the_labels():
    """Table 5: a divergence of .0005, where one threshold leaves .0491. Predictions lean to the
    frequent classes, which are also those that the network is surest of.
    """
    rng = np.random.default_rng(0)
    prior = np.array([0.45, 0.3, 0.15, 0.06, 0.04])
    predicted = prior**1.3 / (prior**1.3).sum()
    images = []
    for _ in range(20):
        labels = rng.choice(5, (64, 64), p=predicted).astype(np.uint8)
        sure = rng.gamma(2, 9000 * prior[labels] ** 0.3)
        images.append((labels, np.minimum(sure, LEVELS - 1).astype(np.int64)))
    counts = sum(selection.count(*image, 5) for image in images)
    pixels = (10**9 * prior).astype(np.int64)
    divergence = {}
    for name, rule in {"dars": Aligned(0.2), "st": TopShare(0.2, per_class=False)}.items():
        chosen = rule(counts, pixels)
        draws = np.random.default_rng(1)
        kept = np.concatenate([selection.select(*image, chosen, draws) for image in images])
        number = np.bincount(kept[kept != 255], minlength=5)
        assert number.sum() == pytest.approx(0.2 * 20 * 64**2, rel=0.02)
        divergence[name] = (prior * np.log(prior / (number / number.sum()))).sum()
    assert divergence["dars"] < 0.0005
    assert divergence["st"] > 0.03


def test_histograms_do_not_grow_with_the_images():
    labels, levels, prior = simulated(step=3000, count=10**5)

    def peak(chunks):
        tracemalloc.start()
        total = np.zeros((5, LEVELS), np.int64)
        for _ in range(chunks):
            total += selection.count(labels, levels, 5) * 1000  # as of a thousand such images
        chosen = Aligned(0.2)(total, prior)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most, total, chosen

    few, _, expected = peak(2)
    many, total, chosen = peak(11)
    assert many <= 1.01 * few
    assert few < 20 * total.nbytes
    assert total.sum() == 11_000 * (labels != 255).sum() > 10**9
    # A multiple of all counts has the same thresholds, but for the rounding of what is wanted.
    np.testing.assert_array_equal(chosen.lowest, expected.lowest)
    np.testing.assert_allclose(chosen.share, expected.share, rtol=1e-3)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("threshold:0.9", Threshold(0.9)),
        ("top:0.2", TopShare(0.2, per_class=False)),
        ("balanced:1", TopShare(1.0)),
        ("aligned:0.5", Aligned(0.5)),
    ],
)
def test_rules_by_name(text, rule):
    assert selection.parse(text) == rule


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("best:0.5", r"Unknown rule 'best:0.5'.*threshold:C.*top:SHARE.*balanced:.*aligned:"),
        ("", "Unknown rule"),
        ("aligned", "needs a number: aligned:0.5"),
        ("top:half", "needs a number: top:0.5"),
        ("balanced:1.5", "share of 1.5 is not from 0 to 1"),
        ("aligned:-0.1", "share of -0.1"),
        ("threshold:95", "threshold of 95.0"),
        ("threshold:nan", "threshold of nan"),
    ],
)
def test_rules_that_do_not_exist_are_refused(text, words):
    with pytest.raises(UserError, match=words):
        selection.parse(text)


def test_a_precision_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="'float32' is neither 'float16' nor 'stored'"):
        Aligned(0.5, precision="float32")


@pytest.mark.parametrize("case", CASES)
def test_error_rates_are_those_of_the_surest(case):
    labels, levels, _ = CASES[case]
    right = np.random.default_rng(2).random(labels.shape) < 0.6 + levels / (3 * LEVELS)
    known, wrong = (selection.count(labels[x], levels[x], 5) for x in (labels < 9, ~right))
    found = selection.error_rates(known, wrong)
    for c, i in np.ndindex(found.shape):
        mine, errors = levels[labels == c], ~right[labels == c]
        ranked = np.sort(mine)[::-1]
        if not len(ranked):
            assert np.isnan(found[c, i])
            continue
        last = ranked[math.ceil(SHARES[i] * len(ranked)) - 1]
        assert found[c, i] == pytest.approx(errors[mine >= last].mean())
    assert case == "nothing" or np.nanmax(found) > 0
