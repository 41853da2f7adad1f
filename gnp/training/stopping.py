"""Requests to stop a run: Ctrl-C, and the SIGTERM of schedulers."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from gnp.errors import EX_TEMPFAIL

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; it is saved at `saved_step` and can be continued from there.

    `exit_code` is 130 after Ctrl-C, and after SIGTERM that for "start me again".
    """

    def __init__(self, step: int, total_steps: int, *, saved_step: int | None, exit_code: int):
        super().__init__(f"stopped at step {step} of {total_steps}")
        self.step, self.total_steps = step, total_steps
        self.saved_step, self.exit_code = saved_step, exit_code


class StopRequest:
    """Whether and by what the run has been asked to stop; `exit_code` is 0 until then."""

    def __init__(self) -> None:
        self.exit_code = 0


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Has the first SIGINT or SIGTERM noted; the second acts as if there were no run."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may handle signals
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def handle(number: int, frame: Any) -> None:
        request.exit_code = 130 if number == signal.SIGINT else EX_TEMPFAIL
        # Not by print, which may be what was interrupted.
        os.write(2, b"\nstopping after the steps under way; again to stop at once\n")
        for other, handler in before.items():
            signal.signal(other, handler)

    for number in _SIGNALS:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
