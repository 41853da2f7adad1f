"""The order of training examples: a permutation for each epoch, one place at a time.

A permutation of N examples is a Feistel network over the numbers of b bits, 2^b ≥ N, that is
applied again to what falls outside of [0, N) ("cycle walking": J. Black and P. Rogaway, "Ciphers
with Arbitrary Finite Domains", CT-RSA 2002). No place depends on another, so a batch costs as much
as its own examples, and nothing is sorted. The host (NumPy) and the compiled step (JAX) get the
same numbers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ROUNDS = 8
_LEAST_BITS = 8  # below, there are too few different networks


def example_at(seed: int, places: np.ndarray, num_examples: int) -> np.ndarray:
    """The examples at places of the stream of all epochs, on the host.

    Place p is the (p mod N)-th of epoch ⌊p / N⌋, in which each example comes exactly once.

    Args:
      seed: of all epochs' permutations, below 2^32.
      places: whole numbers from 0, below 2^31.
      num_examples: N.

    Returns:
      int32 numbers below N, of the shape of `places`.
    """
    places = np.asarray(places, np.int64)
    keys = _round_keys(seed, (places // num_examples).astype(np.uint32))
    numbers = (places % num_examples).astype(np.uint32)
    numbers = _network(numbers, keys, num_examples)
    while (outside := numbers >= num_examples).any():
        numbers = np.where(outside, _network(numbers, keys, num_examples), numbers)
    return numbers.astype(np.int32)


def traced_example_at(
    seed: jax.typing.ArrayLike, places: jax.Array, num_examples: int
) -> jax.Array:
    """`example_at` in a compiled program: int32 places and examples; the seed may be traced too."""
    keys = _round_keys(seed, (places // num_examples).astype(jnp.uint32))
    numbers = _network((places % num_examples).astype(jnp.uint32), keys, num_examples)
    numbers = jax.lax.while_loop(
        lambda x: (x >= num_examples).any(),
        lambda x: jnp.where(x >= num_examples, _network(x, keys, num_examples), x),
        numbers,
    )
    return numbers.astype(jnp.int32)


def _network(numbers: Any, keys: list[Any], num_examples: int) -> Any:
    """A bijection of the numbers of b bits: each half in turn is XORed with a hash of the other."""
    bits = max((num_examples - 1).bit_length(), _LEAST_BITS)
    low_bits = bits // 2
    low_mask, high_mask = np.uint32(2**low_bits - 1), np.uint32(2 ** (bits - low_bits) - 1)
    low, high = numbers & low_mask, numbers >> np.uint32(low_bits)
    for i, key in enumerate(keys):
        if i % 2:
            high = high ^ (_mix(low ^ key) & high_mask)
        else:
            low = low ^ (_mix(high ^ key) & low_mask)
    return high << np.uint32(low_bits) | low


def _round_keys(seed: Any, epochs: Any) -> list[Any]:
    """A key for each round, of each epoch's network."""
    traced = isinstance(seed, jax.Array)
    seeds = seed.astype(jnp.uint32)[None] if traced else np.array([seed], np.uint32)
    start = _mix(epochs + _mix(seeds)[0])
    return [_mix(start + np.uint32(i * 0x9E3779B9 & 0xFFFFFFFF)) for i in range(1, _ROUNDS + 1)]


def _mix(x: Any) -> Any:
    """C. Wellons' hash "lowbias32" of 32 bits (https://nullprogram.com/blog/2018/07/31/)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
