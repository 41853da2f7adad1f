"""Schedules and optimizers of a configuration against closed forms and Optax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnp import config as gnp_config
from gnp import transforms
from gnp.errors import UserError
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


def not_wanted():
    raise AssertionError("shapes are wanted only for patterns, as they take time")


def build(*, params=not_wanted, **fields):
    config = make_config(lr__schedule="constant", **fields)
    gnp_config.validate(config)
    return optimizers.build(config, steps_per_epoch=PER_EPOCH, total_steps=TOTAL, params=params)


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
        *("learning_rate", "grad_norm", "perturbed_grad_norm", "radius", "ratio", "swd_factor")
    }
    np.testing.assert_allclose(report["swd_factor"], 1 / np.sqrt((g**2).mean()), rtol=1e-10)
    for norm in ("grad_norm", "perturbed_grad_norm"):
        np.testing.assert_allclose(report[norm], np.linalg.norm(g), rtol=1e-6)


@pytest.mark.parametrize("name", gnp_config.OPTIMIZERS)
def test_the_spread_of_adaptive_learning_rates_is_reported(name):
    optimizer = build(
        optimizer__name=name, gr__policy="zero", lr__warmup="2st", log__adaptive_lr=True,
        weight_decay__kind="none" if name == "sgd" else "scheduled",
        weight_decay__value=0 if name == "sgd" else 0.01,
    )  # fmt: skip
    params = {"a": jnp.arange(1.0, 5), "b": {"nu": jnp.array([1e-3, 0.0])}}  # no gradient at 0
    state = optimizer.tx.init(params)
    assert float(optimizer.report(state, 0).get("adaptive_lr_log_std", (0, 1))[0]) == 0
    for scale in (3.0, 1.0):  # AMSGrad divides by the larger one

        def square(p, scale=scale):
            return jax.tree.map(lambda x: scale * x**2, p)

        _, state = optimizer.tx.update(square(params), state, params, grad_fn=square)
    report = optimizer.report(state, 0)
    if name == "sgd":
        assert "adaptive_lr_log_std" not in report
        return
    field = "nu_max" if name in ("amsgrad", "padam") else "nu"
    (nu,) = optax.tree_utils.tree_get_all_with_path(
        state, field, lambda path, _: isinstance(path[-1], optax.tree_utils.NamedTupleKey)
    )
    v = np.concatenate([np.ravel(x) for x in jax.tree.leaves(nu[1])]).astype(np.float64)
    expected = np.std(np.log(1 / np.sqrt(v[v > 0])))
    assert (v == 0).sum() == (name != "yogi") and expected > 0.5  # Yogi begins at 1e-6
    np.testing.assert_allclose(report["adaptive_lr_log_std"][0], expected, rtol=1e-5)


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


# --- Single parameters --------------------------------------------------------------------------

# The parameters of a small transformer, two blocks of which are stacked.
TREE = {
    "patch_embed": {"kernel": np.array([[0.7, -0.4], [1.1, 0.3]]), "bias": np.array([0.2, -0.1])},
    "blocks": {
        "kernel": np.array([[[0.5, -0.2], [0.3, 0.9]], [[-0.6, 0.8], [0.4, -1.2]]]),
        "bias": np.array([[0.1, 0.3], [-0.2, 0.4]]),
    },
    "head": {"kernel": np.array([[1.3], [-0.7]]), "bias": np.array([0.6])},
}
INPUTS = np.random.default_rng(0).normal(size=(5, 2))


def build_tree(**fields):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), TREE)
    return build(params=lambda: shapes, **fields)


def loss(params):
    x = jnp.asarray(INPUTS)
    for layer in (
        params["patch_embed"],
        *(jax.tree.map(lambda p, i=i: p[i], params["blocks"]) for i in range(2)),
        params["head"],
    ):
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return jnp.mean((x - 0.5) ** 2)


def gradient(optimizer, loss=loss):
    """As the train step takes it."""

    def objective(params):
        params = optimizer.without_frozen(params)
        return loss(params) + optimizer.l2_penalty(params)

    return jax.grad(objective)


def trained(optimizer, params=TREE, loss=loss, steps=3):
    """The parameters after some steps."""
    params = jax.tree.map(jnp.asarray, params)
    *_, params = descend(optimizer.tx, gradient(optimizer, loss), params, steps)
    return params


def assert_trees_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10), a, b)


def test_multipliers_are_optaxs_own_optimizers_with_other_rates():
    rules = "head/bias=0,head=10,bias=0.5"
    ours = build_tree(
        lr__multipliers=rules, weight_decay__kind="decoupled", weight_decay__value=0.1
    )
    labels = {
        "patch_embed": {"kernel": 1.0, "bias": 0.5},
        "blocks": {"kernel": 1.0, "bias": 0.5},
        "head": {"kernel": 10.0, "bias": 0.0},
    }
    rates = {x: optax.adamw(BASE * x, weight_decay=0.1) for x in (0.0, 0.5, 1.0, 10.0)}
    theirs = optax.with_extra_args_support(optax.partition(rates, labels))
    grad = jax.grad(loss)
    params = jax.tree.map(jnp.asarray, TREE)
    for a, b in zip(
        descend(ours.tx, grad, params), descend(theirs, grad, params), strict=True
    ):  # fmt: skip
        assert_trees_close(a, b)


@pytest.mark.parametrize("kind", ["none", "vanilla"])
def test_layer_decay_and_multipliers_scale_the_whole_update(kind):
    decay = {"weight_decay__kind": kind, "weight_decay__value": 0 if kind == "none" else 0.2}
    plain = trained(build_tree(optimizer__name="sgd", **decay), steps=1)
    scaled = trained(
        build_tree(
            optimizer__name="sgd", lr__layer_decay=0.5, lr__multipliers="^blocks=3,head=2", **decay
        ),
        steps=1,
    )
    factors = {"patch_embed": 0.5**3, "blocks": 3 * np.array([0.5**2, 0.5]), "head": 2}
    for module, factor in factors.items():
        for name, start in TREE[module].items():
            factor_of_rows = np.reshape(factor, np.shape(factor) + (1,) * (start.ndim - 1))
            np.testing.assert_allclose(
                scaled[module][name] - start,
                (plain[module][name] - start) * (factor_of_rows if np.ndim(factor) else factor),
                rtol=1e-10,
            )


def test_factors_keep_the_parameters_dtype():
    tx = build_tree(lr__layer_decay=0.5, lr__multipliers="head=2", optimizer__name="sgd").tx
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), TREE)
    updates, _ = tx.update(params, tx.init(params), params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer__name": "adam", "clip_norm": 0.01},
        {"optimizer__name": "amsgrad", "weight_decay__kind": "scheduled", "gr__policy": "none"},
        {"optimizer__name": "sgd", "weight_decay__kind": "scheduled"},
        {"optimizer__name": "sgd", "weight_decay__kind": "l2", "gr__policy": "none"},
        {"optimizer__name": "padam", "weight_decay__kind": "vanilla", "gr__policy": "none"},
    ],
    ids=lambda x: "-".join(map(str, x.values())),
)
def test_freezing_is_training_a_smaller_model(fields):
    """Frozen parameters stay to the bit and take no memory; the rest trains as if they were data.

    Neither GR's radius, nor the norm to be clipped, nor v̄ see what is frozen.
    """
    if "weight_decay__kind" in fields:
        fields["weight_decay__value"] = 0.1
    frozen = build_tree(optimizer__freeze="^patch_embed,blocks/kernel", **fields)
    smaller = build(**fields)
    data = {"patch_embed": TREE["patch_embed"], "blocks": {"kernel": TREE["blocks"]["kernel"]}}
    rest = {"blocks": {"bias": TREE["blocks"]["bias"]}, "head": TREE["head"]}

    def loss_of_rest(params):
        return loss(data | params | {"blocks": data["blocks"] | params["blocks"]})

    params = trained(frozen)
    assert_trees_close(
        {"blocks": {"bias": params["blocks"]["bias"]}, "head": params["head"]},
        trained(smaller, rest, loss_of_rest),
    )
    for path in (("patch_embed", "kernel"), ("patch_embed", "bias"), ("blocks", "kernel")):
        module, name = path
        assert params[module][name].tobytes() == TREE[module][name].tobytes()

    def sizes(optimizer, params):
        return sorted(x.shape for x in jax.tree.leaves(jax.eval_shape(optimizer.tx.init, params)))

    assert sizes(frozen, TREE) == sizes(smaller, rest)


def updated(optimizer):
    """The gradients, and the report of the first update."""

    @jax.jit
    def update(params):
        grad = gradient(optimizer)
        grads, state = grad(params), optimizer.tx.init(params)
        _, state = optimizer.tx.update(grads, state, params, grad_fn=grad)
        return grads, optimizer.report(state, 0)

    grads, report = update(TREE)
    return grads, {name: float(value) for name, (value, _) in report.items()}


def test_frozen_gradients_are_zero_and_reports_are_found():
    grads, report = updated(
        build_tree(optimizer__freeze="head", gr__policy="none", gr__radius=0.0, gr__ratio=0.0)
    )
    assert not any(np.any(x) for x in jax.tree.leaves(grads["head"]))
    expected = jax.grad(loss)(TREE)
    assert_trees_close(grads["blocks"], expected["blocks"])
    norm = np.sqrt(
        sum(np.sum(x**2) for m in ("patch_embed", "blocks") for x in expected[m].values())
    )
    np.testing.assert_allclose(report["grad_norm"], norm, rtol=1e-6)


def test_exclusion_is_adamw_with_a_mask():
    ours = build_tree(
        optimizer__name="adam", weight_decay__kind="decoupled", weight_decay__value=0.1,
        weight_decay__exclude="bias,^patch",
    )  # fmt: skip
    mask = {
        "patch_embed": {"kernel": False, "bias": False},
        "blocks": {"kernel": True, "bias": False},
        "head": {"kernel": True, "bias": False},
    }
    theirs = optax.with_extra_args_support(optax.adamw(BASE, weight_decay=0.1, mask=mask))
    grad = jax.grad(loss)
    params = jax.tree.map(jnp.asarray, TREE)
    for a, b in zip(
        descend(ours.tx, grad, params), descend(theirs, grad, params), strict=True
    ):  # fmt: skip
        assert_trees_close(a, b)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("sgd", kind) for kind in gnp_config.WEIGHT_DECAYS if kind != "none"),
        ("amsgrad", "scheduled"),
    ],
)
def test_excluded_parameters_are_without_any_kind_of_decay(name, kind):
    """In the first step they move as without decay, and the others as if none were excluded."""
    decay = {"weight_decay__kind": kind, "weight_decay__value": 0.1}
    some = trained(
        build_tree(optimizer__name=name, weight_decay__exclude="bias,head", **decay), steps=1
    )
    all_decay = trained(build(optimizer__name=name, **decay), steps=1)
    none_decays = trained(build(optimizer__name=name), steps=1)
    for module, expected in (
        ("patch_embed", all_decay), ("blocks", all_decay), ("head", none_decays),
    ):  # fmt: skip
        np.testing.assert_allclose(some[module]["kernel"], expected[module]["kernel"], rtol=1e-10)
        np.testing.assert_allclose(some[module]["bias"], none_decays[module]["bias"], rtol=1e-10)


def test_excluded_parameters_count_in_the_second_moment_and_frozen_ones_do_not():
    """1/√v̄ of the first step is that of the mean of g² over what is trained."""
    decay = {"weight_decay__kind": "scheduled", "weight_decay__value": 0.1}
    g = jax.grad(loss)(TREE)
    for fields, counted in (
        ({"weight_decay__exclude": "head"}, ("patch_embed", "blocks", "head")),
        ({"optimizer__freeze": "head"}, ("patch_embed", "blocks")),
        (
            {"optimizer__freeze": "head", "weight_decay__exclude": "blocks"},
            ("patch_embed", "blocks"),
        ),
    ):
        _, report = updated(build_tree(**decay, **fields))
        squares = np.concatenate([np.ravel(x**2) for m in counted for x in g[m].values()])
        np.testing.assert_allclose(report["swd_factor"], 1 / np.sqrt(squares.mean()), rtol=1e-10)


def test_l2_penalty_is_over_what_is_trained_and_decays():
    l2 = {"weight_decay__kind": "l2", "weight_decay__value": 0.3}

    def squares(*names):
        return sum(np.sum(TREE[module][name] ** 2) for module, name in names)

    kernels = [("patch_embed", "kernel"), ("blocks", "kernel"), ("head", "kernel")]
    biases = [("patch_embed", "bias"), ("blocks", "bias"), ("head", "bias")]
    for fields, names in (
        ({}, kernels + biases),
        ({"weight_decay__exclude": "bias"}, kernels),
        ({"optimizer__freeze": "head"}, kernels[:2] + biases[:2]),
        ({"weight_decay__exclude": "bias", "optimizer__freeze": "^patch"}, kernels[1:]),
        ({"weight_decay__exclude": "bias,blocks,patch", "optimizer__freeze": "head"}, []),
    ):
        penalty = build_tree(**l2, **fields).l2_penalty(TREE)
        np.testing.assert_allclose(penalty, 0.15 * squares(*names), rtol=1e-12)
    assert build().l2_penalty(TREE) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer__freeze": "hed"}, "config.optimizer.freeze: 'hed' matches no parameter"),
        (
            {
                "weight_decay__exclude": "bias,nrm",
                "weight_decay__kind": "decoupled",
                "weight_decay__value": "0.1",
            },
            "config.weight_decay.exclude: 'nrm' matches no parameter",
        ),
        ({"lr__multipliers": "hed=2"}, "config.lr.multipliers: 'hed' matches no parameter"),
        ({"lr__multipliers": "head"}, "config.lr.multipliers: 'head' is no rule"),
        (
            {"optimizer__freeze": "kernel,bias"},
            "config.optimizer.freeze: 'kernel', 'bias' match all parameters",
        ),
    ],
)
def test_wrong_patterns_name_their_field(fields, message):
    with pytest.raises(UserError, match=message) as error:
        build_tree(**fields)
    assert "\n" not in str(error.value)
