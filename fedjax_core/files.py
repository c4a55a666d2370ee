"""Writing files so that a failure says what to do, and never leaves half a file."""

import contextlib
import errno
import os
import pathlib
import uuid

from fedjax_core.errors import StorageError


def unwritable(path: pathlib.Path, error: OSError | ValueError) -> StorageError:
    """The error to raise for a `path` that cannot be written."""
    # A path with a NUL in it is a ValueError.
    reason = getattr(error, "strerror", None) or error
    return StorageError(
        f"expected a path that can be written, got {path} ({reason}); choose another one."
    )


def check_writable(path: pathlib.Path, *, overwrite: bool) -> None:
    """Makes sure that `write_atomically` can write `path`, and leaves what is there alone.

    Args:
      path: the file; missing folders are made.
      overwrite: whether the file may exist.

    Raises:
      StorageError: the file cannot be written, or it exists and may not.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        exists = _exists(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = _beside(path)
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        raise unwritable(path, error) from error
    if exists and not overwrite:
        raise StorageError(
            f"expected a new file, got {path}, which exists; choose another one, or overwrite it "
            "(`--overwrite`)."
        )


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Writes beside `path` and renames, so that no reader ever sees half a file.

    Args:
      path: the file, replaced if it exists; missing folders are made.
      data: its content.

    Raises:
      StorageError: the file cannot be written.
    """
    beside = None
    try:
        beside = _beside(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except (OSError, ValueError) as error:
        # The folder or the file may be what is missing.
        with contextlib.suppress(OSError, ValueError):
            if beside is not None:
                beside.unlink()
        raise unwritable(path, error) from error


def _beside(path: pathlib.Path) -> pathlib.Path:
    """A new name in the folder of `path`; not made of its name, which may be as long as can be."""
    return path.with_name(f".incomplete-{uuid.uuid4().hex}")


def _exists(path: pathlib.Path) -> bool:
    # Not `Path.exists`, for which a name that is too long is no error in every version of Python.
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True
