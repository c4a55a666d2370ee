"""Frames: what they hold, their size, and that nothing but a frame is read as one."""

import dataclasses
import random
import tracemalloc
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core.bits import BitCount
from fedjax_core.compression import (
    PRESETS,
    Frame,
    Keys,
    Message,
    chain,
    common_seed,
    eden,
    elias_gamma,
    error_feedback,
    frame,
    frame_bits,
    huffman,
    identity,
    lossless,
    preset,
    rice,
    step_quantize,
    tern_grad,
    threshold,
    top_k,
    unframe,
    uniform_quantize,
    zero_runs,
)
from fedjax_core.errors import CodecError

KEYS = Keys(jax.random.key(0), jax.random.key(1))
VALUE = {
    "w": jax.random.normal(jax.random.key(2), (40, 30)),
    "b": jnp.arange(30.0),
    "n": jnp.arange(3),
}


def message_of(codec, value=VALUE):
    server, memory = codec.init(jax.eval_shape(lambda: value))
    run = jax.jit(lambda k, v: codec.encode(k, memory, codec.hints(server), v)[1])
    return jax.device_get(run(KEYS, value))


def same(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


CODECS = {
    **{name: preset(name) for name in PRESETS},
    "identity": identity(),
    "lossless": lossless(),
    "trits": tern_grad(min_size=0),
    "threshold": threshold(1.0, min_size=0),
    "eden": eden(0.5, min_size=0),
    "top_k": top_k(0.1, min_size=0),
    **{
        code.name: chain(step_quantize(0.5, min_size=0), code)
        for code in (huffman(), rice(), elias_gamma(), zero_runs())
    },
}
# Their bytes are those of a family whose frames the quick tests try too.
RARE = {
    "flagship",
    "rotated",
    "tff_8bit",
    "eden",
    "threshold",
    huffman().name,
    rice().name,
    elias_gamma().name,
}
each_codec = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in RARE else []) for name in CODECS],
)


@each_codec
def test_frames_come_back(name):
    codec = CODECS[name]
    message = message_of(codec)
    data = frame(codec, message)
    assert same(unframe(codec, data, jax.eval_shape(lambda: message)).message, message)
    bits = int(codec.bits(message))
    assert 8 * len(data) - frame_bits(codec, message) <= bits
    assert 8 * len(data) - frame_bits(codec, message) == bits or not codec.traits.exact_bits


def test_bytes_of_a_frame():
    """By the table of the module: ten numbers of 16 bits, without any stage."""
    codec, message = identity(), Message(np.arange(10, dtype=np.int16))
    data = frame(codec, message)
    assert data[:4] == b"FC\x01\x00"
    # One tensor, of no kind and width, with one array: its dtype, one axis, of ten.
    table = bytes([1, data[9], 0, 1, data[12], 1, 10])
    assert data[8:15] == table
    assert data[15:23] == (20).to_bytes(8, "little")
    assert data[23:43] == message.payload.tobytes()
    assert data[43:] == zlib.crc32(data[:43]).to_bytes(4, "little")
    assert frame_bits(codec, message) == 8 * (len(data) - 20)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_and_weights_travel(impl):
    codec, message = identity(), Message(np.float32([1.0]))
    keys = Keys(jax.random.key(3, impl=impl), jax.random.key(4, impl=impl))
    read = unframe(codec, frame(codec, message, keys=keys, weight=12.5), message)
    assert isinstance(read, Frame)
    assert read.weight == 12.5
    for mine, theirs in zip(keys, read.keys, strict=True):
        assert jax.random.key_impl(mine) == jax.random.key_impl(theirs)
        np.testing.assert_array_equal(jax.random.key_data(mine), jax.random.key_data(theirs))


def test_receivers_without_the_senders_key_decode_with_the_one_in_the_frame():
    codec, x = eden(2, min_size=0), VALUE["w"]
    message = message_of(codec, x)
    read = unframe(codec, frame(codec, message, keys=KEYS), message)
    decode = jax.jit(lambda keys, message: codec.decode(keys, (), message))
    np.testing.assert_array_equal(decode(read.keys, read.message), decode(KEYS, message))


def resealed(data: bytes) -> bytes:
    return data[:-4] + zlib.crc32(data[:-4]).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: b"XX" + d[2:], "begin with"),
        (lambda d: d[:2] + b"\x02" + d[3:], "version 1"),
        (lambda d: d[:3] + b"\x04" + d[4:], "flags of 0 to 3"),
        (lambda d: d[:4] + b"abcd" + d[8:], "expected a message of identity"),
        (lambda d: d[:8] + b"\x07" + d[9:], r"the tensors float32\[5\], int32\[2, 3\]"),
        (lambda d: d[:-5] + bytes([d[-5] ^ 1]) + d[-4:], "checksum"),
        (lambda d: d[:10], "cut short"),
        (lambda d: d[:-1], "bytes of a message"),
        (lambda d: d + b"\0", "bytes of a message"),
        (lambda d: b"", "cut short"),
    ],
)
def test_what_is_wrong_is_named(change, expected):
    codec = identity()
    message = Message([np.zeros(5, np.float32), np.zeros((2, 3), np.int32)])
    with pytest.raises(CodecError, match=expected):
        unframe(codec, change(frame(codec, message)), message)


