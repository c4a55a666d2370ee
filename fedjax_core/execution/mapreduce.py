"""The MapReduce form of a computation: plain JAX functions, and a loop of the host over them.

The form is for systems that have a driver of their own: each piece (see `stages.py`) is a pure
function with a type, and can be exported. Clients are worked on one at a time; groups of them are
added up on their own and then merged.
"""

import functools
import json
import pathlib
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.bits import BitCount
from fedjax_core.errors import ArgumentError
from fedjax_core.execution import lowering, waves
from fedjax_core.execution import manifest as artifacts
from fedjax_core.execution.calling import Interface, out_of_bounds, to_user
from fedjax_core.execution.export import check_callbacks, check_functions, compile_flat
from fedjax_core.execution.manifest import PLATFORMS, Dimensions
from fedjax_core.execution.plan import Plan
from fedjax_core.execution.stages import (
    Piece,
    Report,
    Stage,
    argument_type,
    make_ledger,
    make_stage,
    make_update,
)
from fedjax_core.files import write_atomically
from fedjax_core.language import feeding, types
from fedjax_core.language.analysis import program_of
from fedjax_core.language.program import Constant, Program, SecureSum
from fedjax_core.language.types import FederatedType, FunctionType
from fedjax_core.language.values import Federated

_ROLES = Stage._fields


class Run(NamedTuple):
    """What one run of the form knows so far: by name, what `Stage` calls them."""

    server: dict[str, Any]
    clients: dict[str, Any]
    num_clients: int
    reports: list[Report]
    kept: dict[str, Any]


def map_reduce_form(computation: Any) -> "MapReduceForm":
    """Takes a computation apart into the pieces of the MapReduce form.

    Args:
      computation: a federated computation with declared types.

    Raises:
      ArgumentError: for a computation without declared types, or with functions as parameters.

    Examples:
      >>> from fedjax_core.execution.computation import federated_computation
      >>> from fedjax_core.language import operators, placements, types
      >>> mean = federated_computation(
      ...     operators.federated_mean, types.FederatedType(np.float32, placements.CLIENTS))
      >>> form = map_reduce_form(mean)
      >>> round(float(form.run([68.5, 70.3, 69.8])), 4), form.report.name
      (69.5333, 'report')
    """
    program = program_of(computation)
    check_functions(program)
    plan = Plan.of(program)
    before: dict[str, types.Type] = {"server": argument_type(plan, uniform=True)}
    stages = []
    for number in range(plan.num_stages):
        stage, report = make_stage(plan, number, before)
        stages.append(stage)
        before = {**before, f"report_{number}": report}
    return MapReduceForm(plan, tuple(stages), make_update(plan, before), make_ledger(plan, before))


