"""DRIVE and EDEN: rotate, round to the levels that are best for a Gaussian, correct the scale.

    r = R x,   c_i = the Lloyd-Max level nearest to sqrt(B) r_i / |r|,   Q(x) = R^-1 (S c)

| scale | S | mean square error, of abs(x)^2, at 1, 2, 3, 4 bits |
|---|---|---|
| unbiased | abs(r)^2 / (c . r) | D / (1 - D): 0.5708, 0.1331, 0.03578, 0.00959 |
| mmse | (c . r) / abs(c)^2 | D: 0.3634, 0.1175, 0.03455, 0.00950 |

for each block of B elements, with a scale each. The error is the same whatever the source, because
the rotation R (see `hadamard`) makes each one nearly Gaussian. Every sender has a rotation of its
own, so that the errors of many senders average out.

References:
  Vargaftik, Ben Basat, Portnoy, Mendelson, Ben-Itzhak, Mitzenmacher. DRIVE: one-bit distributed
  mean estimation. NeurIPS 2021, arXiv:2105.08339.

  Vargaftik, Ben Basat, Portnoy, Mendelson, Ben-Itzhak, Mitzenmacher. EDEN: communication-efficient
  and robust distributed mean estimation for federated learning. ICML 2022, arXiv:2108.08842.
"""

import dataclasses
import math
from numbers import Real
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.compression.base import Codec, Rotated, Traits
from fedjax_core.compression.chain import chain
from fedjax_core.compression.checks import choice, shown
from fedjax_core.compression.gaussian import lloyd_max, middles
from fedjax_core.compression.hadamard import check_block, rotate, rotate_back
from fedjax_core.compression.numerics import finite, norm, ratio
from fedjax_core.compression.sampled import rand_k
from fedjax_core.compression.selection import tensorwise
from fedjax_core.compression.wire import Symbols
from fedjax_core.errors import CodecError

Scale = Literal["unbiased", "mmse"]


def drive(*, scale: Scale = "unbiased", block: int = 4096, min_size: int = 20_000) -> Codec:
    """One bit an element: `eden` with ``bits=1``, whose levels are the signs.

    Args:
      scale: see `eden`.
      block: see `eden`.
      min_size: see `eden`.

    Returns:
      The codec.

    Raises:
      CodecError: as `eden`.

    Example:
      >>> from fedjax_core.compression import Keys
      >>> codec = drive(min_size=0)
      >>> keys = Keys(jax.random.key(0), jax.random.key(1))
      >>> _, message = codec.encode(keys, (), (), jnp.array([0.0, -3.0, 0.0, 0.0]))
      >>> (codec.decode(keys, (), message).round(6) + 0).tolist()
      [0.0, -3.0, 0.0, 0.0]
    """
    codec = eden(1, scale=scale, block=block, min_size=min_size)
    return codec._replace(name=_name("drive", [], scale, block))


