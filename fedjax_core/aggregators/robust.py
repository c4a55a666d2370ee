"""Wrappers against single updates that are too large: clipping and zeroing by norm.

robust_aggregator()       = chain(zero_by_norm(...), clip_by_global_norm(...), mean())
compression_aggregator()  = the same around mean(codec=uniform_quantize(8))
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_core.aggregators.base import (
    Aggregator,
    Measurements,
    Wrapper,
    chain,
    is_present,
    merge_measurements,
)
from fedjax_core.aggregators.quantiles import NormEstimator, as_estimator, quantile
from fedjax_core.aggregators.sums import mean, unweighted_mean
from fedjax_core.compression.base import Codec
from fedjax_core.compression.edges import PlacedKeys
from fedjax_core.compression.uniform import uniform_quantize
from fedjax_core.errors import ArgumentError
from fedjax_core.language.operators import federated_broadcast, federated_map, federated_sum
from fedjax_core.language.tracing import Value


class WrapperState(NamedTuple):
    """The state of a wrapper beside that of what it wraps."""

    norm: Any
    inner: Any


class Limited(NamedTuple):
    """A value after a wrapper, its norm before, and whether it was changed (int32, 0 or 1)."""

    value: Any
    norm: Any
    is_changed: Any


def global_norm(value: Any, order: float = 2) -> jax.Array:
    """The norm of all elements of a pytree together, in float32; order 1, 2 or infinity.

    Examples:
      >>> float(global_norm({"a": jnp.array([3.0]), "b": jnp.array([4.0])}))
      5.0
    """
    leaves = [jnp.abs(x).astype(jnp.float32) for x in jax.tree.leaves(value)]
    if not leaves:
        return jnp.float32(0)
    if order == math.inf:
        return jnp.max(jnp.stack([jnp.max(x, initial=0.0) for x in leaves]))
    if order == 1:
        return jnp.sum(jnp.stack([jnp.sum(x) for x in leaves]))
    # Scaled by the largest element, so that squares neither overflow nor vanish.
    largest = global_norm(value, math.inf)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    return scale * jnp.sqrt(jnp.sum(jnp.stack([jnp.sum((x / scale) ** 2) for x in leaves])))


def clip_by_global_norm(norm: float | NormEstimator) -> Wrapper:
    """Scales each client's value down to a global Euclidean norm of at most `norm`.

    ``x <- x min(1, C / |x|)``, over all leaves together, dtypes kept. A value whose norm is not
    finite cannot be scaled and becomes zero.

    Args:
      norm: the largest norm; a positive number, or an estimator such as `quantile(1.0, 0.8)`.

    Returns:
      A wrapper that measures `{"clip_by_global_norm": {"norm", "count"}}`.

    Raises:
      ArgumentError: if `norm` is neither.
    """

    def clip(limit: jax.Array, value: Any) -> Limited:
        size = global_norm(value)
        scale = jnp.where(size > limit, limit / jnp.where(size > 0, size, 1.0), 1.0)
        clipped = jax.tree.map(
            # In float32 or wider: a small scale would vanish in half precision.
            lambda x: jnp.where(jnp.isfinite(size), (x * scale).astype(x.dtype), jnp.zeros_like(x)),
            value,
        )
        return Limited(clipped, size, (~(size <= limit)).astype(jnp.int32))

    return _limit("clip_by_global_norm", as_estimator(norm), clip)


def zero_by_norm(norm: float | NormEstimator, *, order: float = math.inf) -> Wrapper:
    """Replaces a client's value by zero where its norm exceeds `norm`, or is not finite.

    The client's weight is kept, so that a zeroed client still counts in a weighted mean.

    Args:
      norm: the largest norm that is let through; a positive number, or an estimator.
      order: of the norm: 1, 2 or infinity.

    Returns:
      A wrapper that measures `{"zero_by_norm": {"norm", "count"}}`.

    Raises:
      ArgumentError: if `norm` or `order` is none of these.
    """
    if order not in (1, 2, math.inf):
        raise ArgumentError(f"Expected the order of a norm: 1, 2 or math.inf, got {order=}.")

    def zero(limit: jax.Array, value: Any) -> Limited:
        size = global_norm(value, order)
        is_kept = size <= limit  # False for NaN
        kept = jax.tree.map(lambda x: jnp.where(is_kept, x, jnp.zeros_like(x)), value)
        return Limited(kept, size, (~is_kept).astype(jnp.int32))

    return _limit("zero_by_norm", as_estimator(norm), zero)


def _limit(
    name: str, estimator: NormEstimator, limit: Callable[[jax.Array, Any], Limited]
) -> Wrapper:
    """A wrapper that changes each client's value by a function of an estimated norm."""

    def wrap(inner: Aggregator) -> Aggregator:
        def init(template: Any) -> tuple[Any, Any]:
            server, memory = inner.init(template)
            return WrapperState(estimator.init(), server), memory

        def aggregate(
            keys: PlacedKeys, server: Value, memory: Value, value: Value, weight: Value
        ) -> tuple[Value, Value, Any, Measurements]:
            norm = federated_map(estimator.report, server.norm)
            limited = federated_map(limit, federated_broadcast(norm, name="norm"), value)
            present = is_present(weight)
            own = {
                "norm": norm,
                "count": federated_sum(limited.is_changed, present=present, name="norm"),
            }
            state, memory, result, measured = inner.aggregate(
                keys, server.inner, memory, limited.value, weight
            )
            new_norm = estimator.update(server.norm, limited.norm, present)
            new_server = federated_map(WrapperState, new_norm, state)
            return new_server, memory, result, merge_measurements(name, own, measured)

        return Aggregator(inner.is_weighted, init, aggregate)

    return wrap


