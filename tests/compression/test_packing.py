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
    with pytest.raises(CodecError, match=r"expected integers in \[0, 2\*\*2\)"):
        packing.pack_bits(np.array(codes), 2)


def test_filling_bits_must_be_zero():
    with pytest.raises(CodecError, match="last 2 bits"):
        packing.unpack_bits(b"\xff", 2, 3)
