"""Huffman codes and ANS: frequencies, ideal lengths, and an independent coder in big integers."""

import functools
import heapq
import math

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_core.compression import frequencies as model
from fedjax_core.compression import rans, statistical
from fedjax_core.compression.statistical import Ans, Huffman
from fedjax_core.errors import CodecError

CODES = [Huffman(), Ans()]
each_code = pytest.mark.parametrize("code", CODES, ids=str)


@functools.cache
def counter(code, width: int):
    return jax.jit(lambda numbers: code.count(numbers, width))


def check_round_trip(code, numbers: np.ndarray, width: int) -> int:
    """The number of bytes."""
    numbers = numbers.astype(np.uint32)
    written = code.write(numbers, width, 1 << 30)
    assert len(written) == -(-int(counter(code, width)(numbers)) // 8)
    assert code.write(numbers, width, len(written)) is None
    read, used = code.read(memoryview(written + b"\xff\x00"), numbers.size, width)
    assert used == len(written)
    np.testing.assert_array_equal(read, numbers)
    return len(written)


def optimal_bits(counts: list[int]) -> int:
    """Of a Huffman code, by a heap: the sum of the weights of all joined nodes."""
    heap, bits = [count for count in counts if count], 0
    heapq.heapify(heap)
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        bits += joined
        heapq.heappush(heap, joined)
    return bits


def kraft_sum(lengths: list[int]) -> int:
    """In units of 2**-64."""
    return sum(1 << (64 - length) for length in lengths)


def test_case_10_huffman_lengths():
    counts = [8, 4, 2, 1, 1]
    lengths = model.huffman_lengths(jnp.array(counts, jnp.uint32)).tolist()
    assert lengths == [1, 2, 3, 4, 4]
    assert sum(n * length for n, length in zip(counts, lengths, strict=True)) == 30
    assert kraft_sum(lengths) == 1 << 64


def test_case_10_single_symbol():
    assert model.huffman_lengths(jnp.array([0, 7, 0], jnp.uint32)).tolist() == [0, 0, 0]
    assert model.huffman_lengths(jnp.zeros(3, jnp.uint32)).tolist() == [0, 0, 0]
    # A table of one token: its number (10 bits for 512 tokens), gamma(6) and gamma(1).
    assert check_round_trip(Huffman(), np.full(1000, 5), 9) == 2


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(
        st.one_of(st.just(0), st.integers(1, 9), st.integers(1, 10**6)), min_size=7, max_size=7
    )
)
def test_huffman_lengths_are_optimal_and_complete(counts):
    lengths = model.huffman_lengths(jnp.array(counts, jnp.uint32)).tolist()
    used = [(n, length) for n, length in zip(counts, lengths, strict=True) if n]
    assert sum(n * length for n, length in used) == optimal_bits(counts)
    assert all(length == 0 for n, length in zip(counts, lengths, strict=True) if not n)
    if used:
        assert kraft_sum([length for _, length in used]) == 1 << 64


def test_longest_codewords_of_frequencies():
    """Fibonacci weights make the deepest code: with the sum 2**14 none is longer than 20."""
    weights = [1, 1]
    while sum(weights) + weights[-1] + weights[-2] <= 1 << 14:
        weights.append(weights[-1] + weights[-2])
    lengths = model.huffman_lengths(jnp.array(weights, jnp.uint32))
    assert int(lengths.max()) == len(weights) - 1 <= 20


@pytest.mark.parametrize("size", [1, 2, 5, 100, 16_383, 16_384, 300_000, 1 << 28])
def test_frequencies_are_positive_where_needed_and_sum_up(size):
    """All m tokens have 1 and their share of the rest, so they cost -log2(1 - m / sum) at most."""
    rng = np.random.default_rng(size)
    for concentration in (0.02, 0.3, 10.0):
        weights = rng.dirichlet(np.full(min(size, 500), concentration))
        counts = np.floor(weights * size).astype(np.int64)
        counts[0] += size - counts.sum()
        found = np.asarray(model.frequencies(jnp.asarray(counts, jnp.uint32), size)).astype(int)
        assert found.sum() == 1 << model.precision(size)
        np.testing.assert_array_equal(found > 0, counts > 0)
        probabilities = counts[counts > 0] / size
        excess = np.sum(probabilities * np.log2(probabilities / found[counts > 0] * found.sum()))
        assert excess < 1e-3 - np.log2(1 - probabilities.size / found.sum())


