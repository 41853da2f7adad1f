"""Where a run's numbers go: `metrics.jsonl`, TensorBoard events, and the terminal."""

import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from gnp.training.files import write_atomically

Row = dict[str, Any]


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and to TensorBoard events.

    A row is {"step", "epoch", "wall_time" (seconds), "split" ("train", "test", …), values…}.
    Opened at a step, it first drops the rows after it, which a continued run makes again. One that
    does not write only keeps the newest rows: of several processes one writes.
    """

    def __init__(self, workdir: pathlib.Path, *, step: int, writes: bool = True):
        path = workdir / "metrics.jsonl"
        self.last: dict[str, Row] = {}  # the newest row of each split
        kept = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break  # the line that was being written when the process was killed
            if row["step"] <= step:
                kept.append(line + "\n")
                self.last[row["split"]] = row
        self._writes = writes
        if writes:
            write_atomically(path, "".join(kept))
            self._file = path.open("a")
            self._events = SummaryWriter(str(workdir), purge_step=step + 1, flush_secs=10)

    @property
    def wall_time(self) -> float:
        """Seconds that the run had taken at the newest row."""
        return max((row["wall_time"] for row in self.last.values()), default=0.0)

    def write(self, row: Row) -> None:
        """Appends a row."""
        self.last[row["split"]] = row
        if not self._writes:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if isinstance(value, float) and name != "wall_time":
                self._events.add_scalar(f"{row['split']}/{name}", value, row["step"])

    def sync(self) -> None:
        """Returns when all rows are on the disk, which a checkpoint must not precede."""
        if self._writes:
            os.fsync(self._file.fileno())
            self._events.flush()

    def close(self) -> None:
        """Writes what is buffered and closes the files."""
        if self._writes:
            self._file.close()
            self._events.close()


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
