"""The class-attention transformer's parts and the whole of it against NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnp.errors import UserError
from gnp.models import cait
from gnp.models.cait import CaiT

TINY = {"width": 6, "depth": 3, "num_heads": 2}

# The optimisation of machine code would take most of the tests' time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def create(**fields):
    return CaiT.for_images(**{"image_size": 8, "num_classes": 5} | TINY | fields)


def random_params(module, *args, seed=1, scale=0.5):
    """Normal parameters in float64, in the shapes that the module asks for."""
    shape = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape) * scale, shape)


erf = np.vectorize(math.erf)


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def norm(x, p):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * p["scale"] + p["bias"]


def mlp(x, p):
    x = dense(x, p["fc1"])
    return dense(x * (1 + erf(x / np.sqrt(2))) / 2, p["fc2"])


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def talking_heads(x, p, heads):
    """Of one image's tokens [tokens, width], in loops over pairs of heads."""
    query, key, value = (np.split(y, heads, 1) for y in np.split(dense(x, p["qkv"]), 3, axis=1))
    scores = [q @ k.T / np.sqrt(q.shape[1]) for q, k in zip(query, key, strict=True)]

    def mix(maps, p):
        return [
            sum(p["kernel"][i, j] * maps[i] for i in range(heads)) + p["bias"][j]
            for j in range(heads)
        ]

    weights = mix([softmax(y) for y in mix(scores, p["proj_l"])], p["proj_w"])
    out = [w @ v for w, v in zip(weights, value, strict=True)]
    return dense(np.concatenate(out, axis=1), p["proj"])


def class_attention(x, p, heads):
    """From the first of one image's tokens [tokens, width] to all: [1, width]."""
    query, key, value = (np.split(dense(x, p[name]), heads, 1) for name in "qkv")
    out = [
        softmax(q[:1] @ k.T / np.sqrt(q.shape[1])) @ v
        for q, k, v in zip(query, key, value, strict=True)
    ]
    return dense(np.concatenate(out, axis=1), p["proj"])


def test_talking_heads_attention():
    with jax.enable_x64(True):
        module = cait.TalkingHeadsAttention(3, jnp.float64)
        x = np.random.default_rng(0).normal(size=(2, 7, 12))
        params = random_params(module, x)
        out = np.asarray(jit(module.apply)({"params": params}, x))
    assert out.dtype == np.float64
    expected = [talking_heads(tokens, params, 3) for tokens in x]
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-10)


def test_class_attention():
    with jax.enable_x64(True):
        module = cait.ClassAttention(3, jnp.float64)
        x = np.random.default_rng(0).normal(size=(2, 7, 12))
        params = random_params(module, x)
        out = np.asarray(jit(module.apply)({"params": params}, x))
    assert out.shape == (2, 1, 12)
    expected = [class_attention(tokens, params, 3) for tokens in x]
    # JAX's attention takes its softmax in float32: relative errors of some 1e-7.
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


def test_forward_against_numpy():
    with jax.enable_x64(True):
        model = create(dtype=jnp.float64)
        images = np.random.default_rng(0).normal(size=(2, 8, 8, 3))
        params = random_params(model, images)
        logits = np.asarray(jit(model.apply)({"params": params}, images))

    def unstack(p, i):
        return jax.tree.map(lambda leaf: leaf[i], p)

    expected = []
    for image in images:
        patches = [
            image[i : i + 2, j : j + 2].ravel() for i in range(0, 8, 2) for j in range(0, 8, 2)
        ]
        x = dense(np.array(patches), params["patch_embed"]) + params["pos_embed"][0]
        for i in range(3):
            p = unstack(params["blocks"], i)
            x = x + p["gamma_1"] * talking_heads(norm(x, p["norm1"]), p["attn"], 2)
            x = x + p["gamma_2"] * mlp(norm(x, p["norm2"]), p["mlp"])
        token = params["cls_token"][0]
        for i in range(2):
            p = unstack(params["blocks_token_only"], i)
            both = norm(np.concatenate([token, x]), p["norm1"])
            token = token + p["gamma_1"] * class_attention(both, p["attn"], 2)
            token = token + p["gamma_2"] * mlp(norm(token, p["norm2"]), p["mlp"])
        expected.append(dense(norm(token[0], params["norm"]), params["head"]))
    # Class attention's softmax and the logits are rounded to float32.
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_scan_and_remat_change_nothing():
    """Loss and gradients in training, from the same weights and key."""
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    params = jax.tree.map(np.float32, random_params(create(depth=2), images, scale=0.3))

    def loss_and_gradients(**fields):
        model = create(depth=2, dropout=0.1, stochastic_depth=0.3, **fields)

        def loss(params):
            rngs = {"dropout": jax.random.key(2)}
            logits = model.apply({"params": params}, images, True, rngs=rngs)
            return jnp.square(logits - 1).mean()

        return jit(jax.value_and_grad(loss))(params)

    value, gradients = loss_and_gradients()
    # The softmax undoes a constant added to all scores, so that proj_l's bias and the class
    # attention's key bias have no gradient but rounding: the scale is that of all gradients.
    scale = max(np.abs(x).max() for x in jax.tree.leaves(gradients))

    def assert_near(a, b):
        # The same operations in another order, each exact to 2**-24, through 4 blocks and back.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * scale)

    for fields in ({"remat": "full"}, {"scan": True, "remat": "dots"}):
        jax.tree.map(assert_near, loss_and_gradients(**fields), (value, gradients))


