"""Schedules and optimizers of a configuration against closed forms and Optax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnp import config as gnp_config
from gnp import transforms
from gnp.training import optimizer as optimizers

TOTAL, PER_EPOCH, BASE = 100, 10.0, 0.4


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def make_config(**fields):
    config = gnp_config.default()
    config.lr.base = BASE
    for field, value in fields.items():
        gnp_config.override(config, field.replace("__", "."), str(value))
    config.epochs = TOTAL / PER_EPOCH
    return config


def learning_rates(**fields):
    config = make_config(**fields).lr
    schedule = optimizers.learning_rate(config, steps_per_epoch=PER_EPOCH, total_steps=TOTAL)
    return np.asarray([jax.jit(schedule)(count) for count in range(TOTAL)])


def test_constant_without_warmup():
    np.testing.assert_allclose(learning_rates(lr__schedule="constant"), BASE)


def test_linear_warmup_then_cosine_to_zero():
    rates = learning_rates(lr__schedule="cosine", lr__warmup="2ep")
    t = np.arange(1, 21)
    np.testing.assert_allclose(rates[:20], BASE * t / 20, rtol=1e-6)  # Eq. 6, t from 1
    s = np.arange(80)
    np.testing.assert_allclose(rates[20:], BASE * (1 + np.cos(np.pi * s / 80)) / 2, rtol=1e-6)


def test_constant_warmup():
    rates = learning_rates(
        lr__schedule="constant", lr__warmup="5st", lr__warmup_kind="constant",
        lr__warmup_factor=0.25,
    )  # fmt: skip
    np.testing.assert_allclose(rates, [0.1] * 5 + [BASE] * 95, rtol=1e-6)


def test_steps():
    rates = learning_rates(
        lr__schedule="step", lr__drops="50%,8ep", lr__drop_factor=0.1, lr__warmup="4st"
    )
    expected = [0.1, 0.2, 0.3, 0.4] + [BASE] * 46 + [BASE * 0.1] * 30 + [BASE * 0.01] * 20
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


@pytest.mark.parametrize("multiplier", [1, 2])
def test_warm_restarts(multiplier):
    """Loshchilov and Hutter's recursion, one step after another."""
    rates = learning_rates(
        lr__schedule="restarts", lr__restart_period="1ep", lr__restart_multiplier=multiplier,
        lr__warmup="3st",
    )  # fmt: skip
    expected, since, period = [], 0, 10
    for _ in range(TOTAL - 3):
        if since == period:
            since, period = 0, period * multiplier
        expected.append(BASE * (1 + np.cos(np.pi * since / period)) / 2)
        since += 1
    np.testing.assert_allclose(rates[3:], expected, rtol=1e-6, atol=1e-7)


def descend(tx, grad_fn, params, steps=6):
    """`steps` updates from `params`; yields the parameters after each."""
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
        yield params


def build(**fields):
    config = make_config(lr__schedule="constant", **fields)
    gnp_config.validate(config)
    return optimizers.build(config, steps_per_epoch=PER_EPOCH, total_steps=TOTAL)


PARAMS = np.array([1.0, -2.0, 0.5])


def grad_fn(params):
    return jnp.array([1.0, 3.0, 0.2]) * jnp.sin(params)


