"""What a program sends: every edge with its direction, its type, its codec and its bits."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from fedjax_core.bits import format_bits
from fedjax_core.errors import ArgumentError
from fedjax_core.language import types
from fedjax_core.language.feeding import type_of_federated
from fedjax_core.language.local import Local
from fedjax_core.language.program import (
    Broadcast,
    Constant,
    Edge,
    Extreme,
    Get,
    Op,
    Program,
    Request,
    SecureSum,
    Select,
    Zip,
    goes_up,
    secure_sum_bits,
    type_bits,
)
from fedjax_core.language.tracing import member_of
from fedjax_core.language.types import StructType, Type
from fedjax_core.language.values import Federated


class EdgeReport(NamedTuple):
    """One crossing between the server and the clients.

    Attributes:
      direction: "down", from the server, or "up".
      operator: what made it, as in `federated_...`: "broadcast", "sum", "min", "max", "aggregate",
        "collect", "secure_sum", "secure_modular_sum", "select (keys)" up and "select" down.
      name: of the edge.
      type: of one message.
      codec: the name of its codec, None for raw values.
      bits_per_client: the size of one message; None where it depends on the values.
      bits: of the whole cohort, if every client takes part.
      location: file and line of the operator.
      visibility: "blind" if the server learns nothing but the total, "clear" if it decodes, or
        made, each message.
      round_trip: the round trip that the edge belongs to, from 1. What the server sends after the
        last aggregation has no way back, and its number is `num_round_trips + 1`.
    """

    direction: str
    operator: str
    name: str
    type: Type
    codec: str | None
    bits_per_client: int | None
    bits: int | None
    location: str
    visibility: str = "clear"
    round_trip: int = 1


class CommunicationReport(tuple[EdgeReport, ...]):
    """The edges of a computation; `str` makes a table of them."""

    __slots__ = ()

    @property
    def num_round_trips(self) -> int:
        """How many messages, at most, have to reach the server one after the other.

        It is the largest number of aggregations on a path; what clients ask a selection for counts
        as one too.
        """
        return max((edge.round_trip for edge in self if edge.direction == "up"), default=0)

    @property
    def broadcast_bits(self) -> int | None:
        """The bits from the server to the clients; None if an edge's bits depend on the values."""
        return _total(edge for edge in self if edge.direction == "down")

    @property
    def aggregate_bits(self) -> int | None:
        """The bits from the clients to the server, likewise."""
        return _total(edge for edge in self if edge.direction == "up")

    def __str__(self) -> str:
        header = (
            *("direction", "operator", "name", "codec", "visibility", "trip"),
            *("bits a client", "bits", "type"),
        )
        lines = table([header, *(_row(edge) for edge in self)])
        return "\n".join([*lines, f"round trips: {self.num_round_trips}"])


def _total(edges: Iterator[EdgeReport]) -> int | None:
    bits = [edge.bits for edge in edges]
    return None if None in bits else sum(b for b in bits if b is not None)


def _row(edge: EdgeReport) -> tuple[str, ...]:
    return (
        edge.direction,
        edge.operator,
        edge.name,
        edge.codec or "-",
        edge.visibility,
        str(edge.round_trip),
        show_bits(edge.bits_per_client),
        "by value" if edge.bits is None else format_bits(edge.bits),
        shorten(str(edge.type)),
    )


