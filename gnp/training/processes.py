"""What several processes that train one model agree on. With one process all of it is at once."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gnp.errors import UserError

_MESSAGE_BYTES = 4096  # what is told of another process's error, at most


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


@contextlib.contextmanager
def errors_shared() -> Iterator[None]:
    """Every process goes on, or all raise: those without an error of their own that of another.

    A process that ended alone would leave the others waiting for it in their next collective
    operation.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if jax.process_count() == 1:
        if error:
            raise error
        return
    message = np.zeros(_MESSAGE_BYTES, np.uint8)
    if error:
        text = str(error) if isinstance(error, UserError) else repr(error)
        encoded = text.encode()[:_MESSAGE_BYTES]
        message[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    messages = multihost_utils.process_allgather(message)
    if error:
        raise error
    for i, other in enumerate(messages):
        if other.any():
            text = bytes(other).rstrip(b"\0").decode(errors="replace")
            raise UserError(f"process {i} of {len(messages)}: {text}")


class Agreement:
    """What the processes agree on from call to call, without waiting for each other.

    Each puts numbers in after it has dispatched a call of the compiled program, and gets the
    largest of all processes' numbers as they were at the call before: by then that has come
    in. So all of them get the same numbers at the same call.
    """

    def __init__(self, mesh: Mesh, first: tuple[float, ...]):
        self._alone = jax.process_count() == 1
        self._previous = np.array(first)
        # One row for each device; those of a process have its numbers.
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._rows = mesh.devices.size
        self._max = jax.jit(
            lambda x: x.max(axis=0), out_shardings=NamedSharding(mesh, PartitionSpec())
        )

    def exchange(self, *numbers: float) -> tuple[float, ...]:
        """The largest numbers of the call before; of this one if there is only one process."""
        if self._alone:
            return numbers
        own = np.array(numbers, np.float32)[None]
        rows = jax.make_array_from_callback(
            (self._rows, len(numbers)), self._sharding, lambda index: own
        )
        previous, self._previous = self._previous, self._max(rows)
        return tuple(np.asarray(previous).tolist())


def whole(x: jax.Array | np.ndarray) -> np.ndarray:
    """An array on the host, wherever its parts lie; to be called by every process."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(jax.device_get(x))
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def wait_for_all(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
