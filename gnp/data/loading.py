"""From a source to the batches of a run: kept on the devices whole, or streamed to them."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gnp.data import resident, streaming
from gnp.data.archives import host_memory
from gnp.data.augment import COLOR_OPERATIONS, Operation
from gnp.data.decode import readable, refusal, stored
from gnp.data.pipeline import (
    Batch,
    EvalBatches,
    Preprocessing,
    StreamedEvalBatches,
    StreamedTrainBatches,
    TrainBatches,
)
from gnp.data.records import DamagedError, Records, Source, in_memory
from gnp.data.text import TextEvalBatches, TextSource, TextTrainBatches
from gnp.errors import UserError, printable

_log = logging.getLogger(__name__)

# How much of a device's memory a data set may take: chosen by itself, and at most.
_AUTO_SHARE, _LARGEST_SHARE = 0.4, 0.8

_SAMPLE = 512  # images from which the statistics of a streamed data set are estimated


@dataclasses.dataclass(frozen=True)
class ResidentData:
    """A data set that lives on the devices: every call is fed all of it.

    Attributes:
      arrays: of each split.
      train_batches: how the step makes batches of the split "train".
      eval_batches: how batches of each split in its own order are made.
      about: where the data are, for people.
    """

    arrays: Mapping[str, Batch]
    train_batches: TrainBatches | TextTrainBatches
    eval_batches: Mapping[str, EvalBatches] | Mapping[str, TextEvalBatches]
    about: str

    max_steps_per_call: ClassVar[int | None] = None  # any number of steps share an input

    @property
    def bytes_per_device(self) -> int:
        """The memory that the data take on each device."""
        return sum(x.nbytes for x in jax.tree.leaves(self.arrays))

    def train_input(self) -> Batch:
        """The split "train"."""
        return self.arrays["train"]

    def eval_input(self, split: str) -> Batch:
        """The split."""
        return self.arrays[split]

    def train_feed(self, first: int, last: int) -> streaming.Feed:
        """Always the split "train"."""
        return _Always(self.arrays["train"])

    def eval_feed(self, split: str) -> streaming.Feed:
        """Always the split."""
        return _Always(self.arrays[split])


class _Always:
    """The same input again and again."""

    waited = 0.0

    def __init__(self, data: Batch):
        self._data = data

    def get(self, busy: Any = None) -> Batch:
        return self._data

    def close(self) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class StreamedData:
    """A data set whose batches are made on the host and sent to the devices.

    Attributes:
      train_reader, eval_readers: the batches that the host makes.
      num_workers: processes that make them.
      over_batch: how a batch lies on the devices.
      train_batches: what the step does with a batch.
      eval_batches: what evaluation does with one.
      about: where the data are, for people.
      told: what has been said of damaged examples.
    """

    train_reader: streaming.TrainReader
    eval_readers: Mapping[str, streaming.EvalReader]
    num_workers: int
    over_batch: NamedSharding
    train_batches: StreamedTrainBatches
    eval_batches: Mapping[str, StreamedEvalBatches]
    about: str
    told: set[str] = dataclasses.field(default_factory=set)

    max_steps_per_call: ClassVar[int | None] = 1

    @property
    def bytes_per_device(self) -> int:
        """The memory that the batches ahead take on each device: two, and the one in use."""
        reader = self.train_reader
        batch = reader.batch_size * math.prod(reader.output_shape)
        return (streaming.AHEAD + 1) * batch // self.over_batch.mesh.size

    def train_input(self) -> Batch:
        """The shapes of a batch."""
        reader = self.train_reader
        return self._shapes(reader.batch_size, reader.output_shape)

    def eval_input(self, split: str) -> Batch:
        """The shapes of a batch."""
        reader = self.eval_readers[split]
        return self._shapes(reader.batch_size, reader.image_shape)

    def _shapes(self, batch_size: int, image_shape: tuple[int, int, int]) -> Any:
        shape = functools.partial(jax.ShapeDtypeStruct, sharding=self.over_batch)
        return {
            "image": shape((batch_size, *image_shape), jnp.uint8),
            "label": shape((batch_size,), jnp.int32),
        }

    def train_feed(self, first: int, last: int) -> streaming.Feed:
        """The batches from number `first` to before `last`."""
        return self._feed(dataclasses.replace(self.train_reader, num_steps=last), first)

    def eval_feed(self, split: str) -> streaming.Feed:
        """The split's batches."""
        return self._feed(self.eval_readers[split], 0)

    def _feed(self, reader: streaming.Reader, first: int) -> streaming.Feed:
        return streaming.StreamFeed(
            reader,
            first=first,
            sharding=self.over_batch,
            num_workers=self.num_workers,
            told=self.told,
        )


