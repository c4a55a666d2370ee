"""The operators of the language: local computations, and the few edges between placements.

    federated_value      T -> T@P
    federated_zip        <{T}@P,{U}@P> -> {<T,U>}@P
    federated_map        <(T -> U),{T}@P> -> {U}@P
    federated_eval       <( -> T)> -> {T}@CLIENTS, T@SERVER
    federated_broadcast  T@SERVER -> T@CLIENTS
    federated_sum        {T}@CLIENTS -> T@SERVER
    federated_mean       <{T}@CLIENTS,{W}@CLIENTS> -> T@SERVER
    federated_min        {T}@CLIENTS -> T@SERVER
    federated_max        {T}@CLIENTS -> T@SERVER
    federated_collect    {T}@CLIENTS -> T*@SERVER
    federated_aggregate  <{T}@CLIENTS,U,(<U,T> -> U),(<U,U> -> U),(U -> R)> -> R@SERVER
    federated_select     <{int32[n]}@CLIENTS,int32@SERVER,T@SERVER,(<T,int32> -> U)> -> {U*}@CLIENTS

They are used in the body of a federated computation and append one or a few operations to its
program.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

from fedjax_core.errors import CodecError, FederatedTypeError
from fedjax_core.language import inference
from fedjax_core.language.checks import check_fits
from fedjax_core.language.feeding import to_member
from fedjax_core.language.local import Local, TypedFunction
from fedjax_core.language.mapping import federated_eval as federated_eval
from fedjax_core.language.mapping import federated_map as federated_map
from fedjax_core.language.mapping import federated_type_of, local_of, placed, presence
from fedjax_core.language.mapping import federated_value as federated_value
from fedjax_core.language.mapping import federated_zip as federated_zip
from fedjax_core.language.messages import EdgeCodec, broadcast_encoded, sum_encoded
from fedjax_core.language.placements import CLIENTS, SERVER
from fedjax_core.language.program import (
    Aggregate,
    Broadcast,
    Collect,
    Count,
    Extreme,
    Request,
    Select,
    Sum,
    type_bits,
)
from fedjax_core.language.tracing import (
    Value,
    current_builder,
    is_placed,
    location,
    operator,
    position_of,
)
from fedjax_core.language.types import FederatedType, SequenceType, TensorType, Type


@operator
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
        _check_codec(codec, "federated_broadcast")
        return broadcast_encoded(codec, value, name)
    value = placed(value, SERVER, "federated_broadcast")
    builder = current_builder("federated_broadcast")
    t = federated_type_of(value, name)
    if not t.all_equal:
        raise FederatedTypeError(
            f"federated_broadcast: expected one value at the server, got {t}, which may differ from "
            "one part of the server to another; declare it as all-equal."
        )
    member = t.member
    type_bits(member)  # refuses what has no size
    t = FederatedType(member, CLIENTS, all_equal=True)
    inputs = (position_of(value, builder, "federated_broadcast"),)
    return builder.add(Broadcast(type=t, inputs=inputs, label=name, location=location()))


def _check_codec(codec: Any, what: str) -> None:
    missing = [part for part in ("init", "encode", "decode", "bits") if not hasattr(codec, part)]
    if missing:
        raise CodecError(
            f"{what}: expected a codec, got {codec!r} without {missing}; pass one of "
            "fc.compression, or None to send raw values."
        )


@operator
def federated_sum(
    value: Any,
    *,
    codec: EdgeCodec | None = None,
    present: Value | None = None,
    name: str = "value",
) -> Value:
    """Sums the clients' values: `{T}@CLIENTS -> T@SERVER`; zero if there are none.

    Small dtypes are accumulated in 32 bits, and the result has the value's dtype again. A sum of
    integers that the dtype does not hold is the nearest number that it does hold, in whatever order
    the values were added: 200 clients' int8 ones sum to 127.

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
        _check_codec(codec, "federated_sum")
        return sum_encoded(codec, value, present, name)
    value = placed(value, CLIENTS, "federated_sum")
    member = federated_type_of(value, name).member
    _check(inference.why_not_summable(member), value, "federated_sum", "numbers")
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


