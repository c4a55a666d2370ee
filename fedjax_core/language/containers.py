"""One level of a pytree: the fields of a container, and the container without them."""

import dataclasses
import itertools
from collections import OrderedDict
from typing import Any

import jax
import numpy as np

from fedjax_core.errors import FederatedTypeError
from fedjax_core.language.base_types import shorten

MAX_DEPTH = 100
"""How deep types, and values of them, may lie inside one another."""


def one_level(tree: Any) -> tuple[list[tuple[str | None, Any]], Any]:
    """The children of a pytree node as `(name or None, child)`, and its one-level `PyTreeDef`.

    A field has a name where JAX knows one: the attribute of a dataclass or NamedTuple, or the key
    of a dict as a string.

    Raises:
      FederatedTypeError: for a leaf, and for a dict whose keys have no order.

    Examples:
      >>> one_level({"a": 1, "b": [2, 3]})[0]
      [('a', 1), ('b', [2, 3])]
    """
    # All but the root, which comes first, are leaves: by identity a container would be no leaf of
    # itself, and what contains itself has no end.
    visits = itertools.count()
    try:
        paths, container = jax.tree_util.tree_flatten_with_path(
            tree, is_leaf=lambda _: next(visits) > 0
        )
    except ValueError as error:
        raise FederatedTypeError(
            f"Expected a pytree, got {shorten(repr(tree))} ({error}); give the keys of a dict one "
            "type."
        ) from error
    if any(not path for path, _ in paths):
        raise FederatedTypeError(
            f"Expected a registered pytree or an array, got {shorten(repr(tree))} of type "
            f"{type(tree).__name__}; {_remedy(tree)}."
        )
    return [(_name_of(path[0]), child) for path, child in paths], container


def check_depth(depth: int, what: str) -> None:
    """Raises where a walk has gone too deep.

    Args:
      depth: how many containers the walk is inside of.
      what: names what is walked, in the message.

    Raises:
      FederatedTypeError: for more than `MAX_DEPTH`. JAX itself has no such limit: what contains
        itself would end it.
    """
    if depth > MAX_DEPTH:
        raise FederatedTypeError(
            f"Expected {what} at most {MAX_DEPTH} deep, got one that is nested too deeply, or "
            "contains itself; take it apart."
        )


def check_nesting(tree: Any, what: str = "a pytree", depth: int = 0) -> None:
    """Raises for a pytree with which JAX should not be trusted, see `check_depth`."""
    check_depth(depth, what)
    visits = itertools.count()
    children, container = jax.tree.flatten(tree, is_leaf=lambda _: next(visits) > 0)
    if not jax.tree_util.treedef_is_leaf(container):
        for child in children:
            if not isinstance(child, int | float | np.ndarray | np.generic):  # most are numbers
                check_nesting(child, what, depth + 1)


def differs_statically(ours: Any, theirs: Any) -> bool:
    """Whether two containers are of one class, but differ in what that holds beside its fields.

    Such are the static fields of a dataclass, of which a program knows those it was traced with.
    """
    mine, others = ours.node_data(), theirs.node_data()
    if mine is None or others is None or mine[0] is not others[0]:
        return False
    return mine[0] not in (list, tuple, dict, OrderedDict) and bool(ours != theirs)


def _name_of(key: Any) -> str | None:
    if isinstance(key, jax.tree_util.GetAttrKey):
        return key.name
    if isinstance(key, jax.tree_util.DictKey):
        return plain_str(key.key) if isinstance(key.key, str) else str(key.key)
    return None


def _remedy(leaf: Any) -> str:
    if isinstance(leaf, str):
        return "for the type that a text stands for, use parse_type"
    if dataclasses.is_dataclass(leaf):
        return "register its class with jax.tree_util.register_dataclass"
    return "convert it to an array, or make its class a pytree"


def plain_str(name: str) -> str:
    """`name` as an instance of `str` itself: subclasses have representations of their own."""
    return str.__str__(name)


def default_container(names: list[str | None]) -> Any:
    """The container of a struct that was given none: an OrderedDict if all have names, or a tuple.

    Args:
      names: of the fields, None for one without.
    """
    if names and None not in names:
        return jax.tree.structure(OrderedDict.fromkeys(names, 0))
    return jax.tree.structure((0,) * len(names))
