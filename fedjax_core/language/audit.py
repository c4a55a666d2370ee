"""What a local computation holds besides arithmetic: calls out of JAX, and captured arrays."""

import dataclasses
import enum
import functools
import sys
import types as python_types
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import AbstractValue
from jax.extend import core as jex_core

from fedjax_core.language.local import Local

# `debug_callback`, `io_callback`, `pure_callback` and their kin all have it in their names. Names
# rather than effects, because `pure_callback` has no effect.
_CALLBACK = "callback"
# A failed `check` carries values out in its message.
_HOST = frozenset({"debug_print", "infeed", "outfeed", "check"})
# Native code, and exported modules that may call back themselves.
_FOREIGN = frozenset({"ffi_call", "call_exported", "call_tf"})
# Rules of Python that JAX traces later: for a batch, and for an array in shards.
_RULES = frozenset({"custom_vmap_call", "custom_partitioning"})
_OUTSIDE = _HOST | _FOREIGN | _RULES

_KEYS = ("threefry2x32", "rbg", "unsafe_rbg")
# How deep inside of an equation's parameters JAX's own records are searched.
_DEPTH = 12
# What holds no function. Arrays among them: to look into one would fetch it from its device.
_LEAVES = (
    *(python_types.NoneType, int, float, complex, str, bytes, type, enum.Enum),
    *(np.dtype, np.generic, np.ndarray, jax.Array, AbstractValue, jex_core.Primitive),
    *(jax.tree_util.PyTreeDef, jax.sharding.Mesh, jax.sharding.AbstractMesh),
    *(jax.sharding.Sharding, jax.sharding.PartitionSpec),
)


def outside_calls(local: Local) -> tuple[str, ...]:
    """The calls to Python or to foreign code in `local`, such as "debug_callback in scan in jit".

    All its traces are searched, with everything inside of loops, branches and nested functions.
    What cannot be searched counts as a call too: "opaque primitive Name" for a primitive whose body
    is hidden, and "key<name>" for random keys that are not JAX's own.
    """
    found: dict[str, None] = {}
    for closed in _traces(local):
        found.update(dict.fromkeys(_calls(closed, (), {})))
    return tuple(found)


def _traces(local: Local) -> list[Any]:
    with local.lock:
        return [traced.jaxpr for traced in local.traces.values()]


def _open(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, jex_core.ClosedJaxpr) else jaxpr


def _calls(closed: Any, outside: tuple[str, ...], seen: dict[int, Any]) -> Iterator[str]:
    jaxpr = _open(closed)
    if id(jaxpr) in seen:  # traced once, used often
        return
    seen[id(jaxpr)] = jaxpr
    yield from _foreign_keys((*jaxpr.invars, *jaxpr.constvars), outside)
    for eqn in jaxpr.eqns:
        path = (eqn.primitive.name, *outside)
        inside = _search(eqn.params)
        if reason := _reason(eqn, inside):
            yield " in ".join((reason, *outside))
        yield from _foreign_keys(eqn.outvars, path)
        for inner in inside.jaxprs:
            yield from _calls(inner, path, seen)


def _reason(eqn: Any, inside: "_Inside") -> str:
    """How `eqn` itself leaves JAX; empty if it does not."""
    name = eqn.primitive.name
    if _CALLBACK in name or name in _OUTSIDE:
        return name
    if not _is_of_jax(type(eqn.primitive)):
        return f"opaque primitive {name}"
    body = eqn.params.get("_prim")  # what JAX expands no sooner than it compiles
    is_hidden = not inside.jaxprs and any(function is not body for function in inside.functions)
    if body is None or (_is_of_jax(type(body)) and not is_hidden):
        return ""
    return f"opaque primitive {type(body).__name__}"


