"""Saving and restoring: what comes back is what was saved, and what stays is what was asked for."""

import logging
import resource
import shutil
import threading

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxssl.checkpoint import FORMAT, CheckpointError, Checkpoints
from jaxssl.contracts import UserError


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: dict
    extra: dict


def make_state(seed=0):
    """Every dtype and container that a training state holds, drawn by numpy."""
    rng = np.random.default_rng(seed)
    params = {
        name: {
            "kernel": jnp.asarray(rng.normal(size=(3, 3, 4)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=4), jnp.bfloat16),
        }
        for name in ("a", "b")
    }
    optimizer = optax.chain(optax.clip(1.0), optax.sgd(optax.constant_schedule(0.1), momentum=0.9))
    extra = {
        "bank": jnp.asarray(rng.normal(size=(8, 2)), jnp.float32),
        "full": jnp.asarray(rng.random(8) < 0.5),
        "count": jnp.asarray(rng.integers(-9, 9, 8), jnp.int32),
        "nothing": {},
    }
    opt_state = {name: optimizer.init(params[name]) for name in params}
    return State(jnp.int32(seed), params, opt_state, extra)


def sharding(devices=1):
    if devices == 1:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("data",)), PartitionSpec())


def abstract(tree, where=None):
    where = where or sharding()
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def steps(directory):
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def save(directory, *numbers, **options):
    with Checkpoints(directory, **options) as checkpoints:
        for number in numbers:
            checkpoints.keep.add(number)
            checkpoints.save(number, make_state(number), {"phase": "main"})


@pytest.mark.parametrize("async_save", [True, False])
def test_round_trip_is_exact(tmp_path, async_save):
    save(tmp_path, 3, async_save=async_save)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(3, abstract(make_state()))
    assert_same(restored, make_state(3))


def test_metadata_round_trip(tmp_path):
    meta = {"best": None, "phases": [["warmup", 5], ["main", 10]], "miou": 0.25, "on": True}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(7, make_state(), meta)
        before = checkpoints.latest()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == before == (7, {**meta, "format": FORMAT, "keep": []})


@pytest.mark.parametrize(("saved", "restored"), [(1, 8), (8, 1), (8, 2)])
def test_other_number_of_devices(tmp_path, saved, restored):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    state = jax.device_put(make_state(1), sharding(saved))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        back = checkpoints.restore(1, abstract(state, sharding(restored)))
    assert_same(back, make_state(1))
    assert all(leaf.sharding == sharding(restored) for leaf in jax.tree.leaves(back))


def test_part_of_a_state(tmp_path):
    save(tmp_path, 2)
    with Checkpoints(tmp_path) as checkpoints:
        part = checkpoints.restore_part(2, ("params", "b"), abstract(make_state().params["b"]))
        assert_same(part, make_state(2).params["b"])
        with pytest.raises(UserError, match=r"2 missing from it: params/c/bias, params/c/kernel"):
            checkpoints.restore_part(2, ("params", "c"), abstract(make_state().params["b"]))


def test_donated_while_saving(tmp_path):
    """The step that follows a save overwrites its buffers."""
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        state = jnp.arange(1 << 20, dtype=jnp.float32)
        checkpoints.save(1, {"x": state}, {})
        jax.block_until_ready(overwrite(state))
        checkpoints.wait()
        restored = checkpoints.restore(1, abstract({"x": state}))
    np.testing.assert_array_equal(restored["x"], np.arange(1 << 20))


