"""Gradient regularization.

Reference: Zhao et al., "When Will Gradient Regularization Be Harmful?", ICML 2024
(arXiv:2406.09723), Eq. 1-4.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class GradientRegularizationState(NamedTuple):
    """The number of updates made, and what the last one did (float32 scalars, to be plotted)."""

    count: jax.Array  # type: ignore[assignment]  # tuple.count, which no state needs
    radius: jax.Array
    ratio: jax.Array
    grad_norm: jax.Array
    perturbed_grad_norm: jax.Array  # 0 where the second gradient was not computed


def gradient_regularization(
    radius: optax.ScalarOrSchedule, ratio: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    r"""Penalises the norm of the gradient.

    The gradient of :math:`L(\theta) + \lambda \|\nabla L(\theta)\|` is
    :math:`g + \lambda H g / \|g\|` with :math:`g = \nabla L(\theta)`. Its Hessian-free estimate,
    which this transform returns, mixes the gradient with that at a perturbed point:

    .. math::
      g_{GR} = (1 - \alpha_t)\, g + \alpha_t \nabla L(\theta + \epsilon), \qquad
      \epsilon = r_t \frac{g}{\|g\|}, \qquad \alpha_t = \frac{\lambda_t}{r_t},

    with the global L2 norm over all parameters. :math:`\alpha = 1` is SAM. A zero gradient gives
    :math:`\epsilon = 0`. Norms, perturbation and mix are computed in float32 at least and rounded
    to the parameters' and the updates' own dtypes.

    Cost: two gradients a step, and one where :math:`\alpha_t = 0` (the second is not computed).

    Put it first in a chain: it wants the raw gradient. `grad_fn` must be the gradient of the loss
    that gave `updates`: same batch, same dropout mask, no running statistics written.

    Args:
      radius: :math:`r_t`, the length of the perturbation in units of the parameters.
      ratio: :math:`\alpha_t`, dimensionless. Both are floats or schedules, called with t = 1 for
        the first update, t = count + 1 in general; `warmup` makes those of the paper.

    Returns:
      An `optax.GradientTransformationExtraArgs` with
      `update(updates, state, params, *, grad_fn)`. `updates` are the gradients at `params`;
      `grad_fn(params)` returns gradients of the same structure. Further extra arguments are
      ignored.

    Raises:
      ValueError: if `radius` or `ratio` is a negative number, or if `update` is called without
        `params` or `grad_fn`.

    Reference:
      Zhao et al., "When Will Gradient Regularization Be Harmful?", ICML 2024, Eq. 1-4.

    >>> import jax, jax.numpy as jnp, optax
    >>> from gnp import transforms
    >>> loss = lambda params: jnp.sum(jnp.array([1.0, 3.0]) * params**2) / 2
    >>> params = jnp.array([3.0, 4.0 / 3.0])
    >>> tx = optax.chain(transforms.gradient_regularization(0.1, 0.5), optax.sgd(1.0))
    >>> updates, _ = tx.update(
    ...     jax.grad(loss)(params), tx.init(params), params, grad_fn=jax.grad(loss))
    >>> print(-updates)  # g + 0.05 H g / |g|, with g = (3, 4) and H = diag(1, 3)
    [3.03 4.12]
    """
    for name, value in (("radius", radius), ("ratio", ratio)):
        if not callable(value) and not isinstance(value, jax.core.Tracer) and value < 0:
            raise ValueError(f"{name} must be 0 or more, got {value}")
    # A plain number is known when the step is traced: 0 then leaves no second gradient in the
    # program, and any other needs no branch.
    fixed_ratio = ratio if isinstance(ratio, (int, float)) else None

    def init_fn(params: optax.Params) -> GradientRegularizationState:
        del params
        zero = jnp.zeros((), jnp.float32)
        return GradientRegularizationState(jnp.zeros((), jnp.int32), zero, zero, zero, zero)

    def update_fn(
        updates: optax.Updates,
        state: GradientRegularizationState,
        params: optax.Params | None = None,
        *,
        grad_fn: Callable[[Any], Any] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GradientRegularizationState]:
        del extra_args
        if params is None:
            raise ValueError(
                "gradient_regularization perturbs the parameters: "
                "call update(grads, state, params, grad_fn=grad_fn)"
            )
        if grad_fn is None:
            raise ValueError(
                "gradient_regularization takes a second gradient: call "
                "update(grads, state, params, grad_fn=jax.grad(loss)), where loss(params) is the "
                "loss that gave grads"
            )
        t = optax.safe_increment(state.count)
        radius_t = jnp.asarray(radius(t) if callable(radius) else radius)
        ratio_t = jnp.asarray(ratio(t) if callable(ratio) else ratio)
        norm = _global_norm(updates)

        def regularized(updates: optax.Updates) -> tuple[optax.Updates, jax.Array]:
            scale = jnp.where(norm > 0, radius_t / jnp.where(norm > 0, norm, 1), 0)
            perturbed = jax.tree.map(lambda p, g: _add_scaled(p, g, scale), params, updates)
            second = grad_fn(perturbed)
            mixed = jax.tree.map(lambda g, h: _mix(g, h, ratio_t), updates, second)
            return mixed, _global_norm(second)

        def plain(updates: optax.Updates) -> tuple[optax.Updates, jax.Array]:
            return updates, jnp.zeros_like(norm)

        if fixed_ratio is not None:
            mixed, second_norm = (regularized if fixed_ratio else plain)(updates)
        else:
            mixed, second_norm = jax.lax.cond(ratio_t != 0, regularized, plain, updates)
        report = (radius_t, ratio_t, norm, second_norm)
        return mixed, GradientRegularizationState(t, *(x.astype(jnp.float32) for x in report))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _wide(x: jax.Array) -> jax.Array:
    """`x` in float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _global_norm(tree: Any) -> jax.Array:
    return jnp.sqrt(sum((jnp.sum(jnp.square(_wide(x))) for x in jax.tree.leaves(tree)), 0.0))


def _add_scaled(param: jax.Array, grad: jax.Array, scale: jax.Array) -> jax.Array:
    grad = _wide(grad)
    return (_wide(param) + scale.astype(grad.dtype) * grad).astype(param.dtype)


def _mix(first: jax.Array, second: jax.Array, ratio: jax.Array) -> jax.Array:
    wide = _wide(first)
    ratio = ratio.astype(wide.dtype)
    return ((1 - ratio) * wide + ratio * second.astype(wide.dtype)).astype(first.dtype)
