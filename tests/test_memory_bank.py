import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxssl import memory_bank

LENGTHS, E, K = (7, 5, 6), 2, 4


def new_keys(rng):
    """Keys, and how many of them to push."""
    keys = rng.normal(size=(len(LENGTHS), K, E)).astype(np.float32)
    return keys, rng.integers(0, K + 1, len(LENGTHS)).astype(np.int32)


def queues():
    return [collections.deque(maxlen=length) for length in LENGTHS]


def extend(queues, keys, count):
    for queue, of_class, n in zip(queues, keys, count, strict=True):
        queue.extend(of_class[:n].tolist())


def oldest_first(bank, c):
    """The keys that a class has, in the order in which they came."""
    fill, position, length = (int(x[c]) for x in (bank.fill, bank.position, bank.length))
    slots = (position - fill + np.arange(fill)) % length
    return np.asarray(bank.keys[c], np.float32)[slots].tolist()


def assert_holds(bank, queues):
    for c, queue in enumerate(queues):
        assert oldest_first(bank, c) == [*queue]


def test_the_bank_forgets_what_came_first():
    bank, expected, rng = (
        memory_bank.empty(LENGTHS, E, "float32"),
        queues(),
        np.random.default_rng(0),
    )
    push = jax.jit(memory_bank.push)
    assert bank.keys.shape == (3, 7, E)
    for _ in range(20):
        keys, count = new_keys(rng)
        bank = push(bank, keys, count)
        extend(expected, keys, count)
        assert_holds(bank, expected)
    assert bank.fill.tolist() == [*LENGTHS]


def test_half_precision_rounds_what_it_holds():
    keys, count = new_keys(np.random.default_rng(0))
    bank = memory_bank.push(memory_bank.empty(LENGTHS, E, "bfloat16"), keys, count)
    assert bank.keys.dtype == jnp.bfloat16
    c = int(np.argmax(count))
    np.testing.assert_allclose(oldest_first(bank, c), keys[c, : count[c]], rtol=2**-8)


@pytest.mark.parametrize("c", [0, 1, 2])
def test_draws_are_of_the_keys_that_are_there(c):
    bank = memory_bank.empty(LENGTHS, E, "bfloat16")
    keys = np.arange(3 * K * E, dtype=np.float32).reshape(3, K, E)
    bank = memory_bank.push(bank, keys, np.array([K, 0, 3], np.int32))
    drawn = memory_bank.draw(bank, c, jax.random.key(0), (30, 2))
    assert (drawn.shape, drawn.dtype) == ((30, 2, E), jnp.float32)
    there = [K, 0, 3][c]
    expected = keys[c, :there] if there else np.zeros((1, E))
    np.testing.assert_array_equal(np.unique(drawn.reshape(-1, E), axis=0), expected)


def test_a_bank_of_given_keys():
    (keys, count), expected = new_keys(np.random.default_rng(0)), queues()
    extend(expected, keys, count)
    assert_holds(memory_bank.of(keys, count), expected)


def test_no_gradient_reaches_the_bank():
    keys, count = new_keys(np.random.default_rng(0))

    def total(old, new):
        bank = memory_bank.empty(LENGTHS, E, "float32")
        bank = memory_bank.push(dataclasses.replace(bank, keys=old), new, count)
        return bank.keys.sum() + memory_bank.draw(bank, 0, jax.random.key(0), (3,)).sum()

    for gradient in jax.grad(total, (0, 1))(jnp.ones((3, 7, E)), jnp.asarray(keys)):
        assert not gradient.any()


def test_devices_end_with_one_bank_that_holds_the_keys_of_all():
    """Also where these are more than a ring is long."""
    rng, expected = np.random.default_rng(0), queues()
    bank = memory_bank.empty(LENGTHS, E, "float32")

    @functools.partial(jax.pmap, axis_name="devices", in_axes=(None, 0, 0))
    def step(bank, keys, count):
        after = memory_bank.push(bank, keys, count)
        return memory_bank.push_of_devices(bank, after, K, "devices")

    for _ in range(3):
        pushed = [new_keys(rng) for _ in range(8)]
        banks = step(bank, *(np.stack(x) for x in zip(*pushed, strict=True)))
        for keys, count in pushed:
            extend(expected, keys, count)
        for i in range(8):
            bank = jax.tree.map(lambda x, i=i: np.asarray(x[i]), banks)
            assert_holds(bank, expected)
