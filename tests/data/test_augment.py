"""Augmentations that move or cover pixels against plain NumPy, and what texts mean."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnp.data.augment import (
    OPERATIONS,
    POLICIES,
    Operation,
    arguments,
    augment,
    cutout,
    fit,
    flip,
    mixes_labels,
    pad_crop,
    parse_augment,
    random_erasing,
    random_resized_crop,
)
from gnp.data.augment_crop import draw_rectangles
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
    flipped = np.asarray(flip(jax.random.key(0), jnp.asarray(images)))
    mirrored = np.array(
        [np.array_equal(a, b) for a, b in zip(flipped, images[:, :, ::-1], strict=True)]
    )
    kept = np.array([np.array_equal(a, b) for a, b in zip(flipped, images, strict=True)])
    assert (mirrored ^ kept).all()
    assert abs(mirrored.sum() - 500) < 5 * np.sqrt(250)


def test_random_resized_crop_is_a_box_of_the_image():
    """An image whose channels are its own coordinates tells which box came out, and how resized."""
    size, height, width = 8, 40, 60
    rows, columns = np.mgrid[:height, :width] + 0.5  # the pixels' middles
    image = np.stack([rows, columns, np.full_like(rows, 7)], axis=-1).astype(np.float32)
    images = jnp.asarray(np.broadcast_to(image, (3000, *image.shape)))
    crop = jax.jit(functools.partial(random_resized_crop, size=size))
    crops = np.asarray(crop(jax.random.key(0), images))
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


def test_cutout_is_numpys():
    """Every middle is used; the square around it, as far as it lies in the image, is zero."""
    images = images_of((3000, 6, 5, 2))
    ours = np.asarray(cutout(jax.random.key(0), jnp.asarray(images), 4))
    squares = {}
    for i in range(6):
        for j in range(5):
            mask = np.ones((6, 5, 1), np.uint8)
            mask[max(i - 2, 0) : i + 2, max(j - 2, 0) : j + 2] = 0
            squares[mask.tobytes()] = (i, j)
    used = [
        squares[(image != 0).all(-1, keepdims=True).astype(np.uint8).tobytes()] for image in ours
    ]
    np.testing.assert_array_equal(ours[ours != 0], images[ours != 0])
    _, counts = np.unique(used, axis=0, return_counts=True)
    assert len(counts) == 30 and (np.abs(counts - 100) < 50).all()
    odd = np.asarray(cutout(jax.random.key(0), jnp.ones((200, 9, 9, 1), jnp.uint8), 3))
    assert (odd == 0).sum((1, 2, 3)).max() == 9


def test_random_erasing_fills_rectangles_with_noise():
    n, height, width = 4000, 20, 30
    images = jnp.full((n, height, width, 2), 300, jnp.int32)  # a value that noise does not have
    out = np.asarray(random_erasing(jax.random.key(0), images, 0.25))
    erased = (out != 300).all(-1)
    np.testing.assert_array_equal(erased, (out != 300).any(-1))
    chosen = erased.any((1, 2))
    assert abs(chosen.sum() - n / 4) < 5 * np.sqrt(n * 3 / 16)
    rows, columns = erased.any(2), erased.any(1)
    np.testing.assert_array_equal(erased, rows[:, :, None] & columns[:, None, :])
    noise = np.bincount(out[erased].ravel(), minlength=256)
    assert len(noise) == 256 and (np.abs(noise - noise.mean()) < 5 * np.sqrt(noise.mean())).all()
    a, b = out[erased].T.astype(float)
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(len(a))  # channels are independent
    kept = random_erasing(jax.random.key(0), images, 0.0)
    assert (kept == 300).all()
    assert (random_erasing(jax.random.key(0), images, 1.0) != 300).any((1, 2, 3)).all()


def test_random_erasings_rectangles():
    n, height, width = 20_000, 900, 1000
    corners, sides = map(np.asarray, draw_rectangles(jax.random.key(0), n, height, width))
    assert (sides >= 1).all() and (corners >= 0).all()
    assert (corners + sides <= [height, width]).all()
    area, ratio = sides.prod(1) / (height * width), np.log(sides[:, 0] / sides[:, 1])
    free = (sides < [height, width]).all(1)
    assert free.mean() > 0.97
    for share in (0.25, 0.5, 0.75):
        assert abs((area < 0.02 + share * (1 / 3 - 0.02)).mean() - share) < 0.018
        assert abs((ratio < np.log(0.3) * (1 - 2 * share)).mean() - share) < 0.018
    assert area.min() > 0.0195 and area.max() < 0.335
    assert np.abs(ratio).max() < np.log(1 / 0.29)
    place = corners / np.maximum([height, width] - sides, 1)
    for share in (0.25, 0.5, 0.75):
        assert (np.abs((place[free] < share).mean(0) - share) < 0.018).all()
    tiny = draw_rectangles(jax.random.key(0), 500, 1, 2)
    assert (tiny[0] + tiny[1] <= np.array([1, 2])).all() and (tiny[1] >= 1).all()


def test_augment_fits_between_images_and_labels():
    """The middle of a larger image is cut before it is mixed, and labels count its pixels."""
    images = np.zeros((300, 8, 8, 1), np.uint8)
    images[1::2] = 255
    images[:, 0] = images[:, -1] = images[:, :, 0] = images[:, :, -1] = 77  # is cut off
    labels = jnp.arange(300) % 2
    out, weights = augment(
        jax.random.key(0), jnp.asarray(images), labels, parse_augment("cutmix"), size=6,
        num_classes=2,
    )  # fmt: skip
    assert out.shape == (300, 6, 6, 1) and set(np.unique(out)) == {0, 255}
    np.testing.assert_allclose(weights[:, 1], np.asarray(out).mean((1, 2, 3)) / 255, atol=1e-6)


def test_random_resized_crop_in_a_list_gives_the_size():
    images = jnp.asarray(images_of((2, 20, 30, 3)))
    operations = parse_augment("random_resized_crop:0.5,flip")
    key, labels = jax.random.key(0), jnp.arange(2)
    out, same = augment(key, images, labels, operations, size=7, num_classes=2)
    assert out.shape == (2, 7, 7, 3) and (same == labels).all()
    crop = random_resized_crop(jax.random.fold_in(key, 0), images, 0.5, size=7)
    np.testing.assert_array_equal(out, flip(jax.random.fold_in(key, 1), crop))


def test_what_a_text_means():
    basic = (Operation("pad_crop", (4,)), Operation("flip"))
    assert parse_augment("none") == parse_augment(" none ") == ()
    assert parse_augment("basic") == parse_augment("pad_crop, flip") == basic
    assert parse_augment("pad_crop:1,flip") == (Operation("pad_crop", (1,)), Operation("flip"))
    assert parse_augment("basic,cutout:8") == (*basic, Operation("cutout", (8,)))
    assert parse_augment("rand_augment:3") == (Operation("rand_augment", (3, 9)),)
    assert parse_augment("color_jitter:0:0.1 : 1") == (
        Operation("color_jitter", (0.0, 0.1, 1.0, 0.0)),
    )
    assert parse_augment("heavy") == (
        *basic,
        Operation("rand_augment", (2, 9)),
        Operation("random_erasing", (0.25,)),
        Operation("mixup_or_cutmix", (0.8, 1.0)),
        Operation("label_smoothing", (0.1,)),
    )
    (crop,) = parse_augment("random_resized_crop")
    assert crop == Operation("random_resized_crop", (0.08,))
    args = parse_augment("pad_crop:4.0,rand_augment,cutout")
    assert all(type(x) is int for operation in args for x in operation.args)
    assert hash(args) is not None
    assert mixes_labels(parse_augment("heavy")) and not mixes_labels(parse_augment("basic"))
    assert mixes_labels(parse_augment("label_smoothing"))


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_defaults_may_be_given(name):
    """Every operation's defaults are within their own range, and are its function's."""
    values = arguments(name)
    assert parse_augment(":".join([name, *map(str, values.values())])) == parse_augment(name)
    (operation,) = parse_augment(name)
    signature = inspect.signature(OPERATIONS[name])
    for argument, value in zip(values, operation.args, strict=True):
        assert signature.parameters[argument].default == value


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_policies_can_be_parsed(name):
    parse_augment(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pad_crop,flipp", "unknown augmentation 'flipp'; did you mean 'flip'?"),
        ("", "unknown augmentation ''; valid are: none, basic, heavy, pad_crop"),
        ("basic,none", "'none' is for no augmentation at all"),
        ("basic:4", "a policy takes no arguments; write pad_crop:4,flip with other numbers"),
        ("flip:1", "'flip:1' has too many arguments; its form is flip"),
        ("mixup:1:2", "its form is mixup:alpha"),
        ("mixup:x", "alpha is 'x'; it must be a number between 0.01 and 1000"),
        ("mixup:", "alpha is ''"),
        ("mixup:nan", "alpha is 'nan'"),
        ("mixup:0", "alpha is '0'"),
        ("cutmix:-1", "alpha is '-1'"),
        ("mixup_or_cutmix:1:inf", "cutmix_alpha is 'inf'"),
        ("random_erasing:1.1", "probability is '1.1'; it must be a number between 0 and 1"),
        ("pad_crop:-1", "padding is '-1'; it must be a whole number between 0"),
        ("pad_crop:1.5", "padding is '1.5'; it must be a whole number"),
        ("label_smoothing:1", "it must be a number at least 0 and below 1"),
        ("rand_augment:2:31", "magnitude is '31'; it must be a whole number between 0 and 30"),
        ("rand_augment:0", "num_layers is '0'"),
        ("cutout:0", "size is '0'; it must be a whole number between 1"),
        ("random_resized_crop:0", "min_area is '0'; it must be a number above 0 and at most 1"),
        ("color_jitter:0:0:0:0.6", "hue is '0.6'; it must be a number between 0 and 0.5"),
        ("mixup,flip", "'flip' changes images; it must come before 'mixup'"),
        ("label_smoothing,cutmix,basic", "'pad_crop' .* must come before 'label_smoothing'"),
        ("flip,random_resized_crop", "'random_resized_crop' must come first, and only once"),
        ("random_resized_crop,random_resized_crop", "must come first, and only once"),
    ],
)
def test_mistakes_are_told_in_one_line(text, message):
    with pytest.raises(UserError, match=message) as error:
        parse_augment(text)
    assert "\n" not in str(error.value)
