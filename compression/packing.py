"""Dense packing of unsigned integers on the host: `width` bits each, the lowest bit first.

Element i occupies bits ``i * width`` to ``(i + 1) * width - 1``, where bit j is bit ``j % 8`` of
byte ``j // 8``.
"""

import numpy as np

from fedjax_core.errors import CodecError

# Numbers handled at once, so that the array of single bits stays small: a multiple of 8.
_CHUNK = 1 << 20


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
    if flat.size and (int(flat.max()) >> width or int(flat.min()) < 0):
        raise CodecError(
            f"expected integers in [0, 2**{width}), got a range of [{flat.min()}, {flat.max()}]; "
            "the message was not made by its codec."
        )
    if width in (8, 16):
        return flat.astype(f"<u{width // 8}").tobytes()
    chunks = (flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK))
    return b"".join(_pack_chunk(chunk, width) for chunk in chunks)


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
    stride = _CHUNK * width // 8
    codes = np.empty(count, np.uint32)
    for index, start in enumerate(range(0, count, _CHUNK)):
        end = min(start + _CHUNK, count)
        chunk = data[index * stride : (index + 1) * stride]
        codes[start:end] = _unpack_chunk(chunk, end - start, width)
    return codes


def _pack_chunk(codes: np.ndarray, width: int) -> bytes:
    bits = np.empty((codes.size, width), np.uint8)
    for position in range(width):
        bits[:, position] = (codes >> position) & 1
    return np.packbits(bits, bitorder="little").tobytes()


def _unpack_chunk(data: bytes, count: int, width: int) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=count * width, bitorder="little")
    columns = bits.reshape(count, width)
    codes = np.zeros(count, np.uint32)
    for position in range(width):
        codes |= columns[:, position].astype(np.uint32) << np.uint32(position)
    return codes
