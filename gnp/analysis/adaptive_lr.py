r"""The variance of the adaptive learning rate, in theory, in simulation and in a training run.

Adam divides its step by the root of a moving average of squared gradients. Early in training this
average has few terms, and where gradients decay fast it has in effect few for good; its inverse
root, and with it the step, then varies much from one parameter or seed to another.

Reference: Zhao et al., "When Will Gradient Regularization Be Harmful?", ICML 2024
(arXiv:2406.09723), Eq. 5 and 7-9.
"""

import math
from typing import Any

import jax
import numpy as np
import optax
from numpy.typing import ArrayLike


def psi(grads: ArrayLike, b2: float) -> np.ndarray:
    r"""The adaptive learning rate that a sequence of gradients leads to (Eq. 5).

    .. math::
      \psi_t = \sqrt{\frac{1 - \beta_2^t}{(1 - \beta_2) \sum_{i=1}^t \beta_2^{t-i} g_i^2}}
             = \frac{1}{\sqrt{\hat v_t}}

    with Adam's bias-corrected :math:`\hat v_t` and no :math:`\epsilon`. Where all gradients are 0
    it is 0, as the factor of scheduled weight decay is.

    Args:
      grads: :math:`g_1, \dots, g_t`, [t, …] with t at least 1.
      b2: :math:`\beta_2`, 0 to 1; 1 is its limit, the plain mean of the squares.

    Returns:
      :math:`\psi_t`, […], in float64.
    """
    squares = np.square(np.asarray(grads, np.float64))
    weights = b2 ** np.arange(len(squares) - 1, -1, -1.0)  # their sum is (1 - b2^t) / (1 - b2)
    nu_hat = np.tensordot(weights / weights.sum(), squares, 1)
    positive = nu_hat != 0  # a NaN stays one
    return np.where(positive, 1 / np.sqrt(np.where(positive, nu_hat, 1)), 0)


