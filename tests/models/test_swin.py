"""The Swin transformer's parts and the whole of it against NumPy.

The oracle knows neither windows nor shifts: it attends over the full image, and two pixels see
each other if a grid that is displaced by the shift has them in one cell.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnp.errors import UserError
from gnp.models import layers, swin
from gnp.models.swin import SwinTransformer

TINY = {"width": 6, "depths": (4, 2, 2), "num_heads": 2}

# The optimisation of machine code would take most of the tests' time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def create(**fields):
    return SwinTransformer.for_images(**{"image_size": 8, "num_classes": 5} | TINY | fields)


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
    return (x - mean) / np.sqrt(variance + 1e-5) * p["scale"] + p["bias"]


def mlp(x, p):
    x = dense(x, p["fc1"])
    return dense(x * (1 + erf(x / np.sqrt(2))) / 2, p["fc2"])


def attention(x, p, heads, window, shift):
    """Over all pixels of one image [side, side, width]."""
    side, _, width = x.shape
    table = p["relative_position_bias_table"]
    pixels = [(y, x) for y in range(side) for x in range(side)]
    bias = np.full((heads, side**2, side**2), -np.inf)
    for i, (y, x_) in enumerate(pixels):
        for j, (v, u) in enumerate(pixels):
            same_row = (y - shift) // window == (v - shift) // window
            same_column = (x_ - shift) // window == (u - shift) // window
            if same_row and same_column:
                bias[:, i, j] = table[(y - v + window - 1) * (2 * window - 1) + x_ - u + window - 1]
    query, key, value = np.split(dense(x.reshape(-1, width), p["qkv"]), 3, axis=-1)
    out = []
    for h, bias_of_head in enumerate(bias):
        part = slice(h * width // heads, (h + 1) * width // heads)
        scores = query[:, part] @ key[:, part].T / np.sqrt(width // heads) + bias_of_head
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        out.append(weights @ value[:, part])
    return dense(np.concatenate(out, axis=-1), p["proj"]).reshape(x.shape)


def block(x, p, heads, window, shift):
    x = x + attention(norm(x, p["norm1"]), p["attn"], heads, window, shift)
    return x + mlp(norm(x, p["norm2"]), p["mlp"])


def merge(x, p):
    rows = []
    for y in range(0, x.shape[0], 2):
        cells = [
            (x[y, u], x[y + 1, u], x[y, u + 1], x[y + 1, u + 1]) for u in range(0, x.shape[1], 2)
        ]
        rows.append([np.concatenate(cell) for cell in cells])
    return norm(np.array(rows), p["norm"]) @ p["reduction"]["kernel"]


@pytest.mark.parametrize("window", [1, 2, 5])
def test_relative_position_index(window):
    index = swin.relative_position_index(window)
    assert index.shape == (window**2, window**2)
    for query in range(window**2):
        for key in range(window**2):
            dy, dx = query // window - key // window, query % window - key % window
            row = (dy + window - 1) * (2 * window - 1) + (dx + window - 1)
            assert index[query, key] == row
    assert set(index.ravel()) == set(range((2 * window - 1) ** 2))


@pytest.mark.parametrize(
    ("side", "window", "shift"), [(6, 3, 0), (6, 3, 1), (8, 4, 2), (9, 3, 1), (3, 3, 0)]
)
def test_attention_against_the_full_image(side, window, shift):
    with jax.enable_x64(True):
        module = swin.WindowAttention(3, window, shift, jnp.float64)
        x = np.random.default_rng(0).normal(size=(2, side, side, 6))
        params = random_params(module, x)
        out = np.asarray(jit(module.apply)({"params": params}, x))
    assert out.dtype == np.float64
    expected = [attention(image, params, 3, window, shift) for image in x]
    # JAX's attention takes its softmax in float32: relative errors of some 1e-7.
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("window_size", [4, 7])
def test_one_window_holds_a_small_map(window_size):
    """Then the second block of a pair neither shifts nor masks."""
    with jax.enable_x64(True):
        module = swin.Pair(2, window_size, 2.0, 0.0, jnp.float64)
        x = np.random.default_rng(0).normal(size=(1, 4, 4, 6))
        params = random_params(module, x, None, False)
        out = np.asarray(jit(lambda p: module.apply({"params": p}, x, None, False))(params))
    expected = block(x[0], params["regular"], 2, 4, 0)
    expected = block(expected, params["shifted"], 2, 4, 0)
    np.testing.assert_allclose(out[0], expected, rtol=0, atol=1e-5)


def test_patch_merging():
    with jax.enable_x64(True):
        module = swin.PatchMerging(jnp.float64)
        x = np.random.default_rng(0).normal(size=(2, 6, 6, 3))
        params = random_params(module, x)
        out = np.asarray(module.apply({"params": params}, x))
    assert out.shape == (2, 3, 3, 6)
    np.testing.assert_allclose(out, [merge(image, params) for image in x], rtol=0, atol=1e-10)


def test_forward_against_numpy():
    """The whole model: maps of 8, 4 and 2 pixels on a side, with windows of 4."""
    with jax.enable_x64(True):
        model = create(dtype=jnp.float64)
        images = np.random.default_rng(0).normal(size=(2, 8, 8, 3))
        params = random_params(model, images, scale=0.3)
        logits = np.asarray(jit(model.apply)({"params": params}, images))

    expected = []
    for x in images:
        x = norm(dense(x, params["patch_embed"]), params["patch_norm"])  # a patch is a pixel
        for stage, depth in enumerate(TINY["depths"]):
            p, side = params[f"layers_{stage}"], 8 // 2**stage
            if stage:
                x = merge(x, p["downsample"])
            heads, window, shift = 2 * 2**stage, min(4, side), 2 if side > 4 else 0
            for i in range(depth // 2):
                pair = jax.tree.map(lambda leaf, i=i: leaf[i], p["blocks"])
                x = block(x, pair["regular"], heads, window, 0)
                x = block(x, pair["shifted"], heads, window, shift)
        expected.append(dense(norm(x, params["norm"]).mean((0, 1)), params["head"]))
    # Softmaxes and logits are rounded to float32.
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_scan_and_remat_change_nothing():
    """Loss and gradients in training, from the same weights and key."""
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    sizes = {"depths": (4,), "dropout": 0.1, "stochastic_depth": 0.3}
    params = jax.tree.map(np.float32, random_params(create(**sizes), images, scale=0.3))

    def loss_and_gradients(**fields):
        model = create(**sizes, **fields)

        def loss(params):
            rngs = {"dropout": jax.random.key(2)}
            logits = model.apply({"params": params}, images, True, rngs=rngs)
            return jnp.square(logits - 1).mean()

        return jit(jax.value_and_grad(loss))(params)

    def assert_near(a, b):
        # The same operations in another order, each exact to 2**-24, through 4 blocks and back.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())

    expected = loss_and_gradients()
    for fields in ({"remat": "full"}, {"scan": True, "remat": "dots"}):
        jax.tree.map(assert_near, loss_and_gradients(**fields), expected)


def test_stochastic_depth_of_a_pair():
    """A rate of 1 drops a block's branches: the first rate is the regular block's."""
    pair = swin.Pair(2, 4, 2.0, 0.0, jnp.float32)
    regular = swin.Block(2, 4, 0, 2.0, 0.0, jnp.float32)
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 4))
    params = random_params(pair, x, None, False)

    @jit
    def train(rates):
        return pair.apply({"params": params}, x, rates, True, rngs={"dropout": jax.random.key(1)})

    expected = jit(lambda: regular.apply({"params": params["regular"]}, x, None, False))()
    np.testing.assert_allclose(train(jnp.array([0.0, 1.0])), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(train(jnp.array([1.0, 1.0])), x)


def test_stochastic_depth_grows_over_all_stages(monkeypatch):
    seen = []

    def record(block, x, depth, rates, train, *, scan, remat):
        seen.append(rates)
        return x

    @jit
    def rates():
        seen.clear()
        create(stochastic_depth=0.7).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
        return list(seen)

    monkeypatch.setattr(layers, "repeat", record)
    assert [x.shape for x in rates()] == [(2, 2), (1, 2), (1, 2)]
    every = np.concatenate([x.ravel() for x in rates()])
    np.testing.assert_allclose(every, np.arange(8) / 7 * 0.7, rtol=1e-6, atol=0)


def test_published_initialisation():
    model = create(image_size=32, width=96, depths=(2, 2), num_heads=3, num_classes=100)
    images = jnp.zeros((1, 32, 32, 3))
    params = jit(model.init)(jax.random.key(0), images)["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.startswith("patch_embed"):
            bound = 12**-0.5
            # Of 96 values or more the largest is, but for a chance of 1e-5, above 0.88 of it.
            assert 0.88 * bound < np.abs(leaf).max() <= bound, name
            assert abs(np.mean(leaf)) < 0.3 * bound, name
        elif name.endswith(("kernel", "table")):
            # The deviation of n values is known to 1/√(2n).
            np.testing.assert_allclose(np.std(leaf), 0.02, rtol=4 / np.sqrt(2 * leaf.size))
        else:
            assert (leaf == (1 if name.endswith("scale") else 0)).all(), name


def test_bfloat16_is_near_float32():
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    params = jax.tree.map(np.float32, random_params(create(depths=(2, 2)), images, scale=0.3))
    full, half = (
        jit(create(depths=(2, 2), dtype=dtype).apply)({"params": params}, images)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert half.dtype == jnp.float32
    # bfloat16 has 8 bits: 2**-8 relative to the logits, over four blocks.
    difference = np.abs(full - half).max()
    assert 0 < difference < 4 * 2**-8 * np.abs(full).max()


@pytest.mark.parametrize(
    ("image_size", "patch_size", "window_size"),
    [(8, 1, 4), (16, 2, 4), (32, 2, 4), (64, 4, 4), (224, 4, 7)],
)
def test_usual_patch_and_window(image_size, patch_size, window_size):
    model = create(image_size=image_size, depths=(2, 2, 6, 2))
    assert (model.patch_size, model.window_size) == (patch_size, window_size)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 5}, "model.num_heads 5 does not divide model.width 96"),
        ({"mlp_ratio": 0.001}, "model.mlp_ratio 0.001 leaves no features of model.width 96"),
        ({"remat": "ful"}, "unknown model.remat 'ful'; did you mean 'full'?"),
        ({"patch_size": 5}, "model.patch_size 5 does not divide the images' 32 pixels"),
        ({"image_size": 40}, "no usual patch size for images of 40 pixels"),
        ({"depths": (2, 3, 6, 2)}, "model.depths (2, 3, 6, 2): each stage must have an even"),
        ({"depths": ()}, "model.depths (): each stage must have an even"),
        ({"depths": (2, 0)}, "model.depths (2, 0): each stage must have an even"),
        ({"patch_size": 8}, "leaves 4 patches on a side of the images' 32 pixels"),
        ({"patch_size": 8}, "before each later stage of model.depths; a multiple of 8 can"),
        ({"window_size": 0}, "model.window_size 0 does not divide"),
        (
            {"window_size": 3},
            "model.window_size 3 does not divide the stages' feature maps of 16, 8, 4, 2 on a "
            "side; valid are: 1, 2, 4, 8, 16",
        ),
        ({"window_size": 5}, "valid are: 1, 2, 4, 8, 16"),
        (
            {"image_size": 224, "window_size": 4},
            "feature maps of 56, 28, 14, 7 on a side; valid are: 1, 7, 14, 28, 56",
        ),
    ],
)
def test_sizes_that_do_not_fit(fields, message):
    sizes = {"image_size": 32, "width": 96, "depths": (2, 2, 6, 2), "num_heads": 3}
    with pytest.raises(UserError) as error:
        create(**sizes | fields)
    assert message in str(error.value)
