"""Data sets as TFDS prepares them are what TFDS's own reader says, and damage is told."""

import concurrent.futures
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from gnp.data import decode, resident
from gnp.data.records import DamagedError
from gnp.data.sources import open_source
from gnp.data.tfrecord import TFRecords
from gnp.errors import UserError
from tests.data.cifar_like import (
    as_tfrecord,
    write_cifar,
    write_custom,
    write_imagenet,
    write_tfrecord,
)

FORMATS = ("array_record", "tfrecord")


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    home = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "tfds"


def message_of(name, data_dir) -> str:
    """What is wrong, when it is opened or at the latest when it is decoded."""
    with pytest.raises(UserError) as caught:
        resident.load(open_source(name, str(data_dir), image_size=8))
    message = str(caught.value)
    assert "\n" not in message
    return message


def read_by_tfds(folder: Path, split: str) -> list[dict]:
    return list(tfds.builder_from_directory(folder).as_data_source(split))


# What is read


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("file_format", FORMATS)
def test_reads_what_tfds_reads_in_its_order(data_dir, name, num_shards, file_format):
    written = write_cifar(data_dir, 40, 20, name, num_shards=num_shards)
    folder = data_dir / name / "3.0.2"
    expected = {split: read_by_tfds(folder, split) for split in ("train", "test")}
    if file_format == "tfrecord":
        as_tfrecord(folder)
    assert len(list(folder.glob(f"*-train.{file_format}-*"))) == num_shards
    source = open_source(name, str(data_dir))
    assert (source.name, source.where) == (name, str(folder))
    assert len(source.classes) == source.num_classes == {"cifar10": 10, "cifar100": 100}[name]
    assert (source.image_shape, source.same_size) == ((32, 32, 3), True)
    assert source.num_examples == {"train": 40, "test": 20}
    assert source.test_split == "test"
    splits = resident.load(source)
    for split, examples in expected.items():
        assert splits[split].images.dtype == np.uint8
        assert splits[split].labels.dtype == np.int32
        images = np.stack([example["image"] for example in examples])
        np.testing.assert_array_equal(splits[split].images, images)
        labels = [example["label"] for example in examples]
        np.testing.assert_array_equal(splits[split].labels, labels)
        # And that is what was written.
        numbers = [int(example["id"].decode().rpartition("_")[2]) for example in examples]
        assert sorted(numbers) == list(range(len(numbers)))
        np.testing.assert_array_equal(images, written[split][0][numbers])
        np.testing.assert_array_equal(labels, written[split][1][numbers])


def test_names_of_classes_are_those_of_tfds(data_dir):
    features = {
        "image": tfds.features.Image(shape=(4, 4, 1)),
        "label": tfds.features.ClassLabel(names=["zebra", "ape"]),
    }
    image = np.zeros((4, 4), np.uint8)
    write_custom(data_dir, features, {"train": [{"image": image, "label": "ape"}]})
    source = open_source("some_set", str(data_dir))
    assert source.classes == ("zebra", "ape")
    assert source.splits["train"][0].label == 1


def test_records_are_encoded_and_named(data_dir):
    write_cifar(data_dir, 4, 2)
    record = open_source("cifar10", str(data_dir)).splits["train"][2]
    assert record.image.startswith(b"\x89PNG")
    assert record.name == f"record 2 of train in {data_dir}/cifar10/3.0.2"


@pytest.mark.parametrize("file_format", FORMATS)
def test_opening_decodes_nothing(data_dir, monkeypatch, file_format):
    write_cifar(data_dir, 4, 2, file_format=file_format)
    for name in ("deserialize_example", "deserialize_example_np"):
        monkeypatch.setattr(tfds.features.FeaturesDict, name, None)
    monkeypatch.setattr(decode, "_open", None)
    assert open_source("cifar10", str(data_dir)).num_examples == {"train": 4, "test": 2}


def label_of(records, i: int) -> int:
    return records[i].label