def variance_psi(t: ArrayLike, sigma1: ArrayLike, gamma: ArrayLike) -> np.ndarray:
    r"""The variance of :math:`\psi_t` for decaying Gaussian gradients, approximately (Eq. 9).

    .. math::
      \operatorname{Var} \psi_t \approx \frac{t}{2 \sigma_1} \cdot
        \frac{(1 + e^{-\gamma t}) (1 - e^{-\gamma})^2}{(1 + e^{-\gamma}) (1 - e^{-\gamma t})^2}
        \qquad \Bigl(\to \frac{1}{2 \sigma_1 t} \text{ for } \gamma \to 0\Bigr)

    Derivation: let :math:`g_k \sim N(0, \sigma_k)` be independent, :math:`\sigma_k` being the
    *variance*, and :math:`\beta_2 \to 1`, so that :math:`\psi_t = v^{-1/2}` with v the mean of
    the :math:`g_k^2`. The delta method gives :math:`\operatorname{Var} \psi \approx
    \operatorname{Var}(v) / (4 (\operatorname{E} v)^3)
    = t \sum \sigma_k^2 / (2 (\sum \sigma_k)^3)`, and the geometric sums for
    :math:`\sigma_k = \sigma_1 e^{-\gamma (k-1)}` give Eq. 9 exactly. (Were :math:`\sigma_k = \sigma
    e^{-\gamma k}`, the same holds for :math:`\sigma_1 = \sigma e^{-\gamma}`.)

    How far it is off. The variance is finite only for :math:`t \ge 3`. Eq. 9 is too small by a
    factor that depends, to leading order, on the effective number of gradients

    .. math::
      n = \frac{(\sum \sigma_k)^2}{\sum \sigma_k^2}
        = \frac{\tanh(\gamma t / 2)}{\tanh(\gamma / 2)} \le t, \qquad
      \frac{\operatorname{Var} \psi}{\text{Eq. 9}} = 1 + \frac{39}{4 n}
        - 6 \frac{\sum \sigma_k^3}{\sum \sigma_k \sum \sigma_k^2} + O(n^{-2}),

    that is 1 + 3.75/t without decay and about :math:`1 + \frac78 \gamma` for
    :math:`1/t \ll \gamma \ll 1`: the error does not vanish with t where gradients decay. The exact
    variance, by quadrature, over Eq. 9:

    ==== ===== ===== ===== ===== ===== =====
    t    γ = 0 0.01  0.1   0.3   1     2
    ==== ===== ===== ===== ===== ===== =====
    3    6.54  6.54  6.52  6.39  6.05  8.75
    5    2.52  2.52  2.50  2.42  2.81  6.34
    10   1.51  1.51  1.49  1.47  2.50  6.29
    20   1.22  1.22  1.20  1.32  2.49  6.29
    100  1.04  1.04  1.09  1.31  2.49  6.29
    1000 1.00  1.01  1.09  1.31  2.49  6.29
    ==== ===== ===== ===== ===== ===== =====

    With :math:`\beta_2 < 1` it holds while :math:`(1 - \beta_2) t \ll 1`. Beyond, the average
    forgets the large early gradients, which the plain mean keeps: the formula that follows in the
    same way has :math:`\gamma + \ln \beta_2` for :math:`\gamma`, and for t/2 it has
    :math:`1 / (2 w_1)`, with the weight
    :math:`w_1 = (1 - \beta_2) \beta_2^{t-1} / (1 - \beta_2^t)` of the first gradient.

    Args:
      t: the number of gradients.
      sigma1: :math:`\sigma_1`, the variance of the first gradient, in units of a gradient squared.
      gamma: :math:`\gamma`, the decay of the variance in a step. The three broadcast.

    Returns:
      The variance, in units of 1 / `sigma1`, float64.
    """
    t, sigma1, gamma = (np.asarray(x, np.float64) for x in (t, sigma1, gamma))
    rate = np.where(gamma == 0, 1, gamma)
    # expm1, since 1 - exp loses all digits of a small gamma
    ratio = np.where(gamma == 0, 1 / t, np.expm1(-rate) / np.expm1(-rate * t))
    return t / (2 * sigma1) * ratio**2 * (1 + np.exp(-gamma * t)) / (1 + np.exp(-gamma))


def increasing_in_gamma(t: ArrayLike, gamma: ArrayLike) -> np.ndarray:
    r"""The paper's condition for Eq. 9 to increase with γ: :math:`t e^{-\gamma (t-1)} \le 1`.

    It is sufficient but not needed: at every fixed t > 1 Eq. 9 increases with γ from γ = 0 on. It
    is :math:`\frac{t}{2 \sigma_1} \cdot \frac{\tanh(\gamma / 2)}{\tanh(\gamma t / 2)} \cdot
    \frac{1 - e^{-\gamma}}{1 - e^{-\gamma t}}`, and both quotients increase because
    :math:`x / \sinh x` and :math:`x / (e^x - 1)` decrease.

    Args:
      t: the number of gradients, at least 1.
      gamma: :math:`\gamma`, the decay of the variance in a step. The two broadcast.

    Returns:
      Booleans; the condition is :math:`\gamma \ge \ln(t) / (t - 1)`.
    """
    t, gamma = np.asarray(t, np.float64), np.asarray(gamma, np.float64)
    return t * np.exp(-gamma * (t - 1)) <= 1


