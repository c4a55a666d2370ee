"""Batches of a client's examples: shuffled by a key, the last one masked."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_core.language.values import Sequence

# The configuration's attributes are unknown to type checkers.
_PARTITIONABLE = "jax_threefry_partitionable"


def num_batches(examples: Sequence, batch_size: int) -> jax.Array:
    """``ceil(length / batch_size)``, an int32 scalar; 0 for an empty sequence."""
    return (examples.length + batch_size - 1) // batch_size


def shuffle(key: jax.Array, examples: Sequence) -> jax.Array:
    """A random order of the examples.

    Every position draws its own 31 bits from the key, and positions are sorted by them, equal ones
    as they stand. So the order depends on the key and the length alone, not on the capacity that
    the sequence happens to be padded to.

    Args:
      key: of this client and epoch.
      examples: of the client.

    Returns:
      int32 `[capacity]`: a permutation whose first `length` entries are the positions of examples.
    """
    sizes = _prefix_sizes(examples.capacity)
    branches = [lambda n=n: _shuffle_prefix(key, examples, n) for n in sizes]
    return lax.switch(jnp.sum(examples.length > jnp.array(sizes[:-1], jnp.int32)), branches)


def _prefix_sizes(capacity: int) -> list[int]:
    """Rising sizes up to `capacity`, a factor of 8 apart.

    A short client beside a long one only pays for the size that holds its own examples.
    """
    sizes = [capacity]
    while sizes[-1] > 256:
        sizes.append(-(-sizes[-1] // 8))
    return sizes[::-1]


def _shuffle_prefix(key: jax.Array, examples: Sequence, size: int) -> jax.Array:
    """`shuffle` of a sequence of at most `size` examples."""
    positions = jnp.arange(examples.capacity, dtype=jnp.int32)
    prefix, rest = positions[:size], positions[size:]
    # The highest bit is that of padding, so that one number orders both.
    is_padding = (prefix >= examples.length).astype(jnp.uint32)
    ranks = (_bits_by_position(key, size) >> 1) | (is_padding << 31)
    order = lax.sort((ranks, prefix), num_keys=1, is_stable=True)[1]
    return jnp.concatenate([order, rest])


def _bits_by_position(key: jax.Array, size: int) -> jax.Array:
    """Random uint32 `[size]`, each depending on the key and its position alone."""
    is_threefry = str(jax.random.key_impl(key)) == "threefry2x32"
    if is_threefry and getattr(jax.config, _PARTITIONABLE):  # one draw has this property then
        return jax.random.bits(key, (size,))
    positions = jnp.arange(size, dtype=jnp.uint32)
    return jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(key, i)))(positions)


def take_batch(
    examples: Sequence, order: jax.Array, index: jax.Array, batch_size: int
) -> tuple[Any, jax.Array]:
    """The batch number `index` of the examples in the given order.

    Args:
      examples: of the client.
      order: int32 `[capacity]`, see `shuffle`.
      index: int32 scalar, from 0.
      batch_size: static.

    Returns:
      `(batch, mask)`: a pytree of `[batch_size, ...]`, and bool `[batch_size]`, False for padding.
      What the padding holds is undefined.
    """
    slots = index * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
    positions = jnp.take(order, slots, mode="clip")
    return examples.take(positions), slots < examples.length
