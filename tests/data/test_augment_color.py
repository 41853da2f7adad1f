"""Changes of colour against Pillow, image by image, and the law of what is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pillow_augment
import pytest
from PIL import Image, ImageFilter, ImageOps
from scipy import stats

from gnp.data import augment_color
from gnp.data.augment_color import color_jitter, draw_jitter, jitter, turn_hue


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_is_pillows_in_any_order(channels):
    rng = np.random.default_rng(channels)
    images = np.stack([pillow_augment.photo(20, seed, channels) for seed in range(64)])
    order = np.argsort(rng.random((64, 3)), axis=1)
    factors = np.hstack([rng.integers(0, 8193, (64, 3)), np.zeros((64, 1), int)])
    ours = jax.jit(jitter, static_argnames="with_hue")(images, order, factors, with_hue=False)
    for image, got, which, factor in zip(images, ours, order, factors, strict=True):
        expected = pillow_augment.jitter(image, which, factor / 4096)
        np.testing.assert_array_equal(got, expected)


def test_smooth_is_pillows():
    images = noise((8, 9, 7, 3))
    ours = np.asarray(jax.jit(augment_color.smooth)(images))
    for image, got in zip(images, ours, strict=True):
        theirs = Image.fromarray(image).filter(ImageFilter.SMOOTH)
        np.testing.assert_array_equal(got, np.asarray(theirs))


@pytest.mark.parametrize("shape", [(2, 1, 1, 3), (2, 2, 5, 3), (2, 5, 2, 1)])
def test_smooth_leaves_tiny_images(shape):
    np.testing.assert_array_equal(augment_color.smooth(jnp.asarray(noise(shape))), noise(shape))


def test_hue_is_pillows_but_for_a_few_colours():
    """A third of a percent of colours has a hue that Pillow rounds to the next step."""
    images = noise((64, 64, 64, 3))
    steps = np.random.default_rng(1).integers(-127, 128, 64)
    ours = np.asarray(jax.jit(turn_hue)(images, steps)).astype(int)
    theirs = np.stack([pillow_augment.turn_hue(*pair) for pair in zip(images, steps, strict=True)])
    off = np.abs(ours - theirs).max(axis=-1)
    assert (off > 0).mean() < 0.005
    assert off.max() <= 6


def test_hue_in_a_jitter():
    """Hue last, first, and between; few enough colours that Pillow's rounding does not show."""
    images = np.stack([pillow_augment.photo(6, seed) for seed in range(3)])
    order = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
    factors = np.array([[3000, 5000, 6000, 40], [5000, 3000, 2000, -70], [4500, 4000, 5500, 9]])
    ours = np.asarray(jitter(jnp.asarray(images), order, jnp.asarray(factors), with_hue=True))
    for image, got, which, factor in zip(images, ours, order, factors, strict=True):
        expected = pillow_augment.jitter(image, which, [*(factor[:3] / 4096), factor[3]])
        off = np.abs(got.astype(int) - expected).max(axis=-1)
        assert (off > 1).mean() <= 0.03 and off.max() <= 15


def test_autocontrast_is_pillows_for_every_pair_of_extremes():
    """Against ImageOps' arithmetic in NumPy's float64, which stumbles in 12094 of the cases."""
    low, high = np.triu_indices(256, 1)
    counts = np.zeros((len(low), 1, 256), np.int32)
    counts[np.arange(len(low)), 0, low] = counts[np.arange(len(low)), 0, high] = 1
    tables = np.asarray(jax.jit(augment_color.autocontrast)(counts))[:, 0]
    scale = 255.0 / (high - low)
    value = np.arange(256)
    expected = np.clip((value * scale[:, None] + (-low * scale)[:, None]).astype(int), 0, 255)
    inside = (value >= low[:, None]) & (value <= high[:, None])
    np.testing.assert_array_equal(tables[inside], expected[inside])
    whole = 255 * (value - low[:, None]) // (high - low)[:, None]
    assert (expected != whole)[inside].sum() == 12094


@pytest.mark.parametrize("kind", ["autocontrast", "equalize"])
def test_tables_are_pillows(kind):
    """Of noise, of few pixels, of two values, and of one."""
    images = np.stack([pillow_augment.photo(24, seed) for seed in range(40)])
    images = np.concatenate([images, noise((4, 24, 24, 3)), images[:4] // 200, 0 * images[:2] + 9])

    def apply(images):
        counts = augment_color.histogram(images)
        return augment_color.look_up(getattr(augment_color, kind)(counts).astype(jnp.uint8), images)

    for image, got in zip(images, np.asarray(jax.jit(apply)(images)), strict=True):
        np.testing.assert_array_equal(got, getattr(ImageOps, kind)(Image.fromarray(image)))


def test_drawn_factors_and_orders():
    n = 40_000
    order, factors = draw_jitter(jax.random.key(0), n, (0.4, 1.5, 0.2, 0.1))
    order, factors = np.asarray(order), np.asarray(factors)
    for i, (low, high) in enumerate([(0.6, 1.4), (0, 2.5), (0.8, 1.2)]):
        law = stats.uniform(low, high - low)
        assert stats.kstest(factors[:, i] / 4096, law.cdf).pvalue > 1e-4
        assert round(low * 4096) <= factors[:, i].min() and factors[:, i].max() <= high * 4096 + 1
    # ⌊255 · U(−0.1, 0.1)⌋ towards zero: −25 … 25, and 0 twice as often.
    counts = np.bincount(factors[:, 3] + 25, minlength=51)
    p = np.array([0.5, *[1] * 24, 2, *[1] * 24, 0.5]) / 51
    assert (np.abs(counts - n * p) < 5 * np.sqrt(n * p)).all() and counts.sum() == n
    codes, counts = np.unique(order @ [64, 16, 4, 1], return_counts=True)
    assert len(codes) == 24 and (np.abs(counts - n / 24) < 5 * np.sqrt(n / 24)).all()
    some, _ = draw_jitter(jax.random.key(0), 50, (0.4, 0.0, 0.2, 0.0))
    assert set(map(tuple, np.asarray(some))) == {(0, 2), (2, 0)}


def test_color_jitter_applies_what_is_drawn():
    """A grey image shows its brightness factor alone; none of a range changes nothing."""
    images = np.full((2000, 2, 2, 3), 100, np.uint8)
    run = jax.jit(color_jitter, static_argnums=(2, 3, 4, 5))
    bright = np.asarray(run(jax.random.key(0), images, 0.5, 0.3, 0.3, 0.0))
    assert (bright == bright[:, :1, :1, :1]).all()
    assert stats.kstest((bright[:, 0, 0, 0] + 0.5) / 100, stats.uniform(0.5, 1).cdf).pvalue > 1e-4
    photos = noise((4, 5, 5, 3))
    np.testing.assert_array_equal(run(jax.random.key(0), photos, 0, 0, 0, 0), photos)
    turned = np.asarray(run(jax.random.key(0), photos, 0, 0, 0, 0.5))
    assert (turned != photos).any()
    np.testing.assert_array_equal(turned.max(-1), photos.max(-1))  # hue keeps the value
