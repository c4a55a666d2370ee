"""Sums of integers are exact: they saturate once, whatever the order, the lanes and the mode.

All expected numbers are sums of Python's integers, which have no width.
"""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedjax_core as fc

DTYPES = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32)
NUM_CLIENTS = 7
MODES = {
    "reference": fc.Execution(mode="reference"),
    "stacked": fc.Execution(mode="stacked"),
    "streamed 1": fc.Execution(mode="streamed", lanes=1),
    "streamed 3": fc.Execution(mode="streamed", lanes=3),
}
MODULI = {"one": 1, "small": 5, "even": 2**16, "odd": 65_537, "large": 2**31 - 1}


@functools.cache
def lowered(operator, t, mode):
    """The operator for client values of type `t`, compiled unless it is the reference."""
    computation = fc.federated_computation(operator, fc.FederatedType(t, fc.CLIENTS))
    run = computation.lower(MODES[mode])
    return run if mode == "reference" else jax.jit(run)


def run(operator, mode, values, valid=None):
    member = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), values)
    value = fc.Federated(values, fc.CLIENTS)
    result, _ = lowered(operator, fc.to_type(member), mode)(value, valid=valid)
    return result.value


def saturated(values, dtype):
    limits = np.iinfo(dtype)
    return min(max(sum(map(int, values)), int(limits.min)), int(limits.max))


def wide_range(dtype):
    """Integers of a dtype, its ends among them more often than by chance."""
    limits = np.iinfo(dtype)
    low, high = int(limits.min), int(limits.max)
    ends = st.sampled_from([low, low + 1, 0, 1, high - 1, high])
    return st.one_of(ends, st.integers(low, high))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_sums_saturate_once(data, dtype):
    """Unlike running sums with saturation: max + 1 - 1 is max, and never max - 1."""
    values = data.draw(st.lists(wide_range(dtype), min_size=NUM_CLIENTS, max_size=NUM_CLIENTS))
    order = data.draw(st.permutations(range(NUM_CLIENTS)))
    valid = np.array(data.draw(st.lists(st.booleans(), min_size=7, max_size=7)))
    values = np.array(values, dtype)
    for mode in MODES:
        total = run(fc.federated_sum, mode, values[list(order)], valid)
        assert total.dtype == dtype
        assert int(total) == saturated(values[list(order)][valid], dtype), mode


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.int32, [2**31 - 1, 1], 2**31 - 1),
        (np.int32, [2**31 - 1, 1, -1], 2**31 - 1),
        (np.int32, [2**31 - 1, 1, -2], 2**31 - 2),
        (np.int32, [-(2**31), -(2**31), 2**31 - 1, 2**31 - 1], -2),
        (np.uint32, [2**32 - 1, 2**32 - 1], 2**32 - 1),
        (np.uint32, [], 0),
        (np.int8, [1] * 200, 127),
        (np.int8, [-128, -1, 127, 2], 0),
        (np.uint8, [200, 55], 255),
        (np.uint8, [200, 56], 255),
        (np.int16, [-32768, -1], -32768),
    ],
)
def test_sums_at_the_ends_of_a_dtype(mode, dtype, values, expected):
    assert int(run(fc.federated_sum, mode, np.array(values, dtype))) == expected


def test_lists_give_the_same():
    total = fc.federated_computation(fc.federated_sum, fc.FederatedType(np.int32, fc.CLIENTS))
    assert total([2**31 - 1, 1]) == 2**31 - 1
    assert total([2**31 - 1, 1, -5]) == 2**31 - 5


