"""Evaluating one operation on members' values: what all ways to run a program share."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from fedjax_core.bits import BitCount
from fedjax_core.errors import FederatedTypeError
from fedjax_core.execution.convolutions import rewrite_convolutions
from fedjax_core.language import inference, types
from fedjax_core.language.local import Local, Traced
from fedjax_core.language.program import Constant, Edge, Get, Map, Op, Zip, type_bits
from fedjax_core.language.types import Type


def evaluate(op: Op, inputs: list[Any]) -> Any:
    """The value of a local operation at one member, given its inputs' values there."""
    match op:
        case Constant(value=value):
            return value
        case Map(local=local):
            return call_local(local, *inputs)
        case Zip(tree=tree):
            return jax.tree.unflatten(tree, inputs)
        case Get(position=position):
            return types.one_level(inputs[0])[0][position][1]
    raise FederatedTypeError(f"Expected an operation at one member, got {op.describe()}.")


def call_local(local: Local, *args: Any) -> Any:
    """Evaluates a local computation on pytrees of arrays, under its own name in profiles."""
    args = jax.tree.map(jnp.asarray, args)
    traced = local.traced_for(args)
    on_cpu = jax.default_backend() == "cpu"
    leaves = _jitted(traced, local.name, on_cpu)(*jax.tree.leaves(args))
    return jax.tree.unflatten(traced.out_tree, leaves)


def accumulate(local: Local, state: Any, member: Any) -> Any:
    """The next state of a fold, in the containers of the state before."""
    leaves = jax.tree.leaves(call_local(local, state, member))
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


@functools.lru_cache(maxsize=1024)
def _jitted(traced: Traced, name: str, on_cpu: bool) -> Callable[..., Any]:
    jaxpr = rewrite_convolutions(traced.jaxpr) if on_cpu else traced.jaxpr

    def call(*leaves: Any) -> list[Any]:
        return jex_core.jaxpr_as_fun(jaxpr)(*leaves)

    call.__name__ = name
    return jax.jit(call)


def accumulator(t: Type) -> Any:
    """A zero to sum values of type `t` into, at least 32 bits wide."""
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, _wide(x.dtype)), inference.template(t), is_leaf=_is_shape
    )


def _wide(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return dtype
    return jnp.promote_types(dtype, _at_least(dtype))


def _at_least(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.float32
    return jnp.uint32 if jnp.issubdtype(dtype, jnp.unsignedinteger) else jnp.int32


def _is_shape(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def add(total: Any, value: Any) -> Any:
    """`total + value`, leaf by leaf in the accumulator's dtype."""
    return jax.tree.map(lambda a, x: a + x.astype(a.dtype), total, value)


def narrow(total: Any, t: Type) -> Any:
    """An accumulated sum in the dtypes of type `t`."""
    return jax.tree.map(lambda x, s: x.astype(s.dtype), total, inference.template(t))


def mask(keep: jax.Array, value: Any) -> Any:
    """`value` where `keep`, else zeros; never a product, so that what is left out may be NaN."""
    return jax.tree.map(lambda x: jnp.where(keep, x, jnp.zeros_like(x)), value)


def select(keep: jax.Array, new: Any, old: Any) -> Any:
    """`new` where `keep`, else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, old)


def raw_bits(op: Edge, source: Type) -> BitCount:
    """The size of one raw message of type `source` on the edge `op`."""
    return BitCount.of(type_bits(source))
