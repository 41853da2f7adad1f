"""Augmentations against plain NumPy, and as properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnp.data.augment import (
    OPERATIONS,
    augment,
    fit,
    flip,
    pad_crop,
    parse_augment,
    random_resized_crop,
)
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
    once, again = (
        augment(jax.random.key(seed), images, operations, padding, size) for _ in range(2)
    )
    assert once.shape == images.shape and once.dtype == images.dtype
    np.testing.assert_array_equal(once, again)
    if "random_resized_crop" in operations:
        assert once.min() >= 0 and once.max() <= 255.001  # float32 weights of sum 1
    else:
        assert set(np.unique(once)) <= {0, *np.unique(images)}


def test_keys_give_different_augmentations():
    images = jnp.asarray(images_of((64, 8, 8, 3)))
    a, b = (augment(jax.random.key(i), images, ("pad_crop", "flip"), 4, 8) for i in range(2))
    assert (a != b).any()


def test_random_resized_crop_is_a_box_of_the_image():
    """An image whose channels are its own coordinates tells which box came out, and how resized."""
    size, height, width = 8, 40, 60
    rows, columns = np.mgrid[:height, :width] + 0.5  # the pixels' middles
    image = np.stack([rows, columns, np.full_like(rows, 7)], axis=-1).astype(np.float32)
    images = jnp.asarray(np.broadcast_to(image, (3000, *image.shape)))
    crops = np.asarray(
        jax.jit(random_resized_crop, static_argnums=(2, 3))(jax.random.key(0), images, 0, size)
    )
    assert crops.shape == (3000, size, size, 3)
    np.testing.assert_allclose(crops[..., 2], 7, rtol=1e-5)
    # A triangle of a few whole pixels gives a coordinate back to a few percent of a side.
    y, x = crops[:, :, 0, 0], crops[:, 0, :, 1]
    tall, wide = ((v[:, 5] - v[:, 2]) * size / 3 for v in (y, x))
    area, ratio = tall * wide / (height * width), wide / tall
    assert 0.07 < area.min() < 0.1 and 0.9 < area.max() < 1.04
    free = area < 0.3  # whose sides nothing limits
    assert 0.72 < ratio[free].min() < 0.77 and 1.3 < ratio[free].max() < 1.39
    assert abs(np.mean(area < 0.54) - 0.5) < 0.05
    middle = (y[:, 3] + y[:, 4]) / 2
    assert abs(middle.mean() - height / 2) < 1  # any place
    assert middle[free].std() > 5


def test_a_whole_image_is_resized_as_pillow_does():
    from PIL import Image

    images = images_of((2, 5, 5, 3))
    larger = np.asarray(fit(jnp.asarray(images), 16))
    for ours, image in zip(larger, images, strict=True):
        theirs = Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR)
        assert np.abs(ours.astype(int) - np.asarray(theirs)).max() <= 1  # they round in between
    np.testing.assert_array_equal(fit(jnp.asarray(images), 3), images[:, 1:4, 1:4])


def test_names():
    assert parse_augment("none") == ()
    assert parse_augment("basic") == parse_augment("pad_crop, flip") == ("pad_crop", "flip")
    with pytest.raises(UserError, match="'flipp'; did you mean 'flip'"):
        parse_augment("pad_crop,flipp")
