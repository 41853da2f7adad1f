"""python -m gnp.sweeps.after WORKDIR COMMAND…: does what is left of a run that a process trains.

It waits until no process trains in the work directory, and becomes the command if the run has not
ended then. The process is one of a sweep that was killed.
"""

import os
import pathlib
import sys
import time

from gnp.files import is_locked

_WAIT_SECONDS = 0.2  # between two looks


def main() -> int:
    """Waits, and ends with the sweep that has started it."""
    workdir, *command = sys.argv[1:]
    sweep = os.getppid()
    while is_locked(pathlib.Path(workdir)):
        time.sleep(_WAIT_SECONDS)
        if os.getppid() != sweep:  # it was killed too; the next one waits itself
            return 1
    if not (pathlib.Path(workdir) / "result.json").exists():
        os.execv(command[0], command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
