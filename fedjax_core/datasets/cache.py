"""The cache folder: prepared datasets, each in a folder of its own, whole or not at all."""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedjax_core.errors import StorageError
from fedjax_core.files import write_atomically

ENVIRONMENT_VARIABLE = "FEDJAX_CORE_CACHE"
_SETTINGS_FILE = "settings.json"
_REMEDY = f"choose another folder with data_dir= or the environment variable {ENVIRONMENT_VARIABLE}"


def cache_folder(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder for prepared data: `data_dir`, else $FEDJAX_CORE_CACHE, else ~/.cache/fedjax_core.

    It is not created: data that is already prepared may lie on a read-only disk.

    Raises:
      StorageError: no folder can have this name.
    """
    chosen = data_dir or os.environ.get(ENVIRONMENT_VARIABLE) or "~/.cache/fedjax_core"
    folder = Path(chosen).expanduser().absolute()
    if "\0" in str(folder):
        raise StorageError(f"no folder has a NUL in its name, got {str(folder)!r}; {_REMEDY}")
    return folder


def make_writable(folder: Path) -> Path:
    """Creates `folder` and its parents, and makes sure that files can be written there.

    Raises:
      StorageError: it cannot be created or written; the message names it and the remedy.
    """
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    return folder


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turns errors of the file system into a StorageError that names the folder and the remedy."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"cannot write to the cache folder {folder}: {error}; {_REMEDY}"
        ) from error


def prepared(
    parent: Path, name: str, settings: Mapping[str, Any], build: Callable[[Path], None]
) -> Path:
    """The folder with what `build` makes of `settings`, built once and atomically.

    The folder's name is a hash of the settings, so different settings never share one. `build`
    writes into a temporary folder beside it, which is renamed when it is complete: a run that
    is killed leaves nothing that could be taken for data, and two runs at once do no harm.

    Args:
      parent: the cache folder.
      name: of the dataset, a folder in `parent`.
      settings: JSON-like values that the content depends on.
      build: fills the empty folder it is given.

    Returns:
      ``parent / name / hash``.

    Raises:
      StorageError: the folder cannot be written, or what lies there is damaged.
    """
    text = json.dumps(settings, sort_keys=True)
    folder = parent / name / hashlib.sha256(text.encode()).hexdigest()[:16]
    with writing_to(folder):
        is_there = folder.is_dir()
    if is_there:
        _check_complete(folder, json.loads(text))
        return folder
    make_writable(folder.parent)
    with writing_to(folder), temporary_folder(folder.parent) as unfinished:
        build(unfinished)
        _write_settings(unfinished, json.loads(text))
        _rename_unless_there(unfinished, folder)
    return folder


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, removed afterwards if it is still there."""
    folder = parent / f".incomplete-{uuid.uuid4().hex}"
    # Not tempfile.mkdtemp: its folders are private to the user, and a cache may be shared.
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_settings(folder: Path, settings: dict[str, Any]) -> None:
    files = {str(p.relative_to(folder)): p.stat().st_size for p in _files(folder)}
    content = {"settings": settings, "files": files}
    text = json.dumps(content, indent=2, sort_keys=True)
    write_atomically(folder / _SETTINGS_FILE, text.encode())


def _files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != _SETTINGS_FILE]


def _rename_unless_there(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError:
        # Another process was quicker with the same settings; its folder is as good.
        if not folder.is_dir():
            raise


def _check_complete(folder: Path, settings: dict[str, Any]) -> None:
    try:
        content = json.loads((folder / _SETTINGS_FILE).read_text(encoding="utf-8"))
        same = content["settings"] == settings
        odd = [n for n, size in content["files"].items() if (folder / n).stat().st_size != size]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        same, odd = False, [f"{_SETTINGS_FILE}: {error}"]
    if not same or odd:
        raise StorageError(
            f"the prepared dataset in {folder} is damaged ({', '.join(odd) or 'other settings'}); "
            "delete this folder, it will be made again"
        )
