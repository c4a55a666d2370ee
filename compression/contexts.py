"""What an element of a matrix of symbols is likely to be, from its row and its column.

The updates of networks are uneven: whole rows are zero (pixels that are never lit, units that are
never active), and columns differ by orders of magnitude. So each row of a matrix is in one of four
classes by its mean magnitude, each column in one of 32, and together they name a context:

    context = column class + 4 * row class

In each context a symbol is the answers to up to 15 questions, each with a probability that is sent:
is it not zero; is its magnitude above 1; is it above 2, 3, ... 14 (these share one probability).

Rows resemble each other at a distance, the period: what a feature map says of one place, it says of
the next one. So the class of a row is answers too, whose probabilities follow from the class of the
row one period above. Columns lean to one side: what comes out of a ReLU is never negative, so the
strongest singular vector of such rows has one sign, and others mostly one. So signs have a
probability in each column in which they are uneven; elsewhere they are bits as they are, and so is
what a magnitude has above 14, in Elias gamma.

How often each answer is given is counted on the device, by small products of matrices.

References:
  Marpe, Schwarz, Wiegand. Context-based adaptive binary arithmetic coding in the H.264/AVC video
  compression standard. IEEE Transactions on Circuits and Systems for Video Technology 13(7), 2003
  (the questions).

  Wiedemann et al. DeepCABAC: a universal compression algorithm for deep neural networks. IEEE
  Journal of Selected Topics in Signal Processing 14(4), 2020, arXiv:1907.11900.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_core.compression.questions import (
    ESCAPE,
    LEVEL_BITS,
    MIDDLE,
    NO_ROW,
    NUM_QUESTIONS,
    UPPER,
    nearest_level,
)

ROW_BITS, COLUMN_BITS = 2, 5
NUM_ROW_CLASSES, NUM_COLUMN_CLASSES = 1 << ROW_BITS, 1 << COLUMN_BITS
ROW_STEP = 4  # two octaves, in half octaves
# Rows and columns of class 0 hold zeros only, and have no context.
NUM_CONTEXTS = NUM_COLUMN_CLASSES - 1 + ROW_STEP * (NUM_ROW_CLASSES - 2)
# Contexts of a row's class.
NUM_ABOVE = NO_ROW + 1
PERIOD_BITS = 12
SHORTEST_PERIOD = 16
# The column class of a mean magnitude of 1.
_ONE = 21
# Below this, float32 counts exactly.
_EXACT = 1 << 24
# A period of rows that do not repeat saves some bits by chance.
_CHANCE_BITS = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plane:
    """A matrix of symbols, with what its contexts follow from.

    Attributes:
      codes: int32 ``[m, n]``, magnitudes below 2**30.
      rows: uint8 ``[m]``, 0 to 3; 0 only for rows of zeros.
      columns: uint8 ``[n]``, 0 to 31; 0 only for columns of zeros.
      period: int32, rows between a row and the one above it; 0 for none.
      signs: uint8 ``[n]``, the level of the probability of a negative sign; 0 for bits as they are.
    """

    codes: Any
    rows: Any
    columns: Any
    period: Any
    signs: Any


def longest_period(num_rows: int) -> int:
    """The longest period of so many rows; 0 if they have none."""
    longest = min(num_rows // 2, (1 << PERIOD_BITS) - 1)
    return longest if longest >= SHORTEST_PERIOD else 0


def classify(codes: jax.Array) -> Plane:
    """A matrix with the classes, period and levels that fit it.

    Args:
      codes: int32 ``[m, n]``, magnitudes below 2**30.

    Returns:
      The plane.

    Example:
      >>> plane = classify(jnp.array([[0, 3], [0, 0]]))
      >>> plane.rows.tolist(), plane.columns.tolist()
      ([2, 0], [0, 24])
    """
    magnitudes = jnp.abs(codes).astype(jnp.float32)
    by_row, by_column = jnp.sum(magnitudes, axis=1), jnp.sum(magnitudes, axis=0)
    num_rows = jnp.maximum(jnp.sum(by_row > 0), 1)
    # Apart: XLA's CPU backend has naive loops for the sum over both axes.
    mean = jnp.sum(jax.lax.optimization_barrier(by_row)) / num_rows
    # About the mean row; two octaves up and down.
    relative = jnp.round(jnp.log2(jnp.where(by_row > 0, by_row / mean, 1)) / 2).astype(jnp.int32)
    rows = jnp.clip(MIDDLE + relative, 1, UPPER)
    rows = jnp.where(by_row > 0, rows, 0).astype(jnp.uint8)
    octaves = jnp.log2(jnp.where(by_column > 0, by_column / num_rows, 1))
    halves = jnp.round(2 * octaves).astype(jnp.int32)
    columns = jnp.clip(_ONE + halves, 1, NUM_COLUMN_CLASSES - 1)
    columns = jnp.where(by_column > 0, columns, 0).astype(jnp.uint8)
    plane = Plane(codes, rows, columns, _period(rows), jnp.zeros_like(columns))
    return dataclasses.replace(plane, signs=_sign_levels(tally(plane).signs))


def entropy_bits(matrix: jax.Array) -> jax.Array:
    """About how many bits a matrix takes, float32, to choose between two ways to send a tensor."""
    plane = classify(matrix)
    answers = tally(plane).symbols
    rows = jnp.sum(plane.rows > 0, dtype=jnp.float32)
    signs = answers[0, 1].astype(jnp.float32)
    return jnp.sum(_entropy(answers)) + jnp.sum(signs) + ROW_BITS * rows


class Tally(NamedTuple):
    """How often each answer about the elements of a plane is given.

    Attributes:
      symbols: uint32 ``[questions, no and yes, contexts]``.
      signs: uint32 ``[2, n]``, the positive and the negative elements of each column.
    """

    symbols: jax.Array
    signs: jax.Array


def tally(plane: Plane) -> Tally:
    """Counts the elements of a plane of the device or of the host.

    Args:
      plane: its period and the levels of its signs do not matter.

    Returns:
      The numbers of answers.
    """
    codes = jnp.asarray(plane.codes)
    magnitudes = jnp.abs(codes)
    rows = _one_hot(plane.rows, NUM_ROW_CLASSES)
    columns = _one_hot(plane.columns, NUM_COLUMN_CLASSES).astype(jnp.uint32)
    # Sums along rows are exact in float32, those of their results in integers.
    dtype = _counting(ESCAPE * rows.shape[0])

    def by_row_class(numbers: jax.Array) -> jax.Array:
        """The sums over the rows of each class, ``[row classes, n]``."""
        return _product(rows.astype(dtype).T, numbers.astype(dtype))

    def two(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Those of two masks, at once where the float32 that holds both is exact."""
        base = rows.shape[0] + 1
        if base * base > _EXACT:
            return by_row_class(first), by_row_class(second)
        both = by_row_class(first + jnp.where(second, base, 0))
        return both % base, both // base

    def by_class(sums: jax.Array) -> jax.Array:
        """The sum over each pair of classes."""
        return jnp.sum(sums[:, :, None] * columns[None], axis=1, dtype=jnp.uint32)

    num_rows = jnp.sum(rows, axis=0, dtype=jnp.uint32)
    elements = num_rows[:, None] * jnp.sum(columns, axis=0, dtype=jnp.uint32)[None]
    some, negative = two(magnitudes >= 1, codes < 0)
    above_one, escaped = map(by_class, two(magnitudes >= 2, magnitudes >= ESCAPE))
    above_zero = by_class(some)
    more = by_class(by_row_class(jnp.clip(magnitudes - 2, 0, ESCAPE - 2)))
    pairs = jnp.stack(
        [
            jnp.stack([elements - above_zero, above_zero]),
            jnp.stack([above_zero - above_one, above_one]),
            jnp.stack([above_one - escaped, more]),
        ]
    )
    width = NUM_COLUMN_CLASSES - 1
    found = jnp.zeros((NUM_QUESTIONS, 2, NUM_CONTEXTS), jnp.uint32)
    for row in range(NUM_ROW_CLASSES - 1):
        begin = ROW_STEP * row
        found = found.at[:, :, begin : begin + width].add(pairs[:, :, row])
    some, negative = (jnp.sum(x, axis=0, dtype=jnp.uint32) for x in (some, negative))
    return Tally(found, jnp.stack([some - negative, negative]))


