"""Patterns against lists by hand; layers against the order in which Flax runs modules."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from gnp import models
from gnp.errors import UserError
from gnp.training import patterns


@functools.cache
def forward(name, **fields):
    """A model's shapes, and its parameters' paths in the order of the forward pass."""
    if models.list_models()[name].takes == "tokens":
        model, example = models.create(name, 10), jnp.zeros((1, 1), jnp.int32)
    else:
        model = models.create(name, 10, image_size=32, **fields)
        example = jnp.zeros((1, 32, 32, 3))
    order = []

    def init():
        params = model.init(jax.random.key(0), example)["params"]
        order.extend(flatten_dict(params, sep="/"))  # JAX itself returns dictionaries sorted
        return params

    return jax.eval_shape(init), order


def flat(tree):
    return flatten_dict(tree, sep="/")


SHAPES = {
    "blocks": {"attn": {"kernel": np.zeros((3, 2, 2)), "bias": np.zeros((3, 2))}},
    "head": {"kernel": np.zeros((2, 5)), "bias": np.zeros(5)},
    "pos_embed": np.zeros((1, 4, 2)),
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), set()),
        (("pos",), {"pos_embed"}),
        (("^head/",), {"head/kernel", "head/bias"}),
        (("bias$", "embed"), {"blocks/attn/bias", "head/bias", "pos_embed"}),
        (("attn/.*l$",), {"blocks/attn/kernel"}),
        (("^(?!head)",), {"blocks/attn/kernel", "blocks/attn/bias", "pos_embed"}),
    ],
)
def test_what_patterns_match(given, expected):
    matched = flat(patterns.matches("config.x", given, SHAPES))
    assert {path for path, matches in matched.items() if matches} == expected


def test_the_first_rule_that_matches_decides():
    rules = ("head/bias=3", "head=10", "bias=0", "a=b|pos_embed=0.5")
    assert flat(patterns.multipliers("config.x", rules, SHAPES)) == {
        **{"head/bias": 3, "head/kernel": 10, "blocks/attn/bias": 0},
        **{"pos_embed": 0.5, "blocks/attn/kernel": 1},
    }


@pytest.mark.parametrize(
    ("function", "given", "message"),
    [
        (patterns.matches, "hed", "config.f: 'hed' matches no parameter; the nearest are 'head'"),
        (patterns.matches, "hed/bias", "the nearest are 'head/bias', "),
        (patterns.matches, "^attn", "matches no parameter; the nearest are 'attn', "),
        (patterns.matches, "a(b", "config.f: 'a(b' is no regular expression: missing )"),
        (patterns.multipliers, "hed=2", "config.f: 'hed' matches no parameter; the nearest"),
        (patterns.multipliers, "a(b=2", "config.f: 'a(b' is no regular expression: missing )"),
        (patterns.multipliers, "head", "config.f: 'head' is no rule; write PATTERN=FACTOR"),
        (patterns.multipliers, "head=", "'head=' is no rule"),
        (patterns.multipliers, "head=-1", "'head=-1' is no rule"),
        (patterns.multipliers, "head=nan", "'head=nan' is no rule"),
        (patterns.multipliers, "head=inf", "'head=inf' is no rule"),
    ],
)
def test_wrong_patterns_are_told_in_one_line(function, given, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        function("config.f", (given,), SHAPES)
    assert "\n" not in str(error.value)


def test_a_rule_that_decides_nothing():
    with pytest.raises(UserError, match="'head/bias=3' decides nothing"):
        patterns.multipliers("config.f", ("bias=1", "head=2", "head/bias=3"), SHAPES)


# The last layer's number.
LAST = {
    **dict.fromkeys(["vit_ti", "vit_s", "vit_b"], 12 + 1),
    **{"swin_t": 2 + 2 + 6 + 2 + 1, "swin_s": 2 + 2 + 18 + 2 + 1, "swin_b": 2 + 2 + 18 + 2 + 1},
    **dict.fromkeys(["cait_xxs12", "cait_xs12", "cait_s12"], 12 + 2 + 1),
    "cait_xxs24": 24 + 2 + 1,
    **{"resnet18": 8 + 1, "resnet34": 16 + 1, "resnet50": 16 + 1},
    **{"vgg16": 13, "vgg16_bn": 13},  # the first convolution is layer 0
    **{"densenet121": 6 + 12 + 24 + 16 + 3 + 1, "googlenet": 9 + 1, "lstm": 2 + 1},
}


@pytest.mark.parametrize(
    ("name", "fields", "last"),
    [
        *((name, {}, LAST.get(name)) for name in models.list_models()),
        ("resnet18", {"stem": "imagenet"}, 9),
        ("vgg16", {"stem": "imagenet"}, 15),  # its head has two layers more
        ("densenet121", {"stem": "imagenet", "depths": (2, 2)}, 2 + 2 + 1 + 1),
        ("googlenet", {"stem": "imagenet"}, 10),
        ("vit_ti", {"pool": "mean", "depth": 1}, 2),
        ("swin_t", {"depths": (2, 4)}, 7),
    ],
)
def test_layers_of_every_model_are_in_the_order_of_the_forward_pass(name, fields, last):
    shapes, order = forward(name, **fields)
    numbers = flat(patterns.layers(shapes))
    run, seen = [], set()
    for path in order:
        stack = re.match(r"(.*/)?blocks\w*/", path)
        if path == "cls_token":
            assert numbers[path] == 0  # an embedding, though CaiT's is joined late
        elif stack is None:
            run.append(numbers[path])
        elif stack[0] not in seen:
            seen.add(stack[0])
            members = [numbers[other] for other in order if other.startswith(stack[0])]
            for block in zip(*(np.ravel(member) for member in members), strict=True):
                run += sorted(block)
    assert set(np.diff(run)) == {0, 1} and run[0] == 0 and run[-1] == last
    factors = flat(patterns.layer_multipliers(0.5, shapes))
    for path, shape in flat(shapes).items():
        np.testing.assert_array_equal(factors[path], 0.5 ** (last - np.asarray(numbers[path])))
        assert np.shape(np.broadcast_to(factors[path], shape.shape)) == shape.shape


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "vit_ti",
            {"pos_embed": 0, "patch_embed/bias": 0, "norm/scale": 13, "head/kernel": 13}
            | {"blocks/attn/qkv/kernel": range(1, 13), "blocks/norm1/scale": range(1, 13)},
        ),
        (
            "swin_t",
            {"patch_norm/scale": 0, "norm/bias": 13, "layers_0/blocks/regular/norm1/scale": [1]}
            | {"layers_0/blocks/shifted/mlp/fc1/kernel": [2], "layers_2/downsample/norm/bias": 5}
            | {"layers_2/downsample/reduction/kernel": 5}
            | {"layers_2/blocks/regular/attn/relative_position_bias_table": [5, 7, 9]}
            | {"layers_2/blocks/shifted/attn/qkv/bias": [6, 8, 10]},
        ),
        (
            "cait_xxs12",
            {"blocks/gamma_1": range(1, 13), "blocks_token_only/attn/q/kernel": [13, 14]}
            | {"cls_token": 0, "norm/scale": 15},
        ),
        (
            "resnet50",
            {"bn1/scale": 0, "layer1_0/downsample_1/bias": 1, "layer1_0/conv3/kernel": 1}
            | {"layer1_2/bn1/scale": 3, "layer2_0/conv1/kernel": 4, "fc/bias": 17},
        ),
        (
            "vgg16_bn",
            {"features_0/bias": 0, "features_1/scale": 0, "features_3/kernel": 1}
            | {"features_40/kernel": 12, "features_41/bias": 12, "head_fc/kernel": 13},
        ),
        (
            "densenet121",
            {"conv0/kernel": 0, "denseblock1_denselayer6/norm1/scale": 6}
            | {"transition1/norm/scale": 7, "denseblock2_denselayer1/norm1/scale": 8}
            | {"denseblock2_denselayer10/conv1/kernel": 17, "norm5/scale": 62},
        ),
        ("googlenet", {"conv1/bn/scale": 0, "inception4a/branch1/bn/bias": 3, "fc/bias": 10}),
        ("lstm", {"embedding/embedding": 0, "layers_1/recurrent": 2, "head/bias": 3}),
    ],
)
def test_layers_by_hand(name, expected):
    numbers = flat(patterns.layers(forward(name)[0]))
    for path, number in expected.items():
        np.testing.assert_array_equal(np.ravel(numbers[path]), np.ravel(number), err_msg=path)
