"""The image classifiers of federated learning's first papers.

| model       | layers                                              | parameters (digits) |
|-------------|-----------------------------------------------------|---------------------|
| `emnist_cnn`| conv 5x5x32, pool, conv 5x5x64, pool, 512, 10       | 1,663,370           |
| `two_nn`    | 200, 200, 10                                        | 199,210             |
| `linear`    | 10                                                  | 7,850               |

References:
  H. B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Aguera y Arcas. Communication-Efficient
  Learning of Deep Networks from Decentralized Data. AISTATS 2017, arXiv:1602.05629.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fedjax_core.learning.metrics import Metric
from fedjax_core.learning.models import Model, from_flax


def _image_spec(shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        "image": jax.ShapeDtypeStruct(tuple(shape), jnp.uint8),
        "label": jax.ShapeDtypeStruct((), jnp.int32),
    }


def emnist_cnn(only_digits: bool = True, metrics: Mapping[str, Metric] | None = None) -> Model:
    """The FedAvg CNN for 28 x 28 images (McMahan et al., 2017), without dropout.

    Args:
      only_digits: 10 classes (1,663,370 parameters); otherwise the 62 of EMNIST (1,690,046).
      metrics: by name; None for accuracy.

    Returns:
      The model, of ``{"image": uint8[28,28,1], "label": int32}``.

    >>> variables = jax.eval_shape(emnist_cnn().init, jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
    1663370
    """
    # flax.linen takes a quarter of a second to import: only who makes a network pays for it.
    from fedjax_core.learning.networks import FedAvgCNN

    module = FedAvgCNN(num_classes=10 if only_digits else 62)
    return from_flax(module, input_spec=_image_spec((28, 28, 1)), metrics=metrics)


def linear(
    num_classes: int = 10,
    input_shape: tuple[int, ...] = (28, 28, 1),
    metrics: Mapping[str, Metric] | None = None,
) -> Model:
    """Multinomial logistic regression on the pixels: one linear layer with a bias.

    Args:
      num_classes: number of logits.
      input_shape: of one image.
      metrics: by name; None for accuracy.

    >>> variables = jax.eval_shape(linear().init, jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
    7850
    """
    from fedjax_core.learning.networks import DenseNetwork

    module = DenseNetwork(num_classes)
    return from_flax(module, input_spec=_image_spec(input_shape), metrics=metrics)


def two_nn(
    num_classes: int = 10,
    hidden: int = 200,
    input_shape: tuple[int, ...] = (28, 28, 1),
    metrics: Mapping[str, Metric] | None = None,
) -> Model:
    """The 2NN of McMahan et al. (2017): two hidden layers with ReLU.

    Args:
      num_classes: number of logits.
      hidden: units of each hidden layer.
      input_shape: of one image.
      metrics: by name; None for accuracy.

    >>> variables = jax.eval_shape(two_nn().init, jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
    199210
    """
    from fedjax_core.learning.networks import DenseNetwork

    module = DenseNetwork(num_classes, hidden=(hidden, hidden))
    return from_flax(module, input_spec=_image_spec(input_shape), metrics=metrics)
