"""Federated datasets in the format of TensorFlow Federated's public files.

An SQLite file, often LZMA-compressed, with two tables:

    examples(split_name, client_id, serialized_example_proto)   one row an example
    client_metadata(client_id, split_name, num_examples)

The examples are serialized `tf.train.Example` messages; TensorFlow is not needed to read them.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedjax_core.datasets import checks, sqlite_files, store
from fedjax_core.datasets.federated import FederatedDataset
from fedjax_core.errors import DataError, StorageError

if TYPE_CHECKING:
    import sqlite3

Decode = Callable[[dict[str, Any]], dict[str, Any]]
Row = tuple[str, bytes]

TABLES = {
    "examples": ("split_name", "client_id", "serialized_example_proto"),
    "client_metadata": ("client_id", "split_name", "num_examples"),
}
_CHUNK_ROWS = 1024


def from_tff_sqlite(
    path: str | os.PathLike[str],
    *,
    split: str,
    decode: Decode | None = None,
    name: str | None = None,
) -> FederatedDataset:
    """Reads one split of a file in TensorFlow Federated's format into memory.

    Args:
      path: the .sqlite file, or the .sqlite.lzma as published.
      split: one of the splits in the file, for example "digits_only_train".
      decode: turns one example into arrays of the same shape for all; it gets feature name ->
        float32 or int64 array ``[num_values]``, or a list of bytes. By default single values
        become scalars, the flat images of the public files are shaped (EMNIST's `pixels` become
        `image` float32 ``[28, 28, 1]``), and other features stay flat.
      name: for messages and reports; by default file and split.

    Returns:
      A `FederatedDataset`, its clients in the order of their ids.

    Raises:
      StorageError: the file is missing, damaged, or of another format.
      DataError: no such split, or features that are text or of varying length without a `decode`.
    """
    with sqlite_files.open_database(path, TABLES) as connection:
        title = name or f"{Path(path).name.split('.')[0]}/{split}"
        return read_split(connection, split, store.allocate_in_memory, decode, title)


def read_split(
    connection: "sqlite3.Connection",
    split: str,
    allocate: store.Allocate,
    decode: Decode | None,
    name: str,
) -> FederatedDataset:
    """Reads one split row by row, in one pass over the file, into arrays that `allocate` makes."""
    client_ids, sizes = _clients(connection, split)
    offsets = checks.offsets_of(sizes)
    placer = _Placer(client_ids, offsets)
    examples: dict[str, np.ndarray] = {}
    for rows in _chunks(connection, split, int(offsets[-1])):
        positions = placer.positions(rows)
        chunk = _decoded(rows, decode)
        if not examples:
            examples = _allocated(chunk, int(offsets[-1]), allocate)
        _check_same_features(chunk, examples, rows)
        store.placed_rows(positions, chunk, examples)
    placer.check_complete()
    if not examples:
        raise StorageError(f"the split {split!r} has no examples; get the file again")
    return FederatedDataset(examples, offsets, client_ids, name)


class _Placer:
    """Gives every row its place: the next free one of its client."""

    def __init__(self, client_ids: tuple[str, ...], offsets: np.ndarray) -> None:
        self._client_ids = client_ids
        self._index = {client_id: i for i, client_id in enumerate(client_ids)}
        self._free = offsets[:-1].tolist()
        self._end = offsets[1:].tolist()

    def positions(self, rows: list[Row]) -> np.ndarray:
        """The rows' places in the arrays: int64 ``[rows]``."""
        return np.asarray([self._position(client_id) for client_id, _ in rows], np.int64)

    def check_complete(self) -> None:
        """All clients have as many examples as they should."""
        for client_id, free, end in zip(self._client_ids, self._free, self._end, strict=True):
            if free != end:
                raise StorageError(
                    f"client {client_id!r} has {end - free} examples less than client_metadata "
                    "states; the file is incomplete, get it again"
                )

    def _position(self, client_id: str) -> int:
        client = self._index.get(client_id)
        if client is None or self._free[client] == self._end[client]:
            raise StorageError(
                f"client {client_id!r} has more examples than client_metadata states; the file is "
                "inconsistent, get it again"
            )
        self._free[client] += 1
        return self._free[client] - 1


def _clients(connection: "sqlite3.Connection", split: str) -> tuple[tuple[str, ...], np.ndarray]:
    rows = connection.execute(
        "SELECT client_id, num_examples FROM client_metadata WHERE split_name = ? "
        "ORDER BY client_id",
        (split,),
    ).fetchall()
    if not rows:
        found = connection.execute("SELECT DISTINCT split_name FROM client_metadata ORDER BY 1")
        raise DataError(f"no split {split!r}; the file has {[row[0] for row in found]}")
    bad = [r for r in rows if not isinstance(r[0], str) or not isinstance(r[1], int) or r[1] < 0]
    if bad or len({row[0] for row in rows}) < len(rows):
        raise StorageError(
            "client_metadata needs one row for each client id (text) with its num_examples (at "
            f"least 0), got {bad[:3] or 'a client twice'}; get the file again"
        )
    _check_total(connection, split, sum(row[1] for row in rows))
    return tuple(row[0] for row in rows), np.asarray([row[1] for row in rows], np.int64)


