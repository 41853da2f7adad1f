"""Sharpness of losses whose Hessian is known in closed form."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.flatten_util import ravel_pytree
from matfree import decomp

from gnp.analysis import sharpness
from gnp.analysis.mean_loss import MeanLoss

DTYPES = [("float32", 1e-4), ("float64", 1e-10)]


@pytest.fixture(params=DTYPES, ids=lambda x: x[0])
def precision(request):
    """A dtype and how exact results are in it, relative to the largest number."""
    with jax.enable_x64(request.param[0] == "float64"):
        yield request.param


def close(value, expected, tolerance):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(value), expected, rtol=0, atol=tolerance * scale)


def symmetric(spectrum, seed=0):
    """A symmetric matrix with the eigenvalues, and its eigenvectors."""
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.normal(size=(len(spectrum),) * 2))[0]
    return vectors * np.asarray(spectrum) @ vectors.T, vectors


def as_matvec(matrix, dtype):
    """The matrix as a function of trees, as of `tree_of`."""
    matrix = jnp.asarray(matrix, dtype)

    def matvec(tree):
        flat, unravel = ravel_pytree(tree)
        return unravel(jnp.matmul(matrix, flat, precision="highest"))

    return matvec


def tree_of(vector, dtype):
    vector = jnp.asarray(vector, dtype)
    rows = len(vector) // 4
    return {"b": vector[: -2 * rows], "w": vector[-2 * rows :].reshape(rows, 2)}


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


# --- Losses over batches -------------------------------------------------------------------------


class Regression:
    """Linear or softmax regression with weights, and its Hessian in NumPy."""

    def __init__(self, dtype, *, classes=None):
        rng = np.random.default_rng(1)
        self.classes, self.dtype = classes, dtype
        self.x = rng.normal(size=(30, 4)) * [3, 1, 0.5, 0.1]
        self.y = rng.integers(classes, size=30) if classes else rng.normal(size=30)
        self.weight = rng.integers(1, 4, size=30).astype(float)
        size = (4, classes) if classes else (4,)
        self.params = {"w": jnp.asarray(rng.normal(size=size), dtype)}

    def batch_loss(self, params, others, batch, carry):
        x, y, weight = batch
        outputs = jnp.matmul(x, params["w"], precision="highest")
        if self.classes:
            chosen = jnp.take_along_axis(jax.nn.log_softmax(outputs), y[:, None], 1)[:, 0]
            losses = -chosen
        else:
            losses = jnp.square(outputs - y) / 2
        return jnp.sum(weight * losses) * others, (weight.sum(), carry + 1)

    def mean_loss(self, batch_size, **more):
        """Batches of equal size; the last is filled up with examples of weight 0."""
        padding = -len(self.x) % batch_size

        def batches():
            for i in range(0, len(self.x), batch_size):
                some = slice(i, i + batch_size)
                x, y, weight = self.x[some], self.y[some], self.weight[some]
                missing = batch_size - len(x)
                assert missing in (0, padding)
                yield (
                    jnp.asarray(np.pad(x, ((0, missing), (0, 0)), constant_values=7), self.dtype),
                    jnp.asarray(np.pad(y, (0, missing)), None if self.classes else self.dtype),
                    jnp.asarray(np.pad(weight, (0, missing)), self.dtype),
                )

        return MeanLoss(self.batch_loss, batches, carry=jnp.zeros(()), **more)

    def closed_form(self):
        """Loss, gradient and Hessian of the weighted mean, in float64."""
        share, w = self.weight / self.weight.sum(), flat(self.params)
        if not self.classes:
            errors = self.x @ w - self.y
            return (
                share @ errors**2 / 2,
                self.x.T @ (share * errors),
                (self.x * share[:, None]).T @ self.x,
            )
        logits = self.x @ w.reshape(4, -1)
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        loss = -share @ np.log(p[np.arange(30), self.y])
        grad = self.x.T @ (share[:, None] * (p - np.eye(self.classes)[self.y]))
        hessian = np.zeros((w.size, w.size))
        for i in range(30):
            of_logits = np.diag(p[i]) - np.outer(p[i], p[i])
            hessian += share[i] * np.kron(np.outer(self.x[i], self.x[i]), of_logits)
        return loss, grad.ravel(), hessian


@pytest.mark.parametrize(
    ("classes", "batch_size"),
    [(None, 30), (None, 7), (3, 8)],
    ids=["one-batch", "linear", "softmax"],
)
def test_a_regression_over_batches_has_what_it_has_in_closed_form(precision, classes, batch_size):
    """Loss, gradient, Hessian, eigenvalues by `np.linalg.eigh`, and the passes that they take."""
    dtype, tolerance = precision
    problem, scale = Regression(dtype, classes=classes), jnp.asarray(2.0, dtype)
    loss, grad, hessian = (2 * x for x in problem.closed_form())
    size, passes = len(grad), []
    mean = problem.mean_loss(batch_size, on_pass=lambda: passes.append(1))
    assert mean.value(problem.params, scale) == pytest.approx(loss, rel=tolerance)
    value, found = mean.value_and_grad(problem.params, scale)
    assert value == pytest.approx(loss, rel=tolerance)
    close(flat(found), grad, tolerance)
    assert mean.num_examples == problem.weight.sum()
    assert len(passes) == 2

    def matvec(v):
        return mean.hvp(problem.params, v, scale)

    unravel = ravel_pytree(problem.params)[1]
    columns = [flat(matvec(unravel(jnp.asarray(e, dtype)))) for e in np.eye(size)]
    close(columns, hessian, tolerance)
    passes.clear()
    start = sharpness.rademacher(jax.random.key(0), problem.params)
    found = sharpness.tridiagonalise(matvec, start, 100)
    assert len(passes) == size, "no more steps than parameters"
    values, _ = sharpness.top_eigenvalues(found, size)
    close(values, np.linalg.eigvalsh(hessian)[::-1], tolerance)
    z = flat(start)
    assert found.quadratic_form == pytest.approx(z @ hessian @ z, rel=tolerance)
    assert sharpness.quadratic_form(matvec, start) == pytest.approx(z @ hessian @ z, rel=tolerance)
    assert len(passes) == size + 1


def test_what_is_carried_goes_from_batch_to_batch_and_has_no_derivative():
    def batch_loss(params, others, batch, carry):
        loss = params**2 * batch + carry
        return loss, (jnp.ones(()), carry + 10 * params)

    mean = MeanLoss(batch_loss, lambda: [jnp.float32(1), jnp.float32(2)], carry=jnp.zeros(()))
    params = jnp.float32(3)
    assert mean.value(params) == (9 * 3 + 30) / 2
    assert mean.value_and_grad(params) == ((9 * 3 + 30) / 2, 2 * 3 * 3 / 2)
    assert mean.hvp(params, jnp.float32(1)) == 2 * 3 / 2


# --- Lanczos -------------------------------------------------------------------------------------

SPECTRUM = np.concatenate([[-4, -1], np.geomspace(1e-3, 1, 26), [5, 9]])


def test_lanczos_is_matfrees_and_errors_are_the_norms_of_residuals(precision):
    """They bound the distance to an eigenvalue."""
    dtype, tolerance = precision
    matrix, _ = symmetric(SPECTRUM)
    start = np.random.default_rng(3).normal(size=30)
    found = sharpness.tridiagonalise(as_matvec(matrix, dtype), tree_of(start, dtype), 10)
    with jax.enable_x64(True):
        theirs = decomp.tridiag_sym(10)(lambda v: matrix @ v, jnp.asarray(start))
    close(found.diagonal, np.diag(theirs.J_small), tolerance)
    close(found.off_diagonal[:-1], np.diag(theirs.J_small, 1), tolerance)
    close(found.off_diagonal[-1], np.linalg.norm(theirs.residual), tolerance)
    assert found.norm == pytest.approx(np.linalg.norm(start), rel=tolerance)

    values, errors = sharpness.top_eigenvalues(found, 4)
    small = np.linalg.eigh(np.asarray(theirs.J_small))
    vectors = (np.asarray(theirs.Q_tall).T @ small[1])[:, ::-1][:, :4]
    residuals = np.linalg.norm(matrix @ vectors - values * vectors, axis=0)
    assert residuals[-1] > 1e-2 > 1e-4 > residuals[0], "one that is wrong, and one that is right"
    np.testing.assert_allclose(errors, residuals, rtol=0, atol=9 * tolerance)
    assert (errors > 8.9 * np.finfo(dtype).eps).all(), "rounding of the largest eigenvalue"
    distances = np.abs(values[:, None] - SPECTRUM).min(axis=1)
    assert (distances <= errors + 9 * tolerance).all()
    assert (np.diff(values) < 0).all() and values[0] == pytest.approx(9, rel=tolerance)


def test_eigenvalues_that_occur_several_times_are_all_found(precision):
    """Also where the start has no part of an eigenvector, and where nothing is left to start."""
    dtype, tolerance = precision
    spectrum = [3, 3, 3, 1, 1, 0, 0, -2]
    matrix, vectors = symmetric(spectrum)
    start = vectors[:, 0] + 2 * vectors[:, 5]
    found = sharpness.tridiagonalise(as_matvec(matrix, dtype), tree_of(start, dtype), 8)
    values, _ = sharpness.top_eigenvalues(found, 8)
    close(values, np.array(spectrum), tolerance)
    assert np.count_nonzero(found.off_diagonal) < 8
    nothing = sharpness.tridiagonalise(as_matvec(0 * matrix, dtype), tree_of(start, dtype), 8)
    assert not nothing.diagonal.any() and not nothing.off_diagonal.any()


def test_a_start_of_zeros_is_refused():
    with pytest.raises(ValueError, match="not zero"):
        sharpness.tridiagonalise(lambda v: v, {"w": jnp.zeros(3)}, 2)


# --- Trace and density ---------------------------------------------------------------------------


def test_the_trace_over_all_signs_is_exact_and_its_variance_is_hutchinsons():
    matrix, _ = symmetric([4, 2, 1, 0, -1, -3])
    matvec = as_matvec(matrix, "float32")
    signs = [tree_of(z, "float32") for z in itertools.product([-1, 1], repeat=6)]
    samples = [sharpness.quadratic_form(matvec, z) for z in signs]
    mean, error = sharpness.trace(samples)
    assert mean == pytest.approx(3, abs=1e-4)
    off = matrix - np.diag(np.diag(matrix))
    assert error**2 * 63 == pytest.approx(2 * np.sum(off**2), rel=1e-4)
    assert math.isnan(sharpness.trace([1.0])[1])


def test_random_signs_are_signs_and_independent():
    like = {"a": jnp.zeros((50, 20)), "b": jnp.zeros(1000, jnp.bfloat16)}
    tree = sharpness.rademacher(jax.random.key(0), like)
    assert tree["a"].shape == (50, 20) and tree["b"].dtype == jnp.bfloat16
    a, b = np.asarray(tree["a"]).ravel(), np.asarray(tree["b"], np.float32)
    assert {*a, *b} == {-1, 1}
    other = np.asarray(sharpness.rademacher(jax.random.key(1), like)["a"]).ravel()
    # the mean of 1000 independent signs has a standard deviation of 0.032
    assert max(abs(a.mean()), abs(b.mean()), abs((a * b).mean()), abs((a * other).mean())) < 0.13


def test_the_density_of_exhausted_spaces_is_that_of_the_starts(precision):
    """Then quadrature is exact: the weights are the squared parts of the eigenvectors."""
    dtype, tolerance = precision
    matrix, vectors = symmetric(SPECTRUM)
    keys = jax.random.split(jax.random.key(5), 3)
    starts = [sharpness.rademacher(key, tree_of(np.zeros(30), dtype)) for key in keys]
    found = [sharpness.tridiagonalise(as_matvec(matrix, dtype), z, 30) for z in starts]
    grid, density = sharpness.spectral_density(found, width=0.02)
    weights = np.mean([(vectors.T @ flat(z)) ** 2 for z in starts], axis=0) / 30
    sigma = 0.02 * 13
    bells = np.exp(-(((grid[:, None] - SPECTRUM) / sigma) ** 2) / 2)
    close(density, bells @ weights / (sigma * math.sqrt(2 * math.pi)), tolerance)
    assert grid[0] == pytest.approx(-4 - 5 * sigma) and grid[-1] == pytest.approx(9 + 5 * sigma)
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-6)


def test_the_density_has_its_mass_where_the_eigenvalues_are():
    """A large matrix in a few steps: 70 % of the eigenvalues around 0, 30 % around 5."""
    spectrum = np.concatenate([np.linspace(-0.1, 0.1, 140), np.linspace(4.5, 5.5, 60)])
    matrix, _ = symmetric(spectrum)
    keys = jax.random.split(jax.random.key(6), 4)
    starts = [sharpness.rademacher(key, tree_of(np.zeros(200), "float32")) for key in keys]
    matvec = as_matvec(matrix, "float32")
    grid, density = sharpness.spectral_density(
        [sharpness.tridiagonalise(matvec, z, 15) for z in starts]
    )
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-6)
    low, high = grid < 2.5, grid > 2.5
    # of a share p of 200 eigenvalues 4 probes have a deviation of √(2 p (1 − p) / 800) = 0.023
    assert np.trapezoid(density[low], grid[low]) == pytest.approx(0.7, abs=0.09)
    assert np.trapezoid((grid * density)[high], grid[high]) == pytest.approx(1.5, abs=0.45)


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_the_density_of_a_multiple_of_the_identity_is_a_bell(value):
    found = sharpness.tridiagonalise(as_matvec(value * np.eye(8), "float32"), np.ones(8), 8)
    grid, density = sharpness.spectral_density([found])
    assert grid[density.argmax()] == pytest.approx(value, abs=1e-3)
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-6)


# --- SAM's sharpness -----------------------------------------------------------------------------


def quadratic(matrix, linear, dtype):
    """½ θᵀAθ + bᵀθ as `loss` and `value_and_grad`."""
    matrix, linear = jnp.asarray(matrix, dtype), jnp.asarray(linear, dtype)

    def loss(params):
        v = params["v"]
        return v @ jnp.matmul(matrix, v, precision="highest") / 2 + linear @ v

    def value_and_grad(params):
        value, grad = jax.value_and_grad(loss)(params)
        return float(value), grad

    return lambda params: float(loss(params)), value_and_grad


def test_sams_sharpness_of_a_quadratic(precision):
    dtype, tolerance = precision
    matrix, _ = symmetric([5, 2, 1, 0.5, 0.1])
    linear, theta = np.random.default_rng(7).normal(size=(2, 5))
    loss, value_and_grad = quadratic(matrix, linear, dtype)
    params, grad = {"v": jnp.asarray(theta, dtype)}, matrix @ theta + linear
    found = sharpness.sam_sharpness(loss, value_and_grad, params, 0.5)
    norm = np.linalg.norm(grad)
    first = 0.5 * norm + 0.5**2 / 2 * grad @ matrix @ grad / norm**2
    assert found == pytest.approx(first, rel=tolerance)
    at_params = value_and_grad(params)
    again = sharpness.sam_sharpness(loss, value_and_grad, params, 0.5, at_params=at_params)
    assert again == found

    # The largest rise is on the sphere: (μ − A) ε = g for the μ > λ₁ with ‖ε‖ = ρ.
    def step(mu):
        return np.linalg.solve(mu * np.eye(5) - matrix, grad)

    mu = scipy.optimize.brentq(lambda mu: np.linalg.norm(step(mu)) - 0.5, 5 + 1e-9, 1e3, xtol=1e-14)
    best = grad @ step(mu) + step(mu) @ matrix @ step(mu) / 2
    assert best > first * (1 + 1e-3)
    found = sharpness.sam_sharpness(loss, value_and_grad, params, 0.5, num_ascents=60)
    assert found == pytest.approx(best, rel=tolerance)


def test_more_ascents_never_find_less():
    loss, value_and_grad = quadratic(np.diag([-3.0, 1.0, 2.0]), [1.0, 0.2, 0.1], "float32")
    params = {"v": jnp.zeros(3)}
    found = [
        sharpness.sam_sharpness(loss, value_and_grad, params, 1.0, num_ascents=n) for n in range(6)
    ]
    assert (np.diff(found) >= 0).all() and found[0] < found[-1]


def test_a_gradient_of_zero_has_no_sharpness_and_an_overflow_is_nan():
    loss, value_and_grad = quadratic(np.eye(2), np.zeros(2), "float32")
    params = {"v": jnp.zeros(2)}
    assert sharpness.sam_sharpness(loss, value_and_grad, params, 0.1) == 0
    far = sharpness.sam_sharpness(loss, value_and_grad, {"v": jnp.full(2, 1e19)}, 1e25)
    assert math.isnan(far)
