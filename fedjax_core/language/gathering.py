"""Other ways from the clients to the server: folds, extremes, single values, and selected parts."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

from fedjax_core.errors import FederatedTypeError
from fedjax_core.language import inference
from fedjax_core.language.checks import check_fits
from fedjax_core.language.feeding import to_member
from fedjax_core.language.local import Local, TypedFunction
from fedjax_core.language.locations import location
from fedjax_core.language.mapping import (
    check_members,
    federated_type_of,
    federated_value,
    local_of,
    placed,
    presence,
)
from fedjax_core.language.placements import CLIENTS, SERVER
from fedjax_core.language.program import (
    Aggregate,
    Collect,
    Constant,
    Extreme,
    Request,
    Select,
    type_bits,
)
from fedjax_core.language.tracing import (
    Value,
    builder_op,
    current_builder,
    is_placed,
    operator,
    position_of,
)
from fedjax_core.language.types import FederatedType, SequenceType, TensorType, Type


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
    source = builder_op(start)
    if isinstance(source, Constant):
        _check_neutral(merger, source.value, state)
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
    check_members(inference.why_not_orderable(member), value, what, "real numbers")
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
