"""Low rank, one step for the whole message, contexts and asymmetric numeral systems, in one codec.

    positions p = x / step                         step = relative step * rms of the whole message
    each matrix:  symbols of p, or symbols of the factors A, B of p ~ sum_k A_k B_k^T / s_k
    Q(x) = a * step * (what the symbols stand for),   a = |p|^2 / <p, what they stand for>

An error of a twelfth of a squared step in each factor costs as much as in each element, so one step
distributes the bits over all tensors as reverse water-filling does. Components with s_k < 2 steps
are left out. What symbols stand for is stretched by a until it is as long in the direction of x as
x itself: of messages that are averaged, errors cancel and a shrinkage does not.

With stochastic rounding a takes what symbols stand for in the mean: E A_k B_k^T is that of the
factors, since both are rounded independently, and only components that are left out are lost.

References:
  Cover, Thomas. Elements of information theory, section 10.3.3 (reverse water-filling).

  Vargaftik et al. EDEN: communication-efficient and robust distributed mean estimation for
  federated learning. ICML 2022, arXiv:2108.08842 (the unbiased scale a).

  See `low_rank` and `contexts`.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.compression import choices, low_rank
from fedjax_core.compression.alike import map_alike
from fedjax_core.compression.base import (
    Codec,
    Keys,
    Message,
    Report,
    Traits,
    keep_total,
    stateless,
)
from fedjax_core.compression.checks import check_given, choice, told, whole
from fedjax_core.compression.contexts import entropy_bits
from fedjax_core.compression.control import Control, fixed
from fedjax_core.compression.numerics import (
    divisor,
    finite,
    largest,
    narrow,
    ratio,
    round_stochastically,
    total,
    wide,
)
from fedjax_core.compression.planes import Planes, classified
from fedjax_core.compression.wire import check_tensors
from fedjax_core.errors import CodecError

Candidates = Literal["low_rank", "direct", "both", "ledger"]
FlagshipRounding = Literal["nearest", "stochastic"]

_MOST = float(jnp.finfo(jnp.float32).max)
# Symbols of larger magnitudes would not fit their codes.
_LARGEST = float(2**24)
# Components below so many steps are left out.
_SMALLEST_COMPONENT = 2.0
# So many bits are worth a squared step of error. The slope of 2^(-2R) at an error of 1 / 12 is half
# of it; where most symbols are zeros a bit removes only about half as much.
_BITS_PER_ERROR = 12 / math.log(2)
# A matrix has factors if they hold at most this part of its elements.
_MAX_SHARE = 0.5
# From so many rows or more it is judged how many bits a matrix takes.
_NUM_SAMPLED = 512
# All vectors are sent as one matrix of so many columns, with narrow matrices.
_WIDTH = 16
_FEW_COLUMNS = 4


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """How one floating tensor is sent.

    Attributes:
      shape: of the tensor.
      dtype: of the tensor.
      rank: of its factors; 0 if it has none.
      is_direct: whether its own symbols are sent.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    rank: int
    is_direct: bool

    @property
    def has_choice(self) -> bool:
        """Whether it may be sent in either way."""
        return self.rank > 0 and self.is_direct and not self.is_small

    @property
    def is_small(self) -> bool:
        """Whether it is sent with all other vectors, as one matrix."""
        return low_rank.matrix_shape(self.shape)[1] < _FEW_COLUMNS or len(self.shape) < 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Contents:
    """What a message holds.

    Attributes:
      scale: float32, what a symbol of 1 stands for.
      components: bfloat16 ``[rank]`` for each tensor with factors: singular values in steps.
      planes: the symbols: of each large tensor itself, then of its factors, and of all vectors.
      others: the leaves that are not floating, as they are.
      structure: static, of the value.
      tensors: static, one for each leaf; None for the others.
    """

    scale: Any
    components: tuple[Any, ...]
    planes: Planes | None
    others: tuple[Any, ...]
    structure: Any = dataclasses.field(metadata={"static": True})
    tensors: tuple[_Tensor | None, ...] = dataclasses.field(metadata={"static": True})


