import hashlib
import json

import pytest

from fedjax_core.datasets import download
from fedjax_core.errors import StorageError

CONTENT = bytes(range(256)) * 2000


@pytest.fixture
def url(web):
    web.files["/set/data.bin"] = CONTENT
    return f"{web.url}/set/data.bin"


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_download_is_kept_with_its_checksum(url, web, tmp_path):
    path = download.fetch(url, tmp_path / "downloads")
    assert path == tmp_path / "downloads" / "data.bin"
    assert path.read_bytes() == CONTENT
    assert json.loads(download.record_path(path).read_text()) == {
        "url": url,
        "size": len(CONTENT),
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
    }
    assert download.fetch(url, tmp_path / "downloads") == path
    assert web.requests == 1
    assert _names(path.parent) == ["data.bin", "data.bin.json"]


def test_an_interrupted_transfer_is_started_again(url, web, tmp_path):
    web.breaks = 2
    assert download.fetch(url, tmp_path).read_bytes() == CONTENT
    assert web.requests == 3
    assert _names(tmp_path) == ["data.bin", "data.bin.json"]


def test_half_a_file_is_never_used(url, web, tmp_path):
    web.breaks = 3
    with pytest.raises(StorageError, match="put it at") as caught:
        download.fetch(url, tmp_path)
    assert str(tmp_path / "data.bin") in str(caught.value)
    assert _names(tmp_path) == []
    assert download.fetch(url, tmp_path).read_bytes() == CONTENT


def test_a_file_that_changed_is_refused(url, tmp_path):
    path = download.fetch(url, tmp_path)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(StorageError, match="not the file that was used first") as caught:
        download.fetch(url, tmp_path)
    assert hashlib.sha256(CONTENT).hexdigest() in str(caught.value)
    assert f"delete {path}" in str(caught.value)


def test_a_download_with_another_checksum_is_refused(url, web, tmp_path):
    download.fetch(url, tmp_path).unlink()
    web.files["/set/data.bin"] = CONTENT + b"!"
    with pytest.raises(StorageError, match="not the file that was used first") as caught:
        download.fetch(url, tmp_path)
    assert hashlib.sha256(CONTENT + b"!").hexdigest() in str(caught.value)
    assert _names(tmp_path) == ["data.bin.json"]
    download.record_path(tmp_path / "data.bin").unlink()
    assert download.fetch(url, tmp_path).read_bytes() == CONTENT + b"!"


def test_a_file_placed_by_hand_needs_no_network(tmp_path):
    (tmp_path / "data.bin").write_bytes(b"by hand")
    path = download.fetch("http://127.0.0.1:1/data.bin", tmp_path)
    assert path.read_bytes() == b"by hand"
    assert json.loads(download.record_path(path).read_text())["size"] == 7


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1/data.bin", "http://nowhere.invalid/data.bin"]
)
def test_without_a_network_the_error_says_which_file_to_put_where(address, tmp_path):
    with pytest.raises(StorageError, match="where there is a network") as caught:
        download.fetch(address, tmp_path)
    assert address in str(caught.value)
    assert str(tmp_path / "data.bin") in str(caught.value)
    assert _names(tmp_path) == []


def test_a_missing_page_is_reported(web, tmp_path):
    with pytest.raises(StorageError, match="HTTP status 404"):
        download.fetch(f"{web.url}/other.bin", tmp_path)


def test_a_damaged_record_is_reported(url, tmp_path):
    record = download.record_path(download.fetch(url, tmp_path))
    record.write_text("{")
    with pytest.raises(StorageError, match="delete it to record it anew"):
        download.fetch(url, tmp_path)


def test_a_folder_that_cannot_be_written_is_named(url, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write to the cache folder") as caught:
        download.fetch(url, tmp_path / "file" / "downloads")
    assert str(tmp_path / "file") in str(caught.value)
