"""What a computation gives back: Python values for who passed Python values."""

from typing import Any

import jax
import numpy as np

from fedjax_core.errors import ArgumentError
from fedjax_core.language import types
from fedjax_core.language.placements import CLIENTS
from fedjax_core.language.values import Federated, Sequence


def num_clients_of(value: Federated) -> int | None:
    """The size of the clients axis; None where there is none to read it from."""
    if value.placement is not CLIENTS or value.all_equal:
        return None
    is_sequence = lambda x: isinstance(x, Sequence)  # noqa: E731
    leaves = jax.tree.leaves(value.value, is_leaf=is_sequence)
    sizes = {(leaf.length if is_sequence(leaf) else leaf).shape[0] for leaf in leaves}
    if len(sizes) > 1:
        raise ArgumentError(
            f"Expected one number of clients in a value at CLIENTS, got arrays of {sorted(sizes)}; "
            "give all leaves the same leading axis."
        )
    return sizes.pop() if sizes else None


def to_python(value: Federated) -> Any:
    """What a computation fed with lists returns: a list with one entry a client, or one value."""
    host = jax.tree.map(_to_host, value.value)
    num_clients = num_clients_of(value)
    if value.placement is not CLIENTS or value.all_equal:
        return _with_lists(host)
    return [_with_lists(_row(host, client)) for client in range(num_clients or 0)]


def to_host(value: Any) -> Any:
    """An unplaced result as NumPy arrays and scalars, its sequences as lists of examples."""
    return _with_lists(jax.tree.map(_to_host, value))


def _row(arrays: Any, index: int) -> Any:
    return jax.tree.map(lambda x: x[index], arrays)


def _with_lists(member: Any) -> Any:
    """One member's value, its sequences as lists of examples."""

    def unpack(x: Any) -> Any:
        if not isinstance(x, Sequence):
            return x
        return [_row(x.elements, int(x.start) + i) for i in range(int(x.length))]

    return jax.tree.map(unpack, member, is_leaf=lambda x: isinstance(x, Sequence))


def _to_host(x: Any) -> Any:
    if isinstance(x, str):
        return x
    if types.is_extended_dtype(x.dtype):
        return x
    array = np.asarray(x)
    return array if array.shape else array[()]
