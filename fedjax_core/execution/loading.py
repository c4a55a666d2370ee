"""Running exported computations, without the code that defined them.

Reading a file runs nothing of it; a call runs the compiled computation alone.
"""

import functools
import os
import pathlib
import re
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fedjax_core.bits import BitCount
from fedjax_core.errors import ArgumentError, StorageError
from fedjax_core.execution import manifest as artifacts
from fedjax_core.execution import validation
from fedjax_core.execution.calling import Given, Interface, is_stacked, out_of_bounds, to_user
from fedjax_core.execution.manifest import Dimensions
from fedjax_core.files import COMPUTATION, to_path, unreadable
from fedjax_core.language import feeding
from fedjax_core.language.notation import parse_type
from fedjax_core.language.placements import CLIENTS
from fedjax_core.language.types import FunctionType
from fedjax_core.language.values import Federated, Sequence


def load_computation(path: str | os.PathLike[str]) -> "LoadedComputation":
    """Reads a computation that `export` wrote.

    Args:
      path: the file.

    Raises:
      FederatedTypeError: for a path that is none.
      StorageError: there is no such file, it is something else, it was cut short or altered, or it
        was written by a newer JAX that this one does not understand.
    """
    path = to_path(path)
    manifest, artifact = artifacts.read(path)
    try:
        validation.check_entries(manifest)
        interface = _interface(manifest)
        written_by = manifest["versions"]["jax"]
    # A checksum is no proof of who wrote the file.
    except Exception as error:
        raise unreadable(path, COMPUTATION) from error
    exported = _deserialize(path, artifact, written_by)
    try:
        validation.check_artifact(manifest, interface, exported)
        loaded = LoadedComputation(manifest, interface, exported)
    except Exception as error:
        raise unreadable(path, COMPUTATION) from error
    return loaded


def _interface(manifest: dict[str, Any]) -> Interface:
    return Interface(
        name=str(manifest["name"]),
        parameter_names=tuple(map(str, manifest["parameter_names"])),
        parameters=tuple(map(parse_type, manifest["parameters"])),
        result=parse_type(manifest["result"]),
        has_clients=bool(manifest["has_clients"]),
    )


def _deserialize(path: pathlib.Path, artifact: bytes, written_by: str) -> jax.export.Exported:
    is_newer = _release(written_by) > _release(jax.__version__)
    try:
        exported = jax.export.deserialize(bytearray(artifact))
        if is_newer:
            exported.mlir_module()  # raises here for what this version does not know
    except Exception as error:
        if not is_newer:
            raise unreadable(path, COMPUTATION) from error
        raise StorageError(
            f"expected a computation exported by jax {jax.__version__} or an older one, got "
            f"{path}, exported by jax {written_by}: JAX reads what older versions wrote, not what "
            "newer ones did; export it with the older version, or run it with the newer."
        ) from error
    return exported


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:4]))


