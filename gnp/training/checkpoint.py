"""Checkpoints of the train state, by Orbax."""

import pathlib

import jax
import orbax.checkpoint as ocp

from gnp.errors import UserError
from gnp.training.state import TrainState


class Checkpoints:
    """The checkpoints in a work directory, `checkpoints/<step>`, the newest `keep` of them.

    Saving is asynchronous and atomic: an interrupted save leaves no checkpoint. With `keep` None
    they are there to be read; then a `UserError` says if there is none.
    """

    def __init__(self, workdir: pathlib.Path, *, keep: int | None = None):
        self._directory = workdir.absolute() / "checkpoints"
        if keep is None and not self._directory.is_dir():
            raise UserError(f"no checkpoint in {workdir}; has the run been started?")
        writes = keep is not None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=writes, cleanup_tmp_directories=writes
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """Reads the checkpoint of `step`, by default the newest.

        Args:
          like: the state's shapes, dtypes and shardings (`jax.ShapeDtypeStruct` leaves).
          step: one of the steps there are.

        Raises:
          UserError: if there is no such checkpoint.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise UserError(f"no checkpoint in {self._directory}; has the run been started?")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise UserError(f"no checkpoint of step {step} in {self._directory}; there are {steps}")
        return self._manager.restore(step, args=ocp.args.StandardRestore(like))

    def save(self, step: int, state: TrainState) -> None:
        """Begins to save; returns when the state's buffers may be donated."""
        # Orbax reads host memory in the background, which on a CPU is the donated buffers' own.
        state = jax.block_until_ready(jax.tree.map(lambda x: x.copy(), state))
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def close(self) -> None:
        """Returns when the last save is complete."""
        self._manager.wait_until_finished()
        self._manager.close()
