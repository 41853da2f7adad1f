"""Gradient regularization.

Reference: Zhao et al., "When Will Gradient Regularization Be Harmful?", ICML 2024
(arXiv:2406.09723), Eq. 1-4.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnp.transforms.branches import if_any
from gnp.transforms.norms import (
    ScaledNorm,
    largest,
    power_to_unit,
    saturated,
    scaled_norm,
    times,
    wide,
)

ESTIMATORS = ("finite_difference", "exact")
PENALTIES = ("norm", "squared_norm")


class GradientRegularizationState(NamedTuple):
    """The number of updates made, and what the last one did (float32 scalars, to be plotted).

    A norm is finite where all that it is of is: beyond float32's largest number it is that number.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count, which no state needs
    radius: jax.Array
    ratio: jax.Array
    grad_norm: jax.Array  # of the gradient that is perturbed along; with groups, their mean
    perturbed_grad_norm: jax.Array  # 0 where the second gradient was not computed


def gradient_regularization(
    radius: optax.ScalarOrSchedule,
    ratio: optax.ScalarOrSchedule,
    *,
    estimator: str = "finite_difference",
    penalty: str = "norm",
    num_groups: int | None = None,
    adaptive: bool = False,
    mask: Any | Callable[[optax.Params], Any] | None = None,
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
    to the parameters' and the updates' own dtypes. :math:`\epsilon` has its length, and no finite
    number becomes an inf or a NaN, also where the squares of g overflow or vanish; gradients below
    the smallest normal number, 1.2e-38, count as 0.

    Cost: two gradients a step, and one where :math:`\alpha_t = 0` (the second is not computed;
    under `jax.vmap`, where it is 0 for all of the batch).

    Put it first in a chain: it wants the raw gradient. `grad_fn` must be the gradient of the loss
    that gave `updates`: same batch, same dropout mask, no running statistics written. It wants all
    parameters, so use `mask` in place of `optax.masked` or `optax.partition`. To accumulate
    gradients, let `updates` and `grad_fn` both be means over the microbatches, as in
    scripts/examples/accumulation.py: inside `optax.MultiSteps`, `grad_fn` would be that of the last
    microbatch alone.

    Args:
      radius: :math:`r_t`, the length of the perturbation in units of the parameters.
      ratio: :math:`\alpha_t`, dimensionless. Both are floats or schedules, called with t = 1 for
        the first update, t = count + 1 in general; `warmup` makes those of the paper.
      estimator: "finite_difference", as above, or "exact": the linearised
        :math:`g + H \epsilon` in place of :math:`\nabla L(\theta + \epsilon)`, by `jax.jvp` of
        `grad_fn`, so that :math:`g_{GR} = g + \lambda_t H g / \|g\|` without truncation error.
        It costs about three gradients a step, four where the ratio is a schedule (the branch then
        computes the first anew), and wants a `grad_fn` that can be differentiated forward.
      penalty: "norm", or "squared_norm" for :math:`L + (\lambda/2) \|\nabla L\|^2`, where
        :math:`\epsilon = r_t\, g` is not normalised.
      num_groups: m, for m-sharpness (extension; Foret et al., "Sharpness-Aware Minimization",
        ICLR 2021). Every leaf of `updates` then has a leading axis of m gradients, one
        a group of examples; `grad_fn` maps m parameter trees, stacked likewise, to m gradients;
        each group is perturbed along its own gradient, and the mean over the groups is returned.
      adaptive: scales the perturbation per parameter (extension; Kwon et al., "ASAM", ICML
        2021): :math:`\epsilon = r_t\, \theta^2 g / \|\theta g\|`, element by element. With
        "squared_norm", :math:`\epsilon = r_t\, \theta^2 g`.
      mask: a tree of booleans of the parameters' structure (or a function that makes it from the
        parameters) that says what is perturbed, for instance all but biases and norms; the norm in
        :math:`\epsilon` is over what is (extension).

    Returns:
      An `optax.GradientTransformationExtraArgs` with
      `update(updates, state, params, *, grad_fn, ascent_grads=None)`. `updates` are the gradients
      at `params`; `grad_fn(params)` returns gradients of the same structure. `ascent_grads`, where
      given, is perturbed along in place of `updates` (extension): the gradient of a fraction f of
      the batch, say. With the ratio 1.0 `updates` are then not used, and a compiled step costs
      1 + f gradients. Further extra arguments are ignored.

    Raises:
      ValueError: if an argument is none of the above, or if `update` is called without `params` or
        `grad_fn`, or with a leading axis that is not `num_groups`.

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
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    if penalty not in PENALTIES:
        raise ValueError(f"penalty must be one of {', '.join(PENALTIES)}, got {penalty!r}")
    if num_groups is not None and num_groups < 1:
        raise ValueError(f"num_groups must be 1 or more, got {num_groups}")
    # A plain number is known when the step is traced: 0 then leaves no second gradient in the
    # program, 1 no first one in the mix, and neither needs a branch.
    fixed_ratio = ratio if isinstance(ratio, (int, float)) else None

    def init_fn(params: optax.Params) -> GradientRegularizationState:
        del params
        return GradientRegularizationState(
            jnp.zeros((), jnp.int32), *(jnp.zeros((), jnp.float32) for _ in range(4))
        )

    def update_fn(
        updates: optax.Updates,
        state: GradientRegularizationState,
        params: optax.Params | None = None,
        *,
        grad_fn: Callable[[Any], Any] | None = None,
        ascent_grads: optax.Updates | None = None,
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
        if any(_is_masked(x) for x in jax.tree.leaves(params, is_leaf=_is_masked)):
            raise ValueError(
                "gradient_regularization inside optax.masked or optax.partition sees a part of the "
                "parameters, but grad_fn wants all: put it outside, and use its argument mask"
            )
        t = optax.safe_increment(state.count)
        radius_t = jnp.asarray(radius(t) if callable(radius) else radius)
        ratio_t = jnp.asarray(ratio(t) if callable(ratio) else ratio)
        if fixed_ratio == 0.5:  # of which XLA would make half of a sum that can overflow
            ratio_t = jax.lax.optimization_barrier(ratio_t)
        ascent = updates if ascent_grads is None else ascent_grads

        norm_fn = functools.partial(scaled_norm, stacked=num_groups is not None)
        products: Callable[..., Any] = _products
        perturbation: Callable[..., Any] = functools.partial(
            _perturbation if penalty == "norm" else _squared_norm_perturbation, adaptive=adaptive
        )
        origin = params
        if num_groups is not None:
            _check_groups(ascent, num_groups)
            products = jax.vmap(products, in_axes=(None, 0))
            perturbation = jax.vmap(perturbation, in_axes=(None, 0, 0, None))
            origin = jax.tree.map(
                lambda p: jnp.broadcast_to(p, (num_groups, *jnp.shape(p))), params
            )

        def regularized(updates: optax.Updates) -> tuple[optax.Updates, jax.Array]:
            along = ascent
            if mask is not None:
                along = _perturbed(mask(params) if callable(mask) else mask, ascent)
            if adaptive and penalty == "norm":
                along = products(params, along)
            norm_along = ascent_norm if along is ascent else norm_fn(along)
            epsilon = perturbation(params, along, norm_along, radius_t)
            if estimator == "exact":
                tangents = jax.tree.map(
                    lambda e, p: jnp.asarray(e, jnp.asarray(p).dtype), epsilon, origin
                )
                first, product = jax.jvp(grad_fn, (origin,), (tangents,))
                second = jax.tree.map(jnp.add, first, product)
            else:
                second = grad_fn(jax.tree.map(_add, origin, epsilon))
            if fixed_ratio == 1:
                mixed = jax.tree.map(
                    lambda g, h: jnp.asarray(h, jnp.asarray(g).dtype), updates, second
                )
            else:
                up_to_1 = fixed_ratio is not None and fixed_ratio < 1
                mix = functools.partial(_mix, ratio=ratio_t, up_to_1=up_to_1)
                mixed = jax.tree.map(mix, updates, second)
            return _mean(mixed, num_groups), _mean(norm_fn(second).value(), num_groups)

        def plain(updates: optax.Updates) -> tuple[optax.Updates, jax.Array]:
            return _mean(updates, num_groups), jnp.zeros_like(norm)

        ascent_norm = norm_fn(ascent)
        norm = _mean(ascent_norm.value(), num_groups)
        if fixed_ratio is not None:
            mixed, second_norm = (regularized if fixed_ratio else plain)(updates)
        else:
            mixed, second_norm = if_any(ratio_t != 0, regularized, plain, updates)
        report = (radius_t, ratio_t, norm, second_norm)
        return mixed, GradientRegularizationState(
            t, *(saturated(wide(x), wide(x), jnp.float32) for x in report)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _perturbed(mask: Any, grads: optax.Updates) -> optax.Updates:
    """The gradients, zero for what is not perturbed."""
    return jax.tree.map(lambda keep, g: g if keep else jax.tree.map(jnp.zeros_like, g), mask, grads)


def _products(params: optax.Params, grads: optax.Updates) -> optax.Updates:
    """θ g times a power of two, with which it does not overflow."""
    power = power_to_unit(largest(grads))
    return jax.tree.map(lambda p, g: wide(p) * times(power, wide(g)), params, grads)


def _perturbation(
    params: optax.Params,
    along: optax.Updates,
    norm: ScaledNorm,
    radius: jax.Array,
    *,
    adaptive: bool,
) -> optax.Updates:
    """The perturbation ε, in float32 at least; zero where the norm is.

    Args:
      params: θ.
      along: g, or θ g up to a factor.
      norm: of `along`.
      radius: r.
      adaptive: whether ε has another factor θ.
    """
    power, unit_norm = norm.unit()
    positive = unit_norm > 0
    number = jnp.finfo(unit_norm.dtype)
    # An element of ε that is rounded up from the largest radius would be inf.
    radius = jnp.minimum(radius, float(number.max) * (1 - 4 * float(number.eps)))
    scale = jnp.where(positive, radius / jnp.where(positive, unit_norm, 1), 0)

    def epsilon(param: jax.Array, x: jax.Array) -> jax.Array:
        x = times(power, wide(x))
        if adaptive:
            x = wide(param) * x
        return times(scale, x)

    return jax.tree.map(epsilon, params, along)


def _squared_norm_perturbation(
    params: optax.Params,
    grads: optax.Updates,
    norm: ScaledNorm,
    radius: jax.Array,
    *,
    adaptive: bool,
) -> optax.Updates:
    """The perturbation r g, or r θ² g, in float32 at least."""
    del norm

    def epsilon(param: jax.Array, grad: jax.Array) -> jax.Array:
        param, grad = wide(param), wide(grad)
        if not adaptive:
            return times(radius, grad)
        product = param * (param * grad)
        # Where that overflows, |θ| is above 1 and r θ does not vanish.
        return jnp.where(
            jnp.isfinite(product), times(radius, product), times(radius, param) * grad * param
        )

    return jax.tree.map(epsilon, params, grads)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _add(param: jax.Array, epsilon: jax.Array) -> jax.Array:
    param = jnp.asarray(param)
    return (param.astype(epsilon.dtype) + epsilon).astype(param.dtype)


def _mix(first: jax.Array, second: jax.Array, *, ratio: jax.Array, up_to_1: bool) -> jax.Array:
    dtype = jnp.asarray(first).dtype
    first = wide(first)
    ratio, second = ratio.astype(first.dtype), jnp.asarray(second, first.dtype)
    mixed = (1 - ratio) * first + ratio * second
    if not up_to_1:
        # The terms can overflow where their sum does not.
        above = jnp.maximum(ratio, 1)
        halved = (1 - ratio) / above / 2 * first + ratio / above / 2 * second
        mixed = jnp.where(jnp.isfinite(mixed), mixed, halved * above * 2)
    return mixed.astype(dtype)


def _mean(tree: Any, num_groups: int | None) -> Any:
    """The mean over the groups' leading axis, where there is one."""
    if num_groups is None:
        return tree

    # The sum can overflow where the mean does not. One sum, since it goes over the devices; a power
    # of two rounds nothing.
    power = 2.0 ** -num_groups.bit_length()

    def mean(x: jax.Array) -> jax.Array:
        part = jnp.sum(wide(x) * power, axis=0)
        return saturated(part / (num_groups * power), part).astype(x.dtype)

    return jax.tree.map(mean, tree)


def _check_groups(tree: Any, num_groups: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.shape(leaf)[:1] != (num_groups,):
            raise ValueError(
                f"with num_groups={num_groups} every gradient has a leading axis of that length, "
                f"but the one at {jax.tree_util.keystr(path) or 'the root'} has the shape "
                f"{jnp.shape(leaf)}: take the gradients with jax.vmap over the groups"
            )
