"""Decoded splits and their cache: the same as one by one, whole or not there, and never stale."""

import concurrent.futures
import contextlib
import errno
import json
import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from gnp.data import resident, streaming
from gnp.data.decode import stored
from gnp.data.pipeline import normalise
from gnp.data.records import DamagedError, Record, Source
from gnp.data.resident import Split, channel_statistics, load
from gnp.data.sources import open_source
from gnp.errors import UserError
from tests.data.cifar_like import png, write_cifar

PARTS = {"train": "train[:75%]", "validation": "train[75%:]", "test": "test"}


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    home = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "tfds"


@pytest.fixture
def source(data_dir):
    write_cifar(data_dir, 40, 20)
    return open_source("cifar10", str(data_dir)).select(**PARTS)


def refuse_to_decode(*_, **__):
    raise AssertionError("decoded again")


@pytest.fixture
def decodes_nothing(monkeypatch):
    """Call it when nothing is to be decoded any more."""
    return lambda: monkeypatch.setattr(streaming, "readable", refuse_to_decode)


def assert_same(actual: dict[str, Split], expected: dict[str, Split]):
    assert actual.keys() == expected.keys()
    for split in expected:
        for field in ("images", "labels", "mean", "std", "damaged"):
            a, b = getattr(actual[split], field), getattr(expected[split], field)
            np.testing.assert_array_equal(a, b)
            assert np.asarray(a).dtype == np.asarray(b).dtype


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# Made-up examples, some damaged


class Numbered:
    """Example i is all of the pixel value i and of class i % 5, unless something is wrong."""

    labels = None

    def __init__(self, size, damaged=(), unreadable=()):
        self.size, self.damaged, self.unreadable = size, damaged, unreadable

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        if i in self.unreadable:
            raise DamagedError(f"example {i} is unreadable")
        content = b"" if i in self.damaged else png(np.full((4, 4), i % 256, np.uint8)).getvalue()
        return Record(content, i % 5, f"example {i}")


def made_up(key: str | None = "key", **splits: Numbered) -> Source:
    return Source(
        name="Made up/1",
        classes=tuple("abcde"),
        image_shape=(4, 4, 1),
        same_size=True,
        splits=splits,
        test_split=None,
        key=None if key is None else lambda: key,
        where="/some/folder",
    )


# What is decoded


@pytest.mark.parametrize("size", [1, 255, 256, 257, 700])
def test_is_the_same_as_one_by_one(size, decodes_nothing):
    source = made_up(train=Numbered(size))
    decoded = load(source)["train"]
    decodes_nothing()
    for split in (decoded, load(source)["train"]):
        assert (split.images.dtype, split.images.shape) == (np.uint8, (size, 4, 4, 1))
        assert (split.labels.dtype, split.labels.shape) == (np.int32, (size,))
        np.testing.assert_array_equal(split.labels, np.arange(size) % 5)
        np.testing.assert_array_equal(split.images[:, 1, 2, 0], np.arange(size) % 256)
        assert split.damaged == ()


def test_real_examples_are_the_same_as_one_by_one(source):
    for name, split in load(source).items():
        records = source.splits[name]
        for i in range(len(records)):
            image = stored(records[i], source.image_shape, same_size=True)
            np.testing.assert_array_equal(split.images[i], image)
            assert split.labels[i] == records[i].label
        np.testing.assert_allclose(split.mean, (split.images / 255).mean((0, 1, 2)), rtol=1e-12)
        np.testing.assert_allclose(split.std, (split.images / 255).std((0, 1, 2)), rtol=1e-10)


def test_what_is_in_memory_is_not_cached(cache_home):
    for _ in range(2):
        split = load(made_up(None, train=Numbered(7)))["train"]
        assert not isinstance(split.images, np.memmap)
    load(open_source("digits"))
    assert not cache_home.exists()


# Statistics


