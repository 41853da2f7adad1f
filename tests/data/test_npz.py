"""Arrays in a file: what NumPy writes is what is read, and all else is refused in one line."""

import os
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gnp.data import resident
from gnp.data.sources import open_source
from gnp.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 5, 4, 3)).astype(np.uint8)
LABELS = np.array([0, 2, 1, 1, 0, 2])


@pytest.fixture
def file(tmp_path):
    return tmp_path / "some.npz"


def open_npz(file, **arrays):
    np.savez(file, **arrays)
    return open_source("npz", str(file), image_size=5)


def read(file, split="train", **arrays):
    records = open_npz(file, **arrays).splits[split]
    return records.images, records.labels


def message_of(file, **arrays) -> str:
    if arrays:
        np.savez(file, **arrays)
    with pytest.raises(UserError) as caught:
        open_source("npz", str(file), image_size=5)
    message = str(caught.value)
    assert "\n" not in message and str(file) in message
    return message


def test_splits_are_what_was_written(file):
    source = open_npz(
        file,
        train_images=IMAGES,
        train_labels=LABELS,
        val_images=IMAGES[:2],
        val_labels=LABELS[:2],
        test_images=IMAGES[:3],
        test_labels=LABELS[:3] + 3,
    )
    assert source.num_examples == {"train": 6, "validation": 2, "test": 3}
    assert (source.name, source.num_classes, source.test_split) == ("npz", 6, "test")
    assert (source.classes[5], source.where, source.key) == ("5", str(file), None)
    loaded = resident.load(open_source("npz", str(file), resize=5).select(test="test"))
    assert loaded["test"].images.shape == (3, 5, 5, 3)
    np.testing.assert_array_equal(loaded["test"].labels, LABELS[:3] + 3)
    np.testing.assert_array_equal(source.splits["train"].images, IMAGES)
    np.testing.assert_array_equal(source.splits["train"].labels, LABELS)
    assert source.splits["train"].labels.dtype == np.int32
    record = source.splits["train"][1]
    assert (record.label, record.name) == (2, f"image 1 of train in {file}")


def test_square_images_of_one_size_need_no_size_and_are_as_they_are(file):
    np.savez(file, train_images=IMAGES[:, :4], train_labels=LABELS)
    source = open_source("npz", str(file))
    assert source.image_shape == (4, 4, 3)
    np.testing.assert_array_equal(resident.load(source)["train"].images, IMAGES[:, :4])


@pytest.mark.parametrize(
    ("images", "labels", "split"),
    [
        ("train_images", "train_labels", "train"),
        ("x_train", "y_train", "train"),
        ("X_train", "y_train", "train"),
        ("Train_Images", "TRAIN_LABELS", "train"),
        ("train_x", "train_y", "train"),
        ("images", "labels", "train"),
        ("image", "label", "train"),
        ("x", "y", "train"),
        ("valid_images", "valid_labels", "validation"),
        ("x_val", "y_val", "validation"),
        ("validation_images", "validation_labels", "validation"),
        ("x_test", "y_test", "test"),
        ("test_image", "test_label", "test"),
    ],
)
def test_names(file, images, labels, split):
    source = open_npz(
        file, **{images: IMAGES, labels: LABELS, "meta": np.arange(3), "x_of": LABELS}
    )
    assert list(source.splits) == [split]
    assert source.test_split == (None if split == "train" else split)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_compressed_or_not(file, write):
    write(file, images=IMAGES, labels=LABELS)
    records = open_source("npz", str(file), image_size=5).splits["train"]
    np.testing.assert_array_equal(records.images, IMAGES)


def test_tilde_is_the_home_folder(file, monkeypatch):
    np.savez(file, images=IMAGES, labels=LABELS)
    monkeypatch.setenv("HOME", str(file.parent))
    assert open_source("npz", "~/some.npz", image_size=5).num_examples == {"train": 6}


