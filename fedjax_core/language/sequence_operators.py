"""The operators on sequences, for local functions and for the bodies of federated computations.

    sequence_map     <(T -> U),T*> -> U*
    sequence_reduce  <T*,U,(<U,T> -> U)> -> U
    sequence_sum     T* -> T

On a `Sequence`, or a list of examples, they compute. On a value of the body of a federated
computation they become one local computation where the value is: of `{T*}@P` the result is at `P`,
of an unplaced `T*` it is unplaced.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.errors import FederatedTypeError
from fedjax_core.language import feeding, inference, types
from fedjax_core.language.local import TypedFunction, name_of
from fedjax_core.language.mapping import apply_local
from fedjax_core.language.sequences import Sequence
from fedjax_core.language.tracing import Value, member_of, operator, zip_values
from fedjax_core.language.types import SequenceType, StructType, Type


def sequence_map(function: Any, sequence: Any) -> Any:
    """Applies a function to each element of a sequence: `<(T -> U),T*> -> U*`.

    Args:
      function: a `jax_computation` of type `(T -> U)`, or any JAX function of one element.
      sequence: a `Sequence` or a list of examples; or, in the body of a federated computation, a
        value of type `{T*}@P` or `T*`.

    Returns:
      A `Sequence`, a list for a list, or a value of the body.

    Raises:
      FederatedTypeError: if `sequence` is none, or `function` does not take its elements.

    Examples:
      >>> [int(x) for x in sequence_map(lambda x: x + 1, [1, 2, 3])]
      [2, 3, 4]
    """
    return _sequence_map(function, sequence)


@operator
def _sequence_map(function: Any, sequence: Any) -> Any:
    what = f"sequence_map of `{_name(function)}`"
    given = _as_sequence(sequence, what)
    apply = _function_of(function, (_element_type(given, what),), what)
    if isinstance(given, Value):
        local = _named(lambda rows: rows.map(apply), f"sequence_map_{_name(function)}")
        return apply_local(local, (given,), what)
    result = given.map(apply)
    is_list = isinstance(sequence, list | tuple)
    return [_row(result.elements, i) for i in range(len(sequence))] if is_list else result


def _row(elements: Any, index: int) -> Any:
    return jax.tree.map(lambda x: x[index], elements)


def sequence_reduce(sequence: Any, zero: Any, op: Any) -> Any:
    """Folds a sequence in order: `<T*,U,(<U,T> -> U)> -> U`.

    Args:
      sequence: as that of `sequence_map`.
      zero: a constant, the result for no elements; or, in the body of a federated computation, a
        value where the sequence is.
      op: a `jax_computation` of type `(<U,T> -> U)`, or any JAX function
        `(accumulator, element) -> accumulator`.

    Returns:
      The accumulator, of the type of `zero`; see `Sequence.reduce`.

    Raises:
      FederatedTypeError: if `sequence` is none, or `zero` and `op` do not fit together.
      PlacementError: if `zero` is not where the sequence is.

    Examples:
      >>> float(sequence_reduce([1.0, 2.0, 4.0], 0.0, lambda total, x: total + x))
      7.0
    """
    return _sequence_reduce(sequence, zero, op)


@operator
def _sequence_reduce(sequence: Any, zero: Any, op: Any) -> Any:
    what = f"sequence_reduce with `{_name(op)}`"
    given = _as_sequence(sequence, what)
    zero = _as_zero(zero, given, what)
    state = _type_of_zero(zero, given)
    fold = _function_of(op, (state, _element_type(given, what)), what, result=state)
    if not isinstance(given, Value):
        return given.reduce(zero, fold)
    name = f"sequence_reduce_{_name(op)}"
    if not isinstance(zero, Value):
        return apply_local(_named(lambda rows: rows.reduce(zero, fold), name), (given,), what)
    local = _named(lambda rows, start: rows.reduce(start, fold), name)
    return apply_local(local, (given, zero), what)


def sequence_sum(sequence: Any) -> Any:
    """Adds up the elements of a sequence: `T* -> T`; zeros for no elements.

    Args:
      sequence: of numbers or structs of them, as that of `sequence_map`.

    Returns:
      The sum; see `Sequence.sum`.

    Raises:
      FederatedTypeError: if `sequence` is none, or its elements are no numbers.

    Examples:
      >>> int(sequence_sum([1, 2, 3]))
      6
    """
    return _sequence_sum(sequence)


@operator
def _sequence_sum(sequence: Any) -> Any:
    what = "sequence_sum"
    given = _as_sequence(sequence, what)
    _element_type(given, what)
    if isinstance(given, Value):
        return apply_local(_named(lambda rows: rows.sum(), what), (given,), what)
    return given.sum()


def _name(function: Any) -> str:
    return name_of(getattr(function, "function", function))


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`function` under a name that programs and profiles show."""
    function.__name__ = name
    return function


