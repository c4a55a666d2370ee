"""Derivatives and vectorisation of programs, as programs again.

    program -> function of one member's values -> jax.grad, jax.vmap -> program

The gradient of a program of local computations, broadcasts and sums has broadcasts and sums alone:
what was sent down is differentiated by a sum, what was summed by a broadcast. Clients that are not
there, or not valid, have no part in it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_core.errors import ArgumentError, FederatedTypeError
from fedjax_core.language import inference
from fedjax_core.language.differentiation.bridge import member_function
from fedjax_core.language.differentiation.pieces import AT_CLIENTS, AT_SERVER, Home, Signature
from fedjax_core.language.differentiation.staging import rebuild
from fedjax_core.language.placements import CLIENTS, SERVER
from fedjax_core.language.program import Program
from fedjax_core.language.tracing import member_of
from fedjax_core.language.types import (
    FederatedType,
    FunctionType,
    SequenceType,
    StructType,
    TensorType,
    Type,
    is_extended_dtype,
)

ArgumentNumbers = int | tuple[int, ...]
Axes = int | None | tuple[int | None, ...]


def gradient(program: Program, argnums: ArgumentNumbers, *, with_value: bool) -> Program:
    """The program of the derivatives of a program's only result.

    Args:
      program: whose result is one floating-point scalar at the server.
      argnums: the arguments to differentiate by.
      with_value: whether the result is `(value, gradients)`.

    Raises:
      FederatedTypeError: where the result or an argument cannot be differentiated, or the program
        has an edge that cannot.
      ArgumentError: for arguments that do not exist.
    """
    what = "value_and_grad" if with_value else "grad"
    _check_parameters(program, what)
    _check_scalar(program, what)
    trees = [_argument_tree(program, k) for k in _chosen_arguments(program, argnums, what)]
    chosen = tuple(index for tree in trees for index in jax.tree.leaves(tree))
    for index in chosen:
        _check_differentiable(program, index, what)
    numbers = iter(range(with_value, len(chosen) + with_value))
    numbered = [jax.tree.map(lambda _: next(numbers), tree) for tree in trees]
    result = numbered[0] if isinstance(argnums, int) else tuple(numbered)
    gradients = tuple(_home_of_gradient(_parameter_types(program)[i]) for i in chosen)
    signature = _signature(
        program,
        f"{what}_{program.name}",
        homes=(AT_SERVER, *gradients) if with_value else gradients,
        result_tree=(0, result) if with_value else result,
    )
    return rebuild(_differentiated(program, chosen, what, with_value), signature)


def _differentiated(
    program: Program, chosen: tuple[int, ...], what: str, with_value: bool
) -> Callable[..., list[Any]]:
    """The member function of the derivatives by the parameters at the indices `chosen`."""
    member = member_function(program, what)

    def function(*args: Any) -> list[Any]:
        def loss(*given: Any) -> Any:
            replaced = dict(zip(chosen, given, strict=True))
            return member(*(replaced.get(i, arg) for i, arg in enumerate(args)))[0]

        numbers = tuple(range(len(chosen)))
        try:
            value, gradients = jax.value_and_grad(loss, numbers)(*(args[i] for i in chosen))
        except ValueError as error:
            _explain(error, f"{what} of `{program.name}`")
            raise
        return [value, *gradients] if with_value else list(gradients)

    return function


def _explain(error: ValueError, what: str) -> None:
    """Raises the remedy where the error is that of a loop whose end is not known."""
    if "Reverse-mode differentiation does not work" in str(error):
        raise FederatedTypeError(
            f"{what}: expected loops of a fixed number of steps, got one that ends with the data, "
            "such as Sequence.reduce; use Sequence.scan, which goes over the whole capacity."
        ) from error


def _argument_tree(program: Program, k: int) -> Any:
    """The structure of an argument, with indices of the program's parameters at the leaves."""
    order = {position: index for index, position in enumerate(program.parameters)}
    return jax.tree.map(order.__getitem__, program.parameter_tree[k])


