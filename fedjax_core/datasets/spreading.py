"""Cohorts spread over the devices of a mesh: each holds its own clients' examples, and no others.

With several processes each makes the cohort of its own clients and spreads it; together they are
the cohort of the round, which no process holds in whole.
"""

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_core.datasets.cohort import Cohort, gather_rows, next_power_of_two, slice_rows
from fedjax_core.errors import ArgumentError, FederatedTypeError
from fedjax_core.execution.config import Execution


def spread(cohort: Cohort, execution: Execution) -> Cohort:
    """The cohort on the devices of ``execution.mesh``, an equal share of its clients on each.

    Clients are dealt out by their number of examples, so that the devices have as much to do. With
    several processes (`jax.distributed`), each of them calls this at the same time, with the
    clients of which it holds the data; it is a collective operation.

    Args:
      cohort: of arrays in memory; each device gets the rows of its clients alone.
      execution: with a mesh, whose devices the processes have equal numbers of.

    Returns:
      The cohort of all processes' clients, padded to a multiple of the devices with clients that
      do not count. It is for algorithms with this `execution`.

    Raises:
      ArgumentError: without a mesh, or where the devices are not divided evenly.
      FederatedTypeError: for what is no cohort of arrays in memory.
    """
    if not isinstance(execution, Execution) or execution.mesh is None:
        raise ArgumentError(
            f"spread: expected an Execution with a mesh, got {execution!r}; pass the one that the "
            "algorithm has."
        )
    if not isinstance(cohort, Cohort) or cohort.pools != 1:
        raise FederatedTypeError(
            f"spread: expected a cohort as dataset.cohort(ids) makes it, got {cohort!r}."
        )
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(cohort)):
        raise FederatedTypeError(
            "spread: expected arrays in memory, got values that JAX is tracing; spread the cohort "
            "outside of jit, and pass the result."
        )
    num_parts = _num_local_parts(execution)
    parts = _deal(np.asarray(cohort.length), num_parts)
    num_rows = max(int(np.asarray(cohort.length)[part].sum()) for part in parts)
    sizes = np.array([max(map(len, parts)), num_rows, cohort.capacity], np.int32)
    size, num_rows, capacity = _largest(sizes, execution).tolist()
    pieces = [_part(cohort, part, size, next_power_of_two(num_rows)) for part in parts]
    on_host = jax.tree.map(lambda *rows: np.concatenate(rows), *pieces)
    sharding = NamedSharding(execution.mesh, P(execution.axis))
    leaves = jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, rows), on_host
    )
    examples, start, length, uid, index, valid = leaves
    pools = execution.num_shards
    return Cohort(examples, start, length, uid, index, valid, capacity, pools)


def _num_local_parts(execution: Execution) -> int:
    """How many shares of the clients this process has."""
    num_processes = jax.process_count()
    if execution.num_shards % num_processes:
        raise ArgumentError(
            f"spread: expected equal numbers of devices in all processes, got "
            f"{execution.num_shards} parts for {num_processes} processes; make the mesh of all "
            "devices."
        )
    return execution.num_shards // num_processes


def _deal(length: np.ndarray, num_parts: int) -> list[np.ndarray]:
    """Positions of clients for each part: longest first, there and back again."""
    order = np.argsort(-length, kind="stable")
    rounds = np.full((-(-len(order) // num_parts), num_parts), -1)
    rounds.reshape(-1)[: len(order)] = order
    rounds[1::2] = rounds[1::2, ::-1]
    return [column[column >= 0] for column in rounds.T]


def _largest(sizes: np.ndarray, execution: Execution) -> np.ndarray:
    """The largest of each number over all processes."""
    if jax.process_count() == 1:
        return sizes
    mesh = execution.mesh
    rows = np.tile(sizes, (_num_local_parts(execution), 1))
    shared = jax.make_array_from_process_local_data(
        NamedSharding(mesh, P(execution.axis)),  # pyright: ignore[reportArgumentType] - has a mesh
        rows,
    )
    everywhere = NamedSharding(mesh, P())  # pyright: ignore[reportArgumentType]
    return np.asarray(jax.jit(lambda x: x.max(axis=0), out_shardings=everywhere)(shared))


def _part(cohort: Cohort, part: np.ndarray, size: int, num_rows: int) -> tuple[object, ...]:
    """The clients at the positions `part`, with a pool of their own."""
    start, length = np.asarray(cohort.start)[part], np.asarray(cohort.length)[part]
    rows = slice_rows(start, length)
    pool = {n: gather_rows(np.asarray(x), rows, num_rows) for n, x in cohort.examples.items()}
    begin = np.cumsum(length, dtype=np.int64) - length

    def padded(values: np.ndarray, fill: int, dtype: type) -> np.ndarray:
        result = np.full((size, *values.shape[1:]), fill, dtype)
        result[: len(values)] = values
        return result

    far = np.iinfo(np.int32).max  # where JAX drops a scatter
    return (
        pool,
        padded(begin, 0, np.int32),
        padded(length, 0, np.int32),
        padded(np.asarray(cohort.uid)[part], 0, np.uint32),
        padded(np.asarray(cohort.index)[part], far, np.int32),
        padded(np.asarray(cohort.valid)[part], 0, np.bool_),
    )
