r"""How sharp a loss is at a point: its Hessian's spectrum and trace, and SAM's sharpness.

Every function takes the loss as functions of its parameters, any tree of arrays: `matvec` maps a
tree v to the Hessian-vector product :math:`H v`, `loss` gives a float, `value_and_grad` a float and
a tree. `gnp.analysis.mean_loss.MeanLoss` has them for a loss over many batches; with
`jax.grad` and `jax.jvp` they are one line for your own.

What a measure takes, in passes over the data. A Hessian-vector product is 2 to 3 gradients, a loss
about 1/3 of one:

============================  ==========================================
`tridiagonalise`, m steps     m Hessian-vector products (top eigenvalues
                              and density come from the same ones)
`trace`, p probes             p Hessian-vector products
`sam_sharpness`, k ascents    1 + k gradients, 1 loss
============================  ==========================================

The algorithm is that of `matfree.decomp.tridiag_sym`, to which the tests hold it. Matfree traces
its products into one program, and these go over batches from Python (see `MeanLoss`).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

Matvec = Callable[[Any], Any]


class Tridiagonal(NamedTuple):
    """What Lanczos' algorithm makes of a symmetric H: H Q ≈ Q T, with q₁ = start / ‖start‖.

    Attributes:
      diagonal: of T, float64[m].
      off_diagonal: of T, float64[m]; its last entry is the norm of the residual that is left.
      norm: ‖start‖.
      eps: the spacing of the numbers at 1 that H v was computed in.
    """

    diagonal: np.ndarray
    off_diagonal: np.ndarray
    norm: float
    eps: float

    @property
    def quadratic_form(self) -> float:
        """startᵀ H start."""
        return float(self.norm**2 * self.diagonal[0])

    def eigh(self) -> tuple[np.ndarray, np.ndarray]:
        """The eigenvalues of T, which are the Ritz values of H, ascending, and its eigenvectors."""
        off = self.off_diagonal[:-1]
        return np.linalg.eigh(np.diag(self.diagonal) + np.diag(off, 1) + np.diag(off, -1))


def tridiagonalise(matvec: Matvec, start: Any, num_steps: int) -> Tridiagonal:
    r"""Lanczos' algorithm with full reorthogonalisation.

    .. math::
      \beta_i q_{i+1} = H q_i - \alpha_i q_i - \beta_{i-1} q_{i-1}

    Each new vector is made orthogonal to all before it, twice. Where nothing is left of it,
    the space of start, H start, H² start, … is exhausted, and the algorithm goes on with a random
    vector orthogonal to all before: so eigenvalues of which the start has no part are found too.

    Cost: `num_steps` products with H. Memory: `num_steps` + 4 copies of the parameters.

    Args:
      matvec: v ↦ H v for a symmetric H, a function of trees; it need not be traceable.
      start: a tree that is not zero, such as `rademacher` gives.
      num_steps: m; at most the number of parameters are made.

    Returns:
      T, and the start's norm.

    Reference:
      Golub & Van Loan, "Matrix Computations", 4th edition, §10.1 and 10.3.
    """
    vector, unravel = ravel_pytree(start)
    num_steps = min(num_steps, vector.size)
    norm = float(jnp.linalg.norm(vector))
    if not norm > 0:
        raise ValueError(f"the start must be a vector that is not zero, its norm is {norm}")
    vector = vector / norm
    basis = jnp.zeros((num_steps, vector.size), vector.dtype)
    diagonal, off_diagonal = np.zeros(num_steps), np.zeros(num_steps)
    largest, eps = 0.0, float(jnp.finfo(vector.dtype).eps)
    for i in range(num_steps):
        basis = _set_row(basis, vector, i)
        product = ravel_pytree(matvec(unravel(vector)))[0]
        rest, alpha, beta = _orthogonal_part(basis, product, i)
        diagonal[i], off_diagonal[i] = alpha, beta
        largest = max(largest, abs(diagonal[i]) + off_diagonal[i])
        if off_diagonal[i] <= 10 * eps * largest:  # rounding
            off_diagonal[i] = 0
            key = jax.random.fold_in(jax.random.key(0), i)
            rest = jax.random.normal(key, vector.shape, vector.dtype)
            rest, _, beta = _orthogonal_part(basis, rest, i)
        vector = rest / beta
    return Tridiagonal(diagonal, off_diagonal, norm, eps)


@functools.partial(jax.jit, donate_argnums=0)
def _set_row(basis: jax.Array, vector: jax.Array, i: int) -> jax.Array:
    return basis.at[i].set(vector)


@jax.jit
def _orthogonal_part(
    basis: jax.Array, vector: jax.Array, i: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What of a vector is orthogonal to the basis' rows, its product with row i, and the norm."""
    with jax.default_matmul_precision("highest"):
        first = basis @ vector
        vector = vector - first @ basis
        second = basis @ vector
        vector = vector - second @ basis
    return vector, first[i] + second[i], jnp.linalg.norm(vector)


