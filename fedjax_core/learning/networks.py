"""The networks of federated learning's first papers, as linen modules that map images to logits."""

import jax
from flax import linen  # noqa: TID253 - who imports this module is about to make a network
from jax import Array
from jaxtyping import Float

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
    return windows.max(axis=(2, 4))


class FedAvgCNN(linen.Module):
    """Two convolutions of 5 x 5 with pooling, 512 hidden units, logits (McMahan et al., 2017)."""

    num_classes: int

    @linen.compact
    def __call__(self, images: Float[Array, " batch 28 28 1"]) -> Float[Array, " batch classes"]:
        """Logits of the images."""
        hidden = images
        for channels in (32, 64):
            hidden = linen.Conv(channels, (5, 5), padding="SAME", kernel_init=_glorot)(hidden)
            hidden = max_pool_2x2(jax.nn.relu(hidden))
        hidden = hidden.reshape(len(hidden), -1)
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
        hidden = images.reshape(len(images), -1)
        for units in self.hidden:
            hidden = jax.nn.relu(linen.Dense(units, kernel_init=_glorot)(hidden))
        return linen.Dense(self.num_classes, kernel_init=_glorot)(hidden)
