"""Rows of metrics: none twice and none missing, whatever happens to the disk and to the process."""

import contextlib
import json
import logging
import pathlib
import shutil
import sys
import tempfile
import types
from typing import ClassVar

import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import hparams

from gnp import config as gnp_config
from gnp.errors import UserError
from gnp.training import events as events_module
from gnp.training import metrics
from gnp.training.events import hyperparameters
from gnp.training.metrics import MetricsWriter
from tests.small_disk import ROOT, small_disk

EXAMPLES = pytest.mark.parametrize("examples", [50, pytest.param(1000, marks=pytest.mark.slow)])

# The beginning of a program that writes metrics, without JAX, which is slow to import.
PROGRAM = f"""
import sys, types
package = types.ModuleType("gnp.training")
package.__path__ = [{str(ROOT / "gnp" / "training")!r}]
sys.modules["gnp.training"] = package
sys.path.insert(0, {str(ROOT)!r})
import pathlib
from gnp.training.metrics import MetricsWriter

def row(step):
    return {{"step": step, "epoch": step / 7, "wall_time": 0.5 * step, "split": "train",
            "loss": 1 / step, "note": "x" * (step * 37 % 301)}}
"""


def row(step, split="train", **values):
    values = values or {"loss": 1 / (step + 1)}
    return {"step": step, "epoch": step / 7, "wall_time": 0.5 * step, "split": split, **values}


def lines(rows):
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def read(workdir):
    """The rows of the file, each of whose lines must be whole."""
    blob = (workdir / "metrics.jsonl").read_bytes()
    assert blob == b"" or blob.endswith(b"\n")
    return [json.loads(line) for line in blob.splitlines()]


def events(workdir):
    """What TensorBoard shows: the value of each step and tag."""
    values = {}
    paths = list(workdir.glob("events.out.tfevents.*"))
    for path in sorted(paths, key=lambda path: [int(x) for x in path.name.split(".")[-2:]]):
        blob = path.read_bytes()
        while blob:  # length, its checksum, the event, its checksum
            size = int.from_bytes(blob[:8], "little")
            event = Event.FromString(blob[12 : 12 + size])
            blob = blob[16 + size :]
            if event.session_log.status == SessionLog.START:
                values = {key: value for key, value in values.items() if key[0] < event.step}
            for value in event.summary.value:
                values[event.step, value.tag] = value.simple_value
    return values


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# --- What is read -------------------------------------------------------------------------------

STEPS = st.integers(0, 40)
ROWS = st.builds(
    lambda step, split, loss: lines([row(step, split, loss=loss)]).rstrip(b"\n"),
    STEPS,
    st.sampled_from(["train", "test", "größer"]),
    st.none() | st.floats(allow_nan=False, allow_infinity=False),
)
# A flipped bit of the brace that a line begins with, and lines that are something else.
FLIPPED = st.builds(
    lambda line, bit: bytes([line[0] ^ 1 << bit]) + line[1:], ROWS, st.integers(0, 7)
)
CUT = st.builds(lambda line, share: line[: 1 + int(share * len(line))], ROWS, st.floats(0, 0.9))
OTHERS = st.one_of(
    st.binary(min_size=1)
    .filter(lambda line: line.strip() and b"\n" not in line)
    .map(b"\0".__add__),
    st.sampled_from(
        [
            b"null",
            b"17",
            b"[]",
            b"{}",
            b'{"step": 3, "epoch": 1}',
            b'{"step": 3, "epoch": 1, "split": 2}',
            b'{"step": "3", "epoch": 1, "split": "train"}',
            b'{"step": NaN, "epoch": 1, "split": "train"}',
            b'{"step": 3, "epoch": Infinity, "split": "train"}',
            b'{"step": true, "epoch": 1, "split": "train"}',
            b'{"step": 3, "split": "train"}',
            b"\xff\xfe",
        ]
    ),
)
LINES = st.lists(st.tuples(st.just(True), ROWS) | st.tuples(st.just(False), FLIPPED | CUT | OTHERS))


@EXAMPLES
def test_the_rows_kept_are_the_valid_ones_up_to_the_step(examples):
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(LINES, st.binary(max_size=30) | CUT, STEPS)
    @example([(False, b"[" * 100_000), (True, lines([row(1)])[:-1])], b"{", 1)
    def check(there, tail, step):
        tail = b"\0" + tail.replace(b"\n", b"")  # the line that was being written
        with tempfile.TemporaryDirectory() as folder:
            workdir = pathlib.Path(folder)
            (workdir / "metrics.jsonl").write_bytes(b"\n".join([*(x for _, x in there), tail]))
            kept = [json.loads(line) for valid, line in there if valid]
            kept = [r for r in kept if r["step"] <= step]
            with contextlib.closing(MetricsWriter(workdir, step=step)) as writer:
                assert writer.history == kept == read(workdir)
                assert writer.last == {r["split"]: r for r in kept}
                writer.write(row(50))
            assert read(workdir) == [*kept, row(50)]
            damaged, path = (
                [x for valid, x in there if not valid],
                workdir / "metrics.jsonl.damaged",
            )
            assert path.exists() == bool(damaged)
            if damaged:
                assert path.read_bytes() == b"\n".join([*damaged, b""])

    check()


