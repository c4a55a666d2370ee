"""Casts to shorter floats.

| codec | bits an element | mantissa | scale | mean square error on a Gaussian |
|---|---|---|---|---|
| `bfloat16` | 16 | 7 bits | none | 2.8e-6 |
| `float8` | 8 | 3 bits (e4m3) | the largest magnitude becomes 448 | 7.0e-4 |

References:
  Micikevicius et al. FP8 formats for deep learning. 2022, arXiv:2209.05433.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.compression.base import Codec, Traits
from fedjax_core.compression.numerics import narrow, ratio, wide
from fedjax_core.compression.selection import tensorwise
from fedjax_core.compression.wire import Symbols

_TRAITS = Traits(contractive=True)


def bfloat16(*, min_size: int = 20_000) -> Codec:
    """Sends each large floating tensor as bfloat16, rounded to the nearest, halves to the even.

    Args:
      min_size: tensors with strictly more elements are cast, the others and all integers travel
        raw.

    Returns:
      The codec. Finite elements stay finite: what would round to infinity becomes the largest
      bfloat16. Infinities and NaN stay what they are.

    Raises:
      CodecError: `min_size` is out of range; a leaf to encode is not an array.

    Example:
      >>> from fedjax_core.compression import Keys
      >>> codec = bfloat16(min_size=0)
      >>> keys = Keys(jax.random.key(0), jax.random.key(1))
      >>> _, message = codec.encode(keys, (), (), jnp.array([1.0, 1.001, -2.5]))
      >>> codec.decode(keys, (), message).tolist()
      [1.0, 1.0, -2.5]
    """

    def encode_tensor(key: jax.Array, tensor: jax.Array) -> tuple[Symbols, tuple[()]]:
        del key
        codes = jax.lax.bitcast_convert_type(narrow(wide(tensor), jnp.bfloat16), jnp.uint16)
        return Symbols(codes, 16, np.dtype(tensor.dtype)), ()

    def decode_tensor(key: jax.Array, symbols: Symbols, side: tuple[()]) -> jax.Array:
        del key, side
        return jax.lax.bitcast_convert_type(symbols.codes, jnp.bfloat16).astype(symbols.dtype)

    return tensorwise("bfloat16()", _TRAITS, min_size, encode_tensor, decode_tensor)


def float8(*, min_size: int = 20_000) -> Codec:
    """Sends each large floating tensor as float8 (e4m3), its largest magnitude as 448.

    Rounded to the nearest, halves to the even. A tensor takes 32 bits more (64 if float64) for its
    largest magnitude, which comes back unchanged. Magnitudes from 2**-6 / 448 of it on have a
    relative error of at most 2**-4, smaller ones an absolute error of 2**-10 / 448 of it.

    Args:
      min_size: tensors with strictly more elements are cast, the others and all integers travel
        raw.

    Returns:
      The codec. A tensor that holds a NaN or an infinity decodes to non-finite values everywhere.

    Raises:
      CodecError: `min_size` is out of range; a leaf to encode is not an array.

    Example:
      >>> from fedjax_core.compression import Keys
      >>> codec = float8(min_size=0)
      >>> keys = Keys(jax.random.key(0), jax.random.key(1))
      >>> _, message = codec.encode(keys, (), (), jnp.array([7.0, -3.5, 1.8, 0.0]))
      >>> codec.decode(keys, (), message).tolist()
      [7.0, -3.5, 1.75, 0.0]
    """
    limit = float(jnp.finfo(jnp.float8_e4m3fn).max)

    def encode_tensor(key: jax.Array, tensor: jax.Array) -> tuple[Symbols, jax.Array]:
        del key
        x = wide(tensor)
        largest = jnp.max(jnp.abs(x))
        cast = (ratio(x, largest) * limit).astype(jnp.float8_e4m3fn)
        codes = jax.lax.bitcast_convert_type(cast, jnp.uint8)
        return Symbols(codes, 8, np.dtype(tensor.dtype)), largest

    def decode_tensor(key: jax.Array, symbols: Symbols, largest: jax.Array) -> jax.Array:
        del key
        cast = jax.lax.bitcast_convert_type(symbols.codes, jnp.float8_e4m3fn)
        return (cast.astype(largest.dtype) / limit * largest).astype(symbols.dtype)

    return tensorwise("float8()", _TRAITS, min_size, encode_tensor, decode_tensor)
