"""Optimizers of the SWD paper that Optax does not have."""

from collections.abc import Callable
from typing import Any

import optax

from gnp.transforms.weight_decay import scheduled_weight_decay


def adams(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 5e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
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
    return optax.chain(
        scheduled_weight_decay(
            optax.scale_by_adam(b1=b1, b2=b2, eps=eps), weight_decay, b2=b2, mask=mask
        ),
        optax.scale_by_learning_rate(learning_rate),
    )
