"""Bodies: a Python function of placed values becomes a `Program`; programs go into each other."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from fedjax_core.errors import FederatedTypeError
from fedjax_core.language import inference, types
from fedjax_core.language.checks import check_fits, check_takes
from fedjax_core.language.feeding import contains_str, is_composite, to_member
from fedjax_core.language.local import (
    TypedFunction,
    name_of,
    pack_types,
    positional_names,
)
from fedjax_core.language.mapping import apply_local
from fedjax_core.language.program import Apply, Parameter, Program
from fedjax_core.language.tracing import (
    Builder,
    Value,
    building,
    constant,
    current_builder,
    explain,
    operator,
    position_of,
    zip_values,
)
from fedjax_core.language.types import FederatedType, FunctionType, StructType, Type


def trace_program(function: Callable[..., Any], parameters: tuple[Type, ...]) -> Program:
    """Traces `function` for arguments of the given types.

    Args:
      function: called once, with a `Value` (or a pytree of them) for each parameter; returns a
        pytree of `Value`s and constants.
      parameters: types of any kind, or structs of them.

    Raises:
      FederatedTypeError: if the function returns something else.
    """
    name = name_of(function)
    names = tuple(positional_names(function))
    check_takes(function, len(parameters), f"`{name}`")
    with building() as builder:
        arguments = tuple(_declare(builder, t) for t in parameters)
        with _outside_of_jax_traces():
            result = _as_values(_call_body(function, arguments, name), name)
        return _program(builder, name, names, parameters, arguments, result)


def _call_body(function: Callable[..., Any], arguments: tuple[Any, ...], name: str) -> Any:
    try:
        return function(*arguments)
    except TypeError as error:
        explain(error, name)
        raise


def _program(
    builder: Builder,
    name: str,
    names: tuple[str, ...],
    parameters: tuple[Type, ...],
    arguments: tuple[Any, ...],
    result: Any,
) -> Program:
    position = lambda value: position_of(value, builder, name)  # noqa: E731
    return Program(
        name=name,
        ops=tuple(builder.ops),
        parameter_tree=jax.tree.map(position, arguments, is_leaf=_is_value),
        result_tree=jax.tree.map(position, result, is_leaf=_is_value),
        type_signature=FunctionType(pack_types(names, parameters), _result_type(result)),
        parameter_names=names[: len(parameters)],
    )


def _is_value(x: Any) -> bool:
    return isinstance(x, Value)


def _outside_of_jax_traces() -> contextlib.AbstractContextManager[None]:
    """Keeps tracers out of a program, which outlives the JAX transformation it may be traced in.

    Only where there is one: evaluating everything at once makes tracing several times slower.
    """
    is_tracing = isinstance(jnp.zeros(()), Tracer)
    return jax.ensure_compile_time_eval() if is_tracing else contextlib.nullcontext()


def _declare(builder: Builder, t: Type) -> Any:
    if not is_composite(t):
        _check_parameter(t)
        return builder.add(Parameter(type=t))
    assert isinstance(t, StructType)
    children = list(t.children())
    if any(isinstance(child, FunctionType) for child in children):
        raise FederatedTypeError(
            f"Expected no function inside a struct, got {t}; make it a parameter of its own."
        )
    return jax.tree.unflatten(t.container, [_declare(builder, child) for child in children])


def _check_parameter(t: Type) -> None:
    """Raises for a type of which no value can be passed."""
    if isinstance(t, FunctionType):
        return
    if t.contains(types.AbstractType) or t.contains(types.PlacementType):
        raise FederatedTypeError(
            f"Expected the type of a value for a parameter, got {t}; leave the types out to make "
            "the computation polymorphic."
        )
    inference.template(t.member if isinstance(t, FederatedType) else t)  # has a fixed shape


def _as_values(result: Any, name: str) -> Any:
    """The result of a body with its constants made values of the program."""
    if not jax.tree.leaves(result, is_leaf=_is_value):
        raise FederatedTypeError(
            f"Expected `{name}` to return a value, or a struct of them, got {result!r}; add a "
            "return."
        )
    return jax.tree.map(lambda leaf: _as_value(leaf, name), result, is_leaf=_is_value)


@operator
def _as_value(leaf: Any, name: str) -> Value:
    if isinstance(leaf, Value):
        return leaf
    if isinstance(leaf, Tracer):
        raise FederatedTypeError(
            f"Expected `{name}` to return values of its body, got {leaf}, which JAX is tracing "
            "outside of it; pass it as an argument."
        )
    try:
        t = inference.infer_type(leaf)
    except FederatedTypeError as error:
        raise FederatedTypeError(
            f"Expected `{name}` to return values, got {leaf!r} of type {type(leaf).__name__}, "
            "which is neither a value of the body nor a constant; return what operators made."
        ) from error
    return constant(leaf if contains_str(t) else to_member(leaf, t, f"`{name}`"), t, name)


def _result_type(result: Any) -> Type:
    if isinstance(result, Value):
        return result.type_signature
    fields, container = types.one_level(result)
    return StructType([(name, _result_type(child)) for name, child in fields], container)


@operator
def inline(program: Program, args: tuple[Any, ...]) -> Any:
    """Appends the operations of `program`, applied to values, to the one under construction.

    Args:
      program: what is called.
      args: one value, or struct of values, for each of its arguments.

    Raises:
      FederatedTypeError: where an argument does not have the parameter's type.
    """
    name = f"`{program.name}`"
    given = [_argument(x, name) for x in program.leaves_of(args)]
    wanted = [program.ops[i].type for i in program.parameters]
    names = names_of_parameters(program)
    for value, t, where in zip(given, wanted, names, strict=True):
        check_fits(t, value.type_signature, where)
    values = dict(zip(program.parameters, given, strict=True))
    return _append(program, values, name)


def names_of_parameters(program: Program) -> list[str]:
    """What errors call each of a program's parameters: the argument, and the field in it."""
    return [
        f"{program.name_of_argument(k)}{jax.tree_util.keystr(path)}"
        for k, tree in enumerate(program.parameter_tree)
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _argument(x: Any, name: str) -> Value:
    if callable(x) and not isinstance(x, Value):
        raise FederatedTypeError(
            f"{name}: expected values of this body, got {x!r}; give it its functions first, with "
            "bind."
        )
    return zip_values(x, name)


def _append(program: Program, values: dict[int, Value], name: str) -> Any:
    """Appends what is not in `values` yet; returns the results."""
    builder = current_builder(name)
    for index, op in enumerate(program.ops):
        if index not in values:
            inputs = tuple(position_of(values[i], builder, name) for i in op.inputs)
            values[index] = builder.add(dataclasses.replace(op, inputs=inputs))
    return jax.tree.map(lambda i: values[i], program.result_tree)


def bind_functions(program: Program, functions: dict[int, Any]) -> Program:
    """A program with functions in the place of some of its parameters.

    Args:
      program: with parameters that are functions.
      functions: for the index of an argument the function: typed, or any JAX function.

    Raises:
      FederatedTypeError: where a function does not have the type that the parameter has.
    """
    kept = [k for k in range(len(program.parameter_tree)) if k not in functions]
    wanted = program.argument_types
    for k, function in functions.items():
        _check_function(function, wanted[k], program.name_of_argument(k))
    with building() as builder:
        arguments = tuple(_declare(builder, wanted[k]) for k in kept)
        values: dict[int, Value] = {}
        for k, argument in zip(kept, arguments, strict=True):
            positions = jax.tree.leaves(program.parameter_tree[k])
            leaves = jax.tree.leaves(argument, is_leaf=_is_value)
            values.update(zip(positions, leaves, strict=True))
        bound = {program.parameter_tree[k]: function for k, function in functions.items()}
        result = _append_bound(program, values, bound)
        names = tuple(program.parameter_names[k] for k in kept) if program.parameter_names else ()
        types_kept = tuple(wanted[k] for k in kept)
        return _program(builder, program.name, names, types_kept, arguments, result)


def _check_function(function: Any, t: Type, where: str) -> None:
    if not callable(function) or isinstance(function, Value):
        raise FederatedTypeError(
            f"{where}: expected a function of type {t}, got {function!r}; pass a jax_computation, "
            "or any JAX function."
        )
    if isinstance(function, TypedFunction):
        check_fits(t, function.type_signature, where)


def _append_bound(program: Program, values: dict[int, Value], functions: dict[int, Any]) -> Any:
    builder = current_builder(program.name)
    for index, op in enumerate(program.ops):
        if index in values or index in functions:
            continue
        if isinstance(op, Apply) and op.inputs[0] in functions:
            args = tuple(values[i] for i in op.inputs[1:])
            values[index] = _call(functions[op.inputs[0]], program.ops[op.inputs[0]].type, args, op)
        else:
            inputs = tuple(position_of(values[i], builder, program.name) for i in op.inputs)
            values[index] = builder.add(dataclasses.replace(op, inputs=inputs))
    return jax.tree.map(lambda i: values[i], program.result_tree)


def _call(function: Any, t: Type, args: tuple[Value, ...], op: Apply) -> Value:
    """A call of a function that is known by now."""
    name = f"the call of `{name_of(function)}` at {op.location or 'an unknown place'}"
    inner = getattr(function, "program", None)
    if isinstance(inner, Program) and any(isinstance(t, FederatedType) for t in inner.types):
        result = inline(inner, args)
    elif t.contains(FederatedType):  # without declared types: traced for those of the parameter
        body = getattr(function, "function", function)
        result = inline(trace_program(body, tuple(arg.type_signature for arg in args)), args)
    else:
        result = apply_local(function, args, name)
    check_fits(op.type, result.type_signature, f"the result of {name}")
    return result