def test_records_can_be_sent_to_another_process(data_dir):
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as process:
        for name, file_format in zip(("cifar10", "cifar100"), FORMATS, strict=True):
            write_cifar(data_dir, 20, 2, name, num_shards=2, file_format=file_format)
            source = open_source(name, str(data_dir)).select(train="train[10%:]")
            records = source.splits["train"]
            expected = [records[i] for i in range(18)]  # has files open, if it keeps them open
            packed = pickle.dumps(records)
            assert len(packed) < 10_000
            copy = pickle.loads(packed)
            assert [copy[i] for i in range(18)] == expected
            found = list(process.map(label_of, [records] * 18, range(18), timeout=60))
            assert found == [record.label for record in expected]


def test_the_key_changes_with_the_files(data_dir):
    write_cifar(data_dir, 4, 2)
    source = open_source("cifar10", str(data_dir))
    key = source.key()
    assert key.startswith("3.0.2-") and key == open_source("cifar10", str(data_dir)).key()
    for path in (data_dir / "cifar10" / "3.0.2").glob("*-0000*"):
        os.utime(path, (0, 0))
        assert source.key() != key
        key = source.key()


# Where it is


def test_default_folder_is_that_of_tfds(data_dir, monkeypatch):
    write_cifar(data_dir, 4, 2)
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(data_dir))
    assert open_source("cifar10").num_examples == {"train": 4, "test": 2}


def test_tilde_is_the_home_folder(data_dir, monkeypatch):
    write_cifar(data_dir, 4, 2)
    monkeypatch.setenv("HOME", str(data_dir.parent))
    assert open_source("cifar10", "~/tfds").num_examples == {"train": 4, "test": 2}


def test_a_relative_folder(data_dir, monkeypatch):
    write_cifar(data_dir, 4, 2)
    monkeypatch.chdir(data_dir)
    source = open_source("cifar10", "../tfds")
    monkeypatch.chdir("/")
    assert len(resident.load(source)["train"].labels) == 4


@pytest.mark.parametrize("inner", ["cifar10", "cifar10/3.0.2"])
def test_its_own_folder_does_too(data_dir, inner):
    write_cifar(data_dir, 4, 2)
    for name in ("cifar10", "cifar10:3.0.2"):
        source = open_source(name, str(data_dir / inner))
        assert source.where == str(data_dir / "cifar10" / "3.0.2")


def test_the_folder_of_another_data_set_is_not_taken_for_it(data_dir):
    write_cifar(data_dir, 4, 2)
    folder = data_dir / "cifar10" / "3.0.2"
    message = message_of("cifar100", folder)
    assert message.startswith(
        f"{folder} holds cifar10:3.0.2, not cifar100; set config.data.name=cifar10, or"
    )
    assert f"{folder} holds cifar10:3.0.2, not cifar10:3.0.1;" in message_of(
        "cifar10:3.0.1", folder
    )


def add_version(data_dir: Path, version: str, num_train: int) -> None:
    """One more version of `cifar10`."""
    folder = data_dir / "cifar10"
    write_cifar(data_dir / "new", num_train, 2)
    (data_dir / "new" / "cifar10" / "3.0.2").rename(folder / version)
    shutil.rmtree(data_dir / "new")
    info = folder / version / "dataset_info.json"
    info.write_text(info.read_text().replace('"3.0.2"', f'"{version}"'))


def test_versions(data_dir):
    write_cifar(data_dir, 4, 2)
    add_version(data_dir, "3.0.10", 5)
    add_version(data_dir, "1.2.3", 6)
    (data_dir / "cifar10" / "9.0.0").mkdir()
    (data_dir / "cifar10" / "3.1.0.incompleteXYZ").mkdir()
    for name, size in {
        "cifar10": 5,
        "cifar10:3.0.10": 5,
        "cifar10:3.0.2": 4,
        "cifar10:1.2.3": 6,
    }.items():
        for folder in (data_dir, data_dir / "cifar10"):
            source = open_source(name, str(folder))
            assert (source.name, source.num_examples["train"]) == (name, size)
    message = message_of("cifar10:3.0.3", data_dir)
    assert message.startswith(f"cifar10 is in {data_dir}/cifar10 in version ")
    for version in ("1.2.3", "3.0.2", "3.0.10"):
        assert version in message
    assert ", not 3.0.3; set config.data.name=cifar10:3.0.10, or " in message


