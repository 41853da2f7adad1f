"""The figures of the gradient regularization paper, from runs.

Reference: Zhao et al., "When Will Gradient Regularization Be Harmful?", ICML 2024
(arXiv:2406.09723).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib import patheffects, ticker
from matplotlib.figure import Figure

from gnp.analysis import comparison
from gnp.analysis.figures import many_runs, settings
from gnp.analysis.figures.style import COLORS, MARKERS, styled
from gnp.analysis.labels import text
from gnp.analysis.runs import Run
from gnp.config import GR_POLICIES
from gnp.errors import UserError

_ADAPTIVE = ("adam", "amsgrad", "yogi", "radam", "adabound", "padam", "rmsprop")


@styled
def error_by_policy(runs: Sequence[Run]) -> Figure:
    """The final test error by warmup policy, as in Figure 1.

    A row is a setting (model, optimizer, …) and a panel a data set. Large points are the means over
    seeds with ± one sample standard deviation, small ones the seeds; those that diverged are
    counted at the right.

    Raises:
      UserError: if no data set and model has finished runs of two policies (gr.policy) or more.
    """
    runs = settings.ended(runs, "the error by policy")
    runs = list(_beside_regularized(settings.differing(runs, _policy)))
    rows = settings.of(runs, ("gr.policy", "data.name"))
    rows, note = settings.best([row for row in rows if settings.survivors(row.runs)])
    if not rows:
        raise UserError(
            "the error by policy needs finished runs of two policies (gr.policy) or more on one "
            "data set and model"
        )
    runs = [run for row in rows for run in row.runs]
    policies = [policy for policy in GR_POLICIES if any(_policy(run) == policy for run in runs)]
    data = sorted({text(run.setting("data.name")) for run in runs})
    labels = [many_runs.wrapped(row.label, 2.6) for row in rows]
    lines = max(label.count("\n") + 1 for label in labels)
    height = len(rows) * max(0.2 * len(policies) + 0.15, 0.18 * lines + 0.1) + 0.8
    figure = Figure(figsize=(max(6.4, 3.6 * len(data)), max(2.4, height)))
    places = figure.subplots(1, len(data), squeeze=False, sharey=True)[0]
    entries: many_runs.Entries = {}
    for axes, name in zip(places, data, strict=True):
        of_data = [run for run in runs if text(run.setting("data.name")) == name]
        axes.set_title(many_runs.wrapped(name, 3.4) if len(data) > 1 else "", loc="left")
        axes.set_xlabel(settings.metric_label(settings.survivors(of_data) or of_data))
        for place, row in enumerate(rows):
            for index, policy in enumerate(policies):
                seeds = [r for r in settings.inside(row, of_data) if _policy(r) == policy]
                if not seeds:
                    continue
                finals = [settings.final(run) for run in settings.survivors(seeds)]
                values = np.array(finals or [np.nan])
                y = place + 0.8 * ((index + 0.5) / len(policies) - 0.5)
                color = COLORS[index % len(COLORS)]
                if num := settings.diverged(seeds):
                    edge = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
                    says = f"× {num} diverged"
                    axes.annotate(says, (1, y), (4, 0), va="center", color=color, **edge)
                look = {"color": color, "marker": MARKERS[index], "linestyle": "none"}
                std = values.std(ddof=1) if len(values) > 1 else None
                entries[f"gr {policy}"] = axes.errorbar(
                    values.mean(), y, xerr=std, **look, markersize=6.5
                )
                if len(values) > 1:
                    axes.plot(values, np.full(len(values), y), **look | {"alpha": 0.5, "zorder": 1})
    places[0].set_yticks(*(range(len(rows)), labels) if len(rows) > 1 else ([],))
    places[0].set_ylim(len(rows) - 0.5, -0.5)  # the first row is the uppermost
    order = [f"gr {policy}" for policy in policies]
    many_runs.legend(figure, {label: entries[label] for label in order}, note)
    return figure


@styled
def gradient_norm_with_gr(runs: Sequence[Run]) -> Figure:
    """The norm of the gradient at θ through training with and without GR, as in Figure 2.

    The warmup is shaded. GR is that of the first step on, policy "none".

    Raises:
      UserError: if no data set and model has runs of both policies, "off" and "none".
    """
    chosen = [run for run in runs if _policy(run) in ("off", "none")]
    chosen = settings.differing(chosen, _policy)
    if not chosen:
        raise UserError(
            "the gradient norm with and without GR needs runs of the policies off and none "
            "(gr.policy) on one data set and model"
        )
    return _gradient_norm(chosen)


@styled
def gradient_norm_by_policy(runs: Sequence[Run]) -> Figure:
    """The norm of the gradient at θ through training under each policy, as in Figure 4.

    The warmup is shaded.

    Raises:
      UserError: if no data set and model has runs of two policies or more.
    """
    chosen = settings.differing(runs, _policy)
    if not chosen:
        raise UserError(
            "the gradient norm by policy needs runs of two policies (gr.policy) or more on one "
            "data set and model"
        )
    return _gradient_norm(chosen)


@styled
def adaptive_lr_by_policy(runs: Sequence[Run]) -> Figure:
    """How far apart the adaptive learning rates are through training, a line a setting.

    The standard deviation over the parameters of ln ψ, ψ = 1/√v, which `config.log.adaptive_lr`
    logs. The warmup is shaded.

    Raises:
      UserError: if no run has logged it.
    """
    if not any(run.has("train", "adaptive_lr_log_std") for run in runs):
        raise UserError(
            "the adaptive learning rate through training needs runs of adaptive optimizers with "
            "--config.log.adaptive_lr=True"
        )
    ylabel = "std of ln ψ, ψ = 1/√v"
    return many_runs.draw_curves(runs, "train", "adaptive_lr_log_std", ylabel, warmup=True)


def _gradient_norm(runs: Sequence[Run]) -> Figure:
    return many_runs.draw_curves(runs, "train", "grad_norm", "gradient norm", warmup=True)


def _beside_regularized(runs: Sequence[Run]) -> Iterator[Run]:
    """The runs; one without regularization once for each radius, ratio, … that it stands beside."""

    def others(run: Run) -> str:
        fields = comparison.settings_of(run)
        return repr([(k, x) for k, x in fields.items() if not k.startswith("gr.") and k != "seed"])

    used: dict[str, dict[str, Any]] = {}
    for run in runs:
        if _policy(run) != "off":
            fields = run.config["gr"] | {"policy": "off"}
            used.setdefault(others(run), {})[repr(sorted(fields.items()))] = fields
    for run in runs:
        beside = used.get(others(run), {}) if _policy(run) == "off" else {}
        for fields in beside.values():
            yield dataclasses.replace(run, config=run.config | {"gr": fields})
        if not beside:
            yield run


def _policy(run: Run) -> str:
    return str(run.setting("gr.policy") or "off")


@styled
def theoretical_variance(runs: Sequence[Run]) -> Figure:
    """`variance_surface` with its defaults, where the runs are of what it explains, as Figure 3.

    Raises:
      UserError: if no run has GR with an adaptive optimizer.
    """
    if not any(r.setting("optimizer.name") in _ADAPTIVE and _policy(r) != "off" for r in runs):
        raise UserError(
            "the variance surface is of runs with GR (gr.policy) and an adaptive optimizer "
            f"({', '.join(_ADAPTIVE)})"
        )
    return variance_surface()


@styled
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
    for label in axes.clabel(lines, fmt="{:g}".format, fontsize=9.5, inline=False):
        label.set_bbox({"facecolor": "black", "edgecolor": "none", "pad": 1.5})
    bar = figure.colorbar(bands, format="{x:g}", ticks=decades)
    bar.set_label(f"variance of ψ (Eq. 9, σ₁ = {sigma1:g})")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.grid(visible=False)
    return figure
