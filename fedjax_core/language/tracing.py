"""The values in the body of a federated computation, and the program they are building.

A value is opaque: it has a type and fields, but no arithmetic and no truth value, because there is
nothing to compute with yet. Operators append to the program of the innermost body that this thread
is tracing.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, cast

import jax
from jax.core import Tracer

from fedjax_core.errors import (
    CallError,
    ContextError,
    FederatedTypeError,
    FedjaxError,
    FieldError,
    PlacementError,
)
from fedjax_core.language import inference, types
from fedjax_core.language.checks import check_fits
from fedjax_core.language.feeding import to_member
from fedjax_core.language.locations import locate, located, location, raised_at
from fedjax_core.language.placements import Placement
from fedjax_core.language.program import Apply, Broadcast, Constant, Count, Get, Op, Zip
from fedjax_core.language.types import FederatedType, FunctionType, StructType, Type

_THREAD = threading.local()


class Value:
    """A value in the body of a federated computation: placed, unplaced, or a function.

    Attributes:
      type_signature: its type, a `FederatedType` where it is placed.
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
        return get(self, _position_of_field(self, key))

    def _struct(self) -> StructType:
        member = member_of(self.type_signature)
        if isinstance(member, StructType):
            return member
        raise located(
            FederatedTypeError,
            f"Expected a struct to take apart, got a value of type {self.type_signature}; compute "
            "with it in federated_map.",
        )

    def _refuse(self, *_: Any) -> NoReturn:
        raise located(
            FederatedTypeError,
            f"Expected an operator for a value of type {self.type_signature}, got Python's own "
            "arithmetic, test or conversion: the body of a federated computation only describes "
            "where values go. Put it into a function, and apply that with federated_map.",
        )

    def __format__(self, spec: str) -> str:
        return self._refuse() if spec else repr(self)

    def __call__(self, *args: Any) -> "Value":
        """Calls a function that is a parameter."""
        if not isinstance(self.type_signature, FunctionType):
            raise located(
                CallError,
                f"Expected a function to call, got a value of type {self.type_signature}; make it "
                "a parameter whose type is a FunctionType, or leave out the call.",
            )
        return _call(self, args)

    __invert__ = __rpow__ = __rmatmul__ = __rfloordiv__ = __rmod__ = _refuse
    __bool__ = __int__ = __float__ = __index__ = __neg__ = __abs__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __floordiv__ = __mod__ = __pow__ = __matmul__ = _refuse
    __divmod__ = __rdivmod__ = __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = _refuse
    __rand__ = __ror__ = __rxor__ = __round__ = __complex__ = _refuse
    __array__ = _refuse  # np.sum(value)
    __lt__ = __le__ = __gt__ = __ge__ = __and__ = __or__ = __xor__ = _refuse
    __setitem__ = __contains__ = __eq__ = __ne__ = _refuse
    __hash__ = object.__hash__


def _position_of_field(value: Value, key: Any) -> int:
    """The position of the field `key`; names what there is if there is no such field."""
    t = member_of(value.type_signature)
    if not isinstance(t, StructType):
        raise located(
            FieldError,
            f"Expected a struct with a field {key!r}, got a value of type {value.type_signature}; "
            "compute with it in federated_map.",
        )
    if isinstance(key, Value):
        key._refuse()
    names = [name for name in t.names() if name is not None]
    is_position = isinstance(key, int) and 0 <= key < len(t.elements)
    if is_position or (isinstance(key, str) and key in names):
        return t.position(key)
    fields = f"one of the fields {names}, or " if names else ""
    raise located(
        FieldError,
        f"Expected {fields}an index from 0 to {len(t.elements) - 1} into {value.type_signature}, "
        f"got {key!r}; take the field by its name or position.",
    )


