"""The contract of a codec: what encodes, decodes, counts and writes the messages of one edge.

A codec is a NamedTuple of pure functions at the level of ONE sender; the library maps them over
clients.

    memory, message = encode(keys, memory, hints, value)       on the sender
    summand = decode(keys, hints, message)                     on the receiver, per message
    server, value = finish(shared_key, server, total, report)  on the receiver, once, after the sum

`hints(server)` goes down to the senders before they encode, and is counted. `bits(message)` is the
exact size of the message, inside any JAX program; `to_bytes` are those bytes, on the host, and
``8 * len(to_bytes(message)) == int(bits(message))``. Only a codec without the trait `exact_bits`
may count more than it sends.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from fedjax_core.bits import BitCount
from fedjax_core.compression import wire
from fedjax_core.compression.checks import told
from fedjax_core.errors import CodecError


class Keys(NamedTuple):
    """The randomness of one message.

    Attributes:
      shared: a key that all senders and the receiver know (a common rotation).
      client: the key of this sender alone (stochastic rounding).
    """

    shared: jax.Array
    client: jax.Array


class Message(NamedTuple):
    """What one sender sends.

    Attributes:
      payload: pytree that the next stage of a chain encodes; ``()`` where a later stage carries it.
      side: what decoding needs besides (ranges, positions); counted.
      stats: scalars that the receiver sums over the messages for `Report`; counted at their raw
        size.
    """

    payload: Any
    side: Any = ()
    stats: Any = ()


class Report(NamedTuple):
    """What the receiver knows about the messages that arrived.

    Attributes:
      count: int32 scalar, how many arrived.
      bits: their total size.
      stats: the sum of their `Message.stats`.
    """

    # Hides the method of tuples, which nobody needs here.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    bits: BitCount
    stats: Any = ()


class Traits(NamedTuple):
    """What holds for every value, so that a composition can be checked.

    Rounding errors of floats aside, and numbers below the smallest normal one, which devices may
    take for zero. With Q(x) the reconstruction of x:

    Attributes:
      unbiased: E Q(x) = x over the keys.
      contractive: E |Q(x) - x|^2 <= (1 - d) |x|^2 with some d > 0 (what error feedback needs).
      linear: decoding is linear, and the messages of all senders may be summed before they are
        decoded; such a codec sends no side information.
      summable: the payloads of all senders may be summed as they are (what secure sums need).
      exact_bits: `Codec.bits` is the exact size and not a bound.
      needs_seed: the receiver needs the sender's own key to decode.
      independent: given the values, the errors of senders with keys of their own are independent
        of each other, or not random at all, so that a mean makes them smaller.
    """

    unbiased: bool = False
    contractive: bool = False
    linear: bool = False
    summable: bool = False
    exact_bits: bool = True
    needs_seed: bool = False
    independent: bool = True


class Codec(NamedTuple):
    """A pair of pure functions around an edge, with what they remember, and the edge's exact size.

    Attributes:
      name: how the codec was made, such as ``"uniform_quantize(bits=8)"``.
      traits: what holds for every value.
      init: ``(template) -> (server, memory)`` from a pytree of `jax.ShapeDtypeStruct`: the
        receiver's state and the memory of one sender; each ``()`` when there is none.
      hints: ``(server) -> hints``, what senders need to encode; ``()`` when nothing.
      encode: ``(keys, memory, hints, value) -> (memory, message)``.
      decode: ``(keys, hints, message) -> summand``.
      finish: ``(shared_key, server, total, report) -> (server, value)``; `keep_total` for most.
      bits: ``(message) -> BitCount`` under `jit` and `vmap`; where the size does not depend on
        values it also counts a message of `jax.ShapeDtypeStruct`.
      to_bytes: ``(message) -> bytes`` on the host: side, stats, then payload, each tensor aligned
        to a byte.
      from_bytes: ``(like, data) -> (message, rest)``, where `like` is a message of
        `jax.ShapeDtypeStruct`.
    """

    name: str
    traits: Traits
    init: Callable[[Any], tuple[Any, Any]]
    hints: Callable[[Any], Any]
    encode: Callable[[Keys, Any, Any, Any], tuple[Any, Message]]
    decode: Callable[[Keys, Any, Message], Any]
    finish: Callable[[jax.Array, Any, Any, Report], tuple[Any, Any]]
    bits: Callable[[Message], BitCount]
    to_bytes: Callable[[Message], bytes]
    from_bytes: Callable[[Message, bytes], tuple[Message, bytes]]

    def transport(self, like: Message) -> tuple[Callable[[Message, int], Message], int]:
        """How messages like `like` travel as frames; see `framing.transport`."""
        from fedjax_core.compression import framing  # which is about codecs

        own: Any = self
        return framing.transport(own, cast(Any, like))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Survivors:
    """The elements of a sparse tensor that are sent.

    Attributes:
      values: ``[k]``, the elements that survive, in the order of their positions; a later stage of
        a chain encodes them.
      shape: static, the shape of the tensor they stand for.
    """

    values: Any
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def size(self) -> int:
        """The number of elements of the tensor that `values` stand for."""
        return math.prod(self.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotated:
    """A tensor in other coordinates, in blocks.

    Attributes:
      values: ``[blocks, block]``, with the zeros that fill up the last block; a later stage of a
        chain encodes them.
      shape: static, the shape of the tensor.
      dtype: static, the dtype of the tensor.
    """

    values: Any
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @property
    def size(self) -> int:
        """The number of elements of the tensor, without filling."""
        return math.prod(self.shape)


def stateless(
    name: str,
    traits: Traits,
    encode: Callable[[Keys, Any], Message],
    decode: Callable[[Keys, Message], Any],
) -> Codec:
    """A codec without state, memory or hints, whose messages are written tensor by tensor.

    Args:
      name: how the codec was made.
      traits: what holds for every value.
      encode: ``(keys, value) -> message``.
      decode: ``(keys, message) -> summand``.

    Returns:
      The codec.
    """
    return Codec(
        name=name,
        traits=traits,
        init=lambda template: ((), ()),
        hints=lambda server: (),
        encode=lambda keys, memory, hints, value: (memory, encode(keys, value)),
        decode=lambda keys, hints, message: decode(keys, message),
        finish=keep_total,
        bits=_count,
        to_bytes=_write,
        from_bytes=_read,
    )


def keep_total(shared_key: jax.Array, server: Any, total: Any, report: Report) -> tuple[Any, Any]:
    """The `Codec.finish` of a codec with nothing to do after the sum."""
    del shared_key, report
    return server, total


def identity() -> Codec:
    """The codec that sends every tensor as it is.

    Returns:
      A codec with all good traits, at the raw size.

    Example:
      >>> import jax.numpy as jnp
      >>> codec = identity()
      >>> keys = Keys(jax.random.key(0), jax.random.key(1))
      >>> _, message = codec.encode(keys, (), (), {"w": jnp.ones((5, 2))})
      >>> int(codec.bits(message))
      320
    """
    traits = Traits(unbiased=True, contractive=True, linear=True, summable=True)
    return stateless(
        "identity()",
        traits,
        encode=lambda keys, value: Message(wire.check_tensors(value)),
        decode=lambda keys, message: message.payload,
    )


def to_bytes(codec: Codec, message: Message) -> bytes:
    """The bytes that travel for a message, on the host.

    Args:
      codec: the codec that encoded it.
      message: the message of one sender (no clients axis).

    Returns:
      ``int(codec.bits(message)) / 8`` bytes.

    Raises:
      CodecError: `message` is not a `Message`, holds what is no array of numbers, or what this
        codec does not write.
    """
    check_codec(codec, "that encoded the message")
    return codec.to_bytes(wire.check_tensors(check_message(message)))


def from_bytes(codec: Codec, data: bytes | bytearray | memoryview, like: Message) -> Message:
    """The message that `to_bytes` wrote.

    Args:
      codec: the codec that encoded it.
      data: all bytes of the message.
      like: a message of the same structure, shapes and dtypes, of arrays or
        `jax.ShapeDtypeStruct`; get it by `jax.eval_shape` of `Codec.encode`.

    Returns:
      The message, its leaves NumPy arrays.

    Raises:
      CodecError: `data` is no bytes, too short or too long, no message has these bytes, or `like`
        is not a `Message`.

    Example:
      >>> import numpy as np
      >>> codec, message = identity(), Message(np.float32([1.5, 2.5]))
      >>> from_bytes(codec, to_bytes(codec, message), like=message).payload
      array([1.5, 2.5], dtype=float32)
    """
    check_codec(codec, "that encoded the message")
    data = check_bytes(data)
    message, rest = codec.from_bytes(wire.check_tensors(check_message(like)), data)
    if rest:
        expected = len(data) - len(rest)
        raise CodecError(
            f"expected {expected} bytes for a message of {codec.name}, got {len(data)}; "
            "pass the bytes of exactly one message, and the `like` of the value that was encoded."
        )
    return message


def check_codec(codec: Any, where: str) -> None:
    """Raises unless `codec` is one.

    Raises:
      CodecError: it is something else.
    """
    if isinstance(codec, Codec):
        return
    remedy = "pass one such as top_k(0.1)"
    if isinstance(codec, str):
        remedy = "a codec of this name is preset(name)"
    elif hasattr(codec, "send"):
        codec, remedy = (
            getattr(codec, "name", codec),
            "it is for the way down: broadcast_codec takes it",
        )
    elif callable(codec):
        remedy = "call it, as in top_k(0.1)"
    elif isinstance(codec, list | tuple) and not hasattr(codec, "_fields"):
        remedy = "pass codecs, not a list: chain(...) makes one of several"
    raise CodecError(f"expected a codec {where}, got {told(codec)}; {remedy}.")


def check_message(message: Message) -> Message:
    """`message` itself, if it is one.

    Raises:
      CodecError: it is something else.
    """
    if not isinstance(message, Message):
        raise CodecError(
            f"expected a Message, got {type(message).__name__}; encode the value first: "
            "`memory, message = codec.encode(keys, memory, hints, value)`."
        )
    return message


def check_bytes(data: Any) -> bytes:
    """`data` as bytes.

    Raises:
      CodecError: it is something else than bytes, a bytearray or a memoryview.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise CodecError(
            f"expected the bytes of a message, got {type(data).__name__}; pass what `to_bytes` "
            "returned (an array's own bytes are `array.tobytes()`)."
        )
    return bytes(data)


def _parts(message: Message) -> tuple[Any, Any, Any]:
    """The parts of a message in the order in which they are written."""
    return message.side, message.stats, message.payload


def _count(message: Message) -> BitCount:
    return wire.count(_parts(message))


def _write(message: Message) -> bytes:
    return wire.to_bytes(_parts(message))


def _read(like: Message, data: bytes) -> tuple[Message, bytes]:
    (side, stats, payload), rest = wire.from_bytes(_parts(like), data)
    return Message(payload, side, stats), rest
