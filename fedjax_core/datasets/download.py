"""Downloads by the download manager of TensorFlow Datasets, with a checksum of the first use."""

import hashlib
import json
from pathlib import Path
from typing import Any

from fedjax_core.datasets import cache
from fedjax_core.errors import StorageError
from fedjax_core.files import write_atomically

_ATTEMPTS = 3
_TIMEOUT_SECONDS = 20
_CHUNK_BYTES = 1 << 20


def fetch(url: str, folder: Path) -> Path:
    """The file at `url`, downloaded to `folder` unless it is there already.

    A download goes to a temporary folder and is moved when it is complete; one that breaks off is
    started again, up to three times. Size and SHA-256 of the first one are recorded in a .json file
    beside it, and every later use and every later download is checked against them.

    Args:
      url: an http or https address that ends in a file name.
      folder: where downloads are kept. A copy from elsewhere may be put there under the same name.

    Returns:
      The path of the file in `folder`.

    Raises:
      StorageError: no network, a transfer that keeps breaking off, or content that differs from
        what was recorded; the message says which file to put where.
    """
    target = folder / url.rsplit("/", 1)[-1]
    if target.is_file():
        verify(target, url)
        return target
    cache.make_writable(folder)
    _check_reachable(url, target)
    with cache.writing_to(folder), cache.temporary_folder(folder) as unfinished:
        downloaded = _download(url, unfinished, target)
        found, expected = _fingerprint(downloaded), _recorded(target)
        if expected not in (None, found):
            raise StorageError(_differs(f"the file at {url}", target, expected, found))
        _record(target, url, found)
        downloaded.rename(target)
    return target


def verify(path: Path, url: str) -> None:
    """Checks a file against the size and checksum recorded at its first use, or records them.

    Raises:
      StorageError: it differs.
    """
    found = _fingerprint(path)
    expected = _recorded(path)
    if expected is None:
        _record_if_possible(path, url, found)
    elif found != expected:
        raise StorageError(_differs(str(path), path, expected, found))


def record_path(path: Path) -> Path:
    """Where size and checksum of a downloaded file are recorded."""
    return path.with_name(f"{path.name}.json")


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK_BYTES):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _recorded(path: Path) -> dict[str, Any] | None:
    record = record_path(path)
    if not record.exists():
        return None
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        return {"size": content["size"], "sha256": content["sha256"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"cannot read the recorded checksum {record}: {error}; delete it to record it anew"
        ) from error


def _record(path: Path, url: str, fingerprint: dict[str, Any]) -> None:
    text = json.dumps({"url": url, **fingerprint}, indent=2)
    write_atomically(record_path(path), text.encode())


def _record_if_possible(path: Path, url: str, fingerprint: dict[str, Any]) -> None:
    try:
        _record(path, url, fingerprint)
    except OSError:
        # A file on a read-only disk can be used, though not be recorded.
        return


def _differs(what: str, path: Path, expected: dict[str, Any], found: dict[str, Any]) -> str:
    return (
        f"{what} is not the file that was used first: expected {expected['size']} bytes with "
        f"SHA-256 {expected['sha256']}, got {found['size']} bytes with {found['sha256']}; if it is "
        f"damaged, delete {path} to download it again; if the publisher replaced it, delete "
        f"{record_path(path)} too"
    )


def _check_reachable(url: str, target: Path) -> None:
    # The download manager tries for minutes before it gives up without a network; so ask first.
    import requests

    try:
        response = requests.head(url, allow_redirects=True, timeout=_TIMEOUT_SECONDS)
    except requests.RequestException as error:
        raise StorageError(_place_by_hand(url, target, error)) from error
    if response.status_code in (401, 403, 404, 410):
        raise StorageError(_place_by_hand(url, target, f"HTTP status {response.status_code}"))


def _place_by_hand(url: str, target: Path, reason: object) -> str:
    return (
        f"cannot download {url} ({reason}); download it where there is a network and put it at "
        f"{target}, or pass its place as path="
    )


def _download(url: str, folder: Path, target: Path) -> Path:
    attempt = 1
    while True:
        try:
            return _download_once(url, folder / str(attempt))
        except Exception as error:
            # The manager lets errors of requests, urllib3 and its own through, of no common class.
            if attempt == _ATTEMPTS:
                raise StorageError(_place_by_hand(url, target, error)) from error
            attempt += 1


def _download_once(url: str, folder: Path) -> Path:
    import tensorflow_datasets as tfds

    # The manager is not told what we expect: it would remember it for the rest of the process.
    return Path(tfds.download.DownloadManager(download_dir=folder).download(url))