def count_rows(plane: Plane) -> jax.Array:
    """How often each answer about a row is given: uint32 ``[questions, no and yes, above]``.

    Args:
      plane: of the device or of the host.

    Returns:
      The numbers of answers; zeros for a plane of zeros, which is not asked.
    """
    answers = _count_rows(jnp.asarray(plane.rows), jnp.asarray(plane.period, jnp.int32))
    return answers * holds_any(plane).astype(jnp.uint32)


def holds_any(plane: Plane) -> jax.Array:
    """Whether not all of a plane is zero."""
    return jnp.any(jnp.asarray(plane.columns) > 0)


def _count_rows(rows: jax.Array, period: jax.Array) -> jax.Array:
    """The answers about rows of these classes, uint32 ``[questions, no and yes, above]``."""
    has_above = (period > 0) & (jnp.arange(rows.size) >= period)
    above = jnp.where(has_above, jnp.roll(rows, period), NO_ROW)
    dtype = _counting(rows.size)
    contexts = above[:, None] == jnp.arange(NUM_ABOVE, dtype=above.dtype)[None]
    classes = rows[:, None] == jnp.arange(NUM_ROW_CLASSES, dtype=rows.dtype)[None]
    none, lower, middle, upper = _product(contexts.astype(dtype).T, classes.astype(dtype)).T
    some = lower + middle + upper
    return jnp.stack(
        [
            jnp.stack([none, some]),
            jnp.stack([middle, lower + upper]),
            jnp.stack([lower, upper]),
        ]
    )


