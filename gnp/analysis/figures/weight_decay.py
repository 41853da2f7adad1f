"""The figures of the scheduled weight decay paper, from runs.

Reference: Xie et al., "On the Overlooked Pitfalls of Weight Decay and How to Mitigate Them: A
Gradient-Norm Perspective", NeurIPS 2023 (arXiv:2011.11152).
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from gnp.analysis.figures import many_runs, settings
from gnp.analysis.figures.style import styled
from gnp.analysis.runs import Run, number
from gnp.errors import UserError

_ERROR: dict[str, Any] = {"key": "error", "ylabel": "test error (%)", "scale": 100}


@styled
def learning_curves(runs: Sequence[Run]) -> Figure:
    """Test error through training, a line a setting, as Figures 9 and 14 have it by optimizer.

    Raises:
      UserError: if no run has a test error.
    """
    return many_runs.draw_curves(_of_images(runs, "learning curves"), "test", **_ERROR)


@styled
def perplexity_curves(runs: Sequence[Run]) -> Figure:
    """Test perplexity of language models through training, as in Figure 13.

    Raises:
      UserError: if no run has a test perplexity.
    """
    if not any(run.has("test", "perplexity") for run in runs):
        raise UserError("perplexity curves need runs of a language model that were evaluated")
    return many_runs.draw_curves(runs, "test", "perplexity", "test perplexity")


@styled
def vanilla_against_coupled(runs: Sequence[Run]) -> Figure:
    """Test error with vanilla and with coupled weight decay through training, as in Figure 1.

    Vanilla decay (Eq. 1) is not multiplied by the learning rate, coupled decay (Eq. 2) is.

    Raises:
      UserError: if no data set and model has runs of both (weight_decay.kind).
    """
    kinds = ("vanilla", "coupled")
    chosen = [run for run in runs if run.setting("weight_decay.kind") in kinds]
    chosen = settings.differing(chosen, lambda run: run.setting("weight_decay.kind"))
    if not chosen:
        raise UserError(
            "vanilla against coupled weight decay needs runs of both (weight_decay.kind) on one "
            "data set and model"
        )
    return many_runs.draw_curves(_of_images(chosen, "this figure"), "test", **_ERROR)


@styled
def warm_restarts(runs: Sequence[Run]) -> Figure:
    """Test error under a cosine schedule with warm restarts, as in Figures 12 and 20.

    Raises:
      UserError: if there is no such run (lr.schedule restarts).
    """
    chosen = [run for run in runs if run.setting("lr.schedule") == "restarts"]
    if not chosen:
        raise UserError("warm restarts need runs with that schedule (lr.schedule=restarts)")
    return many_runs.draw_curves(_of_images(chosen, "warm restarts"), "test", **_ERROR)


@styled
def long_training(runs: Sequence[Run]) -> Figure:
    """Test error of short and of long trainings, with a logarithmic epoch, as Figure 17's runs.

    Raises:
      UserError: if all runs of a data set and model are equally long.
    """
    chosen = settings.differing(runs, lambda run: number(run.setting("epochs")))
    if not chosen:
        raise UserError(
            "long training needs runs of two lengths (epochs) or more on one data set and model"
        )
    chosen = _of_images(chosen, "long training")
    return many_runs.draw_curves(chosen, "test", **_ERROR, log_epochs=True)


@styled
def gradient_norm_by_decay(runs: Sequence[Run]) -> Figure:
    """The gradient norm through training by weight decay, as in Figures 2 and 3.

    The panels are of models: with BatchNorm and without, as vgg16_bn and vgg16.

    Raises:
      UserError: if all runs of a data set and model have the same weight decay.
    """
    fields = ("weight_decay.kind", "weight_decay.value")
    chosen = settings.differing(runs, lambda run: tuple(map(run.setting, fields)))
    if not chosen:
        raise UserError(
            "the gradient norm by weight decay needs runs that differ in it (weight_decay.kind or "
            "weight_decay.value) on one data set and model"
        )
    return many_runs.draw_curves(chosen, "train", "grad_norm", "gradient norm")


@styled
def scheduled_decay(runs: Sequence[Run]) -> Figure:
    """The factor of SWD, the gradient norm and the training loss through training, as in Figure 4.

    A row is a data set and model. The factor 1/√v̄ is that of runs with scheduled weight decay.

    Raises:
      UserError: if no run has it.
    """
    by_panel = {
        name: inner
        for name, inner in settings.panels(runs).items()
        if any(run.has("train", "swd_factor") for run in inner)
    }
    if not by_panel:
        raise UserError(
            "the factor of SWD needs runs with scheduled weight decay (weight_decay.kind=scheduled)"
        )
    shown = [run for inner in by_panel.values() for run in inner]
    found, note = settings.best(settings.of(shown))
    metrics = {"swd_factor": "factor 1/√v̄", "grad_norm": "gradient norm", "loss": "training loss"}
    figure, places = many_runs.grid([name for name in by_panel for _ in metrics])
    look = settings.looks(found)
    entries: many_runs.Entries = {}
    for row, inner in enumerate(by_panel.values()):
        for column, (key, label) in enumerate(metrics.items()):
            axes = places[len(metrics) * row + column]
            axes.set(xlabel="epoch", ylabel=label)
            for index, setting in enumerate(found):
                seeds = settings.inside(setting, inner)
                seeds = settings.complete([run for run in seeds if run.has("train", key)])
                if seeds:
                    of = many_runs.curves(setting._replace(runs=tuple(seeds)), "train", key)
                    line = many_runs.draw(axes, of, look[setting.label], index)
                    entries[setting.label] = line
            many_runs.finish_curves(axes)
    many_runs.legend(figure, many_runs.named(entries, found), note)
    return figure


def _of_images(runs: Sequence[Run], what: str) -> list[Run]:
    chosen = [run for run in runs if not any("perplexity" in of for of in run.metrics.values())]
    if not any(run.has("test", "error") for run in chosen):
        raise UserError(f"{what} need runs with a test error")
    return chosen
