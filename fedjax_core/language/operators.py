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

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.bits import BitCount
from fedjax_core.errors import FederatedTypeError, PlacementError
from fedjax_core.language import types
from fedjax_core.language.feeding import to_member
from fedjax_core.language.local import JaxComputation, name_of, trace_local
from fedjax_core.language.placements import CLIENTS, SERVER, Placement
from fedjax_core.language.program import (
    Aggregate,
    Broadcast,
    Codec,
    Constant,
    Count,
    Map,
    Sum,
    type_bits,
)
from fedjax_core.language.tracing import (
    Value,
    current_builder,
    location,
    position_of,
    zip_values,
)
from fedjax_core.language.types import FederatedType, TensorType, Type


class Received(NamedTuple):
    """What a sum of encoded messages gives at the server."""

    total: Any
    count: Any
    bits: Any
    stats: Any


def federated_value(value: Any, placement: Placement) -> Value:
    """A constant at a placement: `T -> T@P`, the same at all members.

    Args:
      value: a pytree of numbers or arrays.
      placement: `CLIENTS` or `SERVER`.

    Raises:
      FederatedTypeError: if `value` is placed already.
    """
    builder = current_builder("federated_value")
    if any(isinstance(leaf, Value) for leaf in jax.tree.leaves(value)):
        raise FederatedTypeError(f"federated_value: expected an unplaced constant, got {value!r}.")
    member = types.infer_type(value)
    t = FederatedType(member, placement, all_equal=True)
    constant = to_member(value, member, "federated_value")
    return builder.add(Constant(type=t, value=constant, location=location()))


def federated_zip(values: Any) -> Value:
    """Makes one placed struct of values at one placement: `<{T}@P,{U}@P> -> {<T,U>}@P`."""
    return zip_values(values, "federated_zip")


def federated_map(function: Any, arg: Any, *more: Any) -> Value:
    """Applies a local computation to each member: `<(T -> U),{T}@P> -> {U}@P`.

    Args:
      function: a `jax_computation` or any JAX function; traced once for the types it meets.
      arg: a placed value, or a struct of values at one placement. A tuple or list of values is
        spread over the parameters of a function that has as many.
      *more: further arguments, for functions of several.

    Returns:
      The results, where the arguments are: `{U}@CLIENTS` or `U@SERVER`.

    Raises:
      FederatedTypeError: naming the function and the argument whose type does not fit.
    """
    builder = current_builder("federated_map")
    args = _spread(function, arg) if not more else (arg, *more)
    what = f"federated_map of `{name_of(getattr(function, 'function', function))}`"
    values = tuple(zip_values(value, what) for value in args)
    placement = _common_placement(values, what)
    members = tuple(_federated(value, what).member for value in values)
    inputs = tuple(position_of(value, builder, what) for value in values)

    def make() -> Map:
        local = trace_local(function, members, what)
        t = FederatedType(local.result, placement)
        return Map(type=t, inputs=inputs, local=local, location=location())

    return builder.add_once(("map", function, inputs), make)


def _spread(function: Any, arg: Any) -> tuple[Any, ...]:
    """The positional arguments that a single argument of `federated_map` stands for."""
    count = _num_parameters(function)
    if isinstance(arg, tuple | list) and not hasattr(arg, "_fields") and count == len(arg) > 1:
        return tuple(arg)
    if isinstance(arg, Value) and count is not None and count > 1:
        return tuple(arg)
    return (arg,)


