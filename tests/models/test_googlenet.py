"""GoogLeNet against NumPy and the paper's table, and its initial values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnp.errors import UserError
from gnp.models.googlenet import GoogLeNet, Inception
from gnp.models.layers import max_pool
from tests.models import numpy_layers
from tests.models.numpy_layers import Net, apply, pool, random_variables, relu

NAMES = [f"inception{name}" for name in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")]


def numpy_googlenet(net, images, stem):
    cifar = stem == "cifar"

    def conv(x, path, stride=1):
        x = net.conv(x, f"{path}/conv", stride)
        return relu(net.norm(x, f"{path}/bn", epsilon=1e-5 if cifar else 1e-3))

    def inception(x, name):
        one = conv(x, f"{name}/branch1")
        three = conv(conv(x, f"{name}/branch2_0"), f"{name}/branch2_1")
        five = conv(conv(x, f"{name}/branch3_0"), f"{name}/branch3_1")
        if cifar:
            five = conv(five, f"{name}/branch3_2")
        pooled = conv(pool(x, 3, 1, padding=1), f"{name}/branch4")
        return np.concatenate([one, three, five, pooled], axis=-1)

    if cifar:
        x = conv(images, "conv1")
    else:
        x = pool(conv(images, "conv1", stride=2), 3, 2, ceil=True)
        x = pool(conv(conv(x, "conv2"), "conv3"), 3, 2, ceil=True)
    for name in NAMES:
        if cifar and name in ("inception4a", "inception5a"):
            x = pool(x, 3, 2, padding=1)
        elif name == "inception4a":
            x = pool(x, 3, 2, ceil=True)
        elif name == "inception5a":
            x = pool(x, 2, 2, ceil=True)
        x = inception(x, name)
    return net.dense(x.mean((1, 2)), "fc")


@pytest.mark.parametrize(
    ("stem", "image_size", "groups"), [("cifar", 7, 2), ("imagenet", 52, None)]
)
def test_forward_against_numpy(stem, image_size, groups):
    """With random parameters and running statistics, in float64; windows are cut off often."""
    with jax.enable_x64(True):
        model = GoogLeNet.for_images(
            image_size=image_size,
            num_classes=5,
            stem=stem,
            width=1,
            batch_norm_groups=groups or 1,
            dtype=jnp.float64,
        )
        images = np.random.default_rng(1).normal(size=(4, image_size, image_size, 3))
        variables = random_variables(model, images)
        logits = apply(model, variables, images, train=groups is not None)
    expected = numpy_googlenet(Net(variables, groups), images, stem)
    # The logits are rounded to float32.
    np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "stride", "padding", "ceil"),
    [(3, 1, 1, False), (3, 2, 1, False), (2, 2, 0, False), (3, 2, 0, True), (2, 2, 0, True)],
)
@pytest.mark.parametrize("shape", [(2, 8, 11, 3), (2, 7, 4, 3)])
def test_max_pool_and_its_gradient(size, stride, padding, ceil, shape):
    """Each window's gradient goes to its largest pixel; of values that all differ."""
    rng = np.random.default_rng(0)
    x = rng.permutation(np.prod(shape)).reshape(shape).astype(np.float32)
    y, pull = jax.vjp(lambda x: max_pool(x, size, stride, padding=padding, ceil=ceil), x)
    expected = pool(x, size, stride, padding, ceil)
    np.testing.assert_array_equal(y, expected)
    weights = rng.integers(1, 9, expected.shape).astype(np.float32)
    grad = np.zeros(np.prod(shape))
    # A pixel is found by its value, the place where it stood before the permutation.
    np.add.at(grad, expected.astype(int), weights)
    np.testing.assert_array_equal(pull(jnp.asarray(weights))[0], grad[x.astype(int)])


@pytest.mark.parametrize(("image_size", "sizes"), [(32, (32, 16, 8)), (224, (28, 14, 7))])
def test_features_and_sizes_of_the_published_network(image_size, sizes):
    """The inception modules of the paper's Table 1, at both stems."""
    model = GoogLeNet.for_images(image_size=image_size, num_classes=10)
    images = jnp.zeros((1, image_size, image_size, 3))
    shapes = numpy_layers.outputs(model, images, Inception)
    features = (256, 480, 512, 512, 512, 528, 832, 832, 1024)
    places = (0, 0, 1, 1, 1, 1, 1, 2, 2)
    assert list(shapes) == NAMES
    for name, n, place in zip(NAMES, features, places, strict=True):
        assert shapes[name] == (1, sizes[place], sizes[place], n)


