"""Sparsification by a threshold: how many elements are sent depends on the tensor.

    Q(x)_i = x_i if |x_i| >= t rms(x), else 0

Which elements are sent travels as a mask, in runs of zeros if that is shorter.

References:
  Strom. Scalable distributed DNN training using commodity GPU cloud computing. Interspeech 2015.

  Dutta, Bergou, Abdelmoniem, Ho, Sahu, Canini, Kalnis. On the discrepancy between the theoretical
  analysis and practical implementations of compressed communication for distributed deep learning.
  AAAI 2020, arXiv:1911.08250.
"""

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.bits import BitCount
from fedjax_core.compression.base import Codec, Traits
from fedjax_core.compression.checks import real, shown
from fedjax_core.compression.coding import Coded
from fedjax_core.compression.numerics import norm, wide
from fedjax_core.compression.selection import tensorwise
from fedjax_core.compression.universal import ZeroRuns
from fedjax_core.compression.wire import Packed, Symbols, take


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masked(Packed):
    """A tensor of which some elements are sent, as they are.

    Attributes:
      values: the tensor; what is not sent is zero.
      mask: of symbols 0 and 1 in the shape of the tensor, 1 where an element is sent.
    """

    values: Any
    mask: Coded

    @property
    def num_elements(self) -> int:
        """See `Packed`."""
        return self.mask.num_elements

    def count(self) -> BitCount:
        """See `Packed`."""
        sent = jnp.sum(self.mask.symbols.codes, dtype=jnp.uint32)
        width = jnp.uint32(8 * np.dtype(self.values.dtype).itemsize)
        return self.mask.count() + BitCount(jnp.zeros_like(sent), sent).times(width)

    def to_bytes(self) -> bytes:
        """See `Packed`."""
        is_sent = np.asarray(self.mask.symbols.codes) == 1
        return self.mask.to_bytes() + np.asarray(self.values)[is_sent].tobytes()

    def from_bytes(self, data: memoryview) -> tuple[Self, int]:
        """See `Packed`."""
        mask, begin = self.mask.from_bytes(data)
        is_sent = np.asarray(mask.symbols.codes) == 1
        dtype = np.dtype(self.values.dtype)
        end = begin + int(is_sent.sum()) * dtype.itemsize
        values = np.zeros(self.values.shape, dtype)
        values[is_sent] = np.frombuffer(take(data, end)[begin:], dtype)
        return dataclasses.replace(self, values=values, mask=mask), end


def threshold(limit: float, *, min_size: int = 20_000) -> Codec:
    """Keeps the elements of each large floating tensor that are at least `limit` root mean squares.

    It needs no selection of the largest, which `top_k` does, and sends more where more is large.
    The kept elements travel raw; no later stage of a chain sees them.

    Args:
      limit: in root mean squares of the tensor, not negative.
      min_size: tensors with strictly more elements are sparsified, the others and all integers
        travel whole.

    Returns:
      The codec. A tensor that holds a NaN or an infinity travels whole.

    Raises:
      CodecError: `limit` or `min_size` is out of range; a leaf to encode is not an array.

    Example:
      >>> from fedjax_core.compression import Keys
      >>> codec = threshold(1.0, min_size=0)
      >>> keys = Keys(jax.random.key(0), jax.random.key(1))
      >>> _, message = codec.encode(keys, (), (), jnp.array([1.0, -4.0, 2.0, 3.0]))
      >>> codec.decode(keys, (), message).tolist()
      [0.0, -4.0, 0.0, 3.0]
    """
    exact = real("limit", limit, 0, hint="it is in root mean squares of the tensor")

    def encode_tensor(key: jax.Array, tensor: jax.Array) -> tuple[Masked, tuple[()]]:
        del key
        flat = jnp.ravel(wide(tensor))
        least = norm(flat)[0] * (exact / math.sqrt(flat.size))
        # Nothing is below a NaN.
        is_sent = (~(jnp.abs(flat) < least) & (flat != 0)).reshape(tensor.shape)
        mask = Coded(Symbols(is_sent.astype(jnp.uint8), 1, np.dtype(tensor.dtype)), ZeroRuns())
        return Masked(jnp.where(is_sent, tensor, jnp.zeros_like(tensor)), mask), ()

    def decode_tensor(key: jax.Array, masked: Masked, side: tuple[()]) -> jax.Array:
        del key, side
        return masked.values

    # Some element is at least as large as the root mean square.
    traits = Traits(contractive=exact <= 1)
    name = f"threshold({shown(exact)})"
    return tensorwise(name, traits, min_size, encode_tensor, decode_tensor, Masked)
