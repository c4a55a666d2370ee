"""Sparsification: which elements survive, what is lost, and how positions travel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_core.compression import Keys, top_k
from fedjax_core.compression.sparse import largest_positions
from fedjax_core.errors import CodecError

KEYS = Keys(jax.random.key(0), jax.random.key(1))


def encode(codec, value):
    return codec.encode(KEYS, (), (), value)[1]


def round_trip(codec, value):
    return codec.decode(KEYS, (), encode(codec, value))


positions_of = jax.jit(largest_positions, static_argnums=1)


def expected_positions(flat: np.ndarray, count: int) -> np.ndarray:
    """By a stable sort on the host: ties to the lower index."""
    return np.sort(np.argsort(-np.abs(flat), kind="stable")[:count])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-4, 4, width=16), min_size=12, max_size=12),
    st.sampled_from([1, 5, 12]),
    st.sampled_from([jnp.float32, jnp.float16, jnp.bfloat16]),
)
def test_positions_agree_with_a_stable_sort(values, count, dtype):
    flat = np.asarray(values).astype(dtype)
    positions = positions_of(flat, count)
    assert positions.dtype == jnp.int32
    np.testing.assert_array_equal(positions, expected_positions(flat.astype(np.float32), count))


def test_positions_of_a_long_tensor_with_many_ties():
    flat = np.random.default_rng(0).integers(-9, 9, 100_003).astype(np.float32)
    positions = positions_of(flat, 10_001)
    np.testing.assert_array_equal(positions, expected_positions(flat, 10_001))


def test_positions_of_float64():
    with jax.enable_x64(True):
        flat = np.array([1e-300, -1e300, 0.0, 2.0])
        assert largest_positions(jnp.asarray(flat), 2).tolist() == [1, 3]


def test_positions_map_over_clients():
    rows = jax.random.normal(jax.random.key(2), (4, 101))
    mapped = jax.vmap(lambda row: positions_of(row, 7))(rows)
    for row, positions in zip(np.asarray(rows), mapped, strict=True):
        np.testing.assert_array_equal(positions, expected_positions(row, 7))


@pytest.mark.parametrize("value", [[0.0] * 6, [2.0, -2.0, 2.0, -2.0, 2.0, -2.0]])
def test_ties_keep_exactly_k_and_the_lower_indices(value):
    decoded = round_trip(top_k(0.5, min_size=0), jnp.array(value))
    assert decoded.tolist() == [*value[:3], 0.0, 0.0, 0.0]


def test_survivors_keep_their_values_and_order():
    message = encode(top_k(0.4, min_size=0), jnp.array([[1.0, -8.0], [3.0, 0.5], [-2.0, 9.0]]))
    assert message.payload.values.tolist() == [-8.0, 3.0, 9.0]
    assert message.side[0].indices.tolist() == [1, 2, 5]
    assert message.payload.shape == (3, 2)
    assert message.payload.size == 6


@pytest.mark.parametrize(
    ("fraction", "size", "kept"),
    [(0.07, 100, 7), (0.1, 1_605_632, 160_564), (0.1, 51_200, 5_120), (1e-9, 5, 1), (1, 5, 5)],
)
def test_number_of_survivors(fraction, size, kept):
    """0.07 * 100 is 7.000000000000001 in floating point."""
    template = jax.ShapeDtypeStruct((size,), jnp.float32)
    codec = top_k(fraction, min_size=0)
    assert jax.eval_shape(lambda v: encode(codec, v), template).payload.values.shape == (kept,)


def test_small_tensors_and_integers_travel_whole():
    value = {
        "bias": jnp.arange(100.0),
        "kernel": jnp.arange(101.0),
        "steps": jnp.arange(500, dtype=jnp.int32),
    }
    decoded = round_trip(top_k(0.01, min_size=100), value)
    np.testing.assert_array_equal(decoded["bias"], value["bias"])
    np.testing.assert_array_equal(decoded["steps"], value["steps"])
    assert np.flatnonzero(decoded["kernel"]).tolist() == [99, 100]


def lost(x: np.ndarray, fraction: float) -> float:
    decoded = np.asarray(jitted_round_trip(fraction)(x), np.float64)
    return float(np.sum((decoded - x) ** 2) / np.sum(x.astype(np.float64) ** 2))


@pytest.mark.parametrize(
    ("source", "fraction", "expected"),
    [
        ("normal", 0.001, 0.98730),
        ("normal", 0.01, 0.91551),
        ("normal", 0.1, 0.56071),
        ("laplace", 0.001, 0.96823),
        ("laplace", 0.01, 0.83791),
        ("laplace", 0.1, 0.40465),
    ],
)
def test_lost_energy_of_known_sources(source, fraction, expected):
    """Reference case 28, within its half percent: over ten standard errors at this length."""
    x = getattr(np.random.default_rng(0), source)(size=1_000_000).astype(np.float32)
    assert lost(x, fraction) == pytest.approx(expected, rel=0.005)


@functools.cache
def jitted_round_trip(fraction):
    return jax.jit(lambda x: round_trip(top_k(fraction, min_size=0), x))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=10, max_size=10),
    st.sampled_from([0.1, 0.5, 1.0]),
)
def test_contraction(values, fraction):
    x = np.array(values, np.float32)
    error = np.asarray(jitted_round_trip(fraction)(x), np.float64) - x
    bound = (1 - np.ceil(fraction * 10) / 10) * np.sum(x.astype(np.float64) ** 2)
    assert np.sum(error**2) <= bound * (1 + 1e-12)


@pytest.mark.parametrize(
    "fraction", [0, -0.1, 1.0001, float("nan"), float("inf"), True, "0.1", None]
)
def test_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(CodecError, match=r"expected fraction to be a number in \(0, 1\]"):
        top_k(fraction)


def test_min_size_out_of_range_is_refused():
    with pytest.raises(CodecError, match="expected min_size"):
        top_k(0.1, min_size=-1)


def test_leaf_that_is_no_array_is_named():
    with pytest.raises(CodecError, match=r"got float at value\[1\]"):
        encode(top_k(0.1), [jnp.ones(3), 2.0])
