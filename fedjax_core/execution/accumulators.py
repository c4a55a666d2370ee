"""Accumulators: what sums are added up in, so that neither order nor width changes a result much.

    dtype                            accumulator
    bfloat16, float16                float32
    float32, float64, complex        the same
    integers of up to 32 bits        `WideInt`, exact

A sum of integers that its dtype does not hold becomes the nearest number that it does hold.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_core.language import inference
from fedjax_core.language.types import Type

# So many numbers of half the width can be added before they need to be carried.
_MAX_SUMMANDS = 1 << 15


class WideInt(NamedTuple):
    """An integer `high * 2**half + low`, where `half` is half the width of the words.

    It holds the sum of 65,536 numbers of the word's whole range, and of more of smaller ones.
    """

    high: jax.Array
    low: jax.Array


def _half(word: jax.Array) -> int:
    return word.dtype.itemsize * 4


def widen(x: jax.Array) -> WideInt:
    """`x`, any integers, as the start of a sum."""
    wide = x if jnp.iinfo(x.dtype).bits >= 32 else x.astype(_word(x.dtype))
    half = _half(wide)
    mask = wide.dtype.type((1 << half) - 1)
    return WideInt(wide >> half, wide & mask)


def _word(dtype: Any) -> Any:
    return jnp.uint32 if jnp.issubdtype(dtype, jnp.unsignedinteger) else jnp.int32


def carry(x: WideInt) -> WideInt:
    """The same number with `low` back in its range."""
    half = _half(x.low)
    return WideInt(x.high + (x.low >> half), x.low & x.low.dtype.type((1 << half) - 1))


def saturate(x: WideInt, dtype: Any) -> jax.Array:
    """The integer of `dtype` that is nearest to `x`."""
    half = _half(x.low)
    is_unsigned = jnp.issubdtype(dtype, jnp.unsignedinteger)
    word = jnp.dtype(f"{'uint' if is_unsigned else 'int'}{2 * half}")
    limits = jnp.iinfo(word)
    top, bottom = limits.max >> half, limits.min >> half
    exact = (x.high.astype(word) << half) | x.low.astype(word)
    largest, smallest = (jnp.asarray(bound, word) for bound in (limits.max, limits.min))
    inside = jnp.where(x.high > top, largest, jnp.where(x.high < bottom, smallest, exact))
    narrow = jnp.iinfo(dtype)
    return jnp.clip(inside, word.type(narrow.min), word.type(narrow.max)).astype(dtype)


def modulo(x: WideInt, modulus: int) -> jax.Array:
    """`x % modulus` as uint32, for a sum of non-negative integers of up to 32 bits."""
    m = jnp.uint32(modulus)
    rest = x.high.astype(jnp.uint32) % m
    for _ in range(_half(x.low)):
        rest = (rest * 2) % m  # below 2**32, because moduli have at most 31 bits
    return (rest + x.low.astype(jnp.uint32) % m) % m


def zero(t: Type) -> Any:
    """The empty sum of values of type `t`, which `narrow` turns into one."""
    return zero_like(inference.template(t))


def zero_like(template: Any) -> Any:
    """As `zero`, for values like a pytree of arrays or of their shapes."""
    return jax.tree.map(_zero, template)


def _zero(x: Any) -> Any:
    if _is_integer(x.dtype):
        return widen(jnp.zeros(x.shape, x.dtype))
    return jnp.zeros(x.shape, _wide_float(x.dtype))


def _is_integer(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.integer)


def _wide_float(dtype: Any) -> Any:
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    return dtype if is_complex or jnp.finfo(dtype).bits >= 32 else jnp.float32


def _is_wide(x: Any) -> bool:
    return isinstance(x, WideInt)


def add(total: Any, value: Any) -> Any:
    """`total` with one more value."""
    return add_lanes(total, jax.tree.map(lambda x: jnp.asarray(x)[None], value))


def add_lanes(total: Any, values: Any) -> Any:
    """`total` with the values of a wave, stacked along axis 0."""

    def one(total: Any, x: jax.Array) -> Any:
        if _is_wide(total):
            return merge(total, _sum_wide(widen(x)))
        return total + jnp.sum(x, axis=0, dtype=total.dtype)

    return jax.tree.map(one, total, values, is_leaf=_is_wide)


def _sum_wide(x: WideInt) -> WideInt:
    """The sum along axis 0, carried in between where there is too much to add at once."""
    num_lanes = x.low.shape[0]
    if num_lanes <= _MAX_SUMMANDS:
        return carry(WideInt(jnp.sum(x.high, axis=0), jnp.sum(x.low, axis=0)))
    parts = [
        _sum_wide(WideInt(x.high[i : i + _MAX_SUMMANDS], x.low[i : i + _MAX_SUMMANDS]))
        for i in range(0, num_lanes, _MAX_SUMMANDS)
    ]
    return _sum_wide(jax.tree.map(lambda *words: jnp.stack(words), *parts))


def merge(a: Any, b: Any) -> Any:
    """The sum of two totals."""

    def one(a: Any, b: Any) -> Any:
        return carry(WideInt(a.high + b.high, a.low + b.low)) if _is_wide(a) else a + b

    return jax.tree.map(one, a, b, is_leaf=_is_wide)


def carried(total: Any) -> Any:
    """A total whose words were summed each on its own, as between devices, in its usual form."""
    return jax.tree.map(lambda x: carry(x) if _is_wide(x) else x, total, is_leaf=_is_wide)


def narrow(total: Any, t: Type) -> Any:
    """A total as a value of type `t`."""
    return narrow_like(total, inference.template(t))


def narrow_like(total: Any, template: Any) -> Any:
    """As `narrow`, for values like a pytree of arrays or of their shapes."""

    def one(total: Any, x: Any) -> jax.Array:
        return saturate(total, x.dtype) if _is_wide(total) else total.astype(x.dtype)

    return jax.tree.map(one, total, template, is_leaf=_is_wide)
