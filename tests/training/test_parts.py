"""Batches gone through in parts, groups with perturbations of their own, averaged parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnp import models, transforms
from gnp.training.optimizer import Optimizer
from gnp.training.sharding import make_mesh, over_batch
from gnp.training.step import cross_entropy, init_state, make_train_step, scores

LR, RADIUS, RATIO = 0.1, 0.5, 0.6
B, SHAPE = 16, (8, 8, 1)


@pytest.fixture(autouse=True)
def float64():
    """So that what must agree does so to 1e-10."""
    with jax.enable_x64(True):
        yield


def make_optimizer(num_groups=None, ratio=RATIO):
    gr = transforms.gradient_regularization(RADIUS, ratio, num_groups=num_groups)
    return Optimizer(optax.chain(gr, optax.sgd(LR)), lambda count: jnp.float64(LR), 0.0)


class Net(nn.Module):
    """Dense, tanh, dense; or with batch normalisation over `groups` successive parts."""

    groups: int | None = None

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(6, param_dtype=float)(images.reshape(images.shape[0], -1))
        if self.groups is not None:
            axes = self.variable("batch_stats", "mean", jnp.zeros, (6,))
            parts = x.reshape(1 if self.is_initializing() else self.groups, -1, 6)
            mean = parts.mean(axis=1, keepdims=True)
            if train and not self.is_initializing():
                axes.value = 0.9 * axes.value + 0.1 * mean.mean(axis=(0, 1))
            x = (parts - (mean if train else axes.value)).reshape(x.shape)
        return nn.Dense(3, param_dtype=float)(jnp.tanh(x))


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {
        "input": jnp.asarray(rng.normal(size=(B, *SHAPE))),
        "label": jnp.asarray(rng.integers(0, 3, B), jnp.int32),
    }


def run(model, optimizer, batch, steps=3, **arguments):
    ema = arguments.get("ema_decay") is not None
    state = init_state(model, optimizer, batch["input"][:1], seed=0, ema=ema)
    step = jax.jit(make_train_step(model, optimizer, seed=0, log_every=100, **arguments))
    states = [state]
    for _ in range(steps):
        states.append(step(states[-1], batch))
    return states


def assert_close(a, b, **tolerance):
    tolerance = tolerance or {"rtol": 1e-10, "atol": 1e-12}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("ratio", [0.0, RATIO, 1.0])
@pytest.mark.parametrize("accumulate", [2, 8, 16])
def test_accumulated_gradients_are_those_of_the_whole_batch(batch, accumulate, ratio):
    optimizer = make_optimizer(ratio=ratio)
    whole = run(Net(), optimizer, batch)[-1]
    parts = run(Net(), optimizer, batch, accumulate=accumulate)[-1]
    assert_close(parts.params, whole.params)
    # The metrics are float32.
    assert_close(parts.metrics, whole.metrics, rtol=1e-6)


def test_statistics_are_those_of_each_part(batch):
    """Part j has the rows j, j + 4, …: in another order they are 4 successive parts."""
    order = np.arange(B).reshape(-1, 4).T.ravel()
    sorted_batch = {name: x[order] for name, x in batch.items()}
    whole = run(Net(groups=4), make_optimizer(), sorted_batch)[-1]
    parts = run(Net(groups=1), make_optimizer(), batch, accumulate=4)[-1]
    assert_close(parts.params, whole.params)
    assert_close(parts.model_state, whole.model_state, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_group_is_perturbed_along_its_own_gradient(batch, accumulate):
    """m-sharpness by a loop over the groups."""
    m, model = 4, Net()
    before, after = run(model, make_optimizer(m), batch, 1, num_groups=m, accumulate=accumulate)

    def loss(params, rows):
        logits = model.apply({"params": params}, batch["input"][rows])
        return -jax.nn.log_softmax(logits)[jnp.arange(B // m), batch["label"][rows]].mean()

    total, norms = jax.tree.map(jnp.zeros_like, before.params), []
    for rows in np.split(np.arange(B), m):
        first = jax.grad(loss)(before.params, rows)
        norms.append(np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(first))))
        perturbed = jax.tree.map(
            lambda p, g, norm=norms[-1]: p + RADIUS * g / norm, before.params, first
        )
        second = jax.grad(loss)(perturbed, rows)
        total = jax.tree.map(
            lambda t, g, h: t + ((1 - RATIO) * g + RATIO * h) / m, total, first, second
        )
    expected = jax.tree.map(lambda p, g: p - LR * g, before.params, total)
    # The step's loss, and so what its gradients begin with, is float32.
    assert_close(after.params, expected, rtol=1e-6, atol=1e-9)
    assert float(after.metrics["grad_norm"][0]) == pytest.approx(np.mean(norms), rel=1e-6)


def test_groups_do_not_depend_on_devices(batch):
    """Eight groups on one device, and one on each of eight."""
    one = run(Net(), make_optimizer(8), batch, num_groups=8)[-1]
    mesh = make_mesh(8, batch_size=B)
    placed = jax.device_put(batch, over_batch(mesh))
    eight = run(Net(), make_optimizer(8), placed, num_groups=8, mesh=mesh)[-1]
    assert jax.tree.leaves(eight.params)[0].sharding.num_devices == 8
    assert_close(eight.params, one.params)


def test_one_group_is_the_whole_batch(batch):
    whole = run(Net(), make_optimizer(), batch)[-1]
    group = run(Net(), make_optimizer(1), batch, num_groups=1)[-1]
    assert_close(group.params, whole.params)


@pytest.mark.parametrize("arguments", [{"accumulate": 4}, {"num_groups": 4}])
def test_both_gradients_see_the_same_masks_in_every_part(batch, arguments):
    """With a radius of 0 the second gradient is the first only if its masks are."""

    class Dropped(Net):
        @nn.compact
        def __call__(self, images, train=False):
            return super().__call__(nn.Dropout(0.5, deterministic=not train)(images), train)

    def last(ratio):
        gr = transforms.gradient_regularization(0.0, ratio, num_groups=arguments.get("num_groups"))
        optimizer = Optimizer(optax.chain(gr, optax.sgd(LR)), lambda count: LR, 0.0)
        return run(Dropped(), optimizer, batch, **arguments)[-1].params

    assert_close(last(0.0), last(1.0))


@pytest.mark.parametrize("arguments", [{"accumulate": 4}, {"accumulate": 2, "num_groups": 2}])
def test_each_stream_keeps_its_own_state(arguments):
    """A language model that is gone through in parts reads on where each stream was."""
    model = models.create("lstm", 6, embedding_size=4, hidden_size=5, dropout=0.0)
    words = jax.random.randint(jax.random.key(0), (8, 4), 0, 6)
    batch = {"input": words[:, :-1], "label": words[:, 1:]}

    def last(num_groups=None, **arguments):
        gr = transforms.gradient_regularization(0.0, 0.5, num_groups=num_groups)
        optimizer = Optimizer(optax.chain(gr, optax.sgd(LR)), lambda count: LR, 0.0)
        state = init_state(model, optimizer, jnp.zeros((8, 1), jnp.int32), seed=0)
        step = make_train_step(
            *(model, optimizer), seed=0, log_every=9, num_groups=num_groups, **arguments
        )
        return jax.jit(lambda s: step(step(s, batch), batch))(state)

    whole, parts = last(), last(**arguments)
    assert float(jnp.abs(whole.model_state["carry"]["layers_0"]["h"]).max()) > 0
    assert_close(parts.model_state, whole.model_state, rtol=1e-5, atol=1e-7)
    assert_close(parts.params, whole.params, rtol=1e-5, atol=1e-7)


def test_the_average_of_the_parameters(batch):
    """By NumPy, with its warmup and with the running statistics."""
    states = run(Net(groups=1), make_optimizer(), batch, steps=30, ema_decay=0.5)
    average = np.asarray(states[0].params["Dense_0"]["kernel"])
    statistics = np.asarray(states[0].model_state["batch_stats"]["mean"])
    for t, state in enumerate(states[1:]):
        d = min(0.5, (1 + t) / (10 + t))
        average = d * average + (1 - d) * np.asarray(state.params["Dense_0"]["kernel"])
        statistics = d * statistics + (1 - d) * state.model_state["batch_stats"]["mean"]
    ema = states[-1].ema
    np.testing.assert_allclose(ema["params"]["Dense_0"]["kernel"], average, rtol=1e-6)
    np.testing.assert_allclose(ema["batch_stats"]["mean"], statistics, rtol=1e-5, atol=1e-7)


def test_top5_error_is_numpys():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 9)), rng.integers(0, 9, 200)
    five = np.argsort(-logits, axis=1)[:, :5]
    expected = ~(five == labels[:, None]).any(axis=1)
    values = scores(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_array_equal(values["top5_error"], expected)
    mixed = 0.6 * np.eye(9)[labels] + 0.4 * np.eye(9)[labels[::-1]]
    np.testing.assert_array_equal(
        scores(jnp.asarray(logits), jnp.asarray(mixed))["top5_error"], expected
    )
    assert "top5_error" not in scores(jnp.zeros((2, 5)), jnp.zeros(2, int))
    not_finite = scores(jnp.full((1, 9), jnp.nan), jnp.zeros(1, int))
    assert (
        not_finite["top5_error"] == 1
        and jnp.isnan(cross_entropy(jnp.full((1, 9), jnp.nan), jnp.zeros(1, int)))[0]
    )
