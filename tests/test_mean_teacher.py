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

from jaxssl import views
from jaxssl.methods import mean_teacher

SIZE = (16, 24)


@pytest.fixture(autouse=True)
def seen(monkeypatch):
    """The images of all views, in order; each is darker by a random factor."""
    images = []

    def darker(key, image):
        images.append(np.asarray(image * jax.random.uniform(key, minval=0.3)))
        return images[-1]

    monkeypatch.setattr(views, "photometric_distortion", darker)
    return images


def start(method, net):
    """The state of a run whose teacher is no copy of its student."""
    state = make_state(method, {"a": net})
    return state.with_network("teacher_a", net.init(jax.random.key(7), SIZE))


def loss_and_gradient(method, net, state, batch, progress=0.0):
    def loss(params):
        key, phase = jax.random.key(0), method.phases(plan(warmup=1))[-1]
        return method.loss(
            {"a": net}, params, state, {}, batch, key, phase=phase, progress=jnp.float32(progress)
        )

    return jax.value_and_grad(loss, has_aux=True)(state.params)


@pytest.mark.parametrize("teacher_stats", ["ema", "own"])
def test_loss_and_gradient(teacher_stats, seen):
    method = mean_teacher.Method(weight=3.0, rampup=0.5, teacher_stats=teacher_stats)
    batch, net = random_batch(), Linear()
    state = start(method, net)
    (value, aux), grads = loss_and_gradient(method, net, state, batch, progress=0.3)
    student_sees, teacher_sees = seen
    assert not np.array_equal(student_sees, teacher_sees)

    labeled, valid, own = batch["labeled"], batch["unlabeled"]["valid"], teacher_stats == "own"
    teacher = state.network("teacher_a")
    taught, _, teacher_statistics = forward(teacher, teacher_sees, valid, batch_stats=own)

    def reference(params):
        first, _, stats = forward((params, state.stats["a"]), labeled["image"], labeled["valid"])
        second, _, stats = forward((params, stats), student_sees, valid)
        distance = ((softmax(second) - softmax(taught)) ** 2).sum(-1)
        consistency = nearest(distance, SIZE)[valid].mean()
        supervised = cross_entropy(nearest(first, SIZE), labeled["label"])
        ramp = np.exp(-5 * (1 - 0.3 / 0.5) ** 2)
        return supervised + 3 * ramp * consistency, supervised, consistency, stats

    expected, supervised, consistency, stats = reference(state.params["a"])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["loss_supervised"][0], supervised, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["loss_consistency"][0], consistency, rtol=1e-5)
    np.testing.assert_allclose(aux.stats["a"]["mean"], stats["mean"], rtol=1e-3)
    np.testing.assert_allclose(
        aux.teacher_stats["a"]["mean"], teacher_statistics["mean"], rtol=1e-3
    )
    assert_gradient(grads["a"], state.params["a"], lambda params: reference(params)[0])


def test_classification(seen):
    method, net = mean_teacher.Method(weight=2.0, rampup=0.0), Pooled()
    batch = random_batch(padded=False)
    for images in batch.values():
        del images["valid"]
    batch["labeled"]["label"] = np.array([0, 255, 3, 1], np.uint8)
    state = start(method, net)
    (value, _), _ = loss_and_gradient(method, net, state, batch)

    def logits(variables, image, batch_stats=True):
        return forward(variables, image, np.ones(image.shape[:3], bool), batch_stats)[0].mean(
            (1, 2)
        )

    student, teacher = state.network("a"), state.network("teacher_a")
    p, q = softmax(logits(student, seen[0])), softmax(logits(teacher, seen[1], False))
    expected = cross_entropy(logits(student, batch["labeled"]["image"]), batch["labeled"]["label"])
    np.testing.assert_allclose(value, expected + 2 * ((p - q) ** 2).sum(-1).mean(), rtol=1e-5)


def test_nothing_valid():
    method, net, batch = mean_teacher.Method(), Linear(), random_batch()
    batch["unlabeled"]["valid"][:] = False
    (_, aux), grads = loss_and_gradient(method, net, start(method, net), batch)
    assert aux.metrics["loss_consistency"][0] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("length", [0.0, 0.4, 1.0])
def test_the_weight_rises_over_its_share_of_the_phase(length):
    progress = np.array([0.0, 0.1, 0.39, 0.4, 0.9])
    t = np.minimum(progress / length, 1) if length else np.ones(5)
    ramp = mean_teacher.sigmoid_ramp(jnp.asarray(progress), length)
    np.testing.assert_allclose(ramp, np.exp(-5 * (1 - t) ** 2), rtol=1e-5)


def test_the_teacher_is_the_mean_of_students_and_then_a_moving_average():
    method = mean_teacher.Method(ema_decay_max=0.7)
    warmup, main = method.phases(plan(warmup=2))
    assert method.ema_decay(warmup, jnp.int32(5)) == 0
    decays = [float(method.ema_decay(main, jnp.int32(k))) for k in range(6)]
    np.testing.assert_allclose(decays, [0, 1 / 2, 2 / 3, 0.7, 0.7, 0.7], rtol=1e-6)
    assert method.headline == method.labeler == "teacher_a"
