import jax
import numpy as np
import pytest
from conftest import OPTIMIZER, Small, make_state, plan, random_batch
from jax.sharding import PartitionSpec

from jaxssl import optim, sharding
from jaxssl.contracts import Stream, UserError
from jaxssl.methods import mkd
from jaxssl.step import Clock, make_train_step


def mesh_of(devices):
    return sharding.make_mesh(jax.devices()[:devices])


def test_mesh_of_all_devices():
    mesh = sharding.make_mesh()
    assert mesh.axis_names == ("data",)
    assert mesh.devices.tolist() == jax.devices()


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_rows_are_split_in_order(devices):
    mesh, rows = mesh_of(devices), np.arange(16).reshape(8, 2)
    batch = sharding.to_devices({"labeled": {"image": rows}}, mesh)
    image = batch["labeled"]["image"]
    np.testing.assert_array_equal(image, rows)
    assert image.sharding.spec == PartitionSpec("data")
    blocks = [np.asarray(shard.data) for shard in image.addressable_shards]
    for block, expected in zip(blocks, np.split(rows, devices), strict=True):
        np.testing.assert_array_equal(block, expected)
    everywhere = jax.device_put(rows, sharding.replicated(mesh))
    assert all(shard.data.shape == (8, 2) for shard in everywhere.addressable_shards)


def test_batch_that_cannot_be_split_is_refused():
    sharding.check_batch(Stream("labeled", 16), 2, mesh_of(8))
    words = r"batch.labeled=24 .*accumulate=2 and 8 devices.* multiple of 16; .* fewer devices"
    with pytest.raises(UserError, match=words):
        sharding.check_batch(Stream("labeled", 24), 2, mesh_of(8))


def test_a_machine_without_a_device_is_refused(monkeypatch):
    def refuse():
        raise RuntimeError("The TPU is already in use by process with pid 7.")

    monkeypatch.setattr(jax, "devices", refuse)
    with pytest.raises(UserError, match=r"no device here: The TPU is already in use by .* pid 7"):
        sharding.make_mesh()


def test_abstract_arrays():
    where = sharding.replicated(mesh_of(2))
    tree = sharding.abstract({"w": np.zeros((3, 2), np.float16)}, where)
    assert (tree["w"].shape, tree["w"].dtype, tree["w"].sharding) == ((3, 2), np.float16, where)


def train(method, devices, *, dtype, steps):
    """The state after some steps on noise, its batch split over the devices."""
    mesh = mesh_of(devices)
    nets = dict.fromkeys("ab", Small(dtype=dtype))
    (main,) = method.phases(plan(images=8))
    everywhere, rows = sharding.replicated(mesh), sharding.batched(mesh)
    step = jax.jit(
        make_train_step(
            method,
            nets,
            main,
            optim.make_optimizer(OPTIMIZER),
            optim.make_schedule(OPTIMIZER),
            learning_rate=0.1,
            seed=0,
        ),
        in_shardings=(everywhere, everywhere, rows, everywhere),
        out_shardings=everywhere,
    )
    state = jax.device_put(make_state(method, nets, size=(16, 24)), everywhere)
    clock = jax.device_put(Clock.of(main, 0), everywhere)
    for seed in range(steps):
        batch = sharding.to_devices(random_batch(seed, images=8), mesh)
        state, _ = step(state, {}, batch, clock)
    return jax.tree.map(np.asarray, state)


def assert_close(state, expected, tolerance):
    """Relative to the largest value of each leaf."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max()),
        state,
        expected,
    )


@pytest.mark.slow
def test_devices_do_not_matter_in_float64():
    method = mkd.Method(augment="all", consistency_on="all")
    with jax.enable_x64(True):
        one, two, eight = (train(method, n, dtype="float64", steps=5) for n in (1, 2, 8))
    assert one.params["a"]["head"]["classifier"]["kernel"].dtype == np.float64
    assert_close(two, one, 1e-10)
    assert_close(eight, one, 1e-10)


def test_devices_do_not_matter_in_float32():
    method = mkd.Method(strong=False)
    one, eight = (train(method, n, dtype="float32", steps=1) for n in (1, 8))
    assert_close(eight, one, 1e-5)
