"""Gradient regularization, scheduled weight decay, and the optimizers they are compared with.

Optax gradient transformations. Standalone: imports jax and optax, nothing else.
"""

from gnp.transforms.gradient_regularization import (
    GradientRegularizationState,
    gradient_regularization,
)
from gnp.transforms.optimizers import (
    ScaleByAdaboundState,
    ScaleByAmsgradState,
    adabound,
    adams,
    amsgrad,
    padam,
    scale_by_adabound,
    scale_by_amsgrad,
    scale_by_padam,
    sgds,
)
from gnp.transforms.schedules import between, every
from gnp.transforms.warmup import POLICIES, warmup
from gnp.transforms.weight_decay import ScheduledWeightDecayState, scheduled_weight_decay

__all__ = [
    "POLICIES",
    "GradientRegularizationState",
    "ScaleByAdaboundState",
    "ScaleByAmsgradState",
    "ScheduledWeightDecayState",
    "adabound",
    "adams",
    "amsgrad",
    "between",
    "every",
    "gradient_regularization",
    "padam",
    "scale_by_adabound",
    "scale_by_amsgrad",
    "scale_by_padam",
    "scheduled_weight_decay",
    "sgds",
    "warmup",
]
