"""A language model in step and evaluation: its state is carried, and each word counts once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnp import models, transforms
from gnp.data.loading import ResidentData
from gnp.data.text import TextEvalBatches, TextTrainBatches
from gnp.training.evaluation import make_evaluate, make_grad_norm
from gnp.training.optimizer import Optimizer
from gnp.training.sharding import make_mesh, replicated
from gnp.training.state import mean_metrics
from gnp.training.step import init_state, make_train_call, make_train_step

WORDS, TEXT = 6, np.random.default_rng(0).integers(0, 6, 101).astype(np.int32)
STREAMS, LENGTH = 8, 3


def make(rate, radius=0.0):
    model = models.create("lstm", WORDS, embedding_size=4, hidden_size=5, dropout=0.0)
    gr = transforms.gradient_regularization(radius, 1.0 if radius else 0.0)
    optimizer = Optimizer(optax.chain(gr, optax.sgd(rate)), lambda count: rate, 0.0)
    example = jnp.zeros((STREAMS, 1), jnp.int32)
    state = jax.jit(lambda: init_state(model, optimizer, example, seed=0))()
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state.params)
    return model, optimizer, state.replace(params=params)


def run(state, model, optimizer, steps, devices=1):
    mesh = make_mesh(devices, batch_size=STREAMS)
    batches = TextTrainBatches(len(TEXT), STREAMS, LENGTH)
    step = make_train_step(model, optimizer, seed=0, log_every=100)
    call = make_train_call(step, batches, max_steps=steps, mesh=mesh)
    state, text = jax.device_put((state, {"word": TEXT}), replicated(mesh))
    return call(jax.tree.map(jnp.copy, state), text, steps)


def long_pass(model, params, steps):
    """The logits and the state after all words of so many steps, read at once."""
    starts = np.arange(STREAMS)[:, None] * len(TEXT) // STREAMS
    words = TEXT[(starts + np.arange(steps * LENGTH)) % len(TEXT)]
    return model.apply({"params": params}, words, mutable=["carry"])


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_training_goes_on_where_the_last_step_ended():
    """At a learning rate of 0, three steps read the text as one pass does."""
    model, optimizer, state = make(rate=0.0)
    after, _ = run(state, model, optimizer, steps=3)
    _, carried = long_pass(model, state.params, steps=3)
    assert_close(after.model_state, dict(carried), rtol=1e-5, atol=1e-6)


def test_the_state_is_that_of_the_first_gradient():
    """A second gradient far away writes nothing; the update is that at the place far away."""
    model, optimizer, state = make(rate=1.0, radius=5.0)
    after, _ = run(state, model, optimizer, steps=1)
    _, carried = long_pass(model, state.params, steps=1)
    assert_close(after.model_state, dict(carried), rtol=1e-5, atol=1e-6)

    batches = TextTrainBatches(len(TEXT), STREAMS, LENGTH)
    batch = batches.batch({"word": TEXT}, jnp.int32(0), jnp.int32(0))

    @jax.jit
    @jax.grad
    def grad(params):
        logits = model.apply({"params": params}, batch["input"])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][..., None], 2).mean()

    first = grad(state.params)
    scale = 5.0 / optax.tree.norm(first)
    far = jax.tree.map(lambda p, g: p + scale * g, state.params, first)
    expected = jax.tree.map(jnp.subtract, state.params, grad(far))
    assert_close(after.params, expected, rtol=1e-4, atol=1e-5)


def test_one_device_and_eight_agree():
    model, optimizer, state = make(rate=0.5, radius=0.1)
    (one, (metrics, _)), (eight, (metrics8, _)) = (
        run(state, model, optimizer, steps=4, devices=devices) for devices in (1, 8)
    )
    assert_close(one.params, eight.params, rtol=1e-4, atol=1e-5)
    assert mean_metrics(metrics)["loss"] == pytest.approx(mean_metrics(metrics8)["loss"], rel=1e-5)


@pytest.mark.parametrize(("num_streams", "devices"), [(1, 1), (3, 1), (3, 8)])
def test_evaluation_is_one_pass_over_each_stream(num_streams, devices):
    model, _, state = make(rate=0.0)
    mesh = make_mesh(devices, batch_size=8)
    rows = num_streams if devices == 1 else 8
    batches = TextEvalBatches(len(TEXT), num_streams, 4, rows)
    state, arrays = jax.device_put((state, {"word": TEXT}), replicated(mesh))
    arguments = model, ResidentData({"a": arrays}, None, {"a": batches}, ""), "a", mesh, state
    sums = make_evaluate(*arguments)(state)

    losses, wrong = [], []
    for words, labels in zip(
        np.array_split(TEXT[:-1], [34, 68][: num_streams - 1]),
        np.array_split(TEXT[1:], [34, 68][: num_streams - 1]),
        strict=True,
    ):
        logits = np.asarray(model.apply({"params": state.params}, words[None])[0], np.float64)
        log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        losses.extend(-log_probabilities[np.arange(len(labels)), labels])
        wrong.extend(logits.argmax(1) != labels)
    assert len(losses) == 100 == batches.num_examples
    assert mean_metrics(sums)["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert mean_metrics(sums)["error"] == pytest.approx(np.mean(wrong), abs=1e-6)
    assert np.isfinite(make_grad_norm(*arguments)(state))
