"""Encoded messages on edges: what travels, who decodes it, and its bits.

    sum_messages       {message}@CLIENTS -> Received@SERVER
    broadcast_message  message@SERVER -> T@CLIENTS

`sum_encoded` and `broadcast_encoded` put a whole codec on an edge, if it needs neither keys nor
memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

from fedjax_core.bits import BitCount
from fedjax_core.errors import CodecError, FederatedTypeError
from fedjax_core.language import inference, types
from fedjax_core.language.local import trace_local
from fedjax_core.language.locations import location
from fedjax_core.language.mapping import federated_map, federated_type_of, placed, presence
from fedjax_core.language.placements import CLIENTS, SERVER
from fedjax_core.language.program import Broadcast, Codec, Sum
from fedjax_core.language.tracing import Value, current_builder, position_of
from fedjax_core.language.types import FederatedType, TensorType, Type

# From a message of `jax.ShapeDtypeStruct`: a function `(message, bits) -> message` of the host,
# through the bytes of a frame, where `bits` is the size that the device counted; and what a frame
# adds to it, in bits.
Transport = Callable[[Any], tuple[Callable[[Any, int], Any], int]]


class Received(NamedTuple):
    """What a sum of encoded messages gives at the server."""

    total: Any
    count: Any
    bits: Any
    stats: Any


def broadcast_message(
    message: Value,
    *,
    codec: str,
    receive: Callable[..., Any],
    bits: Callable[[Any], BitCount],
    context: tuple[Value, ...] = (),
    transport: Transport | None = None,
    name: str = "value",
) -> Value:
    """Sends an encoded message to all clients, each of which decodes it.

    Args:
      message: at the server, already encoded.
      codec: the codec's name.
      receive: `(*context, message) -> value`, run at each client.
      bits: `(message) -> BitCount`.
      context: values at the clients that decoding needs and that they hold already.
      transport: how messages become bytes, for runs that send these.
      name: of the edge.
    """
    what = "broadcast_message"
    builder = current_builder(what)
    message = placed(message, SERVER, what)
    context = tuple(placed(value, CLIENTS, what) for value in context)
    edge = _edge_codec(codec, lambda *args: (receive(*args), ()), bits, context, message, transport)
    member = _first_field(edge.receive.result)
    t = FederatedType(
        member, CLIENTS, all_equal=all(federated_type_of(c, what).all_equal for c in context)
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
    transport: Transport | None,
) -> Codec:
    members = tuple(federated_type_of(value, name).member for value in (*context, message))
    like = inference.template(members[-1])
    travel, frame_bits = transport(like) if transport is not None else (None, 0)
    return Codec(
        name=name,
        receive=trace_local(receive, members, f"the decoder of {name}"),
        bits=trace_local(bits, members[-1:], f"the bit count of {name}"),
        travel=travel,
        frame_bits=frame_bits,
    )


def sum_messages(
    message: Value,
    *,
    codec: str,
    receive: Callable[..., Any],
    bits: Callable[[Any], BitCount],
    context: tuple[Value, ...] = (),
    present: Value | None = None,
    transport: Transport | None = None,
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
      transport: how messages become bytes, for runs that send these.
      name: of the edge.

    Returns:
      `Received(total, count, bits, stats)` at the server.
    """
    what = "sum_messages"
    builder = current_builder(what)
    message = placed(message, CLIENTS, what)
    context = tuple(placed(value, CLIENTS, what) for value in context)
    edge = _edge_codec(codec, receive, bits, context, message, transport)
    value_type, stats_type = edge.receive.result.children()
    if not inference.is_sum_compatible(value_type):
        raise FederatedTypeError(
            f"{what}: expected messages that decode to numbers, got {value_type}."
        )
    word: Any = TensorType(np.uint32)
    received = types.to_type(Received(value_type, np.int32, BitCount(word, word), stats_type))
    inputs = (message, *context, *presence(present, what))
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


