"""Universal codes of non-negative integers: exact lengths on the device, bits on the host.

| code | of u, with n = u + 1 | bits |
|---|---|---|
| Elias gamma | bit length of n in unary, its lower bits | 2 floor(log2 n) + 1 |
| Elias delta | bit length N of n in gamma, its lower bits | floor(log2 n) + 2 floor(log2 N) + 1 |
| Golomb-Rice | u >> k in unary, its k lower bits | (u >> k) + 1 + k |
| zero runs | for each u > 0: gamma of the zeros before it, then a sign and gamma of \\|q\\| | see below |

u = 2q for q >= 0 and -2q - 1 else (`zigzag`). Lengths come from integer arithmetic: logarithms in
float32 are wrong from 2**15 on. Gamma, delta and Rice write the unary parts of all numbers first,
then all lower bits, so that whole arrays are read at once; this changes no length.

References:
  Elias. Universal codeword sets and representations of the integers. IEEE Transactions on
  Information Theory 21(2), 1975.

  Golomb. Run-length encodings. IEEE Transactions on Information Theory 12(3), 1966.

  Rice. Some practical universal noiseless coding techniques. JPL Publication 79-22, 1979.
"""

import abc
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.bits import BitCount
from fedjax_core.compression.bitstreams import BitReader, BitWriter, bit_length, next_ones
from fedjax_core.errors import CodecError

# Bits that hold the parameter of a Rice code.
_PARAMETER_BITS = 5
# No number in a code of zero runs has more zeros in front.
_LONGEST_RUN = 31


class Code(abc.ABC):
    """A lossless code of a vector of integers in ``[0, 2**width)``, `width` at most 31.

    A code is a frozen dataclass, so that two of the same kind and parameters are equal.
    """

    @abc.abstractmethod
    def count(self, numbers: jax.Array, width: int) -> BitCount:
        """The exact number of bits that `write` takes, under `jit` and `vmap`.

        Args:
          numbers: uint32 ``[n]``, n from 1 to 2**28.
          width: the numbers are below ``2**width``.
        """

    @abc.abstractmethod
    def write(self, numbers: np.ndarray, width: int, limit: int) -> bytes | None:
        """The bits in whole bytes, or None if there are `limit` bytes or more."""

    @abc.abstractmethod
    def read(self, data: memoryview, size: int, width: int) -> tuple[np.ndarray, int]:
        """Reads what `write` wrote.

        Args:
          data: the bytes, and perhaps more; not trusted.
          size: how many numbers.
          width: as when they were written.

        Returns:
          uint32 ``[size]``, which a caller must check against ``2**width``, and how many bytes
          they took.

        Raises:
          CodecError: no numbers have these bytes.
        """


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
    places = jnp.arange(width, dtype=jnp.uint32)[:, None]
    ones = jnp.sum((numbers[None, :] >> places) & 1, axis=1, dtype=jnp.uint32)[None, :]
    above = np.arange(width)[None, :] - np.arange(width + 1)[:, None]
    powers = np.where(above < 0, 0, np.left_shift(1, np.maximum(above, 0))).astype(np.uint32)
    ones = jnp.broadcast_to(ones, powers.shape)
    quotients = BitCount(jnp.zeros_like(ones), ones).times(jnp.asarray(powers)).sum(axis=1)
    rest = jnp.full(width + 1, numbers.size, jnp.uint32)
    rest = BitCount(jnp.zeros_like(rest), rest).times(jnp.arange(1, width + 2, dtype=jnp.uint32))
    return quotients + rest


@dataclasses.dataclass(frozen=True)
class EliasGamma(Code):
    """Elias gamma of u + 1."""

    def count(self, numbers: jax.Array, width: int) -> BitCount:
        """See `Code`."""
        del width
        return total(gamma_lengths(numbers + 1))

    def write(self, numbers: np.ndarray, width: int, limit: int) -> bytes | None:
        """See `Code`."""
        del width
        shifted = numbers.astype(np.int64) + 1
        widths = bit_length(shifted) - 1
        if not _fits(2 * int(widths.sum()) + widths.size, limit):
            return None
        writer = BitWriter()
        writer.unary(widths)
        writer.fields(shifted ^ (1 << widths), widths)
        return writer.to_bytes()

    def read(self, data: memoryview, size: int, width: int) -> tuple[np.ndarray, int]:
        """See `Code`."""
        reader = BitReader(data)
        numbers = read_gammas(reader, size, width + 1) - 1
        return numbers.astype(np.uint32), reader.finish()


