"""What `open_source` finds under which name, and the size that images are kept at."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gnp import data
from gnp.data import resident
from gnp.data.sources import list_sources, open_source
from gnp.errors import UserError


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# Names


def test_lists_names_without_importing_tfds():
    code = (
        "import sys; from gnp import data; from gnp.data import resident; "
        "print(data.list_sources()); resident.load(data.open_source('digits')); "
        "assert 'tensorflow_datasets' not in sys.modules and 'tensorflow' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(run.stdout) == [
        *("digits", "npz", "folder", "imagenet", "tiny_imagenet", "ptb"),
        *("cifar10", "cifar100", "imagenet2012"),
    ]


def test_our_own_need_no_tfds(tmp_path):
    """Not even to say that their files are not there."""
    code = f"""
import sys
from gnp import data
from gnp.errors import UserError
for name in {list_sources()!r}:
    if not name.startswith("cifar") and name not in ("digits", "imagenet2012"):
        try:
            data.open_source(name, {str(tmp_path / "none")!r})
            print(name)
        except UserError as error:
            assert "none" in str(error)
assert "tensorflow_datasets" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("", "")


def test_what_a_data_set_holds():
    kinds = {name: data.holds(name) for name in list_sources()}
    assert kinds.pop("ptb") == "tokens"
    assert set(kinds.values()) == {"images"}
    source = open_source("digits")
    assert (source.holds, source.unit) == ("images", "image")


@pytest.mark.parametrize(("name", "nearest"), [("cifar-10", "cifar10"), ("digit", "digits")])
def test_unknown_name_is_told_the_nearest(name, nearest, tmp_path):
    with pytest.raises(UserError, match=f"unknown data set '{name}'.*'{nearest}'"):
        open_source(name, str(tmp_path))


# Digits


def test_digits_are_the_known_scans():
    source = open_source("digits")
    splits = resident.load(source)
    assert source.num_classes == 10 and source.classes == tuple("0123456789")
    assert (source.image_shape, source.same_size) == ((8, 8, 1), True)
    assert source.num_examples == {"train": 1437, "test": 360}
    assert (source.test_split, source.where) == ("test", "this package")
    for split, decoded in splits.items():
        assert decoded.images.shape == (source.num_examples[split], 8, 8, 1)
        assert decoded.images.dtype == np.uint8
        assert decoded.labels.shape == (source.num_examples[split],)
        assert decoded.labels.dtype == np.int32
    labels = np.concatenate([decoded.labels for decoded in splits.values()])
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    np.testing.assert_array_equal(np.bincount(labels), counts)


def test_digits_are_split_without_overlap_as_ever():
    order = np.random.RandomState(0).permutation(1797)
    splits = resident.load(open_source("digits"))
    images = np.empty((1797, 8, 8, 1), np.uint8)
    labels = np.empty(1797, np.int32)
    images[order] = np.concatenate([splits["test"].images, splits["train"].images])
    labels[order] = np.concatenate([splits["test"].labels, splits["train"].labels])
    # The file begins with the digits in turn, and with this scan (from 0 to 16).
    np.testing.assert_array_equal(labels[:10], np.arange(10))
    first = np.array(
        [
            [0, 0, 5, 13, 9, 1, 0, 0],
            [0, 0, 13, 15, 10, 15, 5, 0],
            [0, 3, 15, 2, 0, 11, 8, 0],
            [0, 4, 12, 0, 0, 8, 8, 0],
            [0, 5, 8, 0, 0, 9, 8, 0],
            [0, 4, 11, 0, 1, 12, 7, 0],
            [0, 2, 14, 5, 10, 12, 0, 0],
            [0, 0, 6, 13, 10, 0, 0, 0],
        ]
    )
    np.testing.assert_allclose(images[0, :, :, 0], first * 255 / 16, atol=0.5)
    assert images.max() == 255
    # The original's scans are all different, so that equal ones would be in both splits.
    assert len(np.unique(images.reshape(1797, -1), axis=0)) == 1797