class LoadedComputation:
    """A computation read from a file: called like the one that was exported.

    Containers are not in the file: structs with names come back as ordered dicts, others as tuples,
    and arguments are matched by name. It can be traced by `jax.jit`, but not be differentiated, go
    through `jax.vmap`, or be put into other computations: transform first, then export.

    Attributes:
      manifest: what the file says of it.
      type_signature: its `FunctionType`.
      parameters: the types of its arguments.
      stablehlo: the compiled program as a portable StableHLO artifact.
    """

    def __init__(
        self, manifest: dict[str, Any], interface: Interface, exported: jax.export.Exported
    ) -> None:
        self.manifest = manifest
        self.type_signature: FunctionType = interface.type_signature
        self.parameters = interface.parameters
        self.stablehlo: bytes = exported.mlir_module_serialized
        self._interface = interface
        self._dtypes = [x.dtype for x in exported.in_avals]
        self._capacities = _capacities(interface, exported.in_avals)
        self._platforms = tuple(exported.platforms)
        self._lanes = int(manifest["lanes"])
        self._takes_valid = manifest["kind"] == "computation"
        self._num_edges = len(manifest["edges"])
        self._sums = list(manifest["secure_sums"])
        self._needs_64_bits = bool(manifest["enable_x64"])
        self._jitted = jax.jit(exported.call)
        self._has_run = False

    def __repr__(self) -> str:
        return f"{self._interface.name}: {self.type_signature}"

    def __call__(self, *args: Any, num_clients: int | None = None, **kwargs: Any) -> Any:
        """Runs the computation.

        Args:
          *args: one for each parameter, as for a `Computation`.
          num_clients: needed only where no argument tells how many clients there are.
          **kwargs: arguments by the names of the parameters.

        Raises:
          FederatedTypeError: naming the argument, and the client, that does not fit.
          ArgumentError: for sequences that are too long, on a platform that it was not exported
            for, or where arguments disagree on the number of clients.
          StorageError: where JAX refuses what is in the file.
        """
        return self.call_with_ledger(*args, num_clients=num_clients, **kwargs)[0]

    def call_with_ledger(
        self, *args: Any, valid: Any = None, num_clients: int | None = None, **kwargs: Any
    ) -> tuple[Any, tuple[BitCount, ...]]:
        """As a call, with what was sent.

        Args:
          *args: as for a call.
          valid: bool `[clients]`, False for clients that only pad the cohort.
          num_clients: as for a call.
          **kwargs: as for a call.

        Returns:
          `(result, ledger)`, a `BitCount` for each of `manifest["edges"]`.
        """
        given = self._interface.take(args, kwargs, num_clients, valid)
        self._check_platform()
        arrays = iter(self._run(self._arrays(given, valid)))
        strings = iter(self.manifest["strings"])
        result = artifacts.build(self._interface.result, arrays, strings)
        ledger = tuple(BitCount(next(arrays), next(arrays)) for _ in range(self._num_edges))
        self._check_bounds(list(arrays))
        cut = functools.partial(_first_clients, given.num_clients)
        result = jax.tree.map(cut, result, is_leaf=lambda x: isinstance(x, Federated))
        return to_user(result, given.is_lazy), ledger

    def _arrays(self, given: Given, valid: Any) -> list[Any]:
        """The plain arrays of a call, clients padded to full waves of which there is at least 1."""
        num_waves = max(-(-given.num_clients // self._lanes), 1)
        missing = num_waves * self._lanes - given.num_clients
        arrays = []
        for x, (t, _) in zip(self._padded(given.leaves), self._interface.leaves, strict=True):
            added = missing if is_stacked(t) else 0
            leaves = jax.tree.leaves(x)
            arrays += [_pad_clients(artifacts.as_plain(leaf), added) for leaf in leaves]
        if self._takes_valid:
            is_valid = np.ones(given.num_clients, bool) if valid is None else valid
            arrays.append(_pad_clients(jnp.asarray(is_valid), missing))
        pairs = zip(arrays, self._dtypes, strict=True)
        return [x if x.dtype == dtype else x.astype(dtype) for x, dtype in pairs]

    def _run(self, arrays: list[Any]) -> Any:
        """The results; until there were some, an error of JAX says that the file is damaged."""
        try:
            results = self._jitted(*arrays)
        # JAX raises errors of many kinds for what it does not understand, some of them private.
        except Exception as error:
            is_ours = not self._has_run and not any(isinstance(x, Tracer) for x in arrays)
            if not is_ours or "RESOURCE_EXHAUSTED" in str(error):
                raise
            raise StorageError(
                f"`{self._interface.name}`: expected a computation that JAX compiles and runs, got "
                f"{artifacts.reason_of(error)}; the file is damaged, or was made for another kind "
                "of device: use another copy, or export it again."
            ) from error
        self._has_run = True
        return results

    def _padded(self, leaves: list[Any]) -> list[Any]:
        """The arguments with their sequences in the padded layout, of the capacities it takes.

        Those that were left open under one name have one capacity, the largest.
        """
        values = [x.value if isinstance(x, Federated) else x for x in leaves]
        pairs = list(zip(values, self._capacities, strict=True))
        padded = []
        for (x, capacity), (_, name) in zip(pairs, self._interface.leaves, strict=True):
            if isinstance(capacity, str):
                capacity = _common_capacity([y for y, open_ in pairs if open_ == capacity])
            where = f"argument `{name}` of `{self._interface.name}`"
            padded.append(x if capacity is None else _to_capacity(x, capacity, where))
        return padded

    def _check_platform(self) -> None:
        name = self._interface.name
        backend = jax.default_backend()
        wanted = {"cuda", "rocm", "gpu"} if backend == "gpu" else {backend}
        if not wanted & set(self._platforms):
            raise ArgumentError(
                f"`{name}`: expected to run on one of {list(self._platforms)}, which it was "
                f"exported for, got {backend}; export it again with platforms=."
            )
        if self._needs_64_bits and not artifacts.has_64_bits():
            raise ArgumentError(
                f"`{name}`: expected jax_enable_x64, with which it was exported; set it with "
                'jax.config.update("jax_enable_x64", True).'
            )

    def _check_bounds(self, counts: list[Any]) -> None:
        if any(isinstance(x, Tracer) for x in counts):
            return
        for known, pair in zip(
            self._sums, zip(counts[::2], counts[1::2], strict=True), strict=True
        ):
            if any(map(int, pair)):
                bounds = known["lower"], known["upper"]
                name = self._interface.name
                raise out_of_bounds(name, known["name"], bounds, known["location"], pair)


def _capacities(interface: Interface, avals: Any) -> list[int | str | None]:
    """For each argument the capacity of its sequences, the symbol's name where it is left open."""
    capacities: list[int | str | None] = []
    shapes = iter([x.shape for x in avals])
    for t, _ in interface.leaves:
        capacity = None
        spec = artifacts.spec_of(t, Dimensions(1, 1))
        for leaf in jax.tree.leaves(spec, is_leaf=_is_sequence):
            parts = [next(shapes, ()) for _ in jax.tree.leaves(leaf)]
            if _is_sequence(leaf) and len(parts) > 2:
                capacity = parts[0][int(is_stacked(t))]
        capacities.append(capacity if capacity is None or type(capacity) is int else str(capacity))
    return capacities


def _first_clients(num_clients: int, x: Any) -> Any:
    if not isinstance(x, Federated) or x.placement is not CLIENTS or x.all_equal:
        return x
    return Federated(jax.tree.map(lambda leaf: leaf[:num_clients], x.value), x.placement, False)


def _pad_clients(x: jax.Array, missing: int) -> jax.Array:
    if not missing:
        return x
    return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))


