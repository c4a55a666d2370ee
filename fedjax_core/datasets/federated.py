"""Federated datasets: flat arrays of examples, grouped by client."""

import collections
import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from fedjax_core.datasets import checks
from fedjax_core.datasets import cohort as cohorts
from fedjax_core.datasets.cohort import Cohort, Slices, bytes_per_row
from fedjax_core.datasets.resident import DeviceDataset, put_on_device
from fedjax_core.errors import ArgumentError, DataError, FederatedTypeError, UnknownClientError
from fedjax_core.memory import check_fits

# Of a cohort's tables: start, length, uid, index, valid.
_BYTES_PER_CLIENT = 8 + 4 + 8 + 4 + 1

# Above this many clients a search for similar ids would take longer than a person waits.
_MAX_CLIENTS_TO_COMPARE = 20_000


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FederatedDataset:
    """Examples of many clients: flat arrays in which each client is one slice of rows.

    The arrays are in memory or memory-mapped, and read-only through this object. Nothing loops over
    clients or examples in Python when a cohort is made.

    Attributes:
      examples: feature name -> array ``[num_examples, ...]``, grouped by client.
      offsets: int64 ``[num_clients + 1]``; client `i` has the rows ``offsets[i]:offsets[i + 1]``.
      client_ids: the ids, in the order of the rows.
      name: for messages and reports.

    Examples:
      >>> import numpy as np
      >>> from fedjax_core.datasets import from_clients
      >>> data = from_clients({"ann": {"x": np.arange(3)}, "bob": {"x": np.arange(2)}})
      >>> data
      FederatedDataset('clients', num_clients=2, num_examples=5, features={'x': 'int32[]'})
      >>> data.client("bob")["x"].tolist(), data.cohort(["bob", "ann"]).length.tolist()
      ([0, 1], [2, 3])
    """

    examples: Mapping[str, np.ndarray]
    offsets: np.ndarray
    client_ids: tuple[str, ...]
    name: str = "examples"

    def __post_init__(self) -> None:
        examples = {
            name: checks.read_only(checks.canonical(name, x)) for name, x in self.examples.items()
        }
        offsets = checks.read_only(np.asarray(self.offsets, np.int64))
        client_ids = tuple(self.client_ids)
        checks.check_rows(examples, self.name)
        checks.check_client_ids(client_ids)
        checks.check_offsets(offsets, len(client_ids), next(iter(examples.values())).shape[0])
        object.__setattr__(self, "examples", examples)
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "client_ids", client_ids)

    @property
    def num_clients(self) -> int:
        """How many clients the dataset has, empty ones included."""
        return len(self.client_ids)

    @functools.cached_property
    def num_examples(self) -> np.ndarray:
        """int64 ``[num_clients]``: each client's number of examples, aligned with `client_ids`."""
        return checks.read_only(np.diff(self.offsets))

    @property
    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of one example, without the examples axis."""
        return {n: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for n, x in self.examples.items()}

    @functools.cached_property
    def bytes_per_example(self) -> int:
        """What one example takes in memory."""
        return bytes_per_row(self.examples)

    @functools.cached_property
    def _positions(self) -> dict[str, int]:
        return {client_id: i for i, client_id in enumerate(self.client_ids)}

    @functools.cached_property
    def _uids(self) -> np.ndarray:
        return cohorts.client_uids(self.client_ids)

    def client(self, client_id: str) -> dict[str, np.ndarray]:
        """The examples of one client: feature name -> read-only view ``[num_examples, ...]``.

        Raises:
          UnknownClientError: the dataset has no such client.
        """
        position = self._position(client_id)
        rows = slice(self.offsets[position], self.offsets[position + 1])
        return {name: np.asarray(x[rows]) for name, x in self.examples.items()}

    def cohort(self, ids: Iterable[str], num_clients: int | None = None) -> Cohort:
        """The examples of several clients, packed for one round.

        Args:
          ids: ids of different clients of this dataset, in the order the cohort shall have.
          num_clients: if given, the cohort is padded with invalid, empty clients to this size, so
            that rounds with cohorts of different sizes share one compiled program.

        Returns:
          A `Cohort` of numpy arrays in memory; no device is touched.

        Raises:
          DataError: no id, or the same one twice; `UnknownClientError` for an unknown one.
          FederatedTypeError: an id that is no str, or one str in place of a list.
          ArgumentError: `num_clients` is below the number of ids, or above 2**31 - 1.
          DeviceMemoryError: there is no memory for so many; nothing was allocated.
        """
        return self.cohort_at(self.positions(ids), num_clients)

    def cohort_at(self, positions: np.ndarray, num_clients: int | None = None) -> Cohort:
        """As `cohort`, of the clients at these different positions of `client_ids`.

        Raises:
          DeviceMemoryError: the examples do not fit into memory; nothing was allocated.
        """
        slices = self.slices_at(positions, num_clients)
        rows = cohorts.slice_rows(slices.start, slices.length)
        num_rows = cohorts.next_power_of_two(len(rows))
        if num_rows > 2**31:
            raise DataError(
                f"a cohort holds at most 2**31 examples, got {len(rows)} in {len(positions)} "
                "clients; take fewer clients a round"
            )
        what = f"the {len(rows):,} examples of {len(positions):,} clients of {self.name!r}"
        remedy = "take fewer clients a round"
        check_fits(num_rows * self.bytes_per_example, what, remedy, on_host=True)
        pool = {n: cohorts.gather_rows(x, rows, num_rows) for n, x in self.examples.items()}
        return slices.packed().of(pool, cohorts.next_power_of_two(int(slices.length.max())))

    def on_device(self, device: Any = None) -> DeviceDataset:
        """The dataset with its examples on a device, as they are stored.

        Rounds then gather their examples there: what the host sends is a few numbers a client, and
        all cohorts of one size share one compiled program.

        Args:
          device: a `jax.Device` or a sharding; JAX's default device if not given.

        Raises:
          DeviceMemoryError: the examples do not fit there; nothing was allocated.
          DataError: more than 2**31 - 1 examples.

        Examples:
          >>> import numpy as np
          >>> from fedjax_core.datasets import from_clients
          >>> data = from_clients({"a": {"x": np.arange(3)}, "b": {"x": np.arange(2)}}).on_device()
          >>> data.cohort(["b"]).start.tolist(), data.capacity
          ([3], 4)
        """
        return put_on_device(self, device)

    def slices_at(self, positions: np.ndarray, num_clients: int | None = None) -> Slices:
        """The clients at these different positions of `client_ids` as slices of `examples`.

        Args:
          positions: integers ``[clients]``.
          num_clients: padded size, see `cohort`.

        Raises:
          DataError: no position, the same one twice, or one that the dataset does not have.
          ArgumentError: `num_clients` is below the number of positions.
        """
        positions = self._checked_positions(positions)
        size = _padded_size(num_clients, len(positions))
        return Slices(
            start=_pad(self.offsets[positions], size, 0, np.int64),
            length=_pad(self.num_examples[positions], size, 0, np.int32),
            uid=_pad(self._uids[positions], size, 0, np.uint32),
            index=_pad(positions, size, self.num_clients, np.int32),
            valid=_pad(np.ones(len(positions)), size, 0, np.bool_),
        )

    def select(self, ids: Iterable[str]) -> "FederatedDataset":
        """The dataset of these clients only, in this order; their examples are copied.

        Raises:
          DataError, FederatedTypeError: as `cohort`.
        """
        positions = self.positions(ids)
        length = self.num_examples[positions]
        rows = cohorts.slice_rows(self.offsets[positions], length)
        examples = {n: cohorts.gather_rows(x, rows, len(rows)) for n, x in self.examples.items()}
        client_ids = tuple(self.client_ids[i] for i in positions)
        return FederatedDataset(examples, checks.offsets_of(length), client_ids, self.name)

    def __len__(self) -> int:
        return self.num_clients

    def __repr__(self) -> str:
        features = {n: f"{s.dtype}{list(s.shape)}" for n, s in self.element_spec.items()}
        return (
            f"FederatedDataset({self.name!r}, num_clients={self.num_clients}, "
            f"num_examples={self.offsets[-1]}, features={features})"
        )

    def _position(self, client_id: object) -> int:
        if not isinstance(client_id, str):
            raise FederatedTypeError(
                f"client ids are str, got {client_id!r} of type {type(client_id).__name__}; those "
                f"of {self.name!r} look like {self.client_ids[0]!r} and are in `client_ids`"
            )
        position = self._positions.get(client_id)
        if position is None:
            raise UnknownClientError(self._unknown(client_id))
        return position

    def _unknown(self, client_id: str) -> str:
        known = self.client_ids[:_MAX_CLIENTS_TO_COMPARE]
        close = difflib.get_close_matches(client_id, known, n=3) or list(known[:3])
        return (
            f"the dataset {self.name!r} has no client {client_id!r} among its {self.num_clients} "
            f"clients; did you mean one of {close}? All ids are in `client_ids`"
        )

    def positions(self, ids: Iterable[str]) -> np.ndarray:
        """The positions of different clients in `client_ids`: int64 ``[clients]``.

        Raises:
          DataError, FederatedTypeError: as `cohort`.
        """
        if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
            raise FederatedTypeError(
                f"expected a list of client ids, got {ids!r} of type {type(ids).__name__}; for one "
                "client pass a list of one id"
            )
        found = np.asarray([self._position(client_id) for client_id in ids], np.int64)
        return self._checked_positions(found)

    def _checked_positions(self, positions: Any) -> np.ndarray:
        positions = np.asarray(positions)
        if positions.ndim != 1 or not len(positions):
            raise DataError(f"expected at least one client id of {self.name!r}, got none")
        if positions.dtype.kind not in "iu":
            raise FederatedTypeError(
                f"expected positions of clients as integers, got {positions.dtype}; they are those "
                "of `client_ids`, see `positions`"
            )
        ordered = np.sort(positions)
        if ordered[0] < 0 or ordered[-1] >= self.num_clients:
            wrong = ordered[0] if ordered[0] < 0 else ordered[-1]
            raise UnknownClientError(
                f"expected positions from 0 to {self.num_clients - 1} in the dataset "
                f"{self.name!r}, got {wrong}"
            )
        if (ordered[1:] == ordered[:-1]).any():
            position, count = collections.Counter(positions.tolist()).most_common(1)[0]
            raise DataError(
                f"each client may be asked for once, got {self.client_ids[position]!r} {count} "
                "times; sample without replacement or remove the repetition"
            )
        return positions


def _padded_size(num_clients: int | None, num_ids: int) -> int:
    if num_clients is None:
        return num_ids
    num_clients = checks.checked_count("num_clients", num_clients)
    if num_clients < num_ids:
        raise ArgumentError(
            f"num_clients is the padded size of the cohort: expected at least the {num_ids} ids "
            f"given, got {num_clients=}"
        )
    if num_clients >= 2**31:
        raise ArgumentError(
            f"num_clients: expected at most 2**31 - 1, got {num_clients}; it is the padded size of "
            "the cohort, such as the clients of the largest round"
        )
    what = f"the tables of {num_clients:,} clients"
    check_fits(_BYTES_PER_CLIENT * num_clients, what, "pad to fewer clients", on_host=True)
    return num_clients


def _pad(values: np.ndarray, size: int, fill: int, dtype: type) -> np.ndarray:
    padded = np.full((size, *values.shape[1:]), fill, dtype)
    padded[: len(values)] = values
    return padded