def _parameter_types(program: Program) -> tuple[Type, ...]:
    return tuple(program.ops[position].type for position in program.parameters)


def _signature(program: Program, name: str, homes: tuple[Home, ...], result_tree: Any) -> Signature:
    """A signature with the parameters of `program`."""
    count = len(program.parameter_tree)
    return Signature(
        name=name,
        parameters=_parameter_types(program),
        parameter_tree=tuple(_argument_tree(program, k) for k in range(count)),
        packed=program.type_signature.parameter,
        parameter_names=program.parameter_names,
        homes=homes,
        result_tree=result_tree,
    )


def _home_of_gradient(t: Type) -> Home:
    """Where the parameter is; at each client its own, even where the parameter is all-equal."""
    is_at_clients = isinstance(t, FederatedType) and t.placement is CLIENTS
    return AT_CLIENTS if is_at_clients else AT_SERVER


def _check_parameters(program: Program, what: str) -> None:
    for k, t in enumerate(program.argument_types):
        if t.contains(FunctionType):
            raise FederatedTypeError(
                f"{what} of `{program.name}`: expected values as arguments, got a function of type "
                f"{t} as {program.name_of_argument(k)}; bind it first."
            )


def _check_scalar(program: Program, what: str) -> None:
    t = program.type_signature.result
    member = t.member if isinstance(t, FederatedType) and t.placement is SERVER else None
    is_scalar = isinstance(member, TensorType) and member.shape == () and _is_float(member.dtype)
    if not is_scalar:
        raise FederatedTypeError(
            f"{what} of `{program.name}`: expected one floating-point scalar at the server as the "
            f"result, such as float32@SERVER, got {t}; aggregate to a scalar loss, with "
            "federated_mean for example."
        )


def _is_float(dtype: Any) -> bool:
    return not is_extended_dtype(dtype) and jnp.issubdtype(dtype, jnp.floating)


def _chosen_arguments(program: Program, argnums: ArgumentNumbers, what: str) -> list[int]:
    count = len(program.parameter_tree)
    given = tuple(argnums) if isinstance(argnums, tuple | list) else (argnums,)
    is_valid = all(type(k) is int and -count <= k < count for k in given)
    chosen = [k % count for k in given] if is_valid else []
    if not chosen or len(set(chosen)) < len(chosen):
        raise ArgumentError(
            f"{what} of `{program.name}`: expected argnums to be different numbers of its {count} "
            f"arguments, from 0 to {count - 1}, got {argnums!r}."
        )
    return chosen


