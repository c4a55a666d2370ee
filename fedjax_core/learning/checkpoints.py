"""Saving and loading states: any pytree of arrays, without pickle.

A file is one line of JSON, the header, and then the bytes of the leaves, one after the other:

    {"format": "fedjax-core", "version": 1, "sha256": ...,
     "leaves": [{"path": ".params['w']", "dtype": "float32", "shape": [3]}, ...]}

Reading one runs no code from it. The structure is not in the file: `load` is given a tree of the
same structure, and every leaf is checked against it by path, shape and dtype.
"""

import hashlib
import json
import math
import pathlib
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.errors import FederatedTypeError, StorageError
from fedjax_core.learning.files import write_atomically

_FORMAT = "fedjax-core"
_VERSION = 1
_MAX_HEADER = 1 << 26


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
    leaves = _named_leaves(tree)
    body = b"".join(_to_host(at, leaf).tobytes() for at, leaf in leaves)
    descriptions = [_describe(at, leaf) for at, leaf in leaves]
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "sha256": _digest(descriptions, body),
        "leaves": descriptions,
    }
    write_atomically(pathlib.Path(path), json.dumps(header).encode() + b"\n" + body)


def load(path: str | pathlib.Path, like: Any) -> Any:
    """Reads a pytree that `save` wrote.

    Args:
      path: the file.
      like: a tree of the same structure, whose leaves give the expected shapes and dtypes: arrays,
        ``jax.ShapeDtypeStruct`` (``jax.eval_shape(algorithm.init, key)`` is such a tree), JAX keys,
        Python numbers.

    Returns:
      The tree; a leaf is a NumPy array or a Python number where `like` has one, else a JAX array.

    Raises:
      StorageError: there is no such file, or it is no checkpoint, cut short or altered.
      FederatedTypeError: the tree in the file has another structure, shape or dtype than `like`;
        the message names the leaf.
    """
    path = pathlib.Path(path)
    descriptions, body = _read(path)
    leaves = _named_leaves(like)
    _check_leaves(path, [_describe(at, leaf) for at, leaf in leaves], descriptions)
    layout = [_stored_as(leaf) for _, leaf in leaves]
    expected = sum(math.prod(stored.shape) * stored.dtype.itemsize for stored in layout)
    if len(body) != expected:
        raise StorageError(
            f"expected {expected} bytes of leaves in {path}, got {len(body)}; use another copy."
        )
    restored, offset = [], 0
    for (_, leaf), stored in zip(leaves, layout, strict=True):
        count = math.prod(stored.shape)
        array = np.frombuffer(body, stored.dtype, count, offset).reshape(stored.shape)
        restored.append(_as_in(leaf, array.copy()))
        offset += array.nbytes
    return jax.tree.unflatten(jax.tree.structure(like), restored)


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


def _describe(at: str, leaf: Any) -> dict[str, Any]:
    """A leaf as the header has it: where it is, and what its bytes mean."""
    stored = _stored_as(leaf)
    dtype = f"key {_key_implementation(leaf)}" if _is_key(leaf) else stored.dtype.name
    return {"path": at, "dtype": dtype, "shape": list(stored.shape)}


def _to_host(at: str, leaf: Any) -> np.ndarray:
    array = np.asarray(jax.device_get(jax.random.key_data(leaf) if _is_key(leaf) else leaf))
    if array.dtype.kind in "OSUMm":
        raise FederatedTypeError(
            f"expected arrays, JAX keys and numbers, got {type(leaf).__name__} at {at}; "
            "leave it out of the tree that is saved."
        )
    return array


def _as_in(like: Any, array: np.ndarray) -> Any:
    """`array` as the kind of leaf that `like` is."""
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=_key_implementation(like))
    if isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return jnp.asarray(array)
    return array if isinstance(like, np.ndarray) else type(like)(array.item())


def _digest(descriptions: list[dict[str, Any]], body: bytes) -> str:
    digest = hashlib.sha256(json.dumps(descriptions).encode())
    digest.update(body)
    return digest.hexdigest()


def _read(path: pathlib.Path) -> tuple[list[dict[str, Any]], bytes]:
    """The descriptions of the leaves and their bytes, once the checksum fits."""
    try:
        with path.open("rb") as file:
            line, body = file.readline(_MAX_HEADER), file.read()
    except OSError as error:
        raise StorageError(
            f"expected a file that `save` wrote, got {path} ({error.strerror}); check the path."
        ) from error
    header = _parse_header(path, line)
    if _digest(header["leaves"], body) != header["sha256"]:
        raise StorageError(
            f"expected the bytes that `save` wrote, got {path} with another checksum: it was "
            "cut short or altered; use another copy or save it again."
        )
    return header["leaves"], body


def _parse_header(path: pathlib.Path, line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        header = None
    if not _is_header(header):
        raise StorageError(
            f"expected a file that `save` wrote, got {path}, which is not; check the path."
        )
    if header["version"] != _VERSION:
        raise StorageError(
            f"expected a checkpoint of version {_VERSION}, got version {header['version']!r} in "
            f"{path}; read it with the version of the library that wrote it."
        )
    return header


def _is_header(header: Any) -> TypeGuard[dict[str, Any]]:
    return (
        isinstance(header, dict)
        and header.get("format") == _FORMAT
        and {"version", "sha256"} <= header.keys()
        and isinstance(header.get("leaves"), list)
        and all(_is_description(leaf) for leaf in header["leaves"])
    )


def _is_description(leaf: Any) -> bool:
    return isinstance(leaf, dict) and leaf.keys() == {"path", "dtype", "shape"}


def _check_leaves(
    path: pathlib.Path, wanted: list[dict[str, Any]], found: list[dict[str, Any]]
) -> None:
    held = {description["path"]: description for description in found}
    for description in wanted:
        at = description["path"]
        if held.pop(at, None) != description:
            got = next((_type_of(other) for other in found if other["path"] == at), "no such leaf")
            raise FederatedTypeError(
                f"expected {_type_of(description)} at {at}, got {got} in {path}; "
                "`like` has to come from the same model and algorithm."
            )
    if held:
        raise FederatedTypeError(
            f"expected {len(wanted)} leaves, got {len(found)} in {path}, among them "
            f"{next(iter(held))}; `like` has to come from the same model and algorithm."
        )


def _type_of(description: dict[str, Any]) -> str:
    return f"{description['dtype']}{description['shape']}"
