"""Checks with one wording: whether a type fits another, and whether a function takes arguments."""

import inspect
from collections.abc import Callable
from typing import Any

from fedjax_core.errors import FederatedTypeError, PlacementError
from fedjax_core.language.placements import CLIENTS
from fedjax_core.language.types import FederatedType, FunctionType, Type


def check_fits(expected: Type, given: Type, what: str) -> None:
    """Raises unless a value of type `given` may be used where `expected` is wanted.

    Raises:
      PlacementError: if it lives elsewhere.
      FederatedTypeError: if the types differ in another way.
    """
    try:
        expected.check_assignable_from(given, what)
    except FederatedTypeError as error:
        is_elsewhere, remedy = _remedy(expected, given)
        kind = PlacementError if is_elsewhere else FederatedTypeError
        raise kind(f"{str(error).rstrip('.')}; {remedy}.") from None


def _remedy(expected: Type, given: Type) -> tuple[bool, str]:
    """Whether values of these types live at different placements, and what to do about it."""
    if isinstance(expected, FunctionType) or isinstance(given, FunctionType):
        return False, f"pass a value of type {expected}"
    if isinstance(expected, FederatedType):
        if not isinstance(given, FederatedType):
            return True, "place it with federated_value"
        if expected.placement is not given.placement:
            remedy = "broadcast it first" if expected.placement is CLIENTS else "aggregate it first"
            return True, f"pass a value at {expected.placement}, {remedy}"
        if expected.member.is_assignable_from(given.member):
            return False, "broadcast it from the server, so that all clients have the same value"
    elif isinstance(given, FederatedType):
        return True, "compute with it where it is, in federated_map"
    if _shape_of(expected) is not _shape_of(given):
        return False, "give it the same structure"
    return False, "convert it, for example with astype, or declare another type"


def _shape_of(t: Type) -> type[Type]:
    """Whether a member's value is a tensor, a struct or a sequence."""
    return type(t.member if isinstance(t, FederatedType) else t)


def check_takes(function: Callable[..., Any], num_args: int, what: str) -> None:
    """Raises unless `function` can be called with so many positional arguments.

    Raises:
      FederatedTypeError: with the function's parameters.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*range(num_args))
    except TypeError as error:
        count = "1 argument" if num_args == 1 else f"{num_args} arguments"
        raise FederatedTypeError(
            f"{what}: expected a function of {count}, got one that takes {signature} ({error}); "
            "change its parameters, or what it is given."
        ) from error
