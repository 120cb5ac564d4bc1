import collections
import dataclasses
import json

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import (
    OPTIMIZER,
    Linear,
    cross_entropy,
    forward,
    make_state,
    nearest,
    plan,
    random_batch,
)
from ml_collections import ConfigDict

from jaxssl import config as configs
from jaxssl import (
    contracts,
    memory_bank,
    methods,
    mixing,
    models,
    optim,
    phases,
    sampling,
    sharding,
)
from jaxssl.checkpoint import Checkpoints
from jaxssl.contracts import UserError
from jaxssl.methods import u2pl
from jaxssl.step import Clock, make_train_step

C, E, SIZE, HALF = 6, 5, (16, 24), (8, 12)
MASK = np.random.default_rng(1).random((4, *SIZE)) < 0.4
SMALL = {"num_anchors": 3, "num_negatives": 4, "keys": 6, "capacity": 9, "capacity_0": 11}

SETTINGS = [
    {},
    {"teacher_forwards": "one"},
    {"teacher_stats": "own"},
    {"teacher_forwards": "one", "teacher_stats": "own"},
    {"alpha_0": 60.0, "dynamic": False, "eta": 0.5},
    {"positive": "released", "contrast_mean": "present"},
    {"negatives": "released"},
    {"negative_pixels": "reliable", "alpha_0": 50.0},
    {"negative_pixels": "all"},
    {"probability_rank": False},
    {"rank_low": 1, "rank_high": 3},
    {"rank_low": 9, "rank_high": 20},
    {"memory_bank": False},
    {"bank_dtype": "bfloat16"},
    {"lambda_c": 0.0},
    {"anchor_threshold": 0.6, "temperature": 0.2, "lambda_c": 1.0},
    {"anchor_threshold": 1.0},
    {"ohem": True, "ohem_threshold": 0.2, "ohem_min_kept": 40},
]


def name_of(settings):
    return "-".join(f"{key}={value}" for key, value in settings.items()) or "default"


def softmax(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def ranks_of(p):
    """Position of each class among the probabilities, from the largest on."""
    order = np.argsort(-p, axis=-1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(p.shape[-1]), p.shape), -1)
    return ranks


def contrast(anchor, positive, negatives, temperature):
    """Equation 4 of one anchor."""

    def cosine(x, y):
        length = np.linalg.norm(x) * np.linalg.norm(y)
        return x @ y / length if length else 0.0

    odds = [np.exp(cosine(anchor, key) / temperature) for key in (positive, *negatives)]
    return -np.log(odds[0] / sum(odds))


def test_entropy_is_equation_5():
    logits = np.random.default_rng(0).normal(0, 5, (3, 4, C))
    logits[0, 0] = [900, 0, 0, 0, -900, 0]
    with jax.enable_x64(True):
        found = u2pl.entropy(jnp.asarray(logits))
    np.testing.assert_allclose(found, scipy.stats.entropy(softmax(logits), axis=-1), atol=1e-14)


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.9])
def test_alpha_is_equation_7(progress):
    assert u2pl.Method().alpha(progress) == pytest.approx(20 * (1 - progress))
    assert u2pl.Method(alpha_0=30.0, dynamic=False).alpha(progress) == 30


@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
def test_pseudo_labels_are_equation_6(progress):
    logits = np.random.default_rng(0).normal(0, 2, (2, 7, 9, C))
    logits[0, :3] = logits[0, 0, 0]
    entropies = scipy.stats.entropy(softmax(logits), axis=-1)
    gamma = np.percentile(entropies, 100 - 20 * (1 - progress))
    with jax.enable_x64(True):
        found = u2pl.Method().pseudo_labels(jnp.asarray(logits), progress=progress)
    assert found.dtype == jnp.uint8
    np.testing.assert_array_equal(found, np.where(entropies < gamma, logits.argmax(-1), 255))
    assert (np.asarray(found) == 255).any()  # at the end still the least sure one


def test_padding_is_not_compared():
    logits = np.random.default_rng(0).normal(0, 2, (2, 7, 9, C)).astype(np.float32)
    valid = np.ones((2, 7, 9), bool)
    valid[1, :, 4:] = False
    logits[~valid] = 0  # less sure than all others
    entropies = scipy.stats.entropy(softmax(logits), axis=-1)
    gamma = np.percentile(entropies[valid], 90)
    found = u2pl.Method().pseudo_labels(jnp.asarray(logits), valid=jnp.asarray(valid), progress=0.5)
    expected = np.where(entropies < gamma, logits.argmax(-1), 255)
    np.testing.assert_array_equal(np.asarray(found)[valid], expected[valid])
    assert 0 < (expected[valid] == 255).sum() < (~valid).sum()


