"""Reads the work directory of a run: its configuration, metrics and result."""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import numpy as np

from gnp.config import parse_duration
from gnp.errors import UserError

Metrics = dict[str, dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run as its work directory tells it.

    Attributes:
      workdir: the directory that was read.
      config: the resolved configuration, nested.
      metrics: split ("train", "test", …) → key ("step", "epoch", "loss", …) → one float64 value a
        logged row; NaN where a row has no number for the key.
      result: what the run wrote when it ended; None while it has not.
    """

    workdir: pathlib.Path
    config: dict[str, Any]
    metrics: Metrics
    result: dict[str, Any] | None

    def setting(self, name: str) -> Any:
        """The configuration's value for a dotted name ("gr.policy"), None where it has none."""
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def series(self, split: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """The epochs and the values of one metric; empty where it was never logged."""
        columns = self.metrics.get(split, {})
        if key not in columns:
            return np.empty(0), np.empty(0)
        return columns["epoch"], columns[key]

    def has(self, split: str, key: str) -> bool:
        """Whether any row has a finite value for the metric."""
        return bool(np.isfinite(self.series(split, key)[1]).any())

    def final(self, split: str, key: str) -> float:
        """The result's value for a metric, or the last logged one; NaN where there is neither."""
        value = ((self.result or {}).get(split) or {}).get(key)
        if value is not None:
            return float(value)
        values = self.series(split, key)[1]
        return float(values[-1]) if values.size else float("nan")

    @property
    def last(self) -> tuple[int, float]:
        """The step and the epoch of the last row of any split; zeros before the first row."""
        ends = [(columns["step"][-1], columns["epoch"][-1]) for columns in self.metrics.values()]
        step, epoch = max(ends, default=(0, 0.0))
        return int(step), float(epoch)

    @property
    def learning_rate_warmup(self) -> float:
        """The length of the learning-rate warmup in epochs."""
        return self._in_epochs(self.setting("lr.warmup"))

    @property
    def gr_warmup(self) -> float:
        """The length in epochs of the warmup that bears on the gradient regularization.

        It is the learning rate's unless the configuration gives gradient regularization its own,
        which the policies "off" and "none" do not use.
        """
        own = self.setting("gr.warmup")
        if own is None or self.setting("gr.policy") in (None, "off", "none"):
            return self.learning_rate_warmup
        return self._in_epochs(own)

    def _in_epochs(self, duration: str | None) -> float:
        if not duration:
            return 0.0
        length = parse_duration(duration)
        step, epoch = self.last
        percent = float(self.setting("epochs") or 0) / 100
        return length.value * {"ep": 1.0, "st": epoch / max(step, 1), "%": percent}[length.unit]


def load(workdir: str | os.PathLike[str]) -> Run:
    """Reads the work directory of a run that has ended, is under way or was interrupted."""
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"no directory {workdir}; give the work directory of a run")
    if not (workdir / "config.json").is_file():
        raise UserError(f"{workdir} is not the work directory of a run: it has no config.json")
    result = workdir / "result.json"
    return Run(
        workdir=workdir,
        config=_read_object(workdir / "config.json"),
        metrics=_read_metrics(workdir / "metrics.jsonl"),
        result=_read_object(result) if result.exists() else None,
    )


def _read_object(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, not {type(value).__name__}")
    return value


def _read_metrics(path: pathlib.Path) -> Metrics:
    """The rows of a metrics file as columns; no columns where the file is missing or empty."""
    lines = path.read_bytes().rstrip().split(b"\n") if path.exists() else []
    rows: dict[str, list[dict[str, Any]]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # the run was stopped, or is being read, while it wrote
                break
            raise UserError(f"{path}, line {number} is not valid JSON: {error}") from error
        if not _is_row(row):
            raise UserError(
                f"{path}, line {number} should be an object with a split, a step and an epoch"
            )
        rows.setdefault(row["split"], []).append(row)
    return {split: _columns(part) for split, part in rows.items()}


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("split"), str)
        and all(_is_number(row.get(key)) and math.isfinite(row[key]) for key in ("step", "epoch"))
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _columns(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    keys = dict.fromkeys(key for row in rows for key in row if key != "split")
    values = {key: [row.get(key) for row in rows] for key in keys}
    return {
        key: np.array([v if _is_number(v) else np.nan for v in column], np.float64)
        for key, column in values.items()
    }
