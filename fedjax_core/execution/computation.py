"""Computations: programs that can be called, composed, and lowered to JAX functions."""

import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fedjax_core.errors import ArgumentError, FederatedTypeError
from fedjax_core.execution import lowering, reference, sharding, waves
from fedjax_core.execution.calling import Interface, out_of_bounds, to_user
from fedjax_core.execution.config import HOST_DRIVEN, Execution
from fedjax_core.execution.lowering import Outcome
from fedjax_core.execution.transport import wired
from fedjax_core.language import feeding, inference, results, types
from fedjax_core.language.arguments import bind_arguments
from fedjax_core.language.bodies import bind_functions, inline, trace_program
from fedjax_core.language.containers import check_nesting
from fedjax_core.language.local import TypedFunction, name_of, positional_names, split_function
from fedjax_core.language.program import Constant, Program, SecureSum
from fedjax_core.language.tracing import Value
from fedjax_core.language.types import FederatedType, FunctionType
from fedjax_core.language.values import Federated, Sequence


class Computation(TypedFunction):
    """A federated computation: a typed program, traced once.

    Called with Python lists (one entry a client) it returns Python values; called with `Federated`
    values it returns `Federated` values and can be traced by JAX; called in the body of another
    computation, with values of that body, it becomes part of that one.

    Attributes:
      program: the traced `Program`.
      type_signature: its `FunctionType`.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.type_signature: FunctionType = program.type_signature
        self.parameters = program.argument_types
        self.function = self._local_function()
        self.__name__ = program.name
        self._jitted = jax.jit(self._compute, static_argnames="num_clients")
        self._interface = Interface.of(program)
        self._bound = functools.lru_cache(maxsize=64)(self._bind)
        ops = program.ops
        self._strings = {i: ops[i] for i in program.results if _is_string(ops[i])}
        self._is_checked = any(isinstance(op, SecureSum) and op.is_checked for op in ops)
        self._takes_federated = bool(self.parameters) and all(
            isinstance(t, FederatedType) for t in self.parameters
        )

    def __repr__(self) -> str:
        return f"{self.program.name}: {self.type_signature}"

    def __call__(self, *args: Any, num_clients: int | None = None, **kwargs: Any) -> Any:
        """Runs the computation.

        Args:
          *args: one for each parameter: for a value at the clients a list with one entry a client,
            or an array with a leading clients axis; for one at the server, or an unplaced one, the
            value; a `Federated`; a function for a parameter that is one.
          num_clients: needed only where no argument tells how many clients there are.
          **kwargs: arguments by the names of the parameters.

        Raises:
          FederatedTypeError: naming the argument, and the client, that does not fit.
          ArgumentError: where arguments disagree on the number of clients.
        """
        if self._takes_federated and not kwargs and num_clients is None and _all_federated(args):
            return self._finish(self._jitted(*args))
        names = self.program.parameter_names
        args = bind_arguments(self.program.name, names, len(self.parameters), args, kwargs)
        for k, arg in enumerate(args):
            if isinstance(arg, list | tuple | dict):
                check_nesting(arg, self.program.name_of_argument(k))
        functions = {k: args[k] for k in self._functions() if not isinstance(args[k], Value)}
        if functions:
            rest = (arg for k, arg in enumerate(args) if k not in functions)
            bound = self._with_functions(tuple(functions.items()))
            return bound(*rest, num_clients=num_clients)
        if any(map(_holds_value, self.program.leaves_of(args))):
            return inline(self.program, args)
        return self._run(args, num_clients)

    def bind(self, *functions: Any) -> "Computation":
        """The computation with functions in the place of those parameters that are functions.

        Args:
          *functions: one for each such parameter, in their order: typed, or any JAX function.

        Raises:
          FederatedTypeError: where a function does not have the parameter's type.
        """
        indices = self._functions()
        if len(functions) != len(indices):
            raise FederatedTypeError(
                f"`{self.program.name}` expected {len(indices)} functions, got {len(functions)}; "
                "pass one for each parameter that is a function."
            )
        return self._with_functions(tuple(zip(indices, functions, strict=True)))

    def place(self, *args: Any, num_clients: int | None = None, **kwargs: Any) -> tuple[Any, ...]:
        """The arguments of a call as arrays, ready for `lower`, and for `jax.jit` and `lax.scan`.

        Args:
          *args: as for a call.
          num_clients: needed only where no argument tells how many clients there are.
          **kwargs: as for a call.

        Returns:
          A `Federated` for each placed parameter, a pytree of arrays for each unplaced one, structs
          of placed values taken apart, in the order that `lower` takes them.

        Raises:
          FederatedTypeError: naming the argument, and the client, that does not fit.
          ArgumentError: where arguments disagree on the number of clients.
        """
        self._check_bound()
        return tuple(self._interface.take(args, kwargs, num_clients).leaves)

    def _check_bound(self) -> None:
        """Raises if there are parameters that are functions."""
        functions = [self.program.name_of_argument(k) for k in self._functions()]
        if functions:
            raise FederatedTypeError(
                f"`{self.program.name}`: expected a computation that knows its functions, got one "
                f"with {', '.join(functions)}; give it its functions first, with bind."
            )

    def _functions(self) -> list[int]:
        return [k for k, t in enumerate(self.parameters) if isinstance(t, FunctionType)]

    def _with_functions(self, functions: tuple[tuple[int, Any], ...]) -> "Computation":
        try:
            return self._bound(functions)
        except TypeError:
            if all(isinstance(function, Hashable) for _, function in functions):
                raise
        return self._bind(functions)  # what has no hash is not remembered

    def _bind(self, functions: tuple[tuple[int, Any], ...]) -> "Computation":
        return Computation(bind_functions(self.program, dict(functions)))

    def lower(self, execution: Execution = Execution()) -> Callable[..., Any]:  # noqa: B008 - frozen
        """The computation as a plain JAX function.

        Args:
          execution: how it is to run.

        Returns:
          A function `(*args, valid=None, num_clients=None) -> (result, ledger)`: the arguments are
          `Federated` values (plain ones where they are unplaced) in the order of the program's
          parameters, and so are the leaves of the result. `valid` is bool `[clients]`, False for
          padding. `ledger` is a tuple of `BitCount`, one for each edge of `program_run_by`: what
          this run sent over it. A secure sum clips what is out of its bounds.
        """
        if not isinstance(execution, Execution):
            raise ArgumentError(
                f"Expected an Execution, got {execution!r}; pass fc.Execution(mode=...)."
            )
        self._check_bound()

        def lowered(*args: Any, valid: Any = None, num_clients: int | None = None) -> Any:
            outcome = self._evaluate(args, valid, num_clients, execution)
            ledger = tuple(outcome.ledger[i] for i, _ in self.program_run_by(execution).edges)
            return _wrap(self.program, outcome.values), ledger

        lowered.__name__ = self.program.name
        return lowered

    def program_run_by(self, execution: Execution) -> Program:
        """The program that an execution runs: with `wire`, the one whose messages are bytes.

        Args:
          execution: how it is to run.

        Returns:
          `program` itself, or one with more edges behind those of `program`.
        """
        return wired(self.program) if execution.wire else self.program

    def _evaluate(
        self, args: Any, valid: Any, num_clients: int | None, execution: Execution
    ) -> Outcome:
        program = self.program_run_by(execution)
        clients = self._interface.check(args, num_clients, valid)
        pairs = zip(program.parameters, args, strict=True)
        values = {i: _with_possible_lengths(_bare(arg)) for i, arg in pairs}
        _check_pools(program.name, values, clients, execution.num_shards)
        if execution.mode in HOST_DRIVEN and any(
            isinstance(x, Tracer) for x in jax.tree.leaves((args, valid))
        ):
            raise ArgumentError(
                f"`{program.name}`: expected concrete values for mode='{execution.mode}', got "
                "values that JAX is tracing; call it outside of jit, or use another mode."
            )
        if execution.mode == "reference":
            keep = np.ones(clients, bool) if valid is None else np.asarray(valid, bool)
            return _run_reference(program, values, keep)
        valid = jnp.ones(clients, bool) if valid is None else jnp.asarray(valid, bool)
        if execution.mesh is not None:
            return sharding.run(program, values, valid, execution)
        lanes, loop = execution.num_lanes(clients), waves.loop_of(execution.mode)
        return lowering.run(program, values, valid, lanes, loop=loop)

    def _compute(self, *args: Any, num_clients: int | None = None) -> Any:
        """What a call compiles: the results but for strings, and what secure sums clipped."""
        outcome = self._evaluate(args, None, num_clients, Execution())
        if self._strings:
            values = {i: x for i, x in outcome.values.items() if i not in self._strings}
            return values, outcome.violations
        return _wrap(self.program, outcome.values), outcome.violations

    def _finish(self, computed: Any) -> Any:
        """The result of a call, once nothing is found to be out of bounds."""
        result, violations = computed
        if self._is_checked and not isinstance(jax.tree.leaves(violations)[0], Tracer):
            self._check_bounds(violations)
        if self._strings:
            strings = {i: cast(Constant, op).value for i, op in self._strings.items()}
            return _wrap(self.program, result | strings)
        return result

    def _check_bounds(self, violations: dict[int, Any]) -> None:
        for i, (below, above) in violations.items():
            if int(below) or int(above):
                op = cast(SecureSum, self.program.ops[i])
                bounds = op.lower, op.upper
                name = self.program.name
                raise out_of_bounds(name, op.label, bounds, op.location, (below, above))

    def _run(self, args: tuple[Any, ...], num_clients: int | None) -> Any:
        given = self._interface.take(args, {}, num_clients)
        known = (results.num_clients_of(x) for x in given.leaves if isinstance(x, Federated))
        is_told = any(size is not None for size in known)
        # What the arrays tell already would only make the compiled function another one.
        stated = None if is_told or not self._interface.has_clients else given.num_clients
        result = self._finish(self._jitted(*given.leaves, num_clients=stated))
        return to_user(result, given.is_lazy)

    def _local_function(self) -> Callable[..., Any]:
        """The computation as a local one, for members' values; only if nothing in it is placed."""

        def call(*members: Any) -> Any:
            leaves = self.program.leaves_of(members)
            return self._finish(self._jitted(*leaves))

        call.__name__ = self.program.name
        return call


