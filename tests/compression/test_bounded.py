"""Bounded support: unbiased, with the error of the best levels, and one rotation for all."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core.compression import bounded_support
from fedjax_core.errors import CodecError


@pytest.mark.parametrize("name", ["normal", "laplace"])
@pytest.mark.parametrize(("bits", "error"), [(1, 8.597), (2, 0.5733), (3, 0.0926), (4, 0.01947)])
def test_error_of_any_source(bits, error, name, lost, source):
    """Reference case 27, within 3 %: T of this many elements varies by 0.4 %."""
    assert lost(bounded_support(bits), source(name, 2**18)) == pytest.approx(error, rel=0.03)


def test_errors_of_ten_clients_average_out(many, source):
    """With one rotation for all: the rounding alone is independent."""
    x = np.asarray(source("student", 2**15), np.float64)
    decoded = many(bounded_support(2), jnp.float32(x), 10).mean(0)
    assert np.sum((decoded - x) ** 2) / np.sum(x**2) == pytest.approx(0.0573, rel=0.1)


def test_bits(bits_of):
    """Two bits a symbol, T, 512 outliers, and a gap each: log2(512) + log2(e) bits, and 0.03."""
    gap = 9 + np.log2(np.e) + 0.03
    expected = 2**19 + 32 + 512 * (32 + gap)
    assert bits_of(bounded_support(2), (2**18,)) == pytest.approx(expected, abs=512)


@pytest.mark.parametrize("bits", [0, 5, 2.0, True])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(CodecError, match="expected bits to be an integer from 1 to 4"):
        bounded_support(bits)
