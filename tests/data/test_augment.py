"""Augmentations against plain NumPy, and as properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnp.data.augment import OPERATIONS, augment, flip, pad_crop, parse_augment
from gnp.errors import UserError


def images_of(shape, seed=0, dtype=np.uint8):
    return np.random.default_rng(seed).integers(1, 256, shape).astype(dtype)


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_pad_crop_is_a_window_of_the_padded_image(padding):
    """Found by search among all windows that NumPy cuts; over many images, all are used."""
    images = images_of((2000, 6, 5, 2))
    cropped = np.asarray(jax.jit(pad_crop, static_argnums=2)(jax.random.key(0), images, padding))
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    offsets = range(2 * padding + 1)
    used = set()
    for before, after in zip(padded, cropped, strict=True):
        found = [
            (i, j)
            for i in offsets
            for j in offsets
            if np.array_equal(before[i : i + 6, j : j + 5], after)
        ]
        assert found, "no window of the padded image"
        used.update(found)
    assert len(used) == (2 * padding + 1) ** 2


def test_flip_mirrors_half_of_the_images():
    images = images_of((1000, 3, 4, 1))
    flipped = np.asarray(flip(jax.random.key(0), jnp.asarray(images), 0))
    mirrored = np.array(
        [np.array_equal(a, b) for a, b in zip(flipped, images[:, :, ::-1], strict=True)]
    )
    kept = np.array([np.array_equal(a, b) for a, b in zip(flipped, images, strict=True)])
    assert (mirrored ^ kept).all()
    assert abs(mirrored.sum() - 500) < 5 * np.sqrt(250)


@settings(deadline=None, max_examples=25)
@given(
    operations=st.lists(st.sampled_from(sorted(OPERATIONS)), max_size=3),
    batch=st.integers(1, 4),
    size=st.integers(1, 9),
    padding=st.integers(0, 5),
    dtype=st.sampled_from([np.uint8, np.float32]),
    seed=st.integers(0, 2**31 - 1),
)
def test_shape_range_dtype_and_determinism(operations, batch, size, padding, dtype, seed):
    images = jnp.asarray(images_of((batch, size, size, 3), seed % 1000, dtype))
    once, again = (augment(jax.random.key(seed), images, operations, padding) for _ in range(2))
    assert once.shape == images.shape and once.dtype == images.dtype
    np.testing.assert_array_equal(once, again)
    assert set(np.unique(once)) <= {0, *np.unique(images)}


def test_keys_give_different_augmentations():
    images = jnp.asarray(images_of((64, 8, 8, 3)))
    a, b = (augment(jax.random.key(i), images, ("pad_crop", "flip"), 4) for i in range(2))
    assert (a != b).any()


def test_names():
    assert parse_augment("none") == ()
    assert parse_augment("basic") == parse_augment("pad_crop, flip") == ("pad_crop", "flip")
    with pytest.raises(UserError, match="'flipp'; did you mean 'flip'"):
        parse_augment("pad_crop,flipp")
