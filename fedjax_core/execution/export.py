"""Exporting computations to files; `loading.py` runs them without the code that defined them.

An exported computation is StableHLO for several platforms in one file, for cohorts of any size,
together with a manifest of its types, its edges and its calling convention (see `manifest.py`).
"""

import os
from typing import Any, NamedTuple, cast

import jax
import jax.export
import jax.numpy as jnp

from fedjax_core.errors import ArgumentError, FedjaxError, NotExportableError
from fedjax_core.execution import lowering
from fedjax_core.execution import manifest as artifacts
from fedjax_core.execution.calling import Interface
from fedjax_core.execution.manifest import PLATFORMS, Dimensions
from fedjax_core.files import to_path
from fedjax_core.language.analysis import communication, program_of
from fedjax_core.language.audit import outside_calls
from fedjax_core.language.local import Local
from fedjax_core.language.program import Op, Program, SecureSum
from fedjax_core.language.types import FunctionType, SequenceType


def export(
    computation: Any,
    path: str | os.PathLike[str],
    *,
    platforms: tuple[str, ...] = PLATFORMS,
    sequence_capacity: int | None = None,
    lanes: int = 1,
) -> None:
    """Writes a computation to one file, which `load` runs without the code that defined it.

    Args:
      computation: a federated computation with declared types.
      path: the file; an existing one is replaced.
      platforms: what it is compiled for, out of "cpu", "cuda", "rocm" and "tpu".
      sequence_capacity: the most examples that a sequence may have. None leaves it open, which not
        every function of a sequence allows.
      lanes: how many clients run side by side (see `Execution`).

    Raises:
      ArgumentError: for a computation that cannot be exported: without declared types, with
        parameters that are functions, with calls back to Python, with types that no file can name,
        or one that JAX refuses; for other options than these.
      StorageError: the file cannot be written.

    Examples:
      >>> import pathlib, tempfile
      >>> import numpy as np
      >>> from fedjax_core.execution.computation import federated_computation
      >>> from fedjax_core.execution.loading import load_computation
      >>> from fedjax_core.language import operators, placements, types
      >>> mean = federated_computation(
      ...     operators.federated_mean, types.FederatedType(np.float32, placements.CLIENTS))
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "mean"
      >>> export(mean, path)
      >>> round(float(load_computation(path)([68.5, 70.3, 69.8])), 4)
      69.5333
    """
    path = to_path(path)
    program = program_of(computation)
    check_functions(program)
    check_callbacks(program)
    _check_positive("lanes", lanes)
    if sequence_capacity is not None:
        _check_positive("sequence_capacity", sequence_capacity)
    interface = Interface.of(program)
    sizes = artifacts.symbols()
    capacity = sequence_capacity or sizes.capacity
    flat = _flatten(program, interface, Dimensions(lanes * sizes.cohort, capacity), lanes)
    exported = compile_flat(interface, flat, platforms, sequence_capacity)
    more = {
        "kind": "computation",
        "lanes": lanes,
        "sequence_capacity": sequence_capacity,
        "edges": _edges(computation),
        "secure_sums": [_bounds(op) for op in _checked(program)],
    }
    artifacts.write(path, interface, flat, exported, more)


def check_functions(program: Program) -> None:
    """Raises `ArgumentError` for a program with functions as parameters."""
    functions = [
        program.name_of_argument(k)
        for k, t in enumerate(program.argument_types)
        if isinstance(t, FunctionType)
    ]
    if functions:
        raise NotExportableError(
            f"`{program.name}`: expected a computation whose functions are known, got {functions} "
            "to be given; bind them first, with computation.bind(...)."
        )


def check_callbacks(program: Program) -> None:
    """Raises `ArgumentError` for a program that calls Python while it runs."""
    for op in program.ops:
        calls = [call for local in locals_of(op) for call in outside_calls(local)]
        python = [call for call in calls if "callback" in call or "debug_print" in call]
        if python:
            raise NotExportableError(
                f"`{program.name}`: expected local computations that JAX compiles, got {python} at "
                f"{op.location or 'an unknown place'}, which calls Python; take it out."
            )


