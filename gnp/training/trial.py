"""What a run is made of beside the loop: its work directory, and its part of a compiled program."""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from gnp.config import parse_duration
from gnp.data.loading import Data
from gnp.errors import UserError
from gnp.training import nonfinite, provenance, workdir
from gnp.training.checkpoint import Checkpoints
from gnp.training.experiment import Experiment, nonfinite_limit
from gnp.training.metrics import MetricsWriter, Row
from gnp.training.processes import is_main
from gnp.training.saving import Saving
from gnp.training.state import TrainState
from gnp.training.step import make_train_call, make_train_step

_log = logging.getLogger(__name__)


class Trial:
    """A run's work directory while it is trained: checkpoints, rows of metrics, when it is saved.

    Attributes:
      experiment: the run's.
      checkpoints: in the work directory.
      writer: of the metrics; there from `begin` on, as is `saving`.
      skipped: steps that were left out.
      failure: why the run has ended early; None for one that goes on.
    """

    def __init__(
        self,
        experiment: Experiment,
        directory: epath.Path,
        *,
        command: str | None = None,
        on_row: Callable[[Row], None] | None = None,
    ):
        self._began = time.monotonic()
        self.experiment, self.directory, self.command = experiment, directory, command
        self._on_row = on_row or (lambda row: None)
        config = experiment.config
        self.checkpoints = Checkpoints(
            directory,
            config=workdir.essential(config),
            noted=config.to_dict(),
            keep=config.checkpoint.keep,
        )
        self.skipped = 0
        self.failure: UserError | None = None

    def begin(self, step: int) -> None:
        """Opens the metrics at a step, and notes with what the run is started."""
        config = self.experiment.config
        self.writer = MetricsWriter(self.directory, step=step, writes=is_main(), config=config)
        self._wall_time_before = self.writer.wall_time
        if is_main():
            mesh = self.experiment.mesh
            for line in provenance.record(
                self.directory, step=step, command=self.command, mesh=mesh
            ):
                _log.warning("the run is continued with %s: it may round otherwise", line)
        every = parse_duration(config.checkpoint.every, minutes=True)
        self.saving = Saving(
            self.checkpoints,
            self.writer,
            seconds=60 * every.value if every.unit == "min" else None,
            best=config.checkpoint.best,
        )
        self.saving.update_best(step)

    @property
    def wall_time(self) -> float:
        """Seconds that the run has taken."""
        return self._wall_time_before + time.monotonic() - self._began

    def write(self, split: str, step: int, values: Mapping[str, float | None]) -> Row:
        """Writes a row of metrics, and gives it."""
        row = {
            "step": step,
            "epoch": step / self.experiment.steps_per_epoch,
            "wall_time": self.wall_time,
            "split": split,
            **values,
        }
        self.writer.write(row)
        if is_main():
            self._on_row(row)
        return row

    def has_row(self, split: str, step: int) -> bool:
        """Whether the newest row of a split is that of a step."""
        return self.writer.last.get(split, {}).get("step") == step

    def left_out(self, step: int, skipped: int) -> None:
        """Notes how many steps have been left out up to a step, and warns of new ones."""
        if skipped > self.skipped:
            _log.warning(
                "up to step %d: %d not finite, left out (%d so far)",
                *(step, skipped - self.skipped, skipped),
            )
            self.skipped = skipped

    def failed(self, data: Data, state: TrainState, *, tried: str = "") -> UserError:
        """Saves what a step that is not finite leaves; gives the error that ends the run.

        Args:
          data: the run's.
          state: before the step.
          tried: what has been tried, in brackets, if anything.
        """
        step = int(state.step)
        path = nonfinite.save(self.directory, data, state)
        self.saving.save(step, nonfinite.ready_to_go_on(state))
        with contextlib.suppress(OSError):
            self.checkpoints.wait()
        return UserError(
            f"step {step + 1}: the loss or a gradient is not finite{tried}; the state before it is "
            f"the checkpoint of step {step}, its batch is {path} "
            "(gnp.training.nonfinite.load reads both). A lower config.lr.base or config.clip_norm "
            "may help, or continue with --config.on_nonfinite=skip or rollback"
        )

    def close(self, *, whole: bool) -> None:
        """Writes what is buffered; `whole`: also waits for a save that is under way."""
        self.writer.close(whole=whole)
        if whole:
            self.checkpoints.close()


class Program:
    """How the loop's states are made, taken apart and trained: here those of one run.

    Attributes:
      arguments: what the train call takes after its first three arguments.
    """

    def __init__(self, experiment: Experiment):
        self._experiment = experiment
        self.arguments: tuple[Any, ...] = ()

    def state(self, checkpoints: Sequence[Checkpoints], pretrained: Any) -> TrainState:
        """The newest state that has been saved, or the first one."""
        if checkpoints[0].steps():
            return checkpoints[0].restore(self._experiment.abstract_state)
        return self._experiment.init(pretrained)

    def each(self, tree: Any) -> list[Any]:
        """The trials' own parts of a state, or of what a call reports."""
        return [tree]

    def data(self, data: Data, trial: int) -> Data:
        """The data in the trial's own order."""
        return data

    def train_call(self, data: Data, *, log_every: int, max_steps: int) -> jax.stages.Wrapped:
        """The program of up to `max_steps` train steps, as of `make_train_call`."""
        experiment = self._experiment
        return make_train_call(
            train_step(experiment, log_every=log_every),
            data.train_batches,
            max_steps=max_steps,
            mesh=experiment.mesh,
            state_sharding=experiment.state_sharding,
        )


def train_step(experiment: Experiment, *, log_every: int, generator: Any = "rbg") -> Any:
    """The train step of an experiment, as of `make_train_step`."""
    config = experiment.config
    return make_train_step(
        experiment.model,
        experiment.optimizer,
        seed=config.seed,
        log_every=log_every,
        mesh=experiment.mesh,
        accumulate=config.accumulate,
        num_groups=config.gr.num_groups,
        ema_decay=config.ema.decay,
        nonfinite_limit=nonfinite_limit(config),
        generator=generator,
    )
