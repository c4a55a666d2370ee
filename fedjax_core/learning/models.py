"""What is learned: a model is a NamedTuple of pure functions.

Any network fits: `from_functions` takes an ``init`` and an ``apply``, `from_flax` takes a flax
module, linen or nnx. Both give the same guarantees to those who train:

* Padding is inert. Rows that the mask drops are replaced by rows that it keeps before the network
  sees them, so they change neither loss nor gradient, whatever they hold.
* Metrics come as sums (see `fedjax_core.learning.metrics`), so they can be added over anything.
* ``variables`` is all that travels: what is trained, sent, aggregated and saved.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from fedjax_core.errors import ArgumentError, FederatedTypeError
from fedjax_core.learning.features import (
    as_float,
    check_lengths,
    check_names,
    conform,
    fill_padding,
    to_input_spec,
)
from fedjax_core.learning.flax_modules import InitFn, RunFn, flax_functions, place_buffers
from fedjax_core.learning.metrics import (
    Mean,
    Metric,
    Sum,
    accuracy,
    softmax_cross_entropy,
)

# What a network gets, and what a caller may give.
Batch = Mapping[str, Array]
Features = Mapping[str, Array | np.ndarray]
Stats = dict[str, Mean | Sum]

_RESERVED = ("loss", "num_examples", "num_batches")


class LossFn(Protocol):
    """Loss and metrics of a batch."""

    def __call__(
        self,
        key: Array | None,
        variables: Any,
        batch: Features,
        mask: Bool[Array, " batch"],
        train: bool,
    ) -> tuple[Float[Array, ""], tuple[Stats, Any]]:
        """Measures one batch; differentiate the first result with respect to `variables`.

        Args:
          key: for dropout and the like; may be None for models that draw nothing.
          variables: as `Model.init` gives them.
          batch: the features of `Model.input_spec`, each ``[batch, ...]``.
          mask: bool ``[batch]``, False for padding.
          train: static; whether dropout and batch statistics are on.

        Returns:
          The mean loss over the examples that `mask` keeps (float32, 0 if there is none), and the
          pair of metric stats and `variables` with buffers updated. An optimiser's step is to be
          added to the latter; for models without buffers it is `variables` itself.
        """
        ...


class Model(NamedTuple):
    """A network, its loss and its metrics.

    Attributes:
      input_spec: shape and dtype of each feature of ONE example, without a batch axis.
      num_classes: labels are 0 .. num_classes - 1; None if the model does not classify.
      init: ``(key) -> variables``.
      loss: see `LossFn`. Its stats hold "loss" (a `Mean`), "num_examples" and "num_batches" (int32
        `Sum`; a batch counts if it has an example), and the metrics of the user.
      predict: ``(variables, batch) -> predictions``, in evaluation mode; needs no labels.
      label_key: the feature that `num_classes` is about.
      image_key: the feature that may be stored as uint8 or as floats, whatever its dtype here.
    """

    input_spec: dict[str, jax.ShapeDtypeStruct]
    num_classes: int | None
    init: Callable[[Array], Any]
    loss: LossFn
    predict: Callable[[Any, Features], Any]
    label_key: str = "label"
    image_key: str | None = None


# (variables, batch, key, train) -> (predictions, variables with updated buffers)
_Forward = Callable[[Any, Batch, Array | None, bool], tuple[Any, Any]]


def from_functions(
    init: Callable[[Array], Any],
    apply: Callable[[Any, Batch, Array | None, bool], Any],
    *,
    loss: Callable[[Any, Batch], Float[Array, " batch"]],
    input_spec: Mapping[str, Any],
    metrics: Mapping[str, Metric] | None = None,
    num_classes: int | None = None,
    label_key: str = "label",
) -> Model:
    """A model of plain functions, written for a batch.

    Args:
      init: ``(key) -> variables``.
      apply: ``(variables, batch, key, train) -> predictions``; `key` may be None when it evaluates.
        Features come as they are stored, without any scaling.
      loss: ``(predictions, batch) -> losses``, one of each example, ``[batch]``.
      input_spec: shape and dtype of each feature of one example, without a batch axis.
      metrics: by name; None for accuracy if there is `num_classes`, else for none.
      num_classes: labels are 0 .. num_classes - 1, which is checked on the host; None for no check.
      label_key: the feature that holds the labels.

    Raises:
      ArgumentError: `input_spec`, `metrics` or `num_classes` are not what they should be.

    >>> spec = {"x": jax.ShapeDtypeStruct((), jnp.float32)}
    >>> squared = lambda predictions, batch: (predictions - batch["x"]) ** 2
    >>> constant = from_functions(
    ...     lambda key: jnp.float32(0.0), lambda w, batch, key, train: jnp.full_like(batch["x"], w),
    ...     loss=squared, input_spec=spec)
    >>> batch, mask = {"x": jnp.array([1.0, 3.0])}, jnp.array([True, True])
    >>> float(constant.loss(None, jnp.float32(0.0), batch, mask, train=False)[0])
    5.0
    """

    def forward(variables: Any, batch: Batch, key: Array | None, train: bool) -> tuple[Any, Any]:
        return apply(variables, batch, key, train), variables

    return _model(
        init,
        forward,
        loss,
        input_spec=to_input_spec(input_spec),
        metrics=metrics,
        num_classes=num_classes,
        label_key=label_key,
    )


def from_flax(
    module: Any,
    *,
    input_spec: Mapping[str, Any],
    loss: Callable[[Any, Batch], Float[Array, " batch"]] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    num_classes: int | None = None,
    input_key: str = "image",
    label_key: str = "label",
    rngs: Sequence[str] = ("dropout",),
    mutable: Literal["average", "frozen"] | None = None,
) -> Model:
    """A model of a flax module that maps ``[batch, ...]`` inputs to predictions.

    Inputs stored as uint8 are scaled by 1/255 to float32, floats are taken as they are
    (`as_float`); an ``input_spec`` with another integer dtype, of tokens say, passes them on
    unchanged. A ``__call__`` with an argument ``train`` (or ``training``, ``deterministic``,
    ``use_running_average``) is told whether it trains.

    Args:
      module: a linen module; an nnx module (its own parameters are then the initial ones, whatever
        the key); or a function ``rngs -> nnx module``, as ``functools.partial(Network, 784, 10)``.
      input_spec: shape and dtype of each feature of one example, without a batch axis.
      loss: ``(predictions, batch) -> losses``, one of each example, ``[batch]``; None for softmax
        cross entropy of logits ``[batch, classes]``.
      metrics: by name; None for accuracy if the model classifies, else for none.
      num_classes: labels are 0 .. num_classes - 1; None takes the number of logits if `loss` is
        None.
      input_key: the feature that the module gets.
      label_key: the feature that holds the labels.
      rngs: names of the random streams that a linen module draws from while it trains.
      mutable: what becomes of buffers, such as the running statistics of batch normalisation.
        "average": they are part of the variables, updated by training and aggregated like the rest.
        "frozen": they keep their initial values (of a key 0, or those of the nnx module given), are
        used in training too, and do not travel. None: a module with buffers is refused.

    Returns:
      The model. Its variables are the module's parameters; with "average", ``{"params": ...}`` and
      each collection of buffers beside it.

    Raises:
      ArgumentError: the module has buffers and `mutable` does not say what to do with them; the
        number of classes disagrees with the logits; or an argument is not what it should be.

    Note:
      A module whose ``__call__`` takes ``train`` but not ``use_running_average`` runs with frozen
      buffers in evaluation mode altogether, so its dropout is off as well.
      With "average", the gradient of buffers is exactly 0, so any optimiser without weight decay
      leaves them alone; mask the decay (``optax.masked``) if there is one.

    >>> from flax import linen
    >>> spec = {"image": jax.ShapeDtypeStruct((4,), jnp.float32),
    ...         "label": jax.ShapeDtypeStruct((), jnp.int32)}
    >>> model = from_flax(linen.Dense(3), input_spec=spec)
    >>> model.num_classes, model.init(jax.random.key(0))["kernel"].shape
    (3, (4, 3))
    """
    spec = to_input_spec(input_spec)
    check_names(spec, (input_key,), where="input_spec")
    input_dtype = spec[input_key].dtype
    is_image = input_dtype == jnp.uint8 or jnp.issubdtype(input_dtype, jnp.floating)
    example = np.zeros((1, *spec[input_key].shape), jnp.float32 if is_image else input_dtype)
    functions = flax_functions(module, example, tuple(rngs))
    init, run = place_buffers(functions, mutable)

    def forward(variables: Any, batch: Batch, key: Array | None, train: bool) -> tuple[Any, Any]:
        inputs = as_float(batch[input_key]) if is_image else batch[input_key]
        return run(variables, inputs, key, train)

    if loss is None:
        num_classes = _number_of_logits(init, run, example, num_classes)
        loss = functools.partial(_label_loss, label_key=label_key)
    return _model(
        init,
        forward,
        loss,
        input_spec=spec,
        metrics=metrics,
        num_classes=num_classes,
        label_key=label_key,
        image_key=input_key if is_image else None,
    )


def _label_loss(predictions: Any, batch: Batch, *, label_key: str) -> Float[Array, " batch"]:
    return softmax_cross_entropy(predictions, batch[label_key])


def _number_of_logits(init: InitFn, run: RunFn, example: np.ndarray, expected: int | None) -> int:
    predictions = jax.eval_shape(
        lambda key: run(init(key), jnp.asarray(example), None, False)[0], jax.random.key(0)
    )
    shape = getattr(predictions, "shape", None)
    if shape is None or len(shape) != 2:
        raise ArgumentError(
            "Without loss=, the module must give logits [batch, classes], for softmax cross "
            f"entropy; it gives {predictions}. Pass loss=, a function (predictions, batch) -> "
            "losses [batch]."
        )
    if expected is not None and expected != shape[1]:
        raise ArgumentError(
            f"num_classes={expected}, but the module gives {shape[1]} logits. Make them equal, or "
            "leave num_classes out."
        )
    return shape[1]


def _to_metrics(
    metrics: Mapping[str, Metric] | None, num_classes: int | None, label_key: str
) -> dict[str, Metric]:
    if metrics is None:
        is_classifier = num_classes is not None
        return (
            {"accuracy": functools.partial(accuracy, label_key=label_key)} if is_classifier else {}
        )
    if not isinstance(metrics, Mapping):
        raise ArgumentError(
            "metrics must map names to functions (predictions, batch, mask) -> Mean or Sum, like "
            f'{{"accuracy": accuracy}}; got {metrics!r}.'
        )
    for name, metric in metrics.items():
        if name in _RESERVED or not callable(metric):
            raise ArgumentError(
                "metrics must map names to functions (predictions, batch, mask) -> Mean or Sum, "
                f"and every model has {', '.join(_RESERVED)} already; got {name!r}: {metric!r}."
            )
    return dict(metrics)


def _check_num_classes(num_classes: int | None, spec: Mapping[str, Any], label_key: str) -> None:
    if num_classes is None:
        return
    if (
        isinstance(num_classes, bool)
        or not isinstance(num_classes, int | np.integer)
        or num_classes < 1
    ):
        raise ArgumentError(f"num_classes must be a positive integer or None; got {num_classes!r}.")
    check_names(spec, (label_key,), where="input_spec")


def _checked_losses(losses: Any, mask: Array) -> Array:
    if jnp.shape(losses) != mask.shape:
        raise FederatedTypeError(
            f"loss must give one loss of each example, of shape {list(mask.shape)}; got shape "
            f"{list(jnp.shape(losses))}. Leave out the mean over the batch, it is taken here."
        )
    return losses


def _checked_stat(name: str, stat: Any) -> Mean | Sum:
    """A metric's result as it can be added up: scalars of at least 32 bits."""
    if not isinstance(stat, Mean | Sum):
        raise FederatedTypeError(
            f"metric {name!r} must give a Mean or a Sum of scalars; got {type(stat).__name__}. "
            "Return metrics.Mean.of(values, mask), or metrics.Sum(total)."
        )
    return type(stat)(*(_wide_scalar(name, total) for total in stat))


