"""The warmup policies of gradient regularization.

Reference: Zhao et al., "When Will Gradient Regularization Be Harmful?", ICML 2024
(arXiv:2406.09723), Eq. 10-15.
"""

import difflib

import jax
import jax.numpy as jnp
import optax

POLICIES = ("off", "none", "r", "lambda", "zero")


def warmup(
    policy: str, *, radius: float | jax.Array, ratio: float | jax.Array, warmup_steps: int
) -> tuple[optax.ScalarOrSchedule, optax.ScalarOrSchedule]:
    r"""The radius :math:`r_t` and the ratio :math:`\alpha_t = \lambda_t / r_t` under a policy.

    With :math:`w(t) = \min(t / T_w, 1)`, and t = 1 for the first update:

    ========== ================ =================================== ======================
    policy     :math:`r_t`      :math:`\alpha_t`                    :math:`\lambda_t`
    ========== ================ =================================== ======================
    ``off``    0                0                                   0
    ``none``   :math:`r_0`      :math:`\alpha_0`                    :math:`\lambda_0`
    ``r``      :math:`w(t) r_0` :math:`\alpha_0`                    :math:`w(t) \lambda_0`
    ``lambda`` :math:`r_0`      :math:`w(t) \alpha_0`               :math:`w(t) \lambda_0`
    ``zero``   :math:`r_0`      0 for :math:`t \le T_w`, then       0, then
                                :math:`\alpha_0`                    :math:`\lambda_0`
    ========== ================ =================================== ======================

    ``none`` is plain gradient regularization. ``off`` costs one gradient a step, and so does
    ``zero`` for as long as it warms up: a ratio of 0 skips the second gradient.

    Args:
      policy: one of `POLICIES`.
      radius: :math:`r_0`, the length of the perturbation, in units of the parameters.
      ratio: :math:`\alpha_0 = \lambda_0 / r_0`, dimensionless; 1 is SAM.
      warmup_steps: :math:`T_w`, usually that of the learning rate. 0 means no warmup: every
        policy but ``off`` is then ``none``.

    Returns:
      `(radius, ratio)`, the first two arguments of `gradient_regularization`: floats where they
      are constant, otherwise schedules of t (a scalar integer array) to float32 scalars.

    Raises:
      ValueError: for an unknown policy, or a negative radius, ratio or number of steps.

    Reference:
      Zhao et al., "When Will Gradient Regularization Be Harmful?", ICML 2024, Eq. 10-15.

    >>> from gnp import transforms
    >>> radius, ratio = transforms.warmup("zero", radius=0.1, ratio=1.0, warmup_steps=2)
    >>> radius, [float(ratio(t)) for t in (1, 2, 3)]
    (0.1, [0.0, 0.0, 1.0])
    """
    if policy not in POLICIES:
        close = difflib.get_close_matches(str(policy), POLICIES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"valid are: {', '.join(POLICIES)}"
        raise ValueError(f"unknown warmup policy {policy!r}; {hint}")
    for name, value in (("radius", radius), ("ratio", ratio), ("warmup_steps", warmup_steps)):
        if not isinstance(value, jax.core.Tracer) and value < 0:
            raise ValueError(f"{name} must be 0 or more, got {value}")

    def weight(t: jax.Array) -> jax.Array:  # w(t), Eq. 6
        return jnp.minimum(jnp.asarray(t, jnp.float32) / warmup_steps, 1.0)

    if policy == "off":
        return 0.0, 0.0
    if policy == "none" or warmup_steps == 0:
        return radius, ratio
    if policy == "r":
        return lambda t: weight(t) * radius, ratio
    if policy == "lambda":
        return radius, lambda t: weight(t) * ratio
    return radius, lambda t: jnp.where(t > warmup_steps, jnp.float32(ratio), jnp.float32(0))
