"""PowerSGD: the mean of matrices by two sums of their factors, so nothing but sums is sent.

    clients:  x_k = u_k + e_k,   P_k = x_k B              B: the basis of the last round, broadcast
    server:   P = orthonormal basis of sum_k w_k P_k      broadcast
    clients:  R_k = x_k^T P,     e_k = x_k - P R_k^T      what is left for the next round
    server:   R = sum_k w_k R_k / sum_k w_k,  mean ~ P R^T,  B = R

The mean is that of the values, projected to `rank` directions, and the errors add up to what the
projection left out. A round takes two trips up and two down.

References:
  Vogels, Karimireddy, Jaggi. PowerSGD: practical low-rank gradient compression for distributed
  optimization. NeurIPS 2019, arXiv:1905.13727 (algorithms 1 and 2).
"""

from typing import Any, cast

import jax
import jax.numpy as jnp

from fedjax_core.aggregators.base import Aggregator, Measurements, is_present
from fedjax_core.aggregators.sums import check_kind
from fedjax_core.compression.checks import flag, whole
from fedjax_core.compression.edges import PlacedKeys
from fedjax_core.compression.low_rank import matrix_shape, orthonormal
from fedjax_core.compression.low_rank import multiply as product
from fedjax_core.language import inference
from fedjax_core.language.operators import (
    divide,
    federated_broadcast,
    federated_count,
    federated_map,
    federated_sum,
    multiply,
)
from fedjax_core.language.tracing import Value
from fedjax_core.language.types import FederatedType

# A matrix has factors if they hold at most this part of its elements.
_MAX_SHARE = 0.5


def power_sgd(rank: int = 4, *, error_feedback: bool = True) -> Aggregator:
    """The weighted mean of matrices of low rank, and the exact one of all other tensors.

    Tensors of several axes are matrices whose columns are the last axis. Those whose factors would
    hold more than half as many elements, and vectors, are averaged as they are.

    Args:
      rank: how many directions of each matrix are sent, 1 to 256.
      error_feedback: whether clients remember what the projections left out, one tensor in float32
        for each matrix. Turn it off where a client takes part once.

    Returns:
      An aggregator that measures `{"power_sgd": {"num_clients", "total_weight"}}`.

    Raises:
      CodecError: an argument is out of range.
    """
    own_rank = whole("rank", rank, 1, 256)
    remembers = flag("error_feedback", error_feedback)

    def init(template: Any) -> tuple[Any, Any]:
        check_kind(template, jnp.inexact, "floating-point numbers to average")
        shapes = [matrix_shape(x.shape) for x in jax.tree.leaves(template) if _pays(x, own_rank)]
        keys = jax.random.split(jax.random.key(0), max(len(shapes), 1))
        bases = [
            jax.random.normal(key, (columns, own_rank))
            for key, (_, columns) in zip(keys, shapes, strict=False)
        ]
        errors = [jnp.zeros(shape) for shape in shapes] if remembers else []
        return tuple(bases), tuple(errors)

    def split(value: Any, errors: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        """The matrices, with what was left of them, and all other leaves."""
        leaves = jax.tree.leaves(value)
        chosen = [x for x in leaves if _pays(x, own_rank)]
        matrices = [x.astype(jnp.float32).reshape(matrix_shape(x.shape)) for x in chosen]
        if remembers:
            matrices = [x + error for x, error in zip(matrices, errors, strict=True)]
        return tuple(matrices), tuple(x for x in leaves if not _pays(x, own_rank))

    def aggregate(
        keys: PlacedKeys, server: Value, memory: Value, value: Value, weight: Value
    ) -> tuple[Value, Value, Value, Measurements]:
        del keys
        present = is_present(weight)
        matrices, others = federated_map(split, value, memory)
        basis = federated_broadcast(server, name="basis")
        left = federated_map(_left, matrices, basis, weight)
        directions = federated_map(_orthonormal, federated_sum(left, present=present, name="left"))
        known = federated_broadcast(directions, name="directions")
        right = federated_map(_products, matrices, known)
        weighted = federated_map(multiply, (right, others), weight)
        total = federated_sum(weighted, present=present, name="update")
        total_weight = federated_sum(weight, present=present, name="weight")
        means = federated_map(divide, total, total_weight)
        member = cast(FederatedType, value.type_signature).member
        template = inference.template(member)

        def join(directions: Any, means: tuple[Any, Any]) -> Any:
            matrices, others = (iter(x) for x in (zip(directions, means[0], strict=True), means[1]))
            leaves, structure = jax.tree.flatten(template)
            found = [
                _product(*next(matrices)).reshape(x.shape).astype(x.dtype)
                if _pays(x, own_rank)
                else next(others)
                for x in leaves
            ]
            return jax.tree.unflatten(structure, found)

        mean = federated_map(join, directions, means)
        server = federated_map(_next_basis, server, means[0], total_weight)
        if remembers:
            memory = federated_map(_left_over, present, memory, matrices, known, right)
        measurements = {"num_clients": federated_count(present), "total_weight": total_weight}
        return server, memory, mean, {"power_sgd": measurements}

    return Aggregator(True, init, aggregate)


def _pays(leaf: Any, rank: int) -> bool:
    """Whether a leaf is sent by its factors."""
    rows, columns = matrix_shape(leaf.shape)
    return len(leaf.shape) > 1 and rank * (rows + columns) <= _MAX_SHARE * rows * columns


def _left(matrices: Any, bases: Any, weight: jax.Array) -> Any:
    return multiply(jax.tree.map(product, matrices, bases), weight)


def _orthonormal(matrices: Any) -> Any:
    return jax.tree.map(orthonormal, matrices)


def _products(matrices: Any, directions: Any) -> Any:
    return jax.tree.map(lambda x, p: product(x.T, p), matrices, directions)


def _product(directions: jax.Array, right: jax.Array) -> jax.Array:
    return product(directions, right.T)


def _next_basis(old: Any, new: Any, total_weight: jax.Array) -> Any:
    """What the next round begins with; after a round of nobody what this one began with."""
    return jax.tree.map(lambda a, b: jnp.where(total_weight > 0, a, b), new, old)


def _left_over(present: jax.Array, old: Any, matrices: Any, directions: Any, right: Any) -> Any:
    """What the projection left out, of clients that take part."""

    def one(old: jax.Array, x: jax.Array, p: jax.Array, r: jax.Array) -> jax.Array:
        return jnp.where(present, x - _product(p, r), old)

    return jax.tree.map(one, old, matrices, directions, right)