def _is_string(op: Any) -> bool:
    return isinstance(op, Constant) and feeding.contains_str(op.type)


def _all_federated(args: tuple[Any, ...]) -> bool:
    for arg in args:  # noqa: SIM110 - on the way of every call, and faster than all()
        if type(arg) is not Federated:
            return False
    return True


def _with_possible_lengths(value: Any) -> Any:
    """`value`, its sequences of a length that their capacity allows."""

    def one(x: Any) -> Any:
        if not isinstance(x, Sequence):
            return x
        numpy = np if isinstance(x.length, np.ndarray) else jnp
        return dataclasses.replace(x, length=numpy.clip(x.length, 0, x.capacity))

    return jax.tree.map(one, value, is_leaf=lambda x: isinstance(x, Sequence))


def _bare(arg: Any) -> Any:
    return arg.value if isinstance(arg, Federated) else arg


def _holds_value(x: Any) -> bool:
    """Whether `x` is a value of a body, or a container with one."""
    if not isinstance(x, tuple | list | Mapping):
        return isinstance(x, Value)
    leaves = jax.tree.leaves(x, is_leaf=lambda leaf: isinstance(leaf, Value))
    return any(isinstance(leaf, Value) for leaf in leaves)


def _wrap(program: Program, results: dict[int, Any]) -> Any:
    def wrap(i: int) -> Any:
        t = program.ops[i].type
        if not isinstance(t, FederatedType):
            return results[i]
        return Federated(results[i], t.placement, t.all_equal)

    return jax.tree.map(wrap, program.result_tree)


