"""What trials that run side by side run on: GPUs, or CPU cores, each in one trial's hands."""

import itertools
import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from gnp.errors import UserError

_T = TypeVar("_T")


class Slot(NamedTuple):
    """What one of the trials has.

    Attributes:
      devices: what CUDA_VISIBLE_DEVICES is set to; None leaves it.
      cores: the CPU cores that it may use; None leaves them.
    """

    devices: str | None = None
    cores: frozenset[int] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The variables that a process on it has beside this one's."""
        return {} if self.devices is None else {"CUDA_VISIBLE_DEVICES": self.devices}

    def holds(self, process: int) -> bool:
        """Whether a process runs on it, by its number; False where that cannot be told."""
        try:
            environment = pathlib.Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            cores = os.sched_getaffinity(process)
        except OSError:  # it has ended, is another user's, or this is not Linux
            return False
        devices = f"CUDA_VISIBLE_DEVICES={self.devices}".encode()
        return (self.devices is None or devices in environment) and self.cores in (None, cores)


def make(jobs: int, devices: str | None = None) -> list[Slot]:
    """As many slots as trials are to run side by side.

    GPUs are divided among them, or CPU cores where there are none. One trial alone has all, unless
    devices are named.

    Args:
      jobs: how many trials run side by side.
      devices: the GPUs to use, as CUDA_VISIBLE_DEVICES has them ("0,1,2,3"); by default that
        variable's, or all that nvidia-smi tells of.

    Raises:
      UserError: if there are fewer GPUs than jobs, or a device is named twice.
    """
    if devices is not None:
        names = [name.strip() for name in devices.split(",")]
        if not all(re.fullmatch(r"[\w:/.-]+", name) for name in names):
            raise UserError(f"--devices={devices}: write the GPUs' numbers, as --devices=0,1,2,3")
        if len({*names}) < len(names):
            raise UserError(f"--devices={devices} has a device twice")
    elif jobs == 1:
        return [Slot()]
    else:
        names = find_gpus(os.environ)
    if not names:
        return [Slot(cores=cores) for cores in _cores(jobs)]
    if len(names) < jobs:
        raise UserError(
            f"--jobs={jobs}, but there are {len(names)} devices ({', '.join(names)}); each trial "
            "needs one of its own"
        )
    return [Slot(devices=",".join(part)) for part in _divide(names, jobs)]


def with_one_device(slots: Sequence[Slot]) -> list[Slot]:
    """The slots with the first of their GPUs each; a slot that has all gets the first of all."""
    slots = list(slots)
    if len(slots) == 1 and slots[0].devices is None:
        slots = [slots[0]._replace(devices=name) for name in find_gpus(os.environ)[:1]] or slots
    return [
        slot if slot.devices is None else slot._replace(devices=slot.devices.split(",")[0])
        for slot in slots
    ]


def find_gpus(environ: Mapping[str, str]) -> list[str]:
    """The GPUs that this process may use, without starting JAX, which would take their memory."""
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & {*platforms.split(",")}:
        return []
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return [] if names in ([""], ["-1"]) else names
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split() if done.returncode == 0 else []


def _cores(jobs: int) -> list[frozenset[int] | None]:
    """The cores of each job; None, all of them, where there are fewer cores than jobs."""
    if not hasattr(os, "sched_getaffinity"):  # not Linux
        return [None] * jobs
    cores = sorted(os.sched_getaffinity(0))
    if jobs == 1 or len(cores) < jobs:
        return [None] * jobs
    return [frozenset(part) for part in _divide(cores, jobs)]


def _divide(items: Sequence[_T], parts: int) -> list[Sequence[_T]]:
    """The items in so many runs of neighbours, whose lengths differ by one at most."""
    ends = [len(items) * i // parts for i in range(parts + 1)]
    return [items[a:b] for a, b in itertools.pairwise(ends)]
