"""What `open_source` finds, decodes, keeps and refuses, without a network or TensorFlow."""

import concurrent.futures
import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from gnp.data import sources
from gnp.data.sources import Source, Split, open_source
from gnp.errors import UserError
from tests.data.cifar_like import write_cifar, write_imagenet


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    """A cache of the test's own."""
    home = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "tfds"


def refuse_to_decode(*_):
    raise AssertionError("decoded again")


def assert_equal(actual: dict[str, Split], expected: dict[str, Split]):
    assert actual.keys() == expected.keys()
    for split in expected:
        np.testing.assert_array_equal(actual[split].images, expected[split].images)
        np.testing.assert_array_equal(actual[split].labels, expected[split].labels)


def in_stored_order(written, data_dir, name="cifar10", version="3.0.2"):
    """What `write_cifar` returned, as TFDS's own reader orders it."""
    builder = tfds.builder_cls(name)(data_dir=str(data_dir))
    splits = {}
    for split, (images, labels) in written.items():
        ids = [record["id"].decode() for record in builder.as_data_source(split)]
        order = [int(i.removeprefix(f"{split}_")) for i in ids]
        splits[split] = Split(images[order], labels[order])
    return splits


# Names


def test_lists_names_without_importing_tfds():
    code = (
        "import sys; from gnp.data import sources; print(sources.list_sources()); "
        "sources.open_source('digits').load(); assert 'tensorflow_datasets' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['digits', 'cifar10', 'cifar100', 'imagenet2012', 'ptb']"


@pytest.mark.parametrize(("name", "nearest"), [("cifar-10", "cifar10"), ("digit", "digits")])
def test_unknown_name_is_told_the_nearest(name, nearest):
    with pytest.raises(UserError, match=f"unknown data set '{name}'.*'{nearest}'"):
        open_source(name)


# Digits


def test_digits_are_the_known_scans():
    source = open_source("digits")
    splits = source.load()
    assert source.num_classes == 10
    assert source.image_shape == (8, 8, 1)
    assert source.num_examples == {"train": 1437, "test": 360}
    for split, data in splits.items():
        assert data.images.shape == (source.num_examples[split], 8, 8, 1)
        assert data.images.dtype == np.uint8
        assert data.labels.shape == (source.num_examples[split],)
        assert data.labels.dtype == np.int32
    labels = np.concatenate([data.labels for data in splits.values()])
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    np.testing.assert_array_equal(np.bincount(labels), counts)


def test_digits_are_split_without_overlap_as_ever():
    order = np.random.RandomState(0).permutation(1797)
    splits = open_source("digits").load()
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


# Reading what TFDS has prepared


@pytest.mark.parametrize(("name", "num_classes"), [("cifar10", 10), ("cifar100", 100)])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_reads_exact_pixels_in_stored_order(data_dir, name, num_classes, num_shards):
    written = write_cifar(data_dir, 40, 20, name, num_shards=num_shards)
    source = open_source(name, str(data_dir))
    assert source.name == name
    assert source.num_classes == num_classes
    assert source.image_shape == (32, 32, 3)
    assert source.num_examples == {"train": 40, "test": 20}
    splits = source.load()
    for split in splits.values():
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
    expected = in_stored_order(written, data_dir, name)
    assert len(list(data_dir.rglob("*train.array_record-*"))) == num_shards
    assert not np.array_equal(expected["train"].images, written["train"][0])
    assert_equal(splits, expected)


def test_opening_decodes_nothing(data_dir, monkeypatch):
    write_cifar(data_dir, 4, 2)
    monkeypatch.setattr(sources, "_decode", refuse_to_decode)
    assert open_source("cifar10", str(data_dir)).num_examples == {"train": 4, "test": 2}


def test_reads_more_than_one_batch(data_dir):
    written = write_cifar(data_dir, 600, 2)
    splits = open_source("cifar10", str(data_dir)).load()
    assert_equal(splits, in_stored_order(written, data_dir))


def test_default_folder_is_that_of_tfds(data_dir, monkeypatch):
    write_cifar(data_dir, 4, 2)
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(data_dir))
    assert open_source("cifar10").num_examples == {"train": 4, "test": 2}


def test_tilde_is_the_home_folder(data_dir, monkeypatch):
    write_cifar(data_dir, 4, 2)
    monkeypatch.setenv("HOME", str(data_dir.parent))
    assert open_source("cifar10", "~/tfds").num_examples == {"train": 4, "test": 2}


def test_is_silent(data_dir, capfd, caplog):
    write_cifar(data_dir, 4, 2)
    capfd.readouterr()
    caplog.clear()
    open_source("cifar10", str(data_dir)).load()
    with pytest.raises(UserError):
        open_source("cifar100", str(data_dir))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


# The cache