class Builder:
    """The program under construction, and the values already made in it."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.memo: dict[Any, Value] = {}

    def add(self, op: Op) -> Value:
        """Appends `op` and returns its value; that of an equal one if there is one already."""
        key = _identity(op)
        if key in self.memo:
            return self.memo[key]
        self.ops.append(op)
        value = Value(self, len(self.ops) - 1, op.type)
        if key is not None:
            self.memo[key] = value
        return value


def _identity(op: Op) -> Any:
    """What two operations share that have the same value; None for one that may differ."""
    match op:
        case Get(inputs=inputs, position=position):
            return "get", inputs, position
        case Count(inputs=inputs):
            return "count", inputs
        case Broadcast(inputs=inputs, codec=None):
            return "broadcast", inputs  # what the clients have, they need not be sent again
    return None


@contextlib.contextmanager
def building() -> Iterator[Builder]:
    """A program that this thread traces until the context ends."""
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


def operator(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the errors of an operator name the line of the user's code that called it."""
    is_public = not function.__name__.startswith("_")

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            if is_public:
                current_builder(function.__name__)
            return function(*args, **kwargs)
        except Exception as error:
            locate(error, function.__name__)
            raise

    return call


def explain(error: TypeError, name: str) -> None:
    """Raises an error that says more where JAX was given a value of a body to compute with."""
    if not isinstance(error, FedjaxError) and f"{Value.__module__}.{Value.__name__}" in str(error):
        raise located(
            FederatedTypeError,
            f"`{name}`: expected arrays in a JAX function, got a value of the body of a federated "
            "computation; put the function into federated_map, with the value as its argument.",
            raised_at(error),
        ) from error


def builder_op(value: Value) -> Op:
    """The operation that made a value."""
    return value._builder.ops[value._position]


def member_of(t: Type) -> Type:
    """The type of one member's value; `t` itself where it is not placed."""
    return t.member if isinstance(t, FederatedType) else t


def like(t: Type, member: Type) -> Type:
    """The type `member`, placed as `t` is."""
    return (
        FederatedType(member, t.placement, t.all_equal) if isinstance(t, FederatedType) else member
    )


def get(value: Value, position: int) -> Value:
    """The field of a placed struct at `position`, itself placed."""
    builder = current_builder("get")
    t = value.type_signature
    member = member_of(t)
    assert isinstance(member, StructType)
    source = position_of(value, builder, "get")
    field = like(t, member.elements[position][1])
    return builder.add(Get(type=field, inputs=(source,), position=position, location=location()))


def zip_values(tree: Any, what: str) -> Value:
    """Makes one struct of a pytree of values at one placement, or of unplaced values and constants.

    Raises:
      FederatedTypeError: if some leaves are placed and others are not, or the placements differ.
    """
    if isinstance(tree, Value):
        return tree
    leaves, container = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, Value))
    if not leaves:
        raise FederatedTypeError(
            f"{what}: expected at least one placed value, got {tree!r}; pass some, or place an "
            "empty struct with federated_value."
        )
    if not any(isinstance(leaf, Value) for leaf in leaves):
        is_traced = any(isinstance(leaf, Tracer) for leaf in leaves)
        remedy = (
            "call operators outside of local functions"
            if is_traced
            else ("place a constant with federated_value")
        )
        raise PlacementError(f"{what}: expected placed values, got {tree!r}; {remedy}.")
    unplaced = [x for x in leaves if not isinstance(x, Value) or not is_placed(x)]
    if not unplaced:
        return _zip_placed(leaves, container, what)
    if len(unplaced) < len(leaves):
        raise PlacementError(
            f"{what}: expected placed values, got {unplaced[0]!r} among them; place it with "
            "federated_value."
        )
    values = [as_value(leaf, what) for leaf in leaves]
    t = _nested_struct(jax.tree.unflatten(container, [value.type_signature for value in values]))
    return _add_zip(values, container, t, what)


def as_value(leaf: Any, what: str) -> Value:
    """`leaf`, as an unplaced constant unless it is a value already."""
    if isinstance(leaf, Value):
        return leaf
    t = inference.infer_type(leaf)
    return constant(to_member(leaf, t, what), t, what)


def _add_zip(values: list[Value], container: Any, t: Type, what: str) -> Value:
    builder = current_builder(what)
    _check_keeps_fields(container, len(values), what)
    inputs = tuple(position_of(value, builder, what) for value in values)
    return builder.add(Zip(type=t, inputs=inputs, tree=container, location=location()))


