"""The mean of a loss over many batches, as a function of the parameters, and its derivatives."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gnp.data.loading import Data
from gnp.data.pipeline import Batch
from gnp.training.compilation import compiled
from gnp.training.evaluation import eval_logits, first_carry
from gnp.training.sharding import over_batch
from gnp.training.state import TrainState
from gnp.training.step import cross_entropy

_AHEAD = 4  # batches that the devices have been given and not yet worked through

# (params, others, batch, carry) → (Σ wᵢ Lᵢ, (Σ wᵢ, carry)).
BatchLoss = Callable[[Any, Any, Any, Any], tuple[jax.Array, tuple[jax.Array, Any]]]


class MeanLoss:
    r"""The weighted mean of a loss over all examples of all batches.

    .. math::
      L(\theta) = \frac{\sum_b \sum_{i \in b} w_i L_i(\theta)}{\sum_b \sum_{i \in b} w_i}

    Gradients and Hessian-vector products are linear in the examples, so they are added up batch by
    batch, and are exact however the examples are cut into batches. Each is one program, compiled at
    its first call and called for every batch, a few ahead of the devices: what is streamed fits,
    and XLA's convolutions take 16 times as long in a loop on CPUs. Matrix products have the full
    precision of their dtype, also where accelerators would round to TF32 or bfloat16.

    A call goes over all batches once. A value takes about 1/3 of the time of a gradient, and a
    Hessian-vector product 2 to 3 times as long as one.

    Args:
      batch_loss: (params, others, batch, carry) → (Σ wᵢ Lᵢ of the batch, (Σ wᵢ, carry)), a function
        that JAX can trace. It is differentiated with respect to `params` alone, so what is carried
        from batch to batch counts as constant.
      batches: gives the batches, trees of arrays of the same shapes, anew at each call.
      carry: what is carried into the first batch.
      on_pass: called when all batches have been gone through once.

    Attributes:
      num_examples: Σ wᵢ as of the last call.
    """

    def __init__(
        self,
        batch_loss: BatchLoss,
        batches: Callable[[], Iterable[Any]],
        *,
        carry: Any = (),
        on_pass: Callable[[], None] = lambda: None,
    ):
        self._batch_loss, self._batches, self._carry = batch_loss, batches, carry
        self._on_pass = on_pass
        self._programs: dict[Any, jax.stages.Compiled] = {}
        self.num_examples = 0.0

    def value(self, params: Any, others: Any = None) -> float:
        """L(θ), summed over the batches in float64."""
        return self._mean(self._add_value, (), (params, others))[0]

    def value_and_grad(self, params: Any, others: Any = None) -> tuple[float, Any]:
        """L(θ) and ∇L(θ)."""
        return self._mean(self._add_grad, _zeros_like(params), (params, others))

    def hvp(self, params: Any, vector: Any, others: Any = None) -> Any:
        """The Hessian-vector product ∇²L(θ) v, forward over reverse mode: exact to rounding.

        Args:
          params: θ.
          vector: v, of the shapes and dtypes of θ.
          others: what the loss depends on beside θ, such as running statistics.
        """
        return self._mean(self._add_hvp, _zeros_like(params), (params, others, vector))[1]

    def _add_value(self, total: Any, carry: Any, batch: Any, params: Any, others: Any) -> Any:
        loss, (weight, carry) = self._batch_loss(params, others, batch, carry)
        return total, carry, loss, weight

    def _add_grad(self, total: Any, carry: Any, batch: Any, params: Any, others: Any) -> Any:
        (loss, (weight, carry)), grads = jax.value_and_grad(self._batch_loss, has_aux=True)(
            params, others, batch, carry
        )
        return jax.tree.map(jnp.add, total, grads), carry, loss, weight

    def _add_hvp(
        self, total: Any, carry: Any, batch: Any, params: Any, others: Any, vector: Any
    ) -> Any:
        def grad(params: Any) -> Any:
            return jax.grad(self._batch_loss, has_aux=True)(params, others, batch, carry)

        _, product, (weight, carry) = jax.jvp(grad, (params,), (vector,), has_aux=True)
        # The loss itself is not asked for.
        return jax.tree.map(jnp.add, total, product), carry, jnp.zeros_like(weight), weight

    def _mean(
        self, add: Callable[..., Any], total: Any, arguments: tuple[Any, ...]
    ) -> tuple[float, Any]:
        """The loss and what `add` adds up, over the sum of the weights."""
        carry, losses, weights = self._carry, [], []
        with contextlib.closing(_closable(self._batches())) as batches:
            for batch in batches:
                program = self._program(add, (total, carry, batch, *arguments))
                total, carry, loss, weight = program(total, carry, batch, *arguments)
                losses.append(loss)
                weights.append(weight)
                jax.block_until_ready(weights[-_AHEAD:][0])
        self.num_examples = float(np.sum(jax.device_get(weights), dtype=np.float64))
        mean = float(np.sum(jax.device_get(losses), dtype=np.float64)) / self.num_examples
        self._on_pass()
        return mean, jax.tree.map(lambda x: x / self.num_examples, total)

    def _program(self, add: Callable[..., Any], arguments: tuple[Any, ...]) -> jax.stages.Compiled:
        name = add.__name__
        if name not in self._programs:
            with jax.default_matmul_precision("highest"):
                lowered = jax.jit(add, donate_argnums=0).lower(*arguments)
            self._programs[name] = compiled(lowered)
        return self._programs[name]


def split_loss(
    model: nn.Module,
    data: Data,
    split: str,
    mesh: Mesh,
    state: TrainState,
    *,
    max_examples: int | None = None,
    on_pass: Callable[[], None] = lambda: None,
) -> MeanLoss:
    """The mean cross-entropy over a split, as in evaluation.

    No augmentation, no dropout, no L2 penalty; BatchNorm has the running statistics, which are
    among the `others` of the loss, `TrainState.model_state`. A language model's gradients are
    truncated at the batches' ends.

    Args:
      model: the model.
      data: the data set.
      split: which part of it.
      mesh: the devices.
      state: one with the shapes of those that the loss will be asked about.
      max_examples: only the first so many of the split, in its own order.
      on_pass: as of `MeanLoss`.
    """
    source, inputs = data.eval_batches[split], data.eval_input(split)
    wanted = source.num_examples if max_examples is None else max_examples
    # Those of a batch, or about so many: none is missing, the last batches may hold nothing.
    in_a_batch = -(-source.num_examples // source.num_batches)
    num_batches = min(-(-wanted // in_a_batch), source.num_batches)

    def batches() -> Iterator[Any]:
        with contextlib.closing(data.eval_feed(split)) as feed:
            for i in range(num_batches):
                yield feed.get(), np.int32(i)

    def batch_loss(params: Any, others: Any, inputs: Any, carry: Any) -> Any:
        batch: Batch = source.batch(*inputs)
        batch = jax.lax.with_sharding_constraint(batch, over_batch(mesh))
        before, carry = carry
        weight = batch["weight"]
        weight *= before + jnp.cumsum(weight).reshape(weight.shape) <= wanted
        logits, carry = eval_logits(model, others, params, batch, carry)
        loss = jnp.sum(weight * cross_entropy(logits, batch["label"]))
        return loss, (weight.sum(), (before + weight.sum(), carry))

    shapes = jax.eval_shape(source.batch, inputs, jnp.int32(0))
    carry = jnp.zeros(()), first_carry(model, state, shapes)
    return MeanLoss(batch_loss, batches, carry=carry, on_pass=on_pass)


def _zeros_like(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


def _closable(batches: Iterable[Any]) -> Generator[Any, None, None]:
    yield from batches
