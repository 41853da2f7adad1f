"""Loss, error and gradient norm over a whole data set."""

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gnp.data.pipeline import Batch, EvalBatches
from gnp.training.checkpoint import Checkpoints
from gnp.training.experiment import make_experiment
from gnp.training.sharding import over_batch, replicated
from gnp.training.state import MetricSums, TrainState, finite, mean_metrics
from gnp.training.step import cross_entropy, misclassified


def make_evaluate(model: nn.Module, batches: EvalBatches, mesh: Mesh) -> jax.stages.Wrapped:
    """Compiles `(state, data) -> sums` of the loss and the error over all examples."""

    def evaluate(state: TrainState, data: Batch) -> MetricSums:
        def batch_sums(i: jax.Array) -> tuple[jax.Array, jax.Array]:
            batch = jax.lax.with_sharding_constraint(batches.batch(data, i), over_batch(mesh))
            logits = _logits(model, state, state.params, batch)
            loss = jnp.sum(batch["weight"] * cross_entropy(logits, batch["label"]))
            return loss, jnp.sum(batch["weight"] * misclassified(logits, batch["label"]))

        losses, errors = jax.lax.map(batch_sums, jnp.arange(batches.num_batches))
        count = jnp.float32(batches.num_examples)
        return {"loss": (losses.sum(), count), "error": (errors.sum(), count)}

    return jax.jit(evaluate, out_shardings=replicated(mesh))


def make_grad_norm(model: nn.Module, batches: EvalBatches, mesh: Mesh) -> jax.stages.Wrapped:
    """Compiles `(state, data) ->` the norm of the gradient of the mean loss over all examples.

    ‖∇ (1/N) Σᵢ Lᵢ(θ)‖, a float32 scalar, with the model as in evaluation: no augmentation, no
    dropout, running statistics.
    """

    def grad_norm(state: TrainState, data: Batch) -> jax.Array:
        def batch_loss(params: Any, i: jax.Array) -> jax.Array:
            batch = jax.lax.with_sharding_constraint(batches.batch(data, i), over_batch(mesh))
            losses = cross_entropy(_logits(model, state, params, batch), batch["label"])
            return jnp.sum(batch["weight"] * losses) / batches.num_examples

        def add(i: jax.Array, total: Any) -> Any:
            return jax.tree.map(jnp.add, total, jax.grad(batch_loss)(state.params, i))

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        return optax.tree.norm(jax.lax.fori_loop(0, batches.num_batches, add, zeros))

    return jax.jit(grad_norm, out_shardings=replicated(mesh))


def _logits(model: nn.Module, state: TrainState, params: Any, batch: Batch) -> jax.Array:
    variables = {"params": params, **state.model_state}
    logits = model.apply(variables, batch["image"], train=False)
    assert isinstance(logits, jax.Array)  # no collection is mutable
    return logits


def evaluate_checkpoint(
    config: ConfigDict, workdir: str | pathlib.Path, *, step: int | None = None
) -> dict[str, Any]:
    """Evaluates a checkpoint on all training and all test images, without augmentation.

    Args:
      config: the run's.
      workdir: the run's directory.
      step: which checkpoint; by default the newest.

    Returns:
      {"step", "train", "test"}, where each split has "loss", "error" (a fraction), "grad_norm"
      (‖∇ mean loss‖ over the split) and "num_examples".

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
    values: dict[str, Any] = {"step": int(state.step)}
    for split, batches in data.eval_batches.items():
        evaluate = make_evaluate(experiment.model, batches, experiment.mesh)
        grad_norm = make_grad_norm(experiment.model, batches, experiment.mesh)
        values[split] = {
            **mean_metrics(evaluate(state, data.arrays[split])),
            "grad_norm": finite(float(grad_norm(state, data.arrays[split]))),
            "num_examples": batches.num_examples,
        }
    return values