@pytest.mark.parametrize(
    ("fields", "reference"),
    [
        ({"optimizer__name": "adam"}, optax.adam(BASE)),
        ({"optimizer__name": "rmsprop"}, optax.rmsprop(BASE)),
        ({"optimizer__name": "yogi"}, optax.yogi(BASE, eps=1e-8)),
        ({"optimizer__name": "radam"}, optax.radam(BASE)),
        ({"optimizer__name": "amsgrad"}, transforms.amsgrad(BASE)),
        ({"optimizer__name": "padam"}, transforms.padam(BASE)),
        ({"optimizer__name": "adabound"}, transforms.adabound(BASE)),
        (
            {"optimizer__name": "amsgrad", "weight_decay__kind": "scheduled"},
            transforms.adams(BASE, weight_decay=0.1, amsgrad=True),
        ),
        ({"optimizer__name": "sgd"}, optax.sgd(BASE, 0.9)),
        (
            {"optimizer__name": "sgd", "optimizer__nesterov": True},
            optax.sgd(BASE, 0.9, nesterov=True),
        ),
        (
            {"optimizer__name": "adam", "weight_decay__kind": "decoupled"},
            optax.adamw(BASE, weight_decay=0.1),
        ),
        (
            {"optimizer__name": "adam", "clip_norm": 0.5},
            optax.chain(optax.clip_by_global_norm(0.5), optax.adam(BASE)),
        ),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else "",
)
def test_optaxs_own_optimizers(fields, reference):
    if "weight_decay__kind" in fields:
        fields = fields | {"weight_decay__value": 0.1}
    ours = descend(build(**fields).tx, grad_fn, jnp.array(PARAMS))
    theirs = descend(optax.with_extra_args_support(reference), grad_fn, jnp.array(PARAMS))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


def test_gr_comes_before_clipping():
    """SGD on clip(GR(g)), by hand; clip(g) would point elsewhere."""
    tx = build(gr__policy="none", gr__radius=0.5, clip_norm=0.5, optimizer__name="sgd").tx
    theta, momentum = PARAMS, np.zeros(3)

    def gradient(x):
        return np.array([1.0, 3.0, 0.2]) * np.sin(x)

    for params in descend(tx, grad_fn, jnp.array(PARAMS)):
        g = gradient(theta)
        g = gradient(theta + 0.5 * g / np.linalg.norm(g))
        momentum = 0.9 * momentum + g * min(1, 0.5 / np.linalg.norm(g))
        theta = theta - BASE * momentum
        np.testing.assert_allclose(params, theta, rtol=1e-10)


def test_vanilla_decay_is_equation_1():
    """θ ← (1 − λ)θ − ηu: the learning rate does not scale the decay."""
    tx = build(optimizer__name="sgd", weight_decay__kind="vanilla", weight_decay__value=0.2).tx
    theta, momentum = PARAMS, np.zeros(3)
    for params in descend(tx, grad_fn, jnp.array(PARAMS)):
        momentum = 0.9 * momentum + np.array([1.0, 3.0, 0.2]) * np.sin(theta)
        theta = (1 - 0.2) * theta - BASE * momentum
        np.testing.assert_allclose(params, theta, rtol=1e-10)


def test_what_lies_beyond_the_run_lies_beyond_int32_too():
    rates = learning_rates(lr__schedule="step", lr__drops="50%,999999999999ep")
    np.testing.assert_allclose(rates[50:], BASE * 0.1, rtol=1e-6)
    rates = learning_rates(
        lr__schedule="restarts", lr__restart_period="1ep", lr__restart_multiplier=100_000_000
    )
    assert np.isfinite(rates).all()


def test_coupled_decay_is_equation_2():
    """θ ← (1 − ηλ)θ − ηu, with momentum's u."""
    tx = build(optimizer__name="sgd", weight_decay__kind="coupled", weight_decay__value=0.2).tx
    theta, momentum = PARAMS, np.zeros(3)
    for params in descend(tx, grad_fn, jnp.array(PARAMS)):
        momentum = 0.9 * momentum + np.array([1.0, 3.0, 0.2]) * np.sin(theta)
        theta = (1 - BASE * 0.2) * theta - BASE * momentum
        np.testing.assert_allclose(params, theta, rtol=1e-10)


def test_scheduled_decay_of_sgd_is_sgds():
    """The decay factor is ηλ / (1 − momentum)."""
    tx = build(optimizer__name="sgd", weight_decay__kind="scheduled", weight_decay__value=0.02).tx
    theta, momentum = PARAMS, np.zeros(3)
    for params in descend(tx, grad_fn, jnp.array(PARAMS)):
        momentum = 0.9 * momentum + np.array([1.0, 3.0, 0.2]) * np.sin(theta)
        theta = theta - BASE * momentum - BASE * 0.02 / (1 - 0.9) * theta
        np.testing.assert_allclose(params, theta, rtol=1e-10)


def test_scheduled_decay_of_rmsprop_uses_its_decay_rate():
    tx = build(
        optimizer__name="rmsprop", optimizer__decay=0.8, weight_decay__kind="scheduled",
        weight_decay__value=0.02,
    ).tx  # fmt: skip
    theta, nu = PARAMS, np.zeros(3)
    for t, params in enumerate(descend(tx, grad_fn, jnp.array(PARAMS)), 1):
        g = np.array([1.0, 3.0, 0.2]) * np.sin(theta)
        nu = 0.8 * nu + 0.2 * g**2
        v_bar = nu.mean() / (1 - 0.8**t)
        theta = theta - BASE * g / np.sqrt(nu + 1e-8) - BASE * 0.02 * theta / np.sqrt(v_bar)
        np.testing.assert_allclose(params, theta, rtol=1e-10)


def test_gr_is_warmed_up_with_the_learning_rate_unless_it_has_its_own():
    for fields, expected in (
        ({"lr__warmup": "3st"}, [0, 0, 0, 1, 1]),
        ({"lr__warmup": "3st", "gr__warmup": "1st"}, [0, 1, 1, 1, 1]),
    ):
        optimizer = build(gr__policy="zero", optimizer__name="sgd", **fields)
        params = jnp.array(PARAMS)
        state, ratios = optimizer.tx.init(params), []
        for _ in range(5):
            _, state = optimizer.tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
            ratios.append(float(optimizer.report(state, 0)["ratio"][0]))
        assert ratios == expected


def test_what_is_reported():
    plain = build(gr__policy="off")
    params = jnp.array(PARAMS)
    assert set(plain.report(plain.tx.init(params), 0)) == {"learning_rate"}
    full = build(
        gr__policy="none", weight_decay__kind="scheduled", weight_decay__value=0.1, clip_norm=9
    )
    state = full.tx.init(params)
    g = np.asarray(grad_fn(params))
    _, state = full.tx.update(grad_fn(params), state, params, grad_fn=lambda p: jnp.array(g))
    report = {name: float(value) for name, (value, weight) in full.report(state, 0).items()}
    assert set(report) == {
        *("learning_rate", "perturbed_grad_norm", "radius", "ratio", "swd_factor")
    }
    np.testing.assert_allclose(report["swd_factor"], 1 / np.sqrt((g**2).mean()), rtol=1e-10)
    np.testing.assert_allclose(report["perturbed_grad_norm"], np.linalg.norm(g), rtol=1e-6)


@pytest.mark.parametrize("kind", gnp_config.WEIGHT_DECAYS)
@pytest.mark.parametrize("name", gnp_config.OPTIMIZERS)
@pytest.mark.parametrize("policy", gnp_config.GR_POLICIES)
def test_every_combination_can_be_built_and_moves(name, kind, policy):
    optimizer = build(
        optimizer__name=name, weight_decay__kind=kind, gr__policy=policy, lr__warmup="2st",
        weight_decay__value=0 if kind == "none" else 0.01,
    )  # fmt: skip
    *_, params = descend(optimizer.tx, grad_fn, jnp.array(PARAMS), steps=3)
    assert jnp.isfinite(params).all() and (params != PARAMS).all()
    assert optimizer.l2 == (0.01 if kind == "l2" else 0.0)
