"""Batch normalisation against Flax's, its derivatives, its parts, and its statistics under GR."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from gnp import transforms
from gnp.errors import UserError
from gnp.models.layers import BatchNorm
from gnp.models.resnet import ResNet
from gnp.training.optimizer import Optimizer
from gnp.training.sharding import make_mesh, over_batch, replicated
from gnp.training.step import init_state, make_train_step

SHAPE = (16, 5, 3, 4)


def inputs(seed, shape=SHAPE):
    """Channels of several means and deviations."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * [0.5, 1, 2, 4] + [-3, 0, 1, 8]
    return jnp.asarray(x, jnp.float32)


def random_variables(seed=0):
    rng = np.random.default_rng(seed)
    params = {"scale": rng.normal(size=4), "bias": rng.normal(size=4)}
    running = {"mean": rng.normal(size=4), "var": np.exp(rng.normal(size=4))}
    variables = {"params": params, "batch_stats": running}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), variables)


def in_training(norm, variables, x):
    return norm.apply(variables, x, train=True, mutable=["batch_stats"])


def assert_close(a, b, **tolerances):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerances), a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("groups", [1, 4])
def test_each_part_is_normalised_as_flax_does(groups, dtype):
    """Three steps, then evaluation; the parts' statistics move the running ones together."""
    dtype = jnp.dtype(dtype)
    ours = BatchNorm(groups, momentum=0.8, epsilon=1e-3, dtype=dtype)
    flax = nn.BatchNorm(momentum=0.8, epsilon=1e-3, dtype=dtype, use_fast_variance=False)
    variables = expected = random_variables()
    # Roundings of one ulp in either order, of outputs to 12.
    tolerances = {"rtol": 2**-8, "atol": 2**-7} if dtype == jnp.bfloat16 else {"atol": 1e-5}
    for seed in range(3):
        x = inputs(seed).astype(dtype)
        y, state = in_training(ours, variables, x)
        parts = [
            flax.apply(expected, part, use_running_average=False, mutable=["batch_stats"])
            for part in jnp.split(x, groups)
        ]
        assert y.dtype == dtype and y.shape == x.shape
        wanted = jnp.concatenate([part for part, _ in parts])
        assert_close(y.astype(jnp.float32), wanted.astype(jnp.float32), **tolerances)
        states = jax.tree.map(lambda *xs: sum(xs) / groups, *[state for _, state in parts])
        assert_close(state, states, rtol=1e-5, atol=1e-6)
        variables, expected = variables | state, expected | states
    y = ours.apply(variables, x, train=False)
    wanted = flax.apply(expected, x, use_running_average=True)
    assert y.dtype == dtype
    assert_close(y.astype(jnp.float32), wanted.astype(jnp.float32), **tolerances)


def test_initial_values():
    norm = BatchNorm()
    for train in (False, True):
        variables = norm.init(jax.random.key(0), inputs(0), train)
        assert_close(variables["params"], {"scale": np.ones(4), "bias": np.zeros(4)})
        assert_close(variables["batch_stats"], {"mean": np.zeros(4), "var": np.ones(4)})


@pytest.mark.parametrize("groups", [1, 2])
def test_derivatives_against_finite_differences(groups):
    """Also the second ones, which the exact estimator of gradient regularization takes."""
    with jax.enable_x64(True):
        x = jnp.asarray(inputs(0, (4, 3, 4)), jnp.float64)
        weights = np.random.default_rng(1).normal(size=x.shape)
        norm = BatchNorm(groups, epsilon=0.1, dtype=jnp.float64)
        running = random_variables()["batch_stats"]

        def value(x, params):
            y, _ = in_training(norm, {"params": params, "batch_stats": running}, x)
            return (jnp.tanh(y) * weights).sum()

        params = jax.tree.map(lambda p: p.astype(jnp.float64), random_variables()["params"])
        check_grads(value, (x, params), order=1, modes=["rev"], rtol=1e-6)
        grad = jax.grad(value, argnums=(0, 1))
        check_grads(grad, (x, params), order=1, modes=["fwd"], rtol=1e-6)


