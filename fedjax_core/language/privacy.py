"""The proof that clients' values leave as aggregates only, read from a program."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from fedjax_core.errors import ArgumentError, PrivacyError
from fedjax_core.language.analysis import (
    bits_per_client,
    operator_name,
    program_of,
    sources,
    visibility,
)
from fedjax_core.language.audit import captured_arrays, outside_calls
from fedjax_core.language.dependence import check_has_no_calls, describe_path, find_path
from fedjax_core.language.local import Local
from fedjax_core.language.privacy_report import (
    CapturedConstant,
    ClientResult,
    Crossing,
    OutsideCall,
    PrivacyReport,
)
from fedjax_core.language.program import (
    Aggregate,
    Broadcast,
    Constant,
    Count,
    Edge,
    Extreme,
    Map,
    Op,
    Parameter,
    Program,
    Request,
    Select,
    Sum,
    goes_up,
    is_at_clients,
    is_at_server,
)

# A mean is a sum, and another one or a count.
_WORDS = {
    "sum": "sum",
    "mean": "sum",
    "min": "min",
    "max": "max",
    "aggregate": "aggregate",
    "collect": "collect",
    "select": "select (keys)",
    "count": "count",
    "secure_sum": "secure_sum",
    "secure_modular_sum": "secure_modular_sum",
}
_ALWAYS = frozenset({"count", "secure_sum", "secure_modular_sum"})


def check_aggregated_only(
    computation: Any, allow: Iterable[str] = ("sum", "mean", "secure_sum")
) -> PrivacyReport:
    """Proves that what clients hold reaches the server through allowed aggregations only.

    The proof is by types and data flow. A client's value is any argument placed at the clients,
    what a call out of JAX returns there, and all that is computed from them at the clients. It has
    to end in an allowed aggregation, or stay at the clients. No function that sees it may call
    Python (`jax.debug.print`, `io_callback`, `checkify.check` and their kin) or foreign code: that
    would be another way out. What hides its code counts as such a call: rules of `custom_vmap` and
    `custom_partitioning`, random keys of generators that are not JAX's own, and primitives that are
    expanded by code of others. The same holds for what the server runs on each client's message: a
    codec's decoder, and `accumulate` and `merge` of a general aggregation.

    How many clients answer is never a secret to the server: `federated_count` is always allowed,
    and so are secure sums. Where `present` depends on what clients hold, the server learns who
    sends; the report says so.

    Args:
      computation: a `Computation`, or anything else with a `program`.
      allow: names of operators, without `federated_`: "sum", "mean" (the same as "sum"), "min",
        "max", "aggregate", "collect", "select", "count", "secure_sum", "secure_modular_sum"; or of
        edges: "aggregate:quantiles" is the general aggregation with `name="quantiles"`. A weighted
        mean takes two sums: "mean:loss" allows the sum called "loss" and that called "weight";
        "sum:loss" the former alone.

    Returns:
      A `PrivacyReport`.

    Raises:
      PrivacyError: with the path from a client's value to where it leaves.
      ArgumentError: for a name that is not known, of an operator or of an edge, or if there is no
        program.

    Note:
      Not covered: what a sum over very few clients tells, or several sums over cohorts that differ
      in one client; what a function writes on purpose into the sum, such as each client's value
      into an entry of its own; how messages are protected on their way, and that the server runs
      this program; `bits` and `stats` of encoded sums, which are sums as well. Code that JAX has
      not traced is not seen: rules of `custom_vjp` and `custom_jvp` for derivatives that the
      program does not take (check the differentiated computation), functions of sequences for
      capacities not met yet (check again after a run), and primitives with a lowering of their own.
      Classes that are registered with JAX as pytrees are trusted: their flattening and unflattening
      is Python that runs on the values before and after the traced code.

    Examples:
      >>> import numpy as np
      >>> from fedjax_core.execution.computation import federated_computation
      >>> from fedjax_core.language import operators, placements, types
      >>> mean = federated_computation(
      ...     operators.federated_mean, types.FederatedType(np.float32, placements.CLIENTS))
      >>> [crossing.operator for crossing in check_aggregated_only(mean).crossings]
      ['sum', 'count']
    """
    words = _check_words(allow)
    program = program_of(computation)
    check_has_no_calls(program, PrivacyError)
    _check_edges(words, program)
    return _Proof(program, words).report()


def _check_words(allow: Iterable[str]) -> tuple[str, ...]:
    if not isinstance(allow, Iterable):
        raise ArgumentError(
            f"allow: expected names of operators, such as ('sum', 'max'), got {allow!r}; pass () "
            "to allow secure sums and counts only."
        )
    words = (allow,) if isinstance(allow, str) else tuple(allow)
    for word in words:
        if not isinstance(word, str) or word.split(":")[0] not in _WORDS:
            raise ArgumentError(
                f"allow: expected names among {', '.join(sorted(_WORDS))}, or one of them with "
                f"that of an edge, such as 'aggregate:quantiles'; got {word!r}."
            )
    return tuple(sorted(set(words)))


def _check_edges(words: tuple[str, ...], program: Program) -> None:
    """Raises for a name of an edge that the program does not have."""
    labels = {op.label for _, op in program.edges}
    for word in words:
        _, colon, label = word.partition(":")
        if colon and label not in labels:
            raise ArgumentError(
                f"allow: expected the name of one of the edges {sorted(labels)} of "
                f"`{program.name}`, got {word!r}; see fc.communication."
            )


def _allowed_by(word: str) -> list[tuple[str, str]]:
    """The operators that `word` allows, each with the name of its edge, or "" for any."""
    head, _, label = word.partition(":")
    weights = [("sum", "weight")] if head == "mean" and label else []
    return [(_WORDS[head], label), *weights]


class _Proof:
    """The flow of clients' values through a program.

    Attributes:
      is_private: for each operation, whether its value is, or depends on, what single clients hold.
    """

    def __init__(self, program: Program, words: tuple[str, ...]) -> None:
        self.program = program
        self.words = words
        self.is_private: list[bool] = []
        self.crossings: list[Crossing] = []
        self.calls: list[OutsideCall] = []

    def report(self) -> PrivacyReport:
        """Goes through all operations in order.

        Raises:
          PrivacyError: at the first one that lets a client's value out.
        """
        for i, op in enumerate(self.program.ops):
            private = tuple(j for j in sources(self.program, i) if self.is_private[j])
            self._check_crossing(i, op, private)
            calls_at_clients = self._check_calls(i, op, bool(private))
            is_source = calls_at_clients or isinstance(op, Parameter)
            self.is_private.append(is_at_clients(op) and (is_source or bool(private)))
        return PrivacyReport(
            self.program.name,
            self.words,
            tuple(self.crossings),
            tuple(self.calls),
            tuple(x for i, op in enumerate(self.program.ops) for x in _constants(i, op)),
            self._client_results(),
        )

    def _check_crossing(self, i: int, op: Op, private: tuple[int, ...]) -> None:
        """Raises if `op` takes a client's value to the server in a way that is not allowed."""
        is_up = goes_up(op) or isinstance(op, Request)
        if private and is_up and not self._is_allowed(op):
            self._refuse_crossing(i, op)
        if is_up:
            self._record(i, op, private)
        stays = is_up or is_at_clients(op)
        if _from_server(op, private) if stays else private:
            self._refuse(i, "takes a client's value to the server without an aggregation", "")

    def _is_allowed(self, op: Op) -> bool:
        name = operator_name(op)
        label = op.label if isinstance(op, Edge) else ""
        words = {pair for word in self.words for pair in _allowed_by(word)}
        return name in _ALWAYS or (name, "") in words or (name, label) in words

    def _refuse_crossing(self, i: int, op: Op) -> None:
        word = next(word for word, name in _WORDS.items() if name == operator_name(op))
        label = f":{op.label}" if isinstance(op, Edge) else ""
        self._refuse(
            i,
            f"sends a client's value to the server by {operator_name(op)}, which is not allowed "
            f"(allowed: {', '.join(self.words) or 'nothing'})",
            f"Use an allowed aggregation, or allow this one with {word + label!r}.",
        )

    def _record(self, i: int, op: Op, private: tuple[int, ...]) -> None:
        is_edge = isinstance(op, Edge)
        presence = _presence(op)
        message = op.inputs[:1] if is_edge else presence
        self.crossings.append(
            Crossing(
                position=i,
                operator=operator_name(op),
                name=op.label if is_edge else "-",
                type=self.program.message_type(op) if is_edge else op.type,
                visibility=visibility(op),
                bits_per_client=bits_per_client(self.program, op, 1) if is_edge else 0,
                is_client_data=bool(set(message) & set(private)),
                reveals_presence=bool(set(presence) & set(private)),
                location=op.location,
            )
        )

    def _check_calls(self, i: int, op: Op, is_private: bool) -> bool:
        """Records calls out of the program; whether `op` makes one at the clients.

        Raises:
          PrivacyError: if one may see a client's own value.
        """
        is_source = False
        for local, placement, is_each in _locals(op):
            for call in outside_calls(local):
                if is_private and is_each:
                    self._refuse_call(i, local, call)
                is_source = is_source or placement == "clients"
                self.calls.append(OutsideCall(i, local.name, call, placement, op.location))
        return is_source

    def _refuse_call(self, i: int, local: Local, call: str) -> None:
        self._refuse(
            i,
            f"lets `{local.name}` call out of the program ({call}) where it sees a client's value, "
            "past every aggregation",
            "Remove the call, or return the value and aggregate it.",
        )

    def _refuse(self, i: int, reason: str, remedy: str) -> None:
        program = self.program
        path = find_path(program, i, self._is_source, lambda j: self.is_private[j])
        where = program.ops[i].location or "an unknown place"
        raise PrivacyError(
            f"`{program.name}` expected clients' values to leave as allowed aggregates only, but "
            f"%{i} ({where}) {reason}. {remedy}".rstrip()
            + f"\n{describe_path(program, path)}"
        )

    def _is_source(self, i: int) -> bool:
        """Whether clients' values begin here."""
        return self.is_private[i] and not any(
            self.is_private[j] for j in self.program.ops[i].inputs
        )

    def _client_results(self) -> tuple[ClientResult, ...]:
        results = dict.fromkeys(self.program.results)
        ops = self.program.ops
        return tuple(ClientResult(i, ops[i].type) for i in results if is_at_clients(ops[i]))


