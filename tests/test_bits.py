"""Counts of bits are exact where float32 and int32 are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_core.bits import BitCount, format_bits
from fedjax_core.errors import ArgumentError, FederatedTypeError

CNN_BITS = 53_227_840
COUNTS = st.integers(0, 2**64 - 1)


def stack(counts: list[int]) -> BitCount:
    """A count with a leading axis, made without the code under test."""
    words = np.array(counts, np.uint64)
    return BitCount(
        jnp.asarray((words >> np.uint64(32)).astype(np.uint32)),
        jnp.asarray((words & np.uint64(0xFFFFFFFF)).astype(np.uint32)),
    )


@pytest.mark.parametrize("count", [0, 1, 2**32 - 1, 2**32, CNN_BITS, 2**64 - 1, np.int64(7)])
def test_of_and_int_are_inverse(count):
    assert int(BitCount.of(count)) == count
    assert BitCount.of(count).low.dtype == jnp.uint32


@settings(max_examples=50, deadline=None)
@given(COUNTS, COUNTS)
def test_addition_carries(a, b):
    assert int(BitCount.of(a) + BitCount.of(b)) == (a + b) % 2**64


@settings(max_examples=50, deadline=None)
@given(st.lists(COUNTS, min_size=3, max_size=3))
def test_smallest_of_an_axis(counts):
    assert int(stack(counts).min()) == min(counts)
    assert int(stack([2**33, 2**32 + 5, 2**34 + 1]).min()) == 2**32 + 5


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 2**32 - 1, 2**32 + 1, CNN_BITS])
def test_whole_bytes(count):
    assert int(BitCount.of(count).whole_bytes()) == -(-count // 8) * 8


@settings(max_examples=50, deadline=None)
@given(COUNTS, st.integers(0, 2**32 - 1))
def test_times_is_exact(a, n):
    assert int(BitCount.of(a).times(n)) == a * n % 2**64
    assert int(BitCount.of(a).times(jnp.uint32(n))) == a * n % 2**64


@settings(max_examples=30, deadline=None)
@given(st.lists(COUNTS, min_size=8, max_size=8))
def test_sum_is_exact(counts):
    assert int(stack(counts).sum()) == sum(counts) % 2**64


@pytest.mark.parametrize("terms", [0, 1, 65_535, 65_536, 65_537, 200_000])
def test_sum_of_many_terms_does_not_overflow(terms):
    count = 2**33 - 1
    assert int(stack([count] * terms).sum()) == count * terms


def test_eight_more_bits_change_the_sum_of_ten_updates():
    """In float32 they would not: reference case 1."""
    total = BitCount.of(CNN_BITS).times(10)
    assert int(total) == 532_278_400
    assert int(total + BitCount.of(8)) == 532_278_408
    assert np.float32(532_278_400) + np.float32(8) == np.float32(532_278_400)


def test_works_in_jit_vmap_and_scan():
    def total(start: BitCount, n: jax.Array) -> BitCount:
        each = jax.vmap(lambda k: BitCount.of(CNN_BITS).times(k))(jnp.arange(3) + n)
        added, _ = jax.lax.scan(lambda carry, _: (carry + each.sum(), None), start, length=100)
        return added

    result = jax.jit(total)(BitCount.zero(), jnp.int32(1))
    assert int(result) == 100 * (1 + 2 + 3) * CNN_BITS


def test_sums_over_any_axis():
    counts = np.arange(6).reshape(2, 3) * (2**32 - 1)
    total = BitCount(*(words.reshape(2, 3) for words in stack(counts.ravel().tolist()))).sum(axis=1)
    assert [int(BitCount(*words)) for words in zip(*total, strict=True)] == [
        3 * (2**32 - 1),
        12 * (2**32 - 1),
    ]


def test_builtin_sum_order_and_operators():
    counts = [BitCount.of(2**32 - 1), BitCount.of(1), BitCount.of(5)]
    assert int(sum(counts)) == 2**32 + 5
    assert max(counts) is counts[0]
    assert int(counts[2] * 3) == int(3 * counts[2]) == 15


def test_is_a_pytree_of_two_words():
    leaves, structure = jax.tree.flatten(BitCount.of(3))
    assert len(leaves) == 2
    assert isinstance(jax.tree.unflatten(structure, leaves), BitCount)


@pytest.mark.parametrize("count", [-1, 2**64])
def test_of_refuses_what_does_not_fit(count):
    with pytest.raises(ArgumentError, match=f"got {count}"):
        BitCount.of(count)


@pytest.mark.parametrize("count", [1.0, True, "1", None])
def test_of_refuses_what_is_no_integer(count):
    with pytest.raises(FederatedTypeError, match="expected an integer"):
        BitCount.of(count)


@pytest.mark.parametrize("factor", [-1, 2**32])
def test_times_refuses_numbers_that_do_not_fit(factor):
    with pytest.raises(ArgumentError, match=f"got {factor}"):
        BitCount.of(1).times(factor)


@pytest.mark.parametrize("factor", [1.5, jnp.float32(2)])
def test_times_refuses_what_is_no_integer(factor):
    with pytest.raises(FederatedTypeError, match="expected an integer"):
        BitCount.of(1).times(factor)


def test_adds_counts_only():
    with pytest.raises(TypeError):
        _ = BitCount.of(1) + 1
    with pytest.raises(TypeError):
        _ = BitCount.of(1) + tuple(BitCount.of(1))


def test_shapes_are_named_in_errors():
    with pytest.raises(ArgumentError, match=r"scalar BitCount, got one of shape \(2,\)"):
        int(stack([1, 2]))
    with pytest.raises(ArgumentError, match="axis to sum"):
        BitCount.of(1).sum()


@pytest.mark.parametrize(
    ("bits", "text"),
    [
        (532_278_400, "507.62Mibit"),
        (1_064_556_800, "1015.24Mibit"),
        (1_596_835_200, "1.49Gibit"),
        (134_640_000, "128.40Mibit"),
        (0, "0.00bit"),
        (1023, "1023.00bit"),
        (1024, "1.00Kibit"),
        (2**40, "1.00Tibit"),
        (2**64, "16777216.00Tibit"),
    ],
)
def test_format_bits_as_in_the_tutorial(bits, text):
    assert format_bits(bits) == text


def test_format_bits_takes_counts_and_refuses_negative_ones():
    assert format_bits(BitCount.of(2048)) == "2.00Kibit"
    with pytest.raises(ArgumentError, match="got -1"):
        format_bits(-1)
