import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxssl import sampling


def many(function, count):
    """What a function of a key gives for many keys, as rows."""
    return np.asarray(jax.jit(jax.vmap(function))(jax.random.split(jax.random.key(0), count)))


def assert_equally_likely(rows, possible):
    """No outcome but these, and each about as often."""
    found = collections.Counter(map(tuple, rows.tolist()))
    assert found.keys() <= set(possible)
    counts = [found[outcome] for outcome in possible]
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(("count", "number"), [(2, 1), (4, 2), (4, 4), (5, 3), (3, 7)])
def test_every_sequence_of_distinct_numbers_is_as_likely(count, number):
    rows = many(lambda key: sampling.distinct(key, count, number), 20_000)
    possible = [*itertools.permutations(range(count), min(number, count))]
    assert_equally_likely(rows[:, :count], possible)


@pytest.mark.parametrize("count", [512, 600, 40_000])
def test_many_distinct_numbers(count):
    rows = many(lambda key: sampling.distinct(key, count, 512), 50)
    assert rows.min() >= 0
    assert rows.max() < count
    assert all(len(set(row)) == 512 for row in rows.tolist())
    tenths = np.bincount(10 * rows.ravel() // count, minlength=10)
    assert abs(tenths / rows.size - 0.1).max() < 0.01


MASK = np.array([0, 1, 1, 0, 0, 1, 0, 1, 0], bool)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_positions_of_the_mask_are_as_likely(number, replace):
    draw = functools.partial(sampling.draw, mask=jnp.array(MASK), number=number, replace=replace)
    rows = many(lambda key: draw(key)[0], 10_000)
    places = np.flatnonzero(MASK).tolist()
    ways = itertools.product(places, repeat=number)
    possible = ways if replace else itertools.permutations(places, number)
    assert_equally_likely(rows, [*possible])
    assert draw(jax.random.key(0))[1] == number


def test_fewer_positions_than_draws():
    draw = functools.partial(sampling.draw, jax.random.key(0), jnp.array(MASK), 7)
    positions, drawn = draw(replace=False)
    assert int(drawn) == 4
    assert sorted(positions[:4].tolist()) == [1, 2, 5, 7]
    again, drawn = draw(replace=True)
    assert int(drawn) == 7
    assert MASK[np.asarray(again)].all()


@pytest.mark.parametrize("replace", [False, True])
def test_nothing_to_draw_from(replace):
    mask = jnp.zeros(5, bool)
    positions, drawn = sampling.draw(jax.random.key(0), mask, 3, replace=replace)
    assert int(drawn) == 0
    assert ((positions >= 0) & (positions < 5)).all()
