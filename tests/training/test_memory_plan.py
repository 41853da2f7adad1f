"""The memory plan against hand counts and the compiler's, and what is said when memory ran out."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gnp import config as gnp_config
from gnp import models, transforms
from gnp.training import memory_plan
from gnp.training.optimizer import Optimizer
from gnp.training.sharding import make_mesh
from gnp.training.state import TrainState
from gnp.training.step import init_state, make_train_step

VIT = ("vit_ti", {"width": 64, "depth": 4, "num_heads": 4})
SHALLOW = ("vit_ti", VIT[1] | {"depth": 2})
REMAT = ("vit_ti", VIT[1] | {"scan": True, "remat": "full"})
RESNET = ("resnet18", {"width": 16, "depths": (1, 1, 1)})
KB = 1000


def shape(*sizes, **fields):
    return jax.ShapeDtypeStruct(sizes, jnp.float32, **fields)


def state_of(params, **fields):
    empty = dict.fromkeys(("step", "data_step", "model_state", "opt_state", "metrics", "nonfinite"))
    return TrainState(params=params, **(empty | {"step": shape()} | fields))


def fullest(function, *inputs, params=None):
    """Bytes of gradients and activations."""
    plan = memory_plan.plan(jax.jit(function).trace(*inputs).jaxpr, state_of(params))
    return plan.gradients, plan.activations


def traced(name, sizes, *, batch_size=64, ratio=0.0, accumulate=1):
    """A train step and the state it takes."""
    model = models.create(name, 10, image_size=32, **sizes)
    gr = transforms.gradient_regularization(0.05 if ratio else 0.0, ratio)
    optimizer = Optimizer(optax.chain(gr, optax.adam(1e-3)), lambda count: 1e-3, l2=0.0)
    image = jnp.zeros((1, 32, 32, 3))
    state = jax.eval_shape(lambda: init_state(model, optimizer, image, seed=0))
    batch = {
        "input": shape(batch_size, 32, 32, 3),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    step = make_train_step(model, optimizer, seed=0, log_every=10, accumulate=accumulate)
    return jax.jit(step, donate_argnums=0).trace(state, batch), state


def planned(*arguments, **fields):
    step, state = traced(*arguments, **fields)
    return memory_plan.plan(step.jaxpr, state)


def test_results_are_kept_until_their_last_reader():
    x = shape(KB)

    def chain(x):  # two at a time; the input is the caller's, and so is the result
        return jnp.exp(jnp.exp(jnp.exp(jnp.exp(x))))

    def kept(x):  # the first until the end
        y = jnp.exp(x)
        return y + jnp.exp(jnp.exp(jnp.exp(y)))

    assert fullest(chain, x) == (0, 2 * 4 * KB)
    assert fullest(kept, x) == (0, 3 * 4 * KB)


def test_views_and_what_is_not_read():
    x = shape(KB)

    def viewed(x):  # the view takes no memory, and is read while what it shows is kept
        y = jnp.exp(x)
        return jnp.exp(y[None]) + y

    def unread(x):  # what z would take is not counted
        y = jnp.exp(x)
        z = jnp.exp(y) + y  # noqa: F841
        return y

    assert fullest(viewed, x) == (0, 2 * 4 * KB)
    assert fullest(unread, x) == (0, 0)
    # The order of the largest comes with them, read or not.
    assert fullest(lambda x: jax.lax.top_k(x, KB)[0], x) == (0, 4 * KB)


def test_inner_programs_add_to_what_is_held():
    x = shape(KB)

    def inner(x):  # one beside its input and its result
        return jnp.sin(jnp.sin(x))

    def scan(x):  # the states before and after the loop, and each one's sum
        return jax.lax.scan(lambda x, _: (inner(x), x.sum()), x, length=10)

    assert fullest(inner, x) == (0, 4 * KB)
    assert fullest(lambda x: jax.jit(inner)(x) * 2, x) == (0, 2 * 4 * KB)
    assert fullest(lambda x: jax.checkpoint(inner)(x) * 2, x) == (0, 2 * 4 * KB)
    held = fullest(lambda x: jax.lax.cond(True, inner, jnp.sin, jnp.sin(x)) * 2, x)
    assert held == (0, 3 * 4 * KB)
    assert fullest(lambda x: [y * 2 for y in scan(x)], x) == (0, 2 * 4 * KB + 4 * 10)


def test_what_is_shaped_like_a_parameter_is_a_gradient():
    params = {"w": shape(KB, 2)}

    def two(w, x):
        return jnp.exp(jnp.exp(w)).sum() + jnp.exp(jnp.exp(x)).sum()

    gradients, activations = fullest(two, params["w"], shape(KB), params=params)
    assert (gradients, activations) == (2 * 8 * KB, 0)  # the fuller moment of the two


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (VIT, {}),
        (SHALLOW, {"ratio": 0.5, "accumulate": 2}),
        (REMAT, {}),
        (RESNET, {}),
    ],
)
def test_estimate_is_within_a_factor_of_two_of_the_compilers(model, fields):
    step, state = traced(*model, **fields)
    plan = memory_plan.plan(step.jaxpr, state)
    compiled = step.lower().compile().memory_analysis()
    assert 1 / 2 < (plan.gradients + plan.activations) / compiled.temp_size_in_bytes < 2
    kept = plan.params + plan.optimizer
    assert compiled.output_size_in_bytes == pytest.approx(kept, rel=0.02)


def test_what_saves_memory_lowers_the_estimate():
    plain, half = planned(*VIT), planned(*VIT, batch_size=32)
    assert half.activations == pytest.approx(plain.activations / 2, rel=0.01)
    parts = planned(*VIT, accumulate=2)
    assert parts.activations == pytest.approx(plain.activations / 2, rel=0.02)
    for scan in (False, True):
        remat = planned(*VIT[:1], VIT[1] | {"scan": scan, "remat": "full"})
        assert remat.activations < plain.activations / 3
    half = planned(*VIT[:1], VIT[1] | {"dtype": jnp.bfloat16})
    assert 0.5 * plain.activations < half.activations < 0.8 * plain.activations


def test_a_second_gradient_has_the_first_and_the_perturbed_parameters_beside_it():
    plain, gr = planned(*VIT), planned(*VIT, ratio=0.5)
    assert gr.activations == pytest.approx(plain.activations, rel=0.01)
    # Those of the head alone are read for the last time before.
    assert 1.8 * plain.params < gr.gradients - plain.gradients < 2 * plain.params


def test_a_device_has_its_part():
    mesh = make_mesh(2, 4, batch_size=8)
    cut = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())
    params = {"a": shape(10, 8, sharding=cut), "b": shape(9, sharding=whole)}
    stats = {"batch_stats": {"mean": shape(5)}}
    state = state_of(params, model_state=stats, opt_state=(params, params), ema={"params": params})

    def program(params, x):
        return jnp.exp(jnp.exp(params["a"])).sum() + jnp.exp(x).sum()

    step = jax.jit(program).trace(params, shape(16, KB))
    plan = memory_plan.plan(step.jaxpr, state, num_devices=8, data=7, device=8_100_000_000)
    own = 4 * (10 * 2 + 9)
    assert plan[:5] == (own + 4 * 5, 2 * own, own, 0, 4 * 2 * KB)
    assert plan.data == 7 and plan.total == sum(plan[:6]) and plan.device == 8_100_000_000


def test_the_plan_is_one_line():
    mega = 10**6
    sizes = (21.5 * mega, 42.9 * mega, 0, 43 * mega, 1200 * mega, 0, 1307.4 * mega)
    plan = memory_plan.MemoryPlan(*map(int, sizes), device=8100 * mega)
    assert str(plan) == (
        "memory a device: parameters 21.5 MB, optimizer 42.9 MB, a step's gradients 43.0 MB, its "
        "activations about 1.2 GB; in all about 1.3 GB of 8.1 GB"
    )
    plan = plan._replace(ema=21 * mega, data=184 * mega, device=None)
    assert "their average 21.0 MB" in str(plan) and "data 184.0 MB" in str(plan)
    assert str(plan).endswith("in all about 1.3 GB")


def config_of(**fields):
    config = gnp_config.default()
    config.update_from_flattened_dict(fields)
    return config


def test_a_real_failure_is_told_with_the_plan_and_what_to_do():
    with pytest.raises(jax.errors.JaxRuntimeError) as failure:
        jax.jit(lambda: jnp.zeros(2**45, jnp.uint8))()
    plan = memory_plan.MemoryPlan(0, 0, 0, 0, 0, 0, 9 * 10**9, 8 * 10**9)
    error = memory_plan.out_of_memory(failure.value, config_of(), plan, num_devices=8)
    assert str(error) == (
        "out of memory (35.2 TB were asked for; the plan was about 9.0 GB of 8.0 GB a device): "
        "lower config.data.batch_size (128 now), or set config.accumulate=2 (the same result), or "
        "config.model.remat=full, or config.dtype=bfloat16, or config.mesh.fsdp=8, or "
        "config.data.resident=false"
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4770354232 bytes.\n"
            "BufferAssignment OOM Debugging.",
            "out of memory (4.8 GB were asked for): lower",
        ),
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 13.67GiB.",
            "out of memory (13.67GiB were asked for): lower",
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 21.95G of 15.48G hbm. Exceeded hbm capacity by 6.47G.",
            "out of memory (21.95G of 15.48G were asked for): lower",
        ),
        ("INTERNAL: CUDA error: out of memory", "out of memory: lower"),
    ],
)
def test_texts_of_gpus_and_tpus(text, told):
    error = memory_plan.out_of_memory(jax.errors.JaxRuntimeError(text), config_of())
    assert str(error).startswith(told) and "\n" not in str(error)


@pytest.mark.parametrize(
    "error", [ValueError("out of memory"), jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes")]
)
def test_another_error_is_none_of_ours(error):
    assert memory_plan.out_of_memory(error, config_of()) is None


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        (
            {
                **{"model.name": "resnet18", "model.batch_norm_groups": 6},
                **{"data.batch_size": 24, "accumulate": 2},
            },
            "lower config.data.batch_size (24 now), or set config.accumulate=4 (but for "
            "BatchNorm's statistics the same result), or config.dtype=bfloat16, or "
            "config.data.resident=false",
        ),
        (
            {"model.name": "lstm", "data.name": "ptb", "data.batch_size": 20, "mesh.data": 4},
            "lower config.data.batch_size (20 now), or set config.accumulate=5 (the same result), "
            "or config.dtype=bfloat16, or config.mesh.fsdp=4 with config.mesh.data=1",
        ),
        (
            {
                **{"data.batch_size": 8, "accumulate": 2, "mesh.fsdp": 4, "model.remat": "full"},
                **{"dtype": "bfloat16", "data.resident": "false"},
            },
            "lower config.data.batch_size (8 now)",
        ),
    ],
)
def test_advice_is_what_the_run_has_not_done(fields, advice):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")
    devices = 1 if fields.get("model.name") == "resnet18" else 4
    config = config_of(**fields)
    told = memory_plan.out_of_memory(error, config, num_devices=devices)
    assert str(told) == f"out of memory: {advice}"