# Numbers


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.int64, np.uint64, ">i4"])
def test_whole_numbers_of_any_kind(file, dtype):
    images, labels = read(file, images=(IMAGES // 2).astype(dtype), labels=LABELS.astype(dtype))
    np.testing.assert_array_equal(images, IMAGES // 2)
    np.testing.assert_array_equal(labels, LABELS)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_from_0_to_1_or_whole(file, dtype):
    images, _ = read(file, images=(IMAGES / 255).astype(dtype), labels=LABELS)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, IMAGES)
    images, _ = read(file, images=IMAGES.astype(dtype), labels=LABELS)
    np.testing.assert_array_equal(images, IMAGES)


def test_floats_are_rounded_to_the_nearest(file):
    values = np.array([[[0, 0.0019, 0.002], [0.4999, 0.999, 1]]])
    images, _ = read(file, images=values, labels=LABELS[:1])
    np.testing.assert_array_equal(images[0, ..., 0], [[0, 0, 1], [127, 255, 255]])


@pytest.mark.parametrize(("shape", "channels"), [((5, 4), 1), ((5, 4, 1), 1), ((5, 4, 4), 4)])
def test_channels(file, shape, channels):
    images = RNG.integers(0, 256, (6, *shape)).astype(np.uint8)
    source = open_npz(file, images=images, labels=LABELS[:, None])
    assert source.image_shape == (6, 6, channels)
    records = source.splits["train"]
    np.testing.assert_array_equal(records.images, images.reshape(6, 5, 4, channels))
    np.testing.assert_array_equal(records.labels, LABELS)


# What cannot be used


def changed(array, place, value):
    array = array.copy()
    array[place] = value
    return array


FLOATS = IMAGES / 255


@pytest.mark.parametrize(
    ("images", "labels", "reason"),
    [
        (
            changed(FLOATS, (4, 1, 1, 1), np.nan),
            LABELS,
            r"images[4] of F has NaN or infinity (1 of",
        ),
        (
            changed(FLOATS, ([2, 5], 0), -np.inf),
            LABELS,
            r"images[2] of F has NaN or infinity (2 of",
        ),
        (FLOATS * 2, LABELS, "has values from 0.0 to 2.0; pixels are whole numbers from 0 to 255"),
        (FLOATS - 0.5, LABELS, "has values from -0.5 to 0.5; pixels"),
        (FLOATS * 255 + 0.25, LABELS, "; pixels are whole numbers"),
        (IMAGES.astype(int) + 1, LABELS, "has values from 1 to 256; pixels"),
        (IMAGES.astype(int) - 1, LABELS, "has values from -1 to 254; pixels"),
        (IMAGES > 7, LABELS, "images of F is bool; write one with np.savez"),
        (IMAGES.astype(complex), LABELS, "images of F is complex128; write"),
        (IMAGES.astype(str), LABELS, "images of F is <U3; write"),
        (IMAGES[..., :2], LABELS, "images of F has the shape [6, 5, 4, 2]; write"),
        (IMAGES[0, 0], LABELS, "images of F has the shape [4, 3]; write"),
        (np.uint8(7), LABELS, "images of F has the shape []; write"),
        (IMAGES[:0], LABELS[:0], "images of F has the shape [0, 5, 4, 3]; write"),
        (IMAGES[:, :0], LABELS, "images of F has the shape [6, 0, 4, 3]; write"),
        (IMAGES[None], LABELS, "images of F has the shape [1, 6, 5, 4, 3]; write"),
        (IMAGES, LABELS[1:], "F has 6 images in images but 5 in labels"),
        (IMAGES, LABELS[:0], "F has 6 images in images but 0 in labels"),
        (IMAGES, changed(LABELS, 3, -1), "labels[3] of F is -1; labels are whole numbers from 0"),
        (IMAGES, changed(LABELS, 2, 2**31), "labels[2] of F is 2147483648; labels are"),
        (IMAGES, LABELS.astype(float), "labels of F is float64[6]; write"),
        (IMAGES, LABELS > 1, "labels of F is bool[6]; write"),
        (IMAGES, np.eye(6, dtype=int), "labels of F is int64[6, 6]; write"),
        (IMAGES, np.int64(3), "labels of F is int64[]; write"),
        (IMAGES, LABELS.astype(str), "labels of F is <U21[6]; write"),
    ],
)
def test_arrays_that_are_refused(file, images, labels, reason):
    message = message_of(file, images=images, labels=labels)
    assert reason in message.replace(str(file), "F")


def test_splits_of_different_shapes(file):
    message = message_of(file, x_train=IMAGES, y_train=LABELS, x_test=IMAGES[:, :4], y_test=LABELS)
    assert message.endswith("has splits of different image shapes: [(4, 4, 3), (5, 4, 3)]")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["a", "b"], "has no images and labels, only a, b; write one with np.savez"),
        (["train_images"], "only train_images;"),
        (["train_images", "test_labels"], "only train_images, test_labels;"),
        (["images_labels"], "only images_labels;"),
    ],
)
def test_names_that_say_nothing(file, names, told):
    assert told in message_of(file, **dict.fromkeys(names, LABELS))


