"""A data set's splits as arrays in memory, decoded once and kept in a cache.

What was decoded is kept under `$XDG_CACHE_HOME/gnp` (by default `~/.cache/gnp`), which may be
deleted at any time.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gnp.data.decode import refusal
from gnp.data.records import Records, Source, Subset, in_memory, plain
from gnp.data.streaming import EvalReader, HostBatch, default_num_workers, iterate
from gnp.errors import UserError, printable

_log = logging.getLogger(__name__)

_CHUNK = 256  # images that are decoded together
_LONG = 4.0  # seconds of decoding for which it is worth starting processes


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of one split, in the order in which they are stored.

    Attributes:
      images: uint8[N, H, W, C]; may be a read-only memory map.
      labels: int32[N], from 0 to the number of classes - 1. Where an example is damaged, another
        one's image stands in its place, and the complement, -1 - label, of its label.
      mean, std: float64[C], of the images over 255.
      damaged: a line for each damaged example.
    """

    images: np.ndarray
    labels: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    damaged: tuple[str, ...] = ()


def load(source: Source, *, skip_damaged: bool = False) -> dict[str, Split]:
    """All splits of a source; slow the first time.

    Args:
      source: what to load; its image shape must be settled.
      skip_damaged: whether damaged examples are left out, with a warning, or are an error.

    Raises:
      UserError: if an example is damaged and that is not to be left out, or if all are.
    """
    splits, home = {}, _home(source)
    for name, records in source.splits.items():
        cache = home and home / _folder(name, records)
        split = cache and _read(cache, (len(records), *source.image_shape), source.num_classes)
        if not split:
            split = _decode(source, name, records, cache, skip_damaged)
        if split.damaged and not skip_damaged:
            raise refusal(split.damaged[0], skip_damaged=False)
        if split.damaged:
            _log.warning(
                "%d of %d %s images of %s are damaged and left out: %s",
                *(len(split.damaged), len(records), name, source.name),
                "; ".join(split.damaged[:3]) + ("; …" if len(split.damaged) > 3 else ""),
            )
        splits[name] = split
    return splits


def _decode(
    source: Source, name: str, records: Records, cache: Path | None, skip_damaged: bool
) -> Split:
    """Decodes a split in parallel, into the cache if that can be, with a bar if one can see it."""
    shape, total = (len(records), *source.image_shape), len(records)
    with contextlib.ExitStack() as stack:
        folder = _make_folder(cache, stack) if cache else None
        mapped = _reserve(folder / "images.npy", shape) if folder else None
        images = np.empty(shape, np.uint8) if mapped is None else mapped
        labels, damaged = np.empty(total, np.int32), []
        progress = stack.enter_context(
            tqdm(
                total=total,
                desc=f"decoding {source.name} ({name})",
                unit=" images",
                leave=False,
                disable=None,
            )
        )
        reader = EvalReader(records, source.image_shape, source.same_size, _CHUNK, skip_damaged)
        chunks = stack.enter_context(_in_parallel(reader))
        for start in range(0, total, _CHUNK):
            chunk = next(chunks)
            if chunk["error"]:
                raise UserError(chunk["error"])
            part = slice(start, min(start + _CHUNK, total))
            count = part.stop - part.start
            images[part], labels[part] = chunk["image"][:count], chunk["label"][:count]
            damaged += chunk["damaged"]
            del chunk  # it is in memory that its process takes back
            progress.update(count)
        mean, std = channel_statistics(images)
        split = Split(images, labels, mean, std, tuple(damaged))
        if folder is not None and cache is not None and mapped is not None:
            split = _keep(split, folder, cache)
    return split


