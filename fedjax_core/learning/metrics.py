"""Metrics as a monoid: measured in sums, added anywhere, divided once.

A metric maps a batch to a `Mean` or a `Sum`. These add up, over batches, clients and rounds, in any
order and grouping; only at the very end does `finish` turn them into numbers. So an average over
clients weighs each example equally, and nothing is ever an average of averages.
"""

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int


def safe_div(numerator: ArrayLike, denominator: ArrayLike) -> Array:
    """Divides where the denominator is not 0, and gives 0 where it is.

    Gradients there are 0 as well, never NaN: the division that is thrown away is by 1.

    Args:
      numerator: any shape.
      denominator: the shape of `numerator`, or a scalar.

    Returns:
      The quotients, in the shape of `numerator`.

    >>> [float(x) for x in safe_div(jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 1.0, 2.0]))]
    [0.0, 2.0, 1.5]
    """
    denominator = jnp.asarray(denominator)
    is_zero = denominator == 0
    safe = lax.select(is_zero, lax.full_like(denominator, 1), denominator)
    quotient = jnp.asarray(numerator) / safe
    return jnp.where(is_zero, lax.full_like(quotient, 0), quotient)


class Mean(NamedTuple):
    """A weighted mean that is not divided yet.

    Attributes:
      total: float32 scalar, the sum of ``weight * value``.
      weight: float32 scalar, the sum of the weights.

    >>> float((Mean(1.0, 2.0) + Mean(2.0, 3.0)).result())  # 3 / 5
    0.6000000238418579
    """

    total: Array | float
    weight: Array | float

    @classmethod
    def of(cls, values: Float[Array, " batch"], mask: Bool[Array, " batch"]) -> Self:
        """The mean of the values that `mask` keeps; what it drops may even be NaN."""
        kept = jnp.where(mask, values.astype(jnp.float32), 0.0)
        return cls(jnp.sum(kept), jnp.sum(mask, dtype=jnp.float32))

    # A tuple's own + would append the fields, which is never what adding two means is to do.
    def __add__(self, other: "Mean") -> "Mean":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Mean(self.total + other.total, self.weight + other.weight)

    def result(self) -> Array:
        """``total / weight``; 0 if the weight is 0."""
        return safe_div(self.total, self.weight)


class Sum(NamedTuple):
    """A sum, of counts for example.

    Attributes:
      total: scalar of any dtype.

    >>> (Sum(2) + Sum(3)).result()
    5
    """

    total: Array | float

    # As in Mean.
    def __add__(self, other: "Sum") -> "Sum":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Sum(self.total + other.total)

    def result(self) -> Array | float:
        """The sum itself."""
        return self.total


class Metric(Protocol):
    """What is measured on one batch."""

    def __call__(
        self, predictions: Any, batch: Mapping[str, Array], mask: Bool[Array, " batch"]
    ) -> Mean | Sum:
        """Measures the examples of `batch` that `mask` keeps.

        Args:
          predictions: what the model predicts for the batch, ``[batch, ...]``.
          batch: the features, each ``[batch, ...]``.
          mask: bool ``[batch]``, False for padding, whose rows must not count.

        Returns:
          A `Mean` or `Sum` of scalars.
        """
        ...


def softmax_cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]
) -> Float[Array, " batch"]:
    """Cross entropy of each example: ``log(sum_c exp(logits[c])) - logits[label]``, in nats.

    A label outside ``0 .. classes - 1`` gives NaN, so that it cannot pass for a loss.

    >>> logits = jnp.array([[1.2, 0.4]])
    >>> [round(float(x), 6) for x in softmax_cross_entropy(logits, jnp.array([1]))]
    [1.171101]
    """
    logits = logits.astype(jnp.float32)
    classes = jnp.arange(logits.shape[-1])
    # A comparison instead of an indexed read: its gradient is no scatter, and a label of -1 does
    # not silently mean the last class.
    is_label = labels[:, None] == classes[None, :]
    log_probabilities = jax.nn.log_softmax(logits)
    losses = -jnp.sum(jnp.where(is_label, log_probabilities, 0.0), axis=-1)
    return jnp.where(jnp.any(is_label, axis=-1), losses, jnp.nan)


def cross_entropy(
    predictions: Float[Array, "batch classes"],
    batch: Mapping[str, Array],
    mask: Bool[Array, " batch"],
    *,
    label_key: str = "label",
) -> Mean:
    """Mean softmax cross entropy, in nats; a `Metric`.

    Args:
      predictions: logits.
      batch: holds the labels, int ``[batch]``, under `label_key`.
      mask: False for padding.
      label_key: name of the feature that holds the labels.
    """
    return Mean.of(softmax_cross_entropy(predictions, batch[label_key]), mask)


def accuracy(
    predictions: Float[Array, "batch classes"],
    batch: Mapping[str, Array],
    mask: Bool[Array, " batch"],
    *,
    label_key: str = "label",
) -> Mean:
    """Share of examples whose largest logit is at the label (the first, if several); a `Metric`.

    Args:
      predictions: logits, or anything whose largest entry names the class.
      batch: holds the labels, int ``[batch]``, under `label_key`.
      mask: False for padding.
      label_key: name of the feature that holds the labels.

    >>> logits, labels = jnp.array([[1.0, 2.0], [1.0, 2.0], [3.0, 0.0]]), jnp.array([1, 0, 0])
    >>> float(accuracy(logits, {"label": labels}, jnp.array([True, True, False])).result())
    0.5
    """
    is_right = jnp.argmax(predictions, axis=-1) == batch[label_key]
    return Mean.of(is_right.astype(jnp.float32), mask)


def merge(left: Mapping[str, Mean | Sum], right: Mapping[str, Mean | Sum]) -> dict[str, Mean | Sum]:
    """Adds two measurements of the same metrics."""
    return jax.tree.map(operator.add, dict(left), dict(right))


def finish(stats: Mapping[str, Mean | Sum]) -> dict[str, Any]:
    """The numbers that added up stats stand for.

    >>> finish({"num_examples": Sum(7)})
    {'num_examples': 7}
    """
    return {name: stat.result() for name, stat in stats.items()}
