"""The vision transformer against published counts, and its parts against NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnp import models
from gnp.errors import UserError

# (10 classes at 32 pixels, 1000 classes at 224 pixels), as published and as timm counts them.
PARAMETERS = {
    "vit_ti": (5_362_762, 5_717_416),
    "vit_s": (21_342_346, 22_050_664),
    "vit_b": (85_152_010, 86_567_656),
}
TINY = {"width": 12, "depth": 2, "num_heads": 3}


def shapes(name, num_classes, image_size, **overrides):
    model = models.create(name, num_classes, image_size=image_size, **overrides)
    images = jnp.zeros((2, image_size, image_size, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images))


@pytest.mark.parametrize("name", models.list_models())
def test_number_of_parameters(name):
    def count(*args):
        return sum(x.size for x in jax.tree.leaves(shapes(name, *args)["params"]))

    assert (count(10, 32), count(1000, 224)) == PARAMETERS[name]


@pytest.mark.parametrize("name", models.list_models())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_and_gradients(name, dtype):
    """At a depth of one; every parameter gets a finite gradient, not all zero."""
    model = models.create(name, 10, image_size=32, depth=1, dtype=jnp.dtype(dtype))
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    # The head is zero at first, and a zero head has no gradient for what is below it.
    params["head"]["kernel"] = jax.random.normal(jax.random.key(2), params["head"]["kernel"].shape)

    @jax.jit
    def grad(params):
        logits, pull = jax.vjp(lambda p: model.apply({"params": p}, images), params)
        return logits, pull(jax.random.normal(jax.random.key(3), logits.shape))[0]

    logits, grads = grad(params)
    assert logits.shape == (2, 10) and logits.dtype == jnp.float32
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.isfinite(grad).all(), path
        assert jnp.abs(grad).max() > 0, path


def test_forward_against_numpy():
    """The whole model with random parameters, in float64, written out with loops over heads."""
    with jax.enable_x64(True):
        model = models.create("vit_ti", 5, image_size=8, **TINY, dtype=jnp.float64)
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
        x = np.concatenate([params["cls_token"][0], x]) + params["pos_embed"][0]
        for i in range(TINY["depth"]):
            p = params[f"blocks_{i}"]
            x = x + attention(norm(x, p["norm1"]), p["attn"])
            x = x + mlp(norm(x, p["norm2"]), p["mlp"])
        expected.append(dense(norm(x[0], params["norm"]), params["head"]))
    # The logits are rounded to float32.
    np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-6)


def test_published_initialisation():
    model = models.create("vit_s", 10, image_size=32, depth=1)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    block = params["blocks_0"]

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


def test_bfloat16_is_near_float32():
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    full = models.create("vit_ti", 10, image_size=32, **TINY)
    half = models.create("vit_ti", 10, image_size=32, **TINY, dtype=jnp.bfloat16)
    params = jax.jit(full.init)(jax.random.key(0), images)["params"]
    params["head"]["kernel"] = jax.random.normal(jax.random.key(2), (12, 10))
    a, b = (jax.jit(m.apply)({"params": params}, images) for m in (full, half))
    # bfloat16 has 8 bits: 2**-8 relative to logits of the order of 3, over two blocks.
    assert 0 < np.abs(a - b).max() < 0.15


def test_stochastic_depth_drops_whole_examples():
    """An example whose branches are all dropped passes through unchanged."""
    from gnp.models.vit import Block

    block = Block(num_heads=2, mlp_ratio=2.0, dropout=0.0, stochastic_depth=0.5, dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (64, 3, 4))
    variables = jax.jit(block.init, static_argnums=2)(jax.random.key(1), x, False)
    apply = jax.jit(block.apply, static_argnums=2)
    out = apply(variables, x, True, rngs={"dropout": jax.random.key(2)})
    unchanged = np.all(np.asarray(out == x), axis=(1, 2))
    partly = np.any(np.asarray(out == x), axis=(1, 2))
    assert (unchanged == partly).all(), "an example was dropped in part"
    assert 4 <= unchanged.sum() <= 30  # 64 times 1/4, five deviations
    assert not np.any(apply(variables, x, False) == x, axis=(1, 2)).any(), "dropped in evaluation"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vit_tiny"}, "unknown model 'vit_tiny'; did you mean 'vit_ti'?"),
        ({"widht": 3}, "model 'vit_ti' has an unknown field 'widht'; did you mean 'width'?"),
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
