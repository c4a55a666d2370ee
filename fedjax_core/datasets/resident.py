"""A dataset that lives on the device: a round gathers its rows there, and the host sends indices.

The arrays are kept as they are stored (uint8 images stay uint8). A cohort of it is a few numbers a
client; the pool of examples, shared by all cohorts, has one shape, so that rounds with different
clients share one compiled program.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from fedjax_core.datasets.cohort import Cohort, next_power_of_two
from fedjax_core.errors import ArgumentError, DataError, FederatedTypeError
from fedjax_core.memory import check_fits, format_bytes

if TYPE_CHECKING:
    from fedjax_core.datasets.federated import FederatedDataset


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DeviceDataset:
    """A `FederatedDataset` with its examples on a device, made by `FederatedDataset.on_device`.

    Attributes:
      dataset: the same dataset in the memory of the host.
      examples: feature name -> array ``[num_examples, ...]`` on the device.
      capacity: static upper bound of a client's number of examples, a power of two.
    """

    dataset: "FederatedDataset"
    examples: dict[str, jax.Array]
    capacity: int

    @property
    def num_clients(self) -> int:
        """How many clients the dataset has, empty ones included."""
        return self.dataset.num_clients

    @property
    def client_ids(self) -> tuple[str, ...]:
        """The ids, in the order of the rows."""
        return self.dataset.client_ids

    @property
    def num_bytes(self) -> int:
        """What the examples take on the device."""
        return sum(x.nbytes for x in self.examples.values())

    def cohort(self, ids: Iterable[str], num_clients: int | None = None) -> Cohort:
        """As `FederatedDataset.cohort`, of examples that stay where they are."""
        return self.cohort_at(self.dataset.positions(ids), num_clients)

    def cohort_at(self, positions: np.ndarray, num_clients: int | None = None) -> Cohort:
        """The cohort of the clients at these positions of `client_ids`; see `cohort`."""
        return self.dataset.slices_at(positions, num_clients).of(self.examples, self.capacity)

    def __repr__(self) -> str:
        size = format_bytes(self.num_bytes)
        return f"DeviceDataset({self.dataset!r}, {size}, capacity={self.capacity})"


def put_on_device(dataset: "FederatedDataset", device: Any = None) -> DeviceDataset:
    """See `FederatedDataset.on_device`."""
    if not isinstance(device, jax.Device | jax.sharding.Sharding | None):
        raise FederatedTypeError(
            f"on_device: expected a jax.Device or a sharding, got {device!r}; take one of "
            "jax.devices()"
        )
    num_rows = int(dataset.offsets[-1])
    if num_rows >= 2**31:
        raise DataError(
            f"a device holds at most 2**31 - 1 examples of a dataset, got {num_rows}; leave it in "
            "the memory of the host: rounds are then sent what they need"
        )
    num_bytes = sum(_bytes_on(device, x) for x in dataset.examples.values())
    what = f"the {num_rows:,} examples of {dataset.name!r}"
    remedy = "leave them in the memory of the host: rounds are then sent what they need"
    where = _first_of(device)
    check_fits(num_bytes, what, remedy, where)
    examples = jax.device_put(dict(dataset.examples), device)
    capacity = next_power_of_two(int(dataset.num_examples.max()))
    return DeviceDataset(dataset, examples, capacity)


def _first_of(device: Any) -> Any:
    """A device to ask for its memory."""
    if not isinstance(device, jax.sharding.Sharding):
        return device
    local = device.addressable_devices
    return min(local, key=lambda found: found.id) if local else None


def _bytes_on(device: Any, array: np.ndarray) -> int:
    """What an array takes on each device; on CPUs, which share their memory, on all of them.

    Raises:
      ArgumentError: for a sharding that does not divide the array.
    """
    if not isinstance(device, jax.sharding.Sharding):
        return array.nbytes
    try:
        shape = device.shard_shape(array.shape)
    except ValueError as error:
        raise ArgumentError(
            f"on_device: expected a sharding that divides {array.dtype}{list(array.shape)}, got "
            f"{device!r} ({error}); keep all examples on each device, as "
            "NamedSharding(mesh, PartitionSpec()) does, or spread each cohort: datasets.spread"
        ) from error
    local = device.addressable_devices
    is_cpu = all(found.platform == "cpu" for found in local)
    return math.prod(shape) * array.dtype.itemsize * (len(local) if is_cpu else 1)