def flagship(
    step: float | Control = 4.0,
    *,
    rank: int = 16,
    candidates: Candidates = "both",
    rounding: FlagshipRounding = "nearest",
) -> Codec:
    """Sends all floating tensors with one step, large matrices by their factors of low rank.

    On updates of the FedAvg CNN a parameter takes about 0.05 bits at a step of 4 and 0.03 at 8. The
    step is the only knob: rank, dropped components and zeros follow from it.

    Take it for updates of networks with dense layers, whose rank is at most the number of a
    client's examples. It is of no use under secure sums, since its messages do not add, and behind
    a rotation, which spreads every matrix over all directions.

    Args:
      step: in root mean squares of the whole value, 1e-3 to 1e3, but no larger than its largest
        element; or what sets it from round to round: `target_rate`, `target_error` or `scheduled`.
      rank: how many components of a matrix are tried at most, 1 to 256.
      candidates: how large matrices are sent: ``"low_rank"``, which is very wrong for matrices that
        have no low rank; ``"direct"``; the better one of ``"both"``, which every sender finds for
        each matrix; or as the ``"ledger"`` of earlier rounds says, in which each way was tried: a
        sender then computes one of them, and tells what it cost, 32 bits for each matrix.
      rounding: of symbols. ``"nearest"`` loses least of one message, and what it loses, weak
        directions and tensors, is lost by all senders alike. ``"stochastic"``, by the sender's key,
        loses more at more bits, but what is left averages out; see "Accuracy against bits" in
        docs/compression.md.

    Returns:
      The codec. A value that holds a NaN, or a number that is infinite in float32, decodes to NaN
      everywhere.

    Raises:
      CodecError: an argument is out of range; a leaf to encode is not an array; hints are not
        those of the value.

    Example:
      >>> codec = flagship(1.0)
      >>> keys = Keys(jax.random.key(0), jax.random.key(1))
      >>> x = jnp.outer(jnp.sin(jnp.arange(400.0)), jnp.cos(jnp.arange(300.0)))
      >>> _, message = jax.jit(codec.encode)(keys, (), (), x)
      >>> lost = jnp.sum((codec.decode(keys, (), message) - x) ** 2) / jnp.sum(x**2)
      >>> int(jax.jit(codec.bits)(message)) / x.size < 0.05, bool(lost < 0.001)
      (True, True)
    """
    control = step if isinstance(step, Control) else fixed(step)
    own_rank = whole("rank", rank, 1, 256)
    choice("candidates", candidates, get_args(Candidates))
    choice("rounding", rounding, get_args(FlagshipRounding))

    learns = candidates == "ledger"
    options = "" if rank == 16 else f", rank={own_rank}"
    options += "" if candidates == "both" else f", candidates={candidates}"
    options += "" if rounding == "nearest" else f", rounding={rounding}"
    name = f"flagship({control.name}{options})"

    def init(template: Any) -> tuple[Any, Any]:
        check_tensors(template)
        tensors = [_describe(leaf, own_rank, candidates) for leaf in jax.tree.leaves(template)]
        num_choices = sum(t is not None and t.has_choice for t in tensors)
        return (control.init(), choices.init(num_choices) if learns else ()), ()

    def hints_of(server: tuple[Any, Any]) -> tuple[Any, Any]:
        step = () if control.step is None else control.step(server[0])
        return step, choices.current(server[1]) if learns else ()

    def encode(keys: Keys, memory: Any, hints: Any, value: Any) -> tuple[Any, Message]:
        if control.step is not None or learns:
            check_given("hints", name, hints, value)
            _check_hints(name, hints, jax.eval_shape(lambda: hints_of(init(value)[0])))
        given_step, is_low_rank = hints or ((), ())
        own_step: Any = float(control.name) if control.step is None else given_step
        chosen = _Chosen(own_rank, candidates, rounding == "stochastic", is_low_rank)
        contents, error, costs = _encode(keys, value, own_step, chosen)
        stats = (error if control.needs_error else (), costs if learns else ())
        return memory, Message(contents, stats=stats)

    def finish(key: jax.Array, server: Any, total: Any, report: Report) -> tuple[Any, Any]:
        num_elements = sum(x.size for x in jax.tree.leaves(total))
        error, costs = report.stats
        controlled = control.update(server[0], report._replace(stats=error), num_elements)
        learned = choices.update(server[1], costs, report.count) if learns else ()
        return keep_total(key, (controlled, learned), total, report)

    codec = stateless(
        name,
        Traits(),
        encode=lambda keys, value: Message(value),
        decode=lambda keys, message: _decode(message.payload),
    )._replace(encode=encode)
    if control.step is None and not learns:
        return codec
    return codec._replace(init=init, hints=hints_of, finish=finish)


