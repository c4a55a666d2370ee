"""Packing of unsigned integers on the host, the first one lowest.

| packing | element i occupies | bytes of n elements |
|---|---|---|
| dense | bits ``i * width`` to ``(i + 1) * width - 1`` | ceil(n * width / 8) |
| trits | digit ``i % 5``, in base 3, of byte ``i // 5`` | ceil(n / 5) |
| words | as dense, in a stream cut into 28 bits for each 32-bit word | 4 ceil(n * width / 28) |

Bit j of a stream is bit ``j % 8`` of byte ``j // 8``; words are little-endian, their upper four
bits zero. They are what TFF sends; nothing else should.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from fedjax_core.errors import CodecError

_TRIT_VALUES = np.array([1, 3, 9, 27, 81], np.uint8)
_WORD_BITS = 28

PackingName = Literal["dense", "trits", "words"]


class Packing(NamedTuple):
    """A way to write integers.

    Attributes:
      num_bytes: ``(count, width) -> int``, the exact number of bytes.
      pack: ``(codes, width) -> bytes``.
      unpack: ``(data, count, width) -> codes``.
    """

    num_bytes: Callable[[int, int], int]
    pack: Callable[[np.ndarray, int], bytes]
    unpack: Callable[[bytes, int, int], np.ndarray]


def pack_bits(codes: np.ndarray, width: int) -> bytes:
    """Packs integers into ``ceil(codes.size * width / 8)`` bytes, the last one filled with zeros.

    Args:
      codes: integers in ``[0, 2**width)``, any shape, read in C order.
      width: bits of each, 0 to 32.

    Returns:
      The bytes.

    Raises:
      CodecError: an integer does not fit.

    Example:
      >>> pack_bits(np.array([1, 2, 3]), 4).hex()
      '2103'
    """
    flat = np.ravel(codes)
    _check_below(flat, 1 << width)
    if width in (8, 16):
        return flat.astype(f"<u{width // 8}").tobytes()
    num_codes, num_bytes = _period(width)
    codes = np.zeros((-(-flat.size // num_codes), num_codes), np.uint32)
    codes.reshape(-1)[: flat.size] = flat
    packed = np.zeros((len(codes), num_bytes), np.uint8)
    for code, byte, distance in _shared_bits(width):
        packed[:, byte] |= _shifted_up(codes[:, code], -distance).astype(np.uint8)
    return packed.tobytes()[: -(-flat.size * width // 8)]


def unpack_bits(data: bytes, count: int, width: int) -> np.ndarray:
    """The integers that `pack_bits` packed.

    Args:
      data: exactly ``ceil(count * width / 8)`` bytes.
      count: how many integers.
      width: bits of each, 0 to 32.

    Returns:
      uint32 ``[count]`` (uint8 and uint16 for widths 8 and 16).

    Raises:
      CodecError: the bits that fill up the last byte are not zero.
    """
    if width in (8, 16):
        return np.frombuffer(data, dtype=f"<u{width // 8}", count=count)
    filling = 8 * len(data) - count * width
    if filling and data[-1] >> (8 - filling):
        raise CodecError(
            f"expected the last {filling} bits of a packed tensor to be zero, "
            f"got byte {data[-1]:#04x}; the bytes were altered, or belong to another message."
        )
    num_codes, num_bytes = _period(width)
    packed = np.zeros((-(-count // num_codes), num_bytes), np.uint8)
    packed.reshape(-1)[: len(data)] = np.frombuffer(data, np.uint8)
    codes = np.zeros((len(packed), num_codes), np.uint32)
    for code, byte, distance in _shared_bits(width):
        codes[:, code] |= _shifted_up(packed[:, byte].astype(np.uint32), distance)
    codes &= np.uint32((1 << width) - 1)
    return codes.reshape(-1)[:count]


def pack_trits(codes: np.ndarray) -> bytes:
    """Packs numbers below 3 into ``ceil(codes.size / 5)`` bytes, the last one filled with zeros.

    Args:
      codes: integers in ``[0, 3)``, any shape, read in C order.

    Returns:
      The bytes.

    Raises:
      CodecError: a number is none of 0, 1 and 2.

    Example:
      >>> pack_trits(np.array([2, 0, 1, 0, 0, 1])).hex()
      '0b01'
    """
    flat = np.ravel(codes)
    _check_below(flat, 3)
    padded = np.zeros((-(-flat.size // 5), 5), np.uint8)
    padded.reshape(-1)[: flat.size] = flat
    return (padded @ _TRIT_VALUES).tobytes()


def unpack_trits(data: bytes, count: int) -> np.ndarray:
    """The numbers that `pack_trits` packed.

    Args:
      data: exactly ``ceil(count / 5)`` bytes.
      count: how many numbers.

    Returns:
      uint8 ``[count]``.

    Raises:
      CodecError: a byte is above 242, or the numbers that fill up the last byte are not zero.
    """
    packed = np.frombuffer(data, np.uint8)
    codes = np.ravel(packed[:, None] // _TRIT_VALUES[None] % 3)
    if np.any(packed > 242) or np.any(codes[count:]):
        raise CodecError(
            "expected five numbers below 3 in each byte, zeros behind the last one; "
            "the bytes were altered, or belong to another message."
        )
    return codes[:count]


def pack_words(codes: np.ndarray, width: int) -> bytes:
    """Packs integers into ``ceil(codes.size * width / 28)`` words of 32 bits, 28 of them used.

    Args:
      codes: integers in ``[0, 2**width)``, any shape, read in C order.
      width: bits of each, 0 to 32.

    Returns:
      The bytes.

    Raises:
      CodecError: an integer does not fit.
    """
    num_words = -(-np.size(codes) * width // _WORD_BITS)
    stream = pack_bits(codes, width).ljust(-(-num_words * _WORD_BITS // 8), b"\0")
    return unpack_bits(stream, num_words, _WORD_BITS).astype("<u4").tobytes()


def unpack_words(data: bytes, count: int, width: int) -> np.ndarray:
    """The integers that `pack_words` packed.

    Args:
      data: exactly ``4 * ceil(count * width / 28)`` bytes.
      count: how many integers.
      width: bits of each, 0 to 32.

    Returns:
      uint32 ``[count]`` (uint8 and uint16 for widths 8 and 16).

    Raises:
      CodecError: a bit that is not used is not zero.
    """
    stream = pack_bits(np.frombuffer(data, "<u4"), _WORD_BITS)
    size = -(-count * width // 8)
    if any(stream[size:]):
        raise CodecError(
            "expected the bits behind the last element to be zero; "
            "the bytes were altered, or belong to another message."
        )
    return unpack_bits(stream[:size], count, width)


PACKINGS: dict[PackingName, Packing] = {
    "dense": Packing(lambda count, width: -(-count * width // 8), pack_bits, unpack_bits),
    "trits": Packing(
        lambda count, width: -(-count // 5),
        lambda codes, width: pack_trits(codes),
        lambda data, count, width: unpack_trits(data, count),
    ),
    "words": Packing(
        lambda count, width: 4 * -(-count * width // _WORD_BITS), pack_words, unpack_words
    ),
}


def _check_below(codes: np.ndarray, end: int) -> None:
    if codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < end:
        raise CodecError(
            f"expected integers in [0, {end}), got a range of [{codes.min()}, {codes.max()}]; "
            "the message was not made by its codec."
        )


def _period(width: int) -> tuple[int, int]:
    """The smallest number of integers that fill whole bytes, and the number of these bytes."""
    num_codes = 8 // math.gcd(width, 8)
    return num_codes, num_codes * width // 8


def _shared_bits(width: int) -> Iterator[tuple[int, int, int]]:
    """Each integer of a period with each byte that has bits of it.

    Yields:
      The integer, the byte, and by how many bits the byte lies above the integer's lowest one.
    """
    for code in range(_period(width)[0]):
        for byte in range(code * width // 8, -(-(code + 1) * width // 8)):
            yield code, byte, 8 * byte - code * width


def _shifted_up(numbers: np.ndarray, distance: int) -> np.ndarray:
    if distance < 0:
        return numbers >> np.uint32(-distance)
    return numbers << np.uint32(distance)