FEATURES = {
    "photo": tfds.features.Image(shape=(None, None, 3)),
    "kind": tfds.features.ClassLabel(names=["x", "y", "z"]),
    "text": tfds.features.Text(),
}


def example(kind, height=6, width=5, seed=0):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return {"photo": image, "kind": kind, "text": "some text"}


@pytest.fixture
def configs(data_dir):
    """A data set of two configurations, whose features have names of their own."""
    for config, kind in (("small", 0), ("large", 1)):
        write_custom(
            data_dir,
            FEATURES,
            {"train": [example(kind), example(2, 9, 7, 1)], "validation": [example(kind)]},
            configs=[config],
            supervised_keys=("photo", "kind"),
        )
    return data_dir


@pytest.mark.parametrize("file_format", FORMATS)
def test_configurations_and_names_of_features(configs, file_format):
    for config, kind in (("small", 0), ("large", 1)):
        folder = configs / "some_set" / config / "1.0.0"
        if file_format == "tfrecord":
            as_tfrecord(folder)
        for place in (configs, folder, folder.parent, folder.parent.parent):
            for version in ("", ":1.0.0"):
                name = f"some_set/{config}{version}"
                source = open_source(name, str(place), image_size=8)
                assert (source.name, source.where) == (name, str(folder))
        assert source.num_examples == {"train": 2, "validation": 1}
        assert (source.classes, source.test_split) == (("x", "y", "z"), "validation")
        assert source.image_shape == (9, 9, 3) and not source.same_size
        records = source.splits["train"]
        assert [records[i].label for i in range(2)] == [kind, 2]
        whole = decode.stored(records[1], (9, 7, 3), same_size=True)
        np.testing.assert_array_equal(whole, example(2, 9, 7, 1)["photo"])


def test_which_configurations_there_are_is_said(configs):
    told = "has the configurations large, small; set config.data.name=some_set/large"
    folder = configs / "some_set"
    for place in (configs, folder):
        assert message_of("some_set", place) == f"some_set in {folder} {told}"
    assert message_of("some_set/huge", configs) == (
        f"{folder} has no some_set/huge, but the configurations large, small; set "
        "config.data.name=some_set/large"
    )
    message = message_of("some_set/large:2.0.0", configs)
    assert message.startswith(
        f"some_set/large is in {folder}/large in version 1.0.0, not 2.0.0; set"
    )
    message = message_of("some_set/large", folder / "small" / "1.0.0")
    assert f"{folder}/small/1.0.0 holds some_set/small:1.0.0, not some_set/large; set" in message


def test_images_that_differ_in_size_need_one(configs):
    with pytest.raises(UserError, match=r"differ in size: set config.data.image_size, such as 224"):
        open_source("some_set/small", str(configs))


def test_imagenet_is_stored_at_one_size(tmp_path):
    """The shorter side is resized and the middle kept."""
    sizes = [(80, 160), (120, 60), (50, 50)]
    write_imagenet(tmp_path, {"train": sizes, "validation": sizes[:2]})
    source = open_source("imagenet2012", str(tmp_path), image_size=56)
    assert (source.num_classes, source.image_shape) == (1000, (64, 64, 3))
    assert source.num_examples == {"train": 3, "validation": 2}
    assert source.test_split == "validation"
    splits = resident.load(source)
    np.testing.assert_array_equal(np.sort(splits["train"].labels), [0, 1, 2])
    for image in splits["train"].images:
        assert image.shape == (64, 64, 3)
        # Red above, blue below, and a JPEG's blur between.
        assert np.abs(image[:24].astype(int) - (200, 40, 40)).max() < 12
        assert np.abs(image[40:].astype(int) - (40, 40, 200)).max() < 12


