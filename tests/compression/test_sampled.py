"""Sampled elements: their error, who draws them, and that no position travels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core.compression import Keys, chain, rand_k, to_bytes, uniform_quantize
from fedjax_core.errors import CodecError


@pytest.mark.parametrize("fraction", [0.1, 0.25, 1])
def test_error_of_constant_magnitudes(fraction, lost, source):
    """Reference case 29: d / k - 1, and 1 - k / d unscaled; exact where all magnitudes are one."""
    x = source("signs", 2_000)
    for common in (True, False):
        unbiased = rand_k(fraction, common, min_size=0)
        assert lost(unbiased, x) == pytest.approx(1 / fraction - 1, rel=1e-6)
        plain = rand_k(fraction, common, unbiased=False, min_size=0)
        assert lost(plain, x) == pytest.approx(1 - fraction, rel=1e-6)


def test_error_of_a_gaussian(many, source):
    """Reference case 29, within its 2 %: over five standard errors of 16 clients."""
    x = np.asarray(source("normal", 2**16), np.float64)
    decoded = many(rand_k(0.1, common=False), jnp.float32(x), 16)
    lost = np.sum((decoded - x[None]) ** 2, axis=1).mean() / np.sum(x**2)
    assert lost == pytest.approx(9, rel=0.02)


def test_all_elements_are_drawn_alike(many):
    """Each within 6 standard errors of 4,000 draws: false alarms at 1e-7 for 50 elements."""
    drawn = (many(rand_k(0.3, common=False, min_size=0), jnp.ones(50), 4_000) > 0).mean(0)
    assert np.all(np.abs(drawn - 0.3) < 6 * np.sqrt(0.3 * 0.7 / 4_000))


def test_common_draw_is_that_of_the_shared_key(many):
    decoded = many(rand_k(0.1, min_size=0), jnp.ones(100), 3)
    np.testing.assert_array_equal(decoded[0], decoded[1])
    own = many(rand_k(0.1, common=False, min_size=0), jnp.ones(100), 3)
    assert not np.array_equal(own[0], own[1])


def test_values_alone_travel(source):
    keys = Keys(jax.random.key(0), jax.random.key(1))
    codec, x = rand_k(0.1, min_size=0), source("normal", 1_000)
    _, message = codec.encode(keys, (), (), x)
    decoded = codec.decode(keys, (), message)
    assert to_bytes(codec, message) == np.asarray(decoded)[np.flatnonzero(decoded)].tobytes()


def test_bits(bits_of):
    assert bits_of(rand_k(0.1, min_size=10), (10,), (101,)) == 320 + 11 * 32
    quantised = chain(rand_k(0.1), uniform_quantize(4))
    assert bits_of(quantised, (100_000,)) == 40_000 + 64


@pytest.mark.parametrize("fraction", [0, 1.5, float("nan"), True])
def test_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(CodecError, match=r"expected fraction to be a number in \(0, 1\]"):
        rand_k(fraction)
