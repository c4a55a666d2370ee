"""Bytes of messages: raw tensors are kept bit by bit, and altered bytes are refused."""

import importlib.util
import pathlib
import sys
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core.compression
from fedjax_core.compression import Keys, Message, from_bytes, identity, to_bytes
from fedjax_core.errors import CodecError

KEYS = Keys(jax.random.key(0), jax.random.key(1))


def identity_bits(value) -> int:
    codec = identity()
    return int(codec.bits(codec.encode(KEYS, (), (), value)[1]))


def test_sizes_of_raw_values():
    """The sizes of tensors in C-111."""
    assert identity_bits(np.zeros(10, np.int32)) == 320
    assert identity_bits([np.zeros(10), np.zeros(10, np.int32)]) == 960
    assert identity_bits(np.zeros(10, np.int64)) == 640
    assert identity_bits({}) == 0


def test_raw_tensors_are_kept_bit_by_bit():
    """Reference case 36: signed zeros, subnormals, infinities, payloads of NaN."""
    words = np.array([0x80000000, 1, 0x7F800000, 0xFF800000, 0x7FC12345, 0xFFFFFFFF], np.uint32)
    value = words.view(np.float32)
    codec = identity()
    _, message = codec.encode(KEYS, (), (), value)
    written = to_bytes(codec, message)
    assert written == words.tobytes()
    read = codec.decode(KEYS, (), from_bytes(codec, written, message))
    np.testing.assert_array_equal(read.view(np.uint32), words)


def test_tensors_are_little_endian_and_in_the_order_of_the_tree():
    value = {"b": jnp.array([1], jnp.int32), "a": jnp.array([True, False])}
    codec = identity()
    assert to_bytes(codec, codec.encode(KEYS, (), (), value)[1]) == b"\1\0\1\0\0\0"


@pytest.mark.parametrize(("size", "expected"), [(11, 12), (13, 12), (0, 12)])
def test_expected_bytes_are_named(size, expected):
    like = Message(jax.ShapeDtypeStruct((3,), jnp.float32))
    with pytest.raises(CodecError, match=f"expected {expected} bytes.*got {size}"):
        from_bytes(identity(), bytes(size), like)


def test_booleans_are_zero_or_one():
    like = Message(jax.ShapeDtypeStruct((2,), jnp.bool_))
    with pytest.raises(CodecError, match="boolean"):
        from_bytes(identity(), b"\1\2", like)


def test_what_is_no_message_is_refused():
    with pytest.raises(CodecError, match="expected a Message, got dict"):
        to_bytes(identity(), {"w": jnp.ones(3)})
    with pytest.raises(CodecError, match="expected a Message, got tuple"):
        from_bytes(identity(), b"", (1, 2))


def test_folder_on_the_path_stands_in_for_the_standard_library(monkeypatch):
    """From Python 3.14 on `compression` is a package that gzip imports."""
    folder = pathlib.Path(fedjax_core.compression.__file__).parent
    spec = importlib.util.spec_from_file_location(
        "compression", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compression", module)
    spec.loader.exec_module(module)
    assert module.__path__ == [str(pathlib.Path(sysconfig.get_path("stdlib"), "compression"))]
    assert not hasattr(module, "Codec")


def test_only_bytes_are_read():
    codec = identity()
    _, message = codec.encode(KEYS, (), (), np.arange(3.0))
    data = to_bytes(codec, message)
    for same in (bytearray(data), memoryview(data)):
        np.testing.assert_array_equal(from_bytes(codec, same, message).payload, np.arange(3.0))
    for wrong in ("abc", [1], None, np.frombuffer(data, np.uint8), 24):
        with pytest.raises(CodecError, match=r"expected the bytes of a message, got"):
            from_bytes(codec, wrong, message)
