"""Figures of runs, drawn with Matplotlib and returned as `matplotlib.figure.Figure`.

Nothing here touches pyplot's state. In a notebook, `%matplotlib inline` shows a returned figure;
elsewhere `figure.savefig("error.svg")` keeps it.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart, made lighter or
darker until each has a contrast of at least 3:1 with white and with near-black. Lines also
differ in width, dashes or markers, so that they stay apart in a grey print.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import patheffects, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gnp.analysis.runs import Run
from gnp.errors import UserError

BLUE, VERMILION, GREEN, PURPLE, OCHRE, GREY = COLORS = (
    "#1a7fc1",
    "#d55e00",
    "#009e73",
    "#bf5f96",
    "#9a7200",
    "#777777",
)
# The colour of text, axes and shading. Whoever embeds a figure may replace it; no line has it.
INK = "#1a1a1a"

# Text that stays readable when a phone shows a figure in the width of its screen.
_STYLE: Any = {
    "figure.figsize": (4.2, 2.6),
    "figure.constrained_layout.use": True,
    "font.size": 10.5,
    "legend.fontsize": 10.5,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.borderaxespad": 0.0,
    "legend.borderpad": 0.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "lines.markersize": 4,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "grid.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}

_styled = matplotlib.rc_context(_STYLE)  # as a decorator it leaves the caller's settings alone

# Metrics that vary from batch to batch: where there are many rows, the figures show the running
# mean over a fortieth of the run, and the rows themselves faintly.
_NOISY = ("loss", "error", "perplexity", "grad_norm", "perturbed_grad_norm")
_FIRST: dict[str, Any] = {"color": BLUE, "linewidth": 1.3}
_SECOND: dict[str, Any] = {"color": VERMILION, "linewidth": 1.8, "marker": "o"}
_THIRD: dict[str, Any] = {"color": GREEN, "linewidth": 1.8, "marker": "s", "linestyle": "--"}
_SPLITS = (("train", _FIRST), ("validation", _THIRD), ("test", _SECOND))
# The digits that a logarithmic axis labels in each decade, by how many decades it spans.
_DIGITS = ((1, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,))
_DASHES = ("-", (0, (5, 1.6)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (9, 3)), (0, (3, 3)))
_MARKERS = ("o", "s", "^", "D", "v", "X")


@_styled
def error(run: Run) -> Figure:
    """The error of each split, in percent, against the epoch."""
    figure, axes = _new("error (%)")
    for split, style in _SPLITS:
        _draw(axes, run, split, "error", scale=100, label=split, **style)
    axes.set_ylim(bottom=0)
    return _finish(figure, [axes], run, run.gr_warmup)


@_styled
def loss(run: Run) -> Figure:
    """The loss of each split, in nats an image or a word, against the epoch."""
    figure, axes = _new("loss")
    for split, style in _SPLITS:
        _draw(axes, run, split, "loss", label=split, **style)
    _scale_y(axes)
    return _finish(figure, [axes], run, run.gr_warmup)


@_styled
def perplexity(run: Run) -> Figure:
    """A language model's perplexity, exp(loss), of each split against the epoch."""
    figure, axes = _new("perplexity")
    for split, style in _SPLITS:
        _draw(axes, run, split, "perplexity", label=split, **style)
    _scale_y(axes)
    return _finish(figure, [axes], run, run.gr_warmup)


@_styled
def gradient_norm(run: Run) -> Figure:
    """L2 norms of the gradient at θ and, where it was computed, at θ + ε against the epoch."""
    figure, axes = _new("gradient norm")
    _draw(axes, run, "train", "grad_norm", label="at θ", **_FIRST)
    _draw(axes, run, "train", "perturbed_grad_norm", label="at θ + ε", **_SECOND)
    _scale_y(axes)
    return _finish(figure, [axes], run, run.gr_warmup)


@_styled
def regularization(run: Run) -> Figure:
    """The radius r and the ratio α = λ/r that were applied against the epoch, one above another."""
    figure = Figure()
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, key, label in ((upper, "radius", "radius r"), (lower, "ratio", "ratio λ/r")):
        # A row tells the mean since the row before: a value switched on in between is a step up.
        _draw(axes, run, "train", key, color=GREEN, linewidth=2.0, drawstyle="steps-pre")
        axes.set_ylabel(label)
        top = _top(axes)
        axes.set_ylim(0, 1.15 * top)
        axes.set_yticks([0, top], ["0", f"{top:g}"])
    return _finish(figure, [upper, lower], run, run.gr_warmup)


