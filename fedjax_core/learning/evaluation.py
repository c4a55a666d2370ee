"""Evaluating a model on the host's data, and checking data against a model."""

import collections
import functools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from fedjax_core.datasets.cohort import Cohort
from fedjax_core.datasets.federated import FederatedDataset
from fedjax_core.datasets.splits import Splits
from fedjax_core.errors import ArgumentError, DataError, FederatedTypeError
from fedjax_core.learning.features import check_feature, check_lengths, check_names
from fedjax_core.learning.metrics import Mean, Sum, merge
from fedjax_core.learning.models import LossFn, Model, Stats

# Batches on their way to the device: enough to keep it busy, few enough to fit any memory.
_BATCHES_IN_FLIGHT = 2

# For what is no data, but close to it.
_REMEDIES: dict[type, str] = {
    Cohort: " Pass the dataset of these clients: dataset.select(ids).",
    Splits: " Pass one of its parts, such as its `.test`.",
}


def evaluate(model: Model, params: Any, data: Any, batch_size: int = 500) -> dict[str, float]:
    """Loss and metrics of a model over all examples.

    The result does not depend on `batch_size`, but for the order in which floats are added: the
    last batch is padded and masked, and batches are added up in float64. One program is compiled
    for a model and a batch size.

    Args:
      model: what to evaluate.
      params: its variables, such as ``state.params``.
      data: features, each ``[examples, ...]``; or a `FederatedDataset`, whose clients are pooled.
      batch_size: examples evaluated at once; only memory and speed depend on it.

    Returns:
      The metrics by name: "loss" (mean over examples), "num_examples", and the model's own.

    Raises:
      DataError: `data` is neither features nor a dataset (a `Cohort` holds rows that only pad it),
        there are no examples, a feature is missing, features differ in length, or a label is not
        one of the model's classes.
      FederatedTypeError: a feature has another shape or dtype than the model takes, or `params` are
        no variables.
      ArgumentError: `batch_size` is not a positive integer.

    >>> from fedjax_core.models import linear
    >>> model = linear(num_classes=2, input_shape=(3,))
    >>> zeros = jax.tree.map(np.zeros_like, model.init(jax.random.key(0)))
    >>> data = {"image": np.zeros((5, 3), np.uint8), "label": np.array([0, 0, 0, 1, 1])}
    >>> evaluate(model, zeros, data, batch_size=2)["accuracy"]
    0.6
    """
    if (
        isinstance(batch_size, bool)
        or not isinstance(batch_size, int | np.integer)
        or batch_size < 1
    ):
        raise ArgumentError(f"batch_size must be a positive integer; got {batch_size!r}.")
    _check_params(params)
    examples = _to_features(data)
    check_examples(model, examples, where="evaluate")
    examples = {name: examples[name] for name in model.input_spec}
    num_examples = len(next(iter(examples.values())))
    if num_examples == 0:
        raise DataError("evaluate: there are no examples. Give at least one.")
    # Small data: a shorter batch, of a length that other small data share.
    size = min(batch_size, 1 << (num_examples - 1).bit_length())
    return _finish_on_host(_sum_over_batches(model.loss, params, examples, num_examples, size))


def _to_features(data: Any) -> Mapping[str, Any]:
    if isinstance(data, FederatedDataset):
        return data.examples
    if not isinstance(data, Mapping):
        raise DataError(
            "evaluate: data must be a dict of arrays with a common leading axis, or a "
            f"FederatedDataset; got {type(data).__name__}.{_REMEDIES.get(type(data), '')}"
        )
    return data


def _check_params(params: Any) -> None:
    """Raises for a state, None, an algorithm: what is passed by mistake for a model's variables."""
    is_state = isinstance(params, tuple) and hasattr(params, "params")
    leaves = jax.tree.leaves(params)
    kinds = jax.Array | np.ndarray | np.number | np.bool_ | int | float
    if params is None or is_state or not all(isinstance(x, kinds) for x in leaves):
        raise FederatedTypeError(
            "evaluate: params must be the variables of the model, a pytree of arrays; got "
            f"{type(params).__name__}. Pass state.params, of the state that a training returned."
        )


