"""Filter-normalised directions, and the surface of a loss that is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnp import models
from gnp.analysis.loss_surface import direction, filter_axes, loss_surface

# The axes along which each kind of parameter has its filters, and an example's shape.
KINDS = {
    "dense/kernel": ((5, 3), (0,)),
    "conv/kernel": ((3, 3, 2, 4), (0, 1, 2)),
    "blocks/dense/kernel": ((2, 5, 3), (1,)),
    "lstm/recurrent": ((4, 16), (0,)),
    "embedding/embedding": ((7, 4), (1,)),
    "cls_token": ((1, 1, 6), (0, 1, 2)),
    "pos_embed": ((1, 5, 6), (0, 1, 2)),
    "norm/scale": ((6,), None),
    "blocks/norm/scale": ((2, 6), None),
    "blocks/dense/bias": ((2, 3), None),
    "blocks/gamma_1": ((2, 3), None),
    "blocks/attn/relative_position_bias_table": ((2, 9, 3), None),
}


def nested(flat):
    tree = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    return tree


def random_params(seed=0):
    rng = np.random.default_rng(seed)
    return nested(
        {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, (s, _) in KINDS.items()}
    )


def test_a_direction_has_the_filter_norms_of_the_parameters():
    params = random_params()
    found = direction(jax.random.key(0), params)
    expected = nested({name: axes for name, (_, axes) in KINDS.items()})
    is_axes = {"is_leaf": lambda x: x is None or isinstance(x, tuple)}
    for x, d, axes in zip(
        jax.tree.leaves(params),
        jax.tree.leaves(found),
        jax.tree.leaves(expected, **is_axes),
        strict=True,
    ):
        x, d = np.asarray(x, np.float64), np.asarray(d, np.float64)
        assert x.shape == d.shape
        if axes is None:
            assert not d.any()
            continue
        norms = (np.sqrt((y**2).sum(axis=axes)) for y in (d, x))
        np.testing.assert_allclose(*norms, rtol=1e-5)
        if d.size > 1:
            assert abs(np.corrcoef(d.ravel(), x.ravel())[0, 1]) < 0.9, "but not the parameters"


def test_directions_are_those_of_their_key():
    params = random_params()
    one, same, other = (direction(jax.random.key(k), params) for k in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (one, other))
    # of 100 independent entries or more
    assert abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b) < 0.35


def test_filters_of_zeros_and_parameters_without_names():
    params = [jnp.zeros((2, 3)), jnp.ones(3), jnp.ones(())]
    kernel, bias, scalar = direction(jax.random.key(0), params)
    assert not kernel.any() and not bias.any() and not scalar
    assert direction(jax.random.key(0), jnp.ones((2, 3))).shape == (2, 3)


@pytest.mark.parametrize("name", ["vit_ti", "swin_t", "cait_xxs12", "resnet18", "lstm"])
def test_every_kernel_of_a_model_has_a_direction_and_nothing_else_but_tokens(name):
    is_text = name == "lstm"
    model = models.create(name, num_classes=10, image_size=None if is_text else 32)
    example = jnp.zeros((1, 4), jnp.int32) if is_text else jnp.zeros((1, 32, 32, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), example)["params"]
    moved = {
        path[-1].key
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if filter_axes(path, x.ndim) is not None
    }
    left_out = {
        path[-1].key
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if filter_axes(path, x.ndim) is None
    }
    assert moved <= {"kernel", "recurrent", "embedding", "cls_token", "pos_embed"}
    assert left_out <= {"bias", "scale", "gamma_1", "gamma_2", "relative_position_bias_table"}
    assert "kernel" in moved


def test_the_surface_of_a_quadratic_is_that_in_closed_form():
    rng = np.random.default_rng(1)
    root, theta = rng.normal(size=(6, 6)), rng.normal(size=(3, 2))
    matrix = root.T @ root
    params = {"kernel": jnp.asarray(theta, jnp.float32)}
    ways = tuple(direction(jax.random.key(k), params) for k in (0, 1))

    def loss(params):
        v = np.asarray(params["kernel"], np.float64).ravel()
        return v @ matrix @ v / 2

    x, y = np.linspace(-1, 1, 5), np.linspace(-0.5, 2, 4)
    found = loss_surface(loss, params, ways, x, y)
    d, e = (np.asarray(w["kernel"], np.float64).ravel() for w in ways)
    v = theta.ravel()
    expected = [
        [
            (v @ matrix @ v + a * a * d @ matrix @ d + b * b * e @ matrix @ e) / 2
            + a * v @ matrix @ d
            + b * v @ matrix @ e
            + a * b * d @ matrix @ e
            for a in x
        ]
        for b in y
    ]
    assert found.shape == (4, 5) and found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-4)