@dataclasses.dataclass(frozen=True)
class EliasDelta(Code):
    """Elias delta of u + 1."""

    def count(self, numbers: jax.Array, width: int) -> BitCount:
        """See `Code`."""
        del width
        return total(delta_lengths(numbers + 1))

    def write(self, numbers: np.ndarray, width: int, limit: int) -> bytes | None:
        """See `Code`."""
        del width
        shifted = numbers.astype(np.int64) + 1
        lengths = bit_length(shifted)
        writer = BitWriter()
        write_gammas(writer, lengths)
        if not _fits(writer.num_bits + int(lengths.sum()) - lengths.size, limit):
            return None
        writer.fields(shifted ^ (1 << (lengths - 1)), lengths - 1)
        return writer.to_bytes()

    def read(self, data: memoryview, size: int, width: int) -> tuple[np.ndarray, int]:
        """See `Code`."""
        reader = BitReader(data)
        lengths = read_gammas(reader, size, (width + 1).bit_length())
        _check_widths(lengths - 1, width)
        lower = reader.fields(lengths - 1).astype(np.int64)
        return (lower + (1 << (lengths - 1)) - 1).astype(np.uint32), reader.finish()


@dataclasses.dataclass(frozen=True)
class Rice(Code):
    """Golomb-Rice.

    Attributes:
      parameter: k, or None for the best one of each vector, which then takes 5 bits.
    """

    parameter: int | None

    def count(self, numbers: jax.Array, width: int) -> BitCount:
        """See `Code`."""
        if self.parameter is not None:
            return total(rice_lengths(numbers, self.parameter))
        return rice_totals(numbers, width).min() + BitCount.of(_PARAMETER_BITS)

    def write(self, numbers: np.ndarray, width: int, limit: int) -> bytes | None:
        """See `Code`."""
        parameter = self._choose(numbers, width)
        quotients = numbers >> np.uint32(parameter)
        writer = BitWriter()
        if self.parameter is None:
            writer.integers(np.array([parameter]), _PARAMETER_BITS)
        num_bits = int(quotients.sum(dtype=np.uint64)) + numbers.size * (1 + parameter)
        if not _fits(writer.num_bits + num_bits, limit):
            return None
        writer.unary(quotients)
        writer.integers(numbers, parameter)
        return writer.to_bytes()

    def read(self, data: memoryview, size: int, width: int) -> tuple[np.ndarray, int]:
        """See `Code`."""
        reader = BitReader(data)
        parameter = self.parameter
        if parameter is None:
            parameter = int(reader.integers(1, _PARAMETER_BITS)[0])
        quotients = reader.unary(size)
        if size and int(quotients.max()) >> max(width - parameter, 0):
            raise _altered(f"every number to be below 2**{width}")
        lower = reader.integers(size, parameter)
        return (quotients << parameter).astype(np.uint32) | lower, reader.finish()

    def _choose(self, numbers: np.ndarray, width: int) -> int:
        """The parameter, or the best one: the total is convex in it."""
        if self.parameter is not None:
            return self.parameter

        def num_bits(k: int) -> int:
            return int((numbers >> np.uint32(k)).sum(dtype=np.uint64)) + numbers.size * (1 + k)

        best = min(max(int(numbers.mean()).bit_length() - 1, 0), width)
        step = 1 if best < width and num_bits(best + 1) < num_bits(best) else -1
        while 0 <= best + step <= width and num_bits(best + step) < num_bits(best):
            best += step
        return best


