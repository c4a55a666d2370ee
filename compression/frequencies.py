"""What an entropy code knows of a tensor: how often each symbol occurs, and what that costs.

    number u  -> token (symbol of a small alphabet) + extra bits as they are
    histogram -> frequencies: positive integers with the sum 2**14 (less for short tensors)
    frequencies -> ideal bits, in integer arithmetic     and     lengths of a Huffman code

Everything is integer arithmetic, the same on every device, and written once: the host calls these
functions too. So the size that the device counts is the size that the host writes.

References:
  Huffman. A method for the construction of minimum-redundancy codes. Proceedings of the IRE 40(9),
  1952.
"""

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.bits import BitCount
from fedjax_core.compression.lengths import gamma_lengths

# The sum of frequencies is at most 2**_PRECISION.
_PRECISION = 14
# A histogram is scaled so that a count times a sum of frequencies fits 32 bits.
_COUNT_BITS = 32 - _PRECISION
# Numbers of fewer bits are tokens themselves; of longer ones the leading bits are.
_DIRECT_BITS = 9
NUM_DIRECT = 1 << _DIRECT_BITS
# How many bits of a long number, behind the first, belong to its token.
_MANTISSA_BITS = 3

_WORD_MAX = np.uint32(0xFFFFFFFF)


def num_tokens(width: int) -> int:
    """The size of the alphabet for numbers below ``2**width``."""
    if width <= _DIRECT_BITS:
        return 1 << width
    return NUM_DIRECT + ((width - _DIRECT_BITS) << _MANTISSA_BITS)


def tokenize(numbers: Any, lengths: Any, xp: ModuleType) -> tuple[Any, Any]:
    """The token of each number, and how many of its lower bits the token does not hold.

    Numbers below 2**9 are tokens themselves. A longer one has the token of its length and the three
    bits behind the leading one.

    Args:
      numbers: of any shape.
      lengths: their bit lengths, of the same dtype.
      xp: `numpy` or `jax.numpy`.

    Returns:
      The tokens and the numbers of extra bits.
    """
    is_direct = lengths <= _DIRECT_BITS
    extra = xp.where(is_direct, 0, lengths - 1 - _MANTISSA_BITS).astype(numbers.dtype)
    # 8 to 15 by the leading four bits: the octave from 2**9 on comes first.
    octave = lengths - 1 - _DIRECT_BITS
    leading = (numbers >> extra) - (1 << _MANTISSA_BITS)
    long = NUM_DIRECT + (octave << _MANTISSA_BITS) + leading
    return xp.where(is_direct, numbers, long).astype(numbers.dtype), extra


def extra_bits(tokens: np.ndarray) -> np.ndarray:
    """int64, the extra bits of each token."""
    octave = (tokens.astype(np.int64) - NUM_DIRECT) >> _MANTISSA_BITS
    return np.where(octave < 0, 0, octave + _DIRECT_BITS - _MANTISSA_BITS)


