"""python -m gnp.evaluate: the test error, the gradient norm and the sharpness of checkpoints."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from etils import epath
from ml_collections import ConfigDict

from gnp import environment
from gnp.command_line import Parser, config_of, directory, run
from gnp.errors import UserError

if TYPE_CHECKING:  # it loads NumPy
    from gnp.analysis.measures import Settings

# The flags of --sharpness, named as the fields of `gnp.analysis.measures.Settings`.
_SETTINGS: dict[str, tuple[type, str]] = {
    "eigenvalues": (int, "how many of the largest eigenvalues of the Hessian (10)"),
    "lanczos_steps": (int, "Hessian-vector products for them, and for a density probe (40)"),
    "density_probes": (int, "random starts of the spectral density (2)"),
    "trace_probes": (int, "random vectors of the trace (20)"),
    "radius": (float, "of SAM's sharpness (0.05)"),
    "ascents": (int, "steps of gradient ascent after SAM's (0)"),
    "surface": (int, "points on a side of the loss surface; it takes their square of losses (0)"),
    "extent": (float, "of the surface, in units of the filters' norms (1)"),
    "max_examples": (int, "only the first so many of the split train (all)"),
    "seed": (int, "of random vectors and directions (0)"),
}


_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def main() -> int:
    """Parses the flags, evaluates, and prints."""
    parser = Parser("gnp.evaluate", "The error, loss and gradient norm of a run's checkpoint.")
    parser.add_argument(
        "--workdir",
        required=True,
        type=directory,
        action="append",
        help="the run's directory; with --sharpness also a folder of runs, and more than once",
    )
    parser.add_argument(
        "--step", help="which checkpoint, or best; by default the newest (--sharpness: all)"
    )
    parser.add_argument("--data_dir", help="where the data set is, if not where the run had it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--sharpness",
        action="store_true",
        help="the Hessian's spectrum and more, at every checkpoint; kept in sharpness.jsonl",
    )
    group = parser.add_argument_group("with --sharpness")
    for name, (kind, text) in _SETTINGS.items():
        group.add_argument(f"--{name}", type=kind, metavar="N" if kind is int else "X", help=text)
    flags = parser.parse_args()
    given = {name: getattr(flags, name) for name in _SETTINGS if getattr(flags, name) is not None}
    if given and not flags.sharpness:
        raise UserError(f"--{next(iter(given))} goes with --sharpness; add it")
    environment.set_up()
    damaged: list[str] = []
    workdirs = _workdirs(flags.workdir, damaged)
    if flags.sharpness:
        return _sharpness(workdirs, damaged, flags, given)
    folder = next((each for each in flags.workdir if each not in workdirs), None)
    if folder or len(workdirs) > 1:
        what = f"{folder} is a folder of runs" if folder else "several runs are given"
        raise UserError(
            f"{what}, and one is evaluated at a time; name it, as --workdir={workdirs[0]}, or "
            "measure all with --sharpness"
        )
    return _evaluate(workdirs[0], flags)


def _workdirs(given: list[epath.Path], damaged: list[str]) -> list[epath.Path]:
    """The work directories that are given, and those in folders of runs that can be read."""
    # Here, since NumPy is slow to import.
    from gnp.analysis import comparison, runs

    found: dict[epath.Path, None] = {}
    for folder in given:
        if runs.is_workdir(folder) or not folder.is_dir():
            found[folder] = None
        else:
            problems: list[str] = []
            try:
                found |= dict.fromkeys(run.workdir for run in comparison.find([folder], problems))
            except UserError as error:
                if len(given) == 1:
                    raise
                problems = problems or [str(error)]
            damaged += problems
    return list(found)


def _config(workdir: epath.Path, flags: argparse.Namespace) -> ConfigDict:
    config = config_of(workdir)
    if flags.data_dir:
        config.data.data_dir = flags.data_dir
    return config


def _evaluate(workdir: epath.Path, flags: argparse.Namespace) -> int:
    # Here, since JAX is slow to import.
    from gnp.training.evaluation import evaluate_checkpoint, find_step
    from gnp.training.metrics import headline, text

    config = _config(workdir, flags)
    step = find_step(config, workdir, flags.step)
    values = evaluate_checkpoint(config, workdir, step=step)
    if flags.json:
        print(json.dumps(values))
        return 0
    print(f"{workdir}, step {values['step']}")
    for split, of_split in values.items():
        if not isinstance(of_split, dict):
            continue
        more = ""
        if "top5_error" in of_split:
            more = f"top-5 error {text(of_split['top5_error'], '.2%')}, "
        if "ema_error" in of_split and "perplexity" not in of_split:
            more += f"of the average {text(of_split['ema_error'], '.2%')}, "
        print(
            f"{split:>6}: {' '.join(headline(of_split))}, {more}"
            f"loss {text(of_split['loss'], '.4f')}, "
            f"gradient norm {text(of_split['grad_norm'], '.4g')} "
            f"({of_split['num_examples']:,} {values['unit']}s)"
        )
    return 0


def _sharpness(
    workdirs: Sequence[epath.Path],
    damaged: Sequence[str],
    flags: argparse.Namespace,
    given: dict[str, Any],
) -> int:
    """Measures runs one after another; one that cannot be does not keep the others from it."""
    from gnp.analysis.measures import Settings, without_nan

    settings = Settings(**given)
    rows: list[dict[str, Any]] = []
    for line in damaged:
        print(f"error: {line}", file=sys.stderr, flush=True)
    failed, total = len(damaged), len(workdirs) + len(damaged)
    for workdir in workdirs:
        try:
            of_run = _measure(workdir, flags, settings)
            rows += [{"workdir": str(workdir), **row} for row in of_run]
        except UserError as error:
            if total == 1:
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)
            failed += 1
    if flags.json:
        print(json.dumps(without_nan(rows)))
    if failed:
        print(f"{failed} of {total} runs could not be measured", file=sys.stderr)
    return 1 if failed else 0


def _measure(
    workdir: epath.Path, flags: argparse.Namespace, settings: "Settings"
) -> list[dict[str, Any]]:
    """Measures a run's checkpoints, and prints a table of them unless JSON is asked for."""
    from tqdm import tqdm

    from gnp.analysis.checkpoint_measures import measure_checkpoints
    from gnp.analysis.measures import NAME
    from gnp.training.evaluation import find_step

    config = _config(workdir, flags)
    steps = None
    if flags.step not in (None, "all"):
        step = find_step(config, workdir, flags.step)
        assert step is not None
        steps = [step]
    bar = tqdm(disable=not sys.stderr.isatty(), unit="pass", dynamic_ncols=True, leave=False)

    def on_start(step: int, num_passes: int) -> None:
        bar.reset(num_passes)
        bar.set_description(f"step {step}")
        if bar.disable:
            print(f"measuring step {step}: {num_passes} passes", file=sys.stderr, flush=True)

    rows: list[dict[str, Any]] = []
    with bar:
        for row in measure_checkpoints(
            *(config, workdir, settings), steps=steps, on_start=on_start, on_pass=bar.update
        ):
            if not flags.json:
                if not rows:
                    bar.write(f"{workdir}, {row['num_examples']:,} examples of {row['split']}")
                bar.write("\n".join(_table(row, first=not rows)))
                sys.stdout.flush()
            rows.append(row)
    if not flags.json:
        print(f"kept in {workdir / NAME}", flush=True)
    return rows


