"""What clients remember between rounds: one row a client of the dataset, beside the state.

    round:  memory = rows of the cohort's clients  ->  program  ->  the same rows, replaced

The rows lie on the device, on a mesh spread like the clients. A client that is not in the cohort,
or does not count in the round, keeps its row as it is.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_core.datasets.cohort import Cohort
from fedjax_core.errors import ArgumentError, FederatedTypeError
from fedjax_core.execution import sharding
from fedjax_core.execution.config import Execution
from fedjax_core.language import inference
from fedjax_core.learning.rounds import Memory, State
from fedjax_core.memory import check_fits


def has_memory(member: Memory) -> bool:
    """Whether clients remember anything."""
    return bool(jax.tree.leaves(member))


def check_memory(member: Memory, num_clients: Any, execution: Execution) -> None:
    """Raises unless there is memory for so many clients, before any of it is taken.

    Raises:
      ArgumentError: for a number that is missing, or none.
      DeviceMemoryError: naming the number of bytes.
    """
    if num_clients is None and not has_memory(member):
        return
    if not isinstance(num_clients, int | np.integer) or num_clients < 1 or num_clients is True:
        raise ArgumentError(
            "Expected the number of clients, each of which may remember something from round to "
            f"round, got {num_clients!r}; call init(key, dataset.num_clients)."
        )
    if not has_memory(member):
        return
    leaves = jax.tree.leaves(member)
    each = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    rows = _num_rows(int(num_clients), execution)
    mesh = execution.mesh
    device = None if mesh is None else mesh.devices.flat[0]
    what = f"what {num_clients:,} clients remember, {each:,} bytes each,"
    remedy = "use fewer clients, spread them over more devices, or take parts without memory"
    check_fits(each * rows // execution.num_shards, what, remedy, device)


def _num_rows(num_clients: int, execution: Execution) -> int:
    """One for each client, and as many as the devices divide evenly."""
    return -(-num_clients // execution.num_shards) * execution.num_shards


def stack_memory(member: Memory, num_clients: int | None, execution: Execution) -> Any:
    """The same memory for every client, ``[num_clients, ...]``; () if there is none."""
    if num_clients is None or not has_memory(member):
        return ()
    rows = _num_rows(num_clients, execution)
    spread = _sharding(execution)

    def repeat(x: jax.Array) -> jax.Array:
        # Without arguments, for these would have to be on the devices of all processes.
        row = jax.device_get(x)
        make = jax.jit(lambda: jnp.broadcast_to(row, (rows, *row.shape)), out_shardings=spread)
        return make()

    return jax.tree.map(repeat, member)


def _sharding(execution: Execution) -> NamedSharding | None:
    mesh = execution.mesh
    return None if mesh is None else NamedSharding(mesh, P(execution.axis))


def place_state(state: State, execution: Execution) -> State:
    """The state where rounds leave it: on all devices of a mesh, and memory spread over them."""
    bare = sharding.replicate(state._replace(clients=()), execution)
    clients = state.clients
    spread = _sharding(execution)
    if spread is not None and not any(isinstance(x, Tracer) for x in jax.tree.leaves(clients)):
        clients = sharding.put(clients, spread)
    return bare._replace(clients=clients)


def take_memory(clients: Memory, cohort: Cohort, execution: Execution) -> Memory:
    """The rows of the cohort's clients; padding gets some client's."""
    everywhere = _explicit(execution, P())
    return jax.tree.map(
        lambda x: x.at[cohort.index].get(mode="clip", out_sharding=everywhere), clients
    )


def put_memory(clients: Memory, cohort: Cohort, new: Memory, execution: Execution) -> Memory:
    """The rows of the cohort's clients replaced; what padding has is dropped."""
    if not jax.tree.leaves(clients):
        return clients
    everywhere, spread = _explicit(execution, P()), _explicit(execution, P(execution.axis))
    # Positions that are out of bounds are dropped, and `num_clients` may be a row that only pads.
    far = jnp.iinfo(jnp.int32).max
    index = jnp.where(cohort.valid, cohort.index, far)

    def put(x: jax.Array, rows: jax.Array) -> jax.Array:
        rows = rows if everywhere is None else jax.reshard(rows, everywhere)
        return x.at[index].set(rows, mode="drop", out_sharding=spread)

    return jax.tree.map(put, clients, new)


def _explicit(execution: Execution, spec: P) -> NamedSharding | None:
    """A sharding that has to be named because it is part of the types of a mesh."""
    mesh = execution.mesh
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return None
    return NamedSharding(mesh, spec)


def check_remembered(member: Memory, clients: Any, owner: Any) -> None:
    """Raises unless the state holds what the clients of a cohort or dataset remember.

    Args:
      member: what one client remembers.
      clients: of the state.
      owner: a `Cohort`, or a dataset.

    Raises:
      FederatedTypeError: for memory of another structure.
      ArgumentError: for clients that it has no row for.
    """
    if not has_memory(member):
        if jax.tree.leaves(clients):
            raise FederatedTypeError(
                f"Expected a state whose clients remember nothing, got clients={clients!r}; it has "
                "to come from the init of the same algorithm."
            )
        return
    rows = jax.tree.leaves(clients)
    num_rows = rows[0].shape[0] if rows and jnp.ndim(rows[0]) else 0
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct((num_rows, *x.shape), x.dtype), member)
    found = inference.difference(wanted, clients)
    if found:
        raise FederatedTypeError(
            f"What the clients remember does not fit: {found}; the state has to come from "
            "init(key, dataset.num_clients) of the same algorithm."
        )
    last = _last_client(owner)
    if last is not None and last >= num_rows:
        raise ArgumentError(
            f"Expected clients below number {num_rows}, for so many remember something in this "
            f"state, got number {last}; begin with init(key, dataset.num_clients)."
        )


def _last_client(owner: Any) -> int | None:
    if not isinstance(owner, Cohort):
        return owner.num_clients - 1
    arrays = [x for x in (owner.index, owner.valid) if isinstance(x, jax.Array)]
    if any(isinstance(x, Tracer) or not x.is_fully_addressable for x in arrays):
        return None
    index = np.asarray(owner.index)[np.asarray(owner.valid)]
    return int(index.max(initial=-1))
