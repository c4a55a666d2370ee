"""Chains of codecs: each stage encodes the payload of the stage before it.

`chain(top_k(0.1), uniform_quantize(8))` sends the positions of a tenth of the elements (side
information of the first stage) and 8-bit symbols of their values (payload of the last).

    encode:  value -> stage 0 -> payload -> stage 1 -> ... -> payload of the last stage
    decode:  backwards, for every message, until only leading linear stages are left
    finish:  those linear stages, once, on the sum of all messages
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_core.bits import BitCount
from fedjax_core.compression.base import (
    Codec,
    Keys,
    Message,
    Report,
    Traits,
    check_codec,
    identity,
    keep_total,
)
from fedjax_core.compression.checks import told
from fedjax_core.errors import CodecError


def chain(*codecs: Codec) -> Codec:
    """Composes codecs from the outside in: the first one sees the value, the last one the wire.

    Stage i gets both keys folded with i. Its state, memory and hints are entry i of a tuple
    (``()`` if no stage has any); so are the side information and the statistics of the message,
    whose payload is that of the last stage.

    The linear stages at the beginning are undone in `finish`, once for the sum; all others in
    `decode`. A linear stage behind another kind is undone in `decode` too, so it cannot have
    server state.

    Args:
      *codecs: the stages; none gives `identity()`.

    Returns:
      The codec. It has the trait unbiased, contractive, linear, summable or exact_bits if every
      stage has it, and needs_seed if any stage does.

    Raises:
      CodecError: an argument is not a codec, or a stage that has work to do after the sum stands
        behind one that must be undone before it.

    Example:
      >>> from fedjax_core.compression import chain, top_k, uniform_quantize
      >>> chain(top_k(0.1), uniform_quantize(8)).name
      'chain(top_k(0.1), uniform_quantize(bits=8))'
    """
    for position, codec in enumerate(codecs):
        check_codec(codec, f"as argument {position} of chain")
    if len(codecs) < 2:
        return codecs[0] if codecs else identity()
    stages = _Stages(codecs)
    stages.check()
    return Codec(
        name=f"chain({', '.join(codec.name for codec in codecs)})",
        traits=_combine([codec.traits for codec in codecs]),
        init=stages.init,
        hints=stages.hints,
        encode=stages.encode,
        decode=stages.decode,
        finish=stages.finish if stages.has_finish else keep_total,
        bits=stages.bits,
        to_bytes=stages.to_bytes,
        from_bytes=stages.from_bytes,
    )


@dataclasses.dataclass(frozen=True)
class _Stages:
    """The functions of a chain.

    Attributes:
      codecs: at least two stages.
    """

    codecs: tuple[Codec, ...]

    @property
    def num_linear(self) -> int:
        """How many linear stages lead the chain."""
        kinds = [codec.traits.linear for codec in self.codecs]
        return kinds.index(False) if False in kinds else len(kinds)

    @property
    def has_finish(self) -> bool:
        """Whether anything is left to do after the sum."""
        outermost = self.codecs[: self.num_linear + 1]
        return self.num_linear > 0 or any(codec.finish is not keep_total for codec in outermost)

    def check(self) -> None:
        """Refuses a stage that must be finished after the sum where that is not possible."""
        for position in range(self.num_linear + 1, len(self.codecs)):
            codec = self.codecs[position]
            if codec.finish is not keep_total and not codec.traits.linear:
                raise CodecError(
                    f"expected stage {position}, {codec.name}, to be undone for each message, "
                    f"because it stands behind {self.codecs[self.num_linear].name}, but it "
                    "finishes after the sum; put it first, or directly behind linear stages."
                )

    def init(self, template: Any) -> tuple[Any, Any]:
        servers, memories = [], []
        for position, codec in enumerate(self.codecs):
            server, memory = codec.init(template)
            self._check_server(position, server)
            servers.append(server)
            memories.append(memory)
            template = _payload_type(codec, server, memory, template)
        return _join(servers), _join(memories)

    def hints(self, server: Any) -> Any:
        return _join([codec.hints(own) for codec, own in self._zip(server)])

    def encode(self, keys: Keys, memory: Any, hints: Any, value: Any) -> tuple[Any, Message]:
        memories, messages = [], []
        for position, (codec, own, hint) in enumerate(self._zip(memory, hints)):
            own, message = codec.encode(_fold(keys, position), own, hint, value)
            if codec.traits.linear:
                _check_no_side(position, codec, message)
            memories.append(own)
            messages.append(message)
            value = message.payload
        sides = tuple(message.side for message in messages)
        return _join(memories), Message(value, sides, tuple(message.stats for message in messages))

    def decode(self, keys: Keys, hints: Any, message: Message) -> Any:
        stages = list(self._zip(hints, message.side, message.stats))
        value = message.payload
        for position in reversed(range(self.num_linear, len(stages))):
            codec, hint, side, stats = stages[position]
            own = _fold(keys, position)
            value = codec.decode(own, hint, Message(value, side, stats))
            if codec.traits.linear:
                report = Report(jnp.ones((), jnp.int32), BitCount.zero(), stats)
                _, value = codec.finish(own.shared, (), value, report)
        return value

    def finish(
        self, shared_key: jax.Array, server: Any, total: Any, report: Report
    ) -> tuple[Any, Any]:
        servers = list(_split(server, len(self.codecs)))
        stats = _split(report.stats, len(self.codecs))
        for position in reversed(range(min(self.num_linear + 1, len(self.codecs)))):
            codec, own = self.codecs[position], servers[position]
            key = jax.random.fold_in(shared_key, position)
            if position < self.num_linear:
                # The sum of the messages of a linear stage is a message; it belongs to no one
                # client.
                total = codec.decode(Keys(key, key), codec.hints(own), Message(total))
            own_report = report._replace(stats=stats[position])
            servers[position], total = codec.finish(key, own, total, own_report)
        return _join(servers), total

    def bits(self, message: Message) -> BitCount:
        counts = [codec.bits(part) for codec, part in self._parts(message)]
        return sum(counts, BitCount.zero())

    def to_bytes(self, message: Message) -> bytes:
        return b"".join(codec.to_bytes(part) for codec, part in self._parts(message))

    def from_bytes(self, like: Message, data: bytes) -> tuple[Message, bytes]:
        parts, rest = [], data
        for position, (codec, part) in enumerate(self._parts(like)):
            try:
                read, rest = codec.from_bytes(part, rest)
            except CodecError as error:
                place = f"stage {position}, {codec.name}, at byte {len(data) - len(rest)}"
                raise CodecError(f"{place} of {len(data)}: {error}") from error
            parts.append(read)
        sides = tuple(part.side for part in parts)
        return Message(parts[-1].payload, sides, tuple(part.stats for part in parts)), rest

    def _parts(self, message: Message) -> list[tuple[Codec, Message]]:
        """What each stage adds to the wire: only the last one writes a payload."""
        *rest, last = self._zip(message.side, message.stats)
        earlier = [(codec, Message((), side, stats)) for codec, side, stats in rest]
        codec, side, stats = last
        return [*earlier, (codec, Message(message.payload, side, stats))]

    def _zip(self, *states: Any) -> list[tuple[Any, ...]]:
        """The stages, each with its entry of every tuple in `states`."""
        count = len(self.codecs)
        return list(zip(self.codecs, *(_split(state, count) for state in states), strict=True))

    def _check_server(self, position: int, server: Any) -> None:
        codec = self.codecs[position]
        if position > self.num_linear and codec.traits.linear and jax.tree.leaves(server):
            raise CodecError(
                f"expected stage {position}, {codec.name}, to have no server state, because it is "
                "undone for each message; put it before the stages that are not linear."
            )


def _check_no_side(position: int, codec: Codec, message: Message) -> None:
    if jax.tree.leaves(message.side):
        raise CodecError(
            f"expected stage {position}, {codec.name}, to send no side information, because it is "
            "linear and its messages are summed; clear its trait `linear`."
        )


def _combine(traits: list[Traits]) -> Traits:
    combined = Traits(*(all(values) for values in zip(*traits, strict=True)))
    return combined._replace(needs_seed=any(each.needs_seed for each in traits))


def _fold(keys: Keys, position: int) -> Keys:
    return Keys(*(jax.random.fold_in(key, position) for key in keys))


def _join(parts: list[Any]) -> Any:
    """One tuple for all stages; ``()`` if they hold nothing, so stateless stages stay stateless."""
    return tuple(parts) if jax.tree.leaves(parts) else ()


def _split(joined: Any, count: int) -> tuple[Any, ...]:
    """The entries of what `_join` joined."""
    if not isinstance(joined, tuple) or len(joined) not in (0, count):
        raise CodecError(
            f"expected one entry for each of the {count} stages of a chain, or (), got "
            f"{told(joined)}; it belongs to another codec."
        )
    return joined or ((),) * count


def _payload_type(codec: Codec, server: Any, memory: Any, template: Any) -> Any:
    """The type of what a stage passes on."""

    def payload(key: jax.Array, server: Any, memory: Any, value: Any) -> Any:
        return codec.encode(Keys(key, key), memory, codec.hints(server), value)[1].payload

    key = jax.eval_shape(jax.random.key, 0)
    return jax.eval_shape(payload, key, server, memory, template)
