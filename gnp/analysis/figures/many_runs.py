"""What the figures of many runs share: mean and band, a grid of panels, the legend.

The seeds of a setting are drawn as their mean in a band of ± one sample standard deviation, at the
x that all have; where they have too few in common, as when some were evaluated or measured at other
epochs, each is a thin line of its own. Metrics of batches with many rows are drawn as running
means, which the axis says; the last values in a legend are those that were logged.
"""

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gnp.analysis.comparison import Setting, has_diverged, has_finished
from gnp.analysis.figures import settings
from gnp.analysis.figures.one_run import MANY, NOISY, running_mean
from gnp.analysis.figures.settings import Look
from gnp.analysis.figures.style import drawn_values, ink, label_decades, scale_y
from gnp.analysis.runs import Run
from gnp.errors import UserError, printable

Entries = dict[str, Artist | Container]  # of a legend: what it shows by its label

_SMOOTH = f"\n(running mean if > {MANY} rows)"
_LONGEST = 110  # characters of a label
_CHARACTER = 0.083  # inches of one, on average


class Curve(NamedTuple):
    """A metric through training: the mean over seeds, or one seed's.

    Attributes:
      x: the epochs, say.
      mean: over the seeds, NaN where one of them has no finite value.
      std: the sample standard deviation, None of one seed.
      last: the last value of each seed.
      smooth: whether `mean` and `std` are of running means, which `last` never is.
    """

    x: np.ndarray
    mean: np.ndarray
    std: np.ndarray | None
    last: np.ndarray
    smooth: bool


def curves(setting: Setting, split: str, key: str, scale: float = 1.0) -> list[Curve]:
    """The curves of a setting's seeds that have a value of the metric; see `of_seeds`."""
    seeds = []
    for run in (run for run in setting.runs if run.has(split, key)):
        epochs, values = run.series(split, key)
        if split == "train" and len(epochs) > 2:
            last, before = np.diff(epochs)[:-3:-1]
            if last < before / 2:  # the mean of the few steps that were left, and as noisy
                epochs, values = epochs[:-1], values[:-1]
        seeds.append((epochs, np.where(np.isfinite(values), scale * values, np.nan)))
    return of_seeds(seeds, smooth=split == "train" and key in NOISY)


