"""Saving and loading states: any pytree of arrays, without pickle.

A file is the leaves by their paths in flax's msgpack, sealed (see `fedjax_core.files`). Reading one
runs no code from it. The structure is not in the file: `load` is given a tree of the same
structure, and every leaf is checked against it by path, shape and dtype.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.errors import ArgumentError, FederatedTypeError
from fedjax_core.execution.loading import load_computation
from fedjax_core.files import (
    CHECKPOINT,
    COMPUTATION,
    kind_of,
    read_sealed,
    unreadable,
    write_sealed,
)

_NOT_GIVEN: Any = object()

# What the file says of a leaf: its dtype (for a key, the generator) and its shape.
_Description = tuple[str, tuple[int, ...]]


def save(path: str | pathlib.Path, tree: Any) -> None:
    """Writes a pytree to one file, which appears complete or not at all.

    Args:
      path: the file; an existing one is replaced.
      tree: a pytree of arrays, JAX keys and Python numbers, such as a state or its params.

    Raises:
      FederatedTypeError: a leaf is none of these.
      StorageError: the file cannot be written.

    Example:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "params"
      >>> save(path, {"w": jnp.arange(3.0), "round": 7})
      >>> load(path, {"w": jnp.zeros(3), "round": 0})
      {'round': 7, 'w': Array([0., 1., 2.], dtype=float32)}
    """
    from flax import serialization

    leaves = {
        at: {"data": _to_host(at, leaf), "type": _describe(leaf)[0]}
        for at, leaf in _named_leaves(tree)
    }
    body = serialization.msgpack_serialize(leaves)
    write_sealed(pathlib.Path(path), CHECKPOINT, body)


def load(path: str | pathlib.Path, like: Any = _NOT_GIVEN) -> Any:
    """Reads a pytree that `save` wrote, or a computation that `export` wrote.

    Args:
      path: the file.
      like: for a pytree, a tree of the same structure, whose leaves give the expected shapes and
        dtypes: arrays, ``jax.ShapeDtypeStruct`` (``jax.eval_shape(algorithm.init, key)`` is such a
        tree), JAX keys, Python numbers. For a computation it is left out.

    Returns:
      The tree; a leaf is a NumPy array or a Python number where `like` has one, else a JAX array.
      Or the computation, as a `LoadedComputation`.

    Raises:
      StorageError: there is no such file, or it is of another kind, cut short or altered.
      ArgumentError: `like` is missing for a pytree, or given for a computation.
      FederatedTypeError: the tree in the file has another structure, shape or dtype than `like`;
        the message names the leaf.
    """
    path = pathlib.Path(path)
    kind = kind_of(path, CHECKPOINT, COMPUTATION)
    if kind is COMPUTATION:
        _check_no_like(path, like)
        return load_computation(path)
    if like is _NOT_GIVEN:
        raise ArgumentError(
            f"expected an exported computation for load(path), got the pytree that `save` wrote to "
            f"{path}; pass a tree of the same structure, load(path, like)."
        )
    found = _read(path)
    leaves = _named_leaves(like)
    wanted = {at: _describe(leaf) for at, leaf in leaves}
    _check_leaves(path, wanted, {at: (x["type"], x["data"].shape) for at, x in found.items()})
    restored = [_as_in(leaf, found[at]["data"]) for at, leaf in leaves]
    return jax.tree.unflatten(jax.tree.structure(like), restored)


def _check_no_like(path: pathlib.Path, like: Any) -> None:
    if like is not _NOT_GIVEN:
        raise ArgumentError(
            f"expected a pytree that `save` wrote for load(path, like), got {path}, an exported "
            "computation; leave `like` out."
        )


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(at) or "the root", leaf) for at, leaf in leaves]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", np.dtype(bool)), jax.dtypes.prng_key)


def _key_implementation(leaf: Any) -> str:
    """The generator of a key, also of one that is only a shape and a dtype."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return str(found[0])


def _stored_as(leaf: Any) -> jax.ShapeDtypeStruct | np.ndarray:
    """What has the shape and dtype of a leaf's bytes in the file."""
    if _is_key(leaf):
        return jax.eval_shape(jax.random.key_data, leaf)
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else np.asarray(leaf)


def _describe(leaf: Any) -> _Description:
    """What is expected of the bytes of a leaf."""
    stored = _stored_as(leaf)
    dtype = f"key {_key_implementation(leaf)}" if _is_key(leaf) else stored.dtype.name
    return dtype, tuple(stored.shape)


def _to_host(at: str, leaf: Any) -> np.ndarray:
    array = np.asarray(jax.device_get(jax.random.key_data(leaf) if _is_key(leaf) else leaf))
    if array.dtype.kind in "OSUMm":
        raise FederatedTypeError(
            f"expected arrays, JAX keys and numbers, got {type(leaf).__name__} at {at}; "
            "leave it out of the tree that is saved."
        )
    # bfloat16 and its kin are of the same kind, but of types of their own.
    if array.dtype.type is np.void:
        raise FederatedTypeError(
            f"expected arrays of numbers, got dtype {array.dtype} at {at}; save each of its fields "
            "as an array of its own."
        )
    # The file names a dtype without its byte order.
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _as_in(like: Any, array: np.ndarray) -> Any:
    """`array` as the kind of leaf that `like` is."""
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=_key_implementation(like))
    if isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return jnp.asarray(array)
    return array if isinstance(like, np.ndarray) else type(like)(array.item())


def _read(path: pathlib.Path) -> dict[str, Any]:
    """The leaves of a file by their paths, once the checksum fits."""
    from flax import serialization

    body = read_sealed(path, CHECKPOINT)
    try:
        leaves = serialization.msgpack_restore(body)
    # A checksum is no proof of who wrote the file, and the reader raises errors of many kinds.
    except Exception as error:
        raise unreadable(path, CHECKPOINT) from error
    if not isinstance(leaves, dict) or not all(map(_is_stored_leaf, leaves.values())):
        raise unreadable(path, CHECKPOINT)
    return leaves


def _is_stored_leaf(value: Any) -> bool:
    """Whether this is what `save` makes of a leaf, its data of the dtype that its type says."""
    if not isinstance(value, dict) or value.keys() != {"type", "data"}:
        return False
    kind, data = value["type"], value["data"]
    if not isinstance(kind, str) or not isinstance(data, np.ndarray):
        return False
    return data.dtype.name == ("uint32" if kind.startswith("key ") else kind)


def _check_leaves(
    path: pathlib.Path, wanted: dict[str, _Description], found: dict[str, _Description]
) -> None:
    for at, description in wanted.items():
        if found.get(at) != description:
            got = _type_of(found[at]) if at in found else "no such leaf"
            raise FederatedTypeError(
                f"expected {_type_of(description)} at {at}, got {got} in {path}; "
                "`like` has to come from the same model and algorithm."
            )
    surplus = found.keys() - wanted.keys()
    if surplus:
        raise FederatedTypeError(
            f"expected {len(wanted)} leaves, got {len(found)} in {path}, among them "
            f"{min(surplus)}; `like` has to come from the same model and algorithm."
        )


def _type_of(description: _Description) -> str:
    return f"{description[0]}{list(description[1])}"