def _check_pools(name: str, values: Any, num_clients: int, num_shards: int) -> None:
    """Raises for sequences of several pools, unless each device has one for its clients."""
    for x in jax.tree.leaves(values, is_leaf=waves.is_sequence):
        if not waves.is_sequence(x) or x.pools == 1:
            continue
        if x.pools != num_shards or num_clients % num_shards:
            raise ArgumentError(
                f"`{name}`: expected a mesh of {x.pools} devices, and clients that they divide "
                f"evenly, for a sequence of {x.pools} pools, got {num_shards} devices and "
                f"{num_clients} clients; spread the cohort for the execution that runs it."
            )


def _run_reference(program: Program, values: dict[int, Any], keep: np.ndarray) -> Outcome:
    """The reference interpreter on stacked values, for the clients that are to be kept."""
    clients = np.flatnonzero(keep).tolist()
    for i in program.parameters:
        if not lowering.is_uniform(program.ops[i]):
            values[i] = [waves.member(values[i], client) for client in clients]
    outcome = reference.run(program, values, len(clients))
    for i in set(program.results):
        if not lowering.is_uniform(program.ops[i]):
            t = cast(FederatedType, program.ops[i].type)
            outcome.values[i] = _stack_again(outcome.values[i], clients, t, len(keep))
    return outcome


