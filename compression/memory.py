"""Error feedback: what one message loses is added to the next value of the same sender.

    m_t = encode(x_t + e_t),   e_{t+1} = x_t + e_t - Q(x_t + e_t)

So the sum of all that was received is the sum of all values but for the last error, which stays
bounded if the codec is contractive.

References:
  Seide, Fu, Droppo, Li, Yu. 1-bit stochastic gradient descent and its application to data-parallel
  distributed training of speech DNNs. Interspeech 2014.

  Karimireddy, Rebjock, Stich, Jaggi. Error feedback fixes SignSGD and other gradient compression
  schemes. ICML 2019, arXiv:1901.09847.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_core.compression.base import Codec, Keys, Message, Report, check_codec
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
    check_codec(codec, "under error feedback")
    if not codec.traits.contractive:
        raise CodecError(
            f"expected a contractive codec under error feedback, got {codec.name}: one message may "
            "lose more than there is, so errors would add up without bound; take one that is, such "
            'as top_k, scaled_sign, eden(..., scale="mmse") or step_quantize(..., '
            'correction="mmse").'
        )

    def init(template: Any) -> tuple[Any, Any]:
        if jax.tree.leaves(codec.init(template)):
            raise CodecError(
                f"expected a codec without state or memory under error feedback, got {codec.name}; "
                "put error feedback around the part of the chain that has none."
            )
        return (), jax.tree.map(_no_error, template)

    def encode(keys: Keys, memory: Any, hints: Any, value: Any) -> tuple[Any, Message]:
        aim = jax.tree.map(_corrected, value, memory)
        _, message = codec.encode(keys, (), hints, aim)
        summand = codec.decode(keys, hints, message)
        report = Report(jnp.int32(1), codec.bits(message), message.stats)
        _, received = codec.finish(keys.shared, (), summand, report)
        lost = jax.tree.map(_lost, memory, value, received)
        return lost, message

    return codec._replace(
        name=f"error_feedback({codec.name})",
        # The sum over rounds is right, and no single message.
        traits=codec.traits._replace(unbiased=False, linear=False, summable=False),
        init=init,
        encode=encode,
    )


def _no_error(leaf: Any) -> jax.Array:
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
