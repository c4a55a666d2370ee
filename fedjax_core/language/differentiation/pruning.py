"""The equations of a jaxpr that its results need, looking into calls of which they need a part."""

from typing import Any

from jax.extend import core as jex_core

# Calls whose body is the parameter `jaxpr`, with one input for each of its own.
_CALLS = frozenset({"jit", "pjit", "closed_call"})


def is_literal(atom: Any) -> bool:
    """Whether `atom` is a number in the jaxpr, which cannot be looked up."""
    return isinstance(atom, jex_core.Literal)


def prune(jaxpr: Any) -> tuple[list[Any], dict[Any, Any]]:
    """Leaves out the equations that no result depends on.

    Differentiation leaves calls behind of which only a constant is still wanted. They are put in
    line, so that what the rest of them needs is left out as well.

    Args:
      jaxpr: not closed; its effects are left out unless a result needs them.

    Returns:
      The equations in order, and for variables that have another name in them, that name.
    """
    live = {atom for atom in jaxpr.outvars if not is_literal(atom)}
    names: dict[Any, Any] = {}
    kept: list[Any] = []
    pending = list(jaxpr.eqns)
    while pending:
        eqn = pending.pop()
        used = [var in live for var in eqn.outvars]
        if not any(used):
            continue
        if not all(used) and _can_be_put_in_line(eqn):
            aliases, body = _in_line(eqn)
            wanted = [atom for var, atom in aliases.items() if var in live]
            live.update(atom for atom in wanted if not is_literal(atom))
            names.update(aliases)
            pending.extend(body)
        else:
            live.update(atom for atom in eqn.invars if not is_literal(atom))
            kept.append(eqn)
    return kept[::-1], names


def _can_be_put_in_line(eqn: Any) -> bool:
    inner = eqn.params.get("jaxpr")
    is_call = eqn.primitive.name in _CALLS and isinstance(inner, jex_core.ClosedJaxpr)
    return is_call and not inner.consts


def _in_line(eqn: Any) -> tuple[dict[Any, Any], list[Any]]:
    """The names of a call's results in its body, and the body with variables of its own."""
    inner = eqn.params["jaxpr"].jaxpr
    outer = dict(zip(inner.invars, eqn.invars, strict=True))

    def renamed(atom: Any) -> Any:
        return atom if is_literal(atom) else outer[atom]

    body = []
    for step in inner.eqns:
        invars = [renamed(atom) for atom in step.invars]
        outer.update((var, jex_core.Var(var.aval)) for var in step.outvars)
        body.append(step.replace(invars=invars, outvars=[outer[var] for var in step.outvars]))
    results = map(renamed, inner.outvars)
    return dict(zip(eqn.outvars, results, strict=True)), body
