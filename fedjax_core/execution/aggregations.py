"""Aggregations: how each operator that goes up is folded over the clients.

An aggregation is a zero, what one client contributes, how a wave of contributions is added, how two
groups of clients are merged, and what the server makes of the total. All ways to run a program that
do not go client by client share these.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedjax_core.bits import BitCount
from fedjax_core.execution import accumulators, collectives
from fedjax_core.execution.evaluation import call_local, mask, select
from fedjax_core.language import inference
from fedjax_core.language.messages import Received
from fedjax_core.language.program import (
    Aggregate,
    Count,
    Edge,
    Extreme,
    Op,
    Program,
    SecurePart,
    SecureSum,
    Sum,
    secure_parts,
    type_bits,
)
from fedjax_core.language.secure import SecureTotal
from fedjax_core.language.types import FederatedType, Type
from fedjax_core.rounding import pinned

Axis = str | tuple[str, ...] | None


class Partial(NamedTuple):
    """What some clients add up to; () where an aggregation has no use for a part.

    Attributes:
      total: the accumulator.
      count: int32, how many clients there are in it.
      bits: of their messages, where that depends on the values.
      stats: the accumulated statistics of their messages.
    """

    total: Any
    count: Any
    bits: Any = ()
    stats: Any = ()


class Aggregation(NamedTuple):
    """One operator that goes up, as a fold.

    Attributes:
      zero: `(op, values) -> Partial`, of no clients; `values` of the server's operations.
      contribute: `(op, inputs, is_valid) -> Partial`, of one client.
      add: `(op, total, lanes) -> Partial`, where `lanes` is stacked over the clients of a wave.
      merge: `(op, a, b) -> Partial`.
      result: `(op, total) -> value` at the server.
      adds_up: whether the total of several devices is the sum of theirs, array by array.
    """

    zero: Callable[[Any, dict[int, Any]], Partial]
    contribute: Callable[[Any, list[Any], jax.Array], Partial]
    add: Callable[[Any, Partial, Partial], Partial]
    merge: Callable[[Any, Partial, Partial], Partial]
    result: Callable[[Any, Partial], Any]
    adds_up: bool = True


def is_present(op: Op, inputs: list[Any], is_valid: jax.Array) -> jax.Array:
    """Whether a client takes part in an aggregation."""
    if isinstance(op, Count):
        return is_valid & inputs[0] if inputs else is_valid
    if isinstance(op, Sum | Extreme) and op.has_presence:
        return is_valid & inputs[-1]
    return is_valid


def _none() -> jax.Array:
    return jnp.int32(0)


def _one_if(present: jax.Array) -> jax.Array:
    return jnp.asarray(present).astype(jnp.int32)


# Sums, raw or of encoded messages.


def sum_types(op: Sum) -> tuple[Type, Type | None]:
    """The types of what a sum adds up, and of its statistics (None without a codec)."""
    if op.codec is None:
        return cast(FederatedType, op.type).member, None
    value, stats = op.codec.receive.result.children()
    return value, stats


def _sum_zero(op: Sum, _: dict[int, Any]) -> Partial:
    value, stats = sum_types(op)
    if stats is None:
        return Partial(accumulators.zero(value), _none())
    return Partial(accumulators.zero(value), _none(), BitCount.zero(), accumulators.zero(stats))


def _sum_contribute(op: Sum, inputs: list[Any], is_valid: jax.Array) -> Partial:
    present = is_present(op, inputs, is_valid)
    message, *context = inputs[:-1] if op.has_presence else inputs
    count = _one_if(present)
    if op.codec is None:
        return Partial(mask(present, message), count)
    value, stats = pinned(call_local(op.codec.receive, *context, pinned(message)))
    bits = call_local(op.codec.bits, message)
    return Partial(mask(present, value), count, mask(present, bits), mask(present, stats))


def _sum_add(_: Op, total: Partial, lanes: Partial) -> Partial:
    return Partial(
        accumulators.add_lanes(total.total, lanes.total),
        total.count + jnp.sum(lanes.count, dtype=jnp.int32),
        total.bits + lanes.bits.sum(axis=0) if isinstance(total.bits, BitCount) else (),
        accumulators.add_lanes(total.stats, lanes.stats),
    )


def _sum_merge(_: Op, a: Partial, b: Partial) -> Partial:
    return Partial(
        accumulators.merge(a.total, b.total),
        a.count + b.count,
        a.bits + b.bits if isinstance(a.bits, BitCount) else (),
        accumulators.merge(a.stats, b.stats),
    )


def _sum_result(op: Sum, total: Partial) -> Any:
    value, stats = sum_types(op)
    narrowed = accumulators.narrow(total.total, value)
    if stats is None:
        return narrowed
    return Received(narrowed, total.count, total.bits, accumulators.narrow(total.stats, stats))


# Counts.


def _count_zero(_op: Count, _: dict[int, Any]) -> Partial:
    return Partial((), _none())


def _count_contribute(op: Count, inputs: list[Any], is_valid: jax.Array) -> Partial:
    return Partial((), _one_if(is_present(op, inputs, is_valid)))


def _count_result(_: Count, total: Partial) -> jax.Array:
    return total.count


# Smallest and largest values.


def _extreme_zero(op: Extreme, _: dict[int, Any]) -> Partial:
    template = inference.template(cast(FederatedType, op.type).member)
    return Partial(jax.tree.map(lambda x: neutral(op, x), template), _none())


def neutral(op: Extreme, x: Any) -> jax.Array:
    """What the smallest, or largest, of no values like `x` is."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        infinity = -jnp.inf if op.is_max else jnp.inf
        if np.isinf(np.asarray(infinity).astype(x.dtype)):
            return jnp.full(x.shape, infinity, x.dtype)
        limits = jnp.finfo(x.dtype)  # some dtypes of 8 bits have no infinity
        return jnp.full(x.shape, limits.min if op.is_max else limits.max, x.dtype)
    limits = jnp.iinfo(x.dtype)
    return jnp.full(x.shape, limits.min if op.is_max else limits.max, x.dtype)


