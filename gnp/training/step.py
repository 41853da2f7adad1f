"""The train step, a pure function of arrays, and its compiled form."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gnp.data.pipeline import Batch
from gnp.training.optimizer import Optimizer
from gnp.training.sharding import over_batch, over_microbatches, replicated
from gnp.training.state import (
    MetricSums,
    NonFinite,
    Report,
    TrainState,
    add_metrics,
    averaged,
)


class _Pass(NamedTuple):
    """What a forward pass gives beside the gradient."""

    metrics: dict[str, jax.Array]  # means over the examples
    model_state: Any


def make_train_step(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    seed: jax.typing.ArrayLike,
    log_every: int,
    mesh: Mesh | None = None,
    accumulate: int = 1,
    num_groups: int | None = None,
    ema_decay: jax.typing.ArrayLike | None = None,
    nonfinite_limit: int | None = 1,
    generator: Any = "rbg",
) -> Callable[[TrainState, Batch], TrainState]:
    """The train step: one update, for every model and method.

    Loss and error are those at the parameters before the update, of the first gradient; running
    statistics and a carried state come from its forward pass. A second gradient, if the optimizer
    takes one, sees the same batch, masks and carried state, and writes neither.

    With `accumulate` k the batch is gone through in k parts, of which part j has the examples
    j, j + k, …, so that each device has rows of every part. Both gradients are the mean over all
    of them, so the update is that of the whole batch, up to rounding; BatchNorm's statistics are
    those of each part, and running ones move towards the parts' mean.

    With `num_groups` m (m-sharpness) the batch is cut into m successive parts, each with its own
    gradient and perturbation; the optimizer's first transform gets the m gradients on a leading
    axis and gives their mean.

    The average of the parameters and the running statistics, with t the updates made:
    ema ← d ema + (1 − d) θ, d = min(`ema_decay`, (1 + t) / (10 + t)).

    A step whose loss or squared gradient norms are not finite is left out: parameters and optimizer
    stay as they are, and the next step takes the next batch. After `nonfinite_limit` such steps in
    a row the state stays at the last of them, whatever batches come: `step` and `data_step` are
    those of the step that failed.

    Args:
      model: a Flax Linen module as `gnp.models.create` makes it, inputs to logits.
      optimizer: as `optimizer.build` makes it.
      seed: of dropout and stochastic depth, with the step.
      log_every: the metrics' sums begin anew after each multiple of so many steps.
      mesh: the devices that the parts are laid over; None for one.
      accumulate: k.
      num_groups: m, the `num_groups` of the optimizer's gradient regularization.
      ema_decay: None for no average.
      nonfinite_limit: 1 or more; None for steps that are not checked.
      generator: of the masks' random bits, as `jax.random.key` names it.
    """

    def gradient(params: Any, model_state: Any, batch: Batch, key: jax.Array) -> tuple[Any, _Pass]:
        """The gradient of the mean loss over examples that are gone through at once."""

        def loss_fn(params: Any) -> tuple[jax.Array, _Pass]:
            params = optimizer.without_frozen(params)
            logits, updated = model.apply(
                {"params": params, **model_state},
                batch["input"],
                train=True,
                rngs={"dropout": key},
                mutable=list(model_state),
            )
            metrics = {name: x.mean() for name, x in scores(logits, batch["label"]).items()}
            return metrics["loss"] + optimizer.l2_penalty(params), _Pass(metrics, updated)

        return jax.grad(loss_fn, has_aux=True)(params)

    def train_step(state: TrainState, batch: Batch) -> TrainState:
        # Masks want many random bits and no more: "rbg" is the generator that is cheapest to draw
        # from.
        key = jax.random.fold_in(jax.random.key(seed, impl=generator), state.data_step)
        whole_batch = _Parts(accumulate, num_groups, mesh)
        grad = functools.partial(whole_batch.mean, gradient, state.model_state, batch, key)
        grads, (metrics, model_state) = grad(state.params, stacked=False)
        updates, opt_state = optimizer.tx.update(
            grads,
            state.opt_state,
            state.params,
            grad_fn=lambda params: grad(params, stacked=num_groups is not None)[0],
        )
        params = optax.apply_updates(state.params, updates)
        one = jnp.ones((), jnp.float32)
        updates_made = state.step - state.nonfinite.total
        metrics["weight_norm"] = optax.tree.norm(state.params)
        values: MetricSums = {
            **{name: (value, one) for name, value in metrics.items()},
            **optimizer.report(opt_state, updates_made),
        }
        if "grad_norm" not in values:
            values["grad_norm"] = (optax.tree.norm(grads), one)
        ema = None
        if ema_decay is not None:
            decay = jnp.minimum(ema_decay, (1 + updates_made) / (10 + updates_made))
            ema = jax.tree.map(
                lambda a, x: decay * a + (1 - decay) * x, state.ema, averaged(params, model_state)
            )
        # A square that overflows would stay in the optimizer's second moments for ever.
        norms = [values[x][0] for x in ("grad_norm", "perturbed_grad_norm") if x in values]
        checked = [values["loss"][0], *map(jnp.square, norms)]
        values["skipped"] = (jnp.zeros(()), one)
        restart = state.step % log_every == 0
        updated = state.replace(
            step=state.step + 1,
            data_step=state.data_step + 1,
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            metrics=add_metrics(state.metrics, values, restart=restart),
            nonfinite=state.nonfinite._replace(in_a_row=jnp.zeros((), jnp.int32)),
            ema=ema,
        )
        if nonfinite_limit is None:
            return updated
        stays = state.nonfinite.in_a_row >= nonfinite_limit
        kept = _left_out(state, values, restart=restart, limit=nonfinite_limit)
        kept = jax.tree.map(lambda a, b: jnp.where(stays, a, b), state, kept)
        good = jnp.isfinite(jnp.stack(checked)).all() & ~stays
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), updated, kept)

    return train_step


def _left_out(
    state: TrainState, values: MetricSums, *, restart: jax.Array, limit: int
) -> TrainState:
    """The state after a step that is left out; where it was the last that may be, that before."""
    in_a_row = state.nonfinite.in_a_row + 1
    goes_on = (in_a_row < limit).astype(jnp.int32)
    none = {name: (jnp.zeros(()), jnp.zeros(())) for name in values}
    none["skipped"] = (jnp.ones(()), goes_on.astype(jnp.float32))
    return state.replace(
        step=state.step + goes_on,
        data_step=state.data_step + goes_on,
        metrics=add_metrics(state.metrics, none, restart=restart),
        nonfinite=NonFinite(in_a_row, state.nonfinite.total + goes_on),
    )


class _Parts(NamedTuple):
    """How a batch is gone through: in parts one after another, each in groups side by side."""

    accumulate: int
    num_groups: int | None
    mesh: Mesh | None

    def mean(
        self,
        gradient: Callable[[Any, Any, Batch, jax.Array], tuple[Any, _Pass]],
        model_state: Any,
        batch: Batch,
        key: jax.Array,
        params: Any,
        *,
        stacked: bool,
    ) -> tuple[Any, _Pass]:
        """The gradient over all parts, of each group by itself, and the means of the rest.

        Args:
          gradient: of examples that are gone through at once.
          model_state: a collection "carry" has a row for each of the batch.
          batch: whose leaves have the examples along the first axis.
          key: of the masks; another one is made of it for each part.
          params: where the gradients are taken.
          stacked: whether each group has its own parameters, along a leading axis.
        """
        if self.accumulate == 1 and self.num_groups is None:
            return gradient(params, model_state, batch, key)
        carry = {name: x for name, x in model_state.items() if name == "carry"}
        shared = {name: x for name, x in model_state.items() if name != "carry"}

        def part(inputs: tuple[Batch, Any, jax.Array]) -> tuple[Any, _Pass]:
            batch, carry, keys = inputs

            def group(params: Any, batch: Batch, carry: Any, key: jax.Array) -> tuple[Any, _Pass]:
                return gradient(params, shared | carry, batch, key)

            if self.num_groups is not None:
                group = jax.vmap(group, in_axes=(0 if stacked else None, 0, 0, 0))
            return group(params, batch, carry, keys)

        def body(total: Any, inputs: Any) -> tuple[Any, Any]:
            grads, (metrics, updated) = part(inputs)
            carry = {name: updated.pop(name) for name in list(updated) if name == "carry"}
            terms = grads, metrics, updated
            return jax.tree.map(lambda a, x: a + x / self.accumulate, total, terms), carry

        shape = (self.accumulate, *(() if self.num_groups is None else (self.num_groups,)))
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(math.prod(shape)))
        inputs = (*jax.tree.map(self._split, (batch, carry)), keys.reshape(shape))
        first = jax.tree.map(lambda x: x[0], inputs)
        grads, (metrics, updated) = jax.eval_shape(part, first)
        updated.pop("carry", None)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, metrics, updated))
        if self.accumulate == 1:  # XLA's convolutions take 16 times as long in a loop on CPUs
            (grads, metrics, updated), carry = body(zeros, first)
            carry = jax.tree.map(lambda x: x[None], carry)
        else:
            (grads, metrics, updated), carry = jax.lax.scan(body, zeros, inputs)
        if self.num_groups is not None:
            metrics, updated = jax.tree.map(lambda x: x.mean(axis=0), (metrics, updated))
        return grads, _Pass(metrics, updated | jax.tree.map(self._join, carry))

    def _split(self, x: jax.Array) -> jax.Array:
        """[B, …] as [accumulate, groups, rows, …], or without the groups' axis."""
        groups = self.num_groups or 1
        x = x.reshape(groups, -1, self.accumulate, *x.shape[1:])
        x = jnp.moveaxis(x, 2, 0)
        if self.num_groups is None:
            x = x[:, 0]
        if self.mesh is not None and x.shape[1] % self.mesh.size == 0:
            x = jax.lax.with_sharding_constraint(x, over_microbatches(self.mesh))
        return x

    def _join(self, x: jax.Array) -> jax.Array:
        """The inverse of `_split`."""
        if self.num_groups is None:
            x = x[:, None]
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(-1, *x.shape[3:])