def test_the_test_set_of_imagenet_has_no_labels(tmp_path):
    write_imagenet(tmp_path, {"train": [(8, 8)], "validation": [(8, 8)], "test": [(8, 8)]})
    source = open_source("imagenet2012", str(tmp_path), image_size=8)
    assert source.test_split == "validation" and "test" in source.splits


# What is not to be had


def test_what_holds_no_images_with_labels(data_dir):
    image, label = tfds.features.Image(shape=(2, 2, 3)), tfds.features.ClassLabel(num_classes=2)
    pixels = np.zeros((2, 2, 3), np.uint8)
    cases = {
        "no_label": ({"image": image}, {"image": pixels}, None),
        "two_labels": (
            {"image": image, "label": tfds.features.Sequence(label)},
            {"image": pixels, "label": [0, 1]},
            ("image", "label"),
        ),
        "other_names": ({"a": image, "b": label}, {"a": pixels, "b": 0}, None),
        "no_image": (
            {"image": tfds.features.Text(), "label": label},
            {"image": "words", "label": 0},
            ("image", "label"),
        ),
        "numbers": (
            {"image": image, "label": tfds.features.Scalar(np.int64)},
            {"image": pixels, "label": 0},
            ("image", "label"),
        ),
        "deep": (
            {"image": tfds.features.Image(shape=(2, 2, 1), dtype=np.uint16), "label": label},
            {"image": np.zeros((2, 2), np.uint16), "label": 0},
            ("image", "label"),
        ),
        "no_classes": (
            {"image": image, "label": tfds.features.ClassLabel()},
            None,
            ("image", "label"),
        ),
        "three_keys": (
            {"image": image, "label": label, "text": tfds.features.Text()},
            {"image": pixels, "label": 0, "text": ""},
            ("image", "label", "text"),
        ),
    }
    for name, (features, example, keys) in cases.items():
        write_custom(
            data_dir,
            features,
            {"train": [example] if example else []} if example else {},
            name=name,
            supervised_keys=keys,
        )
        message = message_of(name, data_dir)
        assert message.startswith(
            f"{name} is no data set of images (uint8) with one label each: it has "
        )
        assert all(feature in message for feature in features)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("cifar-10", "cifar10"), ("digit", "digits"), ("fashion-mnist", "fashion_mnist")],
)
def test_unknown_name_is_told_the_nearest(data_dir, name, nearest):
    assert message_of(name, data_dir) == f"unknown data set {name!r}; did you mean {nearest!r}?"


@pytest.mark.parametrize(
    "name", ["qqqqqqqqqqqqqqq", "", "/", "qqqqqqqqqqqqqq/x:1.0.0", "../../qqqqq"]
)
def test_unknown_name_is_told_what_there_is(data_dir, name):
    message = message_of(name, data_dir)
    assert message.startswith(f"unknown data set {name!r}; valid are digits, npz, folder, ")
    assert str(data_dir) in message and "tensorflow.org/datasets/catalog" in message
    assert len(message) < 1000


def test_a_folder_that_may_not_be_read(data_dir, monkeypatch):
    write_cifar(data_dir, 4, 2)
    real = Path.iterdir

    def refuse(self):
        if self.name == "cifar10":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self)

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert message_of("cifar10", data_dir) == f"cannot read {data_dir}/cifar10: Permission denied"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("place", ["", "cifar10", "cifar10/3.0.2"])
def test_what_may_not_be_read(data_dir, place):
    write_cifar(data_dir, 4, 2)
    (data_dir / place).chmod(0)
    try:
        assert "Permission denied" in message_of("cifar10", data_dir)
    finally:
        (data_dir / place).chmod(0o700)


# Damage


def shard_of(folder: Path) -> Path:
    (path,) = folder.glob("cifar10-test*")
    return path


def break_info(folder: Path) -> Path:
    (folder / "dataset_info.json").write_text('{"name":')
    return folder


