"""Opening SQLite files that others wrote: read-only, maybe compressed, never trusted."""

import contextlib
import lzma
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import numpy as np

from fedjax_core.datasets import checks
from fedjax_core.errors import StorageError

if TYPE_CHECKING:
    import sqlite3

_SQLITE_MAGIC = b"SQLite format 3\0"
_XZ_MAGIC = b"\xfd7zXZ\0"
# The properties byte of nearly all .lzma files, and the low bytes of their dictionary size.
_LZMA_MAGIC = b"]\0\0"
_COPY_BYTES = 1 << 20

# Flat values of the public files: (feature, number of values) -> (name here, shape, dtype). The
# files do not say how images are shaped.
_LAYOUTS = {
    ("pixels", 784): ("image", (28, 28, 1), np.dtype(np.float32)),
    ("image", 3072): ("image", (32, 32, 3), np.dtype(np.uint8)),
    ("image", 21168): ("image", (84, 84, 3), np.dtype(np.uint8)),
}


@contextlib.contextmanager
def open_database(
    path: str | os.PathLike[str],
    tables: Mapping[str, tuple[str, ...]],
    temporary: Path | None = None,
) -> Iterator["sqlite3.Connection"]:
    """A read-only connection to a SQLite file, decompressed first if it is an .lzma or .xz.

    Args:
      path: the file.
      tables: the tables that it must have, and their columns.
      temporary: where the decompressed file may lie meanwhile; by default the system's place.

    Raises:
      StorageError: there is no such file, it is something else, it is cut off or damaged, or a
        table or column is missing. So is every error of SQLite inside the context.
    """
    import sqlite3

    path = Path(path).expanduser()
    with _decompressed(path, temporary) as database:
        _check_magic(path, database)
        uri = f"{database.absolute().as_uri()}?mode=ro&immutable=1"
        try:
            with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
                _check_tables(path, connection, tables)
                yield connection
        except sqlite3.Error as error:
            raise StorageError(
                f"cannot read {path} with SQLite: {error}; the file is damaged, get it again"
            ) from error


def known_layout(name: str, values: np.ndarray) -> tuple[str, np.ndarray]:
    """Name and shape that flat values of a public file have here; others stay as they are.

    Args:
      name: of the feature.
      values: ``[rows, ...]``.

    Raises:
      DataError: values that do not fit into the dtype of the layout.
    """
    size = int(np.prod(values.shape[1:]))
    if (name, size) not in _LAYOUTS:
        return name, values
    new_name, shape, dtype = _LAYOUTS[name, size]
    if values.dtype.kind in "iu" and dtype.kind == "u":
        checks.check_fits(f"feature {name!r}", values, dtype)
    return new_name, values.reshape(-1, *shape).astype(dtype, copy=False)


@contextlib.contextmanager
def _decompressed(path: Path, temporary: Path | None) -> Iterator[Path]:
    if not _first_bytes(path).startswith((_XZ_MAGIC, _LZMA_MAGIC)):
        yield path
        return
    with tempfile.TemporaryDirectory(dir=temporary) as folder:
        database = Path(folder) / "database.sqlite"
        _decompress(path, database)
        yield database


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(_SQLITE_MAGIC))
    except OSError as error:
        raise StorageError(f"cannot open {path}: {error}; check the path") from error


def _decompress(path: Path, database: Path) -> None:
    from tqdm import tqdm

    try:
        with (
            path.open("rb") as file,
            tqdm.wrapattr(
                file, "read", path.stat().st_size, desc=f"Decompressing {path.name}", disable=None
            ) as counted,
            lzma.open(cast(IO[bytes], counted)) as source,
            database.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, _COPY_BYTES)
    except (EOFError, lzma.LZMAError) as error:
        raise StorageError(
            f"cannot decompress {path}: {error}; the file is cut off or damaged, delete it and get "
            "it again"
        ) from error
    except OSError as error:
        raise StorageError(
            f"cannot decompress {path} to {database.parent}: {error}; free space there, or set the "
            "environment variable TMPDIR or data_dir= to a larger disk"
        ) from error


def _check_magic(path: Path, database: Path) -> None:
    found = _first_bytes(database)
    if found != _SQLITE_MAGIC:
        raise StorageError(
            f"{path} is no SQLite file, nor one compressed as .lzma or .xz: it begins with "
            f"{found!r}; check which file this is"
        )


def _check_tables(
    path: Path, connection: "sqlite3.Connection", tables: Mapping[str, tuple[str, ...]]
) -> None:
    found = [row[0] for row in connection.execute("SELECT name FROM sqlite_master")]
    for table, columns in tables.items():
        info = connection.execute("SELECT name FROM pragma_table_info(?)", (table,))
        missing = sorted(set(columns) - {row[0] for row in info})
        if missing:
            raise StorageError(
                f"{path} has no table {table!r} with the columns {list(columns)} (tables: {found}, "
                f"missing columns: {missing}); check that this file is of the expected source"
            )
