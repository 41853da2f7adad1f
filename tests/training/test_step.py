"""The train step: what it reports, what the second gradient shares, and where it runs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnp import models, transforms
from gnp.data.augment import parse_augment
from gnp.data.loading import ResidentData
from gnp.data.pipeline import EvalBatches, Preprocessing, TrainBatches
from gnp.training.evaluation import make_evaluate, make_grad_norm
from gnp.training.optimizer import Optimizer
from gnp.training.sharding import make_mesh, over_batch, replicated
from gnp.training.state import mean_metrics
from gnp.training.step import init_state, make_train_call, make_train_step

SHAPE = (8, 8, 1)
PREPROCESSING = Preprocessing(
    parse_augment("pad_crop:1"), 8, 3, np.array([0.5]), np.array([0.2]), seed=0
)
LR = 0.1


def tiny(**overrides):
    sizes = {"width": 8, "depth": 1, "num_heads": 2} | overrides
    return models.create("vit_ti", 3, image_size=8, **sizes)


def make_optimizer(radius=0.0, ratio=0.0, l2=0.0):
    gr = transforms.gradient_regularization(radius, ratio)
    return Optimizer(optax.chain(gr, optax.sgd(LR)), lambda count: LR, l2)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {
        "input": jnp.asarray(rng.normal(size=(16, *SHAPE)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 3, 16), jnp.int32),
    }


def init(model, optimizer):
    return jax.jit(lambda: init_state(model, optimizer, jnp.zeros((1, *SHAPE)), seed=0))()


def one_step(model, optimizer, batch, steps=1):
    state = init(model, optimizer)
    step = jax.jit(make_train_step(model, optimizer, seed=0, log_every=100))
    for _ in range(steps):
        before, state = state, step(state, batch)
    return before, state


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_loss_and_error_are_those_before_the_update(batch):
    model = tiny()
    before, after = one_step(model, make_optimizer(0.5, 1.0), batch, steps=3)
    logits = np.asarray(model.apply({"params": before.params}, batch["input"]), np.float64)
    labels = np.asarray(batch["label"])
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    loss = -np.log(probabilities[np.arange(16), labels]).mean()
    # The metrics are sums since the last log line.
    added = {k: after.metrics[k][0] - before.metrics[k][0] for k in after.metrics}
    np.testing.assert_allclose(added["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(added["error"], (logits.argmax(1) != labels).mean(), atol=1e-6)
    norm = np.sqrt(sum((np.asarray(x) ** 2).sum() for x in jax.tree.leaves(before.params)))
    np.testing.assert_allclose(added["weight_norm"], norm, rtol=1e-5)


def test_both_gradients_see_the_same_masks(batch):
    """With no perturbation the second gradient is the first only if its masks are."""
    model = tiny(dropout=0.5, stochastic_depth=0.5)
    _, plain = one_step(model, make_optimizer(0.0, 0.0), batch, steps=3)
    _, regularized = one_step(model, make_optimizer(0.0, 1.0), batch, steps=3)
    assert_equal(plain.params, regularized.params)
    _, bare = one_step(tiny(), make_optimizer(), batch, steps=3)
    assert (bare.params["head"]["kernel"] != plain.params["head"]["kernel"]).any()


def test_masks_change_from_step_to_step(batch):
    model = tiny(dropout=0.5)
    frozen = Optimizer(optax.chain(optax.set_to_zero()), lambda count: 0.0, 0.0)
    state = init(model, frozen)
    state.params["head"]["kernel"] = jax.random.normal(jax.random.key(0), (8, 3))
    step = jax.jit(make_train_step(model, frozen, seed=0, log_every=1))
    losses = []
    for _ in range(3):
        state = step(state, batch)
        losses.append(float(state.metrics["loss"][0]))
    assert len(set(losses)) == 3


def test_running_statistics_come_from_the_first_gradient(batch):
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            x = nn.Dense(5)(images.reshape(images.shape[0], -1))
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            return nn.Dense(3)(x)

    model = Normed()
    before, after = one_step(model, make_optimizer(3.0, 1.0), batch)
    dense = before.params["Dense_0"]
    features = np.asarray(batch["input"]).reshape(16, -1) @ dense["kernel"] + dense["bias"]
    statistics = after.model_state["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(statistics["mean"], 0.1 * features.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(statistics["var"], 0.9 + 0.1 * features.var(0), rtol=1e-4)


def test_l2_is_in_both_gradients(batch):
    """Against SAM of the loss plus (λ/2)|θ|², written by hand; the loss reported is without it."""
    model, l2, radius = tiny(), 0.3, 0.7
    before, after = one_step(model, make_optimizer(radius, 1.0, l2=l2), batch, steps=2)

    def objective(params):
        logits = model.apply({"params": params}, batch["input"])
        picked = jax.nn.log_softmax(logits)[jnp.arange(16), batch["label"]]
        return -picked.mean() + l2 / 2 * sum(jnp.sum(x**2) for x in jax.tree.leaves(params))

    grad = jax.jit(jax.grad(objective))
    first = grad(before.params)
    norm = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(first)))
    second = grad(jax.tree.map(lambda p, g: p + radius * g / norm, before.params, first))
    expected = jax.tree.map(lambda p, g: p - LR * g, before.params, second)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        after.params,
        expected,
    )
    added = after.metrics["loss"][0] - before.metrics["loss"][0]
    weights = sum(jnp.sum(x**2) for x in jax.tree.leaves(before.params))
    np.testing.assert_allclose(added, objective(before.params) - l2 / 2 * weights, rtol=1e-4)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(1)
    return {
        "image": rng.integers(0, 256, (50, *SHAPE)).astype(np.uint8),
        "label": rng.integers(0, 3, 50).astype(np.int32),
    }


def run_calls(data, lengths, devices=1):
    """Train steps in calls of the given lengths; the state and the compiled call."""
    model, optimizer = tiny(dropout=0.1), make_optimizer(0.1, 0.5)
    mesh = make_mesh(devices, batch_size=16)
    batches = TrainBatches(50, 16, 0, PREPROCESSING)
    step = make_train_step(model, optimizer, seed=0, log_every=4)
    call = make_train_call(step, batches, max_steps=6, mesh=mesh)
    data = jax.device_put(data, replicated(mesh))
    state = jax.device_put(init(model, optimizer), replicated(mesh))
    for length in lengths:
        state, sums = call(state, data, length)
    return state, sums, call


def test_results_do_not_depend_on_where_calls_end_and_nothing_is_compiled_twice(data):
    together, sums, _ = run_calls(data, [6, 6])
    apart, other_sums, call = run_calls(data, [1, 2, 3, 5, 1])
    assert int(together.step) == int(apart.step) == 12
    assert_equal(together, apart)
    assert_equal(sums, other_sums)
    assert call._cache_size() == 1


def test_metrics_begin_anew_after_each_log_line(data):
    _, (sums, _), _ = run_calls(data, [6])  # log_every is 4
    assert float(sums["loss"][1]) == 2
    assert mean_metrics(sums)["ratio"] == 0.5


def compiled_text(call, state, data, devices):
    data = jax.device_put(data, replicated(make_mesh(devices, batch_size=16)))
    return call.lower(state, data, 6).compile().as_text()


def test_one_device_and_eight_agree(data):
    one, _, call = run_calls(data, [6], devices=1)
    assert "all-reduce(" not in compiled_text(call, one, data, 1)
    eight, _, call = run_calls(data, [6], devices=8)
    # A device has its share of the batch's 17 tokens an image, and gradients are summed over all.
    text = compiled_text(call, eight, data, 8)
    assert "all-reduce(" in text and "f32[2,17," in text and "f32[16,17," not in text
    assert eight.step.sharding.num_devices == 8
    # Sums over the batch are taken in another order: some ulps, grown over six steps.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        jax.device_get(one.params),
        jax.device_get(eight.params),
    )


@pytest.mark.parametrize("batch_size", [7, 50, 64])
@pytest.mark.parametrize("devices", [1, 8])
def test_evaluation_is_numpys_at_any_batch_size(data, batch_size, devices):
    model, optimizer = tiny(), make_optimizer()
    mesh = make_mesh(devices, batch_size=8)
    batch_size = -(-batch_size // devices) * devices
    batches = EvalBatches(50, batch_size, PREPROCESSING)
    state = init(model, optimizer)
    state.params["head"]["kernel"] = jax.random.normal(jax.random.key(5), (8, 3))
    images = ((data["image"] / 255 - 0.5) / 0.2).astype(np.float32)

    def mean_loss(params):
        logits = model.apply({"params": params}, images)
        return -jax.nn.log_softmax(logits)[jnp.arange(50), data["label"]].mean()

    state, arrays = jax.device_put((state, data), replicated(mesh))
    arguments = model, ResidentData({"a": arrays}, None, {"a": batches}, ""), "a", mesh, state
    values = mean_metrics(make_evaluate(*arguments)(state))
    params = jax.device_get(state.params)
    logits = jax.jit(model.apply)({"params": params}, images)
    errors = np.asarray(logits).argmax(1) != data["label"]
    assert values["error"] == pytest.approx(errors.mean(), abs=1e-6)
    np.testing.assert_allclose(values["loss"], mean_loss(params), rtol=1e-5)
    grads = jax.jit(jax.grad(mean_loss))(params)
    expected = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(grads)))
    norm = make_grad_norm(*arguments)(state)
    np.testing.assert_allclose(norm, expected, rtol=1e-5)


def test_the_batch_is_laid_over_the_mesh():
    mesh = make_mesh(8, batch_size=16)
    placed = jax.device_put(jnp.zeros((16, 2)), over_batch(mesh))
    assert placed.addressable_shards[0].data.shape == (2, 2)


def test_devices_that_do_not_fit():
    from gnp.errors import UserError

    with pytest.raises(UserError, match=r"config.mesh.data is 9, but there are 8 devices"):
        make_mesh(9, batch_size=18)
    with pytest.raises(UserError, match=r"batch_size is 9, which 8 devices do not divide"):
        make_mesh(-1, batch_size=9)
