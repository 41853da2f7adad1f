"""Trials as processes: started on slots, logged, stopped, and why one failed."""

import contextlib
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import NamedTuple

from gnp.errors import UserError, printable
from gnp.sweeps.slots import Slot
from gnp.sweeps.trials import Trial, shell

_TAIL = 100_000  # bytes of a log in which the reason for a failure is looked for


class Job(NamedTuple):
    """What one process does.

    Attributes:
      name: of one trial, or of those that it trains together.
      trials: these.
      command: its command line.
      log: the file to which its output is appended.
      after: the number of a process that does it now, and leaves what it does not end; None: none.
    """

    name: str
    trials: tuple[Trial, ...]
    command: Sequence[str]
    log: pathlib.Path
    after: int | None = None


class Running(NamedTuple):
    """A job under way: its process, its slot, when it began and where in its log."""

    job: Job
    process: subprocess.Popen[bytes]
    slot: Slot
    began: float
    log_offset: int

    @property
    def seconds(self) -> float:
        """For how long it has been running."""
        return time.monotonic() - self.began


class Ended(NamedTuple):
    """A job that has ended: how (an exit code), where its log began, and after what time."""

    job: Job
    code: int
    log_offset: int
    seconds: float


class Pool:
    """Processes, at most one on each slot.

    Each is in a session of its own: Ctrl-C on the terminal reaches the sweep alone, which asks them
    to stop once, so that they save.
    """

    def __init__(self, slots: Sequence[Slot]):
        self._free = list(slots)
        self.running: list[Running] = []
        self._asked_to_stop: set[int] = set()

    @property
    def has_room(self) -> bool:
        """Whether a slot is free."""
        return bool(self._free)

    def start(self, job: Job) -> None:
        """Starts a job on a free slot: that of the process that does it now, if there is one.

        Raises:
          UserError: if it cannot be started, or its log not be written.
        """
        free = [x for x in self._free if job.after is None or x.holds(job.after)] or self._free
        slot = free[0]
        self._free.remove(slot)
        try:
            with open(job.log, "ab") as log:
                offset = log.seek(0, os.SEEK_END)
                log.write(f"$ {shell(job.command)}\n".encode(errors="replace"))
                log.flush()
                process = subprocess.Popen(
                    job.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **slot.environment},
                    start_new_session=True,
                )
        except OSError as error:
            self._free.insert(0, slot)
            what = error.filename or job.command[0]
            raise UserError(f"cannot start {job.name}: {what}: {error.strerror}") from None
        if slot.cores is not None:
            # XLA has as many threads as cores that the process may use when it starts.
            with contextlib.suppress(OSError):  # it has ended already
                os.sched_setaffinity(process.pid, slot.cores)
        self.running.append(Running(job, process, slot, time.monotonic(), offset))

    def poll(self) -> list[Ended]:
        """The jobs that have ended since it was last asked."""
        ended = []
        for running in list(self.running):
            code = running.process.poll()
            if code is None:
                continue
            self.running.remove(running)
            self._free.append(running.slot)
            ended.append(Ended(running.job, code, running.log_offset, running.seconds))
        return ended

    def stop(self, job: Job) -> None:
        """Asks a job to save and end, once: a second signal would end it at once."""
        for running in self.running:
            if running.job is job and running.process.pid not in self._asked_to_stop:
                self._asked_to_stop.add(running.process.pid)
                running.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends what is left at once; a run that is killed continues from its last checkpoint."""
        for running in self.running:
            running.process.kill()
        for running in self.running:
            running.process.wait()


def failure(ended: Ended, trial: Trial) -> str:
    """Why a trial has no result, in one line.

    It is what the log says of the trial by its name ("error: NAME: …"), or its last "error: …", or
    the last exception's line, or how the process ended.
    """
    lines = _last_lines(ended.job.log, ended.log_offset)
    of_it = f"error: {trial.name}: "
    for line in lines:
        if line.startswith(of_it):
            return printable(line.removeprefix(of_it))
    for number in range(len(lines) - 1, -1, -1):
        line = lines[number]
        if line.startswith("error: "):
            return printable(line.removeprefix("error: "))
        if line.startswith("Traceback (most recent call last)"):
            # The frames are indented, the exception is not.
            rest = [x for x in lines[number + 1 :] if x.strip() and not x.startswith(" ")]
            if rest:
                return printable(rest[0])
    if ended.code < 0:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(-ended.code).name}"
    return f"ended with exit code {ended.code} and no result"


def _last_lines(log: pathlib.Path, offset: int) -> list[str]:
    """The last lines of a log, from an offset on."""
    try:
        with open(log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(offset, size - _TAIL))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
