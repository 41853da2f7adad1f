"""TFRecord files by record number, without TensorFlow.

A file is a sequence of: the length n of the record, uint64; a checksum of these 8 bytes, uint32;
the record, n bytes; a checksum of it, uint32. All are little-endian; a checksum is the CRC-32C,
rotated right by 15 bits, plus 0xA282EAD8 (https://www.tensorflow.org/tutorials/load_data/tfrecord).
"""

import bisect
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import SupportsIndex, overload

import google_crc32c
import numpy as np


class TFRecords(Sequence[bytes]):
    """The records of several files, one file after the other.

    The lengths in the files are read at once, the records when they are asked for.

    Raises:
      ValueError: if a file is cut off, or is no TFRecord file; when a record is asked for, if its
        checksum is wrong.
    """

    def __init__(self, paths: Sequence[Path]):
        self._paths = list(paths)
        self._offsets = [_offsets(path) for path in self._paths]
        self._ends = np.cumsum([len(offsets) for offsets in self._offsets]).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, i: SupportsIndex) -> bytes: ...
    @overload
    def __getitem__(self, i: slice) -> list[bytes]: ...
    def __getitem__(self, i: SupportsIndex | slice) -> bytes | list[bytes]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        number = range(len(self))[i]
        file = bisect.bisect_right(self._ends, number)
        offset = int(self._offsets[file][number - self._ends[file]])  # from the file's end
        with self._paths[file].open("rb", buffering=0) as opened:
            opened.seek(offset)
            length = _length(opened.read(12), self._paths[file])
            content = opened.read(length + 4)
        record, checksum = content[:length], content[length:]
        if len(checksum) != 4 or _checksum(record) != struct.unpack("<I", checksum)[0]:
            raise ValueError(f"the checksum at byte {offset} of {self._paths[file]} is wrong")
        return record


def _offsets(path: Path) -> np.ndarray:
    """Where each record begins, int64[N]."""
    size, position, found = path.stat().st_size, 0, []
    with path.open("rb", buffering=0) as file:
        while position < size:
            file.seek(position)
            found.append(position)
            position += 16 + _length(file.read(12), path)
    if position > size:
        raise ValueError(f"{path} is cut off in record {len(found) - 1}")
    return np.array(found, np.int64)


def _length(header: bytes, path: Path) -> int:
    if len(header) != 12 or _checksum(header[:8]) != struct.unpack("<I", header[8:])[0]:
        raise ValueError(f"{path} is cut off, or no TFRecord file")
    return int(struct.unpack("<Q", header[:8])[0])


def _checksum(content: bytes) -> int:
    crc = google_crc32c.value(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
