"""Federated datasets in the format of FedJAX's public files.

An SQLite file with one table, ``federated_data(client_id, data, num_examples)``, one row a client;
`data` is zlib-compressed msgpack of a dict of feature name -> array. An array is the msgpack
extension 1, itself msgpack of ``[shape, name of the dtype, bytes in row-major order]``.
"""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedjax_core.datasets import building, sqlite_files
from fedjax_core.datasets.federated import FederatedDataset
from fedjax_core.errors import DataError, StorageError

if TYPE_CHECKING:
    import sqlite3

TABLES = {"federated_data": ("client_id", "data", "num_examples")}
_ARRAY = 1
_TEXT_ARRAY = 4
# A client's data beyond this is taken for an attack or damage rather than unpacked.
_MAX_CLIENT_BYTES = 1 << 31


def from_fedjax_sqlite(
    path: str | os.PathLike[str], *, name: str | None = None
) -> FederatedDataset:
    """Reads a file in FedJAX's format into memory.

    Args:
      path: the .sqlite file (or one compressed as .lzma or .xz).
      name: for messages and reports; by default the file's.

    Returns:
      A `FederatedDataset`, its clients in the order of their ids. EMNIST's `pixels` become `image`
      float32 ``[28, 28, 1]``; everything else is as in the file.

    Raises:
      StorageError: the file is missing, damaged, or of another format.
      DataError: features that hold text, or that differ between clients.
    """
    with sqlite_files.open_database(path, TABLES) as connection:
        rows = list(_clients(connection))
    clients = dict(rows)
    if not clients or len(clients) < len(rows):
        raise StorageError(
            f"{path} has {len(rows)} clients with {len(clients)} different ids; check that this "
            "file is of the expected source"
        )
    return building.from_clients(clients, name=name or Path(path).name.split(".")[0])


def _clients(connection: "sqlite3.Connection") -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    rows = connection.execute(
        "SELECT client_id, data, num_examples FROM federated_data ORDER BY client_id"
    )
    for raw_id, data, num_examples in rows:
        is_bytes = isinstance(raw_id, bytes)
        client_id = raw_id.decode("utf-8", "surrogateescape") if is_bytes else str(raw_id)
        examples = _examples(client_id, data)
        _check_num_examples(client_id, examples, num_examples)
        yield client_id, dict(sqlite_files.known_layout(n, x) for n, x in examples.items())


def _examples(client_id: str, data: bytes) -> dict[str, np.ndarray]:
    import msgpack

    try:
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(data, _MAX_CLIENT_BYTES)
        if not unpacker.eof:
            raise ValueError("the compressed data is cut off or too large")
        examples = msgpack.unpackb(content, ext_hook=_array, raw=False)
    except (DataError, StorageError):
        raise
    except Exception as error:
        # msgpack raises a dozen unrelated classes on bytes that it does not understand.
        raise StorageError(
            f"the data of client {client_id!r} is damaged or no zlib-compressed msgpack: {error}; "
            "get the file again"
        ) from error
    if not isinstance(examples, dict) or not all(_is_column(x) for x in examples.values()):
        raise StorageError(
            f"the data of client {client_id!r} is no dict of arrays; check that this file is in "
            "FedJAX's format"
        )
    return examples


def _is_column(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim > 0


def _array(code: int, data: bytes) -> np.ndarray:
    import msgpack

    if code == _TEXT_ARRAY:
        raise DataError(
            "the file holds text, which is no feature for JAX; encode it as integers and use "
            "from_clients"
        )
    if code != _ARRAY:
        raise ValueError(f"unknown msgpack extension {code}")
    shape, dtype, content = msgpack.unpackb(data, raw=False)
    return np.frombuffer(content, np.dtype(dtype)).reshape(shape)


def _check_num_examples(client_id: str, examples: dict[str, np.ndarray], stated: object) -> None:
    sizes = {name: len(x) for name, x in examples.items()}
    if not sizes or any(size != stated for size in sizes.values()):
        raise StorageError(
            f"client {client_id!r}: num_examples states {stated}, the features have {sizes} "
            "examples; the file is inconsistent, get it again"
        )
