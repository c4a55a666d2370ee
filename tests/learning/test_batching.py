"""Batches: every example once an epoch, in an order of the key's, the last batch masked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_core.language.values import Sequence
from fedjax_core.learning.batching import num_batches, shuffle, take_batch


def sequence(length: int, capacity: int, start: int = 0) -> Sequence:
    rows = jnp.arange(capacity + start, dtype=jnp.int32) - start
    return Sequence({"x": rows}, jnp.int32(start), jnp.int32(length), capacity)


@settings(max_examples=25, deadline=None)
@given(length=st.integers(0, 13), batch_size=st.integers(1, 6), start=st.integers(0, 3))
def test_batches_hold_every_example_once(length, batch_size, start):
    """The masks keep exactly the examples; the number of batches is ceil(length / batch size)."""
    examples = sequence(length, 16, start)
    order = shuffle(jax.random.key(length), examples)
    seen = []
    for index in range(int(num_batches(examples, batch_size))):
        batch, mask = take_batch(examples, order, jnp.int32(index), batch_size)
        seen += list(np.asarray(batch["x"])[np.asarray(mask)])
    assert sorted(seen) == list(range(length))
    assert int(num_batches(examples, batch_size)) == -(-length // batch_size)


@pytest.mark.parametrize(
    ("lengths", "batch_size", "last"), [((10, 1, 4, 2), 4, [True, True, False, False])]
)
def test_last_batch_is_masked(lengths, batch_size, last):
    """10 examples in batches of 4: three batches, and the last one holds two (as in J-29)."""
    examples = sequence(lengths[0], 16)
    batch, mask = take_batch(examples, jnp.arange(16), jnp.int32(2), batch_size)
    np.testing.assert_array_equal(mask, last)
    np.testing.assert_array_equal(np.asarray(batch["x"])[np.asarray(mask)], [8, 9])


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("is_partitionable", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_order_is_a_function_of_key_and_length_alone(impl, is_partitionable):
    """Neither the capacity nor the place in the pool changes it; another key does."""
    with jax.threefry_partitionable(is_partitionable):
        check_order(jax.random.key(3, impl=impl), jax.random.key(4, impl=impl))


def check_order(key, other):
    small = shuffle(key, sequence(11, 16))[:11]
    np.testing.assert_array_equal(small, shuffle(key, sequence(11, 64, start=5))[:11])
    assert not np.array_equal(small, shuffle(other, sequence(11, 16))[:11])
    assert not np.array_equal(small, np.arange(11))


def test_orders_are_uniform():
    """6 orders, 6,000 keys: chi-square below 20.5 (5 degrees, false alarm 1e-3)."""
    orders = jax.vmap(lambda key: shuffle(key, sequence(3, 4))[:3])(
        jax.random.split(jax.random.key(0), 6000)
    )
    codes = np.asarray(orders) @ np.array([9, 3, 1])
    counts = np.unique(codes, return_counts=True)[1]
    assert len(counts) == 6
    assert np.sum((counts - 1000.0) ** 2 / 1000.0) < 20.5


def test_order_does_not_depend_on_a_long_neighbour():
    """Capacities beyond 256 sort a prefix only; the order of a short client stays the same."""
    key = jax.random.key(5)
    expected = shuffle(key, sequence(100, 128))[:100]
    for capacity in (256, 300, 5000):
        np.testing.assert_array_equal(shuffle(key, sequence(100, capacity))[:100], expected)
    for length in (255, 256, 257, 624, 625, 626, 4999, 5000):
        order = np.asarray(shuffle(key, sequence(length, 5000)))
        assert sorted(order[:length]) == list(range(length))
