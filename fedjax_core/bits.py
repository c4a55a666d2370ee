"""Exact counts of bits, on the device and on the host.

A raw update of the FedAvg CNN is 53,227,840 bits: float32 counts exactly only to 16.8 million,
int32 overflows at 41 updates, and uint64 needs a global switch in JAX. A `BitCount` is a 64-bit
count in two uint32 words, added with carry, so it works in every program and never rounds.
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.errors import ArgumentError, FederatedTypeError

_HALF = 16
_HALF_MASK = 0xFFFF
_WORD_MASK = 0xFFFFFFFF
_UNITS = ("bit", "Kibit", "Mibit", "Gibit", "Tibit")


class BitCount(NamedTuple):
    """An exact count below 2**64: ``high * 2**32 + low``.

    It is a pytree of two arrays, so it passes through `jit`, `vmap`, `scan` and `tree.map`. All
    arithmetic is modulo 2**64.

    Attributes:
      high: uint32, any shape: the upper 32 bits.
      low: uint32, the same shape: the lower 32 bits.

    Example:
      >>> update = BitCount.of(53_227_840)
      >>> int(update.times(10) + BitCount.of(8))
      532278408
    """

    high: jax.Array
    low: jax.Array

    @classmethod
    def of(cls, count: int | np.integer) -> Self:
        """The count of a Python or NumPy integer.

        Args:
          count: an integer in ``[0, 2**64)``.

        Returns:
          A scalar `BitCount`.

        Raises:
          FederatedTypeError: `count` is not an integer known while tracing.
          ArgumentError: `count` is negative or needs more than 64 bits.
        """
        value = _static_integer(count, limit=1 << 64)
        high, low = np.uint32(value >> 32), np.uint32(value & _WORD_MASK)
        return cls(jnp.asarray(high), jnp.asarray(low))

    @classmethod
    def zero(cls) -> Self:
        """The count of nothing."""
        return cls.of(0)

    # A NamedTuple would concatenate and repeat; its comparison, high before low, is right as it is.
    def __add__(self, other: object) -> "BitCount":
        """The sum with another count of the same shape (or a scalar one)."""
        if not isinstance(other, BitCount):
            return NotImplemented
        low = jnp.add(self.low, other.low)
        carry = jnp.less(low, other.low).astype(jnp.uint32)
        return BitCount(jnp.add(self.high, other.high) + carry, low)

    def __radd__(self, other: object) -> "BitCount":
        """Makes the built-in `sum` of counts work: it starts at the integer 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    # Incompatible on purpose: a count is no sequence.
    def __mul__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, factor: int | jax.Array
    ) -> "BitCount":
        """The same as `times`."""
        return self.times(factor)

    __rmul__ = __mul__  # pyright: ignore[reportAssignmentType]

    def times(self, factor: int | jax.Array) -> "BitCount":
        """The product with a non-negative number, such as the number of clients.

        Args:
          factor: an integer in ``[0, 2**32)``: a Python one, or an int32 or uint32 array (a
            scalar, or of the count's shape). An array is not checked for negative values.

        Returns:
          The product modulo 2**64.

        Raises:
          FederatedTypeError: `factor` is not an integer.
          ArgumentError: a Python `factor` is negative or needs more than 32 bits.
        """
        multiplier = _as_word(factor)
        carried, low = _multiply_words(self.low, multiplier)
        return BitCount(jnp.multiply(self.high, multiplier) + carried, low)

    def sum(self, axis: int = 0) -> "BitCount":
        """The sum along one axis, such as the clients axis.

        Args:
          axis: the axis to sum away.

        Returns:
          The sum modulo 2**64, exact for any number of terms.

        Raises:
          ArgumentError: the count is a scalar, so it has no axis to sum.
        """
        if jnp.ndim(self.low) == 0:
            raise ArgumentError(
                "expected a BitCount with an axis to sum, got a scalar one; "
                "add scalar counts with `+`."
            )
        return _sum_leading(jnp.moveaxis(self.high, axis, 0), jnp.moveaxis(self.low, axis, 0))

    def min(self, axis: int = 0) -> "BitCount":
        """The smallest along one axis, such as that of the codes of which the shortest is taken.

        Args:
          axis: the axis to reduce.

        Returns:
          The smallest counts.
        """
        high = jnp.min(self.high, axis, keepdims=True)
        low = jnp.where(self.high == high, self.low, jnp.uint32(_WORD_MASK))
        return BitCount(jnp.squeeze(high, axis), jnp.min(low, axis))

    def whole_bytes(self) -> "BitCount":
        """The count rounded up to a multiple of 8, modulo 2**64."""
        filled = self + BitCount.of(7)
        return BitCount(filled.high, filled.low & jnp.uint32(0xFFFFFFF8))

    def __int__(self) -> int:
        """The exact count as a Python integer, on the host."""
        if np.ndim(self.low) != 0:
            raise ArgumentError(
                f"expected a scalar BitCount, got one of shape {np.shape(self.low)}; "
                "call `.sum()` first."
            )
        return (int(self.high) << 32) | int(self.low)


