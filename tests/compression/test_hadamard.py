"""Randomised Hadamard rotation: a linear isometry that undoes itself, with padding that counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core.compression import Keys, chain, hadamard_rotation, to_bytes, uniform_quantize
from fedjax_core.compression.hadamard import hadamard_transform
from fedjax_core.errors import CodecError

KEYS = Keys(jax.random.key(0), jax.random.key(1))


def sylvester(size: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)


@pytest.mark.parametrize("size", [1, 2, 8, 64, 512])
def test_transform_is_the_product_with_sylvesters_matrix(size):
    rows = np.random.default_rng(0).normal(size=(3, size)).astype(np.float32)
    np.testing.assert_allclose(hadamard_transform(rows), rows @ sylvester(size), atol=1e-5)


def test_what_is_transformed_beside_changes_nothing_but_rounding():
    rows = jax.random.normal(jax.random.key(2), (7, 256))
    together = jax.jit(hadamard_transform)(rows)
    for row, expected in zip(rows, together, strict=True):
        np.testing.assert_allclose(hadamard_transform(row[None])[0], expected, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 4_095, 4_096, 4_097, 10_000])
def test_isometry_and_involution(size, source, round_trip):
    """Reference case 26."""
    codec = hadamard_rotation(min_size=0)
    value = source("student", size)
    _, message = codec.encode(KEYS, (), (), value)
    norms = [float(jnp.linalg.norm(x)) for x in (message.payload.values, value)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    np.testing.assert_allclose(round_trip(codec, value), value, atol=1e-5 * norms[1])


@pytest.mark.parametrize("block", [16, 4_096])
def test_one_hot_is_spread_evenly(block):
    """Reference case 26."""
    value = jnp.zeros(block).at[block // 3].set(-5.0)
    _, message = hadamard_rotation(block, min_size=0).encode(KEYS, (), (), value)
    np.testing.assert_allclose(jnp.abs(message.payload.values), 5 / np.sqrt(block), rtol=1e-6)


@pytest.mark.parametrize(
    ("size", "block", "padded"),
    [
        (1_663_370, 4_096, 1_667_072),
        (1_663_370, 2**21, 2_097_152),
        (51_200, 4_096, 53_248),
        (3, 4_096, 4),
        (1, 4_096, 1),
    ],
)
def test_padding_is_counted(size, block, padded, bits_of):
    """Reference case 5: 407 blocks, or the next power of two."""
    assert bits_of(hadamard_rotation(block, min_size=0), (size,)) == 32 * padded
    quantised = chain(hadamard_rotation(block, min_size=0), uniform_quantize(8, min_size=0))
    assert bits_of(quantised, (size,)) == 8 * padded + 64


def test_padding_of_the_cnn_to_powers_of_two(bits_of):
    """Reference case 5: 2,172,528 = 1.3061 times its size."""
    shapes = [(5, 5, 1, 32), (32,), (5, 5, 32, 64), (64,), (3136, 512), (512,), (512, 10), (10,)]
    assert bits_of(hadamard_rotation(2**21, min_size=0), *shapes) == 32 * 2_172_528


@pytest.mark.parametrize("codec", [hadamard_rotation(), hadamard_rotation(2**18)])
def test_rotation_saves_heavy_tails(codec, lost, source):
    """A Student source of 3 degrees of freedom becomes a Gaussian, whose extremes are small.

    8 bits from -5 to 5 root mean squares: a step of 10/255, an error of its square's sixth.
    """
    x = source("student", 2**18)
    quantise = uniform_quantize(8)
    assert lost(quantise, x) > 0.01
    assert lost(chain(codec, quantise), x) == pytest.approx((10 / 255) ** 2 / 6, rel=1)


def test_sizes_are_judged_on_the_original_tensor(round_trip):
    codec = chain(hadamard_rotation(min_size=2), uniform_quantize(4, min_size=3))
    value = [jnp.arange(1.0, 4.0), jnp.arange(4.0), jnp.arange(2.0)]
    for before, after in zip(value, round_trip(codec, value), strict=True):
        assert after.shape == before.shape
        np.testing.assert_allclose(after, before, atol=0.8)
    # Three elements are rotated to four, and not quantised: they were not more than three.
    np.testing.assert_allclose(round_trip(codec, value)[0], value[0], atol=1e-5)


def test_stages_undo_what_they_did_themselves(round_trip):
    codec = chain(hadamard_rotation(min_size=0), hadamard_rotation(4, min_size=5))
    value = [jnp.arange(3.0), jnp.arange(9.0)]
    for before, after in zip(value, round_trip(codec, value), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-5)


def test_half_precision_is_rotated_in_float32(round_trip):
    codec = hadamard_rotation(min_size=0)
    value = jnp.arange(100, dtype=jnp.float16)
    _, message = codec.encode(KEYS, (), (), value)
    assert len(to_bytes(codec, message)) == 4 * 128
    np.testing.assert_allclose(round_trip(codec, value), value, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("block", [0, 3, 4_095, -4, 4.0, True])
def test_block_that_is_no_power_of_two_is_refused(block):
    with pytest.raises(CodecError, match="expected block to be a power of two"):
        hadamard_rotation(block)
