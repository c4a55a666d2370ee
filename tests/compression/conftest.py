"""Measuring codecs: what is lost, and how many bits a message takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core.compression import Keys, Report

SHARED = jax.random.key(0)


def reconstruct(codec, value, client):
    """What the receiver has of the message of one client, with the shared key 0."""
    keys = Keys(SHARED, client)
    message = codec.encode(keys, (), (), value)[1]
    report = Report(jnp.int32(1), codec.bits(message), message.stats)
    return codec.finish(SHARED, (), codec.decode(keys, (), message), report)[1]


@pytest.fixture
def round_trip():
    """``(codec, value, seed=0) -> value``, compiled."""

    def run(codec, value, seed=0):
        return jax.jit(lambda v, k: reconstruct(codec, v, k))(value, jax.random.key(seed))

    return run


@pytest.fixture
def many():
    """``(codec, value, count) -> [count, *shape]``: of clients with independent keys."""

    def run(codec, value, count):
        each = jax.jit(jax.vmap(lambda k: reconstruct(codec, value, k)))
        return np.asarray(each(jax.random.split(jax.random.key(7), count)), np.float64)

    return run


@pytest.fixture
def lost(round_trip):
    """``(codec, x, seed=0) -> |Q(x) - x|^2 / |x|^2``."""

    def measure(codec, x, seed=0):
        error = np.asarray(round_trip(codec, x, seed), np.float64) - np.asarray(x, np.float64)
        return float(np.sum(error**2) / np.sum(np.asarray(x, np.float64) ** 2))

    return measure


@pytest.fixture
def bits_of():
    """``(codec, *shapes) -> int``: the size of a message of Gaussian float32 tensors."""

    def count(codec, *shapes):
        value = [jax.random.normal(jax.random.key(7), shape) for shape in shapes]
        keys = Keys(SHARED, SHARED)
        return int(jax.jit(lambda v: codec.bits(codec.encode(keys, (), (), v)[1]))(value))

    return count


@pytest.fixture
def source():
    """``(name, size) -> float32 [size]``: of mean 0, with a fixed seed."""

    def draw(name, size):
        rng = np.random.default_rng(size)
        kinds = {
            "normal": rng.normal,
            "laplace": rng.laplace,
            "uniform": lambda size: rng.uniform(-1, 1, size),
            "student": lambda size: rng.standard_t(3, size),
            "signs": lambda size: 3.25 * rng.choice([-1, 1], size),
        }
        return jnp.asarray(kinds[name](size=size), jnp.float32)

    return draw


@pytest.fixture
def two_valued():
    """``(x, low, high) -> (mean, deviation)`` of the squared error of unbiased rounding to the two.

    The squared error of an element is ``(high - x)^2`` with probability
    ``(x - low) / (high - low)``, else ``(x - low)^2``.
    """

    def moments(x, low, high):
        up, down = (high - x) ** 2, (x - low) ** 2
        probability = (x - low) / np.where(high > low, high - low, 1)
        variance = probability * (1 - probability) * (up - down) ** 2
        return float(np.sum((high - x) * (x - low))), float(np.sqrt(np.sum(variance)))

    return moments