def test_pixels_as_sure_as_each_other_teach_nothing():
    labels = u2pl.Method().pseudo_labels(jnp.ones((1, 2, 3, C)), progress=0.5)
    assert (labels == 255).all()


@pytest.mark.parametrize(("kept", "weight"), [(12, 1.0), (3, 4.0), (0, 0.0)])
def test_weight_is_equation_8(kept, weight):
    """However large the crop is in which these twelve pixels stand."""
    labels, valid = np.full((2, 2, 3), 255, np.uint8), np.ones((2, 2, 3), bool)
    labels.ravel()[:kept] = 1
    for size in (0, 5):
        edges = ((0, 0), (0, size), (0, size))
        padded = np.pad(labels, edges, constant_values=255), np.pad(valid, edges)
        assert u2pl.unsupervised_weight(*padded, 1.5) == pytest.approx(1.5 * weight)


def test_anchors_are_equations_9_to_11():
    rng = np.random.default_rng(0)
    p, labels = softmax(rng.normal(0, 2, (200, C))), rng.integers(0, C + 1, 200).astype(np.uint8)
    labels[labels == C] = 255
    found = u2pl.anchor_classes(jnp.asarray(p), jnp.asarray(labels), 0.3)
    expected = [y if y != 255 and q[y] > 0.3 else 255 for q, y in zip(p, labels, strict=True)]
    assert found.tolist() == expected
    assert found.dtype == jnp.uint8


def test_order_counts_more_probable_classes():
    p = softmax(np.random.default_rng(0).normal(size=(50, C))).astype(np.float32)
    p[:10, 1::2] = p[:10, :1]
    p[10] = 1 / C
    order = u2pl.class_order(jnp.asarray(p))
    np.testing.assert_array_equal(order, ranks_of(p))
    assert np.take_along_axis(np.asarray(order), p.argmax(-1)[:, None], 1).max() == 0


@pytest.mark.parametrize(
    ("num_classes", "limits"), [(2, (1, 20)), (3, (1, 20)), (4, (3, 20)), (21, (3, 20))]
)
def test_limits_of_ranks_shrink_with_the_classes(num_classes, limits):
    assert u2pl.rank_limits(3, 20, num_classes) == limits
    notes = u2pl.Method().notes(num_classes)
    assert len(notes) == (limits[0] != 3)
    assert all("--config.method.rank_low=1" in note for note in notes)
    assert not u2pl.Method(probability_rank=False).notes(num_classes)
    assert not u2pl.Method(rank_low=1).notes(num_classes)


@pytest.mark.parametrize("limits", [(3, 20), (1, 3), (2, 4), (3, 256), None])
def test_negatives_are_equations_13_to_15(limits):
    rng = np.random.default_rng(0)
    labels, labeled = rng.integers(0, C, 60).astype(np.uint8), rng.random(60) < 0.5
    ranks = ranks_of(rng.random((60, C)))
    low, high = limits or (C, C)
    for c in range(C):
        rank = jnp.asarray(ranks[:, c], jnp.uint8)
        found = u2pl.is_negative(c, labels, rank, jnp.asarray(labeled), limits)
        for j in range(60):
            if labeled[j]:
                expected = labels[j] != c and 0 <= ranks[j, c] < low
            else:
                expected = limits is None or low <= ranks[j, c] < high
            assert found[j] == expected


def test_info_nce_is_equation_4():
    rng = np.random.default_rng(0)
    anchors, positive, negatives = (rng.normal(size=s) for s in ((3, E), (E,), (3, 4, E)))
    with jax.enable_x64(True):
        run = jax.value_and_grad(u2pl.info_nce, (0, 1, 2))
        value, gradients = run(anchors, positive, negatives, 0.5)
    terms = [contrast(a, positive, n, 0.5) for a, n in zip(anchors, negatives, strict=True)]
    np.testing.assert_allclose(value, np.mean(terms), rtol=1e-12)
    assert not gradients[1].any()
    assert not gradients[2].any()

    step = np.zeros((3, E))
    step[1, 2] = 1e-6
    ends = [contrast((anchors + s)[1], positive, negatives[1], 0.5) / 3 for s in (step, -step)]
    np.testing.assert_allclose(gradients[0][1, 2], (ends[0] - ends[1]) / 2e-6, rtol=1e-6)


