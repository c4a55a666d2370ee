"""Three values an element: minus, nothing, plus, times one scale for each tensor.

| codec | which elements are not zero | scale | bits an element |
|---|---|---|---|
| `tern_grad` | each with probability abs(x) / s | s = max abs(x), clipped | 1.6: five to a byte |
| `sparse_ternary` | the k largest | their mean magnitude | k/n (1 + a position) |

References:
  Wen, Xu, Yan, Wu, Wang, Chen, Li. TernGrad: ternary gradients to reduce communication in
  distributed deep learning. NeurIPS 2017, arXiv:1705.07878.

  Sattler, Wiedemann, Müller, Samek. Robust and communication-efficient federated learning from
  non-IID data. IEEE TNNLS 2019, arXiv:1903.02891 (sparse ternary compression).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.compression.base import Codec, Traits
from fedjax_core.compression.chain import chain
from fedjax_core.compression.checks import real, shown
from fedjax_core.compression.numerics import (
    finite,
    norm,
    ratio,
    round_stochastically,
    wide,
)
from fedjax_core.compression.selection import tensorwise
from fedjax_core.compression.signs import scaled_sign
from fedjax_core.compression.sparse import top_k
from fedjax_core.compression.wire import Symbols


def tern_grad(clip: float | None = 2.5, *, min_size: int = 20_000) -> Codec:
    """Rounds each element of a large floating tensor to -s, 0 or s at random.

        Q(x)_i = s sign(x_i) with probability |x_i| / s, else 0,   s = max |x|

    Five elements take a byte, and a tensor 32 bits more (64 if float64). The mean square error is
    ``s |x|_1 - |x|^2``, so it pays to clip: magnitudes above `clip` root mean squares are cut to
    that. On a Gaussian it is 1.0 of ``|x|^2`` with ``clip=2.5``, and 3.0 without for a million
    elements.

    Args:
      clip: in root mean squares of the tensor, 1 to 1e6; or None for no clipping, which alone is
        unbiased.
      min_size: tensors with strictly more elements are quantised, the others and all integers
        travel raw.

    Returns:
      The codec. A tensor that holds a NaN or an infinity decodes to non-finite values everywhere.

    Raises:
      CodecError: `clip` or `min_size` is out of range; a leaf to encode is not an array.

    Note:
      The paper clips at a multiple of the standard deviation about the mean, which would erase a
      constant tensor.

    Example:
      >>> from fedjax_core.compression import Keys
      >>> codec = tern_grad(None, min_size=0)
      >>> keys = Keys(jax.random.key(0), jax.random.key(1))
      >>> _, message = codec.encode(keys, (), (), jnp.array([2.0, 0.0, -2.0]))
      >>> codec.decode(keys, (), message).tolist()
      [2.0, 0.0, -2.0]
    """
    limit = None if clip is None else real("clip", clip, 1, 1e6, "it is in root mean squares")

    def encode_tensor(key: jax.Array, tensor: jax.Array) -> tuple[Symbols, jax.Array]:
        return _quantize(key, tensor, limit)

    traits = Traits(unbiased=limit is None)
    name = f"tern_grad(clip={None if limit is None else shown(limit)})"
    return tensorwise(name, traits, min_size, encode_tensor, _dequantize)


def sparse_ternary(fraction: float, *, min_size: int = 20_000) -> Codec:
    """Keeps the largest elements of each large floating tensor, all with one magnitude.

    It is ``chain(top_k(fraction), scaled_sign())``: positions, one bit for each survivor's sign,
    and the mean magnitude of the survivors. On a Gaussian, of a hundredth of the elements, it
    loses 0.91637 of ``|x|^2`` at 0.091 bits an element.

    Args:
      fraction: the part of the elements that is kept, in (0, 1], as in `top_k`.
      min_size: tensors with strictly more elements are sparsified, the others and all integers
        travel whole.

    Returns:
      The codec. A tensor that holds a NaN or an infinity decodes to non-finite values at all
      positions that are sent.

    Raises:
      CodecError: `fraction` or `min_size` is out of range; a leaf to encode is not an array.

    Example:
      >>> from fedjax_core.compression import Keys
      >>> codec = sparse_ternary(0.5, min_size=0)
      >>> keys = Keys(jax.random.key(0), jax.random.key(1))
      >>> _, message = codec.encode(keys, (), (), jnp.array([1.0, -4.0, 2.0, 0.0]))
      >>> codec.decode(keys, (), message).tolist()
      [0.0, -3.0, 3.0, 0.0]
    """
    stages = top_k(fraction, min_size=min_size), scaled_sign(min_size=min_size)
    return chain(*stages)._replace(name=f"sparse_ternary({fraction})")


def _quantize(key: jax.Array, tensor: jax.Array, clip: float | None) -> tuple[Symbols, jax.Array]:
    x = wide(tensor)
    scale = jnp.max(jnp.abs(x))
    if clip is not None:
        # Both are NaN if an element is, and the second one is if one is infinite.
        scale = jnp.minimum(scale, clip / math.sqrt(x.size) * norm(jnp.ravel(x))[0])
    probability = jnp.minimum(finite(ratio(jnp.abs(x), scale)), 1)
    is_sent = round_stochastically(key, probability)
    codes = 1 + jnp.where(x < 0, -is_sent, is_sent)
    return Symbols(codes.astype(jnp.uint8), 2, np.dtype(tensor.dtype), "trits"), scale


def _dequantize(key: jax.Array, symbols: Symbols, scale: jax.Array) -> jax.Array:
    del key
    return ((symbols.codes.astype(scale.dtype) - 1) * scale).astype(symbols.dtype)
