"""Floating-point operations: what a model and a step ask for, and what a device can do."""

import functools
import math
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params

# Sides of the square matrices that `matmul_rate` multiplies, and a product's longest time.
_SIZES = {"cpu": (256, 512, 1024, 2048)}
_SIZES_OF_ACCELERATORS = (2048, 8192)
_PRODUCT_SECONDS = 0.1
_BLOCKS = 5  # the best of which counts


def multiply_adds(jaxpr: Jaxpr | ClosedJaxpr) -> int:
    """The multiply-adds of a program's convolutions and matrix products.

    A loop of known length counts as often as it runs, a conditional as its largest branch, and a
    `while` loop, whose length is not known, once. As papers count, products with the zeros around
    an image are in it; those with the zeros that a strided convolution's gradient puts between its
    inputs are not.
    """
    return sum(map(_of_operation, getattr(jaxpr, "jaxpr", jaxpr).eqns))


def _of_operation(operation: JaxprEqn) -> int:
    name, params = operation.primitive.name, operation.params
    values: list[Any] = [value.aval for value in (*operation.outvars, *operation.invars)]
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        result, left, _ = values
        return result.size * math.prod(left.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        # A result sees the kernel's height and width, and the inputs of its own group alone, which
        # are those that the kernel has.
        _, *summed = params["dimension_numbers"].rhs_spec
        result, _, kernel = values
        count = result.size * math.prod(kernel.shape[axis] for axis in summed)
        return count // math.prod(params["lhs_dilation"])
    inner = [multiply_adds(jaxpr) for jaxpr in jaxprs_in_params(params)]
    if name == "cond":
        return max(inner)
    return params.get("length", 1) * sum(inner)


def forward_flops(model: nn.Module, variables: Any, inputs: Any) -> float:
    """FLOPs of one forward pass in evaluation, of the whole batch: 2 for each multiply-add.

    Nothing is computed: `variables` and `inputs` may be shapes (`jax.ShapeDtypeStruct`).
    """
    apply = functools.partial(model.apply, train=False)
    return 2.0 * multiply_adds(jax.make_jaxpr(apply)(variables, inputs))


def step_flops(forward: float, gradients: float) -> float:
    """FLOPs of a step that takes so many gradients: 3 · forward · gradients.

    A gradient is a forward pass and a backward one of twice its FLOPs: each matrix product has a
    gradient for both of its factors. The convention of Kaplan et al. 2020 (arXiv:2001.08361,
    Section 2.1), and of PaLM's model FLOPs utilization (arXiv:2204.02311, Appendix B): what is
    computed again to save memory does not count, so that it lowers the utilization. The first
    layer's gradient for its input counts, though it is never computed.

    Args:
      forward: FLOPs of a forward pass, of all examples of the step.
      gradients: how many the step takes, in the mean; 2 with gradient regularization.
    """
    return 3.0 * forward * gradients


def matmul_rate(
    dtype: jax.typing.DTypeLike, device: jax.Device | None = None, seconds: float = 0.2
) -> float:
    """FLOP/s of a product of two square matrices, measured: 2 n³ / time, n up to 8192 (CPU: 2048).

    The best of several blocks of products, where n is as large as lets a product last 0.1 s. With
    JAX's default precision, as in the models: float32 is TensorFloat-32 on GPUs that have it.

    Args:
      dtype: of the matrices.
      device: the first local one by default.
      seconds: how long is measured, about; compiling and finding n come on top.
    """
    device = device or jax.local_devices()[0]
    sizes = _SIZES.get(device.platform, _SIZES_OF_ACCELERATORS)
    for size, larger in zip(sizes, (*sizes[1:], None), strict=True):
        products = _Products(size, dtype, device)
        products.seconds(1)  # compiles
        product_seconds = products.seconds(1)
        if larger is None or product_seconds * (larger / size) ** 3 > _PRODUCT_SECONDS:
            break
    count = max(round(seconds / _BLOCKS / product_seconds), 1)
    best = min(products.seconds(count) for _ in range(_BLOCKS)) / count
    return 2 * size**3 / best


class _Products:
    """Products a (a (a … x)) on a device, each of which has to wait for the one before."""

    def __init__(self, size: int, dtype: jax.typing.DTypeLike, device: jax.Device):
        @jax.jit
        def draw(key: jax.Array) -> jax.Array:
            # Not zeros, which cost less power; with the variance 1/n products keep their size.
            bound = math.sqrt(3 / size)
            return jax.random.uniform(key, (2, size, size), dtype, -bound, bound)

        self._a, self._x = draw(jax.device_put(jax.random.key(0, impl="rbg"), device))
        self._multiply = jax.jit(jnp.matmul)

    def seconds(self, count: int) -> float:
        """The time of so many."""
        x = jax.block_until_ready(self._x)
        began = time.perf_counter()
        for _ in range(count):
            x = self._multiply(self._a, x)
        jax.block_until_ready(x)
        return time.perf_counter() - began
