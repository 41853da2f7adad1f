"""The order of examples: permutations that host and step agree on, and that look random."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gnp.data.order import example_at, traced_example_at

seeds = st.integers(0, 2**31 - 1)


@settings(deadline=None, max_examples=150)
@given(size=st.integers(1, 3000), seed=seeds, epoch=st.integers(0, 500))
def test_an_epoch_is_a_permutation(size, seed, epoch):
    places = epoch * size + np.arange(size)
    np.testing.assert_array_equal(np.sort(example_at(seed, places, size)), np.arange(size))


def test_powers_of_two_and_their_neighbours():
    for bits in (8, 9, 12, 15):
        for size in (2**bits - 1, 2**bits, 2**bits + 1):
            found = example_at(3, size + np.arange(size), size)
            np.testing.assert_array_equal(np.sort(found), np.arange(size))


@settings(deadline=None, max_examples=20)
@given(size=st.sampled_from([1, 7, 256, 1437, 50_000, 2**30]), seed=seeds, data=st.data())
def test_the_step_agrees_with_the_host(size, seed, data):
    first = data.draw(st.integers(0, 2**31 - 65))
    places = first + np.arange(64)
    traced = jax.jit(traced_example_at, static_argnums=(0, 2))(
        seed, jnp.asarray(places, jnp.int32), size
    )
    np.testing.assert_array_equal(traced, example_at(seed, places, size))


@settings(deadline=None, max_examples=20)
@given(size=st.sampled_from([1, 7, 1437, 50_000]), some=st.lists(seeds, min_size=3, max_size=3))
def test_the_seed_may_be_traced(size, some):
    """One program for all seeds, and for several side by side, as uint32 or int32."""
    places = jnp.arange(100, 164)
    expected = [example_at(seed, np.asarray(places), size) for seed in some]
    traced = jax.jit(traced_example_at, static_argnums=2)
    for dtype in (jnp.uint32, jnp.int32):
        one_by_one = [traced(dtype(seed), places, size) for seed in some]
        np.testing.assert_array_equal(one_by_one, expected)
        side_by_side = jax.vmap(lambda seed: traced_example_at(seed, places, size))
        np.testing.assert_array_equal(side_by_side(jnp.array(some, dtype)), expected)


def chi_square(observed, freedom):
    """By how many standard deviations counts differ from equal ones."""
    expected = observed.mean()
    statistic = ((observed - expected) ** 2 / expected).sum()
    return (statistic - freedom) / np.sqrt(2 * freedom)


def test_every_example_may_come_anywhere():
    """Over many epochs, of 10 and of 300 examples, and over many seeds."""
    by_epoch = [
        example_at(0, np.arange(runs * size), size).reshape(runs, size)
        for size, runs in ((10, 20_000), (300, 3_000))
    ]
    by_seed = np.array([example_at(seed, np.arange(300), 300) for seed in range(3_000)])
    for orders in (*by_epoch, by_seed):
        size = orders.shape[1]
        counts = np.array([np.bincount(column, minlength=size) for column in orders.T])
        assert abs(chi_square(counts, (size - 1) ** 2)) < 5


def test_neighbours_are_independent():
    """Of all pairs of 12 examples, each follows the other equally often; so over two epochs."""
    size, runs = 12, 20_000
    orders = example_at(5, np.arange(2 * runs * size), size).reshape(runs, 2, size)
    pairs = np.zeros((size, size))
    np.add.at(pairs, (orders[:, 0, :-1].ravel(), orders[:, 0, 1:].ravel()), 1)
    off_diagonal = pairs[~np.eye(size, dtype=bool)]
    assert pairs.trace() == 0
    assert abs(chi_square(off_diagonal, off_diagonal.size - 1)) < 5
    across = np.zeros((size, size))
    np.add.at(across, (orders[:, 0].ravel(), orders[:, 1].ravel()), 1)
    assert abs(chi_square(across, (size - 1) ** 2)) < 5


def test_a_large_order_has_no_trend():
    """Ranks of 100,000 examples: no correlation with the place, the next one or the next epoch."""
    size = 100_000
    first, second = example_at(0, np.arange(2 * size), size).reshape(2, size).astype(float)
    for a, b in ((first, np.arange(size)), (first[1:], first[:-1]), (first, second)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(size)
    assert (first == np.arange(size)).sum() < 12  # fixed points: 1 is expected
    runs_up = (np.diff(first) > 0).mean()
    assert abs(runs_up - 0.5) < 5 / np.sqrt(size)
