"""One program for all tensors of one shape, which is compiled once.

A network of repeated or recurrent layers has many matrices of few shapes. What is traced for each
of them in turn takes minutes to compile.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def map_alike(function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
    """What a function makes of each item, at once of all that are alike.

    Args:
      function: of one item of each argument, arrays or pytrees of them.
      *arguments: sequences of one length.

    Returns:
      The results in the order of the items. Items of the same structure, shapes and dtypes are
      stacked and mapped with `jax.vmap`.

    Example:
      >>> items = [jnp.ones(2), jnp.zeros(3), jnp.full(2, 4.0)]
      >>> [int(x) for x in map_alike(jnp.sum, items)]
      [2, 0, 8]
    """
    items = list(zip(*arguments, strict=True))
    groups: dict[Any, list[int]] = {}
    for index, item in enumerate(items):
        leaves, structure = jax.tree.flatten(item)
        shapes = tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
        groups.setdefault((structure, shapes), []).append(index)
    results: list[Any] = [None] * len(items)
    for indices in groups.values():
        if len(indices) == 1:
            results[indices[0]] = function(*items[indices[0]])
            continue
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *(items[index] for index in indices))
        found = jax.vmap(function)(*stacked)
        for position, index in enumerate(indices):
            results[index] = jax.tree.map(lambda x, at=position: x[at], found)
    return results