@contextlib.contextmanager
def _in_parallel(reader: EvalReader) -> Iterator[Iterator[HostBatch]]:
    """The batches of a reader, by other processes if that is worth starting them.

    Threads would not do: Python's lock lets them decode small images only one by one.
    """
    began = time.monotonic()
    first = reader[0]
    seconds = (time.monotonic() - began) * len(reader)
    num_workers = default_num_workers() if seconds > _LONG else 0
    if in_memory(reader.records):
        num_workers = 0
    with iterate(reader, 1, num_workers) as others:
        yield itertools.chain([first], others)


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of uint8[N, H, W, C] images over 255: two float64[C].

    Exact, from the histogram of each channel, block by block, so that a large memory map is read
    only once and never held. A channel that does not vary has the deviation 1.
    """
    values = np.arange(256) / 255
    channels = images.shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(images), 1024):
        block = images[start : start + 1024]
        for c in range(channels):
            counts[c] += np.bincount(block[..., c].ravel(), minlength=256)
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ values
    variance = (shares * (values - mean[:, None]) ** 2).sum(axis=1)
    return mean, np.where(variance > 0, np.sqrt(variance), 1.0)


# The cache of a split is a folder: images.npy, labels.npy, split.json.


def _home(source: Source) -> Path | None:
    """Where a source's splits are kept; None for one that is in memory anyway."""
    if source.key is None:
        return None
    try:
        key = source.key()
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gnp"
    shape = "x".join(map(str, source.image_shape)) + ("" if source.same_size else "-resized")
    return home / f"{re.sub(r'[^a-z0-9_.]', '-', source.name)}-{key}-{shape}"


def _folder(name: str, records: Records) -> str:
    """What a split's folder is called."""
    if isinstance(records, Subset):
        return f"{records.split}-{records.start}-{records.stop}"
    return name


def _read(cache: Path, shape: tuple[int, ...], num_classes: int) -> Split | None:
    """The decoded split as a memory map, None if it is not there or not whole."""
    try:
        about = json.loads(Path(plain(cache / "split.json")).read_text())
        # Maps, so that a header that tells of too much is an error and takes no memory.
        images, labels = (
            np.load(plain(cache / name), mmap_mode="r", allow_pickle=False)
            for name in ("images.npy", "labels.npy")
        )
        mean, std = (np.array(about[field], np.float64) for field in ("mean", "std"))
        damaged = tuple(map(printable, about["damaged"]))
        classes = np.where(labels < 0, ~labels, labels)
        whole = (
            (images.shape, images.dtype) == (shape, np.uint8)
            and (labels.shape, labels.dtype) == (shape[:1], np.int32)
            and 0 <= classes.min() <= classes.max() < num_classes
            and mean.shape == std.shape == shape[-1:]
            and bool(np.isfinite([mean, std]).all() and (std > 0).all())
        )
    except Exception:  # whatever NumPy and json raise; it is decoded again
        return None
    return Split(images, np.array(labels), mean, std, damaged) if whole else None


def _make_folder(cache: Path, stack: contextlib.ExitStack) -> Path | None:
    """A folder beside the cache to write into; None, and a warning, if there can be none."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        return Path(stack.enter_context(tempfile.TemporaryDirectory(dir=cache.parent)))
    except OSError as error:
        _warn(cache, error)
        return None


def _reserve(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """A file of its whole size, mapped into memory; None, and a warning, if the disk is full."""
    try:
        images = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        # A map of a file with holes would be a fatal signal when the disk is full.
        with path.open("r+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        _warn(path.parent, error)
        path.unlink(missing_ok=True)
        return None
    return images


def _keep(split: Split, folder: Path, cache: Path) -> Split:
    """Moves what has been decoded to its place, whole or not at all."""
    about = {
        "mean": split.mean.tolist(),
        "std": split.std.tolist(),
        "damaged": split.damaged,
    }
    try:
        assert isinstance(split.images, np.memmap)
        split.images.flush()
        np.save(folder / "labels.npy", split.labels)
        (folder / "split.json").write_text(json.dumps(about))
        cache.mkdir(exist_ok=True)
        for name in ("images.npy", "labels.npy", "split.json"):  # the last says that all are there
            (folder / name).replace(cache / name)
    except OSError as error:
        _warn(cache, error)
        return dataclasses.replace(split, images=np.array(split.images))
    return split


def _warn(cache: Path, error: OSError) -> None:
    _log.warning("cannot write the cache %s, decoding again next time: %s", cache, error)
