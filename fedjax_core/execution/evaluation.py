"""Evaluating one operation on members' values: what all ways to run a program share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from fedjax_core.errors import FederatedTypeError
from fedjax_core.execution.convolutions import rewrite_convolutions
from fedjax_core.language import types
from fedjax_core.language.local import Local, Traced
from fedjax_core.language.program import (
    Broadcast,
    Constant,
    Get,
    Map,
    Op,
    Place,
    Request,
    Select,
    Zip,
)
from fedjax_core.language.values import Sequence
from fedjax_core.rounding import pinned


def evaluate(op: Op, inputs: list[Any]) -> Any:
    """The value of an operation at one member, given its inputs' values there."""
    match op:
        case Broadcast():
            return _receive(op, inputs)
        case Place() | Request():
            return inputs[0]
        case Select():
            return _select(op, *inputs)
        case Constant(value=value):
            return value
        case Map(local=local):
            return call_local(local, *inputs)
        case Zip(tree=tree):
            return jax.tree.unflatten(tree, inputs)
        case Get(position=position):
            return types.one_level(inputs[0])[0][position][1]
    raise FederatedTypeError(
        f"Expected a program without functions as parameters, got {op.describe()} "
        f"({op.location}); give the computation its functions first, with bind."
    )


def _receive(op: Broadcast, inputs: list[Any]) -> Any:
    """What a client has after a broadcast."""
    if op.codec is None:
        return inputs[0]
    message, *context = inputs
    return call_local(op.codec.receive, *context, pinned(message))[0]


def _select(op: Select, keys: Any, max_key: Any, source: Any) -> Sequence:
    keys = jnp.clip(jnp.asarray(keys), 0, jnp.maximum(max_key, 1) - 1)
    num_keys = keys.shape[0]
    parts = jax.vmap(lambda key: call_local(op.select, source, key))(keys)
    return Sequence(parts, jnp.int32(0), jnp.int32(num_keys), num_keys)


def call_local(local: Local, *args: Any) -> Any:
    """Evaluates a local computation on pytrees of arrays, under its own name in profiles."""
    args = jax.tree.map(jnp.asarray, args)
    traced = local.traced_for(args)
    leaves = _compiled(traced, local.name)(*jax.tree.leaves(args))
    return jax.tree.unflatten(traced.out_tree, leaves)


def accumulate(local: Local, state: Any, member: Any) -> Any:
    """The next state of a fold, in the containers of the state before."""
    leaves = jax.tree.leaves(call_local(local, state, member))
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def _compiled(traced: Traced, name: str) -> Callable[..., Any]:
    """A trace as a function of its own name, kept with it."""
    key = name, jax.default_backend() == "cpu"
    call = traced.compiled.get(key)
    return call or traced.compiled.setdefault(key, _compile(traced, *key))


def _compile(traced: Traced, name: str, on_cpu: bool) -> Callable[..., Any]:
    jaxpr = rewrite_convolutions(traced.jaxpr) if on_cpu else traced.jaxpr

    def call(*leaves: Any) -> list[Any]:
        return jex_core.jaxpr_as_fun(jaxpr)(*leaves)

    call.__name__ = name
    return jax.jit(call)


def mask(keep: jax.Array, value: Any) -> Any:
    """`value` where `keep`, else zeros; never a product, so that what is left out may be NaN."""
    return jax.tree.map(lambda x: jnp.where(keep, x, jnp.zeros_like(x)), value)


def select(keep: jax.Array, new: Any, old: Any) -> Any:
    """`new` where `keep`, else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, old)
