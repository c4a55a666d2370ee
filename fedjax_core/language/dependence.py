"""How the steps of a program depend on each other: paths, and what may not follow from what."""

from collections import deque
from collections.abc import Callable
from typing import Any

import jax

from fedjax_core.errors import ArgumentError
from fedjax_core.language import inference
from fedjax_core.language.analysis import program_of, shorten, sources, table, trips
from fedjax_core.language.program import (
    Apply,
    Broadcast,
    Edge,
    Parameter,
    Program,
    SecureSum,
    Select,
    goes_up,
)
from fedjax_core.language.tracing import member_of


def check_round_trips(computation: Any, *, at_most: int = 1) -> None:
    """Raises if clients and server have to exchange results more than `at_most` times.

    One round trip is what fits one meeting with the clients: a broadcast, their work, and one or
    more aggregations of it. A selection (`federated_select`) is a round trip of its own.

    Args:
      computation: a `Computation`, or anything else with a `program`.
      at_most: how many round trips are allowed.

    Raises:
      ArgumentError: with the path that takes more; or if there is no program, or one that calls
        functions that are parameters.

    Examples:
      >>> import numpy as np
      >>> from fedjax_core.execution.computation import federated_computation
      >>> from fedjax_core.language import operators, placements, types
      >>> mean = federated_computation(
      ...     operators.federated_mean, types.FederatedType(np.float32, placements.CLIENTS))
      >>> check_round_trips(mean, at_most=1)
    """
    program = known_program(computation)
    levels = trips(program)
    late = next((i for i, level in enumerate(levels) if level > at_most), None)
    if late is None:
        return
    path = [late]
    while earlier := sources(program, path[-1]):
        path.append(max(earlier, key=lambda i: levels[i]))
    raise ArgumentError(
        f"`{program.name}` expected at most {at_most} round trips between clients and server, got "
        f"{max(levels)}: the last step of this path is number {at_most + 1}. Split the computation "
        f"there, or allow more with at_most.\n{describe_path(program, path[::-1])}"
    )


def check_broadcast_not_dependent_on_aggregate(computation: Any) -> None:
    """Raises if the server sends clients anything computed from an aggregate of this computation.

    Raises:
      ArgumentError: with the path from the aggregation to the broadcast (or the selection); or if
        there is no program, or one that calls functions that are parameters.
    """
    _check_independent(computation, lambda op: isinstance(op, Broadcast | Select), "broadcast")


def check_aggregate_not_dependent_on_aggregate(computation: Any) -> None:
    """Raises if an aggregation takes anything computed from another one of this computation.

    Raises:
      ArgumentError: with the path from one aggregation to the other; or if there is no program, or
        one that calls functions that are parameters.
    """
    _check_independent(computation, goes_up, "aggregation")


def _check_independent(computation: Any, is_later: Callable[[Any], bool], what: str) -> None:
    program = known_program(computation)
    for i, op in enumerate(program.ops):
        path = find_path(program, i, lambda j: goes_up(program.ops[j])) if is_later(op) else ()
        if path:
            raise ArgumentError(
                f"`{program.name}` expected no {what} to depend on an aggregation, got one at "
                f"{op.location or 'an unknown place'} that does. Split the computation after the "
                f"aggregation.\n{describe_path(program, path)}"
            )


def aggregations(computation: Any) -> tuple[Edge, ...]:
    """The aggregations of a computation: what clients send to become one value at the server.

    Those of values without arrays do not count, nor does `federated_count`, which sends nothing.

    Raises:
      ArgumentError: if there is no program, or one that calls functions that are parameters.
    """
    program = known_program(computation)
    return tuple(
        op
        for _, op in program.edges
        if goes_up(op) and not inference.is_empty(member_of(program.message_type(op)))
    )


def contains_secure_aggregation(computation: Any) -> bool:
    """Whether a computation has an aggregation of which the server learns the total only.

    Raises:
      ArgumentError: as `aggregations`.
    """
    return any(isinstance(op, SecureSum) for op in aggregations(computation))


def contains_unsecured_aggregation(computation: Any) -> bool:
    """Whether a computation has an aggregation of messages that the server sees.

    Raises:
      ArgumentError: as `aggregations`.
    """
    return any(not isinstance(op, SecureSum) for op in aggregations(computation))


def known_program(computation: Any) -> Program:
    """The program of a computation of which all functions are known.

    Raises:
      ArgumentError: if there is no program, or one that calls functions that are parameters.
    """
    program = program_of(computation)
    check_has_no_calls(program, ArgumentError)
    return program


def check_has_no_calls(program: Program, error: type[ArgumentError]) -> None:
    """Raises `error` if `program` calls functions that are parameters."""
    for i, op in enumerate(program.ops):
        if isinstance(op, Apply):
            name = argument_name(program, op.inputs[0])
            raise error(
                f"`{program.name}` expected all functions to be known, got a call of {name} (%{i}, "
                f"{op.location or 'an unknown place'}); give the computation its functions first, "
                "with bind."
            )


def find_path(
    program: Program,
    target: int,
    is_start: Callable[[int], bool],
    passes: Callable[[int], bool] = lambda i: True,
) -> tuple[int, ...]:
    """A shortest path to an operation, along what each is computed from.

    Args:
      program: where to look.
      target: the position of its last operation.
      is_start: whether the path may begin at a position, which is not `target`.
      passes: whether it may go through a position.

    Returns:
      The positions from the first to `target`; empty if there is no path.
    """
    following = {target: target}
    pending = deque([target])
    while pending:
        i = pending.popleft()
        if i != target and is_start(i):
            return _follow(following, i)
        for j in sources(program, i):
            if j not in following and passes(j):
                following[j] = i
                pending.append(j)
    return ()


def _follow(following: dict[int, int], start: int) -> tuple[int, ...]:
    path = [start]
    while following[path[-1]] != path[-1]:
        path.append(following[path[-1]])
    return tuple(path)


def describe_path(program: Program, path: tuple[int, ...] | list[int]) -> str:
    """The operations of a path, one a line, with their types and where they were made."""
    rows = []
    for i in path:
        op = program.ops[i]
        is_parameter = isinstance(op, Parameter)
        where = argument_name(program, i) if is_parameter else op.location
        rows.append(
            (f"  %{i} = {shorten(op.describe())}", f": {shorten(str(op.type))}", f"# {where}")
        )
    return "\n".join(table(rows))


def argument_name(program: Program, position: int) -> str:
    """What errors call the argument that a parameter is, or is a part of."""
    for index, positions in enumerate(program.parameter_tree):
        if position in jax.tree.leaves(positions):
            return program.name_of_argument(index)
    return f"%{position} of `{program.name}`"