def test_a_mean_far_from_zero_costs_no_digits():
    """As of a deviation of 1 around 3000, where x² in float32 knows 1 only to one digit."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE) + 3000, jnp.float32)
    variables = BatchNorm().init(jax.random.key(0), x, False)
    y, state = in_training(BatchNorm(), variables, x)
    exact = np.asarray(x, np.float64)
    mean, var = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
    assert_close(state["batch_stats"]["var"], 0.9 + 0.1 * var, rtol=1e-5)
    # μ is known to some ulps of 3000, 2.4e-4 each.
    assert_close(y, (exact - mean) / np.sqrt(var + 1e-5), atol=5e-3)


@pytest.mark.parametrize("groups", [1, 2, 8, 16])
def test_one_device_and_eight_agree(groups):
    """Whether a device has part of a group, one or several."""
    norm = BatchNorm(groups)
    variables, x = random_variables(), inputs(0)
    weights = jax.random.normal(jax.random.key(1), SHAPE)

    @jax.jit
    def run(variables, x):
        def value(params, x):
            y, state = in_training(norm, variables | {"params": params}, x)
            return (y * weights).sum(), (y, state)

        return jax.grad(value, argnums=(0, 1), has_aux=True)(variables["params"], x)

    mesh = make_mesh(8, batch_size=len(x))
    (one, other) = (
        run(variables, x),
        run(jax.device_put(variables, replicated(mesh)), jax.device_put(x, over_batch(mesh))),
    )
    assert other[1][0].sharding.num_devices == 8
    # Sums over the batch are taken in another order.
    assert_close(other, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("groups", "returned", "communicates"),
    [(1, "output", True), (8, "output", False), (8, "gradient", False), (8, "statistics", True)],
)
def test_parts_laid_along_the_devices_need_no_communication(groups, returned, communicates):
    norm = BatchNorm(groups)
    mesh = make_mesh(8, batch_size=SHAPE[0])

    def run(variables, x):
        if returned == "gradient":
            return jax.grad(lambda x: jnp.tanh(in_training(norm, variables, x)[0]).sum())(x)
        y, state = in_training(norm, variables, x)
        return y if returned == "output" else state

    variables = jax.device_put(random_variables(), replicated(mesh))
    x = jax.device_put(inputs(0), over_batch(mesh))
    text = jax.jit(run).lower(variables, x).compile().as_text()
    words = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    assert any(word in text for word in words) == communicates
    assert f"f32[{SHAPE[0] // 8}," in text and f"f32[{SHAPE[0]}," not in text


def test_parts_that_do_not_divide_the_batch():
    message = "model.batch_norm_groups is 3, which does not divide a batch of 16"
    with pytest.raises(UserError, match=message):
        in_training(BatchNorm(3), random_variables(), inputs(0))
    # There are no parts in evaluation.
    BatchNorm(3).apply(random_variables(), inputs(0), train=False)


@pytest.mark.parametrize("groups", [1, 2])
def test_statistics_under_gradient_regularization_are_of_the_first_gradient(groups):
    """A whole network, perturbed so far that the second gradient's are others."""
    model = ResNet.for_images(
        image_size=8,
        num_classes=3,
        depths=(1,),
        bottleneck=False,
        width=4,
        batch_norm_groups=groups,
    )
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(8, 8, 8, 1)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 3, 8), jnp.int32)
    radius, learning_rate = 5.0, 0.1
    gr = transforms.gradient_regularization(radius, 1.0)
    chain = optax.chain(gr, optax.sgd(learning_rate))
    optimizer = Optimizer(chain, lambda count: learning_rate, 0.0)
    before = jax.jit(lambda: init_state(model, optimizer, images[:1], seed=0))()
    step = jax.jit(make_train_step(model, optimizer, seed=0, log_every=1))
    after = step(before, {"input": images, "label": labels})

    @jax.jit
    def gradient(params):
        def loss(params):
            logits, state = in_training(model, {"params": params, **before.model_state}, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), state

        return jax.grad(loss, has_aux=True)(params)

    grads, first = gradient(before.params)
    assert_close(after.model_state, first, rtol=1e-6, atol=1e-7)
    scale = radius / optax.tree.norm(grads)
    perturbed = jax.tree.map(lambda p, g: p + scale * g, before.params, grads)
    grads, second = gradient(perturbed)
    differences = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), first, second)
    assert min(jax.tree.leaves(differences)) > 1e-3
    # The second gradient normalises with its own statistics, those at the perturbed parameters.
    expected = jax.tree.map(lambda p, g: p - learning_rate * g, before.params, grads)
    assert_close(after.params, expected, rtol=1e-4, atol=1e-5)
