"""Figures of runs, drawn with Matplotlib and returned as `matplotlib.figure.Figure`.

Nothing here touches pyplot's state. In a notebook, `%matplotlib inline` shows a returned figure;
elsewhere `figure.savefig("error.svg")` keeps it. `with figures.dark():` draws for a dark page.

- `error`, `loss`, … take one run.
- The figures of the papers take runs in any number (`gnp.analysis.comparison.find`): seeds of one
  setting are drawn as their mean in a band, or with bars, of ± one sample standard deviation.
  Where the runs have nothing to show they raise `gnp.errors.UserError`, which says what they need.
- `PAPER_FIGURES` is the catalogue of the latter.
"""

from gnp.analysis.figures.catalogue import PAPER_FIGURES, PaperFigure
from gnp.analysis.figures.final_errors import (
    error_against_decay,
    error_against_searched,
    error_over_lr_and_decay,
    loss_against_error,
)
from gnp.analysis.figures.gradient_regularization import (
    adaptive_lr_by_policy,
    error_by_policy,
    gradient_norm_by_policy,
    gradient_norm_with_gr,
    theoretical_variance,
    variance_surface,
)
from gnp.analysis.figures.one_run import (
    adaptive_lr,
    decay_factor,
    error,
    gradient_norm,
    learning_rate,
    loss,
    perplexity,
    regularization,
    weight_norm,
)
from gnp.analysis.figures.sharpness import (
    adaptive_lr_spread,
    adaptive_lr_variance,
    hessian_eigenvalues,
    loss_surface,
    sam_sharpness,
    spectral_density,
)
from gnp.analysis.figures.style import COLORS, INK, dark
from gnp.analysis.figures.weight_decay import (
    gradient_norm_by_decay,
    learning_curves,
    long_training,
    perplexity_curves,
    scheduled_decay,
    vanilla_against_coupled,
    warm_restarts,
)

__all__ = [
    "COLORS",
    "INK",
    "PAPER_FIGURES",
    "PaperFigure",
    "adaptive_lr",
    "adaptive_lr_by_policy",
    "adaptive_lr_spread",
    "adaptive_lr_variance",
    "dark",
    "decay_factor",
    "error",
    "error_against_decay",
    "error_against_searched",
    "error_by_policy",
    "error_over_lr_and_decay",
    "gradient_norm",
    "gradient_norm_by_decay",
    "gradient_norm_by_policy",
    "gradient_norm_with_gr",
    "hessian_eigenvalues",
    "learning_curves",
    "learning_rate",
    "long_training",
    "loss",
    "loss_against_error",
    "loss_surface",
    "perplexity",
    "perplexity_curves",
    "regularization",
    "sam_sharpness",
    "scheduled_decay",
    "spectral_density",
    "theoretical_variance",
    "vanilla_against_coupled",
    "variance_surface",
    "warm_restarts",
    "weight_norm",
]
