import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    OPTIMIZER,
    Linear,
    Pooled,
    cross_entropy,
    forward,
    make_state,
    mean_iou,
    nearest,
    plan,
    random_batch,
    shapes,
)

from jaxssl import methods, mixing, models, optim, views
from jaxssl.contracts import Outputs, UserError
from jaxssl.inference import make_predict
from jaxssl.methods import mkd, supervised
from jaxssl.step import Clock, make_train_step

SIZE = (16, 24)


def run(method, nets, batch, phase=-1):
    """The state that a run starts with, its loss and what comes with that."""
    state, key = make_state(method, nets), jax.random.key(0)
    phase = method.phases(plan(warmup=1))[phase]
    loss, aux = method.loss(
        nets, state.params, state, {}, batch, key, phase=phase, progress=jnp.zeros(())
    )
    return state, loss, aux


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("auxiliary", [False, True])
def test_loss_is_cross_entropy(strong, auxiliary, monkeypatch):
    def inverted(key, image, *, valid):
        assert valid.shape == image.shape[:3]
        return 255.0 - image

    monkeypatch.setattr(views, "strong", inverted)
    batch, nets = random_batch(), {"a": Linear(auxiliary=auxiliary)}
    method = supervised.Method(strong=strong, auxiliary_weight=0.3)
    state, loss, aux = run(method, nets, batch)

    labeled = batch["labeled"]
    image = 255.0 - labeled["image"] if strong else labeled["image"]
    logits, _, stats = forward(state.network("a"), image, labeled["valid"])
    logits = nearest(logits, SIZE)
    expected = cross_entropy(logits, labeled["label"])
    if auxiliary:
        expected += 0.3 * cross_entropy(2 * logits, labeled["label"])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["loss_supervised"][0], expected, rtol=1e-5)
    np.testing.assert_allclose(aux.stats["a"]["mean"], stats["mean"], rtol=1e-5)


def test_classification_labels_meet_logits_as_they_are():
    logits, labels = np.random.default_rng(0).normal(size=(5, 4)), np.array([0, 3, 255, 1, 1])
    loss = supervised.loss_at_full_size(
        Linear(), Outputs(jnp.float32(logits)), jnp.uint8(labels), auxiliary_weight=1.0
    )
    np.testing.assert_allclose(loss, cross_entropy(logits, labels), rtol=1e-6)


def test_mixup_learns_mixed_labels_from_mixed_images(monkeypatch):
    mixed, rng = mixing.Mixup(np.float32(0.7), np.array([2, 0, 3, 1])), np.random.default_rng(0)
    monkeypatch.setattr(mixing, "mixup", lambda key, batch, *, alpha: mixed if alpha == 2 else None)
    image, label = random_batch()["labeled"]["image"], rng.integers(0, 4, 4, np.uint8)
    batch = {"labeled": {"image": image, "label": label}}
    state, loss, aux = run(supervised.Method(mixup=2.0), {"a": Pooled()}, batch)
    between = 0.7 * image + 0.3 * image[mixed.partner]
    logits, _, stats = forward(state.network("a"), between, np.ones(image.shape[:3], bool))
    logits = logits.mean((1, 2))
    own, others = (cross_entropy(logits, labels) for labels in (label, label[mixed.partner]))
    np.testing.assert_allclose(loss, 0.7 * own + 0.3 * others, rtol=1e-5)
    np.testing.assert_allclose(aux.stats["a"]["mean"], stats["mean"], rtol=1e-4)


def test_mixup_is_refused_for_masks():
    with pytest.raises(UserError, match=r"a label for each pixel.*method\.mixup=0"):
        run(supervised.Method(mixup=0.75), {"a": Linear()}, random_batch())


def test_an_average_is_evaluated_where_there_is_one():
    method, alone = supervised.Method(ema_decay_max=0.9), supervised.Method()
    assert (alone.teachers, alone.headline) == ((), "a")
    assert (method.teachers, method.headline) == (("a",), "teacher_a")
    (phase,) = method.phases(plan())
    decays = [float(method.ema_decay(phase, jnp.int32(k))) for k in (0, 1, 3, 1000)]
    assert decays == pytest.approx([0, 0.5, 0.75, 0.9])