def eden(
    bits: float, *, scale: Scale = "unbiased", block: int = 4096, min_size: int = 20_000
) -> Codec:
    """Rotates each large floating tensor with the sender's key and rounds it to Lloyd-Max levels.

    An element takes `bits` bits, with the padding of the last block, and a block 32 bits more (64
    if float64): 1.010 bits an element at one bit. Below one bit, that part of the elements is drawn
    at random with the sender's key (`rand_k`), and sent with one bit each: the mean square error is
    ``(pi / 2) / bits - 1``.

    The receiver undoes the rotation of each message. No seed travels: as with dither in
    `uniform_quantize`, the receiver derives the sender's key from the round's and the sender's id.

    Args:
      bits: 1, 2, 3 or 4, or a number in (0, 1).
      scale: ``"unbiased"`` when messages of several senders are averaged, ``"mmse"`` for the
        smallest error of one message, as error feedback needs.
      block: elements that are rotated together, a power of two.
      min_size: tensors with strictly more elements are quantised, the others and all integers
        travel raw.

    Returns:
      The codec. A block that holds a NaN or an infinity, or whose norm overflows, decodes to
      non-finite values.

    Raises:
      CodecError: an argument is out of range; a leaf to encode is not an array.

    Note:
      Unbiasedness is exact for rotations drawn uniformly from all. A Hadamard matrix with random
      signs comes close for long blocks, not for short ones, so the codec does not claim the trait
      `unbiased`; `bounded_support` does.

    Example:
      >>> from fedjax_core.compression import Keys
      >>> codec = eden(2, min_size=0)
      >>> keys = Keys(jax.random.key(0), jax.random.key(1))
      >>> _, message = codec.encode(keys, (), (), jnp.ones(8192))
      >>> int(codec.bits(message))
      16448
    """
    is_number = isinstance(bits, Real) and not isinstance(bits, bool)
    if not is_number or not (0 < bits < 1 or bits in (1, 2, 3, 4)):
        raise CodecError(f"expected bits to be 1, 2, 3, 4 or a number in (0, 1), got {bits!r}.")
    choice("scale", scale, ("unbiased", "mmse"))
    size = check_block(block)
    name = _name("eden", [f"bits={shown(bits)}"], scale, block)
    if bits < 1:
        drawn = rand_k(bits, common=False, unbiased=scale == "unbiased", min_size=min_size)
        return chain(drawn, _eden("eden", 1, scale, size, min_size))._replace(name=name)
    return _eden(name, int(bits), scale, size, min_size)


def _name(factory: str, shown: list[str], scale: str, block: int) -> str:
    changed = {"scale": scale != "unbiased", "block": block != 4096}
    shown = [*shown, *(f"{k}={v}" for k, v in (("scale", scale), ("block", block)) if changed[k])]
    return f"{factory}({', '.join(shown)})"


def _eden(name: str, bits: int, scale: Scale, block: int, min_size: int) -> Codec:
    def encode_tensor(key: jax.Array, tensor: jax.Array) -> tuple[Rotated, jax.Array]:
        rotated = rotate(key, tensor, block)
        codes, scales = _quantize(rotated.values, bits, scale)
        symbols = Symbols(codes, bits, np.dtype(rotated.values.dtype))
        return dataclasses.replace(rotated, values=symbols), scales

    def decode_tensor(key: jax.Array, rotated: Rotated, scales: jax.Array) -> jax.Array:
        values = scales * _levels(bits, scales)[rotated.values.codes]
        return rotate_back(key, dataclasses.replace(rotated, values=values))

    traits = Traits(contractive=scale == "mmse", needs_seed=True)
    return tensorwise(name, traits, min_size, encode_tensor, decode_tensor, Rotated)


def _levels(bits: int, like: jax.Array) -> jax.Array:
    return jnp.asarray(lloyd_max(bits), like.dtype)


def _quantize(blocks: jax.Array, bits: int, scale: Scale) -> tuple[jax.Array, jax.Array]:
    """The codes of all blocks, and their scales ``[blocks, 1]``."""
    norms, size = norm(blocks), blocks.shape[1]
    # Of mean square 1, so that nothing below overflows.
    z = finite(ratio(blocks, norms) * math.sqrt(size))
    thresholds = jnp.asarray(middles(lloyd_max(bits)), z.dtype)
    codes = jnp.searchsorted(thresholds, z, side="right", method="compare_all")
    c = _levels(bits, z)[codes]
    aligned = jnp.sum(c * z, axis=1, keepdims=True)
    if scale == "unbiased":
        relative = size / jnp.where(aligned > 0, aligned, 1)
    else:
        relative = aligned / jnp.sum(c * c, axis=1, keepdims=True)
    scales = norms / math.sqrt(size) * relative
    is_zero = norms < jnp.finfo(norms.dtype).tiny
    return codes.astype(jnp.uint8), jnp.where(is_zero, 0, scales)
