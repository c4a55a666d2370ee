"""The networks of federated learning's first papers, as linen modules that map images to logits."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from flax import linen  # noqa: TID253 - who imports this module is about to make a network
from flax.linen.dtypes import promote_dtype  # noqa: TID253
from jax import Array, lax
from jaxtyping import Float

from fedjax_core.errors import FederatedTypeError

# The initialiser of Keras, with which the papers and TFF's tutorials ran.
_glorot = linen.initializers.glorot_uniform()


def max_pool_2x2(
    images: Float[Array, " batch height width channels"],
) -> Float[Array, " batch height//2 width//2 channels"]:
    """The maximum of each 2 x 2 window; height and width must be even.

    Equal to ``linen.max_pool(images, (2, 2), (2, 2))``, but for its gradient at ties, which is
    shared evenly here. Where windows do not overlap, a reshape and a maximum over two axes do the
    same, and their gradient is a comparison; that of `reduce_window` is a scatter, slow on CPUs.
    """
    batch, height, width, channels = images.shape
    windows = images.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return _largest(windows, (2, 4))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _largest(windows: Array, axes: tuple[int, ...]) -> Array:
    """`jnp.max` over some short axes, with its gradient made of faster parts: ties share it evenly.

    How many share a maximum is counted position by position. As a sum over the axes it would write
    an array of the size of `windows` first.
    """
    return windows.max(axes)


@_largest.defjvp
def _largest_jvp(
    axes: tuple[int, ...], primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    (windows,), (tangent,) = primals, tangents
    largest = _largest(windows, axes)
    count = jnp.zeros_like(largest)
    for position in itertools.product(*(range(windows.shape[axis]) for axis in axes)):
        at = dict(zip(axes, position, strict=True))
        member = windows[tuple(at.get(axis, slice(None)) for axis in range(windows.ndim))]
        count += jnp.asarray(~(member < largest), windows.dtype)
    is_largest = ~(windows < jnp.expand_dims(largest, axes))  # all of them, where one is NaN
    return largest, jnp.where(is_largest, tangent, 0).sum(axes) / count


class ConvPool(linen.Module):
    """A convolution of 5 x 5 with bias, a max-pool of 2 x 2 and a ReLU, on images of even sizes.

    Bias and ReLU grow with their argument, so that they may come after pooling: the same result
    from a quarter of the work. For images with a single channel the four positions of a window are
    computed side by side, as channels of one matrix product: on CPUs, a convolution with so few
    channels in takes twice as long.

    Attributes:
      channels: of the result.

    Raises:
      FederatedTypeError: for images of another rank, or of odd sizes.
    """

    channels: int

    @linen.compact
    def __call__(
        self, images: Float[Array, " batch height width inputs"]
    ) -> Float[Array, " batch height//2 width//2 channels"]:
        """What is left of the images, a quarter of their pixels."""
        if images.ndim != 4 or images.shape[1] % 2 or images.shape[2] % 2:
            raise FederatedTypeError(
                "Expected images [batch, height, width, channels] of even height and width, which "
                f"are pooled by two, got the shape {images.shape}."
            )
        shape = (5, 5, images.shape[-1], self.channels)
        kernel = self.param("kernel", _glorot, shape, jnp.float32)
        bias = self.param("bias", linen.initializers.zeros, shape[-1:], jnp.float32)
        images, kernel, bias = promote_dtype(images, kernel, bias)
        pooled = _single(images, kernel) if images.shape[-1] == 1 else _several(images, kernel)
        return jax.nn.relu(pooled + bias.reshape(1, 1, 1, -1))


def _several(images: Array, kernel: Array) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return max_pool_2x2(
        lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=layout)
    )


def _single(images: Array, kernel: Array) -> Array:
    """The same where images have one channel: each window is seen by 6 x 6 pixels."""
    batch, height, width, _ = images.shape
    padded = jnp.pad(images[..., 0], [(0, 0), (2, 2), (2, 2)])
    offsets = list(itertools.product(range(6), range(6)))
    seen = jnp.stack([padded[:, i : i + height : 2, j : j + width : 2] for i, j in offsets], -1)
    shifted = [
        jnp.pad(kernel[:, :, 0], [(i, 1 - i), (j, 1 - j), (0, 0)])
        for i, j in itertools.product(range(2), range(2))
    ]
    positions = seen.reshape(-1, 36) @ jnp.concatenate(shifted, -1).reshape(36, -1)
    windows = positions.reshape(batch, height // 2, width // 2, 4, kernel.shape[-1])
    return _largest(windows, (3,))


class FedAvgCNN(linen.Module):
    """Two convolutions of 5 x 5 with pooling, 512 hidden units, logits (McMahan et al., 2017)."""

    num_classes: int

    @linen.compact
    def __call__(self, images: Float[Array, " batch 28 28 1"]) -> Float[Array, " batch classes"]:
        """Logits of the images."""
        hidden = images
        for index, channels in enumerate((32, 64)):
            hidden = ConvPool(channels, name=f"Conv_{index}")(hidden)
        hidden = hidden.reshape(len(hidden), math.prod(hidden.shape[1:]))
        hidden = jax.nn.relu(linen.Dense(512, kernel_init=_glorot)(hidden))
        return linen.Dense(self.num_classes, kernel_init=_glorot)(hidden)


class DenseNetwork(linen.Module):
    """Layers of hidden units with ReLU over the flattened image, and logits.

    Attributes:
      num_classes: number of logits.
      hidden: units of each hidden layer; () for a linear model.
    """

    num_classes: int
    hidden: tuple[int, ...] = ()

    @linen.compact
    def __call__(self, images: Float[Array, " batch *shape"]) -> Float[Array, " batch classes"]:
        """Logits of the images."""
        hidden = images.reshape(len(images), math.prod(images.shape[1:]))
        for units in self.hidden:
            hidden = jax.nn.relu(linen.Dense(units, kernel_init=_glorot)(hidden))
        return linen.Dense(self.num_classes, kernel_init=_glorot)(hidden)
