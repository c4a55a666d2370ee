"""Federated datasets from arrays: of each client, or flat ones with a rule that splits them."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fedjax_core.datasets import checks
from fedjax_core.datasets import partition as partitions
from fedjax_core.datasets.cohort import aligned_zeros, gather_rows
from fedjax_core.datasets.federated import FederatedDataset
from fedjax_core.datasets.partition import Partition
from fedjax_core.errors import DataError, FederatedTypeError

# What makes partitions; passed instead of one when it was not called.
_PARTITIONERS = (partitions.iid, partitions.dirichlet, partitions.shards, partitions.by_key)


def from_clients(
    clients: Mapping[str, Mapping[str, Any]], *, name: str = "clients"
) -> FederatedDataset:
    """A federated dataset from the examples of each client.

    Args:
      clients: client id -> feature name -> array ``[num_examples, ...]``. A client may be empty
        (arrays of 0 rows). All clients have the same features, shapes and dtypes.
      name: for messages and reports.

    Returns:
      A `FederatedDataset` in memory, its clients in the order of `clients`. Where JAX has no 64-bit
      types (its default) they become 32-bit ones.

    Raises:
      DataError: no clients, or clients whose features do not fit; the message names client and
        feature.

    Examples:
      >>> from_clients({"a": {"x": [68.0, 70.0]}, "b": {"x": [71.0]}}).num_examples.tolist()
      [2, 1]
    """
    if not isinstance(clients, Mapping) or not clients:
        raise DataError(
            "expected a dict of client id -> examples with at least one client, got "
            f"{type(clients).__name__} {clients!r:.80}"
        )
    checks.check_client_ids(tuple(clients))
    checked = {client_id: _client_arrays(client_id, x) for client_id, x in clients.items()}
    first = next(iter(checked))
    for client_id, arrays in checked.items():
        _check_same_features(client_id, arrays, first, checked[first])
    sizes = [len(next(iter(arrays.values()))) for arrays in checked.values()]
    features = {n: _concatenate([x[n] for x in checked.values()]) for n in checked[first]}
    return FederatedDataset(features, checks.offsets_of(np.asarray(sizes)), tuple(checked), name)


def from_arrays(
    examples: Mapping[str, Any],
    *,
    partition: Partition,
    seed: int = 0,
    features: Iterable[str] | None = None,
    name: str = "arrays",
) -> FederatedDataset:
    """A federated dataset from flat arrays and a rule that gives the rows to clients.

    Args:
      examples: feature name -> array ``[num_examples, ...]``.
      partition: a partitioner of `fedjax_core.datasets.partition`, or any function
        ``(examples, numpy.random.Generator) -> {client id: row numbers}``.
      seed: of the generator that the partitioner gets; the same seed gives the same clients.
      features: the features to keep, by default all. The partitioner sees all of them: a column
        that only names the client may be text, if it is not kept.
      name: for messages and reports.

    Returns:
      A `FederatedDataset` in memory. Rows that the partitioner gives to nobody are left out.

    Raises:
      DataError: features of unequal length, an unknown feature, or a partition that does not fit.
      FederatedTypeError: `partition` is no function, or gives something else than rows of clients.

    Examples:
      >>> import numpy as np
      >>> from fedjax_core.datasets import partition
      >>> data = from_arrays({"x": np.arange(10)}, partition=partition.iid(3))
      >>> data.num_examples.tolist()
      [4, 3, 3]
    """
    _check_partition(partition)
    if not isinstance(examples, Mapping):
        raise DataError(
            f"{name}: expected a dict of feature name -> array, got {type(examples).__name__}"
        )
    columns = {feature: checks.to_array(feature, x, name) for feature, x in examples.items()}
    checks.check_rows(columns, name)
    kept = _kept_features(columns, features)
    groups = partition(columns, np.random.default_rng(checks.checked_seed(seed)))
    rows, sizes = _checked_groups(groups, len(next(iter(columns.values()))))
    arrays = {n: gather_rows(checks.canonical(n, columns[n]), rows, len(rows)) for n in kept}
    return FederatedDataset(arrays, checks.offsets_of(sizes), tuple(groups), name)


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    shape = sum(map(len, arrays)), *arrays[0].shape[1:]
    return np.concatenate(arrays, out=aligned_zeros(shape, arrays[0].dtype))


def _client_arrays(client_id: str, examples: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if not isinstance(examples, Mapping):
        raise DataError(
            f"client {client_id!r}: expected a dict of feature name -> array, got "
            f"{type(examples).__name__}"
        )
    where = f"client {client_id!r}"
    arrays = {n: np.asarray(checks.canonical(n, x, where)) for n, x in examples.items()}
    checks.check_rows(arrays, where)
    return arrays


def _check_same_features(
    client_id: str, arrays: dict[str, np.ndarray], first: str, expected: dict[str, np.ndarray]
) -> None:
    if arrays.keys() != expected.keys():
        odd = sorted(arrays.keys() ^ expected.keys())
        raise DataError(
            f"client {client_id!r} has the features {sorted(arrays)}, client {first!r} has "
            f"{sorted(expected)}; give {odd} to all clients or to none"
        )
    for name, array in arrays.items():
        _check_same_type(client_id, name, array, first, expected[name])


def _check_same_type(
    client_id: str, name: str, array: np.ndarray, first: str, expected: np.ndarray
) -> None:
    if (array.dtype, array.shape[1:]) != (expected.dtype, expected.shape[1:]):
        raise DataError(
            f"feature {name!r}: client {client_id!r} has {array.dtype}{list(array.shape[1:])} an "
            f"example, client {first!r} has {expected.dtype}{list(expected.shape[1:])}; convert "
            "them to one dtype and shape"
        )


def _kept_features(columns: dict[str, np.ndarray], features: Iterable[str] | None) -> list[str]:
    kept = list(columns if features is None else features)
    unknown = [feature for feature in kept if feature not in columns]
    if unknown or not kept:
        raise DataError(f"features must name some of {list(columns)}, got {kept}")
    return kept


def _checked_groups(groups: Mapping[str, Any], num_examples: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of all clients one after the other, and how many each has."""
    if not isinstance(groups, Mapping):
        raise FederatedTypeError(
            "a partition returns {client id: row numbers of the examples it got}; got "
            f"{type(groups).__name__}"
        )
    if not groups:
        raise DataError("the partition made no clients; give it at least one example")
    rows = [_checked_rows(client_id, x, num_examples) for client_id, x in groups.items()]
    return np.concatenate(rows), np.asarray([len(x) for x in rows], np.int64)


