r"""The loss over a plane through the parameters, along filter-normalised random directions.

Reference: Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018, Section 4
(arXiv:1712.09913).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpy.typing import ArrayLike

_WHOLE = ("cls_token", "pos_embed")  # each is one filter
_ZEROED = ("bias", "scale", "gamma")  # what the names of biases, norms and layer scales hold


@jax.jit
def direction(key: jax.Array, params: Any) -> Any:
    r"""A random direction with the filter norms of the parameters.

    .. math::
      d_f \leftarrow \frac{d_f}{\|d_f\|} \|\theta_f\|, \qquad d \sim N(0, I)

    for each filter f, the weights that make one feature: of a kernel, dense or convolutional, all
    that lead to one output (its last axis; models keep the kernels of repeated blocks along a
    leading axis, which counts as separate kernels); of an embedding a word's row; a class token or
    a position embedding as a whole. Biases, the parameters of normalisation layers and layer scales
    stay as they are: their part is 0. So the picture does not depend on the scale of weights, which
    normalisation layers cancel.

    Args:
      key: a JAX random key.
      params: nested dictionaries as Flax makes them, or any tree; in one without names arrays of
        one axis or none count as biases, those of more as kernels.

    Returns:
      A tree of the shapes and dtypes of `params`.
    """
    vector, unravel = ravel_pytree(params)  # drawn at once: compiling it for each array takes long
    drawn = unravel(jax.random.normal(key, vector.shape, vector.dtype))
    return jax.tree_util.tree_map_with_path(_with_norms, drawn, params)


def filter_axes(path: tuple[Any, ...], ndim: int) -> tuple[int, ...] | None:
    """Along which axes an array's filters lie, None for one that directions leave out.

    Args:
      path: the array's place in the tree, as JAX gives it.
      ndim: how many axes it has.
    """
    name = str(getattr(path[-1], "key", "")) if path else ""
    if ndim < 2 or any(word in name for word in _ZEROED):
        return None
    if name in _WHOLE:
        return tuple(range(ndim))
    if name == "embedding":
        return (ndim - 1,)
    return (1,) if ndim == 3 else tuple(range(ndim - 1))


def _with_norms(path: tuple[Any, ...], drawn: jax.Array, x: jax.Array) -> jax.Array:
    """What has been drawn, with the filter norms of x."""
    axes = filter_axes(path, x.ndim)
    if axes is None:
        return jnp.zeros_like(x)

    def norm(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))

    return drawn / norm(drawn) * norm(x)


def loss_surface(
    loss: Callable[[Any], float],
    params: Any,
    directions: tuple[Any, Any],
    x: ArrayLike,
    y: ArrayLike,
) -> np.ndarray:
    r"""The losses :math:`L(\theta + x_j d_1 + y_i d_2)`.

    Cost: a loss for each point, about a third of a gradient.

    Args:
      loss: L, a function of the parameters.
      params: θ.
      directions: d₁ and d₂, as of `direction`.
      x: the places along d₁, [J].
      y: those along d₂, [I].

    Returns:
      float64[I, J], as `matplotlib`'s `contour(x, y, …)` takes it.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    values = [[loss(_moved(params, *directions, a, b)) for a in x] for b in y]
    return np.array(values, np.float64).reshape(y.size, x.size)


@jax.jit
def _moved(params: Any, first: Any, second: Any, a: float, b: float) -> Any:
    def move(p: jax.Array, d: jax.Array, e: jax.Array) -> jax.Array:
        return p + jnp.asarray(a, p.dtype) * d + jnp.asarray(b, p.dtype) * e

    return jax.tree.map(move, params, first, second)