def test_gradient_at_nothing_is_nothing():
    zero = np.zeros((2, E), np.float32)
    value, gradient = jax.value_and_grad(u2pl.info_nce)(zero, zero[0], zero[:, None], 0.5)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    assert not gradient.any()


def cutmix(mask, x):
    return np.where(mask.reshape(mask.shape + (1,) * (x.ndim - 3)), x, np.roll(x, -1, 0))


@pytest.fixture
def fixed(monkeypatch):
    """A CutMix mask and draws that NumPy can repeat: what comes first, again and again."""

    def draw(key, mask, number, *, replace):
        there = mask.sum(dtype=jnp.int32)
        ranks = jnp.arange(number) % jnp.maximum(there, 1)
        drawn = jnp.where(there > 0, number, 0) if replace else jnp.minimum(there, number)
        return jnp.searchsorted(jnp.cumsum(mask), ranks, side="right") % len(mask), drawn

    def oldest_first(bank, c, key, shape):
        i = jnp.arange(shape[0] * shape[1]).reshape(shape)
        slots = (bank.position[c] - bank.fill[c] + i % bank.fill[c]) % bank.length[c]
        return bank.keys[c, slots].astype(jnp.float32)

    monkeypatch.setattr(mixing, "box_mask", lambda *args, **kwargs: jnp.asarray(MASK))
    monkeypatch.setattr(sampling, "draw", draw)
    monkeypatch.setattr(memory_bank, "draw", oldest_first)


FIRST = np.random.default_rng(2).normal(size=(C, 5, E)), np.array([5, 0, 3, 5, 5, 0], np.int32)
"""Keys that the bank holds before, and how many of each class."""


def rounded(keys, method):
    return np.float64(jnp.asarray(keys).astype(method.bank_dtype))


def bank_before(method):
    """The memory bank as queues."""
    lengths = [method.capacity_0] + [method.capacity] * (C - 1)
    queues = [collections.deque(maxlen=length) for length in lengths]
    if method.memory_bank:
        for queue, keys, count in zip(queues, *FIRST, strict=True):
            queue.extend(rounded(keys[:count], method))
    return queues


def held(bank, c):
    """Keys of a class in the bank, in the order in which they came."""
    fill, position, length = (int(x[c]) for x in (bank.fill, bank.position, bank.length))
    return np.float64(bank.keys[c, (position - fill + np.arange(fill)) % length])


def cycled(rows, number):
    return [rows[i % len(rows)] for i in range(number)]


def reference_contrast(method, queues, z, teacher_z, p, label, known, candidate, labeled):
    """Algorithm 1 on pixels: Lc; the queues are filled."""
    total, ranks = 0.0, ranks_of(p)
    low, high = method.rank_low if method.rank_low < C else C // 2, method.rank_high
    M, N = method.num_anchors, method.num_negatives
    for c, queue in enumerate(queues):
        rank = ranks[:, c]
        of_labeled, of_others = rank < low, (rank >= low) & (rank < high)
        if not method.probability_rank:
            of_labeled = of_others = True
        negative = candidate & np.where(labeled, (known != c) & of_labeled, of_others)
        if method.negatives == "released":
            negative &= known == c
        queue.extend(rounded(teacher_z[negative][: method.keys], method))
        anchors = (label == c) & (p[:, c] > method.anchor_threshold)
        if not anchors.any() or not queue:
            continue
        positive = teacher_z[anchors if method.positive == "paper" else label == c].mean(0)
        negatives = np.reshape(cycled(queue, M * N), (M, N, -1))
        for anchor, keys in zip(cycled(z[anchors], M), negatives, strict=True):
            total += contrast(anchor, positive, keys, method.temperature) / M
    present = len(set(label.tolist()) - {255})
    return total / (C if method.contrast_mean == "all" else present)


def hard(logits, labels, method):
    """Labels of hard pixels alone (`losses.ohem_cross_entropy` is tested on its own)."""
    if not method.ohem:
        return labels
    p = np.take_along_axis(softmax(logits), np.minimum(labels, C - 1)[..., None], -1)[..., 0]
    p[labels == 255] = 1
    least = method.ohem_min_kept * len(labels)
    limit = max(method.ohem_threshold, np.sort(p.ravel())[least - 1])
    return np.where(p <= limit, labels, 255)


