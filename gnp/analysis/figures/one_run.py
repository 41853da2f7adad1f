"""Figures of one run through training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gnp.analysis.figures.style import (
    BLUE,
    GREEN,
    OCHRE,
    PURPLE,
    VERMILION,
    drawn_values,
    ink,
    scale_y,
    styled,
)
from gnp.analysis.runs import Run

# Metrics that vary from batch to batch: of more than `MANY` rows the figures show the running mean
# over a fortieth of the run, and the rows themselves faintly.
MANY = 120
NOISY = ("loss", "error", "perplexity", "grad_norm", "perturbed_grad_norm")
_FIRST: dict[str, Any] = {"color": BLUE, "linewidth": 1.3}
_SECOND: dict[str, Any] = {"color": VERMILION, "linewidth": 1.8, "marker": "o"}
_THIRD: dict[str, Any] = {"color": GREEN, "linewidth": 1.8, "marker": "s", "linestyle": "--"}
_SPLITS = (("train", _FIRST), ("validation", _THIRD), ("test", _SECOND))


@styled
def error(run: Run) -> Figure:
    """The error of each split, in percent, against the epoch."""
    figure, axes = _new("error (%)")
    for split, style in _SPLITS:
        _draw(axes, run, split, "error", scale=100, label=split, **style)
    axes.set_ylim(bottom=0)
    return _finish(figure, [axes], run, run.gr_warmup)


@styled
def loss(run: Run) -> Figure:
    """The loss of each split, in nats an image or a word, against the epoch."""
    figure, axes = _new("loss")
    for split, style in _SPLITS:
        _draw(axes, run, split, "loss", label=split, **style)
    scale_y(axes)
    return _finish(figure, [axes], run, run.gr_warmup)


@styled
def perplexity(run: Run) -> Figure:
    """A language model's perplexity, exp(loss), of each split against the epoch."""
    figure, axes = _new("perplexity")
    for split, style in _SPLITS:
        _draw(axes, run, split, "perplexity", label=split, **style)
    scale_y(axes)
    return _finish(figure, [axes], run, run.gr_warmup)


@styled
def gradient_norm(run: Run) -> Figure:
    """L2 norms of the gradient at θ and, where it was computed, at θ + ε against the epoch."""
    figure, axes = _new("gradient norm")
    _draw(axes, run, "train", "grad_norm", label="at θ", **_FIRST)
    _draw(axes, run, "train", "perturbed_grad_norm", label="at θ + ε", **_SECOND)
    scale_y(axes)
    return _finish(figure, [axes], run, run.gr_warmup)


@styled
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


@styled
def learning_rate(run: Run) -> Figure:
    """The learning rate against the epoch."""
    figure, axes = _new("learning rate")
    _draw(axes, run, "train", "learning_rate", color=BLUE, linewidth=2.0)
    axes.set_ylim(0, 1.08 * _top(axes))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    return _finish(figure, [axes], run, run.learning_rate_warmup)


@styled
def weight_norm(run: Run) -> Figure:
    """The L2 norm of all parameters against the epoch."""
    figure, axes = _new("weight norm ‖θ‖")
    _draw(axes, run, "train", "weight_norm", color=PURPLE, linewidth=2.0)
    return _finish(figure, [axes], run, run.gr_warmup)


@styled
def decay_factor(run: Run) -> Figure:
    """The factor 1/√v̄ by which scheduled weight decay multiplies ηλ against the epoch."""
    figure, axes = _new("SWD factor 1/√v̄")
    _draw(axes, run, "train", "swd_factor", color=OCHRE, linewidth=2.0)
    scale_y(axes)
    return _finish(figure, [axes], run, run.gr_warmup)


@styled
def adaptive_lr(run: Run) -> Figure:
    """The standard deviation over parameters of ln ψ, ψ = 1/√v, against the epoch."""
    figure, axes = _new("std of ln ψ, ψ = 1/√v")
    _draw(axes, run, "train", "adaptive_lr_log_std", color=BLUE, linewidth=2.0)
    return _finish(figure, [axes], run, run.learning_rate_warmup)


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
    if key in NOISY and len(values) > MANY:
        axes.plot(epochs, values, color=style["color"], linewidth=0.8, alpha=0.35)
        values = running_mean(values, len(values) // 40)
    style["markevery"] = max(1, len(values) // 8)
    if np.isfinite(values).sum() < 8:  # marks all of few, since one between gaps makes no line
        style |= {"marker": "o", "markevery": 1, "clip_on": False}
    axes.plot(epochs, values, **style)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the finite values around each finite one."""
    finite = np.isfinite(values)
    window = np.ones(width)
    count = np.convolve(finite, window, "same")
    total = np.convolve(np.where(finite, values, 0), window, "same")
    return np.where(finite, total / np.maximum(count, 1), np.nan)


def _top(axes: Axes) -> float:
    """The largest value drawn, 1 where nothing positive is."""
    return float(drawn_values(axes).max(initial=0.0)) or 1.0


def _finish(figure: Figure, panels: Sequence[Axes], run: Run, warmup: float) -> Figure:
    """Shades the warmup and adds what all figures of one run share: epochs, and a legend."""
    for axes in panels:
        axes.set_xlim(0, run.last[1] or 1)
        if warmup > 0:
            axes.axvspan(0, warmup, color=ink(), alpha=0.1, linewidth=0, zorder=0, label="_warmup")
    first, last = panels[0], panels[-1]
    last.set_xlabel("epoch")
    if warmup > 0:
        first.annotate("warmup", (0, 1), (0, 3), "axes fraction", "offset points", va="bottom")
    if first.get_legend_handles_labels()[0]:
        first.legend(loc="lower right", bbox_to_anchor=(1, 1.02), ncols=3, columnspacing=1.2)
    return figure
