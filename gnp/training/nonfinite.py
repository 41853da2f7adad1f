"""What happens after a step whose loss or gradients are not finite."""

import io
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from gnp.config import from_json
from gnp.data.loading import Data, train_batch
from gnp.data.pipeline import Batch
from gnp.errors import UserError
from gnp.files import write_atomically
from gnp.training.checkpoint import Checkpoints
from gnp.training.experiment import Experiment, make_experiment, on_one_device
from gnp.training.processes import is_main, whole
from gnp.training.state import NonFinite, TrainState
from gnp.training.step import make_train_step

_log = logging.getLogger(__name__)


class NonFiniteError(Exception):
    """A step had a loss or a gradient that is not finite, and was not to be left out."""


class Failure(NamedTuple):
    """A step that failed, to be looked into: `train_step(state, batch)` makes it again.

    Attributes:
      experiment: the run's.
      state: that before the step, on one device.
      batch: what the step learned from, "input" as the model sees it and "label".
      train_step: without the check, so that what is not finite can be followed.
    """

    experiment: Experiment
    state: TrainState
    batch: Batch
    train_step: Callable[[TrainState, Batch], TrainState]


def load(workdir: epath.PathLike) -> Failure:
    """Reads what a run left that has stopped at a loss or a gradient that is not finite.

    Raises:
      UserError: if there is no such thing in the work directory.
    """
    workdir = epath.Path(workdir)
    steps = [int(p.stem.removeprefix("nonfinite-")) for p in workdir.glob("nonfinite-*.npz")]
    if not steps:
        raise UserError(f"{workdir} has no nonfinite-STEP.npz: no step of its run has failed")
    path = workdir / "config.json"
    config = from_json(path.read_text(), where=str(path))
    experiment = make_experiment(on_one_device(config))
    state = Checkpoints(workdir).restore(experiment.abstract_state, max(steps) - 1)
    with np.load(io.BytesIO(_file(workdir, max(steps)).read_bytes()), allow_pickle=False) as saved:
        batch = {name: jax.numpy.asarray(saved[name]) for name in ("input", "label")}
    train_step = make_train_step(
        experiment.model,
        experiment.optimizer,
        seed=config.seed,
        log_every=experiment.steps(config.log.every),
        num_groups=config.gr.num_groups,
        ema_decay=config.ema.decay,
        nonfinite_limit=None,
    )
    return Failure(experiment, state, batch, train_step)


def save(workdir: epath.Path, data: Data, state: TrainState) -> epath.Path:
    """Saves the batch of the step after `state`, for `load`; gives the file."""
    batch = {name: whole(x) for name, x in train_batch(data, int(state.data_step)).items()}
    path = _file(workdir, int(state.step) + 1)
    if is_main():
        content = io.BytesIO()
        arrays: dict[str, Any] = batch
        np.savez(content, **arrays)
        try:
            write_atomically(path, content.getvalue())
        except OSError as error:
            _log.warning("cannot write %s: %s", path, error)
    return path


def with_batches_from(state: TrainState, data_step: int) -> TrainState:
    """The state with other batches to come, from number `data_step` on."""
    return ready_to_go_on(state).replace(data_step=_like(state.data_step, data_step))


def ready_to_go_on(state: TrainState) -> TrainState:
    """The state without the steps that have failed up to now."""
    in_a_row = _like(state.nonfinite.in_a_row, 0)
    return state.replace(nonfinite=NonFinite(in_a_row, state.nonfinite.total))


def _like(x: jax.Array, value: int) -> jax.Array:
    return jax.make_array_from_callback((), x.sharding, lambda _: np.asarray(value, x.dtype))


def _file(workdir: epath.Path, step: int) -> epath.Path:
    return workdir / f"nonfinite-{step}.npz"
