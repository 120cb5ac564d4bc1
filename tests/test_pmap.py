"""`parallel="pmap"`: every method's step on eight devices, and how it differs from the mesh's."""

import json

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Linear, cross_entropy, make_state, nearest, stream_arrays

from jaxssl import config as configs
from jaxssl import methods, models, optim, phases, sharding, train
from jaxssl.checkpoint import Checkpoints
from jaxssl.contracts import IGNORE_LABEL, Plan, UserError
from jaxssl.methods import cps, dars, dmt, mkd, supervised
from jaxssl.state import TEACHER
from jaxssl.step import Clock, make_train_step

SIZE = (8, 12)
MAKE_MESH = sharding.make_mesh


def phase_of(method, index=-1, *, images=16):
    count = {"labeled": images, "unlabeled": images}
    plan = Plan(sizes=count, batch=count, num_classes=4, steps=10, warmup=4, crop=SIZE)
    return method.phases(plan)[index]


def batch_of(phase, *, ignored=False):
    """Noise; where some of it is `ignored`, images differ in how much."""
    rng = np.random.default_rng(0)
    batch = {stream.name: stream_arrays(stream, rng, SIZE) for stream in phase.streams}
    for arrays in batch.values():
        if ignored:
            share = rng.uniform(0.1, 0.9, (len(arrays["image"]), 1, 1))
            arrays["valid"][2:4, -2:] = False
            if "label" in arrays:
                arrays["label"][rng.random(arrays["label"].shape) < share] = IGNORE_LABEL
                arrays["label"][~arrays["valid"]] = IGNORE_LABEL
    return batch


def nets_of(method):
    return {name: Linear(channels=5 + i) for i, name in enumerate(method.students)}


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
    after, metrics = run(method, phase, batch_of(phase, ignored=True), "pmap")
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
