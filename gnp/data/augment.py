"""Augmentation of image batches inside the compiled step: pure functions of a key."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from gnp.errors import unknown

# An operation takes (key, images [B, H, W, C], padding, size), and keeps the dtype; all but
# random_resized_crop keep the shape.
Operation = Callable[[jax.Array, jax.Array, int, int], jax.Array]

POLICIES: dict[str, tuple[str, ...]] = {"none": (), "basic": ("pad_crop", "flip")}


def pad_crop(key: jax.Array, images: jax.Array, padding: int, size: int = 0) -> jax.Array:
    """Pads each image with `padding` zero pixels on each side and crops it back at random.

    Every one of the (2 · padding + 1)² offsets is equally likely, independently for each image.
    """
    del size
    batch, height, width, channels = images.shape
    pad = (padding, padding)
    padded = jnp.pad(images, ((0, 0), pad, pad, (0, 0)))
    offsets = jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)

    def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*offset, 0), (height, width, channels))

    return jax.vmap(crop)(padded, offsets)


def flip(key: jax.Array, images: jax.Array, padding: int = 0, size: int = 0) -> jax.Array:
    """Mirrors each image left to right with probability 1/2."""
    del padding, size
    mirrored = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def random_resized_crop(
    key: jax.Array, images: jax.Array, padding: int = 0, size: int = 224
) -> jax.Array:
    """A random part of each image, resized to `size` × `size` pixels (Szegedy et al., 2015).

    The part has a share of the image's area from U(0.08, 1), a ratio of width to height whose
    logarithm is from U(log 3/4, log 4/3), as far as the image's sides allow, and any place in it.
    Resized bilinearly, antialiased, rounded if the dtype is an integer's.
    """
    del padding
    batch, height, width, channels = images.shape
    keys = jax.random.split(key, 3)
    area = height * width * jax.random.uniform(keys[0], (batch,), minval=0.08)
    ratio = jnp.exp(jax.random.uniform(keys[1], (batch,), minval=-1, maxval=1) * jnp.log(4 / 3))
    sides = jnp.minimum(
        jnp.stack([jnp.sqrt(area / ratio), jnp.sqrt(area * ratio)], axis=1),
        jnp.array([height, width]),
    )
    corners = jax.random.uniform(keys[2], (batch, 2)) * (jnp.array([height, width]) - sides)

    def resize(image: jax.Array, side: jax.Array, corner: jax.Array) -> jax.Array:
        scale = size / side
        shape = (size, size, channels)
        return jax.image.scale_and_translate(
            image.astype(jnp.float32), shape, (0, 1), scale, -corner * scale, "linear"
        )

    return _as(images.dtype, jax.vmap(resize)(images, sides, corners))


OPERATIONS: dict[str, Operation] = {
    "pad_crop": pad_crop,
    "flip": flip,
    "random_resized_crop": random_resized_crop,
}


def fit(images: jax.Array, size: int) -> jax.Array:
    """Images [B, H, W, C] of `size` × `size` pixels: the middle of larger ones, or resized."""
    batch, height, width, channels = images.shape
    if min(height, width) >= size:
        top, left = (height - size) // 2, (width - size) // 2
        return images[:, top : top + size, left : left + size]
    shape = (batch, size, size, channels)
    return _as(images.dtype, jax.image.resize(images.astype(jnp.float32), shape, "linear"))


def _as(dtype: jnp.dtype, images: jax.Array) -> jax.Array:
    return (jnp.rint(images) if jnp.issubdtype(dtype, jnp.integer) else images).astype(dtype)


def parse_augment(text: str) -> tuple[str, ...]:
    """The operations of a policy ("none", "basic") or of a list ("pad_crop,flip"), in order.

    Raises:
      UserError: for a name that is neither.
    """
    if text in POLICIES:
        return POLICIES[text]
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in OPERATIONS:
            raise unknown("augmentation", name, [*POLICIES, *OPERATIONS])
    return names


def augment(
    key: jax.Array, images: jax.Array, operations: Sequence[str], padding: int, size: int
) -> jax.Array:
    """Applies the named operations in order, each with its own key.

    Args:
      key: a JAX random key; the result is a pure function of it.
      images: [B, H, W, C], any dtype, which is kept.
      operations: names, as `parse_augment` returns them.
      padding: pixels on each side, for `pad_crop`.
      size: pixels on a side of the result.
    """
    for i, name in enumerate(operations):
        images = OPERATIONS[name](jax.random.fold_in(key, i), images, padding, size)
    return fit(images, size)
