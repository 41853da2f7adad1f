"""What the benchmarks share: rows, timing in alternating pairs, the table and the file."""

import argparse
import contextlib
import json
import pathlib
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol, TextIO

import jax

from gnp.errors import UserError


class Row(NamedTuple):
    """A line of the table, and an object of the JSON file."""

    name: str
    value: float
    unit: str
    spread: tuple[float, float] | None = None  # quartiles
    target: float | None = None  # the most that `value` may be
    at_least: bool = False  # the target is the least that it may be

    @property
    def met(self) -> bool:
        """Whether the target is."""
        assert self.target is not None
        return self.value >= self.target if self.at_least else self.value <= self.target

    def as_json(self) -> dict[str, Any]:
        """Name, value and unit; target and whether it is met where there is one."""
        row: dict[str, Any] = {"name": self.name, "value": self.value, "unit": self.unit}
        if self.target is not None:
            row |= {"target": self.target, "met": self.met}
        return row


def row(
    name: str,
    values: list[float],
    unit: str,
    target: float | None = None,
    *,
    at_least: bool = False,
) -> Row:
    """The median, and the quartiles where there is more than one value."""
    spread = None
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, method="inclusive")
        spread = (low, high)
    return Row(name, statistics.median(values), unit, spread, target, at_least)


class Timed(Protocol):
    """What can be run for a number of steps."""

    def seconds(self, steps: int) -> float:
        """The wall time of a step, over this many."""


def pairs(a: Timed, b: Timed, rounds: int, seconds: float) -> list[tuple[float, float]]:
    """The times of a step of `a` and of `b` in turn, over blocks of about `seconds` each."""
    for case in (a, b):
        case.seconds(1)  # the first is slow
    slower = max(case.seconds(1) for case in (a, b))
    steps = max(1, round(seconds / slower))
    return [(a.seconds(steps), b.seconds(steps)) for _ in range(rounds)]


def temporary_bytes(program: jax.stages.Compiled) -> int:
    """What the program allocates beside its arguments and results."""
    memory = program.memory_analysis()
    if memory is None:
        raise UserError("this device's compiler does not account for its memory")
    return memory.temp_size_in_bytes


def table(rows: Iterable[Row]) -> str:
    """The rows for a terminal."""
    lines = []
    for r in rows:
        spread = f"[{r.spread[0]:.3f}, {r.spread[1]:.3f}]" if r.spread else ""
        end = ""
        if r.target is not None:
            least = "at least " if r.at_least else ""
            end = f"  target {least}{r.target:g}: {'met' if r.met else 'missed'}"
        lines.append(f"{r.name:50s} {r.value:10.3f}  {spread:22s} {r.unit}{end}")
    return "\n".join(lines)


def add_flags(parser: argparse.ArgumentParser, *, rounds: tuple[int, int]) -> None:
    """The flags that every benchmark has; `rounds` are the default ones and those of --quick."""
    parser.add_argument("--quick", action="store_true", help="small: a minute or two on 2 cores")
    parser.add_argument("--json", type=pathlib.Path, help="file for the rows, an object a line")
    default = f"{rounds[0]}; quick: {rounds[1]}"
    parser.add_argument("--rounds", type=int, help=f"pairs of each comparison ({default})")
    parser.add_argument("--seconds", type=float, help="of a block of steps (1; quick: 0.3)")


def sizes(
    flags: argparse.Namespace, default: dict[str, Any], quick: dict[str, Any]
) -> dict[str, Any]:
    """The flags with the default of each that is not given; `quick` ones are for --quick.

    Raises:
      UserError: for a whole number below 1, or another below 0.
    """
    given = {name: value for name, value in vars(flags).items() if value is not None}
    found = default | (quick if flags.quick else {}) | given
    for name, value in found.items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise UserError(f"--{name} must be 1 or more, got {value}")
        if isinstance(value, float) and not value >= 0:
            raise UserError(f"--{name} must be 0 or more, got {value}")
    return found


def opened(path: pathlib.Path | None) -> contextlib.AbstractContextManager[TextIO | None]:
    """The file to be written, opened before anything is measured."""
    if path is None:
        return contextlib.nullcontext()
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json: cannot write {path}: {error.strerror}") from None


def report(rows: list[Row], file: TextIO | None) -> None:
    """Prints the rows, and writes them to the file if there is one."""
    print(table(rows), flush=True)
    if file is not None:
        file.writelines(json.dumps(r.as_json(), ensure_ascii=False) + "\n" for r in rows)
        file.flush()
