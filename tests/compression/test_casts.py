"""Casts, against the float types of NumPy's ml_dtypes."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fedjax_core.compression import bfloat16, float8


def numbers() -> np.ndarray:
    """Normal ones of all sizes that bfloat16 holds, both signs."""
    rng = np.random.default_rng(0)
    return (rng.choice([-1, 1], 4_097) * 2.0 ** rng.uniform(-120, 120, 4_097)).astype(np.float32)


def test_bfloat16_rounds_as_numpy_does(round_trip):
    expected = numbers().astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(round_trip(bfloat16(min_size=0), numbers()), expected)


def test_float8_rounds_as_numpy_does(round_trip, source):
    # With a largest magnitude of 448 nothing is scaled.
    x = np.clip(np.asarray(source("student", 4_097)) * 20, -448, 448)
    x[7] = -448
    expected = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(round_trip(float8(min_size=0), x), expected)


@pytest.mark.parametrize(
    ("codec", "expected"), [(bfloat16(), 2.77e-6), (float8(), 7.0e-4)], ids=["bfloat16", "float8"]
)
def test_error_on_a_gaussian(codec, expected, lost, source):
    """The measurements of the reference, section 1a, within 5 %."""
    assert lost(codec, source("normal", 2**18)) == pytest.approx(expected, rel=0.05)


def test_largest_numbers_stay_finite(round_trip):
    limit = jnp.finfo(jnp.float32).max
    value = jnp.array([limit, -limit, 0, 1])
    decoded = round_trip(bfloat16(min_size=0), value)
    assert jnp.all(jnp.isfinite(decoded))
    np.testing.assert_allclose(decoded, value, rtol=2**-8)
    np.testing.assert_array_equal(round_trip(float8(min_size=0), value)[:3], value[:3])


def test_bfloat16_keeps_what_is_not_finite(round_trip):
    value = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 2.0])
    np.testing.assert_array_equal(round_trip(bfloat16(min_size=0), value), value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_element_spoils_the_scale_of_float8(bad, round_trip):
    assert not jnp.any(jnp.isfinite(round_trip(float8(min_size=0), jnp.array([1.0, bad, 2.0]))))


def test_bits(bits_of):
    assert bits_of(bfloat16(min_size=10), (10,), (11,)) == 320 + 176
    assert bits_of(float8(min_size=10), (10,), (11,)) == 320 + 88 + 32
