"""The comparison's optimizers against NumPy float64 transcriptions of their papers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnp import transforms

B1, B2, EPS, STEPS = 0.8, 0.95, 1e-6, 30
THETA = np.random.default_rng(0).normal(size=5)
SCALE = np.array([0.1, 1.0, 3.0, 0.5, 2.0])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def gradient(theta, t):
    """Shrinks and grows, so that a running maximum differs from the average."""
    return SCALE * np.sin(theta) * (1.5 + np.cos(t))


def rate(count):
    return 0.05 * 0.98**count


def moments():
    """Yields (t, η_t, m, v, the maximum of v, θ's setter) for a loop in NumPy."""
    theta = THETA.copy()
    m = v = v_max = np.zeros(5)
    for t in range(1, STEPS + 1):
        g = gradient(theta, t)
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
        v_max = np.maximum(v_max, v)
        theta = yield t, rate(t - 1), m, v, v_max, theta
        yield


def follow(step):
    """The parameters after each update of a rule θ ← step(t, η, m, v, v_max, θ)."""
    loop, path = moments(), []
    for _ in range(STEPS):
        path.append(step(*next(loop)))
        loop.send(path[-1])
    return path


def descend(tx):
    params, path = jnp.array(THETA), []
    state = tx.init(params)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p))
    for t in range(1, STEPS + 1):
        grads = jnp.array(gradient(np.asarray(params), t))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path


def assert_same(tx, step):
    np.testing.assert_allclose(descend(tx), follow(step), rtol=1e-10)


def amsgrad_direction(t, m, v_max):
    return m / (1 - B1**t) / (np.sqrt(v_max / (1 - B2**t)) + EPS)


def test_amsgrad():
    def step(t, eta, m, v, v_max, theta):
        return theta - eta * amsgrad_direction(t, m, v_max)

    assert_same(transforms.amsgrad(rate, B1, B2, EPS), step)
    theirs = np.asarray(descend(optax.amsgrad(rate, B1, B2, EPS)))
    assert np.abs(theirs - np.asarray(follow(step))).max() > 1e-3, "Optax's is another algorithm"


def test_adams_with_amsgrad():
    """v̄ is the mean of the bias-corrected running maximum."""

    def step(t, eta, m, v, v_max, theta):
        v_bar = (v_max / (1 - B2**t)).mean()
        return theta - eta * (amsgrad_direction(t, m, v_max) + 0.03 * theta / np.sqrt(v_bar))

    assert_same(transforms.adams(rate, B1, B2, EPS, weight_decay=0.03, amsgrad=True), step)


@pytest.mark.parametrize("partial", [0.0, 0.125, 0.5])
def test_padam(partial):
    def step(t, eta, m, v, v_max, theta):
        size = eta * np.sqrt(1 - B2**t) / (1 - B1**t)
        return theta - size * m / (np.sqrt(v_max) + EPS) ** (2 * partial)

    assert_same(transforms.padam(rate, B1, B2, EPS, partial=partial), step)


@pytest.mark.parametrize("gamma", [1e-3, 0.05, 1e3])
def test_adabound(gamma):
    """The bounds are active on some elements and not on others, and follow the schedule."""
    clipped = []

    def step(t, eta, m, v, v_max, theta):
        size = eta * np.sqrt(1 - B2**t) / (1 - B1**t) / (np.sqrt(v) + EPS)
        final = 0.1 * eta / rate(0)
        bounded = np.clip(size, final * (1 - 1 / (gamma * t + 1)), final * (1 + 1 / (gamma * t)))
        clipped.extend(bounded != size)
        return theta - bounded * m

    tx = transforms.adabound(rate, B1, B2, EPS, final_learning_rate=0.1, gamma=gamma)
    assert_same(tx, step)
    assert any(clipped) or gamma == 1e-3
    assert not all(clipped) or gamma == 1e3


def test_adabound_needs_a_base_rate():
    with pytest.raises(ValueError, match="give base_learning_rate"):
        transforms.adabound(optax.linear_schedule(0.0, 0.1, 10))
    same = transforms.adabound(rate, B1, B2, EPS, base_learning_rate=rate(0))
    np.testing.assert_array_equal(descend(same), descend(transforms.adabound(rate, B1, B2, EPS)))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dampening", [0.0, 0.4])
def test_sgds(dampening, nesterov):
    buffer = [np.zeros(5)]

    def step(t, eta, m, v, v_max, theta):
        g = (1 - dampening) * gradient(theta, t)
        buffer[0] = 0.9 * buffer[0] + g
        direction = 0.9 * buffer[0] + g if nesterov else buffer[0]
        return theta - eta * direction - eta * 0.01 * (1 - dampening) / (1 - 0.9) * theta

    tx = transforms.sgds(rate, 0.9, dampening, weight_decay=0.01, nesterov=nesterov)
    assert_same(tx, step)


def test_sgds_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="momentum must be"):
        transforms.sgds(0.1, momentum=1.0, weight_decay=0.0)
    with pytest.raises(ValueError, match="weight_decay must be"):
        transforms.sgds(0.1, weight_decay=-1.0)


@pytest.mark.parametrize(
    "inner", [optax.contrib.muon(0.1), optax.adafactor(0.1)], ids=["muon", "adafactor"]
)
def test_scheduled_decay_around_whole_optimizers(inner):
    """Beside the inner optimizer's own update, with its sign."""
    params = {"kernel": jnp.array(np.random.default_rng(1).normal(size=(4, 4)))}
    grads = jax.tree.map(jnp.cos, params)
    tx = transforms.scheduled_weight_decay(inner, 0.1)
    ours, _ = tx.update(grads, tx.init(params), params)
    theirs, _ = inner.update(grads, inner.init(params), params)
    factor = 1 / np.sqrt(np.mean(np.asarray(grads["kernel"]) ** 2))
    expected = theirs["kernel"] + 0.1 * factor * params["kernel"]
    np.testing.assert_allclose(ours["kernel"], expected, rtol=1e-10)
