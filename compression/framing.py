"""Frames: messages as they are handed to a network, each of which says what it is.

| field | bytes |
|---|---|
| magic ``FC``, version | 2 + 1 |
| flags: 1 seeds, 2 weight | 1 |
| codec: the first bytes of SHA-256 of its name | 4 |
| number of tensors, and for each its kind, dtype, width, rank and dimensions | by shape |
| seeds, if any: the implementation and both keys | by implementation |
| weight, if any: float32 | 4 |
| length of the message | 8 |
| the message: side information (scales, tables, positions), statistics, payload | its bits / 8 |
| CRC-32 of all before | 4 |

Integers without a size are LEB128, the others little-endian. A receiver knows the codec and the
type of the value, so the table of tensors holds nothing new; it is there so that bytes of another
model are refused and not misread. All of a frame but the message itself is overhead, which the
ledger of ``Execution(wire=True)`` lists in rows of their own.

Reading trusts nothing: sizes are compared before anything is allocated, and what does not fit is
refused. A CRC finds accidents, not forgeries; those need a signature around the frame.

References:
  ISO/IEC 8802-3 (CRC-32, as in zlib). DWARF 5, section 7.6 (LEB128).
"""

import hashlib
import math
import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.compression import wire
from fedjax_core.compression.base import (
    Codec,
    Keys,
    Message,
    check_bytes,
    check_codec,
    check_message,
    from_bytes,
    to_bytes,
)
from fedjax_core.compression.checks import as_float, told
from fedjax_core.errors import CodecError

_MAGIC, _VERSION = b"FC", 1
_SEEDS, _WEIGHT = 1, 2
_HEAD = struct.Struct("<2sBB4s")
_LENGTH = struct.Struct("<Q")
_FLOAT = struct.Struct("<f")
_CHECKSUM = struct.Struct("<I")
# Words of a key of each implementation.
_KEY_WORDS = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}


class Frame(NamedTuple):
    """What a frame holds.

    Attributes:
      message: the message, its leaves NumPy arrays.
      keys: of the sender, or None where the receiver derives them.
      weight: of the value in a mean, or None.
    """

    message: Message
    keys: Keys | None = None
    weight: float | None = None


def frame(
    codec: Codec, message: Message, *, keys: Keys | None = None, weight: float | None = None
) -> bytes:
    """The bytes of a message with all that it takes to recognise and check it.

    Args:
      codec: that encoded it.
      message: of one sender, its leaves on the host or on a device.
      keys: to be sent along, for a receiver that cannot derive them.
      weight: to be sent along.

    Returns:
      The frame: ``frame_bits(codec, message) / 8`` bytes more than the message, if it holds
      neither keys nor a weight.

    Raises:
      CodecError: `message` is not one of this codec.

    Example:
      >>> from fedjax_core.compression import identity
      >>> codec, message = identity(), Message(np.float32([1.5, 2.5]))
      >>> data = frame(codec, message, weight=20.0)
      >>> read = unframe(codec, data, like=message)
      >>> len(data), read.message.payload.tolist(), read.weight
      (39, [1.5, 2.5], 20.0)
    """
    body = to_bytes(codec, message)
    if keys is not None and not _are_keys(keys):
        raise CodecError(
            f"expected keys to be Keys(shared, client) of two typed keys, or None, got {keys!r}; "
            "make keys by jax.random.key(seed)."
        )
    if weight is not None and not _is_float32(weight):
        got = told(weight)
        raise CodecError(f"expected weight to be a number that float32 holds, got {got}.")
    flags = _SEEDS * (keys is not None) | _WEIGHT * (weight is not None)
    parts = [
        _HEAD.pack(_MAGIC, _VERSION, flags, _codec_id(codec)),
        _table(message),
        _write_keys(keys) if keys is not None else b"",
        _FLOAT.pack(weight) if weight is not None else b"",
        _LENGTH.pack(len(body)),
        body,
    ]
    data = b"".join(parts)
    return data + _CHECKSUM.pack(zlib.crc32(data))


