"""Scheduled weight decay.

Reference: Xie et al., "On the Overlooked Pitfalls of Weight Decay and How to Mitigate Them: A
Gradient-Norm Perspective", NeurIPS 2023 (arXiv:2011.11152), Eq. 9 and Algorithm 2.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnp.transforms.branches import if_any
from gnp.transforms.norms import mean_of_large, saturated


class ScheduledWeightDecayState(NamedTuple):
    r"""The number of updates made, the mean of v (not bias-corrected), and the inner state.

    `factor` is the :math:`1 / \sqrt{\bar v_t}` of the last update, to be plotted.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count, which no state needs
    mean_nu: jax.Array
    factor: jax.Array
    inner_state: optax.OptState


def scheduled_weight_decay(
    inner: optax.GradientTransformation,
    weight_decay: float | jax.Array,
    *,
    b2: float | jax.Array = 0.999,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    second_moment: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Decoupled weight decay that is scaled by the inverse root of the mean second moment.

    With the base optimizer's direction :math:`u_t` (for Adam,
    :math:`\hat m_t / (\sqrt{\hat v_t} + \epsilon)`), it returns :math:`u_t + \lambda \theta_{t-1}
    / \sqrt{\bar v_t}`, so that after the learning rate

    .. math::
      \theta_t = \theta_{t-1} - \eta_t u_t - \eta_t \lambda \frac{\theta_{t-1}}{\sqrt{\bar v_t}},
      \qquad \bar v_t = \operatorname{mean}(\hat v_t),

    where the mean is over all elements of all parameters and
    :math:`\hat v_t = v_t / (1 - \beta_2^t)`, :math:`v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2`.
    The mean is linear, so :math:`\bar v` is the bias-corrected moving average of
    :math:`\operatorname{mean}(g^2)`: one scalar of state, whatever the base optimizer keeps.
    A zero :math:`\bar v` decays nothing, and one beyond the largest number is that number: it stays
    finite where the gradients are.

    Cost: one gradient a step. Put `scale_by_learning_rate` after it, and clipping before it.

    Args:
      inner: the base optimizer without its learning rate, as `optax.scale_by_adam()`.
      weight_decay: :math:`\lambda`; the papers' is 5e-4, the L2 strength of the same recipe.
      b2: :math:`\beta_2`, that of the base optimizer where it has one.
      mask: a tree of booleans of the parameters' structure (or a function that makes it from
        the parameters) that says what decays. :math:`\bar v` is over all parameters in any case.
      second_moment: a function from the inner state to the tree of :math:`v_t`, for a base
        optimizer whose :math:`v_t` is not the moving average of :math:`g_t^2`, as AMSGrad's
        running maximum: :math:`\bar v_t` is then the mean of that, over :math:`1 - \beta_2^t`.

    Returns:
      An `optax.GradientTransformationExtraArgs`; extra arguments go to `inner`.

    Raises:
      ValueError: if `weight_decay` is negative, or if `update` is called without `params`.

    Reference:
      Xie et al., "On the Overlooked Pitfalls of Weight Decay and How to Mitigate Them",
      NeurIPS 2023, Eq. 9 and Algorithm 2.

    >>> import jax.numpy as jnp, optax
    >>> from gnp import transforms
    >>> tx = transforms.scheduled_weight_decay(optax.identity(), 0.1)
    >>> params = jnp.array([1.0, 2.0])
    >>> updates, _ = tx.update(jnp.array([0.0, 0.5]), tx.init(params), params)
    >>> factor = 1 / jnp.sqrt((0.0**2 + 0.5**2) / 2)  # 1 / sqrt(mean(g^2)) at the first step
    >>> bool(jnp.allclose(updates, jnp.array([0.0, 0.5]) + 0.1 * factor * params))
    True
    """
    if not isinstance(weight_decay, jax.core.Tracer) and weight_decay < 0:
        raise ValueError(f"weight_decay must be 0 or more, got {weight_decay}")
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> ScheduledWeightDecayState:
        dtype = _wide_dtype(params)
        return ScheduledWeightDecayState(
            count=jnp.zeros((), jnp.int32),
            mean_nu=jnp.zeros((), dtype),
            factor=jnp.zeros((), dtype),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: ScheduledWeightDecayState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScheduledWeightDecayState]:
        if params is None:
            raise ValueError(
                "scheduled_weight_decay decays the parameters: call update(grads, state, params)"
            )
        t = optax.safe_increment(state.count)
        dtype = state.mean_nu.dtype
        mean_nu = (b2 * state.mean_nu + (1 - b2) * _mean(updates, dtype, power=2)).astype(dtype)

        def mean_nu_of_large(grads: optax.Updates) -> jax.Array:
            square = mean_of_large(grads, dtype, power=2)
            return (b2 * state.mean_nu + (1 - b2) * square).astype(dtype)

        mean_nu = _unless_finite(mean_nu, mean_nu_of_large, updates)
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        if second_moment is not None:
            nu = second_moment(inner_state)
            of_large = functools.partial(mean_of_large, dtype=dtype, power=1)
            mean_nu = _unless_finite(_mean(nu, dtype, power=1), of_large, nu)
        factor = _decay_factor(mean_nu, t, b2)

        def decayed(update: jax.Array, param: jax.Array) -> jax.Array:
            decay = (weight_decay * factor).astype(dtype) * jnp.asarray(param, dtype)
            return (jnp.asarray(update, dtype) + decay).astype(jnp.asarray(update).dtype)

        decay_tree = mask(params) if callable(mask) else mask
        if decay_tree is None:
            updates = jax.tree.map(decayed, updates, params)
        else:
            updates = jax.tree.map(
                lambda decays, u, p: jax.tree.map(decayed, u, p) if decays else u,
                decay_tree,
                updates,
                params,
            )
        return updates, ScheduledWeightDecayState(t, mean_nu, factor, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _decay_factor(mean_nu: jax.Array, t: jax.Array, b2: float | jax.Array) -> jax.Array:
    """1/√v̄, or 0 where v̄ is below the smallest normal number; `mean_nu` is before correction."""
    corrected = mean_nu / (1 - jnp.asarray(b2, mean_nu.dtype) ** t.astype(mean_nu.dtype))
    corrected = saturated(corrected, mean_nu)
    positive = corrected >= jnp.finfo(mean_nu.dtype).tiny
    return jnp.where(positive, jax.lax.rsqrt(jnp.where(positive, corrected, 1)), 0)


def _unless_finite(x: jax.Array, otherwise: Callable[[Any], jax.Array], tree: Any) -> jax.Array:
    """`x`, or `otherwise(tree)` where it is inf or NaN."""
    return if_any(~jnp.isfinite(x), otherwise, lambda _: x, tree)


def _wide_dtype(tree: Any) -> Any:
    """The dtype of the tree's leaves, float32 at least."""
    return jnp.result_type(jnp.float32, *(jnp.asarray(x).dtype for x in jax.tree.leaves(tree)))


def _mean(tree: Any, dtype: Any, *, power: int) -> jax.Array:
    """The mean over all elements of all leaves to a power."""
    leaves = jax.tree.leaves(tree)
    total = sum((jnp.sum(jnp.asarray(x, dtype) ** power) for x in leaves), jnp.zeros((), dtype))
    return total / max(sum(jnp.size(x) for x in leaves), 1)