def format_bits(count: int | BitCount) -> str:
    """A count of bits in binary units with two decimals, as the TFF research tutorial prints it.

    Args:
      count: bits, not negative.

    Returns:
      The count in the largest of bit, Kibit, Mibit, Gibit, Tibit in which it is at least 1.

    Raises:
      ArgumentError: `count` is negative.

    Example:
      >>> format_bits(532_278_400)
      '507.62Mibit'
    """
    bits = int(count)
    if bits < 0:
        raise ArgumentError(f"expected a count of bits that is not negative, got {bits}.")
    power = min(max(bits.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    return f"{bits / (1 << 10 * power):.2f}{_UNITS[power]}"


def _static_integer(value: object, limit: int) -> int:
    """`value` as a Python integer in ``[0, limit)``."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise FederatedTypeError(
            f"expected an integer, got {type(value).__name__}; "
            "a count is exact, so convert with int()."
        )
    number = int(value)
    if not 0 <= number < limit:
        raise ArgumentError(f"expected a count in [0, {limit}), got {number}.")
    return number


def _as_word(factor: object) -> jax.Array:
    """`factor` as uint32."""
    if isinstance(factor, jax.Array | np.ndarray) and jnp.issubdtype(factor.dtype, jnp.integer):
        return jnp.asarray(factor).astype(jnp.uint32)
    return jnp.asarray(np.uint32(_static_integer(factor, limit=1 << 32)))


def _multiply_words(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The 64-bit product of two uint32 as ``(high, low)``, from products of their 16-bit halves."""
    a_high, a_low = a >> _HALF, a & _HALF_MASK
    b_high, b_low = b >> _HALF, b & _HALF_MASK
    low_low, low_high, high_low = a_low * b_low, a_low * b_high, a_high * b_low
    # At most 3 * (2**16 - 1): the three 16-bit terms that meet at bit 16 cannot overflow.
    middle = (low_low >> _HALF) + (low_high & _HALF_MASK) + (high_low & _HALF_MASK)
    high = a_high * b_high + (low_high >> _HALF) + (high_low >> _HALF) + (middle >> _HALF)
    return high, a * b


def _sum_leading(high: jax.Array, low: jax.Array) -> BitCount:
    """The sum over axis 0, in groups of 2**16 terms: as many 16-bit halves as fit a uint32."""
    terms = low.shape[0]
    if terms > 1 << _HALF:
        groups = -(-terms // (1 << _HALF))
        partial = _sum_leading(_grouped(high, groups), _grouped(low, groups))
        return _sum_leading(partial.high, partial.low)
    lower = jnp.sum(low & _HALF_MASK, axis=0, dtype=jnp.uint32)
    upper = jnp.sum(low >> _HALF, axis=0, dtype=jnp.uint32)
    upper_carried = BitCount(upper >> _HALF, upper << _HALF)
    total = BitCount(jnp.sum(high, axis=0, dtype=jnp.uint32), lower)
    return total + upper_carried


def _grouped(words: jax.Array, groups: int) -> jax.Array:
    """Axis 0 folded to ``[terms per group, groups]``, zeros at the end."""
    size = -(-words.shape[0] // groups)
    padding = [(0, size * groups - words.shape[0])] + [(0, 0)] * (words.ndim - 1)
    return jnp.pad(words, padding).reshape((size, groups, *words.shape[1:]))
