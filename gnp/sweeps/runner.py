"""Runs the jobs of a sweep to their end, or until it is asked to stop."""

import pathlib
import time

from gnp.errors import UserError
from gnp.sweeps import directory, summary
from gnp.sweeps.display import Display, Row
from gnp.sweeps.jobs import Outcome, Source
from gnp.sweeps.processes import Ended, Pool, failure
from gnp.sweeps.progress import Watch
from gnp.sweeps.trials import Trial
from gnp.training.stopping import stop_requests

_POLL_SECONDS = 0.1  # between two looks at the processes
_LOOK_SECONDS = 1.0  # between two looks at what they have logged


def run(source: Source, pool: Pool, display: Display, out: pathlib.Path, metric: str) -> int:
    """Runs all jobs, several at a time if the pool has room for them.

    On the first Ctrl-C or SIGTERM the running trials save and end; the second ends all at once.

    Returns:
      0, or 130 after Ctrl-C and 75 after SIGTERM.
    """
    watch, looked = Watch(metric), -_LOOK_SECONDS
    with display, stop_requests() as stop:
        try:
            while True:
                for ended in pool.poll():
                    for trial in ended.job.trials:
                        outcome = _outcome(out, trial, ended, metric, stopping=stop.exit_code != 0)
                        outcome = source.ended(trial, outcome)
                        display.ended(trial.name, *outcome, ended.seconds)
                while not stop.exit_code and pool.has_room and (job := source.next()):
                    try:
                        pool.start(job)
                    except UserError as error:  # as on a full disk; the others go on
                        for trial in job.trials:
                            outcome = source.ended(trial, Outcome("failed", str(error)))
                            display.ended(trial.name, *outcome, 0.0)
                    else:
                        # The log of trials in one program has the first one's name.
                        note = f"  (log: {job.log})" if len(job.trials) > 1 else ""
                        if job.after is not None:
                            note = "  (by another process, and here if that does not end it)"
                        display.started(job.name, note)
                if not pool.running:
                    return stop.exit_code
                if stop.exit_code:
                    for running in pool.running:
                        pool.stop(running.job)
                if time.monotonic() - looked >= _LOOK_SECONDS:
                    looked = time.monotonic()
                    _look(source, pool, display, out, watch)
                time.sleep(_POLL_SECONDS)
        finally:
            pool.kill()


def _look(source: Source, pool: Pool, display: Display, out: pathlib.Path, watch: Watch) -> None:
    """Shows what runs, and stops what is not wanted any more."""
    rows = []
    for running in pool.running:
        for trial in running.job.trials:
            progress = watch.look(trial.workdir(out))
            epochs = trial.config.epochs
            rows.append(Row(trial.name, progress.epoch, epochs, progress.best, running.seconds))
            if source.is_unwanted(trial, progress):
                pool.stop(running.job)
    display.show(source.count(), rows)


def _outcome(
    out: pathlib.Path, trial: Trial, ended: Ended, metric: str, *, stopping: bool
) -> Outcome:
    """How a trial ended; what has a result is done, whatever came after it."""
    result = directory.result(out, trial)
    if result is not None:
        return Outcome("done", f"{metric} {summary.text(summary.value(result, metric), metric)}")
    if stopping:
        return Outcome("stopped", "to be continued")
    return Outcome("failed", f"{failure(ended, trial)} (see {ended.job.log})")
