"""DRIVE and EDEN: errors that do not depend on the source, and independent rotations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core.compression import Keys, drive, eden
from fedjax_core.errors import CodecError

LOSSES = {1: 0.363380, 2: 0.117482, 3: 0.034548, 4: 0.009501}


@pytest.mark.parametrize("name", ["normal", "laplace", "student"])
@pytest.mark.parametrize(
    "bits", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow), 4]
)
def test_error_of_any_source(bits, name, lost, source):
    """Reference case 22, within its 3 %: over four standard errors.

    In one block, because a Student source has elements that stand out of a block of 4,096 even
    after the rotation, and are sent better than a Gaussian's.
    """
    x, loss, block = source(name, 2**17), LOSSES[bits], 2**17
    assert lost(eden(bits, block=block), x) == pytest.approx(loss / (1 - loss), rel=0.03)
    assert lost(eden(bits, block=block, scale="mmse"), x) == pytest.approx(loss, rel=0.03)


def test_padding_takes_its_share_of_the_error(lost, source):
    """Reference case 22, at its filling of 79 %: the error that falls on the padding is dropped.

    At a filling near one half all of it stays, because both halves of the rotated block are equal.
    """
    size, padded = 51_981, 2**16
    expected = (np.pi / 2 - 1) * size / padded
    assert lost(drive(block=padded), source("normal", size)) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize("block", [64, 4_096])
def test_unbiased_scale_keeps_the_projection(bits, block, source, round_trip):
    """Reference case 22: Q(x) . x = x . x."""
    x = source("student", 8_192)
    decoded = round_trip(eden(bits, block=block, min_size=0), x)
    x, decoded = np.asarray(x, np.float64), np.asarray(decoded, np.float64)
    assert np.dot(decoded, x) == pytest.approx(np.dot(x, x), rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4_096, 5_000])
def test_one_hot_is_exact_and_zero_stays_zero(size, round_trip):
    """Reference case 23."""
    value = jnp.zeros(size).at[size // 2].set(-7.0)
    # Sums of thousands of equal terms in float32 are right to four digits.
    decoded = round_trip(drive(min_size=0), value)
    np.testing.assert_allclose(decoded, value, rtol=1e-4, atol=1e-5)
    assert not jnp.any(round_trip(drive(min_size=0), jnp.zeros(size)))


def test_errors_of_ten_clients_average_out(many, source):
    """Reference case 24, within its 5 %."""
    x = np.asarray(source("normal", 2**16), np.float64)
    each = many(drive(), jnp.float32(x), 10)

    def lost(decoded):
        return np.sum((decoded - x) ** 2) / np.sum(x**2)

    assert lost(each.mean(0)) == pytest.approx(0.0571, rel=0.05)
    assert lost(np.mean([each[0]] * 10, axis=0)) == pytest.approx(0.571, rel=0.05)


def test_sender_and_receiver_need_the_same_key(source):
    codec, x = drive(), source("normal", 2**15)
    assert codec.traits.needs_seed
    shared = jax.random.key(0)
    _, message = codec.encode(Keys(shared, jax.random.key(1)), (), (), x)
    wrong = codec.decode(Keys(shared, jax.random.key(2)), (), message)
    assert float(jnp.sum((wrong - x) ** 2) / jnp.sum(x**2)) > 2


@pytest.mark.parametrize(("part", "size"), [(0.1, 163_840), (0.5, 32_768)])
def test_error_below_one_bit(part, size, lost, source):
    """Reference case 25, within its 5 %: (pi / 2) / p - 1 where the drawn part fills its blocks."""
    x = source("normal", size)
    assert lost(eden(part), x) == pytest.approx(np.pi / 2 / part - 1, rel=0.05)
    mmse = 1 - 2 / np.pi * part
    assert lost(eden(part, scale="mmse"), x) == pytest.approx(mmse, rel=0.05)


def test_bits(bits_of):
    """Symbols with padding, a scale for each block; a tenth of the elements at 0.1 bits."""
    d, blocks = 1_663_370, 407
    for bits in (1, 2, 3, 4):
        assert bits_of(eden(bits), (d,)) == bits * 4_096 * blocks + 32 * blocks
    assert bits_of(drive(), (d,)) / d == pytest.approx(1.0101, abs=5e-5)
    assert bits_of(eden(0.1), (163_840,)) == 16_384 + 4 * 32


@pytest.mark.parametrize("bits", [0, 5, 1.5, -1, True, "1", float("nan")])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(CodecError, match=r"expected bits to be 1, 2, 3, 4 or a number in \(0, 1\)"):
        eden(bits)


def test_scale_that_is_none_is_refused():
    with pytest.raises(CodecError, match="expected scale"):
        drive(scale="norm")
