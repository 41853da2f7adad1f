"""The figures of both papers, as a catalogue that a report goes through."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from gnp.analysis.figures import (
    final_errors,
    gradient_regularization,
    sharpness,
    weight_decay,
)
from gnp.analysis.runs import Run


class PaperFigure(NamedTuple):
    """A figure that is drawn from runs.

    Attributes:
      name: that of its function and, in a report, of its file.
      title: what it shows, for its heading.
      source: which figures of which paper it redraws, or whose idea it is.
      draw: draws it; raises `gnp.errors.UserError` where the runs have nothing to show.
    """

    name: str
    title: str
    source: str
    draw: Callable[[Sequence[Run]], Figure]


_ENTRIES = (
    (gradient_regularization.error_by_policy, "Error by warmup policy", "GR paper, Figure 1"),
    (
        gradient_regularization.gradient_norm_with_gr,
        "Gradient norm with and without GR",
        "GR paper, Figure 2",
    ),
    (
        gradient_regularization.theoretical_variance,
        "Variance of the adaptive learning rate, in theory",
        "GR paper, Figure 3",
    ),
    (
        gradient_regularization.adaptive_lr_by_policy,
        "The adaptive learning rate through training",
        "beside GR paper, Figure 3",
    ),
    (
        sharpness.adaptive_lr_variance,
        "Variance of the adaptive learning rate, measured",
        "beside GR paper, Figure 3",
    ),
    (
        sharpness.adaptive_lr_spread,
        "Spread of the adaptive learning rate, measured",
        "beside GR paper, Figure 3",
    ),
    (
        gradient_regularization.gradient_norm_by_policy,
        "Gradient norm by warmup policy",
        "GR paper, Figure 4",
    ),
    (
        weight_decay.vanilla_against_coupled,
        "Vanilla against coupled weight decay",
        "SWD paper, Figure 1",
    ),
    (
        weight_decay.gradient_norm_by_decay,
        "Gradient norm by weight decay",
        "SWD paper, Figures 2 and 3",
    ),
    (weight_decay.scheduled_decay, "Scheduled weight decay", "SWD paper, Figure 4"),
    (
        sharpness.hessian_eigenvalues,
        "Largest eigenvalues of the Hessian",
        "SWD paper, Figures 6 and 8",
    ),
    (weight_decay.learning_curves, "Learning curves", "SWD paper, Figures 9 and 14"),
    (
        final_errors.error_against_decay,
        "Error against weight decay",
        "SWD paper, Figures 10 and 16",
    ),
    (
        final_errors.error_over_lr_and_decay,
        "Error over learning rate and weight decay",
        "SWD paper, Figure 11",
    ),
    (weight_decay.warm_restarts, "Warm restarts", "SWD paper, Figures 12 and 20"),
    (weight_decay.perplexity_curves, "Perplexity", "SWD paper, Figure 13"),
    (
        final_errors.loss_against_error,
        "Training loss against test error",
        "SWD paper, Figures 15 and 19",
    ),
    (weight_decay.long_training, "Short and long training", "SWD paper, Figure 17"),
    (final_errors.error_against_searched, "Error against what was searched", "of a search"),
    (sharpness.spectral_density, "Spectral density of the Hessian", "Ghorbani et al., 2019"),
    (sharpness.sam_sharpness, "SAM sharpness", "Foret et al., 2021"),
    (sharpness.loss_surface, "Loss surface", "Li et al., 2018"),
)

PAPER_FIGURES = {
    draw.__name__: PaperFigure(draw.__name__, title, source, draw)
    for draw, title, source in _ENTRIES
}
