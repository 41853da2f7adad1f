"""The table at the end of a sweep: each setting's mean over its seeds, best first.

Which runs count is as in reports (`gnp.analysis.comparison.has_diverged`).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from gnp import data
from gnp.analysis.runs import number
from gnp.errors import unknown

_PERCENT = ("error", "top5_error")
_METRICS = ("error", "loss", "top5_error", "perplexity")


class Line(NamedTuple):
    """A setting: its name, the values of its finished trials, and how many trials it has."""

    setting: str
    values: tuple[float, ...]
    trials: int


def line(setting: str, results: Sequence[Mapping[str, Any] | None], metric: str) -> Line:
    """The line of a setting, from what its trials wrote when they ended (None: they have not)."""
    values = [value(result, metric) for result in results if result is not None]
    return Line(setting, tuple(x for x in values if not math.isnan(x)), len(results))


def choose_metric(asked: str | None, config: ConfigDict) -> str:
    """What trials are judged by, as "validation/error": the less the better.

    Args:
      asked: what the user asked for, if anything.
      config: a configuration of the sweep.

    Raises:
      UserError: if there is no such metric.
    """
    words = data.holds(config.data.name) == "tokens"
    splits = ["test", "train"]
    if words or config.data.validation is not None:
        splits.insert(0, "validation")
    if asked is None:
        return f"{splits[0]}/{'perplexity' if words else 'error'}"
    known = [name for name in _METRICS if words or name != "perplexity"]
    if config.ema.decay is not None:
        known += [f"ema_{name}" for name in known]
    valid = [f"{split}/{name}" for split in splits for name in known]
    if asked not in valid:
        raise unknown("--metric", asked, valid)
    return asked


def value(result: Mapping[str, Any] | None, metric: str) -> float:
    """A metric of what a run wrote when it ended.

    NaN where it has none that is finite, or has diverged: its last training loss or its test metric
    is not finite.
    """
    result = result or {}
    test = result.get("test")
    words = isinstance(test, dict) and "perplexity" in test
    needed = [metric, "test/perplexity" if words else "test/error"]
    if result.get("train"):
        needed.append("train/loss")
    values = [_number(result, name) for name in needed]
    return math.nan if any(map(math.isnan, values)) else values[0]


def _number(result: Mapping[str, Any], metric: str) -> float:
    split, _, name = metric.partition("/")
    values = result.get(split)
    return number(values.get(name) if isinstance(values, dict) else None)


def text(value: float, metric: str) -> str:
    """A metric's value for a person: errors in percent."""
    if math.isnan(value):
        return "–"
    name = metric.partition("/")[2].removeprefix("ema_")
    if name in _PERCENT:
        return f"{100 * value:.2f} %"
    return f"{value:.2f}" if name == "perplexity" else f"{value:.4f}"


def table(lines: Sequence[Line], metric: str) -> str:
    """Settings with the mean and the sample standard deviation of their values, best first.

    Those of which a trial has none come after those that are complete.
    """

    def mean(line: Line) -> float:
        return statistics.fmean(line.values) if line.values else math.inf

    rows = [("setting", metric, "std", "seeds")]
    for line in sorted(lines, key=lambda line: (len(line.values) < line.trials, mean(line))):
        spread = statistics.stdev(line.values) if len(line.values) > 1 else math.nan
        seeds = f"{len(line.values)}"
        if len(line.values) < line.trials:
            seeds += f" of {line.trials}"
        middle = text(mean(line) if line.values else math.nan, metric)
        rows.append((line.setting or "–", middle, text(spread, metric), seeds))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows
    )