def _period(rows: jax.Array) -> jax.Array:
    """The distance at which classes resemble each other most, if that saves bits."""
    longest = longest_period(rows.size)
    if not longest:
        return jnp.int32(0)
    centred = rows.astype(jnp.float32) - jnp.mean(rows.astype(jnp.float32))
    size = 1 << (rows.size + longest - 1).bit_length()
    likeness = jnp.fft.irfft(jnp.square(jnp.abs(jnp.fft.rfft(centred, size))), size)
    likely = likeness[SHORTEST_PERIOD : longest + 1]
    period = SHORTEST_PERIOD + jnp.argmax(likely).astype(jnp.int32)
    alone, repeated = (jnp.sum(_entropy(_count_rows(rows, x))) for x in (jnp.int32(0), period))
    return jnp.where(alone - repeated > _CHANCE_BITS, period, 0)


def _sign_levels(counts: jax.Array) -> jax.Array:
    """The level of each column's signs, where it saves more than it takes."""
    saved = jnp.sum(counts.astype(jnp.float32), axis=0) - _entropy(counts[None])[0]
    level = nearest_level(*counts.astype(jnp.float32))
    return jnp.where(saved > LEVEL_BITS, jnp.maximum(level, 1), 0).astype(jnp.uint8)


def _entropy(answers: jax.Array) -> jax.Array:
    """The bits of answers, float32 ``[questions, n]``, of ``[questions, no and yes, n]``."""
    counts = answers.astype(jnp.float32)
    share = counts / jnp.maximum(jnp.sum(counts, axis=1, keepdims=True), 1)
    return -jnp.sum(counts * jnp.log2(jnp.where(answers > 0, share, 1)), axis=1)


def _one_hot(classes: Any, num_classes: int) -> jax.Array:
    """``[elements, classes - 1]``: class 0 has no column."""
    return jnp.asarray(classes)[:, None] == jnp.arange(1, num_classes, dtype=jnp.uint8)[None]


def _counting(largest: int) -> jax.typing.DTypeLike:
    """A dtype that holds sums up to `largest` exactly, float32 where it can, which is faster."""
    return jnp.float32 if largest < _EXACT else jnp.uint32


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """The exact product of two matrices of whole numbers, uint32."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST).astype(jnp.uint32)
