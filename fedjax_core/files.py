"""Files: written whole or not at all, sealed with a checksum, and errors that say what to do."""

import contextlib
import errno
import hashlib
import os
import pathlib
import stat
import uuid
from typing import Any, NamedTuple

from fedjax_core.errors import FederatedTypeError, StorageError


def to_path(path: Any) -> pathlib.Path:
    """The path that a user passed.

    Raises:
      FederatedTypeError: for what is neither text nor a path.

    Examples:
      >>> to_path("states/latest").name
      'latest'
    """
    try:
        return pathlib.Path(path)
    except TypeError as error:
        raise FederatedTypeError(
            f"Expected a path, as a str or a pathlib.Path, got {path!r} of type "
            f"{type(path).__name__}."
        ) from error


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
        target = _target(path)
        exists = _exists(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        probe = _beside(target)
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
      path: the file, replaced if it exists; missing folders are made. Of a link that which it leads
        to is written, and the link stays.
      data: its content.

    Raises:
      StorageError: the file cannot be written, or what is there is no file: a folder, a device.
    """
    beside = None
    try:
        target = _target(path)
        beside = _beside(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    except (OSError, ValueError) as error:
        # The folder or the file may be what is missing.
        with contextlib.suppress(OSError, ValueError):
            if beside is not None:
                beside.unlink()
        raise unwritable(path, error) from error


class SealedKind(NamedTuple):
    """A kind of file that begins with a line of text: its format, version, SHA-256 of the rest.

    Attributes:
      format: the first word of the line.
      version: the second; a file of another version is refused.
      what: names the kind in errors.
      writer: names the function that writes it.
    """

    format: str
    version: str
    what: str
    writer: str


CHECKPOINT = SealedKind("fedjax-core", "1", "a checkpoint", "`save`")
COMPUTATION = SealedKind("fedjax-core-computation", "1", "an exported computation", "`export`")

# Longer than any first line: what is there in a foreign file may have no end.
_MAX_HEADER = 200


def write_sealed(path: pathlib.Path, kind: SealedKind, body: bytes) -> None:
    """Writes `body` behind the line that seals it, atomically.

    Raises:
      StorageError: the file cannot be written.
    """
    header = f"{kind.format} {kind.version} {hashlib.sha256(body).hexdigest()}\n".encode()
    write_atomically(path, header + body)


def read_sealed(path: pathlib.Path, kind: SealedKind) -> bytes:
    """What `write_sealed` was given.

    Raises:
      StorageError: there is no such file, or it is of another kind or version, cut short or
        altered.
    """
    header, _, body = _read(path, f"a file that {kind.writer} wrote").partition(b"\n")
    fields = header[:_MAX_HEADER].decode("ascii", "replace").split(" ")
    if len(fields) != 3 or fields[0] != kind.format:
        raise StorageError(
            f"expected a file that {kind.writer} wrote, got {path}, which is not; check the path."
        )
    if fields[1] != kind.version:
        raise StorageError(
            f"expected {kind.what} of version {kind.version}, got version {fields[1]} in {path}; "
            "read it with the version of the library that wrote it."
        )
    if fields[2] != hashlib.sha256(body).hexdigest():
        raise StorageError(
            f"expected the bytes that {kind.writer} wrote, got {path} with another checksum: it "
            "was cut short or altered; use another copy or write it again."
        )
    return body


def kind_of(path: pathlib.Path, *kinds: SealedKind) -> SealedKind:
    """Which of some kinds of files this one is, by its first word.

    Raises:
      StorageError: there is no such file, or it is of none of these kinds.
    """
    writers = " or ".join(kind.writer for kind in kinds)
    start = _read(path, f"a file that {writers} wrote", _MAX_HEADER)
    found = {kind.format.encode(): kind for kind in kinds}.get(start.partition(b" ")[0])
    if found is None:
        raise StorageError(
            f"expected a file that {writers} wrote, got {path}, which is not; check the path."
        )
    return found


def unreadable(path: pathlib.Path, kind: SealedKind) -> StorageError:
    """The error to raise for a file whose checksum fits but whose content does not."""
    return StorageError(
        f"expected a file that {kind.writer} wrote, got {path}, whose content is something else; "
        "use another copy or write it again."
    )


def _read(path: pathlib.Path, what: str, size: int = -1) -> bytes:
    try:
        _check_regular(path)  # a pipe would wait for a writer, and a device has no end
        with path.open("rb") as file:
            return file.read(size)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"expected {what}, got {path} ({reason}); check the path.") from error


def _target(path: pathlib.Path) -> pathlib.Path:
    """The file that is written for `path`: another one where that is a link.

    Raises:
      OSError: there is something, and it is no file.
    """
    with contextlib.suppress(FileNotFoundError):
        _check_regular(path)
    return pathlib.Path(os.path.realpath(path)) if path.is_symlink() else path


def _check_regular(path: pathlib.Path) -> None:
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "It is a device, a pipe or a socket")


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
