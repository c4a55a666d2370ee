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

SAME = [(2, 2), (2, 2)]


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


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    beyond=st.integers(0, 9),
    before=st.integers(-1, 4),
    after=st.integers(-1, 4),
    across=st.integers(1, 3),
)
def test_filters_of_five_rows(beyond, before, after, across):
    """Any number of rows: what is left of a last tile is cut off."""
    images, kernel = normal(0, 2, 7 + beyond, 4, 3), normal(1, 5, across, 3, 2)
    tiling = Tiling(2, 5, tiles=-(-(7 + beyond + before + after - 4) // 2), blocks=1)
    got = convolve(jnp.asarray(images), jnp.asarray(kernel), [(before, after), (1, 0)], tiling)
    begin, end = max(-before, 0), images.shape[1] - max(-after, 0)
    padding = [(max(before, 0), max(after, 0)), (1, 0)]
    expected = exact(images[:, begin:end], kernel, padding)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None, derandomize=True)
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


def test_rounding_is_that_of_the_direct_sum_within_a_factor_of_three():
    images = np.abs(normal(0, 2, 16, 16, 64))  # as ReLU leaves them
    kernel, tiling = normal(1, 5, 5, 64, 32), Tiling(2, 5, 8, 1)
    check_rounding(images, kernel, SAME, tiling)


@pytest.mark.parametrize("rows", [3, 4, 5])
def test_rounding_of_gradients_of_kernels(rows):
    block, pad = 7 - rows, (rows - 1) // 2
    padding = [(pad, rows - 1 - pad)] * 2
    images, cotangents = np.abs(normal(0, 32, 16, 16, 20)), normal(1, 16, 16, 20, 64)
    check_rounding(images, cotangents, padding, Tiling(rows, block, 1, -(-16 // block)))


def check_rounding(images, kernel, padding, tiling):
    expected = exact(images, kernel, padding)
    direct = lax.conv_general_dilated(
        images, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    got = convolve(jnp.asarray(images), jnp.asarray(kernel), padding, tiling)
    assert relative_error(got, expected) < 3 * relative_error(direct, expected)


@pytest.mark.parametrize("begin", range(12))
def test_a_window_of_zeros_gives_zero(begin):
    """To the bit, for ReLU and pooling take zero for what it is."""
    images = normal(0, 1, 16, 8, 4)
    images[:, begin : begin + 5] = 0
    got = convolve(jnp.asarray(images), normal(1, 5, 5, 4, 3), [(0, 0), (2, 2)], Tiling(2, 5, 6, 1))
    assert not np.any(got[:, begin])
    assert np.all(got[:, max(begin - 5, 0) : begin].any((0, 2, 3)))


def test_a_large_row_spoils_no_window_without_it():
    images, kernel = normal(0, 1, 12, 8, 4), normal(1, 5, 5, 4, 3)
    images[:, 6] *= 1e6
    padding, tiling = [(0, 0), (2, 2)], Tiling(2, 5, 4, 1)
    got = convolve(jnp.asarray(images), jnp.asarray(kernel), padding, tiling)
    expected = exact(images, kernel, padding)
    without = [row for row in range(8) if not row <= 6 < row + 5]
    np.testing.assert_allclose(got[:, without], expected[:, without], rtol=1e-4, atol=1e-4)


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


CUT = {
    "five rows": (spec(20, 14, 14, 32), spec(5, 5, 32, 64), Tiling(2, 5, 7, 1)),
    "many rows": (spec(20, 36, 36, 32), spec(5, 5, 32, 64), Tiling(2, 5, 18, 1)),
    "an odd number of rows": (spec(20, 13, 13, 32), spec(5, 5, 32, 64), Tiling(2, 5, 7, 1)),
    "three rows": (spec(8, 28, 28, 64), spec(3, 3, 64, 64), None),
    "a gradient of three rows": (spec(32, 14, 14, 20), spec(16, 16, 20, 64), Tiling(3, 4, 1, 4)),
    "smaller than its kernel": (spec(64, 2, 2, 64), spec(9, 9, 64, 64), None),
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
    # The direct one stands beside the six of it, for other platforms.
    assert count_convolutions(rewritten.jaxpr) == 3 * (6 + 1)
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


def convolution(images):
    return lax.conv_general_dilated(
        images, KERNEL, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


KERNEL = normal(1, 5, 5, 32, 64)


@pytest.mark.parametrize(("platform", "count"), [("cpu", 6), ("cuda", 1), ("tpu", 1)])
def test_other_platforms_sum_directly(platform, count):
    """What is exported from a CPU for them, too."""
    images = normal(0, 20, 14, 14, 32)
    rewritten = rewrite_convolutions(jax.make_jaxpr(convolution)(images))
    run = jax.jit(lambda x: jax.core.eval_jaxpr(rewritten.jaxpr, rewritten.consts, x))
    module = jax.export.export(run, platforms=(platform,))(images).mlir_module()
    assert module.count("stablehlo.convolution") == count


def test_a_symbolic_number_of_images_is_summed_directly():
    (batch,) = jax.export.symbolic_shape("batch")
    jaxpr = jax.make_jaxpr(convolution)(spec(batch, 14, 14, 32))
    assert count_convolutions(rewrite_convolutions(jaxpr).jaxpr) == 1


def test_a_rewritten_function_can_be_transformed():
    """Derivatives of derivatives, and vmap over images and kernels."""
    images, kernels = normal(0, 2, 20, 8, 8, 32), 0.1 * normal(1, 2, 5, 5, 32, 32)
    layout = ("NHWC", "HWIO", "NHWC")

    def loss(images, kernel):
        out = lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=layout)
        return jnp.mean(jnp.sin(out))

    jaxpr = rewrite_convolutions(jax.make_jaxpr(loss)(images[0], kernels[0]))
    assert count_convolutions(jaxpr.jaxpr) == 7
    rewritten = lambda *xs: jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *xs)[0]  # noqa: E731

    def curvature(function):
        gradient = jax.grad(function, argnums=1)
        along = lambda x, k: jax.jvp(lambda k: gradient(x, k), (k,), (k,))[1]  # noqa: E731
        return jax.vmap(along)(images, kernels)

    got, expected = jax.jit(lambda: (curvature(rewritten), curvature(loss)))()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.max(np.abs(expected)))