def top_eigenvalues(tridiagonal: Tridiagonal, k: int) -> tuple[np.ndarray, np.ndarray]:
    r"""The k largest Ritz values λ, and the norms of their residuals.

    .. math::
      \| H v - \lambda v \| = \beta_m |s_m|

    with s the eigenvector of T and v = Q s; H has an eigenvalue within that distance of λ. What is
    less than the rounding of the largest eigenvalue is given as that. No Ritz value is above H's
    largest eigenvalue, and an eigenvalue that H has several times is found once until the space is
    exhausted. The error of an extreme eigenvalue falls off geometrically with the number of steps;
    take 2 to 4 times as many as eigenvalues are wanted, and look at the errors.

    Args:
      tridiagonal: of m steps.
      k: how many; at most m are there.

    Returns:
      The values in descending order, and their errors, float64[min(k, m)] each.

    Reference:
      Parlett, "The Symmetric Eigenvalue Problem", SIAM 1998, §13.2.
    """
    values, vectors = tridiagonal.eigh()
    errors = tridiagonal.off_diagonal[-1] * np.abs(vectors[-1])
    errors = np.maximum(errors, tridiagonal.eps * np.abs(values).max())
    return values[::-1][:k], errors[::-1][:k]


def spectral_density(
    tridiagonals: Sequence[Tridiagonal], *, num_points: int = 401, width: float = 0.01
) -> tuple[np.ndarray, np.ndarray]:
    r"""The density of H's eigenvalues, by stochastic Lanczos quadrature and Gaussian smoothing.

    .. math::
      \phi(t) = \frac{1}{n} \sum_{i=1}^n \mathcal N(t; \lambda_i, \sigma^2) \approx
        \frac{1}{p} \sum_{j=1}^p \sum_{l=1}^m (s^{(j)}_{1l})^2
        \mathcal N(t; \theta^{(j)}_l, \sigma^2)

    with the Ritz values θ and the eigenvectors s of T of p random starts. What separates
    eigenvalues by less than σ is not seen; a share of the eigenvalues has a standard error of the
    order of 1/√(n p).

    Args:
      tridiagonals: of random starts, as of `rademacher`.
      num_points: of the grid; it reaches 5σ beyond the Ritz values.
      width: σ as a fraction of the range of the Ritz values.

    Returns:
      The eigenvalues t, evenly spaced, and φ(t), float64[num_points] each; φ integrates to 1.

    Reference:
      Ghorbani, Krishnan & Xiao, "An Investigation into Neural Net Optimization via Hessian
      Eigenvalue Density", ICML 2019, Algorithm 1; Papyan, "The Full Spectrum of Deepnet Hessians at
      Scale", 2018 (arXiv:1811.07062).
    """
    systems = [tridiagonal.eigh() for tridiagonal in tridiagonals]
    nodes = np.concatenate([values for values, _ in systems])
    weights = np.concatenate([vectors[0] ** 2 for _, vectors in systems]) / len(systems)
    extent = np.ptp(nodes)
    if extent <= 1e-6 * np.abs(nodes).max():  # a multiple of the identity, to rounding
        extent = np.abs(nodes).max() or 1.0
    sigma = width * extent
    grid = np.linspace(nodes.min() - 5 * sigma, nodes.max() + 5 * sigma, num_points)
    distances = (grid[:, None] - nodes) / sigma
    bells = np.exp(-(distances**2) / 2) / (math.sqrt(2 * math.pi) * sigma)
    return grid, bells @ weights