def reference(method, state, batch, progress, queues):
    """Equation 1 in NumPy: the loss, its parts, and the teacher's new statistics."""
    labeled, weak, teacher = batch["labeled"], batch["unlabeled"], state.network("teacher_a")
    mixed = {k: cutmix(MASK, x) for k, x in weak.items()}
    n, own, truth = len(labeled["label"]), method.teacher_stats == "own", labeled["label"]

    def both(unlabeled):
        return (np.concatenate([labeled[k], unlabeled[k]]) for k in ("image", "valid"))

    if method.teacher_forwards == "two":
        first, _, _ = forward(teacher, weak["image"], weak["valid"], False)
        pseudo = cutmix(MASK, nearest(first, SIZE).argmax(-1))
        small, teacher_z, new_stats = forward(teacher, *both(mixed), own)
        full = nearest(small[n:], SIZE)
    else:
        small, teacher_z, new_stats = forward(teacher, *both(weak), own)
        full = cutmix(MASK, nearest(small[n:], SIZE))
        pseudo = full.argmax(-1)
        for x in (small, teacher_z):
            x[n:] = cutmix(nearest(MASK, HALF), x[n:])
    entropies, valid = scipy.stats.entropy(softmax(full), axis=-1), mixed["valid"]
    alpha = method.alpha_0 * (1 - progress if method.dynamic else 1)
    gamma = np.percentile(entropies[valid], 100 - alpha)
    pseudo = np.where(valid, pseudo, 255)
    taught = np.where(entropies < gamma, pseudo, 255)
    kept = (taught != 255).sum()

    logits, z, _ = forward(state.network("a"), *both(mixed))
    large = nearest(logits, SIZE)
    parts = {
        "loss_supervised": cross_entropy(large[:n], hard(large[:n], truth, method))
        + 0.4 * cross_entropy(2 * large[:n], hard(2 * large[:n], truth, method)),
        "loss_unsupervised": cross_entropy(large[n:], taught),
        "weight_unsupervised": method.eta * valid.sum() / kept,
        "kept": kept / valid.sum(),
    }
    loss = parts["loss_supervised"] + parts["weight_unsupervised"] * parts["loss_unsupervised"]
    if method.lambda_c:
        candidate = {
            "unreliable": valid & (entropies >= gamma),
            "reliable": valid & (entropies <= np.percentile(entropies[valid], alpha)),
            "all": valid,
        }[method.negative_pixels]
        pixels = [
            nearest(np.concatenate(pair), HALF).ravel()
            for pair in (
                (truth, taught),
                (truth, pseudo),
                (truth != 255, candidate),
                (np.ones_like(valid), np.zeros_like(valid)),
            )
        ]
        flat = (x.reshape(-1, x.shape[-1]) for x in (z, teacher_z, softmax(small)))
        parts["loss_contrast"] = reference_contrast(method, queues, *flat, *pixels)
        loss += method.lambda_c * parts["loss_contrast"]
    return loss, parts, new_stats


NET = Linear(num_classes=C, auxiliary=True)


def distinct_state(method, net=NET):
    """A state whose teacher differs from the student, and whose bank holds something."""
    state = make_state(method, {"a": net}, size=SIZE)
    params, _ = net.init(jax.random.key(7), SIZE)
    stats = {"mean": jnp.array([0.1, -0.2, 0.05])}
    state = state.with_network("teacher_a", contracts.Variables(params, stats))
    if "bank" not in state.extra or net.num_classes != C:
        return state
    keys, count = FIRST
    bank = memory_bank.push(state.extra["bank"], jnp.asarray(keys), jnp.asarray(count))
    return state.replace(extra={"bank": bank})


def doubled(tree):
    """Floats in float64; the bank, whose precision is a setting, stays."""

    def leaf(x):
        return x.astype(jnp.float64) if x.dtype == jnp.float32 else x

    changed = {"params", "stats", "teacher_params", "teacher_stats"}
    return tree.replace(**{k: jax.tree.map(leaf, getattr(tree, k)) for k in changed})


def loss_of(method, batch, net=NET, progress=0.3, seed=0):
    """`method.loss` in the main phase as a function of the parameters and the state."""
    phase = method.phases(plan())[-1]

    def loss(params, state):
        return method.loss(
            {"a": net},
            params,
            state,
            {},
            batch,
            jax.random.key(seed),
            phase=phase,
            progress=progress,
        )

    return loss


