"""Streamed batches: a function of (seed, step), whoever makes them, and every example once."""

import contextlib
import multiprocessing
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from gnp.data import streaming
from gnp.data.records import ArrayRecords, DamagedError, Record
from gnp.data.streaming import RESTARTS, EvalReader, StreamFeed, TrainReader
from gnp.errors import UserError

SHAPE = (6, 6, 3)


def make_records(size, image_size=6):
    """Each image is of one colour, by which it is known."""
    images = np.zeros((size, image_size, image_size, 3), np.uint8)
    images[:] = np.arange(size, dtype=np.uint8)[:, None, None, None]
    return ArrayRecords(images, np.arange(size, dtype=np.int32) % 7, "train")


class Damaged:
    """Records of which some cannot be read."""

    labels = None

    def __init__(self, records, damaged):
        self.records, self.damaged = records, damaged

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        if i in self.damaged:
            raise DamagedError(f"image {i} is damaged")
        return self.records[i]


def train_reader(records, batch_size=4, num_steps=50, **kwargs):
    arguments = {"crop": None, "seed": 0, "skip_damaged": False} | kwargs
    return TrainReader(
        records, SHAPE, True, batch_size=batch_size, num_steps=num_steps, **arguments
    )


def sharding(devices=1):
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    return NamedSharding(mesh, PartitionSpec("data"))


def colours(batch):
    return np.asarray(batch["image"])[:, 0, 0, 0].tolist()


def rows_of(process, rows):
    """The rows of a process that has so many."""
    return tuple(range(process * rows, (process + 1) * rows))


