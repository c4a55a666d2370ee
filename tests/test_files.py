"""Files: written whole, through links, and only where a file can be."""

import os
import pathlib

import pytest

from fedjax_core import files
from fedjax_core.errors import FederatedTypeError, StorageError


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / "a" / "b"
    files.write_atomically(path, b"1")
    files.write_atomically(path, b"2")
    assert (path.read_bytes(), os.listdir(path.parent)) == (b"2", ["b"])


@pytest.mark.parametrize("exists", [True, False])
def test_links_stay_and_lead_to_what_is_written(exists, tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    if exists:
        target.write_bytes(b"1")
    link.symlink_to("target")
    files.check_writable(link, overwrite=True)
    files.write_atomically(link, b"2")
    assert (link.is_symlink(), target.read_bytes()) == (True, b"2")
    assert sorted(os.listdir(tmp_path)) == ["link", "target"]


def test_a_circle_of_links_is_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(StorageError, match="expected a path that can be written"):
        files.write_atomically(tmp_path / "a", b"")


def test_what_is_no_file_is_not_replaced(pipe, tmp_path):
    """A rename would put a file in the place of the device."""
    (tmp_path / "link").symlink_to("pipe")
    for path in (pipe, tmp_path / "link"):
        for write in (
            lambda path: files.write_atomically(path, b""),
            lambda path: files.check_writable(path, overwrite=True),
        ):
            with pytest.raises(StorageError, match=r"It is a device, a pipe or a socket"):
                write(path)
    with pytest.raises(StorageError, match="Is a directory"):
        files.write_atomically(tmp_path, b"")
    assert pipe.is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_what_is_no_file_is_not_read(pipe):
    """A pipe waits for who writes into it, and a device has no end."""
    for path in (pipe, pathlib.Path("/dev/zero")):
        with pytest.raises(StorageError, match=r"It is a device, a pipe or a socket.*check the"):
            files.read_sealed(path, files.CHECKPOINT)
        with pytest.raises(StorageError, match=r"It is a device, a pipe or a socket.*check the"):
            files.kind_of(path, files.CHECKPOINT, files.COMPUTATION)


@pytest.mark.parametrize("path", [None, 3, b"x", ["x"]], ids=repr)
def test_a_path_is_text_or_a_path(path):
    with pytest.raises(FederatedTypeError, match=r"Expected a path, as a str or a pathlib.Path"):
        files.to_path(path)
    assert files.to_path("x") == files.to_path(pathlib.Path("x")) == pathlib.Path("x")
