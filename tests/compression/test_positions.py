"""Positions: the shortest of four forms, counted on the device, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_core.compression import Positions
from fedjax_core.errors import CodecError

SIZE = 5000


@functools.cache
def counter(size: int):
    return jax.jit(lambda indices: Positions(indices, size).count())


def gamma(number: int) -> int:
    return 2 * number.bit_length() - 1


def lengths(indices: list[int], size: int) -> list[int]:
    """Bits of indices, of a mask, of gaps in Elias gamma and in the best Golomb-Rice code."""
    gaps = [b - a - 1 for a, b in zip([-1, *indices], indices, strict=False)]
    width = (size - 1).bit_length()
    rice = [sum((gap >> k) + 1 + k for gap in gaps) for k in range(width + 1)]
    return [len(indices) * width, size, sum(gamma(gap + 1) for gap in gaps), 5 + min(rice)]


def check(indices: np.ndarray, size: int = SIZE) -> int:
    """The tag of the form that was taken."""
    positions = Positions(indices.astype(np.int32), size)
    written = positions.to_bytes()
    expected = lengths(indices.tolist(), size)
    assert len(written) == 1 + -(-min(expected) // 8)
    assert int(counter(size)(positions.indices)) == 8 * len(written)
    assert -(-expected[written[0]] // 8) == -(-min(expected) // 8)
    read, used = positions.from_bytes(memoryview(written + b"\xff\xff"))
    assert used == len(written)
    assert read.indices.dtype == np.int32
    np.testing.assert_array_equal(read.indices, indices)
    return written[0]


def random_indices(count: int, size: int = SIZE) -> np.ndarray:
    return np.sort(np.random.default_rng(count).choice(size, count, replace=False))


@pytest.mark.parametrize("count", [2, 50, 500, 1500, 2500, 4999])
def test_random_indices(count):
    """Indices for two of them, Golomb-Rice gaps for more, a mask for most."""
    assert check(random_indices(count)) == (0 if count == 2 else 3 if count < 2000 else 1)


@pytest.mark.parametrize("index", [0, 1, 2500, 4999])
def test_one_index(index):
    """Where it is near the beginning gamma is shorter than 13 bits."""
    assert check(np.array([index])) == (2 if index < 2 else 0)


def test_clustered_indices_take_gamma():
    starts = np.arange(0, SIZE, 500)
    indices = np.concatenate([np.arange(start, start + 40) for start in starts])
    assert check(indices) == 2


def test_indices_at_both_ends_take_a_form_each():
    assert check(np.array([2500, 4999])) == 0
    assert check(np.arange(SIZE - 1)) == 1
    assert check(np.arange(0, SIZE, 2)) == 1


@pytest.mark.parametrize(("count", "size"), [(0, 0), (0, 1), (0, SIZE), (1, 1), (SIZE, SIZE)])
def test_none_and_all_take_no_bits(count, size):
    positions = Positions(np.arange(count, dtype=np.int32), size)
    assert positions.to_bytes() == b""
    assert int(counter(size)(positions.indices)) == 0
    read, used = positions.from_bytes(memoryview(b"\xff"))
    assert used == 0
    np.testing.assert_array_equal(read.indices, np.arange(count))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sets(st.integers(0, 29), min_size=5, max_size=5))
def test_any_indices(chosen):
    check(np.array(sorted(chosen)), 30)


def test_gaps_of_a_hundredth_are_within_a_percent_of_the_least_possible():
    """8.0793 bits a position, by log2 of the binomial coefficient; indices take 21.

    Reference case 6: the naive 64 bits an element, 1,064,576, and one index for all, 32 k + 21, are
    what others count.
    """
    size, count = 1_663_370, 16_634
    bits = int(counter(size)(random_indices(count, size).astype(np.int32)))
    assert bits / count == pytest.approx(8.108, abs=0.02)
    assert 32 * count + 21 < 32 * count + bits < 64 * count == 1_064_576


def test_counts_map_over_clients():
    rows = np.stack([np.arange(50), random_indices(50), np.arange(0, 5000, 100)]).astype(np.int32)
    mapped = jax.jit(jax.vmap(lambda row: Positions(row, SIZE).count()))(jnp.asarray(rows))
    for index, row in enumerate(rows):
        count = int(jax.tree.map(lambda x, i=index: x[i], mapped))
        assert count == 8 * len(Positions(row, SIZE).to_bytes())


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "expected 1 bytes"),
        (b"\4" + bytes(9), "tag below 4"),
        (b"\0" + (99 | 98 << 7).to_bytes(2, "little"), "increasing"),
        (b"\0" + (98 | 127 << 7).to_bytes(2, "little"), "increasing"),
        (b"\0" + (98 | 99 << 7 | 1 << 14).to_bytes(2, "little"), "last 2 bits"),
        (b"\1" + bytes(13), "expected 2 increasing positions"),
        (b"\1" + b"\1", "expected 13 bytes"),
        (b"\2" + bytes(13), "expected 2 numbers"),
        (b"\2" + (1 << 6 | 1 << 13 | 4095 << 14).to_bytes(4, "little"), "increasing"),
        (b"\3" + b"\x1f" + bytes(20), "expected 2 numbers"),
    ],
)
def test_what_are_no_positions_is_refused(data, expected):
    like = Positions(jax.ShapeDtypeStruct((2,), jnp.int32), 100)
    with pytest.raises(CodecError, match=expected):
        like.from_bytes(memoryview(data))


@pytest.mark.parametrize("count", [40, 400, 2500])
def test_altered_bytes_are_refused_or_give_positions(count):
    rng = np.random.default_rng(0)
    positions = Positions(random_indices(count).astype(np.int32), SIZE)
    written = np.frombuffer(positions.to_bytes(), np.uint8)
    for _ in range(200):
        altered = written.copy()
        altered[rng.integers(0, written.size, 2)] = rng.integers(0, 256, 2)
        altered[0] = rng.integers(0, 5)
        try:
            read, _ = positions.from_bytes(memoryview(altered.tobytes()))
        except CodecError:
            continue
        assert read.indices.shape == (count,)
        assert np.all(np.diff(read.indices) > 0)
        assert 0 <= read.indices[0] <= read.indices[-1] < SIZE
