"""Loss, error and gradient norm over a whole data set."""

import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gnp.data.pipeline import Batch, EvalBatches
from gnp.data.text import TextEvalBatches
from gnp.training.checkpoint import Checkpoints
from gnp.training.experiment import make_experiment
from gnp.training.sharding import over_batch, replicated
from gnp.training.state import MetricSums, TrainState, finite
from gnp.training.step import cross_entropy, misclassified


def make_evaluate(
    model: nn.Module,
    batches: EvalBatches | TextEvalBatches,
    mesh: Mesh,
    state: TrainState,
    data: Batch,
) -> Callable[[TrainState, Batch], MetricSums]:
    """Compiles `(state, data) -> sums` of the loss and the error over all examples.

    A call for each batch, one after another without waiting: XLA's convolutions take 16 times as
    long in a loop on CPUs.

    Args:
      model: the model.
      batches: of the data set.
      mesh: the devices.
      state: one as the function will be given.
      data: the data set, as the function will be given it.
    """

    def evaluate_batch(
        state: TrainState, data: Batch, total: tuple[Any, jax.Array, jax.Array], i: jax.Array
    ) -> tuple[Any, jax.Array, jax.Array]:
        carry, losses, errors = total
        batch = jax.lax.with_sharding_constraint(batches.batch(data, i), over_batch(mesh))
        logits, carry = _logits(model, state, state.params, batch, carry)
        losses += jnp.sum(batch["weight"] * cross_entropy(logits, batch["label"]))
        errors += jnp.sum(batch["weight"] * misclassified(logits, batch["label"]))
        return carry, losses, errors

    def begin() -> tuple[Any, jax.Array, jax.Array]:
        batch = jax.eval_shape(batches.batch, data, jnp.int32(0))
        return _first_carry(model, state, batch), jnp.zeros(()), jnp.zeros(())

    first = jax.jit(begin, out_shardings=replicated(mesh))()
    count = jax.device_put(jnp.float32(batches.num_examples), replicated(mesh))
    compiled = (
        jax.jit(evaluate_batch, out_shardings=replicated(mesh))
        .lower(state, data, first, 0)
        .compile()
    )

    def evaluate(state: TrainState, data: Batch) -> MetricSums:
        total = first
        for i in range(batches.num_batches):
            total = compiled(state, data, total, i)
        _, losses, errors = total
        return {"loss": (losses, count), "error": (errors, count)}

    return evaluate


def make_grad_norm(
    model: nn.Module, batches: EvalBatches | TextEvalBatches, mesh: Mesh
) -> jax.stages.Wrapped:
    """Compiles `(state, data) ->` the norm of the gradient of the mean loss over all examples.

    ‖∇ (1/N) Σᵢ Lᵢ(θ)‖, a float32 scalar, with the model as in evaluation: no augmentation, no
    dropout, running statistics. A language model's gradient is truncated at the batches' ends.
    """

    def grad_norm(state: TrainState, data: Batch) -> jax.Array:
        def batch_loss(params: Any, carry: Any, i: jax.Array) -> tuple[jax.Array, Any]:
            batch = jax.lax.with_sharding_constraint(batches.batch(data, i), over_batch(mesh))
            logits, carry = _logits(model, state, params, batch, carry)
            losses = cross_entropy(logits, batch["label"])
            return jnp.sum(batch["weight"] * losses) / batches.num_examples, carry

        def add(total_carry: tuple[Any, Any], i: jax.Array) -> tuple[tuple[Any, Any], None]:
            total, carry = total_carry
            grads, carry = jax.grad(batch_loss, has_aux=True)(state.params, carry, i)
            return (jax.tree.map(jnp.add, total, grads), carry), None

        carry = _first_carry(model, state, batches.batch(data, jnp.int32(0)))
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        (total, _), _ = jax.lax.scan(add, (zeros, carry), jnp.arange(batches.num_batches))
        return optax.tree.norm(total)

    return jax.jit(grad_norm, out_shardings=replicated(mesh))


def _logits(
    model: nn.Module, state: TrainState, params: Any, batch: Batch, carry: Any
) -> tuple[jax.Array, Any]:
    """The logits of a batch, and what the model carries on to the next ({} if nothing)."""
    others = {name: value for name, value in state.model_state.items() if name != "carry"}
    logits, updated = model.apply(
        {"params": params, **others, **carry}, batch["input"], train=False, mutable=["carry"]
    )
    return logits, dict(updated)


def _first_carry(model: nn.Module, state: TrainState, batch: Batch) -> Any:
    """What a model carries before the first batch: zeros, or {} if it carries nothing."""
    shapes = jax.eval_shape(
        lambda state, batch: _logits(model, state, state.params, batch, {})[1], state, batch
    )
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def evaluate_checkpoint(
    config: ConfigDict, workdir: str | pathlib.Path, *, step: int | None = None
) -> dict[str, Any]:
    """Evaluates a checkpoint on all examples of every split, without augmentation.

    Args:
      config: the run's.
      workdir: the run's directory.
      step: which checkpoint; by default the newest.

    Returns:
      {"step", "train", "test"} and what other splits there are, where each has "loss", "error" (a
      fraction), for a language model "perplexity", "grad_norm" (‖∇ mean loss‖ over the split) and
      "num_examples".

    Raises:
      UserError: if there is no such checkpoint.
    """
    config = config.copy_and_resolve_references()
    config.mesh.data = 1  # wherever the run was trained, this may be another machine
    experiment = make_experiment(config)
    checkpoints = Checkpoints(pathlib.Path(workdir))
    state = checkpoints.restore(experiment.abstract_state(), step)
    checkpoints.close()
    data = experiment.load_data()
    values: dict[str, Any] = {"step": int(state.step), "unit": experiment.source.unit}
    for split, batches in data.eval_batches.items():
        evaluate = make_evaluate(
            experiment.model, batches, experiment.mesh, state, data.arrays[split]
        )
        grad_norm = make_grad_norm(experiment.model, batches, experiment.mesh)
        values[split] = {
            **experiment.mean_metrics(evaluate(state, data.arrays[split])),
            "grad_norm": finite(float(grad_norm(state, data.arrays[split]))),
            "num_examples": batches.num_examples,
        }
    return values