def _check_hints(name: str, hints: Any, expected: Any) -> None:
    if isinstance(hints, tuple) and not hints:
        return
    if jax.tree.structure(hints) != jax.tree.structure(expected) or any(
        jnp.shape(x) != y.shape
        for x, y in zip(jax.tree.leaves(hints), jax.tree.leaves(expected), strict=True)
    ):
        raise CodecError(
            f"expected hints of {name} for this value, a step and a way for each of its matrices, "
            f"like {told(expected)}, got {told(hints)}; make them by `codec.hints(server)` with "
            "the server of `codec.init` of a value of these shapes."
        )


class _Chosen(NamedTuple):
    """How matrices are sent.

    Attributes:
      rank: of the factors.
      candidates: see `flagship`.
      is_stochastic: whether symbols are rounded so.
      is_low_rank: bool ``[matrices]`` with the candidates of a ledger.
    """

    rank: int
    candidates: str
    is_stochastic: bool
    is_low_rank: Any


def _encode(
    keys: Keys, value: Any, step: float | jax.Array, chosen: _Chosen
) -> tuple[_Contents, jax.Array, jax.Array]:
    """What a message holds, its squared error relative to the squared norm, and what ways cost."""
    check_tensors(value)
    leaves, structure = jax.tree.flatten(value)
    tensors = tuple(_describe(leaf, chosen.rank, chosen.candidates) for leaf in leaves)
    others = tuple(x for x, t in zip(leaves, tensors, strict=True) if t is None)
    floats = [wide(jnp.asarray(x)) for x, t in zip(leaves, tensors, strict=True) if t is not None]
    described = [t for t in tensors if t is not None]
    unit, is_finite = _unit(floats, step)
    positions = [jnp.clip(finite(ratio(x, unit)), -_LARGEST, _LARGEST) for x in floats]
    sent, costs = _sent(keys, described, positions, chosen)
    matrices = [codes for each in sent for codes in each.codes]
    components = [each.scales.astype(jnp.bfloat16) for each in sent if each.scales is not None]
    aligned = sum((each.aligned for each in sent), jnp.float32(0))
    squares = sum((each.squares for each in sent), jnp.float32(0))
    vectors = [jnp.ravel(p) for t, p in zip(described, positions, strict=True) if t.is_small]
    if vectors:
        p = jnp.concatenate(vectors)
        padded = jnp.pad(p, (0, -p.size % _WIDTH)).reshape(-1, _WIDTH)
        own = jax.random.fold_in(keys.client, len(floats)) if chosen.is_stochastic else ()
        all_vectors = _direct(_Random(keys.shared, own), padded)
        matrices += all_vectors.codes
        aligned, squares = aligned + all_vectors.aligned, squares + all_vectors.squares
    energy = sum((total(p * p) for p in positions), jnp.float32(0))
    stretch = jnp.where(aligned > 0, energy / divisor(aligned), 0)
    scale = jnp.where(is_finite, jnp.minimum(unit * stretch, _MOST), jnp.nan).astype(jnp.float32)
    planes = classified(matrices) if matrices else None
    # With <Q, x> = |x|^2 the error is |Q|^2 - |x|^2; what is empty has none.
    error = jnp.where(aligned > 0, stretch * stretch * squares / divisor(energy) - 1, 1)
    error = jnp.where(energy > 0, jnp.maximum(error, 0), jnp.where(unit > 0, 1, 0))
    error = jnp.where(is_finite, error, jnp.nan).astype(jnp.float32)
    contents = _Contents(scale, tuple(components), planes, others, structure, tensors)
    return contents, error, jnp.stack(costs) if costs else jnp.zeros(0)


