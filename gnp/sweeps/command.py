"""From the flags of `gnp.sweep` to the table at its end."""

import argparse
import pathlib
import sys
import time
from collections.abc import Sequence

from gnp.errors import UserError
from gnp.files import is_remote
from gnp.sweeps import directory, runner, slots, slurm, summary
from gnp.sweeps.display import Display
from gnp.sweeps.jobs import Grid, Source
from gnp.sweeps.parameters import parse_grid, parse_search, parse_seeds
from gnp.sweeps.processes import Pool
from gnp.sweeps.trials import Recipe, Trial, product, resolve, shell

_WAIT_SECONDS = 0.5  # between two looks whether other processes have ended


def sweep(flags: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Runs a sweep, or goes on with it.

    Args:
      flags: those of `gnp.sweep`.
      overrides: pairs of field and text that all trials share.

    Returns:
      The exit code: 1 if a trial failed, 130 after Ctrl-C, 75 after SIGTERM.

    Raises:
      UserError: for flags, fields, configurations and a directory that are wrong, before the first
        trial starts. What a trial alone finds out (its data are not there, Weights & Biases is not
        logged in to) ends that trial, which says so.
    """
    if is_remote(flags.out):
        raise UserError(f"--out={flags.out}: a sweep's directory is a local one")
    out = pathlib.Path(flags.out)
    recipe = Recipe.parse(flags.config, overrides)
    log = recipe.load().log
    if log.wandb is not None and log.group is None:
        recipe = Recipe.parse(flags.config, [*overrides, ("log.group", out.absolute().name)])
    seeds = None if flags.seeds is None else parse_seeds(flags.seeds)
    if flags.search is not None:
        return _search(flags, out, recipe, seeds)
    values, arguments = resolve(recipe, parse_grid(flags.grid or []))
    trials = product(recipe, values, arguments, seeds)
    metric = summary.choose_metric(flags.metric, trials[0].config)
    here = directory.asked(
        recipe,
        kind="grid",
        parameters=values,
        seeds=sorted({trial.seed for trial in trials}),
        metric=metric,
    )
    is_array = flags.launcher == "slurm"
    options = slurm.parse(flags.sbatch or "")
    places = [] if is_array else slots.make(flags.jobs or 1, flags.devices)
    if flags.vmap:
        places = slots.with_one_device(places)
    directory.make(out)
    with directory.hold(out):
        directory.claim(out, here)
        directory.check(out, trials)
        if not is_array:
            _wait_for_others(out, trials, [] if flags.vmap else places)
        grid = Grid(out, trials, metric)
        if is_array:
            return _write_array_job(out, grid, options, flags.jobs)
        _say(f"{len(trials)} trials, judged by {metric}")
        if flags.vmap:
            _say(f"{len(grid.unfinished)} to train in {grid.train_together(places[0])} programs")
        return _run(flags, out, grid, Pool(places), metric)


def _search(
    flags: argparse.Namespace, out: pathlib.Path, recipe: Recipe, seeds: Sequence[int] | None
) -> int:
    from gnp.sweeps import search  # here, since only this needs Optuna

    space = parse_search(flags.search)
    space, arguments, seeds = search.check(recipe, space, seeds)
    metric = summary.choose_metric(flags.metric, recipe.load())
    here = directory.asked(
        recipe,
        kind="search",
        parameters={name: x.text for name, x in space.items()},
        seeds=seeds,
        metric=metric,
    )
    places = slots.make(flags.jobs or 1, flags.devices)
    directory.make(out)
    with directory.hold(out):
        directory.claim(out, here)
        _wait_for_others(out)
        source = search.Search(
            *(out, recipe, space, arguments, seeds, metric),
            num_settings=flags.trials or 20,
            sampler=flags.sampler or "tpe",
            sampler_seed=flags.sampler_seed or 0,
            prune=flags.prune or "none",
        )
        _say(f"{flags.trials or 20} settings × {len(seeds)} seeds, judged by {metric}")
        if flags.metric is None and metric.startswith("test/"):
            _say(
                "the test set chooses the settings, whose error on it is then too low; to have a "
                "part of the training set choose them: --config.data.train=train[:90%] "
                "--config.data.validation=train[90%:]"
            )
        return _run(flags, out, source, Pool(places), metric)


def _wait_for_others(
    out: pathlib.Path, trials: Sequence[Trial] = (), places: Sequence[slots.Slot] = ()
) -> None:
    """Waits for what a sweep that was killed has left running: it goes on to its end.

    Not for one of these trials on one of these places, which it keeps while others run beside it.
    """
    names, said = {trial.name for trial in trials}, False
    while others := [
        name
        for name, process in directory.in_training(out).items()
        if name not in names or not any(place.holds(process) for place in places)
    ]:
        if not said:
            _say(f"other processes train {', '.join(others)}; waiting for their end")
        said = True
        time.sleep(_WAIT_SECONDS)


def _write_array_job(
    out: pathlib.Path, grid: Grid, options: slurm.Options, at_once: int | None
) -> int:
    if not grid.unfinished:
        print("all trials are done")
        return 0
    script = slurm.write(out, grid.unfinished, options, at_once=at_once)
    print(f"an array job of {len(grid.unfinished)} trials; to submit it:")
    print(f"  {shell(['sbatch', str(script)])}")
    return 0


def _run(
    flags: argparse.Namespace, out: pathlib.Path, source: Source, pool: Pool, metric: str
) -> int:
    """Runs what is not done and tells how it ended."""
    code = runner.run(source, pool, Display(metric), out, metric)
    lines = source.lines()
    if any(line.values for line in lines):
        print(summary.table(lines, metric))
    count = {state: number for state, number in source.count().items() if number}
    print(", ".join(f"{number} {state}" for state, number in count.items()))
    if code:
        _say(f"stopped; to go on:\n  {shell(sys.orig_argv)}")
        return code
    if source.failed:
        print(f"failed: {'; '.join(source.failed)}")
    if count.get("failed"):
        print(source.advice())
    report = out / "report"
    if flags.report and count.get("done"):
        from gnp.report import write_comparison  # here, since only this needs it

        print(f"report: {write_comparison([out], report)}")
    elif count.get("done"):
        print(f"report: {shell(['python', '-m', 'gnp.report', str(out), f'--out={report}'])}")
    return 1 if count.get("failed") else 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
