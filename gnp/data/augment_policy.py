"""RandAugment and AutoAugment: a few of Pillow's transforms for each image, drawn at random.

All transforms that can be drawn are known when the step is compiled. They are rows of a table, and
an image's transform is a row's number: the images of a batch go through the same few operations
(a blend, a lookup table and a warp), each with its own row's parameters.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gnp.data.augment_color import (
    ONE,
    autocontrast,
    blend,
    check_images,
    equalize,
    histogram,
    look_up,
    luma,
    mean,
    smooth,
)

# The operations of RandAugment (Cubuk et al., 2020); AutoAugment has "invert", too.
RAND_AUGMENT = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness"),
    *("color", "contrast", "sharpness", "posterize", "solarize", "autocontrast", "equalize"),
)

# What a blend goes towards, and tables that depend on the image.
_ENHANCEMENTS = ("brightness", "contrast", "color", "sharpness")
_ADAPTIVE = ("autocontrast", "equalize")

_SIGNED = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate", *_ENHANCEMENTS)

# AutoAugment's policy for CIFAR-10 (Cubuk et al., 2019, Table 7): 25 pairs of an operation, its
# probability and its magnitude of 0 … 9.
CIFAR10_POLICY = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 0), ("autocontrast", 0.4, 0)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("autocontrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 0)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 0)),
)


class Transform(NamedTuple):
    """One of Pillow's transforms: `enhancement`, then `table` or `adaptive`, then `source`.

    At most one of them changes the image. As a table of n transforms, each field has n rows.

    Attributes:
      enhancement: what to blend with, the number of one of `_ENHANCEMENTS`.
      factor: of the blend, as a multiple of 1/4096; 4096 leaves the image alone.
      table: uint8[256], the new value of each value.
      adaptive: 0, or 1 + the number of one of `_ADAPTIVE`, whose table takes the place.
      source: int32[6], (a, b, c, d, e, f) in 65536ths: the pixel (x, y) comes from
        (⌊a x + b y + c⌋, ⌊d x + e y + f⌋).
    """

    enhancement: np.ndarray | np.int32
    factor: np.ndarray | np.int32
    table: np.ndarray
    adaptive: np.ndarray | np.int32
    source: np.ndarray


def rand_augment(
    key: jax.Array, images: jax.Array, num_layers: int = 2, magnitude: int = 9
) -> jax.Array:
    """RandAugment (Cubuk et al., 2020): `num_layers` random transforms of each image in turn.

    Each is one of the 14 of `RAND_AUGMENT` with the same probability, drawn for each image and
    layer, with `magnitude` of 0 … 30 (see `make_transform`) and either sign with probability 1/2.

    Args:
      key: a JAX random key.
      images: uint8[B, H, W, C] of 1 or 3 channels.
      num_layers: transforms in turn.
      magnitude: of all transforms, 0 … 30.

    Raises:
      TypeError: if the images are not uint8, or have another number of channels.
    """
    check_images(images, "rand_augment")
    batch, height, width, _ = images.shape
    table = make_table(
        [(name, sign * magnitude, 30) for name in RAND_AUGMENT for sign in (1, -1)], height, width
    )
    for row in draw_rand_augment(key, num_layers, batch):
        images = transform(images, table, row)
    return images


def draw_rand_augment(key: jax.Array, num_layers: int, batch: int) -> jax.Array:
    """Rows of the table of `rand_augment`, 2 · operation + (negative), int32[num_layers, batch]."""
    return jax.random.randint(key, (num_layers, batch), 0, 2 * len(RAND_AUGMENT))


def auto_augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """AutoAugment's policy for CIFAR-10 (Cubuk et al., 2019).

    One of the 25 pairs of `CIFAR10_POLICY` for each image; each of its two transforms is applied
    with its probability, and has either sign with probability 1/2.

    Args:
      key: a JAX random key.
      images: uint8[B, H, W, C] of 1 or 3 channels.

    Raises:
      TypeError: if the images are not uint8, or have another number of channels.
    """
    check_images(images, "auto_augment")
    batch, height, width, _ = images.shape
    transforms = [
        (name, sign * magnitude, 9)
        for pair in CIFAR10_POLICY
        for name, _, magnitude in pair
        for sign in (1, -1)
    ]
    table = make_table([*transforms, ("identity", 0, 9)], height, width)
    for row in draw_auto_augment(key, batch):
        images = transform(images, table, row)
    return images


def draw_auto_augment(key: jax.Array, batch: int) -> jax.Array:
    """Rows of the table of `auto_augment`, int32[2, batch].

    4 · pair + 2 · (second of the pair) + (negative), or 100, which is the identity.
    """
    pair_key, applied_key, sign_key = jax.random.split(key, 3)
    pair = jax.random.randint(pair_key, (batch,), 0, len(CIFAR10_POLICY))
    probabilities = jnp.array([[p for _, p, _ in pair] for pair in CIFAR10_POLICY])
    applied = jax.random.bernoulli(applied_key, probabilities[pair].T)
    negative = jax.random.bernoulli(sign_key, shape=(2, batch))
    rows = 4 * pair + jnp.array([[0], [2]]) + negative
    return jnp.where(applied, rows, 4 * len(CIFAR10_POLICY))


def make_transform(name: str, magnitude: int, largest: int, height: int, width: int) -> Transform:
    """A transform of images of height × width pixels, as of torchvision's classes.

    With m = |magnitude| / largest, and its sign for those that have one:

      shear_x, shear_y           x' = x ± 0.3 m · y, or y' = y ± 0.3 m · x, from the corner
      translate_x, translate_y   by ± ⌊150/331 m · width⌋, or height, pixels
      rotate                     by ± 30 m degrees about the middle
      brightness, color, contrast, sharpness   Pillow's enhancement by the factor 1 ± 0.9 m
      posterize                  to the upper 8 − (4 m, rounded half to even) bits
      solarize                   value ↦ 255 − value from 255 (1 − m) on
      autocontrast, equalize, invert, identity   without a magnitude

    What comes from outside of the image is zero. Matrices are Pillow's for the nearest pixel, in
    whole 65536ths as Pillow has them.
    """
    size, sign = abs(magnitude), -1 if magnitude < 0 else 1
    share = size / largest
    value = np.arange(256)
    table, factor = value, ONE
    a, b, c, d, e, f = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0
    if name == "shear_x":
        b = sign * 0.3 * share
    elif name == "shear_y":
        d = sign * 0.3 * share
    elif name == "translate_x":
        c = -sign * (150 * width * size // (331 * largest))
    elif name == "translate_y":
        f = -sign * (150 * height * size // (331 * largest))
    elif name == "rotate":
        angle = sign * math.radians(30 * share)
        a = e = math.cos(angle)
        d = math.sin(angle)
        b = -d
        c = (1 - a) * width / 2 - b * height / 2
        f = (1 - e) * height / 2 - d * width / 2
    elif name in _ENHANCEMENTS:
        factor = round(ONE * (1 + sign * 0.9 * share))
    elif name == "posterize":
        table = value & ~(2 ** round(4 * share) - 1)
    elif name == "solarize":
        table = np.where(value < 255 * (largest - size) / largest, value, 255 - value)
    elif name == "invert":
        table = 255 - value
    # Pixels have their middle at a half, and come from where their middle does.
    source = np.array([a, b, c + a / 2 + b / 2, d, e, f + d / 2 + e / 2])
    return Transform(
        enhancement=np.int32(_ENHANCEMENTS.index(name) if name in _ENHANCEMENTS else 0),
        factor=np.int32(factor),
        table=table.astype(np.uint8),
        adaptive=np.int32(1 + _ADAPTIVE.index(name) if name in _ADAPTIVE else 0),
        source=np.floor(source * 65536 + 0.5).astype(np.int32),
    )


def make_table(transforms: Sequence[tuple[str, int, int]], height: int, width: int) -> Transform:
    """The transforms (name, magnitude, largest) as the rows of a table."""
    rows = [make_transform(*transform, height, width) for transform in transforms]
    return Transform(*(np.stack([*field]) for field in zip(*rows, strict=True)))


def transform(images: jax.Array, table: Transform, row: jax.Array) -> jax.Array:
    """Applies to each of uint8[B, H, W, C] images the transform in its `row`, int32[B], of `table`.

    Equal to Pillow's, pixel by pixel, for enhancement factors that are multiples of 1/4096.
    """
    enhancement, factor, fixed, adaptive, source = (jnp.asarray(field)[row] for field in table)

    grey, which = luma(images), enhancement[:, None, None, None]
    towards = jnp.where(which == 1, mean(grey), jnp.where(which == 2, grey, smooth(images)))
    blended = blend(jnp.where(which == 0, 0, towards), images, factor)

    # Images that need their histogram are not blended: the factor of their row is 1.
    own = jnp.broadcast_to(fixed[:, None], (*images.shape[::3], 256))

    def with_adaptive() -> jax.Array:
        counts = histogram(images)
        kind = adaptive[:, None, None]
        adapted = jnp.where(kind == 1, autocontrast(counts), equalize(counts))
        return jnp.where(kind > 0, adapted.astype(jnp.uint8), own)

    # Skipped in a batch that needs no histogram. XLA also fuses nothing over its edge: else it
    # would compute the tables anew for each pixel.
    tables = jax.lax.cond((adaptive > 0).any(), with_adaptive, lambda: own)
    return warp(look_up(tables, blended), source)


def warp(images: jax.Array, source: jax.Array) -> jax.Array:
    """`Image.transform(AFFINE, NEAREST)`, zero where a pixel comes from outside of the image.

    Args:
      images: [B, H, W, C], any dtype.
      source: int32[B, 6], as in `Transform`.
    """
    batch, height, width, channels = images.shape
    a, b, c, d, e, f = source.T[:, :, None, None]
    row, column = jnp.arange(height)[:, None], jnp.arange(width)
    x, y = (a * column + b * row + c) >> 16, (d * column + e * row + f) >> 16
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    pixels = jnp.where(inside, y * width + x, 0).reshape(batch, -1)
    take = jax.vmap(lambda image, pixel: image.at[pixel].get(mode="promise_in_bounds"))
    moved = take(images.reshape(batch, -1, channels), pixels).reshape(images.shape)
    return jnp.where(inside[..., None], moved, jnp.zeros((), images.dtype))
