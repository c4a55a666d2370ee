"""Factors of matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core as fc
from fedjax_core.compression import low_rank

KEY = jax.random.key(0)


def relative_error(x, y) -> float:
    return float(np.sum((np.asarray(x) - np.asarray(y)) ** 2) / np.sum(np.asarray(x) ** 2))


def of_rank(rank: int, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    left, right = (rng.normal(size=(n, rank)) for n in shape)
    return (left @ right.T).astype(np.float32)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (300, 20)])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_matrix_of_low_rank_comes_back(shape, rank):
    """Reference case 31."""
    x = of_rank(rank, shape)
    assert relative_error(x, low_rank.product(low_rank.factorize(KEY, x, rank))) < 1e-9


def test_the_error_of_other_matrices_is_nearly_the_least():
    rng = np.random.default_rng(1)
    x = np.float32(of_rank(5, (200, 80)) + rng.normal(size=(200, 80)))
    factors = low_rank.factorize(KEY, x, 8)
    values = np.linalg.svd(x, compute_uv=False)
    least = np.sum(values[8:] ** 2) / np.sum(values**2)
    assert relative_error(x, low_rank.product(factors)) <= 1.1 * least
    np.testing.assert_allclose(factors.scales[:5], values[:5], rtol=5e-3)


@pytest.mark.parametrize(("shape", "rank"), [((400, 300), 8), ((200, 50), 4)])
def test_rounded_factors_cost_a_twelfth_of_a_squared_step(shape, rank):
    """Reference case 31: E|W' - W|^2 = rank (m + n) step^2 / 12 at high rates."""
    x = 50 * of_rank(rank, shape)
    factors = low_rank.factorize(KEY, jnp.asarray(x), rank)
    rounded = factors._replace(left=jnp.round(factors.left), right=jnp.round(factors.right))
    error = np.sum((np.asarray(low_rank.product(rounded)) - x) ** 2)
    assert error == pytest.approx(rank * sum(shape) / 12, rel=0.1)


@pytest.mark.slow
def test_the_update_of_a_dense_layer_from_one_batch_has_the_rank_of_the_batch():
    """Reference case 31."""
    model = fc.models.two_nn()
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.random((20, 28, 28, 1), np.float32),
        "label": rng.integers(0, 10, 20, np.int32),
    }
    params = model.init(jax.random.key(1))
    gradient = jax.grad(lambda p: model.loss(KEY, p, batch, np.ones(20, bool), True)[0])(params)
    kernels = [x for x in jax.tree.leaves(gradient) if x.ndim == 2 and min(x.shape) > 20]
    assert kernels
    for kernel in kernels:
        assert relative_error(kernel, low_rank.product(low_rank.factorize(KEY, kernel, 20))) < 1e-8


def test_nothing_is_left_of_zeros():
    factors = low_rank.factorize(KEY, jnp.zeros((30, 20)), 4)
    assert not np.any(low_rank.product(factors))


def test_components_that_are_left_out_add_nothing():
    factors = low_rank.factorize(KEY, of_rank(3, (30, 20)), 3)
    fewer = factors._replace(scales=factors.scales.at[1:].set(0))
    first = np.outer(factors.left[:, 0], factors.right[:, 0]) / factors.scales[0]
    np.testing.assert_allclose(low_rank.product(fewer), first, atol=1e-5)
