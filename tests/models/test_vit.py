"""The vision transformer against published counts, and its parts against NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnp import models
from gnp.errors import UserError

TINY = {"width": 12, "depth": 2, "num_heads": 3}


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_forward_against_numpy(pool):
    """The whole model with random parameters, in float64, written out with loops over heads."""
    with jax.enable_x64(True):
        model = models.create("vit_ti", 5, image_size=8, **TINY, pool=pool, dtype=jnp.float64)
        images = np.random.default_rng(0).normal(size=(2, 8, 8, 3))
        shape = jax.eval_shape(lambda: model.init(jax.random.key(0), images))["params"]
        rng = np.random.default_rng(1)
        params = jax.tree.map(lambda x: rng.normal(size=x.shape) * 0.5, shape)
        logits = np.asarray(model.apply({"params": params}, images))

    erf = np.vectorize(math.erf)

    def dense(x, p):
        return x @ p["kernel"] + p["bias"]

    def norm(x, p):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-6) * p["scale"] + p["bias"]

    def attention(x, p):
        out = []
        width = x.shape[-1]
        query, key, value = np.split(dense(x, p["qkv"]), 3, axis=-1)
        for h in range(TINY["num_heads"]):
            part = slice(h * width // 3, (h + 1) * width // 3)
            scores = query[:, part] @ key[:, part].T / np.sqrt(width // 3)
            weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
            out.append(weights @ value[:, part])
        return dense(np.concatenate(out, axis=-1), p["proj"])

    def mlp(x, p):
        x = dense(x, p["fc1"])
        return dense(x * (1 + erf(x / np.sqrt(2))) / 2, p["fc2"])

    expected = []
    for image in images:
        patches = [
            image[i : i + 2, j : j + 2].ravel() for i in range(0, 8, 2) for j in range(0, 8, 2)
        ]
        x = dense(np.array(patches), params["patch_embed"])
        if pool == "token":
            x = np.concatenate([params["cls_token"][0], x])
        x = x + params["pos_embed"][0]
        for i in range(TINY["depth"]):
            p = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
            x = x + attention(norm(x, p["norm1"]), p["attn"])
            x = x + mlp(norm(x, p["norm2"]), p["mlp"])
        x = norm(x, params["norm"])
        expected.append(dense(x[0] if pool == "token" else x.mean(0), params["head"]))
    # The logits are rounded to float32.
    np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_scan_and_remat_change_nothing():
    """With dropout and stochastic depth: the same loss and gradients, from the same variables."""
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    rates = {"dropout": 0.1, "stochastic_depth": 0.3}

    def loss_and_grads(**choice):
        model = models.create("vit_ti", 10, image_size=32, **TINY, **rates, **choice)
        variables = jax.jit(model.init)(jax.random.key(0), images)
        variables["params"]["head"]["kernel"] = jax.random.normal(jax.random.key(2), (12, 10))

        def loss(variables):
            rngs = {"dropout": jax.random.key(4)}
            return jnp.mean(model.apply(variables, images, train=True, rngs=rngs) ** 2)

        return jax.jit(jax.value_and_grad(loss))(variables)

    value, grads = loss_and_grads()
    largest = max(np.abs(x).max() for x in jax.tree.leaves(grads))
    for choice in ({"scan": True}, {"remat": "full"}, {"scan": True, "remat": "dots"}):
        again, others = loss_and_grads(**choice)
        # Only the order of sums differs: a few ulp, times the depth.
        np.testing.assert_allclose(again, value, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(others), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6 * largest)


def test_published_initialisation():
    model = models.create("vit_s", 10, image_size=32, depth=2)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    block, other = (jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in (0, 1))
    assert not np.array_equal(block["mlp"]["fc1"]["kernel"], other["mlp"]["fc1"]["kernel"])

    def uniform_bound(fan_in, fan_out):
        return np.sqrt(6 / (fan_in + fan_out))

    for kernel, bound in (
        *((k, uniform_bound(384, 384)) for k in np.split(block["attn"]["qkv"]["kernel"], 3, 1)),
        (block["attn"]["proj"]["kernel"], uniform_bound(384, 384)),
        (block["mlp"]["fc1"]["kernel"], uniform_bound(384, 1536)),
        (block["mlp"]["fc2"]["kernel"], uniform_bound(1536, 384)),
    ):
        # Uniform: the largest of 147,456 or more values is within 1e-3 of the bound.
        assert bound * (1 - 1e-3) < np.abs(kernel).max() <= bound
        np.testing.assert_allclose(np.std(kernel), bound / np.sqrt(3), rtol=0.01)
    np.testing.assert_allclose(np.std(params["patch_embed"]["kernel"]), 48**-0.5, rtol=0.02)
    np.testing.assert_allclose(np.std(params["pos_embed"]), 0.02, rtol=0.02)
    assert not params["cls_token"].any() and not params["head"]["kernel"].any()


def test_stochastic_depth_drops_whole_examples():
    """An example whose branches are all dropped passes through unchanged."""
    from gnp.models.vit import Block

    block = Block(num_heads=2, mlp_ratio=2.0, dropout=0.0, dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (64, 3, 4))
    rate = jnp.float32(0.5)
    variables = jax.jit(block.init, static_argnums=3)(jax.random.key(1), x, rate, False)
    apply = jax.jit(block.apply, static_argnums=3)
    out = apply(variables, x, rate, True, rngs={"dropout": jax.random.key(2)})
    unchanged = np.all(np.asarray(out == x), axis=(1, 2))
    partly = np.any(np.asarray(out == x), axis=(1, 2))
    assert (unchanged == partly).all(), "an example was dropped in part"
    assert 4 <= unchanged.sum() <= 30  # 64 times 1/4, five deviations
    assert not np.any(apply(variables, x, rate, False) == x, axis=(1, 2)).any(), "in evaluation"


def test_stochastic_depth_grows_linearly_and_keeps_the_mean():
    from gnp.models.layers import StochasticDepth, linear_rates

    np.testing.assert_allclose(linear_rates(0.3, 4), [0, 0.1, 0.2, 0.3], rtol=1e-6)
    assert linear_rates(0.0, 4) is None
    ones = jnp.ones((10_000, 1))
    rngs = {"dropout": jax.random.key(0)}
    out = np.asarray(StochasticDepth().apply({}, ones, jnp.float32(0.2), True, rngs=rngs))
    assert set(np.unique(out)) == {0, np.float32(1 / np.float32(0.8))}
    assert abs((out == 0).mean() - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 10_000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pool": "max"}, "unknown model.pool 'max'; valid are: token, mean"),
        ({"num_heads": 5}, "model.num_heads 5 does not divide model.width 192"),
        ({"mlp_ratio": 0.001}, "model.mlp_ratio 0.001 leaves no features of model.width 192"),
        ({"patch_size": 5}, "model.patch_size 5 does not divide the images' 32 pixels"),
        ({"image_size": 40}, "no usual patch size for images of 40 pixels"),
    ],
)
def test_sizes_that_do_not_fit(arguments, message):
    with pytest.raises(UserError) as error:
        models.create(**{"name": "vit_ti", "num_classes": 10, "image_size": 32} | arguments)
    assert message in str(error.value)
