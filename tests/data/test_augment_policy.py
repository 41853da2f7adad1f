"""RandAugment and AutoAugment: every transform against Pillow's, and what is drawn how often."""

import jax
import numpy as np
import pillow_augment
import pytest

from gnp.data.augment_policy import (
    CIFAR10_POLICY,
    RAND_AUGMENT,
    auto_augment,
    draw_auto_augment,
    draw_rand_augment,
    make_table,
    rand_augment,
    transform,
)

NAMES = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness"),
    *("color", "contrast", "sharpness", "posterize", "solarize", "autocontrast", "equalize"),
)
SIGNED = NAMES[1:10]
NUM_IMAGES = 4

# Cubuk et al. (2019), Table 7, as printed there: operation, probability, magnitude.
TABLE_7 = """
Invert 0.1 7 Contrast 0.2 6
Rotate 0.7 2 TranslateX 0.3 9
Sharpness 0.8 1 Sharpness 0.9 3
ShearY 0.5 8 TranslateY 0.7 9
AutoContrast 0.5 8 Equalize 0.9 2
ShearY 0.2 7 Posterize 0.3 7
Color 0.4 3 Brightness 0.6 7
Sharpness 0.3 9 Brightness 0.7 9
Equalize 0.6 5 Equalize 0.5 1
Contrast 0.6 7 Sharpness 0.6 5
Color 0.7 7 TranslateX 0.5 8
Equalize 0.3 7 AutoContrast 0.4 8
TranslateY 0.4 3 Sharpness 0.2 6
Brightness 0.9 6 Color 0.2 8
Solarize 0.5 2 Invert 0.0 3
Equalize 0.2 0 AutoContrast 0.6 0
Equalize 0.2 8 Equalize 0.6 4
Color 0.9 9 Equalize 0.6 6
AutoContrast 0.8 4 Solarize 0.2 8
Brightness 0.1 3 Color 0.7 0
Solarize 0.4 5 AutoContrast 0.9 3
TranslateY 0.9 9 TranslateY 0.7 9
AutoContrast 0.9 2 Solarize 0.8 3
Equalize 0.8 8 Invert 0.1 3
TranslateY 0.7 9 AutoContrast 0.9 1
"""


def paper_policy():
    names = {name.replace("_", ""): name for name in (*NAMES, "invert")}
    for line in TABLE_7.split("\n")[1:-1]:
        a, p, m, b, q, n = line.split()
        yield (names[a.lower()], float(p), int(m)), (names[b.lower()], float(q), int(n))


def signed(name, sign, bin_, largest, height, width):
    value = pillow_augment.magnitude(name, bin_, largest, height, width)
    return sign * value if name in SIGNED else value


@pytest.mark.parametrize(("height", "width", "channels"), [(32, 32, 3), (23, 40, 3), (32, 32, 1)])
@pytest.mark.parametrize("largest", [9, 30])
def test_every_transform_is_pillows(height, width, channels, largest):
    """Every operation, sign and some magnitudes, on photographs and noise, pixel by pixel."""
    chosen = [0, 1, 3, 8, 9] if largest == 9 else [0, 1, 9, 14, 23, 30]
    cases = [(n, s, m) for n in (*NAMES, "invert") for s in (1, -1) for m in chosen]
    photos = [pillow_augment.photo(40, i, channels)[:height, :width] for i in range(NUM_IMAGES - 1)]
    rng = np.random.default_rng(0)
    photos.append(rng.integers(0, 256, (height, width, channels)).astype(np.uint8))
    table = make_table([(n, s * m, largest) for n, s, m in cases], height, width)
    rows = np.repeat(np.arange(len(cases)), len(photos))
    images = np.stack(photos * len(cases))
    ours = np.asarray(jax.jit(transform)(images, table, rows))
    for row, image, got in zip(rows, images, ours, strict=True):
        name, sign, bin_ = cases[row]
        value = signed(name, sign, bin_, largest, height, width)
        expected = pillow_augment.transform(image, name, value, rounded=True)
        np.testing.assert_array_equal(got, expected, err_msg=str(cases[row]))
        if name in pillow_augment.ENHANCE:  # without the rounding of the factor
            exact = pillow_augment.transform(image, name, value, rounded=False)
            assert np.abs(got.astype(int) - exact).max() <= 1


