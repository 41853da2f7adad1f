"""What a person sees while a sweep runs: a live table on a terminal, otherwise a line an event."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gnp.errors import printable
from gnp.sweeps import summary

_STYLES = {"done": "green", "failed": "bold red", "stopped": "yellow", "pruned": "yellow"}


class Row(NamedTuple):
    """A trial that is running: its name, how far it is, its best value and the seconds so far."""

    name: str
    epoch: float
    epochs: float
    best: float
    seconds: float


class Display:
    """Shows a sweep on standard error."""

    def __init__(self, metric: str, console: Console | None = None):
        self._metric = metric
        self._console = console or Console(stderr=True, highlight=False)
        self._live = (
            Live(console=self._console, auto_refresh=False, transient=True)
            if self._console.is_terminal
            else None
        )

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live is not None:
            self._live.stop()

    def started(self, name: str, note: str = "") -> None:
        """Says that a job has started, if nothing else shows that or what is noted of it."""
        if self._live is None or note:
            self.say(f"started  {name}{note}")

    def ended(self, name: str, state: str, note: str, seconds: float) -> None:
        """Says how a trial has ended."""
        line = f"{state:<8} {name}  {note}  {duration(seconds)}"
        self.say(line, _STYLES.get(state, ""))

    def say(self, line: str, style: str = "") -> None:
        """Prints a line, above the table."""
        if self._live is not None:
            self._console.print(Text(printable(line), style=style))
        else:
            print(printable(line), file=sys.stderr, flush=True)

    def show(self, count: Mapping[str, int], rows: Sequence[Row]) -> None:
        """Shows how many trials are in which state, and those that run."""
        if self._live is not None:
            self._live.update(self._table(count, rows), refresh=True)

    def _table(self, count: Mapping[str, int], rows: Sequence[Row]) -> Table:
        counts = "  ".join(f"{number} {state}" for state, number in count.items())
        table = Table(title=f"{len(rows)} running  {counts}", title_justify="left", box=None)
        table.add_column("running", overflow="fold")
        for name in ("epoch", f"best {self._metric}", "time"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:  # of which `Live` shows what fits the screen
            table.add_row(
                Text(printable(row.name)),
                f"{row.epoch:.1f} / {row.epochs:g}",
                summary.text(row.best, self._metric),
                duration(row.seconds),
            )
        return table


def duration(seconds: float) -> str:
    """A time as 3:05 or 1:03:05."""
    minutes, rest = divmod(math.floor(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
