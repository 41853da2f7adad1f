"""Trials that one compiled program trains: which they are, and the process that does it."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

from gnp.errors import UserError, printable
from gnp.files import write_atomically
from gnp.sweeps.processes import Job
from gnp.sweeps.slots import Slot
from gnp.sweeps.trials import Trial


def divide(out: pathlib.Path, trials: Sequence[Trial], slot: Slot) -> list[tuple[Trial, ...]]:
    """The trials in groups that one program can train; see `gnp.training.vmapped.group`.

    A process on the slot is asked, since that depends on the devices it finds there.

    Raises:
      UserError: if it does not answer.
    """
    if not trials:
        return []
    command = _command(_write(out, "all", trials), "--divide")
    environment = {**os.environ, **slot.environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"--vmap: {printable(done.stderr.strip())}")
    return [tuple(trials[i] for i in group) for group in json.loads(done.stdout)]


def job(out: pathlib.Path, trials: tuple[Trial, ...]) -> Job:
    """The job that trains a group."""
    first = trials[0]
    name = f"{first.name} and {len(trials) - 1} more in one program"
    return Job(name, trials, _command(_write(out, first.name, trials)), first.log(out))


def _write(out: pathlib.Path, name: str, trials: Sequence[Trial]) -> pathlib.Path:
    """Writes what `gnp.sweeps.group` is to train."""
    path = out / "groups" / f"{name}.json"
    content = [
        {
            "name": trial.name,
            "workdir": str(trial.workdir(out)),
            "config": trial.config.to_dict(),
        }
        for trial in trials
    ]
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    return path


def _command(path: pathlib.Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "gnp.sweeps.group", str(path), *flags]
