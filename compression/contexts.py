"""Symbols of matrices in one code: what an element is likely to be follows from its row and column.

The updates of networks are uneven: whole rows are zero (pixels that are never lit, units that are
never active), and columns differ by orders of magnitude. So each row of a matrix is in one of four
classes by its mean magnitude, each column in one of 32, and together they name a context:

    context = column class + 4 * row class

In each context a symbol is the answers to up to 15 questions, each with a probability that is sent:
is it not zero; is its magnitude above 1; is it above 2, 3, ... 14 (these share one probability).
Signs are bits as they are, and so is what a magnitude has above 14, in Elias gamma. All answers of
a message go through one coder, by asymmetric numeral systems; its size follows from how often each
answer is given, which is counted on the device by small matrix products.

References:
  Marpe, Schwarz, Wiegand. Context-based adaptive binary arithmetic coding in the H.264/AVC video
  compression standard. IEEE Transactions on Circuits and Systems for Video Technology 13(7), 2003
  (the questions).

  Wiedemann et al. DeepCABAC: a universal compression algorithm for deep neural networks. IEEE
  Journal of Selected Topics in Signal Processing 14(4), 2020, arXiv:1907.11900.

  Duda. Asymmetric numeral systems: entropy coding combining speed of Huffman coding with
  compression rate of arithmetic coding. 2013, arXiv:1311.2540.
"""

import dataclasses
import functools
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.bits import BitCount
from fedjax_core.compression import questions, rans
from fedjax_core.compression.bitstreams import BitReader, BitWriter, altered
from fedjax_core.compression.coding import Coded
from fedjax_core.compression.frequencies import information, whole_bits
from fedjax_core.compression.lengths import gamma_lengths, total
from fedjax_core.compression.questions import ESCAPE, LEVEL_BITS, NUM_QUESTIONS
from fedjax_core.compression.statistical import Ans
from fedjax_core.compression.wire import Packed, Symbols, take
from fedjax_core.errors import CodecError

