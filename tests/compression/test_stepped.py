"""Quantisation by a step: rates and errors against closed forms and the reference, corrections."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core.compression import Keys, ans, chain, step_quantize, to_bytes
from fedjax_core.errors import CodecError

SIZE = 2**18


def entropy(x: jax.Array, codec) -> float:
    """Bits a symbol, by how often each one occurs."""
    keys = Keys(jax.random.key(0), jax.random.key(1))
    codes = np.asarray(codec.encode(keys, (), (), x)[1].payload.codes)
    share = np.unique(codes, return_counts=True)[1] / codes.size
    return float(-np.sum(share * np.log2(share)))


@pytest.mark.parametrize(
    ("step", "bits", "error"),
    [
        pytest.param(0.5, 3.06197, 0.020408, marks=pytest.mark.slow),
        pytest.param(1, 2.10483, 0.076915, marks=pytest.mark.slow),
        (2, 1.24120, 0.253507),
        (4, 0.31247, 0.743736),
    ],
)
def test_gaussian_with_centroids(step, bits, error, lost, source):
    """Reference case 14: the entropy, and the error within 1 %."""
    codec, x = step_quantize(step, correction="centroids"), source("normal", SIZE)
    assert entropy(x, codec) == pytest.approx(bits, abs=0.01)
    assert lost(codec, x) == pytest.approx(error, rel=0.01)


def test_middle_of_the_step_loses_a_twelfth(lost, source):
    """Reference case 14: D_mid at a step of one deviation."""
    assert lost(step_quantize(1.0), source("normal", SIZE)) == pytest.approx(1 / 12, rel=0.01)


@pytest.mark.parametrize(
    "step",
    [
        0.05,
        pytest.param(0.3, marks=pytest.mark.slow),
        1.0,
        pytest.param(1.7, marks=pytest.mark.slow),
        pytest.param(3.0, marks=pytest.mark.slow),
        4.0,
    ],
)
def test_a_quarter_of_a_bit_above_what_is_possible(step, lost, source):
    """Reference case 35: the excess over the rate-distortion function of a Gaussian."""
    codec, x = step_quantize(step, correction="centroids"), source("normal", SIZE)
    least = 0.5 * math.log2(1 / lost(codec, x))
    assert 0 < entropy(x, codec) - least <= 0.256


@pytest.mark.parametrize(("step", "tolerance"), [(0.1, 0.01), (1.0, 0.02), (2.5, 0.03)])
def test_stochastic_rounding_has_its_exact_error(step, tolerance, lost, source):
    """Reference case 16: the sum of step^2 f (1 - f)."""
    x = source("laplace", SIZE)
    position = np.abs(np.asarray(x, np.float64)) / (
        step * np.sqrt(np.mean(np.square(x, dtype=float)))
    )
    f = position % 1
    expected = np.sum(f * (1 - f)) / np.sum(position**2)
    measured = lost(step_quantize(step, rounding="stochastic"), x)
    assert measured == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("name", ["normal", "laplace", "student", "signs"])
def test_dither_has_the_error_of_its_step(name, lost, source):
    """Reference case 17: a twelfth of the step's square, whatever the source."""
    measured = lost(step_quantize(0.7, rounding="dither"), source(name, SIZE))
    assert measured == pytest.approx(0.7**2 / 12, rel=0.01)


def test_dead_zone_below_one_bit(lost, source):
    """The reference's section 5.1: 0.587 bits lose 0.563, and the source of Laplace 0.434."""
    codec = step_quantize(2.5, correction="centroids", dead_zone=0.15)
    assert entropy(source("normal", SIZE), codec) == pytest.approx(0.587, rel=0.01)
    assert lost(codec, source("normal", SIZE)) == pytest.approx(0.5630, rel=0.01)
    assert entropy(source("laplace", SIZE), codec) == pytest.approx(0.591, rel=0.01)
    assert lost(codec, source("laplace", SIZE)) == pytest.approx(0.434, rel=0.02)


def test_corrections_are_what_they_say(round_trip, source):
    """The smallest error is orthogonal to the reconstruction; alignment keeps x . Q(x)."""
    x = np.asarray(source("student", SIZE), np.float64)
    small = np.asarray(round_trip(step_quantize(2.0, correction="mmse"), jnp.float32(x)), float)
    aligned = np.asarray(
        round_trip(step_quantize(2.0, correction="alignment"), jnp.float32(x)), float
    )
    assert abs(small @ (x - small)) < 1e-5 * (x @ x)
    assert aligned @ x == pytest.approx(x @ x, rel=1e-5)
    assert np.corrcoef(small, aligned)[0, 1] == pytest.approx(1)


def test_symbols_of_the_extremes_fit_their_width():
    """One element has all the energy: its symbol is the norm over the step."""
    codec = step_quantize(0.01, min_size=0)
    keys = Keys(jax.random.key(0), jax.random.key(1))
    x = jnp.zeros(10_000).at[7].set(-5.0)
    _, message = codec.encode(keys, (), (), x)
    assert int(message.payload.codes[7]) == -10_000
    assert message.payload.width == 15
    np.testing.assert_allclose(codec.decode(keys, (), message), x, rtol=1e-6)


@pytest.mark.slow
def test_what_only_large_symbols_need_costs_nothing_once_coded(source):
    """Widths are for the worst case; an entropy code pays for what occurs."""
    codec, keys = chain(step_quantize(1.0), ans()), Keys(jax.random.key(0), jax.random.key(1))
    _, message = codec.encode(keys, (), (), source("normal", SIZE))
    bits = 8 * len(to_bytes(codec, message))
    assert bits == int(codec.bits(message))
    assert bits / SIZE == pytest.approx(2.105, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"step": 0}, "expected step to be a number"),
        ({"step": np.nan}, "expected step to be a number"),
        ({"step": True}, "expected step to be a number"),
        ({"step": 1, "rounding": "down"}, "expected rounding to be"),
        ({"step": 1, "correction": "mean"}, "expected correction to be"),
        ({"step": 1, "dead_zone": 0.5}, "expected dead_zone to be a number"),
        ({"step": 1, "rounding": "dither", "correction": "mmse"}, "expected no correction"),
        ({"step": 1, "min_size": -1}, "expected min_size to be"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, expected):
    with pytest.raises(CodecError, match=expected):
        step_quantize(**arguments)


def test_steps_too_small_for_31_bits_are_refused():
    codec = step_quantize(1e-6, min_size=0)
    value = jax.ShapeDtypeStruct((2**24,), jnp.float32)
    keys = jax.eval_shape(lambda: Keys(jax.random.key(0), jax.random.key(1)))
    with pytest.raises(CodecError, match="take a larger step"):
        jax.eval_shape(lambda k, v: codec.encode(k, (), (), v), keys, value)
