"""`parallel="pmap"`: every method's step on eight devices, and how it differs from the mesh's."""

import json

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    Linear,
    Pooled,
    assert_same_run,
    cross_entropy,
    make_state,
    nearest,
    run_until,
    stream_arrays,
)

from jaxssl import config as configs
from jaxssl import methods, models, optim, phases, sharding, train
from jaxssl.contracts import IGNORE_LABEL, Plan, UserError
from jaxssl.methods import cps, dars, dmt, mkd, supervised
from jaxssl.state import TEACHER
from jaxssl.step import Clock, make_train_step

SIZE = (8, 12)
MAKE_MESH = sharding.make_mesh


def phase_of(method, index=-1, *, images=16):
    count = {"labeled": images, "unlabeled": images}
    sizes = {"labeled": images, "unlabeled": 8 * images}
    plan = Plan(sizes=sizes, batch=count, num_classes=4, steps=10, warmup=4, crop=SIZE)
    return method.phases(plan)[index]


def batch_of(phase, *, ignored=False, task="segmentation"):
    """Noise; where some of it is `ignored`, images differ in how much."""
    rng = np.random.default_rng(0)
    batch = {stream.name: stream_arrays(stream, rng, SIZE, task=task) for stream in phase.streams}
    for arrays in batch.values():
        if ignored and task == "segmentation":
            share = rng.uniform(0.1, 0.9, (len(arrays["image"]), 1, 1))
            arrays["valid"][2:4, -2:] = False
            if "label" in arrays:
                arrays["label"][rng.random(arrays["label"].shape) < share] = IGNORE_LABEL
                arrays["label"][~arrays["valid"]] = IGNORE_LABEL
    return batch


def nets_of(method):
    kind = Linear if "segmentation" in method.tasks else Pooled
    return {name: kind(channels=5 + i) for i, name in enumerate(method.students)}


def start(method):
    return jax.jit(lambda: make_state(method, nets_of(method), size=SIZE))()


def run(method, phase, batch, parallel, *, devices=8, accumulate=1):
    """The state and the metrics after the first step of a phase."""
    mesh = MAKE_MESH(jax.devices()[:devices])
    axis_name = sharding.AXIS if parallel == "pmap" else None
    optimizer = optim.make_optimizer(conftest.OPTIMIZER)
    step = make_train_step(
        method,
        {name: models.over_devices(net, axis_name) for name, net in nets_of(method).items()},
        phase,
        optimizer,
        optim.make_schedule(conftest.OPTIMIZER),
        learning_rate=0.1,
        seed=0,
        accumulate=accumulate,
        axis_name=axis_name,
    )
    state = start(method)
    state = state.replace(opt_state={n: optimizer.init(state.params[n]) for n in phase.train})
    frozen = {name: start(method).network(w.network) for name, w in phase.frozen.items()}
    state, frozen, clock = jax.device_put(
        (state, frozen, Clock.of(phase, 0)), sharding.replicated(mesh)
    )
    rows = sharding.to_devices(batch, mesh, parallel)
    lowered = sharding.parallelize(step, mesh, parallel).lower(state, frozen, rows, clock)
    train.check_fixed_point(state, lowered.out_info[0])
    after, metrics = lowered.compile()(state, frozen, rows, clock)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert all(leaf.sharding == sharding.replicated(mesh) for leaf in jax.tree.leaves(after))
    return after, metrics


def assert_close(state, expected, **tolerances):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **{"rtol": 1e-5, "atol": 1e-5} | tolerances),
        state,
        expected,
    )


@pytest.mark.parametrize("name", methods.available())
def test_a_step_of_every_method_leaves_the_same_on_all_devices(name):
    method = methods.load({"name": name})
    phase = phase_of(method)
    after, metrics = run(method, phase, batch_of(phase, ignored=True, task=method.tasks[0]), "pmap")
    for leaf in jax.tree.leaves((after, metrics)):
        first, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        assert len(others) == 7
        assert np.isfinite(first).all()
        for other in others:
            np.testing.assert_array_equal(first, other)
    assert (int(after.step), int(after.skipped)) == (1, 0)
    for student in phase.train:
        before = start(method).params[student]["head"]["kernel"]
        assert (after.params[student]["head"]["kernel"] != before).any()


@pytest.mark.parametrize(
    ("method", "index"),
    [
        (supervised.Method(), -1),
        (cps.Method(cutmix=False), -1),
        (dars.Method(), 1),
        (dmt.Method(), -1),
        (mkd.Method(strong=False, feature_augmentation=False, teacher_stats="own"), -1),
    ],
    ids=lambda value: getattr(value, "__module__", ""),
)
@pytest.mark.parametrize("devices", [1, 8])
def test_it_equals_the_mesh_where_denominators_do(method, index, devices):
    phase = phase_of(method, index)
    batch = batch_of(phase, ignored=devices == 1)
    ours, theirs = (
        run(method, phase, batch, parallel, devices=devices)[0] for parallel in ("pmap", "mesh")
    )
    assert_close(ours, theirs)