@EXAMPLES
def test_a_flipped_bit_anywhere_costs_no_other_line(examples):
    rows = [row(step) for step in range(8)]
    blob = lines(rows)

    @settings(max_examples=examples, deadline=None)
    @given(st.integers(0, len(blob) - 1), st.integers(0, 7))
    def check(position, bit):
        flipped = bytearray(blob)
        flipped[position] ^= 1 << bit
        number = blob.count(b"\n", 0, position)  # its newline may be what is flipped
        touched = {number, number + 1} if blob[position] == ord("\n") else {number}
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "metrics.jsonl"
            path.write_bytes(flipped)
            with contextlib.closing(MetricsWriter(pathlib.Path(folder), step=10**9)) as writer:
                others = [r for i, r in enumerate(rows) if i not in touched]
                assert [r for r in writer.history if r in others] == others
                assert len(writer.history) <= len(others) + 1

    check()


def test_damaged_lines_are_named_and_kept_beside(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines([row(1)]) + b"xyz\n" + lines([row(2)]) + b"{}\n" + lines([row(3)])[:20])
    writer = MetricsWriter(tmp_path, step=9)
    assert writer.history == [row(1), row(2)] == read(tmp_path)
    (warning,) = warnings(caplog)
    assert f"{path}, line 2, 4: damaged" in warning and "metrics.jsonl.damaged" in warning
    writer.close()
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"xyz\n{}\n"
    path.write_bytes(b"more\n" + path.read_bytes())
    MetricsWriter(tmp_path, step=9).close()
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"xyz\n{}\nmore\n"


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(lines([row(1), row(2)])[:-1])
    with contextlib.closing(MetricsWriter(tmp_path, step=9)) as writer:
        writer.write(row(3))
    assert read(tmp_path) == [row(1), row(2), row(3)]


def test_one_that_does_not_write_keeps_the_rows_and_leaves_the_files(tmp_path, caplog):
    blob = lines([row(1)]) + b"xyz\n" + lines([row(2), row(8)])
    (tmp_path / "metrics.jsonl").write_bytes(blob)
    writer = MetricsWriter(tmp_path, step=5, writes=False)
    writer.write(row(3))
    writer.sync()
    assert writer.history == [row(1), row(2), row(3)] and writer.wall_time == 1.5
    writer.rewind(1)
    assert writer.history == [row(1)]
    writer.close()
    assert not warnings(caplog)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"metrics.jsonl": blob}