def image_batch(seed=0, images=4, num_classes=C):
    return random_batch(seed, images=images, size=SIZE, num_classes=num_classes)


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
@pytest.mark.usefixtures("fixed")
def test_loss_is_equation_1(settings):
    method, batch = u2pl.Method(cutmix=1.0, **{**SMALL, **settings}), image_batch()
    queues = bank_before(method)
    with jax.enable_x64(True):
        state = doubled(distinct_state(method))
        loss, aux = jax.device_get(jax.jit(loss_of(method, batch))(state.params, state))
        expected, parts, stats = reference(method, state, batch, 0.3, queues)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for name, part in parts.items():
        value, count = aux.metrics[name]
        np.testing.assert_allclose(value / count, part, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(aux.teacher_stats["a"]["mean"], stats["mean"], rtol=1e-9)
    if "bank" in aux.extra:
        bank, filled = aux.extra["bank"], [len(queue) for queue in queues]
        assert bank.fill.tolist() == filled
        share, of = aux.metrics["bank"]
        assert (int(share), int(of)) == (sum(filled), sum(queue.maxlen for queue in queues))
        for c, queue in enumerate(queues):
            expected = np.reshape(queue, (-1, E))
            np.testing.assert_allclose(held(bank, c), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("fixed")
def test_gradient_is_the_slope_of_equation_1():
    """Also where nothing else has one: the student's representation in Lc."""
    method, batch = u2pl.Method(cutmix=1.0, lambda_c=3.0, **SMALL), image_batch()
    with jax.enable_x64(True):
        state = doubled(distinct_state(method))
        gradient = jax.jit(jax.grad(loss_of(method, batch), has_aux=True))
        grads, _ = jax.device_get(gradient(state.params, state))
        direction = np.random.default_rng(0).normal(size=(3, E))

        def moved(step):
            params, stats = state.network("a")
            kernel = params["backbone"]["kernel"] + step * direction
            there = contracts.Variables({**params, "backbone": {"kernel": kernel}}, stats)
            return reference(
                method, state.with_network("a", there), batch, 0.3, bank_before(method)
            )[0]

        slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    np.testing.assert_allclose(
        (grads["a"]["backbone"]["kernel"] * direction).sum(), slope, rtol=1e-6
    )


@pytest.mark.parametrize(
    "settings", [{}, {"teacher_forwards": "one", "teacher_stats": "own", "positive": "released"}]
)
def test_gradients_reach_the_student_alone(settings):
    method, batch = u2pl.Method(**SMALL, **settings), image_batch()
    state = distinct_state(method)
    loss = loss_of(method, batch)

    def of_everything(params, teacher, keys):
        bank = dataclasses.replace(state.extra["bank"], keys=keys)
        return loss(params, state.replace(teacher_params=teacher, extra={"bank": bank}))[0]

    given = state.params, state.teacher_params, state.extra["bank"].keys
    student, *others = jax.jit(jax.grad(of_everything, (0, 1, 2)))(*given)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(student))
    assert all(np.abs(leaf).max() == 0 for leaf in jax.tree.leaves(others))


def without_labels(batch):
    batch["labeled"]["label"][:] = 255


def without_pixels(batch):
    without_labels(batch)
    for stream in batch.values():
        stream["valid"][:] = False


def with_one_class(batch):
    batch["labeled"]["label"][:] = 2


@pytest.mark.parametrize("settings", [{}, {"alpha_0": 100.0, "dynamic": False}], ids=name_of)
@pytest.mark.parametrize("change", [without_labels, without_pixels, with_one_class])
@pytest.mark.parametrize("contrast_mean", ["all", "present"])
def test_where_something_is_missing_all_stays_finite(change, settings, contrast_mean):
    method = u2pl.Method(contrast_mean=contrast_mean, **SMALL, **settings)
    batch, state = image_batch(), make_state(method, {"a": NET}, size=SIZE)
    change(batch)
    run = jax.jit(jax.value_and_grad(loss_of(method, batch), has_aux=True))
    (loss, aux), grads = run(state.params, state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, aux, grads)))
    if change is without_pixels:
        assert float(loss) == 0
        assert not any(leaf.any() for leaf in jax.tree.leaves((grads, aux.extra["bank"].fill)))


@pytest.mark.parametrize("settings", [{"anchor_threshold": 1.0}, {"negatives": "released"}])
def test_contrast_without_anchors_or_negatives_is_exactly_nothing(settings):
    """Released, one consistent prediction leaves no negatives: no class ranks first and third."""
    method = u2pl.Method(**SMALL, **settings, teacher_forwards="one", lambda_c=1.0)
    batch, state = image_batch(), make_state(method, {"a": NET}, size=SIZE)
    run = jax.jit(jax.value_and_grad(loss_of(method, batch), has_aux=True))
    (loss, aux), grads = run(state.params, state)
    parts = {name: float(value) for name, (value, _) in aux.metrics.items()}
    assert parts["loss_contrast"] == 0
    if "negatives" in settings:
        assert parts["anchors"] > 0
        assert parts["bank"] == 0
    rest = parts["loss_supervised"] + parts["weight_unsupervised"] * parts["loss_unsupervised"]
    np.testing.assert_allclose(loss, rest, rtol=1e-6)
    without = dataclasses.replace(method, lambda_c=0.0)
    expected, _ = jax.grad(loss_of(without, batch), has_aux=True)(
        state.params, state.replace(extra={})
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), grads, expected
    )


