"""What the proof of privacy found, and how it is printed."""

from typing import NamedTuple

from fedjax_core.language.analysis import shorten, show_bits, table
from fedjax_core.language.types import Type


class Crossing(NamedTuple):
    """One way up, from the clients to the server.

    Attributes:
      position: of the operation in the program.
      operator: as in `communication`, or "count".
      name: of the edge.
      type: of one message.
      visibility: "blind" if the server learns nothing but the total, else "clear".
      bits_per_client: the size of one message, of a secure sum that over a single client; None
        where it depends on the values.
      is_client_data: whether the message depends on what clients hold.
      reveals_presence: whether what clients hold decides who of them sends.
      location: file and line of the operator.
    """

    position: int
    operator: str
    name: str
    type: Type
    visibility: str
    bits_per_client: int | None
    is_client_data: bool
    reveals_presence: bool
    location: str


class OutsideCall(NamedTuple):
    """A call of Python or of foreign code, on allowed aggregates or on no client data.

    Attributes:
      position: of the operation in the program.
      function: whose code has the call.
      call: the call and what it is nested in, such as "debug_callback in scan".
      placement: where it happens: "clients", "server" or "caller".
      location: file and line of the operator.
    """

    position: int
    function: str
    call: str
    placement: str
    location: str


class CapturedConstant(NamedTuple):
    """An array that is a part of the program, and goes wherever it goes.

    Attributes:
      position: of the operation in the program.
      holder: "constant", or the function that captured it.
      placement: where it is used: "clients", "server" or "caller".
      shape: of the array.
      dtype: of the array.
      num_bytes: its size.
    """

    position: int
    holder: str
    placement: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


class ClientResult(NamedTuple):
    """A result that stays at the clients; `position` is that of its operation."""

    position: int
    type: Type


class PrivacyReport(NamedTuple):
    """What was found while proving that clients' values leave as aggregates only; `str` prints it.

    Attributes:
      name: of the computation.
      allowed: the aggregations that were allowed.
      crossings: every way up.
      outside_calls: calls of Python or foreign code, on allowed aggregates or on no client data.
      constants: arrays that are part of the program.
      client_results: what the computation returns at the clients, and the server does not get.
    """

    name: str
    allowed: tuple[str, ...]
    crossings: tuple[Crossing, ...]
    outside_calls: tuple[OutsideCall, ...]
    constants: tuple[CapturedConstant, ...]
    client_results: tuple[ClientResult, ...]

    def __str__(self) -> str:
        sections = [
            ("up to the server", [_crossing_row(x) for x in self.crossings]),
            ("calls out of the program, on aggregates or no client data", _call_rows(self)),
            ("constants in the program", [_constant_row(x) for x in self.constants]),
            ("results at the clients", [_result_row(x) for x in self.client_results]),
        ]
        lines = [
            f"{self.name}: clients' values leave through allowed aggregations only",
            f"allowed: {', '.join(self.allowed)}",
        ]
        for title, rows in sections:
            lines += [f"{title}:", *(table(rows) if rows else ["  none"])]
        return "\n".join(lines)


def _crossing_row(x: Crossing) -> tuple[str, ...]:
    remarks = [] if x.is_client_data else ["no client data"]
    remarks += ["shows who is present"] if x.reveals_presence else []
    return (
        f"  %{x.position} {x.operator}",
        x.name,
        x.visibility,
        f"{show_bits(x.bits_per_client)} bits",
        ", ".join(remarks) or "-",
        shorten(str(x.type)),
    )


def _call_rows(report: PrivacyReport) -> list[tuple[str, ...]]:
    return [
        (f"  %{x.position} {x.function}", x.placement, x.call, x.location)
        for x in report.outside_calls
    ]


def _constant_row(x: CapturedConstant) -> tuple[str, ...]:
    shape = ",".join(map(str, x.shape))
    name = f"{x.dtype}[{shape}]" if x.shape else x.dtype
    return f"  %{x.position} {x.holder}", x.placement, name, f"{x.num_bytes:,} bytes"


def _result_row(x: ClientResult) -> tuple[str, ...]:
    return f"  %{x.position}", shorten(str(x.type))
