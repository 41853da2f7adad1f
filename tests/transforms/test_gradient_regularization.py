"""Gradient regularization against closed forms, a hand-written SAM, and plain training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnp import transforms

RADIUS, RATIO, WARMUP_STEPS = 0.1, 0.8, 4


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def quadratic():
    """L(θ) = θᵀAθ/2 over two leaves; returns its matrix, parameters and gradient function."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(5, 5))
    matrix = root @ root.T
    params = {"a": jnp.array(rng.normal(size=(2,))), "b": jnp.array(rng.normal(size=(3, 1)))}

    def loss(params):
        flat = jnp.concatenate([params["a"], params["b"][:, 0]])
        return flat @ jnp.array(matrix) @ flat / 2

    return matrix, params, jax.grad(loss)


def flatten(params):
    return np.concatenate([np.asarray(params["a"]), np.asarray(params["b"])[:, 0]])


def closed_form(matrix, theta, radius, ratio):
    """On a quadratic the finite difference is exact: g + α r A g / |g|, with g = A θ."""
    g = matrix @ theta
    return g + ratio * radius * matrix @ g / np.linalg.norm(g)


def applied(policy, t):
    """r_t and α_t of Eq. 10-15, written out anew."""
    w = min(t / WARMUP_STEPS, 1)
    return {
        "off": (0, 0),
        "none": (RADIUS, RATIO),
        "r": (w * RADIUS, RATIO),
        "lambda": (RADIUS, w * RATIO),
        "zero": (RADIUS, RATIO if t > WARMUP_STEPS else 0),
    }[policy]


def test_gradient_is_the_closed_form_on_a_quadratic(quadratic):
    matrix, params, grad_fn = quadratic
    tx = transforms.gradient_regularization(RADIUS, RATIO)
    updates, state = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
    expected = closed_form(matrix, flatten(params), RADIUS, RATIO)
    np.testing.assert_allclose(flatten(updates), expected, rtol=1e-10)
    g = matrix @ flatten(params)
    np.testing.assert_allclose(state.grad_norm, np.linalg.norm(g), rtol=1e-6)  # kept in float32
    second = g + RADIUS * matrix @ g / np.linalg.norm(g)
    np.testing.assert_allclose(state.perturbed_grad_norm, np.linalg.norm(second), rtol=1e-6)


def test_estimates_the_gradient_of_the_penalised_loss(quadratic):
    """For a small radius, that of L + λ|∇L|, differentiated by JAX."""
    _, params, _ = quadratic

    def loss(params):
        return jnp.sum(jnp.sin(params["a"])) + jnp.sum(params["b"] ** 3) * params["a"][0]

    penalty = 0.3

    def penalised(params):
        return loss(params) + penalty * optax.tree.norm(jax.grad(loss)(params))

    radius = 1e-6
    tx = transforms.gradient_regularization(radius, penalty / radius)
    grad_fn = jax.grad(loss)
    updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
    # The finite difference's truncation is of the order of the radius.
    np.testing.assert_allclose(flatten(updates), flatten(jax.grad(penalised)(params)), atol=1e-5)


@pytest.mark.parametrize("policy", transforms.POLICIES)
def test_policies_step_by_step_in_a_jitted_chain_with_clipping(quadratic, policy):
    """Eight updates, t from 1, against the closed form, clipped and descended by hand."""
    matrix, params, grad_fn = quadratic
    learning_rate, max_norm = 0.01, 3.0
    schedules = transforms.warmup(policy, radius=RADIUS, ratio=RATIO, warmup_steps=WARMUP_STEPS)
    tx = optax.chain(
        transforms.gradient_regularization(*schedules),
        optax.clip_by_global_norm(max_norm),
        optax.sgd(learning_rate),
    )
    traces = []

    @jax.jit
    def step(params, opt_state):
        traces.append(None)
        updates, opt_state = tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state

    theta, opt_state = flatten(params), tx.init(params)
    clipped = 0
    for t in range(1, 9):
        radius, ratio = applied(policy, t)
        g = closed_form(matrix, theta, radius, ratio)
        clipped += np.linalg.norm(g) > max_norm
        theta = theta - learning_rate * g * min(1, max_norm / np.linalg.norm(g))
        params, opt_state = step(params, opt_state)
        np.testing.assert_allclose(flatten(params), theta, rtol=1e-10, err_msg=f"t = {t}")
        state = opt_state[0]
        np.testing.assert_allclose([state.radius, state.ratio], [radius, ratio], rtol=1e-6)
    assert int(opt_state[0].count) == 8
    assert clipped, "the clipping must have had something to do"
    assert len(traces) == 1, "the step was traced again after the first update"


