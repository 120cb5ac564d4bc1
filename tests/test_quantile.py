import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxssl import sharding
from jaxssl.quantile import kth_smallest, percentile

EXAMPLES = {
    "noise": np.random.default_rng(0).normal(size=(7, 11)),
    "ties": np.random.default_rng(1).integers(-2, 3, 50) / 4,
    "one": np.array([-3.5]),
    "extremes": np.array([np.inf, -np.inf, 0.0, 1e-300, -1e-300, 5e-324, 1e300, np.inf]),
    "equal": np.full(6, 0.3),
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_kth_smallest_is_that_of_a_sort(name, dtype):
    with jax.enable_x64(True):
        values = jnp.asarray(EXAMPLES[name]).astype(dtype)
        every = jax.jit(jax.vmap(kth_smallest, (None, 0)))(values, jnp.arange(values.size))
    assert every.dtype == values.dtype
    expected = np.sort(np.asarray(values).ravel())
    np.testing.assert_array_equal(np.float64(every), np.float64(expected))


@pytest.mark.parametrize("percent", [0.0, 12.5, 33.3, 50.0, 80.0, 99.9, 100.0])
@pytest.mark.parametrize("name", ["noise", "ties", "one", "equal"])
def test_percentile_is_numpys(name, percent):
    values = EXAMPLES[name]
    with jax.enable_x64(True):
        found = jax.jit(percentile)(values, percent)
    np.testing.assert_allclose(found, np.percentile(values, percent), rtol=1e-14)


@pytest.mark.parametrize("percent", [0.0, 41.7, 80.0, 100.0])
def test_percentile_of_what_is_valid(percent):
    values, valid = EXAMPLES["noise"], np.random.default_rng(2).random((7, 11)) < 0.4
    shouting = np.where(valid, values, np.nan)
    with jax.enable_x64(True):
        found = jax.jit(percentile)(shouting, percent, valid=valid)
    np.testing.assert_allclose(found, np.percentile(values[valid], percent), rtol=1e-14)


def test_percentile_of_nothing_is_infinite():
    assert percentile(jnp.ones(3), 80.0, valid=jnp.zeros(3, bool)) == np.inf


def test_no_gradient_flows():
    assert not jax.grad(lambda x: percentile(x, 40.0))(jnp.arange(5.0)).any()


def test_devices_do_not_matter():
    values = np.random.default_rng(0).random((16, 9)).astype(np.float32)
    mesh = sharding.make_mesh(jax.devices())
    run = jax.jit(percentile)
    split = run(sharding.to_devices(values, mesh), 83.0)
    np.testing.assert_array_equal(split, run(values, 83.0))