def _check(reason: str | None, value: Value, what: str, expected: str) -> None:
    """Raises if there is a reason why values of this type cannot be aggregated."""
    if reason is not None:
        raise FederatedTypeError(
            f"{what}: expected {expected} of fixed shape, got {value.type_signature} ({reason}); "
            "convert them, for example with astype, in federated_map."
        )


@operator
def federated_count(present: Value | None = None) -> Value:
    """The number of clients, or of those present: `{bool}@CLIENTS -> int32@SERVER`, at no cost."""
    builder = current_builder("federated_count")
    inputs = tuple(
        position_of(v, builder, "federated_count") for v in presence(present, "federated_count")
    )
    t = FederatedType(TensorType(np.int32), SERVER)
    return builder.add(Count(type=t, inputs=inputs, location=location()))


@operator
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
    reason = inference.why_not_averageable(member)
    _check(reason, value, "federated_mean", "floating-point numbers")
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
            f"{weight.type_signature}; compute one number a client in federated_map."
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


@operator
def federated_aggregate(
    value: Any, zero: Any, accumulate: Any, merge: Any, report: Any, *, name: str = "value"
) -> Value:
    """A general aggregation: `<{T}@CLIENTS,U,(<U,T> -> U),(<U,U> -> U),(U -> R)> -> R@SERVER`.

    Args:
      value: at the clients.
      zero: an unplaced constant, or a value at the server, neutral for `merge`; the accumulator of
        no clients.
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
    start = zero if isinstance(zero, Value) and is_placed(zero) else federated_value(zero, SERVER)
    start = placed(start, SERVER, f"{what}: zero")
    state = federated_type_of(start, what).member
    _check_zero(state, accumulate)
    accumulator = local_of(accumulate, (state, member), f"{what}: accumulate")
    merger = local_of(merge, (state, state), f"{what}: merge")
    for part, local in (("accumulate", accumulator), ("merge", merger)):
        check_fits(state, local.result, f"the result of `{part}`")
    if not isinstance(zero, Value):
        _check_neutral(merger, zero, state)
    reporter = local_of(report, (state,), f"{what}: report")
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


def _check_neutral(merge: Local, zero: Any, state: Type) -> None:
    """Raises unless the merge of two accumulators of no clients is one again.

    Every group of clients that are accumulated apart from others starts from it.
    """
    leaves = jax.tree.leaves(to_member(zero, state, "federated_aggregate: zero"))
    traced = next(iter(merge.traces.values()))
    merged = jex_core.jaxpr_as_fun(traced.jaxpr)(*leaves, *leaves)
    for leaf, result in zip(leaves, merged, strict=True):
        if jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key):
            continue
        if not np.array_equal(leaf, result, equal_nan=jnp.issubdtype(result.dtype, jnp.inexact)):
            raise FederatedTypeError(
                f"federated_aggregate: expected merge(zero, zero) to be zero, got {result} of "
                f"{leaf}; choose a zero that is neutral for `merge`."
            )


def _check_zero(state: Type, accumulate: Any) -> None:
    if isinstance(accumulate, TypedFunction):
        check_fits(accumulate.parameters[0], state, "`zero`")


@operator
def federated_min(value: Any, *, present: Value | None = None, name: str = "value") -> Value:
    """The smallest of the clients' values, element by element: `{T}@CLIENTS -> T@SERVER`.

    Over no clients it is the largest value of the dtype, infinity for floats. NaN wins over
    numbers.

    Args:
      value: real numbers or structs of them, at the clients.
      present: bool at the clients; one that is False sends nothing and counts for nothing.
      name: of the edge.

    Raises:
      PlacementError: if the value is not at the clients.
      FederatedTypeError: for values that have no order (booleans, complex numbers, keys).
    """
    return _extreme(value, present, name, is_max=False)


@operator
def federated_max(value: Any, *, present: Value | None = None, name: str = "value") -> Value:
    """The largest of the clients' values, element by element: `{T}@CLIENTS -> T@SERVER`.

    Over no clients it is the smallest value of the dtype, minus infinity for floats. NaN wins over
    numbers. Arguments and errors as those of `federated_min`.
    """
    return _extreme(value, present, name, is_max=True)


def _extreme(value: Any, present: Value | None, name: str, is_max: bool) -> Value:
    what = f"federated_{'max' if is_max else 'min'}"
    builder = current_builder(what)
    value = placed(value, CLIENTS, what)
    member = federated_type_of(value, what).member
    _check(inference.why_not_orderable(member), value, what, "real numbers")
    inputs = (value, *presence(present, what))
    return builder.add(
        Extreme(
            type=FederatedType(member, SERVER),
            inputs=tuple(position_of(v, builder, what) for v in inputs),
            label=name,
            is_max=is_max,
            has_presence=present is not None,
            location=location(),
        )
    )


@operator
def federated_collect(value: Any, *, name: str = "value") -> Value:
    """Every client's value, at the server: `{T}@CLIENTS -> T*@SERVER`.

    The server sees each value, its memory grows with the cohort, and the analysis reports it. The
    order is that of the clients.

    Args:
      value: at the clients, of a fixed size.
      name: of the edge.

    Raises:
      PlacementError: if the value is not at the clients.
      FederatedTypeError: for sequences, which have no fixed size.
    """
    what = "federated_collect"
    builder = current_builder(what)
    value = placed(value, CLIENTS, what)
    member = federated_type_of(value, what).member
    type_bits(member)  # refuses what has no size
    return builder.add(
        Collect(
            type=FederatedType(SequenceType(member), SERVER),
            inputs=(position_of(value, builder, what),),
            label=name,
            location=location(),
        )
    )


@operator
def federated_select(
    client_keys: Any, max_key: Any, server_val: Any, select_fn: Any, *, name: str = "value"
) -> Value:
    """Gives each client the parts of the server's value that it asks for.

    `<{int32[n]}@CLIENTS,int32@SERVER,T@SERVER,(<T,int32> -> U)> -> {U*}@CLIENTS`. The keys go to
    the server in clear; what it selects comes back, and nothing else of its value.

    Args:
      client_keys: `int32[n]` at the clients; a key outside of `0 .. max_key - 1` is taken for the
        nearest one inside.
      max_key: how many keys there are: int32 at the server, or a constant.
      server_val: at the server.
      select_fn: `(server_val, key) -> part`, run at the server.
      name: of the edges.

    Returns:
      A sequence of `n` parts at each client, in the order of its keys.

    Raises:
      FederatedTypeError: where a type does not fit.
    """
    what = "federated_select"
    builder = current_builder(what)
    keys = placed(client_keys, CLIENTS, what)
    key_type = federated_type_of(keys, what).member
    is_vector = isinstance(key_type, TensorType) and len(key_type.shape or ()) == 1
    if not is_vector or cast(TensorType, key_type).dtype != np.int32:
        raise FederatedTypeError(
            f"{what}: expected client_keys of type {{int32[n]}}@CLIENTS, got "
            f"{keys.type_signature}; convert them with astype in federated_map."
        )
    limit, source = _number_of_keys(max_key, what), placed(server_val, SERVER, what)
    members = (federated_type_of(source, what).member, TensorType(np.int32))
    select = local_of(select_fn, members, f"{what}: select_fn")
    type_bits(select.result)  # refuses what has no size
    request = builder.add(
        Request(
            type=keys.type_signature,
            inputs=(position_of(keys, builder, what),),
            label=name,
            location=location(),
        )
    )
    return builder.add(
        Select(
            type=FederatedType(SequenceType(select.result), CLIENTS),
            inputs=tuple(position_of(v, builder, what) for v in (request, limit, source)),
            label=name,
            select=select,
            location=location(),
        )
    )


def _number_of_keys(max_key: Any, what: str) -> Value:
    """`max_key` as a value at the server."""
    if isinstance(max_key, Value):
        limit = placed(max_key, SERVER, what)
        check_fits(TensorType(np.int32), federated_type_of(limit, what).member, "`max_key`")
        return limit
    is_int = isinstance(max_key, int | np.integer) and not isinstance(max_key, bool)
    if not is_int or not 1 <= max_key <= np.iinfo(np.int32).max:
        raise FederatedTypeError(
            f"{what}: expected `max_key` to be int32 at the server or an int of at least 1, got "
            f"{max_key!r}; pass the number of keys."
        )
    return federated_value(np.int32(max_key), SERVER)
