"""Memory of senders: what a message lost, or what the receiver believes.

    error feedback   send C(x + e),   e <- x + e - C(x + e)
    EF21             send C(x - g),   g <- g + C(x - g)      at the sender
                                      G <- G + sum of C      at the receiver: the sum of all g

With error feedback the sum of all that was received is the sum of all values but for the last
error, which stays bounded if the codec is contractive. With EF21 a sender's value that no longer
changes is known exactly in the end; senders that are absent count with what is known of them.

References:
  Seide, Fu, Droppo, Li, Yu. 1-bit stochastic gradient descent and its application to data-parallel
  distributed training of speech DNNs. Interspeech 2014.

  Karimireddy, Rebjock, Stich, Jaggi. Error feedback fixes SignSGD and other gradient compression
  schemes. ICML 2019, arXiv:1901.09847.

  Richtarik, Sokolov, Fatkhullin. EF21: a new, simpler, theoretically better, and practically faster
  error feedback. NeurIPS 2021, arXiv:2106.05203; and with partial participation: Fatkhullin et al.
  EF21 with bells & whistles. 2021, arXiv:2110.03294.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_core.compression.base import (
    Codec,
    Keys,
    Message,
    Report,
    Rotated,
    Survivors,
    check_codec,
)
from fedjax_core.compression.checks import check_given
from fedjax_core.errors import CodecError


def error_feedback(codec: Codec) -> Codec:
    """Adds to each value what the messages of this sender have lost so far.

    Each sender remembers a tensor for each floating one of its value, in float32 (float64 for
    float64). In a round that it misses, the memory stays as it is, and so does each element that is
    not finite, or is received as what is not: the message shows it, and later ones are not spoilt.

    Args:
      codec: contractive, and without state of its own.

    Returns:
      The codec, whose messages are those of `codec`.

    Raises:
      CodecError: `codec` is not contractive, or has state or memory.

    Example:
      >>> from fedjax_core.compression import top_k
      >>> codec = error_feedback(top_k(0.5, min_size=0))
      >>> keys, x = Keys(jax.random.key(0), jax.random.key(1)), jnp.array([3.0, 2.0])
      >>> _, memory = codec.init(x)
      >>> for _ in range(2):
      ...     memory, message = codec.encode(keys, memory, (), x)
      ...     print(codec.decode(keys, (), message).tolist())
      [3.0, 0.0]
      [0.0, 4.0]
    """
    _check_contractive(codec, "error feedback")

    def init(template: Any) -> tuple[Any, Any]:
        _check_bare(codec, "error feedback", template)
        return (), jax.tree.map(_nothing, template)

    def encode(keys: Keys, memory: Any, hints: Any, value: Any) -> tuple[Any, Message]:
        check_given("memory", f"error_feedback({codec.name})", memory, value)
        aim = jax.tree.map(_corrected, value, memory)
        _, message = codec.encode(keys, (), hints, aim)
        lost = jax.tree.map(_lost, memory, value, _received(codec, keys, hints, message))
        return lost, message

    return codec._replace(
        name=f"error_feedback({codec.name})",
        # The sum over rounds is right, and no single message.
        traits=codec.traits._replace(unbiased=False, linear=False, summable=False),
        init=init,
        encode=encode,
    )


def ef21(codec: Codec) -> Codec:
    """Sends how a value differs from what the receiver believes of this sender.

    The receiver keeps the sum of what it believes of all senders, those that are absent included,
    and gives as the sum of a round the part of it that its number of senders stands for. So a mean
    is over all senders that were ever heard: take `unweighted_mean`, for with weights a sender
    that is absent has the weight that it had, and the mean divides by those of the present ones.

    Each sender remembers a tensor for each floating one of its value, in float32 (float64 for
    float64), and whether it ever sent. Tensors of other dtypes are sent as they are, and are of the
    present senders only.

    Args:
      codec: contractive, and without state of its own.

    Returns:
      The codec, whose messages are those of `codec` and 32 bits.

    Raises:
      CodecError: `codec` is not contractive, or has state or memory.

    Example:
      >>> from fedjax_core.compression import top_k
      >>> codec, x = ef21(top_k(0.5, min_size=0)), jnp.array([3.0, 2.0])
      >>> keys = Keys(jax.random.key(0), jax.random.key(1))
      >>> server, memory = codec.init(x)
      >>> for _ in range(2):
      ...     memory, message = codec.encode(keys, memory, (), x)
      ...     report = Report(jnp.int32(1), codec.bits(message), message.stats)
      ...     total = codec.decode(keys, (), message)
      ...     server, value = codec.finish(keys.shared, server, total, report)
      ...     print(value.tolist())
      [3.0, 0.0]
      [3.0, 2.0]
    """
    _check_contractive(codec, "ef21")

    def init(template: Any) -> tuple[Any, Any]:
        _check_bare(codec, "ef21", template)
        believed = jax.tree.map(_nothing, template)
        return (believed, jnp.int32(0)), (believed, jnp.bool_(False))

    def encode(keys: Keys, memory: Any, hints: Any, value: Any) -> tuple[Any, Message]:
        check_given("memory", f"ef21({codec.name})", memory, value)
        believed, has_sent = memory
        aim = jax.tree.map(_difference, value, believed)
        _, message = codec.encode(keys, (), hints, aim)
        received = _received(codec, keys, hints, message)
        new = jax.tree.map(_believed, believed, received)
        stats = (message.stats, 1 - has_sent.astype(jnp.int32))
        return (new, jnp.bool_(True)), message._replace(stats=stats)

    def decode(keys: Keys, hints: Any, message: Message) -> Any:
        return codec.decode(keys, hints, message._replace(stats=message.stats[0]))

    def finish(key: jax.Array, server: Any, total: Any, report: Report) -> tuple[Any, Any]:
        believed, num_senders = server
        stats, num_new = report.stats
        _, arrived = codec.finish(key, (), total, report._replace(stats=stats))
        believed = jax.tree.map(_believed, believed, arrived)
        num_senders = num_senders + num_new
        share = report.count / jnp.maximum(num_senders, 1)
        value = jax.tree.map(lambda x, y: _shared(x, y, share), believed, arrived)
        return (believed, num_senders), value

    return codec._replace(
        name=f"ef21({codec.name})",
        traits=codec.traits._replace(
            unbiased=False, contractive=False, linear=False, summable=False
        ),
        init=init,
        encode=encode,
        decode=decode,
        finish=finish,
    )


def _check_contractive(codec: Codec, what: str) -> None:
    check_codec(codec, f"under {what}")
    if not codec.traits.contractive:
        raise CodecError(
            f"expected a contractive codec under {what}, got {codec.name}: one message may "
            "lose more than there is, so errors would add up without bound; take one that is, such "
            'as top_k, scaled_sign, eden(..., scale="mmse") or step_quantize(..., '
            'correction="mmse").'
        )


def _check_bare(codec: Codec, what: str, template: Any) -> None:
    def is_moved(node: Any) -> bool:
        return isinstance(node, Rotated | Survivors)

    if any(map(is_moved, jax.tree.leaves(template, is_leaf=is_moved))):
        raise CodecError(
            f"expected {what} around a whole chain, got {what} of {codec.name} behind another "
            "stage: what an element stands for there changes from round to round, and what is "
            "remembered would be added to others."
        )
    if jax.tree.leaves(codec.init(template)):
        raise CodecError(
            f"expected a codec without state or memory under {what}, got {codec.name}; put it "
            "around the part of the chain that has none."
        )


def _received(codec: Codec, keys: Keys, hints: Any, message: Message) -> Any:
    """What the receiver makes of one message."""
    summand = codec.decode(keys, hints, message)
    report = Report(jnp.int32(1), codec.bits(message), message.stats)
    return codec.finish(keys.shared, (), summand, report)[1]


def _nothing(leaf: Any) -> jax.Array:
    is_floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    dtype = jnp.promote_types(leaf.dtype, jnp.float32) if is_floating else jnp.float32
    return jnp.zeros(leaf.shape if is_floating else (0,), dtype)


def _corrected(x: jax.Array, error: jax.Array) -> jax.Array:
    """What the codec is to send; rounded to the dtype of `x`, unlike the error."""
    return (x + error).astype(x.dtype) if error.size else x


def _lost(error: jax.Array, x: jax.Array, received: jax.Array) -> jax.Array:
    if not error.size:
        return error
    lost = x.astype(error.dtype) + error - received.astype(error.dtype)
    return jnp.where(jnp.isfinite(lost), lost, error)


def _difference(x: jax.Array, believed: jax.Array) -> jax.Array:
    return (x - believed).astype(x.dtype) if believed.size else x


def _believed(believed: jax.Array, received: jax.Array) -> jax.Array:
    """What is believed after a message; of what is not finite, what was."""
    if not believed.size:
        return believed
    new = believed + received.astype(believed.dtype)
    return jnp.where(jnp.isfinite(new), new, believed)


def _shared(believed: jax.Array, arrived: jax.Array, share: jax.Array) -> jax.Array:
    """The part of a sum that a round's senders stand for; a message that is not finite shows."""
    if not believed.size:
        return arrived
    return jnp.where(jnp.isfinite(arrived), believed * share, jnp.nan).astype(arrived.dtype)