@pytest.mark.parametrize("width", [4, 16])
def test_width_scales_all_features(width):
    """3a has 64, 96, 128, 16, 32 and 32 features at 64, after a stem of 192."""
    model = GoogLeNet.for_images(image_size=8, num_classes=10, width=width)
    images = jnp.zeros((1, 8, 8, 3))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), images))["params"]
    kernels = {name: p["conv"]["kernel"].shape for name, p in params["inception3a"].items()}
    n = width // 4  # 16 features at 64
    assert params["conv1"]["conv"]["kernel"].shape == (3, 3, 3, 12 * n)
    assert kernels == {
        "branch1": (1, 1, 12 * n, 4 * n),
        "branch2_0": (1, 1, 12 * n, 6 * n),
        "branch2_1": (3, 3, 6 * n, 8 * n),
        "branch3_0": (1, 1, 12 * n, n),
        "branch3_1": (3, 3, n, 2 * n),
        "branch3_2": (3, 3, 2 * n, 2 * n),
        "branch4": (1, 1, 12 * n, 2 * n),
    }


def tiny(image_size=8, **fields):
    return GoogLeNet.for_images(image_size=image_size, num_classes=10, **{"width": 4} | fields)


def test_initialisation():
    """Of a few modules and the head: all initial values would take long to compile."""
    model = tiny()
    images = jnp.zeros((1, 8, 8, 3))
    key = jax.random.key(0, impl="rbg")

    @jax.jit
    def some():
        params = model.init(key, images)["params"]
        return {name: params[name] for name in ("conv1", "inception5b", "fc")}

    params = some()
    for kernel in (
        params["conv1"]["conv"]["kernel"],
        params["inception5b"]["branch2_1"]["conv"]["kernel"],
        params["inception5b"]["branch4"]["conv"]["kernel"],
        params["fc"]["kernel"],
    ):
        # The deviation of n values has the error 1/√(2n); five of them.
        np.testing.assert_allclose(np.std(kernel), 0.01, rtol=5 / np.sqrt(2 * kernel.size))
        assert np.abs(kernel).max() > 0.023, "the tails are cut off"
    assert not params["conv1"]["conv"]["bias"].any()
    assert (params["conv1"]["bn"]["scale"] == 1).all() and not params["conv1"]["bn"]["bias"].any()
    bound = 64**-0.5  # 1024 features at a width of 64
    assert 0.5 * bound < np.abs(params["fc"]["bias"]).max() <= bound


def test_dropout_acts_before_the_head_of_the_imagenet_network():
    assert tiny(stem="cifar").dropout == 0
    assert tiny(16, stem="imagenet").dropout == 0.2
    assert tiny(16, stem="imagenet", dropout=0.0).dropout == 0
    # All of the features are dropped: what is left is the head's bias.
    model = tiny(dropout=1.0)
    images = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    variables = jax.tree.map(np.float32, random_variables(model, images))
    logits = apply(model, variables, images, train=True, dropout=jax.random.key(0))
    bias = variables["params"]["fc"]["bias"]
    np.testing.assert_array_equal(logits, np.stack([bias, bias]))


def test_bfloat16_is_near_numpy():
    model = tiny(dtype=jnp.bfloat16)
    images = np.random.default_rng(1).normal(size=(4, 8, 8, 3)).astype(np.float32)
    variables = jax.tree.map(np.float32, random_variables(model, images))
    logits = apply(model, variables, images)
    assert logits.dtype == np.float32
    expected = numpy_googlenet(Net(variables), images, "cifar")
    # bfloat16 has 8 bits: 2**-8 relative to the logits, over some twenty convolutions.
    assert 1e-4 < np.abs(logits - expected).max() / np.abs(expected).max() < 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stem": "imagnet"}, "unknown model.stem 'imagnet'; did you mean 'imagenet'?"),
        ({"stem": "imagenet", "image_size": 14}, "'imagenet' wants images of 15 pixels or more"),
        ({"width": 0}, "model.width is 0; use numbers from 1 up"),
    ],
)
def test_sizes_that_do_not_fit(fields, message):
    with pytest.raises(UserError) as error:
        tiny(**fields)
    assert message in str(error.value)


@pytest.mark.parametrize(("stem", "image_size"), [("cifar", 1), ("imagenet", 15)])
def test_the_smallest_images(stem, image_size):
    """One pixel reaches the last module."""
    images = jnp.zeros((1, image_size, image_size, 3))
    shapes = numpy_layers.outputs(tiny(image_size, stem=stem), images, Inception)
    assert shapes["inception5b"] == (1, 1, 1, 64)
