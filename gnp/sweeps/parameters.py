"""What a sweep varies, as it is written on the command line: grids, distributions, seeds."""

import decimal
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gnp.errors import UserError, unknown

MAX_TRIALS = 10_000  # of a sweep; more is a slip of the pen

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?"
_RANGE = re.compile(f"({_NUMBER}):({_NUMBER}):({_NUMBER})")
_CALL = re.compile(r"([a-z]+)\((.*)\)", re.DOTALL)
_SPACES: dict[str, Callable[..., np.ndarray]] = {"linspace": np.linspace, "logspace": np.geomspace}
_DISTRIBUTIONS = ("uniform", "loguniform", "int", "choice")


class Distribution(NamedTuple):
    """What a searched parameter is drawn from.

    Attributes:
      text: as it was written, "loguniform(1e-4,1e-2)".
      kind: "uniform", "loguniform", "int" (both ends included) or "choice".
      low: the least value; of a choice 0.
      high: the largest value; of a choice 0.
      choices: the values of a choice, as text.
    """

    text: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()

    @property
    def ends(self) -> tuple[str, ...]:
        """Values that stand for all of them when a configuration is checked."""
        if self.kind == "choice":
            return self.choices
        number = int if self.kind == "int" else float
        return str(number(self.low)), str(number(self.high))


def parse_grid(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Names and their values, from ["gr=off,zero", "lr.base=logspace(1e-4,1e-2,5);epochs=10"].

    A value is a text; a range START:STOP:STEP, which ends at STOP where it meets it; COUNT values
    with equal differences, linspace(START,STOP,COUNT), or equal ratios, logspace(START,STOP,COUNT),
    rounded to six digits. Commas and semicolons in brackets do not separate, and a value in [ ] is
    what stands between them.

    Raises:
      UserError: for anything else, and for a name or a value that comes twice.
    """
    grid = {}
    for name, text in _assignments("--grid", texts):
        values = []
        for item in _split(text, ","):
            values += _values(name, item)
            if len(values) > MAX_TRIALS:
                raise UserError(f"--grid {name}={text} has more than {MAX_TRIALS:,} values")
        if not all(values):
            raise UserError(f"--grid {name}={text} has an empty value; write {name}=A,B,C")
        grid[name] = tuple(values)
    return grid


def parse_search(texts: Sequence[str]) -> dict[str, Distribution]:
    """Names and their distributions, from ["lr.base=loguniform(1e-4,1e-2)", …].

    Raises:
      UserError: for anything that is none of the distributions.
    """
    return {name: _distribution(name, text) for name, text in _assignments("--search", texts)}


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds 0 … 4 from "5", and 3 and 7 from "3,7"; "3," is seed 3 alone.

    Raises:
      UserError: for anything else.
    """
    items = [item.strip() for item in text.split(",")]
    if not items[-1]:
        items.pop()
    if not items or not all(re.fullmatch(r"\d{1,10}", item) for item in items):
        raise UserError(f"--seeds={text}: write how many, as --seeds=5, or which, as --seeds=3,7")
    numbers = [int(item) for item in items]
    if "," in text:
        if len({*numbers}) < len(numbers):
            raise UserError(f"--seeds={text} has a seed twice")
        return tuple(numbers)
    if not 1 <= numbers[0] <= MAX_TRIALS:
        raise UserError(f"--seeds={text}; a sweep has from 1 to {MAX_TRIALS:,} seeds")
    return tuple(range(numbers[0]))


def _assignments(flag: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of name and value from texts of one or more "NAME=VALUE", separated by semicolons."""
    pairs: dict[str, str] = {}
    for text in texts:
        for item in _split(text, ";"):
            if not item:
                continue
            name, equals, value = item.partition("=")
            name = name.strip().removeprefix("config.")
            if not re.fullmatch(r"\w+(\.\w+)*", name) or not equals or not value.strip():
                raise UserError(f"{flag} {item!r} is not of the form NAME=VALUES")
            if name in pairs:
                raise UserError(f"{flag} has {name} twice; write all of its values in one")
            pairs[name] = value.strip()
    return list(pairs.items())


def _split(text: str, separator: str) -> list[str]:
    """The parts of a text between separators that are not in brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == separator and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _values(name: str, item: str) -> list[str]:
    """The values that an item of a list stands for."""
    if match := _RANGE.fullmatch(item):
        return _range(name, item, *map(decimal.Decimal, match.groups()))
    if (match := _CALL.fullmatch(item)) and match[1] in {*_SPACES, *_DISTRIBUTIONS}:
        if match[1] in _DISTRIBUTIONS:
            raise UserError(f"--grid {name}={item} is a distribution; write --search {name}={item}")
        return _space(name, item, match[1], _split(match[2], ","))
    if item.startswith("[") and item.endswith("]"):
        return [item[1:-1].strip()]
    return [item]


def _range(
    name: str, item: str, start: decimal.Decimal, stop: decimal.Decimal, step: decimal.Decimal
) -> list[str]:
    if not step or (stop - start) / step < 0:
        raise UserError(
            f"--grid {name}={item}: no steps of {step} lead from {start} to {stop}; "
            "write START:STOP:STEP"
        )
    count = int((stop - start) / step) + 1
    if count > MAX_TRIALS:
        raise UserError(f"--grid {name}={item} has {count:,} values; at most {MAX_TRIALS:,}")
    return [f"{(start + i * step).normalize():f}" for i in range(count)]


def _space(name: str, item: str, kind: str, arguments: list[str]) -> list[str]:
    where = f"--grid {name}={item}"
    if len(arguments) != 3 or not all(re.fullmatch(_NUMBER, each) for each in arguments):
        raise UserError(f"{where}: write {kind}(START,STOP,COUNT)")
    start, stop, count = float(arguments[0]), float(arguments[1]), float(arguments[2])
    if not count.is_integer() or not 1 <= count <= MAX_TRIALS:
        raise UserError(f"{where}: COUNT is {arguments[2]}; it must be from 1 to {MAX_TRIALS:,}")
    if kind == "logspace" and not (start > 0 and stop > 0):
        raise UserError(f"{where}: START and STOP are the values themselves, and must be above 0")
    return [f"{value:.6g}" for value in _SPACES[kind](start, stop, int(count))]


def _distribution(name: str, text: str) -> Distribution:
    where = f"--search {name}={text}"
    match = _CALL.fullmatch(text)
    if not match:
        raise UserError(
            f"{where} is no distribution; write uniform(LOW,HIGH), loguniform(LOW,HIGH), "
            "int(LOW,HIGH) or choice(A,B,…)"
        )
    kind, arguments = match[1], _split(match[2], ",")
    if kind not in _DISTRIBUTIONS:
        raise unknown(f"distribution in {where}:", kind, _DISTRIBUTIONS)
    if kind == "choice":
        choices = tuple(value for each in arguments for value in _values(name, each))
        if not all(choices) or len({*choices}) < len(choices):
            raise UserError(f"{where} has a value that is empty or comes twice")
        return Distribution(text, kind, choices=choices)
    if len(arguments) != 2 or not all(re.fullmatch(_NUMBER, each) for each in arguments):
        raise UserError(f"{where}: write {kind}(LOW,HIGH)")
    low, high = map(float, arguments)
    if kind == "int" and not (low.is_integer() and high.is_integer()):
        raise UserError(f"{where}: LOW and HIGH must be whole numbers")
    if kind == "loguniform" and low <= 0:
        raise UserError(f"{where}: LOW must be above 0")
    if not low < high < float("inf"):
        raise UserError(f"{where}: LOW must be below HIGH")
    return Distribution(text, kind, low, high)