def _decode(contents: _Contents) -> Any:
    planes = [] if contents.planes is None else [plane.codes for plane in contents.planes.planes]
    codes = iter([jnp.asarray(x).astype(jnp.float32) for x in planes])
    components = iter(jnp.asarray(x).astype(jnp.float32) for x in contents.components)
    large = [t for t in contents.tensors if t is not None and not t.is_small]
    direct, factors = [], []
    for tensor in large:
        direct.append(next(codes) if tensor.is_direct else ())
        held = tensor.rank > 0
        factors.append((next(codes), next(codes), next(components)) if held else ())
    matrices = iter(map_alike(_stands_for, direct, factors))
    vectors, begin = next(codes, jnp.zeros(0)).ravel(), 0
    others, found = iter(contents.others), []
    for tensor in contents.tensors:
        if tensor is None:
            found.append(next(others))
            continue
        if tensor.is_small:
            end = begin + math.prod(tensor.shape)
            value, begin = vectors[begin:end], end
        else:
            value = next(matrices)
        value = jnp.clip(jnp.asarray(contents.scale) * value, -_MOST, _MOST)
        found.append(narrow(value.reshape(tensor.shape), tensor.dtype))
    return jax.tree.unflatten(contents.structure, found)


def _stands_for(direct: Any, factors: Any) -> jax.Array:
    """The matrix of its own symbols, and of those of its factors; without any they are ()."""
    if not factors:
        return direct
    product = low_rank.product(low_rank.Factors(*factors))
    return product if isinstance(direct, tuple) else direct + product


class _Symbols(NamedTuple):
    """One way to send a matrix.

    Attributes:
      codes: int32, of the matrix, or of each of its factors.
      scales: of the factors, None without.
      aligned: <p, what the symbols stand for>, that of its mean where they are random.
      squares: |what the symbols stand for|^2.
    """

    codes: tuple[jax.Array, ...]
    scales: jax.Array | None
    aligned: jax.Array
    squares: jax.Array


def _sent(
    keys: Keys, tensors: list[_Tensor], positions: list[jax.Array], chosen: _Chosen
) -> tuple[list[_Symbols], list[jax.Array]]:
    """How all large tensors are sent, and what a ledger learns of it."""
    learns = chosen.candidates == "ledger"
    large = [index for index, tensor in enumerate(tensors) if not tensor.is_small]
    starts = [jax.random.fold_in(keys.shared, index) for index in large]
    owns: list[Any] = [
        jax.random.fold_in(keys.client, index) if chosen.is_stochastic else () for index in large
    ]
    matrices = [positions[i].reshape(low_rank.matrix_shape(tensors[i].shape)) for i in large]
    given = iter(chosen.is_low_rank)
    choices = [next(given) if learns and tensors[index].has_choice else () for index in large]

    def send(
        start: jax.Array, own: Any, p: jax.Array, is_low_rank: Any
    ) -> tuple[list[_Symbols], Any]:
        tensor = _describe(p, chosen.rank, chosen.candidates)
        assert tensor is not None, "a matrix holds floating numbers"
        if learns and tensor.has_choice:
            ways = _one_way(is_low_rank, _Random(start, own), tensor, p)
            return ways, sum(_cost(x) for x in ways) + jnp.sum(p * p)
        ways = _candidates(_Random(start, own), tensor, p)
        return _better(*ways) if len(ways) == 2 else ways, ()

    found = map_alike(send, starts, owns, matrices, choices)
    costs = [cost for _, cost in found if isinstance(cost, jax.Array)]
    return [each for ways, _ in found for each in ways], costs


class _Random(NamedTuple):
    """The randomness of one matrix.

    Attributes:
      start: of the search for its factors.
      own: of rounding; () for the nearest.
    """

    start: jax.Array
    own: Any


def _candidates(keys: _Random, tensor: _Tensor, p: jax.Array) -> list[_Symbols]:
    found = []
    if tensor.is_direct:
        found.append(_direct(keys, p))
    if tensor.rank:
        found.append(_low_rank(keys, p, tensor.rank))
    return found


def _direct(keys: _Random, p: jax.Array) -> _Symbols:
    codes = _rounded(keys.own, p)
    sent = codes.astype(p.dtype)
    aligned = total(p * _mean(keys.own, sent, p))
    return _Symbols((codes,), None, aligned, total(sent * sent))


