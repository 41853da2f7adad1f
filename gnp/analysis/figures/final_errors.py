"""Figures of final errors over hyperparameters and over training losses, of both papers' kinds.

Reference: Xie et al., "On the Overlooked Pitfalls of Weight Decay and How to Mitigate Them: A
Gradient-Norm Perspective", NeurIPS 2023 (arXiv:2011.11152).
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.tri import Triangulation

from gnp.analysis import comparison, labels
from gnp.analysis.comparison import Setting
from gnp.analysis.figures import many_runs, settings
from gnp.analysis.figures.settings import PANEL, Look
from gnp.analysis.figures.style import (
    COLORS,
    MARKERS,
    VERMILION,
    color_ticks,
    label_decades,
    styled,
)
from gnp.analysis.runs import Run, number
from gnp.errors import UserError

_Key = TypeVar("_Key", bound=Hashable)

_LEAST_VALUES = 3  # of a number that is worth an axis
_LOGARITHMIC = 20  # times the least value, from which the axis is
_MOST_PANELS = 9

# What marks a point of which seeds diverged.
_CROSS: dict[str, Any] = {
    **{"color": VERMILION, "marker": "x", "linestyle": "none", "clip_on": False},
    **{"markersize": 9, "markeredgewidth": 2.5, "zorder": 5},
}


@styled
def error_against_decay(runs: Sequence[Run]) -> Figure:
    """The final test error against the strength of the decay, as in Figures 10 and 16.

    A line is an optimizer, a kind of decay, …; horizontal ones are of runs without decay. Of
    strengths with a cross some seeds diverged, and the mean is of the others; at the upper edge all
    did.

    Raises:
      UserError: if no data set and model has finished runs of two strengths above 0.
    """
    runs = settings.ended(runs, "the error against weight decay")
    by_panel = {
        name: inner
        for name, inner in settings.panels(runs).items()
        if len({*map(_strength, settings.survivors(inner))} - {0.0}) > 1
    }
    if not by_panel:
        raise UserError(
            "the error against weight decay needs finished runs with two strengths or more "
            "(weight_decay.value above 0) on one data set and model"
        )
    shown = [run for inner in by_panel.values() for run in inner]
    found, note = settings.best(settings.of(shown, (*PANEL, "weight_decay.value")))
    look = settings.looks(found)
    figure, places = many_runs.grid(list(by_panel))
    entries: many_runs.Entries = {}
    for axes, inner in zip(places, by_panel.values(), strict=True):
        for setting in found:
            members = settings.inside(setting, inner)
            by_strength = _finals(members, _strength)
            lost = _lost(members, _strength)
            style = look[setting.label]
            if without := by_strength.pop(0.0, None):
                entries[setting.label] = axes.axhline(
                    float(np.mean(without)), **{**style, "marker": "none", "linewidth": 1.2}
                )
            if by_strength:
                strengths = sorted(by_strength)
                seeds = [by_strength[strength] for strength in strengths]
                means = np.array([np.mean(values) for values in seeds])
                std = np.array([np.std(v, ddof=1) if len(v) > 1 else np.nan for v in seeds])
                entries[setting.label] = axes.errorbar(
                    np.array(strengths), means, yerr=std, **style
                )
            for strength in {*lost} - {0.0}:
                here = by_strength.get(strength)
                units = axes.transData if here else axes.get_xaxis_transform()
                axes.plot(
                    strength,
                    np.mean(here or 1),
                    transform=units,
                    **_CROSS | {"color": style["color"]},
                )
        axes.set(xlabel="weight decay λ", ylabel=settings.metric_label(settings.survivors(inner)))
        _log_x(axes, [_strength(run) for run in inner])
    many_runs.legend(figure, many_runs.named(entries, found), note)
    return figure


@styled
def error_over_lr_and_decay(runs: Sequence[Run]) -> Figure:
    """The final test error over learning rate and weight decay, as in Figure 11.

    A panel is an optimizer, a kind of decay, …; the surface is linear between the points that were
    measured, each the mean over its seeds. At crosses seeds diverged, as many as stand beside them;
    the mean is of the others. The star is the least of the points without a cross.

    Raises:
      UserError: if no optimizer has finished runs of two learning rates with two strengths each.
    """
    ended = settings.ended(runs, "the error over learning rate and weight decay")
    means: dict[str, dict[tuple[float, float], float]] = {}
    lost: dict[str, dict[tuple[float, float], str]] = {}
    found, note = settings.best(settings.of(ended, ("lr.base", "weight_decay.value")))
    for setting in found:
        finals = _finals(setting.runs, _rate_and_strength)
        points = {point: float(np.mean(v)) for point, v in finals.items() if min(point) > 0}
        if _spans_a_surface(list(points)):
            means[setting.label] = points
            crosses = _lost(setting.runs, _rate_and_strength)
            lost[setting.label] = {at: num for at, num in crosses.items() if min(at) > 0}
    if not means:
        raise UserError(
            "the error over learning rate and weight decay needs finished runs on a grid of two of "
            "each or more (lr.base, weight_decay.value above 0)"
        )
    figure, places = many_runs.grid(list(means) if len(means) > 1 else [note])
    together = np.concatenate([list(points.values()) for points in means.values()])
    low, high = float(together.min()), float(together.max())
    high = max(high, low + 1e-4 * abs(low) + 1e-9)  # where all are equal
    colors: dict[str, Any] = {"cmap": "cividis", "vmin": low, "vmax": high}
    entries: many_runs.Entries = {}
    for axes, (label, points) in zip(places, means.items(), strict=True):
        x, y = np.array(list(points)).T
        z = np.array(list(points.values()))
        mesh = Triangulation(x, y, Triangulation(np.log(x), np.log(y)).triangles)
        bands = axes.tricontourf(mesh, z, levels=np.linspace(low, high, 13), **colors)
        dots: dict[str, Any] = {
            "s": 36,
            "edgecolors": "white",
            "linewidths": 1,
            "zorder": 3,
            "clip_on": False,
        }
        axes.scatter(x, y, c=z, **dots, **colors)
        if whole := {at: mean for at, mean in points.items() if at not in lost[label]}:
            star: dict[str, Any] = {"color": "white", "markersize": 17, "markeredgecolor": "black"}
            axes.plot(*min(whole, key=whole.__getitem__), "*", **star, zorder=4, clip_on=False)
        for point, num in lost[label].items():
            (entries["so many of the seeds diverged"],) = axes.plot(*point, **_CROSS)
            beside = axes.annotate(num, point, (7, 3), textcoords="offset points", color="white")
            beside.set_path_effects([patheffects.withStroke(linewidth=2.4, foreground="black")])
        axes.set(xlabel="learning rate", ylabel="weight decay λ", yscale="log")
        _log_x(axes, x)
        label_decades(axes, "y", np.log10(y.max() / y.min()))
        axes.grid(visible=False)
    bar = figure.colorbar(bands, ax=places, format="{x:g}", ticks=color_ticks(low, high))
    bar.set_label(settings.metric_label(settings.survivors(ended)))
    many_runs.legend(figure, entries)
    return figure


@styled
def loss_against_error(runs: Sequence[Run]) -> Figure:
    """Final training loss against final test error, a point a run, as in Figures 15 and 19.

    Of settings with equal training losses the lower ones generalise better. The legend says how
    many runs of a setting diverged; they have no point.

    Raises:
      UserError: if no run came to its end with both finite.
    """
    ended = settings.ended(runs, "the training loss against the test error")
    drawn = [r for r in settings.survivors(ended) if np.isfinite(r.final("train", "loss"))]
    if not drawn:
        raise UserError("this figure needs finished runs with a finite training loss")
    found, note = settings.best(settings.of(ended))
    look = settings.looks(found)
    by_panel = settings.panels(drawn)
    figure, places = many_runs.grid(list(by_panel))
    entries: many_runs.Entries = {}
    for axes, inner in zip(places, by_panel.values(), strict=True):
        for setting in found:
            seeds = settings.inside(setting, inner)
            losses = [run.final("train", "loss") for run in seeds]
            errors = [settings.final(run) for run in seeds]
            style = {**look[setting.label], "linestyle": "none", "markersize": 7, "alpha": 0.8}
            (entries[setting.label],) = axes.plot(losses, errors, **style)
        axes.set(xlabel="training loss", ylabel=settings.metric_label(inner))
        losses = [run.final("train", "loss") for run in inner]
        if min(losses) > 0 and max(losses) > 10 * min(losses):
            _log_x(axes, losses)
    many_runs.legend(figure, many_runs.named(entries, found), note)
    return figure


@styled
def error_against_searched(runs: Sequence[Run]) -> Figure:
    """The final test error against each number that differs, as after a search; a point a setting.

    A point is the mean over the seeds; of those with a cross some diverged, and the mean is of the
    others; at the upper edge all did. Its colour is what of the setting is no number, as the
    policy. Each panel has all settings that use its number, whose other numbers differ too.

    Raises:
      UserError: if no number of a configuration has three values or more on one data set and model.
    """
    ended = settings.ended(runs, "the error against what was searched")
    panels = [
        (title, field, found)
        for title, inner in settings.panels(ended).items()
        if settings.survivors(inner)
        for found in [comparison.group(inner)]
        for field in found[0].values
        if len({_number(setting, field) for setting in found} - {None}) >= _LEAST_VALUES
    ]
    drawn = panels[:_MOST_PANELS]
    if not drawn:
        raise UserError(
            "the error against what was searched needs finished runs of three values or more of a "
            "number, as lr.base, on one data set and model"
        )
    kinds = list(dict.fromkeys(_kind(setting) for *_, found in drawn for setting in found))
    kinds = kinds if len(kinds) <= len(COLORS) else []
    figure, places = many_runs.grid([title for title, *_ in drawn])
    entries: many_runs.Entries = {}
    for axes, (_, field, found) in zip(places, drawn, strict=True):
        known = [(setting, x) for setting in found if (x := _number(setting, field)) is not None]
        for setting, x in known:
            seeds = settings.survivors(setting.runs)
            mean = float(np.mean([settings.final(run) for run in seeds])) if seeds else np.nan
            index = kinds.index(_kind(setting)) if kinds else 0
            look: Look = {"color": COLORS[index], "marker": MARKERS[index], "linestyle": "none"}
            (point,) = axes.plot(x, mean, alpha=0.8, **look)
            if len(kinds) > 1:
                entries.setdefault(kinds[index], point)
            if len(seeds) < len(setting.runs):
                units = axes.transData if seeds else axes.get_xaxis_transform()
                (cross,) = axes.plot(x, mean if seeds else 1, transform=units, **_CROSS)
                entries["seeds diverged"] = cross
        shown = settings.survivors(run for setting in found for run in setting.runs)
        axes.set(xlabel=field, ylabel=settings.metric_label(shown))
        values = [x for _, x in known]
        if min(values) > 0 and max(values) >= _LOGARITHMIC * min(values):
            _log_x(axes, values)
    note = f"{len(drawn)} of {len(panels)} numbers" if len(drawn) < len(panels) else ""
    many_runs.legend(figure, entries, note)
    return figure


def _number(setting: Setting, field: str) -> float | None:
    """The setting's value of a field; None where it is no number."""
    value = setting.values[field]
    return float(value) if isinstance(value, int | float) and type(value) is not bool else None