class EdgeCodec(Protocol):
    """What the language asks of a codec; every `fedjax_core.compression.Codec` is one."""

    @property
    def name(self) -> str:
        """For printing."""
        ...

    @property
    def init(self) -> Callable[[Any], tuple[Any, Any]]:
        """`(template) -> (server, memory)`."""
        ...

    @property
    def hints(self) -> Callable[[Any], Any]:
        """`(server) -> hints`."""
        ...

    @property
    def encode(self) -> Callable[..., tuple[Any, Any]]:
        """`(keys, memory, hints, value) -> (memory, message)`."""
        ...

    @property
    def decode(self) -> Callable[..., Any]:
        """`(keys, hints, message) -> summand`."""
        ...

    @property
    def finish(self) -> Callable[..., tuple[Any, Any]]:
        """`(shared_key, server, total, report) -> (server, value)`."""
        ...

    @property
    def bits(self) -> Callable[[Any], BitCount]:
        """`(message) -> BitCount`."""
        ...

    def transport(self, like: Any) -> tuple[Callable[[Any, int], Any], int]:
        """See `Transport`."""
        ...


class _Keys(NamedTuple):
    """Keys that nothing may depend on."""

    shared: jax.Array
    client: jax.Array


def sum_encoded(codec: EdgeCodec, value: Value, present: Value | None, name: str) -> Value:
    """Sums the clients' values through a codec without keys, state or memory.

    Raises:
      CodecError: if the codec has one of these.
    """
    value = placed(value, CLIENTS, "federated_sum")
    _check_stateless(codec, federated_type_of(value, "federated_sum").member, "compression.uplink")
    received = sum_messages(
        federated_map(_encoder(codec), value),
        codec=codec.name,
        receive=lambda message: (codec.decode(_no_keys(), codec.hints(()), message), message.stats),
        bits=codec.bits,
        present=present,
        transport=codec.transport,
        name=name,
    )

    def finish(received: Received) -> Any:
        return codec.finish(_no_keys().shared, (), received.total, received)[1]

    return federated_map(finish, received)


def broadcast_encoded(codec: EdgeCodec, value: Value, name: str) -> Value:
    """Broadcasts the server's value through a codec without keys, state or memory.

    Raises:
      CodecError: if the codec has one of these.
    """
    what = "federated_broadcast"
    value = placed(value, SERVER, what)
    _check_stateless(codec, federated_type_of(value, what).member, "compression.downlink")

    def receive(message: Any) -> Any:
        summand = codec.decode(_no_keys(), codec.hints(()), message)
        report = Received(summand, jnp.int32(1), codec.bits(message), message.stats)
        return codec.finish(_no_keys().shared, (), summand, report)[1]

    message = federated_map(_encoder(codec), value)
    return broadcast_message(
        message,
        codec=codec.name,
        receive=receive,
        bits=codec.bits,
        transport=codec.transport,
        name=name,
    )


def _no_keys() -> _Keys:
    return _Keys(jax.random.key(0), jax.random.key(0))


def _encoder(codec: EdgeCodec) -> Callable[[Any], Any]:
    def encode(value: Any) -> Any:
        return codec.encode(_no_keys(), (), codec.hints(()), value)[1]

    return encode


def _check_stateless(codec: EdgeCodec, member: Type, remedy: str) -> None:
    template = inference.template(member)
    if jax.tree.leaves(codec.init(template)):
        raise CodecError(
            "expected a codec without state and memory on an operator's edge, got "
            f"{codec.name}; use {remedy}, which threads them."
        )
    if _draws(codec, template):
        raise CodecError(
            "expected a codec that draws no random numbers on an operator's edge, got "
            f"{codec.name}; use {remedy}, which passes it keys, or a deterministic codec."
        )


def _draws(codec: EdgeCodec, template: Any) -> bool:
    """Whether the messages of a codec depend on its keys."""

    def encode(keys: _Keys, value: Any) -> Any:
        return codec.encode(keys, (), codec.hints(()), value)[1]

    keys = jax.eval_shape(_no_keys)
    jaxpr = jax.make_jaxpr(encode)(keys, template).jaxpr
    needed = {atom for atom in jaxpr.outvars if not isinstance(atom, jex_core.Literal)}
    for eqn in reversed(jaxpr.eqns):
        if needed & set(eqn.outvars):
            needed |= {atom for atom in eqn.invars if not isinstance(atom, jex_core.Literal)}
    return bool(needed & set(jaxpr.invars[: len(keys)]))
