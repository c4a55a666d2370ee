"""Ternary codecs: their errors in closed form, and trits on the wire."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core.compression import sparse_ternary, tern_grad
from fedjax_core.errors import CodecError


@pytest.mark.parametrize("name", ["normal", "laplace", "uniform"])
@pytest.mark.parametrize("size", [1_000, 2**16])
def test_error_of_tern_grad(name, size, lost, source, two_valued):
    """Reference case 19: s |x|_1 - |x|^2, within five standard errors: false alarms at 6e-7."""
    value = source(name, size)
    x = np.abs(np.asarray(value, np.float64))
    expected, deviation = two_valued(x, 0, x.max())
    energy = np.sum(x**2)
    assert expected == pytest.approx(x.max() * x.sum() - energy)
    measured = lost(tern_grad(None, min_size=0), value)
    assert abs(measured - expected / energy) < 5 * deviation / energy


@pytest.mark.parametrize("clip", [None, 2.5, 1])
def test_constant_magnitudes_are_exact(clip, round_trip, source):
    """Reference case 19."""
    value = source("signs", 1_024)
    np.testing.assert_array_equal(round_trip(tern_grad(clip, min_size=0), value), value)


def test_clipping_at_two_and_a_half(lost, source):
    """On a Gaussian, of root mean square 1, in closed form.

    With m = min(|x|, c): E (Q(x) - x)^2 = c E m - 2 E m |x| + 1. Within 2 %: over five standard
    errors at this length.
    """
    c = 2.5
    grid = np.linspace(0, 12, 1_200_001)
    density = np.sqrt(2 / np.pi) * np.exp(-(grid**2) / 2)
    clipped = np.minimum(grid, c)
    expected = np.trapezoid((c * clipped - 2 * clipped * grid) * density, grid) + 1
    assert lost(tern_grad(), source("normal", 2**18)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("size", "bits"), [(1, 8), (5, 8), (6, 16), (4_095, 6_552), (4_096, 6_560), (4_097, 6_560)]
)
def test_five_trits_take_a_byte(size, bits, bits_of):
    assert bits_of(tern_grad(min_size=0), (size,)) == bits + 32


@pytest.mark.parametrize("clip", [0.5, float("nan"), float("inf"), True, "2.5"])
def test_clip_out_of_range_is_refused(clip):
    with pytest.raises(CodecError, match="expected clip to be a number from 1 to 1e"):
        tern_grad(clip)


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.001, 0.98737), (0.01, 0.91637), (0.1, 0.57452)]
)
def test_lost_energy_of_sparse_ternary(fraction, expected, lost, source):
    """Reference case 28, within its half percent."""
    measured = lost(sparse_ternary(fraction), source("normal", 1_000_000))
    assert measured == pytest.approx(expected, rel=0.005)


def test_survivors_have_one_magnitude(round_trip):
    value = jnp.array([1.0, -4.0, 2.0, 0.0, 0.5, -6.0])
    assert round_trip(sparse_ternary(0.5, min_size=0), value).tolist() == [0, -4, 4, 0, 0, -4]


def test_bits_of_sparse_ternary(bits_of):
    """The reference's section 5.1: gaps of 8.11 bits, a sign each, and a magnitude."""
    size = 1_663_370
    assert bits_of(sparse_ternary(0.01), (size,)) / size == pytest.approx(0.0912, rel=0.005)