def test_the_operations_of_rand_augment():
    assert RAND_AUGMENT == NAMES


def test_rand_augment_draws_all_alike():
    n = 20_000
    rows = np.asarray(draw_rand_augment(jax.random.key(0), 2, n))
    for row in rows:
        counts = np.bincount(row, minlength=28)
        assert len(counts) == 28 and (np.abs(counts - n / 28) < 5 * np.sqrt(n / 28)).all()
    p = 1 / 28**2
    counts = np.bincount(28 * rows[0] + rows[1], minlength=28**2)
    assert len(counts) == 28**2  # both layers, independent of each other
    assert (np.abs(counts - n * p) < 5 * np.sqrt(n * p) + 1).all()


def test_auto_augment_is_the_papers():
    """All but the magnitudes of operations that have none."""
    for ours, paper in zip(CIFAR10_POLICY, paper_policy(), strict=True):
        for (name, p, m), (expected, q, n) in zip(ours, paper, strict=True):
            assert (name, p) == (expected, q)
            assert m == n or name in ("autocontrast", "equalize", "invert")


def test_auto_augment_draws_as_the_paper():
    n = 50_000
    rows = np.asarray(draw_auto_augment(jax.random.key(0), n))
    for second in range(2):
        expected = np.zeros(101)
        for i, pair in enumerate(paper_policy()):
            expected[4 * i + 2 * second :][:2] = pair[second][1] / 25 / 2
        expected[100] = 1 - expected.sum()
        counts = np.bincount(rows[second], minlength=101)
        assert (np.abs(counts - n * expected) <= 5 * np.sqrt(n * expected)).all()
    both = (rows < 100).all(axis=0)
    assert (rows[0, both] // 4 == rows[1, both] // 4).all()  # of one pair
    p = np.mean([a[1] * b[1] for a, b in paper_policy()])
    assert abs(both.sum() - n * p) < 5 * np.sqrt(n * p * (1 - p))
    opposite = rows[0, both] % 2 != rows[1, both] % 2  # signs are independent
    assert abs(opposite.mean() - 0.5) < 2.5 / np.sqrt(both.sum())


def test_rand_augment_applies_the_rows_that_it_draws():
    """A batch of one image: every image that comes out is what Pillow makes in two layers."""
    key, batch = jax.random.key(3), 64
    image = pillow_augment.photo(16, 1)
    run = jax.jit(rand_augment, static_argnums=(2, 3))
    ours = run(key, np.stack([image] * batch), 2, 17)
    rows = np.asarray(draw_rand_augment(key, 2, batch))
    for got, drawn in zip(np.asarray(ours), rows.T, strict=True):
        expected = image
        for row in drawn:
            value = signed(NAMES[row // 2], 1 - 2 * (row % 2), 17, 30, 16, 16)
            expected = pillow_augment.transform(expected, NAMES[row // 2], value, rounded=True)
        np.testing.assert_array_equal(got, expected)


def test_auto_augment_applies_the_rows_that_it_draws():
    key, batch = jax.random.key(5), 128
    image = pillow_augment.photo(16, 2)
    ours = jax.jit(auto_augment)(key, np.stack([image] * batch))
    rows = np.asarray(draw_auto_augment(key, batch))
    policy = list(paper_policy())
    for got, drawn in zip(np.asarray(ours), rows.T, strict=True):
        expected = image
        for row in drawn[drawn < 100]:
            name, _, bin_ = policy[row // 4][row % 4 // 2]
            value = signed(name, 1 - 2 * (row % 2), bin_, 9, 16, 16)
            expected = pillow_augment.transform(expected, name, value, rounded=True)
        np.testing.assert_array_equal(got, expected)
