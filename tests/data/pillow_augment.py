"""Augmentations of single images by Pillow and NumPy alone, given all that is random.

What Pillow's functions mean for RandAugment and AutoAugment is as in torchvision's classes.
"""

import math

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

ENHANCE = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "color": ImageEnhance.Color,
    "sharpness": ImageEnhance.Sharpness,
}


def to_pillow(image):
    """uint8[H, W, C] of 1 or 3 channels."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def to_numpy(image):
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def magnitude(name, bin_, largest, height, width):
    """The size of a transform's magnitude in its own unit; `bin_` of 0 … largest."""
    bins = largest + 1
    space = {
        "shear_x": np.linspace(0, 0.3, bins),
        "shear_y": np.linspace(0, 0.3, bins),
        "translate_x": np.linspace(0, 150 / 331 * width, bins),
        "translate_y": np.linspace(0, 150 / 331 * height, bins),
        "rotate": np.linspace(0, 30, bins),
        "posterize": 8 - np.round(np.arange(bins) / ((bins - 1) / 4)).astype(int),
        "solarize": np.linspace(255, 0, bins),
        **dict.fromkeys(ENHANCE, np.linspace(0, 0.9, bins)),
    }
    return space[name][bin_] if name in space else None


def transform(image, name, value, *, rounded):
    """A transform with the signed `value` of its magnitude; enhancements `rounded` to 1/4096."""
    image = to_pillow(image)
    if name in ENHANCE:
        factor = 1 + value
        image = ENHANCE[name](image).enhance(round(factor * 4096) / 4096 if rounded else factor)
    elif name == "rotate":
        image = image.rotate(value)
    elif name in ("shear_x", "shear_y", "translate_x", "translate_y"):
        matrix = {
            "shear_x": (1, value, 0, 0, 1, 0),
            "shear_y": (1, 0, 0, value, 1, 0),
            "translate_x": (1, 0, -math.trunc(value), 0, 1, 0),
            "translate_y": (1, 0, 0, 0, 1, -math.trunc(value)),
        }[name]
        image = image.transform(
            image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST
        )
    elif name == "posterize":
        image = ImageOps.posterize(image, int(value))
    elif name == "solarize":
        image = ImageOps.solarize(image, value)
    elif name != "identity":
        image = {
            "invert": ImageOps.invert,
            "autocontrast": ImageOps.autocontrast,
            "equalize": ImageOps.equalize,
        }[name](image)
    return to_numpy(image)


def turn_hue(image, steps):
    """Adds 1/255ths of the circle to the hue bytes, modulo 256."""
    if image.shape[-1] == 1:
        return image
    hsv = np.array(to_pillow(image).convert("HSV"))
    hsv[..., 0] += np.uint8(steps % 256)
    return to_numpy(Image.fromarray(hsv, "HSV").convert("RGB"))


def jitter(image, order, factors):
    """Brightness, contrast, saturation (factors, not percent) and hue (steps) in some order."""
    for which in order:
        if which == 3:
            image = turn_hue(image, int(factors[3]))
        else:
            name = ("brightness", "contrast", "color")[which]
            image = to_numpy(ENHANCE[name](to_pillow(image)).enhance(factors[which]))
    return image


def photo(size, seed, channels=3):
    """A smooth random image with some noise, uint8[size, size, channels]: not all values occur."""
    rng = np.random.default_rng(seed)
    small = to_pillow(rng.integers(0, 256, (4, 4, channels)).astype(np.uint8))
    smooth = to_numpy(small.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    low, high = sorted(rng.integers(0, 256, 2))
    noisy = smooth + rng.integers(-9, 10, smooth.shape)
    return np.clip(noisy, low, max(high, low + 30)).clip(0, 255).astype(np.uint8)