@pytest.mark.parametrize("mode", ["stacked", "streamed 3"])
def test_sums_of_many_clients(mode):
    """More than 32,768 numbers at once, where a sum of their halves does not fit a word."""
    rng = np.random.default_rng(0)
    half = rng.integers(-(2**31) + 1, 2**31, 20_000)
    values = rng.permutation(np.concatenate([half, -half, [12_345]])).astype(np.int32)
    assert int(run(fc.federated_sum, mode, values)) == 12_345
    largest = np.full(40_001, 2**32 - 1, np.uint32)
    assert int(run(fc.federated_sum, mode, largest)) == 2**32 - 1
    lowest = np.full(40_001, -(2**31), np.int32)
    assert int(run(fc.federated_sum, mode, lowest)) == -(2**31)
    ones = np.ones(40_001, np.int32)
    assert int(run(fc.federated_sum, mode, ones)) == 40_001


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_small_floats_are_summed_in_a_wider_dtype(mode, dtype):
    """In bfloat16 itself, 256 + 1 is 256."""
    total = run(fc.federated_sum, mode, np.ones(1000, dtype))
    assert (total.dtype, float(total)) == (dtype, 1000)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_modular_sums(data):
    draw = st.lists(wide_range(np.int32), min_size=NUM_CLIENTS, max_size=NUM_CLIENTS)
    columns = {name: data.draw(draw) for name in MODULI}
    valid = np.array(data.draw(st.lists(st.booleans(), min_size=7, max_size=7)))
    values = {name: np.array(column, np.int32) for name, column in columns.items()}
    expected = {
        name: sum(x for x, is_valid in zip(columns[name], valid, strict=True) if is_valid) % m
        for name, m in MODULI.items()
    }
    for mode in MODES:
        result = run(modular_sum, mode, values, valid)
        assert {name: int(x) for name, x in result.items()} == expected, mode


def modular_sum(value):
    return fc.federated_secure_modular_sum(value, MODULI)


def test_modular_sums_of_many_clients():
    values = np.full(40_001, 2**31 - 3, np.int32)
    columns = dict.fromkeys(MODULI, values)
    result = run(modular_sum, "stacked", columns)
    expected = {name: 40_001 * (2**31 - 3) % m for name, m in MODULI.items()}
    assert {name: int(x) for name, x in result.items()} == expected


def zero_weight_mean(value):
    weight = fc.federated_map(lambda x: jnp.zeros((), x.dtype), value)
    return fc.federated_mean(value, weight)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("operator", "dtype", "expected", "documented"),
    [
        (fc.federated_sum, np.int32, 0, "zero if there are none"),
        (fc.federated_sum, np.float32, 0, "zero if there are none"),
        (fc.federated_mean, np.float32, 0, "The mean over no clients"),
        (fc.federated_min, np.float32, np.inf, "infinity for floats"),
        (fc.federated_max, np.float32, -np.inf, "minus infinity for floats"),
        (fc.federated_min, np.int16, 32767, "the largest value of the dtype"),
        (fc.federated_max, np.int16, -32768, "the smallest value of the dtype"),
        (fc.federated_max, np.uint8, 0, "the smallest value of the dtype"),
    ],
)
def test_nobody_gives_what_the_documentation_says(mode, operator, dtype, expected, documented):
    assert documented in " ".join(operator.__doc__.split())
    empty = np.zeros(0, dtype)
    for values, valid in ((empty, None), (np.ones(3, dtype), np.zeros(3, bool))):
        assert float(run(operator, mode, values, valid)) == expected


@pytest.mark.parametrize("mode", MODES)
def test_a_total_weight_of_zero_gives_zero(mode):
    assert "or with a total weight of zero, is zero" in " ".join(fc.federated_mean.__doc__.split())
    for values in ([1.0, 2.0], [np.nan, 1.0], [np.inf]):
        assert float(run(zero_weight_mean, mode, np.float32(values))) == 0


def test_means_with_integer_weights_are_exact():
    """The total of weights may exceed int32, where it saturates rather than turn negative."""
    mean = fc.federated_computation(
        lambda x, w: fc.federated_mean(x, w),
        fc.FederatedType(np.float32, fc.CLIENTS),
        fc.FederatedType(np.int16, fc.CLIENTS),
    )
    exact = Fraction(1 * 32767 + 3 * 32767 + 4 * 32767, 3 * 32767)
    assert mean([1.0, 3.0, 4.0], [32767] * 3) == pytest.approx(float(exact), rel=1e-6)
