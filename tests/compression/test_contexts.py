"""Symbols of matrices in one code: exact sizes, and bytes that are not trusted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_core.compression import contexts, questions
from fedjax_core.compression.contexts import Plane, Planes
from fedjax_core.errors import CodecError

COUNT = jax.jit(Planes.count)
classified = jax.jit(contexts.classified)


def written(planes: Planes) -> bytes:
    """The bytes, which are as many as the device counts and hold the same."""
    data = planes.to_bytes()
    assert 8 * len(data) == int(COUNT(planes))
    read, used = planes.from_bytes(memoryview(data + b"rest"))
    assert used == len(data)
    for a, b in zip(jax.tree.leaves(planes), jax.tree.leaves(read), strict=True):
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
        case "large":
            return rng.integers(-(2**29), 2**29, shape, np.int32)
    raise AssertionError(kind)


KINDS = ("zeros", "one", "constant", "sparse", "rows", "large")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 1), marks=pytest.mark.slow),
        (1, 40),
        pytest.param((40, 1), marks=pytest.mark.slow),
        (33, 65),
    ],
)
def test_sizes_are_exact(shape, kind):
    rng = np.random.default_rng(0)
    written(classified([jnp.asarray(matrix(rng, shape, kind))]))


@pytest.mark.slow
@settings(max_examples=6, deadline=None, derandomize=True)
@given(kinds=st.lists(st.sampled_from(KINDS), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_matrices_share_their_contexts(kinds, seed):
    rng, shapes = np.random.default_rng(seed), ((20, 30), (50, 4), (7, 9))
    matrices = [jnp.asarray(matrix(rng, *pair)) for pair in zip(shapes, kinds, strict=True)]
    written(classified(matrices))


def test_geometric_symbols_take_their_entropy():
    rng = np.random.default_rng(0)
    magnitude = rng.geometric(0.6, (300, 200)) - 1
    codes = np.int32(magnitude * rng.choice([-1, 1], magnitude.shape))
    planes = classified([jnp.asarray(codes)])
    share = 0.6 * 0.4 ** np.arange(40)
    entropy = -np.sum(share * np.log2(share)) + 0.4  # a sign for what is not zero
    assert 8 * len(written(planes)) < 1.02 * entropy * codes.size + 2 * 500


def test_rows_and_columns_that_differ_take_less_than_one_context():
    rng = np.random.default_rng(0)
    scale = rng.lognormal(-2, 2, (200, 1)) * rng.lognormal(0, 1.5, (1, 100))
    codes = np.int32(np.rint(rng.laplace(size=(200, 100)) * scale))
    values, counts = np.unique(codes, return_counts=True)
    share = counts / codes.size
    assert 8 * len(written(classified([jnp.asarray(codes)]))) < -0.85 * codes.size * np.sum(
        share * np.log2(share)
    )
    assert values.size > 10


def test_answers_are_counted_exactly():
    rng = np.random.default_rng(0)
    plane = classified([jnp.asarray(matrix(rng, (60, 50), "rows"))]).planes[0]
    answers = np.asarray(contexts._answers(plane))
    found, codes = contexts._coded_elements(jax.tree.map(np.asarray, plane))
    magnitudes = np.abs(codes)
    for context in range(contexts.NUM_CONTEXTS):
        own = magnitudes[found == context]
        more = np.minimum(own[own >= 2], questions.ESCAPE) - 2
        expected = [
            [np.sum(own == 0), np.sum(own > 0)],
            [np.sum(own == 1), np.sum(own > 1)],
            [np.sum(own[own >= 2] < questions.ESCAPE), np.sum(more)],
        ]
        np.testing.assert_array_equal(answers[:, :, context], expected)


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
    planes = classified([jnp.asarray(matrix(rng, (30, 20), kind)) for kind in ("rows", "large")])
    data = planes.to_bytes()
    refused = 0
    for _ in range(num_mutations):
        altered = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            altered[rng.integers(len(altered))] = rng.integers(256)
        altered = bytes(altered[: rng.integers(len(data) // 2, len(data) + 1)])
        try:
            read, used = planes.from_bytes(memoryview(altered))
        except CodecError:
            refused += 1
        else:
            assert read.to_bytes() == altered[:used]
    assert refused > num_mutations / 2


def test_symbols_where_no_class_allows_them_are_refused():
    plane = Plane(np.ones((2, 2), np.int32), np.uint8([1, 0]), np.uint8([1, 1]))
    levels = np.zeros((contexts.NUM_CONTEXTS, questions.NUM_QUESTIONS), np.uint8)
    with pytest.raises(CodecError, match="zeros in rows and columns of class 0"):
        Planes((plane,), levels).to_bytes()
