"""Universal codes against their definitions, in Python's integers."""

import functools
import math

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_core.compression import lengths, universal
from fedjax_core.compression.universal import EliasDelta, EliasGamma, Rice, ZeroRuns
from fedjax_core.errors import CodecError

CODES = [EliasGamma(), EliasDelta(), Rice(None), Rice(0), Rice(2), Rice(7), ZeroRuns()]
WIDTH = 9
SIZES = (1, 2, 3, 4095, 4096, 4097)

each_code = pytest.mark.parametrize("code", CODES, ids=str)


def gamma(number: int) -> int:
    return 2 * number.bit_length() - 1


def delta(number: int) -> int:
    return number.bit_length() - 1 + gamma(number.bit_length())


def zero_runs(numbers: list[int]) -> int:
    bits, zeros = 0, 0
    for number in numbers:
        if number:
            bits += gamma(zeros + 1) + 1 + gamma((number + 1) // 2)
        zeros = 0 if number else zeros + 1
    return bits + (gamma(zeros + 1) if zeros else 0)


def expected_bits(code: universal.Code, numbers: list[int]) -> int:
    def golomb(k: int) -> int:
        return sum((number >> k) + 1 + k for number in numbers)

    if isinstance(code, ZeroRuns):
        return zero_runs(numbers)
    if isinstance(code, Rice):
        return (
            golomb(code.parameter)
            if code.parameter is not None
            else 5 + min(map(golomb, range(10)))
        )
    return sum((gamma if isinstance(code, EliasGamma) else delta)(number + 1) for number in numbers)


@functools.cache
def counter(code: universal.Code, width: int = WIDTH):
    return jax.jit(lambda numbers: code.count(numbers, width))


def contents(size: int) -> list[np.ndarray]:
    """Numbers below 2**9: zeros, one-hot, constants, extremes, noise, few that are not zero."""
    rng = np.random.default_rng(size)
    noise = rng.integers(0, 1 << WIDTH, size)
    return [
        np.zeros(size),
        np.eye(1, size, size // 2)[0],
        np.full(size, 3),
        np.where(np.arange(size) % 2, 511, 0),
        noise,
        np.where(rng.random(size) < 0.05, noise, 0),
    ]


def check_round_trip(code: universal.Code, numbers: np.ndarray, width: int = WIDTH) -> None:
    numbers = numbers.astype(np.uint32)
    expected = expected_bits(code, numbers.tolist())
    assert int(counter(code, width)(numbers)) == expected
    written = code.write(numbers, width, 1 << 30) or b""
    assert len(written) == -(-expected // 8)
    assert code.write(numbers, width, len(written)) is None
    assert code.write(numbers, width, len(written) + 1) == written
    read, used = code.read(memoryview(written + b"\xff\x00"), numbers.size, width)
    assert used == len(written)
    np.testing.assert_array_equal(read, numbers)


def test_case_7_lengths_of_elias_codes():
    numbers = jnp.array([1, 2, 3, 4, 5, 16, 17], jnp.uint32)
    assert lengths.gamma_lengths(numbers).tolist() == [1, 3, 3, 5, 5, 9, 9]
    assert lengths.delta_lengths(numbers).tolist() == [1, 4, 4, 5, 5, 9, 9]


def test_case_7_powers_of_two_and_their_predecessors():
    """In float32 the logarithms of 2**15 and 2**21 - 1 are wrong."""
    numbers = [2**k for k in range(32)] + [2**k - 1 for k in range(1, 33)]
    words = jnp.array(numbers, jnp.uint32)
    assert lengths.gamma_lengths(words).tolist() == [gamma(number) for number in numbers]
    assert lengths.delta_lengths(words).tolist() == [delta(number) for number in numbers]


def test_case_8_zero_runs():
    signed = np.array([0, 0, 0, 5, 0, -1, 0, 0])
    numbers = lengths.zigzag(jnp.asarray(signed))
    code = ZeroRuns()
    assert int(code.count(numbers, 4)) == (5 + 1 + 5) + (3 + 1 + 1) + 3 == 19
    written = code.write(np.asarray(numbers), 4, 99)
    assert len(written) == 3
    read, used = code.read(memoryview(written), 8, 4)
    assert used == 3
    np.testing.assert_array_equal(lengths.unzigzag(read), signed)


def test_case_9_rice_of_one_number():
    assert int(lengths.rice_lengths(jnp.uint32(9), 2)) == 5


@pytest.mark.parametrize(
    ("probability", "parameter", "mean"), [(0.01, 6, 8.1079), (0.001, 9, 11.4947), (0.1, 3, 4.7558)]
)
def test_case_9_rice_of_geometric_gaps(probability, parameter, mean):
    """The best parameter and the bits of a gap; the tolerance is over ten standard errors."""
    gaps = np.random.default_rng(0).geometric(probability, 1_000_000) - 1
    totals = lengths.rice_totals(jnp.asarray(gaps, jnp.uint32), 14)
    bits = [int(jax.tree.map(lambda x, k=k: x[k], totals)) for k in range(15)]
    assert int(np.argmin(bits)) == parameter
    assert bits[parameter] / 1_000_000 == pytest.approx(mean, abs=0.01)
    # By the closed form of the mean of a geometric number's quotient.
    survival = (1 - probability) ** (1 << parameter)
    assert mean == pytest.approx(parameter + 1 + survival / (1 - survival), abs=1e-4)


@pytest.mark.parametrize(
    "width",
    [1, pytest.param(8, marks=pytest.mark.slow), pytest.param(17, marks=pytest.mark.slow), 31],
)
def test_rice_totals_are_exact(width):
    numbers = np.random.default_rng(width).integers(0, 1 << width, 1001)
    totals = lengths.rice_totals(jnp.asarray(numbers, jnp.uint32), width)
    for k in range(width + 1):
        expected = sum((number >> k) + 1 + k for number in numbers.tolist())
        assert int(jax.tree.map(lambda x, k=k: x[k], totals)) == expected


def test_zigzag_goes_both_ways():
    signed = np.array([0, -1, 1, -2, 2, 2**30 - 1, -(2**30)])
    numbers = lengths.zigzag(jnp.asarray(signed, jnp.int32))
    assert numbers.tolist() == [0, 1, 2, 3, 4, 2**31 - 2, 2**31 - 1]
    np.testing.assert_array_equal(lengths.unzigzag(np.asarray(numbers)), signed)


@each_code
@pytest.mark.parametrize("size", SIZES)
def test_device_bits_are_those_of_the_definition_and_of_the_bytes(code, size):
    for numbers in contents(size):
        check_round_trip(code, numbers)


@each_code
@settings(max_examples=50, deadline=None, derandomize=True)
@given(hnp.arrays(np.uint32, 6, elements=st.integers(0, 511)))
def test_any_numbers_come_back(code, numbers):
    check_round_trip(code, numbers)


@pytest.mark.parametrize("code", [EliasGamma(), EliasDelta(), Rice(None), ZeroRuns()], ids=str)
def test_long_numbers_come_back(code):
    """Up to 2**31 - 1, in all lengths."""
    numbers = [2**k - 1 for k in range(32)] + [2**k for k in range(31)] + [2**31 - 1, 2**31 - 2]
    numbers = np.array(numbers, np.uint32)
    written = code.write(numbers, 31, 1 << 30)
    assert len(written) == -(-int(code.count(jnp.asarray(numbers), 31)) // 8)
    np.testing.assert_array_equal(code.read(memoryview(written), numbers.size, 31)[0], numbers)


def test_counts_map_over_clients():
    rows = np.stack(contents(4097)).astype(np.uint32)
    for code in CODES:
        mapped = jax.jit(jax.vmap(lambda row, code=code: code.count(row, WIDTH)))(rows)
        for index, row in enumerate(rows):
            count = int(jax.tree.map(lambda x, i=index: x[i], mapped))
            assert count == expected_bits(code, row.tolist())


def test_long_runs_come_back():
    """A run of a million zeros, and the end of the vector right behind a number."""
    numbers = np.zeros(1_000_003, np.uint32)
    numbers[[1_000_000, 1_000_002]] = 5, 9
    written = ZeroRuns().write(numbers, WIDTH, 1 << 30) or b""
    assert 8 * len(written) - zero_runs(numbers.tolist()) in range(8)
    for following in (b"", b"\0" * 9, b"\xff" * 9, b"\xaa" * 9):
        read, used = ZeroRuns().read(memoryview(written + following), numbers.size, WIDTH)
        assert used == len(written)
        np.testing.assert_array_equal(read, numbers)


@each_code
def test_altered_bytes_are_refused_or_give_numbers(code):
    rng = np.random.default_rng(3)
    numbers = contents(4097)[5].astype(np.uint32)
    written = np.frombuffer(code.write(numbers, WIDTH, 1 << 30), np.uint8)
    for _ in range(60):
        altered = written.copy()
        altered[rng.integers(0, written.size, 3)] = rng.integers(0, 256, 3)
        data = altered[: rng.integers(written.size // 2, written.size + 1)].tobytes()
        try:
            read, used = code.read(memoryview(data), numbers.size, WIDTH)
        except CodecError:
            continue
        assert read.shape == numbers.shape
        assert used <= len(data)


def test_best_parameter_of_geometric_numbers():
    """The closed form of the reference: 1 + floor(log2(log(phi - 1) / log(1 - p)))."""
    golden = (math.sqrt(5) + 1) / 2
    for probability in (0.3, 0.03, 0.003):
        numbers = np.random.default_rng(0).geometric(probability, 200_000).astype(np.uint32) - 1
        code = Rice(None)
        expected = 1 + math.floor(math.log2(math.log(golden - 1) / math.log(1 - probability)))
        written = code.write(numbers, 20, 1 << 30)
        assert written[0] & 31 == expected