def _check_partition(partition: Any) -> None:
    uncalled = [f.__name__ for f in _PARTITIONERS if partition is f]
    if uncalled or not callable(partition):
        got = f"partition.{uncalled[0]} itself" if uncalled else repr(partition)
        raise FederatedTypeError(
            "partition: expected a function (examples, rng) -> {client id: row numbers}, such as "
            f"partition.iid(10), got {got}; call a partitioner with its settings"
        )


def _checked_rows(client_id: str, values: Any, num_examples: int) -> np.ndarray:
    """The rows that a partition gives to one client: int64 ``[rows]``."""
    rows = checks.to_array("rows", values, f"the partition's client {client_id!r}")
    # An empty list is of floats.
    is_integer = rows.dtype.kind in "iu" or not rows.size
    if rows.ndim != 1 or not is_integer:
        raise FederatedTypeError(
            f"the partition gives client {client_id!r} {rows.dtype}{list(rows.shape)}, expected "
            "one axis of integer row numbers; np.flatnonzero turns a mask into them"
        )
    if rows.size and not 0 <= rows.min() <= rows.max() < num_examples:
        raise DataError(
            f"the partition gives client {client_id!r} rows outside 0..{num_examples - 1}; a "
            "partition returns {client id: row numbers of the examples it got}"
        )
    return rows.astype(np.int64)
