"""Artifacts: a function of plain arrays, compiled for several platforms, and what to know of it.

The calling convention has no pytrees and no keys. Arguments are the leaves of the parameters in
order; of a sequence the arrays of its elements, then `start` and `length`; of a key its data. For a
federated computation `valid`, bool `[clients]`, follows. Results are the leaves of the result in
the same way, strings left out; then for each edge the two words of its bits; then for each secure
sum that is checked how many numbers were below and above its bounds.

An artifact is a sealed file (see `fedjax_core.files`): the manifest, one line of JSON, and then
what `jax.export` made, which holds StableHLO.
"""

import functools
import hashlib
import importlib
import json
import pathlib
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from fedjax_core.errors import (
    ArgumentError,
    FederatedTypeError,
    FedjaxError,
    NotExportableError,
)
from fedjax_core.execution.calling import Interface, is_stacked
from fedjax_core.files import COMPUTATION, read_sealed, unreadable, write_sealed
from fedjax_core.language import inference
from fedjax_core.language.base_types import shorten
from fedjax_core.language.notation import parse_type
from fedjax_core.language.types import (
    FederatedType,
    SequenceType,
    StructType,
    TensorType,
    Type,
    is_extended_dtype,
    is_str,
)
from fedjax_core.language.values import Federated, Sequence

PLATFORMS = ("cpu", "cuda", "tpu")
_KNOWN_PLATFORMS = (*PLATFORMS, "rocm")


class Dimensions(NamedTuple):
    """The sizes that an artifact leaves open, as JAX's symbols, or fixed ones.

    Attributes:
      cohort: of the clients axis.
      capacity: of the sequences among the arguments.
    """

    cohort: Any
    capacity: Any


@functools.cache
def symbols() -> Dimensions:
    """The two symbols. They are made once, because symbols of two scopes cannot be compared."""
    return Dimensions(*jax.export.symbolic_shape("c, cap"))


def spec_of(t: Type, sizes: Dimensions) -> Any:
    """The pytree of `jax.ShapeDtypeStruct` of an argument of type `t`."""
    member = t.member if isinstance(t, FederatedType) else t
    spec = inference.template(member, sizes.capacity)
    if not is_stacked(t):
        return spec
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((sizes.cohort, *x.shape), x.dtype),
        spec,
    )


def as_plain(x: Any) -> Any:
    """A leaf as an array without JAX's own dtypes."""
    x = jnp.asarray(x)
    return jax.random.key_data(x) if is_extended_dtype(x.dtype) else x


def as_leaf(x: Any, dtype: Any) -> Any:
    """The inverse of `as_plain`."""
    return jax.random.wrap_key_data(x, impl=_generator(dtype)) if is_extended_dtype(dtype) else x


def _generator(dtype: Any) -> str:
    """The name of the generator of keys of a dtype."""
    found = []
    key = jax.ShapeDtypeStruct((), dtype)
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), key)
    return str(found[0])