def unframe(codec: Codec, data: bytes | bytearray | memoryview, like: Message) -> Frame:
    """What `frame` wrote.

    Args:
      codec: that encoded the message.
      data: all bytes of one frame; not trusted.
      like: a message of the same structure, shapes and dtypes, of arrays or
        `jax.ShapeDtypeStruct`; get it by `jax.eval_shape` of `Codec.encode`.

    Returns:
      The frame.

    Raises:
      CodecError: the bytes are no frame of this version, of this codec and of these tensors, were
        cut short or altered, or no message has these bytes.
    """
    check_codec(codec, "that encoded the message")
    data = check_bytes(data)
    reader = _Reader(memoryview(data))
    magic, version, flags, codec_id = _HEAD.unpack(reader.take(_HEAD.size))
    _check(magic == _MAGIC, f"a frame to begin with {_MAGIC!r}", f"{magic!r}")
    _check(version == _VERSION, f"a frame of version {_VERSION}", f"version {version}")
    _check(flags in range(4), "flags of 0 to 3", str(flags))
    _check(codec_id == _codec_id(codec), f"a message of {codec.name}", f"one of {codec_id.hex()}")
    table = _table(wire.check_tensors(check_message(like)))
    got = bytes(reader.take(len(table)))
    _check(got == table, f"the tensors {_describe(like)}", "others")
    keys = _read_keys(reader) if flags & _SEEDS else None
    weight = _FLOAT.unpack(reader.take(_FLOAT.size))[0] if flags & _WEIGHT else None
    _check(weight is None or math.isfinite(weight), "a finite weight", str(weight))
    (length,) = _LENGTH.unpack(reader.take(_LENGTH.size))
    left = reader.left - _CHECKSUM.size
    _check(length == left, f"{length} bytes of a message", str(left))
    body = reader.take(length)
    (checksum,) = _CHECKSUM.unpack(reader.take(_CHECKSUM.size))
    found = zlib.crc32(memoryview(data)[: -_CHECKSUM.size])
    _check(checksum == found, f"a checksum of {checksum:#010x}", f"{found:#010x}")
    return Frame(from_bytes(codec, bytes(body), like), keys, weight)


def frame_bits(codec: Codec, like: Message) -> int:
    """What a frame adds to a message, if it holds neither keys nor a weight.

    Args:
      codec: that encodes the message.
      like: the message, or its `jax.ShapeDtypeStruct`.

    Returns:
      The number of bits, the same for all messages of one type.

    Example:
      >>> from fedjax_core.compression import identity
      >>> frame_bits(identity(), Message(jax.ShapeDtypeStruct((1000,), np.float32)))
      224
    """
    check_codec(codec, "that encodes the message")
    wire.check_tensors(check_message(like))
    return 8 * (_HEAD.size + len(_table(like)) + _LENGTH.size + _CHECKSUM.size)


def transport(codec: Codec, like: Message) -> tuple[Callable[[Any, int], Any], int]:
    """How messages of one type travel as frames: through bytes and back, and the overhead in bits.

    Args:
      codec: that encodes them.
      like: of `jax.ShapeDtypeStruct`.

    Returns:
      A function of the host, which raises CodecError if the size that the device counted (its
      second argument, an integer) is not that of the bytes; and `frame_bits`.
    """

    def travel(message: Message, counted: int) -> Message:
        message = jax.tree.map(np.asarray, message)
        data = frame(codec, message)
        size = 8 * len(data) - frame_bits(codec, like)
        if size > counted or (size < counted and codec.traits.exact_bits):
            raise CodecError(
                f"expected `bits` of {codec.name} to count the bytes that it writes, {size} bits, "
                f"got {counted}; correct it, or clear the trait `exact_bits` if it is a bound."
            )
        return unframe(codec, data, like).message

    return travel, frame_bits(codec, like)