def _is_sequence(x: Any) -> bool:
    return isinstance(x, Sequence)


def _common_capacity(values: Any) -> int:
    """The capacity that all sequences in some values are brought to."""
    leaves = jax.tree.leaves(values, is_leaf=_is_sequence)
    return feeding.bucket(max((x.capacity for x in leaves if _is_sequence(x)), default=1))


def _to_capacity(value: Any, capacity: int, where: str) -> Any:
    """A value with its sequences in the padded layout, of one capacity.

    Raises:
      ArgumentError: for a sequence that is longer.
    """

    def convert(x: Any) -> Any:
        if not _is_sequence(x):
            return x
        _check_lengths(x, capacity, where)
        return _repack(x, capacity)

    return jax.tree.map(convert, value, is_leaf=_is_sequence)


def _check_lengths(x: Sequence, capacity: int, where: str) -> None:
    is_known = not isinstance(x.length, Tracer)
    longest = int(np.max(np.asarray(x.length), initial=0)) if is_known else x.capacity
    if longest > capacity:
        raise ArgumentError(
            f"{where}: expected sequences of at most {capacity} examples, for which it was "
            f"exported, got one of {longest}; export it again with sequence_capacity={longest}."
        )


@functools.partial(jax.jit, static_argnums=1)
def _repack(x: Sequence, capacity: int) -> Sequence:
    """Sequences that begin at row 0 of arrays with as many rows as `capacity`."""

    def rows(pool: Any, start: jax.Array) -> Any:
        return jax.tree.map(lambda leaf: _take(leaf, start + jnp.arange(capacity)), pool)

    if jnp.ndim(x.start):
        rows = jax.vmap(rows, in_axes=(None if x.packed else 0, 0))
    start = jnp.asarray(x.start)
    return Sequence(rows(x.elements, start), jnp.zeros_like(start), x.length, capacity)


def _take(leaf: Any, index: jax.Array) -> jax.Array:
    if leaf.shape[0] == 0:
        return jnp.zeros((*index.shape, *leaf.shape[1:]), leaf.dtype)
    return jnp.take(leaf, index, axis=0, mode="clip")