sizes = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@settings(deadline=None, max_examples=60)
@given(sizes=sizes, processes=st.integers(1, 4), seed=st.integers(0, 2**31 - 1))
def test_each_example_exactly_once_an_epoch_for_any_number_of_processes(sizes, processes, seed):
    num_examples, rows = sizes
    records, batch_size = make_records(num_examples), rows * processes
    steps = -(-3 * num_examples // batch_size)
    readers = [
        train_reader(records, batch_size, steps, seed=seed, rows=rows_of(process, rows))
        for process in range(processes)
    ]
    stream = [c for step in range(steps) for reader in readers for c in colours(reader[step])]
    epochs = [stream[i * num_examples : (i + 1) * num_examples] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(num_examples))
    if num_examples > 20:
        assert any(epoch != epochs[0] for epoch in epochs), "the order never changes"
    alone = train_reader(records, batch_size, steps, seed=seed)
    assert stream == [c for step in range(steps) for c in colours(alone[step])]


def test_labels_belong_to_their_images():
    reader = train_reader(make_records(30), 8)
    for step in range(8):
        batch = reader[step]
        assert batch["label"].tolist() == [c % 7 for c in colours(batch)]


@settings(deadline=None, max_examples=60)
@given(
    num_examples=st.integers(1, 30),
    rows=st.integers(1, 12),
    processes=st.integers(1, 3),
    damaged=st.sets(st.integers(0, 29), max_size=3),
)
def test_evaluation_counts_every_example_once(num_examples, rows, processes, damaged):
    """Damaged ones not at all; filling has a label below 0, and that of some class below that."""
    damaged = {i for i in damaged if i < num_examples}
    if len(damaged) == num_examples:
        return
    records = Damaged(make_records(num_examples), damaged)
    seen = []
    for process in range(processes):
        own = rows_of(process, rows)
        reader = EvalReader(records, SHAPE, True, rows * processes, True, own)
        for i in range(len(reader)):
            batch = reader[i]
            assert batch["image"].shape == (rows, *SHAPE)
            assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
            labels = np.where(batch["label"] < 0, ~batch["label"], batch["label"])
            assert ((labels >= 0) & (labels < 7)).all()
            kept = np.flatnonzero(batch["label"] >= 0)
            assert batch["label"][kept].tolist() == [colours(batch)[k] % 7 for k in kept]
            seen += [colours(batch)[k] for k in kept]
    assert sorted(seen) == [i for i in range(num_examples) if i not in damaged]


def read(reader, num_workers, first=0, count=None, devices=1):
    feed = StreamFeed(
        reader, first=first, sharding=sharding(devices), num_workers=num_workers, told=set()
    )
    try:
        batches = [feed.get() for _ in range(len(reader) - first if count is None else count)]
    finally:
        feed.close()
    return jax.device_get(batches)


@pytest.mark.slow
def test_batches_depend_neither_on_workers_nor_on_where_a_run_is_continued():
    """Random crops included; with a run of three epochs, in this process and in 1 and 3 others."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 12, 12, 3)).astype(np.uint8)
    records = ArrayRecords(images, np.arange(20, dtype=np.int32), "train")
    reader = train_reader(records, 8, 9, crop=(6, 0.08))
    expected = [reader[step] for step in range(9)]
    for num_workers, first, devices in [(0, 0, 1), (1, 0, 8), (3, 0, 1), (2, 4, 1)]:
        batches = read(reader, num_workers, first, devices=devices)
        assert len(batches) == 9 - first
        for batch, other in zip(batches, expected[first:], strict=True):
            np.testing.assert_array_equal(batch["image"], other["image"])
            np.testing.assert_array_equal(batch["label"], other["label"])
    assert (expected[0]["image"] != expected[1]["image"]).any()
    # The same example is cropped anew in each epoch.
    first_epoch, second_epoch = (
        {
            int(label): image
            for step in range(9)
            for row, (label, image) in enumerate(
                zip(expected[step]["label"], expected[step]["image"], strict=True)
            )
            if (step * 8 + row) // 20 == epoch
        }
        for epoch in (0, 1)
    )
    assert all((first_epoch[i] != second_epoch[i]).any() for i in range(20))


def test_batches_lie_over_the_devices():
    feed = StreamFeed(
        train_reader(make_records(9), 8), sharding=sharding(8), num_workers=0, told=set()
    )
    batch = feed.get()
    feed.close()
    assert {shard.data.shape for shard in batch["image"].addressable_shards} == {(1, *SHAPE)}


def test_a_damaged_example_is_an_error_that_names_it():
    reader = train_reader(Damaged(make_records(9), {4}), 3)
    with pytest.raises(UserError, match=r"^image 4 is damaged; .*config.data.on_damaged=skip"):
        read(reader, 1)


def test_a_damaged_example_is_left_out_and_told_once(caplog):
    reader = train_reader(Damaged(make_records(9), {4}), 3, 9, skip_damaged=True)
    batches = read(reader, 2)
    stream = [c for batch in batches for c in colours(batch)]
    for epoch in range(3):
        assert sorted(stream[epoch * 9 : epoch * 9 + 9]) == [0, 1, 2, 3, 5, 5, 6, 7, 8]
    assert [record.getMessage() for record in caplog.records] == ["left out: image 4 is damaged"]


class Slow(ArrayRecords):
    def __getitem__(self, i):
        time.sleep(0.02)
        return super().__getitem__(i)


def slow_reader(steps=10_000):
    records = make_records(30)
    return train_reader(Slow(records.images, records.labels, ""), 8, steps)


def kill_one(before=()):
    """Kills a worker that is not among those `before`, as soon as there is one."""
    until = time.monotonic() + 30
    while True:
        for child in multiprocessing.active_children():
            if child.pid not in before:
                os.kill(child.pid, signal.SIGKILL)
                child.join(20)
                return child.pid
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture
def feed_of():
    """Makes feeds that are closed in the end."""
    with contextlib.ExitStack() as stack:

        def make(reader, num_workers, first=0):
            feed = StreamFeed(
                reader, first=first, sharding=sharding(), num_workers=num_workers, told=set()
            )
            stack.callback(feed.close)
            return feed

        yield make
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "evaluation",
    [pytest.param(False, marks=pytest.mark.soak), pytest.param(True, marks=pytest.mark.slow)],
)
def test_a_worker_that_is_killed_is_replaced_and_the_numbers_stay(feed_of, caplog, evaluation):
    reader = slow_reader(30)
    if evaluation:
        records = make_records(200)
        reader = EvalReader(Slow(records.images, records.labels, ""), SHAPE, True, 8, False)
    feed = feed_of(reader, 2, 2)
    batches = []
    for step in range(2, len(reader)):
        batches.append(jax.device_get(feed.get()))
        if step == 6:
            kill_one()
        if step == 16:  # noticed long ago
            (warning,) = [record.getMessage() for record in caplog.records]
            assert warning.startswith("a process that reads the data was killed by signal 9, per")
            assert "; started again at batch " in warning
    for step, batch in enumerate(batches, start=2):
        np.testing.assert_array_equal(batch["image"], reader[step]["image"])
        np.testing.assert_array_equal(batch["label"], reader[step]["label"])


@pytest.mark.slow
def test_a_worker_that_is_killed_is_noticed_before_its_turn(feed_of, caplog):
    """Although all of them have batches ready."""
    feed = feed_of(slow_reader(), 2)
    for _ in range(4):  # each of the workers has made some
        feed.get()
    time.sleep(2)
    kill_one()
    feed.get()  # makes room for one more batch
    until = time.monotonic() + 20
    while not caplog.records and time.monotonic() < until:
        time.sleep(0.1)
    assert "was killed by signal 9" in caplog.text


@pytest.mark.slow
def test_workers_that_are_killed_again_and_again_end_the_run_with_a_line(feed_of, caplog):
    """Before they have made anything, too, as soon as they are there."""
    feed = feed_of(slow_reader(), 1)
    pids = [kill_one()]
    for _ in range(RESTARTS):
        pids.append(kill_one(pids))
    with pytest.raises(UserError, match="killed by signal 9, perhaps for want of memory"):
        feed.get()


@pytest.mark.slow
def test_a_worker_that_stands_still_is_told_and_waited_for(feed_of, caplog, monkeypatch):
    reader = slow_reader()
    feed = feed_of(reader, 1)
    feed.get()
    monkeypatch.setattr(streaming, "WAIT_WARNING", 0.5)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGSTOP)
    continued = threading.Timer(4, os.kill, [worker.pid, signal.SIGCONT])
    continued.start()
    batches = [feed.get() for _ in range(12)]
    continued.join()
    told = [record.getMessage() for record in caplog.records]
    # After 0.5, 1 and 2 seconds of the 4, less those in which there were batches ready.
    assert 2 <= len(told) <= 4
    assert re.match(r"waiting for data since 0.5 s \(batch \d+\): ", told[0])
    assert told[1].startswith("waiting for data since 1 s")
    assert int(re.search(r"batch (\d+)", told[0])[1]) < 12
    for step, batch in enumerate(batches, start=1):
        np.testing.assert_array_equal(batch["image"], reader[step]["image"])


class Exiting:
    """What a mistake in a library may raise."""

    @property
    def batch_size(self):
        raise SystemExit("not an Exception")


def test_whatever_ends_the_thread_of_a_feed_is_told(feed_of):
    feed = feed_of(Exiting(), 0)
    for _ in range(2):
        with pytest.raises(SystemExit, match="not an Exception"):
            feed.get()


class Broken(ArrayRecords):
    def __getitem__(self, i):
        raise ZeroDivisionError("a mistake in the program")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_mistake_in_the_program_keeps_its_name(num_workers):
    records = make_records(4)
    reader = train_reader(Broken(records.images, records.labels, ""))
    with pytest.raises(ZeroDivisionError, match="a mistake in the program"):
        read(reader, num_workers)


def test_closing_early_leaves_nothing_behind():
    feed = StreamFeed(
        train_reader(make_records(30), 8, 10_000), sharding=sharding(), num_workers=1, told=set()
    )
    feed.get()
    began = time.monotonic()
    feed.close()
    assert time.monotonic() - began < 20
    assert not multiprocessing.active_children()


def test_waiting_is_what_the_devices_wait():
    records = make_records(8)
    slow = StreamFeed(
        train_reader(Slow(records.images, records.labels, ""), 8),
        sharding=sharding(),
        num_workers=0,
        told=set(),
    )
    for _ in range(5):
        slow.get()
    slow.close()
    assert slow.waited > 0.4  # nearly 5 batches of 8 examples of 0.02 s
    fast = StreamFeed(train_reader(records, 8), sharding=sharding(), num_workers=0, told=set())
    while fast._queue.qsize() < 2:
        time.sleep(0.01)
    fast.get(), fast.get()
    fast.close()
    assert fast.waited == 0


def test_readers_are_small_to_send():
    assert len(pickle.dumps(train_reader(make_records(4)))) < 5000
    assert isinstance(make_records(4)[0], Record)


def test_after_the_last_batch_there_is_none():
    feed = StreamFeed(
        train_reader(make_records(9), 3, 2), sharding=sharding(), num_workers=0, told=set()
    )
    feed.get(), feed.get()
    for _ in range(2):
        with pytest.raises(EOFError):
            feed.get()
    feed.close()


ORPHANS = """
import sys, time
sys.path.insert(0, {root!r})
from tests.data.test_streaming import *
if __name__ == "__main__":
    feed = StreamFeed(
        train_reader(make_records(30), 8, 10**6), sharding=sharding(), num_workers=2, told=set()
    )
    feed.get()
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_workers_do_not_outlive_a_process_that_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ORPHANS.format(root=str(pathlib.Path(__file__).parents[2])))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert pids
    until = time.monotonic() + 20
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.1)
