"""Derivatives and vectorisation of federated computations, as federated computations again."""

import functools
from typing import Any

import jax
import numpy as np

from fedjax_core.errors import ArgumentError, FederatedTypeError
from fedjax_core.execution.computation import Computation
from fedjax_core.language import feeding, inference
from fedjax_core.language.arguments import bind_arguments
from fedjax_core.language.differentiation.transforms import (
    ArgumentNumbers,
    Axes,
    axes_of,
    gradient,
    vectorised,
    vectorised_type,
)
from fedjax_core.language.placements import CLIENTS
from fedjax_core.language.tracing import Value, member_of
from fedjax_core.language.types import FederatedType, StructType, Type
from fedjax_core.language.values import Federated


def grad(computation: Computation, argnums: ArgumentNumbers = 0) -> Computation:
    """The gradient of a federated computation: a federated computation of the same arguments.

    It has broadcasts and sums alone, sends what a gradient costs, and runs in every way that a
    computation does. Clients that are padding have no part in it, whatever numbers they hold.

    Args:
      computation: whose result is one floating-point scalar at the server. Its edges are
        broadcasts, sums, means, minima and maxima without codecs.
      argnums: by which arguments to differentiate: a position, or a tuple of them. They hold
        floating-point numbers; other arguments may hold anything.

    Returns:
      A computation whose result has the structure of the argument, or is a tuple of those: at the
      server for what is there (or unplaced), at the clients each client's own gradient.

    Raises:
      FederatedTypeError: naming the argument and leaf that is no floating-point number, or the
        operator that has no derivative.
      ArgumentError: for an argument that does not exist.

    Note:
      Clients that all sums of a value leave out by `present` have no part in gradients by what the
      server sent, and may hold NaN. A gradient by a client's own value is NaN where that is.

    Examples:
      >>> import fedjax_core as fc
      >>> import numpy as np
      >>> @fc.federated_computation(fc.FederatedType(np.float32, fc.SERVER))
      ... def loss(x):
      ...     return fc.federated_mean(fc.federated_map(lambda x: x * x, fc.federated_broadcast(x)))
      >>> str(grad(loss).type_signature), float(grad(loss)(3.0, num_clients=3))
      ('(float32@SERVER -> float32@SERVER)', 6.0)
    """
    program = _checked(computation, "grad").program
    return Computation(gradient(program, argnums, with_value=False))


def value_and_grad(computation: Computation, argnums: ArgumentNumbers = 0) -> Computation:
    """The value and the gradient of a federated computation, see `grad`.

    Args:
      computation: whose result is one floating-point scalar at the server.
      argnums: by which arguments to differentiate: a position, or a tuple of them.

    Returns:
      A computation with the result `(value, gradient)`.

    Raises:
      FederatedTypeError: as `grad`.
      ArgumentError: as `grad`.

    Examples:
      >>> import fedjax_core as fc
      >>> import numpy as np
      >>> at_clients = fc.FederatedType(np.float32, fc.CLIENTS)
      >>> @fc.federated_computation(at_clients, fc.FederatedType(np.float32, fc.SERVER))
      ... def loss(x, w):
      ...     error = fc.federated_map(lambda x, w: (w - x) ** 2, (x, fc.federated_broadcast(w)))
      ...     return fc.federated_mean(error)
      >>> [float(x) for x in value_and_grad(loss, argnums=1)([1.0, 2.0, 3.0], 4.0)]
      [4.666666507720947, 4.0]
    """
    program = _checked(computation, "value_and_grad").program
    return Computation(gradient(program, argnums, with_value=True))


def vmap(
    computation: Computation, in_axes: Axes = 0, *, axis_size: int | None = None
) -> "Computation | VectorisedComputation":
    """Several instances of a federated computation at once, such as several models.

    The new axis is one of each member's values; the clients are the same for all instances.

    Args:
      computation: of local computations, broadcasts, sums, means, minima and maxima.
      in_axes: for all arguments, or a tuple with one for each: where the leaves have the new axis,
        not counting that of the clients; None for an argument that all instances share.
      axis_size: how many instances there are. None reads it from the arguments of each call.

    Returns:
      A computation whose results have a new leading axis. Its types hold the size, so without
      `axis_size` it is a `VectorisedComputation`, which makes one for each size it meets.

    Raises:
      FederatedTypeError: for sequences along the axis, or naming the operator that has no such
        form.
      ArgumentError: for an axis that does not exist.

    Examples:
      >>> import fedjax_core as fc
      >>> import numpy as np
      >>> at_clients = fc.FederatedType(np.float32, fc.CLIENTS)
      >>> @fc.federated_computation(at_clients, fc.FederatedType(np.float32, fc.SERVER))
      ... def fit(x, w):
      ...     return fc.federated_mean(
      ...         fc.federated_map(lambda x, w: w * x, (x, fc.federated_broadcast(w))))
      >>> models = vmap(fit, in_axes=(None, 0))
      >>> str(models.type_signature)
      '(<x={float32}@CLIENTS,w=float32[?]@SERVER> -> float32[?]@SERVER)'
      >>> models([1.0, 3.0], np.float32([1, 10])).tolist()
      [2.0, 20.0]
    """
    several = VectorisedComputation(_checked(computation, "vmap"), in_axes)
    return several if axis_size is None else several.for_axis_size(axis_size)


