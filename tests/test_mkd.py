import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    OPTIMIZER,
    Linear,
    Small,
    cross_entropy,
    forward,
    make_state,
    mean_iou,
    nearest,
    plan,
    random_batch,
    shapes,
)

from jaxssl import contracts, methods, mixing, optim, views
from jaxssl.inference import make_predict
from jaxssl.methods import mkd
from jaxssl.step import Clock, make_train_step

C, A, SIZE = 4, 5, (16, 24)
MASK = np.random.default_rng(1).random((4, *SIZE)) < 0.4
OTHER = {"a": "b", "b": "a"}

SETTINGS = [
    {},
    {"teacher": "own"},
    {"teacher": "none"},
    {"strong": False},
    {"feature_augmentation": False},
    {"threshold": 0.6},
    {"consistency_on": "all"},
    {"augment": "all"},
    {"covariance": "full"},
    {"consistency_stride": 8},
    {"weak_photometric": True},
    {"ramp": "linear", "strength": 0.5, "alpha": 0.7, "beta": 0.3},
    {"teacher_stats": "own"},
    {
        "consistency_on": "all",
        "augment": "all",
        "consistency_stride": 8,
        "weak_photometric": True,
        "teacher_stats": "own",
        "threshold": 0.6,
        "teacher": "own",
        "covariance": "full",
    },
]


def name_of(settings):
    return "-".join(f"{key}={value}" for key, value in settings.items()) or "default"


def statistics_of(features, labels, full=False):
    """Moments of `[N,A]` features by class, in NumPy, as the method keeps them."""
    groups = [features[labels == c].astype(np.float64) for c in range(C)]
    mean = [g.mean(0) if len(g) else np.zeros(A) for g in groups]
    spread = [(g - m).T @ (g - m) for g, m in zip(groups, mean, strict=True)]
    m2 = np.stack(spread) if full else np.stack([np.diagonal(s) for s in spread])
    count = np.bincount(labels[labels != 255], minlength=C)
    return mkd.FeatureStatistics(*(jnp.float32(x) for x in (count, np.stack(mean), m2)))


def reference_table(kernel, features, labels, strength, full):
    """Equation 3's term by its definition, a class and a feature at a time."""
    table = np.zeros((C, C))
    for y in range(C):
        of_class = features[labels == y]
        sigma = np.cov(of_class.T, bias=True) if len(of_class) else np.zeros((A, A))
        for j in range(C):
            v = kernel[:, j] - kernel[:, y]
            pairs = [(a, b) for a in range(A) for b in range(A) if full or a == b]
            table[y, j] = strength / 2 * sum(v[a] * sigma[a, b] * v[b] for a, b in pairs)
    return table


def random_features(seed, count=200):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, C - 1, count).astype(np.uint8)
    labels[::7] = 255
    features = rng.normal(size=(count, A)) * rng.uniform(0.2, 2, A) + labels[:, None] % 7
    features[:, 0] += features[:, 1]
    return features.astype(np.float32), labels


BEFORE = random_features(5)  # what networks have seen before the step under test


@pytest.mark.parametrize("full", [False, True])
def test_isda_table_is_equation_3(full):
    features, labels = random_features(0)
    kernel = np.random.default_rng(1).normal(size=(A, C))
    table = mkd.isda_table(jnp.float32(kernel), statistics_of(features, labels, full), 1.3)
    expected = reference_table(kernel, np.float64(features), labels, 1.3, full)
    np.testing.assert_allclose(table, expected, rtol=1e-4, atol=1e-6)
    assert (np.diagonal(table) == 0).all()
    assert (table[C - 1] == 0).all()  # a class never seen


def test_cross_entropy_over_sampled_features_stays_below_the_bound():
    rng = np.random.default_rng(0)
    features, labels = random_features(0)
    kernel, strength, y = rng.normal(size=(A, C)), 0.8, 1
    sigma = np.cov(features[labels == y].T, bias=True)
    center = rng.normal(size=A)
    samples = rng.multivariate_normal(center, strength * sigma, 20_000)
    sampled = cross_entropy(samples @ kernel, np.full(len(samples), y))

    logits = jnp.float32(center @ kernel)[None]
    table = mkd.isda_table(
        jnp.float32(kernel), statistics_of(features, labels, full=True), strength
    )
    bound = cross_entropy(np.array(mkd.augment(logits, jnp.array([y]), table)), np.array([y]))
    assert cross_entropy(np.array(logits), np.array([y])) < sampled < bound