def test_ratio_one_is_sam(quadratic):
    """On a loss that is no quadratic, against SAM written by hand (Foret et al., 2021)."""
    _, params, _ = quadratic

    def loss(params):
        return jnp.sum(jnp.cos(params["a"])) + jnp.sum(params["b"] ** 4) + params["a"][0] ** 3

    grad_fn = jax.grad(loss)
    g = grad_fn(params)
    norm = jnp.sqrt(jnp.sum(g["a"] ** 2) + jnp.sum(g["b"] ** 2))
    expected = grad_fn({k: params[k] + 0.2 * g[k] / norm for k in params})
    tx = transforms.gradient_regularization(0.2, 1.0)
    updates, _ = tx.update(g, tx.init(params), params, grad_fn=grad_fn)
    np.testing.assert_allclose(flatten(updates), flatten(expected), rtol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
@pytest.mark.parametrize("ratio", [0.0, lambda t: jnp.zeros(())], ids=["float", "schedule"])
def test_ratio_zero_is_no_regularization_bit_for_bit(ratio, dtype):
    params = {"a": jnp.array([1.3, -0.7], dtype), "b": jnp.array(0.1, dtype)}
    grads = {"a": jnp.array([1e-3, 7.7], dtype), "b": jnp.array(-3.3, dtype)}
    tx = transforms.gradient_regularization(0.1, ratio)
    updates, _ = jax.jit(lambda g, s, p: tx.update(g, s, p, grad_fn=lambda p: p))(
        grads, tx.init(params), params
    )
    for name in grads:
        assert updates[name].dtype == dtype
        assert (updates[name] == grads[name]).all()


def test_the_second_gradient_is_not_computed_where_the_ratio_is_zero(quadratic):
    """Counted while it runs, by a callback inside the second gradient."""
    _, params, grad_fn = quadratic
    calls = []

    def counting(params):
        jax.debug.callback(lambda: calls.append(None))
        return grad_fn(params)

    schedules = transforms.warmup("zero", radius=0.1, ratio=1.0, warmup_steps=3)
    tx = transforms.gradient_regularization(*schedules)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, grad_fn=counting))
    state, counts = tx.init(params), []
    for _ in range(5):
        _, state = update(grad_fn(params), state, params)
        jax.effects_barrier()
        counts.append(len(calls))
    assert counts == [0, 0, 0, 1, 2]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-30, 1e30])
def test_extreme_gradients_stay_finite(scale, dtype):
    """Zero, subnormal, squares that underflow, squares that overflow."""
    params = jnp.ones((3,), dtype)
    grads = jnp.array([1.0, -1.0, 0.0], jnp.float32) * scale
    tx = transforms.gradient_regularization(0.1, 0.5)
    seen = []

    def grad_fn(params):
        seen.append(params)
        return grads.astype(dtype)

    updates, _ = tx.update(grads.astype(dtype), tx.init(params), params, grad_fn=grad_fn)
    assert jnp.isfinite(seen[0]).all()
    np.testing.assert_array_equal(updates, grads.astype(dtype))
    if scale == 0:
        np.testing.assert_array_equal(seen[0], params)


