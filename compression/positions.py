"""Positions of the elements of a sparse tensor, in the shortest of four forms.

| tag | form | bits |
|---|---|---|
| 0 | indices | k * ceil(log2 size) |
| 1 | mask | size |
| 2 | gaps in Elias gamma | by value |
| 3 | gaps in Golomb-Rice with the best parameter | by value, and 5 |

A gap is the number of elements between two positions. If a hundredth of many elements are picked at
random, a gap takes 8.11 bits in Golomb-Rice code, where the least possible is 8.08; clustered ones
take less in Elias gamma.

References:
  Golomb. Run-length encodings. IEEE Transactions on Information Theory 12(3), 1966.

  Sattler, Wiedemann, Müller, Samek. Robust and communication-efficient federated learning from
  non-iid data. IEEE TNNLS 31(9), 2020, arXiv:1903.02891 (Golomb codes of gaps).
"""

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.bits import BitCount
from fedjax_core.compression.packing import pack_bits, unpack_bits
from fedjax_core.compression.universal import Code, EliasGamma, Rice
from fedjax_core.compression.wire import Packed, take
from fedjax_core.errors import CodecError

_INDICES, _MASK, _FIRST_CODE = 0, 1, 2
_CODES: tuple[Code, ...] = (EliasGamma(), Rice(None))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Positions(Packed):
    """Which elements of a tensor are sent.

    Attributes:
      indices: int32 ``[k]``, positions in the flat tensor, strictly increasing.
      size: static, the number of elements of the tensor.
    """

    indices: Any
    size: int = dataclasses.field(metadata={"static": True})

    @property
    def num_elements(self) -> int:
        """See `Packed`."""
        return self.size

    @property
    def num_positions(self) -> int:
        """How many elements are sent: k."""
        return math.prod(self.indices.shape)

    @property
    def width(self) -> int:
        """Bits of one position by its index: ceil(log2 size)."""
        return (self.size - 1).bit_length()

    def count(self) -> BitCount:
        """See `Packed`."""
        if self._is_known:
            return BitCount.zero()
        indices = jnp.asarray(self.indices)
        before = jnp.concatenate([jnp.full(1, -1, indices.dtype), indices[:-1]])
        gaps = (indices - before - 1).astype(jnp.uint32)
        fixed = min(self.num_positions * self.width, self.size)
        counts = [BitCount.of(fixed), *(code.count(gaps, self.width) for code in _CODES)]
        shortest = jax.tree.map(lambda *words: jnp.stack(words), *counts).min()
        return shortest.whole_bytes() + BitCount.of(8)

    def to_bytes(self) -> bytes:
        """See `Packed`."""
        if self._is_known:
            return b""
        indices = np.asarray(self.indices)
        fixed = min(self.num_positions * self.width, self.size)
        tag = _MASK if self.size < self.num_positions * self.width else _INDICES
        body, limit = None, -(-fixed // 8)
        gaps = (np.diff(indices, prepend=-1) - 1).astype(np.uint32)
        for offset, code in enumerate(_CODES):
            shorter = code.write(gaps, self.width, limit)
            if shorter is not None:
                tag, body, limit = _FIRST_CODE + offset, shorter, len(shorter)
        if body is None:
            is_mask = tag == _MASK
            body = pack_bits(self._mask(indices), 1) if is_mask else pack_bits(indices, self.width)
        return bytes([tag]) + body

    def from_bytes(self, data: memoryview) -> tuple[Self, int]:
        """See `Packed`."""
        if self._is_known:
            indices = np.arange(self.num_positions, dtype=np.int64)
            return self._with_indices(indices), 0
        tag = take(data, 1)[0]
        body = data[1 : 2 + self._limit]
        if tag == _INDICES:
            used = -(-self.num_positions * self.width // 8)
            indices = unpack_bits(bytes(take(body, used)), self.num_positions, self.width)
        elif tag == _MASK:
            used = -(-self.size // 8)
            indices = np.flatnonzero(unpack_bits(bytes(take(body, used)), self.size, 1))
        elif tag < _FIRST_CODE + len(_CODES):
            gaps, used = _CODES[tag - _FIRST_CODE].read(body, self.num_positions, self.width)
            indices = np.cumsum(gaps.astype(np.int64) + 1) - 1
        else:
            raise CodecError(
                f"expected positions to begin with a tag below {_FIRST_CODE + len(_CODES)}, got "
                f"{tag}; the bytes were altered, or belong to another message."
            )
        return self._with_indices(self._check(indices)), 1 + used

    @property
    def _is_known(self) -> bool:
        """Whether there is nothing to send: no element is picked, or all are."""
        return self.num_positions in (0, self.size)

    @property
    def _limit(self) -> int:
        """No form takes more bytes than this, so none has to be searched for behind it."""
        return -(-max(self.num_positions * self.width, self.size) // 8)

    def _mask(self, indices: np.ndarray) -> np.ndarray:
        mask = np.zeros(self.size, np.uint8)
        mask[indices] = 1
        return mask

    def _check(self, indices: np.ndarray) -> np.ndarray:
        """The indices, if they are as many as expected, increasing, inside the tensor."""
        count = self.num_positions
        is_increasing = bool(np.all(np.diff(indices.astype(np.int64)) > 0))
        if len(indices) != count or not is_increasing or np.any(indices >= self.size):
            raise CodecError(
                f"expected {count} increasing positions below {self.size}, got {len(indices)} that "
                "are not; the bytes were altered, or belong to another message."
            )
        return indices

    def _with_indices(self, indices: np.ndarray) -> Self:
        indices = indices.astype(self.indices.dtype).reshape(self.indices.shape)
        return dataclasses.replace(self, indices=indices)
