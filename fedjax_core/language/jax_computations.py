"""Local computations with declared types, which can be called, mapped and composed."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax

from fedjax_core.errors import FederatedTypeError, PlacementError
from fedjax_core.language import types
from fedjax_core.language.arguments import bind_arguments
from fedjax_core.language.checks import check_takes
from fedjax_core.language.feeding import to_member
from fedjax_core.language.local import (
    TypedFunction,
    name_of,
    pack_parameters,
    positional_names,
    split_function,
    trace_local,
)
from fedjax_core.language.mapping import apply_local
from fedjax_core.language.tracing import Value, operator
from fedjax_core.language.types import FederatedType, FunctionType, Type


class JaxComputation(TypedFunction):
    """A JAX function with declared types, ready to be mapped; made by `jax_computation`.

    Attributes:
      function: the Python function.
      type_signature: its `FunctionType`.
    """

    def __init__(self, function: Callable[..., Any], parameters: tuple[Type, ...]) -> None:
        self.function = function
        self.parameters = parameters
        self._names = tuple(positional_names(function))
        what = f"jax_computation of `{name_of(function)}`"
        check_takes(function, len(parameters), what)
        for t in parameters:
            if t.contains(FederatedType) or t.contains(FunctionType):
                raise FederatedTypeError(
                    f"{what}: expected types of one member's values, got {t}; declare the member's "
                    "type, or use federated_computation."
                )
        self._local = trace_local(function, parameters, "jax_computation")
        self.type_signature = FunctionType(
            pack_parameters(function, parameters), self._local.result
        )

    def __repr__(self) -> str:
        return f"{name_of(self.function)}: {self.type_signature}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the function on values of the declared types, sequences given as lists.

        In the body of a federated computation, on unplaced values, it becomes a part of that one.
        """
        name = name_of(self.function)
        args = bind_arguments(name, self._names, len(self.parameters), args, kwargs)
        if any(isinstance(leaf, Value) for leaf in jax.tree.leaves(args, is_leaf=_is_value)):
            return _call_in_body(self, args)
        members = [
            to_member(arg, t, f"argument {position} of `{name}`")
            for position, (arg, t) in enumerate(zip(args, self.parameters, strict=True))
        ]
        return self._local(*members)


def _is_value(x: Any) -> bool:
    return isinstance(x, Value)


@operator
def _call_in_body(computation: JaxComputation, args: tuple[Any, ...]) -> Value:
    name = name_of(computation.function)
    for arg in args:
        if isinstance(arg, Value) and isinstance(arg.type_signature, types.FederatedType):
            raise PlacementError(
                f"`{name}`: expected unplaced values, got one of type {arg.type_signature}; apply "
                "the function where the value is with federated_map."
            )
    return apply_local(computation, args, f"`{name}`")


def _polymorphic(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree.leaves((args, kwargs), is_leaf=_is_value)
        if any(isinstance(leaf, Value) for leaf in leaves):
            return _apply_untyped(function, args, kwargs)
        return function(*args, **kwargs)

    return call


@operator
def _apply_untyped(function: Callable[..., Any], args: Any, kwargs: Any) -> Value:
    name, names = name_of(function), tuple(positional_names(function))
    args = bind_arguments(name, names, len(args) + len(kwargs), args, kwargs)
    return apply_local(function, args, f"`{name}`")


def jax_computation(*args: Any) -> Any:
    """A JAX function of one member's values, with declared types.

    Use it as `@jax_computation(T1, T2)` or as `jax_computation(function, T1, T2)`. Without types
    it is traced for the types it meets, wherever it is mapped or called.

    Args:
      *args: the types of the parameters, as `to_type` takes them, after the function if given.

    Raises:
      FederatedTypeError: if the function cannot be traced for these types.

    Examples:
      >>> import numpy as np
      >>> add_half = jax_computation(lambda x: x + 0.5, np.float32)
      >>> str(add_half.type_signature), float(add_half(1.0))
      ('(float32 -> float32)', 1.5)
    """
    function, specs = split_function(args)
    parameters = tuple(types.to_type(spec) for spec in specs)

    def decorate(function: Callable[..., Any]) -> Any:
        if not parameters and inspect.signature(function).parameters:
            return _polymorphic(function)
        return JaxComputation(function, parameters)

    return decorate if function is None else decorate(function)
