"""Arithmetic that quantisers share: it neither overflows nor moves what is exact."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def wide(tensor: jax.Array) -> jax.Array:
    """A floating tensor in the precision that codecs compute in: float32, or its own float64."""
    return tensor.astype(jnp.float64 if tensor.dtype == jnp.float64 else jnp.float32)


def narrow(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """In the dtype of a tensor; what is finite but too large for it becomes its largest number."""
    if jnp.finfo(dtype).max >= jnp.finfo(x.dtype).max:
        return x.astype(dtype)
    limit = jnp.asarray(jnp.finfo(dtype).max, x.dtype)
    return jnp.where(jnp.isfinite(x), jnp.clip(x, -limit, limit), x).astype(dtype)


def divisor(scale: jax.Array) -> jax.Array:
    """`scale`, or 1 where it is too small to divide by (devices may take subnormals for zero)."""
    return jnp.where(scale >= jnp.finfo(scale.dtype).tiny, scale, jnp.ones_like(scale))


def ratio(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`x / scale`: 1 or -1 exactly where the magnitudes agree, and about x where `scale` is tiny.

    Compilers turn the division by one number into a product with its reciprocal, which rounds
    twice, and flush the reciprocal of the largest numbers to zero. A quarter of them has one.
    """
    is_tiny = scale < 4 * jnp.finfo(scale.dtype).tiny
    quotient = (0.25 * x) / jnp.where(is_tiny, 1, 0.25 * scale)
    return jnp.where(~is_tiny & (jnp.abs(x) == scale), jnp.sign(x), quotient)


def total(x: jax.Array) -> jax.Array:
    """The sum of all elements, by columns first.

    XLA's CPU backend has naive loops for the reduction of a large tensor over all axes at once.
    """
    return jnp.sum(_by_column(jnp.sum, x))


def largest(x: jax.Array) -> jax.Array:
    """The largest of all elements, by columns first as in `total`."""
    return jnp.max(_by_column(jnp.max, x))


def smallest(x: jax.Array) -> jax.Array:
    """The smallest of all elements, by columns first as in `total`."""
    return jnp.min(_by_column(jnp.min, x))


def _by_column(reduce: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    if x.ndim < 2:
        return x
    # Or else the compiler makes one reduction of both.
    return jax.lax.optimization_barrier(reduce(x.reshape(-1, x.shape[-1]), axis=0))


def finite(position: jax.Array) -> jax.Array:
    """Zero in place of what is not finite: what that becomes as an integer differs by device."""
    return jnp.where(jnp.isfinite(position), position, jnp.zeros_like(position))


def mean_magnitude(tensor: jax.Array) -> jax.Array:
    """The mean of |x|, exact for constant magnitudes; NaN if an element is not finite."""
    largest = jnp.max(jnp.abs(tensor))
    return largest * jnp.mean(ratio(jnp.abs(tensor), largest))


def norm(tensor: jax.Array) -> jax.Array:
    """The Euclidean norm along the last axis, which stays.

    It is exact for a single element that is not zero, infinity where it overflows, and NaN where
    an element is not finite.
    """
    largest = jnp.max(jnp.abs(tensor), axis=-1, keepdims=True)
    scaled = ratio(tensor, largest)
    largest = jnp.where(jnp.isfinite(largest), largest, jnp.nan)
    return largest * jnp.sqrt(jnp.sum(scaled * scaled, axis=-1, keepdims=True))


def round_stochastically(key: jax.Array, position: jax.Array) -> jax.Array:
    """``floor(position + u)``, u uniform in [0, 1), so that its mean is `position`.

    The sum is not formed, for its rounding would move exact integers. The probability of rounding
    up is exact to 2**-32.

    Args:
      key: used once.
      position: floating, finite, any shape.

    Returns:
      Whole numbers of the dtype of `position`.
    """
    floor = jnp.floor(position)
    return floor + is_drawn(key, position - floor).astype(position.dtype)


def is_drawn(key: jax.Array, probability: jax.Array) -> jax.Array:
    """Independent draws that are True with `probability`, in [0, 1), exact to 2**-32."""
    remainder = (probability * 2.0**32).astype(jnp.uint32)
    return jax.random.bits(key, probability.shape, jnp.uint32) < remainder


def centered_uniform(key: jax.Array, like: jax.Array) -> jax.Array:
    """Uniform in [-1/2, 1/2), a multiple of 2**-24, in the shape and dtype of `like`."""
    draw = jax.random.bits(key, like.shape, jnp.uint32) >> 8
    return draw.astype(like.dtype) * 2.0**-24 - 0.5
