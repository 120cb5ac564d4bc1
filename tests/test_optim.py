import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import OPTIMIZER

from jaxssl.contracts import UserError
from jaxssl.optim import make_optimizer, make_schedule

RATE = 0.1


def parameters():
    rng = np.random.default_rng(0)
    return {
        "backbone": {"kernel": np.float32(rng.normal(size=(3, 2))), "bias": np.ones(2, np.float32)},
        "head": {"kernel": np.float32(rng.normal(size=(2, 2))), "bias": -np.ones(2, np.float32)},
    }


def gradient(params, step):
    """Of something curved that changes with the step."""
    return jax.tree.map(lambda w: np.cos(w + step) + w, params)


def descend(config, params=None, steps=10):
    optimizer, params = make_optimizer({**OPTIMIZER, **config}), params or parameters()
    state = optimizer.init(params)
    for step in range(steps):
        direction, state = optimizer.update(gradient(params, step), state, params)
        params = jax.tree.map(lambda w, d: np.asarray(w - RATE * d), params, direction)
    return params


def sgd_by_hand(steps=10, *, momentum=0.9, nesterov=False, decay=0.0, only_kernels=False, head=1.0):
    params = parameters()
    trace = jax.tree.map(np.zeros_like, params)
    for step in range(steps):
        grads = gradient(params, step)
        for part, leaves in params.items():
            for name in leaves:
                decays = decay if name == "kernel" or not only_kernels else 0.0
                g = grads[part][name] + decays * leaves[name]
                trace[part][name] = momentum * trace[part][name] + g
                d = g + momentum * trace[part][name] if nesterov else trace[part][name]
                leaves[name] = leaves[name] - RATE * (head if part == "head" else 1.0) * d
    return params


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


@pytest.mark.parametrize(
    ("config", "by_hand"),
    [
        ({}, {}),
        ({"momentum": 0.0}, {"momentum": 0.0}),
        ({"nesterov": True}, {"nesterov": True}),
        ({"weight_decay": 0.1}, {"decay": 0.1}),
        (
            {"weight_decay": 0.1, "decay_norm_and_bias": False},
            {"decay": 0.1, "only_kernels": True},
        ),
        ({"head_factor": 3.0, "weight_decay": 0.1}, {"head": 3.0, "decay": 0.1}),
    ],
    ids=str,
)
def test_sgd_by_hand(config, by_hand):
    assert_close(descend(config), sgd_by_hand(**by_hand))


@pytest.mark.torch
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("head_factor", [1.0, 3.0])
def test_sgd_is_that_of_pytorch(nesterov, head_factor):
    torch = pytest.importorskip("torch")
    leaves, tree = jax.tree.flatten(parameters())
    tensors = [torch.tensor(leaf, requires_grad=True) for leaf in leaves]
    groups = [
        {"params": tensors[:2], "lr": RATE},  # the backbone's, in the order of their names
        {"params": tensors[2:], "lr": RATE * head_factor},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0.05, nesterov=nesterov)
    for step in range(10):
        for tensor in tensors:
            tensor.grad = torch.cos(tensor.detach() + step) + tensor.detach()
        optimizer.step()
    expected = tree.unflatten(tensor.detach().numpy() for tensor in tensors)
    config = {"weight_decay": 0.05, "nesterov": nesterov, "head_factor": head_factor}
    assert_close(descend(config), expected)


def test_sgd_equals_ten_stored_steps_of_pytorch():
    """`torch.optim.SGD` 2.13 with momentum .9 and weight decay .05."""
    params = descend(
        {"weight_decay": 0.05}, {"head": {"bias": np.array([1, -1, 0.25], np.float32)}}
    )
    stored = [-0.83158195, 0.6304889, -0.16769911]
    np.testing.assert_allclose(params["head"]["bias"], stored, rtol=1e-5)


@pytest.mark.parametrize("everything", [False, True])
def test_adamw_is_that_of_optax(everything):
    mask = None if everything else lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    optimizer, params = optax.adamw(RATE, weight_decay=0.05, mask=mask), parameters()
    state = optimizer.init(params)
    for step in range(10):
        updates, state = optimizer.update(gradient(params, step), state, params)
        params = jax.tree.map(np.asarray, optax.apply_updates(params, updates))
    config = {"name": "adamw", "weight_decay": 0.05, "decay_norm_and_bias": everything}
    assert_close(descend(config), params)


def test_clipping_by_the_norm_of_all_gradients():
    config = {"momentum": 0.0, "clip_norm": 0.5}
    optimizer, params = make_optimizer({**OPTIMIZER, **config}), parameters()
    grads = gradient(params, 0)
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    direction, _ = optimizer.update(grads, optimizer.init(params), params)
    assert_close(direction, jax.tree.map(lambda g: g * 0.5 / norm, grads))
    small = jax.tree.map(lambda g: 0.1 * g / norm, grads)
    assert_close(optimizer.update(small, optimizer.init(params), params)[0], small)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"schedule": "poly", "power": 0.9}, [1, 0.75**0.9, 0.5**0.9, 0.25**0.9, 0, 0]),
        ({"schedule": "poly", "power": 1.0}, [1, 0.75, 0.5, 0.25, 0, 0]),
        ({"schedule": "cosine"}, [1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5, 0, 0]),
        ({"schedule": "constant"}, [1] * 6),
        ({"schedule": "constant", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 1]),
        (
            {"schedule": "poly", "power": 1.0, "warmup_steps": 2},
            [0.5, 0.75, 0.5, 0.25, 0, 0],
        ),
    ],
    ids=str,
)
def test_schedules(config, expected):
    schedule = jax.jit(make_schedule({**OPTIMIZER, **config}))
    factors = [schedule(jnp.int32(done), jnp.int32(4)) for done in range(6)]
    np.testing.assert_allclose(factors, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (make_optimizer, {"name": "adam"}, "optimizer.name 'adam'.*adamw, sgd"),
        (make_schedule, {"schedule": "step"}, "optimizer.schedule 'step'.*constant, cosine, poly"),
    ],
)
def test_unknown_names_are_refused(make, config, message):
    with pytest.raises(UserError, match=message):
        make({**OPTIMIZER, **config})
