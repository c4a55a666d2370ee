"""The features of a batch against the specification of one example."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool

from fedjax_core.errors import ArgumentError, DataError, FederatedTypeError

InputSpec = Mapping[str, jax.ShapeDtypeStruct]


def as_float(image: Array | np.ndarray) -> Array:
    """An image for a network: uint8 is scaled by 1/255 to float32, floats are taken as they are.

    Args:
      image: any shape; uint8 in 0 .. 255, or a floating dtype.

    Raises:
      FederatedTypeError: the dtype is neither uint8 nor floating.

    >>> [float(x) for x in as_float(jnp.array([0, 255], jnp.uint8))]
    [0.0, 1.0]
    """
    image = jnp.asarray(image)
    if image.dtype == jnp.uint8:
        return image.astype(jnp.float32) / 255
    if jnp.issubdtype(image.dtype, jnp.floating):
        return image
    raise FederatedTypeError(
        f"An image must be stored as uint8 (0 .. 255) or as floats; got {image.dtype}. Convert it, "
        "for example with .astype(np.uint8)."
    )


def to_input_spec(input_spec: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Checks the specification of one example and gives its features as `ShapeDtypeStruct`.

    Raises:
      ArgumentError: it is not a mapping of names to things with a shape and a dtype.
    """
    if not isinstance(input_spec, Mapping) or not input_spec:
        raise ArgumentError(
            "input_spec must map the names of the features of one example to jax.ShapeDtypeStruct, "
            f'like {{"image": jax.ShapeDtypeStruct((28, 28, 1), jnp.uint8)}}; got {input_spec!r}.'
        )
    for name, spec in input_spec.items():
        if not (hasattr(spec, "shape") and hasattr(spec, "dtype")):
            raise ArgumentError(
                f"input_spec[{name!r}] must have a shape (without a batch axis) and a dtype, as "
                f"jax.ShapeDtypeStruct has; got {spec!r}."
            )
    return {
        name: jax.ShapeDtypeStruct(tuple(spec.shape), spec.dtype)
        for name, spec in input_spec.items()
    }


def _without_trailing_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _dtype_fits(dtype: np.dtype, expected: np.dtype, is_image: bool) -> bool:
    if is_image:
        return dtype == jnp.uint8 or jnp.issubdtype(dtype, jnp.floating)
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    return any(jnp.issubdtype(dtype, k) and jnp.issubdtype(expected, k) for k in kinds)


def check_feature(
    name: str, value: Any, spec: jax.ShapeDtypeStruct, *, is_image: bool, where: str
) -> None:
    """Checks the shape and the kind of dtype of one feature, ``[examples, ...]``, as stored.

    Trailing axes of size 1 may be there or not: ``[n, 28, 28]`` fits ``[28, 28, 1]``.

    Raises:
      FederatedTypeError: `value` is no array, or they do not fit `spec`.
    """
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise FederatedTypeError(
            f"{where}: feature {name!r} must be an array; got {type(value).__name__}. Convert it "
            "with np.asarray."
        )
    shape, dtype = tuple(value.shape), np.dtype(value.dtype)
    fits = _without_trailing_ones(shape[1:]) == _without_trailing_ones(spec.shape)
    if not shape or not fits:
        raise FederatedTypeError(
            f"{where}: feature {name!r} must have the shape [examples, *{list(spec.shape)}]; got "
            f"{list(shape)}. Reshape the data, or give the model an input_spec that fits it."
        )
    if not _dtype_fits(dtype, np.dtype(spec.dtype), is_image):
        expected = "uint8 or floats" if is_image else f"the kind of {spec.dtype}"
        raise FederatedTypeError(
            f"{where}: feature {name!r} must be {expected}; got {dtype}. Convert it with .astype."
        )


def check_names(features: Collection[str], needed: Collection[str], *, where: str) -> None:
    """Checks that every feature of `needed` is there; more features are fine.

    Raises:
      DataError: one is missing.
    """
    missing = sorted(set(needed) - set(features))
    if missing:
        raise DataError(
            f"{where}: the model needs the features {sorted(needed)}, but {missing} are missing "
            f"from {sorted(features)}. Rename the features, or give the model an input_spec with "
            "the names of the data."
        )


def check_lengths(features: Mapping[str, Any], *, where: str) -> int:
    """Checks that all features have one number of examples, and returns it.

    Raises:
      DataError: they differ.
    """
    lengths = {name: len(value) for name, value in features.items()}
    if len(set(lengths.values())) != 1:
        raise DataError(
            f"{where}: features must have one common number of examples along their first axis; "
            f"got {lengths}. Give each example all features."
        )
    return next(iter(lengths.values()))


def conform(
    batch: Mapping[str, Any], input_spec: InputSpec, *, image_key: str | None, where: str
) -> dict[str, Array]:
    """The features of `input_spec` that `batch` has, each as ``[batch, *spec.shape]``.

    Works on tracers. Features that `input_spec` does not know are left out.

    Raises:
      FederatedTypeError: a shape or a dtype does not fit.
    """
    result = {}
    for name, spec in input_spec.items():
        if name in batch:
            value = batch[name]
            check_feature(name, value, spec, is_image=name == image_key, where=where)
            result[name] = jnp.reshape(value, (value.shape[0], *spec.shape))
    return result


def fill_padding(batch: Mapping[str, Array], mask: Bool[Array, " batch"]) -> dict[str, Array]:
    """Replaces the rows that `mask` drops by the rows it keeps, in turn; by zeros if it keeps none.

    Real rows are the safe filling: a masked sum alone does not protect the gradient from
    ``0 * inf``, and statistics over the batch stay those of real examples.

    Args:
      batch: features, each ``[batch, ...]``.
      mask: bool ``[batch]``.

    >>> rows = jnp.array([1.0, 2.0, jnp.nan, jnp.nan, jnp.nan])
    >>> filled = fill_padding({"x": rows}, jnp.array([True, True, False, False, False]))
    >>> [float(x) for x in filled["x"]]
    [1.0, 2.0, 1.0, 2.0, 1.0]
    """
    index = jnp.arange(mask.shape[0])
    kept_first = jnp.argsort(~mask, stable=True)
    num_kept = jnp.sum(mask, dtype=jnp.int32)
    in_turn = jnp.take(kept_first, index % jnp.maximum(num_kept, 1), mode="clip")
    source = jnp.where(mask, index, in_turn)

    def fill(rows: Array) -> Array:
        filled = jnp.take(rows, source, axis=0, mode="clip")
        return lax.select(num_kept > 0, filled, lax.full_like(filled, 0))

    return {name: fill(rows) for name, rows in batch.items()}
