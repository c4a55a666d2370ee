"""Where the values of a member function live: placements inferred from its edges.

A value lives where the arguments that it is computed from live. Only an edge takes it to the other
placement, and each edge up starts a new round trip.
"""

import dataclasses
import enum
import functools
from typing import Any, NamedTuple

from jax.extend import core as jex_core

from fedjax_core.errors import PlacementError
from fedjax_core.language.differentiation.bridge import (
    Tag,
    broadcast_p,
    count_p,
    extreme_p,
    present_p,
    sum_p,
)
from fedjax_core.language.differentiation.pruning import is_literal, prune
from fedjax_core.language.placements import CLIENTS, SERVER
from fedjax_core.language.types import FederatedType, Type

EDGES = (broadcast_p, sum_p, extreme_p, count_p)


class Site(enum.IntEnum):
    """Where a value lives; a constant is at home everywhere, an unplaced one at the server too."""

    CONSTANT = 0
    UNPLACED = 1
    SERVER = 2
    CLIENTS = 3


class Fact(NamedTuple):
    """What is known of a variable.

    Attributes:
      site: where it lives.
      level: how many edges up any path to it has passed.
      is_uniform: whether it is the same for all members.
    """

    site: Site
    level: int
    is_uniform: bool


NOWHERE = Fact(Site.CONSTANT, 0, True)


