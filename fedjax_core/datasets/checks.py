"""What every federated dataset has to satisfy, and the errors that say what does not."""

import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.errors import ArgumentError, DataError, FederatedTypeError


def to_array(name: str, values: Any, where: str = "") -> np.ndarray:
    """The values of a feature as an array; one that is memory-mapped stays so.

    Raises:
      DataError: they are ragged, or have a mask, which would be lost.
    """
    if isinstance(values, np.ma.MaskedArray):
        raise DataError(
            f"{_label(name, where)}: expected plain arrays, got a masked array; fill it "
            "(`array.filled(value)`) or leave out the masked examples"
        )
    try:
        return values if isinstance(values, np.memmap) else exact_text(np.asarray(values), values)
    except ValueError as error:
        raise DataError(
            f"{_label(name, where)}: expected values of one shape, one an example, got ragged or "
            f"mixed ones ({error}); pad them to one shape"
        ) from error


def exact_text(array: np.ndarray, values: Any) -> np.ndarray:
    """`array`, or the same as objects if it has lost NULs at the end of text, as NumPy's text does.

    Args:
      array: what NumPy made of `values`.
      values: maybe a list of str or bytes.
    """
    if array.dtype.kind not in "SU" or isinstance(values, np.ndarray):
        return array
    objects = np.asarray(values, object)
    mixed = len({type(x) for x in objects.flat}) > 1
    return objects if mixed or (objects != array).any() else array


def _label(name: str, where: str) -> str:
    return f"{where}, feature {name!r}" if where else f"feature {name!r}"


def canonical(name: str, array: np.ndarray, where: str = "") -> np.ndarray:
    """`array` in the dtype that JAX would give it: 64-bit numbers become 32-bit unless x64 is on.

    Raises:
      DataError: the dtype is none that JAX knows, or an integer does not fit into 32 bits.
    """
    array = to_array(name, array, where)
    label = _label(name, where)
    # bfloat16 and its kin are of no kind that NumPy knows, hence the second question.
    if array.dtype.kind not in "biufc" and not jnp.issubdtype(array.dtype, np.floating):
        raise DataError(
            f"{label}: expected numbers or booleans, got dtype {array.dtype}; encode text as "
            "integers, or leave the feature out (`features=`)"
        )
    dtype = np.dtype(jax.dtypes.canonicalize_dtype(array.dtype))
    if dtype == array.dtype:
        return array
    if array.dtype.kind in "iu":
        check_fits(label, array, dtype)
    return array.astype(dtype)


def check_fits(label: str, array: np.ndarray, dtype: np.dtype) -> None:
    """All values of an integer array fit into an integer dtype; DataError otherwise."""
    if not array.size:
        return
    limits = np.iinfo(dtype)
    low, high = int(array.min()), int(array.max())
    if low < limits.min or high > limits.max:
        raise DataError(
            f"{label}: the values {low}..{high} do not fit into {dtype}; rescale them, or (for "
            "64 bits) turn on jax.config.update('jax_enable_x64', True)"
        )


def read_only(array: np.ndarray) -> np.ndarray:
    """A view that cannot be written through; the caller's own array stays writable."""
    view = array.view()
    view.flags.writeable = False
    return view


def offsets_of(sizes: np.ndarray) -> np.ndarray:
    """Offsets int64 ``[num_clients + 1]`` from the clients' numbers of examples."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def check_rows(examples: Mapping[str, np.ndarray], where: str) -> None:
    """All features have the same number of rows, and there is at least one feature."""
    if not examples:
        raise DataError(f"{where}: expected at least one feature, got none")
    scalars = [name for name, x in examples.items() if x.ndim == 0]
    if scalars:
        raise DataError(
            f"{where}, feature {scalars[0]!r}: expected an array with a leading axis of examples, "
            "got a scalar; wrap it in a list"
        )
    rows = {name: len(x) for name, x in examples.items()}
    if len(set(rows.values())) > 1:
        raise DataError(
            f"{where}: features of unequal length {rows}; every example needs a value of each"
        )


def check_offsets(offsets: np.ndarray, num_clients: int, num_rows: int) -> None:
    """Offsets rise from 0 to the number of rows and bound every client."""
    if offsets.shape != (num_clients + 1,):
        raise DataError(
            f"expected offsets of shape [{num_clients + 1}] for {num_clients} clients, got "
            f"{list(offsets.shape)}"
        )
    if offsets[0] != 0 or offsets[-1] != num_rows or (np.diff(offsets) < 0).any():
        raise DataError(
            f"offsets must rise from 0 to the {num_rows} examples, got {offsets[0]} to "
            f"{offsets[-1]}; `offsets[i]` is the first row of client i"
        )


def check_client_ids(client_ids: tuple[str, ...]) -> None:
    """Ids are different, not empty, and of type str; there is at least one."""
    if not client_ids:
        raise DataError("expected at least one client, got none")
    for client_id in client_ids:
        if not isinstance(client_id, str):
            raise FederatedTypeError(
                f"client ids are str, got {client_id!r} of type {type(client_id).__name__}; "
                "convert it with str()"
            )
    if len(set(client_ids)) < len(client_ids):
        seen: set[str] = set()
        double = next(i for i in client_ids if i in seen or seen.add(i))
        raise DataError(f"client ids must be different, got {double!r} more than once")


def checked_count(name: str, value: object, *, least: int = 1) -> int:
    """`value` as an int that is at least `least`.

    Raises:
      FederatedTypeError: it is no integer (a bool is none).
      ArgumentError: it is too small.
    """
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise FederatedTypeError(f"{name}: expected an integer of at least {least}, got {value!r}")
    number = operator.index(value)  # type: ignore[arg-type]  # hasattr above
    if number < least:
        raise ArgumentError(f"{name}: expected an integer of at least {least}, got {number}")
    return number


def checked_seed(seed: object) -> int:
    """A seed: an integer of at least 0."""
    return checked_count("seed", seed, least=0)


def checked_fraction(name: str, value: float, *, low: float = 0.0, high: float = 1.0) -> float:
    """`value` as a float strictly between `low` and `high`; ArgumentError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise FederatedTypeError(f"{name}: expected a number, got {value!r}")
    if not low < value < high:
        raise ArgumentError(f"{name}: expected a number strictly in ({low}, {high}), got {value}")
    return float(value)
