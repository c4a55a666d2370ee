"""Exact lengths of universal codes of non-negative integers, on the device.

| code | of u, with n = u + 1 | bits |
|---|---|---|
| Elias gamma | bit length of n in unary, its lower bits | 2 floor(log2 n) + 1 |
| Elias delta | bit length N of n in gamma, its lower bits | floor(log2 n) + 2 floor(log2 N) + 1 |
| Golomb-Rice | u >> k in unary, its k lower bits | (u >> k) + 1 + k |
| zero runs | the zeros before each u > 0 in gamma, a sign, a magnitude in gamma | see below |

A signed integer q is u = 2q for q >= 0 and -2q - 1 else (`zigzag`). Everything is integer
arithmetic: logarithms in float32 are wrong from 2**15 on.

References: see `universal`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.bits import BitCount

# Up to so many bits, to count how often each number occurs is faster than to look at all bits.
_HISTOGRAM_BITS = 12


def zigzag(integers: jax.Array) -> jax.Array:
    """Signed integers as non-negative ones: 0, -1, 1, -2, 2 ... become 0, 1, 2, 3, 4 ...

    Args:
      integers: int32 in ``[-2**30, 2**30)``.

    Returns:
      uint32.

    Example:
      >>> zigzag(jnp.array([0, -1, 1, -2])).tolist()
      [0, 1, 2, 3]
    """
    return ((integers << 1) ^ (integers >> 31)).astype(jnp.uint32)


def unzigzag(numbers: np.ndarray) -> np.ndarray:
    """The integers, int64, of which `zigzag` made the numbers."""
    wide = numbers.astype(np.int64)
    return (wide >> 1) ^ -(wide & 1)


def gamma_lengths(numbers: jax.Array) -> jax.Array:
    """Bits of the Elias gamma code.

    Args:
      numbers: uint32, at least 1.

    Returns:
      uint32, ``2 * floor(log2(numbers)) + 1``.

    Example:
      >>> gamma_lengths(jnp.array([1, 2, 3, 4, 16, 2**31], jnp.uint32)).tolist()
      [1, 3, 3, 5, 9, 63]
    """
    return 2 * _bit_lengths(numbers) - 1


def delta_lengths(numbers: jax.Array) -> jax.Array:
    """Bits of the Elias delta code.

    Args:
      numbers: uint32, at least 1.

    Returns:
      uint32, ``floor(log2(n)) + 2 * floor(log2(floor(log2(n)) + 1)) + 1`` for each n.

    Example:
      >>> delta_lengths(jnp.array([1, 2, 3, 4, 16], jnp.uint32)).tolist()
      [1, 4, 4, 5, 9]
    """
    lengths = _bit_lengths(numbers)
    return lengths - 1 + gamma_lengths(lengths)


def rice_lengths(numbers: jax.Array, parameter: int) -> jax.Array:
    """Bits of the Golomb-Rice code with parameter k.

    Args:
      numbers: uint32.
      parameter: k, 0 to 31.

    Returns:
      uint32, ``(numbers >> k) + 1 + k``.

    Example:
      >>> int(rice_lengths(jnp.uint32(9), 2))
      5
    """
    return (numbers >> parameter) + jnp.uint32(1 + parameter)


def zero_run_lengths(numbers: jax.Array) -> jax.Array:
    """Bits of the code of zero runs, where each codeword begins.

    A number that is not zero takes ``gamma(z + 1) + 1 + gamma(|q|)`` bits, where z zeros stand
    before it; zeros that end the vector take ``gamma(z + 1)``, at the last of them.

    Args:
      numbers: uint32 ``[n]``, zigzag of q.

    Returns:
      uint32 ``[n]``.

    Example:
      >>> q = jnp.array([0, 0, 0, 5, 0, -1, 0, 0])
      >>> zero_run_lengths(zigzag(q)).tolist()
      [0, 0, 0, 11, 0, 5, 0, 3]
    """
    positions = jnp.arange(numbers.size, dtype=jnp.int32)
    is_zero = numbers == 0
    last = jax.lax.cummax(jnp.where(is_zero, -1, positions))
    before = jnp.concatenate([jnp.full(1, -1, jnp.int32), last[:-1]])
    magnitude = jnp.maximum((numbers + 1) >> 1, 1)
    zeros = (positions - before - 1).astype(jnp.uint32)
    codeword = gamma_lengths(zeros + 1) + 1 + gamma_lengths(magnitude)
    is_tail = is_zero & (positions == numbers.size - 1)
    tail = gamma_lengths(zeros + 2)
    return jnp.where(is_tail, tail, jnp.where(is_zero, 0, codeword)).astype(jnp.uint32)


def rice_totals(numbers: jax.Array, width: int) -> BitCount:
    """Bits of all numbers together by the Golomb-Rice codes with parameters 0 to `width`.

    Args:
      numbers: uint32 ``[n]``, below ``2**width``.
      width: at most 31.

    Returns:
      Counts of shape ``[width + 1]``.
    """
    # sum(u >> k) is the sum of 2**(j - k) over the bits j >= k that are set.
    ones = _ones(numbers, width)[None, :]
    above = np.arange(width)[None, :] - np.arange(width + 1)[:, None]
    powers = np.where(above < 0, 0, np.left_shift(1, np.maximum(above, 0))).astype(np.uint32)
    ones = jnp.broadcast_to(ones, powers.shape)
    quotients = BitCount(jnp.zeros_like(ones), ones).times(jnp.asarray(powers)).sum(axis=1)
    rest = jnp.full(width + 1, numbers.size, jnp.uint32)
    rest = BitCount(jnp.zeros_like(rest), rest).times(jnp.arange(1, width + 2, dtype=jnp.uint32))
    return quotients + rest


def _ones(numbers: jax.Array, width: int) -> jax.Array:
    """How many numbers have each bit set: uint32 ``[width]``."""
    times = jnp.uint32(1)
    if width <= _HISTOGRAM_BITS and numbers.size > 1 << width:
        histogram = jnp.zeros(1 << width, jnp.uint32).at[numbers].add(times)
        numbers, times = jnp.arange(1 << width, dtype=jnp.uint32), histogram[None, :]
    places = jnp.arange(width, dtype=jnp.uint32)[:, None]
    is_set = (numbers[None, :] >> places) & 1
    return jnp.sum(is_set * times, axis=1, dtype=jnp.uint32)


def total(lengths: jax.Array) -> BitCount:
    """The sum of a vector of uint32."""
    return BitCount(jnp.zeros_like(lengths), lengths).sum()


def _bit_lengths(numbers: jax.Array) -> jax.Array:
    return 32 - jax.lax.clz(numbers)
