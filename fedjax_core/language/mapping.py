"""Local computations on placed values, and constants: what never crosses between placements."""

import inspect
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from fedjax_core.errors import FederatedTypeError, PlacementError
from fedjax_core.language import inference
from fedjax_core.language.feeding import to_member
from fedjax_core.language.local import JaxComputation, name_of, trace_local
from fedjax_core.language.placements import CLIENTS, SERVER, Placement
from fedjax_core.language.program import Constant, Map
from fedjax_core.language.tracing import (
    Value,
    current_builder,
    location,
    position_of,
    zip_values,
)
from fedjax_core.language.types import FederatedType, TensorType


def federated_value(value: Any, placement: Placement) -> Value:
    """A constant at a placement: `T -> T@P`, the same at all members.

    Args:
      value: a pytree of numbers or arrays.
      placement: `CLIENTS` or `SERVER`.

    Raises:
      FederatedTypeError: if `value` is placed already.
    """
    builder = current_builder("federated_value")
    if any(isinstance(leaf, Value) for leaf in jax.tree.leaves(value)):
        raise FederatedTypeError(f"federated_value: expected an unplaced constant, got {value!r}.")
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value)):
        raise FederatedTypeError(
            f"federated_value: expected a constant, got {value!r}, which JAX is tracing; pass it "
            "as an argument instead."
        )
    member = inference.infer_type(value)
    t = FederatedType(member, placement, all_equal=True)
    constant = to_member(value, member, "federated_value")
    return builder.add(Constant(type=t, value=constant, location=location()))


def federated_zip(values: Any) -> Value:
    """Makes one placed struct of values at one placement: `<{T}@P,{U}@P> -> {<T,U>}@P`."""
    return zip_values(values, "federated_zip")


def federated_map(function: Any, arg: Any, *more: Any) -> Value:
    """Applies a local computation to each member: `<(T -> U),{T}@P> -> {U}@P`.

    Args:
      function: a `jax_computation` or any JAX function; traced once for the types it meets.
      arg: a placed value, or a struct of values at one placement. A tuple or list of values is
        spread over the parameters of a function that has as many.
      *more: further arguments, for functions of several.

    Returns:
      The results, where the arguments are: `{U}@CLIENTS` or `U@SERVER`.

    Raises:
      FederatedTypeError: naming the function and the argument whose type does not fit.
    """
    builder = current_builder("federated_map")
    args = _spread(function, arg) if not more else (arg, *more)
    what = f"federated_map of `{name_of(getattr(function, 'function', function))}`"
    values = tuple(zip_values(value, what) for value in args)
    placement = _common_placement(values, what)
    members = tuple(federated_type_of(value, what).member for value in values)
    inputs = tuple(position_of(value, builder, what) for value in values)
    local = trace_local(function, members, what)
    t = FederatedType(local.result, placement)
    return builder.add(Map(type=t, inputs=inputs, local=local, location=location()))


def _spread(function: Any, arg: Any) -> tuple[Any, ...]:
    """The positional arguments that a single argument of `federated_map` stands for."""
    count = _num_parameters(function)
    if isinstance(arg, tuple | list) and not hasattr(arg, "_fields") and count == len(arg) > 1:
        return tuple(arg)
    if isinstance(arg, Value) and count is not None and count > 1:
        return tuple(arg)
    return (arg,)


def _num_parameters(function: Any) -> int | None:
    if isinstance(function, JaxComputation):
        return len(function.parameters)
    if isinstance(getattr(function, "nin", None), int):  # jnp.add and its kin
        return function.nin
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    required = [
        p
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(required)


def federated_type_of(value: Value, what: str) -> FederatedType:
    """The type of a placed value; `what` names the operator in the error for any other."""
    if not isinstance(value.type_signature, FederatedType):
        raise PlacementError(
            f"{what}: expected a placed value, got one of type {value.type_signature}."
        )
    return value.type_signature


def _common_placement(values: tuple[Value, ...], what: str) -> Placement:
    placements = {federated_type_of(value, what).placement for value in values}
    if len(placements) > 1:
        raise PlacementError(
            f"{what}: expected all arguments at one placement, got "
            f"{[str(value.type_signature) for value in values]}; broadcast the server's first."
        )
    return placements.pop()


def placed(value: Any, placement: Placement, what: str) -> Value:
    """`value`, zipped if it is a struct of values; raises unless it is at `placement`."""
    value = zip_values(value, what)
    t = federated_type_of(value, what)
    if t.placement is not placement:
        remedy = "aggregate it first" if placement is SERVER else "broadcast it first"
        raise PlacementError(f"{what}: expected a value at {placement}, got {t}; {remedy}.")
    return value


def presence(present: Value | None, what: str) -> tuple[Value, ...]:
    """The input that says who is present, if there is one; it has to be bool at the clients."""
    if present is None:
        return ()
    present = placed(present, CLIENTS, what)
    if federated_type_of(present, what).member != TensorType(np.bool_):
        raise FederatedTypeError(
            f"{what}: expected `present` of type {{bool}}@CLIENTS, got {present.type_signature}."
        )
    return (present,)