def test_frames_of_another_codec_or_value_are_refused():
    message = Message(np.zeros(5, np.float32))
    data = frame(identity(), message)
    with pytest.raises(CodecError, match="expected a message of lossless"):
        unframe(lossless(), data, message)
    for other in (np.zeros(6, np.float32), np.zeros(5, np.int32), np.zeros((5, 1), np.float32)):
        with pytest.raises(CodecError, match="expected the tensors"):
            unframe(identity(), data, Message(other))
    with pytest.raises(CodecError, match="expected the bytes of a message, got str"):
        unframe(identity(), "FC", message)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes set, pieces cut, doubled, moved or made up."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        start = rng.randrange(len(changed) + 1)
        end = min(len(changed), start + rng.choice([1, 2, 8, 64]))
        kind = rng.randrange(6)
        if kind == 0 and start < len(changed):
            changed[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[start:end] = bytes(rng.choice([0, 255]) for _ in range(end - start))
        elif kind == 2:
            del changed[start:end]
        elif kind == 3:
            changed[start:start] = changed[start:end]
        elif kind == 4:
            changed[start:start] = rng.randbytes(rng.choice([1, 4, 40]))
        else:
            del changed[start:]
    return bytes(changed)


def check_mutations(count: int, seed: int) -> None:
    """Each is refused, or decodes to a message that is written as the bytes that were read.

    Checksums are made right again in three of four, or nothing would reach the decoders behind.
    """
    rng = random.Random(seed)
    cases = [(codec, message_of(codec)) for codec in CODECS.values()]
    frames = [(codec, message, frame(codec, message)) for codec, message in cases]
    largest = 0
    for number in range(count):
        codec, message, data = frames[number % len(frames)]
        changed = mutate(data, rng)
        changed = resealed(changed) if rng.random() < 0.75 and len(changed) > 4 else changed
        tracemalloc.start()
        try:
            read = unframe(codec, changed, message)
        except CodecError:
            pass
        else:
            again = unframe(codec, frame(codec, read.message), message).message
            assert same(again, read.message)
        finally:
            largest = max(largest, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert largest < 4_000_000


def test_mutated_frames_do_no_harm():
    check_mutations(500, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_mutated_frames_do_no_harm():
    check_mutations(10_000, seed=2)


def test_a_codec_that_counts_wrong_is_found_out():
    """What `Execution(wire=True)` calls: the bytes have to be as many as `bits` says."""
    honest = uniform_quantize(8, min_size=0)
    liar = honest._replace(bits=lambda message: honest.bits(message) + BitCount.of(8))
    message = message_of(honest)
    travel, overhead = liar.transport(jax.eval_shape(lambda: message))
    assert overhead == frame_bits(honest, message)
    with pytest.raises(CodecError, match="expected `bits` of uniform_quantize"):
        travel(message, int(liar.bits(message)))
    assert same(travel(message, int(honest.bits(message))), message)


def test_wrapped_codecs_are_told_apart():
    message = message_of(top_k(0.1, min_size=0))
    data = frame(top_k(0.1, min_size=0), message)
    with pytest.raises(CodecError, match="error_feedback"):
        unframe(error_feedback(top_k(0.1, min_size=0)), data, message)


def test_dataclasses_of_messages_are_not_trusted_to_have_the_right_shape():
    """A sender's own mistake is refused before anything is sent."""
    codec = uniform_quantize(4, min_size=0)
    message = message_of(codec, jnp.arange(8.0))
    wrong = dataclasses.replace(message.payload, codes=np.full(8, 200, np.uint8))
    with pytest.raises(CodecError, match="expected integers in"):
        frame(codec, message._replace(payload=wrong))


@pytest.mark.parametrize(
    ("misuse", "expected"),
    [
        (lambda m: frame(identity(), m, weight="x"), "expected weight to be a number"),
        (lambda m: frame(identity(), m, weight=1e300), "expected weight to be a number"),
        (lambda m: frame(identity(), m, keys=(1, 2)), "expected keys to be Keys"),
        (lambda m: unframe(identity(), frame(identity(), m), 3), "expected a Message"),
        (lambda m: error_feedback(3), "expected a codec under error feedback"),
        (lambda m: common_seed(3), "expected a codec to share a seed"),
    ],
)
def test_misuse_is_named(misuse, expected):
    with pytest.raises(CodecError, match=expected):
        misuse(Message(np.float32([1.0])))
