"""A sweep as an array job of SLURM: a file with a line a trial, and the script that reads it."""

import pathlib
import re
import shlex
import sys
from collections.abc import Sequence

from gnp.errors import UserError, printable
from gnp.files import write_atomically
from gnp.sweeps.trials import Trial

# By name, with the value if there is one, quoted.
Options = dict[str, str | None]

# As in scripts/launch/slurm.sbatch, for one process with one GPU.
_OPTIONS: Options = {
    "--job-name": "gnp-sweep",
    "--ntasks": "1",
    "--gpus-per-node": "1",
    "--cpus-per-task": "8",
    "--time": "24:00:00",
    "--signal": "TERM@120",
    "--requeue": None,
    "--open-mode": "append",
}

_SCRIPT = """\
#!/usr/bin/env bash
# Trains a trial of a sweep in each task of an array job. Written by gnp.sweep; submit it with
#
#   sbatch {path}
#
# Line i + 1 of trials.txt is the trial of task i: its log, and its flags of gnp.train. Two minutes
# before the time limit, on preemption and after the failure of a node a task is put into the queue
# again and continues from its last checkpoint: gnp.train saves on SIGTERM and ends with code 75.
# When all tasks have ended, the command of gnp.sweep writes a script of what is left to do.
#
{options}
set -euo pipefail
cd {directory}

eval "trial=($(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {trials}))"
log=${{trial[0]}}
code=0
srun --cpus-per-task="${{SLURM_CPUS_PER_TASK:-1}}" \\
  "${{PYTHON:-{python}}}" -m gnp.train "${{trial[@]:1}}" >>"$log" 2>&1 || code=$?
if ((code == 75)); then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$code"
"""


def write(
    out: pathlib.Path, trials: Sequence[Trial], more: Options, *, at_once: int | None = None
) -> pathlib.Path:
    """Writes OUT/trials.txt and OUT/array.sbatch, and submits nothing.

    Args:
      out: the sweep's directory.
      trials: those that are not done.
      more: options of sbatch, as `parse` gives them; they stand above the defaults.
      at_once: how many tasks may run at the same time; None for as many as can.

    Returns:
      The script.

    Raises:
      UserError: for a flag of a trial that does not fit a line, or if nothing can be written.
    """
    out = out.absolute()
    path = out / "trials.txt"
    # Lines stay where they are, for tasks that are in the queue already.
    there = path.read_text().splitlines() if path.exists() else []
    lines = {line: i for i, line in enumerate(there)}
    tasks = []
    for trial in trials:
        flags = [str(trial.log(out)), *trial.flags, f"--workdir={trial.workdir(out)}"]
        line = shlex.join(flags)
        if line != printable(line):
            raise UserError(f"trial {trial.name} has a flag with a line break or the like")
        tasks.append(lines.setdefault(line, len(lines)))
    throttle = f"%{at_once}" if at_once else ""
    options: Options = {
        **_OPTIONS,
        "--array": _ranges(sorted(tasks)) + throttle,
        "--output": shlex.quote(f"{str(out).replace('%', '%%')}/logs/slurm-%A_%a.out"),
        **more,
    }
    script = out / "array.sbatch"
    text = _SCRIPT.format(
        path=shlex.quote(str(script)),
        options="\n".join(
            f"#SBATCH {name}" if value is None else f"#SBATCH {name}={value}"
            for name, value in options.items()
        ),
        directory=shlex.quote(str(pathlib.Path.cwd())),
        trials=shlex.quote(str(path)),
        python=shlex.quote(sys.executable),
    )
    try:
        write_atomically(path, "".join(f"{line}\n" for line in lines))
        write_atomically(script, text)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    return script


def parse(sbatch: str) -> Options:
    """Options of sbatch, "--partition=gpu --time=4:00:00", by name.

    Raises:
      UserError: for one that is not of the form --NAME or --NAME=VALUE.
    """
    try:
        words = shlex.split(sbatch)
    except ValueError as error:
        raise UserError(f"--sbatch={sbatch!r} cannot be read: {error}") from None
    options: Options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not re.fullmatch(r"--[a-z][a-z-]*", name) or word != printable(word):
            raise UserError(
                f"--sbatch: {word!r} is not of the form --NAME or --NAME=VALUE, as in "
                "--sbatch='--partition=gpu --time=4:00:00'"
            )
        if name == "--array":
            raise UserError("--sbatch: --array is the sweep's own; --jobs=N says how many at once")
        options[name] = shlex.quote(value) if equals else None
    return options


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as sbatch has them: "0-2,5" of 0, 1, 2 and 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