def replace_info(folder: Path) -> Path:
    (folder / "dataset_info.json").write_text('{"name": "cifar10", "version": "1.0.0"}')
    return folder


def empty_info(folder: Path) -> Path:
    (folder / "dataset_info.json").write_text("{}")
    return folder


def remove_info(folder: Path) -> Path:
    (folder / "dataset_info.json").unlink()
    return folder


def remove_features(folder: Path) -> Path:
    (folder / "features.json").unlink()
    return folder


def rename_split(folder: Path) -> Path:
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"test"', '"validation"'))
    return folder


def remove_shard(folder: Path) -> Path:
    path = shard_of(folder)
    path.unlink()
    return path


def replace_shard(folder: Path) -> Path:
    shard_of(folder).write_bytes(b"something else")
    return folder


def empty_shard(folder: Path) -> Path:
    shard_of(folder).write_bytes(b"")
    return folder


def cut_shard(folder: Path) -> Path:
    os.truncate(shard_of(folder), shard_of(folder).stat().st_size // 2)
    return folder


def cut_end(folder: Path) -> Path:
    os.truncate(shard_of(folder), shard_of(folder).stat().st_size - 1)
    return folder


def lengthen_split(folder: Path) -> Path:
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"20"', '"21"'))
    return folder


def flip_bit(folder: Path) -> Path:
    path = shard_of(folder)
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 50] ^= 4
    path.write_bytes(content)
    return folder


@pytest.mark.parametrize(
    "damage",
    [
        break_info,
        replace_info,
        empty_info,
        remove_info,
        remove_features,
        rename_split,
        remove_shard,
        replace_shard,
        empty_shard,
        cut_shard,
        cut_end,
        lengthen_split,
        flip_bit,
    ],
)
@pytest.mark.parametrize("file_format", FORMATS)
def test_damaged_data_are_named(data_dir, cache_home, damage, file_format):
    write_cifar(data_dir, 40, 20, file_format=file_format)
    culprit = damage(data_dir / "cifar10" / "3.0.2")
    assert str(culprit) in message_of("cifar10", data_dir)
    assert not list(cache_home.rglob("test/split.json"))


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_missing_file_is_named(data_dir, file_format):
    write_cifar(data_dir, 4, 2, num_shards=2, file_format=file_format)
    folder = data_dir / "cifar10" / "3.0.2"
    path = folder / f"cifar10-train.{file_format}-00001-of-00002"
    path.unlink()
    expected = f"{path} is missing: remove {folder} and prepare cifar10 again"
    assert message_of("cifar10", data_dir) == expected


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_damaged_record_is_one(data_dir, file_format):
    write_cifar(data_dir, 4, 3, file_format=file_format)
    folder = data_dir / "cifar10" / "3.0.2"
    flip_bit(folder)
    records = open_source("cifar10", str(data_dir)).splits["test"]
    bad, told = [], ""
    for i in range(3):
        try:
            decode.stored(records[i], (32, 32, 3), same_size=True)
        except DamagedError as error:
            bad.append(i)
            told = str(error)
    # An ArrayRecord file is damaged by the chunk, which may hold all of them.
    assert told.startswith(f"record {bad[-1]} of test in {folder} is damaged: ")
    assert bad if file_format == "array_record" else len(bad) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda _: b"",
        lambda _: b"garbage",
        lambda _: bytes(100),
        lambda record: record[:50],
        lambda record: record.replace(b"label", b"lapel"),
        lambda record: record.replace(b"image", b"photo"),
        lambda record: record.replace(b"IHDR", b"IHDX"),
    ],
)
def test_a_record_of_something_else_is_damaged(data_dir, change, capfd):
    """Its checksum is right, but it is no such example."""
    write_cifar(data_dir, 4, 2, file_format="tfrecord")
    (path,) = (data_dir / "cifar10" / "3.0.2").glob("*-train*")
    records = TFRecords([path])[:]
    write_tfrecord(path, [records[0], change(records[1]), *records[2:]])
    capfd.readouterr()
    source = open_source("cifar10", str(data_dir))
    with pytest.raises(DamagedError) as caught:
        decode.stored(source.splits["train"][1], (32, 32, 3), same_size=True)
    message = str(caught.value)
    assert message.startswith(f"record 1 of train in {path.parent} is damaged: ")
    assert "\n" not in message
    split = resident.load(source, skip_damaged=True)["train"]
    assert split.damaged == (message,)
    assert capfd.readouterr() == ("", "")


