"""Streams of bits on the host: what a code of variable length is written to and read from.

A stream is a sequence of sections, without gaps; bit j of a stream is bit ``j % 8`` of byte
``j // 8``. Everything is done on whole arrays, but for `BitReader.codeword_starts`: where a
codeword begins depends on all before it.
"""

from collections.abc import Callable

import numpy as np

from fedjax_core.errors import CodecError

# Bytes that are looked at at once, so that arrays of single bits stay small.
_CHUNK = 1 << 16
# No codeword that is searched for with `codeword_starts` is longer, in bytes.
_MARGIN = 20


class BitWriter:
    """Collects sections of a stream.

    Example:
      >>> writer = BitWriter()
      >>> writer.unary(np.array([2, 0]))
      >>> writer.fields(np.array([5, 1]), np.array([3, 1]))
      >>> writer.num_bits, writer.to_bytes().hex()
      (8, 'dc')
    """

    def __init__(self) -> None:
        self._sections: list[np.ndarray] = []

    @property
    def num_bits(self) -> int:
        """The length of the stream so far."""
        return sum(section.size for section in self._sections)

    def unary(self, counts: np.ndarray) -> None:
        """Appends each count as so many zeros and a one."""
        ends = np.cumsum(counts + np.int64(1))
        bits = np.zeros(int(ends[-1]) if ends.size else 0, np.uint8)
        bits[ends - 1] = 1
        self._sections.append(bits)

    def fields(self, values: np.ndarray, widths: np.ndarray) -> None:
        """Appends each value in its own number of bits, at most 64, the lowest bit first."""
        values, widths = _merge_neighbours(
            values.astype(np.uint64, copy=False), widths.astype(np.uint64, copy=False)
        )
        ends = np.cumsum(widths, dtype=np.int64)
        num_bits = int(ends[-1]) if ends.size else 0
        if num_bits == 0:
            return
        starts = ends - widths.astype(np.int64)
        words = np.zeros(num_bits // 64 + 2, np.uint64)
        index, shift = starts >> 6, (starts & 63).astype(np.uint64)
        first = np.flatnonzero(np.diff(index, prepend=-1))
        words[index[first]] = np.bitwise_or.reduceat(values << shift, first)
        # Of the values that begin in a word only the last may reach into the next one.
        last = np.append(first[1:], index.size) - 1
        words[index[last] + 1] |= (values[last] >> np.uint64(1)) >> (np.uint64(63) - shift[last])
        self._sections.append(_bits_of(words.view(np.uint8))[:num_bits])

    def integers(self, values: np.ndarray, width: int) -> None:
        """Appends every value below 2**32 in `width` bits."""
        columns = values.astype("<u4").view(np.uint8).reshape(-1, 4)
        bits = np.unpackbits(columns, axis=1, count=width, bitorder="little")
        self._sections.append(bits.ravel())

    def to_bytes(self) -> bytes:
        """The stream, its last byte filled with zeros."""
        if not self._sections:
            return b""
        return np.packbits(np.concatenate(self._sections), bitorder="little").tobytes()


class BitReader:
    """Reads the sections of a stream in order.

    Reading never takes more memory than a small multiple of what is asked for and of `data`.

    Args:
      data: the stream, and perhaps what follows it.
    """

    def __init__(self, data: memoryview | bytes) -> None:
        self._data = np.frombuffer(data, np.uint8)
        self._position = 0

    @property
    def num_bytes(self) -> int:
        """How many bytes the sections that were read take."""
        return -(-self._position // 8)

    def unary(self, count: int) -> np.ndarray:
        """`count` numbers, int64, each so many zeros before a one."""
        found, missing, begin = [], count, self._position // 8
        while missing and begin < self._data.size:
            ones = 8 * begin + np.flatnonzero(_bits_of(self._data[begin : begin + _CHUNK]))
            ones = ones[ones >= self._position][:missing]
            found.append(ones)
            missing -= ones.size
            begin += _CHUNK
        if missing:
            raise CodecError(
                f"expected {count} numbers, got {count - missing}: the message was cut short; "
                "pass all bytes of one message, and the `like` of the value that was encoded."
            )
        ends = np.concatenate(found) if found else np.zeros(0, np.int64)
        counts = np.diff(ends, prepend=self._position - 1) - 1
        self._position = int(ends[-1]) + 1 if count else self._position
        return counts

    def fields(self, widths: np.ndarray) -> np.ndarray:
        """uint64, one number for each width (at most 57)."""
        starts = self._advance(int(widths.sum(dtype=np.int64))) + np.cumsum(widths, dtype=np.int64)
        starts -= widths
        return _windows(self._data, starts) & ((np.uint64(1) << widths.astype(np.uint64)) - 1)

    def integers(self, count: int, width: int) -> np.ndarray:
        """uint32, `count` numbers of `width` bits."""
        start = self._advance(count * width)
        bits = _bits_of(self._data[start // 8 : self.num_bytes])[start % 8 :][: count * width]
        packed = np.packbits(bits.reshape(count, width), axis=1, bitorder="little")
        columns = np.zeros((count, 4), np.uint8)
        columns[:, : packed.shape[1]] = packed
        return columns.view("<u4")[:, 0]

    def codeword_starts(
        self, count: int, lengths: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Where up to `count` codewords of a prefix code begin; the position stays.

        Args:
          count: how many are wanted.
          lengths: from uint8 ``[b]`` to ``[8 * b]``, the length of the codeword that would begin at
            each bit, and 0 where none does. It is at most 160, and found from as many bits.

        Returns:
          int64, up to ``count + 1`` positions: the last is where the last codeword ends. There are
          fewer codewords if one of no length follows, or the stream ends.
        """
        found, position, left = [], self._position, count
        for chunk in range(position // 8, self._data.size, _CHUNK):
            table = lengths(self._data[chunk : chunk + _CHUNK + _MARGIN]).astype(np.uint8)
            starts = _follow(table[: 8 * _CHUNK].tobytes(), position - 8 * chunk, left)
            left -= len(starts) - 1
            position = 8 * chunk + starts.pop()
            found.append(np.array(starts, np.int64) + 8 * chunk)
            if not left or position < 8 * (chunk + _CHUNK):
                break
        return np.concatenate([*found, np.array([position])])

    def windows(self, starts: np.ndarray) -> np.ndarray:
        """uint64, at least 57 bits from each of the positions `starts` on, zeros behind the end."""
        return _windows(self._data, np.minimum(starts, 8 * self._data.size))

    def skip_to(self, position: int) -> None:
        """Ends the section at a bit of the stream."""
        self._advance(position - self._position)

    def finish(self) -> int:
        """The length of the stream in bytes.

        Raises:
          CodecError: the bits that fill up the last byte are not zero.
        """
        filling = -self._position % 8
        if filling and int(self._data[self.num_bytes - 1]) >> (8 - filling):
            raise altered(f"the last {filling} bits to be zero")
        return self.num_bytes

    def _advance(self, num_bits: int) -> int:
        """Takes the next bits, and gives where they start."""
        start, end = self._position, self._position + num_bits
        if end > 8 * self._data.size:
            raise CodecError(
                f"expected at least {-(-end // 8)} bytes of a coded tensor, got {self._data.size}: "
                "the message was cut short; pass all bytes of one message, and the `like` of the "
                "value that was encoded."
            )
        self._position = end
        return start


def altered(expected: str) -> CodecError:
    """The error of bytes that do not decode."""
    return CodecError(
        f"expected {expected} in a coded tensor; the bytes were altered, or belong to another "
        "message."
    )


def bit_length(numbers: np.ndarray) -> np.ndarray:
    """How many bits each number from 0 to 2**53 has: int64."""
    # The exponent of a float64, and 0 has none.
    return np.maximum((numbers.astype(np.float64).view(np.int64) >> 52) - 1022, 0)


def next_ones(bits: np.ndarray) -> np.ndarray:
    """For each bit, where the next one is, itself included; the size where there is none."""
    ones = np.flatnonzero(bits)
    padded = np.append(ones, bits.size)
    return np.repeat(padded, np.diff(padded, prepend=-1))[: bits.size]


def _merge_neighbours(values: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fewer and wider fields with the same bits: what follows takes time for each of them."""
    while values.size > 1 and int(widths.max()) <= 28:
        if values.size % 2:
            values, widths = (np.append(x, np.uint64(0)) for x in (values, widths))
        values = values[::2] | (values[1::2] << widths[::2])
        widths = widths[::2] + widths[1::2]
    return values, widths


def _follow(lengths: bytes, begin: int, count: int) -> list[int]:
    """The starts of up to `count` codewords, and where the last one ends."""
    starts, offset, end = [], begin, len(lengths)
    while offset < end and count and lengths[offset]:
        starts.append(offset)
        offset += lengths[offset]
        count -= 1
    starts.append(offset)
    return starts


def _bits_of(data: np.ndarray) -> np.ndarray:
    return np.unpackbits(data, bitorder="little")


def _windows(data: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The bits from each start on, zeros behind the end; the upper 7 of the 64 may be missing."""
    padded = np.concatenate([data, np.zeros(8, np.uint8)])
    words = np.lib.stride_tricks.sliding_window_view(padded, 8)[starts >> 3]
    words = np.ascontiguousarray(words).view("<u8")[:, 0]
    return words >> (starts & 7).astype(np.uint64)