class Crossing(NamedTuple):
    """One leaf of an edge: what travels, who is present if anybody asks, and what arrives.

    A count has no value.
    """

    primitive: Any
    params: dict[str, Any]
    value: Any
    present: Any
    arrived: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Crossings that are one edge: of the same operation, round trip and presence."""

    primitive: Any
    level: int
    tag: Tag
    is_max: bool
    crossings: list[Crossing]

    @property
    def is_down(self) -> bool:
        """Whether it is a broadcast."""
        return self.primitive is broadcast_p

    @property
    def values(self) -> tuple[Any, ...]:
        """What travels, leaf by leaf."""
        return tuple(crossing.value for crossing in self.crossings)

    @property
    def present(self) -> Any:
        """Who is present; None where all are."""
        return self.crossings[0].present

    @property
    def arrived(self) -> tuple[Any, ...]:
        """What arrives, leaf by leaf."""
        return tuple(crossing.arrived for crossing in self.crossings)


@dataclasses.dataclass(frozen=True, eq=False)
class Flow:
    """A traced member function, with its edges apart from its local equations.

    Attributes:
      facts: of each variable.
      producers: for each variable the local equation that it comes from, and its number.
      groups: the edges that the results need, in the order of the function.
      results: the atoms of the results.
    """

    facts: dict[Any, Fact]
    producers: dict[Any, tuple[int, Any]]
    groups: list[Group]
    results: list[Any]

    @functools.cached_property
    def edges(self) -> frozenset[Any]:
        """What arrives over the edges."""
        return frozenset(var for group in self.groups for var in group.arrived)

    def fact(self, atom: Any) -> Fact:
        """What is known of a variable or a literal."""
        return fact_of(self.facts, atom)


def fact_of(facts: dict[Any, Fact], atom: Any) -> Fact:
    """What `facts` say of a variable or a literal."""
    return NOWHERE if is_literal(atom) else facts[atom]


def fact_of_type(t: Type) -> Fact:
    """What the type of a parameter says."""
    if not isinstance(t, FederatedType):
        return Fact(Site.UNPLACED, 0, True)
    if t.placement is SERVER:
        return Fact(Site.SERVER, 0, True)
    assert t.placement is CLIENTS
    return Fact(Site.CLIENTS, 0, t.all_equal)


def analyse(closed: jex_core.ClosedJaxpr, arguments: list[Fact], name: str) -> Flow:
    """Separates edges from local equations, and infers where every value lives.

    Args:
      closed: the traced member function.
      arguments: what is known of each of its inputs.
      name: of the function, for errors.

    Raises:
      PlacementError: where values of both placements meet without an edge.
    """
    eqns, names = prune(closed.jaxpr)
    walk = _Walk(closed.jaxpr, arguments, names, name)
    for eqn in eqns:
        walk.visit(eqn)
    results = [walk.renamed(atom) for atom in closed.jaxpr.outvars]
    return Flow(walk.facts, walk.producers, _grouped(walk.facts, walk.crossings), results)


class _Walk:
    """One pass over the equations.

    Attributes:
      names: for a variable that is the same as an earlier one, that one.
      sent: for what has crossed already, what arrived.
      marks: for the number of an operation, who is present by it.
    """

    def __init__(self, jaxpr: Any, arguments: list[Fact], names: dict[Any, Any], name: str) -> None:
        self.name = name
        self.facts: dict[Any, Fact] = dict.fromkeys(jaxpr.constvars, NOWHERE)
        self.facts.update(zip(jaxpr.invars, arguments, strict=True))
        self.names = names
        self.producers: dict[Any, tuple[int, Any]] = {}
        self.crossings: list[Crossing] = []
        self.sent: dict[Any, Any] = {}
        self.marks: dict[int, Any] = {}

    def renamed(self, atom: Any) -> Any:
        while not is_literal(atom) and atom in self.names:
            atom = self.names[atom]
        return atom

    def visit(self, eqn: Any) -> None:
        inputs = [self.renamed(atom) for atom in eqn.invars]
        if eqn.primitive in EDGES:
            self._cross(eqn, inputs)
            return
        if eqn.primitive is present_p:
            self.names[eqn.outvars[0]] = self.marks[eqn.params["number"]] = inputs[0]
            return
        if any(new is not old for new, old in zip(inputs, eqn.invars, strict=True)):
            eqn = eqn.replace(invars=inputs)
        self.facts.update(dict.fromkeys(eqn.outvars, self._join(inputs)))
        self.producers.update(dict.fromkeys(eqn.outvars, (len(self.producers), eqn)))

    def _join(self, inputs: list[Any]) -> Fact:
        facts = [fact_of(self.facts, atom) for atom in inputs]
        sites = {fact.site for fact in facts}
        if Site.CLIENTS in sites and sites & {Site.SERVER, Site.UNPLACED}:
            raise PlacementError(
                f"`{self.name}`: expected the values of a local computation at one placement, got "
                "some at the server and some at the clients; broadcast the server's first."
            )
        return Fact(
            max(sites, default=Site.CONSTANT),
            max((fact.level for fact in facts), default=0),
            all(fact.is_uniform for fact in facts),
        )

    def _cross(self, eqn: Any, inputs: list[Any]) -> None:
        """A leaf of an edge; of one that has been sent already, only its name."""
        (arrived,) = eqn.outvars
        number = eqn.params["tag"].present
        if eqn.primitive is sum_p and len(inputs) == 1 and number in self.marks:
            inputs.append(self.marks[number])  # a gradient, of which the absent have no part
        if eqn.primitive is broadcast_p and self._join(inputs).site is Site.CONSTANT:
            self.names[arrived] = inputs[0]  # part of the program on both sides
            return
        key = (eqn.primitive, eqn.params.get("is_max"), *map(_identity, inputs))
        if key in self.sent:
            self.names[arrived] = self.sent[key]
            return
        self.sent[key] = arrived
        is_count = eqn.primitive is count_p
        value, *present = (None, *inputs) if is_count else inputs
        crossing = Crossing(
            eqn.primitive, eqn.params, value, present[0] if present else None, arrived
        )
        self.crossings.append(crossing)
        self.facts[arrived] = self._arrival(eqn.primitive, inputs)

    def _arrival(self, primitive: Any, inputs: list[Any]) -> Fact:
        level = self._join(inputs).level
        if primitive is broadcast_p:
            return Fact(Site.CLIENTS, level, True)
        return Fact(Site.SERVER, level + 1, True)


def _identity(atom: Any) -> Any:
    return id(atom) if is_literal(atom) else atom


def _grouped(facts: dict[Any, Fact], crossings: list[Crossing]) -> list[Group]:
    groups: dict[Any, Group] = {}
    for crossing in crossings:
        level = facts[crossing.arrived].level - (crossing.primitive is not broadcast_p)
        tag, is_max = crossing.params["tag"], crossing.params.get("is_max", False)
        is_constant = crossing.value is not None and fact_of(facts, crossing.value) == NOWHERE
        key = (crossing.primitive, level, tag, is_max, _identity(crossing.present), is_constant)
        group = groups.setdefault(key, Group(crossing.primitive, level, tag, is_max, []))
        group.crossings.append(crossing)
    for group in groups.values():
        group.crossings.sort(key=lambda crossing: crossing.params.get("leaf", 0))
    return list(groups.values())