def test_stochastic_depth_is_the_same_in_all_blocks():
    """At a rate of 1 no block does anything; the class token's layers are not dropped."""
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    params = jax.tree.map(np.float32, random_params(create(), images))
    rngs = {"dropout": jax.random.key(2)}
    model = create(stochastic_depth=1.0)
    dropped = jit(lambda: model.apply({"params": params}, images, True, rngs=rngs))()
    for name in ("gamma_1", "gamma_2"):
        params["blocks"][name] *= 0
    expected = jit(create().apply)({"params": params}, images)
    np.testing.assert_allclose(dropped, expected, rtol=1e-5, atol=1e-5)


def test_class_layers_have_no_dropout():
    """What comes before them is made zero, which no dropout changes."""
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    model = create(dropout=0.5, stochastic_depth=0.5)
    params = jax.tree.map(np.float32, random_params(model, images))
    for name in ("patch_embed", "pos_embed", "blocks"):
        params[name] = jax.tree.map(np.zeros_like, params[name])
    evaluated = jit(model.apply)({"params": params}, images)
    rngs = {"dropout": jax.random.key(2)}
    trained = jit(lambda: model.apply({"params": params}, images, True, rngs=rngs))()
    assert np.abs(evaluated).max() > 0.1
    np.testing.assert_allclose(trained, evaluated, rtol=1e-5, atol=1e-5)


def test_published_initialisation():
    assert create().layer_scale == 1e-5
    model = create(image_size=32, width=96, depth=2, num_heads=8, num_classes=100, layer_scale=0.25)
    images = jnp.zeros((1, 32, 32, 3))
    params = jit(model.init)(jax.random.key(0), images)["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.startswith("patch_embed"):
            bound = 48**-0.5
            # Of 96 values or more the largest is, but for a chance of 1e-5, above 0.88 of it.
            assert 0.88 * bound < np.abs(leaf).max() <= bound, name
            assert abs(np.mean(leaf)) < 0.3 * bound, name
        elif name.endswith(("kernel", "cls_token", "pos_embed")):
            # The deviation of n values is known to 1/√(2n).
            np.testing.assert_allclose(np.std(leaf), 0.02, rtol=4 / np.sqrt(2 * leaf.size))
        elif "gamma" in name:
            assert (leaf == 0.25).all(), name
        else:
            assert (leaf == (1 if name.endswith("scale") else 0)).all(), name


def test_bfloat16_is_near_float32():
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    params = jax.tree.map(np.float32, random_params(create(), images, scale=0.3))
    full, half = (
        jit(create(dtype=dtype).apply)({"params": params}, images)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert half.dtype == jnp.float32
    # bfloat16 has 8 bits: 2**-8 relative to the logits, over five blocks.
    assert 0 < np.abs(full - half).max() < 5 * 2**-8 * np.abs(full).max()


@pytest.mark.parametrize(
    ("image_size", "patch_size"), [(8, 2), (16, 2), (32, 4), (64, 8), (224, 16)]
)
def test_usual_patch(image_size, patch_size):
    assert create(image_size=image_size).patch_size == patch_size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 5}, "model.num_heads 5 does not divide model.width 192"),
        ({"mlp_ratio": 0.001}, "model.mlp_ratio 0.001 leaves no features of model.width 192"),
        ({"remat": "ful"}, "unknown model.remat 'ful'; did you mean 'full'?"),
        ({"patch_size": 5}, "model.patch_size 5 does not divide the images' 32 pixels"),
        ({"image_size": 40}, "no usual patch size for images of 40 pixels"),
        ({"class_depth": 0}, "model.class_depth 0 lets the class token read nothing"),
    ],
)
def test_sizes_that_do_not_fit(fields, message):
    sizes = {"image_size": 32, "width": 192, "depth": 12, "num_heads": 4}
    with pytest.raises(UserError) as error:
        create(**sizes | fields)
    assert message in str(error.value)