def _extreme_contribute(op: Extreme, inputs: list[Any], is_valid: jax.Array) -> Partial:
    present = is_present(op, inputs, is_valid)
    value = jax.tree.map(jnp.asarray, inputs[0])
    nothing = jax.tree.map(lambda x: neutral(op, x), value)
    return Partial(select(present, value, nothing), _one_if(present))


def _extreme_add(op: Extreme, total: Partial, lanes: Partial) -> Partial:
    reduce = jnp.max if op.is_max else jnp.min
    wave = Partial(
        jax.tree.map(lambda x: reduce(x, axis=0), lanes.total),
        jnp.sum(lanes.count, dtype=jnp.int32),
    )
    return _extreme_merge(op, total, wave)


def _extreme_merge(op: Extreme, a: Partial, b: Partial) -> Partial:
    pick = jnp.maximum if op.is_max else jnp.minimum
    return Partial(jax.tree.map(pick, a.total, b.total), a.count + b.count)


def _extreme_result(_: Extreme, total: Partial) -> Any:
    return total.total


# Secure sums of integers.


def _secure_zero(op: SecureSum, _: dict[int, Any]) -> Partial:
    value = _secure_template(op)
    counts = accumulators.zero_like((jnp.int32(0), jnp.int32(0)))
    return Partial(accumulators.zero_like(value), _none(), (), counts)


def _secure_template(op: SecureSum) -> Any:
    member = next(iter(cast(FederatedType, op.type).member.children()))
    return inference.template(member)


def _secure_contribute(op: SecureSum, inputs: list[Any], is_valid: jax.Array) -> Partial:
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, inputs[0]))
    below = above = jnp.int32(0)
    clipped = []
    for k, x in enumerate(leaves):
        if op.modulus is not None:
            clipped.append(jnp.mod(x, jnp.asarray(op.modulus[k], x.dtype)))
            continue
        lower, upper = (_in_dtype(bound, x.dtype) for bound in (op.lower[k], op.upper[k]))
        below = below + jnp.sum(x < lower, dtype=jnp.int32)
        above = above + jnp.sum(x > upper, dtype=jnp.int32)
        clipped.append(jnp.clip(x, lower, upper))
    value = mask(is_valid, jax.tree.unflatten(tree, clipped))
    return Partial(value, _one_if(is_valid), (), mask(is_valid, (below, above)))


def _in_dtype(bound: int, dtype: Any) -> jax.Array:
    """The nearest number to `bound` that the dtype holds."""
    limits = jnp.iinfo(dtype)
    return jnp.asarray(min(max(bound, int(limits.min)), int(limits.max)), dtype)


def _secure_result(op: SecureSum, total: Partial) -> SecureTotal:
    template = _secure_template(op)
    if op.modulus is None:
        value = accumulators.narrow_like(total.total, template)
    else:
        leaves, tree = jax.tree.flatten(template)
        wide = jax.tree.structure(template).flatten_up_to(total.total)
        parts = zip(wide, op.modulus, leaves, strict=True)
        reduced = [accumulators.modulo(x, m).astype(leaf.dtype) for x, m, leaf in parts]
        value = jax.tree.unflatten(tree, reduced)
    counts = (jnp.int32(0), jnp.int32(0))
    return SecureTotal(value, *accumulators.narrow_like(total.stats, counts))


# General folds.


def _fold_zero(op: Aggregate, values: dict[int, Any]) -> Partial:
    return Partial(jax.tree.map(jnp.asarray, values[op.inputs[1]]), _none())


def _fold_contribute(_: Aggregate, inputs: list[Any], is_valid: jax.Array) -> Partial:
    return Partial(inputs[0], _one_if(is_valid))


