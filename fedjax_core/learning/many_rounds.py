"""Many rounds in one compiled program: the host sends which clients, and nothing else.

    for each dispatch:   clients[r] = sampler(round + r)            on the host, a few numbers each
                         for r < count (traced): state = update(state, clients[r])   on the device

JAX returns from a dispatch before the device is done, so that the host draws the clients of the
next one, and gathers their examples where these are not on the device, while this one computes.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_core.datasets.cohort import (
    Cohort,
    bytes_per_row,
    gather_rows,
    next_power_of_two,
    slice_rows,
)
from fedjax_core.datasets.federated import FederatedDataset
from fedjax_core.datasets.resident import DeviceDataset
from fedjax_core.errors import ArgumentError, DataError, FederatedTypeError, noted
from fedjax_core.execution.compiling import jit
from fedjax_core.learning.interrupts import deferred_interrupt
from fedjax_core.memory import check_fits

# What the examples of one dispatch may take where they are sent along with it.
_BYTES_PER_DISPATCH = 1 << 28

_ROUNDS_PER_DISPATCH = 64

# One computes, and the next waits: enough to keep the device busy.
_DISPATCHES_IN_FLIGHT = 2


class Chunk(NamedTuple):
    """The clients of the rounds of one dispatch, each ``[rounds, clients, ...]``; see `Cohort`."""

    start: Any
    length: Any
    uid: Any
    index: Any
    valid: Any


def make_many(
    update: Callable[[Any, Cohort], tuple[Any, Any]], options: Callable[[], dict[str, Any]]
) -> Callable[..., tuple[Any, Any]]:
    """The compiled function of many rounds.

    Args:
      update: `(state, cohort) -> (state, metrics)`, one round.
      options: of the compiler, see `compiling.jit`.

    Returns:
      `(state, examples, chunk, count, capacity) -> (state, metrics)`: the first `count` rounds of
      the chunk. Metrics have a leading axis of rounds, zeros past `count`. The state is donated.
    """

    def many(state: Any, examples: Any, chunk: Chunk, count: Any, capacity: int) -> tuple[Any, Any]:
        def cohort(r: Any) -> Cohort:
            start, length, uid, index, valid = (x[r] for x in chunk)
            return Cohort(examples, start, length, uid, index, valid, capacity)

        shapes = jax.eval_shape(lambda: update(state, cohort(0)))[1]
        num_rounds = chunk.start.shape[0]
        start = jax.tree.map(lambda x: _zero_rows(num_rounds, x), shapes)

        def one(r: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            state, rows = carry
            state, metrics = update(state, cohort(r))
            put = lambda row, x: lax.dynamic_update_index_in_dim(row, x, r, 0)  # noqa: E731
            return state, jax.tree.map(put, rows, metrics)

        return lax.fori_loop(0, count, one, (state, start))

    return jit(many, options, static_argnames="capacity", donate_argnums=0)


def _zero_rows(num_rows: int, like: jax.ShapeDtypeStruct) -> jax.Array:
    """``[num_rows, ...]``, on the mesh that `like` is on: with Explicit axes it is in its type."""
    where = like.sharding
    if isinstance(where, NamedSharding):
        where = NamedSharding(where.mesh, P(None, *where.spec))
    return jnp.zeros((num_rows, *like.shape), like.dtype, device=where)


def make_many_by_host(
    update: Callable[[Any, Cohort], tuple[Any, Any]],
) -> Callable[..., tuple[Any, Any]]:
    """As `make_many`, for rounds that the host drives, and that JAX cannot trace."""

    def many(state: Any, examples: Any, chunk: Chunk, count: int, capacity: int) -> tuple[Any, Any]:
        rows = []
        for r in range(max(int(count), 1)):  # without a round there are still metrics of a shape
            start, length, uid, index, valid = (x[r] for x in chunk)
            cohort = Cohort(examples, start, length, uid, index, valid, capacity)
            new, metrics = update(state, cohort)
            state = new if count else state
            rows.append(metrics)
        return state, jax.tree.map(lambda *xs: jnp.stack(xs), *rows)

    return many


class Source(NamedTuple):
    """Where the examples of many rounds come from.

    Attributes:
      dataset: in the memory of the host.
      examples: the features that the model takes, on the device or on the host.
      is_resident: whether they are on the device.
      capacity: static upper bound of a client's number of examples.
    """

    dataset: FederatedDataset
    examples: dict[str, Any]
    is_resident: bool
    capacity: int


def source_of(dataset: Any, names: Collection[str]) -> Source:
    """The features `names` of a dataset; it stays where it is.

    Raises:
      FederatedTypeError: for what is no dataset.
    """
    is_resident = isinstance(dataset, DeviceDataset)
    on_host = dataset.dataset if is_resident else dataset
    if not isinstance(on_host, FederatedDataset):
        raise FederatedTypeError(
            f"run: expected a FederatedDataset, or one on a device, got {type(dataset).__name__}; "
            "see fedjax_core.datasets."
        )
    examples = {name: x for name, x in dataset.examples.items() if name in names}
    capacity = next_power_of_two(int(on_host.num_examples.max()))
    return Source(on_host, examples, is_resident, capacity)


def run_rounds(
    many: Callable[..., tuple[Any, Any]],
    state: Any,
    source: Source,
    sampler: Callable[[int], Any],
    num_rounds: int,
    size: int | None,
) -> tuple[Any, Any]:
    """Runs rounds from the one that `state` is at.

    Args:
      many: made by `make_many`.
      state: gone afterwards.
      source: of the examples.
      sampler: from the number of a round to ids.
      num_rounds: how many.
      size: rounds of a dispatch; None leaves it to this function.

    Returns:
      The state, and the metrics of all rounds on the host, with a leading axis of rounds.
    """
    check_whole("num_rounds", num_rounds, least=0)
    if size is not None:
        check_whole("rounds_per_dispatch", size, least=1)
    first = int(jax.device_get(state.round))
    _check_last_round(first, num_rounds)
    draw = _drawer(sampler, source.dataset)
    size = size or _default_size(source, len(draw(first)))
    chunks = _Chunks(source, min(size, next_power_of_two(num_rounds)))
    done = []
    with deferred_interrupt() as stop:
        for begin in range(0, max(num_rounds, 1), size):
            if done and stop.is_set():
                break
            count = min(size, num_rounds - begin)
            if len(done) >= _DISPATCHES_IN_FLIGHT:
                jax.block_until_ready(done[-_DISPATCHES_IN_FLIGHT])
            drawn = [draw(first + begin + r) for r in range(max(count, 1))]
            examples, chunk = chunks.make(drawn)
            state, metrics = many(state, examples, chunk, np.int32(count), source.capacity)
            done.append((metrics, count))
        # Most of a run is spent here, where the host waits: Ctrl-C must not lose its rounds.
        return jax.block_until_ready(state), _joined(done)


def _joined(done: list[tuple[Any, int]]) -> Any:
    """The metrics of all dispatches, one after the other."""

    def concatenate(*rows: Any) -> np.ndarray:
        return np.concatenate([x[:count] for x, (_, count) in zip(rows, done, strict=True)])

    return jax.tree.map(concatenate, *jax.device_get([metrics for metrics, _ in done]))


def _drawer(sampler: Any, dataset: FederatedDataset) -> Callable[[int], np.ndarray]:
    """From the number of a round to the positions of its clients."""
    if not callable(sampler):
        raise FederatedTypeError(
            "run: expected `sampler` to be a function from the number of a round to client ids, "
            f"such as sampling.uniform(dataset, 10), got {type(sampler).__name__}."
        )
    ask: Callable[[int], Any] = sampler
    positions = getattr(sampler, "positions", None)
    if positions is None or not _numbers_alike(getattr(sampler, "dataset", dataset), dataset):
        positions = lambda number: dataset.positions(ask(number))  # noqa: E731
    draw: Callable[[int], np.ndarray] = positions

    def drawn(number: int) -> np.ndarray:
        with noted(f"This happened in round {number}."):
            return draw(number)

    return drawn


def _numbers_alike(one: Any, other: FederatedDataset) -> bool:
    """Whether a position means the same client in both datasets."""
    return one is other or getattr(one, "client_ids", None) == other.client_ids


def _default_size(source: Source, clients_per_round: int) -> int:
    """How many rounds a dispatch has, unless the user says."""
    if source.is_resident:
        return _ROUNDS_PER_DISPATCH
    dataset = source.dataset
    rows = clients_per_round * float(dataset.num_examples.mean())
    num_bytes = max(rows * bytes_per_row(source.examples), 1.0)
    return int(np.clip(_BYTES_PER_DISPATCH / num_bytes, 1, _ROUNDS_PER_DISPATCH))


class _Chunks:
    """Makes the chunks of a run, of as few different shapes as it can.

    Args:
      source: of the examples.
      num_rounds: of a chunk.
    """

    def __init__(self, source: Source, num_rounds: int) -> None:
        self._source = source
        self._num_rounds = num_rounds
        self._num_clients = 0
        self._num_rows = 1

    def make(self, drawn: Sequence[np.ndarray]) -> tuple[dict[str, Any], Chunk]:
        """The examples and the chunk of some rounds, at most those of a chunk.

        Args:
          drawn: for each round the positions of its clients in the dataset.
        """
        self._num_clients = self._grown(self._num_clients, max(map(len, drawn)))
        dataset = self._source.dataset
        slices = [dataset.slices_at(positions, self._num_clients) for positions in drawn]
        chunk = Chunk(*(self._stacked([getattr(s, f) for s in slices]) for f in Chunk._fields))
        if self._source.is_resident:
            return self._source.examples, _as_int32(chunk)
        return self._packed(chunk)

    def _packed(self, chunk: Chunk) -> tuple[dict[str, Any], Chunk]:
        """The rows of all clients of the chunk, one client after the other."""
        length = chunk.length.reshape(-1)
        num_rows = max(self._num_rows, next_power_of_two(int(length.sum(dtype=np.int64))))
        if num_rows > self._num_rows:
            self._check_rows(num_rows)
        self._num_rows = num_rows
        rows = slice_rows(chunk.start.reshape(-1), length)
        start = (np.cumsum(length, dtype=np.int64) - length).reshape(chunk.start.shape)
        examples = self._source.examples
        pool = {name: gather_rows(x, rows, self._num_rows) for name, x in examples.items()}
        return pool, _as_int32(chunk._replace(start=start))

    def _check_rows(self, num_rows: int) -> None:
        """Raises for more examples than a dispatch can be sent."""
        remedy = "use fewer rounds_per_dispatch, or fewer clients a round"
        if num_rows > 2**31:
            raise DataError(
                f"run: expected at most 2**31 examples in a dispatch, got {num_rows:,}; {remedy}."
            )
        num_bytes = num_rows * bytes_per_row(self._source.examples)
        what = f"run: the {num_rows:,} examples of a dispatch of {self._num_rounds} rounds"
        check_fits(num_bytes, what, remedy, on_host=True)

    def _stacked(self, rows: list[np.ndarray]) -> np.ndarray:
        """``[rounds, ...]``, padded with zeros."""
        stacked = np.zeros((self._num_rounds, *rows[0].shape), rows[0].dtype)
        stacked[: len(rows)] = rows
        return stacked

    @staticmethod
    def _grown(size: int, wanted: int) -> int:
        """How many clients rounds are padded to: as many as first, then a power of two."""
        if wanted <= size:
            return size
        return wanted if size == 0 else next_power_of_two(wanted)


def _as_int32(chunk: Chunk) -> Chunk:
    return chunk._replace(start=chunk.start.astype(np.int32))


def _check_last_round(first: int, num_rounds: int) -> None:
    last = np.iinfo(np.int32).max
    if num_rounds > last - first:
        raise ArgumentError(
            f"run: expected rounds below number {last:,}, which is what the state can count to, "
            f"got {num_rounds=} from round {first}; begin with a new state."
        )


def check_whole(name: str, value: Any, least: int) -> None:
    """Raises `ArgumentError` unless `value` is an integer of at least `least`."""
    is_int = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_int or value < least:
        raise ArgumentError(
            f"run: expected `{name}` to be an integer of at least {least}, got {value!r}."
        )
