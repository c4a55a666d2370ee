"""What a program sends: every edge with its direction, its type, its codec and its bits."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from fedjax_core.bits import format_bits
from fedjax_core.errors import ArgumentError
from fedjax_core.language.local import Local
from fedjax_core.language.program import Broadcast, Constant, Edge, Program, type_bits
from fedjax_core.language.types import Type


class EdgeReport(NamedTuple):
    """One crossing between the server and the clients.

    Attributes:
      direction: "down", from the server, or "up".
      operator: "broadcast", "sum" or "aggregate".
      name: of the edge.
      type: of one message.
      codec: the name of its codec, None for raw values.
      bits_per_client: the size of one message; None where it depends on the values.
      bits: of the whole cohort, if every client takes part.
      location: file and line of the operator.
    """

    direction: str
    operator: str
    name: str
    type: Type
    codec: str | None
    bits_per_client: int | None
    bits: int | None
    location: str


class CommunicationReport(tuple[EdgeReport, ...]):
    """The edges of a computation; `str` makes a table of them."""

    __slots__ = ()

    @property
    def broadcast_bits(self) -> int | None:
        """The bits from the server to the clients; None if an edge's bits depend on the values."""
        return _total(edge for edge in self if edge.direction == "down")

    @property
    def aggregate_bits(self) -> int | None:
        """The bits from the clients to the server, likewise."""
        return _total(edge for edge in self if edge.direction == "up")

    def __str__(self) -> str:
        header = ("direction", "operator", "name", "codec", "bits a client", "bits", "type")
        rows = [header, *(_row(edge) for edge in self)]
        widths = [min(max(len(row[i]) for row in rows), 40) for i in range(len(header))]
        lines = ["  ".join(f"{x:<{w}}" for x, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)


def _total(edges: Iterator[EdgeReport]) -> int | None:
    bits = [edge.bits for edge in edges]
    return None if None in bits else sum(b for b in bits if b is not None)


def _row(edge: EdgeReport) -> tuple[str, ...]:
    dynamic = "by value"
    return (
        edge.direction,
        edge.operator,
        edge.name,
        edge.codec or "-",
        dynamic if edge.bits_per_client is None else f"{edge.bits_per_client:,}",
        dynamic if edge.bits is None else format_bits(edge.bits),
        _shorten(str(edge.type)),
    )


def _shorten(text: str, width: int = 60) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def communication(computation: Any, *, num_clients: int) -> CommunicationReport:
    """Every edge of a computation, read from its program.

    Args:
      computation: a `Computation`, or anything else with a `program`.
      num_clients: how many clients take part.

    Returns:
      A tuple of `EdgeReport` with totals, which prints as a table.

    Raises:
      ArgumentError: if `num_clients` is negative, or there is no program.

    Examples:
      >>> import numpy as np
      >>> from fedjax_core.execution.computation import federated_computation
      >>> from fedjax_core.language import operators, placements, types
      >>> mean = federated_computation(
      ...     operators.federated_mean, types.FederatedType(np.float32, placements.CLIENTS))
      >>> communication(mean, num_clients=10).aggregate_bits
      320
    """
    program = getattr(computation, "program", None)
    if not isinstance(program, Program):
        raise ArgumentError(
            f"Expected a federated computation with a program, got {computation!r}."
        )
    if isinstance(num_clients, bool) or not isinstance(num_clients, int) or num_clients < 0:
        raise ArgumentError(f"Expected a number of clients of at least 0, got {num_clients=}.")
    return CommunicationReport(_report(program, op, num_clients) for _, op in program.edges)


def _report(program: Program, op: Edge, num_clients: int) -> EdgeReport:
    per_client = bits_per_client(program, op)
    source = program.ops[op.inputs[0]]
    is_down = isinstance(op, Broadcast)
    return EdgeReport(
        direction="down" if is_down else "up",
        operator=type(op).__name__.lower(),
        name=op.label,
        type=source.type,
        codec=op.codec.name if op.codec else None,
        bits_per_client=per_client,
        bits=None if per_client is None else per_client * num_clients,
        location=op.location,
    )


def bits_per_client(program: Program, op: Edge) -> int | None:
    """The size of one message on an edge; None where it depends on the values."""
    source = program.ops[op.inputs[0]]
    if isinstance(op, Broadcast) and isinstance(source, Constant):
        return 0  # part of the program
    return type_bits(source.type) if op.codec is None else _fixed_bits(op.codec.bits)


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