def locals_of(op: Op) -> list[Local]:
    """The local computations of one operation."""
    found = [getattr(op, name, None) for name in ("local", "accumulate", "merge", "report")]
    codec = getattr(op, "codec", None)
    found += [getattr(op, "select", None)] + ([codec.receive, codec.bits] if codec else [])
    return [local for local in found if isinstance(local, Local)]


def _check_positive(name: str, number: Any) -> None:
    is_int = isinstance(number, int) and not isinstance(number, bool)
    if not is_int or not 1 <= number < 1 << 31:
        raise ArgumentError(
            f"Expected {name} to be a positive int of at most 31 bits, got {number!r}."
        )


def compile_flat(
    interface: Interface,
    flat: artifacts.Flat,
    platforms: tuple[str, ...],
    sequence_capacity: int | None,
) -> jax.export.Exported:
    """As `manifest.compile_for`, with what to do where an open capacity is the reason to fail."""
    if sequence_capacity is not None:
        _check_positive("sequence_capacity", sequence_capacity)
    artifacts.check_notation(interface)
    has_sequences = any(t.contains(SequenceType) for t, _ in interface.leaves)
    is_open = has_sequences and sequence_capacity is None
    try:
        return artifacts.compile_for(interface.name, flat, platforms)
    except FedjaxError as error:
        if not is_open or "platforms" in str(error):
            raise
        reason = artifacts.reason_of(error.__cause__ or error)
        raise NotExportableError(
            f"`{interface.name}`: expected functions of sequences of any length, got one that JAX "
            f"compiles for a known capacity only ({reason}); pass sequence_capacity=, the most "
            "examples that a sequence may have."
        ) from error


class Outputs(NamedTuple):
    """The results of an artifact, in their order.

    Attributes:
      result: of the computation.
      ledger: a `BitCount` for each edge.
      violations: for each secure sum that is checked `(below, above)`.
    """

    result: Any
    ledger: Any
    violations: Any


def _flatten(
    program: Program, interface: Interface, sizes: Dimensions, lanes: int
) -> artifacts.Flat:
    """The whole computation as a function of plain arrays."""
    specs = {name: artifacts.spec_of(t, sizes) for t, name in interface.leaves}
    specs["valid"] = jax.ShapeDtypeStruct((sizes.cohort,), jnp.bool_)

    def run(*args: Any) -> Outputs:
        *given, valid = args
        values = dict(zip(program.parameters, given, strict=True))
        outcome = lowering.run(program, values, valid, lanes)
        result = jax.tree.map(lambda i: outcome.values[i], program.result_tree)
        ledger = [outcome.ledger[i] for i, _ in program.edges]
        violations = [outcome.violations[i] for i in _checked_positions(program)]
        return Outputs(result, ledger, violations)

    return artifacts.flatten(run, specs)


def _checked_positions(program: Program) -> list[int]:
    ops = enumerate(program.ops)
    return [i for i, op in ops if isinstance(op, SecureSum) and op.is_checked]


def _checked(program: Program) -> list[SecureSum]:
    return [cast(SecureSum, program.ops[i]) for i in _checked_positions(program)]


def _bounds(op: SecureSum) -> dict[str, Any]:
    return {
        "name": op.label,
        "lower": list(op.lower),
        "upper": list(op.upper),
        "location": op.location,
    }


def _edges(computation: Any) -> list[dict[str, Any]]:
    """The edges as the analysis reports them, their bits for a single client."""
    return [
        {
            "direction": edge.direction,
            "operator": edge.operator,
            "name": edge.name,
            "type": str(edge.type),
            "codec": edge.codec,
            "bits_of_one_client": edge.bits_per_client,
            "visibility": edge.visibility,
            "round_trip": edge.round_trip,
        }
        for edge in communication(computation, num_clients=1)
    ]
