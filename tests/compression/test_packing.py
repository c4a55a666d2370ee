"""Dense packing against Python's own big integers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_core.compression import packing
from fedjax_core.errors import CodecError


@pytest.mark.parametrize(("count", "width", "bits"), [(7, 8, 56), (3, 5, 16), (1, 1, 8), (0, 5, 0)])
def test_sizes(count, width, bits):
    assert 8 * len(packing.pack_bits(np.zeros(count, np.uint8), width)) == bits


@settings(deadline=None)
@given(
    st.integers(1, 32).flatmap(lambda w: st.tuples(st.just(w), st.lists(st.integers(0, 2**w - 1))))
)
def test_packs_as_one_integer_and_back(case):
    width, codes = case
    packed = packing.pack_bits(np.array(codes, np.uint32), width)
    assert int.from_bytes(packed, "little") == sum(c << i * width for i, c in enumerate(codes))
    assert packing.unpack_bits(packed, len(codes), width).tolist() == codes


@pytest.mark.parametrize("width", [3, 16])
def test_long_tensors_are_packed_in_chunks(width):
    codes = np.random.default_rng(0).integers(0, 2**width, (1 << 20) + 5, np.uint32)
    packed = packing.pack_bits(codes, width)
    assert len(packed) == -(-codes.size * width // 8)
    np.testing.assert_array_equal(packing.unpack_bits(packed, codes.size, width), codes)


def test_width_zero_takes_no_bytes():
    assert packing.pack_bits(np.zeros(1, np.int32), 0) == b""
    assert packing.unpack_bits(b"", 1, 0).tolist() == [0]


@pytest.mark.parametrize("codes", [[4], [-1, 0]])
def test_integers_that_do_not_fit_are_refused(codes):
    with pytest.raises(CodecError, match=r"expected integers in \[0, 4\)"):
        packing.pack_bits(np.array(codes), 2)


def test_filling_bits_must_be_zero():
    with pytest.raises(CodecError, match="last 2 bits"):
        packing.unpack_bits(b"\xff", 2, 3)


@pytest.mark.parametrize(("count", "bits"), [(7, 64), (1, 32), (0, 0), (51_200, 32 * 14_629)])
def test_sizes_of_words(count, bits):
    """Reference cases 2 and 4: 28 bits in each 32-bit word."""
    assert 8 * len(packing.pack_words(np.zeros(count, np.uint8), 8)) == bits
    assert 8 * packing.PACKINGS["words"].num_bytes(count, 8) == bits


@settings(deadline=None)
@given(
    st.integers(1, 32).flatmap(lambda w: st.tuples(st.just(w), st.lists(st.integers(0, 2**w - 1))))
)
def test_words_hold_28_bits_of_one_integer(case):
    width, codes = case
    packed = packing.pack_words(np.array(codes, np.uint32), width)
    words = np.frombuffer(packed, "<u4").tolist()
    total = sum(c << i * width for i, c in enumerate(codes))
    assert words == [total >> 28 * i & (2**28 - 1) for i in range(len(words))]
    assert packing.unpack_words(packed, len(codes), width).tolist() == codes


@settings(deadline=None)
@given(st.lists(st.integers(0, 2)))
def test_trits_are_digits_in_base_three(codes):
    packed = packing.pack_trits(np.array(codes, np.uint8))
    assert len(packed) == packing.PACKINGS["trits"].num_bytes(len(codes), 2) == -(-len(codes) // 5)
    for place, byte in enumerate(packed):
        digits = codes[5 * place : 5 * place + 5]
        assert byte == sum(digit * 3**i for i, digit in enumerate(digits))
    assert packing.unpack_trits(packed, len(codes)).tolist() == codes


@pytest.mark.parametrize("codes", [[3], [-1, 0]])
def test_what_is_no_trit_is_refused(codes):
    with pytest.raises(CodecError, match=r"expected integers in \[0, 3\)"):
        packing.pack_trits(np.array(codes))


@pytest.mark.parametrize(("data", "count"), [(b"\xf3", 5), (b"\x09", 2)])
def test_altered_trits_are_refused(data, count):
    with pytest.raises(CodecError, match="the bytes were altered"):
        packing.unpack_trits(data, count)


@pytest.mark.parametrize("data", [b"\1\0\0\x10", b"\1\1\0\0"])
def test_altered_words_are_refused(data):
    with pytest.raises(CodecError, match=r"message was not made|bytes were altered"):
        packing.unpack_words(data, 1, 8)
