import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core.errors import FederatedTypeError, StorageError
from fedjax_core.learning import checkpoints


class State(NamedTuple):
    params: Any
    key: Any
    round: Any


def make_state(key):
    params = {
        "w": jax.random.normal(key, (3, 4)),
        "half": jnp.arange(5, dtype=jnp.bfloat16),
        "empty": jnp.zeros((0, 2), jnp.int8),
        "flag": jnp.array(True),
    }
    return State(params, key, jnp.int32(0))


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(a) == jax.random.key_impl(b)
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_a_state_comes_back_bit_for_bit(tmp_path, impl):
    state = make_state(jax.random.key(3, impl=impl))
    checkpoints.save(tmp_path / "state", state)
    # Shapes and dtypes are enough to read it: no second state has to be made.
    assert_same(checkpoints.load(tmp_path / "state", jax.eval_shape(lambda: state)), state)
    other = make_state(jax.random.key(4, impl=impl))
    assert_same(checkpoints.load(tmp_path / "state", other), state)


def test_leaves_keep_their_kind(tmp_path):
    tree = {"count": 3, "rate": 0.1, "on": True, "host": np.arange(2, dtype=np.int64)}
    checkpoints.save(tmp_path / "tree", tree)
    like = {"count": 0, "rate": 0.0, "on": False, "host": np.zeros(2, np.int64)}
    back = checkpoints.load(tmp_path / "tree", like)
    assert {name: type(value) for name, value in back.items()} == {
        "count": int,
        "rate": float,
        "on": bool,
        "host": np.ndarray,
    }
    assert (back["count"], back["rate"], back["on"], back["host"].tolist()) == (
        3,
        0.1,
        True,
        [0, 1],
    )


def test_a_stack_of_keys_comes_back(tmp_path):
    keys = jax.random.split(jax.random.key(0), 3)
    checkpoints.save(tmp_path / "keys", keys)
    assert_same(checkpoints.load(tmp_path / "keys", keys), keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": jnp.zeros((4, 3))}, r"expected float32\[4, 3\] at \['w'\], got float32\[3, 4\]"),
        ({"w": jnp.zeros((3, 4), jnp.int32)}, r"expected int32\[3, 4\] at \['w'\], got float32"),
        ({"extra": jnp.zeros(1)}, r"at \['extra'\], got no such leaf"),
        ({"flag": None}, r"expected 3 leaves, got 4 .* among them \['flag'\]"),
    ],
)
def test_another_structure_shape_or_dtype_is_refused_by_name(tmp_path, change, message):
    params = make_state(jax.random.key(0)).params
    checkpoints.save(tmp_path / "params", params)
    with pytest.raises(FederatedTypeError, match=message):
        checkpoints.load(tmp_path / "params", params | change)


def test_a_key_of_another_generator_is_refused(tmp_path):
    checkpoints.save(tmp_path / "key", {"key": jax.random.key(0, impl="rbg")})
    with pytest.raises(FederatedTypeError, match=r"expected key threefry2x32\[2\] .* got key rbg"):
        checkpoints.load(tmp_path / "key", {"key": jax.random.key(0)})


def test_an_altered_or_shortened_file_is_refused(tmp_path):
    path = tmp_path / "w"
    checkpoints.save(path, {"w": jnp.arange(100.0)})
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(StorageError, match="cut short or altered"):
        checkpoints.load(path, {"w": jnp.zeros(100)})
    flipped = bytearray(data)
    flipped[-7] ^= 1
    path.write_bytes(bytes(flipped))
    with pytest.raises(StorageError, match="cut short or altered"):
        checkpoints.load(path, {"w": jnp.zeros(100)})


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80\x04pickle", b"[]\n", b'{"format": "fedjax-core"}\n', b'{"format": {}}\n', b"1"],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, data):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(StorageError, match="which is not"):
        checkpoints.load(tmp_path / "file", {})


def test_a_newer_version_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"fedjax-core 99 0123\n")
    with pytest.raises(StorageError, match="version 99"):
        checkpoints.load(tmp_path / "file", {})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"nowhere.*No such file"):
        checkpoints.load(tmp_path / "nowhere", {})


def test_what_is_not_an_array_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(FederatedTypeError, match=r"got str at \['name'\]"):
        checkpoints.save(tmp_path / "tree", {"name": "cnn"})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_no_scraps(tmp_path, monkeypatch):
    path = tmp_path / "w"
    checkpoints.save(path, {"w": jnp.zeros(2)})
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(StorageError, match="No space left"):
        checkpoints.save(path, {"w": jnp.ones(2)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [">f4", ">i8", ">u2", ">c8"])
def test_the_order_of_bytes_is_no_matter(tmp_path, dtype):
    array = np.arange(5).astype(dtype)
    checkpoints.save(tmp_path / "tree", {"w": array})
    native = array.dtype.newbyteorder("=")
    for like in (array, np.zeros(5, native)):
        loaded = checkpoints.load(tmp_path / "tree", {"w": like})["w"]
        np.testing.assert_array_equal(loaded, np.arange(5))


@pytest.mark.parametrize("dtype", [[("a", "f4"), ("b", "i4")], "V8"])
def test_arrays_of_records_are_refused(tmp_path, dtype):
    with pytest.raises(FederatedTypeError, match=r"at \['w'\]; save each of its fields"):
        checkpoints.save(tmp_path / "tree", {"w": np.zeros(3, dtype)})
    assert not (tmp_path / "tree").exists()


def forged(path, body):
    from flax import serialization

    body = body if isinstance(body, bytes) else serialization.msgpack_serialize(body)
    digest = hashlib.sha256(body).hexdigest()
    path.write_bytes(f"fedjax-core 1 {digest}\n".encode() + body)
    return path


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1\xc1",
        [1],
        {"['w']": 1},
        {"['w']": {}},
        {"['w']": {"type": "float32", "data": "abc"}},
        {"['w']": {"type": 4, "data": np.zeros(3, np.float32)}},
        {"['w']": {"type": "float32", "data": np.zeros(3, np.int32)}},
        {"['w']": {"type": "key threefry2x32", "data": np.zeros(3, np.float32)}},
    ],
)
def test_a_right_checksum_of_a_wrong_content_is_an_error_of_storage(tmp_path, body):
    with pytest.raises(StorageError, match="whose content is something else"):
        checkpoints.load(forged(tmp_path / "x", body), {"w": jnp.zeros(3)})


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "f/x", ""])
def test_a_file_that_cannot_be_is_an_error_of_storage(tmp_path, name):
    (tmp_path / "f").touch()
    with pytest.raises(StorageError, match="choose another one"):
        checkpoints.save(tmp_path / name, {"w": jnp.zeros(3)})


def test_a_name_may_be_as_long_as_can_be(tmp_path):
    checkpoints.save(tmp_path / ("x" * 255), {"w": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 255]