def of_seeds(
    seeds: Sequence[tuple[np.ndarray, np.ndarray]], *, smooth: bool = False
) -> list[Curve]:
    """The curve of the seeds' mean where they have values at the same x; else one of each.

    It is the mean where at least half of the x that a seed has are those of all.

    Args:
      seeds: x and the values of each.
      smooth: whether curves of more than `MANY` points become running means over a fortieth.
    """
    by_x = [
        {round(float(x), 6): y for x, y in zip(xs, values, strict=True)} for xs, values in seeds
    ]
    if not by_x:
        return []
    common = set.intersection(*map(set, by_x))
    alike = 2 * len(common) >= max(map(len, by_x))
    found = []
    for group in [by_x] if alike else [[seed] for seed in by_x]:
        xs = sorted(common if alike else group[0])
        values = np.array([[seed[x] for x in xs] for seed in group])
        last, is_smooth = values[:, -1], smooth and len(xs) > MANY
        if is_smooth:
            values = np.array([running_mean(row, len(xs) // 40) for row in values])
        std = values.std(axis=0, ddof=1) if len(values) > 1 else None
        found.append(Curve(np.array(xs), values.mean(axis=0), std, last, is_smooth))
    return found


def grid(titles: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A figure with a panel a title, side by side in up to three columns."""
    columns = min(len(titles), 2 if len(titles) == 4 else 3)
    rows = -(-len(titles) // columns)
    width, height = {1: (6.4, 3.8), 2: (4.6, 3.4)}.get(columns, (3.8, 3.1))
    figure = Figure(figsize=(columns * width, rows * height))
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in places[len(titles) :]:
        axes.remove()
    for axes, title in zip(places, titles, strict=False):
        axes.set_title(wrapped(title, width), loc="left")
    return figure, places[: len(titles)]


def draw(axes: Axes, of: Sequence[Curve], look: Look, index: int = 0) -> Line2D:
    """Draws the curves of a setting and returns the first line.

    A mean is a line in a band of ± one sample standard deviation; of several curves, one a seed,
    the lines are thin. What is smooth says the label of y. Of no curve the line has no point.
    """
    if any(curve.smooth for curve in of) and _SMOOTH not in axes.get_ylabel():
        axes.set_ylabel(axes.get_ylabel() + _SMOOTH)
    thin = {"linewidth": 0.9, "alpha": 0.8} if len(of) > 1 else {}
    lines = [_draw_curve(axes, curve, look | thin, index) for curve in of]
    return lines[0] if lines else axes.plot([], [], **look)[0]


def _draw_curve(axes: Axes, of: Curve, look: Look, index: int) -> Line2D:
    if of.std is not None:
        low, high = of.mean - of.std, of.mean + of.std
        axes.fill_between(of.x, low, high, color=look["color"], alpha=0.2, linewidth=0)
    spacing = max(1, len(of.x) // 8)
    # Markers of close lines lie side by side; of few values each has one, at the edge a whole one.
    few = np.isfinite(of.mean).sum() <= 12
    every = 1 if few else (index % spacing, spacing)
    (line,) = axes.plot(of.x, of.mean, **look, markevery=every, clip_on=not few)
    return line


def finish_curves(axes: Axes) -> None:
    """The scale of y, and limits that hold the lines and the upper edges of the bands."""
    scale_y(axes)
    if axes.get_yscale() == "log":  # where a lower edge near or below 0 has no place
        values = drawn_values(axes)
        paths = [path for band in axes.collections for path in band.get_paths()]
        edges = [np.asarray(path.vertices)[:, 1] for path in paths]
        top = max(values.max(), *(np.max(edge, initial=0) for edge in edges), 0)
        axes.set_ylim(values.min() / 1.2, top * 1.2)
    if axes.get_xscale() == "linear":
        ends = [np.max(line.get_xdata(), initial=0) for line in axes.lines]
        axes.set_xlim(0, max(ends, default=0) or 1)


def shade_warmup(axes: Axes, warmups: Iterable[float]) -> None:
    """Shades the warmup where all runs have the same."""
    lengths = {*warmups}
    if len(lengths) == 1 and (length := lengths.pop()) > 0:
        axes.axvspan(0, length, color=ink(), alpha=0.1, linewidth=0, zorder=0, label="_warmup")


def draw_curves(
    runs: Sequence[Run],
    split: str,
    key: str,
    ylabel: str,
    *,
    scale: float = 1.0,
    warmup: bool = False,
    log_epochs: bool = False,
) -> Figure:
    """A metric against the epoch, a line a setting and a panel a data set and model.

    Runs without a value of the metric are left out, and seeds that are not finished where others
    are; where there is one panel, the legend has the last values. It counts the runs that diverged,
    those before their first value too.

    Raises:
      UserError: if no run has a value of the metric.
    """
    runs = [
        run
        for inner in settings.panels(runs).values()
        if any(run.has(split, key) for run in inner)
        for run in inner
        if run.has(split, key) or has_diverged(run)
    ]
    if not runs:
        raise UserError(f"no run has a value of {split}/{key}")
    unit = "%" if scale == 100 else ""
    figure = draw_settings(
        runs,
        lambda setting: curves(setting, split, key, scale),
        "epoch",
        ylabel,
        last=lambda of: _last(of, unit),
    )
    for axes, inner in zip(figure.axes, settings.panels(runs).values(), strict=True):
        if log_epochs:
            epochs = np.concatenate([np.asarray(line.get_xdata()) for line in axes.lines])
            epochs = epochs[epochs > 0]
            axes.set_xscale("log")
            axes.autoscale(axis="x")
            label_decades(axes, "x", np.log10(epochs.max() / epochs.min()))
        if warmup:
            shade_warmup(axes, [run.gr_warmup for run in inner])
    return figure


def draw_settings(
    runs: Sequence[Run],
    values: Callable[[Setting], list[Curve]],
    xlabel: str,
    ylabel: str,
    *,
    last: Callable[[list[Curve]], str] = lambda _: "",
) -> Figure:
    """A line a setting and a panel a data set and model.

    Args:
      runs: those that have what is to be drawn.
      values: gives the curves of a setting's seeds.
      xlabel: what x is.
      ylabel: what y is.
      last: what the legend says behind a setting where there is one panel.
    """
    found, note = settings.best(settings.of(runs))
    by_panel = settings.panels(runs)
    figure, places = grid(list(by_panel))
    entries: Entries = {}
    suffixes: dict[str, str] = {}
    look = settings.looks(found)
    for axes, inner in zip(places, by_panel.values(), strict=True):
        axes.set(xlabel=xlabel, ylabel=ylabel)
        for index, setting in enumerate(found):
            seeds = settings.complete(settings.inside(setting, inner))
            if seeds:
                of = values(setting._replace(runs=tuple(seeds)))
                entries[setting.label] = draw(axes, of, look[setting.label], index)
                suffixes[setting.label] = last(of) if len(places) == 1 else ""
        finish_curves(axes)
    labelled = {
        _name(setting, suffixes[setting.label]) + left_out(setting): entries[setting.label]
        for setting in found
    }
    legend(figure, labelled, note)
    return figure


def _name(setting: Setting, suffix: str) -> str:
    """What a legend calls a setting; that of one that nothing tells from others, its size."""
    if setting.label == "all" and suffix:
        num = len(setting.runs)
        return f"{num} {'run' if num == 1 else 'runs'}{suffix}"
    return setting.label + suffix


def _last(of: list[Curve], unit: str) -> str:
    """The mean and deviation of the seeds' last values."""
    values = np.concatenate([np.empty(0), *(curve.last for curve in of)])
    if not values.size or not np.isfinite(values).all():
        return ""  # which `left_out` tells
    mean, std = (".2f", ".2f") if unit else (".4g", ".2g")
    spread = f" ± {values.std(ddof=1):{std}}" if values.size > 1 else ""
    return f": {values.mean():{mean}}{spread} {unit}".rstrip()


def named(entries: Entries, found: Sequence[Setting]) -> Entries:
    """The entries in the order of the settings, each with what of it is left out."""
    of = {setting.label: setting for setting in found}
    return {label + left_out(of[label]): x for label, x in in_order(entries, found).items()}


def in_order(entries: Entries, found: Sequence[Setting]) -> Entries:
    """The entries in the order of the settings."""
    labels = [setting.label for setting in found]
    return {label: entries[label] for label in labels if label in entries}


def legend(figure: Figure, entries: Mapping[str, Artist | Container], note: str = "") -> None:
    """A legend under the panels, for which it makes the figure higher; none for "all" alone."""
    if not entries or (list(entries) == ["all"] and not note):
        return
    width, height = figure.get_size_inches()
    labels = [wrapped(label, width - 0.6) for label in entries]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    columns = max(1, min(len(labels), int(width / (longest * _CHARACTER + 0.7))))
    lines = [label.count("\n") + 1 for label in labels]
    rows = -(-len(lines) // columns)
    columns = -(-len(lines) // rows)  # evenly filled
    tallest = max(sum(lines[start : start + rows]) for start in range(0, len(lines), rows))
    figure.set_size_inches(width, height + 0.2 * tallest + 0.25 * bool(note))
    handles: Any = list(entries.values())
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=columns,
        title=note or None,
        alignment="left",
        columnspacing=1.4,
        borderaxespad=0.4,
        handlelength=2.6,
    )


def wrapped(text: str, inches: float) -> str:
    """Text from a configuration or a file's name, in lines that fit into a width."""
    text = printable(text)
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]}…{text[-_LONGEST // 2 :]}"
    return "\n".join(textwrap.wrap(text, max(10, int(inches / _CHARACTER))))


def left_out(setting: Setting) -> str:
    """What a legend says of a setting of which runs have not ended, or diverged."""
    total = len(setting.runs)
    ended = [run for run in setting.runs if has_finished(run) or has_diverged(run)]
    if not ended:
        return " (not finished)"
    says = [f"{len(ended)} of {total} runs"] if len(ended) < total else []
    if lost := settings.diverged(ended):
        says.append("diverged" if total == 1 else f"{lost} diverged")
    return f" ({', '.join(says)})" if says else ""
