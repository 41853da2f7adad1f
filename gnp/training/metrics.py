"""Where a run's numbers go: `metrics.jsonl`, TensorBoard, Weights & Biases, and the terminal."""

import contextlib
import json
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import IO, Any

from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from gnp.errors import UserError
from gnp.files import is_remote, write_atomically
from gnp.training.events import Events
from gnp.training.weights_and_biases import WandbRun

Row = dict[str, Any]

_log = logging.getLogger(__name__)

_WARN_SECONDS = 60.0  # between two warnings that rows cannot be written
_REMOTE_SECONDS = 30.0  # between two writes of a file that cannot be appended to


class MetricsWriter:
    """Appends rows to `metrics.jsonl`, to TensorBoard events and, if asked, to Weights & Biases.

    A row is {"step", "epoch", "wall_time" (seconds), "split" ("train", "test", …), values…}.
    Opened at a step, it first drops the rows after it, which a continued run makes again. One that
    does not write only keeps the rows: of several processes one writes.

    A full disk does not end a run: rows that cannot be written are kept, a warning says so, and
    every later `write` and `sync` tries again. TensorBoard's events then end. What the file holds
    of a line that is no row goes to `metrics.jsonl.damaged`, with a warning.

    An object store's files cannot be appended to: there the whole file is written anew, in `sync`
    and otherwise now and then.

    Args:
      workdir: the run's directory.
      step: at which the run begins, or goes on.
      writes: whether this process writes.
      config: the run's, whose fields the others show beside the numbers; None for none.

    Attributes:
      history: the rows kept and written, in order.
      last: the newest row of each split.
    """

    def __init__(
        self,
        workdir: epath.Path | pathlib.Path,
        *,
        step: int,
        writes: bool = True,
        config: ConfigDict | None = None,
    ) -> None:
        self._workdir = epath.Path(workdir)
        self._path = self._workdir / "metrics.jsonl"
        self._writes, self._config = writes, config
        self._damaged: list[bytes] = []  # not yet kept beside
        self.history: list[Row] = []
        self.last: dict[str, Row] = {}
        if writes and _is_read_only(self._path):
            raise UserError(f"cannot write {self._path}: it is read-only")
        there = self._contents()
        self._read(there or b"", step)
        # The file begins with `_length` bytes that are the first `_stored` rows, or it is to be
        # written anew.
        self._stored = len(self.history)
        lines = _lines(self.history)
        self._length = len(lines)
        self._anew = there is None or bool(self._damaged) or not there.startswith(lines)
        self._anew |= is_remote(self._path) and there != lines
        self._durable = False
        self._remote_time = self._warning_time = -math.inf
        if writes:
            self._try_to_store()
            self._events = Events(self._workdir, purge_step=step + 1, config=config)
            self._wandb = None
            if config is not None and config.log.wandb is not None:
                self._wandb = WandbRun(self._workdir, config)

    @property
    def wall_time(self) -> float:
        """Seconds that the run had taken at the newest row."""
        times = (row.get("wall_time", 0.0) for row in self.last.values())
        return max(filter(_is_number, times), default=0.0)

    def write(self, row: Row) -> None:
        """Appends a row."""
        self._keep(row)
        if self._writes:
            self._durable = False
            if not is_remote(self._path) or self._remote_is_due():
                self._try_to_store()
            self._events.write(row)
            if self._wandb is not None:
                self._wandb.write(row)

    def sync(self) -> None:
        """Returns when all rows are on the disk, which a checkpoint must not precede.

        Raises:
          OSError: if they cannot be written.
        """
        if not self._writes:
            return
        if not self._durable:
            self._store()
            if not is_remote(self._path):
                self._flush()
            self._durable = True
        self._events.flush()

    def rewind(self, step: int) -> None:
        """Drops the rows after `step`, to which the run goes back."""
        rows, self.history, self.last = self.history, [], {}
        for row in rows:
            if row["step"] <= step:
                self._keep(row)
        if self._writes:
            self._anew, self._durable = True, False
            self._try_to_store()
            self._events.close()
            self._events = Events(self._workdir, purge_step=step + 1, config=self._config)

    def close(self, *, whole: bool = True) -> None:
        """Writes what is buffered, if that can be; `whole`: also what a network may hold up."""
        if self._writes:
            try:
                self.sync()
            except OSError as error:
                _log.warning(
                    "%s lacks the last rows, which cannot be written (%s)",
                    *(self._path, error.strerror or error),
                )
            self._events.close()
            if self._wandb is not None and whole:
                self._wandb.close()

    def _contents(self) -> bytes | None:
        """What the file holds, None if there is none."""
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"cannot read {self._path}: {error.strerror or error}") from None

    def _read(self, blob: bytes, step: int) -> None:
        """Keeps the rows up to `step` of a file, and says which of its lines are no rows."""
        lines, numbers = blob.split(b"\n"), []
        for number, line in enumerate(lines, start=1):
            row = _row(line)
            if row is not None:
                if row["step"] <= step:
                    self._keep(row)
            # The last is the one that was being written when the process was killed.
            elif line.strip() and number < len(lines):
                numbers.append(number)
                self._damaged.append(line + b"\n")
        if numbers and self._writes:
            more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
            _log.warning(
                "%s, line %s%s: damaged, left out and kept in %s.damaged",
                *(self._path, ", ".join(map(str, numbers[:10])), more, self._path.name),
            )

    def _keep(self, row: Row) -> None:
        self.history.append(row)
        self.last[row["split"]] = row

    def _try_to_store(self) -> None:
        """Brings the file up to date, or warns."""
        try:
            self._store()
        except OSError as error:
            if time.monotonic() - self._warning_time >= _WARN_SECONDS:
                self._warning_time = time.monotonic()
                _log.warning(
                    "cannot write %s (%s); the rows are kept in memory until it can be written",
                    *(self._path, error.strerror or error),
                )

    def _store(self) -> None:
        """Brings the file up to date.

        Raises:
          OSError: if it cannot be written; what the file then holds of the rows is whole lines,
            or what follows `_length` is cut off the next time.
        """
        if self._damaged:
            path = self._path.with_name(f"{self._path.name}.damaged")
            before = path.read_bytes() if path.exists() else b""
            write_atomically(path, before + b"".join(self._damaged))
            self._damaged = []
        if not (self._anew or is_remote(self._path)):
            self._append()
        if self._anew or (is_remote(self._path) and self._stored < len(self.history)):
            self._remote_time = time.monotonic()
            lines = _lines(self.history)
            write_atomically(self._path, lines)
            self._anew, self._stored, self._length = False, len(self.history), len(lines)

    def _append(self) -> None:
        """Appends the rows that a local file lacks, or finds that it must be written anew."""
        lines = _lines(self.history[self._stored :])
        # Opened each time, to notice when the file has been removed or cut.
        with open(self._path, "ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size < self._length:
                self._anew = True
                return
            if size > self._length:
                file.truncate(self._length)
            try:
                _write_all(file, lines)
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(self._length)
                raise
        self._stored, self._length = len(self.history), self._length + len(lines)

    def _flush(self) -> None:
        """Returns when the disk has the file."""
        try:
            with open(self._path, "ab") as file:
                os.fsync(file.fileno())
        except OSError:
            self._anew = True  # the kernel may have dropped what it could not write
            raise

    def _remote_is_due(self) -> bool:
        return time.monotonic() - self._remote_time >= _REMOTE_SECONDS


def _is_read_only(path: epath.Path) -> bool:
    return not is_remote(path) and os.path.exists(path) and not os.access(path, os.W_OK)


def _row(line: bytes) -> Row | None:
    """A line's row, None if it has none."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    numbers = isinstance(row, dict) and all(_is_number(row.get(key)) for key in ("step", "epoch"))
    return row if numbers and isinstance(row.get("split"), str) else None


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and -math.inf < value < math.inf


def _lines(rows: Sequence[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _write_all(file: IO[bytes], data: bytes) -> None:
    """Writes to an unbuffered file, which may take a part at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


class Progress:
    """Live progress on standard error: a bar on a terminal, plain lines otherwise.

    Not `shown`, it is silent: of several processes one shows it.
    """

    # The values shown: key in a row, name, format.
    _TRAIN = (
        ("loss", "loss", ".4f"),
        ("error", "error", ".2%"),
        ("perplexity", "perplexity", ".1f"),
        ("learning_rate", "lr", ".2e"),
        ("grad_norm", "grad", ".3g"),
        ("radius", "r", ".3g"),
        ("ratio", "ratio", ".3g"),
        ("images_per_second", "images/s", ",.0f"),
        ("words_per_second", "words/s", ",.0f"),
        ("data_wait", "waiting for data", ".0%"),
    )

    def __init__(self, *, total_steps: int, steps_per_epoch: float, step: int, shown: bool = True):
        self._is_shown = shown
        self._total, self._steps_per_epoch = total_steps, steps_per_epoch
        self._first, self._begin = step, time.monotonic()
        self._shown: dict[str, str] = {}
        self._bar = (
            tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.05)
            if shown and sys.stderr.isatty()
            else None
        )

    def show(self, step: int, rows: Sequence[Row]) -> None:
        """Says that the run has reached `step`, and what it logged there."""
        for row in rows:
            if row["split"] == "train":
                for key, name, form in self._TRAIN:
                    if key in row and (key != "error" or "perplexity" not in row):
                        self._shown[name] = text(row[key], form)
            else:
                name, value = headline(row)
                self._shown[f"{row['split']} {name}"] = value
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)
            self._bar.update(step - self._bar.n)
        elif rows:
            values = "  ".join(f"{name} {value}" for name, value in self._shown.items())
            epochs = f"{step / self._steps_per_epoch:.1f}/{self._total / self._steps_per_epoch:.1f}"
            done = (step - self._first) / max(self._total - self._first, 1)
            left = (time.monotonic() - self._begin) * (1 / max(done, 1e-9) - 1)
            self.say(f"epoch {epochs}  step {step}/{self._total}  {values}  eta {left:.0f} s")

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif self._is_shown:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


def headline(values: Row) -> tuple[str, str]:
    """The metric that a split is judged by, its name and its value for a person."""
    if "perplexity" in values:
        return "perplexity", text(values["perplexity"], ".2f")
    return "error", text(values["error"], ".2%")


def text(value: float | None, form: str) -> str:
    """A metric's value for a person; None is one that is not finite."""
    return "not finite" if value is None else format(value, form)
