"""Sparsification at random: which elements are sent is drawn from a key, so no position travels.

    Q(x)_i = x_i n / k if i is drawn, else 0
    E Q(x) = x,   E |Q(x) - x|^2 = (n / k - 1) |x|^2

References:
  Konečný, McMahan, Yu, Richtárik, Suresh, Bacon. Federated learning: strategies for improving
  communication efficiency. 2016, arXiv:1610.05492 (random mask, from a seed).

  Stich, Cordonnier, Jaggi. Sparsified SGD with memory. NeurIPS 2018, arXiv:1809.07599
  (contraction).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_core.compression.base import Codec, Keys, Message, Survivors, Traits, stateless
from fedjax_core.compression.checks import flag
from fedjax_core.compression.numerics import narrow, wide
from fedjax_core.compression.selection import check_min_size, decode_linear, encode_large
from fedjax_core.compression.sparse import check_fraction, positions_of_largest, scatter


def rand_k(
    fraction: float, common: bool = True, *, unbiased: bool = True, min_size: int = 20_000
) -> Codec:
    """Keeps ``ceil(fraction * n)`` elements of each large floating tensor, drawn at random.

    With a `common` draw, from the shared key, all senders keep the same elements: the codec is
    linear, and messages may be summed before they are decoded. Otherwise each sender draws with its
    own key, so that errors average out over senders; the receiver derives that key from the round's
    and the sender's id, so no seed travels either.

    Args:
      fraction: the part of the elements that is kept, in (0, 1]. A float is taken as the decimal
        number it prints as.
      common: whether all senders keep the same elements.
      unbiased: multiply what is kept by n / k. Otherwise it stays as it is, and the codec is
        contractive: ``E |Q(x) - x|^2 = (1 - k / n) |x|^2``.
      min_size: tensors with strictly more elements are sparsified, the others and all integers
        travel whole.

    Returns:
      The codec. A tensor that holds a NaN or an infinity decodes to NaN wherever it is kept.

    Raises:
      CodecError: `fraction` or `min_size` is out of range; a leaf to encode is not an array.

    Note:
      Elements are drawn by the largest of 31 random bits each, ties to the lower index, so their
      probabilities agree to about n / 2**31.

    Example:
      >>> codec = rand_k(0.5, min_size=0)
      >>> keys = Keys(jax.random.key(0), jax.random.key(1))
      >>> _, message = codec.encode(keys, (), (), jnp.ones(6))
      >>> sorted(codec.decode(keys, (), message).tolist())
      [0.0, 0.0, 0.0, 2.0, 2.0, 2.0]
    """
    exact, threshold = check_fraction(fraction), check_min_size(min_size)
    flag("common", common)
    flag("unbiased", unbiased)

    def positions(keys: Keys, index: int, size: int) -> jax.Array:
        key = jax.random.fold_in(keys.shared if common else keys.client, index)
        draw = jax.random.bits(key, (size,), jnp.uint32) >> 1
        return positions_of_largest(draw, math.ceil(exact * size))

    def encode(keys: Keys, value: Any) -> Message:
        def encode_tensor(index: int, tensor: jax.Array) -> tuple[Survivors, tuple[()]]:
            flat = jnp.ravel(tensor)
            kept = flat[positions(keys, index, flat.size)]
            # An element that is not kept must not hide that it is not finite.
            kept = jnp.where(jnp.all(jnp.isfinite(flat)), kept, jnp.nan)
            factor = flat.size / kept.size if unbiased else 1
            return Survivors(narrow(wide(kept) * factor, tensor.dtype), tensor.shape), ()

        return encode_large(value, threshold, encode_tensor)._replace(side=())

    def decode(keys: Keys, message: Message) -> Any:
        def decode_tensor(index: int, survivors: Survivors) -> jax.Array:
            return scatter(survivors, positions(keys, index, survivors.size))

        return decode_linear(message.payload, threshold, Survivors, decode_tensor)

    traits = Traits(
        unbiased=unbiased,
        contractive=not unbiased,
        linear=common,
        summable=common,
        needs_seed=not common,
    )
    shown = ("" if common else ", common=False") + ("" if unbiased else ", unbiased=False")
    return stateless(f"rand_k({fraction}{shown})", traits, encode, decode)
