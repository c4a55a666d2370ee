"""Secure sums: the server learns the total of the clients' integers, and nothing else.

    federated_secure_sum           <{V}@CLIENTS,M> -> V@SERVER
    federated_secure_sum_bitwidth  <{V}@CLIENTS,B> -> V@SERVER
    federated_secure_modular_sum   <{V}@CLIENTS,M> -> V@SERVER

A protocol for secure aggregation sums in a finite field, so each value has bounds that are known
before. Here the arithmetic is simulated, its width is counted exactly, and the analysis calls the
edge blind; the cryptography is not part of a simulation.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.errors import ArgumentError, FederatedTypeError
from fedjax_core.language import inference, types
from fedjax_core.language.base_types import shorten
from fedjax_core.language.locations import location
from fedjax_core.language.mapping import federated_type_of, placed
from fedjax_core.language.placements import CLIENTS, SERVER
from fedjax_core.language.program import SecureSum
from fedjax_core.language.tracing import Value, current_builder, operator, position_of
from fedjax_core.language.types import FederatedType


class SecureTotal(NamedTuple):
    """What a secure sum gives when it is asked to report what it clipped.

    Attributes:
      total: the sum of the clipped values, of the type of one client's value.
      num_below: int32, how many numbers of all clients were below their lower bound.
      num_above: int32, likewise above their upper bound.
    """

    total: Any
    num_below: Any
    num_above: Any


@operator
def federated_secure_sum(
    value: Any,
    max_input: Any,
    *,
    min_input: Any = 0,
    report_clipped: bool = False,
    name: str = "value",
) -> Value:
    """Sums integers within bounds: `<{V}@CLIENTS,M> -> V@SERVER`.

    A value outside of its bounds is clipped to them. If it is not to be reported, calling the
    computation with such a value is an error; inside a JAX transformation, where nothing can be
    raised, it is only clipped.

    Args:
      value: integers or structs of them, at the clients.
      max_input: the largest value a client may send: one int, or a struct of ints like `value`.
      min_input: the smallest, likewise.
      report_clipped: whether to return a struct `SecureTotal` with the numbers of clipped values,
        which the clients send along.
      name: of the edge.

    Raises:
      FederatedTypeError: for values that are no integers, or bounds of another structure.
      ArgumentError: for bounds in the wrong order.
    """
    what = "federated_secure_sum"
    value = _integers(value, what)
    lower = _constants(min_input, value, f"{what}: min_input")
    upper = _constants(max_input, value, f"{what}: max_input")
    leaves = jax.tree.leaves(inference.template(federated_type_of(value, what).member))
    for leaf, low, high in zip(leaves, lower, upper, strict=True):
        limits = jnp.iinfo(leaf.dtype)
        if low > limits.max or high < limits.min:
            raise ArgumentError(
                f"{what}: expected bounds with values of {leaf.dtype} between them, got "
                f"{shorten(low)} and {shorten(high)}; widen the bounds, or convert the values."
            )
        if low > high:
            raise ArgumentError(
                f"{what}: expected max_input to be at least min_input, got {high} and {low}; "
                "exchange the two."
            )
    return _secure_sum(value, what, name, report_clipped, lower=lower, upper=upper)


@operator
def federated_secure_sum_bitwidth(
    value: Any, bitwidth: Any, *, report_clipped: bool = False, name: str = "value"
) -> Value:
    """Sums non-negative integers of so many bits: `<{V}@CLIENTS,B> -> V@SERVER`.

    Args:
      value: integers or structs of them, at the clients.
      bitwidth: of every value: one int from 1 to 62, or a struct of ints like `value`.
      report_clipped: see `federated_secure_sum`.
      name: of the edge.

    Raises:
      FederatedTypeError: for values that are no integers, or widths of another structure.
      ArgumentError: for a width out of range.
    """
    what = "federated_secure_sum_bitwidth"
    value = _integers(value, what)
    widths = _constants(bitwidth, value, f"{what}: bitwidth")
    if any(not 1 <= width <= 62 for width in widths):
        raise ArgumentError(
            f"{what}: expected a bitwidth from 1 to 62, got {bitwidth!r}; quantise to fewer bits, "
            "or clip to bounds with federated_secure_sum."
        )
    upper = tuple((1 << width) - 1 for width in widths)
    lower = (0,) * len(widths)
    return _secure_sum(value, what, name, report_clipped, lower=lower, upper=upper)


@operator
def federated_secure_modular_sum(value: Any, modulus: Any, *, name: str = "value") -> Value:
    """Sums integers modulo `modulus`: `<{V}@CLIENTS,M> -> V@SERVER`, from 0 to `modulus - 1`.

    Each client sends its value modulo `modulus`; negative ones are mapped to non-negative ones.

    Args:
      value: integers or structs of them, at the clients.
      modulus: one positive int that the dtype holds, or a struct of ints like `value`.
      name: of the edge.

    Raises:
      FederatedTypeError: for values that are no integers, or moduli of another structure.
      ArgumentError: for a modulus out of range.
    """
    what = "federated_secure_modular_sum"
    value = _integers(value, what)
    moduli = _constants(modulus, value, f"{what}: modulus")
    leaves = jax.tree.leaves(inference.template(federated_type_of(value, what).member))
    for leaf, m in zip(leaves, moduli, strict=True):
        if not 1 <= m <= min(np.iinfo(leaf.dtype).max, (1 << 31) - 1):
            raise ArgumentError(
                f"{what}: expected a modulus from 1 to the largest {leaf.dtype} of at most 31 "
                f"bits, got {m}; pass a positive int that the values' dtype holds."
            )
    upper = tuple(m - 1 for m in moduli)
    lower = (0,) * len(moduli)
    return _secure_sum(value, what, name, False, lower=lower, upper=upper, modulus=moduli)


def _integers(value: Any, what: str) -> Value:
    value = placed(value, CLIENTS, what)
    reason = inference.why_not_integers(federated_type_of(value, what).member)
    if reason is not None:
        raise FederatedTypeError(
            f"{what}: expected integers of fixed shape, got {value.type_signature} ({reason}); "
            "quantise them in federated_map first."
        )
    return value


def _constants(bound: Any, value: Value, what: str) -> tuple[int, ...]:
    """One int for each leaf of `value`, from one for all or a struct of them."""
    template = inference.template(federated_type_of(value, what).member)
    num_leaves = len(jax.tree.leaves(template))
    given = [bound] * num_leaves if _is_int(bound) else _leaves_like(bound, template, what)
    for x in given:
        if not _is_int(x):
            raise FederatedTypeError(
                f"{what}: expected one constant int, or one for each leaf of "
                f"{value.type_signature}, got {bound!r}; pass Python ints."
            )
    return tuple(int(x) for x in given)


def _leaves_like(bound: Any, template: Any, what: str) -> list[Any]:
    leaves = jax.tree.leaves(bound, is_leaf=lambda x: isinstance(x, Value))
    if isinstance(bound, list | tuple) and len(leaves) == len(jax.tree.leaves(template)):
        return leaves
    if jax.tree.structure(bound) != jax.tree.structure(template):
        raise FederatedTypeError(
            f"{what}: expected one constant int, or a struct of ints like "
            f"{inference.infer_type(template)}, got {bound!r}; give it that structure."
        )
    return leaves


def _is_int(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def _secure_sum(value: Value, what: str, name: str, report_clipped: bool, **bounds: Any) -> Value:
    builder = current_builder(what)
    member = federated_type_of(value, what).member
    result = types.to_type(SecureTotal(member, np.int32, np.int32))
    total = builder.add(
        SecureSum(
            type=FederatedType(result, SERVER),
            inputs=(position_of(value, builder, what),),
            label=name,
            is_checked=not report_clipped,
            location=location(),
            **bounds,
        )
    )
    return total if report_clipped else total.total