def _check_keeps_fields(container: Any, num_fields: int, what: str) -> None:
    """Raises for a container that gives back other fields than it was made of."""
    marks = [object() for _ in range(num_fields)]
    try:
        fields = jax.tree.leaves(jax.tree.unflatten(container, marks))
    except Exception:  # it takes nothing but arrays
        return
    if len(fields) != num_fields or any(x is not y for x, y in zip(fields, marks, strict=True)):
        raise FederatedTypeError(
            f"{what}: expected a pytree whose flatten undoes its unflatten, got {container}; mend "
            "the registration of its class."
        )


def _zip_placed(values: list[Value], container: Any, what: str) -> Value:
    found = [cast(FederatedType, value.type_signature) for value in values]
    placements = {t.placement for t in found}
    if len(placements) > 1:
        raise PlacementError(
            f"{what}: expected values at one placement, got {[str(t) for t in found]}; use "
            "federated_broadcast, or aggregate first."
        )
    struct = _nested_struct(jax.tree.unflatten(container, [t.member for t in found]))
    t = FederatedType(struct, placements.pop(), all(t.all_equal for t in found))
    return _add_zip(values, container, t, what)


def _nested_struct(tree: Any) -> Type:
    if isinstance(tree, Type):
        return tree
    fields, container = types.one_level(tree)
    return StructType([(name, _nested_struct(child)) for name, child in fields], container)


def constant(value: Any, t: Type, operator_name: str) -> Value:
    """An unplaced or placed constant of the program."""
    return current_builder(operator_name).add(Constant(type=t, value=value, location=location()))


def apply_function(function: Value, args: tuple[Any, ...]) -> Value:
    """A call of a function that is a parameter of the computation.

    On placed values, a function of unplaced ones is mapped.

    Raises:
      FederatedTypeError: where the arguments do not fit its type.
    """
    builder = current_builder("a call of a function")
    t = cast(FunctionType, function.type_signature)
    what = f"a call of a function of type {t}"
    values = tuple(arg if isinstance(arg, Value) else zip_values(arg, what) for arg in args)
    expected = parameters_of(t, len(values))
    if len(expected) != len(values):
        raise FederatedTypeError(
            f"{what}: expected {len(expected)} arguments, got {len(values)}; pass one for each "
            "parameter."
        )
    is_mapped = not t.contains(FederatedType) and any(is_placed(value) for value in values)
    for position, (wanted, value) in enumerate(zip(expected, values, strict=True)):
        given = value.type_signature
        given = member_of(given) if is_mapped else given
        check_fits(wanted, given, f"argument {position} of {what}")
    result = t.result
    if is_mapped:
        result = FederatedType(t.result, common_placement(values, what))
    inputs = tuple(position_of(value, builder, what) for value in (function, *values))
    return builder.add(Apply(type=result, inputs=inputs, location=location()))


@operator
def _call(function: Value, args: tuple[Any, ...]) -> Value:
    return apply_function(function, args)


def parameters_of(t: FunctionType, num_args: int) -> tuple[Type, ...]:
    """The types of a function's arguments if it is called with `num_args` of them."""
    if t.parameter is None:
        return ()
    if isinstance(t.parameter, StructType) and num_args == len(t.parameter.elements) != 1:
        return tuple(t.parameter.children())
    return (t.parameter,)


def is_placed(value: Value) -> bool:
    """Whether the value lives at the clients or at the server."""
    return isinstance(value.type_signature, FederatedType)


def common_placement(values: tuple[Value, ...], what: str) -> Placement:
    """The placement that all `values` share.

    Raises:
      PlacementError: if they have more than one, or one of them has none.
    """
    found = {
        value.type_signature.placement if isinstance(value.type_signature, FederatedType) else None
        for value in values
    }
    if len(found) > 1 or None in found:
        raise PlacementError(
            f"{what}: expected all arguments at one placement, got "
            f"{[str(value.type_signature) for value in values]}; broadcast the server's first, and "
            "place unplaced ones with federated_value."
        )
    return cast(Placement, found.pop())
