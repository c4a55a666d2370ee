"""Local computations: JAX functions of one member's values, traced once per shape."""

import dataclasses
import inspect
import threading
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.core import ShapedArray, Tracer
from jax.extend import core as jex_core

from fedjax_core.errors import FederatedTypeError, noted
from fedjax_core.language import inference, types
from fedjax_core.language.checks import check_fits
from fedjax_core.language.feeding import check_runtime
from fedjax_core.language.types import FunctionType, StructType, Type

# Sequences are traced at this capacity where a program is defined; at run time the function is
# traced again for the capacity of the data, and must give the same types.
NOMINAL_CAPACITY = 2


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """A function traced for fixed shapes: `jaxpr` on flat leaves, `out_tree` of its result."""

    jaxpr: jex_core.ClosedJaxpr
    out_tree: Any
    # What it was compiled to, kept here so that it does not outlive the program.
    compiled: dict[Any, Callable[..., Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Local:
    """One local computation of a program.

    Attributes:
      function: takes one positional argument per entry of `parameters`.
      name: for printing and profiles.
      parameters: the unplaced types of the arguments.
      result: the unplaced type of the result.
      traces: one trace for each set of argument shapes; a single one unless sequences are among
        them.
    """

    function: Callable[..., Any]
    name: str
    parameters: tuple[Type, ...]
    result: Type
    traces: dict[Any, Traced]
    lock: Any  # one that its own thread may take again, for functions that call themselves

    def traced_for(self, args: tuple[Any, ...]) -> Traced:
        """The trace for arguments of the shapes of `args`, made on first use."""
        key = _shapes_key(args)
        with self.lock:
            if key not in self.traces:
                self.traces[key] = self._specialise(args)
            return self.traces[key]

    def __call__(self, *args: Any) -> Any:
        """Evaluates the trace on pytrees of arrays."""
        traced = self.traced_for(args)
        call = traced.compiled.get(())
        if call is None:
            call = traced.compiled.setdefault((), jax.jit(jex_core.jaxpr_as_fun(traced.jaxpr)))
        return jax.tree.unflatten(traced.out_tree, call(*jax.tree.leaves(args)))

    def _specialise(self, args: tuple[Any, ...]) -> Traced:
        given = tuple(inference.infer_type(arg) for arg in args)
        for position, (expected, got) in enumerate(zip(self.parameters, given, strict=True)):
            check_runtime(expected, got, f"argument {position} of `{self.name}`")
        traced, result = _trace(self.function, jax.tree.map(_shape_of, args), self.name)
        if not self.result.is_equivalent_to(result):
            raise FederatedTypeError(
                f"Expected `{self.name}` to return {self.result} whatever the capacity of its "
                f"sequences, got {result}; reduce over the positions, masked by the length."
            )
        return traced


def trace_local(function: Any, parameters: tuple[Type, ...], what: str) -> Local:
    """Traces `function` for arguments of the given types.

    Args:
      function: a Python callable or a `TypedFunction`.
      parameters: unplaced types, one for each positional argument.
      what: names the operator in errors.

    Raises:
      FederatedTypeError: where the function does not take these types.
    """
    if isinstance(function, TypedFunction):
        function.check_takes(parameters, what)
        function = function.function
    if not callable(function):
        raise FederatedTypeError(
            f"{what}: expected a function or a jax_computation, got {function!r}."
        )
    name = name_of(function)
    args = tuple(inference.template(t, NOMINAL_CAPACITY) for t in parameters)
    traced, result = _trace(function, args, name)
    traces = {_shapes_key(args): traced}
    return Local(function, name, parameters, result, traces, threading.RLock())


def name_of(function: Any) -> str:
    """A readable name for a callable."""
    name = getattr(function, "__name__", type(function).__name__)
    return "lambda" if name == "<lambda>" else name


def _trace(function: Callable[..., Any], args: tuple[Any, ...], name: str) -> tuple[Traced, Type]:
    with noted(f"JAX was tracing `{name}`, which it does once, with abstract values."):
        jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    _check_captured(jaxpr.consts, name)
    if shapes is None:
        raise FederatedTypeError(
            f"`{name}` returned None: expected a pytree of arrays; add a return."
        )
    return Traced(jaxpr, jax.tree.structure(shapes)), inference.infer_type(shapes)


def _check_captured(consts: Iterable[Any], name: str) -> None:
    """Raises unless all that a function takes from around it are arrays that never change."""
    for const in consts:
        if isinstance(const, Tracer):
            raise FederatedTypeError(
                f"`{name}` captures {const}, a value that JAX is tracing outside of it. A "
                "federated computation outlives that trace: pass the value as an argument instead."
            )
        if not isinstance(jax.typeof(const), ShapedArray):
            raise FederatedTypeError(
                f"`{name}` captures {jax.typeof(const)}, which can be written to: expected a pure "
                "function, whose arguments and results are all that goes in and out. Pass the "
                "value as an argument and return the new one; a jax.new_ref made inside of the "
                "function may be used."
            )


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _shapes_key(args: Any) -> Any:
    leaves, tree = jax.tree.flatten(args)
    return tree, tuple((tuple(x.shape), x.dtype) for x in leaves)


class TypedFunction:
    """A function of one member's values whose types are declared.

    Attributes:
      function: what is traced, with one positional argument per entry of `parameters`.
      parameters: the types of the arguments.
      type_signature: its `FunctionType`.
    """

    function: Callable[..., Any]
    parameters: tuple[Type, ...]
    type_signature: FunctionType

    def check_takes(self, parameters: tuple[Type, ...], what: str) -> None:
        """Raises unless arguments of these types may be passed."""
        name = name_of(self.function)
        if len(parameters) != len(self.parameters):
            raise FederatedTypeError(
                f"{what}: expected {len(self.parameters)} arguments for `{name}` of type "
                f"{self.type_signature}, got {len(parameters)}."
            )
        for position, (expected, got) in enumerate(zip(self.parameters, parameters, strict=True)):
            check_fits(expected, got, f"argument {position} of `{name}` ({what})")


def pack_parameters(function: Callable[..., Any], parameters: tuple[Type, ...]) -> Type | None:
    """One type for all parameters: none, the only one, or a struct named as in Python."""
    return pack_types(tuple(positional_names(function)), parameters)


def pack_types(names: tuple[str, ...], parameters: tuple[Type, ...]) -> Type | None:
    """As `pack_parameters`, for parameters of these names."""
    if len(parameters) < 2:
        return parameters[0] if parameters else None
    if len(names) < len(parameters):  # *args, or a function without a signature
        return StructType(parameters)
    return StructType(list(zip(names, parameters, strict=False)))


def positional_names(function: Callable[..., Any]) -> list[str]:
    """The names of the parameters that can be given by position; none without a signature."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in kinds]


def split_function(args: tuple[Any, ...]) -> tuple[Callable[..., Any] | None, tuple[Any, ...]]:
    """Separates a leading function from the types that follow it."""
    if (
        args
        and callable(args[0])
        and not isinstance(args[0], type | Type)
        and not _is_dtype(args[0])
    ):
        return args[0], args[1:]
    return None, args


def _is_dtype(value: Any) -> bool:
    try:
        types.to_type(value)
    except FederatedTypeError:
        return False
    return True
