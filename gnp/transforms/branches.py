"""Branches that stay branches under `jax.vmap`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def if_any(
    predicate: jax.Array,
    true_fn: Callable[[Any], Any],
    false_fn: Callable[[Any], Any],
    operand: Any,
) -> Any:
    """`jax.lax.cond`, of which `true_fn` is the dear branch.

    Under `jax.vmap` a `lax.cond` computes both branches for the whole batch and chooses. This one
    computes `true_fn` only where the predicate holds for any member of the batch; then too each
    member gets the result of its own branch. Without `vmap` it is the `lax.cond`.

    Args:
      predicate: a boolean scalar.
      true_fn: of `operand`.
      false_fn: of `operand`; cheap, since it is computed in both cases under `vmap`.
      operand: a tree of arrays.
    """
    own = _own(predicate)

    def chosen(operand: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(own, a, b), true_fn(operand), false_fn(operand))

    return jax.lax.cond(_any(predicate), chosen, false_fn, operand)


@custom_vmap
def _any(predicate: jax.Array) -> jax.Array:
    """Whether the predicate holds for any member of the batch: one for all of them."""
    return predicate


@_any.def_vmap
def _any_of_batch(
    axis_size: int, in_batched: list[bool], predicate: jax.Array
) -> tuple[jax.Array, bool]:
    return _any(jnp.any(predicate, axis=0)), False


@custom_vmap
def _own(predicate: jax.Array) -> jax.Array:
    """Whether it holds for a member of a batch; true where there is no batch."""
    return jnp.ones_like(predicate)


@_own.def_vmap
def _own_in_batch(
    axis_size: int, in_batched: list[bool], predicate: jax.Array
) -> tuple[jax.Array, bool]:
    return predicate, True
