"""Optimizers of the SWD paper that Optax does not have, or has in another form."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnp.transforms.weight_decay import scheduled_weight_decay

Mask = Any | Callable[[optax.Params], Any] | None


def adams(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 5e-4,
    amsgrad: bool = False,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamS: Adam with scheduled weight decay.

    .. math::
      m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
      v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \quad
      \hat m_t = \frac{m_t}{1 - \beta_1^t}, \quad \hat v_t = \frac{v_t}{1 - \beta_2^t}, \quad
      \bar v_t = \operatorname{mean}(\hat v_t), \\
      \theta_t = \theta_{t-1} - \eta_t \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}
                 - \eta_t \lambda \frac{\theta_{t-1}}{\sqrt{\bar v_t}}.

    Cost: one gradient a step; Adam's memory and one scalar.

    Args:
      learning_rate: :math:`\eta_t`, a float or an Optax schedule.
      b1: :math:`\beta_1`.
      b2: :math:`\beta_2`.
      eps: :math:`\epsilon`.
      weight_decay: :math:`\lambda`.
      amsgrad: :math:`\hat v_t` is from the running maximum of :math:`v_t`, as in `amsgrad`, and
        :math:`\bar v_t` is the mean of that. It takes one more copy of the parameters.
      mask: what decays, as in `scheduled_weight_decay`.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its `update` needs `params`.

    Raises:
      ValueError: as `scheduled_weight_decay`.

    Reference:
      Xie et al., "On the Overlooked Pitfalls of Weight Decay and How to Mitigate Them",
      NeurIPS 2023, Algorithm 2.

    >>> import jax, jax.numpy as jnp, optax
    >>> from gnp import transforms
    >>> tx = transforms.adams(0.1, weight_decay=1e-3)
    >>> params = jnp.array([1.0, -2.0])
    >>> state = tx.init(params)
    >>> for _ in range(100):
    ...     updates, state = tx.update(2 * params, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> bool(jnp.abs(params).max() < 0.1)
    True
    """
    if amsgrad:
        decayed = scheduled_weight_decay(
            scale_by_amsgrad(b1, b2, eps),
            weight_decay,
            b2=b2,
            mask=mask,
            second_moment=lambda state: state.nu_max,
        )
    else:
        decayed = scheduled_weight_decay(
            optax.scale_by_adam(b1=b1, b2=b2, eps=eps), weight_decay, b2=b2, mask=mask
        )
    return optax.chain(decayed, optax.scale_by_learning_rate(learning_rate))


