"""The reference interpreter: a program run client by client over Python lists.

It has no loops but Python's, no masks and no waves. It is the specification that every other way to
run a program is tested against.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.bits import BitCount
from fedjax_core.errors import FederatedTypeError
from fedjax_core.execution import accumulators
from fedjax_core.execution.aggregations import accumulate, neutral, sum_types
from fedjax_core.execution.evaluation import call_local, evaluate
from fedjax_core.execution.lowering import Outcome, Values, is_uniform
from fedjax_core.language import feeding, inference
from fedjax_core.language.messages import Received
from fedjax_core.language.program import (
    Aggregate,
    Broadcast,
    Collect,
    Constant,
    Count,
    Edge,
    Extreme,
    Op,
    Program,
    SecureSum,
    Sum,
    goes_up,
    secure_sum_bits,
    type_bits,
)
from fedjax_core.language.secure import SecureTotal
from fedjax_core.language.types import FederatedType, SequenceType


def run(program: Program, values: Values, num_clients: int) -> Outcome:
    """Runs a program.

    Args:
      program: what to run.
      values: for each parameter its value; at the clients a list with one entry a client.
      num_clients: how many clients there are.
    """
    values, ledger, violations = dict(values), {}, {}
    for i, op in enumerate(program.ops):
        if i in values:
            continue
        inputs = [_per_client(values[j], program.ops[j], num_clients) for j in op.inputs]
        if isinstance(op, Aggregate):
            values[i] = _fold(op, inputs[0], values[op.inputs[1]])
        elif goes_up(op):
            values[i] = _aggregate(op, _members(op, inputs, num_clients))
        elif is_uniform(op):
            values[i] = evaluate(op, [values[j] for j in op.inputs])
        else:
            members = [[x[client] for x in inputs] for client in range(num_clients)]
            values[i] = [evaluate(op, member) for member in members]
        if isinstance(op, Edge):
            ledger[i] = BitCount.of(_bits(program, op, inputs, num_clients))
        if isinstance(op, SecureSum) and op.is_checked:
            violations[i] = (values[i].num_below, values[i].num_above)
    return Outcome({i: values[i] for i in program.results}, ledger, violations)


def _per_client(value: Any, op: Op, num_clients: int) -> list[Any]:
    return [value] * num_clients if is_uniform(op) else value


def _present(op: Op, inputs: list[Any], num_clients: int) -> list[int]:
    """The clients that take part in an aggregation."""
    has_presence = (isinstance(op, Count) and inputs) or (
        isinstance(op, Sum | Extreme) and op.has_presence
    )
    return [c for c in range(num_clients) if not has_presence or inputs[-1][c]]


def _members(op: Op, inputs: list[Any], num_clients: int) -> list[list[Any]]:
    """The inputs of each client that takes part, without its presence."""
    if isinstance(op, Sum | Extreme) and op.has_presence:
        return [[x[c] for x in inputs[:-1]] for c in _present(op, inputs, num_clients)]
    return [[x[c] for x in inputs] for c in _present(op, inputs, num_clients)]


def _bits(program: Program, op: Edge, inputs: list[Any], num_clients: int) -> int:
    source = program.ops[op.inputs[0]]
    if isinstance(op, Broadcast) and isinstance(source, Constant):
        return 0
    clients = _present(op, inputs, num_clients)
    if op.codec is not None:
        return sum(int(call_local(op.codec.bits, inputs[0][client])) for client in clients)
    if isinstance(op, SecureSum):
        member = cast(FederatedType, source.type).member
        return len(clients) * secure_sum_bits(op, member, len(clients))
    return len(clients) * type_bits(program.message_type(op))


def _aggregate(op: Op, members: list[list[Any]]) -> Any:
    match op:
        case Count():
            return jnp.int32(len(members))
        case Sum():
            return _sum(op, members)
        case Extreme():
            return _extreme(op, [member[0] for member in members])
        case SecureSum():
            return _secure_sum(op, [member[0] for member in members])
        case Collect():
            t = SequenceType(cast(SequenceType, cast(FederatedType, op.type).member).element)
            rows = [jax.tree.map(jnp.asarray, member[0]) for member in members]
            return feeding.to_member(rows, t, "federated_collect")
    raise FederatedTypeError(f"Expected an aggregation, got {op.describe()}.")


def _fold(op: Aggregate, members: list[Any], zero: Any) -> Any:
    state = zero
    for member in members:
        state = accumulate(op, state, member)
    return call_local(op.report, state)


def _sum(op: Sum, members: list[list[Any]]) -> Any:
    value_type, stats_type = sum_types(op)
    total = accumulators.zero(value_type)
    stats = accumulators.zero(stats_type) if stats_type else ()
    bits = 0
    for message, *context in members:
        if op.codec is None:
            total = accumulators.add(total, jax.tree.map(jnp.asarray, message))
            continue
        value, its_stats = call_local(op.codec.receive, *context, message)
        total, stats = accumulators.add(total, value), accumulators.add(stats, its_stats)
        bits += int(call_local(op.codec.bits, message))
    total = accumulators.narrow(total, value_type)
    if stats_type is None:
        return total
    count, bits = jnp.int32(len(members)), BitCount.of(bits)
    return Received(total, count, bits, accumulators.narrow(stats, stats_type))


def _extreme(op: Extreme, members: list[Any]) -> Any:
    pick = np.maximum if op.is_max else np.minimum
    template = inference.template(cast(FederatedType, op.type).member)

    def one(x: Any, *values: Any) -> jax.Array:
        result = np.asarray(neutral(op, x))
        for value in values:
            result = pick(result, np.asarray(value))
        return jnp.asarray(result)

    return jax.tree.map(one, template, *members)


def _secure_sum(op: SecureSum, members: list[Any]) -> SecureTotal:
    value_type = next(iter(cast(FederatedType, op.type).member.children()))
    leaves, tree = jax.tree.flatten(inference.template(value_type))
    totals, below, above = [], 0, 0
    for k, leaf in enumerate(leaves):
        total = np.zeros(leaf.shape, object)
        for member in members:
            x = np.asarray(jax.tree.leaves(member)[k]).astype(object)
            if op.modulus is not None:
                total = (total + x) % op.modulus[k]
                continue
            below += int(np.sum(x < op.lower[k]))
            above += int(np.sum(x > op.upper[k]))
            total = total + np.clip(x, op.lower[k], op.upper[k])
        limits = jnp.iinfo(leaf.dtype)
        held = np.clip(np.asarray(total, object), limits.min, limits.max)
        totals.append(jnp.asarray(np.asarray(held).astype(leaf.dtype)))
    return SecureTotal(jax.tree.unflatten(tree, totals), jnp.int32(below), jnp.int32(above))
