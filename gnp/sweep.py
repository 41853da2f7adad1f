"""python -m gnp.sweep: trains one config file over a grid or a search, with several seeds."""

import os
import signal
from typing import Any, NoReturn

from gnp import environment
from gnp.command_line import Parser, run
from gnp.errors import EX_TEMPFAIL, UserError

DESCRIPTION = """\
Trains a config file many times: with every combination of a grid's values, or with settings that
Optuna draws, each with several seeds.

  python -m gnp.sweep --config=configs/digits.py --grid gr=off,none,r,lambda,zero --seeds=3 \\
      --out=runs/policies
  python -m gnp.sweep --config=configs/digits.py --search 'lr.base=loguniform(1e-4,1e-2)' \\
      --trials=20 --out=runs/rates

A trial is a run of gnp.train in OUT/trials/NAME; what it prints is in OUT/logs/NAME.log, with
--vmap in that of the first of its program. The same command goes on with what is not done, and a
grid may be given more values and seeds.

NAME is an argument of the config file (gr) or a field of the configuration (gr.radius). VALUES are
a,b,c or START:STOP:STEP or linspace(START,STOP,COUNT) or logspace(START,STOP,COUNT); a value that
has commas stands in brackets, [a,b]. A DISTRIBUTION is uniform(LOW,HIGH), loguniform(LOW,HIGH),
int(LOW,HIGH) or choice(a,b,c). What all trials share is set as in gnp.train: --config.epochs=20"""


def main() -> int:
    """Parses the flags, trains, and prints the table of the settings."""
    parser = Parser("gnp.sweep", DESCRIPTION)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE.py[:ARGUMENT]")
    add("--out", required=True, metavar="DIR", help="the sweep's directory")
    add("--grid", action="append", metavar="NAME=VALUES", help="may be repeated, or joined by ;")
    add("--search", action="append", metavar="NAME=DISTRIBUTION", help="likewise")
    add("--seeds", help="how many, as 5 (0 to 4), or which, as 3,7; by default the config's")
    add("--metric", metavar="SPLIT/NAME", help="what is best; validation/error or test/error")
    add("--trials", type=int, metavar="N", help="settings that a search draws; 20")
    add("--sampler", choices=("tpe", "random"), help="how they are drawn; tpe")
    add("--sampler_seed", type=int, metavar="SEED", help="0")
    add("--prune", choices=("none", "median"), help="median: settings below it are given up; none")
    add("--jobs", type=int, metavar="N", help="trials side by side, on GPUs or cores of their own")
    add("--devices", metavar="0,1,…", help="the GPUs that are divided among them; by default all")
    add("--vmap", action="store_true", help="train in one compiled program what can be")
    add("--launcher", choices=("local", "slurm"), default="local", help="slurm: write an array job")
    add("--sbatch", metavar="OPTIONS", help="more options of the array job, as --partition=gpu")
    add("--report", action="store_true", help="write OUT/report in the end")
    flags, changes = parser.parse_with_fields()
    _check(flags)
    environment.set_up()

    # Here, so that --help and a mistyped flag do not wait for JAX.
    from gnp.sweeps import command

    return command.sweep(flags, changes)


def _check(flags: Any) -> None:
    """Checks that the flags go together."""
    given = {name for name, value in vars(flags).items() if not (value is None or value is False)}
    if not given & {"grid", "search", "seeds"}:
        raise UserError("nothing varies; give --grid, --search or --seeds")
    for name in ("grid", "vmap"):
        if {name, "search"} <= given:
            raise UserError(f"--search and --{name} do not go together")
    for name in ("trials", "sampler", "sampler_seed", "prune"):
        if name in given and flags.search is None:
            raise UserError(f"--{name} is for a --search")
    if flags.launcher == "slurm":
        for name in ("search", "vmap", "report", "devices"):
            if name in given:
                raise UserError(f"--{name} and --launcher=slurm do not go together")
    elif flags.sbatch is not None:
        raise UserError("--sbatch is for --launcher=slurm")
    for name, least in (("trials", 1), ("jobs", 1), ("sampler_seed", 0)):
        value = getattr(flags, name)
        if value is not None and value < least:
            raise UserError(f"--{name}={value}; it must be {least} or more")


def _end(number: int, frame: Any) -> NoReturn:
    """Ends the sweep on SIGTERM: its trials are ended with it, and can be continued."""
    raise SystemExit(EX_TEMPFAIL)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        # A terminal that is closed; under nohup it is ignored.
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    run(main)
