"""Which trial is next: in a grid, all that are not done, in order."""

import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from gnp.sweeps import directory, summary, together
from gnp.sweeps.processes import Job
from gnp.sweeps.progress import Progress
from gnp.sweeps.slots import Slot
from gnp.sweeps.trials import Trial


class Outcome(NamedTuple):
    """How a trial ended: "done", "failed", "stopped" or "pruned", and the reason or the value."""

    state: str
    text: str = ""


class Source(Protocol):
    """Gives the jobs of a sweep one by one and hears what came of them.

    Attributes:
      failed: the trials that have failed since the start, with the reason.
    """

    failed: dict[str, str]

    def next(self) -> Job | None:
        """The next job; None while there is none, or no more."""

    def count(self) -> dict[str, int]:
        """How many trials are "done", "failed", "pruned" and "waiting"."""

    def is_unwanted(self, trial: Trial, progress: Progress) -> bool:
        """Whether a trial that is running is to be stopped."""

    def ended(self, trial: Trial, outcome: Outcome) -> Outcome:
        """Hears how a trial ended, and says how that is to be told."""

    def advice(self) -> str:
        """What may be done about trials that have failed."""

    def lines(self) -> list[summary.Line]:
        """The settings with the values of their finished trials."""


class Grid:
    """The trials of a grid.

    Args:
      out: the sweep's directory.
      trials: all of them, done or not.
      metric: what they are judged by.

    Attributes:
      failed: the trials that have failed since the start, with the reason.
      unfinished: the trials that were not done then.
    """

    def __init__(self, out: pathlib.Path, trials: Sequence[Trial], metric: str):
        self._out, self._trials, self._metric = out, trials, metric
        elsewhere = directory.in_training(out)
        self._results = {trial.name: directory.result(out, trial) for trial in trials}
        self.failed: dict[str, str] = {}
        self.unfinished = [trial for trial in trials if self._results[trial.name] is None]
        # First those that other processes train, which have their slots already.
        first = sorted(self.unfinished, key=lambda trial: trial.name not in elsewhere)
        self._jobs = [alone(out, trial, elsewhere.get(trial.name)) for trial in first]
        self._running: set[str] = set()

    def next(self) -> Job | None:
        """The next job."""
        if not self._jobs:
            return None
        job = self._jobs.pop(0)
        self._running |= {trial.name for trial in job.trials}
        return job

    def train_together(self, slot: Slot) -> int:
        """Has one process train what one compiled program can, and says how many they are.

        Args:
          slot: what a process runs on.
        """
        groups = together.divide(self._out, self.unfinished, slot)
        self._jobs = [
            together.job(self._out, trials) if len(trials) > 1 else alone(self._out, trials[0])
            for trials in groups
        ]
        return len(self._jobs)

    def count(self) -> dict[str, int]:
        """How many trials are in which state."""
        done = sum(result is not None for result in self._results.values())
        waiting = len(self._trials) - done - len(self.failed) - len(self._running)
        return {"done": done, "failed": len(self.failed), "waiting": waiting}

    def is_unwanted(self, trial: Trial, progress: Progress) -> bool:
        """All of a grid are wanted."""
        return False

    def ended(self, trial: Trial, outcome: Outcome) -> Outcome:
        """Notes it."""
        self._running.remove(trial.name)
        self._results[trial.name] = directory.result(self._out, trial)
        if outcome.state == "failed":
            self.failed[trial.name] = outcome.text
        return outcome

    def advice(self) -> str:
        """What may be done about trials that have failed."""
        return "the same command tries them again"

    def lines(self) -> list[summary.Line]:
        """The settings in the order of the grid."""
        settings: dict[str, list[Trial]] = {}
        for trial in self._trials:
            settings.setdefault(trial.setting, []).append(trial)
        return [
            summary.line(setting, [self._results[trial.name] for trial in of_it], self._metric)
            for setting, of_it in settings.items()
        ]


def alone(out: pathlib.Path, trial: Trial, process: int | None = None) -> Job:
    """The job that trains one trial, after a process that does so now, if there is one."""
    command = trial.command(out)
    if process is not None:
        command = [sys.executable, "-m", "gnp.sweeps.after", str(trial.workdir(out)), *command]
    return Job(trial.name, (trial,), command, trial.log(out), process)
