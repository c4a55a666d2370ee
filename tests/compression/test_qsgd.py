"""QSGD: its error in closed form, its bounds, and what comes back exactly."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core.compression import qsgd
from fedjax_core.errors import CodecError


def test_error_at_the_root_of_the_size(lost, source):
    """Reference case 18: with s = sqrt(d) the step is one root mean square, so the error is 1/6.

    Within 2 %, over eight standard errors.
    """
    assert lost(qsgd(512), source("normal", 2**18)) == pytest.approx(1 / 6, rel=0.02)


@pytest.mark.parametrize("name", ["normal", "laplace", "student"])
@pytest.mark.parametrize(("levels", "bucket"), [(1, None), (3, 512), (15, 512), (127, 1_000)])
def test_error_in_closed_form(name, levels, bucket, lost, source, two_valued):
    """Within five standard errors: false alarms at 6e-7; and below the bound of the paper."""
    size = 10_000
    value = source(name, size)
    x = np.abs(np.asarray(value, np.float64))
    width = bucket or size
    norms = [np.linalg.norm(x[start : start + width]) for start in range(0, size, width)]
    step = np.repeat(norms, width)[:size] / levels
    low = np.floor(x / step) * step
    expected, deviation = two_valued(x, low, low + step)
    energy = np.sum(x**2)
    measured = lost(qsgd(levels, bucket, min_size=0), value)
    assert abs(measured - expected / energy) < 5 * deviation / energy
    assert expected / energy <= min(width / levels**2, np.sqrt(width) / levels)


@pytest.mark.parametrize(("size", "levels"), [(4, 2), (1_024, 32), (4_096, 128), (1, 1)])
def test_equal_magnitudes_are_exact(size, levels, round_trip, source):
    """Reference case 18."""
    value = source("signs", size)
    np.testing.assert_array_equal(round_trip(qsgd(levels, min_size=0), value), value)


@pytest.mark.parametrize(
    ("levels", "width"), [(1, 2), (3, 3), (4, 4), (127, 8), (128, 9), (32_767, 16)]
)
def test_bits(levels, width, bits_of):
    codec = qsgd(levels, 100, min_size=0)
    assert bits_of(codec, (1_001,)) == 8 * -(-1_001 * width // 8) + 11 * 32


def test_buckets_have_their_own_norms(round_trip):
    value = jnp.array([0.0, 1e-3, 0.0, 0.0, -1e3, 0.0, 5.0])
    np.testing.assert_array_equal(round_trip(qsgd(1, 3, min_size=0), value), value)


def test_norm_that_overflows_is_not_finite(round_trip):
    value = jnp.full(8, jnp.finfo(jnp.float32).max)
    assert not jnp.any(jnp.isfinite(round_trip(qsgd(3, min_size=0), value)))


@pytest.mark.parametrize("levels", [0, 32_768, 1.5, True, None])
def test_levels_out_of_range_are_refused(levels):
    with pytest.raises(CodecError, match="expected levels to be an integer from 1 to 32767"):
        qsgd(levels)


@pytest.mark.parametrize("bucket", [0, -1, 2.0])
def test_bucket_out_of_range_is_refused(bucket):
    with pytest.raises(CodecError, match="expected bucket to be an integer"):
        qsgd(1, bucket)