def test_keeps_newest_and_what_is_asked_for(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step, keep in [(1, {1}), (2, {1, 2}), (3, {2}), (4, {2})]:
            checkpoints.keep = keep
            checkpoints.save(step, make_state(), {})
        checkpoints.wait()
        assert steps(tmp_path) == [2, 4]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.keep == {2}
        checkpoints.save(5, make_state(), {})
        checkpoints.wait()
        assert steps(tmp_path) == [2, 5]
        checkpoints.keep.remove(2)
        checkpoints.save(6, make_state(), {})
        checkpoints.wait()
        assert steps(tmp_path) == [6]


def test_steps_must_rise(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, make_state(), {})
        for step in (5, 4):
            with pytest.raises(ValueError, match="rise"):
                checkpoints.save(step, make_state(), {})


def damage_empty(directory):
    shutil.rmtree(directory)
    directory.mkdir()


def damage_metadata(directory):
    (directory / "meta" / "metadata").unlink()


def damage_text(directory):
    (directory / "meta" / "metadata").write_text("{")


def damage_format(directory):
    (directory / "meta" / "metadata").write_text(f'{{"format": {FORMAT + 1}}}')


@pytest.mark.parametrize("damage", [damage_empty, damage_metadata, damage_text, damage_format])
def test_unreadable_newest_is_skipped(tmp_path, caplog, damage):
    save(tmp_path, 3, 5, 7)
    damage(tmp_path / "7")
    with caplog.at_level(logging.WARNING, "jaxssl"), Checkpoints(tmp_path) as checkpoints:
        latest = checkpoints.latest()
        assert latest is not None
        assert latest[0] == 5
        messages = [r.message for r in caplog.records if r.name.startswith("jaxssl")]
        assert len(messages) == 1
        assert str(tmp_path / "7") in messages[0]
        for step in (6, 7):
            checkpoints.save(step, make_state(step), {})
        checkpoints.wait()
        assert_same(checkpoints.restore(7, abstract(make_state())), make_state(7))
    assert len([p for p in tmp_path.iterdir() if p.name.startswith("7.unreadable")]) == 1


def test_interrupted_save_is_cleaned_up(tmp_path):
    save(tmp_path, 3)
    shutil.copytree(tmp_path / "3", tmp_path / "4.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path) as checkpoints:
        latest = checkpoints.latest()
        assert latest is not None
        assert latest[0] == 3
        checkpoints.save(4, make_state(), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]


def test_another_tree_is_refused_by_leaf(tmp_path):
    save(tmp_path, 1)
    state = make_state()
    params = {**state.params, "c": {f"w{i}": jnp.zeros(2) for i in range(9)}}
    params["a"] = {"kernel": jnp.zeros((3, 3, 5)), "bias": jnp.zeros(4, jnp.float32)}
    wrong = state.replace(params=params, extra={k: state.extra[k] for k in ("full", "count")})
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError) as error:
        checkpoints.restore(1, abstract(wrong))
    text = str(error.value)
    assert "9 missing from it: params/c/w0, params/c/w1" in text
    assert "params/c/w5" not in text
    assert "1 only in it: extra/bank" in text
    assert "2 different: params/a/bias (bfloat16[4] saved, float32[4] expected)" in text
    assert "params/a/kernel (float32[3,3,4] saved, float32[3,3,5] expected)" in text


def test_damaged_arrays_are_one_line(tmp_path):
    # One array: with several, orbax leaves reads behind that complain about a closed event loop.
    state = {"x": jnp.arange(100.0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        for path in (tmp_path / "1" / "state").rglob("d/*"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(UserError, match="damaged") as error:
            checkpoints.restore(1, abstract(state))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert str(tmp_path / "1") in str(error.value)


def test_step_that_is_not_there(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="no checkpoint"):
        checkpoints.restore(9, abstract(make_state()))


@pytest.fixture
def small_files():
    """Writing more than 64 kB into one file fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(on):
        resource.setrlimit(resource.RLIMIT_FSIZE, ((1 << 16) if on else soft, hard))

    yield limit
    limit(False)


def test_failed_write(tmp_path, small_files, caplog):
    state = {"x": jnp.asarray(np.random.default_rng(0).normal(size=1 << 16), jnp.float32)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        small_files(True)
        checkpoints.save(2, state, {})
        with pytest.raises(CheckpointError, match="File too large") as error:
            checkpoints.wait()
        assert "\n" not in str(error.value)
        checkpoints.save(3, state, {})
        with pytest.raises(CheckpointError, match="intact"):
            checkpoints.save(4, state, {})
        latest = checkpoints.latest()
        assert latest is not None
        assert latest[0] == 1
        assert [p.name for p in tmp_path.iterdir()] == ["1"]
        assert not any(record.exc_info for record in caplog.records)
        small_files(False)
        checkpoints.save(5, state, {})
        checkpoints.wait()
        assert [p.name for p in tmp_path.iterdir()] == ["5"]


def test_close_ends_threads_and_keeps_the_error_under_way(tmp_path, small_files):
    before = threading.active_count()
    state = {"x": jnp.asarray(np.random.default_rng(0).normal(size=1 << 16), jnp.float32)}

    def train():
        with Checkpoints(tmp_path) as checkpoints:
            small_files(True)
            checkpoints.save(1, state, {})
            raise KeyError("training failed")

    with pytest.raises(KeyError):
        train()
    assert threading.active_count() <= before


def test_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot create"):
        Checkpoints(tmp_path / "file" / "checkpoints")
