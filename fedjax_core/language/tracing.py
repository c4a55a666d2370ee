"""Tracing: a Python function of placed values becomes a `Program`.

Inside the body a placed value is opaque: it has a type and fields, but no arithmetic and no truth
value, because there is nothing to compute with yet. Operators append to the program of the
innermost body that this thread is tracing.
"""

import contextlib
import dataclasses
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.core import Tracer

from fedjax_core.errors import ContextError, FederatedTypeError, PlacementError
from fedjax_core.language import types
from fedjax_core.language.local import name_of, pack_parameters
from fedjax_core.language.program import Get, Op, Parameter, Program, Zip
from fedjax_core.language.types import FederatedType, FunctionType, StructType, Type

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_THREAD = threading.local()


class Value:
    """A placed value in the body of a federated computation.

    Attributes:
      type_signature: its `FederatedType`.
    """

    def __init__(self, builder: "Builder", position: int, t: Type) -> None:
        self._builder = builder
        self._position = position
        self.type_signature = t

    def __repr__(self) -> str:
        return f"Value({self.type_signature})"

    def __getattr__(self, name: str) -> "Value":
        if name.startswith("__"):
            raise AttributeError(name)
        return self._field(name)

    def __getitem__(self, key: str | int) -> "Value":
        return self._field(key)

    def __len__(self) -> int:
        return len(self._struct().elements)

    def __iter__(self) -> Iterator["Value"]:
        return iter([self._field(i) for i in range(len(self))])

    def _field(self, key: str | int) -> "Value":
        return get(self, self._struct(key).position(key))

    def _struct(self, key: Any = None) -> StructType:
        member = (
            self.type_signature.member if isinstance(self.type_signature, FederatedType) else None
        )
        if isinstance(member, StructType):
            return member
        wanted = "" if key is None else f" with a field {key!r}"
        error = AttributeError if isinstance(key, str) else FederatedTypeError
        raise error(
            f"Expected a struct{wanted}, got a value of type {self.type_signature}; compute with "
            "it in federated_map."
        )

    def _refuse(self, *_: Any) -> NoReturn:
        raise FederatedTypeError(
            f"A value of type {self.type_signature} cannot be computed with here: the body of a "
            "federated computation only describes where values go. Put the arithmetic or the test "
            "into a function, and apply it with federated_map."
        )

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses: no placed value is a function."""
        raise SyntaxError(
            f"A value of type {self.type_signature} is no function and cannot be called."
        )

    __invert__ = __rpow__ = __rmatmul__ = __rfloordiv__ = __rmod__ = _refuse
    __bool__ = __int__ = __float__ = __index__ = __neg__ = __abs__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __floordiv__ = __mod__ = __pow__ = __matmul__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __and__ = __or__ = __xor__ = _refuse
    __setitem__ = __contains__ = __eq__ = __ne__ = _refuse
    __hash__ = object.__hash__


class Builder:
    """The program under construction, and the values already made in it."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.memo: dict[Any, Value] = {}

    def add(self, op: Op) -> Value:
        """Appends `op` and returns its value."""
        self.ops.append(op)
        return Value(self, len(self.ops) - 1, op.type)

    def add_once(self, key: Any, make: Callable[[], Op]) -> Value:
        """As `add`, but an operation with the same key is made only once."""
        if key not in self.memo:
            self.memo[key] = self.add(make())
        return self.memo[key]


@contextlib.contextmanager
def _building() -> Iterator[Builder]:
    stack = _THREAD.__dict__.setdefault("stack", [])
    stack.append(Builder())
    try:
        yield stack[-1]
    finally:
        stack.pop()


def current_builder(operator: str) -> Builder:
    """The program that this thread is tracing.

    Raises:
      ContextError: outside the body of a federated computation.
    """
    stack = getattr(_THREAD, "stack", None)
    if not stack:
        raise ContextError(
            f"{operator} describes a step of a federated computation, and was called outside of "
            "one; call it in a function decorated with federated_computation."
        )
    return stack[-1]


def position_of(value: Value, builder: Builder, operator: str) -> int:
    """The position of `value` in the program under construction."""
    if value._builder is not builder:
        raise ContextError(
            f"{operator}: a value of type {value.type_signature} belongs to another computation; "
            "pass it as an argument."
        )
    return value._position


def location() -> str:
    """`file:line` of the user's code that called into the library."""
    frame = inspect.currentframe()
    while frame is not None and _is_inside(frame.f_code.co_filename):
        frame = frame.f_back
    return "" if frame is None else f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


def _is_inside(filename: str) -> bool:
    return os.path.realpath(filename).startswith(_ROOTS) or filename.startswith("<frozen")


# The package's own folder, and those that its subpackages are linked to.
_ROOTS = tuple(
    os.path.realpath(os.path.join(_PACKAGE, name)) + os.sep
    for name in ("", "algorithms", "compression")
)


def get(value: Value, position: int) -> Value:
    """The field of a placed struct at `position`, itself placed."""
    builder = current_builder("get")
    t = value.type_signature
    assert isinstance(t, FederatedType)
    assert isinstance(t.member, StructType)
    source = position_of(value, builder, "get")
    field = FederatedType(t.member.elements[position][1], t.placement, t.all_equal)
    return builder.add_once(
        ("get", source, position),
        lambda: Get(type=field, inputs=(source,), position=position, location=location()),
    )