def _kind(setting: Setting) -> str:
    """What is no number in a setting, as "gr zero"."""
    return labels.label({name: x for name, x in setting.values.items() if isinstance(x, str)})


def _strength(run: Run) -> float:
    """λ of the weight decay; 0 where there is none."""
    if run.setting("weight_decay.kind") in (None, "none"):
        return 0.0
    return number(run.setting("weight_decay.value"))


def _rate_and_strength(run: Run) -> tuple[float, float]:
    return number(run.setting("lr.base")), _strength(run)


def _finals(runs: Iterable[Run], key: Callable[[Run], _Key]) -> dict[_Key, list[float]]:
    """The final errors by a key of the runs, without those that diverged."""
    values: dict[_Key, list[float]] = {}
    for run in settings.survivors(runs):
        values.setdefault(key(run), []).append(settings.final(run))
    return values


def _lost(runs: Iterable[Run], key: Callable[[Run], _Key]) -> dict[_Key, str]:
    """How many diverged by a key of the runs, of those keys only where any did."""
    by_key: dict[_Key, list[Run]] = {}
    for run in runs:
        by_key.setdefault(key(run), []).append(run)
    return {each: num for each, seeds in by_key.items() if (num := settings.diverged(seeds))}


def _spans_a_surface(points: Sequence[tuple[float, float]]) -> bool:
    """Whether the points, on logarithmic axes, do not lie in one line."""
    if len(points) < 3:
        return False
    offsets = np.log(points) - np.log(points[0])
    return bool(np.linalg.matrix_rank(offsets, tol=1e-6) == 2)


def _log_x(axes: Axes, values: Iterable[float]) -> None:
    """A logarithmic axis for the values above 0, if there are any."""
    positive = [value for value in values if value > 0]
    if positive:
        axes.set_xscale("log")
        label_decades(axes, "x", np.log10(max(positive) / min(positive)))