def variables_of(method):
    return jax.device_get(start(method).network("a"))


def device_loss(logits, labels, devices=8):
    """Mean over the devices of the mean over each one's labeled pixels, in NumPy."""
    parts = (np.split(x, devices) for x in (nearest(logits, SIZE), labels))
    return np.mean([cross_entropy(*part) for part in zip(*parts, strict=True)])


def test_every_device_has_a_denominator_of_its_own():
    """The loss in NumPy, and the update by the gradient of what one program over the whole batch
    says of it; the mesh says something else.
    """
    method = supervised.Method()
    phase = phase_of(method)
    batch = batch_of(phase, ignored=True)
    image, valid, label = (batch["labeled"][name] for name in ("image", "valid", "label"))
    params, stats = variables_of(method)
    logits, _, new_stats = conftest.forward((params, stats), image, valid)
    after, metrics = run(method, phase, batch, "pmap")
    np.testing.assert_allclose(metrics["loss"][0], device_loss(logits, label), rtol=1e-5)
    total, count = metrics["loss_supervised"]
    np.testing.assert_allclose(total / count, device_loss(logits, label), rtol=1e-5)
    np.testing.assert_allclose(after.stats["a"]["mean"], new_stats["mean"], rtol=1e-4)

    def loss(params):
        outputs, _ = Linear().apply(params, stats, image, valid=valid, batch_stats=True)
        logits = nearest(jax.nn.log_softmax(outputs.logits), SIZE)
        terms = jnp.take_along_axis(logits, jnp.minimum(label, 3)[..., None], -1)[..., 0]
        weights = label != IGNORE_LABEL
        counts = weights.reshape(8, -1).sum(1).repeat(2)[:, None, None]
        return -(terms * weights / counts).sum() / 8

    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))
    assert_close(after.params["a"], expected)
    other, _ = run(method, phase, batch, "mesh")
    assert np.abs(other.params["a"]["head"]["bias"] - expected["head"]["bias"]).max() > 1e-3


def test_accumulation_takes_every_other_row_of_each_device():
    method = supervised.Method()
    phase = phase_of(method)
    batch = batch_of(phase, ignored=True)
    losses = []
    for first in range(2):
        image, valid, label = (
            batch["labeled"][name][first::2] for name in ("image", "valid", "label")
        )
        logits, _, _ = conftest.forward(variables_of(method), image, valid)
        losses.append(device_loss(logits, label))
    _, metrics = run(method, phase, batch, "pmap", accumulate=2)
    np.testing.assert_allclose(metrics["loss"][0], np.mean(losses), rtol=1e-5)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_feature_statistics_are_those_of_the_whole_batch(covariance):
    method = mkd.Method(strong=False, covariance=covariance, augment="all")
    phase = phase_of(method)
    batch = batch_of(phase, ignored=True)
    ours, theirs = (run(method, phase, batch, parallel)[0].extra for parallel in ("pmap", "mesh"))
    assert set(ours["features"]) == {"a", "b", TEACHER + "a", TEACHER + "b"}
    assert int(ours["features"]["a"].count.sum()) > 0
    assert_close(ours, theirs, atol=1e-3)


@pytest.fixture(params=["mkd", "dars"])
def config(request, monkeypatch):
    """A short run on two devices; DARS labels images before its round."""
    config = conftest.dars_config(monkeypatch)
    monkeypatch.setattr(
        sharding, "make_mesh", lambda devices=None: MAKE_MESH((devices or jax.devices())[:2])
    )
    config.update(parallel="pmap", warmup=4, steps=5)
    if request.param == "dars":
        config.method.update(ratios=(0.5,), beta_min=(0.0,), beta_max=(0.0,))
    else:
        config.method = configs.mkd()
    config.log.every, config.eval.every, config.checkpoint.every = 1, 5, 2
    return config


def test_a_run_is_killed_and_resumes_bit_for_bit(config, tmp_path, monkeypatch):
    whole, killed, pmap, compiled = tmp_path / "whole", tmp_path / "killed", jax.pmap, []

    def noting(step, *arguments, **options):
        compiled.append(step)
        return pmap(step, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(jax, "pmap", noting)
        assert phases.run(config, whole) == 0
    assert len(compiled) == 2  # phases
    run_until(6, config, killed)
    assert phases.run(config, killed) == 0
    assert_same_run(killed, whole)
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 9
    assert 0 < last["val/miou"] < 1

    config.parallel = "mesh"
    with pytest.raises(UserError, match="parallel: pmap -> mesh"):
        phases.run(config, killed)


def test_an_unknown_word_is_refused():
    config = configs.default()
    config.parallel = "ddp"
    with pytest.raises(UserError, match=r"parallel='ddp'\. There are: mesh, pmap"):
        configs.check(config)


def test_a_batch_that_cannot_be_split_is_refused(config, tmp_path):
    config.batch.update(labeled=3, unlabeled=3)
    with pytest.raises(UserError, match=r"batch.labeled=3 .* 2 devices"):
        phases.run(config, tmp_path)
