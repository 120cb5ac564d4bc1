import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OPTIMIZER, Linear, make_state

from jaxssl import optim, state
from jaxssl.contracts import Variables
from jaxssl.methods import mkd, supervised


@pytest.fixture
def created(nets):
    """From variables made before, which jit may hand through."""
    optimizer = optim.make_optimizer(OPTIMIZER)
    create = functools.partial(state.create, mkd.Method(), nets, optimizer, ("a", "b"))
    keys = {"a": jax.random.key(0), "b": jax.random.key(1)}
    return jax.jit(create)({name: nets[name].init(keys[name], (16, 24)) for name in nets})


def test_no_two_leaves_share_a_buffer(created):
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(created)]
    assert len(set(pointers)) == len(pointers)


def test_teachers_start_as_their_students(created):
    jax.tree.map(np.testing.assert_array_equal, created.teacher_params, created.params)
    jax.tree.map(np.testing.assert_array_equal, created.teacher_stats, created.stats)
    assert int(created.step) == int(created.skipped) == 0


def test_only_what_the_method_has(nets):
    method = supervised.Method()
    created = make_state(method, {"a": nets["a"]})
    assert list(created.params) == ["a"]
    assert created.teacher_params == created.teacher_stats == created.extra == {}
    optimizer = optim.make_optimizer(OPTIMIZER)
    variables = {name: nets[name].init(jax.random.key(0), (16, 24)) for name in "ab"}
    first = state.create(mkd.Method(), nets, optimizer, ("b",), variables)
    assert list(first.opt_state) == ["b"]


def test_students_draw_from_keys_of_their_own():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    net = Linear()
    drawn = state.draw({"a": net, "b": net}, jax.random.key(7), (16, 24), sharding)
    for i, name in enumerate("ab"):
        expected = net.init(jax.random.fold_in(jax.random.key(7), i), (16, 24))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), drawn[name], expected
        )
    kernels = [drawn[name].params["head"]["kernel"] for name in "ab"]
    assert (np.asarray(kernels[0]) != np.asarray(kernels[1])).all()
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(drawn))


@pytest.mark.parametrize("name", ["a", "b", "teacher_a", "teacher_b"])
def test_networks_by_name(created, name):
    new = Variables({"w": jnp.ones(3)}, {"mean": jnp.zeros(2)})
    changed = created.with_network(name, new)
    assert changed.network(name) == new
    for other in {"a", "b", "teacher_a", "teacher_b"} - {name}:
        jax.tree.map(np.testing.assert_array_equal, changed.network(other), created.network(other))


def test_moving_average():
    old, new = {"x": jnp.array([1.0, 2.0])}, {"x": jnp.array([5.0, 4.0])}
    average = jax.jit(state.ema)(old, new, jnp.float32(0.75))
    np.testing.assert_allclose(average["x"], [2, 2.5])
    assert state.ema(old, new, 1.0)["x"].tolist() == [1, 2]
    assert state.ema(old, new, 0.0)["x"].tolist() == [5, 4]
    half = {"x": jnp.ones(2, jnp.bfloat16)}
    assert state.ema(half, half, jnp.float32(0.3))["x"].dtype == jnp.bfloat16
