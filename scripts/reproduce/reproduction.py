"""What the scripts of this folder share: sweeps that are trained one after another, then a report.

Each of them names the sweeps of a table or figure of the papers at two scales: `paper`, the full
recipe, and `small`, which shows the same on two CPU cores with real images.
"""

import contextlib
import dataclasses
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

from gnp.command_line import Parser, run
from gnp.errors import UserError, unknown

ROOT = pathlib.Path(__file__).parents[2]
_FAILED, _MISTAKE = 1, 2  # exit codes of the commands


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Runs of one config file.

    Attributes:
      name: of its folder.
      config: the file in configs/, with its argument.
      grid: names of arguments and fields, and the values of each, as `gnp.sweep` reads them.
      fields: what all runs share.
      measured: on how many examples sharpness is measured at the end; 0 for not at all.
    """

    name: str
    config: str
    grid: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, object] = dataclasses.field(default_factory=dict)
    measured: int = 0

    def command(self, out: pathlib.Path, seeds: str, rest: Sequence[str]) -> list[str]:
        """The command that trains it."""
        return [
            *(
                sys.executable,
                "-m",
                "gnp.sweep",
                f"--config={ROOT / 'configs' / self.config}",
            ),
            *(f"--grid={name}={values}" for name, values in self.grid.items()),
            *(f"--seeds={seeds}", f"--out={out / self.name}"),
            *(f"--config.{name}={value}" for name, value in self.fields.items()),
            *rest,
        ]


def main(description: str, scales: Mapping[str, Sequence[Sweep]], *, seeds: int) -> None:
    """The command line of a script.

    A trial that fails, or a measure, stops neither the others nor the report; the exit code is then
    1, and the last lines say what failed.

    Args:
      description: the script's docstring.
      scales: the sweeps of each scale.
      seeds: how many, unless --seeds says otherwise.
    """
    run(lambda: _main(description, scales, seeds))


def _main(description: str, scales: Mapping[str, Sequence[Sweep]], seeds: int) -> int:
    script = pathlib.Path(sys.argv[0]).name
    parser = Parser(f"scripts/reproduce/{script}", description)
    parser.prog = f"python scripts/reproduce/{script}"
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder of the runs")
    parser.add_argument("--scale", default="paper", help=" or ".join(scales))
    parser.add_argument("--seeds", default=str(seeds), help="how many, as 5, or which, as 3,7")
    parser.add_argument("--data_dir", help="where the data set is")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--dry_run", action="store_true", help="print the commands alone")
    flags, changes = parser.parse_with_fields()
    if flags.scale not in scales:
        raise unknown("scale", flags.scale, list(scales))
    shared = [
        f"--jobs={flags.jobs}",
        *(f"--config.{name}={text}" for name, text in changes),
    ]
    if flags.data_dir:
        shared.append(f"--config.data.data_dir={flags.data_dir}")

    sweeps = scales[flags.scale]
    commands = [sweep.command(flags.out, flags.seeds, shared) for sweep in sweeps]
    report = [
        sys.executable,
        "-m",
        "gnp.report",
        str(flags.out),
        f"--out={flags.out / 'report'}",
    ]
    if flags.dry_run:
        print("\n".join(shlex.join(command) for command in [*commands, report]))
        return 0
    failed = []
    for sweep, command in zip(sweeps, commands, strict=True):
        if code := _call(command):
            if code != _FAILED:  # a mistake in the command, or Ctrl-C
                return code
            failed.append(f"trials of {sweep.name}")
        if sweep.measured:
            for result in sorted((flags.out / sweep.name / "trials").glob("*/result.json")):
                measure = [sys.executable, "-m", "gnp.evaluate", f"--workdir={result.parent}"]
                examples = f"--max_examples={sweep.measured}"
                if code := _call([*measure, "--sharpness", examples]):
                    if code not in (_FAILED, _MISTAKE):
                        return code
                    failed.append(f"the sharpness of {result.parent}")
    code = _call(report)
    if failed:
        print(f"failed: {'; '.join(failed)}\nthe same command tries them again", file=sys.stderr)
    return code or (_FAILED if failed else 0)


def _call(command: list[str]) -> int:
    """Runs a command to its end; on Ctrl-C, which it gets too, waits while it saves."""
    try:
        with subprocess.Popen(command) as process:
            while True:
                with contextlib.suppress(KeyboardInterrupt):
                    return process.wait()
    except OSError as error:
        raise UserError(f"cannot start {command[0]}: {error.strerror}") from error