def zip_values(tree: Any, operator: str) -> Value:
    """Makes one placed struct of a pytree of placed values at one placement.

    Raises:
      FederatedTypeError: if a leaf is not placed, or the placements differ.
    """
    if isinstance(tree, Value):
        return tree
    builder = current_builder(operator)
    leaves, container = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, Value))
    for leaf in leaves:
        if not isinstance(leaf, Value) or not isinstance(leaf.type_signature, FederatedType):
            raise FederatedTypeError(
                f"{operator}: expected placed values, got {leaf!r}; place a constant with "
                "federated_value."
            )
    if not leaves:
        raise FederatedTypeError(f"{operator}: expected at least one placed value, got {tree!r}.")
    placements = {leaf.type_signature.placement for leaf in leaves}
    if len(placements) > 1:
        raise PlacementError(
            f"{operator}: expected values at one placement, got "
            f"{[str(leaf.type_signature) for leaf in leaves]}; use federated_broadcast, or "
            "aggregate first."
        )
    members = [leaf.type_signature.member for leaf in leaves]
    t = FederatedType(
        _nested_struct(jax.tree.unflatten(container, members)),
        placements.pop(),
        all(leaf.type_signature.all_equal for leaf in leaves),
    )
    inputs = tuple(position_of(leaf, builder, operator) for leaf in leaves)
    return builder.add(Zip(type=t, inputs=inputs, tree=container, location=location()))


def _nested_struct(tree: Any) -> Type:
    if isinstance(tree, Type):
        return tree
    fields, container = types.one_level(tree)
    return StructType([(name, _nested_struct(child)) for name, child in fields], container)


def inline(program: Program, args: tuple[Any, ...], operator: str) -> Any:
    """Appends the operations of `program`, applied to placed values, to the one under construction.

    Raises:
      FederatedTypeError: where an argument does not have the parameter's type.
    """
    builder = current_builder(operator)
    given = [zip_values(x, operator) for x in program.leaves_of(args)]
    wanted = [program.ops[i].type for i in program.parameters]
    for index, (value, t) in enumerate(zip(given, wanted, strict=True)):
        t.check_assignable_from(value.type_signature, f"argument {index} of `{operator}`")
    values = dict(zip(program.parameters, given, strict=True))
    for index, op in enumerate(program.ops):
        if index not in values:
            inputs = tuple(position_of(values[i], builder, operator) for i in op.inputs)
            values[index] = builder.add(dataclasses.replace(op, inputs=inputs))
    return jax.tree.map(lambda i: values[i], program.result_tree)


def trace_program(function: Callable[..., Any], parameters: tuple[Type, ...]) -> Program:
    """Traces `function` for arguments of the given types.

    Args:
      function: called once, with a `Value` (or a pytree of them) for each parameter; returns a
        pytree of `Value`s.
      parameters: federated types, or structs of them.

    Raises:
      FederatedTypeError: if the function returns something else.
    """
    name = name_of(function)
    with _building() as builder:
        arguments = tuple(_declare(builder, t) for t in parameters)
        with _outside_of_jax_traces():
            result = function(*arguments)
        _check_result(result, name)
        is_value = lambda x: isinstance(x, Value)  # noqa: E731
        position = lambda value: position_of(value, builder, name)  # noqa: E731
        return Program(
            name=name,
            ops=tuple(builder.ops),
            parameter_tree=jax.tree.map(position, arguments, is_leaf=is_value),
            result_tree=jax.tree.map(position, result, is_leaf=is_value),
            type_signature=FunctionType(
                pack_parameters(function, parameters), _result_type(result)
            ),
        )


def _outside_of_jax_traces() -> contextlib.AbstractContextManager[None]:
    """Keeps tracers out of a program, which outlives the JAX transformation it may be traced in.

    Only where there is one: evaluating everything at once makes tracing several times slower.
    """
    is_tracing = isinstance(jnp.zeros(()), Tracer)
    return jax.ensure_compile_time_eval() if is_tracing else contextlib.nullcontext()


def _declare(builder: Builder, t: Type) -> Any:
    if isinstance(t, FederatedType):
        return builder.add(Parameter(type=t))
    if isinstance(t, StructType):
        return jax.tree.unflatten(t.container, [_declare(builder, child) for child in t.children()])
    raise FederatedTypeError(
        "Expected a federated type, or a struct of them, for a parameter of a federated "
        f"computation, got {t}; say where it lives, as in FederatedType({t}, SERVER)."
    )


def _check_result(result: Any, name: str) -> None:
    leaves = jax.tree.leaves(result, is_leaf=lambda x: isinstance(x, Value))
    if result is None or not leaves:
        raise FederatedTypeError(
            f"`{name}` returned {result!r}: expected a placed value, or a struct of them; add a "
            "return."
        )
    for leaf in leaves:
        if not isinstance(leaf, Value):
            raise FederatedTypeError(
                f"`{name}` returned {leaf!r}, which is not placed; use federated_value to place a "
                "constant."
            )


def _result_type(result: Any) -> Type:
    if isinstance(result, Value):
        return result.type_signature
    fields, container = types.one_level(result)
    return StructType([(name, _result_type(child)) for name, child in fields], container)
