"""Codecs on edges: what is encoded, sent, decoded and finished, written with the operators.

uplink    = broadcast of hints + map of encode + sum of decoded messages + map of finish
downlink  = map of encode at the server + broadcast of the message, decoded by each client
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from fedjax_core.compression.base import Codec, Keys, Message, Report
from fedjax_core.compression.contract import checked
from fedjax_core.errors import CodecError
from fedjax_core.language import inference, types
from fedjax_core.language.messages import Received, broadcast_message, sum_messages
from fedjax_core.language.operators import (
    federated_broadcast,
    federated_map,
    federated_value,
)
from fedjax_core.language.placements import CLIENTS
from fedjax_core.language.tracing import Value


class PlacedKeys:
    """The randomness of a round, where it is needed."""

    def __init__(self, server: Value, shared: Value, client: Value) -> None:
        given = {"server": server, "shared": shared, "client": client}
        self._make: Callable[[str], Value] = given.__getitem__

    @functools.cached_property
    def server(self) -> Value:
        """The round's key at the server, `key@SERVER`."""
        return self._make("server")

    @functools.cached_property
    def shared(self) -> Value:
        """The same key at the clients, `key@CLIENTS`."""
        return self._make("shared")

    @functools.cached_property
    def client(self) -> Value:
        """Each client's own key, `{key}@CLIENTS`."""
        return self._make("client")

    def fold_in(self, tag: int) -> "PlacedKeys":
        """The keys of one part of the round, told from the other parts by `tag`.

        Only the keys that the part asks for become operations of the program.
        """

        def fold(key: jax.Array) -> jax.Array:
            return jax.random.fold_in(key, tag)

        folded = PlacedKeys.__new__(PlacedKeys)
        folded._make = lambda kind: federated_map(fold, getattr(self, kind))
        return folded


def uplink(
    codec: Codec,
    keys: PlacedKeys,
    server: Value,
    memory: Value,
    value: Value,
    *,
    present: Value | None = None,
    name: str = "update",
) -> tuple[Value, Value, Value]:
    """Sums the clients' values through a codec: `{T}@CLIENTS -> T@SERVER`.

    Args:
      codec: encodes at each client; the server decodes, or finishes the sum.
      keys: of this round.
      server: the codec's state, at the server.
      memory: what each sender remembers, at the clients.
      value: at the clients.
      present: bool at the clients; one that is False sends no bits and keeps its memory.
      name: of the edge.

    Returns:
      `(server, memory, total)`.
    """
    codec = checked(codec)
    hints = _hints(codec, server)
    member_keys = federated_map(Keys, (keys.shared, keys.client))

    def encode(keys: Keys, memory: Any, hints: Any, value: Any) -> tuple[Any, Message]:
        return codec.encode(keys, memory, hints, value)

    def receive(keys: Keys, hints: Any, message: Message) -> tuple[Any, Any]:
        return codec.decode(keys, hints, message), message.stats

    def finish(key: jax.Array, server: Any, received: Received) -> tuple[Any, Any]:
        report = Report(received.count, received.bits, received.stats)
        return codec.finish(key, server, received.total, report)

    new_memory, message = federated_map(encode, member_keys, memory, hints, value)
    received = sum_messages(
        message,
        codec=codec.name,
        receive=receive,
        bits=codec.bits,
        context=(member_keys, hints),
        present=present,
        name=name,
    )
    server, total = federated_map(finish, keys.server, server, received)
    _check_decoded(codec, value, total)
    return server, _kept(present, new_memory, memory), total


def _hints(codec: Codec, server: Value) -> Value:
    hints = federated_map(codec.hints, server)
    member = cast(types.FederatedType, hints.type_signature).member
    if inference.is_empty(member):
        return federated_value(inference.template(member), CLIENTS)
    return federated_broadcast(hints, name="hints")


def _kept(present: Value | None, new: Value, old: Value) -> Value:
    """The memory of those who sent, and the old one of those who did not."""
    if present is None or inference.is_empty(old.type_signature):
        return new

    def keep(present: jax.Array, new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(present, a, b), new, old)

    return federated_map(keep, present, new, old)


def downlink(codec: Codec, keys: PlacedKeys, value: Value, *, name: str = "params") -> Value:
    """Broadcasts the server's value through a codec without state: `T@SERVER -> T@CLIENTS`.

    Args:
      codec: encodes at the server, whose own key for this is derived from the round's; each client
        decodes the same message.
      keys: of this round.
      value: at the server.
      name: of the edge.

    Returns:
      What the clients decode.

    Raises:
      CodecError: if the codec keeps state at the receiver, or memory at the sender.
    """
    codec = checked(codec)

    def encode(key: jax.Array, value: Any) -> Message:
        state = codec.init(jax.tree.map(_spec, value))
        if jax.tree.leaves(state):
            raise CodecError(
                f"expected a codec without state or memory on the way down, got {codec.name}; use "
                "it on the way up, as in mean(codec=...)."
            )
        server, memory = state
        return codec.encode(Keys(key, key), memory, codec.hints(server), value)[1]

    def receive(key: jax.Array, message: Message) -> Any:
        summand = codec.decode(Keys(key, key), (), message)
        report = Report(jnp.int32(1), codec.bits(message), message.stats)
        return codec.finish(key, (), summand, report)[1]

    message = federated_map(encode, keys.server, value)
    decoded = broadcast_message(
        message,
        codec=codec.name,
        receive=receive,
        bits=codec.bits,
        context=(keys.shared,),
        name=name,
    )
    _check_decoded(codec, value, decoded)
    return decoded


def _check_decoded(codec: Codec, value: Value, decoded: Value) -> None:
    """Raises unless what comes out of a codec has the type of what went in."""
    expected, got = (cast(types.FederatedType, x.type_signature).member for x in (value, decoded))
    what = f"codec {codec.name}, whose decode and finish have to give back what encode was given"
    inference.check_same(expected, got, what)


def _spec(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
