"""Tables of levels, against integrals of the Gaussian density."""

import numpy as np
import pytest

from fedjax_core.compression.gaussian import bounded_levels, lloyd_max, middles

GRID = np.linspace(-12, 12, 2_400_001)
DENSITY = np.exp(-(GRID**2) / 2) / np.sqrt(2 * np.pi)


def mean(values: np.ndarray) -> float:
    return float(np.trapezoid(values * DENSITY, GRID))


@pytest.mark.parametrize(
    ("bits", "error", "entropy"),
    [(1, 0.363380, 1), (2, 0.117482, 1.9111), (3, 0.034548, 2.8249), (4, 0.009501, 3.7653)],
)
def test_lloyd_max(bits, error, entropy):
    """Reference case 21."""
    levels = lloyd_max(bits)
    cells = np.searchsorted(middles(levels), GRID)
    assert mean((levels[cells] - GRID) ** 2) == pytest.approx(error, abs=1e-5)
    masses = np.array([mean((cells == cell) * 1.0) for cell in range(2**bits)])
    assert -np.sum(masses * np.log2(masses)) == pytest.approx(entropy, abs=1e-4)
    np.testing.assert_array_equal(levels, -levels[::-1])


@pytest.mark.parametrize(
    ("bits", "positive"),
    [
        (1, [0.797885]),
        (2, [0.452780, 1.510418]),
        (3, [0.245094, 0.756005, 1.343909, 2.151946]),
    ],
)
def test_centroids_of_lloyd_max(bits, positive):
    """Reference case 21."""
    np.testing.assert_allclose(lloyd_max(bits)[2 ** (bits - 1) :], positive, atol=1e-6)


def stochastic_error(levels: np.ndarray) -> float:
    """E (a' - Z)(Z - a) over the support of the levels."""
    below = np.clip(np.searchsorted(levels, GRID) - 1, 0, len(levels) - 2)
    inside = np.abs(GRID) <= levels[-1]
    return mean((levels[below + 1] - GRID) * (GRID - levels[below]) * inside)


@pytest.mark.parametrize(
    ("bits", "best", "uniform"),
    [(1, 8.597, 8.597), (2, 0.5733, 0.7140), (3, 0.0926, 0.1303), (4, 0.01947, 0.02837)],
)
def test_bounded_levels(bits, best, uniform):
    """Reference case 27."""
    levels = bounded_levels(bits, 2**-9)
    assert levels[-1] == -levels[0] == pytest.approx(3.0973, abs=5e-5)
    assert stochastic_error(levels) == pytest.approx(best, rel=1e-3)
    assert stochastic_error(np.linspace(levels[0], levels[-1], 2**bits)) == pytest.approx(
        uniform, rel=1e-3
    )


def test_inner_level_of_two_bits():
    """Reference case 27."""
    assert bounded_levels(2, 2**-9)[2] == pytest.approx(0.74472, abs=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_other_bounded_levels_are_better(bits):
    levels = bounded_levels(bits, 2**-9)
    best = stochastic_error(levels)
    for inner in range(1, 2**bits - 1):
        for shift in (-0.02, 0.02):
            moved = levels.copy()
            moved[inner] += shift
            assert stochastic_error(moved) > best