def test_costs_are_those_of_logarithms():
    """In units of 2**-32, rounded up."""
    high, low = model._costs()
    costs = high[1:].astype(np.float64) * 2.0**32 + low[1:]
    expected = (14 - np.log2(np.arange(1, (1 << 14) + 1))) * 2.0**32
    np.testing.assert_allclose(costs, expected, atol=1.001)
    assert np.all(costs >= expected - 1e-3)
    assert costs[-1] == 0


@pytest.mark.parametrize("width", [1, 8, 9, 10, 17, 31])
def test_tokens_hold_all_but_the_extra_bits(width):
    numbers = {0, 1, (1 << width) - 1, 1 << (width - 1), *range(min(1 << width, 3000))}
    numbers.update(np.random.default_rng(0).integers(0, 1 << width, 3000).tolist())
    numbers = np.array(sorted(numbers), np.uint32)
    lengths = np.array([number.bit_length() for number in numbers.tolist()], np.uint32)
    tokens, extra = model.tokenize(numbers, lengths, np)
    assert tokens.max() == model.num_tokens(width) - 1
    np.testing.assert_array_equal(model.extra_bits(tokens), extra)
    lower = numbers & ((np.uint32(1) << extra) - 1)
    np.testing.assert_array_equal(model.detokenize(tokens, lower), numbers)
    on_device = model.tokenize(jnp.asarray(numbers), jnp.asarray(lengths), jnp)[0]
    np.testing.assert_array_equal(on_device, tokens)