@_styled
def learning_rate(run: Run) -> Figure:
    """The learning rate against the epoch."""
    figure, axes = _new("learning rate")
    _draw(axes, run, "train", "learning_rate", color=BLUE, linewidth=2.0)
    axes.set_ylim(0, 1.08 * _top(axes))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    return _finish(figure, [axes], run, run.learning_rate_warmup)


@_styled
def weight_norm(run: Run) -> Figure:
    """The L2 norm of all parameters against the epoch."""
    figure, axes = _new("weight norm ‖θ‖")
    _draw(axes, run, "train", "weight_norm", color=PURPLE, linewidth=2.0)
    return _finish(figure, [axes], run, run.gr_warmup)


@_styled
def decay_factor(run: Run) -> Figure:
    """The factor 1/√v̄ by which scheduled weight decay multiplies ηλ against the epoch."""
    figure, axes = _new("SWD factor 1/√v̄")
    _draw(axes, run, "train", "swd_factor", color=OCHRE, linewidth=2.0)
    _scale_y(axes)
    return _finish(figure, [axes], run, run.gr_warmup)


@_styled
def error_curves(runs: Mapping[str, Run | Sequence[Run]]) -> Figure:
    """Test error, in percent, against the epoch, one line a label.

    Where a label has several runs (seeds), the line is their mean at the epochs that all of them
    evaluated, in a band of ± one sample standard deviation. The legend gives the last error.
    """
    figure = Figure(figsize=(6.4, 3.8))
    axes = figure.subplots()
    for index, (label, group) in enumerate(runs.items()):
        epochs, errors = _test_errors(label, [group] if isinstance(group, Run) else group)
        mean = 100 * errors.mean(axis=0)
        color = COLORS[index % len(COLORS)]
        last = f"{mean[-1]:.2f}"
        if len(errors) > 1:
            std = 100 * errors.std(axis=0, ddof=1)
            axes.fill_between(epochs, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
            last += f" ± {std[-1]:.2f}"
        spacing = max(1, len(epochs) // 8)
        axes.plot(
            epochs,
            mean,
            label=f"{label}: {last} %",
            color=color,
            linestyle=_DASHES[index % len(_DASHES)],
            marker=_MARKERS[index % len(_MARKERS)],
            markevery=(index % spacing, spacing),  # so that those of close lines lie side by side
        )
    axes.set(xlabel="epoch", ylabel="test error (%)")
    _scale_y(axes)
    axes.set_xlim(left=0)
    axes.legend()
    return figure


@_styled
def variance_surface(
    t: np.ndarray | None = None, gamma: np.ndarray | None = None, sigma1: float = 1.0
) -> Figure:
    """The variance of the adaptive learning rate ψ (Eq. 9) over t and γ, as in Figure 3.

    From left to right a training that goes on, from bottom to top gradients that decay faster.
    The bands are a third of a decade wide; the lines between every third carry the variance.

    Args:
      t: numbers of steps, increasing; 3, where the variance becomes finite, to 1000 by default.
      gamma: decays of the gradients' variance in a step, increasing; 0.001 to 1 by default.
      sigma1: σ₁, the variance of the first gradient.

    Reference: Zhao et al., "When Will Gradient Regularization Be Harmful?", ICML 2024.
    """
    from gnp.analysis.adaptive_lr import variance_psi  # loads jax, which no figure of a run needs

    t = np.geomspace(3, 1000, 200) if t is None else np.asarray(t)
    gamma = np.geomspace(1e-3, 1, 200) if gamma is None else np.asarray(gamma)
    variance = variance_psi(t, sigma1, gamma[:, None])
    exponents = 3 * np.log10([variance.min(), variance.max()])
    thirds = np.arange(np.floor(exponents[0]), np.ceil(exponents[1]) + 1)
    figure = Figure(figsize=(5.2, 3.6))
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel="step t", ylabel="decay rate γ")
    # cividis: even in lightness, so that it prints in grey, and the same to the colour-blind
    bands = axes.contourf(t, gamma, variance, 10 ** (thirds / 3), norm="log", cmap="cividis")
    decades = 10 ** (thirds[thirds % 3 == 0] / 3)
    lines = axes.contour(t, gamma, variance, decades, colors="white", linewidths=1.2)
    lines.set_path_effects([patheffects.withStroke(linewidth=2.4, foreground="black")])
    for text in axes.clabel(lines, fmt="{:g}".format, fontsize=9.5, inline=False):
        text.set_bbox({"facecolor": "black", "edgecolor": "none", "pad": 1.5})
    bar = figure.colorbar(bands, format="{x:g}", ticks=decades)
    bar.set_label(f"variance of ψ (Eq. 9, σ₁ = {sigma1:g})")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.grid(visible=False)
    return figure


def _new(label: str) -> tuple[Figure, Axes]:
    figure = Figure()
    axes = figure.subplots()
    axes.set_ylabel(label)
    return figure, axes


def _draw(axes: Axes, run: Run, split: str, key: str, scale: float = 1.0, **style: Any) -> None:
    """Draws one metric against the epoch."""
    if not run.has(split, key):
        return
    epochs, values = run.series(split, key)
    values = np.where(np.isfinite(values), scale * values, np.nan)  # an infinity has no place
    if key in _NOISY and len(values) > 120:
        axes.plot(epochs, values, color=style["color"], linewidth=0.8, alpha=0.35)
        values = _running_mean(values, len(values) // 40)
    style["markevery"] = max(1, len(values) // 8)
    if np.isfinite(values).sum() < 8:  # marks all of few, since one between gaps makes no line
        style |= {"marker": "o", "markevery": 1, "clip_on": False}
    axes.plot(epochs, values, **style)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the finite values around each finite one."""
    finite = np.isfinite(values)
    window = np.ones(width)
    count = np.convolve(finite, window, "same")
    total = np.convolve(np.where(finite, values, 0), window, "same")
    return np.where(finite, total / np.maximum(count, 1), np.nan)


def _values(axes: Axes) -> np.ndarray:
    """All finite values drawn."""
    values = [np.asarray(line.get_ydata(), np.float64) for line in axes.lines]
    together = np.concatenate([np.empty(0), *values])
    return np.extract(np.isfinite(together), together)


def _top(axes: Axes) -> float:
    """The largest value drawn, 1 where nothing positive is."""
    return float(_values(axes).max(initial=0.0)) or 1.0


def _scale_y(axes: Axes) -> None:
    """A logarithmic axis where all values are positive and the largest is many times the least."""
    values = _values(axes)
    if not values.size or values.min() <= 0 or values.max() < 3 * values.min():
        return
    axes.set_yscale("log")
    decades = np.log10(values.max() / values.min())
    digits = _DIGITS[min(int(decades), len(_DIGITS) - 1)]
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=digits))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _finish(figure: Figure, panels: Sequence[Axes], run: Run, warmup: float) -> Figure:
    """Shades the warmup and adds what all figures of one run share: epochs, and a legend."""
    for axes in panels:
        axes.set_xlim(0, run.last[1] or 1)
        if warmup > 0:
            axes.axvspan(0, warmup, color=INK, alpha=0.1, linewidth=0, zorder=0, label="_warmup")
    first, last = panels[0], panels[-1]
    last.set_xlabel("epoch")
    if warmup > 0:
        first.annotate("warmup", (0, 1), (0, 3), "axes fraction", "offset points", va="bottom")
    if first.get_legend_handles_labels()[0]:
        first.legend(loc="lower right", bbox_to_anchor=(1, 1.02), ncols=3, columnspacing=1.2)
    return figure


def _test_errors(label: str, group: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """The epochs that every run of a group evaluated, and the errors there, a row a run."""
    curves = [
        {round(float(x), 6): y for x, y in zip(*run.series("test", "error"), strict=True)}
        for run in group
    ]
    epochs = sorted(set.intersection(*map(set, curves))) if curves else []
    if not epochs:
        raise UserError(
            f"the runs of {label!r} have no evaluated epoch in common; "
            "compare runs that were evaluated alike"
        )
    return np.array(epochs), np.array([[curve[x] for x in epochs] for curve in curves])
