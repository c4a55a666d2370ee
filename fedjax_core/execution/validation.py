"""Whether a manifest is one that `export` wrote: its checksum is no proof of who wrote a file."""

from typing import Any

import jax
import jax.export

from fedjax_core.errors import ArgumentError
from fedjax_core.execution import manifest as artifacts
from fedjax_core.execution.calling import Interface
from fedjax_core.execution.manifest import Dimensions
from fedjax_core.language.types import FederatedType, TensorType, Type, is_str

# A list holds entries that are all of one kind.
_ENTRIES: dict[str, Any] = {
    "name": str,
    "type": str,
    "parameter_names": [str],
    "parameters": [str],
    "result": str,
    "has_clients": bool,
    "arguments": [dict],
    "results": [dict],
    "strings": [str],
    "platforms": [str],
    "enable_x64": bool,
    "versions": dict,
    "kind": str,
    "lanes": int,
    "edges": [dict],
    "secure_sums": [dict],
}
_EDGE: dict[str, Any] = {
    "direction": str,
    "operator": str,
    "name": str,
    "type": str,
    "visibility": str,
    "round_trip": int,
}
_SECURE_SUM: dict[str, Any] = {"name": str, "lower": [(int, float)], "upper": [(int, float)]}


def check_entries(manifest: dict[str, Any]) -> None:
    """Raises `ArgumentError` for an entry that is missing, or of another kind than it should be."""
    _check_kinds(manifest, _ENTRIES)
    _check_kinds(manifest["versions"], {"jax": str})
    for edge in manifest["edges"]:
        _check_kinds(edge, _EDGE)
    for known in manifest["secure_sums"]:
        _check_kinds(known, _SECURE_SUM)
        _check_equal("location", str(known.get("location")), known.get("location") or "None")
    if manifest["kind"] not in ("computation", "piece"):
        raise ArgumentError(f"Expected kind 'computation' or 'piece', got {manifest['kind']!r}.")
    names, parameters = manifest["parameter_names"], manifest["parameters"]
    if len(names) > len(parameters) or len(set(names)) < len(names):
        raise ArgumentError(f"Expected names of {len(parameters)} parameters, got {names}.")


def check_artifact(
    manifest: dict[str, Any], interface: Interface, exported: jax.export.Exported
) -> None:
    """Raises `ArgumentError` unless a manifest, its types and the artifact belong together."""
    _check_equal("platforms", manifest["platforms"], list(exported.platforms))
    for name, avals in (("arguments", exported.in_avals), ("results", exported.out_avals)):
        given = [entry["name"] for entry in manifest[name]]
        _check_equal(name, manifest[name], artifacts.describe(given, avals))
    _check_counts(manifest, interface, exported)
    _check_cohort(manifest)
    _check_dtypes(manifest, interface, exported)
    _check_equal("strings", len(manifest["strings"]), _num_strings(interface.result))


def _check_equal(name: str, got: Any, expected: Any) -> None:
    if got != expected:
        raise ArgumentError(f"Expected {name} to be {expected}, got {got}.")


def _check_kinds(entries: dict[str, Any], kinds: dict[str, Any]) -> None:
    for name, kind in kinds.items():
        if not _is_of_kind(entries.get(name), kind):
            raise ArgumentError(f"Expected {name} to be {kind}, got {entries.get(name)!r}.")


def _is_of_kind(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return type(value) is list and all(_is_of_kind(x, kind[0]) for x in value)
    # A bool is no int here.
    return type(value) in (kind if isinstance(kind, tuple) else (kind,))


def _check_counts(
    manifest: dict[str, Any], interface: Interface, exported: jax.export.Exported
) -> None:
    """Raises unless the artifact takes and gives as many arrays as its types say."""
    taken = sum(artifacts.num_arrays(t) for t in interface.parameters)
    given = artifacts.num_arrays(interface.result)
    given += 2 * (len(manifest["edges"]) + len(manifest["secure_sums"]))
    expected = (taken + (manifest["kind"] == "computation"), given)
    got = (len(exported.in_avals), len(exported.out_avals))
    _check_equal("the numbers of arrays in and out", got, expected)


def _check_cohort(manifest: dict[str, Any]) -> None:
    """Raises unless `lanes` is what the artifact was made for."""
    lanes = manifest["lanes"]
    if manifest["kind"] == "piece":
        _check_equal("lanes", lanes, 1)
        return
    cohort = "c" if lanes == 1 else f"{lanes}*c"
    valid = {"name": "valid", "dtype": "bool", "shape": [cohort]}
    _check_equal("the last argument", manifest["arguments"][-1], valid)


def _check_dtypes(
    manifest: dict[str, Any], interface: Interface, exported: jax.export.Exported
) -> None:
    """Raises unless the arguments have the dtypes and the ranks that their types say."""
    if manifest["enable_x64"] != artifacts.has_64_bits():
        return  # the types then stand for other dtypes here, and a call says so
    specs = [artifacts.spec_of(t, Dimensions(1, 1)) for t, _ in interface.leaves]
    plain = [artifacts.plain_spec(leaf) for leaf in jax.tree.leaves(specs)]
    expected = [(x.dtype, len(x.shape)) for x in plain]
    got = [(x.dtype, len(x.shape)) for x in exported.in_avals]
    _check_equal("the dtypes and ranks of arguments", got[: len(expected)], expected)


def _num_strings(t: Type) -> int:
    if isinstance(t, TensorType):
        return int(is_str(t.dtype))
    return sum(map(_num_strings, [t.member] if isinstance(t, FederatedType) else t.children()))
