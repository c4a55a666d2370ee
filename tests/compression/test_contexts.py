"""Symbols of matrices in one stream: exact sizes, and bytes that are not trusted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_core.compression import contexts, planes, questions
from fedjax_core.compression.contexts import Plane
from fedjax_core.compression.planes import Planes
from fedjax_core.errors import CodecError

COUNT = jax.jit(Planes.count)
classified = jax.jit(planes.classified)


def check_written(message: Planes) -> bytes:
    """The bytes, which are as many as the device counts and hold the same."""
    data = message.to_bytes()
    assert 8 * len(data) == int(COUNT(message))
    read, used = message.from_bytes(memoryview(data + b"rest"))
    assert used == len(data)
    for a, b in zip(jax.tree.leaves(message), jax.tree.leaves(read), strict=True):
        np.testing.assert_array_equal(a, b)
    return data


def matrix(rng: np.random.Generator, shape: tuple[int, int], kind: str) -> np.ndarray:
    match kind:
        case "zeros":
            return np.zeros(shape, np.int32)
        case "one":
            return (np.arange(np.prod(shape)).reshape(shape) == 0).astype(np.int32)
        case "constant":
            return np.full(shape, -7, np.int32)
        case "sparse":
            return rng.integers(-9, 9, shape, np.int32) * (rng.random(shape) < 0.05)
        case "rows":
            scale = rng.lognormal(0, 2, (shape[0], 1))
            return np.rint(rng.normal(size=shape) * scale).astype(np.int32)
        case "periodic":
            kinds = rng.choice([0, 0.2, 5], (16, 1), p=[0.5, 0.3, 0.2])
            scale = np.resize(kinds, (shape[0], 1))
            return np.rint(np.abs(rng.normal(size=shape)) * scale).astype(np.int32)
        case "large":
            return rng.integers(-(2**29), 2**29, shape, np.int32)
    raise AssertionError(kind)


KINDS = ("zeros", "one", "constant", "sparse", "rows", "periodic", "large")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 1), marks=pytest.mark.slow),
        (1, 40),
        pytest.param((40, 1), marks=pytest.mark.slow),
        (33, 65),
        pytest.param((300, 9), marks=pytest.mark.slow),
    ],
)
def test_sizes_are_exact(shape, kind):
    rng = np.random.default_rng(0)
    check_written(classified([jnp.asarray(matrix(rng, shape, kind))]))


@pytest.mark.slow
@settings(max_examples=6, deadline=None, derandomize=True)
@given(kinds=st.lists(st.sampled_from(KINDS), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_matrices_share_their_contexts(kinds, seed):
    rng, shapes = np.random.default_rng(seed), ((20, 30), (50, 4), (7, 9))
    matrices = [jnp.asarray(matrix(rng, *pair)) for pair in zip(shapes, kinds, strict=True)]
    check_written(classified(matrices))


def test_geometric_symbols_take_their_entropy():
    rng = np.random.default_rng(0)
    magnitude = rng.geometric(0.6, (300, 200)) - 1
    codes = np.int32(magnitude * rng.choice([-1, 1], magnitude.shape))
    message = classified([jnp.asarray(codes)])
    share = 0.6 * 0.4 ** np.arange(40)
    entropy = -np.sum(share * np.log2(share)) + 0.4  # a sign for what is not zero
    assert 8 * len(check_written(message)) < 1.02 * entropy * codes.size + 2 * 500


def test_rows_and_columns_that_differ_take_less_than_one_context():
    rng = np.random.default_rng(0)
    scale = rng.lognormal(-2, 2, (200, 1)) * rng.lognormal(0, 1.5, (1, 100))
    codes = np.int32(np.rint(rng.laplace(size=(200, 100)) * scale))
    values, counts = np.unique(codes, return_counts=True)
    share = counts / codes.size
    assert 8 * len(check_written(classified([jnp.asarray(codes)]))) < -0.85 * codes.size * np.sum(
        share * np.log2(share)
    )
    assert values.size > 10


def test_rows_that_repeat_at_a_distance_take_less():
    rng = np.random.default_rng(0)
    shown = rng.random(64) < 0.3
    codes = np.where(np.resize(shown, (640, 1)), rng.integers(1, 3, (640, 4)), 0).astype(np.int32)
    shuffled = codes[np.concatenate([64 * k + rng.permutation(64) for k in range(10)])]
    found = [classified([jnp.asarray(x)]) for x in (codes, shuffled)]
    assert [int(x.planes[0].period) % 64 for x in found] == [0, 0]
    assert int(found[0].planes[0].period) > 0
    assert int(found[1].planes[0].period) == 0
    repeated, alone = (8 * len(check_written(x)) for x in found)
    # The entropy of 640 rows, three in ten of them shown, but for the first 64.
    saved = 576 * -(0.3 * np.log2(0.3) + 0.7 * np.log2(0.7))
    assert alone - repeated == pytest.approx(saved, rel=0.2)


def test_signs_of_columns_that_lean_to_one_side_take_less():
    rng = np.random.default_rng(0)
    magnitudes = rng.integers(1, 3, (500, 3))
    even, uneven = (
        np.int32(magnitudes * np.where(rng.random((500, 3)) < share, -1, 1))
        for share in (0.5, np.array([0.02, 0.5, 1.0]))
    )
    found = [classified([jnp.asarray(x)]) for x in (even, uneven)]
    assert (np.asarray(found[0].planes[0].signs) == 0).all()
    assert (np.asarray(found[1].planes[0].signs) > 0).tolist() == [True, False, True]
    plain, leaning = (8 * len(check_written(x)) for x in found)
    entropy = -(0.02 * np.log2(0.02) + 0.98 * np.log2(0.98))
    assert plain - leaning == pytest.approx(500 * (2 - entropy), rel=0.1)


def test_answers_are_counted_exactly():
    rng = np.random.default_rng(0)
    plane = classified([jnp.asarray(matrix(rng, (60, 50), "rows"))]).planes[0]
    answers = np.asarray(contexts.tally(plane).symbols)
    rows, columns = (np.asarray(x).astype(int) for x in (plane.rows, plane.columns))
    context = contexts.ROW_STEP * (rows[:, None] - 1) + columns[None] - 1
    context = np.where((rows[:, None] > 0) & (columns[None] > 0), context, -1)
    magnitudes = np.abs(np.asarray(plane.codes))
    for index in range(contexts.NUM_CONTEXTS):
        own = magnitudes[context == index]
        more = np.minimum(own[own >= 2], questions.ESCAPE) - 2
        expected = [
            [np.sum(own == 0), np.sum(own > 0)],
            [np.sum(own == 1), np.sum(own > 1)],
            [np.sum(own[own >= 2] < questions.ESCAPE), np.sum(more)],
        ]
        np.testing.assert_array_equal(answers[:, :, index], expected)


def test_answers_about_rows_are_counted_exactly():
    rng = np.random.default_rng(0)
    codes = jnp.asarray(matrix(rng, (200, 5), "periodic"))
    fitted, count = jax.jit(contexts.classify)(codes), jax.jit(contexts.count_rows)
    for period in (0, 16, 70):
        plane = dataclasses.replace(fitted, period=jnp.int32(period))
        rows, found = np.asarray(plane.rows), np.zeros((3, 2, 5), int)
        for index, row in enumerate(rows):
            above = rows[index - period] if period and index >= period else 4
            found[0, int(row > 0), above] += 1
            if row > 0:
                found[1, int(row != 2), above] += 1
            if row in (1, 3):
                found[2, int(row == 3), above] += 1
        np.testing.assert_array_equal(count(plane), found)


def test_frequencies_are_positive_and_add_up():
    table = questions.frequencies()
    assert table.min() > 0
    assert set(table.sum(1)) == {1 << questions.PRECISION}
    np.testing.assert_array_equal(table, table[::-1, ::-1])


def test_the_nearest_level_is_that_of_the_share():
    levels = questions.nearest_level(jnp.array([1e6, 1.0, 500.0]), jnp.array([1.0, 1e6, 500.0]))
    share = questions.frequencies()[np.asarray(levels), 1] / 2.0**questions.PRECISION
    np.testing.assert_allclose(share, [2.0**-12, 1 - 2.0**-12, 0.5], rtol=0.2)


@pytest.mark.parametrize("num_mutations", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_altered_bytes_are_refused_or_decoded(num_mutations):
    rng = np.random.default_rng(0)
    matrices = [((30, 20), "rows"), ((90, 4), "periodic"), ((5, 5), "zeros"), ((7, 9), "large")]
    message = classified([jnp.asarray(matrix(rng, *each)) for each in matrices])
    data = message.to_bytes()
    refused = 0
    for _ in range(num_mutations):
        altered = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            # Half of them in what says how the rest is coded.
            end = len(altered) if rng.random() < 0.5 else 100
            altered[rng.integers(end)] = rng.integers(256)
        altered = bytes(altered[: rng.integers(len(data) // 2, len(data) + 1)])
        try:
            read, used = message.from_bytes(memoryview(altered))
        except CodecError:
            refused += 1
        else:
            assert read.to_bytes() == altered[:used]
    assert refused > num_mutations / 2


@pytest.mark.parametrize("column", [0, 1])
def test_symbols_where_no_class_allows_them_are_refused(column):
    ones, zeros = np.ones((2, 2), np.int32), np.zeros(2, np.uint8)
    plane = Plane(ones, np.uint8([1, 0]), np.uint8([column, column]), np.int32(0), zeros)
    levels = np.zeros((contexts.NUM_CONTEXTS, questions.NUM_QUESTIONS), np.uint8)
    row_levels = np.zeros((contexts.NUM_ABOVE, questions.NUM_QUESTIONS), np.uint8)
    with pytest.raises(CodecError, match="zeros in rows and columns of class 0"):
        Planes((plane,), levels, row_levels).to_bytes()
