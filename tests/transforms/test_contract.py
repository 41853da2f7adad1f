"""What holds for every transform that is exported, inside everything that Optax has."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gnp import transforms

SWD = transforms.scheduled_weight_decay
ZERO = transforms.warmup("zero", radius=0.1, ratio=0.5, warmup_steps=2)
CASES = {
    "gradient_regularization": lambda: transforms.gradient_regularization(0.1, 0.5),
    "gradient_regularization-zero": lambda: transforms.gradient_regularization(*ZERO),
    "gradient_regularization-exact": lambda: transforms.gradient_regularization(
        0.1, 1.0, estimator="exact"
    ),
    "gradient_regularization-adaptive": lambda: transforms.gradient_regularization(
        0.1, transforms.between(1, None, transforms.every(2, 0.5)), adaptive=True
    ),
    "gradient_regularization-squared": lambda: transforms.gradient_regularization(
        0.01, 0.5, penalty="squared_norm"
    ),
    "scheduled_weight_decay": lambda: SWD(optax.scale_by_adam(), 0.01),
    "scheduled_weight_decay-sgd": lambda: SWD(optax.trace(0.9), 0.01),
    "scheduled_weight_decay-rmsprop": lambda: SWD(optax.scale_by_rms(0.9), 0.01, b2=0.9),
    "scheduled_weight_decay-lion": lambda: SWD(optax.scale_by_lion(), 0.01),
    "scheduled_weight_decay-gr": lambda: SWD(transforms.gradient_regularization(0.1, 0.5), 0.01),
    "adams": lambda: transforms.adams(0.1),
    "adams-amsgrad": lambda: transforms.adams(0.1, amsgrad=True),
    "sgds": lambda: transforms.sgds(0.1, weight_decay=0.01),
    "amsgrad": lambda: transforms.amsgrad(0.1),
    "scale_by_amsgrad": lambda: transforms.scale_by_amsgrad(),
    "padam": lambda: transforms.padam(0.1),
    "scale_by_padam": lambda: transforms.scale_by_padam(),
    "adabound": lambda: transforms.adabound(0.1),
    "scale_by_adabound": lambda: transforms.scale_by_adabound(final_ratio=10.0),
}
NO_TRANSFORMS = {"warmup", "every", "between"}  # schedules


def is_gr(name):
    return name.startswith("gradient_regularization") or name.endswith("-gr")


@pytest.fixture(params=CASES)
def name(request):
    return request.param


@pytest.fixture
def tx(name):
    return optax.with_extra_args_support(CASES[name]())


PARAMS = {
    "a": jnp.array([1.0, -2.0, 0.5]),
    "b": {"c": jnp.array([[0.3], [0.7]]), "none": None},
    "scalar": jnp.array(1.5, jnp.float32),
}


def grad_fn(params):
    return jax.tree.map(lambda p: 2 * p + jnp.sin(p), params)


def run(tx, params=PARAMS, steps=4, jit=True, **extra):
    """The parameters and the state after some updates."""

    def step(params, state):
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn, **extra)
        return optax.apply_updates(params, optax.tree.scale(-0.01, updates)), state

    step = jax.jit(step) if jit else step
    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def assert_close(a, b, rtol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-7), a, b)


def test_every_export_is_covered():
    exported = {
        name
        for name in transforms.__all__
        if inspect.isfunction(getattr(transforms, name)) and name not in NO_TRANSFORMS
    }
    assert exported == {case.split("-")[0] for case in CASES}


def test_every_export_says_its_source_and_has_a_doctest():
    for name in transforms.__all__:
        function = getattr(transforms, name)
        if inspect.isfunction(function):
            doc = inspect.getdoc(function)
            for part in ("Args:", "Returns:", ">>>"):
                assert part in doc, f"{name}: {part}"
            assert "Reference:" in doc or name == "between", name
            assert "Cost:" in doc or "costs" in doc, name


def test_moves_and_is_the_same_without_jit(tx):
    params, _ = run(tx)
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (params, PARAMS)), strict=True))
    assert_close(params, run(tx, jit=False)[0])


@pytest.mark.parametrize("wrap", ["chain", "named_chain", "apply_if_finite", "unknown extra"])
def test_inside(tx, wrap):
    expected, _ = run(tx)
    extra = {"value": jnp.ones(()), "unknown": 3} if wrap == "unknown extra" else {}
    wrapped = {
        "chain": lambda: optax.chain(optax.identity(), tx),
        "named_chain": lambda: optax.named_chain(("first", optax.identity()), ("ours", tx)),
        "apply_if_finite": lambda: optax.apply_if_finite(tx, 2),
        "unknown extra": lambda: tx,
    }[wrap]()
    assert_close(run(wrapped, **extra)[0], expected)


def test_inside_masked_and_partition(name, tx):
    """A part of the parameters is updated as if it were all there is; GR says what to use."""
    mask = {"a": True, "b": False, "scalar": True}
    labels = {"a": "ours", "b": "none", "scalar": "ours"}
    for wrapped in (
        optax.masked(tx, mask),
        optax.partition({"ours": tx, "none": optax.set_to_zero()}, labels),
    ):
        if is_gr(name):
            with pytest.raises(ValueError, match="put it outside, and use its argument mask"):
                run(wrapped)
            continue
        params, _ = run(wrapped)
        part = {k: PARAMS[k] for k in ("a", "scalar")}
        expected, _ = run(tx, part)
        assert_close({k: params[k] for k in part}, expected)


@pytest.mark.parametrize(
    ("factory", "hyperparameters"),
    [
        (transforms.gradient_regularization, {"radius": 0.1, "ratio": 0.5}),
        (transforms.adams, {"learning_rate": 0.1, "weight_decay": 0.01}),
        (transforms.sgds, {"learning_rate": 0.1, "momentum": 0.5, "weight_decay": 0.01}),
        (transforms.amsgrad, {"learning_rate": 0.1}),
        (transforms.padam, {"learning_rate": 0.1, "partial": 0.25}),
        (transforms.adabound, {"learning_rate": 0.1, "gamma": 0.01}),
        (lambda weight_decay: SWD(optax.scale_by_adam(), weight_decay), {"weight_decay": 0.01}),
    ],
    ids=["gr", "adams", "sgds", "amsgrad", "padam", "adabound", "swd"],
)
def test_inject_hyperparams(factory, hyperparameters):
    injected = optax.with_extra_args_support(optax.inject_hyperparams(factory)(**hyperparameters))
    expected, _ = run(optax.with_extra_args_support(factory(**hyperparameters)))
    params, state = run(injected)
    assert_close(params, expected, rtol=1e-5)
    assert set(hyperparameters) <= set(state.hyperparams)


def test_multi_steps(name, tx):
    """Two microbatches of the same gradient are one of it; GR says why not and what to use."""
    if is_gr(name):
        doc = inspect.getdoc(transforms.gradient_regularization)
        assert "MultiSteps" in doc and "scripts/examples/accumulation.py" in doc
        return
    multi = optax.MultiSteps(tx, 2)
    params, state = PARAMS, multi.init(PARAMS)
    for _ in range(2):
        updates, state = multi.update(grad_fn(PARAMS), state, params)
        params = optax.apply_updates(params, optax.tree.scale(-0.01, updates))
    assert_close(params, run(tx, steps=1)[0])


@pytest.mark.parametrize(
    "params",
    [
        {"x": jnp.array([1.0, 2.0], jnp.bfloat16)},
        {"x": jnp.array([1.0, 2.0], jnp.bfloat16), "y": jnp.array([0.5])},
        jnp.array(3.0),
        {},
        (jnp.ones((2, 1)), None, [jnp.array(2.0)]),
    ],
    ids=["bfloat16", "mixed", "scalar", "empty", "nested"],
)
def test_structure_and_dtype_are_kept(tx, params):
    updates, state = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(lambda x: x.dtype, params)
    again = jax.eval_shape(lambda: tx.update(grad_fn(params), state, params, grad_fn=grad_fn)[1])
    assert jax.tree.structure(again) == jax.tree.structure(tx.init(params))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), again) == jax.tree.map(
        lambda x: (x.shape, x.dtype), tx.init(params)
    ), "a state whose dtypes change cannot be scanned over"


def test_strict_promotion(name, tx):
    with jax.numpy_dtype_promotion("strict"):
        if name in ("scheduled_weight_decay", "adams"):  # around Optax's Adam, which is not strict
            with pytest.raises(jax.dtypes.TypePromotionError):
                run(optax.with_extra_args_support(optax.scale_by_adam()), steps=1)
            return
        run(tx, steps=2)


def test_compiled_once_with_donation(tx):
    traces = []

    def step(params, state):
        traces.append(None)
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, optax.tree.scale(-0.01, updates)), state

    donating = jax.jit(step, donate_argnums=(0, 1))
    params, state = jax.tree.map(jnp.copy, (PARAMS, jax.jit(tx.init)(PARAMS)))
    for _ in range(4):
        params, state = donating(params, state)
    assert len(traces) == 1
    assert_close(params, run(tx)[0])


def test_scan_and_vmap_over_seeds(tx):
    def train(params):
        def body(carry, _):
            params, state = carry
            updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
            return (optax.apply_updates(params, optax.tree.scale(-0.01, updates)), state), None

        return jax.lax.scan(body, (params, tx.init(params)), length=4)[0][0]

    many = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), PARAMS)
    together = jax.jit(jax.vmap(train))(many)
    for i in range(3):
        alone = jax.tree.map(lambda p: p[i], many)  # noqa: B023
        assert_close(jax.tree.map(lambda p: p[i], together), run(tx, alone)[0], 1e-5)  # noqa: B023


def test_comes_back_from_orbax(tx, tmp_path):
    _, state = run(tx)
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", like)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_one_device_and_eight_agree(tx):
    params = {"w": jnp.linspace(-1.0, 2.0, 16).reshape(8, 2)}
    expected, _ = run(tx, params)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    laid = jax.device_put(params, NamedSharding(mesh, PartitionSpec("data")))
    eight, _ = run(tx, laid)
    assert eight["w"].sharding.num_devices == 8
    assert_close(jax.device_get(eight), expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-30, 1e18, 1e30])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extreme_gradients_never_make_a_nan(tx, scale, dtype):
    params = {"x": jnp.array([1.0, -1.0, 0.0], dtype)}

    def extreme(params):
        return jax.tree.map(lambda p: (jnp.ones_like(p) * scale).astype(dtype), params)

    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(extreme(params), state, params, grad_fn=extreme)
        assert jnp.isfinite(updates["x"].astype(jnp.float32)).all()
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            assert not jnp.isnan(leaf).any(), path
