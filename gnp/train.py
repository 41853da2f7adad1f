"""python -m gnp.train: trains a model, or continues the run in a work directory."""

import pathlib
import shlex
import sys

from gnp import config as gnp_config
from gnp import models
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
    flags, rest = parser.parse_known_args()
    if not flags.workdir.name:
        raise UserError("--workdir names no directory; write --workdir=runs/NAME")
    config = gnp_config.load(
        flags.config, overrides(rest, ["--config", "--workdir", "--list-models"])
    )
    gnp_config.validate(config)

    # Here, so that --help and a mistyped field do not wait for JAX.
    from gnp import report
    from gnp.training import Interrupted, train
    from gnp.training.metrics import headline, text

    command = shlex.join(sys.orig_argv)
    try:
        result = train(config, flags.workdir, command=command)
    except Interrupted as stop:
        print(f"\n{stop}, and saved. To continue it:\n  {command}", file=sys.stderr)
        return 130
    path = report.write(flags.workdir, command=command)
    print(
        f"test {' '.join(headline(result['test']))}, "
        f"test loss {text(result['test']['loss'], '.4f')} "
        f"after {result['epochs']:.1f} epochs ({result['steps']} steps) "
        f"in {result['wall_time']:.0f} s\nreport: {path}"
    )
    return 0


if __name__ == "__main__":
    run(main)
