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
    downlink_preset,
    eden,
    ef21,
    error_feedback,
    fixed_point,
    flagship,
    frame,
    frame_bits,
    from_bytes,
    identity,
    preset,
    qsgd,
    rand_k,
    step_quantize,
    target_rate,
    tern_grad,
    threshold,
    to_bytes,
    top_k,
    unframe,
    uniform_quantize,
)
from fedjax_core.errors import ArgumentError, CodecError, FederatedTypeError

MESSAGE = Message(np.float32([1.5, 2.5]))
FOREIGN = Message(np.float32([1.5, 2.5]), side=(np.float32([1.0]),))
KEYS = Keys(jax.random.key(0), jax.random.key(1))


def encoded_alone(codec):
    """Called by hand without what `init` makes."""
    return codec.encode(KEYS, (), (), jnp.ones(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: threshold(10**400), "expected limit to be a number of at least 0"),
        (lambda: tern_grad(-(10**400)), "expected clip to be a number from 1 to"),
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
        (lambda: frame(identity(), MESSAGE, weight=1e-60), "a number that float32 holds"),
        (
            lambda: frame(
                identity(),
                MESSAGE,
                keys=Keys(*(jax.random.key(0, impl=impl) for impl in ("rbg", "unsafe_rbg"))),
            ),
            "of the same kind",
        ),
        (lambda: aggregators.mean(codec=fixed_point(8), secure="no"), "expected secure"),
        (lambda: aggregators.mean(codec="entropy"), r"is preset\(name\)"),
        (lambda: aggregators.mean(codec=downlink_preset("anchored")), "it is for the way down"),
        (lambda: preset("anchored"), "`downlink_preset` has those of the way down"),
        (lambda: downlink_preset("dense_8bit"), "a codec, `preset"),
        (lambda: flagship(lambda round: 1.0), "for one that changes take `scheduled`"),
        (lambda: tern_grad(1e40), "expected clip to be a number from 1 to 1e"),
        (lambda: uniform_quantize(10**5000), "got an integer of thousands of digits"),
        (lambda: uniform_quantize(8, rounding=np.array(["a", "b"])), "expected rounding to be"),
        (lambda: flagship(candidates=np.array(["a", "b"])), "expected candidates to be"),
        (lambda: encoded_alone(error_feedback(top_k(0.5))), "expected the memory of error_feed"),
        (lambda: encoded_alone(ef21(identity())), "expected the memory of ef21"),
        (lambda: encoded_alone(fixed_point(8)), "expected the hints of fixed_point"),
        (lambda: encoded_alone(flagship(target_rate(1.0))), "expected the hints of flagship"),
        (lambda: to_bytes(chain(identity(), identity()), FOREIGN), "for each of the 2 stages"),
        (lambda: from_bytes(chain(identity(), identity()), b"12345678", FOREIGN), "another codec"),
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
    assert flagship(1 / 3).name != flagship(0.333333).name


def test_equal_codecs_have_one_name():
    assert tern_grad(clip=8).name == tern_grad(clip=8.0).name
    assert eden(2).name == eden(2.0).name


@pytest.mark.parametrize(
    ("codec", "size", "element"),
    [
        (qsgd(1, min_size=0), 10_000, 1000),
        (step_quantize(4.0, rounding="stochastic", min_size=0), 1000, 20_000),
        (rand_k(0.01, min_size=0), 1000, 700),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_large_numbers_of_float16_stay_finite(codec, size, element):
    """What is too large for the dtype becomes its largest number, as in a cast to bfloat16."""
    x = jnp.full(size, element, jnp.float16)
    _, message = codec.encode(KEYS, (), (), x)
    decoded = codec.decode(KEYS, (), message)
    assert decoded.dtype == jnp.float16
    assert float(jnp.max(jnp.abs(decoded))) == float(jnp.finfo(jnp.float16).max)


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