@dataclasses.dataclass(frozen=True)
class ZeroRuns(Code):
    """Runs of zeros and what stands between them, both in Elias gamma: see `zero_run_lengths`."""

    def count(self, numbers: jax.Array, width: int) -> BitCount:
        """See `Code`."""
        del width
        return total(zero_run_lengths(numbers))

    def write(self, numbers: np.ndarray, width: int, limit: int) -> bytes | None:
        """See `Code`."""
        del width
        places = np.flatnonzero(numbers)
        values = numbers[places].astype(np.int64)
        ends = np.append(places, numbers.size)
        runs = np.diff(ends, prepend=-1)
        runs = runs if runs[-1] > 1 else runs[:-1]
        # Each codeword in two fields: the run with the sign behind it, and the magnitude.
        run_fields, run_widths = _gamma_fields(runs)
        run_fields[: values.size] |= (values & 1) << run_widths[: values.size]
        run_widths[: values.size] += 1
        fields, widths = _gamma_fields((values + 1) >> 1)
        if not _fits(int(run_widths.sum() + widths.sum()), limit):
            return None
        # That of the tail has no bits.
        missing = run_widths.size - widths.size
        padded = [np.append(x, np.zeros(missing, np.int64)) for x in (fields, widths)]
        writer = BitWriter()
        writer.fields(
            np.stack([run_fields, padded[0]], axis=1).ravel(),
            np.stack([run_widths, padded[1]], axis=1).ravel(),
        )
        return writer.to_bytes()

    def read(self, data: memoryview, size: int, width: int) -> tuple[np.ndarray, int]:
        """See `Code`."""
        reader = BitReader(data)
        starts = reader.codeword_starts(size, _zero_run_table)
        runs, after = _read_gammas_at(reader, starts)
        covered = np.cumsum(runs)
        num_values = int(np.searchsorted(covered, size))
        if num_values == starts.size or covered[num_values] > size + 1:
            # What follows the numbers was looked at too.
            raise _altered(f"runs and values of {size} numbers")
        # One number more than there are: the last codeword stands for zeros alone.
        has_tail = covered[num_values] == size + 1
        num_values += not has_tail
        if num_values >= starts.size:
            raise _altered(f"runs and values of {size} numbers")
        signs = reader.windows(after[:num_values]) & np.uint64(1)
        magnitudes, ends = _read_gammas_at(reader, after[:num_values] + 1)
        reader.skip_to(int(after[num_values] if has_tail else ends[-1]))
        if (has_tail and runs[num_values] < 2) or np.any(magnitudes >> width):
            raise _altered(f"every number to be below 2**{width}")
        numbers = np.zeros(size, np.uint32)
        numbers[covered[:num_values] - 1] = 2 * magnitudes - signs.astype(np.int64)
        return numbers, reader.finish()


def write_gammas(writer: BitWriter, numbers: np.ndarray) -> None:
    """Appends numbers from 1 on in Elias gamma: all unary parts, then all lower bits."""
    widths = bit_length(numbers) - 1
    writer.unary(widths)
    writer.fields(numbers ^ (1 << widths), widths)


def read_gammas(reader: BitReader, count: int, width: int) -> np.ndarray:
    """int64, the next numbers in Elias gamma, each below ``2**width``, as `write_gammas` wrote."""
    widths = reader.unary(count)
    _check_widths(widths, width - 1)
    return reader.fields(widths).astype(np.int64) | (1 << widths)


def total(lengths: jax.Array) -> BitCount:
    """The sum of a vector of uint32."""
    return BitCount(jnp.zeros_like(lengths), lengths).sum()


def _bit_lengths(numbers: jax.Array) -> jax.Array:
    return 32 - jax.lax.clz(numbers)


def _fits(num_bits: int, limit: int) -> bool:
    """Whether so many bits take fewer than `limit` bytes."""
    return num_bits <= 8 * (limit - 1)


def _gamma_fields(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each Elias gamma codeword as one field, int64, and its width."""
    lower = bit_length(numbers) - 1
    top = np.int64(1) << lower
    return top | ((numbers ^ top) << (lower + 1)), 2 * lower + 1


def _read_gammas_at(reader: BitReader, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers whose Elias gamma codewords begin at some bits, int64, and where these end."""
    windows = reader.windows(starts)
    lower = np.clip(bit_length(windows & (~windows + np.uint64(1))) - 1, 0, _LONGEST_RUN)
    top = np.int64(1) << lower
    windows = reader.windows(starts + lower + 1).astype(np.int64)
    return top | (windows & (top - 1)), starts + 2 * lower + 1


def _zero_run_table(data: np.ndarray) -> np.ndarray:
    """For each bit, the length of the run, sign and magnitude that would begin there, 0 if none."""
    bits = np.unpackbits(data, bitorder="little")
    following = np.append(next_ones(bits), bits.size)
    positions = np.arange(bits.size)
    magnitude = np.minimum(2 * following[:-1] - positions + 2, bits.size)
    end = following[magnitude]
    is_short = (following[:-1] - positions <= _LONGEST_RUN) & (end - magnitude <= _LONGEST_RUN)
    return np.where(is_short & (end < bits.size), 2 * end - magnitude + 1 - positions, 0)


def _check_widths(widths: np.ndarray, largest: int) -> None:
    if widths.size and int(widths.max()) > largest:
        raise _altered(f"numbers of at most {largest + 1} bits")


def _altered(expected: str) -> CodecError:
    return CodecError(
        f"expected {expected} in a coded tensor; the bytes were altered, or belong to another "
        "message."
    )
