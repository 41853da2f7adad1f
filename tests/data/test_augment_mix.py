"""Mixed examples: what their pixels say of the shares is what their labels say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gnp.data.augment_mix import (
    cutmix,
    label_smoothing,
    mix_images,
    mixup,
    mixup_or_cutmix,
    symmetric_beta,
)

HEIGHT, WIDTH = 12, 20


def constant_images(batch):
    """Image i has the value 0 or 240 by turns throughout, and the label i: any share can be read.

    Returns uint8 images [batch, HEIGHT, WIDTH, 1] and the labels [batch, batch].
    """
    values = np.where(np.arange(batch) % 2, 240, 0).astype(np.uint8)
    images = np.broadcast_to(values[:, None, None, None], (batch, HEIGHT, WIDTH, 1))
    return jnp.asarray(images), jnp.eye(batch)


def shares(labels):
    """The share of each example itself; asserts that the rest is the partner's."""
    labels = np.asarray(labels)
    own, rest = np.diagonal(labels), np.roll(labels, 1, axis=1).diagonal()
    np.testing.assert_allclose(own + rest, 1, rtol=1e-6)
    assert ((labels > 0).sum(axis=1) <= 2).all() and (labels >= 0).all()
    return own


def partner_pixels(images):
    """The share of pixels that are not the example's own value; and of the partner's, by value."""
    images = np.asarray(images)[..., 0].astype(float)
    odd = np.arange(len(images)) % 2 == 1
    return np.where(odd[:, None, None], 240 - images, images) / 240


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.8, 1.0, 4.0])
def test_symmetric_beta(alpha):
    draws = np.asarray(symmetric_beta(jax.random.key(1), alpha, 20_000)).astype(float)
    assert np.isfinite(draws).all() and draws.min() >= 0 and draws.max() <= 1
    for x in (0.001, 0.02, 0.2, 0.4, 0.6, 0.8, 0.98, 0.999):  # nearer to 1, float32 is coarse
        assert abs((draws < x).mean() - stats.beta.cdf(x, alpha, alpha)) < 2.5 / np.sqrt(20_000)
    assert np.isfinite(symmetric_beta(jax.random.key(0), 0.01, 20_000)).all()


def test_mixup_mixes_pixels_and_labels_alike():
    images, labels = constant_images(500)
    mixed, mixed_labels = mixup(jax.random.key(0), images, labels, 0.8)
    assert mixed.dtype == jnp.uint8
    other = partner_pixels(mixed)
    assert (other == other[:, :1, :1]).all()
    assert np.abs(240 * (other[:, 0, 0] - (1 - shares(mixed_labels)))).max() <= 0.501  # rounded
    assert stats.kstest(shares(mixed_labels), stats.beta(0.8, 0.8).cdf).pvalue > 1e-4
    exact, _ = mixup(jax.random.key(0), images.astype(jnp.float32), labels, 0.8)
    np.testing.assert_allclose(partner_pixels(exact)[:, 0, 0], 1 - shares(mixed_labels), atol=1e-6)


def test_mixup_is_numpys():
    images = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3)).astype(np.uint8)
    share = np.linspace(0, 1, 7, dtype=np.float32)
    mixed = np.asarray(mix_images(jnp.asarray(images), share))
    weight = share.astype(float)[:, None, None, None]
    exact = weight * images + (1 - weight) * np.roll(images, 1, axis=0)
    assert np.abs(mixed - exact).max() <= 0.5001


def test_cutmix_labels_are_the_share_of_pixels():
    batch = 4000
    images, _ = constant_images(batch)
    labels = jnp.asarray(np.eye(5, dtype=np.float32)[np.arange(batch) % 5])
    cut, cut_labels = jax.jit(cutmix)(jax.random.key(0), images, labels)
    other = partner_pixels(cut)
    assert set(np.unique(other)) == {0, 1}
    area = other.mean((1, 2))
    expected = np.asarray(labels) * (1 - area)[:, None] + np.roll(labels, 1, 0) * area[:, None]
    np.testing.assert_allclose(cut_labels, expected, atol=1e-6)
    # Boxes: full rows × full columns, of which some hang over each edge.
    rows, columns = other.any(2), other.any(1)
    np.testing.assert_array_equal(other, rows[:, :, None] & columns[:, None, :])
    for side in (rows, columns):
        edges = np.diff(side.astype(int), axis=1, prepend=0, append=0)
        assert (np.abs(edges).sum(1) <= 2).all()
        assert side[:, 0].any() and side[:, -1].any()


def test_cutmix_boxes_have_the_papers_law():
    """The sides before they are cut off, and the middles: as NumPy draws them, all in all."""
    batch, rng = 4000, np.random.default_rng(0)
    images, _ = constant_images(batch)
    cut, _ = cutmix(jax.random.key(2), images, jnp.ones((batch, 1)), 1.0)
    ours = partner_pixels(cut).mean(0)
    theirs = np.zeros((HEIGHT, WIDTH))
    for _ in range(batch):
        ratio = np.sqrt(1 - rng.beta(1.0, 1.0))
        tall, wide = int(HEIGHT * ratio), int(WIDTH * ratio)
        top = rng.integers(HEIGHT) - tall // 2
        left = rng.integers(WIDTH) - wide // 2
        theirs[max(top, 0) : max(top + tall, 0), max(left, 0) : max(left + wide, 0)] += 1 / batch
    assert np.abs(ours - theirs).max() < 5 * np.sqrt(2 * 0.25 / batch)


def test_either_of_both_for_each_example():
    batch = 2000
    images, _ = constant_images(batch)
    labels = jnp.asarray(np.eye(2, dtype=np.float32)[np.arange(batch) % 2])
    mixed, mixed_labels = jax.jit(mixup_or_cutmix)(jax.random.key(0), images, labels)
    other = partner_pixels(mixed)
    cut = (other.min((1, 2)) == 0) & (other.max((1, 2)) == 1)
    blended = (other == other[:, :1, :1]).all((1, 2))
    assert (cut | blended).all()
    # A box may be all or nothing: then a pixel does not tell which of both it was.
    assert 0.42 < cut.mean() < 0.5 and 0.5 < blended.mean() < 0.58
    own = np.asarray(mixed_labels)[np.arange(batch), np.arange(batch) % 2]
    assert np.abs(240 * (1 - own - other.mean((1, 2)))).max() <= 0.501


def test_label_smoothing():
    labels = jnp.asarray(np.eye(4, dtype=np.float32))
    images = jnp.zeros((4, 2, 2, 3), jnp.uint8)
    same, smoothed = label_smoothing(jax.random.key(0), images, labels, 0.2)
    assert same is images
    np.testing.assert_allclose(smoothed, np.full((4, 4), 0.05) + 0.8 * np.eye(4), rtol=1e-6)