def _stack_again(rows: list[Any], clients: list[int], t: FederatedType, num_clients: int) -> Any:
    """Client values as arrays; as in the other readings, what others' rows hold is undefined."""
    by_client = dict(zip(clients, rows, strict=True))
    filler = rows[0] if clients else jax.tree.map(_zeros, inference.template(t.member))
    members = [by_client.get(client, filler) for client in range(num_clients)]
    return feeding.stack_members(members, t.member)


def _zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(x.shape, x.dtype)


class PolymorphicComputation:
    """A federated computation without declared types: traced once for each type it meets."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__name__ = name_of(function)
        self._names = tuple(positional_names(function))
        self._traced: dict[Any, Computation] = {}
        self._lock = threading.RLock()  # the function may call this computation with other types

    def __repr__(self) -> str:
        return f"{self.__name__}: a computation without declared types"

    def __getattr__(self, name: str) -> Any:
        if name in ("program", "type_signature", "lower", "place", "parameters"):
            raise AttributeError(
                f"Expected declared types for .{name}, got `{self.__name__}`, which is traced for "
                "the types it meets; choose them with for_types(...)."
            )
        raise AttributeError(name)

    def __call__(self, *args: Any, num_clients: int | None = None, **kwargs: Any) -> Any:
        """Runs the computation for the types of its arguments.

        Args:
          *args: `Federated` values, values of a body, typed functions; numbers and arrays are
            unplaced values.
          num_clients: needed only where no argument tells how many clients there are.
          **kwargs: arguments by the names of the parameters.

        Raises:
          FederatedTypeError: for a list, which does not tell whether it holds clients.
        """
        args = bind_arguments(self.__name__, self._names, len(self._names), args, kwargs)
        return self.for_types(*map(_type_of_argument, args))(*args, num_clients=num_clients)

    def for_types(self, *parameters: Any) -> Computation:
        """The computation for parameters of these types, as `to_type` takes them."""
        key = tuple(map(types.to_type, parameters))
        with self._lock:
            if key not in self._traced:
                self._traced[key] = Computation(trace_program(self.function, key))
            return self._traced[key]


def _type_of_argument(arg: Any) -> types.Type:
    if isinstance(arg, Value | TypedFunction):
        return arg.type_signature
    if isinstance(arg, Federated):
        return feeding.type_of_federated(arg)
    is_leaf = lambda x: isinstance(x, Value | Federated)  # noqa: E731
    if any(map(is_leaf, jax.tree.leaves(arg, is_leaf=is_leaf))):
        fields, container = types.one_level(arg)
        elements = [(name, _type_of_argument(child)) for name, child in fields]
        return types.StructType(elements, container)
    if isinstance(arg, list) or callable(arg):
        raise FederatedTypeError(
            f"Expected a Federated value, an array or a typed function for a computation without "
            f"declared types, got {arg!r}; say where it lives with fc.Federated, or declare the "
            "types."
        )
    return inference.infer_type(arg)


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
    wrong = [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.KEYWORD_ONLY)]
    if any(p.kind is not p.KEYWORD_ONLY or p.default is p.empty for p in wrong):
        raise FederatedTypeError(
            f"`{name_of(function)}` expected named parameters that can be given by position, got "
            f"{', '.join(map(str, wrong))}; name each one, or declare the types."
        )
    return bool(parameters)