def trace(samples: Sequence[float]) -> tuple[float, float]:
    r"""Hutchinson's estimate of tr H, and its standard error.

    .. math::
      \operatorname{tr} H = \operatorname{E} z^T H z, \qquad
      \operatorname{Var} z^T H z = 2 \sum_{i \ne j} H_{ij}^2

    for z of independent random signs; for a diagonal H one is exact.

    Args:
      samples: zᵀ H z of random z, as `quadratic_form` and `Tridiagonal.quadratic_form` give them.

    Returns:
      The mean, and its standard error, which is NaN for a single sample.

    Reference:
      Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix", Communications in
      Statistics, 1989.
    """
    values = np.asarray(samples, np.float64)
    if values.size < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(values.size))


@jax.jit
def rademacher(key: jax.Array, like: Any) -> Any:
    """A tree of random signs, −1 or 1, of the shapes and dtypes of another tree."""
    vector, unravel = ravel_pytree(like)  # drawn at once: compiling it for each array takes long
    return unravel(jax.random.rademacher(key, vector.shape, vector.dtype))


def quadratic_form(matvec: Matvec, vector: Any) -> float:
    """The number vᵀ H v. Cost: one product with H."""
    with jax.default_matmul_precision("highest"):
        return float(optax.tree.vdot(vector, matvec(vector)))


def sam_sharpness(
    loss: Callable[[Any], float],
    value_and_grad: Callable[[Any], tuple[float, Any]],
    params: Any,
    radius: float,
    *,
    num_ascents: int = 0,
    at_params: tuple[float, Any] | None = None,
) -> float:
    r"""SAM's sharpness, the most that the loss rises within a ball, approximately.

    .. math::
      \max_{\|\epsilon\| \le \rho} L(\theta + \epsilon) - L(\theta), \qquad
      \epsilon_0 = \rho \frac{g}{\|g\|}, \quad
      \epsilon_{k+1} = \Pi\Bigl(\epsilon_k + \rho
        \frac{\nabla L(\theta + \epsilon_k)}{\|\nabla L(\theta + \epsilon_k)\|}\Bigr)

    with Π the projection onto the ball. Of all ε the one with the largest loss counts: what is
    returned is a lower bound, which gets no smaller with more ascents. Without any it is the
    sharpness that SAM's step sees; it may be negative where the loss curves downwards.

    Args:
      loss: L.
      value_and_grad: L and ∇L.
      params: θ.
      radius: ρ, in units of the parameters.
      num_ascents: how many steps of projected gradient ascent follow the first.
      at_params: L and ∇L at θ, if they are known; saves one gradient.

    Returns:
      The difference of the losses; NaN where one of them is not finite.

    Reference:
      Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR
      2021, Eq. 1 and 2.
    """
    here, grad = at_params or value_and_grad(params)
    step = _scaled(grad, radius)
    losses = []
    for _ in range(num_ascents):
        value, grad = value_and_grad(optax.tree.add(params, step))
        losses.append(value)
        step = _ascend(step, _scaled(grad, radius), radius)
    losses.append(loss(optax.tree.add(params, step)))
    rise = float(np.max(losses)) - here
    return rise if math.isfinite(rise) else math.nan


@jax.jit
def _scaled(tree: Any, norm: float) -> Any:
    """A tree scaled to a norm; zeros stay zeros."""
    length = optax.tree.norm(tree)
    return optax.tree.scale(norm / jnp.where(length == 0, 1, length), tree)


@jax.jit
def _ascend(step: Any, more: Any, radius: float) -> Any:
    """Their sum, projected onto the ball."""
    total = optax.tree.add(step, more)
    length = optax.tree.norm(total)
    return optax.tree.scale(jnp.where(length > radius, radius / length, 1), total)