def test_second_start_reads_the_cache(data_dir, monkeypatch):
    write_cifar(data_dir, 40, 20)
    first = open_source("cifar10", str(data_dir)).load()
    monkeypatch.setattr(sources, "_decode", refuse_to_decode)
    second = open_source("cifar10", str(data_dir)).load()
    assert isinstance(second["train"].images, np.memmap)
    assert second["train"].images.dtype == np.uint8
    assert second["train"].labels.dtype == np.int32
    assert_equal(second, first)


def test_loads_once_in_a_process(data_dir):
    write_cifar(data_dir, 4, 2)
    source = open_source("cifar10", str(data_dir))
    assert source.load() is source.load()


def test_changed_data_are_decoded_again(data_dir):
    write_cifar(data_dir, 40, 20, seed=0)
    first = open_source("cifar10", str(data_dir)).load()
    shutil.rmtree(data_dir)
    write_cifar(data_dir, 40, 20, seed=1)
    second = open_source("cifar10", str(data_dir)).load()
    assert not np.array_equal(first["train"].images, second["train"].images)


def test_another_folder_is_another_data_set(data_dir):
    for seed, folder in enumerate(["a", "b"]):
        write_cifar(data_dir / folder, 40, 20, seed=seed)
        for path in (data_dir / folder).rglob("*.*"):
            os.utime(path, (0, 0))
    first, second = (open_source("cifar10", str(data_dir / folder)).load() for folder in "ab")
    assert not np.array_equal(first["train"].images, second["train"].images)


@pytest.mark.parametrize("saved", range(5))
def test_interrupted_write_leaves_nothing_to_be_read(data_dir, monkeypatch, cache_home, saved):
    write_cifar(data_dir, 40, 20)
    real, calls = np.save, []

    def interrupted(file, array):
        if len(calls) == saved:
            Path(file).write_bytes(b"\x93NUMPY")
            raise KeyboardInterrupt
        calls.append(file)
        real(file, array)

    def interrupted_move(self, target):
        raise KeyboardInterrupt

    source = open_source("cifar10", str(data_dir))
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", interrupted)
        patch.setattr(Path, "replace", interrupted_move)
        with pytest.raises(KeyboardInterrupt):
            source.load()
    assert not [path for path in cache_home.rglob("*") if path.is_file()]
    again = open_source("cifar10", str(data_dir)).load()
    assert not isinstance(again["train"].images, np.memmap)
    monkeypatch.setattr(sources, "_decode", refuse_to_decode)
    assert_equal(open_source("cifar10", str(data_dir)).load(), again)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "foreign", "other size"])
@pytest.mark.parametrize("file", ["test_images.npy", "train_labels.npy"])
def test_damaged_cache_is_replaced(data_dir, cache_home, damage, file):
    write_cifar(data_dir, 40, 20)
    first = open_source("cifar10", str(data_dir)).load()
    (path,) = cache_home.rglob(file)
    if damage == "missing":
        path.unlink()
    elif damage == "other size":
        np.save(path, np.load(path)[1:])
    else:
        content = path.read_bytes()
        path.write_bytes({"empty": b"", "cut": content[:-1], "foreign": b"no array"}[damage])
    assert_equal(open_source("cifar10", str(data_dir)).load(), first)
    assert len(np.load(path)) == (20 if file.startswith("test") else 40)


def test_two_processes_may_decode_at_once(data_dir, monkeypatch):
    write_cifar(data_dir, 40, 20)
    real, both = sources._decode, threading.Barrier(2, timeout=30)

    def decode(*args):
        both.wait()
        return real(*args)

    monkeypatch.setattr(sources, "_decode", decode)
    opened = [open_source("cifar10", str(data_dir)) for _ in range(2)]
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda source: source.load(), opened)
    assert_equal(first, second)
    monkeypatch.setattr(sources, "_decode", refuse_to_decode)
    assert_equal(open_source("cifar10", str(data_dir)).load(), first)


def test_goes_on_without_a_writable_cache(data_dir, cache_home, caplog):
    written = write_cifar(data_dir, 40, 20)
    cache_home.write_text("a file where the folder should be")
    for _ in range(2):
        caplog.clear()
        splits = open_source("cifar10", str(data_dir)).load()
        assert_equal(splits, in_stored_order(written, data_dir))
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert str(cache_home) in record.getMessage()
        assert "\n" not in record.getMessage()


# What cannot be read


def message_of(*args) -> str:
    with pytest.raises(UserError) as caught:
        open_source(*args).load()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_unprepared_says_at_once_what_to_run(data_dir, monkeypatch, name):
    monkeypatch.setattr(sources, "_has_tensorflow", lambda: False)
    start = time.monotonic()
    message = message_of(name, str(data_dir))
    assert time.monotonic() - start < 3
    assert str(data_dir / name / "3.0.2") in message
    assert "pip install tensorflow" in message
    assert "download_and_prepare(file_format='array_record')" in message


