"""Reads the work directory of a run: its configuration, metrics and result."""

import dataclasses
import json
import math
import os
from typing import Any

import numpy as np
from etils import epath

from gnp.config import parse_duration
from gnp.errors import UserError
from gnp.files import is_remote

Metrics = dict[str, dict[str, np.ndarray]]

_MAX_BYTES = 16_000_000  # of a configuration or a result
_MAX_DEPTH = 20  # of brackets in them
# What runs log is computed in float32.
_LARGEST, _LEAST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).smallest_subnormal)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run as its work directory tells it.

    Attributes:
      workdir: the directory that was read.
      config: the resolved configuration, nested.
      metrics: split ("train", "test", …) → key ("step", "epoch", "loss", …) → one float64 value a
        logged row; NaN where a row has no number for the key, or none that float32 can hold.
      result: what the run wrote when it ended; None while it has not.
    """

    workdir: epath.Path
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
        value = self._of_result(split).get(key)
        if value is not None:
            return number(value)
        values = self.series(split, key)[1]
        return float(values[-1]) if values.size else float("nan")

    def _of_result(self, split: str) -> dict[str, Any]:
        values = (self.result or {}).get(split)
        return values if isinstance(values, dict) else {}

    @property
    def training_time(self) -> float:
        """The seconds it took, or its share of those of runs that were trained together.

        It is known how many they were when the run ended; if it was begun among others, or alone,
        that is not told. NaN where it has not ended.
        """
        result = self.result or {}
        together = number(result.get("trained_together", 1))
        return number(result.get("wall_time")) / together if together >= 1 else math.nan

    @property
    def speed(self) -> float:
        """Images or tokens a second, of the steps alone; NaN where it has not been measured.

        Compiling, evaluation and checkpoints are not in it, nor what came before the last start.
        Of runs that were trained together it is that of all.
        """
        result = self.result or {}
        speed, together = result.get("speed"), number(result.get("trained_together", 1))
        if not isinstance(speed, dict):
            return math.nan
        return number(speed.get(f"{result.get('unit')}s_per_second")) * together

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
        try:
            length = parse_duration(duration)
        except UserError as error:
            raise UserError(f"{self.workdir / 'config.json'}: {error}") from None
        step, epoch = self.last
        percent = number(self.setting("epochs") or 0) / 100
        return length.value * {"ep": 1.0, "st": epoch / max(step, 1), "%": percent}[length.unit]


def load(directory: str | os.PathLike[str]) -> Run:
    """Reads the work directory of a run that has ended, is under way or was interrupted.

    What it has lost is first made from its checkpoints.
    """
    workdir = epath.Path(directory)
    if not workdir.is_dir():
        raise UserError(f"no directory {workdir}; give the work directory of a run")
    names = ("config.json", "metrics.jsonl")
    if is_workdir(workdir) and not all((workdir / name).exists() for name in names):
        from gnp.training.recovery import recover  # here, since Orbax takes a second

        recover(workdir)
    if not (workdir / "config.json").is_file():
        raise UserError(f"{workdir} is not the work directory of a run: it has no config.json")
    result = workdir / "result.json"
    return Run(
        workdir=workdir,
        config=_read_object(workdir / "config.json"),
        metrics=_read_metrics(workdir / "metrics.jsonl"),
        result=_read_object(result) if result.exists() else None,
    )


def is_workdir(directory: epath.Path) -> bool:
    """Whether a directory is that of a run: it has a configuration, or checkpoints."""
    if (directory / "config.json").is_file():
        return True
    try:
        steps = list((directory / "checkpoints").iterdir())
    except OSError:
        return False
    return any(step.name.isdecimal() and (step / "about" / "metadata").exists() for step in steps)


def number(value: Any) -> float:
    """A number that was read from JSON as a float; NaN for anything else.

    Those beyond float32 are not a run's: too large ones are NaN, too small ones 0.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > _LARGEST:
        return math.nan
    return 0.0 if abs(value) < _LEAST else float(value)


def _read_object(path: epath.Path) -> dict[str, Any]:
    content = _read_bytes(path)
    if len(content) > _MAX_BYTES:
        raise UserError(f"{path} has {len(content):,} bytes; it is not what a run writes")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, not {type(value).__name__}")
    if _is_deeper(value, _MAX_DEPTH):
        raise UserError(f"{path} has brackets inside of brackets, more than a run writes")
    return value


def _read_bytes(path: epath.Path) -> bytes:
    if not is_remote(path) and path.exists() and not os.path.isfile(path):  # a pipe never ends
        raise UserError(f"cannot read {path}: it is no plain file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether objects and lists are nested more than `depth` deep."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_is_deeper(each, depth - 1) for each in inner)


def _read_metrics(path: epath.Path) -> Metrics:
    """The rows of a metrics file as columns; no columns where the file is missing or empty."""
    lines = _read_bytes(path).rstrip().split(b"\n") if path.exists() else []
    rows: dict[str, list[dict[str, Any]]] = {}
    for place, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if place == len(lines):  # the run was stopped, or is being read, while it wrote
                break
            raise UserError(f"{path}, line {place} is not valid JSON: {error}") from error
        if not _is_row(row):
            raise UserError(
                f"{path}, line {place} should be an object with a split, a step and an epoch"
            )
        rows.setdefault(row["split"], []).append(row)
    return {split: _columns(part) for split, part in rows.items()}


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("split"), str)
        and all(math.isfinite(number(row.get(key))) for key in ("step", "epoch"))
    )


def _columns(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    keys = dict.fromkeys(key for row in rows for key in row if key != "split")
    return {key: np.array([number(row.get(key)) for row in rows], np.float64) for key in keys}
