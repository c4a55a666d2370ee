"""Uniform quantisation between the minimum and the maximum of each tensor.

    step = (max - min) / (2**bits - 1)
    q(x) = floor((x - min) / step + u),   u uniform in [0, 1)       (stochastic: E Q(x) = x)
    Q(x) = min + step * q(x)

The rule of TFF's `quantize_above_threshold` (tensors above a threshold, the others raw), but with
symbols packed densely, where TFF put 28 bits into each 32-bit word.

References:
  Suresh, Yu, Kumar, McMahan. Distributed mean estimation with limited communication. ICML 2017,
  arXiv:1611.00429 (stochastic k-level quantisation).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.compression.base import Codec, Keys, Message, Traits, stateless
from fedjax_core.compression.selection import check_min_size, decode_large, encode_large
from fedjax_core.compression.wire import Symbols
from fedjax_core.errors import CodecError

_MAX_BITS = 16


def uniform_quantize(bits: int = 8, *, min_size: int = 20_000, stochastic: bool = True) -> Codec:
    """Quantises each large floating tensor to ``2**bits`` levels from its minimum to its maximum.

    A symbol takes `bits` bits, and a tensor 64 more for its range (128 if float64). Its minimum,
    its maximum and every value that lies on a level of an exactly representable grid come back
    unchanged.

    Args:
      bits: bits a symbol, 1 to 16.
      min_size: tensors with strictly more elements are quantised, the others and all integers
        travel raw. Behind a sparsifying stage the size of the original tensor counts.
      stochastic: round up with the probability of the remainder, by the sender's key, so that the
        reconstruction is unbiased; otherwise round to the nearest level, halves to the even one.

    Returns:
      The codec. A tensor that holds a NaN or an infinity decodes to non-finite values everywhere.

    Raises:
      CodecError: `bits` or `min_size` is out of range; a leaf to encode is not an array.

    Note:
      The probability of rounding up is exact to 2**-32. Arithmetic is in float32 (float64 for
      float64), so a float16 or bfloat16 result is rounded once more.

    Example:
      >>> codec = uniform_quantize(1, min_size=0)
      >>> keys = Keys(jax.random.key(0), jax.random.key(1))
      >>> _, message = codec.encode(keys, (), (), jnp.array([0.0, 2.0, 2.0]))
      >>> codec.decode(keys, (), message).tolist()
      [0.0, 2.0, 2.0]
    """
    width, threshold = _check_bits(bits), check_min_size(min_size)

    def encode(keys: Keys, value: Any) -> Message:
        def encode_tensor(index: int, tensor: jax.Array) -> tuple[Symbols, jax.Array]:
            key = jax.random.fold_in(keys.client, index) if stochastic else None
            return _quantize(tensor, width, key)

        return encode_large(value, threshold, encode_tensor)

    def decode(keys: Keys, message: Message) -> Any:
        del keys
        return decode_large(message, lambda node: isinstance(node, Symbols), _dequantize)

    traits = Traits(
        unbiased=stochastic,
        contractive=False,
        linear=False,
        summable=False,
        exact_bits=True,
        needs_seed=False,
    )
    rounding = "" if stochastic else ", stochastic=False"
    return stateless(f"uniform_quantize(bits={width}{rounding})", traits, encode, decode)


def _check_bits(bits: int) -> int:
    is_integer = isinstance(bits, int | np.integer) and not isinstance(bits, bool)
    if not is_integer or not 1 <= bits <= _MAX_BITS:
        raise CodecError(f"expected bits to be an integer from 1 to {_MAX_BITS}, got {bits!r}.")
    return int(bits)


def _quantize(tensor: jax.Array, width: int, key: jax.Array | None) -> tuple[Symbols, jax.Array]:
    """The symbols of one tensor, and its range ``[2]``."""
    levels = 2**width - 1
    wide = tensor.astype(jnp.float64 if tensor.dtype == jnp.float64 else jnp.float32)
    low, high = jnp.min(wide), jnp.max(wide)
    half_step = _half_step(low, high, levels)
    position = (0.5 * wide - 0.5 * low) / jnp.where(half_step > 0, half_step, 1)
    # What NaN becomes as an integer differs between devices.
    position = jnp.where(jnp.isfinite(position), position, 0)
    rounded = jnp.round(position) if key is None else _round_stochastically(key, position)
    # The division may miss the last level by an ulp on either side; the maximum must be exact.
    codes = jnp.where(wide >= high, levels, jnp.minimum(rounded, levels))
    dtype = jnp.uint8 if width <= 8 else jnp.uint16
    return Symbols(codes.astype(dtype), width, np.dtype(tensor.dtype)), jnp.stack([low, high])


def _dequantize(symbols: Symbols, bounds: jax.Array) -> jax.Array:
    levels = 2**symbols.width - 1
    low, high = bounds[0], bounds[1]
    codes = symbols.codes.astype(bounds.dtype)
    inner = 2 * (0.5 * low + codes * _half_step(low, high, levels))
    return jnp.where(symbols.codes == levels, high, inner).astype(symbols.dtype)


def _half_step(low: jax.Array, high: jax.Array, levels: int) -> jax.Array:
    """Half of the distance between two levels: a range may overflow where its half does not."""
    return (0.5 * high - 0.5 * low) / levels


def _round_stochastically(key: jax.Array, position: jax.Array) -> jax.Array:
    """``floor(position + u)`` without forming the sum, whose rounding would move exact integers."""
    floor = jnp.floor(position)
    remainder = ((position - floor) * 2.0**32).astype(jnp.uint32)
    draw = jax.random.bits(key, position.shape, jnp.uint32)
    return floor + (draw < remainder).astype(position.dtype)