def test_unprepared_without_a_network_is_not_tried(data_dir, monkeypatch):
    probed = []
    monkeypatch.setattr(sources, "_has_tensorflow", lambda: True)
    monkeypatch.setattr(sources, "_is_reachable", probed.append)  # None: not reachable
    message = message_of("cifar10", str(data_dir))
    assert probed == ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"]
    assert probed[0] in message
    assert str(data_dir) in message
    assert not data_dir.exists()


@pytest.mark.parametrize("place", ["manual/cifar-10-binary.tar.gz", "cifar10/{cached}", "{cached}"])
def test_an_archive_at_hand_needs_no_network(data_dir, place):
    cached = "cs.toronto.edu_kriz_cifar-10-binaryxKOMUKG8XzocVTfyFVq51o-fJese2Nnd2j2ymlm8od0.tar.gz"
    builder = tfds.builder_cls("cifar10")(data_dir=str(data_dir))
    assert len(sources._urls_to_download(builder)) == 1
    path = data_dir / "downloads" / place.format(cached=cached)
    path.parent.mkdir(parents=True)
    path.touch()
    assert not sources._urls_to_download(builder)


def test_unprepared_is_prepared_where_that_is_possible(data_dir, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sources, "_has_tensorflow", lambda: True)
    monkeypatch.setattr(sources, "_is_reachable", lambda url: True)
    monkeypatch.setattr(sources, "_restrain_tensorflow", lambda: None)
    image = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    Image.fromarray(image).save(tmp_path / "image.png")
    record = {"id": "0", "image": tmp_path / "image.png", "label": 3}

    def split_generators(self, dl_manager):
        return {"train": [(0, record), (1, record)], "test": [(0, record)]}

    monkeypatch.setattr(tfds.builder_cls("cifar10"), "_split_generators", split_generators)
    source = open_source("cifar10", str(data_dir))
    assert capfd.readouterr().out == ""
    assert source.num_examples == {"train": 2, "test": 1}
    np.testing.assert_array_equal(source.load()["test"].images, image[None])
    assert list((data_dir / "cifar10" / "3.0.2").glob("*.array_record-*"))


def test_empty_folder_is_not_taken_for_the_data_set(data_dir, monkeypatch):
    monkeypatch.setattr(sources, "_has_tensorflow", lambda: True)
    monkeypatch.setattr(sources, "_is_reachable", lambda url: True)
    folder = data_dir / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    message = message_of("cifar10", str(data_dir))
    assert message == f"{folder} holds no prepared data set: remove it"


def test_failed_download_is_told(data_dir, monkeypatch):
    monkeypatch.setattr(sources, "_has_tensorflow", lambda: True)
    monkeypatch.setattr(sources, "_is_reachable", lambda url: True)
    monkeypatch.setattr(sources, "_restrain_tensorflow", lambda: None)

    def download(self, **kwargs):
        raise OSError("Not enough disk space.\nNeeded: 1 GiB")

    monkeypatch.setattr(tfds.builder_cls("cifar10"), "download_and_prepare", download)
    message = message_of("cifar10", str(data_dir))
    assert message == f"cannot prepare cifar10 in {data_dir}: Not enough disk space."


def test_reachable_is_what_answers(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    url = f"http://127.0.0.1:{server.server_port}/archive"
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    assert sources._is_reachable(url)
    thread.join()
    # The port is still bound, but nobody answers any more.
    start = time.monotonic()
    assert not sources._is_reachable(url, seconds=0.2)
    assert time.monotonic() - start < 2
    server.server_close()
    assert not sources._is_reachable(url)


def test_slow_name_look_up_is_not_waited_for(monkeypatch):
    released = threading.Event()

    def look_up(*_):
        released.wait(30)
        raise socket.gaierror

    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    start = time.monotonic()
    assert not sources._is_reachable("http://slow.invalid/archive", seconds=0.2)
    assert time.monotonic() - start < 2
    released.set()


def pretend_tfrecord(data_dir: Path) -> None:
    """Gives an ArrayRecord data set the names that a TFRecord one has."""
    folder = data_dir / "cifar10" / "3.0.2"
    for path in folder.glob("*array_record*"):
        path.rename(folder / path.name.replace("array_record", "tfrecord"))
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))


def test_tfrecord_without_tensorflow_says_what_to_install(data_dir, monkeypatch):
    monkeypatch.setattr(sources, "_has_tensorflow", lambda: False)
    write_cifar(data_dir, 4, 2)
    pretend_tfrecord(data_dir)
    message = message_of("cifar10", str(data_dir))
    assert str(data_dir / "cifar10" / "3.0.2") in message
    assert "TFRecord" in message
    assert "pip install tensorflow" in message
    assert "download_and_prepare(file_format='array_record')" in message


