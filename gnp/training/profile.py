"""A trace of what the devices and the host do during some steps."""

import pathlib
from typing import Any

import jax


class Profiler:
    """Traces the first `num_steps` steps (or somewhat more) after `first`; none if that is 0.

    The trace lies under `folder`, in the form that XProf (TensorBoard's profiler) opens, and as
    `perfetto_trace.json.gz` for https://ui.perfetto.dev.
    """

    def __init__(self, folder: pathlib.Path, *, first: int, num_steps: int):
        self._folder, self._first, self._until = folder, first, first + num_steps
        self._tracing, self._done = False, num_steps == 0

    def at(self, step: int, busy: Any = None) -> None:
        """Says that the steps before `step` have been asked for; `busy` is what the last gives."""
        if self._done:
            return
        if not self._tracing and step >= self._first:
            jax.block_until_ready(busy)
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._tracing = True
        elif self._tracing and step >= self._until:
            jax.block_until_ready(busy)
            self.close()

    def close(self) -> None:
        """Writes the trace if one is being made."""
        if self._tracing:
            jax.profiler.stop_trace()
        self._tracing, self._done = False, True
