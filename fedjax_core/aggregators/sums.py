"""Sums and means, with or without a codec on the edge.

mean             = multiply by the weight + sum(codec) + sum of the weights + divide
unweighted_mean  = sum(codec) + count of those present + divide
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_core.aggregators.base import Aggregator, Measurements, is_present
from fedjax_core.compression.base import Codec, check_codec
from fedjax_core.compression.checks import flag
from fedjax_core.compression.edges import PlacedKeys, check_adds, uplink
from fedjax_core.errors import ArgumentError, CodecError
from fedjax_core.language.operators import (
    divide,
    federated_count,
    federated_map,
    federated_sum,
    multiply,
)
from fedjax_core.language.tracing import Value


def sum(codec: Codec | None = None, *, secure: bool = False) -> Aggregator:
    """The sum of the clients' values, weights ignored.

    Args:
      codec: what encodes each client's value on the way up; None sends it raw.
      secure: whether the server sees the sum of the messages alone; see `compression.uplink`.

    Returns:
      An aggregator that measures `{"sum": {"num_clients"}}`.
    """
    init = _codec_init(codec, secure, jnp.number, "numbers to sum")

    def aggregate(
        keys: PlacedKeys, server: Value, memory: Value, value: Value, weight: Value
    ) -> tuple[Value, Value, Value, Measurements]:
        present = is_present(weight)
        server, memory, total = _sum(codec, secure, keys, server, memory, value, present)
        return server, memory, total, {"sum": {"num_clients": federated_count(present)}}

    return Aggregator(False, init, aggregate)


def mean(codec: Codec | None = None, *, secure: bool = False) -> Aggregator:
    """The weighted mean: ``sum_k w_k x_k / sum_k w_k``, zero if the weights sum to zero.

    The value is multiplied by its weight before the codec, so that one common step of a quantiser
    spends the bits where they count.

    Args:
      codec: what encodes each client's weighted value on the way up; None sends it raw.
      secure: whether the server sees the sum of the messages alone; see `compression.uplink`.

    Returns:
      An aggregator that measures `{"mean": {"num_clients", "total_weight"}}`.
    """

    def aggregate(
        keys: PlacedKeys, server: Value, memory: Value, value: Value, weight: Value
    ) -> tuple[Value, Value, Value, Measurements]:
        present = is_present(weight)
        weighted = federated_map(multiply, value, weight)
        server, memory, total = _sum(codec, secure, keys, server, memory, weighted, present)
        total_weight = federated_sum(weight, present=present, name="weight")
        measurements = {"num_clients": federated_count(present), "total_weight": total_weight}
        return server, memory, federated_map(divide, total, total_weight), {"mean": measurements}

    init = _codec_init(codec, secure, jnp.inexact, "floating-point numbers to average")
    return Aggregator(True, init, aggregate)


def unweighted_mean(codec: Codec | None = None, *, secure: bool = False) -> Aggregator:
    """The plain mean over the clients that take part, zero if there are none.

    Args:
      codec: what encodes each client's value on the way up; None sends it raw.
      secure: whether the server sees the sum of the messages alone; see `compression.uplink`.

    Returns:
      An aggregator that measures `{"unweighted_mean": {"num_clients"}}`.
    """

    def aggregate(
        keys: PlacedKeys, server: Value, memory: Value, value: Value, weight: Value
    ) -> tuple[Value, Value, Value, Measurements]:
        present = is_present(weight)
        server, memory, total = _sum(codec, secure, keys, server, memory, value, present)
        count = federated_count(present)
        average = federated_map(divide, total, count)
        return server, memory, average, {"unweighted_mean": {"num_clients": count}}

    init = _codec_init(codec, secure, jnp.inexact, "floating-point numbers to average")
    return Aggregator(False, init, aggregate)


def _codec_init(codec: Codec | None, secure: bool, kind: Any, expected: str) -> Any:
    if codec is not None:
        check_codec(codec, "of the updates, or None")
    flag("secure", secure)
    if secure and codec is None:
        raise ArgumentError(
            "Expected a codec that makes integers for a secure sum, got None; pass codec=, such as "
            "fixed_point(8)."
        )
    if codec is not None and secure:
        check_adds(codec)
    if codec is not None and not codec.traits.independent and kind is jnp.inexact:
        raise CodecError(
            f"Expected a codec whose errors average out, got {codec.name}: all clients would round "
            "with one seed, and the mean would keep the error of a single one; let each draw from "
            "its own key, without common_seed."
        )

    def init(template: Any) -> tuple[Any, Any]:
        check_kind(template, kind, expected)
        return ((), ()) if codec is None else codec.init(template)

    return init


def check_kind(template: Any, kind: Any, expected: str) -> None:
    """Raises unless all leaves are of a kind.

    Raises:
      ArgumentError: naming one that is not.
    """
    for path, leaf in jax.tree.leaves_with_path(template):
        if not jnp.issubdtype(leaf.dtype, kind):
            raise ArgumentError(
                f"Expected {expected}, got {leaf.dtype} at "
                f"{jax.tree_util.keystr(path) or 'the root'}; convert it with astype."
            )


def _sum(
    codec: Codec | None,
    secure: bool,
    keys: PlacedKeys,
    server: Value,
    memory: Value,
    value: Value,
    present: Value,
) -> tuple[Value, Value, Value]:
    if codec is None:
        return server, memory, federated_sum(value, present=present, name="update")
    return uplink(codec, keys, server, memory, value, present=present, secure=secure)
