"""Lossless compression of raw tensors: every bit comes back, and no frame is trusted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zstandard

from fedjax_core.compression import Keys, chain, from_bytes, lossless, to_bytes, uniform_quantize
from fedjax_core.errors import CodecError

KEYS = Keys(jax.random.key(0), jax.random.key(1))


def encode(codec, value):
    return codec.encode(KEYS, (), (), value)[1]


def words(count: int) -> np.ndarray:
    """Signed zeros, subnormals, infinities and payloads of NaN, again and again."""
    special = [0x80000000, 0, 1, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7FC12345, 0xFFFFFFFF]
    return np.resize(np.array(special, np.uint32), count)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 4095, 4097])
def test_case_36_every_bit_comes_back(count):
    codec, value = lossless(), words(count).view(np.float32)
    message = encode(codec, value)
    data = to_bytes(codec, message)
    read = codec.decode(KEYS, (), from_bytes(codec, data, message))
    np.testing.assert_array_equal(np.asarray(read).view(np.uint32), words(count))
    assert 8 * len(data) <= int(codec.bits(message)) == (8 * (4 * count + 1) if count else 0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32", "uint8", "bool"])
def test_all_dtypes_and_shapes_come_back(dtype):
    rng = np.random.default_rng(0)
    value = {
        "large": rng.integers(0, 2, (40, 50)).astype(jnp.dtype(dtype)),
        "scalar": np.ones((), jnp.dtype(dtype)),
        "empty": np.zeros((3, 0), jnp.dtype(dtype)),
    }
    codec = lossless(19)
    message = encode(codec, value)
    data = to_bytes(codec, message)
    read = codec.decode(KEYS, (), from_bytes(codec, data, message))
    for name, array in value.items():
        assert read[name].dtype == array.dtype
        assert read[name].shape == array.shape
        assert np.asarray(read[name]).tobytes() == array.tobytes()


def test_noise_is_sent_as_it_is_and_half_zeros_are_not():
    noise = np.random.default_rng(0).integers(0, 2**32, 10_000, np.uint32)
    codec = lossless()
    assert len(to_bytes(codec, encode(codec, noise))) == 40_001
    update = np.where(np.arange(10_000) % 100 < 50, np.random.default_rng(1).normal(size=10_000), 0)
    assert len(to_bytes(codec, encode(codec, update.astype(np.float32)))) < 21_000


def test_symbols_of_a_chain_are_compressed_too():
    codec = chain(uniform_quantize(8, min_size=10), lossless())
    message = encode(codec, {"large": jnp.arange(100.0), "small": jnp.ones(9)})
    # A range, 100 symbols, and a small tensor, the last two with their tags.
    assert int(codec.bits(message)) == 64 + 808 + 8 * 37
    assert not codec.traits.exact_bits
    decoded = codec.decode(KEYS, (), message)
    np.testing.assert_array_equal(decoded["small"], jnp.ones(9))


def frame_of(raw: bytes, tag: int = 1, length: int | None = None, **parameters) -> bytes:
    frame = zstandard.ZstdCompressor(**parameters).compress(raw)
    return bytes([tag]) + (len(frame) if length is None else length).to_bytes(8, "little") + frame


@pytest.mark.parametrize(
    "data",
    [
        frame_of(bytes(1 << 24)),  # a bomb
        frame_of(bytes(3999)),
        frame_of(bytes(4000), write_content_size=False),
        frame_of(bytes(4000), length=1 << 60),
        frame_of(bytes(4000), length=3),
        frame_of(bytes(4000), length=0),
        frame_of(bytes(4000), tag=2),
        frame_of(bytes(4000))[:-1],
        b"\1" + (40).to_bytes(8, "little") + bytes(40),
        b"\1\0",
        b"\0" + bytes(3999),
        b"",
    ],
)
def test_what_is_no_frame_of_the_tensor_is_refused(data):
    codec = lossless()
    message = encode(codec, np.zeros(1000, np.float32))
    with pytest.raises(CodecError, match="expected"):
        from_bytes(codec, data, message)


def test_booleans_stay_zero_or_one():
    codec = lossless()
    message = encode(codec, np.zeros(4000, np.bool_))
    with pytest.raises(CodecError, match="boolean"):
        from_bytes(codec, frame_of(b"\2" * 4000), message)


@pytest.mark.parametrize("level", [0, 20, 1.5, True, None])
def test_level_out_of_range_is_refused(level):
    with pytest.raises(CodecError, match="expected level"):
        lossless(level)