def test_what_cannot_be_read_is_said(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*metrics.jsonl: Is a directory"):
        MetricsWriter(tmp_path, step=0)


def test_going_back_drops_the_later_rows(tmp_path):
    writer = MetricsWriter(tmp_path, step=0)
    for step in (2, 4, 6):
        writer.write(row(step))
        writer.write(row(step, "test", error=step / 10))
    writer.sync()
    writer.rewind(4)
    kept = [row(2), row(2, "test", error=0.2), row(4), row(4, "test", error=0.4)]
    assert writer.history == kept == read(tmp_path)
    assert writer.last == {"train": kept[2], "test": kept[3]} and writer.wall_time == 2.0
    writer.write(row(5, loss=7.0))
    writer.close()
    assert read(tmp_path) == [*kept, row(5, loss=7.0)]
    shown = events(tmp_path)
    assert {step for step, _ in shown} == {2, 4, 5} and shown[5, "train/loss"] == 7.0
    assert shown[4, "test/error"] == pytest.approx(0.4)


# --- A disk that fails --------------------------------------------------------------------------


def test_a_file_that_is_taken_away_or_cut_is_written_again(tmp_path):
    writer = MetricsWriter(tmp_path, step=0)
    path = tmp_path / "metrics.jsonl"
    writer.write(row(1))
    path.unlink()
    writer.write(row(2))
    assert read(tmp_path) == [row(1), row(2)]
    path.write_bytes(path.read_bytes()[:30])
    writer.sync()
    assert read(tmp_path) == [row(1), row(2)]
    path.write_bytes(path.read_bytes() + b"what another wrote")
    writer.write(row(3))
    assert read(tmp_path) == [row(1), row(2), row(3)]
    writer.close()


def test_rows_that_cannot_be_written_are_kept_and_said_once_a_minute(tmp_path, monkeypatch, caplog):
    now = types.SimpleNamespace(seconds=0.0)
    clock = types.SimpleNamespace(monotonic=lambda: now.seconds, time=lambda: 0.0)
    for module in (metrics, events_module):
        monkeypatch.setattr(module, "time", clock)
    workdir = tmp_path / "run"
    workdir.mkdir()
    writer = MetricsWriter(workdir, step=0)
    writer.write(row(1))
    shutil.rmtree(workdir)
    counts = []
    for step, now.seconds in ((2, 1.0), (3, 59.0), (4, 62.0)):
        writer.write(row(step))
        counts.append(sum("kept in memory" in warning for warning in warnings(caplog)))
    assert counts == [1, 1, 2]
    with pytest.raises(OSError, match="No such file"):
        writer.sync()
    workdir.mkdir()
    writer.sync()
    assert read(workdir) == [row(1), row(2), row(3), row(4)] == writer.history
    shutil.rmtree(workdir)
    writer.write(row(5))
    writer.close()
    assert "lacks the last rows, which cannot be written" in warnings(caplog)[-1]


FULL = (
    PROGRAM
    + """
writer = MetricsWriter(pathlib.Path(), step=int(sys.argv[1]))
for command in sys.stdin:
    name, *numbers = command.split()
    try:
        if name == "write":
            for step in range(int(numbers[0]), int(numbers[1])):
                writer.write(row(step))
        else:
            getattr(writer, name)()
        print("done", flush=True)
    except OSError as error:
        print(error.strerror, flush=True)
"""
)


def expected(step):
    namespace = {"step": step}
    exec(PROGRAM[PROGRAM.index("def row") :] + "\nvalue = row(step)", namespace)
    return namespace["value"]


@contextlib.contextmanager
def writing(disk, step=0):
    """A program that writes metrics; gives a function that asks it for something."""
    with disk.start([sys.executable, "-c", FULL, str(step)], stdin=-1) as process:

        def ask(command):
            process.stdin.write(command + "\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        ask.process = process
        try:
            yield ask
        finally:
            process.kill()


def test_a_disk_that_is_full_in_the_middle_of_a_line():
    """And free again, and full again when the process is killed."""
    with small_disk(kib=128) as disk:
        with writing(disk) as ask:
            assert ask("write 1 10") == ask("sync") == "done"
            disk.fill()
            # More than a page, and more than TensorBoard's buffer and queue.
            assert ask("write 10 200") == "done"
            assert ask("sync") == "No space left on device"
            before = read(disk.path)
            assert before == [expected(step) for step in range(1, len(before) + 1)]
            assert 9 <= len(before) < 199
            disk.free()
            assert ask("write 200 201") == ask("sync") == "done"
            assert read(disk.path) == [expected(step) for step in range(1, 201)]
            disk.fill()
            assert ask("write 201 300") == "done"
            assert ask("close") == "done"  # as far as it can
            ask.process.stdin.close()
            told = ask.process.stderr.read().splitlines()
            assert ask.process.wait(timeout=60) == 0
        assert ["metrics.jsonl" in line for line in told] == [True, False, True], told
        assert "run goes on without them" in told[1] and "lacks the last rows" in told[2]
        # Continued on the full disk, at a step that the file has.
        with writing(disk, step=150) as ask:
            assert ask("write 151 152") == "done"
            assert read(disk.path) == [expected(step) for step in range(1, 152)]


def test_continued_on_a_full_disk_with_a_damaged_line():
    """The line is nowhere left out before it is kept beside."""
    blob = lines([expected(1)]) + b"xyz\n" + lines([expected(step) for step in range(2, 40)])
    with small_disk(kib=64) as disk:
        (disk.path / "metrics.jsonl").write_bytes(blob)
        disk.fill()
        with writing(disk, step=30) as ask:
            assert ask("write 31 33") == "done"
            assert ask("sync") == "No space left on device"
            assert (disk.path / "metrics.jsonl").read_bytes() == blob
            disk.free()
            assert ask("sync") == "done"
            assert read(disk.path) == [expected(step) for step in range(1, 33)]
            assert (disk.path / "metrics.jsonl.damaged").read_bytes() == b"xyz\n"
        assert {path.name.partition(".out")[0] for path in disk.path.iterdir()} <= {
            *("metrics.jsonl", "metrics.jsonl.damaged", "events")
        }


KILLED = (
    PROGRAM
    + """
import os, random, select, signal, time
random.seed(0)
last = 0
for _ in range(15):
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        writer = MetricsWriter(pathlib.Path(), step=last)
        step = last
        while True:
            step += 1
            writer.write(row(step))
            if step % 7 == 0:
                writer.sync()
                os.write(send, b"%d\\n" % step)
    os.close(send)
    select.select([receive], [], [])
    time.sleep(random.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    synced = b""
    while part := os.read(receive, 65536):
        synced += part
    os.close(receive)
    last = int(synced.split()[-1])
    there = open("metrics.jsonl", "rb").read().count(b"\\n")
    assert there >= last, (there, last)
writer = MetricsWriter(pathlib.Path(), step=last)
writer.close()
print(last)
"""
)


def test_killed_while_it_writes_again_and_again():
    with small_disk(kib=65536) as disk:
        last = int(disk.python(KILLED).split()[-1])
        assert last >= 15 * 7
        assert read(disk.path) == [expected(step) for step in range(1, last + 1)]


def test_a_read_only_file_is_refused():
    with small_disk(kib=64) as disk:
        (disk.path / "metrics.jsonl").write_bytes(lines([row(1)]))
        disk.run(["mount", "-o", "remount,ro", disk.inside])
        with pytest.raises(AssertionError, match=r"UserError: cannot write metrics.jsonl"):
            disk.python(PROGRAM + "MetricsWriter(pathlib.Path(), step=0)")


# --- An object store ----------------------------------------------------------------------------


class Store(MemoryFileSystem):
    """An object store in memory, which counts what is written."""

    protocol = ("gcs", "gs")
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]
    writes: ClassVar = []
    broken = False

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("gs://").rstrip("/")

    def _open(self, path, mode="rb", **options):
        if "r" not in mode:
            if Store.broken:
                raise RuntimeError("quota exceeded")
            assert "a" not in mode  # an object cannot be appended to
            Store.writes.append(path.rpartition("/")[2])
        return super()._open(path, mode, **options)


@pytest.fixture
def store(monkeypatch):
    if epath.gpath._is_tf_installed():
        pytest.skip("with TensorFlow installed etils asks that for gs://")
    monkeypatch.setitem(_registry, "gcs", Store)
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    Store.store.clear()
    Store.writes.clear()
    yield Store
    Store.broken = False
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    Store.clear_instance_cache()


def test_an_object_is_written_whole_in_sync_and_now_and_then(store, monkeypatch, caplog):
    now = types.SimpleNamespace(seconds=0.0)
    clock = types.SimpleNamespace(monotonic=lambda: now.seconds, time=lambda: 0.0)
    for module in (metrics, events_module):
        monkeypatch.setattr(module, "time", clock)
    workdir = epath.Path("gs://bucket/run")
    writer = MetricsWriter(workdir, step=0)

    def written():
        names, Store.writes[:] = Store.writes[:], []
        return sorted("events" if "tfevents" in name else name for name in names)

    assert written() == ["metrics.jsonl"]
    for step in range(1, 10):
        now.seconds = 3.0 * step
        writer.write(row(step))
    assert written() == []
    now.seconds = 31.0
    writer.write(row(10))
    assert written() == ["events", "metrics.jsonl"] and len(read(workdir)) == 10
    writer.write(row(11))
    writer.sync()
    writer.sync()
    assert "metrics.jsonl" in written() and len(read(workdir)) == 11
    Store.broken, now.seconds = True, 90.0
    writer.write(row(12))
    with pytest.raises(OSError, match="quota exceeded"):
        writer.sync()
    Store.broken = False
    writer.sync()
    writer.close()
    assert read(workdir) == [row(step) for step in range(1, 13)]
    assert len(warnings(caplog)) == 2  # the rows, TensorBoard
    with contextlib.closing(MetricsWriter(workdir, step=5)) as writer:
        assert read(workdir) == writer.history == [row(step) for step in range(1, 6)]
        writer.write(row(6, loss=6.0))
    shown = events(workdir)
    assert {step for step, _ in shown} == {1, 2, 3, 4, 5, 6} and shown[6, "train/loss"] == 6.0


def test_hyperparameters_are_what_tensorboardx_writes():
    config = gnp_config.default()
    config.log.wandb, config.optimizer.nesterov = "a project", True
    fields = gnp_config.flat(config)
    fields = {k: str(v) if isinstance(v, tuple) else v for k, v in fields.items()}
    assert {"lr.base", "gr.policy", "log.wandb"} <= set(fields)
    _, start, _ = hparams(fields, {})
    assert hyperparameters(config) == start


def test_hyperparameters_are_in_the_events(tmp_path):
    config = gnp_config.default()
    with contextlib.closing(MetricsWriter(tmp_path, step=0, config=config)) as writer:
        writer.write(row(1))
    (path,) = tmp_path.glob("events.out.tfevents.*")
    assert hyperparameters(config).SerializeToString() in path.read_bytes()
    assert events(tmp_path)[1, "train/loss"] == 0.5
