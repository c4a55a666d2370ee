import gzip
import struct

import numpy as np
import pytest

from fedjax_core.datasets.idx import read_idx
from fedjax_core.errors import StorageError


def _idx(code, shape, content):
    return bytes([0, 0, code, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + content


def test_values_of_all_types(tmp_path):
    cases = [
        (0x08, ">3B", np.uint8, [0, 7, 255]),
        (0x09, ">3b", np.int8, [-128, 0, 127]),
        (0x0B, ">3h", np.int16, [-2, 0, 258]),
        (0x0C, ">3i", np.int32, [-2, 0, 65539]),
        (0x0D, ">3f", np.float32, [-0.5, 0.0, 2.0]),
        (0x0E, ">3d", np.float64, [-0.5, 0.0, 2.0]),
    ]
    for code, form, dtype, values in cases:
        (tmp_path / "x").write_bytes(_idx(code, (3,), struct.pack(form, *values)))
        array = read_idx(tmp_path / "x")
        assert array.dtype == dtype
        assert array.dtype.isnative
        assert array.tolist() == values


def test_axes_and_gzip(tmp_path):
    content = _idx(0x08, (2, 1, 3), bytes(range(6)))
    (tmp_path / "x.gz").write_bytes(gzip.compress(content))
    assert read_idx(str(tmp_path / "x.gz")).tolist() == [[[0, 1, 2]], [[3, 4, 5]]]
    (tmp_path / "x").write_bytes(_idx(0x08, (0, 4), b""))
    assert read_idx(tmp_path / "x").shape == (0, 4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no IDX file"),
        (b"PNG and more", "no IDX file"),
        (_idx(0x0A, (1,), b"\0"), "no IDX file"),
        (_idx(0x08, (3,), b"\0\0"), "expected 11 bytes, got 10"),
        (_idx(0x08, (3,), b"\0\0\0\0"), "expected 11 bytes, got 12"),
        (b"\0\0\x08\x03\0\0\0\1", "cut off"),
        (_idx(0x08, (2**32 - 1,) * 4, b""), "cut off"),
        (gzip.compress(b"x" * 1000, mtime=0)[:-9], "cannot read the IDX file"),
        (b"\x1f\x8bgarbage", "cannot read the IDX file"),
    ],
)
def test_other_files_are_refused(tmp_path, content, words):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(StorageError, match=words):
        read_idx(tmp_path / "x")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"nowhere\.gz"):
        read_idx(tmp_path / "nowhere.gz")


def test_mnist(data_dir):
    images = read_idx(data_dir / "mnist" / "t10k-images-idx3-ubyte.gz")
    labels = read_idx(data_dir / "mnist" / "t10k-labels-idx1-ubyte.gz")
    assert images.shape == (10_000, 28, 28)
    assert images.dtype == np.uint8
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(labels).tolist() == counts
