"""Computations: programs that can be called, composed, and lowered to JAX functions."""

import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.errors import ArgumentError, FederatedTypeError
from fedjax_core.execution import lowering, reference
from fedjax_core.execution.config import Execution
from fedjax_core.language import feeding, inference, types
from fedjax_core.language.inference import template
from fedjax_core.language.local import name_of, split_function
from fedjax_core.language.placements import CLIENTS
from fedjax_core.language.program import Program
from fedjax_core.language.tracing import Value, inline, trace_program
from fedjax_core.language.types import FederatedType, FunctionType
from fedjax_core.language.values import Federated


class Computation:
    """A federated computation: a typed program, traced once.

    Called with Python lists (one entry a client) it returns Python values; called with `Federated`
    values it returns `Federated` values and can be traced by JAX; called in the body of another
    computation, with placed values, it becomes part of that one.

    Attributes:
      program: the traced `Program`.
      type_signature: its `FunctionType`.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.type_signature: FunctionType = program.type_signature
        self._lowered: dict[Execution, Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"{self.program.name}: {self.type_signature}"

    def __call__(self, *args: Any, num_clients: int | None = None) -> Any:
        """Runs the computation.

        Args:
          *args: one for each parameter: a list with one entry a client, a value for the server, or
            a `Federated`.
          num_clients: needed only where no argument tells how many clients there are.

        Raises:
          FederatedTypeError: naming the argument, and the client, that does not fit.
          ArgumentError: where arguments disagree on the number of clients.
        """
        leaves = self.program.leaves_of(args)
        if any(map(_holds_value, leaves)):
            return inline(self.program, args, self.program.name)
        placed = self._feed(leaves)
        is_lazy = bool(placed) and all(map(_is_federated, leaves))
        if num_clients is None:
            num_clients = self._count_empty(leaves)
        result = self._default(*placed, num_clients=num_clients)
        return result if is_lazy else jax.tree.map(feeding.to_python, result, is_leaf=_is_federated)

    def lower(self, execution: Execution = Execution()) -> Callable[..., Any]:  # noqa: B008 - frozen
        """The computation as a plain JAX function.

        Args:
          execution: how it is to run.

        Returns:
          A function `(*args, valid=None, num_clients=None) -> (result, ledger)`: the arguments are
          `Federated` values in the order of the program's parameters, and so are the leaves of the
          result. `valid` is bool `[clients]`, False for padding. `ledger` is a tuple of `BitCount`,
          one for each of `program.edges`: what this run sent over it.
        """

        def lowered(*args: Any, valid: Any = None, num_clients: int | None = None) -> Any:
            self._check(args)
            clients = _count_clients(self.program, args, valid, num_clients)
            return self._run(args, valid, clients, execution)

        lowered.__name__ = self.program.name
        return lowered

    def _run(self, args: Any, valid: Any, num_clients: int, execution: Execution) -> Any:
        program = self.program
        values = {i: arg.value for i, arg in zip(program.parameters, args, strict=True)}
        if execution.mode == "reference":
            keep = np.ones(num_clients, bool) if valid is None else np.asarray(valid, bool)
            return _run_reference(program, values, keep)
        valid = jnp.ones(num_clients, bool) if valid is None else jnp.asarray(valid, bool)
        results, ledger = lowering.run(program, values, valid, execution.num_lanes(num_clients))
        return _wrap(program, results), tuple(ledger[i] for i, _ in program.edges)

    def _default(self, *args: Any, num_clients: int | None = None) -> Any:
        with self._lock:
            if Execution() not in self._lowered:
                lowered = self.lower()
                self._lowered[Execution()] = jax.jit(
                    lambda *xs, num_clients: lowered(*xs, num_clients=num_clients)[0],
                    static_argnames="num_clients",
                )
            jitted = self._lowered[Execution()]
        return jitted(*args, num_clients=num_clients)

    def _parameters(self, leaves: Any) -> list[tuple[FederatedType, Any, str]]:
        """For each federated parameter its type, what was given for it, and its name in errors."""
        parameters = self.program.parameters
        if len(leaves) != len(parameters):
            raise FederatedTypeError(
                f"`{self.program.name}` expected {len(parameters)} federated arguments of type "
                f"{self.type_signature.parameter}, got {len(leaves)}."
            )
        return [
            (
                cast(FederatedType, self.program.ops[i].type),
                leaf,
                f"argument {i} of `{self.program.name}`",
            )
            for i, leaf in zip(parameters, leaves, strict=True)
        ]

    def _feed(self, leaves: list[Any]) -> list[Federated]:
        return [feeding.to_placed(leaf, t, where) for t, leaf, where in self._parameters(leaves)]

    def _check(self, args: tuple[Any, ...]) -> None:
        for t, arg, where in self._parameters(args):
            if not _is_federated(arg):
                raise FederatedTypeError(
                    f"{where}: expected a Federated value of type {t}, got {type(arg).__name__}; "
                    "wrap it in fc.Federated."
                )
            feeding.check_federated(arg, t, where)

    def _count_empty(self, leaves: list[Any]) -> int | None:
        """The number of clients where a list of values without arrays alone tells it."""
        for t, leaf, _ in self._parameters(leaves):
            if t.placement is CLIENTS and inference.is_empty(t) and isinstance(leaf, list | tuple):
                return len(leaf)
        return None


def _holds_value(x: Any) -> bool:
    """Whether `x` is a placed value of a body, or a container with one."""
    if not isinstance(x, tuple | list | Mapping):
        return isinstance(x, Value)
    leaves = jax.tree.leaves(x, is_leaf=lambda leaf: isinstance(leaf, Value))
    return any(isinstance(leaf, Value) for leaf in leaves)


def _is_federated(x: Any) -> bool:
    return isinstance(x, Federated)


def _count_clients(program: Program, args: Any, valid: Any, num_clients: int | None) -> int:
    """The one size of the clients axis that all arguments agree on."""
    sizes = {
        f"argument {i}": feeding.num_clients_of(arg)
        for i, arg in zip(program.parameters, args, strict=True)
    }
    sizes["valid"] = None if valid is None else len(valid)
    sizes["num_clients"] = num_clients
    known = {name: size for name, size in sizes.items() if size is not None}
    if num_clients is not None and (isinstance(num_clients, bool) or num_clients < 0):
        raise ArgumentError(f"Expected a number of clients of at least 0, got {num_clients=}.")
    if len(set(known.values())) > 1:
        raise ArgumentError(
            f"`{program.name}` expected one number of clients, got {known}; pass values of the "
            "same clients."
        )
    needs_clients = any(lowering.is_at_clients(op) for op in program.ops)
    if not known and needs_clients:
        raise ArgumentError(
            f"`{program.name}` expected to know how many clients there are, and no argument says "
            "so; pass num_clients=."
        )
    return next(iter(known.values()), 0)


def _wrap(program: Program, results: dict[int, Any]) -> Any:
    def wrap(i: int) -> Federated:
        t = program.ops[i].type
        assert isinstance(t, FederatedType)
        return Federated(results[i], t.placement, t.all_equal)

    return jax.tree.map(wrap, program.result_tree)


def _run_reference(program: Program, values: dict[int, Any], keep: np.ndarray) -> Any:
    """The reference interpreter on stacked values, for the clients that are to be kept."""
    clients = np.flatnonzero(keep).tolist()
    for i in program.parameters:
        if not lowering.is_uniform(program.ops[i]):
            values[i] = [lowering.member(values[i], client) for client in clients]
    results, ledger = reference.run(program, values, len(clients))
    for i in set(program.results):
        t = cast(FederatedType, program.ops[i].type)
        if not lowering.is_uniform(program.ops[i]):
            rows = dict(zip(clients, results[i], strict=True))
            # As in the other readings, what stands in the rows of the others is undefined.
            filler = results[i][0] if clients else jax.tree.map(_zeros, template(t.member))
            rows = [rows.get(client, filler) for client in range(len(keep))]
            results[i] = feeding.stack_members(rows, t.member)
    return _wrap(program, results), tuple(ledger[i] for i, _ in program.edges)


def _zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(x.shape, x.dtype)


class PolymorphicComputation:
    """A federated computation without declared types: traced once for each type it meets."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._traced: dict[Any, Computation] = {}
        self._lock = threading.RLock()  # the function may call this computation with other types

    def __call__(self, *args: Any, num_clients: int | None = None) -> Any:
        """Runs the computation for the types of `args`, which are `Federated` or placed values."""
        return self.for_types(*map(_type_of_argument, args))(*args, num_clients=num_clients)

    def for_types(self, *parameters: types.Type) -> Computation:
        """The computation for parameters of these types."""
        with self._lock:
            if parameters not in self._traced:
                self._traced[parameters] = Computation(trace_program(self.function, parameters))
            return self._traced[parameters]


