"""Sharded lowering: the clients spread over the devices of a mesh.

Each device runs the lowering of `lowering.py` for its share of the clients, in their order. What
has one value for all (at the server, all-equal, unplaced) is computed on every device alike. In a
round trip the devices exchange

* one all-reduce for all sums and counts (one for each dtype, if there are others than float32),
* one gather for smallest and largest values and general folds, whose totals are then merged,
* one gather of the clients' values for each `federated_collect`.

The number of clients is padded to a multiple of the devices, by repeating the last one with `valid`
False. A padded `Sequence` is spread with its client; the pool of a packed one, which clients of all
devices share, is on every device in whole, unless it consists of one pool for each device.

Along other axes than those of the clients the devices of an `Auto` mesh share the work as XLA sees
fit: arrays that are sharded over such an axis stay so. On a mesh with `Explicit` axes they are
replicated.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_core.errors import FederatedTypeError
from fedjax_core.execution import lowering, waves
from fedjax_core.execution.config import Execution
from fedjax_core.execution.lowering import Outcome, Values, is_uniform
from fedjax_core.language.local import Local
from fedjax_core.language.program import Codec, Constant, Op, Program
from fedjax_core.language.values import Sequence


def run(program: Program, values: Values, valid: jax.Array, execution: Execution) -> Outcome:
    """Runs a program on stacked values, with the clients spread over `execution.mesh`.

    Args:
      program: what to run.
      values: for the position of each parameter, its value; at the clients with a leading clients
        axis. Arrays may be on the mesh already, or on any one device that is not committed to.
      valid: bool `[clients]`; a client that is not valid does not exist for any aggregation.
      execution: with a mesh.

    Returns:
      Values at the clients in the order of the clients and, where the devices divide their number,
      sharded over them; all else is replicated.
    """
    mesh = cast(Mesh, execution.mesh)
    num_clients = valid.shape[0]
    constants = {i: op for i, op in enumerate(program.ops) if isinstance(op, Constant)}
    given = values | {i: op.value for i, op in constants.items() if _is_arrays(op.value)}
    args = _prepare(program, given, valid, execution)
    outcome = _compiled(program, execution, num_clients)(*args)
    results = {
        i: x if is_uniform(program.ops[i]) else _unpadded(x, num_clients, mesh)
        for i, x in outcome.values.items()
    }
    strings = {i: constants[i].value for i in program.results if i in constants and i not in given}
    return outcome._replace(values=results | strings)


def replicate(value: Any, execution: Execution) -> Any:
    """A value on all devices of the mesh, as what the server has comes out of a run.

    Rounds that start from it are compiled once: an array on one device would have the second round
    compiled again. Without a mesh, or inside of a JAX transformation, nothing happens.

    Args:
      value: a pytree of arrays, such as the state of an algorithm.
      execution: how it is going to be used.
    """
    leaves = jax.tree.leaves(value)
    if execution.mesh is None or any(isinstance(x, Tracer) for x in leaves):
        return value
    return put(value, NamedSharding(execution.mesh, P()))


def put(value: Any, sharding: NamedSharding) -> Any:
    """`jax.device_put`, also to devices of other processes, which are all given the same value."""
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    return jax.tree.map(lambda x: _put_everywhere(x, sharding), value)


def _put_everywhere(x: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        if x.sharding.is_equivalent_to(sharding, x.ndim):
            return x
        return jax.jit(lambda x: x, out_shardings=sharding)(x)
    if jnp.issubdtype(getattr(x, "dtype", np.dtype(bool)), jax.dtypes.prng_key):
        data = _put_everywhere(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _is_arrays(value: Any) -> bool:
    return not any(isinstance(x, str) for x in jax.tree.leaves(value))


def _prepare(
    program: Program, values: Values, valid: jax.Array, execution: Execution
) -> tuple[Values, jax.Array]:
    """The values and `valid` padded, and on the mesh as far as it matters from where they come."""
    mesh, shards = cast(Mesh, execution.mesh), execution.num_shards
    size = max(-(-valid.shape[0] // shards), 1) * shards
    at_clients = P(execution.axis)

    def client(x: Any) -> Any:
        return _place(_padded(x, size, mesh), mesh, at_clients)

    def server(x: Any) -> Any:
        return _place(x, mesh, P())

    def pool(x: Any, spec: P) -> Any:
        return _place(x, mesh, spec)

    placed = {
        i: jax.tree.map(server, x)
        if is_uniform(program.ops[i])
        else _map_parts(client, pool, x, execution)
        for i, x in values.items()
    }
    valid = _extended(valid, jnp.zeros(size - valid.shape[0], bool), mesh)
    return placed, _place(valid, mesh, at_clients)


def _map_parts(
    clients: Callable[[Any], Any],
    pools: Callable[[Any, P], Any],
    value: Any,
    execution: Execution,
) -> Any:
    """Maps the arrays of a stacked value.

    Args:
      clients: of an array with a clients axis.
      pools: of an array of a sequence's pool, and how it is spread.
      value: at the clients.
      execution: how it is run.
    """

    def one(x: Any) -> Any:
        if not (isinstance(x, Sequence) and x.packed):
            return jax.tree.map(clients, x)
        spec = P() if x.pools == 1 else P(execution.axis)
        pool = jax.tree.map(lambda rows: pools(rows, spec), x.elements)
        return dataclasses.replace(
            x, elements=pool, start=clients(x.start), length=clients(x.length)
        )

    return jax.tree.map(one, value, is_leaf=lambda x: isinstance(x, Sequence))


def _is_explicit(mesh: Mesh | AbstractMesh) -> bool:
    return AxisType.Explicit in mesh.axis_types


def _padded(x: Any, size: int, mesh: Mesh) -> Any:
    """`x` with `size` clients: the last one is repeated, so that no gradient sees odd values."""
    num_clients = x.shape[0]
    if num_clients == size:
        return x
    x = jnp.asarray(x)
    if not num_clients:
        return jnp.zeros((size, *x.shape[1:]), x.dtype)
    last = _replicated(x, mesh)[-1:]
    return _extended(x, jnp.broadcast_to(last, (size - num_clients, *x.shape[1:])), mesh)


def _extended(x: Any, rows: jax.Array, mesh: Mesh) -> Any:
    """`x` with more rows."""
    if not rows.shape[0]:
        return x
    longer = jnp.concatenate([_replicated(x, mesh), rows])
    if _is_explicit(mesh) or not isinstance(x, Tracer):
        return longer
    # Left to itself, XLA moves the rows between the devices with collectives.
    return lax.with_sharding_constraint(longer, NamedSharding(mesh, P()))


def _unpadded(value: Any, num_clients: int, mesh: Mesh) -> Any:
    def one(x: jax.Array) -> jax.Array:
        if x.shape[0] == num_clients:
            return x
        return lax.slice_in_dim(_replicated(x, mesh), 0, num_clients)

    return jax.tree.map(one, value)


def _replicated(x: jax.Array, mesh: Mesh) -> jax.Array:
    """`x` free of a sharding that is part of its type: a part of it could not keep that."""
    return jax.device_put(x, NamedSharding(mesh, P())) if _is_explicit(mesh) else x


def _place(x: Any, mesh: Mesh, spec: P) -> Any:
    """`x` as `jax.shard_map` takes it: of the very sharding on an `Explicit` mesh, else near it."""
    if not _is_explicit(mesh):
        if isinstance(x, Tracer):
            return x
        if isinstance(x, jax.Array) and x.sharding.device_set == set(mesh.devices.flat):
            return x
    return jax.device_put(x, NamedSharding(mesh, spec))


@functools.lru_cache(maxsize=256)
def _compiled(program: Program, execution: Execution, num_clients: int) -> Callable[..., Outcome]:
    """The function of values and `valid`, padded, that runs on the mesh."""
    mesh, axis = cast(Mesh, execution.mesh), execution.axis
    lanes = execution.num_lanes(num_clients)
    manual = _manual_axes(execution)
    detached = _detached(program, mesh, manual)
    kept = tuple(i for i in program.results if not _is_string(program.ops[i]))
    at: Any = {i: P() if is_uniform(program.ops[i]) else P(axis) for i in kept}
    everywhere: Any = P()

    def on_device(values: Values, valid: jax.Array) -> Outcome:
        loop = waves.loop_of(execution.mode)
        outcome = lowering.run(detached, values, valid, lanes, axis, num_clients, loop)
        return outcome._replace(values={i: outcome.values[i] for i in kept})

    def sharded(values: Values, valid: jax.Array) -> Outcome:
        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(_specs(program, values, execution), P(axis)),
            out_specs=Outcome(at, everywhere, everywhere),
            axis_names=manual,
            check_vma=False,
        )(values, valid)

    sharded.__name__ = program.name
    return jax.jit(sharded)


def _is_string(op: Op) -> bool:
    return isinstance(op, Constant) and not _is_arrays(op.value)


def _manual_axes(execution: Execution) -> frozenset[str]:
    """The axes of the clients; all where XLA may not decide on the others."""
    mesh = cast(Mesh, execution.mesh)
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    others = {kind for name, kind in types.items() if name not in execution.axes}
    return frozenset(execution.axes if others <= {AxisType.Auto} else mesh.axis_names)


def _specs(program: Program, values: Values, execution: Execution) -> Values:
    def specs(i: int, value: Any) -> Any:
        if is_uniform(program.ops[i]):
            return P()
        return _map_parts(lambda _: P(execution.axis), lambda _, spec: spec, value, execution)

    return {i: specs(i, value) for i, value in values.items()}


# Arrays that live on the mesh and that local functions capture.


@functools.lru_cache(maxsize=256)
def _detached(program: Program, mesh: Mesh, axes: frozenset[str]) -> Program:
    """The program with functions that run on a mesh even where they capture arrays on that mesh.

    An outside trace of such a function has the mesh of the array in its types, which those inside
    of `jax.shard_map` do not fit, so it is traced anew in there: once for each `mesh`, and for the
    `axes` that the map is over.
    """
    del mesh, axes  # the traces, which the result holds, are theirs
    ops = tuple(_detach_functions(op) for op in program.ops)
    return dataclasses.replace(program, ops=ops)


def _detach_functions(record: Any) -> Any:
    """An operation, or its codec, with each of its functions detached."""
    changed = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Local):
            changed[field.name] = _detach(value)
        elif isinstance(value, Codec):
            changed[field.name] = _detach_functions(value)
    return dataclasses.replace(record, **changed) if changed else record


def _detach(local: Local) -> Local:
    captured = [const for traced in local.traces.values() for const in traced.jaxpr.consts]
    on_mesh = [x for x in captured if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1]
    for const in on_mesh:
        if isinstance(const.sharding, NamedSharding) and _is_explicit(const.sharding.mesh):
            raise FederatedTypeError(
                f"`{local.name}` captures {jax.typeof(const)}, an array on a mesh with Explicit "
                "axes, which JAX does not take into a computation over the mesh. Expected an array "
                "of one device: pass it as an argument, or capture np.asarray of it."
            )
    return dataclasses.replace(local, traces={}, lock=threading.Lock()) if on_mesh else local