def _checked(computation: Any, what: str) -> Computation:
    if isinstance(computation, Computation):
        return computation
    remedy = "make one with federated_computation"
    if isinstance(computation, VectorisedComputation):
        remedy = "choose its size with for_axis_size, or with vmap(..., axis_size=)"
    elif callable(getattr(computation, "for_types", None)):
        remedy = "choose its types with for_types"
    raise FederatedTypeError(
        f"{what}: expected a federated computation of known types, got {computation!r}; {remedy}."
    )


class VectorisedComputation:
    """Instances of a computation along a new axis, as many as the arguments of a call have.

    Attributes:
      computation: of one instance.
      in_axes: the axis of each argument, None where all instances share it.
      type_signature: the type, with `?` for the size of the axis.
    """

    def __init__(self, computation: Computation, in_axes: Axes) -> None:
        self.computation = computation
        self.in_axes = axes_of(computation.program, in_axes)
        self.type_signature = vectorised_type(computation.program, in_axes)
        self._sized = functools.lru_cache(maxsize=64)(
            lambda size: Computation(vectorised(computation.program, self.in_axes, size))
        )

    def __repr__(self) -> str:
        return f"vmap of {self.computation.program.name}: {self.type_signature}"

    def for_axis_size(self, axis_size: int) -> Computation:
        """The computation of so many instances."""
        if isinstance(axis_size, bool) or not isinstance(axis_size, int) or axis_size < 1:
            raise ArgumentError(f"vmap: expected a positive axis_size, got {axis_size!r}.")
        return self._sized(axis_size)

    def __call__(self, *args: Any, num_clients: int | None = None, **kwargs: Any) -> Any:
        """Runs the computation for the number of instances that `args` have, see `Computation`.

        Raises:
          ArgumentError: where no argument tells it.
        """
        program = self.computation.program
        names, types = program.parameter_names, program.argument_types
        args = bind_arguments(program.name, names, len(types), args, kwargs)
        sizes = (
            _axis_size(arg, t, axis)
            for arg, t, axis in zip(args, types, self.in_axes, strict=True)
            if axis is not None
        )
        size = next((size for size in sizes if size is not None), None)
        if size is None:
            raise ArgumentError(
                f"vmap of `{program.name}`: expected an argument that tells how many instances "
                "there are; pass axis_size= to vmap."
            )
        return self.for_axis_size(size)(*args, num_clients=num_clients)


def _axis_size(arg: Any, t: Type, axis: int) -> int | None:
    """The size of the new axis in an argument whose type without it is `t`."""
    while feeding.is_composite(t):
        assert isinstance(t, StructType)
        leaves = feeding.leaves_of(arg, t, "vmap")
        arg, t = leaves[0], next(t.children())
    if isinstance(arg, Federated | Value):
        given = arg.type_signature if isinstance(arg, Value) else feeding.type_of_federated(arg)
        shapes = [leaf.shape for leaf in jax.tree.leaves(inference.template(member_of(given)))]
    else:
        shapes = _shapes_of_member(arg, t)
    fits = [shape for shape in shapes[:1] if -len(shape) <= axis < len(shape)]
    return fits[0][axis] if fits else None


def _shapes_of_member(arg: Any, t: Type) -> list[tuple[int, ...]]:
    """The shapes of the leaves of what was given for one member, or for the first client."""
    if isinstance(t, FederatedType) and t.placement is CLIENTS and not t.all_equal:
        if not len(arg):
            return []
        arg = arg[0]
    if not isinstance(member_of(t), StructType):
        return [np.shape(arg)]
    leaves = jax.tree.leaves(arg, is_leaf=lambda x: isinstance(x, Value))
    return [
        inference.template(member_of(leaf.type_signature)).shape
        if isinstance(leaf, Value)
        else np.shape(leaf)
        for leaf in leaves
    ]
