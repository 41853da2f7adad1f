"""Augmentation of image batches inside the compiled step: pure functions of a key."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from gnp.errors import unknown

# An operation takes (key, images [B, H, W, C] of any dtype, padding) and keeps shape and dtype.
Operation = Callable[[jax.Array, jax.Array, int], jax.Array]

POLICIES: dict[str, tuple[str, ...]] = {"none": (), "basic": ("pad_crop", "flip")}


def pad_crop(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
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


def flip(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Mirrors each image left to right with probability 1/2."""
    del padding
    mirrored = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


OPERATIONS: dict[str, Operation] = {"pad_crop": pad_crop, "flip": flip}


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
    key: jax.Array, images: jax.Array, operations: Sequence[str], padding: int
) -> jax.Array:
    """Applies the named operations in order, each with its own key.

    Args:
      key: a JAX random key; the result is a pure function of it.
      images: [B, H, W, C], any dtype, which is kept.
      operations: names, as `parse_augment` returns them.
      padding: pixels on each side, for `pad_crop`.
    """
    for i, name in enumerate(operations):
        images = OPERATIONS[name](jax.random.fold_in(key, i), images, padding)
    return images