def test_a_file_of_nothing(file):
    np.savez(file)
    assert "has no images and labels, only nothing" in message_of(file)


def test_members_that_are_no_arrays(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("images", b"a picture")
        archive.writestr("labels", b"a name")
    message_of(file)


class Trap:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["images", "labels", "anything"])
def test_pickles_are_never_loaded(file, tmp_path, name):
    trap = np.array([Trap(tmp_path / "sprung")] * 6, object)
    message = message_of(file, **({"images": IMAGES, "labels": LABELS} | {name: trap}))
    assert f"cannot read {name} of {file}: it holds pickled objects, which are never" in message
    assert not (tmp_path / "sprung").exists()
    file.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert "is no .npz file" in message_of(file)
    assert not (tmp_path / "sprung").exists()
    np.load(file, allow_pickle=True)
    assert (tmp_path / "sprung").exists(), "the trap was none"


@pytest.mark.parametrize("content", [b"", b"text\n" * 50, b"PK\x03\x04", b"\x93NUMPY\x01\x00"])
def test_foreign_files(file, content):
    file.write_bytes(content)
    message = message_of(file)
    assert message.startswith(f"cannot read {file}: it is no .npz file, or is cut off; write one")


def test_a_single_array(file):
    with file.open("wb") as opened:
        np.save(opened, IMAGES)
    assert message_of(file).startswith(f"cannot read {file}: it is no .npz file")


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.floats(0, 1, exclude_max=True), cut=st.booleans(), compressed=st.booleans())
def test_a_damaged_file_is_refused_or_as_it_was(file, place, cut, compressed):
    images = IMAGES // 100  # which can be compressed
    (np.savez_compressed if compressed else np.savez)(file, images=images, labels=LABELS)
    content = bytearray(file.read_bytes())
    start = int(place * len(content))
    if cut:
        del content[start:]
    else:
        content[start] ^= 0xFF
    file.write_bytes(content)
    try:
        records = open_source("npz", str(file), image_size=5).splits["train"]
    except UserError:
        message_of(file)
    else:
        np.testing.assert_array_equal(records.images, images)
        np.testing.assert_array_equal(records.labels, LABELS)
        assert not cut


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    message = message_of(tmp_path / "none.npz")
    assert (
        message == f"there is no file {tmp_path}/none.npz; set config.data.data_dir to a .npz file"
    )
    assert "Is a directory" in message_of(tmp_path)
    (tmp_path / "loop.npz").symlink_to("loop.npz")
    message_of(tmp_path / "loop.npz")
    with pytest.raises(UserError, match=r"config.data.data_dir is not set: for npz it is the path"):
        open_source("npz")
