"""Codecs on edges: what is encoded, sent, decoded and finished, written with the operators.

uplink    = broadcast of hints + map of encode + sum of decoded messages + map of finish
  secure:   broadcast of hints + map of encode + secure sum of messages + map of decode and finish
downlink  = map of encode at the server + broadcast of the message, decoded by each client
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from fedjax_core.bits import BitCount
from fedjax_core.compression import wire
from fedjax_core.compression.base import Codec, Keys, Message, Report
from fedjax_core.compression.contract import checked
from fedjax_core.errors import CodecError
from fedjax_core.language import inference, types
from fedjax_core.language.messages import Received, broadcast_message, sum_messages
from fedjax_core.language.operators import (
    federated_broadcast,
    federated_count,
    federated_map,
    federated_value,
)
from fedjax_core.language.placements import CLIENTS
from fedjax_core.language.secure import federated_secure_sum
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
    secure: bool = False,
    name: str = "update",
) -> tuple[Value, Value, Value]:
    """Sums the clients' values through a codec: `{T}@CLIENTS -> T@SERVER`.

    Args:
      codec: encodes at each client; the server decodes, or finishes the sum.
      keys: of this round.
      server: the codec's state, at the server.
      memory: what each sender remembers, at the clients.
      value: at the clients.
      present: bool at the clients; one that is False sends no bits and keeps its memory. In a
        secure sum it sends zeros, which nobody can tell from other messages.
      secure: whether messages go through `federated_secure_sum`, so that the server sees nothing
        but their sum, which it decodes once.
      name: of the edge.

    Returns:
      `(server, memory, total)`.

    Raises:
      CodecError: the codec breaks its contract, or its messages do not add and the sum is secure.
    """
    codec = checked(codec)
    if secure:
        check_adds(codec)
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
    if secure:
        server, total = _secure_total(codec, keys.server, server, message, present, name)
        _check_decoded(codec, value, total)
        return server, _kept(present, new_memory, memory), total
    received = sum_messages(
        message,
        codec=codec.name,
        receive=receive,
        bits=codec.bits,
        context=(member_keys, hints),
        present=present,
        transport=codec.transport,
        name=name,
    )
    server, total = federated_map(finish, keys.server, server, received)
    _check_decoded(codec, value, total)
    return server, _kept(present, new_memory, memory), total


def check_adds(codec: Codec) -> None:
    """Raises unless the messages of a codec may be summed before anyone decodes them.

    Raises:
      CodecError: it lacks a trait that a secure sum needs.
    """
    traits = codec.traits
    reasons = {
        "its messages carry what belongs to one sender (a scale, positions, a code of its own "
        "length), so their sum means nothing": not traits.summable,
        "the server has to decode each message by itself": not traits.linear,
        "the server needs each sender's own key": traits.needs_seed,
    }
    for reason, applies in reasons.items():
        if applies:
            raise CodecError(
                f"expected a codec whose messages add under a secure sum, got {codec.name}: "
                f"{reason}; use fixed_point(8), alone or behind hadamard_rotation(min_size=0) or "
                "rand_k(..., min_size=0), without an entropy code, or sum in clear."
            )


def _secure_total(
    codec: Codec, key: Value, server: Value, message: Value, present: Value | None, name: str
) -> tuple[Value, Value]:
    """What the server makes of the secure sum of all messages, and the codec's state."""
    template = inference.template(cast(types.FederatedType, message.type_signature).member)
    bounds = [_bounds(codec, leaf) for leaf in wire.leaves((template.payload, template.stats))]
    everyone = federated_value(True, CLIENTS) if present is None else present

    def sent(message: Message, present: jax.Array) -> tuple[Any, Any]:
        parts = (message.payload, message.stats)
        return jax.tree.map(lambda x: jnp.where(present, x, jnp.zeros_like(x)), parts)

    sums = federated_secure_sum(
        federated_map(sent, message, everyone),
        [highest for _, highest in bounds],
        min_input=[lowest for lowest, _ in bounds],
        name=name,
    )
    count = federated_count() if present is None else federated_count(present)

    def finish(key: jax.Array, server: Any, sums: tuple[Any, Any], count: jax.Array) -> Any:
        payload, stats = sums
        report = Report(count, BitCount.zero(), stats)
        total = codec.decode(Keys(key, key), codec.hints(server), Message(payload, (), stats))
        return codec.finish(key, server, total, report)

    return federated_map(finish, key, server, sums, count)


def _bounds(codec: Codec, leaf: Any) -> tuple[int, int]:
    """The ends of the symbols of a tensor."""
    if not isinstance(leaf, wire.Symbols):
        raise CodecError(
            f"expected nothing but symbols in a message under a secure sum, got {leaf.dtype} of "
            f"shape {leaf.shape} from {codec.name}; quantise all tensors, with min_size=0, and "
            "send no integers through it."
        )
    highest = (1 << (leaf.width - leaf.is_signed)) - 1
    return (-highest if leaf.is_signed else 0), highest


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

    message = federated_map(lambda key, value: encoded(codec, key, value), keys.server, value)
    decoded = broadcast_message(
        message,
        codec=codec.name,
        receive=lambda key, message: received(codec, key, message),
        bits=codec.bits,
        context=(keys.shared,),
        transport=codec.transport,
        name=name,
    )
    _check_decoded(codec, value, decoded)
    return decoded


def encoded(codec: Codec, key: jax.Array, value: Any) -> Message:
    """The message of the only sender.

    Raises:
      CodecError: the codec keeps state at the receiver, or memory at the sender.
    """
    state = codec.init(jax.tree.map(_spec, value))
    if jax.tree.leaves(state):
        raise CodecError(
            f"expected a codec without state or memory on the way down, got {codec.name}; use it "
            "on the way up, as in mean(codec=...)."
        )
    server, memory = state
    return codec.encode(Keys(key, key), memory, codec.hints(server), value)[1]


def received(codec: Codec, key: jax.Array, message: Message) -> Any:
    """What a receiver makes of the message of the only sender."""
    summand = codec.decode(Keys(key, key), (), message)
    report = Report(jnp.int32(1), codec.bits(message), message.stats)
    return codec.finish(key, (), summand, report)[1]


def _check_decoded(codec: Codec, value: Value, decoded: Value) -> None:
    """Raises unless what comes out of a codec has the type of what went in."""
    expected, got = (cast(types.FederatedType, x.type_signature).member for x in (value, decoded))
    what = f"codec {codec.name}, whose decode and finish have to give back what encode was given"
    inference.check_same(expected, got, what)


def _spec(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
