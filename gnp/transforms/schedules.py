"""Schedules of the ratio of gradient regularization that compose.

A ratio of 0 is a step that costs one gradient, so these are all that periodic and late
regularization need. Extensions: they are in neither paper.
"""

import jax
import jax.numpy as jnp
import optax


def every(k: int, ratio: optax.ScalarOrSchedule) -> optax.Schedule:
    r"""The ratio at t = k, 2k, 3k, …, and 0 at all other t.

    Cost: 1 + 1/k gradients a step on average.

    Args:
      k: the period in updates, 1 or more.
      ratio: a float or a schedule of t.

    Returns:
      A schedule of t, to be used as the ratio of `gradient_regularization`.

    Raises:
      ValueError: if `k` is less than 1.

    Reference:
      Extension; the idea is that of Liu et al., "Towards Efficient and Scalable Sharpness-Aware
      Minimization", CVPR 2022 (there with a reuse of the last perturbed gradient, which this is
      without).

    >>> from gnp import transforms
    >>> schedule = transforms.every(3, 0.8)
    >>> [round(float(schedule(t)), 1) for t in range(1, 7)]
    [0.0, 0.0, 0.8, 0.0, 0.0, 0.8]
    """
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
    return lambda t: jnp.where(jnp.asarray(t) % k == 0, _at(ratio, t), 0)


def between(start: int, stop: int | None, ratio: optax.ScalarOrSchedule) -> optax.Schedule:
    r"""The ratio for :math:`start < t \le stop`, and 0 at all other t.

    `between(warmup_steps, None, ratio)` is zero-warmup (GR paper, Eq. 14-15); compose it as in
    `between(1000, None, every(5, 1.0))`.

    Cost: two gradients a step in between, one elsewhere.

    Args:
      start: the last update before, 0 to begin with the first.
      stop: the last update in between; None for no end.
      ratio: a float or a schedule of t.

    Returns:
      A schedule of t, to be used as the ratio of `gradient_regularization`.

    Raises:
      ValueError: if `start` is negative, or `stop` is before `start`.

    >>> from gnp import transforms
    >>> schedule = transforms.between(1, 3, 0.5)
    >>> [float(schedule(t)) for t in range(1, 6)]
    [0.0, 0.5, 0.5, 0.0, 0.0]
    """
    if start < 0 or (stop is not None and stop < start):
        raise ValueError(f"0 <= start <= stop must hold, got start={start}, stop={stop}")

    def schedule(t: jax.Array) -> jax.Array:
        inside = jnp.asarray(t) > start
        if stop is not None:
            inside &= jnp.asarray(t) <= stop
        return jnp.where(inside, _at(ratio, t), 0)

    return schedule


def _at(ratio: optax.ScalarOrSchedule, t: jax.Array) -> jax.Array:
    return jnp.asarray(ratio(t) if callable(ratio) else ratio)
