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

ESTIMATORS = ("finite_difference", "exact")
PENALTIES = ("norm", "squared_norm")


class GradientRegularizationState(NamedTuple):
    """The number of updates made, and what the last one did (float32 scalars, to be plotted)."""

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
    to the parameters' and the updates' own dtypes.

    Cost: two gradients a step, and one where :math:`\alpha_t = 0` (the second is not computed).

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
        ascent = updates if ascent_grads is None else ascent_grads

        norm_fn: Callable[..., Any] = _global_norm
        perturbation = functools.partial(
            _perturbation,
            normalise=penalty == "norm",
            adaptive=adaptive,
            mask=mask(params) if callable(mask) else mask,
        )
        origin = params
        if num_groups is not None:
            _check_groups(ascent, num_groups)
            norm_fn = jax.vmap(norm_fn)
            perturbation = jax.vmap(perturbation, in_axes=(None, 0, None))
            origin = jax.tree.map(
                lambda p: jnp.broadcast_to(p, (num_groups, *jnp.shape(p))), params
            )

        def regularized(updates: optax.Updates) -> tuple[optax.Updates, jax.Array]:
            epsilon = perturbation(params, ascent, radius_t)
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
                mixed = jax.tree.map(lambda g, h: _mix(g, h, ratio_t), updates, second)
            return _mean(mixed, num_groups), jnp.mean(norm_fn(second))

        def plain(updates: optax.Updates) -> tuple[optax.Updates, jax.Array]:
            return _mean(updates, num_groups), jnp.zeros_like(norm)

        norm = jnp.mean(norm_fn(ascent))
        if fixed_ratio is not None:
            mixed, second_norm = (regularized if fixed_ratio else plain)(updates)
        else:
            mixed, second_norm = jax.lax.cond(ratio_t != 0, regularized, plain, updates)
        report = (radius_t, ratio_t, norm, second_norm)
        return mixed, GradientRegularizationState(t, *(x.astype(jnp.float32) for x in report))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _perturbation(
    params: optax.Params,
    grads: optax.Updates,
    radius: jax.Array,
    *,
    normalise: bool,
    adaptive: bool,
    mask: Any | None,
) -> optax.Updates:
    """The perturbation ε, in float32 at least; zero for a zero gradient and where masked out."""
    if mask is not None:
        grads = jax.tree.map(
            lambda keep, g: g if keep else jax.tree.map(jnp.zeros_like, g), mask, grads
        )
    scaled = grads
    if adaptive:
        scaled = jax.tree.map(lambda p, g: _wide(p) * _wide(g), params, grads)
    scale = radius
    if normalise:
        norm = _global_norm(scaled)
        scale = jnp.where(norm > 0, radius / jnp.where(norm > 0, norm, 1), 0)

    def epsilon(param: jax.Array, scaled_grad: jax.Array) -> jax.Array:
        wide = _wide(scaled_grad)
        if adaptive:
            wide = _wide(param) * wide
        return scale.astype(wide.dtype) * wide

    return jax.tree.map(epsilon, params, scaled)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _wide(x: jax.Array) -> jax.Array:
    """`x` in float32 at least."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _global_norm(tree: Any) -> jax.Array:
    squares = (jnp.sum(jnp.square(_wide(x))) for x in jax.tree.leaves(tree))
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))


def _add(param: jax.Array, epsilon: jax.Array) -> jax.Array:
    param = jnp.asarray(param)
    return (param.astype(epsilon.dtype) + epsilon).astype(param.dtype)


def _mix(first: jax.Array, second: jax.Array, ratio: jax.Array) -> jax.Array:
    wide = _wide(first)
    ratio = ratio.astype(wide.dtype)
    mixed = (1 - ratio) * wide + ratio * jnp.asarray(second, wide.dtype)
    return mixed.astype(jnp.asarray(first).dtype)


def _mean(tree: Any, num_groups: int | None) -> Any:
    """The mean over the groups' leading axis, where there is one."""
    if num_groups is None:
        return tree
    return jax.tree.map(lambda x: jnp.mean(_wide(x), axis=0).astype(x.dtype), tree)


def _check_groups(tree: Any, num_groups: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.shape(leaf)[:1] != (num_groups,):
            raise ValueError(
                f"with num_groups={num_groups} every gradient has a leading axis of that length, "
                f"but the one at {jax.tree_util.keystr(path) or 'the root'} has the shape "
                f"{jnp.shape(leaf)}: take the gradients with jax.vmap over the groups"
            )
