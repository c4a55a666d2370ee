import zlib

import msgpack
import numpy as np
import pytest

from fedjax_core import datasets
from fedjax_core.errors import DataError, StorageError, UnknownClientError


def test_a_hundred_clients_of_rising_size(tmp_path, writers):
    clients = {
        b"%04x" % i: {
            "x": np.arange(i + 1, dtype=np.int32) + i,
            "y": np.full((i + 1, 2), i, np.float32),
        }
        for i in range(100)
    }
    path = writers.fedjax(tmp_path / "hundred.sqlite", clients)
    data = datasets.from_fedjax_sqlite(path)
    assert data.name == "hundred"
    assert data.client_ids == tuple(f"{i:04x}" for i in range(100))
    np.testing.assert_array_equal(data.num_examples, np.arange(100) + 1)
    for client_id, examples in clients.items():
        for name, array in examples.items():
            np.testing.assert_array_equal(data.client(client_id.decode())[name], array)
    with pytest.raises(UnknownClientError):
        data.client("0100")
    with pytest.raises(KeyError):
        data.cohort(["0000", "ffff"])


def test_emnist_pixels_become_images(tmp_path, writers):
    pixels = np.random.default_rng(0).random((3, 28, 28), np.float32)
    path = writers.fedjax(
        tmp_path / "x.sqlite", {b"f1": {"pixels": pixels, "label": np.arange(3, dtype=np.int32)}}
    )
    data = datasets.from_fedjax_sqlite(path, name="writers")
    assert data.element_spec["image"].shape == (28, 28, 1)
    np.testing.assert_array_equal(data.examples["image"][..., 0], pixels)
    assert data.name == "writers"


def test_ids_of_any_bytes_stay_different(tmp_path, writers):
    clients = {b"\xff": {"x": np.arange(1)}, b"\xfe": {"x": np.arange(2)}}
    data = datasets.from_fedjax_sqlite(writers.fedjax(tmp_path / "x.sqlite", clients))
    assert data.num_examples.tolist() == [2, 1]
    assert data.cohort(list(data.client_ids)).uid.shape == (2, 2)


def _packed(content):
    return zlib.compress(msgpack.packb(content))


def _array(shape, dtype, content):
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, content)))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"no zlib", "client 'ann' is damaged"),
        (_packed({"x": 1})[:-3], "cut off"),
        (zlib.compress(b"\xc1 no msgpack"), "damaged"),
        (_packed([1, 2]), "no dict of arrays"),
        (_packed({"x": 1}), "no dict of arrays"),
        (_packed({}), "num_examples states 1"),
        (_packed({"x": _array((), "int32", b"\0\0\0\0")}), "no dict of arrays"),
        (_packed({"x": _array((2,), "int32", b"\0\0\0\0")}), "damaged"),
        (_packed({"x": _array((1,), "nonsense", b"\0\0\0\0")}), "damaged"),
        (_packed({"x": _array((1,), "object", b"\0" * 8)}), "damaged"),
        (_packed({"x": msgpack.ExtType(9, b"")}), "unknown msgpack extension 9"),
        (_packed({"x": _array((2,), "int8", b"\0\0")}), "num_examples states 1"),
    ],
)
def test_damaged_clients_are_refused(tmp_path, writers, data, words):
    path = writers.fedjax(tmp_path / "x.sqlite", {b"ann": data})
    with pytest.raises(StorageError, match=words):
        datasets.from_fedjax_sqlite(path)


def test_text_is_refused(tmp_path, writers):
    path = writers.fedjax(
        tmp_path / "x.sqlite", {b"a": {"snippets": np.array([b"to be"], dtype=object)}}
    )
    with pytest.raises(DataError, match="encode it as integers"):
        datasets.from_fedjax_sqlite(path)


def test_clients_with_other_features_are_refused(tmp_path, writers):
    clients = {b"a": {"x": np.arange(2)}, b"b": {"y": np.arange(2)}}
    with pytest.raises(DataError, match="client 'b' has the features"):
        datasets.from_fedjax_sqlite(writers.fedjax(tmp_path / "x.sqlite", clients))


def test_a_missing_table_and_an_empty_one_are_refused(tmp_path, writers):
    path = writers.fedjax(tmp_path / "x.sqlite", {}, table="other")
    with pytest.raises(StorageError, match="no table 'federated_data'"):
        datasets.from_fedjax_sqlite(path)
    with pytest.raises(StorageError, match="0 clients"):
        datasets.from_fedjax_sqlite(writers.fedjax(tmp_path / "y.sqlite", {}))