def _table(row: dict[str, Any], *, first: bool) -> list[str]:
    """The lines of a table for a row of measures, with its head if it is the first."""
    values, errors = row["eigenvalues"], row["eigenvalue_errors"]
    count = row["settings"]["eigenvalues"]
    last = _with_error(*values[-1:], *errors[-1:])
    columns = [
        ("step", f"{row['step']}", 8),
        ("epoch", f"{row['epoch']:.4g}", 8),
        ("loss", f"{row['loss']:.4f}", 8),
        ("‖∇L‖", f"{row['grad_norm']:.4g}", 10),
        ("‖θ‖", f"{row['weight_norm']:.4g}", 8),
        ("λ₁", _with_error(*values[:1], *errors[:1]), 18),
        *[(f"λ{str(count).translate(_SUBSCRIPTS)}", last, 18)] * (count > 1),
        ("trace", _with_error(row["trace"], row["trace_error"]), 18),
        (f"SAM {row['radius']:g}", f"{row['sam_sharpness']:.4g}", 12),
    ]
    head = "".join(f"{name:>{width}}" for name, _, width in columns)
    line = "".join(f"{text:>{width}}" for _, text, width in columns)
    return [head, line] if first else [line]


def _with_error(value: float = math.nan, error: float = math.nan) -> str:
    return f"{value:.4g}" + ("" if math.isnan(error) else f" ± {error:.1g}")


if __name__ == "__main__":
    run(main)
