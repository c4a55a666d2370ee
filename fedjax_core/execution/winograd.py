"""Convolutions along the rows of images by Winograd's minimal filtering.

Where m outputs share r taps of a filter, m + r - 1 multiplications do for m r (Winograd, 1980; for
convolutional networks: Lavin and Gray, arXiv 1509.09308). Here m + r - 1 = 6, along the rows only:
six convolutions of a single row each, and additions before and after. Tiles of more rows, or of
rows and columns, are less exact, and move more memory than they save arithmetic.

    y_p = (G k)_p * (B x)_p,    output_j = sum_p A_jp y_p        p = 0 .. 5

It serves filters of five rows, in tiles of two outputs, and the gradients of kernels of three to
five rows, by the same identity transposed: a filter as long as the image, cut into blocks of r
taps, of which each of the six convolutions takes the sum. Both are as exact as the direct sum
within a factor of about two, relative to the largest row that an output depends on. A tile of two
outputs never mixes the first row into the second output, nor the last into the first: a window of
zeros gives zero, which ReLU and pooling would see. Wider tiles for filters of three rows do not
have this property, and are not used. A pixel that is not finite makes its window NaN.
"""

from collections.abc import Sequence as AbstractSequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.export import is_symbolic_dim

# Among the sets of five from 0, 1, -1, 2, -2, 1/2 and -1/2 one of those with the smallest error.
_POINTS = (0.0, 1.0, -1.0, 2.0, -0.5)
_NUM_PRODUCTS = len(_POINTS) + 1  # the sixth point is infinity
_TAPS = 5
_TAPS_OF_GRADIENTS = (3, 4, 5)
# Below these the direct sum was as fast: channels pay for additions, large tensors for calls.
_FEWEST_CHANNELS = 32
_FEWEST_MULTIPLICATIONS = 2**24

Padding = AbstractSequence[tuple[int, int]]


class Tiling(NamedTuple):
    """How the rows of a convolution are cut.

    Attributes:
      outputs: of a tile, m.
      taps: of a block of the filter, r.
      tiles: of the output.
      blocks: of the filter; one of `tiles` and `blocks` is 1.
    """

    outputs: int
    taps: int
    tiles: int
    blocks: int


def find_tiling(images: jax.Array, kernel: jax.Array, padding: Padding) -> Tiling | None:
    """How to cut a convolution of stride 1, None where the direct sum is as fast.

    Args:
      images: ``[batch, height, width, channels]``.
      kernel: ``[height, width, channels, filters]``.
      padding: before and after, of height and width.
    """
    shapes = (*images.shape, *kernel.shape)
    if images.ndim != 4 or any(map(is_symbolic_dim, shapes)):
        return None
    batch, height, width, channels = images.shape
    taps, taps_across, _, filters = kernel.shape
    rows = height + sum(padding[0]) - taps + 1
    columns = width + sum(padding[1]) - taps_across + 1
    if rows < 1 or columns < 1 or not images.dtype == kernel.dtype == jnp.float32:
        return None
    if taps == _TAPS:
        outputs = _NUM_PRODUCTS + 1 - taps
        tiling = Tiling(outputs, taps, tiles=-(-rows // outputs), blocks=1)
        narrowest = min(channels, filters)
    elif rows in _TAPS_OF_GRADIENTS:  # the kernel's own channels are the batch here
        block = _NUM_PRODUCTS + 1 - rows
        tiling = Tiling(rows, block, tiles=1, blocks=-(-taps // block))
        narrowest = min(batch, filters)
    else:
        return None
    of_a_row = batch * columns * taps_across * channels * filters
    pays = (
        narrowest >= _FEWEST_CHANNELS
        and rows * taps * of_a_row >= _FEWEST_MULTIPLICATIONS
        # Two thirds of the multiplications at most, or the additions take what they save.
        and 3 * _NUM_PRODUCTS * tiling.tiles * tiling.blocks <= 2 * rows * taps
    )
    return tiling if pays else None


def convolve(images: jax.Array, kernel: jax.Array, padding: Padding, tiling: Tiling) -> jax.Array:
    """The convolution of stride 1 that `find_tiling` cuts, ``[batch, rows, columns, filters]``."""
    if tiling.blocks == 1:
        step = tiling.outputs
        to_outputs, from_kernel, from_image = matrices(tiling.outputs, tiling.taps)
    else:  # the same identity transposed: blocks as tiles, and outputs as taps
        step = tiling.taps
        transposed, from_outputs, from_image = matrices(tiling.taps, tiling.outputs)
        to_outputs, from_kernel = from_outputs.T, transposed.T
    count = tiling.tiles * tiling.blocks
    num_rows = images.shape[1] + sum(padding[0]) - kernel.shape[0] + 1
    before = padding[0][0]
    after = step * (count - 1) + _NUM_PRODUCTS - images.shape[1] - before
    beyond = tiling.taps * tiling.blocks - kernel.shape[0]
    padded = _pad(images, 1, before, after)
    rows = [padded[:, i : i + step * (count - 1) + 1 : step] for i in range(_NUM_PRODUCTS)]
    taps = [_pad(kernel, 0, 0, beyond)[i :: tiling.taps] for i in range(tiling.taps)]
    products = [
        lax.conv_general_dilated(
            _combine(from_image[p], rows),
            _combine(from_kernel[p], taps),
            (1, 1),
            [(0, 0), padding[1]],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        for p in range(_NUM_PRODUCTS)
    ]
    outputs = jnp.stack([_combine(row, products) for row in to_outputs], axis=2)
    batch, tiles, size, *rest = outputs.shape
    return outputs.reshape(batch, tiles * size, *rest)[:, :num_rows]


def _pad(x: jax.Array, axis: int, before: int, after: int) -> jax.Array:
    """`x` with zeros along an axis; less than none cuts it."""
    widths = [(before, after, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)]
    return lax.pad(x, jnp.float32(0), widths)


def matrices(outputs: int, taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The matrices A ``[outputs, 6]``, G ``[6, taps]`` and B ``[6, 6]`` of Toom and Cook.

    The product of two polynomials is known from its values at six points, one of them infinity; a
    correlation is the transpose of such a product.
    """
    points = np.array(_POINTS)
    others = [np.delete(points, p) for p in range(len(points))]
    to_outputs = np.zeros((outputs, _NUM_PRODUCTS))
    from_kernel = np.zeros((_NUM_PRODUCTS, taps))
    from_image = np.zeros((_NUM_PRODUCTS, _NUM_PRODUCTS))
    to_outputs[:, :-1] = np.vander(points, outputs, increasing=True).T
    to_outputs[-1, -1] = from_kernel[-1, -1] = 1
    for p, rest in enumerate(others):
        from_kernel[p] = points[p] ** np.arange(taps) / np.prod(points[p] - rest)
        from_image[p, :-1] = np.poly(rest)[::-1]
    from_image[-1] = np.poly(points)[::-1]
    return to_outputs, from_kernel, from_image


def _combine(factors: np.ndarray, arrays: list[jax.Array]) -> jax.Array:
    """The sum of arrays times factors, without those whose factor is zero."""
    terms = [
        x if factor == 1 else jnp.float32(factor) * x
        for factor, x in zip(factors, arrays, strict=True)
        if factor
    ]
    return sum(terms[1:], terms[0])
