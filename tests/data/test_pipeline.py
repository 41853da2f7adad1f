"""Batches: every example exactly once an epoch, whatever the sizes, and a function of the step."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gnp.data.pipeline import EvalBatches, TrainBatches, channel_statistics, normalise

MEAN, STD = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.3, 0.4])


def train_batches(num_examples, batch_size, seed=0, operations=(), size=4):
    return TrainBatches(num_examples, batch_size, seed, operations, 1, size, MEAN, STD)


sizes = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@settings(deadline=None, max_examples=15)
@given(sizes=sizes, seed=st.integers(0, 2**31 - 1), num_steps=st.integers(1, 12))
def test_each_example_exactly_once_an_epoch(sizes, seed, num_steps):
    """Read in calls of any length, the stream is a permutation of the examples after another."""
    num_examples, batch_size = sizes
    batches = train_batches(num_examples, batch_size, seed)
    order = jax.jit(batches.order, static_argnums=1)
    calls = -(-3 * num_examples // (num_steps * batch_size))  # three epochs at least
    stream = np.concatenate(
        [np.ravel(order(jnp.int32(call * num_steps), num_steps)) for call in range(calls)]
    )
    epochs = [stream[i * num_examples : (i + 1) * num_examples] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(num_examples))
    if num_examples > 20:
        assert any((epoch != epochs[0]).any() for epoch in epochs), "the order never changes"


def test_the_order_is_a_function_of_the_step_and_the_seed():
    """Far into a run too, and however many steps are asked for at once."""
    batches = train_batches(1000, 64)
    for first in (0, 15, 123_456):
        together = batches.order(jnp.int32(first), 20)
        alone = [batches.order(jnp.int32(first + i), 1)[0] for i in range(20)]
        np.testing.assert_array_equal(together, alone)
    other = train_batches(1000, 64, seed=1).order(jnp.int32(0), 20)
    assert (other != batches.order(jnp.int32(0), 20)).any()


def test_a_batch_holds_its_examples_normalised():
    rng = np.random.default_rng(0)
    data = {
        "image": jnp.asarray(rng.integers(0, 256, (10, 4, 4, 3)).astype(np.uint8)),
        "label": jnp.arange(10),
    }
    batches = train_batches(10, 3)
    indices = jnp.array([7, 2, 5])
    batch = batches.batch(data, indices, jnp.int32(4))
    np.testing.assert_array_equal(batch["label"], [7, 2, 5])
    expected = (np.asarray(data["image"])[[7, 2, 5]] / 255 - MEAN) / STD
    np.testing.assert_allclose(batch["input"], expected, rtol=1e-5, atol=1e-6)


def test_augmentation_follows_the_step():
    data = {
        "image": jnp.asarray(np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3)), jnp.uint8),
        "label": jnp.zeros(64, jnp.int32),
    }
    batches = train_batches(64, 64, operations=("pad_crop", "flip"))
    indices = jnp.arange(64)
    a, again, b = (batches.batch(data, indices, jnp.int32(i))["input"] for i in (3, 3, 4))
    np.testing.assert_array_equal(a, again)
    assert (a != b).any()


@settings(deadline=None, max_examples=15)
@given(num_examples=st.integers(1, 30), batch_size=st.integers(1, 40))
def test_evaluation_counts_every_example_once(num_examples, batch_size):
    data = {
        "image": jnp.zeros((num_examples, 1, 1, 3), jnp.uint8),
        "label": jnp.arange(num_examples),
    }
    batches = EvalBatches(num_examples, batch_size, 1, MEAN, STD)
    seen = np.zeros(num_examples)
    for i in range(batches.num_batches):
        batch = batches.batch(data, jnp.int32(i))
        assert batch["input"].shape == (batch_size, 1, 1, 3)
        np.add.at(seen, np.asarray(batch["label"]), np.asarray(batch["weight"]))
    np.testing.assert_array_equal(seen, 1)


def test_channel_statistics_are_numpys():
    images = np.random.default_rng(0).integers(0, 200, (50, 7, 5, 3)).astype(np.uint8)
    images[..., 2] = 9
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std[:2], (images / 255).std((0, 1, 2))[:2], rtol=1e-10)
    assert std[2] == 1, "a channel that does not vary must not be divided by zero"
    normal = normalise(jnp.asarray(images), mean, std)
    np.testing.assert_allclose(normal.mean((0, 1, 2)), 0, atol=1e-5)