@pytest.mark.parametrize("num_classes", [2, 3])
def test_few_classes_have_negatives_and_contrast(num_classes):
    net = Linear(num_classes=num_classes)
    method, batch = u2pl.Method(**SMALL), image_batch(num_classes=num_classes)
    state = distinct_state(method, net)
    run = jax.jit(jax.value_and_grad(loss_of(method, batch, net), has_aux=True))
    (_, aux), grads = run(state.params, state)
    assert (aux.extra["bank"].fill > 0).all()
    assert float(aux.metrics["loss_contrast"][0]) > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_what_stands_in_padding_changes_nothing():
    method, batch, other = u2pl.Method(cutmix=1.0, **SMALL), image_batch(), image_batch(1)
    state = distinct_state(method)
    changed = {
        name: {
            **stream,
            "image": np.where(stream["valid"][..., None], stream["image"], other[name]["image"]),
        }
        for name, stream in batch.items()
    }
    assert (changed["unlabeled"]["image"] != batch["unlabeled"]["image"]).any()
    runs = [
        jax.jit(jax.value_and_grad(loss_of(method, b), has_aux=True))(state.params, state)
        for b in (batch, changed)
    ]
    jax.tree.map(np.testing.assert_array_equal, *runs)


@pytest.mark.parametrize(
    ("probability", "low", "high"), [(0.0, 0, 0), (0.5, 60, 140), (1.0, 200, 200)]
)
def test_a_coin_for_the_batch_says_whether_it_is_mixed(probability, low, high):
    method = u2pl.Method(cutmix=probability)
    draw = jax.jit(jax.vmap(lambda key: method._mask(key, (3, *SIZE))))
    masks = np.asarray(draw(jax.random.split(jax.random.key(0), 200)))
    mixed = ~masks.all((2, 3))
    assert (mixed.all(1) == mixed.any(1)).all()
    assert low <= mixed.any(1).sum() <= high
    areas = masks[mixed].mean((1, 2))
    np.testing.assert_allclose(areas, 0.5, atol=0.5 / SIZE[0])


@pytest.mark.parametrize("teacher_stats", ["ema", "own"])
@pytest.mark.parametrize("teacher_forwards", ["two", "one"])
def test_forward_passes(teacher_stats, teacher_forwards):
    """Labeled and unlabeled images together; only the student sees dropout."""
    calls = []

    class Recording(Linear):
        def apply(self, params, stats, image, *, valid=None, batch_stats, key=None):
            calls.append((image.shape[0], batch_stats, key is not None))
            return super().apply(params, stats, image, valid=valid, batch_stats=batch_stats)

    method = u2pl.Method(teacher_stats=teacher_stats, teacher_forwards=teacher_forwards, **SMALL)
    batch = image_batch()
    batch["unlabeled"] = jax.tree.map(lambda x: x[:3], batch["unlabeled"])
    state = make_state(method, {"a": NET})
    jax.eval_shape(loss_of(method, batch, Recording(C)), state.params, state)
    first = [(3, False, False)] if teacher_forwards == "two" else []
    assert calls == [*first, (7, teacher_stats == "own", False), (7, True, True)]


def test_warm_up_learns_from_the_labels_alone_and_the_teacher_copies():
    method = u2pl.Method(**SMALL, ohem=True, ohem_threshold=0.2, ohem_min_kept=40)
    warmup, main = method.phases(plan(steps=7, warmup=3))
    assert [(p.name, p.steps, p.optimizer, p.schedule) for p in (warmup, main)] == [
        ("warmup", 3, "fresh", (0, 10)),
        ("main", 7, "continue", (3, 10)),
    ]
    decays = method.ema_decay(main, jnp.array([0, 1, 4, 98, 99, 500]))
    np.testing.assert_allclose(decays, [0, 1 / 2, 4 / 5, 98 / 99, 0.99, 0.99], rtol=1e-6)
    batch, state = image_batch(), make_state(method, {"a": NET}, size=SIZE)
    after, metrics = step_of(method, warmup)(
        state, {}, {"labeled": batch["labeled"]}, Clock.of(warmup, 0)
    )
    jax.tree.map(np.testing.assert_array_equal, after.teacher_params, after.params)
    jax.tree.map(np.testing.assert_array_equal, after.teacher_stats, after.stats)
    logits = nearest(forward(state.network("a"), *image_arrays(batch["labeled"]))[0], SIZE)
    expected = sum(
        factor * cross_entropy(x, hard(x, batch["labeled"]["label"], method))
        for factor, x in ((1, logits), (0.4, 2 * logits))
    )
    np.testing.assert_allclose(metrics["loss_supervised"][0], expected, rtol=1e-5)


