"""Levels of quantisers that are best for a Gaussian variable Z, computed here in float64.

| table | rounding | levels a_0 < ... < a_m minimise |
|---|---|---|
| `lloyd_max` | to the nearest | E (Z - a)^2 |
| `bounded_levels` | stochastic, between neighbours | E (a' - Z) (Z - a); a_0 = -T, a_m = T |

References:
  Lloyd. Least squares quantization in PCM. IEEE Transactions on Information Theory 28(2), 1982.

  Max. Quantizing for minimum distortion. IRE Transactions on Information Theory 6(1), 1960.

  Ben Basat, Vargaftik, Portnoy, Einziger, Ben-Itzhak, Mitzenmacher. QUIC-FL: quick unbiased
  compression for federated learning. 2022, arXiv:2205.13341 (bounded support).
"""

import functools
import math

import numpy as np


@functools.cache
def lloyd_max(bits: int) -> np.ndarray:
    """The ``2**bits`` levels of the Lloyd-Max quantiser: each the mean of what is rounded to it.

    Args:
      bits: 1 to 4; the iteration gets slower with the square of the number of levels.

    Returns:
      float64, increasing, symmetric.

    Example:
      >>> lloyd_max(2).round(6).tolist()
      [-1.510418, -0.45278, 0.45278, 1.510418]
    """
    levels = np.linspace(-1, 1, 2**bits) * (1 + bits / 2)
    change = 1.0
    while change > 1e-13:
        ends = np.concatenate([[-np.inf], middles(levels), [np.inf]])
        means = -np.diff(_density(ends)) / np.diff(_distribution(ends))
        change = float(np.abs(means - levels).max())
        levels = means
    # Exactly symmetric, so that no sign is favoured.
    return (levels - levels[::-1]) / 2


def middles(levels: np.ndarray) -> np.ndarray:
    """Where the nearest level changes."""
    return (levels[1:] + levels[:-1]) / 2


@functools.cache
def bounded_levels(bits: int, tail: float) -> np.ndarray:
    """The ``2**bits`` levels of the best unbiased quantiser of Z on [-T, T], by Newton's method.

    Args:
      bits: 1 to 4.
      tail: the probability of ``|Z| > T``.

    Returns:
      float64, increasing, symmetric, from -T to T.

    Example:
      >>> bounded_levels(2, 2**-9).round(4).tolist()
      [-3.0973, -0.7447, 0.7447, 3.0973]
    """
    limit = _quantile(tail)
    levels = np.linspace(-limit, limit, 2**bits)
    for _ in range(50 if bits > 1 else 0):
        gradient, hessian = _derivatives(levels)
        levels[1:-1] -= np.linalg.solve(hessian, gradient)
    return (levels - levels[::-1]) / 2


def _derivatives(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the error, by the inner levels: the gradient and its own derivative."""
    density, mass = _density(levels), np.diff(_distribution(levels))
    moment, width = -np.diff(density), np.diff(levels)
    # The integrals of (z - a) and of (a' - z) over each cell [a, a'].
    from_left, from_right = moment - levels[:-1] * mass, levels[1:] * mass - moment
    diagonal = np.diag((width[:-1] + width[1:]) * density[1:-1])
    neighbours = mass[1:-1]
    hessian = diagonal - np.diag(neighbours, 1) - np.diag(neighbours, -1)
    return from_left[:-1] - from_right[1:], hessian


def _quantile(tail: float) -> float:
    """T with ``P(|Z| > T) = tail``, by bisection."""
    low, high = 0.0, 40.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erfc(middle / math.sqrt(2)) > tail else (low, middle)
    return low


def _density(z: np.ndarray) -> np.ndarray:
    return np.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _distribution(z: np.ndarray) -> np.ndarray:
    return np.array([math.erfc(-x / math.sqrt(2)) / 2 for x in z])
