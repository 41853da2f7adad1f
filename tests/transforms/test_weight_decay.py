"""Scheduled weight decay and AdamS against NumPy, Optax and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnp import transforms


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def algorithm_2(theta, gradient, steps, lr, b1, b2, eps, weight_decay):
    """AdamS as in the paper's Algorithm 2, in NumPy; yields the parameters after each step."""
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t in range(1, steps + 1):
        g = gradient(theta)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        v_bar = v_hat.mean()
        step = m_hat / (np.sqrt(v_hat) + eps) + weight_decay * theta / np.sqrt(v_bar)
        theta = theta - lr(t - 1) * step
        yield theta


def test_adams_is_algorithm_2_for_50_steps():
    rng = np.random.default_rng(0)
    theta = rng.normal(size=7)
    scale = rng.uniform(0.1, 5, size=7)
    hyper = {"b1": 0.85, "b2": 0.97, "eps": 1e-6, "weight_decay": 0.02}

    def lr(count):
        return 0.05 * 0.99**count

    tx = transforms.adams(lr, **hyper)
    params = {"a": jnp.array(theta[:4]), "b": jnp.array(theta[4:]).reshape(3, 1)}
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(None)
        flat = jnp.concatenate([params["a"], params["b"][:, 0]])
        g = jnp.array(scale) * jnp.sin(flat) + 0.1
        grads = {"a": g[:4], "b": g[4:].reshape(3, 1)}
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    expected = algorithm_2(theta, lambda x: scale * np.sin(x) + 0.1, 50, lr, **hyper)
    for t, expected_theta in enumerate(expected, 1):
        params, state = step(params, state)
        flat = np.concatenate([params["a"], params["b"][:, 0]])
        np.testing.assert_allclose(flat, expected_theta, rtol=1e-10, atol=1e-10, err_msg=str(t))
    assert t == 50
    assert len(traces) == 1, "the step was traced again after the first update"


def test_a_constant_second_moment_gives_adamw():
    """Gradients of ±c have v̄ = c², so AdamS is AdamW with the decay λ / c."""
    c, weight_decay, lr = 0.25, 0.03, 0.01
    rng = np.random.default_rng(1)
    params = other = jnp.array(rng.normal(size=6))
    adams = transforms.adams(lr, weight_decay=weight_decay)
    adamw = optax.adamw(lr, weight_decay=weight_decay / c)
    state, other_state = adams.init(params), adamw.init(other)
    for _ in range(20):
        grads = jnp.array(rng.choice([-c, c], size=6))
        updates, state = adams.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, other_state = adamw.update(grads, other_state, other)
        other = optax.apply_updates(other, updates)
        np.testing.assert_allclose(params, other, rtol=1e-10)


def test_no_decay_is_adam_bit_for_bit():
    params = jnp.array([1.0, -2.0])
    grads = jnp.array([0.3, 0.7])
    adams, adam = transforms.adams(0.1, weight_decay=0.0), optax.adam(0.1)
    ours, _ = adams.update(grads, adams.init(params), params)
    theirs, _ = adam.update(grads, adam.init(params), params)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("inner", [optax.scale_by_rms(0.9), optax.trace(0.9), optax.identity()])
def test_any_base_optimizer(inner):
    """The decay is λθ/√v̄ beside the base's own update, v̄ from a float64 recurrence."""
    b2, weight_decay = 0.9, 0.1
    tx = transforms.scheduled_weight_decay(inner, weight_decay, b2=b2)
    rng = np.random.default_rng(2)
    params = {"a": jnp.array(rng.normal(size=3)), "b": jnp.array(rng.normal(size=(2, 2)))}
    state, inner_state, v = tx.init(params), inner.init(params), 0.0
    for t in range(1, 6):
        grads = jax.tree.map(lambda p: jnp.array(rng.normal(size=p.shape)), params)
        updates, state = tx.update(grads, state, params)
        base, inner_state = inner.update(grads, inner_state, params)
        squares = np.concatenate([np.ravel(g) ** 2 for g in jax.tree.leaves(grads)])
        v = b2 * v + (1 - b2) * squares.mean()
        factor = 1 / np.sqrt(v / (1 - b2**t))
        for name in params:
            expected = base[name] + weight_decay * factor * params[name]
            np.testing.assert_allclose(updates[name], expected, rtol=1e-10)


def test_the_mask_says_what_decays_and_the_mean_is_over_all():
    params = {"kernel": jnp.array([2.0, 4.0]), "bias": jnp.array([1.0])}
    grads = {"kernel": jnp.array([0.0, 0.0]), "bias": jnp.array([3.0])}
    for mask in ({"kernel": True, "bias": False}, lambda p: {k: k == "kernel" for k in p}):
        tx = transforms.scheduled_weight_decay(optax.identity(), 0.5, mask=mask)
        updates, _ = tx.update(grads, tx.init(params), params)
        factor = 1 / np.sqrt(9 / 3)
        np.testing.assert_allclose(updates["kernel"], 0.5 * factor * params["kernel"], rtol=1e-10)
        np.testing.assert_array_equal(updates["bias"], grads["bias"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e30])
def test_extreme_gradients_stay_finite(scale, dtype):
    params, grads = jnp.ones((3,), dtype), jnp.full((3,), scale, dtype)
    tx = transforms.scheduled_weight_decay(optax.identity(), 0.1)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates.dtype == dtype
    assert jnp.isfinite(updates).all()
    if scale == 0:
        np.testing.assert_array_equal(updates, grads)


def test_a_prefix_mask_and_scalars_are_taken_as_optax_takes_them():
    params = {"layer": {"kernel": jnp.array([2.0]), "bias": 3.0}, "gain": jnp.array(1.0)}
    grads = jax.tree.map(lambda _: jnp.array(2.0), params)
    tx = transforms.scheduled_weight_decay(
        optax.identity(), 0.5, mask={"layer": True, "gain": False}
    )
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["layer"]["kernel"], 2 + 0.5 / 2 * 2, rtol=1e-10)
    np.testing.assert_allclose(updates["layer"]["bias"], 2 + 0.5 / 2 * 3, rtol=1e-10)
    np.testing.assert_array_equal(updates["gain"], 2)


def test_the_factor_of_the_last_update_is_in_the_state():
    tx = transforms.scheduled_weight_decay(optax.identity(), 0.5)
    params = jnp.ones(2)
    _, state = tx.update(jnp.array([3.0, 4.0]), tx.init(params), params)
    np.testing.assert_allclose(state.factor, 1 / np.sqrt(12.5), rtol=1e-10)


def test_extra_arguments_reach_the_inner_transform():
    inner = transforms.gradient_regularization(0.1, 1.0)
    tx = transforms.scheduled_weight_decay(inner, 0.0)
    params = jnp.ones(2)
    updates, _ = tx.update(params, tx.init(params), params, grad_fn=lambda p: 3 * p)
    np.testing.assert_allclose(updates, 3 * (1 + 0.1 / np.sqrt(2)), rtol=1e-10)


def test_missing_params_say_what_to_write():
    tx = transforms.adams(0.1)
    with pytest.raises(ValueError, match=r"update\(grads, state, params\)"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_negative_decay_is_refused():
    with pytest.raises(ValueError, match="weight_decay must be 0 or more"):
        transforms.adams(0.1, weight_decay=-1.0)