@pytest.mark.parametrize("name", ["cps", "dml", "mkd"])
def test_warm_up_is_supervised_training_of_every_student(name, nets):
    labeled, expected = random_batch()["labeled"], 0.0
    method = methods.load({"name": name})
    state, loss, aux = run(method, nets, {"labeled": labeled}, phase=0)
    for student in "ab":
        logits, _, stats = forward(state.network(student), labeled["image"], labeled["valid"])
        expected += cross_entropy(nearest(logits, SIZE), labeled["label"])
        np.testing.assert_allclose(aux.stats[student]["mean"], stats["mean"], rtol=1e-5)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.parametrize("config", [{"name": "cps"}, {"name": "mkd", "strong": False}], ids=str)
def test_auxiliary_heads_see_labels_only(config, phase, nets):
    batch = random_batch()
    method = methods.load({**config, "auxiliary_weight": 0.3})
    _, without, _ = run(method, nets, batch, phase)
    nets = dict.fromkeys("ab", Linear(auxiliary=True))
    state, loss, _ = run(method, nets, batch, phase)
    labeled, expected = batch["labeled"], 0.0
    for student in "ab":
        logits, _, _ = forward(state.network(student), labeled["image"], labeled["valid"])
        expected += 0.3 * cross_entropy(2 * nearest(logits, SIZE), labeled["label"])
    np.testing.assert_allclose(loss - without, expected, rtol=1e-4)


def test_warm_up_only_makes_training_longer():
    (phase,) = supervised.Method().phases(plan(steps=7, warmup=3))
    assert (phase.steps, phase.train) == (10, ("a",))
    assert [(stream.name, stream.labels) for stream in phase.streams] == [("labeled", "truth")]


def test_methods_are_found_by_name():
    assert methods.load({"name": "mkd", "alpha": 2.0}) == mkd.Method(alpha=2.0)
    with pytest.raises(UserError, match=r"'mkt'.*cps, .*mkd, .*supervised"):
        methods.load({"name": "mkt"})
    with pytest.raises(UserError, match=r"'mkd' has no field 'alfa'.*alpha"):
        methods.load({"name": "mkd", "alfa": 2.0})


def test_overfits_eight_images():
    net = models.load(
        {
            "name": "deeplab_v3plus",
            "backbone": "resnet10",
            "width": 8,
            "channels": 16,
            "low_level_channels": 8,
            "aspp_rates": (1, 2),
        },
        num_classes=3,
    )
    batch, steps = {"labeled": shapes()}, 100
    method, nets = supervised.Method(), {"a": net}
    (phase,) = method.phases(plan(steps, images=8))
    step = jax.jit(
        make_train_step(
            method,
            nets,
            phase,
            optim.make_optimizer(OPTIMIZER),
            optim.make_schedule(OPTIMIZER),
            learning_rate=0.2,
            seed=0,
        )
    )
    state, clock = make_state(method, nets, size=(64, 64)), Clock.of(phase, 0)
    for _ in range(steps):
        state, _ = step(state, {}, batch, clock)
    predict = jax.jit(make_predict(net))
    logits = predict(state.network("a"), batch["labeled"]["image"], batch["labeled"]["valid"])
    assert mean_iou(batch["labeled"]["label"], np.argmax(logits, -1)) > 0.95


def test_a_warm_up_and_the_method_after_it_share_the_schedule_of_supervised_training():
    schedule = optim.make_schedule({"schedule": "poly", "power": 0.9, "warmup_steps": 0})

    def rates(phases):
        found = []
        for phase in phases:
            clock = Clock.of(phase, 0)
            updates = jnp.arange(phase.steps) + clock.schedule_begin
            found += [*schedule(updates, clock.schedule_steps)]
        return found

    for warmup in (0, 4):
        budget = plan(warmup=warmup, steps=6)
        phases = mkd.Method().phases(budget)
        total = warmup + 6
        expected = (1 - np.arange(total) / total) ** 0.9
        np.testing.assert_allclose(rates(phases), expected, rtol=1e-6)
        np.testing.assert_allclose(rates(supervised.Method().phases(budget)), expected, rtol=1e-6)
        assert phases[-1].optimizer == "continue"