def init_state(
    model: nn.Module,
    optimizer: Optimizer,
    example: jax.Array,
    seed: jax.typing.ArrayLike,
    pretrained: Any = None,
    *,
    ema: bool = False,
) -> TrainState:
    """The state before the first step; a pure function of its arguments, to be jitted.

    Args:
      model: the model.
      optimizer: the optimizer.
      example: an input of the model.
      seed: of the model's initial variables.
      pretrained: variables to take in their place: a collection, or a part of one.
      ema: whether the state has an average of the parameters, which begins with the first ones.
    """
    # This generator compiles in a third of the time of the default one.
    key = jax.random.key(seed, impl="rbg")
    logits, variables = model.init_with_output(key, example)
    variables = _merge(variables, pretrained or {})
    params = variables.pop("params")
    opt_state = optimizer.tx.init(params)
    labels = jnp.zeros(logits.shape[:-1], jnp.int32)
    names = {"grad_norm", "weight_norm", "skipped"}
    names |= {*scores(logits, labels), *optimizer.report(opt_state, jnp.zeros((), jnp.int32))}
    # An array for each sum, and for each average: the step's donated buffers must not be shared.
    metrics = {name: (jnp.zeros(()), jnp.zeros(())) for name in sorted(names)}
    average = jax.tree.map(jnp.copy, averaged(params, variables)) if ema else None
    step, data_step, in_a_row, total = (jnp.zeros((), jnp.int32) for _ in range(4))
    return TrainState(
        *(step, data_step, params, variables, opt_state, metrics),
        nonfinite=NonFinite(in_a_row, total),
        ema=average,
    )


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
    state_sharding: Any = None,
) -> jax.stages.Wrapped:
    """Compiles up to `max_steps` train steps into one call, `(state, data, num_steps)`.

    The batches are those of a `gnp.data.loading.Data`, `data` is what its feed gives;
    `state_sharding` is how the state lies on the mesh, by default all of it on every device.

    `num_steps` is not a constant of the program: calls of every length run the same compiled
    step, so nothing is compiled twice and results do not depend on where calls end. With
    `max_steps` 1 there is no loop, and `num_steps` is not looked at. The state is donated. Also
    returns a `Report` in buffers of its own, which stay readable after the state has gone into the
    next call.
    """
    train_call = make_uncompiled_call(train_step, batches, max_steps=max_steps, mesh=mesh)
    everywhere = replicated(mesh)
    shardings = everywhere if state_sharding is None else state_sharding
    return jax.jit(train_call, donate_argnums=0, out_shardings=(shardings, everywhere))


