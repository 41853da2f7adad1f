"""What several processes that train one model agree on. With one process all of it is at once."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gnp.errors import UserError

_MESSAGE_BYTES = 4096  # what is told of another process's error, at most
_DIFFERENCES = 6  # so many are told at most
_VALUE_CHARS = 80  # of each value


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


def all_true(flag: bool) -> bool:
    """Whether `flag` holds in every process; to be called by every process."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).all())


def refuse_differences(what: Mapping[str, Any]) -> None:
    """Returns if all processes have the same; to be called by every process.

    Args:
      what: of this process, such as its configuration and versions. JSON, of any depth and size.

    Raises:
      UserError: by all processes, with the fields that differ from those of process 0, the
        processes and the values.
    """
    if jax.process_count() == 1:
        return
    everyone = [_fields(json.loads(text)) for text in _gather(json.dumps(what).encode())]
    first, differences = everyone[0], []
    for field in sorted(set().union(*everyone)):
        others: dict[str, list[int]] = {}
        for number, fields in enumerate(everyone):
            others.setdefault(fields.get(field, "not at all"), []).append(number)
        expected = first.get(field, "not at all")
        differences += [
            f"{_named(numbers)} {field} {_short(value)}, process 0 {_short(expected)}"
            for value, numbers in others.items()
            if value != expected
        ]
    if not differences:
        return
    told = differences[:_DIFFERENCES]
    if len(differences) > len(told):
        told.append(f"and {len(differences) - len(told)} more")
    raise UserError(
        f"{'; '.join(told)}; start all processes with the same configuration and installation"
    )


def _gather(text: bytes) -> list[bytes]:
    """The texts of all processes, whose lengths may differ."""
    sizes = multihost_utils.process_allgather(np.array(len(text), np.int32))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]) for row, size in zip(rows, sizes, strict=True)]


def _fields(value: Any, prefix: str = "") -> dict[str, str]:
    """The leaves of nested dictionaries as JSON, by their dotted keys."""
    if not isinstance(value, dict) or not value:
        return {prefix.removesuffix("."): json.dumps(value)}
    fields: dict[str, str] = {}
    for name, inner in value.items():
        fields |= _fields(inner, f"{prefix}{name}.")
    return fields


def _named(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"process {numbers[0]} has"
    shown = [str(number) for number in numbers[:4]]
    if len(numbers) > len(shown):
        shown.append(f"{len(numbers) - len(shown)} more")
    return f"processes {', '.join(shown[:-1])} and {shown[-1]} have"


def _short(text: str) -> str:
    return text if len(text) <= _VALUE_CHARS else f"{text[: _VALUE_CHARS - 2]} …"


def wait_for_all(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
