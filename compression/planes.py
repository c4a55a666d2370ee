"""Matrices of symbols in one stream: what travels of `contexts`.

    bits:   which matrices hold anything; of each: which columns, their classes by differences in
            Elias gamma, the period, levels of signs; levels of rows, levels of the contexts in use
    coder:  the answers about rows, elements and signs, by asymmetric numeral systems
    bits:   signs as they are, what magnitudes have above 14

The coder takes what the probabilities promise and 40 bits, filled up with zeros, so that its size
follows from how often each answer is given.

References:
  Duda. Asymmetric numeral systems: entropy coding combining speed of Huffman coding with
  compression rate of arithmetic coding. 2013, arXiv:1311.2540.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.bits import BitCount
from fedjax_core.compression import contexts as model
from fedjax_core.compression import questions, rans
from fedjax_core.compression.alike import map_alike
from fedjax_core.compression.bitstreams import BitReader, BitWriter, altered
from fedjax_core.compression.contexts import NUM_ABOVE, NUM_CONTEXTS, Plane
from fedjax_core.compression.frequencies import whole_bits
from fedjax_core.compression.lengths import gamma_lengths, total, unzigzag, zigzag
from fedjax_core.compression.numerics import largest
from fedjax_core.compression.questions import ESCAPE, LEVEL_BITS, NUM_QUESTIONS
from fedjax_core.compression.universal import read_gammas, write_gammas
from fedjax_core.compression.wire import Packed, take
from fedjax_core.errors import CodecError

_NUM_BYTES_SIZE = 4
# The class to which that of the first column is compared.
_FIRST_CLASS = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Planes(Packed):
    """Matrices of symbols that share the probabilities of their contexts.

    Attributes:
      planes: one at least.
      levels: uint8 ``[contexts, questions]``, below 64: the probabilities of the answer yes.
      row_levels: uint8 ``[above, questions]``, those about rows.
    """

    planes: tuple[Plane, ...]
    levels: Any
    row_levels: Any

    @property
    def num_elements(self) -> int:
        """See `Packed`."""
        return sum(math.prod(plane.codes.shape) for plane in self.planes)

    def count(self) -> BitCount:
        """See `Packed`."""
        found = map_alike(_count_one, self.planes)
        symbols, rows, own, extra, heads, held = map(_sum, zip(*found, strict=True))
        used = _count(jnp.sum(jnp.sum(symbols[0], axis=0) > 0, dtype=jnp.uint32))
        fixed = len(self.planes) + NUM_ABOVE * NUM_QUESTIONS * LEVEL_BITS + NUM_CONTEXTS
        head = heads + BitCount.of(fixed) + used.times(NUM_QUESTIONS * LEVEL_BITS)
        # -log2 of the probability of each answer, rounded up.
        ideal = own + _ideal(symbols, jnp.asarray(self.levels).T)
        ideal = ideal + _ideal(rows, jnp.asarray(self.row_levels).T)
        state = whole_bits(ideal) + BitCount.of(rans.STATE_BITS)
        state = jax.tree.map(lambda word: jnp.where(held > 0, word, 0), state)
        parts = [head.whole_bytes(), state.whole_bytes(), extra.whole_bytes()]
        return sum(parts, BitCount.of(8 * (_NUM_BYTES_SIZE + 1)))

    def to_bytes(self) -> bytes:
        """See `Packed`."""
        everything = [jax.tree.map(np.asarray, plane) for plane in self.planes]
        levels, row_levels = np.asarray(self.levels), np.asarray(self.row_levels)
        held = np.array([plane.columns.any() for plane in everything])
        planes = [plane for plane, is_held in zip(everything, held, strict=True) if is_held]
        found = [_contexts(plane) for plane in planes]
        if any(np.any(p.codes[x < 0]) for p, x in zip(planes, found, strict=True)) or any(
            plane.codes.any() or plane.rows.any()
            for plane, is_held in zip(everything, held, strict=True)
            if not is_held
        ):
            raise CodecError(
                "expected zeros in rows and columns of class 0; the message was not made by its "
                "codec."
            )
        contexts = _joined([x[x >= 0] for x in found])
        magnitudes = _joined(
            [np.abs(p.codes[x >= 0].astype(np.int64)) for p, x in zip(planes, found, strict=True)]
        )
        used = np.bincount(contexts, minlength=NUM_CONTEXTS) > 0
        head = BitWriter()
        head.integers(held, 1)
        for plane in planes:
            _write_head(head, plane)
        head.integers(row_levels.ravel(), LEVEL_BITS)
        head.integers(used, 1)
        head.integers(levels[used].ravel(), LEVEL_BITS)

        def dialogue(order: int) -> questions.Writing:
            writing = questions.Writing()
            for plane in planes:
                questions.ask_rows(writing, plane.rows, int(plane.period), row_levels)
            questions.ask_magnitudes(writing, magnitudes, contexts, levels, order)
            for plane in planes:
                questions.ask_signs(writing, plane.codes < 0, plane.codes != 0, plane.signs)
            return writing

        first = dialogue(0)
        order, state = rans.in_some_order(
            lambda order: (dialogue(order) if order else first).state(), first.num_bytes
        )
        extra = BitWriter()
        for plane in planes:
            extra.integers(plane.codes[_is_plain(plane)] < 0, 1)
        questions.write_escaped(extra, magnitudes)
        middle = len(state).to_bytes(_NUM_BYTES_SIZE, "little") + bytes([order])
        return b"".join([head.to_bytes(), middle, state, extra.to_bytes()])

    def from_bytes(self, data: memoryview) -> tuple[Self, int]:
        """See `Packed`."""
        head = BitReader(data)
        held = np.flatnonzero(head.integers(len(self.planes), 1))
        planes = [_read_head(head, self.planes[index]) for index in held]
        row_levels = _read_levels(head, NUM_ABOVE)
        used = head.integers(NUM_CONTEXTS, 1) > 0
        levels = np.zeros((NUM_CONTEXTS, NUM_QUESTIONS), np.uint8)
        levels[used] = _read_levels(head, int(used.sum()))
        begin = head.finish()
        middle = take(data[begin:], _NUM_BYTES_SIZE + 1)
        num_bytes, order = int.from_bytes(middle[:_NUM_BYTES_SIZE], "little"), middle[-1]
        begin += len(middle)
        if order >= rans.NUM_ORDERS or (order and not planes):
            raise altered(f"one of {rans.NUM_ORDERS} orders")
        reading = questions.Reading(bytes(take(data[begin:], num_bytes)))
        begin += num_bytes

        for index, plane in enumerate(planes):
            rows = questions.ask_rows(reading, plane.rows, int(plane.period), row_levels)
            planes[index] = dataclasses.replace(plane, rows=rows)
        found = [_contexts(plane) for plane in planes]
        contexts = _joined([x[x >= 0] for x in found])
        if np.any(used != (np.bincount(contexts, minlength=NUM_CONTEXTS) > 0)):
            raise altered("a table of the contexts that occur")
        unknown = np.zeros(contexts.size, np.int64)
        magnitudes = questions.ask_magnitudes(reading, unknown, contexts, levels, order)
        planes = _filled(planes, found, magnitudes)
        negative = [
            questions.ask_signs(reading, plane.codes < 0, plane.codes != 0, plane.signs)
            for plane in planes
        ]
        reading.finish()

        extra = BitReader(data[begin:])
        for plane, is_negative in zip(planes, negative, strict=True):
            is_plain = _is_plain(plane)
            is_negative[is_plain] = extra.integers(int(is_plain.sum()), 1) > 0
        planes = _filled(planes, found, questions.read_escaped(extra, magnitudes))
        begin += extra.finish()
        everything = [_zeros(plane) for plane in self.planes]
        for index, plane, is_negative in zip(held, planes, negative, strict=True):
            codes = np.where(is_negative, -plane.codes, plane.codes)
            everything[index] = dataclasses.replace(plane, codes=codes)
        result = dataclasses.replace(
            self, planes=tuple(everything), levels=levels, row_levels=row_levels
        )
        return result, begin


def classified(matrices: list[jax.Array]) -> Planes:
    """Matrices of symbols with the contexts and probabilities that fit them.

    Args:
      matrices: int32 ``[m, n]`` each, magnitudes below 2**30.

    Returns:
      What a message holds of them.

    Example:
      >>> planes = classified([jnp.array([[0, 3], [0, 0]])])
      >>> int(planes.count()), len(planes.to_bytes())
      (272, 34)
    """

    def answers(matrix: jax.Array) -> tuple[Plane, jax.Array, jax.Array]:
        plane = model.classify(matrix)
        found = plane, model.tally(plane).symbols, model.count_rows(plane)
        return dataclasses.replace(plane, codes=()), *found[1:]

    found = map_alike(functools.partial(_unless_zero, answers), matrices)
    heads, symbols, rows = zip(*found, strict=True)
    planes = tuple(
        dataclasses.replace(head, codes=codes) for head, codes in zip(heads, matrices, strict=True)
    )
    return Planes(planes, _levels(_sum(symbols)), _levels(_sum(rows)))


def _unless_zero(function: Callable[[jax.Array], Any], matrix: jax.Array) -> Any:
    """What a function makes of a matrix; zeros, sooner, of a matrix of zeros."""
    is_zero = largest(jnp.abs(matrix)) == 0
    return jax.lax.cond(is_zero, functools.partial(_zeros_like, function), function, matrix)


def _zeros_like(function: Callable[[Any], Any], argument: Any) -> Any:
    shapes = jax.eval_shape(function, argument)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _levels(answers: jax.Array) -> jax.Array:
    """The levels nearest to how often the answer is yes: uint8 ``[contexts, questions]``.

    They are 0 where a context does not occur.
    """
    no, yes = answers[:, 0].astype(jnp.float32), answers[:, 1].astype(jnp.float32)
    is_used = jnp.sum(answers[0], axis=0) > 0
    return jnp.where(is_used[None], questions.nearest_level(no, yes), 0).T


class _Counted(NamedTuple):
    """What is counted of a plane.

    Attributes:
      symbols: how often each answer about an element is given, see `contexts`.
      rows: about a row.
      signs: the bits of signs that are coded.
      plain: of what stands as it is.
      head: of how the plane is coded.
      is_held: 1 if it holds anything.
    """

    symbols: jax.Array
    rows: jax.Array
    signs: BitCount
    plain: BitCount
    head: BitCount
    is_held: jax.Array


def _count_one(plane: Plane) -> _Counted:
    plane = jax.tree.map(jnp.asarray, plane)
    empty = functools.partial(_zeros_like, _count_held)
    return jax.lax.cond(model.holds_any(plane), _count_held, empty, plane)


def _count_held(plane: Plane) -> _Counted:
    found = model.tally(plane)
    has_level = jnp.asarray(plane.signs) > 0
    coded = jnp.where(has_level[None], found.signs, 0)
    plain = jnp.where(has_level, 0, jnp.sum(found.signs, axis=0))
    return _Counted(
        found.symbols,
        model.count_rows(plane),
        _ideal(coded[None], jnp.asarray(plane.signs)[None]),
        total(plain) + _escaped_bits(plane.codes),
        _head_bits(plane),
        model.holds_any(plane).astype(jnp.uint32),
    )


def _ideal(answers: jax.Array, levels: jax.Array) -> BitCount:
    """The sum of -log2 of probabilities, in units of 2**-32.

    Args:
      answers: ``[questions, no and yes, n]``.
      levels: ``[questions, n]``.

    Returns:
      A scalar.
    """
    high, low = (jnp.asarray(words)[levels].swapaxes(1, 2) for words in questions.costs())
    return BitCount(jnp.ravel(high), jnp.ravel(low)).times(jnp.ravel(answers)).sum()


def _head_bits(plane: Plane) -> BitCount:
    """What the bits take that say how a plane is coded."""
    columns, signs = jnp.asarray(plane.columns), jnp.asarray(plane.signs)
    is_live = columns > 0
    # The class of the last column before each that is live.
    index = jnp.where(is_live, jnp.arange(columns.size), -1)
    last = jnp.concatenate([jnp.full(1, -1, index.dtype), jax.lax.cummax(index)[:-1]])
    before = jnp.where(last >= 0, columns[jnp.maximum(last, 0)].astype(jnp.int32), _FIRST_CLASS)
    lengths = gamma_lengths(zigzag(columns.astype(jnp.int32) - before) + 1)
    each = lengths + 1 + jnp.where(signs > 0, jnp.uint32(LEVEL_BITS), 0)
    bits = total(jnp.where(is_live, each, 0)) + BitCount.of(columns.size + model.PERIOD_BITS)
    return jax.tree.map(lambda word: jnp.where(model.holds_any(plane), word, 0), bits)


def _write_head(writer: BitWriter, plane: Plane) -> None:
    """Appends how a plane that holds anything is coded."""
    is_live = plane.columns > 0
    writer.integers(is_live, 1)
    classes = plane.columns[is_live].astype(np.int64)
    steps = np.diff(classes, prepend=_FIRST_CLASS)
    write_gammas(writer, np.where(steps < 0, -2 * steps - 1, 2 * steps) + 1)
    writer.integers(np.array([plane.period]), model.PERIOD_BITS)
    signs = plane.signs[is_live]
    writer.integers(signs > 0, 1)
    writer.integers(signs[signs > 0], LEVEL_BITS)


def _read_head(reader: BitReader, like: Plane) -> Plane:
    """A plane of which the rows and the codes are not yet known."""
    num_rows, num_columns = like.codes.shape
    is_live = reader.integers(num_columns, 1) > 0
    num_live = int(is_live.sum())
    # The difference of two classes takes at most so many bits.
    steps = unzigzag(read_gammas(reader, num_live, model.COLUMN_BITS + 2) - 1)
    classes = _FIRST_CLASS + np.cumsum(steps)
    if not num_live or classes.min() < 1 or classes.max() >= model.NUM_COLUMN_CLASSES:
        raise altered(f"columns of classes below {model.NUM_COLUMN_CLASSES}")
    period = int(reader.integers(1, model.PERIOD_BITS)[0])
    if period and not model.SHORTEST_PERIOD <= period <= model.longest_period(num_rows):
        raise altered("a period of the rows")
    has_level = reader.integers(num_live, 1) > 0
    found = reader.integers(int(has_level.sum()), LEVEL_BITS)
    if not found.all():
        raise altered("levels of signs above 0")
    levels = np.zeros(num_live, np.uint8)
    levels[has_level] = found
    columns, signs = np.zeros((2, num_columns), np.uint8)
    columns[is_live], signs[is_live] = classes, levels
    return dataclasses.replace(_zeros(like), columns=columns, period=np.int32(period), signs=signs)


def _read_levels(reader: BitReader, count: int) -> np.ndarray:
    """uint8 ``[count, questions]``."""
    found = reader.integers(count * NUM_QUESTIONS, LEVEL_BITS)
    return found.reshape(-1, NUM_QUESTIONS).astype(np.uint8)


def _zeros(like: Plane) -> Plane:
    """A plane of the same shapes, NumPy's, that holds nothing."""
    shapes = {f.name: np.shape(getattr(like, f.name)) for f in dataclasses.fields(like)}
    dtypes = {"codes": np.int32, "period": np.int32}
    return Plane(**{k: np.zeros(v, dtypes.get(k, np.uint8)) for k, v in shapes.items()})


