"""The train step, a pure function of arrays, and its compiled form."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gnp.data.pipeline import Batch
from gnp.training.optimizer import Optimizer
from gnp.training.sharding import over_batch, replicated
from gnp.training.state import MetricSums, TrainState, add_metrics


def make_train_step(
    model: nn.Module, optimizer: Optimizer, *, seed: int, log_every: int
) -> Callable[[TrainState, Batch], TrainState]:
    """The train step: one update, for every model and method.

    Loss and error are those at the parameters before the update, of the first gradient; running
    statistics and a carried state come from its forward pass. A second gradient, if the optimizer
    takes one, sees the same batch, masks and carried state, and writes neither.

    Args:
      model: a Flax Linen module as `gnp.models.create` makes it, inputs to logits.
      optimizer: as `optimizer.build` makes it.
      seed: of dropout and stochastic depth, with the step.
      log_every: the metrics' sums begin anew after each multiple of so many steps.
    """

    def train_step(state: TrainState, batch: Batch) -> TrainState:
        # Masks want many random bits and no more: the generator that is cheapest to draw from.
        key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), state.step)

        def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Any]]:
            logits, model_state = model.apply(
                {"params": params, **state.model_state},
                batch["input"],
                train=True,
                rngs={"dropout": key},
                mutable=list(state.model_state),
            )
            loss = cross_entropy(logits, batch["label"]).mean()
            error = misclassified(logits, batch["label"]).mean()
            objective = loss
            if optimizer.l2:
                objective += optimizer.l2 / 2 * optax.tree.norm(params, squared=True)
            return objective, (loss, error, model_state)

        grads, (loss, error, model_state) = jax.grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.tx.update(
            grads,
            state.opt_state,
            state.params,
            grad_fn=lambda params: jax.grad(loss_fn, has_aux=True)(params)[0],
        )
        one = jnp.ones((), jnp.float32)
        values: MetricSums = {
            "loss": (loss, one),
            "error": (error, one),
            "grad_norm": (optax.tree.norm(grads), one),
            "weight_norm": (optax.tree.norm(state.params), one),
            **optimizer.report(opt_state, state.step),
        }
        return state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            model_state=model_state,
            opt_state=opt_state,
            metrics=add_metrics(state.metrics, values, restart=state.step % log_every == 0),
        )

    return train_step


def init_state(
    model: nn.Module,
    optimizer: Optimizer,
    example: jax.typing.ArrayLike,
    seed: int,
    pretrained: Any = None,
) -> TrainState:
    """The state before the first step; a pure function of its arguments, to be jitted.

    Args:
      model: the model.
      optimizer: the optimizer.
      example: an input of the model.
      seed: of the model's initial variables.
      pretrained: variables to take in their place: a collection, or a part of one.
    """
    # This generator compiles in a third of the time of the default one.
    key = jax.random.key(seed, impl="rbg")
    variables = _merge(model.init(key, example), pretrained or {})
    params = variables.pop("params")
    opt_state = optimizer.tx.init(params)
    names = ["loss", "error", "grad_norm", "weight_norm"]
    names += optimizer.report(opt_state, jnp.zeros((), jnp.int32))
    # An array for each sum: the step's donated buffers must not be shared.
    metrics = {name: (jnp.zeros(()), jnp.zeros(())) for name in names}
    return TrainState(jnp.zeros((), jnp.int32), params, variables, opt_state, metrics)


def _merge(tree: Any, replacement: Any) -> Any:
    """A nested dictionary with those of its leaves replaced that `replacement` has."""
    if not isinstance(tree, dict):
        return replacement
    return tree | {key: _merge(tree[key], value) for key, value in replacement.items()}


def make_train_call(
    train_step: Callable[[TrainState, Batch], TrainState],
    batches: Any,
    *,
    max_steps: int,
    mesh: Mesh,
) -> jax.stages.Wrapped:
    """Compiles up to `max_steps` train steps into one call, `(state, data, num_steps)`.

    The batches are those of a `gnp.data.loading.Data`, `data` is what its feed gives.

    `num_steps` is not a constant of the program: calls of every length run the same compiled
    step, so nothing is compiled twice and results do not depend on where calls end. With
    `max_steps` 1 there is no loop, and `num_steps` is not looked at. The state is donated. Also
    returns the metrics' sums in buffers of their own, which stay readable after the state has gone
    into the next call.
    """

    def train_call(
        state: TrainState, data: Batch, num_steps: jax.Array
    ) -> tuple[TrainState, MetricSums]:
        order = batches.order(state.step, max_steps)

        def body(i: jax.Array, state: TrainState) -> TrainState:
            batch = batches.batch(data, order[i], state.step)
            batch = jax.lax.with_sharding_constraint(batch, over_batch(mesh))
            return train_step(state, batch)

        if max_steps == 1:  # XLA's convolutions take 16 times as long in a loop on CPUs
            state = body(jnp.int32(0), state)
        else:
            state = jax.lax.fori_loop(0, num_steps, body, state)
        return state, state.metrics

    return jax.jit(train_call, donate_argnums=0, out_shardings=replicated(mesh))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """−Σ_k p_k log softmax(logits)_k of each example: float32[B], or [B, T] of words.

    Args:
      logits: [B, K], or [B, T, K].
      labels: whole numbers, where p is 1 for the label and 0 for all others; or p itself,
        float[B, K].
    """
    logits = logits.astype(jnp.float32)
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return optax.softmax_cross_entropy(logits, labels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def misclassified(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1 where the largest logit is not the (most probable) label's, else 0: float32[B] or [B, T].

    Args:
      logits: [B, K], or [B, T, K].
      labels: as of `cross_entropy`.
    """
    if jnp.issubdtype(labels.dtype, jnp.floating):
        labels = labels.argmax(axis=-1)
    return (logits.argmax(axis=-1) != labels).astype(jnp.float32)
