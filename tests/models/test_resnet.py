"""The residual network against NumPy, and its initial values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnp.errors import UserError
from gnp.models.resnet import Block, ResNet
from tests.models import numpy_layers
from tests.models.numpy_layers import Net, apply, pool, random_variables, relu


def numpy_resnet(net, images, depths, bottleneck, stem):
    x = net.conv(images, "conv1", stride=2 if stem == "imagenet" else 1)
    x = relu(net.norm(x, "bn1"))
    if stem == "imagenet":
        x = pool(x, 3, 2, padding=1)
    for stage, depth in enumerate(depths, start=1):
        for i in range(depth):
            block = f"layer{stage}_{i}"
            stride = 2 if stage > 1 and i == 0 else 1
            strides = (1, stride, 1) if bottleneck else (stride, 1)
            y = x
            for n, s in enumerate(strides, start=1):
                y = net.norm(net.conv(y, f"{block}/conv{n}", s), f"{block}/bn{n}")
                y = y if n == len(strides) else relu(y)
            # Where shape stays, so does the shortcut.
            if i == 0 and (stage > 1 or bottleneck):
                x = net.conv(x, f"{block}/downsample_0", stride)
                x = net.norm(x, f"{block}/downsample_1")
            x = relu(x + y)
    return net.dense(x.mean((1, 2)), "fc")


@pytest.mark.parametrize(
    ("bottleneck", "stem", "image_size", "groups"),
    [
        (False, "cifar", 9, None),
        (False, "imagenet", 18, 1),
        (True, "cifar", 8, 2),
        (True, "imagenet", 21, None),
    ],
)
def test_forward_against_numpy(bottleneck, stem, image_size, groups):
    """With random parameters and running statistics, in float64; at odd and even sizes."""
    depths = (1, 2, 1)
    with jax.enable_x64(True):
        model = ResNet.for_images(
            image_size=image_size,
            num_classes=5,
            depths=depths,
            bottleneck=bottleneck,
            stem=stem,
            width=3,
            batch_norm_groups=groups or 1,
            dtype=jnp.float64,
        )
        images = np.random.default_rng(1).normal(size=(4, image_size, image_size, 3))
        variables = random_variables(model, images)
        logits = apply(model, variables, images, train=groups is not None)
    expected = numpy_resnet(Net(variables, groups), images, depths, bottleneck, stem)
    # The logits are rounded to float32.
    np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("depths", "bottleneck", "features"),
    [((2, 2, 2, 2), False, (64, 128, 256, 512)), ((3, 4, 6, 3), True, (256, 512, 1024, 2048))],
)
@pytest.mark.parametrize(("image_size", "sizes"), [(32, (32, 16, 8, 4)), (224, (56, 28, 14, 7))])
def test_shapes_of_the_stages(depths, bottleneck, features, image_size, sizes):
    model = ResNet.for_images(
        image_size=image_size, num_classes=10, depths=depths, bottleneck=bottleneck
    )
    shapes = numpy_layers.outputs(model, jnp.zeros((2, image_size, image_size, 3)), Block)
    assert list(shapes) == [f"layer{s}_{i}" for s in (1, 2, 3, 4) for i in range(depths[s - 1])]
    for stage, depth in enumerate(depths):
        for i in range(depth):
            size = sizes[stage]
            assert shapes[f"layer{stage + 1}_{i}"] == (2, size, size, features[stage])


def tiny(**fields):
    sizes = {"depths": (1, 1), "bottleneck": False, "width": 16}
    return ResNet.for_images(image_size=8, num_classes=10, **sizes | fields)


def test_published_initialisation():
    variables = jax.jit(tiny().init)(jax.random.key(0, impl="rbg"), jnp.zeros((1, 8, 8, 3)))
    params = variables["params"]
    for kernel, fan_out in (
        (params["layer1_0"]["conv1"]["kernel"], 9 * 16),
        (params["layer2_0"]["conv1"]["kernel"], 9 * 32),
        (params["layer2_0"]["downsample_0"]["kernel"], 32),
    ):
        deviation = np.sqrt(2 / fan_out)
        # The deviation of n values has the error 1/√(2n); five of them.
        np.testing.assert_allclose(np.std(kernel), deviation, rtol=5 / np.sqrt(2 * kernel.size))
        assert np.abs(kernel).max() > 2.5 * deviation, "the tails are cut off"
    bound = 32**-0.5
    assert 0.95 * bound < np.abs(params["fc"]["kernel"]).max() <= bound
    assert 0.5 * bound < np.abs(params["fc"]["bias"]).max() <= bound
    for name, norm in (("layer1_0", "bn2"), ("layer2_0", "downsample_1")):
        assert (params[name][norm]["scale"] == 1).all() and not params[name][norm]["bias"].any()
        running = variables["batch_stats"][name][norm]
        assert (running["var"] == 1).all() and not running["mean"].any()


def test_bfloat16_is_near_float32():
    images = np.asarray(jax.random.normal(jax.random.key(1), (4, 8, 8, 3)))
    variables = random_variables(tiny(), images)
    variables = jax.tree.map(lambda x: x.astype(np.float32), variables)
    a, b = (apply(tiny(dtype=d), variables, images, True) for d in (jnp.float32, jnp.bfloat16))
    assert a.dtype == b.dtype == np.float32
    # bfloat16 has 8 bits: 2**-8 relative to logits of the order of 1, over five convolutions.
    assert 0 < np.abs(a - b).max() < 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stem": "cifra"}, "unknown model.stem 'cifra'; did you mean 'cifar'?"),
        ({"depths": (2, 0)}, "model.depths is (2, 0); use numbers from 1 up"),
        ({"depths": ()}, "model.depths is (); use numbers from 1 up"),
        ({"width": 0}, "model.width is 0; use numbers from 1 up"),
        ({"batch_norm_groups": 0}, "model.batch_norm_groups is 0; use numbers from 1 up"),
    ],
)
def test_sizes_that_do_not_fit(fields, message):
    with pytest.raises(UserError) as error:
        tiny(**fields)
    assert message in str(error.value)