def make_uncompiled_call(
    train_step: Callable[[TrainState, Batch], TrainState],
    batches: Any,
    *,
    max_steps: int,
    mesh: Mesh,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Report]]:
    """The function that `make_train_call` compiles."""

    def train_call(
        state: TrainState, data: Batch, num_steps: jax.Array
    ) -> tuple[TrainState, Report]:
        order = batches.order(state.data_step, max_steps)

        def body(i: jax.Array, state: TrainState) -> TrainState:
            batch = batches.batch(data, order[i], state.data_step)
            batch = jax.lax.with_sharding_constraint(batch, over_batch(mesh))
            return train_step(state, batch)

        if max_steps == 1:  # XLA's convolutions take 16 times as long in a loop on CPUs
            state = body(jnp.int32(0), state)
        else:
            state = jax.lax.fori_loop(0, num_steps, body, state)
        return state, Report(state.metrics, state.nonfinite)

    return train_call


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


def scores(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """The metrics of each example: "loss", "error" and, of images of more than 5 classes, a third.

    "top5_error" is 1 where five or more classes have larger logits than the (most probable) label.

    Args:
      logits: [B, K], or [B, T, K].
      labels: as of `cross_entropy`.
    """
    values = {"loss": cross_entropy(logits, labels), "error": misclassified(logits, labels)}
    if logits.ndim == 2 and logits.shape[-1] > 5:
        if jnp.issubdtype(labels.dtype, jnp.floating):
            labels = labels.argmax(axis=-1)
        own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
        before = (logits > own).sum(axis=-1)
        wrong = (before >= 5) | ~jnp.isfinite(logits).all(axis=-1)
        values["top5_error"] = wrong.astype(jnp.float32)
    return values
