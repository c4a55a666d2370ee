"""Local computations on placed values, and constants: what never crosses between placements."""

import inspect
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from fedjax_core.errors import FederatedTypeError, PlacementError
from fedjax_core.language import inference
from fedjax_core.language.checks import check_takes
from fedjax_core.language.feeding import contains_str, to_member
from fedjax_core.language.local import Local, TypedFunction, name_of, trace_local
from fedjax_core.language.locations import location
from fedjax_core.language.placements import CLIENTS, SERVER, Placement
from fedjax_core.language.program import Broadcast, Constant, Map, Place, type_bits
from fedjax_core.language.tracing import (
    Value,
    apply_function,
    as_value,
    common_placement,
    current_builder,
    explain,
    is_placed,
    member_of,
    operator,
    position_of,
    zip_values,
)
from fedjax_core.language.types import (
    FederatedType,
    FunctionType,
    StructType,
    TensorType,
    Type,
)


@operator
def federated_value(value: Any, placement: Placement) -> Value:
    """Puts a value at a placement, the same for all members: `T -> T@P`.

    A constant is part of the program and costs nothing. An unplaced value of the body comes from
    the caller: at the clients it is one that the server has sent them.

    Args:
      value: a pytree of numbers or arrays, or an unplaced value.
      placement: `CLIENTS` or `SERVER`.

    Raises:
      FederatedTypeError: if `value` is no pytree of arrays.
      PlacementError: if `value` is placed already, or there is no such placement.
    """
    builder = current_builder("federated_value")
    if not isinstance(placement, Placement):
        raise PlacementError(
            f"federated_value: expected CLIENTS or SERVER as the placement, got {placement!r}; "
            "pass fc.CLIENTS or fc.SERVER."
        )
    leaves = jax.tree.leaves(value, is_leaf=lambda x: isinstance(x, Value))
    if any(isinstance(leaf, Value) for leaf in leaves):
        return _place(zip_values(value, "federated_value"), placement)
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        raise FederatedTypeError(
            f"federated_value: expected a constant, got {value!r}, which JAX is tracing; pass it "
            "as an argument instead."
        )
    member = inference.infer_type(value)
    t = FederatedType(member, placement, all_equal=True)
    stored = value if contains_str(member) else to_member(value, member, "federated_value")
    return builder.add(Constant(type=t, value=stored, location=location()))


def _place(value: Value, placement: Placement) -> Value:
    if is_placed(value):
        raise PlacementError(
            f"federated_value: expected an unplaced value, got one of type {value.type_signature}; "
            "move it with federated_broadcast or an aggregation."
        )
    builder = current_builder("federated_value")
    t = FederatedType(value.type_signature, SERVER)
    inputs = (position_of(value, builder, "federated_value"),)
    at_server = builder.add(Place(type=t, inputs=inputs, location=location()))
    if placement is SERVER:
        return at_server
    type_bits(t)  # refuses what has no size
    sent = FederatedType(t.member, CLIENTS, all_equal=True)
    inputs = (position_of(at_server, builder, "federated_value"),)
    return builder.add(Broadcast(type=sent, inputs=inputs, label="argument", location=location()))


@operator
def federated_zip(values: Any) -> Value:
    """Makes one placed struct of values at one placement: `<{T}@P,{U}@P> -> {<T,U>}@P`."""
    value = zip_values(values, "federated_zip")
    federated_type_of(value, "federated_zip")
    return value


@operator
def federated_map(function: Any, arg: Any, *more: Any) -> Value:
    """Applies a local computation to each member: `<(T -> U),{T}@P> -> {U}@P`.

    Args:
      function: a `jax_computation`, any JAX function, or a function that is a parameter of the
        computation. Traced once for the types it meets.
      arg: a placed value, or a struct of values at one placement. A tuple or list of values is
        spread over the parameters of a function that has as many.
      *more: further arguments, for functions of several.

    Returns:
      The results, where the arguments are: `{U}@CLIENTS` or `U@SERVER`.

    Raises:
      FederatedTypeError: naming the function and the argument whose type does not fit.
    """
    args = _spread(function, arg) if not more else (arg, *more)
    what = f"federated_map of `{name_of(getattr(function, 'function', function))}`"
    values = tuple(zip_values(value, what) for value in args)
    for value in values:
        federated_type_of(value, what)
    if isinstance(function, Value):
        return apply_function(function, values)
    return apply_local(function, values, what)


