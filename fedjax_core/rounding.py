"""Where a float is rounded, so that two programs round alike."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def pinned(value: Any) -> Any:
    """`value`, its floats rounded as they are when they are stored.

    A compiler may contract a product and the sum that follows into one operation, which rounds
    once, and looks through barriers and casts between them. It does so in one program and not in
    another, so that their results differ in the last bit. Here one NaN becomes another one, which
    no compiler can know not to occur.

    Args:
      value: pytree of arrays.

    Returns:
      The same values.
    """
    return jax.tree.map(_pinned, value)


def _pinned(x: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize == 1:
        return x
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    all_ones = bits.dtype.type(np.iinfo(bits.dtype).max)
    return jax.lax.bitcast_convert_type(jnp.where(bits == all_ones, bits ^ 1, bits), x.dtype)
