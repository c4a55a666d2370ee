"""The waves of a pass: what one does, and how they follow one another.

    fused        one loop in one program                     memory and compilation do not grow
    unrolled     one program, wave after wave                no loop around the clients' work
    dispatched   one program for a wave, called by the host  the host sees every wave

All three compute the same: what differs is what XLA makes of it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_core.execution.aggregations import AGGREGATIONS
from fedjax_core.execution.compiling import compiler_options, jit
from fedjax_core.execution.evaluation import evaluate
from fedjax_core.language.program import Op, Parameter, Program, goes_up
from fedjax_core.language.values import Sequence

Values = dict[int, Any]


class Shared(NamedTuple):
    """What all waves of a pass read.

    Attributes:
      values: what has one value for all.
      stacked: values at the clients, for the pools of packed sequences.
    """

    values: Values
    stacked: Values


@dataclasses.dataclass(frozen=True)
class Pass:
    """The client work of one round trip.

    Attributes:
      program: what is run.
      lanes: how many clients run side by side.
      sinks: the aggregations that it adds up.
      rows: the values that stay one for each client.
      needed: the client operations that all of these are computed from, in order.
    """

    program: Program
    lanes: int
    sinks: tuple[int, ...]
    rows: tuple[int, ...]
    needed: tuple[int, ...]

    def wave(self, shared: Shared, totals: Values, xs: tuple[Any, Any]) -> tuple[Values, Values]:
        """Runs the clients of one wave and adds them to `totals`; returns their rows too."""
        lanes, valid = xs
        ops = self.program.ops

        def client(members: Any, is_valid: jax.Array) -> tuple[Values, Values]:
            values = self._run_client(shared, members)
            partial = {i: self._contribute(i, values, is_valid) for i in self.sinks}
            return partial, {i: values[i] for i in self.rows}

        if self.lanes == 1:  # no batching at all: convolutions keep their own form
            first = jax.tree.map(lambda x: x[0], (lanes, valid))
            partials, rows = jax.tree.map(lambda x: jnp.asarray(x)[None], client(*first))
        else:
            partials, rows = jax.vmap(client)(lanes, valid)
        added = {i: rule_of(ops[i]).add(ops[i], totals[i], partials[i]) for i in self.sinks}
        return added, rows

    def _run_client(self, shared: Shared, members: Any) -> Values:
        """The values of the needed operations at one client."""
        values = dict(shared.values)
        for i in self.needed:
            op = self.program.ops[i]
            if isinstance(op, Parameter):
                values[i] = join(members[i], shared.stacked[i])
            elif not goes_up(op):
                values[i] = evaluate(op, [values[j] for j in op.inputs])
        return values

    def _contribute(self, i: int, values: Values, is_valid: jax.Array) -> Any:
        """One client's part of an aggregation."""
        op = self.program.ops[i]
        return rule_of(op).contribute(op, [values[j] for j in op.inputs], is_valid)


class Loop(Protocol):
    """How the waves of a pass follow one another."""

    def __call__(self, work: Pass, shared: Shared, start: Values, xs: Any) -> tuple[Values, Values]:
        """Runs all waves.

        Args:
          work: what each of them does.
          shared: what all of them read.
          start: the totals of no client.
          xs: for each wave `(lanes, valid)`, stacked.

        Returns:
          The totals, and the rows of all waves, stacked.
        """
        ...


def fused(work: Pass, shared: Shared, start: Values, xs: Any) -> tuple[Values, Values]:
    """One loop in one program; a single wave runs outside of any loop."""
    if jax.tree.leaves(xs)[0].shape[0] == 1:
        return unrolled(work, shared, start, xs)
    return lax.scan(functools.partial(work.wave, shared), start, xs)


def unrolled(work: Pass, shared: Shared, start: Values, xs: Any) -> tuple[Values, Values]:
    """One program without a loop over waves: it grows with them, and so does its compilation."""
    return _one_by_one(functools.partial(work.wave, shared), start, xs)


def dispatched(work: Pass, shared: Shared, start: Values, xs: Any) -> tuple[Values, Values]:
    """A program for each wave, called by the host; the totals are donated from one to the next."""
    call = _compiled_wave(work)
    start = jax.tree.map(jnp.copy, start)
    return _one_by_one(lambda totals, x: call(shared, totals, x), start, xs)


@functools.lru_cache(maxsize=256)
def _compiled_wave(work: Pass) -> Callable[..., tuple[Values, Values]]:
    options = lambda: compiler_options(work.program, jax.default_backend())  # noqa: E731
    return jit(work.wave, options, donate_argnums=1)


def _one_by_one(wave: Callable[..., Any], totals: Values, xs: Any) -> tuple[Values, Values]:
    rows = []
    num_waves = jax.tree.leaves(xs)[0].shape[0]
    if num_waves == 0:
        return lax.scan(wave, totals, xs)
    for k in range(num_waves):
        totals, row = wave(totals, jax.tree.map(lambda x, k=k: x[k], xs))
        rows.append(row)
    return totals, jax.tree.map(lambda *parts: jnp.stack(parts), *rows)


def loop_of(mode: str) -> Loop:
    """The loop of a mode of `Execution`."""
    return {"unrolled": unrolled, "dispatched": dispatched}.get(mode, fused)


def rule_of(op: Op) -> Any:
    """How an aggregation adds up."""
    return AGGREGATIONS[type(op)]


def is_sequence(x: Any) -> bool:
    """Whether `x` is a sequence, where pytrees are mapped over."""
    return isinstance(x, Sequence)


def split(value: Any) -> Any:
    """The arrays of a stacked value that have a clients axis."""

    def per_client(x: Any) -> Any:
        return (x.start, x.length) if is_sequence(x) and x.packed else x

    return jax.tree.map(per_client, value, is_leaf=is_sequence)


def join(member: Any, stacked: Any) -> Any:
    """One client's value from its own arrays and the pools that all clients share."""

    def one(x: Any, part: Any) -> Any:
        if not (is_sequence(x) and x.packed):
            return part
        start, length = part
        pool = jax.tree.map(jnp.asarray, x.elements)
        return Sequence(pool, start, length, x.capacity)

    return jax.tree.map(one, stacked, member, is_leaf=is_sequence)


def member(stacked: Any, client: int) -> Any:
    """One client's value out of a stacked one."""
    return join(jax.tree.map(lambda x: x[client], split(stacked)), stacked)
