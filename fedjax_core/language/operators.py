"""The operators of the language: local computations, and the few edges between placements.

    federated_value      T -> T@P
    federated_zip        <{T}@P,{U}@P> -> {<T,U>}@P
    federated_map        <(T -> U),{T}@P> -> {U}@P
    federated_broadcast  T@SERVER -> T@CLIENTS
    federated_sum        {T}@CLIENTS -> T@SERVER
    federated_mean       <{T}@CLIENTS,{W}@CLIENTS> -> T@SERVER
    federated_aggregate  <{T}@CLIENTS,U,(<U,T> -> U),(<U,U> -> U),(U -> R)> -> R@SERVER

They are used in the body of a federated computation and append one or a few operations to its
program.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.errors import FederatedTypeError
from fedjax_core.language import inference
from fedjax_core.language.local import JaxComputation, trace_local
from fedjax_core.language.mapping import federated_map as federated_map
from fedjax_core.language.mapping import federated_type_of, placed, presence
from fedjax_core.language.mapping import federated_value as federated_value
from fedjax_core.language.mapping import federated_zip as federated_zip
from fedjax_core.language.messages import EdgeCodec, broadcast_encoded, sum_encoded
from fedjax_core.language.placements import CLIENTS, SERVER
from fedjax_core.language.program import Aggregate, Broadcast, Count, Sum, type_bits
from fedjax_core.language.tracing import Value, current_builder, location, position_of
from fedjax_core.language.types import FederatedType, TensorType, Type


def federated_broadcast(
    value: Any, *, codec: EdgeCodec | None = None, name: str = "value"
) -> Value:
    """Sends the server's value to all clients: `T@SERVER -> T@CLIENTS`.

    Args:
      value: at the server.
      codec: encodes the value; each client decodes it. One that needs keys or state goes through
        `compression.downlink`. None sends the raw value.
      name: of the edge, for the analysis and the ledger of bits.

    Raises:
      PlacementError: if the value is not at the server.
      CodecError: if the codec needs more than the value.
    """
    if codec is not None:
        return broadcast_encoded(codec, value, name)
    value = placed(value, SERVER, "federated_broadcast")
    builder = current_builder("federated_broadcast")
    member = federated_type_of(value, name).member
    type_bits(member)  # refuses what has no size
    t = FederatedType(member, CLIENTS, all_equal=True)
    inputs = (position_of(value, builder, "federated_broadcast"),)
    return builder.add_once(
        ("broadcast", inputs),  # what the clients have, they need not be sent again
        lambda: Broadcast(type=t, inputs=inputs, label=name, location=location()),
    )


def federated_sum(
    value: Any,
    *,
    codec: EdgeCodec | None = None,
    present: Value | None = None,
    name: str = "value",
) -> Value:
    """Sums the clients' values: `{T}@CLIENTS -> T@SERVER`; zero if there are none.

    Small dtypes are accumulated in 32 bits, and the result has the value's dtype again.

    Args:
      value: numbers or structs of them, at the clients.
      codec: encodes each client's value; the server sums what it decodes. One that needs keys,
        state or memory goes through `compression.uplink`. None sends raw values.
      present: bool at the clients; one that is False sends nothing and counts for nothing.
      name: of the edge.

    Raises:
      PlacementError: if the value is not at the clients.
      FederatedTypeError: if it cannot be summed (booleans, keys, sequences).
      CodecError: if the codec needs more than the value.
    """
    if codec is not None:
        return sum_encoded(codec, value, present, name)
    value = placed(value, CLIENTS, "federated_sum")
    member = federated_type_of(value, name).member
    if not inference.is_sum_compatible(member):
        raise FederatedTypeError(
            f"federated_sum: expected numbers of fixed shape, got {value.type_signature}; convert "
            "them, for example with astype, in federated_map."
        )
    builder = current_builder("federated_sum")
    inputs = (value, *presence(present, "federated_sum"))
    return builder.add(
        Sum(
            type=FederatedType(member, SERVER),
            inputs=tuple(position_of(v, builder, "federated_sum") for v in inputs),
            label=name,
            has_presence=present is not None,
            location=location(),
        )
    )


def federated_count(present: Value | None = None) -> Value:
    """The number of clients, or of those present: `{bool}@CLIENTS -> int32@SERVER`, at no cost."""
    builder = current_builder("federated_count")
    inputs = tuple(
        position_of(v, builder, "federated_count") for v in presence(present, "federated_count")
    )
    t = FederatedType(TensorType(np.int32), SERVER)
    return builder.add_once(
        ("count", inputs), lambda: Count(type=t, inputs=inputs, location=location())
    )


def federated_mean(
    value: Any,
    weight: Any = None,
    *,
    codec: EdgeCodec | None = None,
    present: Value | None = None,
    name: str = "value",
) -> Value:
    """The mean of the clients' values: `<{T}@CLIENTS,{W}@CLIENTS> -> T@SERVER`, weights optional.

    The mean over no clients, or with a total weight of zero, is zero. A client of weight zero
    counts for nothing even where its value is not finite.

    Args:
      value: floating-point numbers or structs of them, at the clients.
      weight: one scalar a client, for the whole struct; 1 for each if not given.
      codec: on the edge of the (weighted) value, see `federated_sum`.
      present: bool at the clients; one that is False sends nothing and counts for nothing.
      name: of the edge that carries the value; the weights travel on one called `weight`.

    Raises:
      FederatedTypeError: for values that are no floating-point numbers, or a weight that is no
        scalar.
    """
    value = placed(value, CLIENTS, "federated_mean")
    member = federated_type_of(value, name).member
    if not inference.is_average_compatible(member):
        raise FederatedTypeError(
            f"federated_mean: expected floating-point numbers, got {value.type_signature}; convert "
            "them in federated_map."
        )
    if weight is None:
        total = federated_sum(value, codec=codec, present=present, name=name)
        return federated_map(divide, total, federated_count(present))
    weight = _scalar_weight(weight)
    weighted = federated_map(multiply, value, weight)
    total = federated_sum(weighted, codec=codec, present=present, name=name)
    return federated_map(divide, total, federated_sum(weight, present=present, name="weight"))


def _scalar_weight(weight: Any) -> Value:
    weight = placed(weight, CLIENTS, "federated_mean")
    member = federated_type_of(weight, "federated_mean").member
    if (
        not isinstance(member, TensorType)
        or member.shape != ()
        or not inference.is_sum_compatible(member)
        or jnp.issubdtype(member.dtype, jnp.complexfloating)
    ):
        raise FederatedTypeError(
            f"federated_mean: expected one scalar weight a client, an integer or float, got "
            f"{weight.type_signature}."
        )
    # The sum of the weights has their dtype, and would overflow a small one.
    return weight if member.dtype.itemsize >= 4 else federated_map(_widen, weight)


def _widen(weight: jax.Array) -> jax.Array:
    is_float = jnp.issubdtype(weight.dtype, jnp.floating)
    return weight.astype(jnp.float32 if is_float else jnp.int32)


def multiply(value: Any, weight: jax.Array) -> Any:
    """`weight * value`, rounded once to each leaf's dtype; zero where the weight is."""

    def scale(x: jax.Array) -> jax.Array:
        product = (x * weight.astype(_at_least_float32(x))).astype(x.dtype)
        return jnp.where(weight != 0, product, jnp.zeros_like(x))

    return jax.tree.map(scale, value)