@settings(deadline=None)
@given(
    st_numpy.arrays(
        np.uint8,
        st.tuples(*[st.integers(1, 5)] * 3, st.sampled_from([1, 3])),
        elements=st.integers(0, 255),
    )
)
def test_statistics_are_numpys(images):
    mean, std = channel_statistics(images)
    axes = (0, 1, 2)
    np.testing.assert_allclose(mean, (images / 255).mean(axes), rtol=1e-12, atol=1e-15)
    varies = images.min(axes) != images.max(axes)
    np.testing.assert_allclose(std[varies], (images / 255).std(axes)[varies], rtol=1e-9)
    assert (std[~varies] == 1).all()


def test_channel_statistics_are_numpys():
    images = np.random.default_rng(0).integers(0, 200, (2100, 7, 5, 3)).astype(np.uint8)
    images[..., 2] = 9
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std[:2], (images / 255).std((0, 1, 2))[:2], rtol=1e-10)
    assert std[2] == 1, "a channel that does not vary must not be divided by zero"
    normal = normalise(jnp.asarray(images), mean, std)
    np.testing.assert_allclose(normal.mean((0, 1, 2)), 0, atol=1e-5)


# The cache


def test_second_start_reads_the_cache(source, cache_home, decodes_nothing):
    first = load(source)
    decodes_nothing()
    second = load(source)
    for split in second.values():
        assert isinstance(split.images, np.memmap) and not split.images.flags.writeable
    assert_same(second, first)
    (folder,) = (cache_home / "gnp").iterdir()
    assert folder.name == f"cifar10-{source.key()}-32x32x3"
    assert files_in(folder) == sorted(
        f"{split}/{file}"
        for split in ("train-0-30", "train-30-40", "test-0-20")
        for file in ("images.npy", "labels.npy", "split.json")
    )


def test_default_folder_is_in_the_home_folder(source, monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load(source)
    assert list((tmp_path / "home" / ".cache" / "gnp").iterdir())


def test_each_part_has_a_cache_of_its_own(data_dir, monkeypatch):
    write_cifar(data_dir, 40, 20)
    source = open_source("cifar10", str(data_dir))
    whole = load(source)["train"]
    for text, start, stop in [
        ("train[:50%]", 0, 20),
        ("train[50%:]", 20, 40),
        ("train[5:25]", 5, 25),
        ("test", 0, 20),
    ]:
        part = load(source.select(train=text))["train"]
        if text != "test":
            np.testing.assert_array_equal(part.images, whole.images[start:stop])
            np.testing.assert_array_equal(part.labels, whole.labels[start:stop])
        else:
            assert not np.array_equal(part.images, whole.images[:20])
    half = source.select(train="train[50%:]")
    part = load(half.select(train="train[:50%]"))["train"]
    np.testing.assert_array_equal(part.images, whole.images[20:30])
    # The same part under another name is decoded once.
    monkeypatch.setattr(streaming, "readable", refuse_to_decode)
    again = load(source.select(validation="train[50%:]"))["validation"]
    np.testing.assert_array_equal(again.images, whole.images[20:])


def test_each_size_has_a_cache_of_its_own(data_dir):
    write_cifar(data_dir, 10, 2)
    for size in (32, 8, 16, 32, 8):
        source = open_source("cifar10", str(data_dir), resize=size)
        split = load(source)["train"]
        assert split.images.shape == (10, size, size, 3)
        expected = stored(source.splits["train"][4], (size, size, 3), same_size=False)
        np.testing.assert_array_equal(split.images[4], expected)


def test_resized_to_the_usual_size_is_not_of_the_usual_size(tmp_path, monkeypatch):
    """One that is damaged where all must be of a size may be resized elsewhere."""
    for i in range(4):
        file = tmp_path / "data" / "train" / "a" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(np.zeros((8, 8), np.uint8)).getvalue())
    strict = open_source("tiny_imagenet", str(tmp_path / "data"))
    file.write_bytes(png(np.zeros((8, 9), np.uint8)).getvalue())
    resized = open_source("tiny_imagenet", str(tmp_path / "data"), resize=8)
    assert (strict.image_shape, strict.same_size) == (resized.image_shape, True)
    assert load(resized)["train"].damaged == ()
    with pytest.raises(UserError, match="9 × 8 pixels, not 8 × 8"):
        load(strict)
    assert len(load(strict, skip_damaged=True)["train"].damaged) == 1
    assert load(resized)["train"].damaged == ()


