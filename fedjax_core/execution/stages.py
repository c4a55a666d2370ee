"""The pieces of the MapReduce form: what each of them computes, out of a program.

A stage is one round trip. In each,

    context       = prepare(server, *reports)       at the server; what the clients are sent
    output        = work(context, client)           at each client
    accumulator   = zero(server, *reports)
    accumulator   = accumulate(accumulator, output.contribution)
    accumulator   = merge(accumulator, accumulator)
    report        = report(accumulator)             at the server

where `server` holds the arguments that are the same everywhere, `client` those of one client, and
`reports` what the stages before reported. After all stages `update(server, *reports)` computes the
results, and `ledger(server, num_clients, *reports)` what was sent.

Values travel in dicts. Arguments have the names of the parameters; other values are called after
what makes them: an edge after its `name`, a local computation after its function. Of values that
would share a name, the later ones get a number, as in `value_2`. The type of a piece has the names.
What clients send one by one is among `output.kept`, under the name of the client's value, and the
driver puts it into `report.collected`, as a `Sequence` under the name of the edge.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from fedjax_core.bits import BitCount
from fedjax_core.errors import ArgumentError
from fedjax_core.execution.aggregations import AGGREGATIONS, message_bits, sent
from fedjax_core.execution.evaluation import call_local
from fedjax_core.execution.plan import Plan, Values, client_inputs, server_inputs
from fedjax_core.language import inference, types
from fedjax_core.language.local import NOMINAL_CAPACITY, pack_types
from fedjax_core.language.program import Broadcast, Constant, Edge
from fedjax_core.language.tracing import member_of
from fedjax_core.language.types import FunctionType, StructType, Type


class Output(NamedTuple):
    """What one client's work gives.

    Attributes:
      contribution: to each aggregation of the stage, by name.
      kept: values that stay one for each client, by name: its own results, and what is to be
        collected.
    """

    contribution: dict[str, Any]
    kept: dict[str, Any]


class Report(NamedTuple):
    """What the server has of a stage.

    Attributes:
      values: the results of its aggregations, by name.
      bits: what the clients sent for each that is an edge.
      collected: the sequences of what clients sent one by one, by the names of the edges. The
        piece `report` leaves it empty, for it never sees the clients: the driver fills it with
        `report._replace(collected={name: sequence})`.
    """

    values: dict[str, Any]
    bits: dict[str, BitCount]
    collected: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """One plain JAX function of the form, with its type.

    Attributes:
      name: of its role.
      function: of pytrees, one for each parameter.
      parameters: the names and types of its arguments.
      result: the type of its result.
      reuses: the positions of the arguments whose memory `consume` may reuse.
    """

    name: str
    function: Callable[..., Any]
    parameters: tuple[tuple[str, Type], ...]
    result: Type
    reuses: tuple[int, ...] = ()

    @property
    def type_signature(self) -> FunctionType:
        """Its type."""
        names = tuple(name for name, _ in self.parameters)
        return FunctionType(pack_types(names, tuple(t for _, t in self.parameters)), self.result)

    def __repr__(self) -> str:
        return f"{self.name}: {self.type_signature}"

    def __call__(self, *args: Any) -> Any:
        """Evaluates it, compiled.

        Args:
          *args: a dict for each of `parameters`, with the names of its type; for a `report_0` the
            `Report` of that stage.

        Raises:
          ArgumentError: for another number of arguments, or another name in one of them.
        """
        self._check(args)
        return self._compiled(*args)

    def consume(self, *args: Any) -> Any:
        """As a call, after which the arguments `reuses` are gone."""
        self._check(args)
        return self._donating(*args)

    def _check(self, args: tuple[Any, ...]) -> None:
        names = [name for name, _ in self.parameters]
        if len(args) != len(names):
            raise ArgumentError(
                f"{self.name}: expected {len(names)} arguments, {', '.join(names)}, got "
                f"{len(args)}; pass each of them, in this order."
            )
        for (name, t), value in zip(self.parameters, args, strict=True):
            where = f"argument `{name}` of {self.name}"
            if name.startswith("report_"):
                _check_report(value, t, where)
            elif isinstance(t, StructType):
                _check_names(value, t, where)

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        return jax.jit(self.function)

    @functools.cached_property
    def _donating(self) -> Callable[..., Any]:
        return jax.jit(self.function, donate_argnums=self.reuses)


class Stage(NamedTuple):
    """The pieces of one round trip, see this module."""

    prepare: Piece
    work: Piece
    zero: Piece
    accumulate: Piece
    merge: Piece
    report: Piece


def _check_report(report: Any, t: Type, where: str) -> None:
    if not isinstance(report, Report):
        raise ArgumentError(
            f"{where}: expected a Report, got {type(report).__name__}; pass what the piece `report`"
            " of that stage returned."
        )
    for field, part in cast(StructType, t).elements:
        _check_names(getattr(report, str(field)), part, f"{where}, `{field}`")


def _check_names(value: Any, t: Type, where: str) -> None:
    """Raises unless `value` is a dict of the names in `t`."""
    expected = cast(StructType, t).names()
    if not isinstance(value, Mapping):
        raise ArgumentError(
            f"{where}: expected a dict with the names {expected}, got {type(value).__name__}; put "
            "the values into one."
        )
    missing = [name for name in expected if name not in value]
    unknown = sorted(str(name) for name in value if name not in expected)
    if missing or unknown:
        raise ArgumentError(
            f"{where}: expected the names {expected}, got {sorted(map(str, value))}; "
            f"{_remedy(missing, unknown, where)}."
        )


def _remedy(missing: list[Any], unknown: list[str], where: str) -> str:
    parts = [f"add {missing}"] if missing else []
    parts += [f"leave out {unknown}"] if unknown else []
    if missing and where.endswith("`collected`"):
        parts.append("fill it with report._replace(collected=...): a Sequence of what clients kept")
    return " and ".join(parts)


def type_of(value: Any) -> Type:
    """The type of a pytree of arrays, or of their shapes."""
    return inference.infer_type(value)


def make_piece(
    name: str,
    function: Callable[..., Any],
    parameters: dict[str, Type],
    reuses: tuple[int, ...] = (),
) -> Piece:
    """A piece, its result's type traced."""
    templates = [inference.template(t, NOMINAL_CAPACITY) for t in parameters.values()]
    result = type_of(jax.eval_shape(function, *templates))
    return Piece(name, function, tuple(parameters.items()), result, reuses)


