"""The contract of an aggregator, held to wherever it is used.

init:      (template) -> (server, memory)
aggregate: (keys, server, memory, value, weight) -> (server, memory, value, measurements)
"""

from collections.abc import Mapping
from typing import Any

import jax

from fedjax_core.aggregators.base import Aggregator, Measurements
from fedjax_core.compression.edges import PlacedKeys
from fedjax_core.errors import FederatedTypeError, PlacementError, noted
from fedjax_core.language.checks import check_takes
from fedjax_core.language.placements import CLIENTS, SERVER, Placement
from fedjax_core.language.tracing import Value
from fedjax_core.language.types import FederatedType, StructType, Type

_INIT = "the aggregator's `init`"
_AGGREGATE = "the aggregator's `aggregate`"


def checked(aggregator: Aggregator) -> Aggregator:
    """The same aggregator, whose functions raise where they break their contract.

    Args:
      aggregator: to be used.

    Raises:
      FederatedTypeError: if it is none, or if its functions take other arguments, return another
        number of results, or a state or memory of another type than they were given.
      PlacementError: from `aggregate`, if a result lives elsewhere.

    Examples:
      >>> from fedjax_core.aggregators.sums import mean
      >>> checked(mean()).is_weighted
      True
    """
    if not isinstance(aggregator, Aggregator):
        raise FederatedTypeError(
            f"Expected an aggregator, got {aggregator!r}; pass one such as aggregators.mean()."
        )
    check_takes(aggregator.init, 1, _INIT)
    check_takes(aggregator.aggregate, 5, _AGGREGATE)

    def init(template: Any) -> tuple[Any, Any]:
        server, memory = _results(aggregator.init(template), _INIT, ("server", "memory"))
        return server, memory

    def aggregate(
        keys: PlacedKeys, server: Value, memory: Value, value: Value, weight: Value
    ) -> tuple[Value, Value, Value, Measurements]:
        with noted(f"In {_AGGREGATE}."):
            results = aggregator.aggregate(keys, server, memory, value, weight)
        names = ("server", "memory", "value", "measurements")
        new_server, new_memory, total, measurements = _results(results, _AGGREGATE, names)
        _check_kept("server", server, new_server, SERVER)
        _check_kept("memory", memory, new_memory, CLIENTS)
        _placed_types("value", total, SERVER)
        _check_measurements(measurements)
        return new_server, new_memory, total, measurements

    return aggregator._replace(init=init, aggregate=aggregate)


def _results(results: Any, what: str, names: tuple[str, ...]) -> tuple[Any, ...]:
    if isinstance(results, tuple) and len(results) == len(names):
        return results
    got = f"{len(results)} results" if isinstance(results, tuple) else f"{results!r}"
    raise FederatedTypeError(
        f"Expected {what} to return ({', '.join(names)}), got {got}; return all of them, () for "
        "one that there is not."
    )


def _check_kept(name: str, old: Any, new: Any, placement: Placement) -> None:
    """Raises unless the next round can be given what this one returned."""
    expected, got = (_placed_types(name, tree, placement) for tree in (old, new))
    if len(expected) != len(got) or not all(
        wanted.is_assignable_from(given) for wanted, given in zip(expected, got, strict=True)
    ):
        wanted, given = (f"<{','.join(map(str, found))}>" for found in (expected, got))
        raise FederatedTypeError(
            f"Expected {_AGGREGATE} to return {name} with the types that it was given, {wanted}, "
            f"got {given}; keep what `init` returns in structure, dtype and shape."
        )


def _placed_types(name: str, tree: Any, placement: Placement) -> list[Type]:
    """The types of the leaves of a result, all of which have to be at `placement`."""
    found: list[Type] = []
    for leaf in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Value)):
        t = leaf.type_signature if isinstance(leaf, Value) else None
        if not isinstance(t, FederatedType) or t.placement is not placement:
            raise PlacementError(
                f"Expected {_AGGREGATE} to return {name} at {placement}, got {leaf!r}; aggregate, "
                "broadcast or place it."
            )
        found.extend(_leaf_types(t.member))
    return found


def _leaf_types(t: Type) -> list[Type]:
    if not isinstance(t, StructType):
        return [t]
    return [leaf for child in t.children() for leaf in _leaf_types(child)]


def _check_measurements(measurements: Any) -> None:
    if not isinstance(measurements, Mapping):
        raise FederatedTypeError(
            f"Expected {_AGGREGATE} to return measurements in a dict, got {measurements!r}; return "
            "{} for none."
        )
    _placed_types("measurements", measurements, SERVER)
