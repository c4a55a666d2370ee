"""Integers whose sum is all that a receiver needs: one step, common to all senders.

    q(x) = floor(x / step + u) clipped to [-m, m],   step = limit / m,   m = 2**(bits - 1) - 1
    sum_k Q(x_k) = step * sum_k q(x_k)

Messages add as integers, exactly and in any order, and are decoded once. So they may go through a
secure sum, where an element of n senders takes ``ceil(log2(2 n m + 1))`` bits: that is what the sum
needs, and neither an entropy code nor a scale of each sender can save any of it.

References:
  Bonawitz, Ivanov, Kreuter, Marcedone, McMahan, Patel, Ramage, Segal, Seth. Practical secure
  aggregation for privacy-preserving machine learning. CCS 2017.

  Bonawitz, Salehi, Konečný, McMahan, Gruteser. Federated learning with autotuned
  communication-efficient secure aggregation. Asilomar 2019, arXiv:1912.00131 (quantisation under a
  common rotation).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.compression.base import Codec, Keys, Message, Report, Traits, stateless
from fedjax_core.compression.checks import check_given, flag, real, shown, whole
from fedjax_core.compression.numerics import finite, round_stochastically, wide
from fedjax_core.compression.selection import (
    check_min_size,
    decode_linear,
    encode_large,
    large_tensors,
)
from fedjax_core.compression.wire import Symbols

_MAX_BITS = 24
# The range of a sender is known to a quarter of an octave, from 2**-20 to 2**12.
_PER_OCTAVE_BITS = 2
_LOWEST_EXPONENT = -20
_NUM_RANGES = 32 << _PER_OCTAVE_BITS
_MANTISSA_BITS = 23
_EXPONENT_BIAS = 127


def fixed_point(
    bits: int = 8, limit: float | None = None, *, stochastic: bool = True, min_size: int = 0
) -> Codec:
    """Rounds the elements of floating tensors to multiples of a step that is common to all senders.

    Elements beyond the limit are clipped to it, so bound them before: by
    ``clip_by_global_norm(limit)``, or by a rotation, which spreads a tensor evenly, as in
    ``chain(hadamard_rotation(min_size=0), fixed_point(8))``. Within the limit rounding is unbiased.

    Without a `limit`, the receiver chooses it anew for each round, and sends it down: what the
    largest element of any sender was in the round before, to a quarter of an octave. For this each
    sender marks one of 128 ranges; the receiver sees the sums of the marks. The first round is
    encoded with a limit of 1.

    Args:
      bits: of a symbol, 2 to 24: ``2**bits - 1`` values.
      limit: the largest magnitude, positive, of which every sender knows; None to follow what is
        sent.
      stochastic: False rounds to the nearest, halves to the even one.
      min_size: tensors with strictly more elements are quantised, the others and all integers
        travel raw; a secure sum takes none of these.

    Returns:
      A codec whose messages add. If an element of a sender is NaN or infinite, the sum is NaN.

    Raises:
      CodecError: an argument is out of range; a leaf to encode is not an array.

    Example:
      >>> codec = fixed_point(8, limit=127.0)
      >>> keys = Keys(jax.random.key(0), jax.random.key(1))
      >>> _, message = codec.encode(keys, (), (), jnp.array([3.0, -1.0, 500.0]))
      >>> message.payload.codes.tolist(), message.payload.width
      ([3, -1, 127], 8)
    """
    width, threshold = whole("bits", bits, 2, _MAX_BITS), check_min_size(min_size)
    unit = "it is the largest magnitude of an element, or None"
    fixed = None if limit is None else real("limit", limit, 1e-30, 1e30, unit)
    highest = (1 << (width - 1)) - 1
    flag("stochastic", stochastic)
    options = "" if fixed is None else f", limit={shown(fixed)}"
    options += "" if stochastic else ", stochastic=False"
    name = f"fixed_point({width}{options})"

    def init(template: Any) -> tuple[Any, Any]:
        del template
        return (jnp.float32(1) if fixed is None else ()), ()

    def encode(keys: Keys, memory: Any, hints: Any, value: Any) -> tuple[Any, Message]:
        if fixed is None:
            check_given("hints", name, hints, value)
        own = _step(hints, fixed, highest)

        def encode_tensor(index: int, tensor: jax.Array) -> tuple[Symbols, tuple[()]]:
            # Clipped before it is divided, which may overflow; an infinite element is marked.
            x = finite(wide(tensor))
            unit = own.astype(x.dtype)
            position = jnp.clip(x, -highest * unit, highest * unit) / unit
            position = jnp.clip(position, -highest, highest)
            key = jax.random.fold_in(keys.client, index)
            rounded = round_stochastically(key, position) if stochastic else jnp.round(position)
            return Symbols(rounded.astype(jnp.int32), width, np.dtype(tensor.dtype)), ()

        message = encode_large(value, threshold, encode_tensor)
        marks = _marks(large_tensors(value, threshold), fixed is None)
        return memory, message._replace(side=(), stats=marks)

    def finish(key: jax.Array, server: Any, total: Any, report: Report) -> tuple[Any, Any]:
        del key
        marks = report.stats.codes
        is_finite = marks[0] == 0
        own = jnp.where(is_finite, _step(server, fixed, highest), jnp.nan)

        def decode_tensor(index: int, symbols: Symbols) -> jax.Array:
            del index
            value = symbols.codes.astype(wide(jnp.zeros((), symbols.dtype)).dtype)
            return (value * own.astype(value.dtype)).astype(symbols.dtype)

        value = decode_linear(total, threshold, Symbols, decode_tensor)
        return (server if fixed is not None else _next_limit(server, marks[1:])), value

    codec = stateless(
        name,
        Traits(linear=True, summable=True),
        encode=lambda keys, value: Message(value),
        decode=lambda keys, message: message.payload,
    )
    return codec._replace(init=init, hints=lambda server: server, encode=encode, finish=finish)


def _step(limit: Any, fixed: float | None, highest: int) -> jax.Array:
    return jnp.asarray(limit if fixed is None else fixed, jnp.float32) / highest


def _marks(tensors: list[jax.Array], with_range: bool) -> Symbols:
    """Whether anything is not finite, and the range of the largest element, one bit each."""
    largest = [jnp.max(jnp.abs(wide(x)), initial=0).astype(jnp.float32) for x in tensors]
    top = jnp.max(jnp.stack(largest)) if largest else jnp.float32(0)
    # What is NaN, or overflows float32, too.
    marks = ~jnp.isfinite(top)[None]
    if with_range:
        places = jnp.arange(_NUM_RANGES)
        marks = jnp.concatenate([marks, (places == _range_of(top)) & (top > 0)])
    return Symbols(marks.astype(jnp.uint8), 1, np.dtype(np.uint8))


def _range_of(magnitude: jax.Array) -> jax.Array:
    """The number of the quarter octave: exponent and two bits of the mantissa, from the bits."""
    quarter = jax.lax.bitcast_convert_type(magnitude, jnp.int32) >> (
        _MANTISSA_BITS - _PER_OCTAVE_BITS
    )
    lowest = (_EXPONENT_BIAS + _LOWEST_EXPONENT) << _PER_OCTAVE_BITS
    return jnp.clip(quarter - lowest, 0, _NUM_RANGES - 1)


def _next_limit(limit: jax.Array, marks: jax.Array) -> jax.Array:
    """The upper end of the highest range that is marked; the same limit if none is."""
    highest = jnp.max(jnp.where(marks > 0, jnp.arange(_NUM_RANGES), -1))
    lowest = (_EXPONENT_BIAS + _LOWEST_EXPONENT) << _PER_OCTAVE_BITS
    bits = (lowest + highest + 1) << (_MANTISSA_BITS - _PER_OCTAVE_BITS)
    found = jax.lax.bitcast_convert_type(bits.astype(jnp.int32), jnp.float32)
    return jnp.where(highest >= 0, found, limit)
