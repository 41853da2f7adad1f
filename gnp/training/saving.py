"""When the state of a run is saved, and what happens if that fails."""

import logging
import time

from gnp.errors import UserError
from gnp.training.checkpoint import Checkpoints, best_step
from gnp.training.metrics import MetricsWriter
from gnp.training.processes import all_true
from gnp.training.state import TrainState

_log = logging.getLogger(__name__)

# How long after a save that failed, as on a full disk, another is tried; and how often at the end.
RETRY_SECONDS, LAST_TRIES, LAST_RETRY_SECONDS = 60.0, 3, 5.0


class Saving:
    """Saves a run's state; where that fails the run goes on, and it is tried again.

    Every one of several processes makes the same calls.

    Args:
      checkpoints: where it is saved.
      writer: the rows of metrics, which no checkpoint precedes.
      seconds: after which another save is wanted; None where steps decide.
      best: the metric, as "validation/error", whose best checkpoint is kept; None for none.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        *,
        seconds: float | None,
        best: str | None,
    ):
        self._checkpoints, self._writer = checkpoints, writer
        self._seconds, self._best = seconds, best
        self._saved_at = time.monotonic()
        self._failure: OSError | None = None
        self._retry_at: float | None = None

    def update_best(self, step: int) -> bool:
        """Has the best checkpoint kept; whether that is the one of this step."""
        if self._best is None:
            return False
        steps = [*self._checkpoints.steps(), step]
        self._checkpoints.best_step = best_step(self._writer.history, self._best, steps)
        return self._checkpoints.best_step == step

    def wanted(self) -> bool:
        """Whether it is time to save; tells of a save that has failed meanwhile."""
        try:
            self._checkpoints.check()
        except OSError as error:
            self._has_failed(error)
        now = time.monotonic()
        if self._retry_at is not None:
            return now >= self._retry_at
        return self._seconds is not None and now >= self._saved_at + self._seconds

    def save(self, step: int, state: TrainState) -> None:
        """Begins to save the state."""
        failure: OSError | None = None
        try:
            self._writer.sync()
        except OSError as error:
            failure = error
        if all_true(failure is None):
            try:
                self._checkpoints.save(step, state, self._writer.history)
            except OSError as error:
                failure = error
        self._saved_at, self._retry_at = time.monotonic(), None
        if failure is not None:
            self._has_failed(failure)

    def finish(self, step: int, state: TrainState) -> None:
        """Returns when the last state, whose save has begun, is saved.

        Raises:
          UserError: if it cannot be.
        """
        for tries_left in reversed(range(LAST_TRIES + 1)):
            try:
                self._checkpoints.wait()
            except OSError as error:
                self._has_failed(error)
            if step in self._checkpoints.steps():
                return
            if tries_left:
                time.sleep(LAST_RETRY_SECONDS)
                self.save(step, state)
        newest = max(self._checkpoints.steps(), default=0)
        raise UserError(
            f"the training has come to its end, step {step}, but that cannot be saved "
            f"({self._failure or 'by another process'}); the newest checkpoint is that of step "
            f"{newest}. Make room and start the same command again"
        )

    def _has_failed(self, error: OSError) -> None:
        self._failure, self._retry_at = error, time.monotonic() + RETRY_SECONDS
        _log.warning("could not save (%s); it is tried again within %.0f s", error, RETRY_SECONDS)