def detokenize(tokens: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """int64, the numbers of the tokens and of their extra bits."""
    tokens, extra = tokens.astype(np.int64), extra_bits(tokens)
    offset = tokens - NUM_DIRECT
    leading = (1 << _MANTISSA_BITS) + (offset & ((1 << _MANTISSA_BITS) - 1))
    return np.where(offset < 0, tokens, (leading << extra) | lower.astype(np.int64))


def precision(size: int) -> int:
    """The sum of the frequencies of `size` numbers is two to the power of this."""
    return min(_PRECISION, size.bit_length())


@functools.partial(jax.jit, static_argnames="size")
def frequencies(histogram: jax.Array, size: int) -> jax.Array:
    """The frequencies with which tokens are coded.

    Every token that occurs has one at least; the rest is shared out by the largest remainder.

    Args:
      histogram: uint32 ``[tokens]``, how often each token occurs.
      size: their sum, 1 to 2**28.

    Returns:
      uint32 ``[tokens]`` with the sum ``2**precision(size)``, 0 for tokens that do not occur.

    Example:
      >>> frequencies(jnp.array([6, 0, 1], jnp.uint32), 7).tolist()
      [6, 0, 2]
    """
    shift = max(size.bit_length() - _COUNT_BITS, 0)
    scale = np.uint32(1 << precision(size))
    present = (histogram > 0).astype(jnp.uint32)
    num_present = present.sum(dtype=jnp.uint32)
    shares = (histogram >> shift) * (scale - num_present)
    floor, remainder = jnp.divmod(shares, np.uint32(size >> shift))
    found = present + floor
    left = scale - found.sum(dtype=jnp.uint32)
    # Tokens that occur come first, those with large remainders before the others.
    order = jnp.argsort(jnp.where(present > 0, -remainder.astype(jnp.int32), 1), stable=True)
    rank = jnp.zeros_like(histogram).at[order].set(jnp.arange(histogram.size, dtype=jnp.uint32))
    share, extra = jnp.divmod(left, num_present)
    return found + present * (share + (rank < extra).astype(jnp.uint32))


@functools.partial(jax.jit, static_argnames="size")
def ideal_bits(histogram: jax.Array, found: jax.Array, size: int) -> BitCount:
    """The sum of -log2 of the frequency of each number, rounded up, and too large by a bit at most.

    Args:
      histogram: uint32 ``[tokens]``, how often each token occurs.
      found: its `frequencies`.
      size: the sum of the histogram, 1 to 2**28.

    Returns:
      A scalar count.
    """
    table = _costs()
    index = found << (_PRECISION - precision(size))
    high, low = (jnp.asarray(words)[index] for words in table)
    return whole_bits(BitCount(high, low).times(histogram).sum())


def information(frequencies: np.ndarray, precision: int) -> tuple[np.ndarray, np.ndarray]:
    """``precision - log2(f)`` in units of 2**-32, rounded up, in two words; 0 where f is 0."""
    costs = [(precision << 32) - _log2(int(f)) if f else 0 for f in frequencies]
    words = np.array(costs, np.uint64)
    return (words >> np.uint64(32)).astype(np.uint32), words.astype(np.uint32)


def whole_bits(exact: BitCount) -> BitCount:
    """A scalar in units of 2**-32, rounded up to whole bits."""
    return BitCount(jnp.zeros_like(exact.high), exact.high + (exact.low > 0).astype(jnp.uint32))


@functools.cache
def _costs() -> tuple[np.ndarray, np.ndarray]:
    return information(np.arange((1 << _PRECISION) + 1), _PRECISION)


def _log2(number: int) -> int:
    """``floor(2**32 * log2(number))``, one bit from each squaring."""
    exponent = number.bit_length() - 1
    mantissa, result = number << (62 - exponent), exponent
    for _ in range(32):
        mantissa = mantissa * mantissa >> 62
        carry = mantissa >> 63
        mantissa >>= carry
        result = 2 * result + carry
    return result


@jax.jit
def huffman_lengths(weights: jax.Array) -> jax.Array:
    """The lengths of the codewords of a Huffman code.

    The two lightest nodes are joined until one is left. Leaves in order of their weights and joined
    nodes in order of their making are both sorted, so the lightest one heads one of two queues.

    Args:
      weights: uint32 ``[tokens]`` with a sum below 2**31; tokens of weight 0 get no codeword.

    Returns:
      uint32 ``[tokens]``: 0 for tokens without codeword, and for a token that is alone.

    Example:
      >>> huffman_lengths(jnp.array([8, 4, 2, 1, 1], jnp.uint32)).tolist()
      [1, 2, 3, 4, 4]
    """
    size = weights.size
    keys = jnp.where(weights > 0, weights, _WORD_MAX)
    order = jnp.argsort(keys, stable=True)
    leaves = jnp.append(keys[order], _WORD_MAX)
    num_joins = jnp.maximum(jnp.sum(weights > 0, dtype=jnp.int32) - 1, 0)

    def take(leaf: jax.Array, node: jax.Array, nodes: jax.Array) -> tuple[jax.Array, ...]:
        """The lightest: its index among leaves and then nodes, its weight, and the heads moved."""
        is_leaf = leaves[leaf] <= nodes[node]
        index = jnp.where(is_leaf, leaf, size + node)
        step = is_leaf.astype(jnp.int32)
        return index, jnp.minimum(leaves[leaf], nodes[node]), leaf + step, node + 1 - step

    def join(step: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        leaf, node, nodes, parents = state
        first, weight, leaf, node = take(leaf, node, nodes)
        second, other, leaf, node = take(leaf, node, nodes)
        parents = parents.at[jnp.stack([first, second])].set(step)
        return leaf, node, nodes.at[step].set(weight + other), parents

    zero = jnp.int32(0)
    nodes = jnp.full(size + 1, _WORD_MAX)
    start = (zero, zero, nodes, jnp.zeros(2 * size + 1, jnp.int32))
    *_, parents = jax.lax.fori_loop(zero, num_joins, join, start)

    def descend(step: jax.Array, depths: jax.Array) -> jax.Array:
        # From the node below the root, which was made last, to the first.
        node = num_joins - 2 - step
        return depths.at[node].set(depths[parents[size + node]] + 1)

    depths = jax.lax.fori_loop(zero, num_joins - 1, descend, jnp.zeros(size + 1, jnp.uint32))
    has_codeword = (jnp.arange(size) <= num_joins) & (num_joins > 0)
    lengths = jnp.where(has_codeword, depths[parents[:size]] + 1, 0)
    return jnp.zeros(size, jnp.uint32).at[order].set(lengths)


def table_bits(entries: jax.Array) -> BitCount:
    """Bits of a table, one positive entry for each token that occurs, by `write_table`.

    Args:
      entries: uint32 ``[tokens]``, 0 for tokens that do not occur.

    Returns:
      A scalar count.
    """
    positions = jnp.arange(entries.size, dtype=jnp.int32)
    present = entries > 0
    last = jax.lax.cummax(jnp.where(present, positions, -1))
    before = jnp.concatenate([jnp.full(1, -1, jnp.int32), last[:-1]])
    gaps = (positions - before).astype(jnp.uint32)
    lengths = gamma_lengths(gaps) + gamma_lengths(jnp.maximum(entries, 1))
    bits = jnp.where(present, lengths, 0).sum(dtype=jnp.uint32)
    return BitCount(jnp.zeros_like(bits), bits + np.uint32(entries.size.bit_length()))
