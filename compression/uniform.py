"""Uniform quantisation between a minimum and a maximum.

    step = (max - min) / (2**bits - 1)

| rounding | q(x), with p = (x - min) / step | Q(x) | mean square error |
|---|---|---|---|
| stochastic | floor(p + u), u uniform in [0, 1) | min + step q | step^2 f (1 - f), f = frac(p) |
| nearest | round(p) | min + step q | at most step^2 / 4 |
| dither | round(p - u), u uniform in [-1/2, 1/2) | min + step (q + u) | step^2 / 12 for every x |

The rule of TFF's `quantize_above_threshold` (tensors above a threshold, the others raw), but with
symbols packed densely, where TFF put 28 bits into each 32-bit word; `tff_8bit` does so too.

References:
  Suresh, Yu, Kumar, McMahan. Distributed mean estimation with limited communication. ICML 2017,
  arXiv:1611.00429 (stochastic k-level quantisation).

  Roberts. Picture coding using pseudo-random noise. IRE Transactions on Information Theory 8(2),
  1962 (subtractive dither).
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.compression.base import Codec, Keys, Message, Traits, stateless
from fedjax_core.compression.checks import choice, flag, whole
from fedjax_core.compression.numerics import (
    centered_uniform,
    finite,
    largest,
    narrow,
    round_stochastically,
    smallest,
    wide,
)
from fedjax_core.compression.packing import PackingName
from fedjax_core.compression.selection import (
    check_min_size,
    decode_large,
    encode_large,
    large_tensors,
)
from fedjax_core.compression.wire import Symbols
from fedjax_core.errors import CodecError
from fedjax_core.rounding import pinned

_MAX_BITS = 16
_MIN_SIZE = 20_000

Rounding = Literal["stochastic", "nearest", "dither"]
Range = Literal["min_max", "common"]


def uniform_quantize(
    bits: int = 8,
    *,
    min_size: int = _MIN_SIZE,
    rounding: Rounding = "stochastic",
    range: Range = "min_max",
    stochastic: bool = True,
) -> Codec:
    """Quantises large floating tensors to ``2**bits`` levels from a minimum to a maximum.

    A symbol takes `bits` bits, and a range 64 more (128 if float64). But for dither, the minimum,
    the maximum and every value that lies on a level of an exactly representable grid come back
    unchanged.

    With dither, the error is uniform within half a step and independent of the value, also for
    zeros, which do not stay zeros. The receiver needs u again. It is drawn from the sender's key,
    which is the round's key folded with the sender's id. The receiver knows both: it drew the
    round's key (which the way down counts), and it has to know whose message it decodes. So no
    seed travels, and none is counted; a receiver that must not learn who sent a message, as behind
    a secure sum, cannot decode it. That is what the trait `needs_seed` says.

    Args:
      bits: bits a symbol, 1 to 16.
      min_size: tensors with strictly more elements are quantised, the others and all integers
        travel raw. Behind a sparsifying stage the size of the original tensor counts.
      rounding: ``"stochastic"``: up with the probability of the remainder, by the sender's key, so
        that the reconstruction is unbiased. ``"nearest"``: to the nearest level, halves to the even
        one. ``"dither"``: subtractive dither, unbiased too.
      range: ``"min_max"`` of each tensor, or one ``"common"`` to all large tensors of the message.
      stochastic: False is the same as ``rounding="nearest"``.

    Returns:
      The codec. A tensor that holds a NaN or an infinity decodes to non-finite values everywhere,
      and so do all tensors that share its range.

    Raises:
      CodecError: an argument is out of range; a leaf to encode is not an array.

    Note:
      The probability of rounding up is exact to 2**-32, u a multiple of 2**-24. Arithmetic is in
      float32 (float64 for float64), so a float16 or bfloat16 result is rounded once more.

    Example:
      >>> codec = uniform_quantize(1, min_size=0)
      >>> keys = Keys(jax.random.key(0), jax.random.key(1))
      >>> _, message = codec.encode(keys, (), (), jnp.array([0.0, 2.0, 2.0]))
      >>> codec.decode(keys, (), message).tolist()
      [0.0, 2.0, 2.0]
    """
    rounding = _check_rounding(rounding, flag("stochastic", stochastic))
    choice("range", range, ("min_max", "common"))
    grid = _Grid(whole("bits", bits, 1, _MAX_BITS), rounding, "dense")
    shown = "" if rounding == "stochastic" else f", rounding={rounding}"
    shown += "" if range == "min_max" else f", range={range}"
    name = f"uniform_quantize(bits={grid.width}{shown})"
    return _quantizer(name, grid, check_min_size(min_size), range)


def tff_8bit() -> Codec:
    """The codec of TFF's tutorial on compression, bit for bit in its cost.

    Tensors of more than 20,000 elements are quantised stochastically to 8 bits between their
    minimum and their maximum. Of every 32-bit word 28 bits are used, so an element costs 9.14 bits:
    the 1,663,370 parameters of the FedAvg CNN take 15,357,536 bits. `uniform_quantize` does the
    same in 13,464,000; take this one for comparisons only.

    Returns:
      The codec.

    Example:
      >>> keys = Keys(jax.random.key(0), jax.random.key(1))
      >>> codec = tff_8bit()
      >>> _, message = codec.encode(keys, (), (), jnp.ones(28_000))
      >>> int(codec.bits(message))
      256064

    References:
      TensorFlow Federated, "TFF for federated learning research: model and update compression".
    """
    return _quantizer("tff_8bit()", _Grid(8, "stochastic", "words"), _MIN_SIZE, "min_max")


@dataclasses.dataclass(frozen=True)
class _Grid:
    """``2**width`` levels, how values are rounded to them, and how they are written."""

    width: int
    rounding: Rounding
    packing: PackingName

    @property
    def last(self) -> int:
        """The number of the highest level."""
        return 2**self.width - 1

    def quantize(self, tensor: jax.Array, bounds: jax.Array, key: jax.Array) -> Symbols:
        """The symbols of one tensor."""
        # The bounds of several tensors may be wider than this one.
        x, low, high = tensor.astype(bounds.dtype), bounds[0], bounds[1]
        half_step = self._half_step(bounds)
        position = finite((0.5 * x - 0.5 * low) / jnp.where(half_step > 0, half_step, 1))
        codes = jnp.clip(self._round(key, position), 0, self.last)
        if self.rounding != "dither":
            # The division may miss the last level by an ulp; the maximum must be exact.
            codes = jnp.where(x >= high, self.last, codes)
        dtype = jnp.uint8 if self.width <= 8 else jnp.uint16
        return Symbols(codes.astype(dtype), self.width, np.dtype(tensor.dtype), self.packing)

    def dequantize(self, symbols: Symbols, bounds: jax.Array, key: jax.Array) -> jax.Array:
        """The reconstruction of one tensor."""
        low, high = bounds[0], bounds[1]
        level = symbols.codes.astype(bounds.dtype)
        if self.rounding == "dither":
            level = level + centered_uniform(key, level)
        # Rounded before the sum, in every program.
        value = 2 * (0.5 * low + pinned(level * self._half_step(bounds)))
        if self.rounding != "dither":
            value = jnp.where(symbols.codes == self.last, high, value)
        return narrow(value, symbols.dtype)

    def _round(self, key: jax.Array, position: jax.Array) -> jax.Array:
        if self.rounding == "stochastic":
            return round_stochastically(key, position)
        if self.rounding == "dither":
            return jnp.round(position - centered_uniform(key, position))
        return jnp.round(position)

    def _half_step(self, bounds: jax.Array) -> jax.Array:
        """Half of the distance of two levels: a range may overflow where its half does not."""
        return (0.5 * bounds[1] - 0.5 * bounds[0]) / self.last


def _quantizer(name: str, grid: _Grid, min_size: int, range: Range) -> Codec:
    def encode(keys: Keys, value: Any) -> Message:
        tensors = large_tensors(value, min_size) if range == "common" else []
        common: Any = _bounds(tensors) if tensors else ()

        def encode_tensor(index: int, tensor: jax.Array) -> tuple[Symbols, Any]:
            key = jax.random.fold_in(keys.client, index)
            if range == "common":
                return grid.quantize(tensor, common, key), ()
            bounds = _bounds([tensor])
            return grid.quantize(tensor, bounds, key), bounds

        message = encode_large(value, min_size, encode_tensor)
        return message._replace(side=(common, message.side)) if range == "common" else message

    def decode(keys: Keys, message: Message) -> Any:
        common, side = message.side if range == "common" else ((), message.side)

        def decode_tensor(index: int, symbols: Symbols, bounds: Any) -> jax.Array:
            own = jnp.asarray(common) if range == "common" else bounds
            return grid.dequantize(symbols, own, jax.random.fold_in(keys.client, index))

        return decode_large(message._replace(side=side), Symbols, decode_tensor)

    is_dithered = grid.rounding == "dither"
    traits = Traits(unbiased=grid.rounding != "nearest", needs_seed=is_dithered)
    return stateless(name, traits, encode, decode)


def _bounds(tensors: list[jax.Array]) -> jax.Array:
    """The minimum and the maximum of all tensors, ``[2]``."""
    widened = [wide(tensor) for tensor in tensors]
    low, high = (
        jnp.stack([end(x).astype(jnp.result_type(*widened)) for x in widened])
        for end in (smallest, largest)
    )
    return jnp.stack([jnp.min(low), jnp.max(high)])


def _check_rounding(rounding: Rounding, stochastic: bool) -> Rounding:
    choice("rounding", rounding, ("stochastic", "nearest", "dither"))
    if rounding == "dither" and not stochastic:
        raise CodecError(
            'expected stochastic to be True with rounding="dither", got False; leave it out.'
        )
    return rounding if stochastic else "nearest"