def _is_plain(plane: Plane) -> np.ndarray:
    """Whose signs are bits as they are."""
    return (plane.codes != 0) & (plane.signs == 0)[None]


def _escaped_bits(codes: Any) -> BitCount:
    def count(above: jax.Array) -> BitCount:
        lengths = jnp.where(above > 0, gamma_lengths(jnp.maximum(above, 1)), 0)
        # Less than 2**6 bits an element: those of a row fit a word.
        return total(jnp.sum(lengths, axis=1, dtype=jnp.uint32))

    above = jnp.maximum(jnp.abs(jnp.asarray(codes)) - (ESCAPE - 1), 0).astype(jnp.uint32)
    return _unless_zero(count, above)


def _contexts(plane: Plane) -> np.ndarray:
    """The context of each element, int8 ``[m, n]``; -1 if it has none."""
    rows, columns = (np.asarray(x).astype(np.int8) for x in (plane.rows, plane.columns))
    found = model.ROW_STEP * (rows[:, None] - 1) + (columns[None, :] - 1)
    return np.where((rows[:, None] > 0) & (columns[None, :] > 0), found, -1)


def _filled(planes: list[Plane], found: list[np.ndarray], codes: np.ndarray) -> list[Plane]:
    """The planes with the codes of all elements that have a context."""
    ends = np.cumsum([np.count_nonzero(x >= 0) for x in found])
    filled = []
    for plane, own, part in zip(planes, found, np.split(codes, ends)[:-1], strict=True):
        matrix = np.zeros(own.shape, np.int32)
        matrix[own >= 0] = part
        filled.append(dataclasses.replace(plane, codes=matrix))
    return filled


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _count(number: jax.Array) -> BitCount:
    return BitCount(jnp.zeros_like(number), number)


def _sum(parts: Iterable[Any]) -> Any:
    return functools.reduce(operator.add, parts)
