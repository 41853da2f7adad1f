"""Batches: every example exactly once an epoch, whatever the sizes, and a function of the step."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gnp.data.augment import parse_augment
from gnp.data.pipeline import EvalBatches, Preprocessing, TrainBatches, normalise

MEAN, STD = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.3, 0.4])


def preprocessing(augment="none", size=4, seed=0):
    return Preprocessing(parse_augment(augment), size, 10, MEAN, STD, seed)


def train_batches(num_examples, batch_size, seed=0, **kwargs):
    return TrainBatches(num_examples, batch_size, seed, preprocessing(seed=seed, **kwargs))


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
    batches = train_batches(64, 64, augment="pad_crop:1,flip", size=8)
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
    batches = EvalBatches(num_examples, batch_size, preprocessing(size=1))
    seen = np.zeros(num_examples)
    for i in range(batches.num_batches):
        batch = batches.batch(data, jnp.int32(i))
        assert batch["input"].shape == (batch_size, 1, 1, 3)
        np.add.at(seen, np.asarray(batch["label"]), np.asarray(batch["weight"]))
    np.testing.assert_array_equal(seen, 1)


def test_damaged_examples_are_learned_from_in_their_substitutes_class_and_not_evaluated():
    labels = jnp.array([3, ~jnp.int32(4), 5, ~jnp.int32(0)])
    data = {"image": jnp.zeros((4, 4, 4, 3), jnp.uint8), "label": labels}
    batch = train_batches(4, 4).batch(data, jnp.arange(4), jnp.int32(0))
    np.testing.assert_array_equal(batch["label"], [3, 4, 5, 0])
    batch = EvalBatches(4, 6, preprocessing()).batch(data, jnp.int32(0))
    np.testing.assert_array_equal(batch["weight"], [1, 0, 1, 0, 0, 0])
    assert (batch["label"] >= 0).all() and (batch["label"] < 10).all()


def test_normalised_images_have_mean_0_and_deviation_1():
    images = np.random.default_rng(0).integers(0, 200, (50, 7, 5, 3)).astype(np.uint8)
    mean, std = (images / 255).mean((0, 1, 2)), (images / 255).std((0, 1, 2))
    normal = np.asarray(normalise(jnp.asarray(images), mean, std), np.float64)
    np.testing.assert_allclose(normal.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(normal.std((0, 1, 2)), 1, atol=1e-5)


def test_labels_are_mixed_where_an_operation_does():
    data = {"image": jnp.zeros((8, 4, 4, 3), jnp.uint8), "label": jnp.arange(8)}
    batches = train_batches(8, 8, augment="label_smoothing:0.1")
    batch = batches.batch(data, jnp.arange(8), jnp.int32(0))
    expected = 0.9 * np.eye(10)[:8] + 0.01
    np.testing.assert_allclose(batch["label"], expected, rtol=1e-6)