class MapReduceForm:
    """A computation as pieces: `stages`, one for each round trip, then `update`.

    The pieces of a computation with a single round trip are attributes of the form as well:
    `prepare`, `work`, `zero`, `accumulate`, `merge`, `report`.

    Attributes:
      program: the whole.
      type_signature: the type of the whole.
      stages: for each round trip its pieces.
      update: the piece that computes the results that are the same for all, from the server's
        arguments and all reports. They are called after what makes them, not after their places in
        the result, which the last line of the printed `program` shows. What clients have as
        results is in the `kept` of their work.
      ledger: the piece that counts what was sent on each edge.
    """

    def __init__(self, plan: Plan, stages: tuple[Stage, ...], update: Piece, ledger: Piece) -> None:
        self.program: Program = plan.program
        self.type_signature: FunctionType = plan.program.type_signature
        self.stages = stages
        self.update = update
        self.ledger = ledger
        self._plan = plan
        self._interface = Interface.of(plan.program)

    def __repr__(self) -> str:
        return "\n".join(
            [f"{self.program.name}: {self.type_signature}", *map(repr, self._pieces().values())]
        )

    def _pieces(self) -> dict[str, Piece]:
        """All pieces by the names of their files."""
        found = {
            f"{number}_{role}": getattr(stage, role)
            for number, stage in enumerate(self.stages)
            for role in _ROLES
        }
        return {**found, "update": self.update, "ledger": self.ledger}

    def _only(self, role: str) -> Piece:
        if len(self.stages) != 1:
            raise ArgumentError(
                f"`{self.program.name}`: expected one round trip for form.{role}, got "
                f"{len(self.stages)}; use form.stages[number].{role}."
            )
        return getattr(self.stages[0], role)

    @property
    def prepare(self) -> Piece:
        """What the server sends the clients."""
        return self._only("prepare")

    @property
    def work(self) -> Piece:
        """What one client does."""
        return self._only("work")

    @property
    def zero(self) -> Piece:
        """The accumulator of no clients."""
        return self._only("zero")

    @property
    def accumulate(self) -> Piece:
        """An accumulator with one more client in it."""
        return self._only("accumulate")

    @property
    def merge(self) -> Piece:
        """The accumulator of two groups of clients."""
        return self._only("merge")

    @property
    def report(self) -> Piece:
        """What the server makes of the whole accumulator."""
        return self._only("report")

    def run(
        self, *args: Any, num_clients: int | None = None, group_size: int = 8, **kwargs: Any
    ) -> Any:
        """Runs the computation with a loop of the host over the clients.

        Args:
          *args: as for the computation.
          num_clients: needed only where no argument tells how many clients there are.
          group_size: how many clients are added up before the group is merged with the others.
          **kwargs: arguments by the names of the parameters.

        Raises:
          FederatedTypeError: naming the argument, and the client, that does not fit.
          ArgumentError: where arguments disagree on the number of clients, or a client's value is
            out of the bounds of a secure sum.
        """
        numbers = {"num_clients": num_clients, "group_size": group_size}
        return self.run_with_ledger(*args, **numbers, **kwargs)[0]

    def run_with_ledger(
        self, *args: Any, num_clients: int | None = None, group_size: int = 8, **kwargs: Any
    ) -> tuple[Any, tuple[BitCount, ...]]:
        """As `run`, with what was sent: a `BitCount` for each of `program.edges`."""
        is_int = isinstance(group_size, int | np.integer) and not isinstance(group_size, bool)
        if not is_int or group_size < 1:
            raise ArgumentError(f"Expected group_size to be a positive int, got {group_size!r}.")
        given = self._interface.take(args, kwargs, num_clients)
        run = self._start(given.leaves, given.num_clients)
        for number in range(len(self.stages)):
            self._run_stage(number, run, group_size)
        results = self.update(run.server, *run.reports)
        count = np.uint32(run.num_clients)
        ledger = self.ledger(run.server, count, *run.reports)
        self._check_bounds(run)
        return to_user(self._result(results | run.kept), given.is_lazy), ledger

    def _start(self, leaves: list[Any], num_clients: int) -> Run:
        plan = self._plan
        pairs = zip(self.program.parameters, leaves, strict=True)
        values = {i: x.value if isinstance(x, Federated) else x for i, x in pairs}
        server = plan.named(values, plan.parameters(uniform=True))
        clients = plan.named(values, plan.parameters(uniform=False))
        return Run(server, jax.tree.map(_to_host, clients), num_clients, [], {})

    def _run_stage(self, number: int, run: Run, group_size: int) -> None:
        stage = self.stages[number]
        context = stage.prepare(run.server, *run.reports)
        totals, kept = [], []
        for first in range(0, run.num_clients, group_size):
            total = self._zero(stage, run)
            for client in range(first, min(first + group_size, run.num_clients)):
                output = stage.work(context, waves.member(run.clients, client))
                total = stage.accumulate.consume(total, output.contribution)
                kept.append(output.kept)
            totals.append(total)
        whole = functools.reduce(stage.merge.consume, totals or [self._zero(stage, run)])
        rows = self._stack(number, kept)
        collected = self._collect(number, rows, run.num_clients)
        # What is the same at all clients may be collected, but comes from `update` as a result.
        shared = {self._plan.names[i] for i in self._plan.uniform_results()}
        run.kept.update({name: x for name, x in rows.items() if name not in shared})
        run.reports.append(stage.report(whole)._replace(collected=collected))

    def _zero(self, stage: Stage, run: Run) -> Any:
        """A zero of its own memory, for the accumulator's is reused."""
        return jax.tree.map(jnp.copy, stage.zero(run.server, *run.reports))

    def _stack(self, number: int, kept: list[dict[str, Any]]) -> dict[str, Any]:
        plan = self._plan
        return {
            plan.names[i]: feeding.stack_members(
                [row[plan.names[i]] for row in kept],
                cast(FederatedType, plan.ops[i].type).member,
            )
            for i in plan.kept(number)
        }

    def _collect(self, number: int, rows: dict[str, Any], num_clients: int) -> dict[str, Any]:
        plan = self._plan
        valid = jnp.ones(num_clients, bool)
        return {
            plan.names[i]: lowering.collect(rows[plan.names[plan.ops[i].inputs[0]]], valid)
            for i in plan.collected(number)
        }

    def _result(self, named: dict[str, Any]) -> Any:
        plan = self._plan

        def value(i: int) -> Any:
            op = plan.ops[i]
            if isinstance(op, Constant) and feeding.contains_str(op.type):
                return _placed(op.value, op.type)
            return _placed(named[plan.names[i]], op.type)

        return jax.tree.map(value, self.program.result_tree)

    def _check_bounds(self, run: Run) -> None:
        values = {name: x for report in run.reports for name, x in report.values.items()}
        for i, op in enumerate(self._plan.ops):
            if isinstance(op, SecureSum) and op.is_checked:
                found = values[self._plan.names[i]]
                counts = found.num_below, found.num_above
                if any(map(int, counts)):
                    bounds = op.lower, op.upper
                    name = self.program.name
                    raise out_of_bounds(name, op.label, bounds, op.location, counts)

    def export(
        self,
        directory: str | pathlib.Path,
        *,
        platforms: tuple[str, ...] = PLATFORMS,
        sequence_capacity: int | None = None,
    ) -> None:
        """Writes each piece to a file of its own, which `load` reads, and `form.json` about them.

        The files are called after stage and piece, such as `0_work`, and `update` and `ledger`.
        Loaded pieces take and return dicts, in the place of `Output` and `Report` too.

        Args:
          directory: made if it does not exist.
          platforms: what they are compiled for.
          sequence_capacity: the most examples of a sequence among the arguments; None leaves it
            open, which not every function of a sequence allows.

        Raises:
          ArgumentError: for a piece that JAX cannot export.
          StorageError: a file cannot be written.
        """
        check_callbacks(self.program)
        directory = pathlib.Path(directory)
        capacity = sequence_capacity or artifacts.symbols().capacity
        pieces = self._pieces()
        for file, piece in pieces.items():
            interface = _interface_of(piece, f"{self.program.name}.{file}")
            specs = {name: _spec(name, t, capacity) for name, t in piece.parameters}
            flat = artifacts.flatten(piece.function, specs)
            exported = compile_flat(interface, flat, platforms, sequence_capacity)
            more = {"kind": "piece", "lanes": 1, "edges": [], "secure_sums": []}
            artifacts.write(directory / file, interface, flat, exported, more)
        text = json.dumps(self._describe(pieces), indent=1)
        write_atomically(directory / "form.json", text.encode())

    def _describe(self, pieces: dict[str, Piece]) -> dict[str, Any]:
        return {
            "name": self.program.name,
            "type": str(self.type_signature),
            "num_stages": len(self.stages),
            "pieces": {file: str(piece.type_signature) for file, piece in pieces.items()},
        }


def _interface_of(piece: Piece, name: str) -> Interface:
    names = tuple(name for name, _ in piece.parameters)
    return Interface(name, names, tuple(t for _, t in piece.parameters), piece.result, False)


def _spec(name: str, t: types.Type, capacity: Any) -> Any:
    """The shapes of a piece's argument; a report's sequences have a row for each client."""
    cohort = artifacts.symbols().cohort
    return artifacts.spec_of(
        t, Dimensions(cohort, cohort if name.startswith("report") else capacity)
    )


def _placed(value: Any, t: types.Type) -> Any:
    return Federated(value, t.placement, t.all_equal) if isinstance(t, FederatedType) else value


def _to_host(x: Any) -> Any:
    """NumPy, of which a row is taken quickly; keys stay what they are."""
    is_key = types.is_extended_dtype(getattr(x, "dtype", None))
    return x if is_key or isinstance(x, np.ndarray) else np.asarray(x)
