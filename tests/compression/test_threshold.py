"""Thresholds: what is kept, what it takes, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core.compression import Keys, from_bytes, threshold, to_bytes
from fedjax_core.errors import CodecError


def test_half_of_a_uniform_source_is_kept(lost, bits_of, source, round_trip):
    """Its root mean square is 1 / sqrt(3): what is below has a share of 3**-1.5 of the energy."""
    x = source("uniform", 2**17)
    assert lost(threshold(1.0), x) == pytest.approx(3**-1.5, rel=0.01)
    assert np.mean(np.asarray(round_trip(threshold(1.0), x)) != 0) == pytest.approx(
        1 - 3**-0.5, abs=0.005
    )


def test_bits_are_a_mask_or_runs_and_the_elements():
    """Two of 1,000: a tag, 24 bits of runs (499 + 1 zeros twice, signs, ones), and 64 of floats."""
    x = jnp.zeros(1000).at[jnp.array([499, 999])].set(jnp.array([2.0, -3.0]))
    codec = threshold(1.0, min_size=0)
    _, message = codec.encode(Keys(jax.random.key(0), jax.random.key(1)), (), (), x)
    written = to_bytes(codec, message)
    assert 8 * len(written) == int(codec.bits(message)) < 8 * 12 + 64
    read = from_bytes(codec, written, like=jax.eval_shape(lambda: message))
    np.testing.assert_array_equal(read.payload.values, x)


def test_everything_of_a_zero_threshold_comes_back(round_trip, source):
    x = source("student", 5000)
    np.testing.assert_array_equal(round_trip(threshold(0.0, min_size=0), x), x)


@pytest.mark.parametrize("other", [np.nan, np.inf, -np.inf])
def test_a_tensor_that_is_not_finite_travels_whole(round_trip, other):
    x = jnp.array([1.0, 2.0, 3.0, other])
    np.testing.assert_array_equal(round_trip(threshold(1.0, min_size=0), x), x)


@pytest.mark.parametrize("limit", [-1.0, np.inf, np.nan, "1", True])
def test_limits_out_of_range_are_refused(limit):
    with pytest.raises(CodecError, match="expected limit to be a number"):
        threshold(limit)
