"""Uniform quantisation by a step, for an entropy code behind it.

    p = x / step,   step = relative step * rms(x)

| rounding | symbol q | reconstruction | mean square error |
|---|---|---|---|
| nearest | sign(p) floor(abs(p) + 1/2 - dead zone) | step q, corrected | about step^2 / 12 |
| stochastic | floor(p + u), u uniform in [0, 1) | step q | step^2 f (1 - f), f = frac(p) |
| dither | round(p - u), u uniform in [-1/2, 1/2) | step (q + u) | step^2 / 12 for every x |

| correction | reconstruction |
|---|---|
| none | step q |
| centroids | the mean of all elements with symbol q, for abs(q) at most 8 |
| mmse | s q, s = (x . q) / abs(q)^2: the smallest error |
| alignment | s q, s = abs(x)^2 / (x . q): as long as x in the direction of x |

A symbol of a Gaussian source takes its entropy, which for rounding to the nearest is within 0.255
bits of what any code of unlimited length can reach at the same error, at every step.

References:
  Gish, Pierce. Asymptotically efficient quantizing. IEEE Transactions on Information Theory 14(5),
  1968 (a quarter of a bit).

  Sullivan. Efficient scalar quantization of exponential and Laplacian random variables. IEEE
  Transactions on Information Theory 42(5), 1996 (dead zones).

  Zamir, Feder. On universal quantization by randomized uniform/lattice quantizers. IEEE
  Transactions on Information Theory 38(2), 1992 (dither).
"""

import dataclasses
import math
from numbers import Real
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.compression.base import Codec, Traits
from fedjax_core.compression.checks import choice, real, shown
from fedjax_core.compression.numerics import (
    centered_uniform,
    divisor,
    finite,
    narrow,
    norm,
    ratio,
    round_stochastically,
    wide,
)
from fedjax_core.compression.selection import tensorwise
from fedjax_core.compression.wire import Symbols
from fedjax_core.errors import CodecError

# Symbols up to this magnitude have a centroid of their own.
_LAST_CENTROID = 8
_MAX_WIDTH = 31

Rounding = Literal["nearest", "stochastic", "dither"]
Correction = Literal["none", "centroids", "mmse", "alignment"]


