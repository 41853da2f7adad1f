"""Norms and means that are right where squares and sums overflow or vanish.

In float32 the square of 2e19 is inf, and that of 1e-23 is 0. The plain sum is taken first; only
where it is out of range, it is taken anew of the tree times a power of two, under `lax.cond`:
ordinary inputs cost what they would without, and give the same bits. A tree with an inf or a NaN in
it has no finite norm or mean.

XLA takes numbers below the smallest normal one, 1.2e-38 in float32, for 0 on CPUs, and so does
what is here.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnp.transforms.branches import if_any


class ScaledNorm(NamedTuple):
    """The L2 norm of a tree, `scaled` / `scale`, which can be beyond the numbers of its dtype."""

    scaled: jax.Array
    scale: jax.Array

    def value(self) -> jax.Array:
        """The norm, at most the largest number of its dtype where the tree is finite."""
        return saturated(self.scaled / self.scale, self.scaled)

    def unit(self) -> tuple[jax.Array, jax.Array]:
        """A power of two, and the norm of the tree times it: about 2, or 0."""
        power = power_to_unit(self.value())
        return power, self.scaled * (power / self.scale)


@functools.partial(jax.jit, static_argnames="stacked")
def scaled_norm(tree: Any, *, stacked: bool = False) -> ScaledNorm:
    """The L2 norm over all leaves, in float32 at least.

    Args:
      tree: whose squares may overflow or vanish.
      stacked: whether the leaves have a leading axis of trees, each of which has its own norm.
    """

    def sum_of_squares(tree: Any) -> jax.Array:
        squares = (jnp.sum(jnp.square(wide(x))) for x in jax.tree.leaves(tree))
        return sum(squares, jnp.zeros((), jnp.float32))

    def rescaled(tree: Any, scale: jax.Array) -> Any:
        tree, scale = _unknown(tree, scale)
        return jax.tree.map(lambda x: times(scale, wide(x)), tree)

    if stacked:
        sum_of_squares, rescaled = jax.vmap(sum_of_squares), jax.vmap(rescaled)
    total = sum_of_squares(tree)
    number = jnp.finfo(total.dtype)
    # Squares below the smallest normal number are lost: a sum that is so much larger is right.
    lowest = _size(tree) * float(number.tiny) / float(number.eps)
    ordinary = (total > lowest) & (total < jnp.inf)
    scale = jnp.where(ordinary, 1, jnp.where(total > 1, _down(number), 1 / _down(number)))
    scale = scale.astype(total.dtype)
    scaled = if_any(
        ~jnp.all(ordinary),
        lambda tree: jnp.sqrt(sum_of_squares(rescaled(tree, scale))),
        lambda tree: jnp.sqrt(jnp.where(ordinary, total, 1)),
        tree,
    )
    return ScaledNorm(scaled, scale)


def mean_of_large(tree: Any, dtype: Any, *, power: int) -> jax.Array:
    """The mean over all elements of all leaves to a power, where their sum overflows.

    At most the largest number of the dtype, unless the tree is not finite.
    """
    exponent = round(math.log2(_down(jnp.finfo(dtype))))
    tree, scale = _unknown(tree, jnp.asarray(2.0**exponent, dtype))
    powers = (jnp.sum((scale * jnp.asarray(x, dtype)) ** power) for x in jax.tree.leaves(tree))
    scaled = sum(powers, jnp.zeros((), dtype)) / max(_size(tree), 1)
    # Not two divisions by a constant, which XLA would make one of by a constant that vanishes.
    mean = jnp.ldexp(scaled, -power * exponent)
    return saturated(mean, scaled)


def power_to_unit(x: jax.Array) -> jax.Array:
    """A power of two, to multiply by without rounding, times which `x` is about 2, or less."""
    number = jnp.finfo(x.dtype)
    power = jax.lax.reduce_precision(2 / x, number.nexp, mantissa_bits=0)
    return jnp.clip(power, float(number.tiny), 2.0 ** (number.maxexp - 1))


def largest(tree: Any) -> jax.Array:
    """The largest magnitude of all leaves, in float32 at least."""
    magnitudes = (jnp.max(jnp.abs(wide(x)), initial=0) for x in jax.tree.leaves(tree))
    return functools.reduce(jnp.maximum, magnitudes, jnp.zeros((), jnp.float32))


def wide(x: Any) -> jax.Array:
    """`x` in float32 at least."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def times(scale: jax.Array, x: jax.Array) -> jax.Array:
    """`scale` · `x` in the dtype of `x`."""
    return scale.astype(x.dtype) * x


def saturated(x: jax.Array, source: jax.Array, dtype: Any = None) -> jax.Array:
    """`x` within the finite numbers of a dtype, its own by default, where `source` is finite.

    Elsewhere `source`, so that what was not finite stays so.
    """
    dtype = x.dtype if dtype is None else dtype
    largest = float(jnp.finfo(dtype).max)
    return jnp.where(jnp.isfinite(source), jnp.clip(x, -largest, largest), source).astype(dtype)


def _unknown(tree: Any, scale: jax.Array) -> tuple[Any, jax.Array]:
    """Both as they are: were one a constant, XLA could take the square of each by itself."""
    return jax.lax.optimization_barrier((tree, scale))


def _down(number: Any) -> float:
    """A power of two that leaves a finite square of every number, 2⁻⁹⁶ in float32.

    Its inverse leaves one that does not vanish of every normal number.
    """
    return 2.0 ** (-3 * number.maxexp // 4)


def _size(tree: Any) -> int:
    return sum(jnp.size(x) for x in jax.tree.leaves(tree))
