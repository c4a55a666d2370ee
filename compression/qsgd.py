"""QSGD: stochastic rounding to multiples of a fraction of the norm.

    Q(x)_i = |x| sign(x_i) l_i / s,   l_i = floor(s |x_i| / |x| + u),   u uniform in [0, 1)

With |x| the Euclidean norm of the tensor, or of each bucket of it:

    E Q(x) = x,   E |Q(x) - x|^2 <= min(n / s^2, sqrt(n) / s) |x|^2     (n: elements of a bucket)

References:
  Alistarh, Grubic, Li, Tomioka, Vojnovic. QSGD: communication-efficient SGD via gradient
  quantization and encoding. NeurIPS 2017, arXiv:1610.02132.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.compression.base import Codec, Traits
from fedjax_core.compression.checks import whole
from fedjax_core.compression.numerics import finite, narrow, norm, ratio, round_stochastically, wide
from fedjax_core.compression.selection import tensorwise
from fedjax_core.compression.wire import Symbols

_MAX_LEVELS = 2**15 - 1


def qsgd(levels: int, bucket: int | None = None, *, min_size: int = 20_000) -> Codec:
    """Rounds each element of a large floating tensor to one of ``2 * levels + 1`` values.

    A symbol holds ``levels`` plus the signed level, in ``ceil(log2(2 * levels + 1))`` bits;
    ``2**(b - 1) - 1`` levels fill b bits. The norm of each bucket takes 32 bits more (64 if
    float64).

    For long tensors give a `bucket`: without one, most elements of a tensor whose root is far above
    `levels` become zeros, and few become large. Elements of a bucket of n, if of equal magnitude
    and if `levels` is a multiple of sqrt(n), come back unchanged; so does a single one that is not
    zero.

    Args:
      levels: positive levels, 1 to 32,767.
      bucket: consecutive elements that share a norm, the last bucket perhaps fewer; None for all of
        a tensor.
      min_size: tensors with strictly more elements are quantised, the others and all integers
        travel raw.

    Returns:
      The codec. A bucket that holds a NaN or an infinity, or whose norm overflows, decodes to
      non-finite values.

    Raises:
      CodecError: an argument is out of range; a leaf to encode is not an array.

    Note:
      The paper codes levels by Elias' omega code; here their width is fixed.

    Example:
      >>> from fedjax_core.compression import Keys
      >>> codec = qsgd(1, min_size=0)
      >>> keys = Keys(jax.random.key(0), jax.random.key(1))
      >>> _, message = codec.encode(keys, (), (), jnp.array([0.0, -3.0, 0.0]))
      >>> codec.decode(keys, (), message).tolist()
      [0.0, -3.0, 0.0]
    """
    num_levels = whole("levels", levels, 1, _MAX_LEVELS)
    size = None if bucket is None else whole("bucket", bucket, 1, 2**31 - 1)

    def encode_tensor(key: jax.Array, tensor: jax.Array) -> tuple[Symbols, jax.Array]:
        return _quantize(key, tensor, num_levels, size or tensor.size)

    def decode_tensor(key: jax.Array, symbols: Symbols, norms: jax.Array) -> jax.Array:
        del key
        return _dequantize(symbols, norms, num_levels, size or symbols.codes.size)

    shown = "" if bucket is None else f", bucket={bucket}"
    name = f"qsgd({levels}{shown})"
    return tensorwise(name, Traits(unbiased=True), min_size, encode_tensor, decode_tensor)


def _in_buckets(tensor: jax.Array, size: int) -> jax.Array:
    """``[buckets, size]``, zeros at the end of the last one."""
    flat = jnp.ravel(tensor)
    size = min(size, flat.size)
    return jnp.pad(flat, (0, -flat.size % size)).reshape(-1, size)


def _quantize(
    key: jax.Array, tensor: jax.Array, levels: int, size: int
) -> tuple[Symbols, jax.Array]:
    """The symbols in the shape of the tensor, and the norms ``[buckets, 1]``."""
    buckets = _in_buckets(wide(tensor), size)
    norms = norm(buckets)
    position = levels * ratio(jnp.abs(buckets), norms)
    level = jnp.minimum(round_stochastically(key, finite(position)), levels)
    codes = levels + jnp.where(buckets < 0, -level, level)
    dtype = jnp.uint8 if levels <= 127 else jnp.uint16
    flat = jnp.ravel(codes)[: tensor.size].astype(dtype)
    width = (2 * levels).bit_length()
    return Symbols(flat.reshape(tensor.shape), width, np.dtype(tensor.dtype)), norms


def _dequantize(symbols: Symbols, norms: jax.Array, levels: int, size: int) -> jax.Array:
    codes = _in_buckets(symbols.codes, size).astype(norms.dtype)
    flat = jnp.ravel((codes - levels) / levels * norms)[: symbols.codes.size]
    return narrow(flat.reshape(symbols.codes.shape), symbols.dtype)
