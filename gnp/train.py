"""python -m gnp.train: trains a model, or continues the run in a work directory."""

import os
import shlex
import signal
import sys
from typing import Any, NoReturn

from gnp import config as gnp_config
from gnp import distributed, environment, models, peers
from gnp.command_line import Parser, directory, run
from gnp.errors import EX_TEMPFAIL, UserError

DESCRIPTION = """\
Trains a model, or continues the run in the work directory.

Every field of the configuration can be set, as --config.gr.radius=0.05 or
--config.lr.warmup=10ep (durations: 40ep epochs, 500st steps, 10% of the run).
A config file may take an argument: --config=configs/cifar_vit.py:model=vit_s,gr=zero"""


def main() -> int:
    """Parses the flags, trains, and draws the report."""
    parser = Parser("gnp.train", DESCRIPTION)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--config", metavar="FILE.py[:ARGUMENT]")
    what.add_argument(
        "--replay",
        type=directory,
        metavar="DIR",
        help="repeat the run in DIR, by default in DIR/replay, and say where it first differs",
    )
    parser.add_argument("--workdir", type=directory, help="the run's directory")
    parser.add_argument(
        "--list-models",
        action="version",
        version=str(models.list_models()),
        help="print all models with their sizes, cost and paper",
    )
    parser.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="STEPS",
        help="trace so many steps into WORKDIR/profile, for XProf and Perfetto",
    )
    distributed.add_flags(parser)
    flags, changes = parser.parse_with_fields()
    if flags.replay is not None:
        flags.workdir = flags.workdir or flags.replay / "replay"
    elif missing := [f"--{x}" for x in ("config", "workdir") if getattr(flags, x) is None]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    if not flags.workdir.name:
        raise UserError("--workdir names no directory; write --workdir=runs/NAME")
    if flags.profile < 0:
        raise UserError(f"--profile is {flags.profile}; it must be a number of steps")
    environment.set_up()
    if flags.replay is None:
        config = gnp_config.load(flags.config, changes)
    else:
        from gnp.replay import load_config  # here, since JAX is slow to import

        config = load_config(flags.replay, changes)
    gnp_config.validate(config)
    distributed.join(
        flags.coordinator,
        flags.num_processes,
        flags.process_id,
        forced=flags.distributed,
        timeout=flags.join_timeout,
    )

    # Here, so that --help and a mistyped field do not wait for JAX.
    from gnp import replay, report
    from gnp.training import Interrupted, train
    from gnp.training.processes import is_main

    command = shlex.join(sys.orig_argv)
    comparison = None
    if flags.replay is not None:
        comparison = replay.begin(flags.replay, flags.workdir)
    result: dict[str, Any] | None = None
    try:
        result = train(
            *(config, flags.workdir),
            command=command,
            profile_steps=flags.profile,
            measure_device=True,
            on_row=comparison.on_row if comparison else None,
        )
    except Interrupted as stop:
        if is_main():
            saved = "and saved"
            if stop.saved_step != stop.step:
                saved = f"but what is saved is step {stop.saved_step or 0}"
            print(f"\n{stop}, {saved}. To continue it:\n  {command}", file=sys.stderr)
        return stop.exit_code
    except replay.Ended:
        pass
    if not is_main():
        return 0
    path = report.write(flags.workdir, command=command)
    if result is not None:
        _tell(result, config.dtype)
    print(f"report: {path}")
    if comparison is None:
        return 0
    identical, lines = comparison.verdict(result)
    print("\n".join(lines))
    return 0 if identical else 1


def _tell(result: dict[str, Any], dtype: str) -> None:
    """Prints how the run ended."""
    from gnp.training.metrics import headline, text

    if "device_flops_per_second" in (result.get("speed") or {}):
        print(_speed(result, dtype))
    print(
        f"test {' '.join(headline(result['test']))}, "
        f"test loss {text(result['test']['loss'], '.4f')} "
        f"after {result['epochs']:.1f} epochs ({result['steps']} steps) "
        f"in {result['wall_time']:.0f} s"
    )


def _speed(result: dict[str, Any], dtype: str) -> str:
    """How fast the run was, against the rate of a matrix product on the same device."""
    speed, unit = result["speed"], result["unit"]
    rate, flops = speed[f"{unit}s_per_second"], speed["flops_per_second"]
    return (
        f"{rate:,.0f} {unit}s/s, {flops / 1e9:,.0f} GFLOP/s, "
        f"{flops / speed['device_flops_per_second']:.0%} of a {dtype} matrix product's; "
        f"{speed['data_wait']:.1%} of the time waiting for data"
    )


def _end_on_sigterm(number: int, frame: Any) -> NoReturn:
    """Ends the process at once, before and after training, with the code for "start me again"."""
    os.write(2, b"\nterminated; to go on, start the same command again\n")
    peers.leave(EX_TEMPFAIL, "terminated")
    os._exit(EX_TEMPFAIL)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end_on_sigterm)
    run(main)