def test_tfrecord_once_decoded_needs_no_tensorflow(data_dir, monkeypatch):
    written = write_cifar(data_dir, 40, 20)
    expected = in_stored_order(written, data_dir)
    pretend_tfrecord(data_dir)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_has_tensorflow", lambda: True)
        patch.setattr(sources, "_decode", lambda *_: expected)
        open_source("cifar10", str(data_dir)).load()
    monkeypatch.setattr(sources, "_has_tensorflow", lambda: False)
    assert_equal(open_source("cifar10", str(data_dir)).load(), expected)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_tfrecord_gives_what_array_record_gives(data_dir, num_shards):
    pytest.importorskip("tensorflow")
    loaded = []
    for file_format in ("tfrecord", "array_record"):
        folder = data_dir / file_format
        write_cifar(folder, 120, 20, num_shards=num_shards, file_format=file_format)
        loaded.append(open_source("cifar10", str(folder)).load())
    assert_equal(*loaded)


def break_info(folder: Path) -> Path:
    (folder / "dataset_info.json").write_text('{"name":')
    return folder.parent


def replace_info(folder: Path) -> Path:
    (folder / "dataset_info.json").write_text('{"name": "cifar10", "version": "1.0.0"}')
    return folder.parent


def remove_info(folder: Path) -> Path:
    (folder / "dataset_info.json").unlink()
    return folder


def remove_split(folder: Path) -> Path:
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"test"', '"validation"'))
    return folder


def remove_shard(folder: Path) -> Path:
    (path,) = folder.glob("cifar10-test*")
    path.unlink()
    return path


def replace_shard(folder: Path) -> Path:
    (path,) = folder.glob("cifar10-test*")
    path.write_bytes(b"something else")
    return folder


def cut_shard(folder: Path) -> Path:
    (path,) = folder.glob("cifar10-test*")
    os.truncate(path, path.stat().st_size // 2)
    return folder


def lengthen_split(folder: Path) -> Path:
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"20"', '"21"'))
    return folder


@pytest.mark.parametrize(
    "damage",
    [
        break_info,
        replace_info,
        remove_info,
        remove_split,
        remove_shard,
        replace_shard,
        cut_shard,
        lengthen_split,
    ],
)
def test_damaged_data_are_named(data_dir, cache_home, damage):
    write_cifar(data_dir, 40, 20)
    culprit = damage(data_dir / "cifar10" / "3.0.2")
    assert str(culprit) in message_of("cifar10", str(data_dir))
    assert not list(cache_home.rglob("*.npy"))


GOOD = {"image": np.zeros((2, 2, 1), np.uint8), "label": 0}


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([GOOD], "train has 1 records, not 2"),
        ([GOOD, GOOD | {"label": 3}], "train has the label 3 of 3 classes"),
        ([GOOD, GOOD | {"label": -1}], "train has the label -1 of 3 classes"),
        (
            [GOOD, GOOD | {"image": np.zeros((3, 2, 1), np.uint8)}],
            r"train image 1 is uint8\[3, 2, 1\], not uint8\[2, 2, 1\]",
        ),
        (
            [GOOD | {"image": np.zeros((2, 2, 1), np.uint16)}, GOOD],
            r"train image 0 is uint16\[2, 2, 1\], not uint8\[2, 2, 1\]",
        ),
    ],
)
def test_wrong_records_are_told(records, reason):
    source = Source("name", 3, (2, 2, 1), {"train": 2}, dict)
    with pytest.raises(UserError, match=f"/folder: {reason}"):
        sources._decode(source, lambda split: records, Path("/folder"))


def test_imagenet_is_stored_at_one_size(tmp_path):
    """The shorter side is resized and the middle kept; its test set is TFDS's validation set."""
    sizes = [(80, 160), (120, 60), (50, 50)]
    write_imagenet(tmp_path, {"train": sizes, "validation": sizes[:2]})
    source = open_source("imagenet2012", str(tmp_path), image_size=56)
    assert (source.num_classes, source.image_shape) == (1000, (64, 64, 3))
    assert source.num_examples == {"train": 3, "test": 2}
    splits = source.load()
    np.testing.assert_array_equal(np.sort(splits["train"].labels), [0, 1, 2])
    for image in splits["train"].images:
        assert image.shape == (64, 64, 3)
        # Red above, blue below, and a JPEG's blur between.
        assert np.abs(image[:24].astype(int) - (200, 40, 40)).max() < 12
        assert np.abs(image[40:].astype(int) - (40, 40, 200)).max() < 12


def test_images_that_differ_in_size_need_one(tmp_path):
    write_imagenet(tmp_path, {"train": [(8, 9)], "validation": [(8, 9)]})
    with pytest.raises(UserError, match=r"set config.data.image_size \(such as 224\)"):
        open_source("imagenet2012", str(tmp_path))