def _check_differentiable(program: Program, index: int, what: str) -> None:
    t = _parameter_types(program)[index]
    (k,) = (
        k
        for k in range(len(program.parameter_tree))
        if index in jax.tree.leaves(_argument_tree(program, k))
    )
    where = f"{what} of `{program.name}`, {program.name_of_argument(k)}"
    if t.contains(SequenceType):
        raise FederatedTypeError(
            f"{where}: expected arrays of floating-point numbers, got {t}, which has a sequence; "
            "differentiate by another argument."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(inference.template(member_of(t))):
        if not _is_float(leaf.dtype):
            raise FederatedTypeError(
                f"{where}: expected floating-point numbers, got {leaf.dtype} for the leaf "
                f"`{jax.tree_util.keystr(path) or 'itself'}` of {t}; pass it in an argument that "
                "argnums leaves out."
            )


def vectorised(program: Program, in_axes: Axes, axis_size: int) -> Program:
    """The program of several instances at once, along a new axis of each member's values.

    Args:
      program: any of local computations, broadcasts, sums, minima and maxima.
      in_axes: for each argument, or for all, where its leaves have the new axis; None for one that
        all instances share.
      axis_size: how many instances there are.

    Returns:
      A program whose results have a new leading axis.

    Raises:
      FederatedTypeError: for sequences along the axis, and edges that have no such form.
      ArgumentError: for axes that do not exist.
    """
    _check_parameters(program, "vmap")
    _check_no_sequences(program)
    axes = axes_of(program, in_axes)
    leaf_axes = {
        index: axis
        for k, axis in enumerate(axes)
        for index in jax.tree.leaves(_argument_tree(program, k))
    }
    in_order = tuple(leaf_axes[index] for index in range(len(leaf_axes)))
    numbers = iter(range(len(program.results)))
    signature = _signature(
        program,
        f"vmap_{program.name}",
        homes=tuple(Home.of(program.ops[position].type) for position in program.results),
        result_tree=jax.tree.map(lambda _: next(numbers), program.result_tree),
    )
    signature = dataclasses.replace(
        signature,
        packed=_packed(program, axes, axis_size),
        parameters=tuple(
            _with_axis(t, axis, axis_size, program.name)
            for t, axis in zip(signature.parameters, in_order, strict=True)
        ),
    )
    member = member_function(program, "vmap")

    def function(*args: Any) -> list[Any]:
        return jax.vmap(member, in_order, axis_size=axis_size)(*args)

    return rebuild(function, signature)


def axes_of(program: Program, in_axes: Axes) -> tuple[int | None, ...]:
    """The axis of each argument.

    Raises:
      ArgumentError: where there is not one for each.
    """
    count = len(program.parameter_tree)
    axes = tuple(in_axes) if isinstance(in_axes, tuple | list) else (in_axes,) * count
    is_valid = all(axis is None or type(axis) is int for axis in axes)
    if not is_valid or len(axes) != count:
        raise ArgumentError(
            f"vmap of `{program.name}`: expected in_axes to be an int, None, or one of them for "
            f"each of its {count} arguments, got {in_axes!r}."
        )
    return axes


def _with_axis(t: Type, axis: int | None, size: int | None, where: str) -> Type:
    """`t` with a new axis in each of its tensors."""
    if axis is None:
        return t
    if isinstance(t, FederatedType):
        return FederatedType(_with_axis(t.member, axis, size, where), t.placement, t.all_equal)
    if isinstance(t, StructType):
        fields = [(name, _with_axis(child, axis, size, where)) for name, child in t.elements]
        return StructType(fields, t.container)
    if not isinstance(t, TensorType) or t.shape is None:
        raise FederatedTypeError(
            f"vmap, {where}: expected arrays along the new axis, got {t}; give this argument the "
            "axis None, so that all instances share it."
        )
    if not -len(t.shape) - 1 <= axis <= len(t.shape):
        raise ArgumentError(
            f"vmap, {where}: expected an axis from 0 to {len(t.shape)} for {t}, got {axis}."
        )
    position = axis % (len(t.shape) + 1)
    return TensorType(t.dtype, (*t.shape[:position], size, *t.shape[position:]))


def _packed(program: Program, axes: tuple[int | None, ...], size: int | None) -> Type | None:
    """The one type of all arguments, each with a new axis."""
    packed = program.type_signature.parameter
    changed = [
        _with_axis(t, axis, size, program.name_of_argument(k))
        for k, (t, axis) in enumerate(zip(program.argument_types, axes, strict=True))
    ]
    if packed is None or len(changed) == 1:
        return changed[0] if changed else None
    assert isinstance(packed, StructType)
    return StructType(list(zip(packed.names(), changed, strict=True)), packed.container)


def _check_no_sequences(program: Program) -> None:
    result = program.type_signature.result
    if result.contains(SequenceType):
        raise FederatedTypeError(
            f"vmap of `{program.name}`: expected arrays as results, got {result}; return what the "
            "sequence is reduced to."
        )


def vectorised_type(program: Program, in_axes: Axes) -> FunctionType:
    """The type of `vectorised` for an axis of any size."""
    _check_no_sequences(program)
    result = _with_axis(program.type_signature.result, 0, None, "result")
    return FunctionType(_packed(program, axes_of(program, in_axes), None), result)
