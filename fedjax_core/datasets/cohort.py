"""The examples of one round: many clients packed into one set of arrays."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fedjax_core.language.values import Sequence

# Bytes: XLA's CPU backend copies an array that begins anywhere else.
_ALIGNMENT = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Cohort:
    """The clients of one round and their examples, as a pytree that any JAX transform accepts.

    All examples lie in one pool, one client after the other; a client is a slice of it. `rows` and
    `capacity` are powers of two, so that few different shapes occur over the rounds of a training.

    Attributes:
      examples: feature name -> array ``[rows, ...]``; rows past the last client's end are zeros.
      start: int32 ``[num_clients]``, the first row of each client.
      length: int32 ``[num_clients]``, its number of examples, 0 for an empty client.
      uid: uint32 ``[num_clients, 2]``, `client_uid` of its id: what its random key is folded from.
      index: int32 ``[num_clients]``, its position in the dataset. Clients that only pad the cohort
        hold the size of the dataset there: JAX drops a scatter to that position.
      valid: bool ``[num_clients]``, False for clients that only pad the cohort.
      capacity: static upper bound of `length`.
      pools: static, of how many pools `examples` consists, see `Sequence`; 1 unless `spread` made
        the cohort.
    """

    examples: dict[str, Any]
    start: Any
    length: Any
    uid: Any
    index: Any
    valid: Any
    capacity: int = dataclasses.field(metadata={"static": True})
    pools: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def num_clients(self) -> int:
        """How many clients the cohort has, those that pad it included."""
        return self.start.shape[0]

    def sequence(self) -> Sequence:
        """The clients' examples as a packed `Sequence`: what a federated computation takes."""
        pools = self.pools
        return Sequence(self.examples, self.start, self.length, self.capacity, True, pools)

    def __repr__(self) -> str:
        shapes = {
            name: f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else repr(x)
            for name, x in self.examples.items()
        }
        size = self.num_clients if hasattr(self.start, "shape") else "?"
        return f"Cohort(num_clients={size}, capacity={self.capacity}, examples={shapes})"


@dataclasses.dataclass(frozen=True)
class Slices:
    """Clients as slices of a pool of examples, on the host.

    Attributes:
      start: int64 ``[clients]``, the first row of each.
      length: int32 ``[clients]``.
      uid, index, valid: as in `Cohort`.
    """

    start: np.ndarray
    length: np.ndarray
    uid: np.ndarray
    index: np.ndarray
    valid: np.ndarray

    def packed(self) -> "Slices":
        """The same clients in a pool that holds their rows alone, one client after the other."""
        start = np.cumsum(self.length, dtype=np.int64) - self.length
        return dataclasses.replace(self, start=np.where(self.valid, start, 0))

    def of(self, examples: dict[str, Any], capacity: int) -> Cohort:
        """The clients as a cohort of a pool.

        Args:
          examples: the pool, feature name -> array ``[rows, ...]``.
          capacity: see `Cohort`.
        """
        start = self.start.astype(np.int32)
        return Cohort(examples, start, self.length, self.uid, self.index, self.valid, capacity)


def client_uid(client_id: str) -> np.ndarray:
    """The first 64 bits of the SHA-256 of a client's id, as two big-endian uint32.

    Returns:
      uint32 ``[2]``. It depends on the id alone: not on the dataset, the cohort or the machine.

    Examples:
      >>> [hex(word) for word in client_uid("abc")]
      ['0xba7816bf', '0x8f01cfea']
    """
    return client_uids([client_id])[0]


def client_uids(client_ids: list[str] | tuple[str, ...]) -> np.ndarray:
    """`client_uid` of many clients: uint32 ``[num_clients, 2]``."""
    # "surrogatepass": ids are any str; one that UTF-8 cannot hold must not end a training.
    digests = (hashlib.sha256(i.encode("utf-8", "surrogatepass")).digest()[:8] for i in client_ids)
    words = np.frombuffer(b"".join(digests), dtype=">u4")
    return words.astype(np.uint32).reshape(-1, 2)


def next_power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`, and at least 1."""
    return 1 << max(size - 1, 0).bit_length()


def gather_rows(array: np.ndarray, rows: np.ndarray, size: int) -> np.ndarray:
    """``array[rows]``, padded with zeros to `size` rows: ``[size, ...]`` in memory."""
    gathered = aligned_zeros((size, *array.shape[1:]), array.dtype)
    # mode="clip" writes straight into `out`; the default mode would make a second copy.
    np.take(array, rows, axis=0, out=gathered[: len(rows)], mode="clip")
    return gathered


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """As `np.zeros`, where JAX can use it: on a CPU it takes the array over without a copy.

    Examples:
      >>> aligned_zeros((5, 3), np.dtype(np.int32)).ctypes.data % 64
      0
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    buffer = np.zeros(num_bytes + _ALIGNMENT, np.uint8)
    begin = -buffer.ctypes.data % _ALIGNMENT
    return buffer[begin : begin + num_bytes].view(dtype).reshape(shape)


def bytes_per_row(examples: Mapping[str, Any]) -> int:
    """What one example of a pool takes in memory."""
    return sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in examples.values())


def slice_rows(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The row numbers of many slices, one after the other: int64 ``[sum(length)]``."""
    ends = np.cumsum(length, dtype=np.int64)
    shift = np.asarray(start, np.int64) - (ends - length)
    return np.repeat(shift, length) + np.arange(ends[-1] if len(ends) else 0, dtype=np.int64)
