"""Writing files so that a failure says what to do, and never leaves half a file."""

import os
import pathlib
import uuid

from fedjax_core.errors import StorageError


def unwritable(path: pathlib.Path, error: OSError) -> StorageError:
    """The error to raise for a `path` that cannot be written."""
    return StorageError(
        f"expected a path that can be written, got {path} ({error.strerror}); choose another one."
    )


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Writes beside `path` and renames, so that no reader ever sees half a file.

    Args:
      path: the file, replaced if it exists; missing folders are made.
      data: its content.

    Raises:
      StorageError: the file cannot be written.
    """
    beside = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        # The folder may be what is missing.
        if beside.is_file():
            beside.unlink()
        raise unwritable(path, error) from error