def show_bits(bits: int | None) -> str:
    """The size of a message, as printed."""
    return "by value" if bits is None else f"{bits:,}"


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """The lines of a table with aligned columns."""
    widths = [min(max(map(len, column)), 40) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{x:<{w}}" for x, w in zip(row, widths, strict=True)) for row in rows]
    return [line.rstrip() for line in lines]


def shorten(text: str, width: int = 60) -> str:
    """`text`, or what fits of it."""
    return text if len(text) <= width else text[: width - 3] + "..."


def communication(computation: Any, *args_or_types: Any, num_clients: int) -> CommunicationReport:
    """Every edge of a computation, read from its program.

    Args:
      computation: a `Computation`, or anything else with a `program`.
      *args_or_types: for a computation without declared types, its arguments (`Federated` values)
        or their types. For others they are not needed, and are checked if given.
      num_clients: how many clients take part.

    Returns:
      A tuple of `EdgeReport` with totals, which prints as a table.

    Raises:
      ArgumentError: if `num_clients` is negative, there is no program, or types are missing.
      FederatedTypeError: if the computation does not take arguments of these types.

    Examples:
      >>> import numpy as np
      >>> from fedjax_core.execution.computation import federated_computation
      >>> from fedjax_core.language import operators, placements, types
      >>> mean = federated_computation(
      ...     operators.federated_mean, types.FederatedType(np.float32, placements.CLIENTS))
      >>> communication(mean, num_clients=10).aggregate_bits
      320
    """
    program = program_of(computation, *args_or_types)
    if isinstance(num_clients, bool) or not isinstance(num_clients, int) or num_clients < 0:
        raise ArgumentError(f"Expected a number of clients of at least 0, got {num_clients=}.")
    levels = trips(program)
    return CommunicationReport(
        _report(program, op, levels[i], num_clients) for i, op in program.edges
    )


def program_of(computation: Any, *args_or_types: Any) -> Program:
    """The program of a computation, traced for arguments of these types if it is polymorphic.

    Raises:
      ArgumentError: if there is no program, or types are missing.
      FederatedTypeError: if the computation does not take arguments of these types.
    """
    given = tuple(_type_of(arg) for arg in args_or_types)
    if hasattr(computation, "for_types"):
        if not given:
            raise ArgumentError(
                "Expected a computation with declared types, got one that is traced for the types "
                "it meets; choose them with computation.for_types(...)."
            )
        computation = computation.for_types(*given)
    program = getattr(computation, "program", None)
    if not isinstance(program, Program):
        raise ArgumentError(
            f"Expected a federated computation with a program, got {computation!r}; one that is "
            "made for each size or type takes for_axis_size(...) or for_types(...) first."
        )
    if given:
        _check_arguments(program, given)
    return program


def _type_of(arg: Any) -> Type:
    if isinstance(arg, Federated):
        return type_of_federated(arg)
    leaves = jax.tree.leaves(arg, is_leaf=lambda x: isinstance(x, Federated))
    if isinstance(arg, tuple | list | Mapping) and any(isinstance(x, Federated) for x in leaves):
        fields, container = types.one_level(arg)
        return StructType([(name, _type_of(child)) for name, child in fields], container)
    return types.to_type(arg)


def _check_arguments(program: Program, given: tuple[Type, ...]) -> None:
    expected = program.argument_types
    if len(given) != len(expected):
        raise ArgumentError(
            f"`{program.name}` expected {len(expected)} arguments, got the types of {len(given)}."
        )
    for index, (wanted, t) in enumerate(zip(expected, given, strict=True)):
        wanted.check_assignable_from(t, program.name_of_argument(index))


def _report(program: Program, op: Edge, level: int, num_clients: int) -> EdgeReport:
    per_client = bits_per_client(program, op, num_clients)
    return EdgeReport(
        direction="down" if _goes_down(op) else "up",
        operator=operator_name(op),
        name=op.label,
        type=program.message_type(op),
        codec=op.codec.name if op.codec else None,
        bits_per_client=per_client,
        bits=None if per_client is None else per_client * num_clients,
        location=op.location,
        visibility=visibility(op),
        round_trip=level + 1 if isinstance(op, Broadcast) else level,
    )


def trips(program: Program) -> tuple[int, ...]:
    """For each operation, how many results had to reach the server before it can be computed.

    Unlike `round_trips`, which counts the passes over the clients that a run makes, it counts what
    a client asks the server for as well, and tells the fields of a struct apart.
    """
    levels: list[int] = []
    for i, op in enumerate(program.ops):
        level = max((levels[j] for j in sources(program, i)), default=0)
        levels.append(level + 1 if goes_up(op) or isinstance(op, Request) else level)
    return tuple(levels)


def sources(program: Program, position: int) -> tuple[int, ...]:
    """The operations that one is computed from: its inputs, of a struct just built the field's."""
    field = _structure(program, position) if isinstance(program.ops[position], Get) else position
    return program.ops[position].inputs if field == position else tuple(jax.tree.leaves(field))


def _structure(program: Program, position: int) -> Any:
    """A value as a structure of the operations that are known to be its parts."""
    op = program.ops[position]
    if isinstance(op, Zip):
        return jax.tree.unflatten(op.tree, op.inputs)
    if isinstance(op, Get):
        struct = _structure(program, op.inputs[0])
        is_known = not isinstance(struct, int)
        return types.one_level(struct)[0][op.position][1] if is_known else position
    return position


def _goes_down(op: Op) -> bool:
    return isinstance(op, Broadcast | Select)


def operator_name(op: Op) -> str:
    """What made an operation, as its users know it."""
    match op:
        case Extreme(is_max=is_max):
            return "max" if is_max else "min"
        case SecureSum(modulus=modulus):
            return "secure_sum" if modulus is None else "secure_modular_sum"
        case Request():
            return "select (keys)"
    return type(op).__name__.lower()


def visibility(op: Op) -> str:
    """Whether the server sees the messages of an edge: "clear" or "blind"."""
    return "blind" if isinstance(op, SecureSum) else "clear"


def bits_per_client(program: Program, op: Edge, num_clients: int) -> int | None:
    """The size of one message on an edge; None where it depends on the values."""
    if isinstance(op, Broadcast) and isinstance(program.ops[op.inputs[0]], Constant):
        return 0  # part of the program
    message = program.message_type(op)
    if isinstance(op, SecureSum):
        return secure_sum_bits(op, member_of(message), num_clients)
    return type_bits(message) if op.codec is None else _fixed_bits(op.codec.bits)


def _fixed_bits(bits: Local) -> int | None:
    """The result of a bit count if it is the same for all messages."""
    traced = next(iter(bits.traces.values()))
    if _depends_on_inputs(traced.jaxpr.jaxpr):
        return None
    zeros = [jnp.zeros(aval.shape, aval.dtype) for aval in traced.jaxpr.in_avals]
    return int(jax.tree.unflatten(traced.out_tree, jex_core.jaxpr_as_fun(traced.jaxpr)(*zeros)))


def _depends_on_inputs(jaxpr: Any) -> bool:
    dependent = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if any(not isinstance(atom, jex_core.Literal) and atom in dependent for atom in eqn.invars):
            dependent.update(eqn.outvars)
    return any(
        not isinstance(atom, jex_core.Literal) and atom in dependent for atom in jaxpr.outvars
    )