def _batches(
    examples: Mapping[str, Any], num_examples: int, size: int
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Slices of `size` rows with their masks; the last is filled up with zeros."""
    for start in range(0, num_examples, size):
        rows = {name: np.asarray(value[start : start + size]) for name, value in examples.items()}
        count = min(size, num_examples - start)
        if count < size:
            rows = {name: _padded(value, size) for name, value in rows.items()}
        yield rows, np.arange(size) < count


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])


# Static by identity: a second evaluation of the same model finds its program.
@functools.partial(jax.jit, static_argnames="loss")
def _measure(variables: Any, batch: Any, mask: Any, *, loss: LossFn) -> Stats:
    _, (stats, _) = loss(None, variables, batch, mask, False)
    return {name: stat for name, stat in stats.items() if name != "num_batches"}


def _sum_over_batches(
    loss: LossFn, variables: Any, examples: Mapping[str, Any], num_examples: int, size: int
) -> Stats:
    measured = (
        _measure(variables, batch, mask, loss=loss)
        for batch, mask in _batches(examples, num_examples, size)
    )
    return functools.reduce(merge, (jax.tree.map(_widen, stats) for stats in _pulled(measured)))


def _pulled(measured: Iterator[Stats]) -> Iterator[Stats]:
    """The stats on the host, each waited for only when later ones are on their way."""
    in_flight: collections.deque[Stats] = collections.deque()
    for stats in measured:
        in_flight.append(stats)
        if len(in_flight) > _BATCHES_IN_FLIGHT:
            yield jax.device_get(in_flight.popleft())
    yield from jax.device_get(list(in_flight))


def _widen(total: np.ndarray) -> np.ndarray:
    is_integer = np.issubdtype(total.dtype, np.integer)
    return np.asarray(total, np.int64 if is_integer else np.float64)


def _finish_on_host(stats: Mapping[str, Mean | Sum]) -> dict[str, float]:
    """As `metrics.finish`, in the precision of Python's floats."""
    return {name: _number(stat) for name, stat in stats.items()}


def _number(stat: Mean | Sum) -> float:
    if isinstance(stat, Mean):
        return float(stat.total) / float(stat.weight) if stat.weight else 0.0
    return np.asarray(stat.total).item()


def check_examples(model: Model, examples: Mapping[str, Any], *, where: str) -> None:
    """Checks examples against a model on the host, before anything is compiled.

    Values are looked at only if they are there: under a JAX transformation names, shapes and dtypes
    are checked, labels are not.

    Args:
      model: whose `input_spec` and `num_classes` the examples must fit.
      examples: features, each ``[examples, ...]``; those that the model does not know are ignored.
      where: who asks, to begin the message with.

    Raises:
      DataError: a feature is missing, features differ in length, or a label is out of range.
      FederatedTypeError: a feature has another shape or kind of dtype.
    """
    check_names(examples, model.input_spec, where=where)
    for name, spec in model.input_spec.items():
        is_image = name == model.image_key
        check_feature(name, examples[name], spec, is_image=is_image, where=where)
    check_lengths({name: examples[name] for name in model.input_spec}, where=where)
    labels = examples.get(model.label_key)
    if model.num_classes is not None and _is_to_be_checked(labels, model.num_classes):
        _check_labels(np.asarray(labels), model.num_classes, model.label_key, where)
        _remember_checked(labels, model.num_classes)


# Labels on a device that are known to be right, by array: they never change, and looking at those
# of a whole dataset in each round would take longer than the round.
_CHECKED: dict[tuple[int, int], weakref.ref[jax.Array]] = {}


def _is_to_be_checked(labels: Any, num_classes: int) -> bool:
    if not isinstance(labels, jax.Array):
        return True
    if isinstance(labels, Tracer) or not labels.is_fully_addressable:
        return False
    known = _CHECKED.get((id(labels), num_classes))
    return known is None or known() is not labels


def _remember_checked(labels: Any, num_classes: int) -> None:
    if isinstance(labels, jax.Array):
        key = id(labels), num_classes
        _CHECKED[key] = weakref.ref(labels, lambda _: _CHECKED.pop(key, None))


def _check_labels(labels: np.ndarray, num_classes: int, name: str, where: str) -> None:
    is_bad = (labels < 0) | (labels >= num_classes)
    if is_bad.any():
        row = int(np.argmax(is_bad.reshape(len(labels), -1).any(axis=-1)))
        raise DataError(
            f"{where}: feature {name!r} must be in 0 .. {num_classes - 1}, the model's classes; "
            f"got {labels[row]} in row {row} ({int(is_bad.sum())} such rows). Correct the labels, "
            "or use a model with more classes."
        )
