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

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.errors import CodecError, FederatedTypeError
from fedjax_core.language import inference
from fedjax_core.language.gathering import federated_aggregate as federated_aggregate
from fedjax_core.language.gathering import federated_collect as federated_collect
from fedjax_core.language.gathering import federated_max as federated_max
from fedjax_core.language.gathering import federated_min as federated_min
from fedjax_core.language.gathering import federated_select as federated_select
from fedjax_core.language.locations import location
from fedjax_core.language.mapping import check_members, federated_type_of, placed, presence
from fedjax_core.language.mapping import federated_eval as federated_eval
from fedjax_core.language.mapping import federated_map as federated_map
from fedjax_core.language.mapping import federated_value as federated_value
from fedjax_core.language.mapping import federated_zip as federated_zip
from fedjax_core.language.messages import EdgeCodec, broadcast_encoded, sum_encoded
from fedjax_core.language.placements import CLIENTS, SERVER
from fedjax_core.language.program import (
    Broadcast,
    Count,
    Sum,
    type_bits,
)
from fedjax_core.language.tracing import Value, current_builder, operator, position_of
from fedjax_core.language.types import FederatedType, StructType, TensorType, Type


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
            f"federated_broadcast: expected one value at the server, got {t}, which may differ "
            "from one part of the server to another; declare it as all-equal."
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
    check_members(inference.why_not_summable(member), value, "federated_sum", "numbers")
    return _sum(value, present, name, member)


def _sum(value: Value, present: Value | None, name: str, result: Type) -> Value:
    """A sum of raw values, as a value of type `result` at the server."""
    builder = current_builder("federated_sum")
    inputs = (value, *presence(present, "federated_sum"))
    return builder.add(
        Sum(
            type=FederatedType(result, SERVER),
            inputs=tuple(position_of(v, builder, "federated_sum") for v in inputs),
            label=name,
            has_presence=present is not None,
            location=location(),
        )
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
    counts for nothing even where its value is not finite. Sums are float32 at least, and so are
    the products of values and weights that clients send.

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
    check_members(reason, value, "federated_mean", "floating-point numbers")
    finish = _divider(member)
    if weight is None:
        if codec is None:
            total = _sum(value, present, name, _wide(member))
        else:
            total = federated_sum(value, codec=codec, present=present, name=name)
        return federated_map(finish, total, federated_count(present))
    weight = _scalar_weight(weight)
    weighted = federated_map(_multiply_wide if _wide(member) != member else multiply, value, weight)
    total = federated_sum(weighted, codec=codec, present=present, name=name)
    return federated_map(finish, total, federated_sum(weight, present=present, name="weight"))


def _wide(t: Type) -> Type:
    """`t` with its small floats as float32."""
    if isinstance(t, StructType):
        return StructType([(name, _wide(child)) for name, child in t.elements], t.container)
    assert isinstance(t, TensorType)
    is_small = jnp.issubdtype(t.dtype, jnp.floating) and jnp.finfo(t.dtype).bits < 32
    return TensorType(np.float32, t.shape) if is_small else t


def _divider(member: Type) -> Callable[..., Any]:
    """`divide`, with a result of type `member` again."""
    if _wide(member) == member:
        return divide
    template = inference.template(member)

    def divide_wide(total: Any, weight: jax.Array) -> Any:
        quotient = divide(total, weight)
        return jax.tree.map(lambda x, s: x.astype(s.dtype), quotient, template)

    return divide_wide


def _multiply_wide(value: Any, weight: jax.Array) -> Any:
    return multiply(jax.tree.map(_as_float32, value), weight)


def _as_float32(x: jax.Array) -> jax.Array:
    """A small float as float32: products and sums of float16 end at 65,504."""
    is_small = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32
    return x.astype(jnp.float32) if is_small else x


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
    # The sum of the weights has their dtype, and a small one, or one of integers, would end early.
    is_wide = jnp.issubdtype(member.dtype, jnp.floating) and jnp.finfo(member.dtype).bits >= 32
    return weight if is_wide else federated_map(_widen, weight)


def _widen(weight: jax.Array) -> jax.Array:
    return weight.astype(jnp.float32)


def multiply(value: Any, weight: jax.Array) -> Any:
    """`weight * value`, rounded once to each leaf's dtype; zero where the weight is.

    Only what is not finite is masked: the derivative by a weight of zero is the value.
    """

    def scale(x: jax.Array) -> jax.Array:
        x = jnp.where((weight != 0) | jnp.isfinite(x), x, jnp.zeros_like(x))
        return (x * weight.astype(_at_least_float32(x))).astype(x.dtype)

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