Data = ResidentData | StreamedData  # the same to the loop


def train_batch(data: Data, step: int) -> Batch:
    """Training batch number `step`, as the compiled step makes it."""
    batches: Any = data.train_batches

    def batch(inputs: Batch, step: jax.Array) -> Batch:
        return batches.batch(inputs, batches.order(step, 1)[0], step)

    with contextlib.closing(data.train_feed(step, step + 1)) as feed:
        return jax.jit(batch)(feed.get(), step)


def load_text(
    source: TextSource,
    *,
    batch_size: int,
    sequence_length: int,
    eval_streams: int,
    eval_batch_size: int,
    replicated: NamedSharding,
) -> ResidentData:
    """Puts a text onto every device.

    Args:
      source: the text.
      batch_size: streams of training.
      sequence_length: words of a stream in a step.
      eval_streams: streams of evaluation.
      eval_batch_size: rows of an evaluation's batch, at least as many.
      replicated: the devices.
    """
    arrays = {split: {"word": words} for split, words in source.words.items()}
    return ResidentData(
        arrays=_on_every_device(arrays, replicated),
        train_batches=TextTrainBatches(source.num_examples["train"], batch_size, sequence_length),
        eval_batches={
            split: TextEvalBatches(count, eval_streams, sequence_length, eval_batch_size)
            for split, count in source.num_examples.items()
        },
        about="on the device",
    )