def sgds(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.9,
    dampening: float = 0.0,
    *,
    weight_decay: float,
    nesterov: bool = False,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGDS: SGD with momentum whose decay follows its effective learning rate.

    .. math::
      m_t = \mu m_{t-1} + (1 - d)\, g_t, \qquad
      \theta_t = \theta_{t-1} - \eta_t m_t
                 - \eta_t \frac{1 - d}{1 - \mu} \lambda \theta_{t-1}.

    With Nesterov's momentum, :math:`\mu m_t + (1 - d)\, g_t` stands in place of :math:`m_t`.

    Cost: one gradient a step; SGD's memory.

    Args:
      learning_rate: :math:`\eta_t`, a float or an Optax schedule.
      momentum: :math:`\mu`, below 1.
      dampening: d.
      weight_decay: :math:`\lambda`.
      nesterov: whether to use Nesterov's momentum.
      mask: a tree of booleans (or a function of the parameters) that says what decays.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its `update` needs `params`.

    Raises:
      ValueError: if `momentum` is not at least 0 and below 1, or `weight_decay` is negative.

    Reference:
      Xie et al., "On the Overlooked Pitfalls of Weight Decay and How to Mitigate Them",
      NeurIPS 2023.

    >>> import jax.numpy as jnp
    >>> from gnp import transforms
    >>> tx = transforms.sgds(0.1, momentum=0.5, weight_decay=0.01)
    >>> params = jnp.array([1.0])
    >>> updates, _ = tx.update(jnp.array([2.0]), tx.init(params), params)
    >>> print(updates)  # -0.1 (2 + 0.01 / (1 - 0.5))
    [-0.202]
    """
    if not isinstance(momentum, jax.core.Tracer) and not 0 <= momentum < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}")
    if not isinstance(weight_decay, jax.core.Tracer) and weight_decay < 0:
        raise ValueError(f"weight_decay must be 0 or more, got {weight_decay}")
    return optax.chain(
        optax.scale(1 - dampening),
        optax.trace(decay=momentum, nesterov=nesterov),
        optax.add_decayed_weights(weight_decay * (1 - dampening) / (1 - momentum), mask),
        optax.scale_by_learning_rate(learning_rate),
    )


class ScaleByAmsgradState(NamedTuple):
    """The number of updates made, both moments, and the running maximum of the second."""

    count: jax.Array  # type: ignore[assignment]  # tuple.count, which no state needs
    mu: optax.Updates
    nu: optax.Updates
    nu_max: optax.Updates


def scale_by_amsgrad(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    r"""The direction of `amsgrad`, to be chained with weight decay and a learning rate.

    .. math::
      u_t = \frac{m_t / (1 - \beta_1^t)}{\sqrt{v^{max}_t / (1 - \beta_2^t)} + \epsilon}

    Cost: one gradient a step; the moments and the maximum, in float32 at least.

    Args:
      b1: :math:`\beta_1`.
      b2: :math:`\beta_2`.
      eps: :math:`\epsilon`.

    Returns:
      An `optax.GradientTransformation` with a `ScaleByAmsgradState`.

    Reference:
      Reddi et al., "On the Convergence of Adam and Beyond", ICLR 2018; the form is PyTorch's.

    >>> import jax.numpy as jnp
    >>> from gnp import transforms
    >>> tx = transforms.scale_by_amsgrad()
    >>> updates, _ = tx.update(jnp.array([2.0]), tx.init(jnp.array([1.0])))
    >>> bool(jnp.allclose(updates, 1.0))
    True
    """

    def direction(m: jax.Array, v_max: jax.Array, t: jax.Array) -> jax.Array:
        v_hat = v_max / (1 - b2**t)
        return m / (1 - b1**t) / (jnp.sqrt(v_hat) + eps)

    return _scale_by_moments(b1, b2, direction)


def amsgrad(
    learning_rate: optax.ScalarOrSchedule, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    r"""AMSGrad in the form that the SWD paper and PyTorch use.

    .. math::
      m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
      v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \quad
      v^{max}_t = \max(v^{max}_{t-1}, v_t), \\
      \theta_t = \theta_{t-1} - \eta_t \frac{m_t / (1 - \beta_1^t)}
                 {\sqrt{v^{max}_t / (1 - \beta_2^t)} + \epsilon}.

    Optax's takes the maximum of the bias-corrected :math:`\hat v_t`, which is another algorithm.

    Cost: one gradient a step; Adam's memory and one more copy of the parameters.

    Args:
      learning_rate: :math:`\eta_t`, a float or an Optax schedule.
      b1: :math:`\beta_1`.
      b2: :math:`\beta_2`.
      eps: :math:`\epsilon`.

    Returns:
      An `optax.GradientTransformation`.

    Reference:
      Reddi et al., "On the Convergence of Adam and Beyond", ICLR 2018.

    >>> import jax.numpy as jnp
    >>> from gnp import transforms
    >>> tx = transforms.amsgrad(0.1)
    >>> updates, _ = tx.update(jnp.array([2.0]), tx.init(jnp.array([1.0])))
    >>> bool(jnp.allclose(updates, -0.1))  # the first step is that of Adam
    True
    """
    return optax.chain(scale_by_amsgrad(b1, b2, eps), optax.scale_by_learning_rate(learning_rate))


def scale_by_padam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, partial: float = 0.125
) -> optax.GradientTransformation:
    r"""The direction of `padam`, to be chained with weight decay and a learning rate.

    .. math::
      u_t = \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
            \frac{m_t}{(\sqrt{v^{max}_t} + \epsilon)^{2p}}

    Cost: one gradient a step; the moments and the maximum, in float32 at least.

    Args:
      b1: :math:`\beta_1`.
      b2: :math:`\beta_2`.
      eps: :math:`\epsilon`.
      partial: p, from 0 (SGD with momentum) to 1/2 (AMSGrad).

    Returns:
      An `optax.GradientTransformation` with a `ScaleByAmsgradState`.

    Reference:
      Chen et al., "Closing the Generalization Gap of Adaptive Gradient Methods in Training Deep
      Neural Networks", IJCAI 2020.

    >>> import jax.numpy as jnp
    >>> from gnp import transforms
    >>> tx = transforms.scale_by_padam(partial=0.5)
    >>> updates, _ = tx.update(jnp.array([2.0]), tx.init(jnp.array([1.0])))
    >>> bool(jnp.allclose(updates, 1.0))
    True
    """

    def direction(m: jax.Array, v_max: jax.Array, t: jax.Array) -> jax.Array:
        step = jnp.sqrt(1 - b2**t) / (1 - b1**t)
        return step * m / (jnp.sqrt(v_max) + eps) ** (2 * partial)

    return _scale_by_moments(b1, b2, direction)


def padam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    partial: float = 0.125,
) -> optax.GradientTransformation:
    r"""Padam: AMSGrad that is only partially adaptive.

    With the moments and the running maximum of `amsgrad`,

    .. math::
      \theta_t = \theta_{t-1} - \eta_t \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
                 \frac{m_t}{(\sqrt{v^{max}_t} + \epsilon)^{2p}}.

    Cost: one gradient a step; Adam's memory and one more copy of the parameters.

    Args:
      learning_rate: :math:`\eta_t`, a float or an Optax schedule.
      b1: :math:`\beta_1`.
      b2: :math:`\beta_2`.
      eps: :math:`\epsilon`.
      partial: p, from 0 (SGD with momentum) to 1/2 (AMSGrad).

    Returns:
      An `optax.GradientTransformation`.

    Reference:
      Chen et al., "Closing the Generalization Gap of Adaptive Gradient Methods in Training Deep
      Neural Networks", IJCAI 2020.

    >>> import jax.numpy as jnp
    >>> from gnp import transforms
    >>> tx = transforms.padam(0.1, b2=0.99)
    >>> updates, _ = tx.update(jnp.array([1.0]), tx.init(jnp.array([1.0])))
    >>> bool(jnp.allclose(updates, -0.1 * 0.01 ** (0.5 - 0.125)))
    True
    """
    return optax.chain(
        scale_by_padam(b1, b2, eps, partial), optax.scale_by_learning_rate(learning_rate)
    )


def _scale_by_moments(
    b1: float, b2: float, direction: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
) -> optax.GradientTransformation:
    """Adam's raw moments and the running maximum; `direction(m, v_max, t)` element by element."""

    def init_fn(params: optax.Params) -> ScaleByAmsgradState:
        zeros = (_wide_zeros(params) for _ in range(3))
        return ScaleByAmsgradState(jnp.zeros((), jnp.int32), *zeros)

    def update_fn(
        updates: optax.Updates, state: ScaleByAmsgradState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByAmsgradState]:
        del params
        t = optax.safe_increment(state.count)
        mu, nu = _moments(updates, state.mu, state.nu, b1, b2)
        nu_max = jax.tree.map(jnp.maximum, state.nu_max, nu)
        updates = jax.tree.map(
            lambda g, m, v: direction(m, v, t.astype(m.dtype)).astype(jnp.asarray(g).dtype),
            updates,
            mu,
            nu_max,
        )
        return updates, ScaleByAmsgradState(t, mu, nu, nu_max)

    return optax.GradientTransformation(init_fn, update_fn)


def _wide_zeros(params: optax.Params) -> optax.Updates:
    """Zeros in float32 at least: bfloat16 cannot hold a moving average with β₂ = 0.999."""
    return jax.tree.map(
        lambda p: jnp.zeros(jnp.shape(p), jnp.result_type(jnp.float32, jnp.asarray(p).dtype)),
        params,
    )


def _moments(
    grads: optax.Updates, mu: optax.Updates, nu: optax.Updates, b1: float, b2: float
) -> tuple[optax.Updates, optax.Updates]:
    """The moving averages of g and g², in the dtype of those before."""
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * _squarable(g, m.dtype), mu, grads)
    nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * _squarable(g, v.dtype) ** 2, nu, grads)
    return mu, nu