def plain_spec(spec: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of `as_plain` of a leaf."""
    if not is_extended_dtype(spec.dtype):
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype)
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), spec.dtype))
    return jax.ShapeDtypeStruct((*spec.shape, *data.shape), data.dtype)


class Flat(NamedTuple):
    """A function of plain arrays.

    Attributes:
      call: `(*arrays) -> arrays`.
      specs: the shapes and dtypes of its arguments.
      names: of its arguments.
      results: the names of its results, once it was traced.
      strings: those among the results, likewise.
    """

    call: Callable[..., Any]
    specs: list[Any]
    names: list[str]
    results: list[str]
    strings: list[str]


def flatten(function: Callable[..., Any], specs: dict[str, Any]) -> Flat:
    """A function of plain arrays out of one of pytrees.

    Args:
      function: `(*values) -> pytree`, of one value for each of `specs`.
      specs: the values' shapes and dtypes, by name.
    """
    named, tree = jax.tree_util.tree_flatten_with_path(list(specs.values()))
    leaves = [leaf for _, leaf in named]
    names, titles = list(specs), [jax.tree_util.keystr(path[1:]) for path, _ in named]
    titles = [names[path[0].idx] + title for (path, _), title in zip(named, titles, strict=True)]
    results: list[str] = []
    strings: list[str] = []

    def call(*arrays: Any) -> list[Any]:
        given = [as_leaf(x, leaf.dtype) for x, leaf in zip(arrays, leaves, strict=True)]
        found = jax.tree_util.tree_leaves_with_path(function(*jax.tree.unflatten(tree, given)))
        strings[:] = [x for _, x in found if isinstance(x, str)]
        arrays_found = [(path, x) for path, x in found if not isinstance(x, str)]
        results[:] = [jax.tree_util.keystr(path).lstrip(".") for path, _ in arrays_found]
        return [as_plain(x) for _, x in arrays_found]

    return Flat(call, [plain_spec(leaf) for leaf in leaves], titles, results, strings)


def build(t: Type, arrays: Iterator[Any], strings: Iterator[str], num_axes: int = 0) -> Any:
    """A value of type `t` from plain arrays.

    Args:
      t: any type of a result.
      arrays: as many as needed are taken from it.
      strings: likewise.
      num_axes: how many axes come before those of one member.
    """
    match t:
        case FederatedType(member, placement, all_equal):
            value = build(member, arrays, strings, int(is_stacked(t)))
            return Federated(value, placement, all_equal)
        case StructType():
            children = [build(child, arrays, strings, num_axes) for child in t.children()]
            return jax.tree.unflatten(t.container, children)
        case SequenceType(element):
            elements = build(element, arrays, strings, num_axes)
            sizes = [x.shape[num_axes] for x in jax.tree.leaves(elements)]
            return Sequence(elements, next(arrays), next(arrays), sizes[0] if sizes else 1)
        case TensorType(dtype):
            return next(strings) if is_str(dtype) else as_leaf(next(arrays), dtype)
    raise ArgumentError(f"Expected the type of a value, got {t}.")


def num_arrays(t: Type) -> int:
    """How many plain arrays a value of type `t` has."""
    if isinstance(t, TensorType):
        return 0 if is_str(t.dtype) else 1
    own = 2 if isinstance(t, SequenceType) else 0  # start and length
    return own + sum(map(num_arrays, t.children()))


def compile_for(name: str, flat: Flat, platforms: tuple[str, ...]) -> jax.export.Exported:
    """What `jax.export` makes of a function.

    Raises:
      ArgumentError: for unknown platforms, or where JAX cannot export the function.
    """
    is_tuple = isinstance(platforms, tuple | list) and len(platforms) > 0
    if not is_tuple or any(platform not in _KNOWN_PLATFORMS for platform in platforms):
        raise ArgumentError(
            f"Expected a tuple of platforms out of {_KNOWN_PLATFORMS}, got {platforms!r}."
        )
    flat.call.__name__ = name
    try:
        return jax.export.export(jax.jit(flat.call), platforms=tuple(platforms))(*flat.specs)
    except FedjaxError:
        raise
    # JAX raises errors of many kinds here, some of them private.
    except Exception as error:
        raise NotExportableError(
            f"`{name}`: expected a computation that JAX exports for {list(platforms)}, got "
            f"{reason_of(error)}"
        ) from error


def check_notation(interface: Interface) -> None:
    """Raises `NotExportableError` for a type that is not read from a file as it was written."""
    for t in (*interface.parameters, interface.result, interface.type_signature):
        try:
            parse_type(str(t)).check_equivalent_to(t, "what is read")
        except (FederatedTypeError, RecursionError) as error:
            raise NotExportableError(
                f"`{interface.name}`: expected types that can be read from a file, got "
                f"{shorten(reason_of(error))}; use dtypes of JAX, and flatter containers."
            ) from error


def reason_of(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def write(
    path: pathlib.Path,
    interface: Interface,
    flat: Flat,
    exported: jax.export.Exported,
    more: dict[str, Any],
) -> None:
    """Writes an artifact and its manifest to one file.

    Args:
      path: the file; an existing one is replaced.
      interface: how it is called.
      flat: what `exported` was made of.
      exported: the artifact.
      more: further entries of the manifest.
    """
    artifact = _serialized(interface.name, exported)
    manifest = _manifest(interface, flat, exported) | more
    manifest["artifact_sha256"] = hashlib.sha256(artifact).hexdigest()
    line = json.dumps(manifest, ensure_ascii=True, allow_nan=False).encode()
    write_sealed(path, COMPUTATION, line + b"\n" + artifact)


def _serialized(name: str, exported: jax.export.Exported) -> bytes:
    try:
        return bytes(exported.serialize())
    # JAX has no room in its files for some of its own dtypes, and says so with a KeyError.
    except Exception as error:
        raise NotExportableError(
            f"`{name}`: expected arrays that JAX writes to files, got {reason_of(error)}; use "
            "another dtype, such as int8."
        ) from error


def _manifest(interface: Interface, flat: Flat, exported: jax.export.Exported) -> dict[str, Any]:
    return {
        "name": interface.name,
        "type": str(interface.type_signature),
        "parameter_names": list(interface.parameter_names),
        "parameters": [str(t) for t in interface.parameters],
        "result": str(interface.result),
        "has_clients": interface.has_clients,
        "arguments": describe(flat.names, exported.in_avals),
        "results": describe(flat.results, exported.out_avals),
        "strings": list(flat.strings),
        "platforms": list(exported.platforms),
        "enable_x64": has_64_bits(),
        "versions": {
            # By name, because this layer does not depend on what the package puts on top of it.
            "fedjax_core": importlib.import_module("fedjax_core").__version__,
            "jax": jax.__version__,
            "jaxlib": metadata.version("jaxlib"),
            "calling_convention": exported.calling_convention_version,
        },
    }


def has_64_bits() -> bool:
    """Whether `jax_enable_x64` is set."""
    return inference.runtime_dtype(np.dtype(np.float64)) == np.float64


def describe(names: list[str], avals: Any) -> list[dict[str, Any]]:
    """For each array its name, dtype and shape, an open size as the text of JAX's symbol."""
    return [
        {
            "name": name,
            "dtype": str(x.dtype),
            "shape": [n if isinstance(n, int) else str(n) for n in x.shape],
        }
        for name, x in zip(names, avals, strict=True)
    ]


def read(path: pathlib.Path) -> tuple[dict[str, Any], bytes]:
    """The manifest and the artifact of a file.

    Raises:
      StorageError: there is no such file, or it is something else, cut short or altered.
    """
    line, _, artifact = read_sealed(path, COMPUTATION).partition(b"\n")
    try:
        manifest = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise unreadable(path, COMPUTATION) from error
    if not isinstance(manifest, dict):
        raise unreadable(path, COMPUTATION)
    if manifest.get("artifact_sha256") != hashlib.sha256(artifact).hexdigest():
        raise unreadable(path, COMPUTATION)
    return manifest, artifact