@settings(deadline=None, max_examples=50)
@given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=6),
    radius=st.floats(0, 10, width=32),
    ratio=st.floats(0, 2, width=32),
)
def test_the_perturbation_has_the_length_of_the_radius(values, radius, ratio):
    """And a constant gradient is left as it is, whatever the mix."""
    grads, params = jnp.array(values, jnp.float64), jnp.zeros(len(values), jnp.float64)
    seen = []

    def grad_fn(params):
        seen.append(params)
        return grads

    tx = transforms.gradient_regularization(radius, ratio)
    updates, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    np.testing.assert_allclose(updates, grads, rtol=1e-10, atol=1e-300)
    if ratio:
        norm = np.linalg.norm(np.asarray(grads))
        # Components below 1e-150 have squares that vanish, and with them the perturbation.
        if norm > 1e-150:
            np.testing.assert_allclose(np.linalg.norm(seen[0]), radius, rtol=1e-10)


def test_bfloat16_is_perturbed_and_mixed_in_float32():
    """Each result is rounded once, from a float64 calculation on the bfloat16 values."""
    rng = np.random.default_rng(3)
    params, grads, second = (jnp.array(rng.normal(size=64), jnp.bfloat16) for _ in range(3))
    seen = []

    def grad_fn(params):
        seen.append(params)
        return second

    tx = transforms.gradient_regularization(0.7, 0.3)
    updates, state = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    theta, g, h = (np.asarray(x, np.float64) for x in (params, grads, second))
    norm = np.linalg.norm(g)
    np.testing.assert_allclose(state.grad_norm, norm, rtol=1e-6)
    assert seen[0].dtype == updates.dtype == jnp.bfloat16
    np.testing.assert_array_equal(seen[0], jnp.array(theta + 0.7 * g / norm, jnp.bfloat16))
    np.testing.assert_array_equal(updates, jnp.array(0.7 * g + 0.3 * h, jnp.bfloat16))


def test_missing_arguments_say_what_to_write():
    tx = transforms.gradient_regularization(0.1, 1.0)
    params = jnp.ones(2)
    with pytest.raises(ValueError, match=r"update\(grads, state, params, grad_fn=jax.grad\(loss"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match=r"update\(grads, state, params, grad_fn=grad_fn\)"):
        tx.update(params, tx.init(params), grad_fn=lambda p: p)


@pytest.mark.parametrize(
    "arguments",
    [{"radius": -0.1, "ratio": 1.0}, {"radius": 0.1, "ratio": -1.0}],
)
def test_negative_numbers_are_refused(arguments):
    with pytest.raises(ValueError, match="must be 0 or more"):
        transforms.gradient_regularization(**arguments)
    with pytest.raises(ValueError, match="must be 0 or more"):
        transforms.warmup("none", **arguments, warmup_steps=1)


def test_an_unknown_policy_names_the_nearest():
    with pytest.raises(ValueError, match="'lamda'; did you mean 'lambda'"):
        transforms.warmup("lamda", radius=0.1, ratio=1.0, warmup_steps=1)


def test_one_device_and_eight_agree(quadratic):
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    rng = np.random.default_rng(1)
    x, y = jnp.array(rng.normal(size=(16, 4))), jnp.array(rng.normal(size=16))
    params = jnp.array(rng.normal(size=4))
    tx = transforms.gradient_regularization(RADIUS, RATIO)

    @jax.jit
    def step(params, x, y):
        grad_fn = jax.grad(lambda p: jnp.mean(jnp.tanh(x @ p - y) ** 2))
        return tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0]

    mesh = Mesh(np.array(jax.devices()), ("data",))
    assert mesh.size == 8
    lay = NamedSharding(mesh, PartitionSpec("data"))
    eight = step(params, jax.device_put(x, lay), jax.device_put(y, lay))
    np.testing.assert_allclose(eight, step(params, x, y), rtol=1e-12)
