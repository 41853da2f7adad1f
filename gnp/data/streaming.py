"""Batches of a data set that is too large for memory: read and decoded while training runs.

A batch is a pure function of (seed, step): neither the number of worker processes nor the step at
which a run is continued changes it.
"""

import contextlib
import ctypes
import dataclasses
import faulthandler
import functools
import gc
import logging
import multiprocessing
import os
import pathlib
import queue
import re
import signal
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

from gnp.data.decode import random_resized_crop, readable, refusal, stored
from gnp.data.order import example_at
from gnp.data.records import DamagedError, Record, Records
from gnp.errors import UserError
from gnp.memory import keep_freed_memory

_log = logging.getLogger(__name__)

# "image" uint8[rows, H, W, C], "label" int32[rows], "damaged": a line for each example left out,
# "error": what is wrong where that must not be, or None, "pid": the process that made it.
HostBatch = dict[str, Any]


AHEAD = 2  # batches that wait on the devices
WAIT_WARNING = 60.0  # seconds of waiting for a batch after which that is said
RESTARTS = 2  # how often the processes that read are started again if one is killed
_PR_SET_PDEATHSIG = 1  # the number of prctl's option


class Reader(Protocol):
    """The batches of a split by number, in a process's own memory. It can be pickled."""

    @property
    def batch_size(self) -> int:
        """The examples of a batch, of all processes together."""

    def __len__(self) -> int:
        """The number of batches."""

    def __getitem__(self, i: int) -> HostBatch:
        """Batch `i`, or this process's part of it."""


@dataclasses.dataclass(frozen=True)
class TrainReader:
    """The training batches: item t is what step t learns from.

    The epochs' permutations follow each other without a gap and are cut into batches: each example
    comes exactly once in an epoch, and no remainder is dropped.

    Attributes:
      records: the training examples, N of them.
      image_shape, same_size: of the source.
      crop: (size, smallest share of the area) of the random crops that are made here; None for
        none.
      batch_size: B, over all processes.
      num_steps: of the run.
      seed: of the order and of the crops.
      skip_damaged: whether damaged examples are left out.
      rows: of a batch, which are made here; None for all.
    """

    records: Records
    image_shape: tuple[int, int, int]
    same_size: bool
    crop: tuple[int, float] | None
    batch_size: int
    num_steps: int
    seed: int
    skip_damaged: bool
    rows: tuple[int, ...] | None = None

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images in a batch."""
        if self.crop is None:
            return self.image_shape
        return self.crop[0], self.crop[0], self.image_shape[2]

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> HostBatch:
        # An example's place in the stream of all epochs determines what is drawn for it.
        places = _places(step, self.batch_size, self.rows)
        indices = example_at(self.seed, np.array(places), len(self.records)).tolist()
        decoders = [functools.partial(self._decode, place) for place in places]
        return _read(self.records, indices, decoders, skip_damaged=self.skip_damaged)

    def _decode(self, place: int, record: Record) -> np.ndarray:
        if self.crop is None:
            return stored(record, self.image_shape, same_size=self.same_size)
        size, min_area = self.crop
        # NumPy guarantees that RandomState's numbers never change; those of its Generator may.
        rng = np.random.RandomState([self.seed, place])
        return random_resized_crop(record, rng, size, self.image_shape[2], min_area=min_area)


@dataclasses.dataclass(frozen=True)
class EvalReader:
    """The batches of a split in its own order, every example in exactly one of them.

    The last batch is filled up with copies of the last example, with the complements of its label.

    Attributes:
      records: the examples.
      image_shape, same_size: of the source.
      batch_size: B, over all processes.
      skip_damaged: whether damaged examples are left out.
      rows: of a batch, which are made here; None for all.
    """

    records: Records
    image_shape: tuple[int, int, int]
    same_size: bool
    batch_size: int
    skip_damaged: bool
    rows: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return -(-len(self.records) // self.batch_size)

    def __getitem__(self, i: int) -> HostBatch:
        places = _places(i, self.batch_size, self.rows)
        present = [place for place in places if place < len(self.records)]
        decode = functools.partial(stored, shape=self.image_shape, same_size=self.same_size)
        read = present or [len(self.records) - 1]  # a process may have nothing but filling
        batch = _read(self.records, read, [decode] * len(read), skip_damaged=self.skip_damaged)
        if batch["error"]:
            return batch
        labels = batch["label"][[min(k, len(read) - 1) for k in range(len(places))]]
        labels[len(present) :] = np.minimum(labels, ~labels)[len(present) :]  # below 0: filling
        fill = len(places) - len(read)
        images = np.concatenate([batch["image"], np.repeat(batch["image"][-1:], fill, axis=0)])
        return batch | {"image": images, "label": labels}


def _places(i: int, batch_size: int, rows: Sequence[int] | None) -> list[int]:
    """The places of batch `i` that are made here."""
    return [i * batch_size + row for row in (range(batch_size) if rows is None else rows)]


def own_rows(sharding: NamedSharding, batch_size: int) -> tuple[int, ...]:
    """The rows of a batch that lie on this process's devices, in ascending order."""
    parts = sharding.addressable_devices_indices_map((batch_size,)).values()
    return tuple(sorted({row for part in parts if part for row in range(batch_size)[part[0]]}))


