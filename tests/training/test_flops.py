"""Counts of operations against closed forms, and the clockwork of the measured rate."""

import functools

import jax
import jax.numpy as jnp
import pytest

from gnp import models
from gnp.training import flops


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def count(function, *inputs):
    return flops.multiply_adds(jax.make_jaxpr(function)(*inputs))


def conv(x, kernel, **fields):
    numbers = ("NHWC", "HWIO", "NHWC")
    fields = {"window_strides": (1, 1), "padding": "VALID"} | fields
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **fields)


def test_matrix_products():
    assert count(jnp.dot, shape(3, 5), shape(5, 7)) == 3 * 5 * 7
    assert count(jnp.matmul, shape(2, 3, 5), shape(2, 5, 7)) == 2 * 3 * 5 * 7
    assert count(functools.partial(jnp.einsum, "abc,bcd->ad"), shape(2, 3, 5), shape(3, 5, 7)) == (
        2 * 3 * 5 * 7
    )
    assert count(jnp.add, shape(9), shape(9)) == 0


@pytest.mark.parametrize(
    ("fields", "kernel", "expected"),
    [
        ({}, (3, 5, 4, 6), 2 * (8 * 6) * (3 * 5 * 4) * 6),
        ({"padding": "SAME"}, (3, 3, 4, 6), 2 * 100 * 9 * 4 * 6),
        ({"padding": ((1, 1), (1, 1)), "window_strides": (2, 2)}, (3, 3, 4, 6), 2 * 25 * 9 * 4 * 6),
        ({"padding": "SAME", "feature_group_count": 2}, (3, 3, 2, 6), 2 * 100 * 9 * 2 * 6),
        ({"padding": "SAME", "feature_group_count": 4}, (3, 3, 1, 4), 2 * 100 * 9 * 4),
        ({"padding": "SAME", "batch_group_count": 2}, (3, 3, 4, 6), 1 * 100 * 9 * 4 * 6),
        # Every input meets every element of the kernel once.
        ({"lhs_dilation": (2, 2), "padding": ((1, 2), (1, 2))}, (3, 3, 4, 6), 2 * 100 * 9 * 4 * 6),
    ],
)
def test_convolutions(fields, kernel, expected):
    assert count(functools.partial(conv, **fields), shape(2, 10, 10, 4), shape(*kernel)) == expected


def test_attention():
    """Scores and values: batch · heads · tokens² · features, each."""
    x = shape(2, 11, 3, 4)
    assert count(jax.nn.dot_product_attention, x, x, x) == 2 * (2 * 3 * 11**2 * 4)


def test_what_is_inside_other_operations():
    x, product = shape(4, 4), 4**3

    def dot(x):
        return x @ x

    def scan(x, length=5):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=length)[0]

    custom_jvp = jax.custom_jvp(dot)
    custom_jvp.defjvp(lambda primals, tangents: (dot(*primals), tangents[0]))
    custom_vjp = jax.custom_vjp(dot)
    custom_vjp.defvjp(lambda x: (x @ x, None), lambda _, g: (g,))
    assert count(scan, x) == 5 * product
    assert count(lambda x: jax.lax.fori_loop(0, 3, lambda i, x: scan(x), x), x) == 15 * product
    for same in (jax.jit(dot), jax.checkpoint(dot), custom_jvp, custom_vjp):
        assert count(lambda x, same=same: same(x) + 1, x) == product
    branches = (lambda x: x, dot, lambda x: scan(x, 7))
    assert count(lambda i, x: jax.lax.switch(i, branches, x), shape(dtype=int), x) == 7 * product
    loop = functools.partial(jax.lax.while_loop, lambda x: x[0, 0] < 9, scan)
    assert count(loop, x) == 5 * product


@pytest.mark.parametrize("stride", [1, 2])
def test_a_gradient_is_three_forward_passes(stride):
    """What `step_flops` takes for granted, with the gradient for the input."""

    def loss(x, kernels, head):
        for kernel in kernels:
            x = conv(x, kernel, window_strides=(stride, stride), padding=((1, 1), (1, 1)))
        return (x.reshape(x.shape[0], -1) @ head).sum()

    size = 16 // stride**2
    inputs = (
        shape(2, 16, 16, 3),
        [shape(3, 3, 3, 8), shape(3, 3, 8, 8)],
        shape(size * size * 8, 10),
    )
    gradient = count(jax.grad(loss, argnums=(0, 1, 2)), *inputs)
    assert gradient == flops.step_flops(count(loss, *inputs), 1)


@pytest.mark.parametrize("name", ["vit_ti", "resnet18", "lstm"])
def test_models_have_their_registered_flops(name):
    """Of a batch that no memory would hold, so nothing is computed."""
    tokens = name == "lstm"
    model = models.create(name, 10_000 if tokens else 10, image_size=None if tokens else 32)
    one = shape(1, 1, dtype=jnp.int32) if tokens else shape(1, 32, 32, 3)
    variables = jax.eval_shape(model.init, jax.random.key(0), one)
    variables.pop("carry", None)
    batch = 10**12
    inputs = jax.ShapeDtypeStruct((batch, *one.shape[1:]), one.dtype)
    gflops = models.list_models()[name].small[1]
    per_example = flops.forward_flops(model, variables, inputs) / batch
    assert per_example == pytest.approx(2e9 * gflops, rel=5e-3)


def test_the_rate_is_of_the_best_block(monkeypatch):
    """With a clock that says that a single product takes 10 ms, and the third block 16 ms.

    The next size is taken while it is expected to last 0.1 s at most: 32 is (80 ms), 128 is not.
    """
    times = {"warm": [9.0, 0.01, 9.0, 0.01], "blocks": [0.05, 0.04, 0.016, 0.04, 0.05]}
    readings = iter([r for t in times["warm"] + times["blocks"] for r in (0.0, t)])
    monkeypatch.setattr(flops.time, "perf_counter", lambda: next(readings))
    monkeypatch.setattr(flops, "_SIZES", {"cpu": (16, 32, 128)})
    # 0.2 s in 5 blocks of 10 ms each: 4 products a block.
    assert flops.matmul_rate("float32") == pytest.approx(2 * 32**3 * 4 / 0.016)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_measured_rate_is_plausible(monkeypatch, dtype):
    monkeypatch.setattr(flops, "_SIZES", {"cpu": (128, 256)})
    rate = flops.matmul_rate(dtype, jax.devices()[3], seconds=0.05)
    assert 1e7 < rate < 1e14