def _from_server(op: Op, private: tuple[int, ...]) -> tuple[int, ...]:
    """Those of the inputs `private` which have to be the server's."""
    match op:
        case Broadcast():
            return tuple(set(private) & set(op.inputs[:1]))
        case Select() | Aggregate():
            return tuple(set(private) & set(op.inputs[1:]))
    return ()


def _presence(op: Op) -> tuple[int, ...]:
    """The inputs that say who sends."""
    if isinstance(op, Count):
        return op.inputs
    return op.inputs[-1:] if isinstance(op, Sum | Extreme) and op.has_presence else ()


def _locals(op: Op) -> list[tuple[Local, str, bool]]:
    """The functions of an operation, where each runs, and whether on each client's own value."""
    match op:
        case Map():
            return [(op.local, _placement(op), True)]
        case Aggregate():
            each = [(local, "server", True) for local in (op.accumulate, op.merge)]
            return [*each, (op.report, "server", False)]
        case Select():
            return [(op.select, "server", False)]  # the server knows the keys by then
        case Broadcast(codec=codec) if codec is not None:
            return [(codec.receive, "clients", True), (codec.bits, "server", False)]
        case Edge(codec=codec) if codec is not None:
            return [(codec.receive, "server", True), (codec.bits, "server", True)]
    return []


def _placement(op: Op) -> str:
    return "clients" if is_at_clients(op) else "server" if is_at_server(op) else "caller"


def _constants(i: int, op: Op) -> list[CapturedConstant]:
    if isinstance(op, Constant):
        holders = [("constant", _placement(op), jax.tree.leaves(op.value))]
    else:
        holders = [(f.name, placement, captured_arrays(f)) for f, placement, _ in _locals(op)]
    rows = (
        CapturedConstant(i, holder, placement, *_describe(array))
        for holder, placement, arrays in holders
        for array in arrays
    )
    return [row for row in rows if row.num_bytes]


def _describe(array: Any) -> tuple[tuple[int, ...], str, int]:
    if isinstance(array, str):
        return (), "str", len(array.encode())
    array = array if hasattr(array, "dtype") else np.asarray(array)
    return array.shape, str(array.dtype), array.size * array.dtype.itemsize
