"""Magnitudes as answers to questions, on the host: the coder behind `contexts`.

Of each element is asked: is it above 0; then, is it above 1; then, is it above 2, 3, ... 14. The
answers to one question in one context have one probability, so they are coded together: question
after question, and for each one context after context. The reader knows from earlier answers who
is asked next.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.compression import rans
from fedjax_core.compression.bitstreams import BitReader, BitWriter, altered
from fedjax_core.compression.universal import read_gammas, write_gammas

NUM_QUESTIONS = 3
# What a magnitude has above this less one travels as it is.
ESCAPE = 15
# The probability of yes is one of 64, evenly spaced in its logarithm against no.
LEVEL_BITS = 6
NUM_LEVELS = 1 << LEVEL_BITS
PRECISION = 16
_OCTAVES = 12.0
# No magnitude is this long, in bits.
_MAX_BITS = 30


@functools.cache
def frequencies() -> np.ndarray:
    """Of no and yes at each level: int64 ``[levels, 2]``, each row of the sum ``2**16``."""
    octaves = np.linspace(-_OCTAVES, _OCTAVES, NUM_LEVELS)
    yes = np.rint((1 << PRECISION) / (1 + 2.0**-octaves)).astype(np.int64)
    return np.stack([(1 << PRECISION) - yes, yes], axis=1)


def nearest_level(no: jax.Array, yes: jax.Array) -> jax.Array:
    """The level for so many answers, uint8; half an answer of each kind is added."""
    octaves = jnp.log2(yes + 0.5) - jnp.log2(no + 0.5)
    level = (octaves + _OCTAVES) * ((NUM_LEVELS - 1) / (2 * _OCTAVES))
    return jnp.clip(jnp.round(level), 0, NUM_LEVELS - 1).astype(jnp.uint8)


def encode(
    contexts: np.ndarray, magnitudes: np.ndarray, levels: np.ndarray, num_bytes: int
) -> tuple[int, bytes]:
    """The state of a coder for all answers, in one of the orders in which it fits.

    Args:
      contexts: int8 ``[n]``.
      magnitudes: int64 ``[n]``.
      levels: ``[contexts, questions]``.
      num_bytes: of the state.

    Returns:
      The number of the order, and the state.

    Raises:
      CodecError: it fits in no order.
    """

    def encode_in(order: int) -> bytes:
        segments = []
        asked = _by_context(rans.reorder(contexts, order))
        magnitude = rans.reorder(magnitudes, order)
        for least in range(ESCAPE):
            asked = [(context, places) for context, places in asked if places.size]
            answers = [magnitude[places] > least for _, places in asked]
            segments += [
                (answer, levels[context, min(least, NUM_QUESTIONS - 1)])
                for answer, (context, _) in zip(answers, asked, strict=True)
            ]
            asked = [
                (context, places[answer])
                for answer, (context, places) in zip(answers, asked, strict=True)
            ]
        coder = rans.new_coder()
        for answer, level in reversed(segments):
            coder.encode_reverse(answer.astype(np.int32), _model(int(level)))
        return rans.state_of(coder)

    return rans.in_some_order(encode_in, num_bytes)


def decode(contexts: np.ndarray, levels: np.ndarray, state: bytes, order: int) -> np.ndarray:
    """int64, the magnitudes up to `ESCAPE` that `encode` encoded.

    Raises:
      CodecError: no magnitudes have this state.
    """
    if order >= rans.NUM_ORDERS or (not contexts.size and (state or order)):
        raise altered(f"one of {rans.NUM_ORDERS} orders")
    coder = rans.coder_from(state)
    found = np.zeros(contexts.size, np.int64)
    asked = _by_context(rans.reorder(contexts, order))
    for least in range(ESCAPE if contexts.size else 0):
        following = []
        for context, places in asked:
            if places.size:
                model = _model(int(levels[context, min(least, NUM_QUESTIONS - 1)]))
                above = places[coder.decode(model, places.size) > 0]
                found[above] = least + 1
                following.append((context, above))
        asked = following
    if contexts.size and not rans.is_empty(coder):
        raise altered("a coder's state to end where it began")
    return rans.restore(found, order)


def write_escaped(writer: BitWriter, magnitudes: np.ndarray) -> None:
    """Appends what the answers do not tell."""
    write_gammas(writer, magnitudes[magnitudes >= ESCAPE] - (ESCAPE - 1))


def read_escaped(reader: BitReader, magnitudes: np.ndarray) -> np.ndarray:
    """The whole magnitudes."""
    is_escaped = magnitudes >= ESCAPE
    magnitudes[is_escaped] = (
        read_gammas(reader, int(np.count_nonzero(is_escaped)), _MAX_BITS) + ESCAPE - 1
    )
    if magnitudes.size and int(magnitudes.max()) >> _MAX_BITS:
        raise altered(f"magnitudes below 2**{_MAX_BITS}")
    return magnitudes


def _by_context(contexts: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """The places of the elements of each context."""
    order = np.argsort(contexts, kind="stable")
    counts = np.bincount(contexts)
    parts = np.split(order, np.cumsum(counts)[:-1]) if counts.size else []
    return [(context, places) for context, places in enumerate(parts) if places.size]


@functools.cache
def _model(level: int) -> object:
    return rans.categorical(frequencies()[level])