def argument_type(plan: Plan, *, uniform: bool) -> StructType:
    """The type of `server`, or of `client`."""
    positions = plan.parameters(uniform=uniform)
    members = {plan.names[i]: member_of(plan.ops[i].type) for i in positions}
    return cast(StructType, types.to_type(members))


def make_stage(plan: Plan, stage: int, before: dict[str, Type]) -> tuple[Stage, Type]:
    """The pieces of a stage.

    Args:
      plan: of the program.
      stage: its number, from 0.
      before: the types of `server` and of the reports of the stages before, by name.

    Returns:
      The stage, and the type of its whole report.
    """
    folded, kept, context = plan.folded(stage), plan.kept(stage), plan.context(stage)

    def prepare(server: Any, *reports: Any) -> dict[str, Any]:
        return plan.named(plan.compute(context, plan.at_server(server, reports)), context)

    def zero(server: Any, *reports: Any) -> dict[str, Any]:
        inputs = [i for target in folded for i in server_inputs(plan.ops[target])]
        values = plan.compute(inputs, plan.at_server(server, reports))
        return {plan.names[i]: _rule(plan, i).zero(plan.ops[i], values) for i in folded}

    def work(context_values: Any, client: Any) -> Output:
        known = plan.known(context_values, context)
        known |= plan.known(client, plan.parameters(uniform=False))
        targets = [i for target in folded for i in client_inputs(plan.ops[target])]
        values = plan.compute([*targets, *kept], known)
        parts = {plan.names[i]: _contribute(plan, i, values) for i in folded}
        return Output(parts, plan.named(values, kept))

    pieces = [make_piece("prepare", prepare, before)]
    client = argument_type(plan, uniform=False)
    pieces.append(make_piece("work", work, {"context": pieces[0].result, "client": client}))
    pieces.append(make_piece("zero", zero, before))
    total, part = pieces[2].result, next(iter(pieces[1].result.children()))
    pieces += _folding_pieces(plan, folded, total, part)
    return Stage(*pieces), _report_type(plan, stage, pieces[-1].result)