def contents(size: int, width: int) -> list[np.ndarray]:
    rng = np.random.default_rng(size)
    return [
        np.zeros(size),
        np.eye(1, size, size // 2)[0],
        np.full(size, 3),
        np.where(np.arange(size) % 2, (1 << width) - 1, 0),
        rng.integers(0, 1 << width, size),
        np.minimum(rng.geometric(0.2, size), (1 << width) - 1),
    ]


@each_code
@pytest.mark.parametrize("width", [5, pytest.param(9, marks=pytest.mark.slow), 20])
@pytest.mark.parametrize(
    "size",
    [
        1,
        pytest.param(2, marks=pytest.mark.slow),
        3,
        pytest.param(4095, marks=pytest.mark.slow),
        4097,
    ],
)
def test_device_bits_are_those_of_the_bytes(code, size, width):
    for numbers in contents(size, width):
        check_round_trip(code, numbers, width)


@each_code
@settings(max_examples=40, deadline=None, derandomize=True)
@given(hnp.arrays(np.uint32, 6, elements=st.integers(0, 511)))
def test_any_numbers_come_back(code, numbers):
    check_round_trip(code, numbers, 9)


@pytest.mark.parametrize("size", [10, 1_000, 100_000])
@pytest.mark.parametrize("concentration", [0.05, 1.0])
def test_case_11_ans_is_within_64_bits_of_the_ideal(size, concentration):
    rng = np.random.default_rng(size)
    numbers = rng.choice(256, size, p=rng.dirichlet(np.full(256, concentration))).astype(np.uint32)
    _, _, found = statistical._measure(numbers, 9)
    state = statistical._encode(numbers, found)
    ideal = sum(math.log2(found.sum() / found[number]) for number in numbers.tolist())
    assert ideal <= 8 * len(state) <= ideal + 64
    histogram = jnp.asarray(np.bincount(numbers, minlength=512), jnp.uint32)
    counted = int(model.ideal_bits(histogram, jnp.asarray(found, jnp.uint32), size))
    assert ideal <= counted + 1e-6
    assert counted <= ideal + 1 + size * 2.0**-32
    assert 8 * len(state) <= counted + 40 <= 8 * len(state) + 64
    check_round_trip(Ans(), numbers, 9)


def test_case_11_one_symbol_alphabets():
    """A table alone: 10 + 5 + 21 bits, 11 of the length of no state, 8 of the order."""
    assert check_round_trip(Ans(), np.full(1000, 5), 9) == -(-(10 + 5 + 21 + 11 + 8) // 8)


def state_by_big_integers(tokens: list[int], found: list[int]) -> bytes:
    """Duda's rANS with a 64-bit state and words of 32 bits, as arithmetic of Python."""
    scale = (1 << 24) // sum(found)
    widths = [scale * frequency for frequency in found]
    begins = np.cumsum([0, *widths]).tolist()
    words, state = [], 1 << 32
    for token in reversed(tokens):
        if state >= widths[token] << 40:
            words.append(state & 0xFFFFFFFF)
            state >>= 32
        state = (state // widths[token] << 24) + begins[token] + state % widths[token]
    words += [state & 0xFFFFFFFF, state >> 32]
    return b"".join(word.to_bytes(4, "little") for word in words).rstrip(b"\0")


@pytest.mark.parametrize("alphabet", [2, 3, 100, 500])
def test_states_are_those_of_an_independent_coder(alphabet):
    """So the model is exactly the frequencies, which other versions could round otherwise."""
    rng = np.random.default_rng(alphabet)
    weights = rng.dirichlet(np.full(alphabet, 0.3))
    numbers = rng.choice(alphabet, 3000, p=weights).astype(np.uint32)
    _, _, found = statistical._measure(numbers, 9)
    expected = state_by_big_integers(numbers.tolist(), found.tolist())
    assert statistical._encode(numbers, found) == expected


def test_numbers_in_blocks_are_coded_in_another_order():
    """Of long blocks the coder may take some bits more than the ideal; of shuffled ones less."""
    numbers = np.repeat(np.random.default_rng(0).integers(0, 5, 40), 50).astype(np.uint32)
    _, _, found = statistical._measure(numbers, 9)

    def encode_in(order: int) -> bytes:
        return statistical._encode(rans.reorder(numbers, order), found)

    sizes = [len(encode_in(order)) for order in range(rans.NUM_ORDERS)]
    shortest = min(sizes)
    assert sizes[0] > shortest
    order, state = rans.in_some_order(encode_in, shortest)
    assert order == sizes.index(shortest)
    decoded = statistical._decode(state, found, numbers.size)
    np.testing.assert_array_equal(rans.restore(decoded, order), numbers)
    with pytest.raises(CodecError, match="use huffman"):
        rans.in_some_order(encode_in, shortest - 1)


@pytest.mark.parametrize("size", [2, 3, 10, 1001])
def test_orders_are_permutations(size):
    for order in range(rans.NUM_ORDERS):
        shuffled = rans.reorder(np.arange(size), order)
        np.testing.assert_array_equal(np.sort(shuffled), np.arange(size))
        np.testing.assert_array_equal(rans.restore(shuffled, order), np.arange(size))


@each_code
def test_counts_map_over_clients(code):
    rows = np.stack(contents(4097, 9)).astype(np.uint32)
    mapped = jax.jit(jax.vmap(lambda row: code.count(row, 9)))(rows)
    for index, row in enumerate(rows):
        count = int(jax.tree.map(lambda x, i=index: x[i], mapped))
        assert len(code.write(row, 9, 1 << 30)) == -(-count // 8)


@each_code
def test_altered_bytes_are_refused_or_give_numbers(code):
    rng = np.random.default_rng(3)
    numbers = contents(4097, 9)[5].astype(np.uint32)
    written = np.frombuffer(code.write(numbers, 9, 1 << 30), np.uint8)
    refused = 0
    for attempt in range(120):
        altered = written.copy()
        # The table at the beginning is the interesting part.
        end = 40 if attempt % 2 else written.size
        altered[rng.integers(0, end, 2)] = rng.integers(0, 256, 2)
        data = altered[: written.size - rng.integers(0, 2)].tobytes()
        try:
            read, used = code.read(memoryview(data), numbers.size, 9)
        except CodecError:
            refused += 1
            continue
        assert read.shape == numbers.shape
        assert used <= len(data)
    assert refused > 60
