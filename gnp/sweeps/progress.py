"""How far a trial is that is running, as its work directory tells."""

import math
import os
import pathlib
from typing import NamedTuple

import numpy as np

from gnp.analysis import runs
from gnp.errors import UserError


class Progress(NamedTuple):
    """How far a run is.

    Attributes:
      epoch: that it has come to.
      values: the metric of each evaluation so far, finite or not.
    """

    epoch: float = 0.0
    values: tuple[float, ...] = ()

    @property
    def best(self) -> float:
        """The least value so far, NaN if there is none."""
        return min((x for x in self.values if math.isfinite(x)), default=math.nan)


class Watch:
    """Reads the rows of runs that are being written, each file only when it has changed."""

    def __init__(self, metric: str):
        self._split, _, self._name = metric.partition("/")
        self._seen: dict[pathlib.Path, tuple[tuple[int, int], Progress]] = {}

    def look(self, workdir: pathlib.Path) -> Progress:
        """How far the run in a work directory is; nowhere if it has not logged yet."""
        try:
            status = os.stat(workdir / "metrics.jsonl")
        except OSError:
            return Progress()
        version = (status.st_mtime_ns, status.st_size)
        if workdir not in self._seen or self._seen[workdir][0] != version:
            self._seen[workdir] = (version, self._read(workdir))
        return self._seen[workdir][1]

    def _read(self, workdir: pathlib.Path) -> Progress:
        try:
            run = runs.load(workdir)
        except UserError:  # it is just being written
            return Progress()
        values: np.ndarray = run.series(self._split, self._name)[1]
        return Progress(run.last[1], tuple(values.tolist()))