def _at_least_float32(x: jax.Array) -> Any:
    """A dtype for weights: float16 ends at 65,504 examples, bfloat16 counts them up to 256."""
    return jnp.promote_types(x.dtype, jnp.float32)


def divide(total: Any, weight: jax.Array) -> Any:
    """`total / weight`, rounded once to each leaf's dtype; zero where the weight is.

    Where the weight is not finite there is no mean, and the result is NaN rather than zero.
    """
    safe = jnp.where(weight == 0, jnp.ones_like(weight), weight)

    def ratio(x: jax.Array) -> jax.Array:
        quotient = (x / safe.astype(_at_least_float32(x))).astype(x.dtype)
        mean = jnp.where(jnp.isfinite(weight), quotient, jnp.nan).astype(x.dtype)
        return jnp.where(weight == 0, jnp.zeros_like(x), mean)

    return jax.tree.map(ratio, total)


def federated_aggregate(
    value: Any, zero: Any, accumulate: Any, merge: Any, report: Any, *, name: str = "value"
) -> Value:
    """A general aggregation: `<{T}@CLIENTS,U,(<U,T> -> U),(<U,U> -> U),(U -> R)> -> R@SERVER`.

    Args:
      value: at the clients.
      zero: an unplaced constant, neutral for `merge`; the accumulator of no clients.
      accumulate: `(accumulator, value) -> accumulator`.
      merge: `(accumulator, accumulator) -> accumulator`, for partial aggregates.
      report: `(accumulator) -> result`.
      name: of the edge.

    Raises:
      FederatedTypeError: where the types of the parts do not fit together.
    """
    what = "federated_aggregate"
    value = placed(value, CLIENTS, what)
    member = federated_type_of(value, what).member
    type_bits(member)  # refuses what has no size
    start = federated_value(zero, SERVER)
    state = federated_type_of(start, what).member
    _check_zero(state, accumulate)
    accumulator = trace_local(accumulate, (state, member), f"{what}: accumulate")
    merger = trace_local(merge, (state, state), f"{what}: merge")
    for part, local in (("accumulate", accumulator), ("merge", merger)):
        state.check_assignable_from(local.result, f"the result of `{part}`")
    reporter = trace_local(report, (state,), f"{what}: report")
    builder = current_builder(what)
    return builder.add(
        Aggregate(
            type=FederatedType(reporter.result, SERVER),
            inputs=(position_of(value, builder, what), position_of(start, builder, what)),
            label=name,
            accumulate=accumulator,
            merge=merger,
            report=reporter,
            location=location(),
        )
    )


def _check_zero(state: Type, accumulate: Any) -> None:
    if isinstance(accumulate, JaxComputation):
        accumulate.parameters[0].check_assignable_from(state, "`zero`")