def test_changed_data_are_decoded_again(data_dir):
    write_cifar(data_dir, 40, 20, seed=0)
    first = load(open_source("cifar10", str(data_dir)))
    shutil.rmtree(data_dir)
    write_cifar(data_dir, 40, 20, seed=1)
    second = load(open_source("cifar10", str(data_dir)))
    assert not np.array_equal(first["train"].images, second["train"].images)


def test_another_folder_is_another_data_set(data_dir):
    for seed, folder in enumerate(["a", "b"]):
        write_cifar(data_dir / folder, 40, 20, seed=seed)
        for path in (data_dir / folder).rglob("*.*"):
            os.utime(path, (0, 0))
    first, second = (load(open_source("cifar10", str(data_dir / folder))) for folder in "ab")
    assert not np.array_equal(first["train"].images, second["train"].images)


def test_data_that_went_away_since_they_were_opened(source, data_dir):
    load(source)
    shutil.rmtree(data_dir)
    with pytest.raises(UserError, match=f"^cannot read {data_dir}/.*: No such file or directory$"):
        load(source)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "foreign", "other size", "a list"])
@pytest.mark.parametrize("file", ["images.npy", "labels.npy", "split.json"])
def test_damaged_cache_is_replaced(source, cache_home, damage, file, decodes_nothing):
    first = load(source)
    (path,) = cache_home.rglob(f"test-0-20/{file}")
    content = path.read_bytes()
    path.unlink()
    if damage == "other size":
        if file == "split.json":
            path.write_text(json.dumps({"mean": [0.5]}))
        else:
            np.save(path, np.zeros((7, 32, 32, 3), np.uint8) if "i" in file else np.zeros(7))
    elif damage == "a list":
        path.write_text("[1, 2]")
    elif damage != "missing":
        path.write_bytes({"empty": b"", "cut": content[:-1], "foreign": b"no array"}[damage])
    assert_same(load(source), first)
    decodes_nothing()
    assert_same(load(source), first)
    assert path.read_bytes() == content


@pytest.mark.parametrize("in_the_way", ["home", "folder", "split", "file"])
def test_goes_on_without_a_writable_cache(source, cache_home, caplog, in_the_way):
    expected = load(source)
    paths = {"home": cache_home, "folder": cache_home / "gnp"}
    paths["split"] = next(cache_home.rglob("test-0-20"))
    paths["file"] = paths["split"] / "labels.npy"
    path = paths[in_the_way]
    expected = {
        name: Split(np.array(s.images), s.labels, s.mean, s.std) for name, s in expected.items()
    }
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("a file where the folder should be")
    else:
        path.unlink()
        path.mkdir()
    for _ in range(2):
        caplog.clear()
        assert_same(load(source), expected)
        assert len(caplog.records) == (3 if in_the_way in ("home", "folder") else 1)
        for record in caplog.records:
            assert record.levelname == "WARNING" and "\n" not in record.getMessage()
            assert record.getMessage().startswith(f"cannot write the cache {cache_home}")


def test_goes_on_when_the_disk_is_full(source, cache_home, caplog, monkeypatch, decodes_nothing):
    sizes = []

    def full(descriptor, offset, size):
        sizes.append(size)
        assert os.fstat(descriptor).st_size == size and offset == 0
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        splits = load(source)
    assert len(sizes) == 3 and sizes[0] > 30 * 32 * 32 * 3
    assert not any(isinstance(split.images, np.memmap) for split in splits.values())
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    for record in caplog.records:
        assert "decoding again next time: [Errno 28] No space left on device" in record.getMessage()
    assert not files_in(cache_home)
    assert_same(load(source), splits)
    decodes_nothing()
    assert_same(load(source), splits)


