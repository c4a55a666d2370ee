"""What a fold keeps from step to step: the structure, shapes and dtypes that it starts with."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_core.errors import FederatedTypeError
from fedjax_core.language import types


def as_arrays(tree: Any) -> Any:
    """Arrays with the dtypes that the leaves have; numbers of Python no longer adapt theirs."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), tree)


def keep_type(old: Any, new: Any, what: str) -> Any:
    """The next accumulator in the structure and dtypes of the one before.

    Args:
      old: pytree of arrays.
      new: what the user's function made of it.
      what: names the accumulator in errors.

    Raises:
      FederatedTypeError: naming the leaf that has another shape, or a dtype that is not kept
        without loss; floats may be rounded.
    """
    wanted = jax.tree_util.tree_leaves_with_path(old)
    found = dict(jax.tree_util.tree_leaves_with_path(new))
    leaves = []
    for path, x in wanted:
        y = found.pop(path, None)
        _check_leaf(x, y, f"{what} at {jax.tree_util.keystr(path) or 'the root'}")
        leaves.append(jnp.asarray(y, x.dtype))
    if found:
        extra = jax.tree_util.keystr(next(iter(found)))
        raise FederatedTypeError(
            f"{what}: expected the structure of the initial one, {jax.tree.structure(old)}, got "
            f"something at {extra} too; return the same structure each time."
        )
    return jax.tree.unflatten(jax.tree.structure(old), leaves)


def _check_leaf(old: jax.Array, new: Any, what: str) -> None:
    expected = f"{old.dtype}{list(old.shape)}"
    if new is None:
        raise FederatedTypeError(f"{what}: expected {expected}, got nothing; return it each time.")
    if jnp.shape(new) != old.shape:
        got = f"{jnp.result_type(new)}{list(jnp.shape(new))}"
        raise FederatedTypeError(f"{what}: expected {expected}, got {got}; start from that shape.")
    if not _holds(old.dtype, new):
        raise FederatedTypeError(
            f"{what}: expected {expected}, got {jnp.result_type(new)}; start from that dtype (0.0 "
            "for floats), or convert it with astype."
        )


def _holds(dtype: Any, value: Any) -> bool:
    """Whether `value` can be kept as `dtype`: floats are rounded, nothing else may be lost."""
    given = jnp.result_type(value)
    if given == dtype:
        return True
    if types.is_extended_dtype(given) or types.is_extended_dtype(dtype):
        return False
    if jnp.issubdtype(dtype, jnp.inexact):
        is_complex = jnp.issubdtype(given, jnp.complexfloating)
        return jnp.issubdtype(dtype, jnp.complexfloating) or not is_complex
    if dtype == jnp.bool_ or jnp.issubdtype(given, jnp.inexact):
        return False
    if given == jnp.bool_ or jnp.asarray(value).weak_type:
        return True
    wide, narrow = jnp.iinfo(dtype), jnp.iinfo(given)
    return wide.min <= narrow.min and narrow.max <= wide.max