def _to_devices(
    rows: np.ndarray, own: tuple[int, ...], batch_size: int, sharding: NamedSharding
) -> jax.Array:
    """A batch on the devices, of which this process has its `own` rows."""

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        first, stop, _ = index[0].indices(batch_size)
        at = own.index(first)
        return rows[at : at + stop - first]

    return jax.make_array_from_callback((batch_size, *rows.shape[1:]), sharding, part)


def _read(
    records: Records, indices: Sequence[int], decoders: Sequence[Any], *, skip_damaged: bool
) -> HostBatch:
    """Reads and decodes examples; an error is returned, since workers cannot raise it usefully."""
    images: np.ndarray | None = None
    labels, damaged = np.empty(len(indices), np.int32), []
    for row, (i, decode) in enumerate(zip(indices, decoders, strict=True)):
        try:
            image, label, problem = readable(records, i, decode, skip_damaged=skip_damaged)
        except DamagedError as error:
            return {
                "error": str(refusal(str(error), skip_damaged=skip_damaged)),
                "pid": os.getpid(),
            }
        if images is None:
            images = np.empty((len(indices), *image.shape), np.uint8)
        images[row], labels[row] = image, label
        if problem:
            damaged.append(problem)
    return {
        "image": images,
        "label": labels,
        "damaged": damaged,
        "error": None,
        "pid": os.getpid(),
    }


class Feed(Protocol):
    """Gives the compiled step its input, call after call."""

    waited: float  # seconds that the devices had nothing to do for want of data

    def get(self, busy: Any = None) -> Any:
        """The next input. What the devices are busy with is not waiting."""

    def close(self) -> None:
        """Ends processes and threads."""


