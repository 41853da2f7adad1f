"""The variance of the adaptive learning rate against NumPy, quadrature and random gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gnp import transforms
from gnp.analysis import adaptive_lr, figures


def exact_variance(t, sigma1, gamma, b2=1.0):
    """Var ψ by quadrature of E v^-p = ∫ s^(p-1) E exp(-s v) ds / Γ(p), at p = 1 and p = 1/2.

    v = Σ c_k z_k² with standard normal z_k has E exp(-s v) = Π (1 + 2 s c_k)^(-1/2). Over x = ln s
    the integrands vanish at both ends, so that the trapezoidal rule converges exponentially.
    """
    weights = b2 ** np.arange(t - 1, -1, -1.0)
    c = sigma1 * np.exp(-gamma * np.arange(t)) * weights / weights.sum()
    x, dx = np.linspace(-60, 120, 3000, retstep=True)
    laplace = np.exp(-0.5 * np.log1p(2 * np.exp(x)[:, None] * c).sum(1))
    mean_square = np.sum(np.exp(x) * laplace) * dx
    mean = np.sum(np.exp(x / 2) * laplace) * dx / math.sqrt(math.pi)
    return mean_square - mean**2


def test_the_quadrature_is_that_of_an_inverse_chi_for_equal_variances():
    for t in (3, 10, 100):
        root = math.exp(math.lgamma((t - 1) / 2) - math.lgamma(t / 2))
        expected = (t / (t - 2) - t / 2 * root**2) / 2.5
        assert exact_variance(t, 2.5, 0) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("b2", [0.0, 0.9, 0.999])
def test_psi_is_equation_5(b2):
    grads = np.random.default_rng(0).normal(size=(7, 2, 3))
    expected = np.empty((2, 3))
    for index in np.ndindex(2, 3):
        total = 0.0
        for i in range(1, 8):
            total += b2 ** (7 - i) * grads[i - 1][index] ** 2
        expected[index] = math.sqrt((1 - b2**7) / ((1 - b2) * total))
    np.testing.assert_allclose(adaptive_lr.psi(grads, b2), expected, rtol=1e-10)


def test_psi_of_zero_gradients_is_zero_and_of_nan_is_nan():
    grads = np.array([[0.0, 0.0, math.nan], [0.0, 2.0, 1.0]])
    np.testing.assert_allclose(adaptive_lr.psi(grads, 1), [0, math.sqrt(0.5), math.nan], rtol=1e-15)


@pytest.mark.parametrize(("t", "gamma"), [(1, 0.5), (2, 2.0), (7, 0.3), (40, 0.05), (40, -0.02)])
def test_equation_9_is_the_delta_method_for_variances_that_decay_from_the_second_on(t, gamma):
    """Var ψ ≈ Var(v) / (4 E(v)³), where v is the mean of squares, Var g² = 2 σ²."""
    sigma = 3.0 * np.exp(-gamma * np.arange(t))
    expected = (2 * sigma**2).sum() / t**2 / (4 * sigma.mean() ** 3)
    assert adaptive_lr.variance_psi(t, 3.0, gamma) == pytest.approx(expected, rel=1e-12)


def test_equation_9_without_decay_and_with_hardly_any():
    t = np.array([1, 3, 1000])
    np.testing.assert_allclose(adaptive_lr.variance_psi(t, 4.0, 0), 1 / (8 * t), rtol=1e-15)
    for gamma in (1e-300, 1e-17, 1e-12):
        np.testing.assert_allclose(adaptive_lr.variance_psi(t, 4.0, gamma), 1 / (8 * t), rtol=1e-8)


def effective_number_and_second_order(t, gamma):
    """The number n = (Σσ)² / Σσ², and the next term of Var ψ / Eq. 9.

    With x = v / E v - 1, ψ = (E v)^(-1/2) (1 - x/2 + 3x²/8 - 5x³/16 …), so that E(v) Var ψ is
    m₂/4 - 3/8 m₃ + 5/16 m₄ + 9/64 (m₄ - m₂²) + … for the moments m₂ = 2 S₂, m₃ = 8 S₃, m₄ = 3 m₂²
    + … of x, S_p = Σσ^p / (Σσ)^p; together S₂/2 (1 + 39/4 S₂ - 6 S₃/S₂ + …).
    """
    sigma = np.exp(-gamma * np.arange(t))
    s2, s3 = (np.sum(sigma**p) / np.sum(sigma) ** p for p in (2, 3))
    return 1 / s2, 39 / 4 * s2 - 6 * s3 / s2


# What is left after the second order, times n². Without decay it is 83/8 + 28/t + … (Stirling's
# series of the inverse chi), below 14 from t = 10 on; with decay it is less.
REMAINDER = 14


@pytest.mark.parametrize("t", [10, 20, 50, 300])
@pytest.mark.parametrize("gamma", [0, 0.01, 0.05, 0.1, 0.3])
def test_equation_9_is_too_small_by_the_second_order(t, gamma):
    n, second_order = effective_number_and_second_order(t, gamma)
    ratio = exact_variance(t, 1.0, gamma) / adaptive_lr.variance_psi(t, 1.0, gamma)
    assert second_order > 0 and 0 < ratio - 1 - second_order < REMAINDER / n**2


@pytest.mark.parametrize(
    ("t", "gamma", "b2"),
    [(10, 0, 1), (10, 0.3, 1), (20, 0.1, 1), (20, 0.3, 1), (50, 0.03, 1), (20, 0.1, 0.9)],
)
def test_random_gradients_have_the_exact_variance(t, gamma, b2):
    variance, error = adaptive_lr.monte_carlo_variance_psi(
        jax.random.key(t), t, 2.0, gamma, 100_000, b2=b2
    )
    exact = exact_variance(t, 2.0, gamma, b2)
    assert abs(variance - exact) < 4 * error and error < 0.02 * exact
    if b2 == 1:  # and Eq. 9 differs from it by what is expected, which shows above the noise
        n, second_order = effective_number_and_second_order(t, gamma)
        eq9 = adaptive_lr.variance_psi(t, 2.0, gamma)
        assert variance - eq9 > 4 * error
        excess = variance / eq9 - 1 - second_order
        assert -4 * error / eq9 < excess < REMAINDER / n**2 + 4 * error / eq9


def test_the_docstring_tells_how_far_equation_9_is_off():
    lines = [line.split() for line in adaptive_lr.variance_psi.__doc__.splitlines()]
    start = next(i for i, line in enumerate(lines) if line[:2] == ["t", "γ"])
    gammas = [float(x) for x in lines[start][3:]]
    rows = lines[start + 2 : start + 8]
    assert [row[0] for row in rows] == ["3", "5", "10", "20", "100", "1000"]
    for t, *told in rows:
        for gamma, ratio in zip(gammas, told, strict=True):
            # terms beyond exp(-80) are nothing, and quadrature needs none of them
            terms = int(min(int(t), 80 / gamma if gamma else math.inf))
            exact = exact_variance(terms, terms / int(t), gamma)
            eq9 = adaptive_lr.variance_psi(int(t), 1.0, gamma)
            assert exact / eq9 == pytest.approx(float(ratio), abs=0.0051), (t, gamma)


def test_forgetting_has_the_formula_that_the_docstring_gives():
    b2, gamma = 0.999, 0.01
    for t in (100, 1000):
        weight = (1 - b2) * b2 ** (t - 1) / (1 - b2**t)
        formula = adaptive_lr.variance_psi(t, 1.0, gamma + math.log(b2)) / (t * weight)
        exact = exact_variance(t, 1.0, gamma, b2)
        n, second_order = effective_number_and_second_order(t, gamma + math.log(b2))
        assert 0 < exact / formula - 1 - second_order < REMAINDER / n**2


def test_too_few_gradients_have_no_variance_or_no_standard_error():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"finite for t of 3 or more, got 2"):
        adaptive_lr.monte_carlo_variance_psi(key, 2, 1.0, 0.1, 10)
    assert adaptive_lr.monte_carlo_variance_psi(key, 4, 1.0, 0.1, 10)[1] == math.inf
    assert adaptive_lr.monte_carlo_variance_psi(key, 5, 1.0, 0.1, 10)[1] < math.inf


@given(st.integers(2, 500), st.floats(0, 4), st.floats(1e-3, 1))
def test_equation_9_increases_with_gamma_under_the_condition_and_without(t, gamma, more):
    threshold = math.log(t) / (t - 1)
    assert adaptive_lr.increasing_in_gamma(t, threshold + more)
    assert not adaptive_lr.increasing_in_gamma(t, threshold * (1 - more / 2))
    for low in (gamma, threshold + gamma):
        values = adaptive_lr.variance_psi(t, 1.0, [low, low + more])
        assert values[0] < values[1]


def test_measured_variance_is_that_of_the_corrected_entries_that_are_not_zero():
    nu = {"w": jnp.array([[0.5, 0.0], [2.0, 8.0]]), "b": jnp.array(0.125), "none": None}
    nu_hat = np.array([0.5, 2.0, 8.0, 0.125]) / (1 - 0.9**3)
    expected = np.var(1 / np.sqrt(nu_hat))
    measured = adaptive_lr.measured_variance(nu, jnp.array(3), 0.9)
    assert measured == pytest.approx(expected, rel=1e-12)
    assert math.isnan(adaptive_lr.measured_variance({"b": jnp.zeros(3)}, 0, 0.9))
    assert math.isnan(adaptive_lr.measured_variance({"b": jnp.array([1.0, jnp.nan])}, 1, 0.9))


@pytest.mark.parametrize("noise", [0, 1e-30])
def test_the_spread_is_that_of_the_rates_between_the_percentiles(noise):
    """Of rates whose logarithms are uniform; a few that come from rounding do not move it."""
    rates = np.exp(np.linspace(0, 1, 10_001))
    nu = {"w": jnp.asarray(rates[:6000] ** -2), "b": jnp.asarray(rates[6000:] ** -2)}
    nu["k"] = jnp.full(10, noise)
    assert adaptive_lr.measured_spread(nu) == pytest.approx(np.exp(0.9), rel=2e-3)
    assert math.isnan(adaptive_lr.measured_spread({"b": jnp.zeros(3)}))


def test_an_optimizer_fed_random_gradients_measures_the_exact_variance():
    """`nu` and `count` are found beside other counts, and parameters of these names."""
    t, gamma, b2, size = 20, 0.1, 0.99, 40_000
    tx = optax.chain(
        transforms.gradient_regularization(0.1, 0.0),
        transforms.scheduled_weight_decay(optax.scale_by_adam(b2=b2), 0.0, b2=b2),
        optax.scale_by_schedule(lambda count: -1e-3),
    )
    params = {"nu": jnp.zeros(size), "count": jnp.zeros(size)}

    def step(state, key_and_sigma):
        key, sigma = key_and_sigma
        noise = jnp.sqrt(sigma) * jax.random.normal(key, (2, size))
        grads = {"nu": noise[0], "count": noise[1]}
        return tx.update(grads, state, params, grad_fn=lambda p: p)[1], None

    keys, sigma = jax.random.split(jax.random.key(1), t), 2 * jnp.exp(-gamma * jnp.arange(t))
    state, _ = jax.jit(lambda: jax.lax.scan(step, tx.init(params), (keys, sigma)))()
    [(nu, count)] = adaptive_lr.second_moments(state)
    measured = adaptive_lr.measured_variance(nu, count, b2)
    _, error = adaptive_lr.monte_carlo_variance_psi(jax.random.key(0), t, 2, gamma, size, b2=b2)
    # twice the samples that gave the error
    assert abs(measured - exact_variance(t, 2, gamma, b2)) < 4 * error / math.sqrt(2)


def test_the_lines_of_the_surface_lie_where_equation_9_says():
    figure = figures.variance_surface()
    axes, bar = figure.axes
    bands, lines = axes.collections
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step t", "decay rate γ")
    assert "variance of ψ" in bar.get_ylabel()
    assert bands.zmin == adaptive_lr.variance_psi(1000, 1, 1e-3)
    assert bands.zmax == adaptive_lr.variance_psi(1000, 1, 1)
    np.testing.assert_allclose(lines.levels, [1e-3, 1e-2, 0.1, 1, 10, 100], rtol=1e-12)
    for level, path in zip(lines.levels, lines.get_paths(), strict=True):
        values = adaptive_lr.variance_psi(path.vertices[:, 0], 1.0, path.vertices[:, 1])
        np.testing.assert_allclose(values, level, rtol=1e-2)  # linear between points of the grid
        assert len(values) > 10


def test_the_surface_of_given_points():
    t, gamma = np.array([5, 50, 500]), np.array([0.01, 0.1])
    figure = figures.variance_surface(t, gamma, sigma1=4.0)
    bands = figure.axes[0].collections[0]
    values = [adaptive_lr.variance_psi(x, 4.0, y) for x in t for y in gamma]
    assert (bands.zmin, bands.zmax) == (min(values), max(values))
    assert "σ₁ = 4" in figure.axes[1].get_ylabel()