def monte_carlo_variance_psi(
    key: jax.Array, t: int, sigma1: float, gamma: float, num_samples: int, *, b2: float = 1.0
) -> tuple[float, float]:
    r"""The variance of :math:`\psi_t` measured over random gradients, and its standard error.

    The gradients are independent, :math:`g_k \sim N(0, \sigma_1 e^{-\gamma (k-1)})` with the
    *variance* as second argument, as in Eq. 7-9.

    :math:`\operatorname{E} \psi^p` is finite only for t > p, since the density of
    :math:`\hat v_t` near 0 is that of :math:`\chi^2_t`. So the variance exists from t = 3 on, its
    standard error from t = 5, and that error is itself measured with finite variance from t = 9.

    Args:
      key: a JAX random key.
      t: the number of gradients, at least 3.
      sigma1: :math:`\sigma_1`, the variance of the first.
      gamma: :math:`\gamma`, the decay of the variance in a step.
      num_samples: how many sequences are drawn; they take about 24 · t · `num_samples` bytes.
      b2: :math:`\beta_2`; 1 is the plain mean, to which Eq. 9 belongs.

    Returns:
      `(variance, standard_error)`; the second is infinite for t < 5.

    Raises:
      ValueError: if `t` is less than 3: the variance is infinite.
    """
    if t < 3:
        raise ValueError(f"the variance of psi is finite for t of 3 or more, got {t}")
    deviations = np.sqrt(sigma1 * np.exp(-gamma * np.arange(t)))
    samples = psi(deviations[:, None] * jax.random.normal(key, (t, num_samples)), b2)
    squares = np.square(samples - samples.mean())
    variance = squares.sum() / (num_samples - 1)
    error = squares.std() / math.sqrt(num_samples) if t >= 5 else math.inf
    return float(variance), float(error)


def measured_variance(nu: Any, count: int | jax.Array, b2: float) -> float:
    r"""The variance of :math:`1 / \sqrt{\hat v_t}` over all parameters: Eq. 9 in a training run.

    Eq. 9 is about the spread of one parameter's rate over random gradients. Here the spread over
    parameters whose gradients differ in scale comes on top.

    Entries of 0 are left out: they are parameters that never had a gradient (rows of an embedding
    that did not occur, say), or one whose square underflowed; they have no adaptive rate.

    Args:
      nu: a tree of :math:`v_t`, before bias correction, as in Optax's `ScaleByAdamState`.
      count: t, the number of updates made.
      b2: :math:`\beta_2` of the optimizer.

    Returns:
      The population variance; NaN where no entry is left, or where one is NaN.
    """
    entries = _nonzero(nu)
    if not entries.size:
        return math.nan
    return float(np.var(np.sqrt((1 - b2 ** int(count)) / entries)))


def measured_spread(nu: Any) -> float:
    r"""How far apart the adaptive learning rates of the parameters are, in a training run.

    The 95th over the 5th percentile of :math:`1 / \sqrt{v_t}` over all parameters; the correction
    of the bias cancels. Parameters whose gradient is 0 but for rounding, as that of the biases of
    attention's keys, have enormous rates, and where there are any the variance is theirs; they do
    not move the percentiles while they are few.

    Args:
      nu: as for `measured_variance`, without its entries of 0.

    Returns:
      At least 1; NaN where no entry is left, or where one is NaN.
    """
    entries = _nonzero(nu)
    if not entries.size:
        return math.nan
    low, high = np.quantile(entries, (0.05, 0.95))
    return float(np.sqrt(high / low))


def _nonzero(nu: Any) -> np.ndarray:
    """The entries of all leaves that are not 0, in float64."""
    leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(nu)]
    entries = np.concatenate([np.empty(0), *leaves])
    return entries[entries != 0]


def second_moments(opt_state: Any, name: str = "nu") -> list[tuple[Any, Any]]:
    """The pairs of v_t and t in an optimizer's state, however deep in chains; t may be None.

    Args:
      opt_state: the state of an Optax transform.
      name: of the field with v_t: "nu", or "nu_max" for AMSGrad's running maximum.
    """
    trees = optax.tree_utils

    def states_with(field: str) -> dict[Any, Any]:  # the parameters may have keys of that name too
        found = trees.tree_get_all_with_path(
            opt_state, field, lambda path, _: isinstance(path[-1], trees.NamedTupleKey)
        )
        return {path[:-1]: value for path, value in found}

    counts = states_with("count")
    return [(nu, counts.get(path)) for path, nu in states_with(name).items()]