def _as_sequence(value: Any, what: str) -> Any:
    """A `Sequence` of what is given as one; a value of a body as it is."""
    if isinstance(value, Value | Sequence):
        return value
    if isinstance(value, list | tuple) and value:
        t = inference.infer_type(value[0])
        rows = [feeding.to_member(x, t, f"{what}, element {i}") for i, x in enumerate(value)]
        return Sequence.from_elements(jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows))
    if isinstance(value, np.ndarray | jax.Array) and value.ndim:
        return Sequence.from_elements(value)
    is_empty = isinstance(value, list | tuple)
    got = "an empty list" if is_empty else f"{value!r} of {type(value).__name__}"
    remedy = "Sequence.from_elements takes arrays of 0 rows" if is_empty else "pass a list"
    raise FederatedTypeError(f"{what}: expected a sequence T*, got {got}; {remedy}.")


def _element_type(given: Any, what: str) -> Type:
    """The type of one element, 64 bits as arrays have them where there are arrays."""
    if isinstance(given, Sequence):
        return inference.runtime_type(given.element_type)
    t = member_of(given.type_signature)
    if not isinstance(t, SequenceType):
        raise FederatedTypeError(
            f"{what}: expected a sequence T*, got a value of type {given.type_signature}."
        )
    return t.element


def _as_zero(zero: Any, given: Any, what: str) -> Any:
    """A value of the body if any leaf is one, else the constant."""
    leaves = jax.tree.leaves(zero, is_leaf=lambda x: isinstance(x, Value))
    if not any(isinstance(leaf, Value) for leaf in leaves):
        return zero
    if not isinstance(given, Value):
        raise FederatedTypeError(
            f"{what}: expected a constant `zero` for a sequence that is no value of the body, got "
            f"{zero!r}; make the sequence an argument, or reduce in federated_map."
        )
    return zip_values(zero, what)


def _type_of_zero(zero: Any, given: Any) -> Type:
    if isinstance(zero, Value):
        return member_of(zero.type_signature)
    t = inference.infer_type(zero)
    return t if isinstance(given, Value) else inference.runtime_type(t)


def _function_of(
    function: Any, parameters: tuple[Type, ...], what: str, result: Type | None = None
) -> Callable[..., Any]:
    """`function` with one positional argument for each of `parameters`, checked if it is typed."""
    if isinstance(function, Value):
        raise FederatedTypeError(
            f"{what}: expected a function that is known where the computation is defined, got a "
            f"parameter of type {function.type_signature}; map it over the clients instead, or "
            "make the computation in a Python function that takes the function."
        )
    if not isinstance(function, TypedFunction):
        if callable(function):
            return function
        raise FederatedTypeError(f"{what}: expected a function, got {function!r}.")
    apply, parameters = _rearranged(function, parameters)
    function.check_takes(parameters, what)
    if result is not None:
        given = function.type_signature.result
        result.check_assignable_from(given, f"the result of `{_name(function)}` ({what})")
    return apply


def _rearranged(
    function: TypedFunction, parameters: tuple[Type, ...]
) -> tuple[Callable[..., Any], tuple[Type, ...]]:
    """A struct spread over the parameters of a function, or several made one, where that fits."""
    call, wanted = function.function, function.parameters
    if len(wanted) == 1 < len(parameters) and isinstance(wanted[0], StructType):
        container = wanted[0].container
        return lambda *args: call(jax.tree.unflatten(container, args)), (StructType(parameters),)
    only = parameters[0]
    if len(parameters) == 1 < len(wanted) == _num_fields(only):
        return lambda x: call(*(child for _, child in types.one_level(x)[0])), tuple(
            only.children()
        )
    return call, parameters


def _num_fields(t: Type) -> int:
    return len(t.elements) if isinstance(t, StructType) else 1
