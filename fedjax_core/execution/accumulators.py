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
    """An integer `(top * 2**half + middle) * 2**half + low`, with `half` half the words' width.

    It holds the sum of 2**31 numbers of the word's whole range.
    """

    top: jax.Array
    middle: jax.Array
    low: jax.Array


def _half(word: jax.Array) -> int:
    return word.dtype.itemsize * 4


def widen(x: jax.Array) -> WideInt:
    """`x`, any integers, as the start of a sum."""
    wide = x if jnp.iinfo(x.dtype).bits >= 32 else x.astype(_word(x.dtype))
    half = _half(wide)
    mask = wide.dtype.type((1 << half) - 1)
    is_signed = jnp.issubdtype(wide.dtype, jnp.signedinteger)
    top = wide >> (2 * half - 1) if is_signed else jnp.zeros_like(wide)
    return WideInt(top, (wide >> half) & mask, wide & mask)


def _word(dtype: Any) -> Any:
    return jnp.uint32 if jnp.issubdtype(dtype, jnp.unsignedinteger) else jnp.int32


def carry(x: WideInt) -> WideInt:
    """The same number with `middle` and `low` back in their range."""
    half = _half(x.low)
    mask = x.low.dtype.type((1 << half) - 1)
    middle = x.middle + (x.low >> half)
    return WideInt(x.top + (middle >> half), middle & mask, x.low & mask)


def saturate(x: WideInt, dtype: Any) -> jax.Array:
    """The integer of `dtype` that is nearest to `x`."""
    half, word = _half(x.low), x.low.dtype
    limits = jnp.iinfo(word)
    is_signed = jnp.issubdtype(word, jnp.signedinteger)
    sign = (x.middle >> (half - 1)) if is_signed else jnp.zeros_like(x.middle)
    is_held = x.top + sign == 0  # all bits above the word are those of its sign
    largest, smallest = (jnp.asarray(bound, word) for bound in (limits.max, limits.min))
    nearest = jnp.where(x.top < 0, smallest, largest) if is_signed else largest
    inside = jnp.where(is_held, (x.middle << half) | x.low, nearest)
    narrow = jnp.iinfo(dtype)
    return jnp.clip(inside, word.type(narrow.min), word.type(narrow.max)).astype(dtype)


def modulo(x: WideInt, modulus: int) -> jax.Array:
    """`x % modulus` as uint32, for a sum of non-negative integers, and at most 31 bits of it."""
    m = jnp.uint32(modulus)
    rest = x.top.astype(jnp.uint32) % m
    for part in (x.middle, x.low):
        for _ in range(_half(x.low)):
            rest = (rest * 2) % m  # below 2**32
        rest = (rest + part.astype(jnp.uint32) % m) % m
    return rest


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
        return carry(WideInt(*(jnp.sum(word, axis=0, dtype=word.dtype) for word in x)))
    parts = [
        _sum_wide(WideInt(*(word[i : i + _MAX_SUMMANDS] for word in x)))
        for i in range(0, num_lanes, _MAX_SUMMANDS)
    ]
    return _sum_wide(jax.tree.map(lambda *words: jnp.stack(words), *parts))


def merge(a: Any, b: Any) -> Any:
    """The sum of two totals."""

    def one(a: Any, b: Any) -> Any:
        return carry(WideInt(*(x + y for x, y in zip(a, b, strict=True)))) if _is_wide(a) else a + b

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