def _check_total(connection: "sqlite3.Connection", split: str, stated: int) -> None:
    """The split has the examples that it states: what is stated is what will be allocated."""
    query = "SELECT COUNT(*) FROM examples WHERE split_name = ?"
    (found,) = connection.execute(query, (split,)).fetchone()
    if stated > found:
        raise StorageError(
            f"the split {split!r} has {stated - found} examples less than client_metadata states; "
            "the file is incomplete, get it again"
        )


def _chunks(connection: "sqlite3.Connection", split: str, total: int) -> Iterator[list[Row]]:
    from tqdm import tqdm

    # In the order of the table: sorting gigabytes of rows by client would take longer than parsing.
    cursor = connection.execute(
        "SELECT client_id, serialized_example_proto FROM examples WHERE split_name = ? "
        "ORDER BY rowid",
        (split,),
    )
    with tqdm(total=total, desc=f"Reading {split}", unit=" examples", disable=None) as bar:
        while rows := cursor.fetchmany(_CHUNK_ROWS):
            yield rows
            bar.update(len(rows))


def _decoded(rows: list[Row], decode: Decode | None) -> dict[str, np.ndarray]:
    """The examples of some rows as arrays ``[rows, ...]``."""
    parsed = [_parsed(client_id, blob) for client_id, blob in rows]
    if decode is None:
        _check_numbers(parsed[0])
        return _default_decoded(_columns(rows, parsed))
    decoded = [_applied(decode, *x) for x in zip(rows, parsed, strict=True)]
    columns = _columns(rows, decoded)
    return {name: checks.canonical(name, column) for name, column in columns.items()}


def _check_numbers(features: dict[str, Any]) -> None:
    text = [name for name, values in features.items() if isinstance(values, list)]
    if text:
        raise DataError(
            f"the features {text} hold text or bytes; pass decode= with a function that turns an "
            "example into arrays of numbers"
        )


def _applied(decode: Decode, row: Row, features: dict[str, Any]) -> dict[str, np.ndarray]:
    decoded = decode(features)
    if not isinstance(decoded, Mapping):
        raise DataError(
            f"decode must return a dict of feature name -> array, got {type(decoded).__name__}"
        )
    where = f"decode of an example of client {row[0]!r}"
    return {name: checks.to_array(name, value, where) for name, value in decoded.items()}


def _parsed(client_id: str, blob: bytes) -> dict[str, Any]:
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        # Generated code: the class exists only at run time.
        example: Any = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]
        features = example.FromString(blob).features.feature
    except (DecodeError, TypeError) as error:
        raise StorageError(
            f"an example of client {client_id!r} is no tf.train.Example: {error}; get the file "
            "again"
        ) from error
    return {name: _values(feature) for name, feature in sorted(features.items())}


def _values(feature: Any) -> Any:
    kind = feature.WhichOneof("kind")
    if kind == "float_list":
        return np.array(feature.float_list.value, np.float32)
    if kind == "int64_list":
        return np.array(feature.int64_list.value, np.int64)
    return list(feature.bytes_list.value)


def _columns(rows: list[Row], parsed: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    for (client_id, _), features in zip(rows, parsed, strict=True):
        if features.keys() != parsed[0].keys():
            raise StorageError(
                f"an example of client {client_id!r} has the features {sorted(features)}, others "
                f"have {sorted(parsed[0])}; get the file again"
            )
    return {name: _stacked(name, [features[name] for features in parsed]) for name in parsed[0]}


def _stacked(name: str, values: list[Any]) -> np.ndarray:
    try:
        return np.stack(values)
    except ValueError as error:
        raise DataError(
            f"feature {name!r} has examples of different shapes ({error}); pass decode= with a "
            "function that gives all the same shape"
        ) from error


def _default_decoded(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    chunk = dict(sqlite_files.known_layout(name, column) for name, column in columns.items())
    flat = {n: x[:, 0] if x.shape[1:] == (1,) else x for n, x in chunk.items()}
    return {name: checks.canonical(name, x) for name, x in flat.items()}


def _allocated(
    chunk: dict[str, np.ndarray], num_examples: int, allocate: store.Allocate
) -> dict[str, np.ndarray]:
    return {n: allocate(n, (num_examples, *x.shape[1:]), x.dtype) for n, x in chunk.items()}


def _check_same_features(
    chunk: dict[str, np.ndarray], examples: dict[str, np.ndarray], rows: list[Row]
) -> None:
    found = {n: (x.dtype, x.shape[1:]) for n, x in chunk.items()}
    expected = {n: (x.dtype, x.shape[1:]) for n, x in examples.items()}
    if found != expected:
        raise DataError(
            f"the examples of clients {rows[0][0]!r} to {rows[-1][0]!r} have {found}, those before "
            f"have {expected}; pass decode= with a function that gives all the same form"
        )
