"""What every registered model has to hold: published counts, shapes, gradients, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnp import models
from gnp.errors import UserError

MODELS = models.list_models()
WORDS = 10_000

DTYPES = (jnp.float32, jnp.bfloat16)

# Versions that compile in seconds: one of each file, and of each kind of block.
NARROW = {
    "vit_ti": {"width": 12, "depth": 2, "num_heads": 3},
    "swin_t": {"width": 12, "depths": (2, 2), "num_heads": 3, "patch_size": 4},
    "cait_xxs12": {"width": 12, "depth": 2, "num_heads": 3},
    "resnet18": {"width": 8, "depths": (1, 1)},
    "resnet50": {"width": 8, "depths": (1, 1)},
    "vgg16": {"width": 4},
    "vgg16_bn": {"width": 4},
    "densenet121": {"growth_rate": 4, "depths": (2, 2)},
    "googlenet": {"width": 4},
    "lstm": {"embedding_size": 8, "hidden_size": 8},
}


def make(name, image_size, **overrides):
    """The model with as many classes as are usual at the size, and an input of it."""
    if MODELS[name].takes == "tokens":
        model = models.create(name, WORDS, **overrides)
        return model, jax.random.randint(jax.random.key(1), (2, 5), 0, WORDS)
    model = models.create(
        name, 1000 if image_size == 224 else 10, image_size=image_size, **overrides
    )
    return model, jax.random.normal(jax.random.key(1), (2, image_size, image_size, 3))


def multiply_adds(jaxpr):
    """Of all convolutions and matrix products, counted from the operations' shapes."""
    total = 0
    for equation in jaxpr.eqns:
        name, shapes = equation.primitive.name, [v.aval.shape for v in equation.invars]
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            over = np.prod([shapes[0][i] for i in contracted], dtype=np.int64)
            total += int(over * np.prod(equation.outvars[0].aval.shape, dtype=np.int64))
        elif name == "conv_general_dilated":
            kernel = equation.params["dimension_numbers"].rhs_spec
            per_output = np.prod([shapes[1][i] for i in kernel[1:]], dtype=np.int64)
            total += int(per_output * np.prod(equation.outvars[0].aval.shape, dtype=np.int64))
        inner = [j for p in equation.params.values() for j in (p if type(p) is tuple else (p,))]
        for value in inner:
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                total += equation.params.get("length", 1) * multiply_adds(value)
    return total


@pytest.mark.parametrize("image_size", [32, 224])
@pytest.mark.parametrize("name", MODELS)
def test_counts_and_shapes(name, image_size):
    """Parameters and GFLOPs of the registry, at both of its sizes, and the logits' shape."""
    model, inputs = make(name, image_size)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs))
    info = MODELS[name]
    num_params, gflops = info.large if image_size == 224 else info.small
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == num_params

    jaxpr, logits = jax.make_jaxpr(model.apply, return_shape=True)(variables, inputs)
    if info.takes == "tokens":
        assert logits.shape == (2, 5, WORDS)
    else:
        assert logits.shape == (2, 1000 if image_size == 224 else 10)
    assert logits.dtype == jnp.float32
    count = inputs.size if info.takes == "tokens" else len(inputs)
    assert multiply_adds(jaxpr) / count / 1e9 == pytest.approx(gflops, rel=5e-3)


# 10⁹ multiply-adds at 224 pixels as the papers state them (ViT: DeiT's paper, the same models).
PUBLISHED_GFLOPS = {
    **{"vit_ti": 1.3, "vit_s": 4.6, "vit_b": 17.6, "swin_t": 4.5, "swin_s": 8.7, "swin_b": 15.4},
    **{"cait_xxs12": 1.3, "cait_xxs24": 2.5, "cait_xs12": 2.8, "cait_s12": 4.8},
    **{"resnet18": 1.8, "resnet34": 3.6, "resnet50": 4.1, "vgg16": 15.5, "googlenet": 1.5},
}


@pytest.mark.parametrize("name", PUBLISHED_GFLOPS)
def test_gflops_are_those_of_the_papers(name):
    assert MODELS[name].large[1] == pytest.approx(PUBLISHED_GFLOPS[name], abs=0.11)


