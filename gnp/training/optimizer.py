"""From a configuration to an Optax chain and its schedules."""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from gnp import transforms
from gnp.config import parse_duration
from gnp.errors import UserError
from gnp.training import patterns


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What the train step needs of the configuration's optimizer.

    Attributes:
      tx: the chain: gradient regularization → clipping → base optimizer → weight decay →
        learning rate → parameters' multipliers of it. Its `update` takes `grad_fn` beside the
        gradients and the parameters.
      learning_rate: the schedule, a function of the number of updates already made.
      l2: λ of L2 regularization. It is not in `tx`: λθ belongs to both of GR's gradients, so the
        step adds `l2_penalty` to the loss.
      frozen: a tree of booleans, true for parameters that stay as they are; None if none do.
      excluded: a tree of booleans, true for parameters without weight decay; None if all have it.
      reports_adaptive_lr: whether `report` has `adaptive_lr_log_std`.
    """

    tx: optax.GradientTransformationExtraArgs
    learning_rate: optax.Schedule
    l2: float | jax.Array
    frozen: Any = None
    excluded: Any = None
    reports_adaptive_lr: bool = False

    def without_frozen(self, params: Any) -> Any:
        """The parameters, with no gradient with respect to those that are frozen."""
        if self.frozen is None:
            return params
        return jax.tree.map(
            lambda x, frozen: jax.lax.stop_gradient(x) if frozen else x, params, self.frozen
        )

    def l2_penalty(self, params: Any) -> jax.Array | float:
        """(λ/2)‖θ‖² over the parameters that are neither frozen nor excluded from decay."""
        if not isinstance(self.l2, jax.Array) and not self.l2:
            return 0.0
        left_out = [tree for tree in (self.frozen, self.excluded) if tree is not None]
        decaying = jax.tree.map(lambda x, *out: None if any(out) else x, params, *left_out)
        return self.l2 / 2 * optax.tree.norm(decaying, squared=True)

    def report(self, opt_state: optax.OptState, count: jax.Array) -> dict[str, Any]:
        """What the last update did, as (value, weight) pairs; a weight of 0 is no value."""
        one = jnp.ones((), jnp.float32)
        values = {"learning_rate": (self.learning_rate(count), one)}
        for state in _states(opt_state):
            if isinstance(state, transforms.GradientRegularizationState):
                values["grad_norm"] = (state.grad_norm, one)
                second = (state.ratio != 0).astype(jnp.float32)
                values["perturbed_grad_norm"] = (state.perturbed_grad_norm, second)
                values["radius"] = (state.radius, one)
                values["ratio"] = (state.ratio, one)
            if isinstance(state, transforms.ScheduledWeightDecayState):
                values["swd_factor"] = (state.factor, one)
        if self.reports_adaptive_lr:
            for state in jax.tree.leaves(opt_state, is_leaf=lambda x: hasattr(x, "nu")):
                if hasattr(state, "nu"):  # AMSGrad and Padam divide by its running maximum
                    nu = getattr(state, "nu_max", state.nu)
                    values["adaptive_lr_log_std"] = (_log_std(nu), one)
        return values


def build(
    config: ConfigDict,
    *,
    steps_per_epoch: float,
    total_steps: int,
    params: Callable[[], Any],
) -> Optimizer:
    """Makes the optimizer of a validated configuration.

    Args:
      config: the configuration; its numbers may be traced, but for b1, b2 and decay.
      steps_per_epoch: not a whole number in general.
      total_steps: of the run.
      params: gives the parameters' shapes; called where the configuration chooses among them.

    Raises:
      UserError: if a pattern of the configuration is wrong, or nothing is left to train.
    """
    schedule = learning_rate(config.lr, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    chosen = _choose(config, params)
    parts: list[optax.GradientTransformation] = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))

    base = base_optimizer(config.optimizer, config.lr.base)
    kind, value = config.weight_decay.kind, config.weight_decay.value
    rate = optax.scale_by_learning_rate(schedule)
    decays = None
    if chosen.excluded is not None:
        decays = jax.tree.map(operator.not_, chosen.excluded)
    if kind == "scheduled":
        parts += [_scheduled_decay(base, value, config.optimizer, decays), rate]
    elif kind in ("coupled", "decoupled"):
        # One update, θ ← (1 − ηλ)θ − ηu, under the names it has for SGD (SWD paper, Eq. 2) and
        # for adaptive optimizers (AdamW, Eq. 8).
        parts += [base, optax.add_decayed_weights(value, decays), rate]
    elif kind == "vanilla":
        # θ ← (1 − λ)θ − ηu, Eq. 1
        parts += [base, rate, optax.add_decayed_weights(-value, decays)]
    else:
        parts += [base, rate]

    if chosen.frozen is not None:
        labels = jax.tree.map(lambda frozen: "frozen" if frozen else "trained", chosen.frozen)
        trained = {"trained": optax.chain(*parts), "frozen": optax.set_to_zero()}
        parts = [optax.partition(trained, labels)]
    if chosen.multipliers is not None:
        parts.append(_multiply(chosen.multipliers))
    if config.gr.policy != "off":
        # Outside of the partition: it calls the gradient, which wants all parameters.
        parts.insert(0, _regularization(config, steps_per_epoch, total_steps))
    l2 = value if kind == "l2" else 0.0
    return Optimizer(
        *(optax.chain(*parts), schedule, l2, chosen.frozen, chosen.excluded),
        reports_adaptive_lr=config.log.adaptive_lr,
    )


class _Chosen(NamedTuple):
    """What a configuration says of single parameters, as trees; None where it says nothing."""

    frozen: Any = None  # booleans
    excluded: Any = None  # booleans, of weight decay
    multipliers: Any = None  # of the learning rate


def _choose(config: ConfigDict, params: Callable[[], Any]) -> _Chosen:
    freeze, exclude = config.optimizer.freeze, config.weight_decay.exclude
    rules, layer_decay = config.lr.multipliers, config.lr.layer_decay
    if not (freeze or exclude or rules or layer_decay is not None):
        return _Chosen()
    shapes = params()
    frozen = excluded = multipliers = None
    if freeze:
        frozen = patterns.matches("config.optimizer.freeze", freeze, shapes)
        if all(jax.tree.leaves(frozen)):
            raise UserError(
                f"config.optimizer.freeze: {', '.join(map(repr, freeze))} match all parameters; "
                "leave some to train"
            )
    if exclude:
        excluded = patterns.matches("config.weight_decay.exclude", exclude, shapes)
    if rules:
        multipliers = patterns.multipliers("config.lr.multipliers", rules, shapes)
    if layer_decay is not None:
        of_layers = patterns.layer_multipliers(layer_decay, shapes)
        multipliers = jax.tree.map(operator.mul, of_layers, multipliers) if rules else of_layers
    return _Chosen(frozen, excluded, multipliers)


def _multiply(factors: Any) -> optax.GradientTransformation:
    """Multiplies updates by factors, a tree of numbers and of arrays that are broadcast."""
    return optax.stateless(
        lambda updates, _: jax.tree.map(
            lambda u, factor: u * jnp.asarray(factor, u.dtype), updates, factors
        )
    )


def _regularization(
    config: ConfigDict, steps_per_epoch: float, total_steps: int
) -> optax.GradientTransformation:
    """Gradient regularization, warmed up with the learning rate unless it has a warmup itself."""
    warmup = parse_duration(config.gr.warmup or config.lr.warmup)
    radius, ratio = transforms.warmup(
        config.gr.policy,
        radius=config.gr.radius,
        ratio=config.gr.ratio,
        warmup_steps=warmup.steps(steps_per_epoch, total_steps),
    )
    return transforms.gradient_regularization(
        radius, ratio, estimator=config.gr.estimator, num_groups=config.gr.num_groups
    )


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
    base: optax.GradientTransformation, value: float, config: ConfigDict, decays: Any
) -> optax.GradientTransformation:
    """Scheduled weight decay of a base optimizer; `decays` is a tree of booleans, None for all."""
    if config.name == "sgd":
        # SGDS: SGD has no second moment; its effective rate is η / (1 − momentum).
        return optax.chain(base, optax.add_decayed_weights(value / (1 - config.momentum), decays))
    return transforms.scheduled_weight_decay(
        base,
        value,
        mask=decays,
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


def _log_std(nu: Any) -> jax.Array:
    r"""The standard deviation over parameters of :math:`\ln \psi = -\frac12 \ln v`.

    Of ψ's logarithm, so that the bias correction and the scale of the loss cancel, and so that
    parameters whose gradient is 0 but for rounding are outliers; of ψ's variance they are all.
    Entries of 0 are left out; where all are, it is 0.
    """
    leaves = jax.tree.leaves(nu)
    count = jnp.maximum(sum(jnp.sum(x > 0) for x in leaves), 1)
    logs = [-0.5 * jnp.log(jnp.where(x > 0, x, 1).astype(jnp.float32)) for x in leaves]
    mean = sum(map(jnp.sum, logs)) / count
    parts = [jnp.sum(jnp.square(y - mean) * (x > 0)) for x, y in zip(leaves, logs, strict=True)]
    return jnp.sqrt(sum(parts) / count)


def _states(opt_state: Any) -> list[Any]:
    """All of our states in an optimizer's state, outermost first."""
    ours = (transforms.GradientRegularizationState, transforms.ScheduledWeightDecayState)
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, ours))
    return [x for x in leaves if isinstance(x, ours)]
