"""Gradient regularization and scheduled weight decay as Optax gradient transformations.

Standalone: imports jax and optax, nothing else.
"""

from gnp.transforms.gradient_regularization import (
    GradientRegularizationState,
    gradient_regularization,
)
from gnp.transforms.optimizers import adams
from gnp.transforms.warmup import POLICIES, warmup
from gnp.transforms.weight_decay import ScheduledWeightDecayState, scheduled_weight_decay

__all__ = [
    "POLICIES",
    "GradientRegularizationState",
    "ScheduledWeightDecayState",
    "adams",
    "gradient_regularization",
    "scheduled_weight_decay",
    "warmup",
]
