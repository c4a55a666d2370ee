"""The bridge to JAX's transformations: a program as a function of one member's values.

In a member function the edges are primitives, and everything else is ordinary JAX. Nothing tells
the server's values from a client's there; `staging` infers it from the edges again.

    broadcast   linear; its transpose is a sum
    sum         linear; its transpose is a broadcast, zero at the clients that are not present
    extreme     the smallest or largest; its derivative is the mean over the clients that have it
    count       how many clients there are
    present     the identity; marks who is present, for the sums of gradients
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend import core as jex_core
from jax.interpreters import ad, batching

from fedjax_core.errors import FederatedTypeError
from fedjax_core.language import inference, types
from fedjax_core.language.local import Local, Traced
from fedjax_core.language.program import (
    Apply,
    Broadcast,
    Constant,
    Count,
    Edge,
    Extreme,
    Get,
    Map,
    Op,
    Parameter,
    Place,
    Program,
    Sum,
    Zip,
)
from fedjax_core.language.types import FederatedType


class Tag(NamedTuple):
    """Which edge a primitive belongs to; the same for all leaves of its value.

    Attributes:
      number: of the operation in its program.
      label: the name of the edge.
      location: file and line of the operator.
      tree: the structure of what travels.
      present: of a broadcast, the number of the operation that says who is present in every sum
        that it leads to, if there is one; what comes back by differentiation is zero for the rest.
    """

    number: int
    label: str
    location: str
    tree: Any
    present: int | None = None


LEAF = jax.tree.structure(0)


def _same_shape(x: Any, *_: Any, **__: Any) -> ShapedArray:
    return ShapedArray(x.shape, x.dtype)


broadcast_p = jex_core.Primitive("federated_broadcast")
sum_p = jex_core.Primitive("federated_sum")
extreme_p = jex_core.Primitive("federated_extreme")
count_p = jex_core.Primitive("federated_count")
present_p = jex_core.Primitive("federated_present")
for _primitive in (broadcast_p, sum_p, extreme_p, present_p):
    _primitive.def_abstract_eval(_same_shape)
count_p.def_abstract_eval(lambda *_, **__: ShapedArray((), jnp.int32))


def _transpose_broadcast(cotangent: Any, _: Any, **params: Any) -> list[Any]:
    return [sum_p.bind(ad.instantiate_zeros(cotangent), **params)]


def _differentiate_sum(primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    value, *present = primals
    tangent = ad.instantiate_zeros(tangents[0])
    return sum_p.bind(value, *present, **params), sum_p.bind(tangent, *present, **params)


def _transpose_sum(cotangent: Any, _: Any, *present: Any, **params: Any) -> list[Any]:
    received = broadcast_p.bind(ad.instantiate_zeros(cotangent), **params)
    return [_where(present, received, 0), *(None for _ in present)]


def _where(present: tuple[Any, ...], value: Any, other: Any) -> Any:
    return jnp.where(present[0], value, jnp.asarray(other, value.dtype)) if present else value


def _differentiate_extreme(
    primals: Any, tangents: Any, *, is_max: bool, tag: Tag, leaf: int
) -> tuple[Any, Any]:
    """The mean of the tangents of all clients that have the extreme value."""
    value, *present = primals
    best = extreme_p.bind(value, *present, is_max=is_max, tag=tag, leaf=leaf)
    tangent = ad.instantiate_zeros(tangents[0])
    is_best = value == broadcast_p.bind(best, tag=tag, leaf=leaf)
    ties = sum_p.bind(is_best.astype(jnp.float32), *present, tag=tag, leaf=leaf)
    chosen = jnp.where(is_best, tangent, jnp.zeros_like(tangent))
    total = sum_p.bind(chosen, *present, tag=tag, leaf=leaf)
    return best, (total / jnp.maximum(ties, 1)).astype(total.dtype)


ad.deflinear2(broadcast_p, _transpose_broadcast)
ad.primitive_jvps[sum_p] = _differentiate_sum
ad.primitive_transposes[sum_p] = _transpose_sum
ad.primitive_jvps[extreme_p] = _differentiate_extreme


def _batch_broadcast(args: Any, axes: Any, **params: Any) -> tuple[Any, Any]:
    return broadcast_p.bind(args[0], **params), axes[0]


def _batch_sum(args: Any, axes: Any, **params: Any) -> tuple[Any, Any]:
    return _batch_up(sum_p, 0, args, axes, params)


def _batch_extreme(args: Any, axes: Any, **params: Any) -> tuple[Any, Any]:
    neutral = _neutral(args[0].dtype, params["is_max"])
    return _batch_up(extreme_p, neutral, args, axes, params)


def _batch_up(
    primitive: jex_core.Primitive, neutral: Any, args: Any, axes: Any, params: Any
) -> tuple[Any, Any]:
    """Passes the axis through; a presence that differs along it becomes a mask of the value."""
    value, *present = args
    if len(axes) == 1 or axes[1] is None:
        return primitive.bind(*args, **params), axes[0]
    mask = jnp.moveaxis(present[0], axes[1], 0)
    value = value[None] if axes[0] is None else jnp.moveaxis(value, axes[0], 0)
    mask = mask.reshape(mask.shape + (1,) * (value.ndim - 1))
    return primitive.bind(_where((mask,), value, neutral), **params), 0


def _batch_count(args: Any, axes: Any, *, tag: Tag) -> tuple[Any, Any]:
    return sum_p.bind(args[0].astype(jnp.int32), tag=tag, leaf=0), axes[0]


def _neutral(dtype: Any, is_max: bool) -> Any:
    if jnp.issubdtype(dtype, jnp.floating):
        return -jnp.inf if is_max else jnp.inf
    limits = jnp.iinfo(dtype)
    return limits.min if is_max else limits.max


batching.primitive_batchers[broadcast_p] = _batch_broadcast
batching.primitive_batchers[sum_p] = _batch_sum
batching.primitive_batchers[extreme_p] = _batch_extreme
batching.primitive_batchers[count_p] = _batch_count
# Who is present in several instances at once is no presence on an edge.
batching.primitive_batchers[present_p] = lambda args, axes, **_: (args[0], axes[0])


def member_function(program: Program, what: str) -> Callable[..., list[Any]]:
    """A program as a JAX function of one member's values.

    Args:
      program: of local computations, broadcasts, sums, counts, minima and maxima.
      what: names the transformation in errors.

    Returns:
      A function with one argument, a pytree, for each of the program's parameters; its result is a
      list of pytrees, one for each of the program's results.

    Raises:
      FederatedTypeError: naming the operation that has no such function.
    """
    live = _live(program)
    for i in live:
        _check(program.ops[i], program, what)
    presences = _presences(program, live)

    def member(*args: Any) -> list[Any]:
        values = dict(zip(program.parameters, args, strict=True))
        for i in live:
            if i not in values:
                op = program.ops[i]
                tag = Tag(i, getattr(op, "label", ""), op.location, LEAF, presences.get(i))
                values[i] = _evaluate(op, [values[j] for j in op.inputs], tag)
        return [values[i] for i in program.results]

    return member


def _live(program: Program) -> list[int]:
    """The operations that the results are computed from, in order."""
    found: set[int] = set()
    pending = list(program.results)
    while pending:
        i = pending.pop()
        if i not in found:
            found.add(i)
            pending.extend(program.ops[i].inputs)
    return sorted(found)


def _check(op: Op, program: Program, what: str) -> None:
    where = f" at {op.location}" if op.location else ""
    if isinstance(op, Apply):
        raise FederatedTypeError(
            f"{what} of `{program.name}`: expected a computation that is complete, got "
            f"{op.describe()}{where}, a call of a parameter; bind its functions first."
        )
    is_edge = isinstance(op, Broadcast | Sum | Extreme)
    is_plain = is_edge and op.codec is None
    if is_plain or isinstance(op, Parameter | Constant | Map | Zip | Get | Place | Count):
        return
    operator = type(op).__name__.lower() + (" with a codec" if is_edge else "")
    remedy = "without the codec" if is_edge else "without it"
    raise FederatedTypeError(
        f"{what} of `{program.name}`: expected broadcasts, sums, minima and maxima of plain "
        f"values, got a {operator}, {op.describe()}{where}; take the {what} of the computation "
        f"{remedy}, or apply jax.{what} to the function that computation.lower(...) gives."
    )


def _presences(program: Program, live: list[int]) -> dict[int, int]:
    """For each broadcast the presence that all sums share to which its value leads, if they do."""
    leads_to: dict[int, set[int | None]] = {i: set() for i in live}
    for i in reversed(live):
        op = program.ops[i]
        if isinstance(op, Sum | Extreme):
            leads_to[op.inputs[0]].add(op.inputs[-1] if op.has_presence else None)
        elif not isinstance(op, Broadcast | Count):
            for j in op.inputs:
                leads_to[j] |= leads_to[i]
    found = {i: leads_to[i] for i in live if isinstance(program.ops[i], Broadcast)}
    shared = {i: next(iter(p)) for i, p in found.items() if len(p) == 1}
    return {i: p for i, p in shared.items() if p is not None}


def _evaluate(op: Op, inputs: list[Any], tag: Tag) -> Any:
    match op:
        case Constant(value=value):
            return value
        case Map(local=local):
            return _call(local, tuple(inputs))
        case Zip(tree=tree):
            return jax.tree.unflatten(tree, inputs)
        case Get(position=position):
            return types.one_level(inputs[0])[0][position][1]
        case Place():
            return inputs[0]
        case Count():
            return count_p.bind(*map(_mark, inputs, op.inputs), tag=tag)
    assert isinstance(op, Edge)
    return _cross(op, inputs, tag)


def _mark(present: Any, number: int) -> Any:
    return present_p.bind(jnp.asarray(present), number=number)


def _cross(op: Edge, inputs: list[Any], tag: Tag) -> Any:
    """The value of an edge, leaf by leaf."""
    value, *present = inputs
    present = list(map(_mark, present, op.inputs[1:]))
    if isinstance(op, Sum):  # of small floats the sum may be wider
        wanted = inference.template(cast(FederatedType, op.type).member)
        value = jax.tree.map(lambda x, s: jnp.asarray(x).astype(s.dtype), value, wanted)
    leaves, tree = jax.tree.flatten(value)
    tag = tag._replace(tree=tree)
    bind: Callable[..., Any] = (broadcast_p if isinstance(op, Broadcast) else sum_p).bind
    if isinstance(op, Extreme):
        bind = functools.partial(extreme_p.bind, is_max=op.is_max)
    crossed = [
        bind(jnp.asarray(leaf), *present, tag=tag, leaf=number)
        for number, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, crossed)


def _call(local: Local, args: tuple[Any, ...]) -> Any:
    args = jax.tree.map(jnp.asarray, args)
    traced = local.traced_for(args)
    leaves = _compiled(traced, local.name)(*jax.tree.leaves(args))
    return jax.tree.unflatten(traced.out_tree, leaves)


def _compiled(traced: Traced, name: str) -> Callable[..., Any]:
    """A call under its own name, which survives differentiation."""
    key = "bridge", name
    call = traced.compiled.get(key)
    return call or traced.compiled.setdefault(key, _compile(traced, name))


def _compile(traced: Traced, name: str) -> Callable[..., Any]:
    def call(*leaves: Any) -> list[Any]:
        return jex_core.jaxpr_as_fun(traced.jaxpr)(*leaves)

    call.__name__ = name
    return jax.jit(call)
