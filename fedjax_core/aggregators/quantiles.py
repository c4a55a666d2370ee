"""Norms that wrappers compare with: fixed, or estimated from the clients' own norms."""

import math
import sys
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_core.errors import ArgumentError
from fedjax_core.language.operators import (
    federated_broadcast,
    federated_count,
    federated_map,
    federated_sum,
)
from fedjax_core.language.tracing import Value

_LARGEST = float(jnp.finfo(jnp.float32).max)


class NormEstimator(NamedTuple):
    """An estimate of a norm that may change from round to round.

    Attributes:
      init: `() -> state`.
      report: `(state) -> norm`, a float32 scalar.
      update: `(state, norms, present) -> state`, on placed values: the state at the server, each
        client's norm and whether it takes part at the clients.
    """

    init: Callable[[], Any]
    report: Callable[[Any], jax.Array]
    update: Callable[[Value, Value, Value], Value]


def fixed(norm: float) -> NormEstimator:
    """The same norm in every round.

    Raises:
      ArgumentError: if `norm` is not a positive number.
    """
    if isinstance(norm, bool) or not isinstance(norm, Real) or not 0 < norm < math.inf:
        raise ArgumentError(
            "Expected a positive number or a norm estimator such as quantile(1.0, 0.8), got "
            f"{norm!r}."
        )
    return NormEstimator(
        init=lambda: (),
        report=lambda state: jnp.float32(norm),
        update=lambda state, norms, present: state,
    )


def quantile(
    initial_estimate: float,
    target_quantile: float,
    learning_rate: float = 0.2,
    *,
    multiplier: float = 1.0,
    increment: float = 0.0,
    is_geometric: bool = True,
) -> NormEstimator:
    """Follows a quantile of the clients' norms by one bit from each.

    With ``b`` the fraction of clients whose norm is at most the estimate ``C``, and target ``t``:
    ``C <- C exp(eta (t - b))``, or ``C <- C + eta (t - b)`` if not geometric. A round without
    clients leaves the estimate as it was.

    Args:
      initial_estimate: of the first round, positive.
      target_quantile: between 0 and 1.
      learning_rate: eta.
      multiplier: the norm reported is ``multiplier * C + increment``.
      increment: see `multiplier`.
      is_geometric: which of the two rules.

    Raises:
      ArgumentError: for values out of range.

    References:
      Andrew, Thakkar, McMahan, Ramaswamy: Differentially Private Learning with Adaptive Clipping,
      NeurIPS 2021, arXiv:1905.03871.
    """
    tiny = sys.float_info.min
    _check_range("initial_estimate", initial_estimate, tiny, _LARGEST)
    _check_range("target_quantile", target_quantile, 0, 1)
    _check_range("learning_rate", learning_rate, 0, _LARGEST)
    _check_range("multiplier", multiplier, tiny, _LARGEST)
    _check_range("increment", increment, 0, _LARGEST)

    def step(estimate: jax.Array, num_below: jax.Array, count: jax.Array) -> jax.Array:
        fraction = num_below / jnp.maximum(count, 1)
        move = learning_rate * (target_quantile - fraction)
        moved = estimate * jnp.exp(move) if is_geometric else estimate + move
        return jnp.where(count > 0, moved, estimate).astype(jnp.float32)

    def is_below(estimate: jax.Array, norm: jax.Array) -> jax.Array:
        return (norm <= estimate).astype(jnp.int32)

    def report(estimate: jax.Array) -> jax.Array:
        # The arithmetic rule may step below zero, where there is no norm.
        return (multiplier * jnp.maximum(estimate, 0) + increment).astype(jnp.float32)

    def update(state: Value, norms: Value, present: Value) -> Value:
        estimate = federated_broadcast(state, name="norm")
        below = federated_map(is_below, estimate, norms)
        num_below = federated_sum(below, present=present, name="norm")
        return federated_map(step, state, num_below, federated_count(present))

    return NormEstimator(
        init=lambda: jnp.float32(initial_estimate),
        report=report,
        update=update,
    )


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:
        raise ArgumentError(f"Expected {name} to be a number from {low} to {high}, got {value!r}.")


def as_estimator(norm: float | NormEstimator) -> NormEstimator:
    """A number as an estimator that always reports it."""
    return norm if isinstance(norm, NormEstimator) else fixed(norm)