@pytest.mark.parametrize("full", [False, True])
def test_running_statistics_equal_those_of_everything_seen(full):
    batches = [random_features(seed) for seed in range(4)]
    running = mkd.empty_statistics(jnp.zeros((A, C)), full=full)
    for features, labels in batches:
        images = jnp.asarray(features).reshape(10, 20, A), jnp.asarray(labels).reshape(10, 20)
        new = mkd.feature_statistics(*images, like=running)
        running = mkd.merge(running, new)
    features, labels = (np.concatenate(x) for x in zip(*batches, strict=True))
    expected = statistics_of(features, labels, full)
    np.testing.assert_array_equal(running.count, expected.count)
    np.testing.assert_allclose(running.mean, expected.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(running.m2, expected.m2, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("before", [0, 3], ids="{}_batches_before".format)
def test_statistics_of_devices_equal_those_of_everything_seen(full, before):
    """On the last device nothing is labeled, and one class is there on a single one."""
    batches = [random_features(seed) for seed in range(before + 8)]
    batches[-1][1][:] = 255
    for _, labels in batches[:-2]:
        labels[labels == 0] = 255
    old = mkd.empty_statistics(jnp.zeros((A, C)), full=full)
    for features, labels in batches[:before]:
        images = jnp.asarray(features), jnp.asarray(labels)
        old = mkd.merge(old, mkd.feature_statistics(*images, like=old))

    def on_device(features, labels):
        new = mkd.merge(old, mkd.feature_statistics(features, labels, like=old))
        return mkd.merge_devices(old, new, "data")

    of_devices = (np.stack(x) for x in zip(*batches[before:], strict=True))
    found = jax.pmap(on_device, "data", out_axes=None)(*of_devices)
    features, labels = (np.concatenate(x) for x in zip(*batches, strict=True))
    expected = statistics_of(features, labels, full)
    np.testing.assert_array_equal(found.count, expected.count)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.m2, expected.m2, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("full", [False, True])
def test_covariance_has_no_gradient(full):
    features, labels = random_features(0)
    empty = mkd.empty_statistics(jnp.zeros((A, C)), full=full)

    def total(features):
        statistics = mkd.feature_statistics(features, jnp.asarray(labels), like=empty)
        return mkd.isda_table(jnp.eye(A, C), statistics, 1.0).sum()

    assert (jax.grad(total)(jnp.asarray(features)) == 0).all()


@pytest.mark.parametrize("full", [False, True])
def test_absent_classes_keep_their_statistics(full):
    features, labels = random_features(0)
    before = statistics_of(features, labels, full)
    of_class_0 = jnp.array([0, 255] * 4 + [0])
    new = mkd.feature_statistics(jnp.asarray(features[:9]), of_class_0, like=before)
    after = mkd.merge(before, new)
    np.testing.assert_array_equal(after.count, before.count + np.array([5, 0, 0, 0]))
    np.testing.assert_array_equal(after.mean[1:], before.mean[1:])
    np.testing.assert_array_equal(after.m2[1:], before.m2[1:])
    assert (after.mean[0] != before.mean[0]).all()


def test_augmentation_leaves_ignored_pixels_and_the_own_class():
    rng = np.random.default_rng(0)
    logits, table = rng.normal(size=(6, C)), rng.random((C, C)) * (1 - np.eye(C))
    labels = jnp.array([0, 1, 2, 3, 255, 255], jnp.uint8)
    added = np.array(mkd.augment(jnp.float32(logits), labels, jnp.float32(table))) - logits
    np.testing.assert_allclose(added[:4], table, atol=1e-6)
    np.testing.assert_allclose(added[4:], 0, atol=1e-6)


def strengthen(image):
    return 255.0 - image


def weaken(image):
    return 0.5 * image + 20.0


@pytest.fixture
def fixed_views(monkeypatch):
    """Views and a CutMix mask that NumPy can repeat."""
    monkeypatch.setattr(views, "strong", lambda key, image, *, valid: strengthen(image))
    monkeypatch.setattr(views, "photometric_distortion", lambda key, image: weaken(image))
    monkeypatch.setattr(mixing, "box_mask", lambda key, batch, size: jnp.asarray(MASK))


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def cutmix(mask, x):
    return np.where(mask.reshape(mask.shape + (1,) * (x.ndim - 3)), x, np.roll(x, -1, 0))


def reference_views(method, batch):
    """Labeled, weak and strong images, each with the pixels that are not padding."""
    weak = weaken if method.weak_photometric else lambda image: image
    labeled, unlabeled = batch["labeled"], batch["unlabeled"]
    weak_view = weak(unlabeled["image"]), unlabeled["valid"]
    strong_view = weak_view
    if method.strong:
        strong = strengthen(unlabeled["image"])
        strong_view = cutmix(MASK, strong), cutmix(MASK, unlabeled["valid"])
    return (weak(labeled["image"]), labeled["valid"]), weak_view, strong_view


def reference_term(method, kernel, progress, pixels, classes):
    """Equation 3's term by class and logit; its last row is that of ignored pixels."""
    ramp = {"cosine": (1 - np.cos(np.pi * progress)) / 2, "linear": progress}[method.ramp]
    full = method.covariance == "full"
    table = reference_table(kernel, pixels, classes, method.strength * ramp, full)
    return np.append(table, np.zeros((1, C)), 0)


def reference(method, state, batch, progress, kernels=None):
    """Equation 4 in NumPy.

    Returns the loss, its parts and the kept share, the networks' statistics, and for each augmented
    network the pixels it has seen with their classes. Equation 3's term is made of `kernels`, where
    they shall differ from those that make the logits.
    """
    labeled_view, weak_view, strong_view = reference_views(method, batch)
    truth, size = batch["labeled"]["label"], tuple(s // method.consistency_stride for s in SIZE)
    label, mask = nearest(truth, size), nearest(MASK, size)
    on = slice(0 if method.consistency_on == "all" else 1, 2)
    valid = [nearest(view[1], size) for view in (labeled_view, strong_view)]

    logits, targets, new_stats, seen, loss_s = {}, {}, {}, {}, 0.0
    for name in ("a", "b", *("teacher_" + t for t in method.teachers)):
        teacher = name.startswith("teacher_")
        params, stats = state.network(name)
        batch_stats = not teacher or method.teacher_stats == "own"
        full, l_features, stats = forward((params, stats), *labeled_view, batch_stats)
        view = weak_view if teacher else strong_view
        unlabeled, u_features, new_stats[name] = forward((params, stats), *view, batch_stats)
        labeled, l_features = nearest(full, size), nearest(l_features, size)
        unlabeled, u_features = nearest(unlabeled, size), nearest(u_features, size)
        if teacher and method.strong:
            unlabeled, u_features = cutmix(mask, unlabeled), cutmix(mask, u_features)
        confidence = [softmax(x).max(-1) for x in (labeled, unlabeled)]

        if method.feature_augmentation and (not teacher or method.augment == "all"):
            own = unlabeled.argmax(-1)
            pixels = [BEFORE[0], *(x.reshape(-1, A) for x in (l_features, u_features))]
            classes = [BEFORE[1], label.ravel(), np.where(valid[1], own, 255).ravel()]
            seen[name] = np.concatenate(pixels), np.concatenate(classes)
            kernel = (kernels or {}).get(name, np.float64(params["head"]["kernel"]))
            term = reference_term(method, kernel, progress, *seen[name])
            unlabeled = unlabeled + term[own]
            if method.augment == "all":
                labeled = labeled + term[np.minimum(label, C)]
                full = full + term[np.minimum(nearest(truth, full.shape[1:3]), C)]
        if not teacher:
            loss_s += cross_entropy(nearest(full, SIZE), truth)

        kept = valid
        if teacher and method.threshold is not None:
            kept = [v & (p >= method.threshold) for v, p in zip(valid, confidence, strict=True)]
        logits[name] = np.concatenate([labeled, unlabeled][on])
        targets[name] = np.where(np.concatenate(kept[on]), logits[name].argmax(-1), 255)

    teacher_of = {"mutual": OTHER, "own": {"a": "a", "b": "b"}, "none": {}}[method.teacher]
    losses = {
        "loss_supervised": loss_s,
        "loss_students": sum(cross_entropy(logits[s], targets[t]) for s, t in OTHER.items()),
    }
    total = loss_s + method.beta * losses["loss_students"]
    if teacher_of:
        losses["loss_teachers"] = sum(
            cross_entropy(logits[s], targets["teacher_" + t]) for s, t in teacher_of.items()
        )
        total += method.alpha * losses["loss_teachers"]
    kept = (targets[method.labeler] != 255).sum() / np.concatenate(valid[on]).sum()
    return total, {**losses, "kept": kept}, new_stats, seen


def distinct_state(method, nets):
    """A state in which every network differs and has seen something."""
    state = make_state(method, nets)
    for i, name in enumerate(("a", "b", *("teacher_" + t for t in method.teachers))):
        params, _ = nets["a"].init(jax.random.key(10 + i), SIZE)
        stats = {"mean": jnp.array([0.1, -0.2, 0.05]) * i}
        state = state.with_network(name, contracts.Variables(params, stats))
    if not method.feature_augmentation:
        return state
    before = statistics_of(*BEFORE, method.covariance == "full")
    return state.replace(extra={"features": dict.fromkeys(state.extra["features"], before)})


def loss_of(method, nets, batch, progress=0.3):
    """`method.loss` in the main phase as a function of the parameters and the state."""
    phase = method.phases(plan())[-1]

    def loss(params, state):
        return method.loss(
            nets, params, state, {}, batch, jax.random.key(0), phase=phase, progress=progress
        )

    return loss


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
@pytest.mark.usefixtures("fixed_views")
def test_loss_is_equation_4(settings, nets):
    method, batch = mkd.Method(**settings), random_batch()
    state = distinct_state(method, nets)
    loss, aux = loss_of(method, nets, batch)(state.params, state)

    expected, terms, stats, seen = reference(method, state, batch, 0.3)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    for name, term in terms.items():
        value, count = aux.metrics[name]
        np.testing.assert_allclose(value / count, term, rtol=1e-4, err_msg=name)
    for name in stats:
        new = aux.teacher_stats if name.startswith("teacher_") else aux.stats
        mean = new[name.removeprefix("teacher_")]["mean"]
        np.testing.assert_allclose(mean, stats[name]["mean"], rtol=1e-4, atol=1e-6)
    features = aux.extra.get("features", {})
    assert set(features) == set(seen)
    for name in features:
        np.testing.assert_array_equal(features[name].count, statistics_of(*seen[name]).count)
        np.testing.assert_allclose(
            features[name].mean, statistics_of(*seen[name]).mean, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("classifier_gradient", [False, True])
@pytest.mark.usefixtures("fixed_views")
def test_gradient_in_the_classifier(classifier_gradient, nets):
    method = mkd.Method(classifier_gradient=classifier_gradient, alpha=0.5)
    state, batch = distinct_state(method, nets), random_batch()
    grads, _ = jax.grad(loss_of(method, nets, batch), has_aux=True)(state.params, state)

    direction = np.random.default_rng(0).normal(size=(A, C))
    start = np.float64(state.params["a"]["head"]["kernel"])

    def moved(step):
        """Student a's kernel elsewhere; in equation 3, too, if that has a gradient."""
        params, stats = state.network("a")
        head = {**params["head"], "kernel": start + step * direction}
        there = state.with_network("a", contracts.Variables({**params, "head": head}, stats))
        kernels = None if classifier_gradient else {"a": start}
        return reference(method, there, batch, 0.3, kernels)[0]

    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    np.testing.assert_allclose((grads["a"]["head"]["kernel"] * direction).sum(), slope, rtol=1e-3)


@pytest.mark.parametrize(
    "settings", [{}, {"augment": "all", "consistency_on": "all", "classifier_gradient": True}]
)
@pytest.mark.usefixtures("fixed_views")
def test_gradients_reach_students_and_never_teachers(settings, nets):
    method, batch = mkd.Method(**settings), random_batch()
    state = distinct_state(method, nets)
    loss = loss_of(method, nets, batch)

    def of_everything(params, teachers):
        return loss(params, state.replace(teacher_params=teachers))[0]

    grads = jax.grad(of_everything, (0, 1))(state.params, state.teacher_params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads[0]))
    assert all(np.abs(leaf).max() == 0 for leaf in jax.tree.leaves(grads[1]))


@pytest.mark.parametrize("settings", [{}, {"consistency_on": "all", "augment": "all"}])
@pytest.mark.usefixtures("fixed_views")
def test_what_stands_in_padding_changes_nothing(settings, nets):
    method, batch = mkd.Method(**settings), random_batch()
    state = distinct_state(method, nets)
    other = random_batch(seed=1)
    changed = {
        name: {
            **stream,
            "image": np.where(stream["valid"][..., None], stream["image"], other[name]["image"]),
        }
        for name, stream in batch.items()
    }
    run = jax.value_and_grad(lambda p, b: loss_of(method, nets, b)(p, state)[0])
    assert (changed["unlabeled"]["image"] != batch["unlabeled"]["image"]).any()
    jax.tree.map(
        np.testing.assert_array_equal, run(state.params, batch), run(state.params, changed)
    )


@pytest.mark.usefixtures("fixed_views")
def test_threshold_that_nothing_reaches(nets):
    method, batch = mkd.Method(threshold=1.0), random_batch()
    state = distinct_state(method, nets)
    grads, aux = jax.grad(loss_of(method, nets, batch), has_aux=True)(state.params, state)
    assert float(aux.metrics["loss_teachers"][0]) == 0
    assert float(aux.metrics["kept"][0]) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_batch_without_any_valid_pixel(nets):
    method, batch = mkd.Method(strong=False), random_batch()
    batch["labeled"]["label"][:] = 255
    for stream in batch.values():
        stream["valid"][:] = False
    state = make_state(method, nets)
    loss = loss_of(method, nets, batch)
    (value, _), grads = jax.value_and_grad(loss, has_aux=True)(state.params, state)
    assert float(value) == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


def test_pseudo_labels():
    probability = np.array([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [0.05, 0.9, 0.05]])
    logits = jnp.float32(np.log(probability))
    assert mkd.Method().pseudo_labels(logits).tolist() == [0, 2, 1]
    kept = mkd.Method(threshold=0.55).pseudo_labels(logits)
    assert kept.tolist() == [0, 255, 1]
    assert kept.dtype == jnp.uint8


@pytest.mark.parametrize(
    ("gamma", "expected"),
    [(0.4, [0.4, 0.4, 0.4]), (0.6, [1 / 2, 0.6, 0.6]), (0.99, [1 / 2, 2 / 3, 3 / 4])],
)
def test_ema_decay(gamma, expected):
    method = mkd.Method(ema_decay_max=gamma)
    warmup, main = method.phases(plan(warmup=3))
    k = jnp.arange(3)
    np.testing.assert_allclose(method.ema_decay(main, k), expected, rtol=1e-6)
    assert method.ema_decay(warmup, k) == 0


def test_phases():
    warmup, main = mkd.Method().phases(plan(steps=7, warmup=3))
    assert (warmup.name, warmup.steps, main.steps) == ("warmup", 3, 7)
    assert main.train == warmup.train == ("a", "b")
    assert [(s.name, s.labels) for s in main.streams] == [
        ("labeled", "truth"),
        ("unlabeled", None),
    ]
    assert [phase.name for phase in mkd.Method().phases(plan())] == ["main"]


def train(method, nets, phase, batch, *, steps, state=None, learning_rate=0.1):
    optimizer = optim.make_optimizer(OPTIMIZER)
    schedule = optim.make_schedule(OPTIMIZER)
    step = jax.jit(
        make_train_step(
            method, nets, phase, optimizer, schedule, learning_rate=learning_rate, seed=0
        )
    )
    size = batch["labeled"]["label"].shape[1:]
    state = make_state(method, nets, size=size) if state is None else state
    clock = Clock.of(phase, 0)
    states = []
    for _ in range(steps):
        state, _ = step(state, {}, batch, clock)
        states.append(state)
    return states


def test_warm_up_keeps_teachers_equal_to_students(nets):
    method = mkd.Method()
    states = train(method, nets, method.phases(plan(warmup=3))[0], random_batch(), steps=2)
    for state in states:
        jax.tree.map(np.testing.assert_array_equal, state.teacher_params, state.params)
        jax.tree.map(np.testing.assert_array_equal, state.teacher_stats, state.stats)
    assert (states[0].params["a"]["head"]["bias"] != states[1].params["a"]["head"]["bias"]).all()


def test_teachers_are_moving_averages_of_their_own_students(nets):
    method = mkd.Method(strong=False)
    first = distinct_state(method, nets)
    (second,) = train(method, nets, method.phases(plan())[0], random_batch(), steps=1, state=first)
    for name in method.students:
        jax.tree.map(
            lambda new, old, student: np.testing.assert_allclose(
                new, 0.4 * old + 0.6 * student, rtol=1e-5, atol=1e-6
            ),
            (second.teacher_params[name], second.teacher_stats[name]),
            (first.teacher_params[name], first.teacher_stats[name]),
            (second.params[name], second.stats[name]),
        )


TABLE_3 = [
    {"teacher": "none", "strong": False, "feature_augmentation": False},
    {"teacher": "own", "strong": False, "feature_augmentation": False},
    {"teacher": "mutual", "strong": False, "feature_augmentation": False},
    {"teacher": "none", "strong": True, "feature_augmentation": False},
    {"teacher": "none", "strong": False, "feature_augmentation": True},
    {"teacher": "mutual", "strong": True, "feature_augmentation": False},
    {"teacher": "mutual", "strong": True, "feature_augmentation": True},
]


@pytest.mark.parametrize("row", TABLE_3, ids=name_of)
@pytest.mark.usefixtures("fixed_views")
def test_rows_of_table_3(row, nets):
    method = mkd.Method(**row)
    state = make_state(method, nets)
    loss = loss_of(method, nets, random_batch())
    grads, aux = jax.grad(loss, has_aux=True)(state.params, state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert float(aux.metrics["loss_students"][0]) > 0
    assert ("loss_teachers" in aux.metrics) == (row["teacher"] != "none")
    assert all(total > 0 for name, (total, _) in aux.metrics.items() if name.startswith("loss_"))
    assert bool(aux.extra) == row["feature_augmentation"]


@pytest.mark.parametrize("teacher_stats", ["ema", "own"])
def test_forward_passes(teacher_stats):
    """Labeled and unlabeled images apart, in every network; only students see dropout."""
    calls = []

    class Recording(Linear):
        def apply(self, params, stats, image, *, valid=None, batch_stats, key=None):
            calls.append((image.shape[0], batch_stats, key is not None))
            return super().apply(params, stats, image, valid=valid, batch_stats=batch_stats)

    method, nets = mkd.Method(teacher_stats=teacher_stats), {"a": Recording(), "b": Recording()}
    batch = random_batch()
    batch["unlabeled"] = jax.tree.map(lambda x: x[:3], batch["unlabeled"])
    jax.eval_shape(
        loss_of(method, nets, batch), *(lambda s: (s.params, s))(make_state(method, nets))
    )
    students = [(4, True, True), (3, True, True)] * 2
    teachers = [(4, teacher_stats == "own", False), (3, teacher_stats == "own", False)] * 2
    assert sorted(calls) == sorted(students + teachers)


def test_network_without_features_is_refused():
    class NoFeatures(Linear):
        def apply(self, *args, **kwargs):
            outputs, stats = super().apply(*args, **kwargs)
            return outputs._replace(features=None), stats

    nets = {"a": NoFeatures(), "b": NoFeatures()}
    method = mkd.Method(strong=False)
    state = make_state(method, nets)
    with pytest.raises(contracts.UserError, match="input of its classifier"):
        loss_of(method, nets, random_batch())(state.params, state)


@pytest.mark.slow
def test_overfits_eight_images():
    images = shapes()
    batch = {"labeled": images, "unlabeled": {k: images[k] for k in ("image", "valid")}}
    nets = dict.fromkeys("ab", Small(num_classes=3))
    method, steps = methods.load({"name": "mkd"}), 100
    warmup, main = method.phases(plan(steps, warmup=steps, images=8))
    warm = train(method, nets, warmup, batch, steps=steps)
    states = train(method, nets, main, batch, steps=steps, state=warm[-1])
    predict = make_predict(nets["a"])
    logits = predict(states[-1].network("a"), images["image"], images["valid"])
    assert mean_iou(images["label"], np.argmax(logits, -1)) > 0.9


def test_unknown_words_are_refused():
    with pytest.raises(contracts.UserError, match=r"ramp 'square'\. There are: cosine, linear"):
        mkd.Method(ramp="square")
    with pytest.raises(contracts.UserError, match="teacher_stats 'none'"):
        mkd.Method(teacher_stats="none")
