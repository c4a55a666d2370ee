"""The server's value on its way down, as its difference to what clients can make or hold already.

    plain      send C(w)
    anchored   send C(w - w_0),   w_0 = initialize(seed), which a client makes from 64 bits
    replica    send C(w - v),     v <- v + what was received: the clients hold v

An anchor needs nothing of a client, so it serves clients that appear once; the difference grows
with training. The difference to a replica is that of one round, but a client that missed rounds
has to catch up first: it is sent what it missed, or all of v, whichever is shorter. Neither adds
up errors, for it is w itself that is compared with what the clients have.

References:
  Tang, Lian, Yu, Zhang, Liu. DoubleSqueeze: parallel stochastic gradient descent with double-pass
  error-compensated compression. ICML 2019, arXiv:1905.05957.

  Philippenko, Dieuleveut. Preserved central model for faster bidirectional compression in
  distributed settings. NeurIPS 2021, arXiv:2102.12528 (differences to what clients hold).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp

from fedjax_core.bits import BitCount
from fedjax_core.compression import wire
from fedjax_core.compression.base import Codec, Message, check_codec
from fedjax_core.compression.checks import told
from fedjax_core.compression.contract import checked
from fedjax_core.compression.edges import PlacedKeys, downlink, encoded, received
from fedjax_core.errors import CodecError
from fedjax_core.language import inference
from fedjax_core.language.messages import broadcast_message, sum_messages
from fedjax_core.language.operators import federated_broadcast, federated_map
from fedjax_core.language.tracing import Value
from fedjax_core.language.types import FederatedType
from fedjax_core.rounding import pinned

# From a seed to the first value, the same on every machine.
Initialize = Callable[[jax.Array], Any]

_SEED_BITS = 64
_NUM_LIMBS, _LIMB_BITS = 4, 16


class Sent(NamedTuple):
    """What a downlink did.

    Attributes:
      server: its state at the server.
      memory: what each client remembers, at the clients.
      value: what the clients have now.
      catch_up: bits at the server, a `BitCount` of what clients that missed rounds were sent
        beside the messages; None where nobody has to catch up.
    """

    server: Value
    memory: Value
    value: Value
    catch_up: Value | None = None


class SendFn(Protocol):
    """The placed part of a downlink."""

    def __call__(
        self, keys: PlacedKeys, initialize: Initialize, server: Value, memory: Value, value: Value
    ) -> Sent:
        """Sends the server's value.

        Args:
          keys: of this round.
          initialize: what `Downlink.init` was told.
          server: the downlink's state, at the server.
          memory: what each client remembers, at the clients.
          value: at the server.
        """
        ...


class Downlink(NamedTuple):
    """How the server's value gets to the clients.

    Attributes:
      name: how it was made.
      init: `(initialize, seed) -> (server, memory)`, where `initialize` is a function from a seed,
        a key, to the first value, which every client can evaluate.
      send: see `SendFn`.
    """

    name: str
    init: Callable[[Initialize, jax.Array], tuple[Any, Any]]
    send: SendFn


def plain(codec: Codec) -> Downlink:
    """Sends the value itself through a codec.

    Args:
      codec: without state or memory.

    Returns:
      The downlink.

    Raises:
      CodecError: `codec` is none, or breaks its contract.
    """
    check_codec(codec, "on the way down")

    def send(
        keys: PlacedKeys, initialize: Initialize, server: Value, memory: Value, value: Value
    ) -> Sent:
        del initialize
        return Sent(server, memory, downlink(codec, keys, value))

    return Downlink(codec.name, lambda initialize, seed: ((), ()), send)


def anchored(codec: Codec) -> Downlink:
    """Sends the difference to the first value, which a client makes from a seed.

    Clients remember nothing, and each round a client is sent 64 bits of seed beside the message.
    Floating leaves are sent as differences, others as they are.

    Args:
      codec: of the difference; without state or memory. For `flagship`, use
        ``candidates="direct"``: what a model has learned over many rounds is not of low rank.

    Returns:
      What `fed_avg` takes as its `broadcast_codec`.

    Raises:
      CodecError: `codec` is none, or breaks its contract; who takes the result raises it for a
        codec that keeps state or memory.

    Example:
      >>> from fedjax_core.compression import flagship
      >>> anchored(flagship(1.0, candidates="direct")).name
      'anchored(flagship(1, candidates=direct))'
    """
    check_codec(codec, "on the way down")
    codec = checked(codec)

    def send(
        keys: PlacedKeys, initialize: Initialize, server: Value, memory: Value, value: Value
    ) -> Sent:
        def encode(key: jax.Array, seed: jax.Array, value: Any) -> Message:
            return encoded(codec, key, difference(value, initialize(seed)))

        def receive(key: jax.Array, seed: jax.Array, message: Message) -> Any:
            return rebuilt(codec, initialize, key, seed, message)

        seed = federated_broadcast(server, name="anchor")
        message = federated_map(encode, keys.server, server, value)
        name = f"anchored({codec.name})"
        return Sent(server, memory, _broadcast(codec, name, message, receive, (keys.shared, seed)))

    return Downlink(f"anchored({codec.name})", lambda initialize, seed: (seed, ()), send)


def rebuilt(
    codec: Codec, initialize: Initialize, key: jax.Array, seed: jax.Array, message: Message
) -> Any:
    """What a client makes of a message of `anchored`: the value, bit for bit as in the round.

    Args:
      codec: that `anchored` was given.
      initialize: from the seed to the first value.
      key: of the message, which codecs without random numbers ignore.
      seed: a key.
      message: decoded from its bytes or not.
    """
    return moved(initialize(seed), received(codec, key, message))


def replica(codec: Codec) -> Downlink:
    """Sends the difference to what clients hold from the rounds before.

    The clients begin with the first value, made from a seed. The server keeps one copy of what
    those hold that missed nothing, of the size of the value. Each client remembers up to where it
    has followed, 8 bytes, and tells it. One that missed rounds is sent their messages, or the whole
    copy raw, whichever is shorter: a row of its own in the ledger, `catch_up`.

    Args:
      codec: of the difference; without state or memory. Its decoder has to compute the same bits on
        all machines, which products of matrices do not.

    Returns:
      What `fed_avg` takes as its `broadcast_codec`.

    Raises:
      CodecError: `codec` is none, or breaks its contract; who takes the result raises it for a
        codec that keeps state or memory.
    """
    check_codec(codec, "on the way down")
    codec = checked(codec)

    def init(initialize: Initialize, seed: jax.Array) -> tuple[Any, Any]:
        return (initialize(seed), BitCount.zero()), BitCount.zero()

    def send(
        keys: PlacedKeys, initialize: Initialize, server: Value, memory: Value, value: Value
    ) -> Sent:
        del initialize
        held, sent = server
        message = federated_map(
            lambda key, held, value: encoded(codec, key, difference(value, held)),
            keys.server,
            held,
            value,
        )

        def receive(key: jax.Array, held: Any, sent: BitCount, message: Message) -> Any:
            value = moved(held, received(codec, key, message))
            return value, sent + codec.bits(message)

        name = f"replica({codec.name})"
        replicas = broadcast_message(
            held,
            codec="held by clients",
            receive=lambda held: held,
            bits=lambda held: BitCount.zero(),
            name="replica",
        )
        position = federated_broadcast(sent, name="position")
        context = (keys.shared, replicas, position)
        at_clients = _broadcast(codec, name, message, receive, context)
        catch_up = _catch_up(memory, position, _raw_size(value))
        server = federated_map(receive, keys.server, held, sent, message)
        return Sent(server, at_clients[1], at_clients[0], catch_up)

    return Downlink(f"replica({codec.name})", init, send)


def _broadcast(
    codec: Codec,
    name: str,
    message: Value,
    receive: Callable[..., Any],
    context: tuple[Value, ...],
) -> Value:
    return broadcast_message(
        message,
        codec=name,
        receive=receive,
        bits=codec.bits,
        context=context,
        transport=codec.transport,
        name="params",
    )


def difference(value: Any, base: Any) -> Any:
    """What is sent: of floating leaves the difference, others as they are.

    Raises:
      CodecError: the base has another structure, other shapes or dtypes.
    """
    found, expected = (jax.tree.map(_kind, tree) for tree in (value, base))
    if found != expected:
        raise CodecError(
            f"expected a value like the first one, which a seed makes, {told(expected)}, got "
            f"{told(found)}; initialize with the shapes and dtypes of what is trained."
        )
    return jax.tree.map(lambda x, y: x - _usable(y) if _is_floating(x) else x, value, base)


def moved(base: Any, received: Any) -> Any:
    """What undoes `difference`, to the bit the same wherever it is computed."""
    return jax.tree.map(
        lambda x, y: _usable(x) + pinned(y) if _is_floating(x) else y, base, received
    )


def _usable(base: jax.Array) -> jax.Array:
    """What differences are taken to: 0 where a round was not finite, which the next one mends."""
    return pinned(jnp.where(jnp.isfinite(base), base, 0))


def _kind(x: Any) -> tuple[tuple[int, ...], str]:
    return jnp.shape(x), jnp.result_type(x).name


def _is_floating(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _catch_up(followed: Value, position: Value, raw: BitCount) -> Value:
    """What the clients of a round are sent of what they missed, `BitCount@SERVER`.

    Each client tells up to where it has followed.

    Args:
      followed: a `BitCount` at the clients: all messages that they know.
      position: the same at the clients: all messages so far.
      raw: the size of the value.
    """

    def receive(position: BitCount, followed: BitCount) -> tuple[jax.Array, tuple[()]]:
        # The first value is made from a seed.
        is_new = (followed.high | followed.low) == 0
        seed = jax.tree.map(lambda x: jnp.where(is_new, x, 0), BitCount.of(_SEED_BITS))
        missed = _subtract(position, followed) + seed
        both = jax.tree.map(lambda *x: jnp.stack(x), missed, raw)
        return _limbs(both.min()), ()

    told = sum_messages(
        followed,
        codec="position",
        receive=receive,
        bits=lambda followed: BitCount.of(64),
        context=(position,),
        name="position",
    )
    return federated_map(lambda told: _from_limbs(told.total), told)


def _raw_size(value: Value) -> BitCount:
    member = cast(FederatedType, value.type_signature).member
    return wire.count(inference.template(member))


def _subtract(a: BitCount, b: BitCount) -> BitCount:
    """The difference, modulo 2**64."""
    borrow = (a.low < b.low).astype(jnp.uint32)
    return BitCount(a.high - b.high - borrow, a.low - b.low)


def _limbs(count: BitCount) -> jax.Array:
    """A count as four numbers of 16 bits, uint32 ``[4]``, of which 65,537 add up without loss."""
    mask = jnp.uint32((1 << _LIMB_BITS) - 1)
    words = (count.low, count.high)
    return jnp.stack([part for x in words for part in (x & mask, x >> _LIMB_BITS)])


def _from_limbs(limbs: jax.Array) -> BitCount:
    counts = BitCount(jnp.zeros_like(limbs), limbs)
    parts = [jax.tree.map(lambda x, i=i: x[i], counts) for i in range(_NUM_LIMBS)]
    total = BitCount.zero()
    for part in reversed(parts):
        total = total.times(1 << _LIMB_BITS) + part
    return total
