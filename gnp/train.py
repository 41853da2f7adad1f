"""python -m gnp.train: trains a model, or continues the run in a work directory."""

import pathlib
import shlex
import sys
from typing import Any

from gnp import config as gnp_config
from gnp import distributed, environment, models
from gnp.command_line import Parser, overrides, run
from gnp.errors import UserError

DESCRIPTION = """\
Trains a model, or continues the run in the work directory.

Every field of the configuration can be set, as --config.gr.radius=0.05 or
--config.lr.warmup=10ep (durations: 40ep epochs, 500st steps, 10% of the run).
A config file may take an argument: --config=configs/cifar_vit.py:model=vit_s,gr=zero"""


def main() -> int:
    """Parses the flags, trains, and draws the report."""
    parser = Parser("gnp.train", DESCRIPTION)
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARGUMENT]")
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="the run's directory")
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
    flags, rest = parser.parse_known_args()
    if not flags.workdir.name:
        raise UserError("--workdir names no directory; write --workdir=runs/NAME")
    if flags.profile < 0:
        raise UserError(f"--profile is {flags.profile}; it must be a number of steps")
    environment.set_up()
    names = ["--config", "--workdir", "--profile", "--list-models", *distributed.FLAGS]
    config = gnp_config.load(flags.config, overrides(rest, names))
    gnp_config.validate(config)
    distributed.join(
        flags.coordinator,
        flags.num_processes,
        flags.process_id,
        forced=flags.distributed,
        timeout=flags.join_timeout,
    )

    # Here, so that --help and a mistyped field do not wait for JAX.
    from gnp import report
    from gnp.training import Interrupted, train
    from gnp.training.metrics import headline, text
    from gnp.training.processes import is_main

    command = shlex.join(sys.orig_argv)
    try:
        result = train(
            *(config, flags.workdir),
            command=command,
            profile_steps=flags.profile,
            measure_device=True,
        )
    except Interrupted as stop:
        if is_main():
            print(f"\n{stop}, and saved. To continue it:\n  {command}", file=sys.stderr)
        return 130
    if not is_main():
        return 0
    path = report.write(flags.workdir, command=command)
    if "device_flops_per_second" in (result.get("speed") or {}):
        print(_speed(result, config.dtype))
    print(
        f"test {' '.join(headline(result['test']))}, "
        f"test loss {text(result['test']['loss'], '.4f')} "
        f"after {result['epochs']:.1f} epochs ({result['steps']} steps) "
        f"in {result['wall_time']:.0f} s\nreport: {path}"
    )
    return 0


def _speed(result: dict[str, Any], dtype: str) -> str:
    """How fast the run was, against the rate of a matrix product on the same device."""
    speed, unit = result["speed"], result["unit"]
    rate, flops = speed[f"{unit}s_per_second"], speed["flops_per_second"]
    return (
        f"{rate:,.0f} {unit}s/s, {flops / 1e9:,.0f} GFLOP/s, "
        f"{flops / speed['device_flops_per_second']:.0%} of a {dtype} matrix product's; "
        f"{speed['data_wait']:.1%} of the time waiting for data"
    )


if __name__ == "__main__":
    run(main)