def image_arrays(stream):
    return stream["image"], stream["valid"]


def step_of(method, phase, net=NET, rate=0.1, **options):
    optimizer, schedule = optim.make_optimizer(OPTIMIZER), optim.make_schedule(OPTIMIZER)
    return make_train_step(
        method, {"a": net}, phase, optimizer, schedule, learning_rate=rate, seed=0, **options
    )


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}], ids=str)
@pytest.mark.parametrize("settings", [{}, {"bank_dtype": "bfloat16", "teacher_stats": "own"}])
def test_state_is_a_fixed_point(settings, options):
    method = u2pl.Method(**SMALL, **settings)
    state, (phase,) = make_state(method, {"a": NET}, size=SIZE), method.phases(plan())
    step = step_of(method, phase, **options)
    after, _ = jax.eval_shape(step, state, {}, image_batch(), Clock.of(phase, 0))
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, after)


def train(devices, parallel="jit", *, steps=2):
    """The state after some steps on noise, its batches split over the devices."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    axis_name = sharding.AXIS if parallel == "pmap" else None
    method, net = u2pl.Method(**SMALL), Linear(C, auxiliary=True, axis_name=axis_name)
    (phase,) = method.phases(plan(images=16))
    step = sharding.parallelize(step_of(method, phase, net, axis_name=axis_name), mesh, parallel)
    everywhere = sharding.replicated(mesh)
    state = doubled(distinct_state(method))
    optimizer = optim.make_optimizer(OPTIMIZER)
    state = state.replace(opt_state={"a": optimizer.init(state.params["a"])})
    state, clock = jax.device_put((state, Clock.of(phase, 0)), everywhere)
    for seed in range(steps):
        batch = sharding.to_devices(image_batch(seed, images=16), mesh, parallel)
        state, metrics = step(state, {}, batch, clock)
    return method, state, metrics


def test_devices_do_not_matter():
    """Percentiles, draws and bank are those of the global batch."""
    with jax.enable_x64(True):
        (_, one, metrics), (_, eight, others) = train(1), train(8)
    assert one.params["a"]["head"]["kernel"].dtype == np.float64
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * (1 + np.abs(y).max())),
        (eight.params, eight.teacher_params, eight.extra, others),
        (one.params, one.teacher_params, one.extra, metrics),
    )
    assert float(metrics["loss_contrast"][0]) > 0
    assert (one.extra["bank"].position > 0).all()


def test_under_pmap_the_bank_holds_the_keys_of_all_devices():
    """What each of eight devices pushes is what the loss of its images pushes."""
    with jax.enable_x64(True):
        method, after, _ = train(8, "pmap", steps=1)
        batch, state = image_batch(images=16), doubled(distinct_state(method))
        (phase,) = method.phases(plan(images=16))
        before, queues = state.extra["bank"], bank_before(method)

        @jax.jit
        def push(rows, key):
            given = {"a": NET}, state.params, state, {}, rows, key
            return method.loss(*given, phase=phase, progress=0.0)[1].extra["bank"]

        for i in range(8):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), i)
            own = push(jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], batch), key)
            for c, queue in enumerate(queues):
                pushed = int(own.position[c] - before.position[c]) % queue.maxlen
                queue.extend(held(own, c)[len(held(own, c)) - pushed :])
    bank = after.extra["bank"]
    for c, queue in enumerate(queues):
        np.testing.assert_allclose(held(bank, c), np.reshape(queue, (-1, E)), rtol=1e-5)
    shards = [np.asarray(shard.data) for shard in bank.keys.addressable_shards]
    assert len(shards) == 8
    assert all((shard == shards[0]).all() for shard in shards)


def test_a_network_without_a_representation_is_refused():
    class Plain(Linear):
        def apply(self, *args, **kwargs):
            outputs, stats = super().apply(*args, **kwargs)
            return outputs._replace(embedding=None), stats

    with pytest.raises(UserError, match=r"--config\.model\.embedding=256"):
        make_state(u2pl.Method(), {"a": Plain()})
    assert make_state(u2pl.Method(lambda_c=0.0), {"a": Plain()}).extra == {}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"negatives": "paper"}, "There are: intended, released"),
        ({"bank_dtype": "float16"}, "There are: float32, bfloat16"),
        ({"teacher_forwards": "three"}, "There are: two, one"),
        ({"alpha_0": 120.0}, "is no number from 0 to 100"),
        ({"cutmix": 50}, "is no number from 0 to 1"),
        ({"ohem_threshold": 0.0}, "no number above 0"),
        ({"rank_low": 0}, "leave no ranks"),
        ({"rank_low": 20}, "leave no ranks"),
        ({"temperature": 0.0}, "no number above 0"),
        ({"keys": 0}, "method.keys=0 is no number from 1 on"),
        ({"lambda_c": -0.1}, r"method.lambda_c=-0\.1 is no number from 0 on"),
        ({"eta": float("nan")}, "is no number from 0 on"),
        ({"ohem_min_kept": -1}, "is no number from 0 on"),
        ({"capacity": 512}, "would fill the bank"),
    ],
)
def test_wrong_fields_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        methods.load({"name": "u2pl", **fields})


def small_run(monkeypatch):
    """A run on streets with a network that compiles in no time, on one device."""
    make_mesh, first = sharding.make_mesh, jax.devices()[:1]
    monkeypatch.setattr(models, "load", lambda config, num_classes, **_: Linear(num_classes))
    monkeypatch.setattr(sharding, "make_mesh", lambda devices=None: make_mesh(first))
    config = configs.default()
    configs.use_streets(config, None)
    with config.unlocked():
        config.data.update(size=(16, 32), train_count=20, val_count=4)
    config.update(crop=(16, 32), warmup=3, steps=8, distributed="off")
    config.method = ConfigDict({"name": "u2pl", **SMALL})
    config.optimizer.update(name="sgd", learning_rate=0.1)
    config.log.update(every=1, tensorboard=False)
    config.eval.update(every=100, batch=4, panels=0, bucket=16)
    config.checkpoint.every = 2
    return config


def last_state(workdir):
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        step, _ = checkpoints.latest()
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one),
            dict(checkpoints._manager.item_metadata(step)["state"].tree),
        )
        return jax.device_get(checkpoints.restore(step, shapes))


def test_a_killed_run_goes_on_with_its_bank(monkeypatch, tmp_path):
    class Killed(BaseException):
        pass

    config, save = small_run(monkeypatch), phases.train.save
    assert phases.run(config, tmp_path / "whole") == 0

    def saving(run, index, state, step):
        save(run, index, state, step)
        if step == 7:
            run.checkpoints.wait()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(phases.train, "save", saving)
        with pytest.raises(Killed):
            phases.run(config, tmp_path / "killed")
    assert phases.run(config, tmp_path / "killed") == 0
    whole, killed = (last_state(tmp_path / name) for name in ("whole", "killed"))
    assert sum(whole["extra"]["bank"]["fill"]) > 0
    jax.tree.map(np.testing.assert_array_equal, killed, whole)
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed")]
    assert lines[0] == lines[1]
    last = json.loads(lines[0].splitlines()[-1])
    assert last["step"] == 11


def test_few_classes_are_told(monkeypatch, tmp_path, capsys):
    config = small_run(monkeypatch)
    config.update(warmup=0, steps=1)
    config.method.rank_low = 19
    assert phases.run(config, tmp_path) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Of 19 classes none ranks 19 or lower" in printed
    assert "--config.method.rank_low=9" in printed


def test_losses_fall():
    images = conftest.shapes(size=32)
    batch = {"labeled": images, "unlabeled": {k: images[k] for k in ("image", "valid")}}
    method, net = u2pl.Method(**SMALL, lambda_c=0.5), Linear(3)
    (phase,) = method.phases(plan(60, images=8))
    step, clock = jax.jit(step_of(method, phase, net, rate=0.5)), Clock.of(phase, 0)
    state, seen = make_state(method, {"a": net}, size=(32, 32)), []
    for _ in range(60):
        state, metrics = step(state, {}, batch, clock)
        seen.append({name: float(value / count) for name, (value, count) in metrics.items()})
    for name in ("loss_supervised", "loss_unsupervised", "loss_contrast"):
        first, last = (np.mean([one[name] for one in part]) for part in (seen[1:6], seen[-5:]))
        assert last < 0.8 * first, name
    assert seen[-1]["bank"] == 1