def _fold_add(op: Aggregate, total: Partial, lanes: Partial) -> Partial:
    """Accumulates the members of a wave one after the other."""

    def step(state: Any, x: tuple[Any, jax.Array]) -> tuple[Any, None]:
        member, count = x
        return select(count > 0, accumulate(op, state, member), state), None

    state = lax.scan(step, total.total, (lanes.total, lanes.count))[0]
    return Partial(state, total.count + jnp.sum(lanes.count, dtype=jnp.int32))


def accumulate(op: Aggregate, state: Any, member: Any) -> Any:
    """The next state of a fold, in the containers of the state before."""
    return _as_in(state, call_local(op.accumulate, state, member))


def _as_in(state: Any, new: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(new))


def _fold_merge(op: Aggregate, a: Partial, b: Partial) -> Partial:
    merged = _as_in(a.total, call_local(op.merge, a.total, b.total))
    return Partial(merged, a.count + b.count)


def _fold_result(op: Aggregate, total: Partial) -> Any:
    return call_local(op.report, total.total)


AGGREGATIONS: dict[type[Op], Aggregation] = {
    Sum: Aggregation(_sum_zero, _sum_contribute, _sum_add, _sum_merge, _sum_result),
    Count: Aggregation(_count_zero, _count_contribute, _sum_add, _sum_merge, _count_result),
    Extreme: Aggregation(
        _extreme_zero,
        _extreme_contribute,
        _extreme_add,
        _extreme_merge,
        _extreme_result,
        adds_up=False,
    ),
    SecureSum: Aggregation(_secure_zero, _secure_contribute, _sum_add, _sum_merge, _secure_result),
    Aggregate: Aggregation(
        _fold_zero, _fold_contribute, _fold_add, _fold_merge, _fold_result, adds_up=False
    ),
}


def across(
    program: Program, totals: dict[int, Partial], num_clients: Any, axis: str | tuple[str, ...]
) -> tuple[dict[int, Partial], Any]:
    """The totals of all devices along mesh axes, for all aggregations of a pass at once.

    Args:
      program: that the aggregations belong to.
      totals: for the position of each aggregation, the total of this device.
      num_clients: summed along with them.
      axis: the mesh axes.

    Returns:
      The totals and the number of clients of all devices. Sums take one all-reduce together; the
      totals of the others are gathered, and merged in the order of the devices.
    """
    sums = {i: x for i, x in totals.items() if AGGREGATIONS[type(program.ops[i])].adds_up}
    folds = {i: x for i, x in totals.items() if i not in sums}
    counts = {i: x.count for i, x in folds.items()}
    sums, counts, num_clients = collectives.add_up((sums, counts, num_clients), axis)
    merged = {i: _merged(program.ops[i], x) for i, x in collectives.gather(folds, axis).items()}
    merged = {i: x._replace(count=counts[i]) for i, x in merged.items()}
    return accumulators.carried(sums) | merged, num_clients


def _merged(op: Op, gathered: Partial) -> Partial:
    """The total of many, stacked along axis 0."""
    first = jax.tree.map(lambda x: x[0], gathered)
    rest = jax.tree.map(lambda x: x[1:], gathered)
    merge = AGGREGATIONS[type(op)].merge
    return lax.scan(lambda state, x: (merge(op, state, x), None), first, rest)[0]


def sent(program: Program, op: Edge, total: Partial) -> BitCount:
    """The bits that the clients sent for an aggregation."""
    if isinstance(total.bits, BitCount):
        return total.bits
    return message_bits(program, op, total.count).times(total.count.astype(jnp.uint32))


def message_bits(program: Program, op: Edge, num_clients: Any) -> BitCount:
    """The size of one raw message on an edge, up or down, in a cohort of `num_clients`."""
    member = cast(FederatedType, program.ops[op.inputs[0]].type).member
    if isinstance(op, SecureSum):
        parts = secure_parts(op, member)
        counts = [BitCount.of(x.size).times(_secure_width(x, num_clients)) for x in parts]
        return sum(counts, BitCount.zero())
    return BitCount.of(type_bits(program.message_type(op)))


def _secure_width(part: SecurePart, num_clients: Any) -> jax.Array:
    """The bits of one number of a secure sum over `num_clients`, as `secure_sum_bits` has them."""
    if part.span is None:
        return jnp.uint32(part.width)
    clients = jnp.maximum(jnp.asarray(num_clients, jnp.uint32), 1)
    # A span may have 62 bits, so the product has three words.
    carry, lowest = BitCount.of(part.span & 0xFFFFFFFF).times(clients)
    highest, middle = BitCount.of(part.span >> 32).times(clients) + BitCount(
        jnp.zeros_like(carry), carry
    )
    width = jnp.uint32(0)
    for place, word in enumerate((lowest, middle, highest)):
        width = jnp.where(word > 0, np.uint32(32 * (place + 1)) - lax.clz(word), width)
    return width
