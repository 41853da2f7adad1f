"""TFRecord files that another program has written are read as they are, damage is noticed."""

import concurrent.futures
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorboardX.record_writer import RecordWriter

from gnp.data.tfrecord import TFRecords

shared_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def write(path: Path, records: list[bytes]) -> Path:
    writer = RecordWriter(str(path))
    for record in records:
        writer.write(record)
    writer.close()
    return path


def checksum(content: bytes) -> bytes:
    """The masked CRC-32C bit by bit, from its polynomial."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


def test_bytes_of_a_file_by_hand(tmp_path):
    length = (5).to_bytes(8, "little")
    path = tmp_path / "a"
    path.write_bytes(length + checksum(length) + b"hello" + checksum(b"hello"))
    assert list(TFRecords([path])) == [b"hello"]
    # The head of every event file that TensorFlow has written.
    assert checksum((24).to_bytes(8, "little")) == b'\xa3\x7fK"'


@shared_folder
@given(st.lists(st.lists(st.binary(max_size=40), max_size=5), min_size=1, max_size=4))
def test_records_of_several_files(tmp_path, shards):
    paths = [write(tmp_path / f"{i}", shard) for i, shard in enumerate(shards)]
    expected = [record for shard in shards for record in shard]
    records = TFRecords(paths)
    assert len(records) == len(expected)
    assert list(records) == expected
    for i in range(-len(expected), len(expected)):
        assert records[i] == expected[i]
        assert records[np.int64(i)] == expected[i]
    for i in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError):
            records[i]
    assert records[1:] == expected[1:] and records[::-2] == expected[::-2]


def test_a_record_larger_than_any_buffer(tmp_path):
    large = np.random.default_rng(0).bytes(3_000_000)
    assert TFRecords([write(tmp_path / "a", [b"x", large, b"y"])])[1:] == [large, b"y"]


RECORDS = [b"first", b"", b"the third one", b"\x00" * 20]


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "some.tfrecord", RECORDS)


def test_truncation_anywhere_is_noticed(file):
    content = file.read_bytes()
    ends = np.cumsum([16 + len(record) for record in RECORDS])
    assert len(content) == ends[-1]
    for size in range(len(content)):
        file.write_bytes(content[:size])
        if size in (0, *ends):  # as if the others had never been written
            count = np.searchsorted(ends, size, side="right")
            assert list(TFRecords([file])) == RECORDS[:count]
        else:
            with pytest.raises(ValueError, match=f"^{file} is cut off"):
                TFRecords([file])


def test_a_flipped_bit_anywhere_is_noticed(file):
    content = file.read_bytes()
    ends = np.cumsum([16 + len(record) for record in RECORDS])
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        culprit = int(np.searchsorted(ends, place, side="right"))
        start = ends[culprit] - 16 - len(RECORDS[culprit])
        if place - start < 12:
            with pytest.raises(ValueError, match=f"^{file} is cut off, or no TFRecord file$"):
                TFRecords([file])
            continue
        records = TFRecords([file])
        for i, record in enumerate(RECORDS):
            if i == culprit:
                with pytest.raises(ValueError, match=f"^the checksum at byte {start} of {file} is"):
                    records[i]
            else:
                assert records[i] == record


@pytest.mark.parametrize("content", [b"x", b"something else", bytes(16), b"\xff" * 64])
def test_foreign_files(tmp_path, content):
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path} is cut off, or no TFRecord file$"):
        TFRecords([path])


def test_a_file_that_changes_or_goes_away_is_noticed(file):
    records = TFRecords([file])
    content = file.read_bytes()
    for size in range(len(content)):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"is cut off|is wrong"):
            records[3]
    file.unlink()
    with pytest.raises(FileNotFoundError):
        records[0]
    file.write_bytes(content)
    assert records[0] == RECORDS[0]


def read(records: TFRecords, i: int) -> bytes:
    return records[i]


def test_can_be_sent_to_threads_and_another_process(file):
    records = TFRecords([file, file])
    assert list(pickle.loads(pickle.dumps(records))) == RECORDS * 2
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        found = list(threads.map(records.__getitem__, [i % 8 for i in range(200)]))
    assert found == [RECORDS[i % 4] for i in range(200)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as process:
        assert process.submit(read, records, 6).result(60) == RECORDS[2]
