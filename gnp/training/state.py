"""What a train step takes and returns, and a checkpoint holds."""

import hashlib
import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gnp.training.processes import whole

# name → (sum of values · weights, sum of weights), float32 scalars, since the last log line.
MetricSums = dict[str, tuple[jax.Array, jax.Array]]


class NonFinite(NamedTuple):
    """How many steps had a loss or a gradient that was not finite, int32 scalars."""

    in_a_row: jax.Array  # up to now
    total: jax.Array  # that were left out


class Report(NamedTuple):
    """What a call of the compiled program tells of the state that it has come to."""

    metrics: MetricSums
    nonfinite: NonFinite


class TrainState(flax.struct.PyTreeNode):
    """The whole state of a run. With the seed it determines all that follows.

    Attributes:
      step: updates made or left out, int32 scalar.
      data_step: the batch that comes next; more than `step` after a return to an older state.
      params: the model's parameters, float32.
      model_state: the model's other variables: BatchNorm's running statistics ("batch_stats"), a
        language model's state ("carry").
      opt_state: the optimizer's.
      metrics: sums of the training metrics since the last log line.
      nonfinite: steps that were left out.
      ema: moving average of the parameters and the running statistics, {"params", "batch_stats"};
        None if there is none.
    """

    step: jax.Array
    data_step: jax.Array
    params: Any
    model_state: Any
    opt_state: optax.OptState
    metrics: MetricSums
    nonfinite: NonFinite
    ema: Any = None


def averaged(params: Any, model_state: Any) -> Any:
    """What `TrainState.ema` averages: the variables that evaluation takes from training."""
    return {"params": params, **{k: v for k, v in model_state.items() if k != "carry"}}


def with_average(state: TrainState) -> TrainState:
    """The state with the averaged variables in place of those of training."""
    others = {name: x for name, x in state.ema.items() if name != "params"}
    return state.replace(params=state.ema["params"], model_state=state.model_state | others)


def num_params(params: Any) -> int:
    """The number of parameters."""
    return sum(x.size for x in jax.tree.leaves(params))


def params_sha256(params: Any) -> str:
    """SHA-256 over the parameters' bytes, in the order of their paths.

    Every process is to call it, since each may have only a part of them.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(whole(leaf)).tobytes())
    return digest.hexdigest()


def add_metrics(sums: MetricSums, values: MetricSums, *, restart: jax.Array) -> MetricSums:
    """Adds (value, weight) pairs to the sums, which begin anew where `restart` is true."""

    def add(total: jax.Array, term: jax.Array) -> jax.Array:
        return jnp.where(restart, 0, total) + term

    return {
        name: (add(sums[name][0], value * weight), add(sums[name][1], weight))
        for name, (value, weight) in values.items()
    }


def mean_metrics(sums: MetricSums) -> dict[str, float | None]:
    """The weighted means, on the host; None where there was no value, or it is not finite."""
    means = {}
    for name, (total, weight) in jax.device_get(sums).items():
        means[name] = finite(float(total) / float(weight)) if weight else None
    return means


def finite(value: float) -> float | None:
    """The value, or None where it is not finite, which JSON has no number for."""
    return value if math.isfinite(value) else None
