"""Plans: which operations of a program run in which round trip, and at which placement."""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import jax

from fedjax_core.execution.evaluation import evaluate
from fedjax_core.execution.lowering import is_uniform
from fedjax_core.language import feeding
from fedjax_core.language.program import (
    Aggregate,
    Collect,
    Constant,
    Edge,
    Map,
    Op,
    Parameter,
    Program,
    goes_up,
    is_at_clients,
    round_trips,
)

Values = dict[int, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What happens in which stage of a program.

    Attributes:
      program: the whole.
      names: of the operations, each its own.
      levels: for each operation the aggregations before it.
    """

    program: Program
    names: tuple[str, ...]
    levels: tuple[int, ...]

    @classmethod
    def of(cls, program: Program) -> "Plan":
        """The plan of a program."""
        return cls(program, _names(program), round_trips(program))

    @property
    def num_stages(self) -> int:
        """The round trips, and one more if clients have results after the last."""
        levels = range(max(self.levels, default=0) + 1)
        return 1 + max((k for k in levels if self.rising(k) or self.kept(k)), default=-1)

    @property
    def ops(self) -> tuple[Op, ...]:
        """The operations of the program."""
        return self.program.ops

    def rising(self, stage: int) -> list[int]:
        """The aggregations of a stage."""
        return [i for i, op in enumerate(self.ops) if goes_up(op) and self.levels[i] == stage + 1]

    def folded(self, stage: int) -> list[int]:
        """Those that are folds."""
        return [i for i in self.rising(stage) if not isinstance(self.ops[i], Collect)]

    def collected(self, stage: int) -> list[int]:
        """Those that gather the clients' values one by one."""
        return [i for i in self.rising(stage) if isinstance(self.ops[i], Collect)]

    def kept(self, stage: int) -> list[int]:
        """The client values that leave the work of a stage as they are."""
        own = [i for i in self.program.results if not is_uniform(self.ops[i])]
        own = [i for i in own if self.levels[i] == stage]
        return sorted({*own, *(self.ops[i].inputs[0] for i in self.collected(stage))})

    def uniform_results(self) -> list[int]:
        """The results that `update` computes: all that are the same everywhere, but for strings."""
        found = {i for i in self.program.results if is_uniform(self.ops[i])}
        return sorted(i for i in found if not feeding.contains_str(self.ops[i].type))

    def parameters(self, *, uniform: bool) -> list[int]:
        """The parameters that are the same everywhere, or those that each client has its own of."""
        return [i for i in self.program.parameters if is_uniform(self.ops[i]) == uniform]

    def context(self, stage: int) -> list[int]:
        """What the clients' work of a stage takes from the server."""
        found: set[int] = set()
        pending = [i for target in self.folded(stage) for i in client_inputs(self.ops[target])]
        pending += self.kept(stage)
        seen: set[int] = set()
        while pending:
            i = pending.pop()
            op = self.ops[i]
            if i in seen or isinstance(op, Constant):
                continue
            seen.add(i)
            if not is_at_clients(op) or (isinstance(op, Parameter) and is_uniform(op)):
                found.add(i)
            else:
                pending.extend(op.inputs)
        return sorted(found)

    def named(self, values: Values, positions: Iterable[int]) -> dict[str, Any]:
        """Some values by their names."""
        return {self.names[i]: values[i] for i in positions}

    def known(self, named: dict[str, Any], positions: Iterable[int]) -> Values:
        """The inverse of `named`."""
        return {i: named[self.names[i]] for i in positions}

    def at_server(self, server: Any, reports: tuple[Any, ...]) -> Values:
        """What the server knows after some stages."""
        known = self.known(server, self.parameters(uniform=True))
        for stage, report in enumerate(reports):
            known |= self.known(report.values, self.folded(stage))
            known |= self.known(report.collected, self.collected(stage))
        return known

    def compute(self, targets: Iterable[int], known: Values) -> Values:
        """The values of operations, and of those that they are computed from."""
        values = dict(known)
        needed: set[int] = set()
        pending = list(targets)
        while pending:
            i = pending.pop()
            if i not in values and i not in needed:
                needed.add(i)
                pending.extend(self.ops[i].inputs)
        for i in sorted(needed):
            values[i] = evaluate(self.ops[i], [values[j] for j in self.ops[i].inputs])
        return values


def client_inputs(op: Op) -> tuple[int, ...]:
    """The inputs of an aggregation that live at the clients."""
    return op.inputs[:1] if isinstance(op, Aggregate) else op.inputs


def server_inputs(op: Op) -> tuple[int, ...]:
    """The inputs of an aggregation that live at the server."""
    return op.inputs[1:] if isinstance(op, Aggregate) else ()


def _names(program: Program) -> tuple[str, ...]:
    """A readable name for each operation; of those that share one, the later get a number."""
    arguments = _argument_names(program)
    names: dict[str, None] = {}
    for i, op in enumerate(program.ops):
        name = arguments.get(i) or _name_of(op)
        numbered = (name if k == 1 else f"{name}_{k}" for k in itertools.count(1))
        names[next(found for found in numbered if found not in names)] = None
    return tuple(names)


def _name_of(op: Op) -> str:
    if isinstance(op, Edge):
        return op.label
    return op.local.name if isinstance(op, Map) else type(op).__name__.lower()


def _argument_names(program: Program) -> dict[int, str]:
    found = {}
    for k, tree in enumerate(program.parameter_tree):
        names = program.parameter_names
        name = names[k] if k < len(names) else f"argument_{k}"
        for path, i in jax.tree_util.tree_leaves_with_path(tree):
            found[i] = name + jax.tree_util.keystr(path)
    return found