def step_quantize(
    step: float,
    *,
    rounding: Rounding = "nearest",
    correction: Correction = "none",
    dead_zone: float = 0.0,
    min_size: int = 20_000,
) -> Codec:
    """Rounds the elements of each large floating tensor to multiples of a step, without any bound.

    Put an entropy code behind it, as in ``chain(step_quantize(1.0), ans())``: alone, symbols take
    as many bits as the largest one of any tensor of this size would. A tensor takes 32 bits more
    for its step or scale (64 if float64), and 17 times as many for centroids.

    Args:
      step: in root mean squares of the tensor. On a Gaussian, with centroids and `ans`: 0.5 takes
        3.06 bits and loses 0.0204 of ``|x|^2``, 1 takes 2.10 and loses 0.0769, 2 takes 1.24 and
        loses 0.2535.
      rounding: ``"nearest"``; ``"stochastic"`` and ``"dither"`` are unbiased, by the sender's key.
      correction: of the values that symbols stand for; see the module. ``"centroids"`` and
        ``"mmse"`` lose least, ``"alignment"`` is best where many messages are averaged.
      dead_zone: how much less is rounded to the nearest, in steps, below 1/2. About 0.15 pays below
        one bit a symbol.
      min_size: tensors with strictly more elements are quantised, the others and all integers
        travel raw.

    Returns:
      The codec. A tensor that holds a NaN or an infinity, or whose norm overflows, decodes to
      non-finite values everywhere.

    Raises:
      CodecError: an argument is out of range; a leaf to encode is not an array, or so large that
        its symbols might not fit 31 bits.

    Example:
      >>> from fedjax_core.compression import Keys
      >>> codec = step_quantize(1.0, min_size=0)
      >>> keys = Keys(jax.random.key(0), jax.random.key(1))
      >>> _, message = codec.encode(keys, (), (), jnp.array([3.0, -3.0, 0.5, 0.0]))
      >>> message.payload.codes.tolist(), [f"{x:.3f}" for x in codec.decode(keys, (), message)]
      ([1, -1, 0, 0], ['2.136', '-2.136', '0.000', '0.000'])
    """
    unit = "it is in root mean squares of the tensor"
    own_step = real("step", step, 1e-6, 1e6, unit)
    grid = _Steps(own_step, rounding, correction, _check_dead_zone(dead_zone))
    _check_choices(grid)

    def encode_tensor(key: jax.Array, tensor: jax.Array) -> tuple[Symbols, jax.Array]:
        return grid.quantize(tensor, key)

    def decode_tensor(key: jax.Array, symbols: Symbols, side: jax.Array) -> jax.Array:
        return grid.dequantize(symbols, side, key)

    return tensorwise(grid.name, grid.traits, min_size, encode_tensor, decode_tensor)


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Multiples of a step, how values are rounded to them, and what they stand for."""

    step: float
    rounding: Rounding
    correction: Correction
    dead_zone: float

    @property
    def name(self) -> str:
        changed = {
            "rounding": self.rounding != "nearest",
            "correction": self.correction != "none",
            "dead_zone": self.dead_zone != 0,
        }
        options = [f", {k}={getattr(self, k)}" for k, is_changed in changed.items() if is_changed]
        return f"step_quantize({shown(self.step)}{''.join(options)})"

    @property
    def traits(self) -> Traits:
        # Some element is at least as large as the root mean square, and must not become zero.
        keeps_some = self.step * (0.5 + self.dead_zone) <= 1
        return Traits(
            unbiased=self.rounding != "nearest",
            contractive=self.correction in ("centroids", "mmse") and keeps_some,
            needs_seed=self.rounding == "dither",
        )

    def quantize(self, tensor: jax.Array, key: jax.Array) -> tuple[Symbols, jax.Array]:
        """The symbols of one tensor, and the step, the scale, or the step and centroids."""
        x = wide(tensor)
        width = self._width(x.size)
        unit = norm(jnp.ravel(x))[0] * (self.step / math.sqrt(x.size))
        position = finite(ratio(x, unit))
        # Rounding may carry an element of the length of the tensor one step further.
        largest = (1 << (width - 1)) - 1
        symbols = jnp.clip(self._round(key, position), -largest, largest)
        side = unit * self._corrected(position, symbols)
        dtype = jnp.int8 if width <= 8 else jnp.int16 if width <= 16 else jnp.int32
        return Symbols(symbols.astype(dtype), width, np.dtype(tensor.dtype)), side

    def dequantize(self, symbols: Symbols, side: jax.Array, key: jax.Array) -> jax.Array:
        """The reconstruction of one tensor."""
        if self.correction == "centroids":
            inner = jnp.clip(symbols.codes.astype(jnp.int32), -_LAST_CENTROID, _LAST_CENTROID)
            beyond = symbols.codes.astype(side.dtype) * side[0]
            value = jnp.where(inner == symbols.codes, side[1:][inner + _LAST_CENTROID], beyond)
            return narrow(value, symbols.dtype)
        position = symbols.codes.astype(side.dtype)
        if self.rounding == "dither":
            position = position + centered_uniform(key, position)
        return narrow(position * side, symbols.dtype)

    def _round(self, key: jax.Array, position: jax.Array) -> jax.Array:
        if self.rounding == "stochastic":
            return round_stochastically(key, position)
        if self.rounding == "dither":
            return jnp.round(position - centered_uniform(key, position))
        magnitude = jnp.floor(jnp.abs(position) + (0.5 - self.dead_zone))
        return jnp.where(position < 0, -magnitude, magnitude)

    def _corrected(self, p: jax.Array, q: jax.Array) -> jax.Array:
        """What symbols stand for, in steps."""
        if self.correction == "none":
            return jnp.ones((), p.dtype)
        if self.correction == "centroids":
            return jnp.concatenate([jnp.ones(1, p.dtype), _centroids(p, q)])
        aligned = jnp.sum(p * q)
        up, down = (aligned, q * q) if self.correction == "mmse" else (jnp.sum(p * p), p * q)
        return jnp.where(aligned > 0, up / divisor(jnp.sum(down)), 0)

    def _width(self, size: int) -> int:
        """Bits of a signed symbol: no element is larger than the norm."""
        width = (math.ceil(math.sqrt(size) / self.step) + 1).bit_length() + 1
        if width > _MAX_WIDTH:
            raise CodecError(
                f"expected symbols of at most {_MAX_WIDTH} bits, got {width} for {size} elements "
                f"and a step of {self.step:g} root mean squares; take a larger step."
            )
        return width


def _centroids(p: jax.Array, q: jax.Array) -> jax.Array:
    """The mean of p for each q, ``[17]``; q itself where there is none."""
    symbols = range(-_LAST_CENTROID, _LAST_CENTROID + 1)
    sums = jnp.stack([jnp.sum(jnp.where(q == k, p - k, 0)) for k in symbols])
    counts = jnp.stack([jnp.sum(q == k) for k in symbols]).astype(p.dtype)
    return jnp.asarray(np.array(symbols), p.dtype) + sums / jnp.maximum(counts, 1)


def _check_dead_zone(dead_zone: float) -> float:
    is_number = isinstance(dead_zone, Real) and not isinstance(dead_zone, bool)
    if not is_number or not 0 <= dead_zone < 0.5:
        raise CodecError(f"expected dead_zone to be a number in [0, 0.5), got {dead_zone!r}.")
    return float(dead_zone)


def _check_choices(grid: _Steps) -> None:
    choice("rounding", grid.rounding, ("nearest", "stochastic", "dither"))
    choice("correction", grid.correction, ("none", "centroids", "mmse", "alignment"))
    is_plain = grid.correction == "none" and grid.dead_zone == 0
    if grid.rounding != "nearest" and not is_plain:
        raise CodecError(
            f'expected no correction and no dead zone with rounding="{grid.rounding}", which is '
            f"unbiased as it is, got correction={grid.correction!r} and "
            f"dead_zone={grid.dead_zone:g}; leave them out."
        )
