"""Examples by number: what every image data set on disk is before anything is decoded."""

import dataclasses
import errno
import functools
import hashlib
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from gnp.errors import UserError, printable

MAX_CLASSES = 1_000_000

_log = logging.getLogger(__name__)


class DamagedError(Exception):
    """An example that cannot be used; the message says which and why, in one line."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class Record(NamedTuple):
    """An example.

    Attributes:
      image: an encoded image (JPEG, PNG, …), or its pixels, uint8[H, W, C].
      label: its class.
      name: what to call it in messages, as its path.
    """

    image: bytes | np.ndarray
    label: int
    name: str


class Records(Protocol):
    """A split's examples by number, in a fixed order.

    It can be pickled, small, and opens its files in the process that reads them.
    """

    def __len__(self) -> int:
        """The number of examples."""

    def __getitem__(self, i: int) -> Record:
        """Example `i`. Raises `DamagedError` if it cannot be read."""

    @property
    def labels(self) -> np.ndarray | None:
        """int32[N], all labels, if they are known without reading the examples."""


@dataclasses.dataclass(frozen=True)
class ArrayRecords:
    """Images in memory.

    Attributes:
      images: uint8[N, H, W, C].
      labels: int32[N].
      name: what to call the split in messages.
    """

    images: np.ndarray
    labels: np.ndarray
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Record:
        return Record(self.images[i], int(self.labels[i]), f"image {i} of {self.name}")


@dataclasses.dataclass(frozen=True)
class Subset:
    """The examples of a split from `start` to `stop`.

    Attributes:
      records: the whole split.
      split: its name.
      start: the first example.
      stop: one past the last.
    """

    records: Records
    split: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, i: int) -> Record:
        return self.records[self.start + i]

    @property
    def labels(self) -> np.ndarray | None:
        """int32[N], if they are known without reading the examples."""
        labels = self.records.labels
        return None if labels is None else labels[self.start : self.stop]


def in_memory(records: Records) -> bool:
    """Whether examples are pixels in this process's memory: nothing to decode, much to send."""
    return isinstance(records.records if isinstance(records, Subset) else records, ArrayRecords)


@dataclasses.dataclass(frozen=True)
class Source:
    """What is known of an image data set before anything is decoded.

    Attributes:
      name: as `list_sources` has it, or TFDS.
      classes: their names; a label is a place in them.
      image_shape: (height, width, channels) in which images are kept when they are decoded; before
        that is settled, height and width are 0 if they vary.
      same_size: whether an image of another size is damaged; otherwise it is resized, by its
        shorter side, and its middle is kept.
      splits: the examples of each.
      test_split: the split to test on unless a configuration names one; None if there is none.
      key: gives a word that changes when the files do; None for what is in memory anyway.
      where: the folder or file, for messages.
    """

    name: str
    classes: Sequence[str]
    image_shape: tuple[int, int, int]
    same_size: bool
    splits: Mapping[str, Records]
    test_split: str | None
    key: Callable[[], str] | None
    where: str

    holds = "images"
    unit = "image"

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @property
    def num_examples(self) -> dict[str, int]:
        """The number of images in each split."""
        return {split: len(records) for split, records in self.splits.items()}

    def select(self, **wanted: str) -> "Source":
        """The source whose splits are parts of this one's, as `train="train[:90%]"`.

        Raises:
          UserError: if there is no such split, or nothing in it.
        """
        splits = {name: self._part(name, text) for name, text in wanted.items()}
        train = splits.get("train")
        for name, part in splits.items():
            if train is None or part is train or part.records is not train.records:
                continue
            shared = min(part.stop, train.stop) - max(part.start, train.start)
            if shared > 0:
                _log.warning(
                    "config.data.train=%s and config.data.%s=%s share %d images, which are learned",
                    *(wanted["train"], name, wanted[name], shared),
                )
        return dataclasses.replace(self, splits=splits)

    def _part(self, name: str, text: str) -> Subset:
        field = f"config.data.{name}"
        bound = r"(-?(?:\d{1,12}|(?:100|\d\d?)%))?"
        match = re.fullmatch(rf"(\w+)(?:\[{bound}:{bound}\])?", text)
        if not match:
            raise UserError(
                f"{field} is {text!r}; write a split, or a part of one by examples or percent: "
                "train, train[:90%], train[90%:], train[:5000]"
            )
        split, start, stop = match[1], match[2], match[3]
        if split not in self.splits:
            raise UserError(
                f"{field} is {text!r}, but {self.name} in {self.where} has no split {split!r}; "
                f"there: {', '.join(self.splits) or 'none'}"
            )
        records = self.splits[split]
        total = len(records)
        first, last = (
            round(int(place[:-1]) * total / 100) if place.endswith("%") else int(place)
            for place in (start or "0", stop or "100%")
        )
        if max(abs(first), abs(last)) > total:
            raise UserError(
                f"{field} is {text!r}, but {split!r} of {self.name} in {self.where} has only "
                f"{total} images"
            )
        first, last = (
            place + total if str(given).startswith("-") else place
            for place, given in ((first, start), (last, stop))
        )
        if first >= last:
            raise UserError(
                f"{field} is {text!r}, which holds none of the {total} images of {split!r} of "
                f"{self.name} in {self.where}"
            )
        if isinstance(records, Subset):
            return Subset(
                records.records, records.split, records.start + first, records.start + last
            )
        return Subset(records, split, first, last)


def fingerprint(paths: Iterable[str | os.PathLike[str]]) -> str:
    """A word that changes when one of the files is written or replaced, or when they are moved."""
    digest = hashlib.sha256()
    real_folder = functools.cache(os.path.realpath)
    for path in paths:
        stat, (folder, name) = os.stat(path), os.path.split(path)
        real = os.path.join(real_folder(folder), name)
        digest.update(os.fsencode(os.path.realpath(path) if os.path.islink(path) else real))
        digest.update(f" {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def plain(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The path of a file, or of a link to one.

    Raises:
      OSError: if there is nothing, or a pipe or a device, which might be read without an end.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a folder is an error anyway
        raise OSError(errno.EINVAL, "it is no plain file", os.fspath(path))
    return path


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