def _low_rank(keys: _Random, p: jax.Array, rank: int) -> _Symbols:
    factors = low_rank.factorize(keys.start, p, rank)
    # As they are sent, so that their rounding costs nothing.
    scales = factors.scales.astype(jnp.bfloat16).astype(jnp.float32)
    scales = jnp.where(scales >= _SMALLEST_COMPONENT, scales, 0)
    left = factors.left * (low_rank.inverse(factors.scales) * scales)[None]
    right = jnp.where(scales[None] > 0, factors.right, 0)
    own_left, own_right = (
        jax.random.split(keys.own) if not isinstance(keys.own, tuple) else ((), ())
    )
    codes = _rounded(own_left, left), _rounded(own_right, right)
    shrunk = low_rank.inverse(scales)[None]
    sent_left, sent_right = codes[0] * shrunk, codes[1].astype(p.dtype)
    mean_left = _mean(own_left, sent_left, left * shrunk)
    mean_right = _mean(own_right, sent_right, right)
    aligned = total(low_rank.multiply(p.T, mean_left) * mean_right)
    grams = [low_rank.multiply(x.T, x) for x in (sent_left, sent_right)]
    return _Symbols(codes, scales, aligned, jnp.sum(grams[0] * grams[1]))


def _better(*sent: _Symbols) -> list[_Symbols]:
    """The ways to send a matrix, all but the best one with zeros in the place of symbols."""
    best = jnp.argmin(jnp.stack([_cost(x) for x in sent]))
    return [
        jax.tree.map(lambda x, is_best=best == index: jnp.where(is_best, x, 0), each)
        for index, each in enumerate(sent)
    ]


def _one_way(
    is_low_rank: jax.Array, keys: _Random, tensor: _Tensor, p: jax.Array
) -> list[_Symbols]:
    """Both ways to send a matrix, one of them with zeros in the place of symbols."""
    direct, factors = jax.eval_shape(lambda: tuple(_candidates(keys, tensor, p)))
    empty = [jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), x) for x in (direct, factors)]
    return jax.lax.cond(
        is_low_rank,
        lambda: [empty[0], _low_rank(keys, p, tensor.rank)],
        lambda: [_direct(keys, p), empty[1]],
    )


def _cost(sent: _Symbols) -> jax.Array:
    """The squared error, but for |p|^2, and what the bits are worth."""
    return sent.squares - 2 * sent.aligned + _expected_bits(sent.codes) / _BITS_PER_ERROR


def _expected_bits(matrices: tuple[jax.Array, ...]) -> jax.Array:
    """About the bits that symbols take, from some of the rows of a long matrix."""
    codes = jnp.concatenate(matrices)
    stride = max(codes.shape[0] // _NUM_SAMPLED, 1)
    return stride * entropy_bits(codes[::stride])


def _rounded(own: Any, p: jax.Array) -> jax.Array:
    """Symbols, rounded to the nearest without a key."""
    rounded = jnp.round(p) if isinstance(own, tuple) else round_stochastically(own, p)
    return rounded.astype(jnp.int32)


def _mean(own: Any, sent: jax.Array, meant: jax.Array) -> jax.Array:
    """The mean of what is sent over the keys of rounding; without one, what is sent."""
    return sent if isinstance(own, tuple) else meant


def _unit(tensors: list[jax.Array], step: float | jax.Array) -> tuple[jax.Array, jax.Array]:
    """The step in units of the value, and whether that is finite."""
    if not tensors:
        return jnp.float32(0), jnp.bool_(True)
    size = sum(x.size for x in tensors)
    most = jnp.max(jnp.stack([largest(jnp.abs(x)).astype(jnp.float32) for x in tensors]))
    scaled = [ratio(x.astype(jnp.float32), most) for x in tensors]
    squares = sum((total(x * x) for x in scaled), jnp.float32(0))
    # Something is always sent: the largest element is one step at least.
    unit = most * jnp.minimum(step * jnp.sqrt(squares / size), 1)
    return unit, jnp.isfinite(unit)


def _describe(leaf: Any, rank: int, candidates: str) -> _Tensor | None:
    """How a leaf is sent; None as it is."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or not math.prod(leaf.shape):
        return None
    shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
    rows, columns = low_rank.matrix_shape(shape)
    own_rank = min(rank, rows, columns)
    pays = own_rank * (rows + columns) <= _MAX_SHARE * rows * columns
    if candidates == "direct" or not pays:
        own_rank = 0
    return _Tensor(
        shape, dtype, own_rank, is_direct=not own_rank or candidates in ("both", "ledger")
    )
