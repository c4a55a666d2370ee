"""What a round needs of a state and a cohort, asked on the host before anything runs.

key      one, of any generator
state    the leaves of the algorithm's own, not given away
cohort   features that fit the model, and a table of clients that fits the features
devices  where the arrays are, against where they are needed
lanes    the copies of the model that clients work on side by side, against the memory there is
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding

from fedjax_core.datasets.cohort import Cohort
from fedjax_core.errors import ArgumentError, DataError, FederatedTypeError
from fedjax_core.execution.config import Execution
from fedjax_core.language import inference
from fedjax_core.learning.evaluation import check_examples
from fedjax_core.learning.models import Model
from fedjax_core.learning.rounds import State
from fedjax_core.memory import check_fits

# What is not worth asking the system about.
_LITTLE_BYTES = 1 << 26

# The kinds of dtypes that each column of a cohort may have, and its shape behind the clients axis.
_COLUMNS = {
    "start": ("iu", ()),
    "length": ("iu", ()),
    "uid": ("u", (2,)),
    "index": ("iu", ()),
    "valid": ("b", ()),
}


def check_key(key: Any) -> None:
    """Raises unless `key` is a single typed key."""
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key) or key.shape:
        raise ArgumentError(f"Expected one key, as jax.random.key(0) makes it, got {key!r}.")


def check_state(expected: State, state: Any) -> None:
    """Raises unless `state` has the leaves of `expected`; its key may be of any generator."""
    if not isinstance(state, State):
        raise FederatedTypeError(
            f"Expected the state that init returned, got {type(state).__name__}."
        )
    wanted = expected._replace(key=state.key, clients=state.clients)
    found = inference.difference(wanted, state)
    if found:
        raise FederatedTypeError(
            f"The state does not fit: {found}; it has to come from the init of the same algorithm."
        )
    check_key(state.key)
    if any(is_deleted(x) for x in jax.tree.leaves(state)):
        raise ArgumentError(
            "Expected a state whose arrays are there, got one that was given away: a round of an "
            "Execution(donate=True) reuses its memory. Go on from the state that the round "
            "returned, or leave out donate."
        )


def is_deleted(x: Any) -> bool:
    """Whether an array's memory is gone."""
    return isinstance(x, jax.Array) and not isinstance(x, Tracer) and x.is_deleted()


def select_features(model: Model, cohort: Cohort) -> Cohort:
    """The cohort with only the features that the model takes."""
    if not isinstance(cohort, Cohort) or not isinstance(cohort.examples, Mapping):
        got = type(cohort).__name__
        if isinstance(cohort, Cohort):
            got += f" of {type(cohort.examples).__name__}"
        raise FederatedTypeError(f"Expected a Cohort, as dataset.cohort(ids) makes it, got {got}.")
    known = {name: x for name, x in cohort.examples.items() if name in model.input_spec}
    if len(known) == len(cohort.examples):
        return cohort
    return dataclasses.replace(cohort, examples=known)


def check_cohort(model: Model, cohort: Cohort) -> None:
    """Checks names, shapes, dtypes and, where they are concrete, labels and slices."""
    check_columns(cohort)
    try:
        check_examples(model, cohort.examples, where="update: the cohort's examples")
    except DataError as error:
        raise _naming_client(error, model, cohort) from None
    _check_slices(cohort)


def check_columns(cohort: Cohort) -> None:
    """Raises unless the tables of a cohort are arrays of one number of clients."""
    for name in ("capacity", "pools"):
        number = getattr(cohort, name)
        is_int = isinstance(number, int | np.integer) and not isinstance(number, bool)
        if not is_int or not 1 <= number < 2**31:
            raise ArgumentError(
                f"Expected `{name}` of the cohort to be an integer of at least 1 and 31 bits, got "
                f"{number!r}; make cohorts with dataset.cohort(ids)."
            )
    size = (getattr(cohort.start, "shape", None) or (0,))[0]
    for name, (kinds, shape) in _COLUMNS.items():
        column = getattr(cohort, name)
        dtype, found = getattr(column, "dtype", None), getattr(column, "shape", None)
        if dtype is None or np.dtype(dtype).kind not in kinds or found != (size, *shape):
            got = repr(column) if dtype is None or found is None else f"{dtype}{list(found)}"
            word = {"b": "bool", "u": "uint32", "iu": "int32"}[kinds]
            raise FederatedTypeError(
                f"Expected `{name}` of the cohort to be {word}{[size, *shape]}, got {got}; make "
                "cohorts with dataset.cohort(ids)."
            )