def _type_of_argument(arg: Any) -> types.Type:
    if isinstance(arg, Value):
        return arg.type_signature
    if isinstance(arg, Federated):
        return feeding.type_of_federated(arg)
    if isinstance(arg, tuple | list | Mapping):
        fields, container = types.one_level(arg)
        elements = [(name, _type_of_argument(child)) for name, child in fields]
        return types.StructType(elements, container)
    raise FederatedTypeError(
        f"Expected a Federated value for a computation without declared types, got {arg!r}; say "
        "where it lives with fc.Federated, or declare the types."
    )


def federated_computation(*args: Any) -> Any:
    """Makes a federated computation of a Python function of placed values.

    Use it as `@federated_computation(T1, T2)`, as `federated_computation(function, T1, T2)`, or
    without types, to be traced for the types it is called with. The function runs once, when it is
    defined.

    Args:
      *args: the types of the parameters, as `to_type` takes them, after the function if given.

    Returns:
      A `Computation` (or a decorator that makes one).

    Raises:
      FederatedTypeError: where an operator in the body meets a type it does not take.

    Examples:
      >>> import numpy as np
      >>> from fedjax_core.language.operators import federated_mean
      >>> from fedjax_core.language.placements import CLIENTS
      >>> average = federated_computation(federated_mean, FederatedType(np.float32, CLIENTS))
      >>> str(average.type_signature), round(float(average([68.5, 70.3, 69.8])), 4)
      ('({float32}@CLIENTS -> float32@SERVER)', 69.5333)
    """
    function, specs = split_function(args)
    parameters = tuple(types.to_type(spec) for spec in specs)

    def decorate(function: Callable[..., Any]) -> Any:
        if not parameters and _takes_arguments(function):
            return PolymorphicComputation(function)
        return Computation(trace_program(function, parameters))

    return decorate if function is None else decorate(function)


def _takes_arguments(function: Callable[..., Any]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise FederatedTypeError(
            f"`{name_of(function)}` expected named parameters, got *args or **kwargs; name each "
            "one."
        )
    return bool(parameters)