def _foreign_keys(atoms: Iterable[Any], path: tuple[str, ...]) -> Iterator[str]:
    """Keys of generators that somebody defined: their bits are drawn by functions not seen here."""
    for atom in atoms:
        dtype = getattr(atom.aval, "dtype", None)
        if dtype is None or isinstance(dtype, np.dtype) or dtype in _own_keys():
            continue
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            yield " in ".join((str(dtype), *path))


@functools.cache
def _own_keys() -> frozenset[Any]:
    return frozenset(
        jax.eval_shape(functools.partial(jax.random.key, 0, impl=name)).dtype for name in _KEYS
    )


@dataclasses.dataclass
class _Inside:
    """What the parameters of an equation hold: jaxprs to search, and functions of Python."""

    jaxprs: list[Any] = dataclasses.field(default_factory=list)
    functions: list[Any] = dataclasses.field(default_factory=list)
    seen: dict[int, Any] = dataclasses.field(default_factory=dict)


def _search(params: dict[str, Any]) -> _Inside:
    """Goes through containers, records, closures and JAX's own objects, wherever jaxprs may be."""
    inside = _Inside()
    _look_into(tuple(params.values()), inside, _DEPTH)
    return inside


def _look_into(value: Any, inside: _Inside, depth: int) -> None:
    if isinstance(value, _LEAVES) or id(value) in inside.seen:
        return
    inside.seen[id(value)] = value
    if isinstance(value, jex_core.Jaxpr | jex_core.ClosedJaxpr):
        inside.jaxprs.append(value)
        return
    if callable(value):
        inside.functions.append(value)
    if depth:
        for child in _children(value):
            _look_into(child, inside, depth - 1)


def _children(value: Any) -> Iterable[Any]:
    match value:
        case dict():
            return value.values()
        case tuple() | list() | set() | frozenset():
            return value
        case functools.partial():
            return (value.func, value.args, value.keywords)
        case python_types.MethodType():
            return (value.__self__, value.__func__)
        case python_types.FunctionType():
            return _captured(value)
    if dataclasses.is_dataclass(value) or _is_of_jax(type(value)):
        return _attributes(value)
    return ()


def _captured(function: python_types.FunctionType) -> list[Any]:
    """What a function of JAX closes over; others are traced where JAX calls them."""
    # Of its globals, because a wrapper has the `__module__` of what it wraps.
    home = str(function.__globals__.get("__name__", ""))
    return [_contents(cell) for cell in function.__closure__ or () if home.startswith("jax")]


def _contents(cell: python_types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # what it is to hold is not defined yet
        return None


def _attributes(value: Any) -> list[Any]:
    slots = (name for base in type(value).__mro__ for name in _names(base))
    found = [getattr(value, name) for name in slots if hasattr(value, name)]
    return [*getattr(value, "__dict__", {}).values(), *found]


def _names(base: type) -> tuple[str, ...]:
    slots = base.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


@functools.cache
def _is_of_jax(kind: type) -> bool:
    """Whether JAX itself defines the class: found there, since a module's name is easily set."""
    if kind.__module__.partition(".")[0] not in ("jax", "jaxlib"):
        return False
    home: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        home = getattr(home, name, None)
    return home is kind


def captured_arrays(local: Local) -> tuple[Any, ...]:
    """The arrays that `local` has taken from around it; numbers without axes inside it left out."""
    found: dict[int, Any] = {}
    for closed in _traces(local):
        found.update({id(array): array for array in _arrays(closed, {})})
    return tuple(found.values())


def _arrays(closed: Any, seen: dict[int, Any]) -> Iterator[Any]:
    if id(closed) in seen:
        return
    seen[id(closed)] = closed
    if isinstance(closed, jex_core.ClosedJaxpr):
        yield from closed.consts
    for eqn in _open(closed).eqns:
        yield from (atom.val for atom in eqn.invars if _is_literal_array(atom))
        for inner in _search(eqn.params).jaxprs:
            yield from _arrays(inner, seen)


def _is_literal_array(atom: Any) -> bool:
    return isinstance(atom, jex_core.Literal) and getattr(atom.val, "ndim", 0) > 0