@operator
def federated_eval(function: Any, placement: Placement) -> Value:
    """Evaluates a function without arguments: `<( -> T)> -> {T}@CLIENTS` or `T@SERVER`.

    Args:
      function: a `jax_computation` without parameters, or any JAX function without arguments. It is
        traced once: one that draws random numbers takes a key as an argument, in federated_map.
      placement: `CLIENTS` or `SERVER`.

    Raises:
      FederatedTypeError: if the function takes arguments.
      PlacementError: if there is no such placement.
    """
    what = f"federated_eval of `{name_of(getattr(function, 'function', function))}`"
    builder = current_builder(what)
    if not isinstance(placement, Placement):
        raise PlacementError(
            f"{what}: expected CLIENTS or SERVER, got {placement!r}; pass fc.CLIENTS or fc.SERVER."
        )
    if isinstance(function, Value):
        result = apply_function(function, ())
        at_server = _place(result, SERVER)
        return at_server if placement is SERVER else _place(result, CLIENTS)
    if _num_parameters(function):
        raise FederatedTypeError(
            f"{what}: expected a function without parameters, got {_num_parameters(function)}; use "
            "federated_map to give it arguments."
        )
    local = local_of(function, (), what)
    return builder.add(
        Map(type=FederatedType(local.result, placement), local=local, location=location())
    )


def apply_local(function: Any, args: tuple[Any, ...], what: str) -> Value:
    """Applies a local computation to members' values, where they are.

    Args:
      function: a typed function, or any JAX function.
      args: values at one placement, or unplaced values and constants; one for each parameter.
      what: names the operation in errors.

    Returns:
      The result at the same placement; unplaced if the arguments are.

    Raises:
      FederatedTypeError: naming the argument whose type does not fit.
    """
    builder = current_builder(what)
    values = tuple(_one_value(arg, what) for arg in args)
    members = tuple(member_of(value.type_signature) for value in values)
    inputs = tuple(position_of(value, builder, what) for value in values)
    is_unplaced = not any(is_placed(value) for value in values)
    placement = None if is_unplaced else common_placement(values, what)
    local = local_of(function, members, what)
    t = local.result if placement is None else FederatedType(local.result, placement)
    return builder.add(Map(type=t, inputs=inputs, local=local, location=location()))


def local_of(function: Any, members: tuple[Type, ...], what: str) -> Local:
    """`function` traced for members' values of these types.

    Raises:
      FederatedTypeError: where it does not take them, or is no function to be traced here.
    """
    if isinstance(function, Value):
        raise FederatedTypeError(
            f"{what}: expected a function of your own, got {function!r}; a function that is a "
            "parameter can be called, mapped or evaluated."
        )
    if isinstance(function, TypedFunction) and function.type_signature.contains(FederatedType):
        raise FederatedTypeError(
            f"{what}: expected a function of one member's values, got a computation of type "
            f"{function.type_signature}; call it with the placed values instead."
        )
    try:
        return trace_local(function, members, what)
    except TypeError as error:
        explain(error, name_of(function))
        if callable(function) and not isinstance(function, TypedFunction):
            check_takes(function, len(members), what)  # says more than Python's own error
        raise


def _one_value(arg: Any, what: str) -> Value:
    """An argument of a local computation: a value, a struct of values, or a constant."""
    leaves = jax.tree.leaves(arg, is_leaf=lambda x: isinstance(x, Value))
    if any(isinstance(leaf, Value) for leaf in leaves):
        return zip_values(arg, what)
    return as_value(arg, what)


def _spread(function: Any, arg: Any) -> tuple[Any, ...]:
    """The positional arguments that a single argument of `federated_map` stands for."""
    count = _num_parameters(function)
    if isinstance(arg, tuple | list) and not hasattr(arg, "_fields") and count == len(arg) > 1:
        return tuple(arg)
    if isinstance(arg, Value) and count is not None and count > 1:
        t = member_of(arg.type_signature)
        return tuple(arg) if isinstance(t, StructType) else (arg,)
    return (arg,)


def _num_parameters(function: Any) -> int | None:
    if isinstance(function, TypedFunction):
        return len(function.parameters)
    if isinstance(function, Value):
        t = function.type_signature
        packed = t.parameter if isinstance(t, FunctionType) else None
        return len(packed.elements) if isinstance(packed, StructType) else 1
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
            f"{what}: expected a placed value, got one of type {value.type_signature}; place it "
            "with federated_value."
        )
    return value.type_signature


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
            f"{what}: expected `present` of type {{bool}}@CLIENTS, got {present.type_signature}; "
            "compare it with something in federated_map."
        )
    return (present,)


def check_members(reason: str | None, value: Value, what: str, expected: str) -> None:
    """Raises if there is a reason why values of this type cannot be aggregated."""
    if reason is not None:
        raise FederatedTypeError(
            f"{what}: expected {expected} of fixed shape, got {value.type_signature} ({reason}); "
            "convert them, for example with astype, in federated_map."
        )
