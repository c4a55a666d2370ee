"""Randomised Hadamard rotation: every tensor becomes nearly Gaussian, and no element stands out.

    y = H diag(signs) x / sqrt(B),   x = diag(signs) H y / sqrt(B)        in blocks of B elements

H is Sylvester's matrix of +1 and -1, and the signs are drawn from a key. The last block of a
tensor is filled with zeros, and what fills it travels and is counted; a tensor shorter than a
block is one block, of the next power of two.

References:
  Ailon, Chazelle. The fast Johnson-Lindenstrauss transform and approximate nearest neighbors. SIAM
  Journal on Computing 39(1), 2009.

  Suresh, Yu, Kumar, McMahan. Distributed mean estimation with limited communication. ICML 2017,
  arXiv:1611.00429 (rotation before quantisation).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.compression.base import Codec, Keys, Message, Rotated, Traits, stateless
from fedjax_core.compression.numerics import narrow, wide
from fedjax_core.compression.selection import check_min_size, decode_linear, encode_large
from fedjax_core.errors import CodecError

# A product with a matrix of 64 is still limited by memory.
_FACTOR_BITS = 6


def hadamard_rotation(block: int = 4096, *, min_size: int = 20_000) -> Codec:
    """Rotates each large floating tensor in blocks, all senders alike.

    The signs are drawn from the shared key, so the rotation is linear: in a chain it is undone
    once, after the sum. It quantises nothing: put a quantiser behind it, as in
    ``chain(hadamard_rotation(), uniform_quantize(8))``.

    Args:
      block: elements that are mixed, a power of two; at least the size of every tensor to mix all.
      min_size: tensors with strictly more elements are rotated, the others and all integers travel
        as they are.

    Returns:
      The codec. Rotated tensors are float32 (float64 if they were). A block that holds a NaN or an
      infinity decodes to non-finite values, and so does one whose sum of magnitudes overflows.

    Raises:
      CodecError: `block` or `min_size` is out of range; a leaf to encode is not an array.

    Example:
      >>> codec = hadamard_rotation(min_size=0)
      >>> keys = Keys(jax.random.key(0), jax.random.key(1))
      >>> _, message = codec.encode(keys, (), (), jnp.array([0.0, 4.0, 0.0]))
      >>> jnp.abs(message.payload.values).tolist()
      [[2.0, 2.0, 2.0, 2.0]]
      >>> (codec.decode(keys, (), message) + 0).tolist()
      [0.0, 4.0, 0.0]
    """
    size, threshold = check_block(block), check_min_size(min_size)

    def encode(keys: Keys, value: Any) -> Message:
        def encode_tensor(index: int, tensor: jax.Array) -> tuple[Rotated, tuple[()]]:
            return rotate(jax.random.fold_in(keys.shared, index), tensor, size), ()

        return encode_large(value, threshold, encode_tensor)._replace(side=())

    def decode(keys: Keys, message: Message) -> Any:
        def decode_tensor(index: int, rotated: Rotated) -> jax.Array:
            return rotate_back(jax.random.fold_in(keys.shared, index), rotated)

        return decode_linear(message.payload, threshold, Rotated, decode_tensor)

    traits = Traits(unbiased=True, contractive=True, linear=True, summable=True)
    shown = "" if size == 4096 else str(size)
    return stateless(f"hadamard_rotation({shown})", traits, encode, decode)


def check_block(block: int) -> int:
    """`block` itself, if it is the size of a block.

    Raises:
      CodecError: it is no power of two.
    """
    is_integer = isinstance(block, int | np.integer) and not isinstance(block, bool)
    if not is_integer or block < 1 or block & (block - 1):
        raise CodecError(f"expected block to be a power of two, got {block!r}.")
    return int(block)


def rotate(key: jax.Array, tensor: jax.Array, block: int) -> Rotated:
    """Rotates a floating tensor in blocks of at most `block` elements; `rotate_back` undoes it."""
    flat = jnp.ravel(wide(tensor))
    block = min(block, 1 << (flat.size - 1).bit_length())
    blocks = jnp.pad(flat, (0, -flat.size % block)).reshape(-1, block)
    values = hadamard_transform(blocks * _signs(key, blocks))
    return Rotated(values, tensor.shape, np.dtype(tensor.dtype))


def rotate_back(key: jax.Array, rotated: Rotated) -> jax.Array:
    """The tensor that was rotated with the same key."""
    blocks = hadamard_transform(rotated.values)
    flat = jnp.ravel(blocks * _signs(key, blocks))[: rotated.size]
    return narrow(flat.reshape(rotated.shape), rotated.dtype)


def hadamard_transform(rows: jax.Array) -> jax.Array:
    """The orthonormal Hadamard transform of each row, its own inverse.

    A matrix of 2**(a + b) is the Kronecker product of one of 2**a and one of 2**b, so a row of
    4,096 takes two products with a matrix of 64.

    Args:
      rows: floating ``[n, B]``, B a power of two.

    Returns:
      ``[n, B]``.
    """
    num_rows, block = rows.shape
    left = block.bit_length() - 1
    scale = 1 / math.sqrt(block)
    while left:
        # Transforms the lowest bits of the position and moves them to the top, so that all are in
        # order again at the end.
        bits = min(left, _FACTOR_BITS)
        factor = jnp.asarray(_sylvester(bits), rows.dtype)
        parts = rows.reshape(num_rows, block >> bits, 1 << bits)
        mixed = jnp.matmul(parts, factor, precision=jax.lax.Precision.HIGHEST)
        rows = jnp.swapaxes(mixed, 1, 2).reshape(num_rows, block)
        left -= bits
    return rows * scale


@functools.cache
def _sylvester(bits: int) -> np.ndarray:
    """The matrix of +1 and -1, ``[2**bits, 2**bits]``: minus where i and j share odd many bits."""
    index = np.arange(1 << bits)
    shared = index[:, None] & index
    parity = np.bitwise_count(shared) % 2
    return np.float32(1) - 2 * parity.astype(np.float32)


def _signs(key: jax.Array, like: jax.Array) -> jax.Array:
    return jax.random.rademacher(key, like.shape, like.dtype)