def default_zeroing_norm() -> NormEstimator:
    """Twice the 98 % quantile of the largest elements, plus one: 21 at first (TFF's default)."""
    return quantile(10.0, 0.98, math.log(10.0), multiplier=2.0, increment=1.0)


def default_clipping_norm() -> NormEstimator:
    """The 80 % quantile of the Euclidean norms, 1 in the first round (TFF's default)."""
    return quantile(1.0, 0.8, 0.2)


def robust_aggregator(
    *,
    zeroing: bool = True,
    clipping: bool = True,
    weighted: bool = True,
    codec: Codec | None = None,
) -> Aggregator:
    """A mean after zeroing of extreme values and adaptive clipping, with TFF's defaults.

    Args:
      zeroing: zero values beyond `default_zeroing_norm`.
      clipping: clip values to `default_clipping_norm`.
      weighted: whether the mean is weighted.
      codec: on the uplink of the values.
    """
    wrappers: list[Wrapper] = []
    if zeroing:
        wrappers.append(zero_by_norm(default_zeroing_norm()))
    if clipping:
        wrappers.append(clip_by_global_norm(default_clipping_norm()))
    return chain(*wrappers, mean(codec) if weighted else unweighted_mean(codec))


def compression_aggregator(
    *,
    zeroing: bool = True,
    clipping: bool = True,
    weighted: bool = True,
    bits: int = 8,
    min_size: int = 20_000,
) -> Aggregator:
    """`robust_aggregator` with large tensors uniformly quantised, with TFF's defaults.

    Args:
      zeroing: see `robust_aggregator`.
      clipping: see `robust_aggregator`.
      weighted: see `robust_aggregator`.
      bits: of each quantised element, 1 to 16.
      min_size: tensors with more elements than this are quantised, others travel raw.

    Note:
      TFF packs 28 bits into each 32; here the bits are packed densely.
    """
    codec = uniform_quantize(bits, min_size=min_size)
    return robust_aggregator(zeroing=zeroing, clipping=clipping, weighted=weighted, codec=codec)
