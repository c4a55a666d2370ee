"""Lossless compression of raw tensors: their bytes by place, then zstd.

All lowest bytes of the elements come first, all highest bytes (of floats: sign and exponent, much
alike) last. On the host `len(to_bytes(...))` is the true size. A device cannot know what zstd makes
of a tensor, so there `bits` is only a bound: the raw size and a byte. For a size that is counted,
quantise and use an entropy code.

References:
  Collet, Kucherawy. Zstandard compression and the application/zstd media type. RFC 8878, 2021.
"""

import dataclasses
import math
from typing import Any, Self

import jax
import numpy as np

from fedjax_core.bits import BitCount
from fedjax_core.compression.base import Codec, Keys, Message, stateless
from fedjax_core.compression.bitstreams import altered
from fedjax_core.compression.coding import LOSSLESS
from fedjax_core.compression.wire import (
    Packed,
    Symbols,
    array_from_bytes,
    check_tensors,
    is_packed,
    take,
    to_bytes,
)
from fedjax_core.errors import CodecError

_PLAIN, _COMPRESSED = 0, 1
# Bytes that hold the length of what zstd made.
_LENGTH_BYTES = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shuffled(Packed):
    """A tensor whose bytes travel by place, compressed by zstd where that makes them fewer.

    Attributes:
      tensor: an array of numbers, or symbols.
      level: static, of zstd.
    """

    tensor: Any
    level: int = dataclasses.field(metadata={"static": True})

    @property
    def num_elements(self) -> int:
        """See `Packed`."""
        return math.prod(self._array.shape)

    @property
    def num_bytes(self) -> int:
        """Of what would travel otherwise."""
        if isinstance(self.tensor, Symbols):
            return self.tensor.num_bytes
        return self._num_raw

    def count(self) -> BitCount:
        """A bound: nothing for a tensor of no bytes, else its bytes and one more."""
        return BitCount.of(8 * (self.num_bytes + 1) if self.num_bytes else 0)

    def to_bytes(self) -> bytes:
        """See `Packed`."""
        import zstandard

        if not self.num_bytes:
            return b""
        array = np.ascontiguousarray(self._array)
        places = array.reshape(-1).view(np.uint8).reshape(-1, array.dtype.itemsize)
        frame = zstandard.ZstdCompressor(level=self.level).compress(places.T.tobytes())
        if len(frame) + _LENGTH_BYTES >= self.num_bytes:
            return bytes([_PLAIN]) + to_bytes(self.tensor)
        return bytes([_COMPRESSED]) + len(frame).to_bytes(_LENGTH_BYTES, "little") + frame

    def from_bytes(self, data: memoryview) -> tuple[Self, int]:
        """See `Packed`."""
        if not self.num_bytes:
            return self._with(np.zeros(self._array.shape, self._array.dtype)), 0
        tag = take(data, 1)[0]
        if tag == _PLAIN and isinstance(self.tensor, Symbols):
            tensor, used = self.tensor.from_bytes(data[1:])
            return dataclasses.replace(self, tensor=tensor), 1 + used
        if tag == _PLAIN:
            array, used = array_from_bytes(self.tensor, data[1:])
            return self._with(array), 1 + used
        begin = 1 + _LENGTH_BYTES
        length = int.from_bytes(take(data, begin)[1:], "little")
        if tag != _COMPRESSED or length + _LENGTH_BYTES >= self.num_bytes:
            raise altered(f"a tag of 0 or 1 and fewer than {self.num_bytes} bytes")
        raw = _decompress(bytes(take(data[begin:], length)), self._num_raw)
        itemsize = np.dtype(self._array.dtype).itemsize
        places = np.frombuffer(raw, np.uint8).reshape(itemsize, -1)
        array, _ = array_from_bytes(self._array, memoryview(places.T.tobytes()))
        return self._with(array), begin + length

    @property
    def _array(self) -> Any:
        return self.tensor.codes if isinstance(self.tensor, Symbols) else self.tensor

    @property
    def _num_raw(self) -> int:
        """The bytes of the array itself."""
        return math.prod(self._array.shape) * np.dtype(self._array.dtype).itemsize

    def _with(self, array: np.ndarray) -> Self:
        """The same with other numbers, if they are possible."""
        if not isinstance(self.tensor, Symbols):
            return dataclasses.replace(self, tensor=array)
        symbols = dataclasses.replace(self.tensor, codes=array)
        symbols.to_bytes()  # which refuses numbers that are no symbols
        return dataclasses.replace(self, tensor=symbols)


def lossless(level: int = 3) -> Codec:
    """Compresses arrays, and symbols of an earlier stage, by zstd after sorting bytes by place.

    Every bit comes back, also of signed zeros, subnormals and NaNs.

    Args:
      level: of zstd, 1 (fast) to 19 (small).

    Returns:
      A codec whose `bits` is a bound, the raw size and a byte a tensor: see the module.

    Raises:
      CodecError: `level` is out of range.

    Example:
      >>> from fedjax_core.compression import to_bytes
      >>> codec, value = lossless(), np.zeros(1000, np.float32)
      >>> _, message = codec.encode(Keys(jax.random.key(0), jax.random.key(1)), (), (), value)
      >>> codec.traits.exact_bits, int(codec.bits(message)), len(to_bytes(codec, message)) < 50
      (False, 32008, True)
    """
    if isinstance(level, bool) or not isinstance(level, int) or not 1 <= level <= 19:
        raise CodecError(f"expected level to be an integer from 1 to 19, got {level!r}.")

    def encode(keys: Keys, value: Any) -> Message:
        del keys
        check_tensors(value)

        def shuffle(node: Any) -> Any:
            is_other = is_packed(node) and not isinstance(node, Symbols)
            return node if is_other else Shuffled(node, level)

        return Message(jax.tree.map(shuffle, value, is_leaf=is_packed))

    def decode(keys: Keys, message: Message) -> Any:
        del keys
        return jax.tree.map(
            lambda node: node.tensor if isinstance(node, Shuffled) else node,
            message.payload,
            is_leaf=is_packed,
        )

    name = f"lossless({'' if level == 3 else level})"
    return stateless(name, LOSSLESS._replace(exact_bits=False), encode, decode)


def _decompress(frame: bytes, expected: int) -> bytes:
    """What a frame holds, if it says itself that these are so many bytes, before any is taken."""
    import zstandard

    try:
        if zstandard.frame_content_size(frame) != expected:
            raise altered(f"a frame of {expected} bytes")
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise altered("a frame of zstd") from error
