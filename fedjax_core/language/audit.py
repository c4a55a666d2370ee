"""What a local computation holds besides arithmetic: calls out of JAX, and captured arrays."""

from collections.abc import Iterator
from typing import Any

from jax.extend import core as jex_core

from fedjax_core.language.local import Local

# `debug_callback`, `io_callback`, `pure_callback` and their kin all have it in their names. Names
# rather than effects, because `pure_callback` has no effect.
_CALLBACK = "callback"
_HOST = frozenset({"debug_print", "infeed", "outfeed"})
# Native code, and exported modules that may call back themselves.
_FOREIGN = frozenset({"ffi_call", "call_exported"})


def outside_calls(local: Local) -> tuple[str, ...]:
    """The calls to Python or to foreign code in `local`, such as "debug_callback in scan in jit".

    All its traces are searched, with everything inside of loops, branches and nested functions.
    """
    found: dict[str, None] = {}
    for closed in _traces(local):
        found.update(dict.fromkeys(_calls(closed.jaxpr, (), {})))
    return tuple(found)


def _traces(local: Local) -> list[Any]:
    with local.lock:
        return [traced.jaxpr for traced in local.traces.values()]


def _calls(jaxpr: Any, outside: tuple[str, ...], seen: dict[int, Any]) -> Iterator[str]:
    if id(jaxpr) in seen:  # traced once, used often
        return
    seen[id(jaxpr)] = jaxpr
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        path = (name, *outside)
        if _CALLBACK in name or name in _HOST or name in _FOREIGN:
            yield " in ".join(path)
        for inner in jex_core.jaxprs_in_params(eqn.params):
            yield from _calls(inner, path, seen)


def captured_arrays(local: Local) -> tuple[Any, ...]:
    """The arrays that `local` has taken from around it; numbers without axes inside it left out."""
    found: dict[int, Any] = {}
    for closed in _traces(local):
        arrays = [*closed.consts, *_arrays(closed.jaxpr, {})]
        found.update({id(array): array for array in arrays})
    return tuple(found.values())


def _arrays(jaxpr: Any, seen: dict[int, Any]) -> Iterator[Any]:
    if id(jaxpr) in seen:
        return
    seen[id(jaxpr)] = jaxpr
    for eqn in jaxpr.eqns:
        yield from (atom.val for atom in eqn.invars if _is_literal_array(atom))
        for value in eqn.params.values():
            for closed in value if isinstance(value, tuple | list) else (value,):
                if isinstance(closed, jex_core.ClosedJaxpr):
                    yield from closed.consts
        for inner in jex_core.jaxprs_in_params(eqn.params):
            yield from _arrays(inner, seen)


def _is_literal_array(atom: Any) -> bool:
    return isinstance(atom, jex_core.Literal) and getattr(atom.val, "ndim", 0) > 0
