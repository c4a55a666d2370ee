"""The reference interpreter: a program run client by client over Python lists.

It has no loops but Python's, no masks and no waves. It is the specification that every other way to
run a program is tested against.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_core.bits import BitCount
from fedjax_core.execution import evaluation
from fedjax_core.execution.evaluation import add, call_local
from fedjax_core.execution.lowering import evaluate, is_uniform, sum_types
from fedjax_core.language.messages import Received
from fedjax_core.language.program import (
    Aggregate,
    Broadcast,
    Constant,
    Count,
    Edge,
    Op,
    Program,
    Sum,
    type_bits,
)

Values = dict[int, Any]


def run(program: Program, values: Values, num_clients: int) -> tuple[Values, Values]:
    """Runs a program.

    Args:
      program: what to run.
      values: for each parameter its value; at the clients a list with one entry a client.
      num_clients: how many clients there are.

    Returns:
      The values of the results, and for each edge the bits of this run.
    """
    values, ledger = dict(values), {}
    for i, op in enumerate(program.ops):
        if i in values:
            continue
        inputs = [_per_client(values[j], program.ops[j], num_clients) for j in op.inputs]
        if isinstance(op, Sum | Count):
            values[i] = _sum(op, inputs, num_clients)
        elif isinstance(op, Aggregate):
            values[i] = _fold(op, inputs[0], values[op.inputs[1]])
        elif is_uniform(op):
            values[i] = evaluate(op, [values[j] for j in op.inputs])
        else:
            members = [[x[client] for x in inputs] for client in range(num_clients)]
            values[i] = [evaluate(op, member) for member in members]
        if isinstance(op, Edge):
            ledger[i] = BitCount.of(
                _bits(op, program.ops[op.inputs[0]], inputs, values, num_clients)
            )
    return {i: values[i] for i in program.results}, ledger


def _per_client(value: Any, op: Op, num_clients: int) -> list[Any]:
    return [value] * num_clients if is_uniform(op) else value


def _fold(op: Aggregate, members: list[Any], zero: Any) -> Any:
    state = zero
    for member in members:
        state = evaluation.accumulate(op.accumulate, state, member)
    return call_local(op.report, state)


def _present(op: Op, inputs: list[Any], num_clients: int) -> list[int]:
    """The clients that take part in a sum or a count."""
    if (isinstance(op, Count) and inputs) or (isinstance(op, Sum) and op.has_presence):
        return [client for client in range(num_clients) if inputs[-1][client]]
    return list(range(num_clients))


def _bits(op: Edge, source: Op, inputs: list[Any], values: Values, num_clients: int) -> int:
    if isinstance(op, Broadcast) and isinstance(source, Constant):
        return 0
    clients = _present(op, inputs, num_clients)
    if op.codec is None:
        return len(clients) * type_bits(source.type)
    messages = [inputs[0][client] for client in clients]
    return sum(int(call_local(op.codec.bits, message)) for message in messages)


def _sum(op: Sum | Count, inputs: list[Any], num_clients: int) -> Any:
    clients = _present(op, inputs, num_clients)
    if isinstance(op, Count):
        return jnp.int32(len(clients))
    return _total(op, [[x[client] for x in inputs] for client in clients])


def _total(op: Sum, members: list[list[Any]]) -> Any:
    value_type, stats_type = sum_types(op)
    total = evaluation.accumulator(value_type)
    stats = evaluation.accumulator(stats_type) if stats_type else ()
    bits = 0
    for inputs in members:
        message, *context = inputs[:-1] if op.has_presence else inputs
        if op.codec is None:
            total = add(total, jax.tree.map(jnp.asarray, message))
            continue
        value, its_stats = call_local(op.codec.receive, *context, message)
        total, stats = add(total, value), add(stats, its_stats)
        bits += int(call_local(op.codec.bits, message))
    total = evaluation.narrow(total, value_type)
    if op.codec is None:
        return total
    return Received(
        total, jnp.int32(len(members)), BitCount.of(bits), evaluation.narrow(stats, stats_type)
    )