def test_labels_out_of_range_are_damage(data_dir):
    features = {
        "image": tfds.features.Image(shape=(2, 2, 3)),
        "label": tfds.features.ClassLabel(num_classes=5),
    }
    pixels = np.zeros((2, 2, 3), np.uint8)
    examples = [{"image": pixels, "label": label} for label in (2, 4, -1)]
    write_custom(data_dir, features, {"train": examples})
    folder = data_dir / "some_set" / "1.0.0"
    features_file = folder / "features.json"
    description = json.loads(features_file.read_text())
    description["featuresDict"]["features"]["label"]["classLabel"]["numClasses"] = "4"
    features_file.write_text(json.dumps(description))
    for path in folder.glob("*.labels.txt"):
        path.unlink()
    records = open_source("some_set", str(data_dir)).splits["train"]
    assert records[0].label == 2
    for i, label in ((1, 4), (2, -1)):
        with pytest.raises(DamagedError) as caught:
            records[i]
        assert str(caught.value) == (
            f"record {i} of train in {folder} has the label {label} of 4 classes"
        )


# Silence


def test_is_silent_and_needs_no_tensorflow(data_dir, tmp_path):
    """In a process of its own, where TFDS cannot have said before what it says only once."""
    write_cifar(data_dir, 4, 2)
    write_cifar(data_dir, 4, 2, "cifar100", file_format="tfrecord")
    write_cifar(tmp_path / "bad", 4, 2)
    flip_bit(tmp_path / "bad" / "cifar10" / "3.0.2")
    write_cifar(tmp_path / "worse", 4, 2)
    break_info(tmp_path / "worse" / "cifar10" / "3.0.2")
    write_custom(
        data_dir,
        FEATURES,
        {"train": [example(0)]},
        configs=["a"],
        supervised_keys=("photo", "kind"),
    )
    code = f"""
import logging, pickle, sys
logging.basicConfig(level=logging.INFO)
from gnp.data import prepare_tfds, resident
from gnp.data.decode import random_resized_crop
from gnp.data.sources import open_source
from gnp.errors import UserError
import numpy as np
prepare_tfds.has_tensorflow = lambda: False
refused = 0
for name, folder in [
    ("cifar10", {str(data_dir)!r}),
    ("cifar100", {str(data_dir)!r}),
    ("some_set/a", {str(data_dir)!r}),
    ("some_set", {str(data_dir)!r}),
    ("nobody_knows", {str(data_dir)!r}),
    ("mnist", {str(data_dir)!r}),
    ("cifar10", {str(tmp_path / "bad")!r}),
    ("cifar10", {str(tmp_path / "worse")!r}),
]:
    try:
        source = open_source(name, folder, image_size=8)
        resident.load(source)
        resident.load(source.select(train="train[:50%]" if "cifar" in name else "train"))
        record = pickle.loads(pickle.dumps(source.splits["train"]))[0]
        random_resized_crop(record, np.random.default_rng(0), 8, 3)
    except UserError:
        refused += 1
assert "tensorflow" not in sys.modules
print(refused)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("5\n", "")


def test_is_silent_where_others_log(data_dir, capfd, caplog):
    write_cifar(data_dir, 4, 2)
    break_info(data_dir / "cifar10" / "3.0.2")
    capfd.readouterr()
    caplog.clear()
    caplog.set_level(0)
    with pytest.raises(UserError):
        open_source("cifar10", str(data_dir))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
