"""What can be done with values of a type: sums, averages, smallest and largest, secure sums.

For each there is a predicate, and a function that says which leaf stands in the way.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from fedjax_core.errors import FederatedTypeError
from fedjax_core.language.base_types import at_path, shorten, step_to
from fedjax_core.language.dtypes import is_extended_dtype, is_str
from fedjax_core.language.types import FederatedType, StructType, TensorType, Type


def why_not_summable(t: Type) -> str | None:
    """Why values of type `t` cannot be added, naming the leaf; None if they can.

    Numbers of fixed shape can, and structs of them.

    Examples:
      >>> from fedjax_core.language.notation import parse_type
      >>> why_not_summable(parse_type("<w=float32[3],mask=bool>"))
      'bool cannot be summed at .mask'
    """
    return _why_not(t, jnp.number, "summed")


def why_not_averageable(t: Type) -> str | None:
    """Why values of type `t` cannot be averaged, naming the leaf; None if they can.

    Floating-point and complex numbers of fixed shape can, and structs of them.

    Examples:
      >>> from fedjax_core.language.notation import parse_type
      >>> why_not_averageable(parse_type("<float32,int32>"))
      'int32 cannot be averaged at [1]'
    """
    return _why_not(t, jnp.inexact, "averaged")


def why_not_orderable(t: Type) -> str | None:
    """Why values of type `t` have no smallest and largest, naming the leaf; None if they have.

    Real numbers of fixed shape have, and structs of them.

    Examples:
      >>> from fedjax_core.language.notation import parse_type
      >>> why_not_orderable(parse_type("complex64"))
      'complex64 cannot be ordered'
    """
    return _why_not(t, (jnp.integer, jnp.floating), "ordered")


def why_not_integers(t: Type) -> str | None:
    """Why values of type `t` cannot be summed securely, naming the leaf; None if they can.

    Integers of fixed shape can, and structs of them.

    Examples:
      >>> from fedjax_core.language.notation import parse_type
      >>> why_not_integers(parse_type("<w=int32[3],b=float32>"))
      'float32 cannot be summed securely at .b'
    """
    return _why_not(t, jnp.integer, "summed securely")


def is_sum_compatible(t: Type) -> bool:
    """Whether values of type `t` can be added, see `why_not_summable`."""
    return why_not_summable(t) is None


def is_average_compatible(t: Type) -> bool:
    """Whether values of type `t` can be averaged, see `why_not_averageable`."""
    return why_not_averageable(t) is None


def is_min_max_compatible(t: Type) -> bool:
    """Whether values of type `t` have a smallest and a largest, see `why_not_orderable`."""
    return why_not_orderable(t) is None


def is_integer_compatible(t: Type) -> bool:
    """Whether values of type `t` are integers, for secure sums; see `why_not_integers`."""
    return why_not_integers(t) is None


def check_sum_compatible(t: Type, what: str = "the value") -> None:
    """Raises `FederatedTypeError` unless values of type `t` can be added.

    Args:
      t: the type of a value.
      what: names the value in the message.

    Raises:
      FederatedTypeError: naming the leaf that cannot be added.
    """
    reason = why_not_summable(t)
    if reason is not None:
        raise FederatedTypeError(
            f"Expected {what} to be numbers of fixed shape, got type {shorten(t)}: {reason}; "
            "convert it, for example with astype, in federated_map."
        )


def _why_not(t: Type, kinds: Any, verb: str) -> str | None:
    def has_kind(dtype: Any) -> bool:
        if is_extended_dtype(dtype) or is_str(dtype):
            return False
        each = kinds if isinstance(kinds, tuple) else (kinds,)
        return any(jnp.issubdtype(dtype, kind) for kind in each)

    return _first_unfit(t, has_kind, verb, "")


def _first_unfit(t: Type, has_kind: Callable[[Any], bool], verb: str, path: str) -> str | None:
    match t:
        case FederatedType(member):
            return _first_unfit(member, has_kind, verb, path)
        case StructType(elements):
            steps = ((step_to(name, i), child) for i, (name, child) in enumerate(elements))
            found = (_first_unfit(child, has_kind, verb, path + step) for step, child in steps)
            return next((reason for reason in found if reason is not None), None)
        case TensorType(dtype, shape) if has_kind(dtype):
            is_fixed = shape is not None and None not in shape
            return None if is_fixed else f"{t} of unknown shape cannot be {verb}{at_path(path)}"
    return f"{shorten(t)} cannot be {verb}{at_path(path)}"
