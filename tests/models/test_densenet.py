"""The densely connected network against NumPy and the paper's table, and its initial values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnp.errors import UserError
from gnp.models.densenet import DenseLayer, DenseNet, Transition
from tests.models import numpy_layers
from tests.models.numpy_layers import Net, apply, pool, random_variables, relu


def numpy_densenet(net, images, depths, stem):
    x = net.conv(images, "conv0", stride=2 if stem == "imagenet" else 1)
    if stem == "imagenet":
        x = pool(relu(net.norm(x, "norm0")), 3, 2, padding=1)
    for block, depth in enumerate(depths, start=1):
        for i in range(1, depth + 1):
            layer = f"denseblock{block}_denselayer{i}"
            y = net.conv(relu(net.norm(x, f"{layer}/norm1")), f"{layer}/conv1")
            y = net.conv(relu(net.norm(y, f"{layer}/norm2")), f"{layer}/conv2")
            x = np.concatenate([x, y], axis=-1)
        if block < len(depths):
            x = relu(net.norm(x, f"transition{block}/norm"))
            x = pool(net.conv(x, f"transition{block}/conv"), 2, 2, of=np.mean)
    return net.dense(relu(net.norm(x, "norm5")).mean((1, 2)), "classifier")


@pytest.mark.parametrize(
    ("stem", "image_size", "groups"),
    [("cifar", 7, 2), ("cifar", 8, None), ("imagenet", 26, None)],
)
def test_forward_against_numpy(stem, image_size, groups):
    """With random parameters and running statistics, in float64; at odd and even sizes."""
    depths = (2, 1, 2)
    with jax.enable_x64(True):
        model = DenseNet.for_images(
            image_size=image_size,
            num_classes=5,
            depths=depths,
            stem=stem,
            growth_rate=3,
            bottleneck_size=2,
            batch_norm_groups=groups or 1,
            dtype=jnp.float64,
        )
        images = np.random.default_rng(1).normal(size=(4, image_size, image_size, 3))
        variables = random_variables(model, images)
        logits = apply(model, variables, images, train=groups is not None)
    expected = numpy_densenet(Net(variables, groups), images, depths, stem)
    # The logits are rounded to float32.
    np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("image_size", "sizes"), [(32, (32, 16, 8, 4)), (224, (56, 28, 14, 7))])
def test_features_and_sizes_of_the_published_network(image_size, sizes):
    """DenseNet-121 of the paper's Table 1: block after block, and between them."""
    model = DenseNet.for_images(image_size=image_size, num_classes=10, depths=(6, 12, 24, 16))
    images = jnp.zeros((1, image_size, image_size, 3))
    shapes = numpy_layers.outputs(model, images, (DenseLayer, Transition))
    for block, (depth, before, after) in enumerate(
        [(6, 64, 256), (12, 128, 512), (24, 256, 1024), (16, 512, 1024)], start=1
    ):
        size = sizes[block - 1]
        for i in range(1, depth + 1):
            shape = shapes.pop(f"denseblock{block}_denselayer{i}")
            assert shape == (1, size, size, before + 32 * i)
        assert shape[-1] == after
        if block < 4:
            size = sizes[block]
            assert shapes.pop(f"transition{block}") == (1, size, size, after // 2)
    assert not shapes


@pytest.mark.parametrize(("growth", "size", "compression"), [(3, 2, 0.4), (5, 1, 1.0), (1, 3, 0.1)])
def test_number_of_parameters_in_closed_form(growth, size, compression):
    depths = (3, 2, 1)
    model = DenseNet.for_images(
        image_size=8,
        num_classes=7,
        depths=depths,
        growth_rate=growth,
        bottleneck_size=size,
        compression=compression,
    )
    images = jnp.zeros((1, 8, 8, 3))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), images))["params"]
    inner = size * growth
    features = 2 * growth
    expected = 27 * features
    for block, depth in enumerate(depths):
        # Sum over layers i of a norm and a 1×1 convolution of features + growth · i, and the rest.
        seen = depth * features + growth * depth * (depth - 1) // 2
        expected += seen * (2 + inner) + depth * (2 * inner + 9 * inner * growth)
        features += depth * growth
        if block < 2:
            kept = max(int(np.floor(compression * features)), 1)
            expected += features * (2 + kept)
            features = kept
    expected += 2 * features + 7 * features + 7
    assert sum(x.size for x in jax.tree.leaves(params)) == expected