def _wide_scalar(name: str, total: Any) -> Array:
    shape, dtype = jnp.shape(total), jnp.result_type(total)
    is_float = jnp.issubdtype(dtype, jnp.floating)
    if shape or not (is_float or dtype == jnp.bool_ or jnp.issubdtype(dtype, jnp.integer)):
        raise FederatedTypeError(
            f"metric {name!r} must give a Mean or a Sum of real scalars; got one of "
            f"{dtype}{list(shape)}. Sum over the batch, and give each entry a metric of its own."
        )
    # Sums over many batches would wrap around or overflow in fewer bits.
    is_narrow = dtype.itemsize < 4
    return jnp.asarray(total, (jnp.float32 if is_float else jnp.int32) if is_narrow else dtype)


def _model(
    init: InitFn,
    forward: _Forward,
    loss: Callable[[Any, Batch], Array],
    *,
    input_spec: dict[str, jax.ShapeDtypeStruct],
    metrics: Mapping[str, Metric] | None,
    num_classes: int | None,
    label_key: str,
    image_key: str | None = None,
) -> Model:
    """Puts mask, metrics and checks around a network."""
    _check_num_classes(num_classes, input_spec, label_key)
    measures = _to_metrics(metrics, num_classes, label_key)

    def masked_loss(
        key: Array | None, variables: Any, batch: Features, mask: Array, train: bool
    ) -> tuple[Array, tuple[Stats, Any]]:
        check_names(batch, input_spec, where="loss")
        known = conform(batch, input_spec, image_key=image_key, where="loss")
        check_lengths({**known, "mask": mask}, where="loss")
        filled = fill_padding(known, mask)
        predictions, after = forward(variables, filled, key, train)
        mean_loss = Mean.of(_checked_losses(loss(predictions, filled), mask), mask)
        stats: Stats = {"loss": mean_loss, **_counts(mask)}
        for name, measure in measures.items():
            stats[name] = _checked_stat(name, measure(predictions, filled, mask))
        return mean_loss.result(), (stats, _unless_empty(mask, after, variables))

    def predict(variables: Any, batch: Features) -> Any:
        known = conform(batch, input_spec, image_key=image_key, where="predict")
        return forward(variables, known, None, False)[0]

    return Model(input_spec, num_classes, init, masked_loss, predict, label_key, image_key)


def _counts(mask: Array) -> Stats:
    return {
        "num_examples": Sum(jnp.sum(mask, dtype=jnp.int32)),
        "num_batches": Sum(jnp.any(mask).astype(jnp.int32)),
    }


def _unless_empty(mask: Array, after: Any, before: Any) -> Any:
    """A batch without examples moves no buffer."""
    if after is before:
        return before
    return jax.tree.map(lambda new, old: jnp.where(jnp.any(mask), new, old), after, before)
