"""Streams of bits against strings of zeros and ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_core.compression import bitstreams
from fedjax_core.errors import CodecError

FIELDS = st.lists(
    st.integers(0, 57).flatmap(lambda w: st.tuples(st.integers(0, 2**w - 1), st.just(w)))
)


def field(value: int, width: int) -> str:
    """The lowest bit first."""
    return f"{value:0{width}b}"[::-1] if width else ""


def as_bytes(bits: str) -> bytes:
    return int(bits[::-1] or "0", 2).to_bytes(-(-len(bits) // 8), "little")


@settings(deadline=None)
@given(FIELDS, st.lists(st.integers(0, 200)), st.lists(st.integers(0, 2**13 - 1)))
def test_sections_are_written_as_they_read_and_come_back(fields, counts, integers):
    values = np.array([value for value, _ in fields], np.uint64)
    widths = np.array([width for _, width in fields], np.int64)
    writer = bitstreams.BitWriter()
    writer.unary(np.array(counts, np.int64))
    writer.fields(values, widths)
    writer.integers(np.array(integers, np.uint32), 13)
    bits = "".join("0" * count + "1" for count in counts)
    bits += "".join(field(*pair) for pair in fields)
    bits += "".join(field(value, 13) for value in integers)
    assert writer.num_bits == len(bits)
    assert writer.to_bytes() == as_bytes(bits)
    reader = bitstreams.BitReader(writer.to_bytes() + b"\xff")
    assert reader.unary(len(counts)).tolist() == counts
    assert reader.fields(widths).tolist() == values.tolist()
    assert reader.integers(len(integers), 13).tolist() == integers
    assert reader.finish() == len(writer.to_bytes())


def test_long_sections_come_back():
    """Longer than what is looked at in one go, with a number longer than that itself."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 9, 300_000)
    counts[1000] = 2_000_000
    widths = rng.integers(0, 20, counts.size)
    values = rng.integers(0, 1 << widths)
    writer = bitstreams.BitWriter()
    writer.unary(counts)
    writer.fields(values, widths)
    reader = bitstreams.BitReader(writer.to_bytes())
    np.testing.assert_array_equal(reader.unary(counts.size), counts)
    np.testing.assert_array_equal(reader.fields(widths), values)


def test_codewords_of_a_long_stream_are_found():
    """Codewords of as many zeros as their first bits say, in two bits."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(2, 6, 500_000)
    writer = bitstreams.BitWriter()
    writer.fields(lengths - 2, lengths)

    def table(data: np.ndarray) -> np.ndarray:
        bits = np.append(np.unpackbits(data, bitorder="little"), 0)
        return 2 + bits[:-1] + 2 * bits[1:]

    reader = bitstreams.BitReader(writer.to_bytes())
    starts = reader.codeword_starts(lengths.size, table)
    np.testing.assert_array_equal(np.diff(starts), lengths)
    assert reader.codeword_starts(0, table).tolist() == [0]


def test_bit_lengths():
    numbers = [0, 1, 2, 3, 4, *(2**k - 1 for k in range(3, 53)), *(2**k for k in range(3, 54))]
    found = bitstreams.bit_length(np.array(numbers, np.int64))
    assert found.tolist() == [number.bit_length() for number in numbers]


@pytest.mark.parametrize(
    "read",
    [
        lambda reader: reader.unary(9),
        lambda reader: reader.fields(np.array([5, 4])),
        lambda reader: reader.integers(3, 3),
        lambda reader: reader.skip_to(9),
    ],
)
def test_streams_that_end_early_are_refused(read):
    with pytest.raises(CodecError, match="cut short"):
        read(bitstreams.BitReader(b"\xff"))


def test_filling_bits_must_be_zero():
    reader = bitstreams.BitReader(b"\x0f")
    reader.integers(1, 3)
    with pytest.raises(CodecError, match="last 5 bits"):
        reader.finish()