class StreamFeed:
    """Batches of a reader, made by worker processes and sent to the devices ahead of time.

    Args:
      reader: the batches.
      first: the batch to begin with.
      sharding: how a batch lies on the devices.
      num_workers: processes; 0 makes batches in a thread of this one.
      told: what has been said of damaged examples; each is said only once.

    Raises:
      UserError: by `get`, for a damaged example that is not to be left out, and if workers die
        again and again.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        first: int = 0,
        sharding: NamedSharding,
        num_workers: int,
        told: set[str],
    ):
        self.waited = 0.0
        self._next = first
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=AHEAD)
        self._closing = threading.Event()
        self._thread = threading.Thread(
            name="feed",
            target=self._fill,
            args=(reader, first, sharding, num_workers, told),
            daemon=True,
        )
        self._thread.start()

    def get(self, busy: Any = None) -> Any:
        """The next batch on the devices, waiting for it if need be.

        Long waiting is told, each time after twice as long.

        Raises:
          EOFError: if there is none any more.
        """
        try:
            item = self._queue.get_nowait()
        except queue.Empty:
            jax.block_until_ready(busy)
            began = time.monotonic()
            item = self._wait()
            self.waited += time.monotonic() - began
        if isinstance(item, BaseException):
            self._queue.put(item)  # for whoever asks again
            raise item
        self._next += 1
        return item

    def _wait(self) -> Any:
        waited, longest = 0.0, WAIT_WARNING
        while True:
            try:
                return self._queue.get(timeout=longest - waited)
            except queue.Empty:
                waited, longest = longest, 2 * longest
                _log.warning(
                    "waiting for data since %.3g s (batch %d): what reads it may be stuck, as on "
                    "storage that does not answer, or too slow for this machine",
                    *(waited, self._next),
                )

    def close(self, seconds: float = 30.0) -> None:
        """Ends the workers and the thread, or leaves them to end by themselves after a time."""
        self._closing.set()
        until = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < until:  # it may be waiting for room
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=0.05)

    def _fill(
        self,
        reader: Reader,
        first: int,
        sharding: NamedSharding,
        num_workers: int,
        told: set[str],
    ) -> None:
        try:
            own = own_rows(sharding, reader.batch_size)
            with iterate(reader, first, num_workers) as batches:
                for batch in batches:
                    if self._closing.is_set():
                        return
                    if batch["error"]:
                        raise UserError(batch["error"])
                    for line in batch["damaged"]:
                        if line not in told:
                            told.add(line)
                            _log.warning("left out: %s", line)
                    # A copy, since workers take their shared memory back.
                    rows = {name: np.array(batch[name]) for name in ("image", "label")}
                    del batch
                    self._queue.put(
                        {
                            name: _to_devices(x, own, reader.batch_size, sharding)
                            for name, x in rows.items()
                        }
                    )
                self._queue.put(EOFError("there are no more batches"))
        except BaseException as error:  # whatever it is, `get` waits for something
            self._queue.put(error)


@contextlib.contextmanager
def iterate(reader: Reader, first: int, num_workers: int) -> Iterator[Iterator[HostBatch]]:
    """The batches of a reader from `first` on, in order, made ahead of time.

    If a process that makes them is killed, all are started again where they were, `RESTARTS` times.

    Args:
      reader: the batches.
      first: the number of the first.
      num_workers: processes that make them; 0 for a thread of this one.

    Raises:
      UserError: by the iterator, if a process could not start, or is killed once too often.
    """
    with contextlib.closing(_restarting(reader, first, num_workers)) as batches:
        yield batches


def _restarting(reader: Reader, first: int, num_workers: int) -> Generator[HostBatch, None, None]:
    for restarts in range(RESTARTS + 1):
        with contextlib.closing(_Workers(reader, first, num_workers)) as workers:
            try:
                while first < len(reader):
                    yield workers.take()  # keeping no reference: workers take its memory back
                    first += 1
                return
            except _EndedError as error:
                if not error.killed or restarts == RESTARTS:
                    raise UserError(str(error)) from error
                reason = str(error)
        _log.warning("%s; started again at batch %d", reason, first)


class _EndedError(Exception):
    """A process that reads has ended unasked; `killed`: by a signal."""

    def __init__(self, exit_code: int):
        self.killed = exit_code < 0
        super().__init__(
            f"a process that reads the data was killed by signal {-exit_code}, perhaps for want of "
            "memory (lower config.data.workers or config.data.batch_size)"
            if self.killed
            else f"a process that reads the data ended with exit code {exit_code}; perhaps it "
            "could not start (a script of your own must train under if __name__ == '__main__')"
        )


class _Workers:
    """The processes that make the batches of a reader, and their batches."""

    def __init__(self, reader: Reader, first: int, num_workers: int):
        import grain  # here, since most runs need no worker
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain passes them on to its workers
        left = len(reader) - first
        num_workers = min(num_workers, left) if left > 1 else 0
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        batches = grain.MapDataset.source(reader)[first:].to_iter_dataset(ahead)
        if num_workers > 0:
            options = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2)
            batches = batches.mp_prefetch(options, worker_init_fn=_begin_worker)
        self._iterator: Any = iter(batches)
        self._known: dict[int, Any] = {os.getpid(): None}

    def take(self) -> HostBatch:
        """The next batch.

        Raises:
          _EndedError: if any process that has made a batch has ended, or the one to make this.
        """
        for worker in self._known.values():
            if worker is not None and worker.exitcode:
                raise _EndedError(worker.exitcode)
        try:
            batch = next(self._iterator)
        except RuntimeError as error:
            ended = re.search(r"Worker process was terminated .* exit code (-?\d+)", str(error))
            if not ended:
                raise
            raise _EndedError(int(ended[1])) from error
        if batch["pid"] not in self._known:
            children = {child.pid: child for child in multiprocessing.active_children()}
            self._known[batch["pid"]] = children.get(batch["pid"])  # None: it has died since
        return batch

    def close(self) -> None:
        self._iterator.close()
        del self._iterator, self._known
        gc.collect()  # the workers' queues and shared memory hang in cycles


def _begin_worker(worker: int, num_workers: int) -> None:
    """Makes a worker leave signals to the process that trains, and end with it however that ends.

    Some schedulers send SIGTERM to every process of a task.
    """
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(AttributeError, OSError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it ended before it could be noticed
        os._exit(1)
    keep_freed_memory()


def show_worker_stacks() -> None:
    """Has every process that reads data print the stacks of its threads to the standard error."""
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError, AttributeError, StopIteration):  # not Linux, or it ended
            status = pathlib.Path(f"/proc/{child.pid}/status").read_text().splitlines()
            caught = next(line for line in status if line.startswith("SigCgt:"))
            # To one that does not expect the signal, as one that is just starting, it is the end.
            if child.pid and int(caught.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1:
                os.kill(child.pid, signal.SIGUSR1)


def default_num_workers() -> int:
    """A process for each core that this one may use, 32 at most."""
    return min(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        32,
    )
