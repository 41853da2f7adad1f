"""VGG against NumPy, its layers' numbers, and its initial values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnp.errors import UserError
from gnp.models.vgg import VGG
from tests.models.numpy_layers import Net, apply, pool, random_variables, relu


def numpy_vgg(net, images, depths, batch_norm, stem):
    x = images
    place = 0
    for depth in depths:
        for _ in range(depth):
            x = net.conv(x, f"features_{place}")
            if batch_norm:
                x = net.norm(x, f"features_{place + 1}")
            x = relu(x)
            place += 3 if batch_norm else 2
        x = pool(x, 2, 2)
        place += 1
    if stem == "cifar":
        return net.dense(x.mean((1, 2)), "head_fc")
    x = x.reshape(len(x), -1)
    x = relu(net.dense(x, "pre_logits_fc1"))
    x = relu(net.dense(x, "pre_logits_fc2"))
    return net.dense(x, "head_fc")


@pytest.mark.parametrize(
    ("batch_norm", "stem", "groups"),
    [(True, "cifar", 2), (False, "cifar", None), (True, "imagenet", None)],
)
def test_forward_against_numpy(batch_norm, stem, groups):
    """With random parameters and running statistics, in float64; 2×2 pixels reach the head."""
    depths = (1, 2, 1)
    with jax.enable_x64(True):
        model = VGG.for_images(
            image_size=17,
            num_classes=5,
            depths=depths,
            batch_norm=batch_norm,
            stem=stem,
            width=3,
            hidden_size=7,
            batch_norm_groups=groups or 1,
            dtype=jnp.float64,
        )
        images = np.random.default_rng(1).normal(size=(4, 17, 17, 3))
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
        assert ("batch_stats" in shapes) == batch_norm
        variables = random_variables(model, images)
        logits = apply(model, variables, images, train=groups is not None)
    expected = numpy_vgg(Net(variables, groups), images, depths, batch_norm, stem)
    # The logits are rounded to float32.
    np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("batch_norm", "convolutions"),
    [
        (True, (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)),
        (False, (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
    ],
)
def test_layers_have_the_published_numbers_and_features(batch_norm, convolutions):
    """Those of timm's and torchvision's `features`, for weights that are stored under them."""
    model = VGG.for_images(image_size=224, num_classes=1000, batch_norm=batch_norm)
    images = jnp.zeros((1, 224, 224, 3))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), images))["params"]
    kernels = {name: p["kernel"].shape for name, p in params.items() if "kernel" in p}
    features = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    for place, before, after in zip(convolutions, (3, *features), features, strict=False):
        assert kernels.pop(f"features_{place}") == (3, 3, before, after)
        assert params[f"features_{place}"]["bias"].shape == (after,)
        assert (f"features_{place + 1}" in params) == batch_norm
    assert kernels == {
        "pre_logits_fc1": (7 * 7 * 512, 4096),
        "pre_logits_fc2": (4096, 4096),
        "head_fc": (4096, 1000),
    }


def tiny(stem="cifar", **fields):
    sizes = {"depths": (1, 2), "width": 16, "hidden_size": 64}
    return VGG.for_images(image_size=8, num_classes=10, stem=stem, **sizes | fields)


def test_published_initialisation():
    key = jax.random.key(0, impl="rbg")
    params = jax.jit(tiny("imagenet").init)(key, jnp.zeros((1, 8, 8, 3)))["params"]
    for name, deviation in (
        ("features_4", np.sqrt(2 / (9 * 32))),
        ("features_7", np.sqrt(2 / (9 * 32))),
        ("pre_logits_fc1", 0.01),
        ("pre_logits_fc2", 0.01),
        ("head_fc", 0.01),
    ):
        kernel = params[name]["kernel"]
        # The deviation of n values has the error 1/√(2n); five of them.
        np.testing.assert_allclose(np.std(kernel), deviation, rtol=5 / np.sqrt(2 * kernel.size))
        assert np.abs(kernel).max() > 2.5 * deviation, "the tails are cut off"
        assert not params[name]["bias"].any()


def test_dropout_acts_in_training_on_both_hidden_layers():
    """With the published rate at the "imagenet" stem, and none at the "cifar" stem."""
    assert tiny("imagenet").dropout == 0.5 and tiny("cifar").dropout == 0
    assert tiny("imagenet", dropout=0.1).dropout == 0.1
    model = tiny("imagenet")
    images = np.asarray(jax.random.normal(jax.random.key(1), (8, 8, 8, 3)))
    variables = jax.tree.map(np.float32, random_variables(model, images))

    def hidden(train):
        names = ("Dropout_0", "Dropout_1")
        _, state = model.apply(
            variables,
            images,
            train=train,
            rngs={"dropout": jax.random.key(2)},
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: module.name in names,
        )
        return [np.asarray(state["intermediates"][name]["__call__"][0]) for name in names]

    # About half of the features are 0 after the ReLU, and in training half of the others too.
    for kept, dropped in zip(hidden(False), hidden(True), strict=True):
        assert kept.shape == dropped.shape == (8, 64)
        assert 0.3 < (kept != 0).mean() < 0.7
        assert 0.1 < (dropped != 0).mean() < 0.4


def test_bfloat16_is_near_float32():
    images = np.asarray(jax.random.normal(jax.random.key(1), (4, 8, 8, 3)))
    variables = jax.tree.map(np.float32, random_variables(tiny(), images))
    a, b = (apply(tiny(dtype=d), variables, images, True) for d in (jnp.float32, jnp.bfloat16))
    assert a.dtype == b.dtype == np.float32
    # bfloat16 has 8 bits: 2**-8 relative to logits of the order of 1, over three convolutions.
    assert 0 < np.abs(a - b).max() < 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stem": "imagenette"}, "unknown model.stem 'imagenette'; did you mean 'imagenet'?"),
        (
            {"depths": (1,) * 4},
            "model.depths has 4 stages, each of which halves the images: 16 pix",
        ),
        ({"depths": (1, 0)}, "model.depths is (1, 0); use numbers from 1 up"),
        ({"hidden_size": 0}, "model.hidden_size is 0; use numbers from 1 up"),
    ],
)
def test_sizes_that_do_not_fit(fields, message):
    with pytest.raises(UserError) as error:
        tiny(**fields)
    assert message in str(error.value)
