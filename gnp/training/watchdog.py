"""Says where a run stands when nothing moves any more."""

import faulthandler
import os
import threading
from types import TracebackType

from gnp.data.streaming import show_worker_stacks


class Watchdog:
    """Prints the stacks of all threads and data workers when a run has not moved for a time.

    A context manager; between its beginning and its end whoever works calls `alive` with every
    piece of work. After `seconds` without a call it prints one line and the stacks to the standard
    error, again after twice, four times, … as long, and a line when things move again. It ends
    nothing: a long compilation is no hang. The time in which the process was stopped does not
    count.

    Args:
      seconds: of silence; 0 or None for never.
    """

    def __init__(self, seconds: float | None):
        self._seconds = seconds or 0.0
        self._doing, self._moves = "starting", 0
        self._closing = threading.Event()
        self._thread = threading.Thread(name="watchdog", target=self._watch, daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds > 0:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()

    def alive(self, doing: str) -> None:
        """Notes that things move, and what is done now."""
        self._doing = doing
        self._moves += 1

    def _watch(self) -> None:
        # Ticks are counted: a clock would go on while the process is stopped.
        tick = min(self._seconds / 10, 1.0)
        moves, silent, limit = self._moves, 0, self._seconds
        while not self._closing.wait(tick):
            if self._moves != moves:
                if silent * tick >= self._seconds:
                    _say(f"moving again after {silent * tick:.3g} s")
                moves, silent, limit = self._moves, 0, self._seconds
                continue
            silent += 1
            if silent * tick >= limit:
                limit *= 2
                _say(
                    f"nothing has moved for {silent * tick:.3g} s, last: {self._doing}; "
                    "the stacks of all threads follow"
                )
                faulthandler.dump_traceback(2, all_threads=True)
                show_worker_stacks()


def _say(line: str) -> None:
    os.write(2, f"\n{line}\n".encode())  # not by print, which may be what hangs
