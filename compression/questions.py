"""Numbers as answers to questions, on the host: the coder behind `planes`.

An answer is yes or no, with a probability that both ends know. What is asked next follows from the
answers so far, so one function leads the dialogue in both directions: `Writing` collects answers
that it looks up, `Reading` decodes them.
"""

import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.compression import rans
from fedjax_core.compression.bitstreams import BitReader, BitWriter, altered
from fedjax_core.compression.frequencies import information
from fedjax_core.compression.universal import read_gammas, write_gammas

# Of an element: is it above 0; is it above 1; is it above 2, 3, ... 14. Of a row: has it a class
# above 0; is this not the middle one; is it the upper one.
NUM_QUESTIONS = 3
# What a magnitude has above this less one travels as it is.
ESCAPE = 15
# The probability of yes is one of 64, evenly spaced in its logarithm against no.
LEVEL_BITS = 6
NUM_LEVELS = 1 << LEVEL_BITS
PRECISION = 16
# Classes of rows, and the context of a row with none above it.
MIDDLE, UPPER = 2, 3
NO_ROW = 4
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


class Ask(Protocol):
    """Asks one question of several numbers."""

    def __call__(
        self, level: int, places: np.ndarray, answer: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """The answers, bool ``[n]``.

        Args:
          level: of the probability of yes.
          places: int64 ``[n]``, whom.
          answer: from places to their answers; called by who writes.
        """
        ...


class Writing:
    """Collects the answers of a dialogue."""

    def __init__(self) -> None:
        self._segments: list[tuple[np.ndarray, int]] = []
        self._cost = 0

    def __call__(
        self, level: int, places: np.ndarray, answer: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """See `Ask`."""
        answers = answer(places)
        self._segments.append((answers, int(level)))
        self._cost += _cost(int(level), answers)
        return answers

    @property
    def num_bytes(self) -> int:
        """Of a state that holds all answers."""
        return _num_bytes(self._cost)

    def state(self) -> bytes:
        """The state of a coder that holds all answers, without the zero bytes at its end."""
        coder = rans.new_coder()
        # A coder is a stack.
        for answers, level in reversed(self._segments):
            coder.encode_reverse(answers.astype(np.int32), _model(level))
        return rans.state_of(coder)


class Reading:
    """Decodes the answers of a dialogue from the state of a coder."""

    def __init__(self, state: bytes) -> None:
        self._coder = rans.coder_from(state)
        self._num_bytes = len(state)
        self._cost = 0

    def __call__(
        self, level: int, places: np.ndarray, answer: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """See `Ask`."""
        del answer
        answers = self._coder.decode(_model(int(level)), places.size) > 0
        self._cost += _cost(int(level), answers)
        return answers

    def finish(self) -> None:
        """Checks that all answers were asked for.

        Raises:
          CodecError: they were not.
        """
        if self._num_bytes != _num_bytes(self._cost):
            raise altered("as many bytes as the answers take")
        if self._num_bytes and not rans.is_empty(self._coder):
            raise altered("a coder's state to end where it began")


def ask_rows(ask: Ask, classes: np.ndarray, period: int, levels: np.ndarray) -> np.ndarray:
    """The classes of rows, where the row one period above is of which class.

    Args:
      ask: of one matrix.
      classes: uint8 ``[m]``, 0 to 3; a reader's may hold anything.
      period: rows between a row and that above it; 0 if no row has one.
      levels: ``[5, questions]``, for each class of the row above, and for none.

    Returns:
      uint8 ``[m]``.
    """
    size = classes.size
    found = np.zeros(size, np.uint8)
    step = period or size
    for begin in range(0, size, step):
        rows = np.arange(begin, min(begin + step, size))
        above = found[rows - step] if begin else np.full(rows.size, NO_ROW, np.uint8)
        for context, places in _by_context(above):
            own = rows[places]
            own = own[ask(levels[context, 0], own, lambda x: classes[x] > 0)]
            found[own] = MIDDLE
            if own.size:
                own = own[ask(levels[context, 1], own, lambda x: classes[x] != MIDDLE)]
            if own.size:
                is_upper = ask(levels[context, 2], own, lambda x: classes[x] == UPPER)
                found[own] = np.where(is_upper, UPPER, 1)
    return found


def ask_magnitudes(
    ask: Ask, magnitudes: np.ndarray, contexts: np.ndarray, levels: np.ndarray, order: int
) -> np.ndarray:
    """Magnitudes up to `ESCAPE`.

    The answers to one question in one context have one probability, so they are coded together:
    question after question, and for each one context after context.

    Args:
      ask: of elements.
      magnitudes: int64 ``[n]``; a reader's may hold anything.
      contexts: int8 ``[n]``.
      levels: ``[contexts, questions]``.
      order: the number of the order of the elements.

    Returns:
      int64 ``[n]``.
    """
    truth = rans.reorder(magnitudes, order)
    found = np.zeros(contexts.size, np.int64)
    asked = _by_context(rans.reorder(contexts, order))
    for least in range(ESCAPE):
        following = []
        for context, places in asked:
            level = levels[context, min(least, NUM_QUESTIONS - 1)]
            above = places[ask(level, places, lambda x, least=least: truth[x] > least)]
            found[above] = least + 1
            if above.size:
                following.append((context, above))
        asked = following
    return rans.restore(found, order)


def ask_signs(
    ask: Ask, is_negative: np.ndarray, is_some: np.ndarray, levels: np.ndarray
) -> np.ndarray:
    """Which elements are negative, in the columns whose signs have a probability.

    Args:
      ask: of rows, column by column.
      is_negative: bool ``[m, n]``; a reader's may hold anything.
      is_some: bool ``[m, n]``, the elements that have a sign.
      levels: ``[n]``; 0 for the columns that are left out.

    Returns:
      bool ``[m, n]``.
    """
    found = np.zeros(is_some.shape, bool)
    for column in np.flatnonzero(levels):
        places = np.flatnonzero(is_some[:, column])
        if places.size:
            own = is_negative[:, column]
            found[places, column] = ask(levels[column], places, lambda x, own=own: own[x])
    return found


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


@functools.cache
def costs() -> tuple[np.ndarray, np.ndarray]:
    """The bits of no and yes at each level, in units of 2**-32: two words ``[levels, 2]``."""
    table = frequencies()
    high, low = information(table.ravel(), PRECISION)
    return high.reshape(table.shape), low.reshape(table.shape)


def _cost(level: int, answers: np.ndarray) -> int:
    """The bits of answers, in units of 2**-32."""
    num_yes = int(np.count_nonzero(answers))
    no, yes = _costs()[level]
    return no * (answers.size - num_yes) + yes * num_yes


@functools.cache
def _costs() -> list[list[int]]:
    high, low = (x.astype(np.uint64) for x in costs())
    return (high << np.uint64(32) | low).tolist()


def _num_bytes(cost: int) -> int:
    """Of a state that takes so many bits, in units of 2**-32."""
    return -(-(-(-cost >> 32) + rans.STATE_BITS) // 8) if cost else 0
