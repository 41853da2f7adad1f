"""From a configuration to an Optax chain and its schedules."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from gnp import transforms
from gnp.config import parse_duration


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What the train step needs of the configuration's optimizer.

    Attributes:
      tx: the chain: gradient regularization → clipping → base optimizer → weight decay →
        learning rate. Its `update` takes `grad_fn` beside the gradients and the parameters.
      learning_rate: the schedule, a function of the number of updates already made.
      l2: λ of L2 regularization. It is not in `tx`: λθ belongs to both of GR's gradients, so the
        step adds (λ/2)‖θ‖² to the loss.
    """

    tx: optax.GradientTransformationExtraArgs
    learning_rate: optax.Schedule
    l2: float

    def report(self, opt_state: optax.OptState, count: jax.Array) -> dict[str, Any]:
        """What the last update did, as (value, weight) pairs; a weight of 0 is no value."""
        one = jnp.ones((), jnp.float32)
        values = {"learning_rate": (self.learning_rate(count), one)}
        for state in _states(opt_state):
            if isinstance(state, transforms.GradientRegularizationState):
                second = (state.ratio != 0).astype(jnp.float32)
                values["perturbed_grad_norm"] = (state.perturbed_grad_norm, second)
                values["radius"] = (state.radius, one)
                values["ratio"] = (state.ratio, one)
            if isinstance(state, transforms.ScheduledWeightDecayState):
                values["swd_factor"] = (state.factor, one)
        return values


def build(config: ConfigDict, *, steps_per_epoch: float, total_steps: int) -> Optimizer:
    """Makes the optimizer of a validated configuration."""
    schedule = learning_rate(config.lr, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    parts: list[optax.GradientTransformation] = []
    if config.gr.policy != "off":
        warmup = parse_duration(config.gr.warmup or config.lr.warmup)
        radius, ratio = transforms.warmup(
            config.gr.policy,
            radius=config.gr.radius,
            ratio=config.gr.ratio,
            warmup_steps=warmup.steps(steps_per_epoch, total_steps),
        )
        parts.append(transforms.gradient_regularization(radius, ratio))
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))

    base = base_optimizer(config.optimizer, config.lr.base)
    kind, value = config.weight_decay.kind, config.weight_decay.value
    rate = optax.scale_by_learning_rate(schedule)
    if kind == "scheduled":
        parts += [_scheduled_decay(base, value, config.optimizer), rate]
    elif kind in ("coupled", "decoupled"):
        # One update, θ ← (1 − ηλ)θ − ηu, under the names it has for SGD (SWD paper, Eq. 2) and
        # for adaptive optimizers (AdamW, Eq. 8).
        parts += [base, optax.add_decayed_weights(value), rate]
    elif kind == "vanilla":
        parts += [base, rate, optax.add_decayed_weights(-value)]  # θ ← (1 − λ)θ − ηu, Eq. 1
    else:
        parts += [base, rate]
    return Optimizer(optax.chain(*parts), schedule, value if kind == "l2" else 0.0)


def base_optimizer(config: ConfigDict, base_learning_rate: float) -> optax.GradientTransformation:
    """The base optimizer of a configuration, without its learning rate."""
    betas = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
    makers: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adam": lambda: optax.scale_by_adam(**betas),
        "amsgrad": lambda: transforms.scale_by_amsgrad(**betas),
        "yogi": lambda: optax.scale_by_yogi(**betas),
        "radam": lambda: optax.scale_by_radam(**betas),
        "padam": lambda: transforms.scale_by_padam(**betas, partial=config.partial),
        "adabound": lambda: transforms.scale_by_adabound(
            **betas,
            final_ratio=config.final_learning_rate / base_learning_rate,
            gamma=config.gamma,
        ),
        "rmsprop": lambda: optax.scale_by_rms(decay=config.decay, eps=config.eps),
        "sgd": lambda: optax.trace(decay=config.momentum, nesterov=config.nesterov),
    }
    return makers[config.name]()


def _scheduled_decay(
    base: optax.GradientTransformation, value: float, config: ConfigDict
) -> optax.GradientTransformation:
    """Scheduled weight decay of a base optimizer."""
    if config.name == "sgd":
        # SGDS: SGD has no second moment; its effective rate is η / (1 − momentum).
        return optax.chain(base, optax.add_decayed_weights(value / (1 - config.momentum)))
    return transforms.scheduled_weight_decay(
        base,
        value,
        b2=config.decay if config.name == "rmsprop" else config.b2,
        second_moment=(lambda s: s.nu_max) if config.name in ("amsgrad", "padam") else None,
    )


def learning_rate(
    config: ConfigDict, *, steps_per_epoch: float, total_steps: int
) -> optax.Schedule:
    r"""The learning rate as a function of the number of updates already made.

    With t = count + 1, the update being made, and T_w warmup steps:

    - t ≤ T_w: :math:`\eta_0 \min(t / T_w, 1)` (GR paper, Eq. 6), or for a constant warmup
      `warmup_factor` :math:`\eta_0`;
    - then, with s = count − T_w updates made since the warmup, out of S = T − T_w: constant
      :math:`\eta_0`; cosine :math:`\eta_0 (1 + \cos(\pi s / S)) / 2`; step
      :math:`\eta_0 \cdot` `drop_factor` to the power of the `drops` that are past (counted from
      the beginning of the run); restarts: a cosine whose i-th period has
      :math:`T_0 T_{mult}^i` steps (Loshchilov & Hutter, 2017).

    Returns:
      A function from an integer scalar to a float scalar of JAX's default precision.
    """

    def steps(text: str) -> int:
        return parse_duration(text).steps(steps_per_epoch, total_steps)

    warmup_steps = steps(config.warmup)
    remaining = max(total_steps - warmup_steps, 1)
    # What lies beyond the run may lie beyond int32 too.
    beyond = total_steps + 1
    drops = jnp.array([min(steps(text), beyond) for text in config.drops], jnp.int32)
    # Where the periods of warm restarts begin; the last entry lies beyond the run.
    restarts, period = [warmup_steps], steps(config.restart_period)
    while restarts[-1] <= total_steps:
        restarts.append(restarts[-1] + period)
        period *= config.restart_multiplier
    starts = jnp.array(restarts, jnp.float32)

    def after_warmup(count: jax.Array) -> jax.Array:
        if config.schedule == "cosine":
            return _half_cosine((count - warmup_steps) / remaining)
        if config.schedule == "step":
            return config.drop_factor ** jnp.sum(count >= drops)
        if config.schedule == "restarts":
            i = jnp.clip(jnp.searchsorted(starts, count, side="right") - 1, 0, len(starts) - 2)
            return _half_cosine((count - starts[i]) / (starts[i + 1] - starts[i]))
        return jnp.ones(())

    def schedule(count: jax.Array) -> jax.Array:
        count = jnp.asarray(count)
        factor = after_warmup(count)
        if warmup_steps:
            constant = config.warmup_kind == "constant"
            warm = config.warmup_factor if constant else (count + 1) / warmup_steps
            factor = jnp.where(count < warmup_steps, warm, factor)
        return config.base * factor

    return schedule


def _half_cosine(progress: jax.Array) -> jax.Array:
    return 0.5 * (1 + jnp.cos(jnp.pi * progress))


def _states(opt_state: Any) -> list[Any]:
    """All of our states in an optimizer's state, outermost first."""
    ours = (transforms.GradientRegularizationState, transforms.ScheduledWeightDecayState)
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, ours))
    return [x for x in leaves if isinstance(x, ours)]
