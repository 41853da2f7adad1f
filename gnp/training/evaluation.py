"""Loss, error and gradient norm over a whole data set."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gnp.data.loading import Data
from gnp.data.pipeline import Batch
from gnp.errors import UserError
from gnp.training.checkpoint import Checkpoints, best_step
from gnp.training.compilation import compiled
from gnp.training.experiment import make_experiment, on_one_device
from gnp.training.metrics import MetricsWriter
from gnp.training.sharding import over_batch, replicated
from gnp.training.state import MetricSums, TrainState, finite, with_average
from gnp.training.step import cross_entropy, scores
from gnp.training.workdir import essential

_AHEAD = 4  # batches that the devices have been given and not yet worked through


def make_evaluate(
    model: nn.Module, data: Data, split: str, mesh: Mesh, state: TrainState
) -> Callable[..., MetricSums | None]:
    """Compiles `state -> sums` of the loss and the errors over all examples of a split.

    A second argument, a function, is asked at each batch whether to stop; then the sums are None.

    A state with an average of the parameters also gives their sums, as "ema_loss" and so on.

    A call for each batch, a few ahead of the devices: XLA's convolutions take 16 times as long in
    a loop on CPUs.

    Args:
      model: the model.
      data: the data set.
      split: which part of it.
      mesh: the devices.
      state: one as the function will be given.
    """
    batches = data.eval_batches[split]

    def add(state: TrainState, inputs: Batch, total: _Total, i: jax.Array) -> _Total:
        batch = jax.lax.with_sharding_constraint(batches.batch(inputs, i), over_batch(mesh))
        logits, carry = eval_logits(model, state.model_state, state.params, batch, total.carry)
        values = scores(logits, batch["label"])
        return _Total(
            carry,
            total.num_examples + batch["weight"].sum(),
            {name: s + jnp.sum(batch["weight"] * values[name]) for name, s in total.sums.items()},
        )

    def zeros(state: TrainState) -> Any:
        names = ("loss", "error", "top5_error")
        return {name: jnp.zeros(()) for name in names if name in state.metrics}

    over_split = _make_sum(add, zeros, model, data, split, mesh, state)

    def evaluate(
        state: TrainState, stopping: Callable[[], bool] = lambda: False
    ) -> MetricSums | None:
        total = over_split(state, stopping)
        if total is None:
            return None
        sums = {name: (value, total.num_examples) for name, value in total.sums.items()}
        if state.ema is not None:
            total = over_split(with_average(state), stopping)
            if total is None:
                return None
            sums |= {f"ema_{name}": (s, total.num_examples) for name, s in total.sums.items()}
        return sums

    return evaluate


def make_grad_norm(
    model: nn.Module, data: Data, split: str, mesh: Mesh, state: TrainState
) -> Callable[[TrainState], jax.Array]:
    """Compiles `state ->` the norm of the gradient of the mean loss over all examples of a split.

    ‖∇ (1/N) Σᵢ Lᵢ(θ)‖, a float32 scalar, with the model as in evaluation: no augmentation, no
    dropout, running statistics. A language model's gradient is truncated at the batches' ends. The
    arguments are those of `make_evaluate`.
    """
    batches = data.eval_batches[split]

    def add(state: TrainState, inputs: Batch, total: _Total, i: jax.Array) -> _Total:
        batch = jax.lax.with_sharding_constraint(batches.batch(inputs, i), over_batch(mesh))

        def batch_loss(params: Any) -> tuple[jax.Array, Any]:
            logits, carry = eval_logits(model, state.model_state, params, batch, total.carry)
            return jnp.sum(batch["weight"] * cross_entropy(logits, batch["label"])), carry

        grads, carry = jax.grad(batch_loss, has_aux=True)(state.params)
        sums = jax.tree.map(jnp.add, total.sums, grads)
        return _Total(carry, total.num_examples + batch["weight"].sum(), sums)

    def zeros(state: TrainState) -> Any:
        return jax.tree.map(jnp.zeros_like, state.params)

    over_split = _make_sum(add, zeros, model, data, split, mesh, state)

    def grad_norm(state: TrainState) -> jax.Array:
        total = over_split(state)
        assert total is not None
        return optax.tree.norm(total.sums) / total.num_examples

    return grad_norm


class _Total(NamedTuple):
    """What has been added up over batches."""

    carry: Any  # what the model carries from batch to batch
    num_examples: jax.Array
    sums: Any


def _make_sum(
    add: Callable[[TrainState, Batch, _Total, jax.Array], _Total],
    zeros: Callable[[TrainState], Any],
    model: nn.Module,
    data: Data,
    split: str,
    mesh: Mesh,
    state: TrainState,
) -> Callable[..., _Total | None]:
    """Compiles `add`, which adds a batch, and calls it for all batches of a split."""
    batches, inputs = data.eval_batches[split], data.eval_input(split)
    batch = jax.eval_shape(batches.batch, inputs, jnp.int32(0))
    first = jax.jit(
        lambda state: _Total(first_carry(model, state, batch), jnp.zeros(()), zeros(state)),
        out_shardings=replicated(mesh),
    )(state)
    program = compiled(jax.jit(add, out_shardings=replicated(mesh)).lower(state, inputs, first, 0))

    def over_split(
        state: TrainState, stopping: Callable[[], bool] = lambda: False
    ) -> _Total | None:
        totals = [first]
        with contextlib.closing(data.eval_feed(split)) as feed:
            for i in range(batches.num_batches):
                totals = totals[-_AHEAD:]
                jax.block_until_ready(totals[0])  # a request to stop must not come too late
                if stopping():
                    return None
                totals.append(program(state, feed.get(totals[-1]), totals[-1], i))
        return totals[-1]

    return over_split


def eval_logits(
    model: nn.Module, model_state: Any, params: Any, batch: Batch, carry: Any
) -> tuple[jax.Array, Any]:
    """The logits of a batch, and what the model carries on to the next ({} if nothing)."""
    others = {name: value for name, value in model_state.items() if name != "carry"}
    logits, updated = model.apply(
        {"params": params, **others, **carry}, batch["input"], train=False, mutable=["carry"]
    )
    return logits, dict(updated)


def first_carry(model: nn.Module, state: TrainState, batch: Batch) -> Any:
    """What a model carries before the first batch: zeros, or {} if it carries nothing."""
    shapes = jax.eval_shape(
        lambda state, batch: eval_logits(model, state.model_state, state.params, batch, {})[1],
        *(state, batch),
    )
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def evaluate_checkpoint(
    config: ConfigDict, workdir: epath.PathLike, *, step: int | None = None
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
    experiment = make_experiment(on_one_device(config))
    checkpoints = Checkpoints(workdir, config=essential(config))
    state = checkpoints.restore(experiment.abstract_state, step)
    data = experiment.load_data()
    values: dict[str, Any] = {"step": int(state.step), "unit": experiment.source.unit}
    for split in data.eval_batches:
        arguments = experiment.model, data, split, experiment.mesh, state
        sums = make_evaluate(*arguments)(state)
        assert sums is not None  # nobody asks it to stop
        values[split] = {
            **experiment.mean_metrics(sums),
            "grad_norm": finite(float(make_grad_norm(*arguments)(state))),
            "num_examples": int(sums["loss"][1]),
        }
    return values


def find_step(config: ConfigDict, workdir: epath.PathLike, text: str | None) -> int | None:
    """The step that a command line names: a number, "best", or None for the newest.

    Raises:
      UserError: if it is none of these, or the run keeps no best checkpoint.
    """
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    if text != "best":
        raise UserError(f"--step={text}: write the number of a step, or best")
    metric = config.checkpoint.best
    if metric is None:
        raise UserError("--step=best: the run has no config.checkpoint.best to be judged by")
    rows = MetricsWriter(epath.Path(workdir), step=2**31, writes=False).history
    step = best_step(rows, metric, Checkpoints(workdir).steps())
    if step is None:
        raise UserError(f"--step=best: no checkpoint of {workdir} has been evaluated yet")
    return step
