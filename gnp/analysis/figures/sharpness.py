"""Figures of what `python -m gnp.evaluate --sharpness` has measured along runs.

Everything here reads the runs' `sharpness.jsonl` (see `gnp.analysis.measures`). The measures of one
data set and model are only shown together if they were measured alike: over as many examples, with
the same radius, …. Of several settings that all its runs were measured with, a figure shows those
of most rows, of these the newest; where there are none it raises `UserError`. A run whose file is
damaged is left out.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from gnp.analysis.comparison import Setting
from gnp.analysis.figures import many_runs, settings
from gnp.analysis.figures.many_runs import Curve
from gnp.analysis.figures.style import color_ticks, styled
from gnp.analysis.runs import Run, number
from gnp.errors import UserError

_Row = dict[str, Any]  # of sharpness.jsonl

# The settings that a measure depends on, beside the seed.
_DEPENDS: dict[str, tuple[str, ...]] = {
    "eigenvalues": ("max_examples", "lanczos_steps"),
    "density": ("max_examples", "lanczos_steps", "density_probes"),
    "sam_sharpness": ("max_examples", "radius", "ascents"),
    "surface": ("max_examples",),
    "adaptive_lr_variance": (),
    "adaptive_lr_spread": (),
}
_ASK = {"surface": " --surface=21"}  # what is only measured if it is asked for


@styled
def hessian_eigenvalues(runs: Sequence[Run]) -> Figure:
    """The largest eigenvalues of the Hessian by rank, as in Figures 6 and 8 of the SWD paper.

    Of each run those of its last measured checkpoint; seeds as mean ± one sample standard
    deviation, of as many eigenvalues as all of them have.

    Raises:
      UserError: if no run has any.
    """
    rows = _measured(runs, "eigenvalues")

    def by_rank(setting: Setting) -> list[Curve]:
        values = [np.array(rows[id(run)][-1]["eigenvalues"]) for run in setting.runs]
        count = min(map(len, values))
        ranks = np.arange(1, count + 1)
        return many_runs.of_seeds([(ranks, each[:count]) for each in values])

    shown = [run for run in runs if id(run) in rows]
    figure = many_runs.draw_settings(shown, by_rank, "rank", "eigenvalue of the Hessian")
    for axes in figure.axes:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    return figure


@styled
def spectral_density(runs: Sequence[Run]) -> Figure:
    """The density of the Hessian's eigenvalues on a logarithmic axis, a line a run.

    Of each run that of its last measured checkpoint.

    Raises:
      UserError: if no run has one.
    """
    rows = _measured(runs, "density")
    shown = [run for run in runs if id(run) in rows]
    found, note = settings.best(settings.of(shown))
    look, by_panel = settings.looks(found), settings.panels(shown)
    figure, places = many_runs.grid(list(by_panel))
    entries: many_runs.Entries = {}
    for axes, inner in zip(places, by_panel.values(), strict=True):
        peak = 0.0
        for setting in found:
            for run in settings.inside(setting, inner):
                density = rows[id(run)][-1]["density"]
                heights = np.array(density["density"], np.float64)
                heights = np.where(heights > 0, heights, np.nan)  # 0 has no place
                if np.isfinite(heights).any():
                    peak = max(peak, np.nanmax(heights))
                style = {**look[setting.label], "marker": "none", "linewidth": 1.2}
                (line,) = axes.plot(density["eigenvalue"], heights, **style)
                entries[setting.label] = line
        axes.set(xlabel="eigenvalue of the Hessian", ylabel="density", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        if peak > 0:  # far below, quadrature tells nothing
            axes.set_ylim(1e-6 * peak, 3 * peak)
    many_runs.legend(figure, many_runs.in_order(entries, found), note)
    return figure


@styled
def sam_sharpness(runs: Sequence[Run]) -> Figure:
    """The sharpness max L(θ + ε) − L(θ), ‖ε‖ ≤ ρ, along training.

    Raises:
      UserError: if no run has it.
    """
    return _along_training(runs, "sam_sharpness", "max L(θ + ε) − L(θ)")


@styled
def adaptive_lr_variance(runs: Sequence[Run]) -> Figure:
    """The variance of the adaptive learning rate ψ over the parameters along training.

    What Figure 3 of the GR paper tells in theory, measured.

    Raises:
      UserError: if no run has it.
    """
    return _along_training(runs, "adaptive_lr_variance", "variance of ψ = 1/√v̂")


@styled
def adaptive_lr_spread(runs: Sequence[Run]) -> Figure:
    """The 95th over the 5th percentile of the adaptive learning rate ψ along training.

    Unlike the variance it is not moved by the few parameters that have no gradient but rounding.

    Raises:
      UserError: if no run has it.
    """
    return _along_training(runs, "adaptive_lr_spread", "95th / 5th percentile of ψ = 1/√v̂")


@styled
def loss_surface(runs: Sequence[Run]) -> Figure:
    """The training loss around the parameters along two random, filter-normalised directions.

    A panel a setting: of its first run that has a surface that of the last checkpoint. The bands
    are the same in all panels; the cross is the parameters.

    Reference: Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018.

    Raises:
      UserError: if no run has a surface.
    """
    last = {run: rows[-1]["surface"] for run, rows in _measured(runs, "surface").items()}
    shown = [run for run in runs if id(run) in last and np.isfinite(last[id(run)]["loss"]).any()]
    if not shown:
        raise UserError("the loss surfaces of these runs have no finite value")
    found, note = settings.best(settings.of(shown, across=()))
    surfaces = [last[id(setting.runs[0])] for setting in found]
    losses = [np.array(surface["loss"]) for surface in surfaces]
    finite = np.concatenate([loss[np.isfinite(loss)] for loss in losses])
    low, high = finite.min(), finite.max()
    high = max(high, low + 1e-4 * abs(low) + 1e-9)  # where all are equal
    log = bool(low > 0 and high > 10 * low)
    levels = np.geomspace(low, high, 15) if log else np.linspace(low, high, 15)
    figure, places = many_runs.grid([s.label if len(found) > 1 else "" for s in found])
    for axes, surface, loss in zip(places, surfaces, losses, strict=True):
        bands = axes.contourf(
            *(surface["x"], surface["y"], np.ma.masked_invalid(loss)),
            levels=levels,
            norm="log" if log else "linear",
            cmap="cividis",
        )
        axes.plot(0, 0, "x", color="white", markersize=8, markeredgewidth=2)
        axes.set(xlabel="first direction", ylabel="second direction", aspect="equal")
        axes.grid(visible=False)
    bar = figure.colorbar(bands, ax=places, format="{x:g}", ticks=color_ticks(low, high, log=log))
    bar.set_label("training loss")
    if note:
        figure.suptitle(note)
    return figure


def _measured(runs: Sequence[Run], key: str) -> dict[int, list[_Row]]:
    """Of each step the newest row that has a measure, in their order, by the run's id.

    Raises:
      UserError: if no run has one, or some that are shown together were not measured alike.
    """
    found = {
        run_id: [by_step[step] for step in sorted(by_step)]
        for inner in settings.panels(runs).values()
        for run_id, by_step in _measured_alike(inner, key).items()
    }
    if not found:
        raise UserError(
            f"the runs have no measured {key.replace('_', ' ')}; measure with "
            "python -m gnp.evaluate --workdir=DIR --sharpness" + _ASK.get(key, "")
        )
    return found


def _measured_alike(runs: Sequence[Run], key: str) -> dict[int, dict[int, _Row]]:
    """The rows that have a measure by the run's id and the step, all of the same settings."""
    from gnp.analysis import measures

    names, workdirs = _DEPENDS[key], {}
    damaged: list[UserError] = []
    by_values: dict[tuple[Any, ...], dict[int, dict[int, _Row]]] = {}
    for run in runs:
        try:
            measured = measures.current(run.workdir)
        except UserError as error:  # it keeps no other run from being shown
            damaged.append(error)
            continue
        for row in measured:
            if _has(row[key]):
                workdirs[id(run)] = run.workdir
                values = tuple(row["settings"].get(name) for name in names)
                by_values[values] = by_values.pop(values, {})  # the newest are the last
                by_values[values].setdefault(id(run), {})[row["step"]] = row
    if not by_values and damaged:
        raise damaged[0]
    if not by_values:
        return {}

    def size(values: tuple[Any, ...]) -> tuple[int, int]:
        return len(by_values[values]), sum(map(len, by_values[values].values()))

    most = max(reversed(by_values), key=size)
    others = [workdir for run_id, workdir in workdirs.items() if run_id not in by_values[most]]
    if others:
        given = dict(zip(names, most, strict=True))
        flags = "".join(f" --{name}={value}" for name, value in given.items() if value is not None)
        raise UserError(
            f"the {key.replace('_', ' ')} of {others[0]} and of "
            f"{workdirs[next(iter(by_values[most]))]} were measured with different settings; "
            f"measure with python -m gnp.evaluate --workdir={others[0]} --sharpness{flags}"
            + _ASK.get(key, "")
        )
    return by_values[most]


def _has(value: Any) -> bool:
    """Whether a measure is there: a finite number, a list, lists of more than a point."""
    if isinstance(value, dict):
        return all(len(numbers) > 1 for numbers in value.values())
    return bool(value) if isinstance(value, list) else bool(np.isfinite(number(value)))


def _along_training(runs: Sequence[Run], key: str, ylabel: str) -> Figure:
    rows = _measured(runs, key)

    def values(setting: Setting) -> list[Curve]:
        of = [np.array([(row["epoch"], row[key]) for row in rows[id(run)]]) for run in setting.runs]
        return many_runs.of_seeds([(seed[:, 0], seed[:, 1]) for seed in of])

    shown = [run for run in runs if id(run) in rows]
    return many_runs.draw_settings(shown, values, "epoch", ylabel)
