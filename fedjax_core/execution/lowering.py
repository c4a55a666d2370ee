"""Stacked and streamed lowerings: a program as one JAX function of arrays with a clients axis.

The operations are grouped into passes, one for each round trip. In a pass, waves of `lanes` clients
go through all the client work that its aggregations need, and are added up at once; client values
that a later pass needs again are computed again, so that memory does not grow with the number of
clients. Stacked is the streamed form with a single wave.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from fedjax_core.bits import BitCount
from fedjax_core.execution import collectives
from fedjax_core.execution.aggregations import Axis, across, message_bits, sent
from fedjax_core.execution.evaluation import call_local, evaluate
from fedjax_core.execution.waves import (
    Loop,
    Pass,
    Shared,
    Values,
    fused,
    is_sequence,
    rule_of,
    split,
)
from fedjax_core.language.program import (
    Broadcast,
    Collect,
    Constant,
    Edge,
    Op,
    Parameter,
    Program,
    Request,
    SecureSum,
    Select,
    goes_up,
    is_at_clients,
    round_trips,
)
from fedjax_core.language.types import FederatedType
from fedjax_core.language.values import Sequence


class Outcome(NamedTuple):
    """What a run of a program gives.

    Attributes:
      values: of the results; client values are stacked.
      ledger: for each edge the bits of this run.
      violations: for each secure sum that is checked, how many numbers were below and above their
        bounds.
    """

    values: Values
    ledger: Values
    violations: Values


class Waves(NamedTuple):
    """The clients in waves of lanes.

    Attributes:
      values: for each parameter, its arrays as `[waves, lanes, ...]`, pools of packed sequences
        left out.
      valid: bool `[waves, lanes]`, False for padding.
      inverse: where client `i` stands among all lanes.
    """

    values: dict[int, Any]
    valid: jax.Array
    inverse: jax.Array | None


def run(
    program: Program,
    values: Values,
    valid: jax.Array,
    lanes: int,
    axis: Axis = None,
    num_clients: int | None = None,
    loop: Loop = fused,
) -> Outcome:
    """Runs a program on stacked values.

    Args:
      program: what to run.
      values: for the position of each parameter, its value; at the clients with a leading clients
        axis.
      valid: bool `[clients]`; a client that is not valid does not exist for any aggregation.
      lanes: how many clients run side by side.
      axis: the mesh axes that the clients are spread over, where this runs on each device for the
        clients that it holds.
      num_clients: on all devices, the padding of the last ones left out; needed with `axis`.
      loop: how the waves follow one another.
    """
    total = valid.shape[0] if num_clients is None else num_clients
    lowering = _Lowering(program, valid, lanes, dict(values), axis, total, loop)
    for level in range(max(round_trips(program), default=0) + 1):
        lowering.evaluate_uniform(level)
        lowering.run_pass(level)
    lowering.count_sent_to_clients()
    known = lowering.values | lowering.outputs
    results = {i: known[i] for i in program.results}
    return Outcome(results, lowering.ledger, lowering.violations)


def is_uniform(op: Op) -> bool:
    """Whether the type says that one value stands for all members: at the server, or all-equal."""
    return not is_at_clients(op) or cast(FederatedType, op.type).all_equal


def _uniform(program: Program) -> tuple[bool, ...]:
    """For each operation, whether it has one value for all members.

    At the clients, so has what comes from broadcasts and constants alone: the same function of the
    same values gives the same result everywhere, whether or not the type promises it.
    """
    uniform: list[bool] = []
    for op in program.ops:
        is_derived = not isinstance(op, Parameter) and all(uniform[i] for i in op.inputs)
        uniform.append(is_uniform(op) or is_derived)
    return tuple(uniform)


class _Lowering:
    """One run of a program: what is known so far.

    Attributes:
      values: of the operations that have one value for all.
      outputs: results at the clients, with a clients axis.
      ledger: for each edge its bits.
      violations: see `Outcome`.
    """

    def __init__(
        self,
        program: Program,
        valid: jax.Array,
        lanes: int,
        values: Values,
        axis: Axis,
        num_clients: int,
        loop: Loop,
    ) -> None:
        self.program = program
        self.loop = loop
        self.axis = axis
        self.ops = program.ops
        self.results = program.results
        self.levels = round_trips(program)
        self.uniform = _uniform(program)
        self.valid = valid
        self.lanes = lanes
        self.stacked = {i: values[i] for i in program.parameters if not is_uniform(self.ops[i])}
        self.values: Values = {i: v for i, v in values.items() if is_uniform(self.ops[i])}
        self.outputs: Values = {}
        self.ledger: Values = {}
        self.violations: Values = {}
        self.num_clients = num_clients
        self.num_valid = jnp.sum(valid, dtype=jnp.uint32)
        self.is_counted = axis is None  # whether that is the number on all devices

    def evaluate_uniform(self, level: int) -> None:
        """Computes what is the same everywhere, as far as the passes so far allow."""
        for i, op in enumerate(self.ops):
            if i in self.values or self.levels[i] != level:
                continue
            if self.uniform[i]:
                inputs = [self.values[j] for j in op.inputs]
                self.values[i] = evaluate(op, inputs)

    def count_sent_to_clients(self) -> None:
        """Adds the bits of the way down to the ledger, once the clients are counted."""
        downward = {
            i: op for i, op in enumerate(self.ops) if isinstance(op, Broadcast | Request | Select)
        }
        if downward:
            self._across({})
            self.ledger |= {i: self._sent_to_clients(op) for i, op in downward.items()}

    def _sent_to_clients(self, op: Edge) -> BitCount:
        """The bits to all clients, or of all requests; a constant is part of the program."""
        if isinstance(op, Broadcast) and isinstance(self.ops[op.inputs[0]], Constant):
            return BitCount.zero()
        if op.codec is None:
            return message_bits(self.program, op, self.num_valid).times(self.num_valid)
        return call_local(op.codec.bits, self.values[op.inputs[0]]).times(self.num_valid)

    def run_pass(self, level: int) -> None:
        """Runs all clients once, for the aggregations and the client results of this level."""
        rising = [i for i, op in enumerate(self.ops) if goes_up(op) and self.levels[i] == level + 1]
        collected = {i: self.ops[i].inputs[0] for i in rising if isinstance(self.ops[i], Collect)}
        sinks = [i for i in rising if i not in collected]
        outputs = [i for i in set(self.results) if self._is_output(i, level)]
        if not rising and not outputs:
            return
        rows = sorted({*outputs, *collected.values()})
        start = {i: rule_of(self.ops[i]).zero(self.ops[i], self.values) for i in sinks}
        needed = self._needed(sinks + rows)
        work = Pass(self.program, self.lanes, tuple(sinks), tuple(rows), tuple(needed))
        waves = self._waves()
        shared = Shared(self._read_by(work), self.stacked)
        totals, stacked = self.loop(work, shared, start, (waves.values, waves.valid))
        stacked = {i: _unsplit(stacked[i], waves, self.valid.shape[0]) for i in rows}
        totals = self._across(totals) if rising else totals
        for i in sinks:
            self._finish(i, totals[i])
        for i, source in collected.items():
            self._collect(i, stacked[source])
        self.outputs |= {i: stacked[i] for i in outputs}

    def _is_output(self, i: int, level: int) -> bool:
        return self.levels[i] == level and not is_uniform(self.ops[i])

    def _read_by(self, work: Pass) -> Values:
        """What has one value for all, as far as a pass reads it."""
        inputs = {j for i in (*work.needed, *work.sinks) for j in self.ops[i].inputs}
        return {i: self.values[i] for i in sorted({*inputs, *work.rows}) if i in self.values}

    def _needed(self, targets: list[int]) -> list[int]:
        """The client operations that `targets` are computed from, in order."""
        needed: set[int] = set()
        pending = list(targets)
        while pending:
            i = pending.pop()
            if i not in needed and i not in self.values:
                needed.add(i)
                pending.extend(self.ops[i].inputs)
        return sorted(needed)

    def _across(self, totals: dict[int, Any]) -> dict[int, Any]:
        """The totals of all devices; the first time the clients are counted along with them."""
        if self.axis is None or (self.is_counted and not totals):
            return totals
        count = () if self.is_counted else self.num_valid
        totals, count = across(self.program, totals, count, self.axis)
        self.num_valid = self.num_valid if self.is_counted else count
        self.is_counted = True
        return totals

    def _finish(self, i: int, total: Any) -> None:
        """Stores the result of an aggregation, and its bits."""
        op = self.ops[i]
        self.values[i] = rule_of(op).result(op, total)
        if isinstance(op, Edge):
            self.ledger[i] = sent(self.program, op, total)
        if isinstance(op, SecureSum) and op.is_checked:
            self.violations[i] = (self.values[i].num_below, self.values[i].num_above)

    def _collect(self, i: int, stacked: Any) -> None:
        """Stores the values of all clients that exist as a sequence at the server."""
        op = cast(Collect, self.ops[i])
        valid = self.valid
        if self.axis is not None:
            gathered = collectives.gather((stacked, valid), self.axis)
            stacked, valid = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), gathered)
            stacked, valid = jax.tree.map(lambda x: x[: self.num_clients], (stacked, valid))
        self.values[i] = collect(stacked, valid)
        bits = message_bits(self.program, op, self.num_valid)
        self.ledger[i] = bits.times(self.num_valid)

    def _waves(self) -> Waves:
        """Splits the clients into waves, longest sequences first where several share a wave."""
        num_clients = self.valid.shape[0]
        num_waves = -(-num_clients // self.lanes)
        parts = {i: split(value) for i, value in self.stacked.items()}
        fold = lambda x: x.reshape(num_waves, self.lanes, *x.shape[1:])  # noqa: E731
        if self.lanes == 1 or num_clients == 0:
            folded = jax.tree.map(lambda x: fold(jnp.asarray(x)), (parts, self.valid))
            return Waves(*folded, inverse=None)
        order = self._order()
        lanes = jnp.concatenate([order, jnp.full(num_waves * self.lanes - num_clients, order[-1])])
        is_real = jnp.arange(num_waves * self.lanes) < num_clients
        values = jax.tree.map(lambda x: fold(jnp.take(x, lanes, axis=0)), parts)
        return Waves(values, fold(is_real & self.valid[lanes]), jnp.argsort(order))

    def _order(self) -> jax.Array:
        """The clients by the length of their first sequence, longest first."""
        for value in self.stacked.values():
            for leaf in jax.tree.leaves(value, is_leaf=is_sequence):
                if is_sequence(leaf):
                    return jnp.argsort(-leaf.length, stable=True)
        return jnp.arange(self.valid.shape[0])


def collect(stacked: Any, valid: jax.Array) -> Sequence:
    """The values of the clients that are valid, in their order, as one sequence."""
    num_clients = valid.shape[0]
    if not num_clients:  # there is no row to take, and a sequence has at least one
        rows = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), stacked)
        return Sequence(rows, jnp.int32(0), jnp.int32(0), 1)
    order = jnp.argsort(~valid, stable=True)
    rows = jax.tree.map(lambda x: jnp.take(x, order, axis=0), stacked)
    return Sequence(rows, jnp.int32(0), jnp.sum(valid, dtype=jnp.int32), num_clients)


def _unsplit(results: Any, waves: Waves, num_clients: int) -> Any:
    """Client results in the order of the clients, from `[waves, lanes, ...]`."""

    def flat(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
        return x[:num_clients] if waves.inverse is None else jnp.take(x, waves.inverse, axis=0)

    return jax.tree.map(flat, results)
