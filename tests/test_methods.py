"""What holds for several methods, and how they are found by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Linear, make_state, plan, random_batch

from jaxssl import methods, sharding

SIZE = (16, 24)
PASSES = {
    "mean_teacher": ["a, dropout", "a, dropout", "teacher"],
    "cutmix_seg": ["a, dropout", "a, dropout", "teacher"],
    "fixmatch": ["a, dropout", "a", "a, dropout"],
    "dml": ["a, dropout", "b, dropout", "a, dropout", "b, dropout"],
}


@dataclasses.dataclass(frozen=True)
class Recorded(Linear):
    """Writes down whose parameters run, and whether with dropout."""

    calls: list = dataclasses.field(default_factory=list, hash=False)

    def apply(self, params, *args, key=None, **kwargs):
        self.calls.append((params, key is not None))
        return super().apply(params, *args, key=key, **kwargs)


def loss_of(method, nets, state, batch):
    phase, key = method.phases(plan(images=len(batch["labeled"]["image"])))[-1], jax.random.key(0)
    zero = jnp.zeros(())
    return method.loss(nets, state.params, state, {}, batch, key, phase=phase, progress=zero)


@pytest.mark.parametrize("name", PASSES)
def test_forward_passes(name):
    method, calls = methods.load({"name": name}), []
    nets = {student: Recorded(calls=calls) for student in method.students}
    state = make_state(method, nets)
    loss_of(method, nets, state, random_batch())
    owners = {id(params): student for student, params in state.params.items()}
    found = [f"{owners.get(id(p), 'teacher')}{', dropout' * noisy}" for p, noisy in calls]
    assert found == PASSES[name]


@pytest.mark.parametrize("name", PASSES)
def test_losses_are_those_of_the_global_batch(name):
    """Eight devices, of whose images some are padded, and one."""
    method, batch = methods.load({"name": name, "weight": 2.0}), random_batch(images=8)
    nets, found = {student: Linear() for student in method.students}, []
    state = make_state(method, nets)
    for devices in (1, 8):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        everywhere, rows = sharding.replicated(mesh), sharding.batched(mesh)
        step = jax.jit(
            lambda state, batch: loss_of(method, nets, state, batch),
            in_shardings=(everywhere, rows),
        )
        found.append(step(state, batch))
    jax.tree.map(
        lambda one, all: np.testing.assert_allclose(one, all, rtol=1e-4, atol=1e-6), *found
    )
    assert found[0][1].metrics["loss_supervised"][0] < found[0][0]