def _folding_pieces(plan: Plan, folded: list[int], total: Type, part: Type) -> list[Piece]:
    """The pieces that know nothing of clients or server."""

    def each(function: Callable[..., Any], *values: Any) -> dict[str, Any]:
        return {
            plan.names[i]: function(i, plan.ops[i], *(value[plan.names[i]] for value in values))
            for i in folded
        }

    def accumulate(accumulator: Any, contribution: Any) -> dict[str, Any]:
        wave = jax.tree.map(lambda x: jnp.asarray(x)[None], contribution)
        return each(lambda i, op, a, b: _rule(plan, i).add(op, a, b), accumulator, wave)

    def merge(accumulator: Any, other: Any) -> dict[str, Any]:
        return each(lambda i, op, a, b: _rule(plan, i).merge(op, a, b), accumulator, other)

    def report(accumulator: Any) -> Report:
        values = each(lambda i, op, a: _rule(plan, i).result(op, a), accumulator)
        bits = {
            plan.names[i]: sent(plan.program, op, accumulator[plan.names[i]])
            for i in folded
            if isinstance(op := plan.ops[i], Edge)
        }
        return Report(values, bits, {})

    first = {"accumulator": total, "contribution": part}
    return [
        make_piece("accumulate", accumulate, first, reuses=(0,)),
        make_piece("merge", merge, {"accumulator": total, "other": total}, reuses=(0,)),
        make_piece("report", report, {"accumulator": total}),
    ]


def _report_type(plan: Plan, stage: int, made: Type) -> Type:
    """The type of a report with what the driver collects."""
    template = inference.template(made, NOMINAL_CAPACITY)
    found = {
        plan.names[i]: inference.template(member_of(plan.ops[i].type), NOMINAL_CAPACITY)
        for i in plan.collected(stage)
    }
    return type_of(template._replace(collected=found))


def make_update(plan: Plan, before: dict[str, Type]) -> Piece:
    """The piece that computes the server's results."""
    results = plan.uniform_results()

    def update(server: Any, *reports: Any) -> dict[str, Any]:
        return plan.named(plan.compute(results, plan.at_server(server, reports)), results)

    return make_piece("update", update, before)


def make_ledger(plan: Plan, before: dict[str, Type]) -> Piece:
    """The piece that counts the bits of each edge."""
    server, *reports = before.items()

    def ledger(server: Any, num_clients: jax.Array, *reports: Any) -> tuple[BitCount, ...]:
        known = plan.at_server(server, reports)
        up = {name: bits for report in reports for name, bits in report.bits.items()}
        return tuple(
            up[plan.names[i]] if plan.names[i] in up else _bits(plan, op, known, num_clients)
            for i, op in plan.program.edges
        )

    count = types.TensorType(jnp.uint32)
    return make_piece("ledger", ledger, dict([server, ("num_clients", count), *reports]))


def _bits(plan: Plan, op: Edge, known: Values, num_clients: jax.Array) -> BitCount:
    """The bits on an edge down, or of values that clients send one by one."""
    if isinstance(op, Broadcast) and isinstance(plan.ops[op.inputs[0]], Constant):
        return BitCount.zero()
    if op.codec is None:
        return message_bits(plan.program, op, num_clients).times(num_clients)
    message = plan.compute(op.inputs[:1], known)[op.inputs[0]]
    return call_local(op.codec.bits, message).times(num_clients)


def _rule(plan: Plan, i: int) -> Any:
    return AGGREGATIONS[type(plan.ops[i])]


def _contribute(plan: Plan, i: int, values: Values) -> Any:
    """One client's part of an aggregation."""
    op = plan.ops[i]
    inputs = [values[j] for j in client_inputs(op)]
    return _rule(plan, i).contribute(op, inputs, jnp.bool_(True))
