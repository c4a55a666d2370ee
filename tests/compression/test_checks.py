"""Numbers, flags, keys and messages that are none."""

import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core import aggregators
from fedjax_core.compression import (
    Keys,
    Message,
    chain,
    error_feedback,
    fixed_point,
    frame,
    frame_bits,
    from_bytes,
    identity,
    rand_k,
    step_quantize,
    tern_grad,
    threshold,
    to_bytes,
    top_k,
    unframe,
    uniform_quantize,
)
from fedjax_core.errors import ArgumentError, CodecError, FederatedTypeError

MESSAGE = Message(np.float32([1.5, 2.5]))
KEYS = Keys(jax.random.key(0), jax.random.key(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: threshold(10**400), "expected limit to be a number of at least 0"),
        (lambda: tern_grad(-(10**400)), "expected clip to be a number of at least 1"),
        (lambda: step_quantize(np.bool(True)), "expected step to be a number from"),
        (lambda: uniform_quantize(8, stochastic=None), "expected stochastic to be True or False"),
        (lambda: uniform_quantize(8, stochastic="8"), "expected stochastic to be True or False"),
        (lambda: fixed_point(stochastic=np.nan), "expected stochastic to be True or False"),
        (lambda: rand_k(0.5, common=2.0), "expected common to be True or False"),
        (lambda: rand_k(0.5, unbiased=0), "expected unbiased to be True or False"),
        (lambda: to_bytes(None, MESSAGE), "expected a codec that encoded the message"),
        (lambda: to_bytes(top_k, MESSAGE), "call it"),
        (lambda: from_bytes(1, b"", MESSAGE), "expected a codec"),
        (lambda: unframe("one_bit", b"", MESSAGE), "expected a codec"),
        (lambda: frame_bits(None, MESSAGE), "expected a codec"),
        (lambda: frame_bits(identity(), None), "expected a Message"),
        (lambda: to_bytes(identity(), Message("a")), "an array of numbers"),
        (lambda: to_bytes(identity(), Message(1.0)), "an array of numbers"),
        (lambda: from_bytes(identity(), b"", Message(1.0)), "an array of numbers"),
        (lambda: frame(identity(), Message(np.array(["a"]))), "an array of numbers"),
        (lambda: frame(identity(), MESSAGE, keys=Keys(1, 2)), "two typed keys"),
        (lambda: frame(identity(), MESSAGE, weight=10**400), "a number that float32 holds"),
        (lambda: frame(identity(), MESSAGE, weight=np.complex64(1)), "a number that float32"),
        (
            lambda: frame(
                identity(), MESSAGE, keys=KEYS._replace(client=jax.random.key(0, impl="rbg"))
            ),
            "of the same kind",
        ),
        (lambda: aggregators.mean(codec=fixed_point(8), secure="no"), "expected secure"),
    ],
)
def test_what_is_wrong_is_named(make, message):
    with pytest.raises((CodecError, ArgumentError, FederatedTypeError), match=message) as caught:
        make()
    assert len(str(caught.value)) < 300


def test_a_list_is_refused_in_few_words():
    with pytest.raises(CodecError, match="not a list") as caught:
        chain([top_k(0.1)])
    assert len(str(caught.value)) < 300


def test_a_frame_whose_weight_is_no_number_is_refused():
    data = frame(identity(), MESSAGE, weight=2.0)
    data = data.replace(struct.pack("<f", 2.0), struct.pack("<f", np.nan))
    data = data[:-4] + struct.pack("<I", zlib.crc32(data[:-4]))
    with pytest.raises(CodecError, match="a finite weight"):
        unframe(identity(), data, MESSAGE)


def test_bytes_may_lie_apart_in_memory():
    data = frame(identity(), MESSAGE)
    apart = memoryview(bytes(b for pair in zip(data, data, strict=True) for b in pair))[::2]
    np.testing.assert_array_equal(unframe(identity(), apart, MESSAGE).message.payload, [1.5, 2.5])


def test_codecs_that_differ_have_different_names():
    assert fixed_point(8, limit=1.0).name == "fixed_point(8, limit=1)"
    assert fixed_point(8, limit=1.0).name != fixed_point(8, limit=1.0000004).name
    assert step_quantize(0.1).name != step_quantize(0.10000001).name


def rounds(codec, values):
    _, memory = codec.init(values[0])

    def step(memory, x):
        memory, message = codec.encode(KEYS, memory, (), x)
        return memory, codec.decode(KEYS, (), message)

    return jax.lax.scan(step, memory, jnp.stack(values))


def test_the_error_of_half_precision_is_remembered_in_full():
    """The sum of what was received is that of all values but for the last error."""
    x = jnp.array([256.0, 1.0], jnp.bfloat16)
    memory, received = rounds(error_feedback(top_k(0.5, min_size=0)), [x] * 600)
    total = np.sum(np.float64(received), axis=0) + np.float64(memory)
    np.testing.assert_array_equal(total, [600 * 256.0, 600.0])
    assert np.any(np.float64(received)[:, 1] > 0)


def test_one_value_that_is_not_finite_does_not_spoil_the_memory():
    values = [jnp.array([jnp.nan, 1.0]), *[jnp.array([1.0, 1.0])] * 4]
    memory, received = rounds(error_feedback(top_k(0.5, min_size=0)), values)
    assert np.isnan(received[0, 0])
    assert np.all(np.isfinite(received[1:]))
    np.testing.assert_allclose(np.sum(received[1:], axis=0) + memory, [4.0, 5.0])
