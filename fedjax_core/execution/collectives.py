"""Collectives: what the devices of a mesh exchange in a round trip.

add_up   the sums of all devices: one all-reduce
gather   the values of all devices, side by side

XLA joins the all-reduces of one dtype into one, and only those. So that a round trip of float32
sums does not wait for a second one, a few integers ride along with them: as digits that float32
adds exactly.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_core.bits import BitCount

Axes = str | tuple[str, ...]

# More integers than this are summed on their own: their digits would cost more than a collective.
_MAX_RIDERS = 1024
_FLOAT32_BITS = 24


def add_up(tree: Any, axis: Axes) -> Any:
    """The sum of what all devices along mesh axes hold.

    Args:
      tree: a pytree of arrays; integers of 32 bits are summed modulo `2**32`, a `BitCount` exactly.
      axis: the mesh axes.
    """
    leaves, structure = jax.tree.flatten(jax.tree.map(_halves, tree, is_leaf=_is_bits))
    is_word = [x.dtype in (jnp.int32, jnp.uint32) for x in leaves]
    words = [x for x, word in zip(leaves, is_word, strict=True) if word]
    others = [x for x, word in zip(leaves, is_word, strict=True) if not word]
    words, others = _add_up_words(words, others, axis)
    ordered = [words.pop(0) if word else others.pop(0) for word in is_word]
    halves = jax.tree.unflatten(structure, ordered)
    return jax.tree.map(
        lambda x, y: _whole(y) if _is_bits(x) else y, tree, halves, is_leaf=_is_bits
    )


def _is_bits(x: Any) -> bool:
    return isinstance(x, BitCount)


def _halves(x: Any) -> Any:
    """A `BitCount` as words whose sums over devices lose no carry."""
    return (x.high, x.low >> 16, x.low & 0xFFFF) if _is_bits(x) else x


def _whole(halves: tuple[jax.Array, ...]) -> BitCount:
    high, upper, lower = halves
    return BitCount(high, lower) + BitCount(upper >> 16, upper << 16)


def _add_up_words(
    words: list[jax.Array], others: list[jax.Array], axis: Axes
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The sums of integers of 32 bits, and of arrays of other dtypes."""
    if not words:
        return words, lax.psum(others, axis)
    flat = jnp.concatenate([lax.bitcast_convert_type(x, jnp.uint32).ravel() for x in words])
    if flat.size <= _MAX_RIDERS and any(x.dtype == jnp.float32 for x in others):
        num_digits, width = _digits(axis)
        shifts = width * jnp.arange(num_digits, dtype=jnp.uint32)[:, None]
        digits = ((flat[None] >> shifts) & ((1 << width) - 1)).astype(jnp.float32)
        digits, others = lax.psum((digits, others), axis)
        flat = jnp.sum(digits.astype(jnp.uint32) << shifts, axis=0, dtype=jnp.uint32)
    else:
        flat, others = lax.psum((flat, others), axis)
    parts = jnp.split(flat, _ends(words)[:-1])
    pairs = zip(words, parts, strict=True)
    return [lax.bitcast_convert_type(part.reshape(x.shape), x.dtype) for x, part in pairs], others


def _digits(axis: Axes) -> tuple[int, int]:
    """How many digits of how many bits hold a word, such that float32 adds those of all devices."""
    num_devices = lax.axis_size(axis)
    width = min(_FLOAT32_BITS - (num_devices - 1).bit_length(), 16)
    return -(-32 // width), width


def gather(tree: Any, axis: Axes) -> Any:
    """What all devices along mesh axes hold, in their order: a pytree of `[devices, ...]`.

    Arrays of one dtype travel together.
    """
    leaves, structure = jax.tree.flatten(tree)
    data = [jax.random.key_data(x) if _is_key(x) else x for x in leaves]
    gathered = list(data)
    for dtype in {x.dtype for x in data}:
        group = [k for k, x in enumerate(data) if x.dtype == dtype]
        flat = lax.all_gather(jnp.concatenate([data[k].ravel() for k in group]), axis)
        parts = jnp.split(flat, _ends([data[k] for k in group])[:-1], axis=1)
        for k, part in zip(group, parts, strict=True):
            gathered[k] = part.reshape(-1, *data[k].shape)
    pairs = zip(leaves, gathered, strict=True)
    return jax.tree.unflatten(structure, [_as_key(x, y) if _is_key(x) else y for x, y in pairs])


def _ends(arrays: list[jax.Array]) -> list[int]:
    """Where each of several arrays ends, one flat after the other."""
    return list(itertools.accumulate(x.size for x in arrays))


def _is_key(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _as_key(key: jax.Array, data: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