def _is_float32(weight: Any) -> bool:
    exact = as_float(weight)
    if not abs(exact) <= float(np.finfo(np.float32).max):
        return False
    return exact == 0 or np.float32(exact) != 0


def _are_keys(keys: Any) -> bool:
    return isinstance(keys, Keys) and all(map(_is_key, keys))


def _is_key(key: Any) -> bool:
    dtype = getattr(key, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _check(is_right: bool, expected: str, got: str) -> None:
    if not is_right:
        raise CodecError(
            f"expected {expected}, got {got}: the bytes were altered, or belong to another "
            "message; pass all bytes of one frame, its codec, and the `like` of its value."
        )


class _Reader:
    """Takes the fields of a frame in order."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    @property
    def left(self) -> int:
        """How many bytes there are still."""
        return len(self._data)

    def take(self, num_bytes: int) -> memoryview:
        """The next bytes."""
        taken = wire.take(self._data, num_bytes)
        self._data = self._data[num_bytes:]
        return taken


def _codec_id(codec: Codec) -> bytes:
    return hashlib.sha256(codec.name.encode()).digest()[:4]


def _table(message: Message) -> bytes:
    """The tensors of a message, in the order in which they are written."""
    leaves = wire.leaves((message.side, message.stats, message.payload))
    return b"".join([_varint(len(leaves)), *map(_entry, leaves)])


def _entry(leaf: Any) -> bytes:
    """One tensor: the name of its kind, and the dtypes and dimensions of its arrays."""
    kind = type(leaf).__name__ if wire.is_packed(leaf) else ""
    width = leaf.width if isinstance(leaf, wire.Symbols) else 0
    arrays = jax.tree.leaves(leaf)
    return b"".join(
        [bytes([zlib.crc32(kind.encode()) & 0xFF, width]), _varint(len(arrays))]
        + [_array_entry(array) for array in arrays]
    )


def _array_entry(array: Any) -> bytes:
    dtype = np.dtype(array.dtype)
    code = zlib.crc32(dtype.name.encode()) & 0xFF
    return b"".join([bytes([code]), *map(_varint, (len(array.shape), *array.shape))])


def _describe(message: Message) -> str:
    leaves = wire.leaves((message.side, message.stats, message.payload))
    arrays = [array for leaf in leaves for array in jax.tree.leaves(leaf)]
    shown = ", ".join(f"{np.dtype(a.dtype).name}{list(a.shape)}" for a in arrays[:8])
    return shown + (f" and {len(arrays) - 8} more" if len(arrays) > 8 else "")


def _varint(number: int) -> bytes:
    """LEB128: seven bits a byte, the lowest first, the upper bit set but in the last one."""
    parts = []
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def _write_keys(keys: Keys) -> bytes:
    name = str(jax.random.key_impl(keys.shared))
    data = [np.asarray(jax.random.key_data(key)).astype("<u4") for key in keys]
    is_same = str(jax.random.key_impl(keys.client)) == name
    if not is_same or name not in _KEY_WORDS or any(x.shape != (_KEY_WORDS[name],) for x in data):
        raise CodecError(
            f"expected two keys of one of {sorted(_KEY_WORDS)}, got {list(map(str, keys))}; pass "
            "two typed keys of the same kind, jax.random.key(seed)."
        )
    return bytes([list(_KEY_WORDS).index(name)]) + b"".join(x.tobytes() for x in data)


def _read_keys(reader: _Reader) -> Keys:
    (index,) = reader.take(1)
    _check(
        index < len(_KEY_WORDS), f"an implementation of keys below {len(_KEY_WORDS)}", str(index)
    )
    name, words = list(_KEY_WORDS.items())[index]
    data = [np.frombuffer(reader.take(4 * words), "<u4").astype(np.uint32) for _ in range(2)]
    return Keys(*(jax.random.wrap_key_data(jnp.asarray(x), impl=name) for x in data))