def _squarable(grad: jax.Array, dtype: Any) -> jax.Array:
    """The gradient within what has a finite square: ±2⁶³ in float32, unless it is inf or NaN.

    The second moment would be inf for ever. Clipped for both moments, their ratio stays right.
    """
    grad = jnp.asarray(grad, dtype)
    largest = 2.0 ** (jnp.finfo(dtype).maxexp // 2 - 1)
    return jnp.where(jnp.isfinite(grad), jnp.clip(grad, -largest, largest), grad)


class ScaleByAdaboundState(NamedTuple):
    """The number of updates made, and both moments."""

    count: jax.Array  # type: ignore[assignment]  # tuple.count, which no state needs
    mu: optax.Updates
    nu: optax.Updates


def scale_by_adabound(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    final_ratio: float | jax.Array,
    gamma: float = 1e-3,
) -> optax.GradientTransformation:
    r"""The direction of `adabound`, to be chained with weight decay and a learning rate.

    .. math::
      u_t = \operatorname{clip}\!\left(
      \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \frac{1}{\sqrt{v_t} + \epsilon},\;
      \rho \Bigl(1 - \frac{1}{\gamma t + 1}\Bigr),\;
      \rho \Bigl(1 + \frac{1}{\gamma t}\Bigr)\right) m_t, \qquad \rho = \eta^* / \eta_0

    Cost: one gradient a step; the moments, in float32 at least.

    Args:
      b1: :math:`\beta_1`.
      b2: :math:`\beta_2`.
      eps: :math:`\epsilon`.
      final_ratio: :math:`\rho`, the final learning rate over the base one: the schedule that
        follows in the chain scales both.
      gamma: :math:`\gamma`, how fast the bounds close in, per update.

    Returns:
      An `optax.GradientTransformation` with a `ScaleByAdaboundState`.

    Reference:
      Luo et al., "Adaptive Gradient Methods with Dynamic Bound of Learning Rate", ICLR 2019.

    >>> import jax.numpy as jnp
    >>> from gnp import transforms
    >>> tx = transforms.scale_by_adabound(final_ratio=100.0, gamma=1e6)
    >>> updates, _ = tx.update(jnp.array([2.0]), tx.init(jnp.array([1.0])))
    >>> bool(jnp.allclose(updates, 100.0 * 0.1 * 2.0))  # bounds that are closed
    True
    """

    def init_fn(params: optax.Params) -> ScaleByAdaboundState:
        zeros = (_wide_zeros(params) for _ in range(2))
        return ScaleByAdaboundState(jnp.zeros((), jnp.int32), *zeros)

    def update_fn(
        updates: optax.Updates, state: ScaleByAdaboundState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByAdaboundState]:
        del params
        t = optax.safe_increment(state.count)
        mu, nu = _moments(updates, state.mu, state.nu, b1, b2)

        def direction(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            time = t.astype(m.dtype)
            step = jnp.sqrt(1 - b2**time) / (1 - b1**time) / (jnp.sqrt(v) + eps)
            lower = final_ratio * (1 - 1 / (gamma * time + 1))
            upper = final_ratio * (1 + 1 / (gamma * time))
            return (jnp.clip(step, lower, upper) * m).astype(jnp.asarray(g).dtype)

        return jax.tree.map(direction, updates, mu, nu), ScaleByAdaboundState(t, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def adabound(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    final_learning_rate: float = 0.1,
    gamma: float = 1e-3,
    base_learning_rate: float | jax.Array | None = None,
) -> optax.GradientTransformation:
    r"""AdaBound: Adam whose step sizes close in on those of SGD.

    With Adam's raw moments,

    .. math::
      \theta_t = \theta_{t-1} - \operatorname{clip}\!\left(
      \eta_t \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \frac{1}{\sqrt{v_t} + \epsilon},\;
      \eta^*_t \Bigl(1 - \frac{1}{\gamma t + 1}\Bigr),\;
      \eta^*_t \Bigl(1 + \frac{1}{\gamma t}\Bigr)\right) m_t,
      \qquad \eta^*_t = \eta^* \eta_t / \eta_0.

    Cost: one gradient a step; Adam's memory.

    Args:
      learning_rate: :math:`\eta_t`, a float or an Optax schedule.
      b1: :math:`\beta_1`.
      b2: :math:`\beta_2`.
      eps: :math:`\epsilon`.
      final_learning_rate: :math:`\eta^*`, SGD's learning rate at the end.
      gamma: how fast the bounds close in, per update.
      base_learning_rate: :math:`\eta_0`, which the schedule is relative to; by default the
        learning rate at count 0.

    Returns:
      An `optax.GradientTransformation`.

    Raises:
      ValueError: if :math:`\eta_0` is not above 0, as where a schedule warms up from 0: then say
        which it is.

    Reference:
      Luo et al., "Adaptive Gradient Methods with Dynamic Bound of Learning Rate", ICLR 2019.

    >>> import jax.numpy as jnp
    >>> from gnp import transforms
    >>> tx = transforms.adabound(1e-3, final_learning_rate=0.1, gamma=1e6)
    >>> updates, _ = tx.update(jnp.array([2.0]), tx.init(jnp.array([1.0])))
    >>> bool(jnp.allclose(updates, -0.1 * 0.1 * 2.0))  # bounds that are closed: SGD's step
    True
    """
    if base_learning_rate is None:
        base_learning_rate = learning_rate(0) if callable(learning_rate) else learning_rate
    if not isinstance(base_learning_rate, jax.core.Tracer) and base_learning_rate <= 0:
        raise ValueError(
            f"the learning rate at count 0 is {base_learning_rate}, which the final one cannot be "
            "relative to: give base_learning_rate, the schedule's highest"
        )
    return optax.chain(
        scale_by_adabound(
            b1, b2, eps, final_ratio=final_learning_rate / base_learning_rate, gamma=gamma
        ),
        optax.scale_by_learning_rate(learning_rate),
    )