def load_images(
    source: Source,
    *,
    keep: str,
    batch_size: int,
    eval_batch_size: int,
    image_size: int,
    operations: tuple[Operation, ...],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int,
    num_steps: int,
    num_workers: int | None = None,
    skip_damaged: bool = False,
    replicated: NamedSharding,
    over_batch: NamedSharding,
) -> ResidentData | StreamedData:
    """Decodes a data set onto every device, or makes ready to stream it.

    Args:
      source: the data set; it has a split "train".
      keep: "true" on the devices, "false" streamed, "auto" on the devices if it fits easily.
      batch_size: of training, over all devices.
      eval_batch_size: of evaluation, a multiple of the number of devices.
      image_size: pixels on a side of what the model sees.
      operations: augmentations. A random_resized_crop, if it is the first, of a streamed data set
        is made on the host, of the whole image.
      mean: of each channel, over 255, to normalise with; None: that of the training images, of a
        streamed data set that of a sample of them.
      std: the standard deviation, likewise.
      seed: of the order and of the augmentation.
      num_steps: of the run.
      num_workers: processes that make what is streamed; None: one for each core.
      skip_damaged: whether damaged images are left out.
      replicated: the devices.
      over_batch: how a batch is laid over them.

    Raises:
      UserError: if the data set does not fit where it is to be kept, or is damaged.
    """
    for name, _ in operations:
        if name in COLOR_OPERATIONS and source.image_shape[2] not in (1, 3):
            raise UserError(
                f"augmentation {name!r} takes grey or RGB images, but those of {source.name} have "
                f"{source.image_shape[2]} channels"
            )
    size = sum(source.num_examples.values()) * math.prod(source.image_shape)
    assert isinstance(replicated.mesh, Mesh)  # and none without devices
    memory = device_memory(replicated.mesh)
    sizes = f"{size / 1e9:.3g} GB of images, {memory / 1e9:.3g} GB of memory"
    if keep == "true" and size > _LARGEST_SHARE * memory:
        raise UserError(
            f"config.data.resident is true, but {source.name} is too large to be kept ({sizes}); "
            "set it to auto or false, or lower config.data.image_size"
        )
    # No larger than the split, but a multiple of the devices.
    devices = replicated.mesh.devices.size
    eval_sizes = {
        name: min(eval_batch_size, -(-count // devices) * devices)
        for name, count in source.num_examples.items()
    }
    make_preprocessing = functools.partial(
        Preprocessing, image_size=image_size, num_classes=source.num_classes, seed=seed
    )
    if keep == "true" or (keep == "auto" and size <= _AUTO_SHARE * memory):
        splits = resident.load(source, skip_damaged=skip_damaged)
        for name, split in splits.items():
            _report_missing_classes(source, name, split.labels)
        train = splits["train"]
        preprocessing = make_preprocessing(
            operations=operations,
            mean=_per_channel("mean", mean, train.mean),
            std=_per_channel("std", std, train.std),
        )
        arrays = {name: {"image": s.images, "label": s.labels} for name, s in splits.items()}
        return ResidentData(
            arrays=_on_every_device(arrays, replicated),
            train_batches=TrainBatches(len(train.labels), batch_size, seed, preprocessing),
            eval_batches={
                name: EvalBatches(count, eval_sizes[name], preprocessing)
                for name, count in source.num_examples.items()
            },
            about=f"kept on the device ({sizes})",
        )

    for name, records in source.splits.items():
        if records.labels is not None:
            _report_missing_classes(source, name, records.labels)
    crop = None
    if operations and operations[0].name == "random_resized_crop":
        crop, operations = (image_size, float(operations[0].args[0])), operations[1:]
    own = np.empty((2, source.image_shape[2]))
    if mean is None or std is None:
        own = np.stack(_sample_statistics(source, skip_damaged=skip_damaged))
    preprocessing = make_preprocessing(
        operations=operations,
        mean=_per_channel("mean", mean, own[0]),
        std=_per_channel("std", std, own[1]),
    )
    common: dict[str, Any] = {
        "image_shape": source.image_shape,
        "same_size": source.same_size,
        "skip_damaged": skip_damaged,
    }
    num_workers = streaming.default_num_workers() if num_workers is None else num_workers
    if all(in_memory(records) for records in source.splits.values()):
        num_workers = 0
    return StreamedData(
        train_reader=streaming.TrainReader(
            records=source.splits["train"],
            crop=crop,
            batch_size=batch_size,
            num_steps=num_steps,
            seed=seed,
            rows=streaming.own_rows(over_batch, batch_size),
            **common,
        ),
        eval_readers={
            name: streaming.EvalReader(
                records=records,
                batch_size=eval_sizes[name],
                rows=streaming.own_rows(over_batch, eval_sizes[name]),
                **common,
            )
            for name, records in source.splits.items()
        },
        num_workers=num_workers,
        over_batch=over_batch,
        train_batches=StreamedTrainBatches(batch_size, preprocessing),
        eval_batches={
            name: StreamedEvalBatches(count, eval_sizes[name], preprocessing)
            for name, count in source.num_examples.items()
        },
        about=f"streamed by {num_workers} worker{'s' * (num_workers != 1)} ({sizes})",
    )


def _on_every_device(arrays: Any, replicated: NamedSharding) -> Any:
    """Puts arrays that every process has onto its devices; the processes do not compare them."""

    def put(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, replicated, lambda index: array)

    return jax.tree.map(put, arrays)


def device_memory(mesh: Mesh) -> int:
    """Bytes of memory that each device has."""
    own = jax.process_index()
    here = [device for device in mesh.devices.flat if device.process_index == own]
    limit = (here[0].memory_stats() or {}).get("bytes_limit")
    if limit is not None:
        return int(limit)
    # CPUs share the machine's.
    return host_memory() // len(here)


def _per_channel(name: str, given: Sequence[float] | None, own: np.ndarray) -> np.ndarray:
    """The configured values if there are any, or the data set's own."""
    if given is None:
        return own
    if len(given) != len(own):
        raise UserError(
            f"config.data.{name} has {len(given)} values, but the images have {len(own)} channels"
        )
    return np.array(given, np.float64)


def _sample_statistics(source: Source, *, skip_damaged: bool) -> tuple[np.ndarray, np.ndarray]:
    """`resident.channel_statistics` of training images that lie evenly apart."""
    records: Records = source.splits["train"]
    count = min(_SAMPLE, len(records))
    decode = functools.partial(stored, shape=source.image_shape, same_size=source.same_size)

    def read(k: int) -> np.ndarray:
        i = k * len(records) // count
        return readable(records, i, decode, skip_damaged=skip_damaged)[0]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        try:
            return resident.channel_statistics(np.stack(list(threads.map(read, range(count)))))
        except DamagedError as error:
            threads.shutdown(cancel_futures=True)
            raise refusal(str(error), skip_damaged=skip_damaged) from None


def _report_missing_classes(source: Source, split: str, labels: np.ndarray) -> None:
    present = np.zeros(source.num_classes, bool)
    present[np.where(labels < 0, ~labels, labels)] = True
    if not present.all():
        missing = np.flatnonzero(~present)
        names = ", ".join(printable(str(source.classes[i])) for i in missing[:3])
        _log.warning(
            "the split %s has no image of %d of the %d classes (%s%s): if that is not meant, set "
            "config.data.%s to another part of the data",
            *(split, len(missing), source.num_classes, names, ", …" * (len(missing) > 3), split),
        )
