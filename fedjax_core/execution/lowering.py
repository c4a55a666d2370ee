"""Stacked and streamed lowerings: a program as one JAX function of arrays with a clients axis.

The operations are grouped into passes, one for each round trip. In a pass, waves of `lanes` clients
go through all the client work that its aggregations need, and are added up at once; client values
that a later pass needs again are computed again, so that memory does not grow with the number of
clients. Stacked is the streamed form with a single wave.
"""

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_core.bits import BitCount
from fedjax_core.execution import evaluation
from fedjax_core.execution.evaluation import call_local, mask, select
from fedjax_core.language.messages import Received
from fedjax_core.language.program import (
    Aggregate,
    Broadcast,
    Constant,
    Count,
    Edge,
    Op,
    Parameter,
    Program,
    Sum,
    is_at_clients,
    round_trips,
)
from fedjax_core.language.types import FederatedType
from fedjax_core.language.values import Sequence

Values = dict[int, Any]


class Partial(NamedTuple):
    """What a wave adds to one aggregation; () where an aggregation has no use for a part."""

    total: Any
    count: Any
    bits: Any
    stats: Any


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


def run(program: Program, values: Values, valid: jax.Array, lanes: int) -> tuple[Values, Values]:
    """Runs a program on stacked values.

    Args:
      program: what to run.
      values: for the position of each parameter, its value; at the clients with a leading clients
        axis.
      valid: bool `[clients]`; a client that is not valid does not exist for any aggregation.
      lanes: how many clients run side by side.

    Returns:
      The values of the results (client values stacked), and for each edge the bits of this run.
    """
    lowering = _Lowering(program, valid, lanes, dict(values))
    for level in range(max(round_trips(program), default=0) + 1):
        lowering.evaluate_uniform(level)
        lowering.run_pass(level)
    known = lowering.values | lowering.outputs
    return {i: known[i] for i in program.results}, lowering.ledger


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
    """

    def __init__(self, program: Program, valid: jax.Array, lanes: int, values: Values) -> None:
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

    def evaluate_uniform(self, level: int) -> None:
        """Computes what is the same everywhere, as far as the passes so far allow."""
        for i, op in enumerate(self.ops):
            if i in self.values or self.levels[i] != level:
                continue
            if isinstance(op, Broadcast):
                self.ledger[i] = self._broadcast_bits(op, self.values[op.inputs[0]])
            if self.uniform[i]:
                inputs = [self.values[j] for j in op.inputs]
                self.values[i] = evaluate(op, inputs)

    def _broadcast_bits(self, op: Broadcast, message: Any) -> BitCount:
        """The bits to all clients; a constant is part of the program and costs none."""
        source = self.ops[op.inputs[0]]
        if isinstance(source, Constant):
            return BitCount.zero()
        bits = (
            call_local(op.codec.bits, message) if op.codec else evaluation.raw_bits(op, source.type)
        )
        return bits.times(jnp.sum(self.valid, dtype=jnp.uint32))

    def run_pass(self, level: int) -> None:
        """Runs all clients once, for the aggregations and the client results of this level."""
        sinks = [i for i, op in enumerate(self.ops) if _goes_up(op) and self.levels[i] == level + 1]
        outputs = [i for i in set(self.results) if self._is_output(i, level)]
        if not sinks and not outputs:
            return
        waves = self._waves()
        start = {i: self._zero(cast(Edge, self.ops[i])) for i in sinks}
        needed = self._needed(sinks + outputs)

        def wave(totals: Values, xs: tuple[Any, Any]) -> tuple[Values, Values]:
            lanes, valid = xs
            return self._run_wave(lanes, valid, totals, needed, outputs)

        totals, results = _scan(wave, start, (waves.values, waves.valid))
        for i in sinks:
            self._finish(i, totals[i])
        for i in outputs:
            self.outputs[i] = _unsplit(results[i], waves, self.valid.shape[0])

    def _is_output(self, i: int, level: int) -> bool:
        return self.levels[i] == level and not is_uniform(self.ops[i])

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

    def _run_wave(
        self, lanes: Any, valid: jax.Array, totals: Values, needed: list[int], outputs: list[int]
    ) -> tuple[Values, Values]:
        """Runs the clients of one wave and adds them to `totals`."""

        def client(members: Any, is_valid: jax.Array) -> tuple[Values, Values]:
            values = self._run_client(members, needed)
            partial = {i: self._contribute(i, values, is_valid) for i in totals}
            return partial, {i: values[i] for i in outputs}

        if self.lanes == 1:  # no batching at all: convolutions keep their own form
            first = jax.tree.map(lambda x: x[0], (lanes, valid))
            partials, results = jax.tree.map(lambda x: jnp.asarray(x)[None], client(*first))
        else:
            partials, results = jax.vmap(client)(lanes, valid)
        added = {i: self._add(i, totals[i], partials[i]) for i in totals}
        return added, results

    def _run_client(self, members: Any, needed: list[int]) -> Values:
        """The values of the needed operations at one client."""
        values = dict(self.values)
        for i in needed:
            op = self.ops[i]
            if isinstance(op, Parameter):
                values[i] = _join(members[i], self.stacked[i])
            elif not _goes_up(op):
                values[i] = evaluate(op, [values[j] for j in op.inputs])
        return values

    def _contribute(self, i: int, values: Values, is_valid: jax.Array) -> Partial:
        """One client's part of an aggregation."""
        op = self.ops[i]
        inputs = [values[j] for j in op.inputs]
        if isinstance(op, Aggregate):
            return Partial(inputs[0], is_valid, (), ())
        present = is_valid
        if isinstance(op, Count):
            present = present & inputs[0] if inputs else present
            return Partial((), present.astype(jnp.int32), (), ())
        return sum_partial(cast(Sum, op), inputs, present)

    def _zero(self, op: Op) -> Partial:
        none = jnp.int32(0)
        if isinstance(op, Aggregate):
            return Partial(self.values[op.inputs[1]], none, (), ())
        if isinstance(op, Count):
            return Partial((), none, (), ())
        value, stats = sum_types(cast(Sum, op))
        bits = BitCount.zero() if cast(Sum, op).codec else ()
        return Partial(
            evaluation.accumulator(value),
            none,
            bits,
            evaluation.accumulator(stats) if stats else (),
        )

    def _add(self, i: int, total: Partial, lanes: Partial) -> Partial:
        """Adds the parts of a wave, stacked over its lanes, to an aggregation."""
        op = self.ops[i]
        count = total.count + jnp.sum(lanes.count, dtype=jnp.int32)
        if isinstance(op, Aggregate):
            return Partial(_fold(op, total.total, lanes.total, lanes.count), count, (), ())
        value = jax.tree.map(
            lambda a, x: a + jnp.sum(x, axis=0, dtype=a.dtype), total.total, lanes.total
        )
        stats = jax.tree.map(
            lambda a, x: a + jnp.sum(x, axis=0, dtype=a.dtype), total.stats, lanes.stats
        )
        bits = total.bits + lanes.bits.sum(axis=0) if isinstance(total.bits, BitCount) else ()
        return Partial(value, count, bits, stats)

    def _finish(self, i: int, total: Partial) -> None:
        """Stores the result of an aggregation, and its bits."""
        op = self.ops[i]
        if isinstance(op, Count):
            self.values[i] = total.count
        elif isinstance(op, Aggregate):
            self.values[i] = call_local(op.report, total.total)
            self.ledger[i] = self._sent(op, total)
        else:
            self.values[i] = sum_result(cast(Sum, op), total)
            self.ledger[i] = self._sent(cast(Sum, op), total)

    def _sent(self, op: Edge, total: Partial) -> BitCount:
        if isinstance(total.bits, BitCount):
            return total.bits
        source = self.ops[op.inputs[0]]
        return evaluation.raw_bits(op, source.type).times(total.count.astype(jnp.uint32))

    def _waves(self) -> Waves:
        """Splits the clients into waves, longest sequences first where several share a wave."""
        num_clients = self.valid.shape[0]
        num_waves = -(-num_clients // self.lanes)
        split = {i: _split(value) for i, value in self.stacked.items()}
        fold = lambda x: x.reshape(num_waves, self.lanes, *x.shape[1:])  # noqa: E731
        if self.lanes == 1 or num_clients == 0:
            folded = jax.tree.map(lambda x: fold(jnp.asarray(x)), (split, self.valid))
            return Waves(*folded, inverse=None)
        order = self._order()
        lanes = jnp.concatenate([order, jnp.full(num_waves * self.lanes - num_clients, order[-1])])
        is_real = jnp.arange(num_waves * self.lanes) < num_clients
        values = jax.tree.map(lambda x: fold(jnp.take(x, lanes, axis=0)), split)
        return Waves(values, fold(is_real & self.valid[lanes]), jnp.argsort(order))

    def _order(self) -> jax.Array:
        """The clients by the length of their first sequence, longest first."""
        for value in self.stacked.values():
            for leaf in jax.tree.leaves(value, is_leaf=_is_sequence):
                if _is_sequence(leaf):
                    return jnp.argsort(-leaf.length, stable=True)
        return jnp.arange(self.valid.shape[0])


def _goes_up(op: Op) -> bool:
    return isinstance(op, Sum | Count | Aggregate)


def _is_sequence(x: Any) -> bool:
    return isinstance(x, Sequence)


def _scan(body: Any, start: Any, xs: Any) -> tuple[Any, Any]:
    """`lax.scan`, but a single step runs outside of a loop."""
    if jax.tree.leaves(xs)[0].shape[0] == 1:
        carry, ys = body(start, jax.tree.map(lambda x: x[0], xs))
        return carry, jax.tree.map(lambda y: jnp.asarray(y)[None], ys)
    return lax.scan(body, start, xs)


def _split(value: Any) -> Any:
    """The arrays of a stacked value that have a clients axis."""

    def per_client(x: Any) -> Any:
        return (x.start, x.length) if _is_sequence(x) and x.packed else x

    return jax.tree.map(per_client, value, is_leaf=_is_sequence)


def _join(member: Any, stacked: Any) -> Any:
    """One client's value from its own arrays and the pools that all clients share."""

    def one(x: Any, part: Any) -> Any:
        if not (_is_sequence(x) and x.packed):
            return part
        start, length = part
        pool = jax.tree.map(jnp.asarray, x.elements)
        return dataclasses.replace(x, elements=pool, start=start, length=length, packed=False)

    return jax.tree.map(one, stacked, member, is_leaf=_is_sequence)


def member(stacked: Any, client: int) -> Any:
    """One client's value out of a stacked one."""
    return _join(jax.tree.map(lambda x: x[client], _split(stacked)), stacked)


def _unsplit(results: Any, waves: Waves, num_clients: int) -> Any:
    """Client results in the order of the clients, from `[waves, lanes, ...]`."""

    def flat(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
        return x[:num_clients] if waves.inverse is None else jnp.take(x, waves.inverse, axis=0)

    return jax.tree.map(flat, results)


def _fold(op: Aggregate, state: Any, members: Any, keep: jax.Array) -> Any:
    """Accumulates the members of a wave one after the other."""

    def step(state: Any, x: tuple[Any, jax.Array]) -> tuple[Any, None]:
        member, is_kept = x
        return select(is_kept, evaluation.accumulate(op.accumulate, state, member), state), None

    state = jax.tree.map(jnp.asarray, state)
    return lax.scan(step, state, (members, keep))[0]


def evaluate(op: Op, inputs: list[Any]) -> Any:
    """The value of an operation at one member, broadcasts included."""
    return _receive(op, inputs) if isinstance(op, Broadcast) else evaluation.evaluate(op, inputs)


def _receive(op: Broadcast, inputs: list[Any]) -> Any:
    """What a client has after a broadcast."""
    if op.codec is None:
        return inputs[0]
    message, *context = inputs
    return call_local(op.codec.receive, *context, message)[0]


def sum_types(op: Sum) -> tuple[Any, Any]:
    """The types of what a sum adds up, and of its statistics (None without a codec)."""
    if op.codec is None:
        return cast(FederatedType, op.type).member, None
    value, stats = op.codec.receive.result.children()
    return value, stats


def sum_partial(op: Sum, inputs: list[Any], is_valid: jax.Array) -> Partial:
    """One client's part of a sum; nothing at all where the client is not present."""
    present = is_valid
    if op.has_presence:
        *inputs, is_present = inputs
        present = present & is_present
    message, *context = inputs
    count = present.astype(jnp.int32)
    if op.codec is None:
        return Partial(mask(present, message), count, (), ())
    value, stats = call_local(op.codec.receive, *context, message)
    bits = call_local(op.codec.bits, message)
    return Partial(mask(present, value), count, mask(present, bits), mask(present, stats))


def sum_result(op: Sum, total: Partial) -> Any:
    """The server's value of a sum."""
    value, stats = sum_types(op)
    narrowed = evaluation.narrow(total.total, value)
    if op.codec is None:
        return narrowed
    return Received(narrowed, total.count, total.bits, evaluation.narrow(total.stats, stats))