def tiny(image_size=8, **fields):
    sizes = {"depths": (1, 2), "growth_rate": 16}
    return DenseNet.for_images(image_size=image_size, num_classes=10, **sizes | fields)


def test_published_initialisation():
    key = jax.random.key(0, impl="rbg")
    params = jax.jit(tiny().init)(key, jnp.zeros((1, 8, 8, 3)))["params"]
    for kernel, fan_in in (
        (params["denseblock1_denselayer1"]["conv1"]["kernel"], 32),
        (params["denseblock2_denselayer2"]["conv2"]["kernel"], 9 * 64),
        (params["transition1"]["conv"]["kernel"], 48),
    ):
        deviation = np.sqrt(2 / fan_in)
        # The deviation of n values has the error 1/√(2n); five of them.
        np.testing.assert_allclose(np.std(kernel), deviation, rtol=5 / np.sqrt(2 * kernel.size))
        assert np.abs(kernel).max() > 2.5 * deviation, "the tails are cut off"
    bound = params["norm5"]["scale"].size ** -0.5
    assert 0.95 * bound < np.abs(params["classifier"]["kernel"]).max() <= bound
    assert not params["classifier"]["bias"].any()
    assert (params["norm5"]["scale"] == 1).all() and not params["norm5"]["bias"].any()


def test_bfloat16_is_near_float32():
    images = np.asarray(jax.random.normal(jax.random.key(1), (4, 8, 8, 3)))
    variables = jax.tree.map(np.float32, random_variables(tiny(), images))
    a, b = (apply(tiny(dtype=d), variables, images, True) for d in (jnp.float32, jnp.bfloat16))
    assert a.dtype == b.dtype == np.float32
    # bfloat16 has 8 bits: 2**-8 relative to logits of the order of 1, over eight convolutions.
    assert 0 < np.abs(a - b).max() < 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stem": "cifar10"}, "unknown model.stem 'cifar10'; did you mean 'cifar'?"),
        ({"depths": (1,) * 5}, "model.depths has 5 blocks, and the images are halved between each"),
        (
            {"image_size": 12, "stem": "imagenet", "depths": (1, 1, 1)},
            "12 pixels are too few for the 'imagenet' stem",
        ),
        ({"depths": (0, 2)}, "model.depths is (0, 2); use numbers from 1 up"),
        ({"growth_rate": 0}, "model.growth_rate is 0; use numbers from 1 up"),
        ({"bottleneck_size": 0}, "model.bottleneck_size is 0; use numbers from 1 up"),
        ({"compression": 1.5}, "model.compression is 1.5, not in (0, 1]"),
    ],
)
def test_sizes_that_do_not_fit(fields, message):
    with pytest.raises(UserError) as error:
        tiny(**fields)
    assert message in str(error.value)


@pytest.mark.parametrize(("stem", "image_size"), [("cifar", 4), ("imagenet", 13)])
def test_the_smallest_images(stem, image_size):
    """One pixel reaches the last block, and of smaller images none would."""
    sizes = {"stem": stem, "depths": (1, 1, 1)}
    model = tiny(image_size, **sizes)
    shapes = numpy_layers.outputs(model, jnp.zeros((1, image_size, image_size, 3)), Transition)
    assert shapes["transition2"][1:3] == (1, 1)
    with pytest.raises(UserError, match=r"model\.depths has 3 blocks"):
        tiny(image_size - 1, **sizes)
