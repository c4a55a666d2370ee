"""Universal codes of non-negative integers.

Gamma, delta and Rice write the unary parts of all numbers first, then all their lower bits, so that
whole arrays are read at once; this changes no length. See `lengths` for what each code takes.

References:
  Elias. Universal codeword sets and representations of the integers. IEEE Transactions on
  Information Theory 21(2), 1975.

  Golomb. Run-length encodings. IEEE Transactions on Information Theory 12(3), 1966.

  Rice. Some practical universal noiseless coding techniques. JPL Publication 79-22, 1979.
"""

import abc
import dataclasses

import jax
import numpy as np

from fedjax_core.bits import BitCount
from fedjax_core.compression import lengths
from fedjax_core.compression.bitstreams import BitReader, BitWriter, altered, bit_length, next_ones

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


@dataclasses.dataclass(frozen=True)
class EliasGamma(Code):
    """Elias gamma of u + 1."""

    def count(self, numbers: jax.Array, width: int) -> BitCount:
        """See `Code`."""
        del width
        return lengths.total(lengths.gamma_lengths(numbers + 1))

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
        return lengths.total(lengths.delta_lengths(numbers + 1))

    def write(self, numbers: np.ndarray, width: int, limit: int) -> bytes | None:
        """See `Code`."""
        del width
        shifted = numbers.astype(np.int64) + 1
        num_bits = bit_length(shifted)
        writer = BitWriter()
        write_gammas(writer, num_bits)
        if not _fits(writer.num_bits + int(num_bits.sum()) - num_bits.size, limit):
            return None
        writer.fields(shifted ^ (1 << (num_bits - 1)), num_bits - 1)
        return writer.to_bytes()

    def read(self, data: memoryview, size: int, width: int) -> tuple[np.ndarray, int]:
        """See `Code`."""
        reader = BitReader(data)
        num_bits = read_gammas(reader, size, (width + 1).bit_length())
        _check_widths(num_bits - 1, width)
        lower = reader.fields(num_bits - 1).astype(np.int64)
        return (lower + (1 << (num_bits - 1)) - 1).astype(np.uint32), reader.finish()


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
            return lengths.total(lengths.rice_lengths(numbers, self.parameter))
        return lengths.rice_totals(numbers, width).min() + BitCount.of(_PARAMETER_BITS)

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
            raise altered(f"every number to be below 2**{width}")
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
    """Runs of zeros, and what is between them, in Elias gamma: see `lengths.zero_run_lengths`."""

    def count(self, numbers: jax.Array, width: int) -> BitCount:
        """See `Code`."""
        del width
        return lengths.total(lengths.zero_run_lengths(numbers))

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
            raise altered(f"runs and values of {size} numbers")
        # One number more than there are: the last codeword stands for zeros alone.
        has_tail = covered[num_values] == size + 1
        num_values += not has_tail
        if num_values >= starts.size:
            raise altered(f"runs and values of {size} numbers")
        signs = reader.windows(after[:num_values]) & np.uint64(1)
        magnitudes, ends = _read_gammas_at(reader, after[:num_values] + 1)
        reader.skip_to(int(after[num_values] if has_tail else ends[-1]))
        if (has_tail and runs[num_values] < 2) or np.any(magnitudes >> width):
            raise altered(f"every number to be below 2**{width}")
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
        raise altered(f"numbers of at most {largest + 1} bits")
