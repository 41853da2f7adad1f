"""Augmentations that mix examples and their labels: pure functions of a key and a batch.

Each example is mixed with the one before it in the batch (the first with the last). A batch is
already in random order, so this is as random as any partner; and where the batch is cut over
devices, each of them receives one single example from its neighbour, where a random permutation
would send nearly all of them round. How much is mixed is drawn for each example and not once for
the batch: the law of an example is the same, and a batch's mean loss varies less.
"""

import jax
import jax.numpy as jnp

from gnp.data.augment_crop import as_dtype, boxes


def mixup(
    key: jax.Array, images: jax.Array, labels: jax.Array, alpha: float = 0.8
) -> tuple[jax.Array, jax.Array]:
    """λ · example + (1 − λ) · partner, pixels and labels, λ ~ Beta(α, α) (Zhang et al., 2018).

    Args:
      key: a JAX random key.
      images: [B, H, W, C]; the dtype is kept, an integer's values are rounded.
      labels: float32[B, K], probabilities.
      alpha: α above 0.
    """
    share = symmetric_beta(key, alpha, images.shape[0])
    return mix_images(images, share), mix_labels(labels, share)


def cutmix(
    key: jax.Array, images: jax.Array, labels: jax.Array, alpha: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """A box of the partner in each example, labels by the share of pixels (Yun et al., 2019).

    The box has ⌊√(1 − λ) · H⌋ rows and ⌊√(1 − λ) · W⌋ columns, λ ~ Beta(α, α), and any pixel as
    its middle. What hangs over the image's edge is cut off, and the partner's label counts by what
    is left, (pixels of the box) / (H · W).

    Args:
      key: a JAX random key.
      images: [B, H, W, C].
      labels: float32[B, K], probabilities.
      alpha: α above 0.
    """
    batch, height, width, _ = images.shape
    share_key, middle_key = jax.random.split(key)
    share = symmetric_beta(share_key, alpha, batch)
    middles = jax.random.randint(middle_key, (batch, 2), 0, jnp.array([height, width]))
    sides = jnp.floor(jnp.sqrt(1 - share)[:, None] * jnp.array([height, width])).astype(jnp.int32)
    covered = boxes(middles - sides // 2, sides, height, width)
    kept = 1 - covered.mean((1, 2, 3), dtype=jnp.float32)
    return jnp.where(covered, partner(images), images), mix_labels(labels, kept)


def mixup_or_cutmix(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Either `mixup` or `cutmix`, with probability 1/2 each, as DeiT does (Touvron et al., 2021).

    Drawn for each example, where DeiT draws for the batch: every gradient then sees both.
    """
    coin_key, mixup_key, cutmix_key = jax.random.split(key, 3)
    coin = jax.random.bernoulli(coin_key, shape=(images.shape[0], 1))
    mixed_images, mixed_labels = mixup(mixup_key, images, labels, mixup_alpha)
    cut_images, cut_labels = cutmix(cutmix_key, images, labels, cutmix_alpha)
    images = jnp.where(coin[..., None, None], mixed_images, cut_images)
    return images, jnp.where(coin, mixed_labels, cut_labels)


def label_smoothing(
    key: jax.Array, images: jax.Array, labels: jax.Array, epsilon: float = 0.1
) -> tuple[jax.Array, jax.Array]:
    """(1 − ε) · labels + ε / K for float32[B, K] labels (Szegedy et al., 2016); images as is."""
    del key
    return images, (1 - epsilon) * labels + epsilon / labels.shape[1]


def partner(examples: jax.Array) -> jax.Array:
    """What each example of the batch is mixed with: the one before it; the first has the last."""
    return jnp.roll(examples, 1, axis=0)


def mix_images(images: jax.Array, share: jax.Array) -> jax.Array:
    """Mixes share · image + (1 − share) · partner, share float32[B]; the images' dtype is kept."""
    own, other = (x.astype(jnp.float32) for x in (images, partner(images)))
    return as_dtype(images.dtype, other + share[:, None, None, None] * (own - other))


def mix_labels(labels: jax.Array, share: jax.Array) -> jax.Array:
    """Mixes share · label + (1 − share) · partner, labels float32[B, K] and share float32[B]."""
    return share[:, None] * labels + (1 - share)[:, None] * partner(labels)


def symmetric_beta(key: jax.Array, alpha: float, count: int) -> jax.Array:
    """`count` independent draws from Beta(α, α), float32.

    From two uniform numbers u, v each, without the rejection loops of a general Beta: with ν = 2α,
    T = √(ν (u^(−2/ν) − 1)) · cos 2πv has Student's distribution of ν degrees of freedom (Bailey,
    1994), and ½ (1 + T / √(ν + T²)) has Beta(ν/2, ν/2).
    """
    u, v = jax.random.uniform(key, (2, count))
    power, cosine = u ** (1 / alpha), jnp.cos(2 * jnp.pi * v)
    # T² / (ν + T²), written so that a tiny u^(1/α) does not overflow.
    square = (1 - power) * cosine**2
    return (1 + jnp.sign(cosine) * jnp.sqrt(square / (power + square))) / 2