_ROW_BITS, _COLUMN_BITS = 2, 5
_NUM_ROW_CLASSES, _NUM_COLUMN_CLASSES = 1 << _ROW_BITS, 1 << _COLUMN_BITS
_ROW_STEP = 4  # two octaves, in half octaves
# Rows and columns of class 0 hold zeros only, and have no context.
NUM_CONTEXTS = _NUM_COLUMN_CLASSES - 1 + _ROW_STEP * (_NUM_ROW_CLASSES - 2)
# The column class of a mean magnitude of 1.
_ONE = 21
# Below this, float32 counts exactly.
_EXACT = 1 << 24
_NUM_BYTES_SIZE = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plane:
    """A matrix of symbols, with the classes of its rows and columns.

    Attributes:
      codes: int32 ``[m, n]``, magnitudes below 2**30.
      rows: uint8 ``[m]``, 0 to 3; 0 only for rows of zeros.
      columns: uint8 ``[n]``, 0 to 31; 0 only for columns of zeros.
    """

    codes: Any
    rows: Any
    columns: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Planes(Packed):
    """Matrices of symbols that share the probabilities of their contexts.

    Attributes:
      planes: one at least.
      levels: uint8 ``[contexts, questions]``, below 64: the probabilities of the answer yes.
    """

    planes: tuple[Plane, ...]
    levels: Any

    @property
    def num_elements(self) -> int:
        """See `Packed`."""
        return sum(math.prod(plane.codes.shape) for plane in self.planes)

    def count(self) -> BitCount:
        """See `Packed`."""
        answers = _sum([_answers(plane) for plane in self.planes])
        num_used = jnp.sum(jnp.sum(answers[0], axis=0) > 0, dtype=jnp.uint32)
        table = _count(num_used).times(NUM_QUESTIONS * LEVEL_BITS) + BitCount.of(NUM_CONTEXTS)
        state = _ideal(answers, jnp.asarray(self.levels)) + BitCount.of(rans.STATE_BITS)
        state = jax.tree.map(lambda word: jnp.where(num_used > 0, word, 0), state)
        extra = _count(jnp.sum(answers[0, 1], dtype=jnp.uint32))
        for plane in self.planes:
            extra = extra + _escaped_bits(plane.codes)
        parts = [table.whole_bytes(), state.whole_bytes(), extra.whole_bytes()]
        classes = [leaf.count() for plane in self.planes for leaf in _classes(plane)]
        return sum([*classes, *parts], BitCount.of(8 * (_NUM_BYTES_SIZE + 1)))

    def to_bytes(self) -> bytes:
        """See `Packed`."""
        planes = [jax.tree.map(np.asarray, plane) for plane in self.planes]
        elements = [_coded_elements(plane) for plane in planes]
        contexts, codes = (np.concatenate(parts) for parts in zip(*elements, strict=True))
        magnitudes, levels = np.abs(codes), np.asarray(self.levels)
        used = np.bincount(contexts, minlength=NUM_CONTEXTS) > 0
        table = BitWriter()
        table.integers(used, 1)
        table.integers(levels[used].ravel(), LEVEL_BITS)
        order, state = questions.encode(contexts, magnitudes, levels, self._state_bytes(planes))
        extra = BitWriter()
        extra.integers(codes[codes != 0] < 0, 1)
        questions.write_escaped(extra, magnitudes)
        head = len(state).to_bytes(_NUM_BYTES_SIZE, "little") + bytes([order])
        classes = b"".join(leaf.to_bytes() for plane in planes for leaf in _classes(plane))
        return b"".join([classes, table.to_bytes(), head, state, extra.to_bytes()])

    def from_bytes(self, data: memoryview) -> tuple[Self, int]:
        """See `Packed`."""
        planes, begin = [], 0
        for plane in self.planes:
            read = []
            for leaf in _classes(plane):
                found, used = leaf.from_bytes(data[begin:])
                read.append(np.asarray(found.symbols.codes))
                begin += used
            planes.append(dataclasses.replace(plane, rows=read[0], columns=read[1]))
        found = [_contexts(plane) for plane in planes]
        contexts = np.concatenate([x.ravel()[x.ravel() >= 0] for x in found])
        table = BitReader(data[begin:])
        used = table.integers(NUM_CONTEXTS, 1) > 0
        if np.any(used != (np.bincount(contexts, minlength=NUM_CONTEXTS) > 0)):
            raise altered("a table of the contexts that occur")
        levels = np.zeros((NUM_CONTEXTS, NUM_QUESTIONS), np.uint8)
        numbers = table.integers(NUM_QUESTIONS * int(used.sum()), LEVEL_BITS)
        levels[used] = numbers.reshape(-1, NUM_QUESTIONS)
        begin += table.finish()
        head = take(data[begin:], _NUM_BYTES_SIZE + 1)
        num_bytes, order = int.from_bytes(head[:_NUM_BYTES_SIZE], "little"), head[-1]
        begin += len(head)
        state = bytes(take(data[begin:], num_bytes))
        magnitudes = questions.decode(contexts, levels, state, order)
        begin += num_bytes
        extra = BitReader(data[begin:])
        signs = extra.integers(int(np.count_nonzero(magnitudes)), 1).astype(np.int64)
        magnitudes = questions.read_escaped(extra, magnitudes)
        codes = magnitudes
        codes[magnitudes > 0] *= 1 - 2 * signs
        begin += extra.finish()
        ends = np.cumsum([np.count_nonzero(x >= 0) for x in found])
        filled = []
        for plane, own, part in zip(planes, found, np.split(codes, ends[:-1]), strict=True):
            matrix = np.zeros(own.shape, np.int32)
            matrix[own >= 0] = part
            filled.append(dataclasses.replace(plane, codes=matrix))
        result = dataclasses.replace(self, planes=tuple(filled), levels=levels)
        if result._state_bytes(filled) != num_bytes:
            raise altered("as many bytes as the answers take")
        return result, begin

    def _state_bytes(self, planes: list[Plane]) -> int:
        """The size of the coder's state."""
        ideal, num_coded = _measured(tuple(planes), np.asarray(self.levels))
        return -(-(int(ideal) + rans.STATE_BITS) // 8) if int(num_coded) else 0


def classified(matrices: list[jax.Array]) -> Planes:
    """Matrices of symbols with the classes and probabilities that fit them.

    Args:
      matrices: int32 ``[m, n]`` each, magnitudes below 2**30.

    Returns:
      What a message holds of them.

    Example:
      >>> planes = classified([jnp.array([[0, 3], [0, 0]])])
      >>> planes.planes[0].rows.tolist(), planes.planes[0].columns.tolist()
      ([2, 0], [0, 24])
    """
    planes = tuple(_classify(matrix) for matrix in matrices)
    return Planes(planes, _levels(_sum([_answers(plane) for plane in planes])))


def entropy_bits(matrix: jax.Array) -> jax.Array:
    """About how many bits a matrix takes, float32, to choose between two ways to send a tensor."""
    plane = _classify(matrix)
    answers = _answers(plane).astype(jnp.float32)
    asked = jnp.sum(answers, axis=1, keepdims=True)
    share = answers / jnp.maximum(asked, 1)
    information = -answers * jnp.log2(jnp.where(answers > 0, share, 1))
    rows = jnp.sum(plane.rows > 0, dtype=jnp.float32)
    return jnp.sum(information) + jnp.sum(answers[0, 1]) + _ROW_BITS * rows


def _classify(codes: jax.Array) -> Plane:
    magnitudes = jnp.abs(codes).astype(jnp.float32)
    by_row, by_column = jnp.sum(magnitudes, axis=1), jnp.sum(magnitudes, axis=0)
    num_rows = jnp.maximum(jnp.sum(by_row > 0), 1)
    mean = jnp.sum(by_row) / num_rows
    # About the mean row; two octaves up and down.
    relative = jnp.round(jnp.log2(jnp.where(by_row > 0, by_row / mean, 1)) / 2).astype(jnp.int32)
    rows = jnp.clip(2 + relative, 1, _NUM_ROW_CLASSES - 1)
    octaves = jnp.log2(jnp.where(by_column > 0, by_column / num_rows, 1))
    halves = jnp.round(2 * octaves).astype(jnp.int32)
    columns = jnp.clip(_ONE + halves, 1, _NUM_COLUMN_CLASSES - 1)
    return Plane(
        codes,
        jnp.where(by_row > 0, rows, 0).astype(jnp.uint8),
        jnp.where(by_column > 0, columns, 0).astype(jnp.uint8),
    )


def _answers(plane: Plane) -> jax.Array:
    """How often each answer is given: uint32 ``[questions, no and yes, contexts]``."""
    magnitudes = jnp.abs(jnp.asarray(plane.codes))
    rows = _one_hot(plane.rows, _NUM_ROW_CLASSES)
    columns = _one_hot(plane.columns, _NUM_COLUMN_CLASSES).astype(jnp.uint32)
    # Sums along rows are exact in float32, those of their results in integers.
    is_exact = ESCAPE * rows.shape[0] < _EXACT
    dtype = jnp.float32 if is_exact else jnp.uint32

    def by_class(numbers: jax.Array) -> jax.Array:
        """The sum over each pair of classes."""
        in_rows = jnp.matmul(
            rows.astype(dtype).T, numbers.astype(dtype), precision=jax.lax.Precision.HIGHEST
        )
        return jnp.sum(in_rows.astype(jnp.uint32)[:, :, None] * columns[None], axis=1)

    num_rows = jnp.sum(rows.astype(jnp.uint32), axis=0)
    elements = num_rows[:, None] * jnp.sum(columns, axis=0)[None]
    above_zero, above_one, escaped = (by_class(magnitudes >= least) for least in (1, 2, ESCAPE))
    more = by_class(jnp.clip(magnitudes - 2, 0, ESCAPE - 2))
    pairs = jnp.stack(
        [
            jnp.stack([elements - above_zero, above_zero]),
            jnp.stack([above_zero - above_one, above_one]),
            jnp.stack([above_one - escaped, more]),
        ]
    )
    shifts = range(_NUM_ROW_CLASSES - 1)
    width = _NUM_COLUMN_CLASSES - 1
    found = jnp.zeros((NUM_QUESTIONS, 2, NUM_CONTEXTS), jnp.uint32)
    for row in shifts:
        begin = _ROW_STEP * row
        found = found.at[:, :, begin : begin + width].add(pairs[:, :, row])
    return found


def _one_hot(classes: Any, num_classes: int) -> jax.Array:
    """``[elements, classes - 1]``: class 0 has no column."""
    return jnp.asarray(classes)[:, None] == jnp.arange(1, num_classes, dtype=jnp.uint8)[None]


def _levels(answers: jax.Array) -> jax.Array:
    """The levels nearest to how often the answer is yes: uint8 ``[contexts, questions]``.

    They are 0 where a context does not occur.
    """
    no, yes = answers[:, 0].astype(jnp.float32), answers[:, 1].astype(jnp.float32)
    is_used = jnp.sum(answers[0], axis=0) > 0
    return jnp.where(is_used[None], questions.nearest_level(no, yes), 0).T


def _ideal(answers: jax.Array, levels: jax.Array) -> BitCount:
    """The sum of -log2 of the probability of each answer, rounded up."""
    high, low = (jnp.asarray(words)[levels.T].swapaxes(1, 2) for words in _costs())
    # [questions, no and yes, contexts], as the answers are.
    exact = BitCount(jnp.ravel(high), jnp.ravel(low)).times(jnp.ravel(answers)).sum()
    return whole_bits(exact)


@functools.cache
def _costs() -> tuple[np.ndarray, np.ndarray]:
    """Of no and yes at each level: two words ``[levels, 2]``."""
    table = questions.frequencies()
    high, low = information(table.ravel(), questions.PRECISION)
    return high.reshape(table.shape), low.reshape(table.shape)


@jax.jit
def _measured(planes: tuple[Plane, ...], levels: Any) -> tuple[BitCount, jax.Array]:
    """The ideal bits of all answers, and how many elements are coded."""
    answers = _sum([_answers(plane) for plane in planes])
    return _ideal(answers, levels), jnp.sum(answers[0], dtype=jnp.uint32)


def _escaped_bits(codes: Any) -> BitCount:
    above = jnp.maximum(jnp.abs(jnp.asarray(codes)) - (ESCAPE - 1), 0).astype(jnp.uint32)
    lengths = jnp.where(above > 0, gamma_lengths(jnp.maximum(above, 1)), 0)
    # Less than 2**6 bits an element: those of a row fit a word.
    return total(jnp.sum(lengths, axis=1, dtype=jnp.uint32))


def _classes(plane: Plane) -> tuple[Coded, Coded]:
    """What travels of the classes."""
    dtype = np.dtype(np.uint8)
    return (
        Coded(Symbols(plane.rows, _ROW_BITS, dtype), Ans()),
        Coded(Symbols(plane.columns, _COLUMN_BITS, dtype), Ans()),
    )


def _contexts(plane: Plane) -> np.ndarray:
    """The context of each element, int8 ``[m, n]``; -1 if it has none."""
    rows, columns = (np.asarray(x).astype(np.int8) for x in (plane.rows, plane.columns))
    found = _ROW_STEP * (rows[:, None] - 1) + (columns[None, :] - 1)
    return np.where((rows[:, None] > 0) & (columns[None, :] > 0), found, -1)


def _coded_elements(plane: Plane) -> tuple[np.ndarray, np.ndarray]:
    """The contexts and the codes of the elements that have a context."""
    contexts = _contexts(plane)
    is_coded = contexts >= 0
    if np.any(np.asarray(plane.codes)[~is_coded]):
        raise CodecError(
            "expected zeros in rows and columns of class 0; the message was not made by its codec."
        )
    return contexts[is_coded], np.asarray(plane.codes)[is_coded].astype(np.int64)


def _count(number: jax.Array) -> BitCount:
    return BitCount(jnp.zeros_like(number), number)


def _sum(parts: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)
