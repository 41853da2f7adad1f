"""python -m gnp.sweeps.group FILE: trains trials in one compiled program, for gnp.sweep --vmap.

The file holds a list of objects with "name", "workdir" and "config".
"""

import json
import os
import pathlib
import shlex
import signal
import sys
from typing import Any, NoReturn

from gnp import command_line, environment
from gnp import config as gnp_config
from gnp.errors import EX_TEMPFAIL, printable


def main() -> int:
    """Reads the file, trains, and draws each trial's report."""
    parser = command_line.Parser("gnp.sweeps.group", "Trains trials in one compiled program.")
    parser.add_argument("file", type=pathlib.Path, help="the trials, written by gnp.sweep")
    parser.add_argument("--divide", action="store_true", help="print which can be trained together")
    flags = parser.parse_args()
    environment.set_up()
    trials = json.loads(flags.file.read_text())
    configs = [
        gnp_config.from_json(json.dumps(trial["config"]), where=str(flags.file)) for trial in trials
    ]

    from gnp import report  # here, since JAX is slow to import
    from gnp.training import Interrupted, vmapped

    if flags.divide:
        print(json.dumps(vmapped.group(configs)))
        return 0
    workdirs, command = [trial["workdir"] for trial in trials], shlex.join(sys.orig_argv)
    try:
        results = vmapped.train(configs, workdirs, command=command)
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        return stop.exit_code
    code = 0
    for trial, result in zip(trials, results, strict=True):
        if "failed" in result:
            print(f"error: {trial['name']}: {printable(result['failed'])}", file=sys.stderr)
            code = 2
        else:
            report.write(trial["workdir"], command=command)
    return code


def _end(number: int, frame: Any) -> NoReturn:
    """Ends the process at once, before and after training."""
    os._exit(EX_TEMPFAIL)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    command_line.run(main)