@pytest.mark.parametrize("call", ["save", "write_text", "replace"])
def test_goes_on_when_the_disk_is_full_in_the_end(source, monkeypatch, caplog, call):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    expected = load(made_up(None, train=Numbered(3)))["train"]
    monkeypatch.setattr(np if call == "save" else Path, call, full)
    actual = load(made_up(train=Numbered(3)))["train"]
    assert_same({"": actual}, {"": expected})
    assert not isinstance(actual.images, np.memmap)
    assert len(caplog.records) == 1


def test_needs_no_fallocate(source, monkeypatch, decodes_nothing):
    """Not every system has it."""
    monkeypatch.delattr(os, "posix_fallocate")
    first = load(source)
    decodes_nothing()
    assert_same(load(source), first)


# Interrupted


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("when", [0, 1, 28, 29, 55])
def test_interrupted_decoding_leaves_nothing(source, cache_home, monkeypatch, when):
    real, count = resident.iterate, 0

    @contextlib.contextmanager
    def interrupted(*args):
        def chunks(real_chunks):
            nonlocal count
            for chunk in real_chunks:
                if count >= when:
                    raise KeyboardInterrupt
                count += 1
                yield chunk

        with real(*args) as real_chunks:
            yield chunks(real_chunks)

    with monkeypatch.context() as patch:
        patch.setattr(resident, "_CHUNK", 1)
        patch.setattr(resident, "iterate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(source)
    whole = {0: 0, 1: 0, 28: 0, 29: 1, 55: 2}[when]
    assert len(files_in(cache_home)) == 3 * whole
    again = load(source)
    for name, split in again.items():
        assert isinstance(split.images, np.memmap)
        for i in (0, -1):
            expected = stored(
                source.splits[name][i % len(split.labels)], (32, 32, 3), same_size=True
            )
            np.testing.assert_array_equal(split.images[i], expected)


@pytest.mark.parametrize("moved", [0, 1, 2])
@pytest.mark.parametrize("before", ["nothing", "damaged images", "damaged labels", "no split"])
def test_interrupted_moving_leaves_nothing_that_is_read(
    source, cache_home, monkeypatch, moved, before
):
    expected = load(source)
    expected = {
        name: Split(np.array(s.images), s.labels, s.mean, s.std) for name, s in expected.items()
    }
    if before == "nothing":
        shutil.rmtree(cache_home)
    else:
        (folder,) = cache_home.rglob("train-0-30")
        file = {"images": "images.npy", "labels": "labels.npy", "split": "split.json"}
        (folder / file[before.split()[1]]).write_bytes(b"")
    real, calls = Path.replace, []

    def interrupted(self, target):
        if len(calls) == moved:
            raise KeyboardInterrupt
        calls.append(target)
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(source)
    assert not list(cache_home.rglob("tmp*"))
    if before == "nothing":
        assert not list(cache_home.rglob("split.json"))
    assert_same(load(source), expected)
    assert_same(load(source), expected)


def test_interrupted_writing_of_labels_leaves_nothing(source, cache_home, monkeypatch):
    for module, call in ((np, "save"), (Path, "write_text"), (resident, "channel_statistics")):
        with monkeypatch.context() as patch:
            patch.setattr(module, call, interrupt)
            with pytest.raises(KeyboardInterrupt):
                load(source)
        assert not files_in(cache_home)


# At once


def test_two_threads_may_decode_at_once(source, monkeypatch, decodes_nothing, caplog):
    real, both = resident._decode, threading.Barrier(2, timeout=30)

    def decode(*args):
        both.wait()
        result = real(*args)
        both.wait()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(resident, "_decode", decode)
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            first, second = threads.map(load, [source] * 2)
    assert_same(first, second)
    decodes_nothing()
    assert_same(load(source), first)
    assert not caplog.records


def load_at_once(data_dir, barrier, results):
    source = open_source("cifar10", data_dir)
    barrier.wait(60)
    splits = load(source)
    results.put([(split.images.sum(), split.labels.sum()) for split in splits.values()])


def test_processes_may_decode_at_once(data_dir, decodes_nothing):
    write_cifar(data_dir, 300, 20)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.SimpleQueue()
    arguments = str(data_dir), barrier, results
    process = context.Process(target=load_at_once, args=arguments)
    process.start()
    load_at_once(*arguments)
    first, second = results.get(), results.get()
    process.join(60)
    assert process.exitcode == 0
    decodes_nothing()
    splits = load(open_source("cifar10", str(data_dir)))
    assert first == second == [(s.images.sum(), s.labels.sum()) for s in splits.values()]


# Damage


HINT = "; mend or remove it, or set config.data.on_damaged=skip to leave such out"


@pytest.mark.parametrize(
    ("records", "told"),
    [
        (Numbered(9, damaged=(4,)), "example 4 is damaged: it is empty"),
        (Numbered(9, unreadable=(8,)), "example 8 is unreadable"),
    ],
)
def test_damage_is_refused(records, told, cache_home):
    for key in ("key", None):
        with pytest.raises(UserError) as caught:
            load(made_up(key, train=records))
        assert str(caught.value) == told + HINT
    assert not files_in(cache_home)


def test_damage_is_left_out_with_one_warning(caplog, decodes_nothing, cache_home):
    source = made_up(train=Numbered(10, damaged=(2, 3, 9), unreadable=(5,)), test=Numbered(4))
    told = (
        "4 of 10 train images of Made up/1 are damaged and left out: example 2 is damaged: it is "
        "empty; example 3 is damaged: it is empty; example 5 is unreadable; …"
    )
    for start in range(2):
        caplog.clear()
        split = load(source, skip_damaged=True)["train"]
        assert [record.getMessage() for record in caplog.records] == [told]
        # In its place the next one that is not, and the complement of that one's label.
        shown = [0, 1, 4, 4, 4, 6, 6, 7, 8, 0]
        np.testing.assert_array_equal(split.images[:, 0, 0, 0], shown)
        left_out = np.isin(np.arange(10), (2, 3, 5, 9))
        expected = np.where(left_out, ~(np.array(shown) % 5), np.arange(10) % 5)
        np.testing.assert_array_equal(split.labels, expected)
        assert len(split.damaged) == 4 and split.damaged[-1] == "example 9 is damaged: it is empty"
        assert isinstance(split.images, np.memmap)
        if start == 0:
            decodes_nothing()
    with pytest.raises(UserError) as caught:
        load(source)
    assert str(caught.value) == "example 2 is damaged: it is empty" + HINT


def test_damage_in_many_chunks_is_told_in_order(caplog):
    damaged = tuple(range(0, 1000, 97))
    split = load(made_up(train=Numbered(1000, damaged)), skip_damaged=True)["train"]
    assert split.damaged == tuple(f"example {i} is damaged: it is empty" for i in damaged)
    np.testing.assert_array_equal(np.flatnonzero(split.labels < 0), damaged)


def test_all_damaged_is_refused_whatever_is_wanted(cache_home):
    with pytest.raises(UserError) as caught:
        load(made_up(train=Numbered(3, damaged=range(3))), skip_damaged=True)
    told = "example 0 is damaged: it is empty, and so are the 2 after it"
    assert str(caught.value) == f"{told}: that is too much to leave out"
    assert not files_in(cache_home)


def test_a_programmers_error_is_not_damage(cache_home):
    class Broken(Numbered):
        def __getitem__(self, i):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        load(made_up(train=Broken(300)), skip_damaged=True)
    assert not files_in(cache_home)
