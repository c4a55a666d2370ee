"""Scaled signs: what is lost of known sources, and what zeros become."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core.compression import scaled_sign
from fedjax_core.errors import CodecError


@pytest.mark.parametrize(
    ("name", "expected"),
    [("normal", 1 - 2 / np.pi), ("laplace", 0.5), ("uniform", 0.25), ("signs", 0)],
)
def test_lost_energy_of_known_sources(name, expected, lost, source):
    """Reference case 20, within its percent: over four standard errors at this length."""
    assert lost(scaled_sign(), source(name, 2**18)) == pytest.approx(expected, rel=0.01, abs=1e-12)


@pytest.mark.parametrize("size", [1, 3, 4097])
def test_lost_energy_in_closed_form(size, lost, source):
    x = np.asarray(source("student", size), np.float64)
    expected = 1 - np.sum(np.abs(x)) ** 2 / (size * np.sum(x**2))
    assert lost(scaled_sign(min_size=0), jnp.float32(x)) == pytest.approx(expected, abs=1e-6)


def test_zeros_are_positive(round_trip):
    decoded = round_trip(scaled_sign(min_size=0), jnp.array([0.0, -0.0, -4.0, 8.0]))
    assert decoded.tolist() == [3.0, 3.0, -3.0, 3.0]


def test_largest_numbers_do_not_overflow(round_trip):
    value = jnp.array([1.0, -1.0, 1.0]) * jnp.finfo(jnp.float32).max
    np.testing.assert_array_equal(round_trip(scaled_sign(min_size=0), value), value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_element_spoils_the_tensor(bad, round_trip):
    assert not jnp.any(
        jnp.isfinite(round_trip(scaled_sign(min_size=0), jnp.array([1.0, bad, 2.0])))
    )


def test_bits(bits_of):
    codec = scaled_sign(min_size=10)
    assert bits_of(codec, (10,), (11,), (3, 8)) == 320 + (16 + 32) + (24 + 32)


def test_min_size_out_of_range_is_refused():
    with pytest.raises(CodecError, match="expected min_size"):
        scaled_sign(min_size=-1)
