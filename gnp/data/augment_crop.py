"""Augmentations that move, cut or cover pixels: pure functions of a key and a batch of images."""

import jax
import jax.numpy as jnp


def pad_crop(key: jax.Array, images: jax.Array, padding: int = 4) -> jax.Array:
    """Pads each image with `padding` zero pixels on each side and crops it back at random.

    Every one of the (2 · padding + 1)² offsets is equally likely, independently for each image.
    """
    batch, height, width, channels = images.shape
    pad = (padding, padding)
    padded = jnp.pad(images, ((0, 0), pad, pad, (0, 0)))
    offsets = jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)

    def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*offset, 0), (height, width, channels))

    return jax.vmap(crop)(padded, offsets)


def flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability 1/2."""
    mirrored = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def random_resized_crop(
    key: jax.Array,
    images: jax.Array,
    min_area: float = 0.08,
    *,
    size: int,
    max_ratio: float = 4 / 3,
) -> jax.Array:
    """A random part of each image, resized to `size` × `size` pixels (Szegedy et al., 2015).

    The part has a share of the image's area from U(min_area, 1), a ratio of width to height whose
    logarithm is from U(−log max_ratio, log max_ratio), as far as the image's sides allow, and any
    place in it. Resized bilinearly, antialiased, rounded if the dtype is an integer's.
    """
    batch, height, width, channels = images.shape
    area_key, ratio_key, corner_key = jax.random.split(key, 3)
    area = height * width * jax.random.uniform(area_key, (batch,), minval=min_area)
    ratio = max_ratio ** jax.random.uniform(ratio_key, (batch,), minval=-1, maxval=1)
    sides = jnp.minimum(
        jnp.stack([jnp.sqrt(area / ratio), jnp.sqrt(area * ratio)], axis=1),
        jnp.array([height, width]),
    )
    corners = jax.random.uniform(corner_key, (batch, 2)) * (jnp.array([height, width]) - sides)

    def resize(image: jax.Array, side: jax.Array, corner: jax.Array) -> jax.Array:
        scale = size / side
        shape = (size, size, channels)
        return jax.image.scale_and_translate(
            image.astype(jnp.float32), shape, (0, 1), scale, -corner * scale, "linear"
        )

    return as_dtype(images.dtype, jax.vmap(resize)(images, sides, corners))


def cutout(key: jax.Array, images: jax.Array, size: int = 16) -> jax.Array:
    """Sets a square of `size` × `size` pixels of each image to zero (DeVries & Taylor, 2017).

    Its middle is any pixel with the same probability, so it may hang over the image's edge.
    """
    batch, height, width, _ = images.shape
    middles = jax.random.randint(key, (batch, 2), 0, jnp.array([height, width]))
    covered = boxes(middles - size // 2, jnp.full((batch, 2), size), height, width)
    return jnp.where(covered, jnp.zeros((), images.dtype), images)


def random_erasing(key: jax.Array, images: jax.Array, probability: float = 0.25) -> jax.Array:
    """Covers a rectangle of each image with noise, with `probability` (Zhong et al., 2020).

    The noise is a whole number of 0 … 255, all equally likely, for each pixel and channel. The
    rectangle lies within the image, anywhere, as `draw_rectangles` says.
    """
    batch, height, width, _ = images.shape
    chosen_key, rectangle_key, noise_key = jax.random.split(key, 3)
    chosen = jax.random.bernoulli(chosen_key, probability, (batch, 1, 1, 1))
    covered = chosen & boxes(*draw_rectangles(rectangle_key, batch, height, width), height, width)
    noise = jax.random.bits(noise_key, images.shape, jnp.uint8)
    return jnp.where(covered, noise.astype(images.dtype), images)


def draw_rectangles(
    key: jax.Array, batch: int, height: int, width: int
) -> tuple[jax.Array, jax.Array]:
    """Rectangles within an image, as random erasing wants them (Zhong et al., 2020).

    The share of the image's area is from U(0.02, 1/3). The logarithm of the ratio of height to
    width is from U(log 0.3, log 1/0.3): the paper draws the ratio itself uniformly, which makes
    more tall ones than wide ones. A side is rounded, and at least 1 and at most the image's: the
    paper draws again where a rectangle does not fit. All places in the image are equally likely.

    Returns:
      The upper left corners and the sides, int32[batch, 2] each, vertical first.
    """
    area_key, ratio_key, corner_key = jax.random.split(key, 3)
    area = height * width * jax.random.uniform(area_key, (batch,), minval=0.02, maxval=1 / 3)
    ratio = 0.3 ** jax.random.uniform(ratio_key, (batch,), minval=-1, maxval=1)
    image = jnp.array([height, width])
    sides = jnp.stack([jnp.sqrt(area * ratio), jnp.sqrt(area / ratio)], axis=1)
    sides = jnp.clip(jnp.rint(sides).astype(jnp.int32), 1, image)
    return jax.random.randint(corner_key, (batch, 2), 0, image - sides + 1), sides


def boxes(corners: jax.Array, sides: jax.Array, height: int, width: int) -> jax.Array:
    """Where the boxes lie: bool[B, height, width, 1]; what hangs over the edge is cut off.

    Args:
      corners: int32[B, 2], the first row and column of each box; they may be negative.
      sides: int32[B, 2], the number of rows and columns.
      height: of the images.
      width: of the images.
    """
    first, last = corners[:, None], (corners + sides)[:, None]  # [B, 1, 2], `last` not included
    row, column = jnp.arange(height), jnp.arange(width)
    rows = (row >= first[..., 0]) & (row < last[..., 0])
    columns = (column >= first[..., 1]) & (column < last[..., 1])
    return (rows[:, :, None] & columns[:, None, :])[..., None]


def fit(images: jax.Array, size: int) -> jax.Array:
    """Images [B, H, W, C] of `size` × `size` pixels: the middle of larger ones, or resized."""
    batch, height, width, channels = images.shape
    if min(height, width) >= size:
        top, left = (height - size) // 2, (width - size) // 2
        return images[:, top : top + size, left : left + size]
    shape = (batch, size, size, channels)
    return as_dtype(images.dtype, jax.image.resize(images.astype(jnp.float32), shape, "linear"))


def as_dtype(dtype: jnp.dtype, images: jax.Array) -> jax.Array:
    """Float images in another dtype, rounded to the nearest whole number for an integer's."""
    return (jnp.rint(images) if jnp.issubdtype(dtype, jnp.integer) else images).astype(dtype)
