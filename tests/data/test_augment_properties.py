"""What holds for every registered augmentation, a new one too."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gnp.data.augment import MIXING, OPERATIONS, augment, parse_augment

BATCH, SIZE, NUM_CLASSES = 16, 12, 5
UINT8_ONLY = ("color_jitter", "rand_augment", "auto_augment")


def images_of(shape, seed=0, dtype=np.uint8):
    return np.random.default_rng(seed).integers(1, 256, shape).astype(dtype)


@functools.cache
def compiled(operation, dtype, channels):
    """`augment` of one operation, compiled once for all examples that Hypothesis finds."""
    del dtype, channels  # a function for each, so that its compilations can be counted
    return jax.jit(
        functools.partial(augment, operations=(operation,), size=SIZE, num_classes=NUM_CLASSES)
    )


@settings(deadline=None, max_examples=50)
@given(
    name=st.sampled_from(sorted(OPERATIONS)),
    colored=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_operation_keeps_its_promises(name, colored, seed):
    """Shape, range, dtype and probabilities; a pure function of the key; compiled or not."""
    channels, dtype = (3, "uint8") if colored else (1, "float32")
    if name in UINT8_ONLY:
        dtype = "uint8"
    images = jnp.asarray(images_of((BATCH, SIZE, SIZE, channels), seed % 1000, dtype))
    labels = jnp.arange(BATCH) % NUM_CLASSES
    (operation,) = parse_augment(name)
    run = compiled(operation, dtype, channels)
    key = jax.random.key(seed)
    out, out_labels = run(key, images, labels)
    assert out.shape == images.shape and out.dtype == images.dtype
    assert out.min() >= 0 and out.max() <= 255.001  # float32 weights of sum 1
    again, again_labels = run(key, images, labels)
    np.testing.assert_array_equal(out, again)
    np.testing.assert_array_equal(out_labels, again_labels)
    if name in MIXING:
        assert out_labels.shape == (BATCH, NUM_CLASSES) and out_labels.dtype == jnp.float32
        assert out_labels.min() >= 0
        np.testing.assert_allclose(out_labels.sum(1), 1, rtol=1e-6)
    else:
        assert out_labels.dtype == labels.dtype
        np.testing.assert_array_equal(out_labels, labels)
    assert run._cache_size() == 1, "keys must not compile anew"


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_every_operation_is_the_same_without_jit(name):
    images = jnp.asarray(images_of((BATCH, SIZE, SIZE, 3)))
    labels = jnp.arange(BATCH) % NUM_CLASSES
    (operation,) = parse_augment(name)
    eager = augment(
        jax.random.key(7), images, labels, (operation,), size=SIZE, num_classes=NUM_CLASSES
    )
    fast = compiled(operation, "uint8", 3)(jax.random.key(7), images, labels)
    # A float32 that is rounded to a whole number may be rounded the other way.
    assert np.abs(np.asarray(eager[0]).astype(int) - np.asarray(fast[0])).max() <= 1
    assert (np.asarray(eager[0]) != np.asarray(fast[0])).mean() < 0.001
    np.testing.assert_allclose(eager[1], fast[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_examples_and_keys_differ(name):
    """Of a batch of one image, whose labels differ: rows differ, and keys, and batches of keys."""
    if name == "label_smoothing":
        pytest.skip("nothing in it is random")
    images = jnp.asarray(np.stack([images_of((SIZE, SIZE, 3))] * BATCH))
    labels = jnp.arange(BATCH) % NUM_CLASSES
    (operation,) = parse_augment(name)
    run = compiled(operation, "uint8", 3)
    (a, p), (b, q) = (run(jax.random.key(i), images, labels) for i in range(2))
    if name in MIXING:
        own = np.asarray(p)[np.arange(BATCH), labels]
        assert len(np.unique(own)) > BATCH / 3 and (p != q).any()
    else:
        assert (a != a[:1]).any() and (a != b).any()


def test_operations_have_keys_of_their_own():
    """The same operation twice does not draw the same twice."""
    images = jnp.asarray(images_of((400, 6, 6, 1)))
    twice, _ = augment(
        jax.random.key(0), images, jnp.zeros(400, int), parse_augment("flip,flip"), size=6,
        num_classes=1,
    )  # fmt: skip
    same = (np.asarray(twice) == np.asarray(images)).all((1, 2, 3))
    assert abs(same.mean() - 0.5) < 0.125


@pytest.mark.parametrize("name", UINT8_ONLY)
@pytest.mark.parametrize("images", [jnp.zeros((2, 4, 4, 3)), jnp.zeros((2, 4, 4, 2), jnp.uint8)])
def test_what_needs_bytes_of_one_or_three_channels_says_so(name, images):
    with pytest.raises(TypeError, match=f"{name} needs uint8 images of 1 or 3 channels, got"):
        jax.eval_shape(OPERATIONS[name], jax.random.key(0), images)


def test_devices_do_not_matter_and_send_each_other_one_example():
    """A batch cut over eight devices comes out as it does from one, and stays where it is."""
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    over_devices = NamedSharding(mesh, PartitionSpec("data"))
    images = images_of((BATCH, SIZE, SIZE, 3))
    labels = np.arange(BATCH) % NUM_CLASSES
    operations = parse_augment("pad_crop,rand_augment:1,random_erasing,mixup_or_cutmix")
    run = functools.partial(augment, operations=operations, size=SIZE, num_classes=NUM_CLASSES)
    key, cut = jax.random.key(0), jax.device_put((images, labels), over_devices)
    compiled_for_8 = jax.jit(run, out_shardings=over_devices).lower(key, *cut).compile()
    for one, eight in zip(
        jax.jit(run)(key, images, labels), compiled_for_8(key, *cut), strict=True
    ):
        np.testing.assert_array_equal(one, eight)
    program = compiled_for_8.as_text()
    sent = re.findall(r"(\w+\[[\d,]*\])\S* (?:collective-permute|all-\w+)(?:-start)?\(", program)
    whether_any = "pred[]"  # RandAugment asks whether an image of the batch needs a histogram
    assert set(sent) - {whether_any} == {f"u8[1,{SIZE},{SIZE},3]", f"f32[1,{NUM_CLASSES}]"}
