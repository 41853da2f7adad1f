"""The other processes of a run: how this one learns that one has ended, and ends itself."""

import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
import threading
import time
from types import TracebackType
from typing import Any, NoReturn

from gnp.errors import EX_TEMPFAIL

# A process that jaxlib has not heard of for so long is taken for dead, in seconds. Its heartbeats
# are those of a thread in C++, so a long compilation or a busy interpreter does not stop them.
HEARTBEAT_TIMEOUT = 30


class _Others:
    """What this process knows of the others.

    Every second each process writes a number into the key-value store of JAX's coordination
    service, which process 0 runs, and reads what all have written. One that ends with an error
    writes why.

    Args:
      client: of the coordination service.
      number: this process's.
      count: of all processes.
      address: (host, port) of the service.
    """

    def __init__(self, client: Any, number: int, count: int, address: tuple[str, int]):
        self._client, self.number, self._count, self._address = client, number, count, address
        self._beats: dict[str, str] = {}
        self._same: dict[str, int] = {}  # how often a process's number was found as it was before
        self._ended: dict[str, str] = {}
        self._exchanges = 0

    def start(self) -> None:
        for target in (self._exchange, self._judge):
            threading.Thread(name="other processes", target=target, daemon=True).start()

    def tell(self, reason: str) -> None:
        """Tells the others why this process ends."""
        key = f"gnp/ended/{self.number}"
        with contextlib.suppress(Exception):  # it is there already, or nobody to be told
            self._client.key_value_set(key, reason)

    def why(self, seconds: float) -> str | None:
        """What has become of another process, if that is found out in so many seconds."""
        until, exchanges = time.monotonic() + seconds, self._exchanges
        while not self._ended and time.monotonic() < until:
            time.sleep(0.2)
        if self._ended:
            return self._lost("")
        if self._exchanges == exchanges and self._service_has_ended():
            return self._lost("0")
        silent = [number for number, same in self._same.items() if same >= 3]
        return self._lost(silent[0]) if len(silent) == 1 else None

    def _lost(self, number: str) -> str:
        for ended, reason in self._ended.items():  # that came first
            return f"process {ended} of {self._count} ended: {reason}"
        return f"process {number} of {self._count} has ended or cannot be reached"

    def _exchange(self) -> None:
        while _joined():
            # An error is the end of process 0 or of the program. If jaxlib is about to abort, a
            # call does not return.
            with contextlib.suppress(Exception):
                mine = f"gnp/alive/{self.number}", str(self._exchanges)
                self._client.key_value_set(*mine, allow_overwrite=True)
                for key, value in self._client.key_value_dir_get("gnp/"):
                    _, kind, number = key.split("/")
                    if number == str(self.number):
                        continue
                    if kind == "ended":
                        self._ended[number] = value
                        continue
                    same = self._beats.get(number) == value
                    self._same[number] = self._same.get(number, 0) + 1 if same else 0
                    self._beats[number] = value
                self._exchanges += 1
            time.sleep(1)

    def _judge(self) -> None:
        """Ends this process when it must not wait any longer."""
        # Seconds are counted one by one, so those in which this process was stopped are not.
        known, no_answer, exchanges = 0, 0, 0
        while _joined():
            time.sleep(1)
            known = known + 1 if self._ended else 0
            no_answer = no_answer + 1 if self._exchanges == exchanges else 0
            exchanges = self._exchanges
            silent = [number for number, same in self._same.items() if same >= 10]
            if known >= 8:  # this one is likely to notice by itself, with an error of its own
                leave_at_once(EX_TEMPFAIL, self._lost(""))
            elif no_answer >= 3 and silent:  # jaxlib is about to abort, and has told the others
                leave_at_once(EX_TEMPFAIL, self._lost(silent[0]), told=True)
            elif no_answer >= 3 and self._service_has_ended(patience=no_answer):
                leave_at_once(EX_TEMPFAIL, self._lost("0"))

    def _service_has_ended(self, patience: int = 0) -> bool:
        """Whether process 0 has, by its port, or by not having answered for so many seconds."""
        if self.number == 0:
            return False
        try:
            socket.create_connection(self._address, timeout=1).close()
        except ConnectionRefusedError:
            return _joined()
        except OSError:
            pass
        return patience >= HEARTBEAT_TIMEOUT // 2


_others: _Others | None = None


def _joined() -> bool:
    import jax

    return jax.distributed.is_initialized()


def watch() -> None:
    """Begins to watch the other processes, if JAX has what that takes."""
    global _others
    try:
        from jax._src import distributed  # as Orbax does; there is no public way to its client
    except ImportError:
        return
    state = getattr(distributed, "global_state", None)
    client = getattr(state, "client", None)
    needed = ("key_value_set", "key_value_dir_get")
    if state is None or not all(hasattr(client, name) for name in needed):
        return
    host, _, port = state.coordinator_address.rpartition(":")
    _others = _Others(client, state.process_id, state.num_processes, (host.strip("[]"), int(port)))
    _delay_abort()
    _others.start()


def _delay_abort() -> None:
    """Leaves 6 seconds between an abort() of jaxlib's and the end, in which to end otherwise.

    jaxlib aborts as soon as it hears of the end of another process, in a thread of its own, and
    calls back nobody. A handler in Python would come too late. The C function sleep is one that
    may be called there; what it is given is the number of the signal, which is 6.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not a Unix
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def leave(code: int, reason: str) -> None:
    """Ends this process at once, and tells the others why; does nothing if it is the only one.

    In an orderly end JAX would wait for them, and they wait for this one: 5 minutes.
    """
    if _others is not None:
        _end(code, reason)


def _end(code: int, reason: str) -> NoReturn:
    others = _others
    if others is not None:
        # In a thread, since it may be what does not answer.
        telling = threading.Thread(target=others.tell, args=[reason[:500]], daemon=True)
        telling.start()
        telling.join(2)
        if others.number == 0:
            time.sleep(3)  # what was told is gone with this process
    leave_at_once(code)


def end_at_once(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Shows an exception and ends the process, which the others notice."""
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, Exception) and _COLLECTIVE.search(first):
        told = _others.why(5) if _others is not None else None
        leave_at_once(
            EX_TEMPFAIL, told or f"another process has ended or cannot be reached ({first})"
        )
    sys.__excepthook__(kind, error, trace)
    _end(1, f"{kind.__name__}: {first}")


# What is at the beginning of the errors of collective operations that another process has left.
_COLLECTIVE = re.compile(r"\bGloo\b|\bNCCL\b|\bcoordination|^(UNAVAILABLE|DEADLINE_EXCEEDED)\b")


def leave_at_once(code: int, lost: str | None = None, *, told: bool = False) -> NoReturn:
    """Ends the process; `lost` is what has become of another one, and whether all know that."""
    if lost is not None:
        again = "start all processes again: they go on from the last checkpoint"
        os.write(2, f"error: {lost.rstrip('.')}; {again}\n".encode(errors="replace"))
        if _others is not None and _others.number == 0 and not told:
            time.sleep(3)  # the others may not know of it yet
    # In a thread, since another one may be writing there and not come to an end.
    flushing = threading.Thread(target=_flush, daemon=True)
    flushing.start()
    flushing.join(1)
    os._exit(code)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
