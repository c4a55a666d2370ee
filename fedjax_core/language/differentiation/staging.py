"""From a member function back to a program, whatever the capacity of its sequences.

No type of a program depends on the capacity of a sequence, but what is kept between the forward and
the backward pass of a gradient does. So the maps of the program are traced again, through the whole
transformation, for each capacity that they meet.
"""

import threading
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jex_core

from fedjax_core.errors import FederatedTypeError
from fedjax_core.language import inference
from fedjax_core.language.differentiation.assembly import Assembly
from fedjax_core.language.differentiation.pieces import Piece, Signature
from fedjax_core.language.local import NOMINAL_CAPACITY, Local, trace_local
from fedjax_core.language.program import Map, Op, Program
from fedjax_core.language.tracing import member_of
from fedjax_core.language.types import FunctionType, StructType, Type, one_level


def rebuild(function: Callable[..., list[Any]], signature: Signature) -> Program:
    """The program of a member function whose edges are those of `bridge`.

    Args:
      function: takes a pytree for each parameter; returns a list with one for each of the
        signature's homes.
      signature: of the program.

    Raises:
      PlacementError: where values of both placements meet without an edge.
    """
    staged = _Staged(function, signature)
    ops, positions = staged.build()
    result_tree = jax.tree.map(lambda k: positions[k], signature.result_tree)
    result = _struct_of(jax.tree.map(lambda i: ops[i].type, result_tree))
    return Program(
        name=signature.name,
        ops=ops,
        parameter_tree=signature.parameter_tree,
        result_tree=result_tree,
        type_signature=FunctionType(signature.packed, result),
        parameter_names=signature.parameter_names,
    )


def _struct_of(tree: Any) -> Type:
    if isinstance(tree, Type):
        return tree
    fields, container = one_level(tree)
    return StructType([(name, _struct_of(child)) for name, child in fields], container)


class _Staged:
    """A member function, traced once for each set of shapes that its arguments have.

    Attributes:
      ops: the program's operations.
      runs: for each other set of shapes the pieces of the maps, by their positions.
    """

    def __init__(self, function: Callable[..., list[Any]], signature: Signature) -> None:
        self.function = function
        self.signature = signature
        self.nominal = tuple(
            inference.template(member_of(t), NOMINAL_CAPACITY) for t in signature.parameters
        )
        self.ops: tuple[Op, ...] = ()
        self.runs: dict[Any, dict[int, Piece]] = {}
        self.lock = threading.Lock()

    def build(self) -> tuple[tuple[Op, ...], list[int]]:
        """The operations, and the position of each result."""
        assembly = self._run(self.nominal, self._trace)
        self.ops = tuple(assembly.ops)
        return self.ops, assembly.results

    def _run(self, templates: tuple[Any, ...], make_local: Callable[..., Local]) -> Assembly:
        closed, shapes = jax.make_jaxpr(self.function, return_shape=True)(*templates)
        trees = [jax.tree.structure(shape) for shape in shapes]
        assembly = Assembly(self.signature, closed, templates, trees, make_local)
        assembly.stage()
        return assembly

    def _trace(self, position: int, piece: Piece) -> Local:
        """The local computation of a map, as it is defined."""

        def function(*args: Any) -> Any:
            return piece.call(self._jaxpr_for(position, piece, args), args)

        function.__name__ = piece.name
        return trace_local(function, piece.types, self.signature.name)

    def _traced(self, position: int, _: Piece) -> Local:
        op = self.ops[position] if position < len(self.ops) else None
        if not isinstance(op, Map):
            raise self._differs()
        return op.local

    def _jaxpr_for(
        self, position: int, piece: Piece, args: tuple[Any, ...]
    ) -> jex_core.ClosedJaxpr:
        """The jaxpr of a map for arguments of these shapes."""
        known = dict(zip(piece.parameters, map(_templates, args), strict=True))
        templates = tuple(known.get(index, nominal) for index, nominal in enumerate(self.nominal))
        key = _shapes(templates)
        if key == _shapes(self.nominal):
            return piece.jaxpr
        with self.lock:
            if key not in self.runs:
                self.runs[key] = self._run_again(templates)
            return self.runs[key][position].jaxpr

    def _run_again(self, templates: tuple[Any, ...]) -> dict[int, Piece]:
        assembly = self._run(templates, self._traced)
        ours = [(op.describe(), op.type) for op in self.ops]
        if ours != [(op.describe(), op.type) for op in assembly.ops]:
            raise self._differs()
        return assembly.pieces

    def _differs(self) -> FederatedTypeError:
        return FederatedTypeError(
            f"`{self.signature.name}`: expected the same edges whatever the capacity of its "
            "sequences; make no decision in a local computation that depends on the capacity."
        )


def _templates(value: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), value)


def _shapes(values: Any) -> Any:
    leaves, tree = jax.tree.flatten(values)
    return tree, tuple((tuple(x.shape), x.dtype) for x in leaves)
