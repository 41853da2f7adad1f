"""Checksums of arrays' values, the same on any number of devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def named(tree: Any) -> dict[str, Any]:
    """The leaves by their paths, as "params/head/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def described(tree: Any) -> dict[str, tuple[str, list[int], int]]:
    """The dtype, the shape and the checksum of each array, by its path."""
    arrays = named(tree)
    sums = jax.device_get({name: checksum(x) for name, x in arrays.items()})
    return {
        name: (str(x.dtype), list(x.shape), int(sums[name]) & 0xFFFFFFFF)
        for name, x in arrays.items()
    }


def checksum(x: jax.Array) -> jax.Array:
    """Σ_i w_i b_i mod 2³², where b are the values' bits and w_i odd: a flipped bit changes it.

    A sum of whole numbers, the same in any order and on any number of devices.
    """
    mesh = getattr(x.sharding, "mesh", None)
    if mesh is None or mesh.size == 1:
        return _compiled(None)(x)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    # One at a time: on CPUs, whose devices share a pool of threads, reductions that do not wait for
    # one another may wait for each other's threads for ever.
    return jax.block_until_ready(_compiled(everywhere)(x))


@functools.cache
def _compiled(sharding: Any) -> Any:
    def total(x: jax.Array) -> jax.Array:
        if x.dtype == bool:
            x = x.astype(jnp.uint8)
        size = x.dtype.itemsize
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(size, 4)}"))
        bits = bits.astype(jnp.uint32)  # of 64 bits, two on a last axis
        place = jnp.zeros(bits.shape, jnp.uint32)
        for axis, length in enumerate(bits.shape):
            place = place * np.uint32(length) + jax.lax.broadcasted_iota(
                jnp.uint32, bits.shape, axis
            )
        return jnp.sum(bits * (place * np.uint32(0x9E3779B1) | np.uint32(1)), dtype=jnp.uint32)

    return jax.jit(total, out_shardings=sharding)
