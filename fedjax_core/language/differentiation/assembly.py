"""The operations of a program from the flow of a member function: one map for each stage.

    level 0    map at the server, broadcasts, map at the clients, sums
    level 1    map at the server, ...

A map at the clients takes parameters and what broadcasts brought, and computes again what one of an
earlier level had, so that nothing stays at the clients between round trips.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from fedjax_core.errors import PlacementError
from fedjax_core.language.differentiation.bridge import LEAF, broadcast_p, count_p, extreme_p, sum_p
from fedjax_core.language.differentiation.flow import (
    NOWHERE,
    Fact,
    Flow,
    Group,
    Site,
    analyse,
    fact_of_type,
)
from fedjax_core.language.differentiation.pieces import (
    AT_CLIENTS,
    AT_SERVER,
    EVERYWHERE,
    UNPLACED,
    Home,
    Output,
    Piece,
    Signature,
    Source,
    can_take,
    name_of,
)
from fedjax_core.language.differentiation.pruning import is_literal
from fedjax_core.language.local import Local
from fedjax_core.language.placements import CLIENTS, SERVER
from fedjax_core.language.program import (
    Broadcast,
    Count,
    Extreme,
    Get,
    Map,
    Op,
    Parameter,
    Place,
    Sum,
)
from fedjax_core.language.tracing import member_of
from fedjax_core.language.types import FederatedType, SequenceType, TensorType


class Assembly:
    """The operations of a program under construction, from one trace.

    Attributes:
      pieces: the work of the maps, by the position of the operation.
      source_of: for a variable the source that has it.
      wanted: for each level and home what the map there has to give.
      positions: of the outputs that maps have given so far, by key.
    """

    def __init__(
        self,
        signature: Signature,
        closed: jex_core.ClosedJaxpr,
        templates: tuple[Any, ...],
        trees: list[Any],
        make_local: Callable[[int, Piece], Local],
    ) -> None:
        self.signature = signature
        self.closed = closed
        self.make_local = make_local
        self.ops: list[Op] = []
        self.pieces: dict[int, Piece] = {}
        self.sources: list[Source] = []
        self.source_of: dict[Any, Source] = {}
        self.positions: dict[Any, int] = {}
        self.placed: dict[int, int] = {}
        facts = self._declare(templates)
        self.flow: Flow = analyse(closed, facts, signature.name)
        self.wanted: dict[tuple[int, Home], list[Output]] = {}
        self._want_edges()
        self._want_results(trees)

    @property
    def results(self) -> list[int]:
        """The position of each result."""
        return [self.positions["result", k] for k in range(len(self.signature.homes))]

    def stage(self) -> None:
        """Appends all operations, level by level."""
        levels = [group.level + 1 for group in self.flow.groups] + [k for k, _ in self.wanted]
        for level in range(max(levels, default=0) + 1):
            for home in (UNPLACED, AT_SERVER):
                self._map(level, home)
            self._edges(level, is_down=True)
            for home in (EVERYWHERE, AT_CLIENTS):
                self._map(level, home)
            self._edges(level, is_down=False)

    def _declare(self, templates: tuple[Any, ...]) -> list[Fact]:
        """Adds the parameters; what is known of their leaves."""
        facts, invars = [], iter(self.closed.jaxpr.invars)
        for t, template in zip(self.signature.parameters, templates, strict=True):
            tree = jax.tree.structure(template)
            leaves = tuple(next(invars) for _ in range(tree.num_leaves))
            self._add_source(self._add(Parameter(type=t)), leaves, tree, Home.of(t))
            facts += [fact_of_type(t)] * len(leaves)
        return facts

    def _add(self, op: Op) -> int:
        self.ops.append(op)
        return len(self.ops) - 1

    def _add_source(self, position: int, leaves: tuple[Any, ...], tree: Any, home: Home) -> None:
        source = Source(position, leaves, tree, home)
        self.sources.append(source)
        self.source_of.update(dict.fromkeys(leaves, source))

    def _want(self, level: int, home: Home, output: Output) -> None:
        self.wanted.setdefault((level, home), []).append(output)

    def _want_edges(self) -> None:
        for number, group in enumerate(self.flow.groups):
            home = AT_SERVER if group.is_down else AT_CLIENTS
            if group.primitive is not count_p and not self._is_constant(group):
                values = Output(("value", number), group.values, _tree_of(group))
                self._want(group.level, home, values)
            if group.present is not None:
                present = Output(("present", number), (group.present,), LEAF)
                self._want(group.level, home, present)

    def _is_constant(self, group: Group) -> bool:
        """Whether a sum is of the same constant at all clients, which needs no sending.

        Where there are sequences, what looks constant may depend on their capacity.
        """
        has_sequences = any(t.contains(SequenceType) for t in self.signature.parameters)
        return (group.primitive is sum_p and not has_sequences) and all(
            self.flow.fact(value) == NOWHERE and jnp.issubdtype(value.aval.dtype, jnp.floating)
            for value in group.values
        )

    def _want_results(self, trees: list[Any]) -> None:
        atoms = iter(self.flow.results)
        for k, (home, tree) in enumerate(zip(self.signature.homes, trees, strict=True)):
            leaves = tuple(next(atoms) for _ in range(tree.num_leaves))
            self._check_home(home, leaves)
            level = max((self.flow.fact(atom).level for atom in leaves), default=0)
            self._want(level, home, Output(("result", k), leaves, tree))

    def _check_home(self, home: Home, atoms: tuple[Any, ...]) -> None:
        allowed = {SERVER: Site.SERVER, CLIENTS: Site.CLIENTS, None: Site.UNPLACED}[home.placement]
        refused = {Site.SERVER, Site.CLIENTS, Site.UNPLACED} - {allowed}
        if allowed is Site.SERVER:
            refused.discard(Site.UNPLACED)
        if any(self.flow.fact(atom).site in refused for atom in atoms):
            raise PlacementError(
                f"`{self.signature.name}`: expected a result at {home.placement}, and its value is "
                "computed somewhere else; move it with federated_broadcast or an aggregation."
            )

    def _sequences(self, home: Home) -> list[Source]:
        """The parameters with sequences that a map at `home` can have."""
        parameters = self.signature.parameters
        return [
            source
            for source, t in zip(self.sources, parameters, strict=False)
            if t.contains(SequenceType) and can_take(home, source.home)
        ]

    def _slice(self, atoms: list[Any]) -> tuple[list[Any], list[Any]]:
        """The equations that a map needs for `atoms`, and the variables that it has to be given."""
        eqns: dict[int, Any] = {}
        frontier: dict[Any, None] = {}
        pending = list(atoms)
        while pending:
            atom = pending.pop()
            if is_literal(atom) or atom in frontier:
                continue
            if atom in self.flow.edges or atom in self.source_of:
                frontier[atom] = None
            elif atom in self.flow.producers:
                index, eqn = self.flow.producers[atom]
                if index not in eqns:
                    eqns[index] = eqn
                    pending.extend(eqn.invars)
        return [eqns[index] for index in sorted(eqns)], list(frontier)

    def _map(self, level: int, home: Home) -> None:
        """Appends the map of a level at a home, if anything is wanted of it."""
        outputs = []
        for output in self.wanted.get((level, home), []):
            source = self._whole_source(output, home)
            if source is None:
                outputs.append(output)
            else:
                self.positions[output.key] = self._position(source, home)
        if outputs:
            self._append_map(level, home, outputs)

    def _whole_source(self, output: Output, home: Home) -> Source | None:
        """The source that is just this output, which then needs no map."""
        first = output.atoms[0] if output.atoms else None
        source = None if is_literal(first) else self.source_of.get(first)
        if source is None or (source.leaves, source.tree) != (output.atoms, output.tree):
            return None
        is_at_home = source.home == home
        is_result = output.key[0] == "result"  # which promises neither more nor less than its type
        fits = is_at_home if is_result and home != AT_SERVER else can_take(home, source.home)
        return source if fits else None

    def _position(self, source: Source, home: Home) -> int:
        """The position of a source for a map at `home`; what is unplaced is placed there."""
        if source.home.placement is home.placement:
            return source.position
        if source.position not in self.placed:
            t = FederatedType(self.ops[source.position].type, SERVER)
            self.placed[source.position] = self._add(Place(type=t, inputs=(source.position,)))
        return self.placed[source.position]

    def _append_map(self, level: int, home: Home, outputs: list[Output]) -> None:
        atoms = [atom for output in outputs for atom in output.atoms]
        eqns, frontier = self._slice(atoms)
        found = {self.source_of[var].position: self.source_of[var] for var in frontier}
        found.update({source.position: source for source in self._sequences(home)})
        sources = [found[position] for position in sorted(found)]
        inputs = tuple(self._position(source, home) for source in sources)
        piece = self._piece(f"{name_of(home)}_{level}", sources, eqns, outputs)
        position = self._add_map(piece, home, inputs)
        self._store(position, home, outputs)

    def _add_map(self, piece: Piece, home: Home, inputs: tuple[int, ...]) -> int:
        position = len(self.ops)
        local = self.make_local(position, piece)
        self.pieces[position] = piece
        return self._add(Map(type=home.type(local.result), inputs=inputs, local=local))

    def _piece(
        self, name: str, sources: list[Source], eqns: list[Any], outputs: list[Output]
    ) -> Piece:
        invars = [var for source in sources for var in source.leaves]
        outvars = [atom for output in outputs for atom in output.atoms]
        count = len(self.signature.parameters)
        return Piece(
            name,
            self._closed(invars, outvars, eqns),
            tuple(member_of(self.ops[source.position].type) for source in sources),
            tuple(source.position if source.position < count else -1 for source in sources),
            tuple(output.tree for output in outputs),
        )

    def _closed(
        self, invars: list[Any], outvars: list[Any], eqns: list[Any]
    ) -> jex_core.ClosedJaxpr:
        whole = self.closed.jaxpr
        debug_info = whole.debug_info._replace(
            arg_names=("",) * len(invars), result_paths=("",) * len(outvars)
        )
        used = {id(atom) for eqn in eqns for atom in eqn.invars} | set(map(id, outvars))
        consts = {
            var: const
            for var, const in zip(whole.constvars, self.closed.consts, strict=True)
            if id(var) in used
        }
        effects: Any = frozenset().union(*(eqn.effects for eqn in eqns))
        jaxpr = jex_core.Jaxpr(list(consts), invars, outvars, eqns, effects, debug_info)
        return jex_core.ClosedJaxpr(jaxpr, list(consts.values()))

    def _store(self, position: int, home: Home, outputs: list[Output]) -> None:
        """Names the outputs of a map; several are the fields of its result."""
        if len(outputs) == 1:
            self.positions[outputs[0].key] = position
            return
        for number, (output, t) in enumerate(
            zip(outputs, member_of(self.ops[position].type).children(), strict=True)
        ):
            field = Get(type=home.type(t), inputs=(position,), position=number)
            self.positions[output.key] = self._add(field)

    def _edges(self, level: int, is_down: bool) -> None:
        for number, group in enumerate(self.flow.groups):
            if group.level != level or group.is_down != is_down:
                continue
            if self._is_constant(group):
                position = self._constant_sum(number, group)
            else:
                position = self._add(self._edge(number, group))
            home = EVERYWHERE if is_down else AT_SERVER
            self._add_source(position, group.arrived, _tree_of(group), home)

    def _edge(self, number: int, group: Group) -> Op:
        present = () if group.present is None else (self.positions["present", number],)
        if group.primitive is count_p:
            return self._count(group, present)
        tag, source = group.tag, self.positions["value", number]
        member = member_of(self.ops[source].type)
        edge = functools.partial(
            _OPS[group.primitive],
            inputs=(source, *present),
            label=tag.label,
            location=tag.location,
        )
        if group.is_down:
            return edge(type=EVERYWHERE.type(member))
        edge = functools.partial(edge, type=AT_SERVER.type(member), has_presence=bool(present))
        return edge(is_max=group.is_max) if group.primitive is extreme_p else edge()

    def _count(self, group: Group, present: tuple[int, ...]) -> Op:
        t = AT_SERVER.type(TensorType(jnp.int32))
        return Count(type=t, inputs=present, location=group.tag.location)

    def _constant_sum(self, number: int, group: Group) -> int:
        """A constant times the number of clients."""
        present = () if group.present is None else (self.positions["present", number],)
        count = self._add(self._count(group, present))
        atoms = list(group.values)
        eqns, _ = self._slice(atoms)
        constants = jex_core.jaxpr_as_fun(self._closed([], atoms, eqns))

        def scale(count: jax.Array) -> list[jax.Array]:
            return [(x * count.astype(jnp.float32)).astype(x.dtype) for x in constants()]

        integer = jax.ShapeDtypeStruct((), jnp.int32)
        piece = Piece(
            "times_count",
            jax.make_jaxpr(scale)(integer),
            (TensorType(jnp.int32),),
            (-1,),
            (_tree_of(group),),
        )
        return self._add_map(piece, AT_SERVER, (count,))


_OPS: dict[Any, Callable[..., Op]] = {broadcast_p: Broadcast, sum_p: Sum, extreme_p: Extreme}


def _tree_of(group: Group) -> Any:
    """The structure of what travels, if all of it does; else a tuple of the leaves that do."""
    leaves = [crossing.params.get("leaf", 0) for crossing in group.crossings]
    if leaves == list(range(group.tag.tree.num_leaves)):
        return group.tag.tree
    return LEAF if len(leaves) == 1 else jax.tree.structure(tuple(leaves))
