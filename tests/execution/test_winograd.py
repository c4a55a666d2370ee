"""Convolutions by fewer multiplications, against sums in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from fedjax_core.execution.convolutions import count_convolutions, rewrite_convolutions
from fedjax_core.execution.winograd import Tiling, convolve, find_tiling, matrices


def exact(images, kernel, padding):
    """The convolution in float64, window by window."""
    padded = np.pad(np.asarray(images, np.float64), [(0, 0), *padding, (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[:2], axis=(1, 2))
    return np.einsum("nhwcij,ijco->nhwo", windows, np.asarray(kernel, np.float64))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def relative_error(got, expected):
    return np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))


@pytest.mark.parametrize("taps", [2, 3, 4, 5])
def test_the_identity_of_the_matrices(taps):
    """A ((G k) * (B x)) is the correlation of six numbers with the taps (Winograd, 1980)."""
    outputs = 7 - taps
    to_outputs, from_kernel, from_image = matrices(outputs, taps)
    kernel, numbers = normal(0, taps), normal(1, 6)
    got = to_outputs @ ((from_kernel @ kernel) * (from_image @ numbers))
    expected = [numbers[i : i + taps] @ kernel for i in range(outputs)]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    taps=st.integers(3, 5),
    beyond=st.integers(0, 9),
    before=st.integers(-1, 4),
    after=st.integers(-1, 4),
    across=st.integers(1, 3),
)
def test_short_filters(taps, beyond, before, after, across):
    """Any number of rows: what is left of a last tile is cut off."""
    images, kernel = normal(0, 2, taps + 2 + beyond, 4, 3), normal(1, taps, across, 3, 2)
    rows = images.shape[1] + before + after - taps + 1
    tiling = Tiling(7 - taps, taps, tiles=-(-rows // (7 - taps)), blocks=1)
    got = convolve(jnp.asarray(images), jnp.asarray(kernel), [(before, after), (1, 0)], tiling)
    begin, end = max(-before, 0), images.shape[1] - max(-after, 0)
    padding = [(max(before, 0), max(after, 0)), (1, 0)]
    expected = exact(images[:, begin:end], kernel, padding)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(outputs=st.integers(3, 5), rows=st.integers(6, 15), padding=st.integers(0, 2))
def test_long_filters(outputs, rows, padding):
    """The shapes of a kernel's gradient: a filter as long as the image, and few outputs."""
    taps = rows + 2 * padding - outputs + 1
    images, kernel = normal(0, 3, rows, 5, 2), normal(1, taps, 4, 2, 2)
    block = 7 - outputs
    tiling = Tiling(outputs, block, tiles=1, blocks=-(-taps // block))
    around = [(padding, padding), (1, 1)]
    got = convolve(jnp.asarray(images), jnp.asarray(kernel), around, tiling)
    np.testing.assert_allclose(got, exact(images, kernel, around), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("taps", [3, 4, 5])
def test_rounding_is_that_of_the_direct_sum_within_a_factor_of_four(taps):
    images = np.abs(normal(0, 2, 16, 16, 64))  # as ReLU leaves them
    kernel, padding = normal(1, taps, taps, 64, 32), [(2, 1), (2, 1)]
    rows = 16 + 3 - taps + 1
    tiling = Tiling(7 - taps, taps, tiles=-(-rows // (7 - taps)), blocks=1)
    expected = exact(images, kernel, padding)
    direct = lax.conv_general_dilated(
        images, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    got = convolve(jnp.asarray(images), jnp.asarray(kernel), padding, tiling)
    assert relative_error(got, expected) < 4 * relative_error(direct, expected)


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


SAME = [(2, 2), (2, 2)]
CUT = {
    "five rows": (spec(20, 14, 14, 32), spec(5, 5, 32, 64), Tiling(2, 5, 7, 1)),
    "three rows": (spec(8, 28, 28, 64), spec(3, 3, 64, 64), Tiling(4, 3, 8, 1)),
    "a kernel's gradient": (spec(32, 14, 14, 20), spec(14, 14, 20, 64), Tiling(5, 2, 1, 7)),
    "one channel": (spec(20, 28, 28, 1), spec(5, 5, 1, 32), None),
    "few filters": (spec(20, 28, 28, 32), spec(5, 5, 32, 16), None),
    "two rows": (spec(20, 28, 28, 32), spec(2, 2, 32, 64), None),
    "seven rows": (spec(20, 28, 28, 32), spec(7, 7, 32, 64), None),
    "a small batch": (spec(1, 14, 14, 32), spec(3, 3, 32, 32), None),
    "half precision": (
        *(spec(20, 14, 14, 32, dtype=jnp.bfloat16), spec(5, 5, 32, 64, dtype=jnp.bfloat16)),
        None,
    ),
    "one dimension": (spec(20, 100, 64), spec(5, 64, 64), None),
}


@pytest.mark.parametrize("name", CUT)
def test_what_is_cut(name):
    """Only what is faster: enough channels, enough rows, enough work, float32."""
    images, kernel, expected = CUT[name]
    assert find_tiling(images, kernel, SAME) == expected


def test_all_three_convolutions_of_a_training_step_are_cut():
    """Value, and the gradients of image and kernel, of the second layer of the FedAvg CNN."""
    images, kernel = normal(0, 20, 14, 14, 32), 0.1 * normal(1, 5, 5, 32, 64)

    def loss(images, kernel):
        out = lax.conv_general_dilated(
            images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(jnp.sin(out))

    both = jax.value_and_grad(loss, argnums=(0, 1))
    jaxpr = jax.make_jaxpr(both)(images, kernel)
    rewritten = rewrite_convolutions(jaxpr)
    assert count_convolutions(rewritten.jaxpr) == 3 * 6
    run = jax.jit(lambda j, *xs: jax.core.eval_jaxpr(j.jaxpr, j.consts, *xs), static_argnums=0)
    for got, expected in zip(
        run(rewritten, images, kernel), run(jaxpr, images, kernel), strict=True
    ):
        scale = np.max(np.abs(expected))
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(
    "changed",
    [
        {"precision": lax.Precision.HIGHEST},
        {"window_strides": (2, 2)},
        {"rhs_dilation": (1, 2)},
        {"lhs_dilation": (2, 1)},
    ],
)
def test_other_convolutions_stay_direct(changed):
    """Strides, dilations, and where the user asks for more precision."""
    images, kernel = normal(0, 20, 14, 14, 32), normal(1, 5, 5, 32, 64)

    def convolution(images):
        return lax.conv_general_dilated(
            images,
            kernel,
            **({"window_strides": (1, 1), "padding": SAME} | changed),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    rewritten = rewrite_convolutions(jax.make_jaxpr(convolution)(images))
    assert count_convolutions(rewritten.jaxpr) == 1