def _num_parameters(function: Any) -> int | None:
    if isinstance(function, JaxComputation):
        return len(function.parameters)
    if isinstance(getattr(function, "nin", None), int):  # jnp.add and its kin
        return function.nin
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    required = [
        p
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(required)


def _federated(value: Value, what: str) -> FederatedType:
    if not isinstance(value.type_signature, FederatedType):
        raise PlacementError(
            f"{what}: expected a placed value, got one of type {value.type_signature}."
        )
    return value.type_signature


def _common_placement(values: tuple[Value, ...], what: str) -> Placement:
    placements = {_federated(value, what).placement for value in values}
    if len(placements) > 1:
        raise PlacementError(
            f"{what}: expected all arguments at one placement, got "
            f"{[str(value.type_signature) for value in values]}; broadcast the server's first."
        )
    return placements.pop()


def _placed(value: Any, placement: Placement, what: str) -> Value:
    value = zip_values(value, what)
    t = _federated(value, what)
    if t.placement is not placement:
        remedy = "aggregate it first" if placement is SERVER else "broadcast it first"
        raise PlacementError(f"{what}: expected a value at {placement}, got {t}; {remedy}.")
    return value


def federated_broadcast(value: Any, *, name: str = "value") -> Value:
    """Sends the server's value to all clients: `T@SERVER -> T@CLIENTS`.

    Args:
      value: at the server.
      name: of the edge, for the analysis and the ledger of bits.

    Raises:
      PlacementError: if the value is not at the server.
    """
    value = _placed(value, SERVER, "federated_broadcast")
    builder = current_builder("federated_broadcast")
    member = _federated(value, name).member
    type_bits(member)  # refuses what has no size
    t = FederatedType(member, CLIENTS, all_equal=True)
    inputs = (position_of(value, builder, "federated_broadcast"),)
    return builder.add_once(
        ("broadcast", inputs),  # what the clients have, they need not be sent again
        lambda: Broadcast(type=t, inputs=inputs, label=name, location=location()),
    )


def broadcast_message(
    message: Value,
    *,
    codec: str,
    receive: Callable[..., Any],
    bits: Callable[[Any], BitCount],
    context: tuple[Value, ...] = (),
    name: str = "value",
) -> Value:
    """Sends an encoded message to all clients, each of which decodes it.

    Args:
      message: at the server, already encoded.
      codec: the codec's name.
      receive: `(*context, message) -> value`, run at each client.
      bits: `(message) -> BitCount`.
      context: values at the clients that decoding needs and that they hold already.
      name: of the edge.
    """
    what = "broadcast_message"
    builder = current_builder(what)
    message = _placed(message, SERVER, what)
    context = tuple(_placed(value, CLIENTS, what) for value in context)
    edge = _edge_codec(codec, lambda *args: (receive(*args), ()), bits, context, message)
    member = _first_field(edge.receive.result)
    t = FederatedType(
        member, CLIENTS, all_equal=all(_federated(c, what).all_equal for c in context)
    )
    inputs = tuple(position_of(value, builder, what) for value in (message, *context))
    return builder.add(
        Broadcast(type=t, inputs=inputs, label=name, codec=edge, location=location())
    )


def _first_field(t: Type) -> Type:
    return next(iter(t.children()))


def _edge_codec(
    name: str,
    receive: Callable[..., Any],
    bits: Callable[[Any], BitCount],
    context: tuple[Value, ...],
    message: Value,
) -> Codec:
    members = tuple(_federated(value, name).member for value in (*context, message))
    return Codec(
        name=name,
        receive=trace_local(receive, members, f"the decoder of {name}"),
        bits=trace_local(bits, members[-1:], f"the bit count of {name}"),
    )


def federated_sum(value: Any, *, present: Value | None = None, name: str = "value") -> Value:
    """Sums the clients' values: `{T}@CLIENTS -> T@SERVER`; zero if there are none.

    Small dtypes are accumulated in 32 bits, and the result has the value's dtype again.

    Args:
      value: numbers or structs of them, at the clients.
      present: bool at the clients; one that is False sends nothing and counts for nothing.
      name: of the edge.

    Raises:
      PlacementError: if the value is not at the clients.
      FederatedTypeError: if it cannot be summed (booleans, keys, sequences).
    """
    value = _placed(value, CLIENTS, "federated_sum")
    member = _federated(value, name).member
    if not types.is_sum_compatible(member):
        raise FederatedTypeError(
            f"federated_sum: expected numbers of fixed shape, got {value.type_signature}; convert "
            "them, for example with astype, in federated_map."
        )
    builder = current_builder("federated_sum")
    inputs = (value, *_presence(present, "federated_sum"))
    return builder.add(
        Sum(
            type=FederatedType(member, SERVER),
            inputs=tuple(position_of(v, builder, "federated_sum") for v in inputs),
            label=name,
            has_presence=present is not None,
            location=location(),
        )
    )


def _presence(present: Value | None, what: str) -> tuple[Value, ...]:
    if present is None:
        return ()
    present = _placed(present, CLIENTS, what)
    if _federated(present, what).member != TensorType(np.bool_):
        raise FederatedTypeError(
            f"{what}: expected `present` of type {{bool}}@CLIENTS, got {present.type_signature}."
        )
    return (present,)


def sum_messages(
    message: Value,
    *,
    codec: str,
    receive: Callable[..., Any],
    bits: Callable[[Any], BitCount],
    context: tuple[Value, ...] = (),
    present: Value | None = None,
    name: str = "value",
) -> Value:
    """Sums what the server decodes from the clients' encoded messages.

    Args:
      message: at the clients, already encoded.
      codec: the codec's name.
      receive: `(*context, message) -> (value, stats)`, run by the server on each message.
      bits: `(message) -> BitCount`.
      context: values at the clients that the server knows too (hints, keys derived from ids).
      present: bool at the clients; one that is False sends nothing.
      name: of the edge.

    Returns:
      `Received(total, count, bits, stats)` at the server.
    """
    what = "sum_messages"
    builder = current_builder(what)
    message = _placed(message, CLIENTS, what)
    context = tuple(_placed(value, CLIENTS, what) for value in context)
    edge = _edge_codec(codec, receive, bits, context, message)
    value_type, stats_type = edge.receive.result.children()
    if not types.is_sum_compatible(value_type):
        raise FederatedTypeError(
            f"{what}: expected messages that decode to numbers, got {value_type}."
        )
    word: Any = TensorType(np.uint32)
    received = types.to_type(Received(value_type, np.int32, BitCount(word, word), stats_type))
    inputs = (message, *context, *_presence(present, what))
    return builder.add(
        Sum(
            type=FederatedType(received, SERVER),
            inputs=tuple(position_of(value, builder, what) for value in inputs),
            label=name,
            codec=edge,
            has_presence=present is not None,
            location=location(),
        )
    )


def federated_count(present: Value | None = None) -> Value:
    """The number of clients, or of those present: `{bool}@CLIENTS -> int32@SERVER`, at no cost."""
    builder = current_builder("federated_count")
    inputs = tuple(
        position_of(v, builder, "federated_count") for v in _presence(present, "federated_count")
    )
    t = FederatedType(TensorType(np.int32), SERVER)
    return builder.add_once(
        ("count", inputs), lambda: Count(type=t, inputs=inputs, location=location())
    )


def federated_mean(
    value: Any,
    weight: Any = None,
    *,
    present: Value | None = None,
    name: str = "value",
) -> Value:
    """The mean of the clients' values: `<{T}@CLIENTS,{W}@CLIENTS> -> T@SERVER`, weights optional.

    The mean over no clients, or with a total weight of zero, is zero. A client of weight zero
    counts for nothing even where its value is not finite.

    Args:
      value: floating-point numbers or structs of them, at the clients.
      weight: one scalar a client, for the whole struct; 1 for each if not given.
      present: bool at the clients; one that is False sends nothing and counts for nothing.
      name: of the edge that carries the value; the weights travel on one called `weight`.

    Raises:
      FederatedTypeError: for values that are no floating-point numbers, or a weight that is no
        scalar.
    """
    value = _placed(value, CLIENTS, "federated_mean")
    member = _federated(value, name).member
    if not types.is_average_compatible(member):
        raise FederatedTypeError(
            f"federated_mean: expected floating-point numbers, got {value.type_signature}; convert "
            "them in federated_map."
        )
    if weight is None:
        total = federated_sum(value, present=present, name=name)
        return federated_map(divide, total, federated_count(present))
    weight = _scalar_weight(weight)
    weighted = federated_map(multiply, value, weight)
    total = federated_sum(weighted, present=present, name=name)
    return federated_map(divide, total, federated_sum(weight, present=present, name="weight"))


def _scalar_weight(weight: Any) -> Value:
    weight = _placed(weight, CLIENTS, "federated_mean")
    member = _federated(weight, "federated_mean").member
    if (
        not isinstance(member, TensorType)
        or member.shape != ()
        or not types.is_sum_compatible(member)
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
    """`total / weight`, rounded once to each leaf's dtype; zero where the weight is."""
    safe = jnp.where(weight == 0, jnp.ones_like(weight), weight)

    def ratio(x: jax.Array) -> jax.Array:
        quotient = (x / safe.astype(_at_least_float32(x))).astype(x.dtype)
        return jnp.where(weight == 0, jnp.zeros_like(x), quotient)

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
    value = _placed(value, CLIENTS, what)
    member = _federated(value, what).member
    type_bits(member)  # refuses what has no size
    start = federated_value(zero, SERVER)
    state = _federated(start, what).member
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