def test_digits_can_be_divided_further():
    source = open_source("digits").select(train="train[:90%]", validation="train[90%:]")
    assert source.num_examples == {"train": 1293, "validation": 144}
    whole = resident.load(open_source("digits"))["train"]
    parts = resident.load(source).values()
    for field in ("images", "labels"):
        joined = np.concatenate([getattr(part, field) for part in parts])
        np.testing.assert_array_equal(joined, getattr(whole, field))


# Sizes


def write(path: Path, size: tuple[int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize(size).convert("RGB").save(path)
    return path


@pytest.fixture
def square(tmp_path):
    for i in range(3):
        write(tmp_path / "square" / "a" / f"{i}.png", (16, 16))
    return str(tmp_path / "square")


@pytest.fixture
def various(tmp_path):
    for i in range(3):
        write(tmp_path / "various" / "a" / f"{i}.png", (16 + i, 16))
    return str(tmp_path / "various")


@pytest.fixture
def wide(tmp_path):
    for i in range(3):
        write(tmp_path / "wide" / "a" / f"{i}.png", (20, 10))
    return str(tmp_path / "wide")


@pytest.mark.parametrize(("image_size", "kept"), [(8, 9), (224, 256)])
def test_square_images_of_another_size_are_resized(square, image_size, kept):
    """Else what is used of large ones would be a small part."""
    source = open_source("folder", square, image_size=image_size)
    assert (source.image_shape, source.same_size) == ((kept, kept, 3), False)


def test_smaller_images_that_are_all_of_one_size_are_kept():
    assert open_source("digits", image_size=224).image_shape == (8, 8, 1)
    assert open_source("digits", image_size=4).image_shape == (5, 5, 1)


@pytest.mark.parametrize("image_size", [None, 16])
def test_square_images_of_one_size_are_kept_as_they_are(square, image_size):
    source = open_source("folder", square, image_size=image_size)
    assert (source.image_shape, source.same_size) == ((16, 16, 3), image_size is None)
    image = np.asarray(Image.open(f"{square}/a/0.png"))
    np.testing.assert_array_equal(resident.load(source)["train"].images, [image] * 3)


@pytest.mark.parametrize("kind", ["various", "wide"])
@pytest.mark.parametrize(("image_size", "kept"), [(7, 8), (56, 64), (224, 256), (100, 114)])
def test_others_are_kept_at_eight_sevenths(request, kind, image_size, kept):
    source = open_source("folder", request.getfixturevalue(kind), image_size=image_size)
    assert (source.image_shape, source.same_size) == ((kept, kept, 3), False)


@pytest.mark.parametrize("kind", ["square", "various", "wide"])
@pytest.mark.parametrize("image_size", [None, 8])
def test_all_are_kept_at_the_size_that_is_asked_for(request, kind, image_size):
    folder = request.getfixturevalue(kind)
    source = open_source("folder", folder, image_size=image_size, resize=12)
    assert (source.image_shape, source.same_size) == ((12, 12, 3), False)
    images = resident.load(source)["train"].images
    assert images.shape == (3, 12, 12, 3)
    assert (np.diff(images[:, :, 6, 0].astype(int), axis=1) > 0).all(), "the gradient is upright"


def test_digits_can_be_resized():
    source = open_source("digits", resize=16)
    assert source.image_shape == (16, 16, 1)
    images = resident.load(source.select(test="test"))["test"].images
    original = open_source("digits").splits["test"]
    expected = Image.fromarray(original[7].image[..., 0]).resize(
        (16, 16), Image.Resampling.BILINEAR
    )
    np.testing.assert_array_equal(images[7, ..., 0], expected)


def test_without_a_size_one_is_asked_for(various, wide):
    for folder, told in ((various, "differ in size"), (wide, "have 10 × 20 pixels")):
        with pytest.raises(UserError) as caught:
            open_source("folder", folder)
        assert str(caught.value) == (
            f"the images of folder in {folder} {told}: set config.data.image_size, such as 224"
        )