def perturbed(tree, deviation):
    """The arrays with normal noise, so that no scale is exactly 1 and no head exactly 0."""
    return jax.tree.map(
        lambda x: x + deviation * jax.random.normal(jax.random.key(2), x.shape), tree
    )


def logits_and_gradients(model, variables, inputs):
    """In training, with dropout; statistics are the batch's."""
    variables = dict(variables)
    params = variables.pop("params")

    @jax.jit
    def both(params):
        def apply(params):
            return model.apply(
                {"params": params, **variables},
                inputs,
                train=True,
                rngs={"dropout": jax.random.key(4)},
                mutable=list(variables),
            )[0]

        logits, pull = jax.vjp(apply, params)
        return logits, pull(jax.random.normal(jax.random.key(3), logits.shape))[0]

    logits, grads = both(params)
    assert logits.dtype == jnp.float32 and jnp.isfinite(logits).all()
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.isfinite(grad).all(), path
        # A bias that a normalisation or a softmax takes away has no gradient.
        assert jnp.abs(grad).max() > 0 or path[-1].key == "bias", path
    return logits, grads


def test_the_representatives_are_of_every_file():
    assert {MODELS[name].file for name in NARROW} == {info.file for info in MODELS.values()}


@pytest.mark.parametrize(
    "name",
    # By how long they take to compile.
    [
        *(n for n in NARROW if n not in ("googlenet", "swin_t", "cait_xxs12")),
        pytest.param("swin_t", marks=pytest.mark.slow),
        pytest.param("cait_xxs12", marks=pytest.mark.slow),
        pytest.param("googlenet", marks=pytest.mark.soak),
    ],
)
def test_narrow_version_in_both_precisions(name):
    """Finite logits and gradients, float32 parameters, and logits that are near each other.

    bfloat16 has 8 bits: 2⁻⁸ an operation, over a few layers.
    """
    (full, inputs), (half, _) = (make(name, 32, **NARROW[name], dtype=dtype) for dtype in DTYPES)
    variables = jax.jit(half.init)(jax.random.key(0), inputs)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables))
    variables["params"] = perturbed(variables["params"], 0.1)
    logits, grads = logits_and_gradients(half, variables, inputs)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(grads))
    rngs = {"dropout": jax.random.key(4)}
    apply = jax.jit(lambda v: full.apply(v, inputs, True, rngs=rngs, mutable=list(v))[0])
    exact = apply(variables)
    assert 0 < np.abs(logits - exact).max() < 0.05 * max(np.abs(exact).max(), 1)


# Half a minute and more each; at a small size they are in the tests above.
LONG = ("googlenet", "densenet121", "swin_t", "swin_s", "swin_b", "vit_b", "resnet50")
LONG += ("cait_xxs24", "cait_xs12", "cait_s12")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.soak if n in LONG else pytest.mark.slow) for n in MODELS],
)
def test_gradients_at_the_registered_size(name):
    scan = {"scan": True} if MODELS[name].file in ("vit", "swin", "cait") else {}
    model, inputs = make(name, 32, **scan)
    variables = jax.jit(model.init)(jax.random.key(0), inputs)
    variables["params"] = perturbed(variables["params"], 0.02)
    logits_and_gradients(model, variables, inputs)


def test_the_list_prints_as_a_table():
    lines = str(models.list_models()).splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(MODELS)
    row = next(line for line in lines if line.startswith("swin_t "))
    assert row.split()[1:5] == ["28,288,354", "4.49", "27,505,108", "0.36"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vit_tiny"}, "unknown model 'vit_tiny'; did you mean 'vit_ti'?"),
        ({"widht": 3}, "model 'vit_ti' has an unknown field 'widht'; did you mean 'width'?"),
        ({"image_size": None}, "model 'vit_ti' wants the size of its images (image_size)"),
        ({"remat": "dot"}, "unknown model.remat 'dot'; did you mean 'dots'?"),
        ({"name": "lstm", "width": 3}, "model 'lstm' has an unknown field 'width'"),
        ({"name": "lstm", "hidden_size": 0}, "model.hidden_size is 0; it must be 1 or more"),
    ],
)
def test_what_does_not_fit(arguments, message):
    with pytest.raises(UserError) as error:
        models.create(**{"name": "vit_ti", "num_classes": 10, "image_size": 32} | arguments)
    assert message in str(error.value)
