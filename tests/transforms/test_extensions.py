"""The variants of gradient regularization against Hessians, loops and NumPy, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gnp import transforms

RADIUS, RATIO = 0.3, 0.6


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


# NumPy's, since JAX's arrays are float32 outside the fixture.
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(12, 4)), RNG.normal(size=12)
THETA = RNG.normal(size=4)


def loss(theta, x=X, y=Y):
    return jnp.mean((jnp.tanh(x @ theta) - y) ** 2)


GRAD, HESSIAN = jax.grad(loss), jax.hessian(loss)


def update(tx, grads=None, params=THETA, grad_fn=GRAD, **extra):
    grads = grad_fn(params) if grads is None else grads
    return tx.update(grads, tx.init(params), params, grad_fn=grad_fn, **extra)


def test_exact_is_the_hessian_vector_product():
    tx = transforms.gradient_regularization(RADIUS, RATIO, estimator="exact")
    g = GRAD(THETA)
    expected = g + RADIUS * RATIO * HESSIAN(THETA) @ g / jnp.linalg.norm(g)
    np.testing.assert_allclose(update(tx)[0], expected, rtol=1e-10)
    finite_difference = transforms.gradient_regularization(RADIUS, RATIO)
    assert np.abs(update(finite_difference)[0] - expected).max() > 1e-3


def test_squared_norm_is_the_gradient_of_its_penalty():
    """Of L + (λ/2)|∇L|², differentiated by JAX."""
    tx = transforms.gradient_regularization(
        RADIUS, RATIO, estimator="exact", penalty="squared_norm"
    )
    expected = jax.grad(lambda p: loss(p) + RADIUS * RATIO / 2 * jnp.sum(GRAD(p) ** 2))(THETA)
    np.testing.assert_allclose(update(tx)[0], expected, rtol=1e-10)
    tx = transforms.gradient_regularization(RADIUS, RATIO, penalty="squared_norm")
    g = GRAD(THETA)
    expected = (1 - RATIO) * g + RATIO * GRAD(THETA + RADIUS * g)
    np.testing.assert_allclose(update(tx)[0], expected, rtol=1e-10)


@pytest.mark.parametrize("estimator", ["finite_difference", "exact"])
def test_adaptive_is_asam(estimator):
    """ε = r θ² g / |θ g|; the exact estimator linearises at the same ε."""
    tx = transforms.gradient_regularization(RADIUS, 1.0, adaptive=True, estimator=estimator)
    g, theta = np.asarray(GRAD(THETA)), np.asarray(THETA)
    epsilon = RADIUS * theta**2 * g / np.linalg.norm(theta * g)
    expected = GRAD(THETA + epsilon) if estimator != "exact" else g + HESSIAN(THETA) @ epsilon
    np.testing.assert_allclose(update(tx)[0], expected, rtol=1e-10)


@pytest.mark.parametrize("mask", [{"w": True, "b": False}, lambda p: {"w": True, "b": False}])
def test_the_mask_says_what_is_perturbed(mask):
    params = {"w": THETA, "b": {"c": jnp.array([0.5])}}
    grads = {"w": jnp.array([3.0, 0.0, 4.0, 0.0]), "b": {"c": jnp.array([100.0])}}
    seen = []

    def grad_fn(params):
        seen.append(params)
        return grads

    tx = transforms.gradient_regularization(RADIUS, RATIO, mask=mask)
    update(tx, grads, params, grad_fn)
    np.testing.assert_array_equal(seen[0]["b"]["c"], params["b"]["c"])
    np.testing.assert_allclose(seen[0]["w"], THETA + RADIUS * grads["w"] / 5, rtol=1e-10)


def grouped(num_groups):
    """Gradients of groups of examples, and the function from stacked parameters to them."""
    x, y = X.reshape(num_groups, -1, 4), Y.reshape(num_groups, -1)

    def grad_fn(thetas):
        return jax.vmap(GRAD)(thetas, x, y)

    return grad_fn(jnp.broadcast_to(THETA, (num_groups, 4))), grad_fn


@pytest.mark.parametrize("ratio", [0.0, RATIO, 1.0, lambda t: RATIO * (t > 0)])
@pytest.mark.parametrize("num_groups", [1, 3, 12])
@pytest.mark.parametrize("estimator", ["finite_difference", "exact"])
def test_groups_are_the_mean_of_each_group_alone(num_groups, ratio, estimator):
    grads, grad_fn = grouped(num_groups)
    tx = transforms.gradient_regularization(
        RADIUS, ratio, num_groups=num_groups, estimator=estimator
    )
    updates, state = update(tx, grads, grad_fn=grad_fn)
    alone = transforms.gradient_regularization(RADIUS, ratio, estimator=estimator)
    x, y = X.reshape(num_groups, -1, 4), Y.reshape(num_groups, -1)
    each = [update(alone, grad_fn=lambda p, i=i: GRAD(p, x[i], y[i])) for i in range(num_groups)]
    np.testing.assert_allclose(updates, np.mean([u for u, _ in each], axis=0), rtol=1e-10)
    norms = [float(s.grad_norm) for _, s in each]
    np.testing.assert_allclose(state.grad_norm, np.mean(norms), rtol=1e-6)


def test_groups_on_eight_devices_are_those_on_one():
    rng = np.random.default_rng(2)
    x, y = jnp.array(rng.normal(size=(8, 5, 4))), jnp.array(rng.normal(size=(8, 5)))
    tx = transforms.gradient_regularization(RADIUS, RATIO, num_groups=8)

    @jax.jit
    def step(x, y):
        def grad_fn(thetas):
            return jax.vmap(GRAD)(thetas, x, y)

        grads = grad_fn(jnp.broadcast_to(THETA, (8, 4)))
        return update(tx, grads, grad_fn=grad_fn)[0]

    lay = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    eight = step(jax.device_put(x, lay), jax.device_put(y, lay))
    np.testing.assert_allclose(eight, step(x, y), rtol=1e-12)


def test_groups_without_their_axis_say_what_to_do():
    tx = transforms.gradient_regularization(RADIUS, RATIO, num_groups=3)
    with pytest.raises(ValueError, match=r"leading axis of that length.*\(4,\).*jax.vmap"):
        update(tx)


def test_ascent_gradients_give_the_direction():
    ascent = jnp.array([1.0, 2.0, 2.0, 0.0])
    tx = transforms.gradient_regularization(RADIUS, RATIO)
    updates, state = update(tx, ascent_grads=ascent)
    expected = (1 - RATIO) * GRAD(THETA) + RATIO * GRAD(THETA + RADIUS * ascent / 3)
    np.testing.assert_allclose(updates, expected, rtol=1e-10)
    assert float(state.grad_norm) == 3


@pytest.mark.parametrize(
    "arguments",
    [{"estimator": "exactt"}, {"penalty": "square"}, {"num_groups": 0}],
)
def test_unknown_variants_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        transforms.gradient_regularization(0.1, 1.0, **arguments)


def test_schedules_compose():
    def values(schedule, stop=8):
        return [float(schedule(jnp.int32(t))) for t in range(1, stop + 1)]

    assert values(transforms.every(3, 0.5)) == [0, 0, 0.5, 0, 0, 0.5, 0, 0]
    assert values(transforms.between(2, 5, 0.5)) == [0, 0, 0.5, 0.5, 0.5, 0, 0, 0]
    late = transforms.between(4, None, transforms.every(2, lambda t: t / 10))
    assert values(late) == pytest.approx([0, 0, 0, 0, 0, 0.6, 0, 0.8])
    _, zero = transforms.warmup("zero", radius=0.1, ratio=0.5, warmup_steps=3)
    assert values(transforms.between(3, None, 0.5)) == values(zero)
    for wrong in (lambda: transforms.every(0, 1.0), lambda: transforms.between(3, 2, 1.0)):
        with pytest.raises(ValueError, match="must"):
            wrong()


def test_periodic_regularization_pays_only_when_it_is_due():
    calls = []

    def counting(theta):
        jax.debug.callback(lambda: calls.append(None))
        return GRAD(theta)

    tx = transforms.gradient_regularization(RADIUS, transforms.every(3, 1.0))
    step = jax.jit(lambda state: tx.update(GRAD(THETA), state, THETA, grad_fn=counting)[1])
    state, counts = tx.init(THETA), []
    for _ in range(6):
        state = step(state)
        jax.effects_barrier()
        counts.append(len(calls))
    assert counts == [0, 0, 1, 1, 1, 2]


def flops(build):
    """Arithmetic of a compiled step on a network whose gradient is nearly all matrix products."""
    with jax.enable_x64(False):
        rng = np.random.default_rng(0)
        x = jnp.array(rng.normal(size=(64, 256)), jnp.float32)
        weights = [jnp.array(rng.normal(size=(256, 256)) / 16, jnp.float32) for _ in range(3)]

        def grad(weights, x):
            def network_loss(weights):
                h = x
                for w in weights:
                    h = jnp.tanh(h @ w)
                return jnp.mean(h**2)

            return jax.grad(network_loss)(weights)

        compiled = jax.jit(lambda w, x: build(grad, w, x)).lower(weights, x).compile()
        return compiled.cost_analysis()["flops"]


def cost(fraction=1.0, **arguments):
    """Of a step in plain gradients."""
    plain = flops(grad_only := lambda grad, w, x: grad(w, x))
    assert plain == flops(grad_only)
    tx = transforms.gradient_regularization(0.1, **{"ratio": 0.5} | arguments)

    def step(grad, w, x):
        extra = {}
        if fraction < 1:
            extra["ascent_grads"] = grad(w, x[: int(fraction * 64)])
        return tx.update(
            grad(w, x), tx.init(w), w, grad_fn=lambda weights: grad(weights, x), **extra
        )[0]

    return flops(step) / plain


def test_cost_in_gradients_a_step():
    # The norms, perturbations and mixes are a few passes over the parameters: 3 % of this network.
    assert cost() == pytest.approx(2, abs=0.05)
    assert cost(ratio=0.0) == pytest.approx(1, abs=0.01)
    assert cost(ratio=1.0) == pytest.approx(2, abs=0.05)
    assert cost(ratio=1.0, fraction=0.25) == pytest.approx(1.25, abs=0.05)
    assert cost(adaptive=True) == pytest.approx(2, abs=0.05)
    assert 2.5 < cost(estimator="exact") < 4.05