def _check_slices(cohort: Cohort) -> None:
    """Raises for clients of rows that the pool does not have, where the host can tell."""
    if not isinstance(cohort.start, np.ndarray) or not isinstance(cohort.length, np.ndarray):
        return
    num_rows = jax.tree.leaves(cohort.examples)[0].shape[0]
    start, length = cohort.start.astype(np.int64), cohort.length.astype(np.int64)
    is_bad = (start < 0) | (length < 0) | (length > cohort.capacity) | (start + length > num_rows)
    if is_bad.any():
        client = int(np.argmax(is_bad))
        raise DataError(
            f"Expected clients of at most {cohort.capacity} examples, within {num_rows:,} rows, "
            f"got rows {start[client]} to {start[client] + length[client]} for client {client} of "
            "the cohort; make cohorts with dataset.cohort(ids)."
        )


def _naming_client(error: DataError, model: Model, cohort: Cohort) -> DataError:
    labels = cohort.examples.get(model.label_key)
    if labels is None or model.num_classes is None or isinstance(labels, Tracer):
        return error
    labels = np.asarray(labels)
    bad = np.flatnonzero((labels < 0) | (labels >= model.num_classes))
    if not len(bad):
        return error
    start, length = np.asarray(cohort.start), np.asarray(cohort.length)
    client = int(np.argmax((start <= bad[0]) & (bad[0] < start + length)))
    return DataError(
        f"{error} The row belongs to client {client} of the cohort, number "
        f"{int(np.asarray(cohort.index)[client])} of the dataset."
    )


def check_devices(state: State, examples: Mapping[str, Any], execution: Execution) -> None:
    """Raises where arrays were put on devices other than those that the round runs on.

    Arrays that were not put anywhere go where they are needed.
    """
    mesh = execution.mesh
    if mesh is not None:
        wanted: tuple[Any, ...] = tuple(mesh.devices.flat)
        what = "the devices of the execution's mesh"
    else:
        at = {name: _devices(x) for name, x in _named(state)}
        first = next((name for name, found in at.items() if found), None)
        if first is None:
            return
        wanted, what = at[first], f"the devices that the state's {first} is on"
    for name, x in examples.items():
        found = _devices(x)
        if found and found != wanted:
            raise ArgumentError(
                f"Expected the examples on {what}, {_listed(wanted)}, got {name!r} on "
                f"{_listed(found)}; spread the cohort for the execution that runs it, or put the "
                "dataset on these devices with dataset.on_device(...)."
            )


def _named(state: State) -> list[tuple[str, Any]]:
    leaves = jax.tree.leaves_with_path(state._replace(clients=()))
    return [(jax.tree_util.keystr(path).lstrip("."), x) for path, x in leaves]


def _devices(x: Any) -> tuple[Any, ...]:
    """Where an array was put, () if nowhere in particular."""
    if not isinstance(x, jax.Array) or isinstance(x, Tracer) or not x.committed:
        return ()
    if isinstance(x.sharding, NamedSharding):
        return tuple(cast(Mesh, x.sharding.mesh).devices.flat)
    return tuple(sorted(x.sharding.device_set, key=lambda device: device.id))


def _listed(devices: tuple[Any, ...]) -> str:
    shown = ", ".join(str(device.id) for device in devices[:8])
    return f"{devices[0].platform} [{shown}{', ...' if len(devices) > 8 else ''}]"


def check_lanes(params: Any, num_clients: int, execution: Execution) -> None:
    """Raises for more clients side by side than there is memory for their copies of the model.

    Args:
      params: arrays or shapes of the model's variables.
      num_clients: of the cohort.
      execution: how it runs.

    Raises:
      DeviceMemoryError: naming the number of bytes, of the copies alone.
    """
    lanes = execution.num_lanes(num_clients)
    each = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params))
    mesh = execution.mesh
    device = jax.local_devices()[0] if mesh is None else mesh.local_devices[0]
    is_shared = mesh is not None and device.platform == "cpu"  # one memory for all of them
    num_bytes = lanes * each * (len(mesh.local_devices) if mesh is not None and is_shared else 1)
    if num_bytes < _LITTLE_BYTES:
        return
    what = f"the copies of the model, {each:,} bytes each, of {lanes:,} clients side by side"
    remedy = "use fewer lanes, as in Execution(mode='streamed', lanes=16)"
    check_fits(num_bytes, what, remedy, device)
