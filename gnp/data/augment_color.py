"""Pillow's changes of colour for a batch of uint8 images, and colour jitter made of them.

Everything is whole-number arithmetic: where Pillow computes in floating point, the numbers here
are the exact ones, so every device and compiler gives the same pixels, which are Pillow's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# Factors of enhancement are multiples of 1/4096, held as whole numbers: with so few digits Pillow's
# own float32 arithmetic is exact, and a factor is off by no more than 0.03 of a grey level.
ONE = 4096

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def color_jitter(
    key: jax.Array,
    images: jax.Array,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.0,
) -> jax.Array:
    """Changes brightness, contrast, saturation and hue of each image, as torchvision does.

    A factor x of brightness, contrast or saturation is from U(max(0, 1 − its range), 1 + range):
    the image is x · image + (1 − x) · (black, its mean grey, its grey version). The hue moves by
    a share of the colour circle from U(−hue, hue). The order is any, drawn for each image.

    Args:
      key: a JAX random key.
      images: uint8[B, H, W, C] of 1 or 3 channels; with one, saturation and hue do nothing.
      brightness: the range of its factor; 0 leaves it alone, as for the others.
      contrast: likewise.
      saturation: likewise.
      hue: at most 0.5.

    Raises:
      TypeError: if the images are not uint8, or have another number of channels.
    """
    check_images(images, "color_jitter")
    ranges = (brightness, contrast, saturation, hue)
    order, factors = draw_jitter(key, images.shape[0], ranges)
    return jitter(images, order, factors, with_hue=hue > 0)


def draw_jitter(
    key: jax.Array, batch: int, ranges: tuple[float, float, float, float]
) -> tuple[jax.Array, jax.Array]:
    """Draws for `jitter`: order int32[batch, n] of those n of range above 0; factors [batch, 4]."""
    order_key, factor_key, hue_key = jax.random.split(key, 3)
    used = jnp.array([i for i in range(4) if ranges[i] > 0], jnp.int32)
    order = used[jnp.argsort(jax.random.uniform(order_key, (batch, len(used))), axis=1)]
    low = jnp.array([round(ONE * max(0, 1 - x)) for x in ranges[:HUE]])
    high = jnp.array([round(ONE * (1 + x)) for x in ranges[:HUE]])
    factors = jax.random.randint(factor_key, (batch, 3), low, high + 1)
    turn = jax.random.uniform(hue_key, (batch, 1), minval=-ranges[HUE], maxval=ranges[HUE])
    return order, jnp.hstack([factors, jnp.trunc(255 * turn).astype(jnp.int32)])


def jitter(images: jax.Array, order: jax.Array, factors: jax.Array, *, with_hue: bool) -> jax.Array:
    """Changes the colours of each image, one thing after the other.

    Args:
      images: uint8[B, H, W, C].
      order: int32[B, n], each of BRIGHTNESS, CONTRAST, SATURATION, HUE: what to change, in order.
      factors: int32[B, 4]: three factors as multiples of 1/4096, and the steps of `turn_hue`.
      with_hue: whether HUE is in the order.
    """
    for which in order.T:
        factor = jnp.take_along_axis(factors, which[:, None], axis=1)[:, 0]
        grey = luma(images)
        chosen = which[:, None, None, None]
        towards = jnp.where(chosen == CONTRAST, mean(grey), grey)
        towards = jnp.where(chosen == BRIGHTNESS, 0, towards)
        changed = blend(towards, images, factor)
        if with_hue:
            changed = jnp.where(chosen == HUE, turn_hue(images, factor), changed)
        images = changed
    return images


def check_images(images: jax.Array, name: str) -> None:
    """Raises a TypeError unless the images are uint8 of 1 or 3 channels."""
    if images.dtype != jnp.uint8 or images.shape[-1] not in (1, 3):
        raise TypeError(
            f"{name} needs uint8 images of 1 or 3 channels, got "
            f"{images.dtype} of {images.shape[-1]}"
        )


def blend(towards: jax.Array, images: jax.Array, factor: jax.Array) -> jax.Array:
    """`Image.blend`: ⌊factor · image + (1 − factor) · towards⌋ within 0 … 255, uint8[B, H, W, C].

    Args:
      towards: int32, broadcast to the images: what a factor of 0 gives.
      images: uint8[B, H, W, C].
      factor: int32[B], as multiples of 1/4096.
    """
    change = factor[:, None, None, None] * (images.astype(jnp.int32) - towards)
    return jnp.clip(towards + (change >> 12), 0, 255).astype(jnp.uint8)


def luma(images: jax.Array) -> jax.Array:
    """`convert("L")`: 0.299 R + 0.587 G + 0.114 B, rounded: int32[B, H, W, 1]."""
    images = images.astype(jnp.int32)
    if images.shape[-1] == 1:
        return images
    red, green, blue = (images[..., i : i + 1] for i in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16  # Pillow's 65536ths


def mean(grey: jax.Array) -> jax.Array:
    """The mean of int32[B, H, W, 1] pixels of each image, rounded half up: int32[B, 1, 1, 1]."""
    count = grey.shape[1] * grey.shape[2]
    total = grey.sum((1, 2, 3), keepdims=True)
    return total // count + (2 * (total % count) >= count)


def smooth(images: jax.Array) -> jax.Array:
    """`ImageFilter.SMOOTH`: (8 neighbours + 5 · pixel) / 13, rounded; the border stays. int32."""
    batch, height, width, channels = images.shape
    # A row of pixels is one axis: with an axis of 3 channels alone, nothing is vectorised.
    whole = images.astype(jnp.int32).reshape(batch, height, -1)
    padded = jnp.pad(whole, ((0, 0), (1, 1), (channels, channels)))
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    left, middle, right = (rows[:, :, i * channels :][:, :, : width * channels] for i in range(3))
    smoothed = jax.lax.div(2 * (left + middle + right + 4 * whole) + 13, 26)
    row, column = jnp.arange(height)[:, None], jnp.arange(width * channels) // channels
    inside = (row > 0) & (row < height - 1) & (column > 0) & (column < width - 1)
    return jnp.where(inside, smoothed, whole).reshape(images.shape)


def turn_hue(images: jax.Array, steps: jax.Array) -> jax.Array:
    """Adds `steps` (int32[B], of 1/255 of the circle) to the hue as torchvision does, modulo 256.

    The way through `convert("HSV")` and back, rounded to bytes as Pillow does. Where the hue of a
    colour is a whole number of steps, Pillow's float32 may say one less: it does for 0.3 % of all
    colours, whose channels may then differ by up to 6.
    """
    if images.shape[-1] == 1:
        return images
    div = jax.lax.div  # of numbers that are not negative
    red, green, blue = (images[..., i].astype(jnp.int32) for i in range(3))
    value = jnp.maximum(jnp.maximum(red, green), blue)
    spread = value - jnp.minimum(jnp.minimum(red, green), blue)
    sixths = jnp.where(  # the hue in (1 / (6 · spread))ths of the circle, from −spread on
        red == value,
        green - blue,
        jnp.where(green == value, 2 * spread + blue - red, 4 * spread + red - green),
    )
    circle = 6 * jnp.maximum(spread, 1)
    hue = div(255 * jnp.where(sixths < 0, sixths + circle, sixths), circle)
    saturation = div(255 * spread, jnp.maximum(value, 1))

    hue = (hue + steps[:, None, None]) & 255
    sextant = div(6 * hue, 255)
    part = 6 * hue - 255 * sextant  # of the sextant, in 255ths

    def darker(share: jax.Array) -> jax.Array:  # value · (1 − share / 255²), rounded
        return div(2 * value * (65025 - share) + 65025, 2 * 65025)

    low = darker(255 * saturation)
    falling, rising = darker(saturation * part), darker(saturation * (255 - part))
    sextant = jnp.where(sextant == 6, 0, sextant)
    channels = (
        (value, falling, low, low, rising, value),
        (rising, value, value, falling, low, low),
        (low, low, rising, value, value, falling),
    )
    turned = [jax.lax.select_n(sextant, *cases) for cases in channels]
    return jnp.stack(turned, axis=-1).astype(jnp.uint8)


def histogram(images: jax.Array) -> jax.Array:
    """How often each value is in each channel of each image: int32[B, C, 256]."""
    batch, height, width, channels = images.shape
    cells = images.reshape(batch, height * width, channels) + 256 * jnp.arange(channels)
    empty = jnp.zeros((batch, 256 * channels), jnp.int32)
    count = jax.vmap(lambda counts, cell: counts.at[cell].add(1, mode="promise_in_bounds"))
    return count(empty, cells).reshape(batch, channels, 256)


def look_up(tables: jax.Array, images: jax.Array) -> jax.Array:
    """tables[b, c, pixel] for each pixel: uint8[B, C, 256] and uint8[B, H, W, C] to the latter."""
    batch, channels, _ = tables.shape
    cells = images.reshape(batch, -1, channels) + 256 * jnp.arange(channels)
    take = jax.vmap(lambda table, cell: table.at[cell].get(mode="promise_in_bounds"))
    return take(tables.reshape(batch, -1), cells).reshape(images.shape)


def autocontrast(counts: jax.Array) -> jax.Array:
    """`ImageOps.autocontrast` as tables, int32[B, C, 256], of the histograms, int32[B, C, 256].

    ⌊255 · (value − lowest) / (highest − lowest)⌋ within 0 … 255; a channel of one value stays.
    Where this is a whole number before it is rounded down, Pillow's float64 arithmetic
    ⌊value · scale − lowest · scale⌋, scale = 255 / (highest − lowest), may fall short of it and
    give one less. It does so here, too: `_last_bits` tells how far both products are off.
    """
    value = jnp.arange(256)
    lowest, highest = _extremes(counts)
    spread = jnp.maximum(highest - lowest, 1)
    # What is outside of lowest … highest does not occur: any value there will do.
    scaled = 255 * jnp.clip(value - lowest, 0, spread)
    result, rest = scaled // spread, scaled % spread
    bits = jnp.asarray(_last_bits())[spread[..., 0]]
    shortfall = jnp.take_along_axis(bits, lowest, axis=-1) - bits
    # The difference is rounded, too: what is nearer to the whole number than to the next float64
    # below it, 2^(⌊log₂ (result − 1)⌋ − 52) away or less, becomes the whole number.
    half = jnp.array([0, 0, *(2 ** ((x - 1).bit_length() - 1) // 2 for x in range(2, 256))])
    result -= (rest == 0) & (shortfall.astype(jnp.int32) > half[result])
    return jnp.where(highest > lowest, result, value)


@functools.cache
def _last_bits() -> np.ndarray:
    """uint32[256, 256]: at [d, i] the float64 product i · (255 / d) in units of 2⁻⁵², modulo 2³².

    Differences of two, as signed numbers, are exact where the true one is a whole number.
    """
    scale = 255.0 / np.maximum(np.arange(256), 1)
    products = np.arange(256) * scale[:, None]
    return (products % 1 * 2.0**52).astype(np.uint64).astype(np.uint32)


def equalize(counts: jax.Array) -> jax.Array:
    """`ImageOps.equalize` as tables, int32[B, C, 256], of the histograms, int32[B, C, 256].

    (⌊step / 2⌋ + number of darker pixels) / step, rounded down, with the step ⌊(pixels below the
    highest value) / 255⌋; a channel of fewer such pixels stays as it is.
    """
    _, highest = _extremes(counts)
    below = counts.sum(-1, keepdims=True) - jnp.take_along_axis(counts, highest, axis=-1)
    step = below // 255
    darker = jnp.cumsum(counts, axis=-1) - counts
    table = jnp.minimum((step // 2 + darker) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, table, jnp.arange(256))


def _extremes(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The lowest and the highest value that occurs, int32[B, C, 1] each."""
    occurs = counts > 0
    lowest = jnp.argmax(occurs, axis=-1, keepdims=True)
    return lowest, 255 - jnp.argmax(occurs[..., ::-1], axis=-1, keepdims=True)
