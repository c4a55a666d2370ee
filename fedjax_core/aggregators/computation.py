"""An aggregator on its own, as a federated computation: to test it or to use it directly."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.aggregators.base import Aggregator
from fedjax_core.aggregators.contract import checked
from fedjax_core.compression.edges import PlacedKeys
from fedjax_core.errors import ArgumentError
from fedjax_core.execution.computation import Computation, federated_computation
from fedjax_core.language import inference, types
from fedjax_core.language.operators import federated_broadcast, federated_map, federated_value
from fedjax_core.language.placements import CLIENTS, SERVER
from fedjax_core.language.tracing import Value
from fedjax_core.language.types import FederatedType, TensorType


class Aggregated(NamedTuple):
    """What an aggregator gives.

    Attributes:
      state: of the aggregator, for the next round.
      value: the aggregate.
      measurements: scalars, by the part of the aggregator that measured them.
    """

    state: Any
    value: Any
    measurements: Any


def as_computation(aggregator: Aggregator, value_type: Any) -> tuple[Any, Computation]:
    """Wraps an aggregator without client memory in a federated computation.

    Args:
      aggregator: what to run.
      value_type: the type of one client's value, as `to_type` takes it.

    Returns:
      `(state, computation)`: the initial state, and a computation
      `(state@SERVER, key@SERVER, {value}@CLIENTS, {float32}@CLIENTS) -> Aggregated` of state, round
      key, values and weights. Client `i` of the list draws its randomness from the key folded with
      `i`, which is sent as a value of its own: `{uint32}@CLIENTS`, the last argument.

    Raises:
      ArgumentError: if the aggregator keeps memory at the clients.

    Examples:
      >>> from fedjax_core.aggregators.sums import mean
      >>> state, average = as_computation(mean(), np.float32)
      >>> key = jax.random.key(0)
      >>> float(average(state, key, [1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [0, 1, 2]).value)
      1.6666666269302368
    """
    aggregator = checked(aggregator)
    member = types.to_type(value_type)
    state, memory = aggregator.init(inference.template(member))
    if jax.tree.leaves(memory):
        raise ArgumentError(
            "Expected an aggregator without memory at the clients; use it in an algorithm."
        )
    key_type = TensorType(jax.eval_shape(lambda: jax.random.key(0)).dtype)

    def aggregate(
        state: Value, key: Value, value: Value, weight: Value, client: Value
    ) -> Aggregated:
        shared = federated_broadcast(key, name="seed")
        keys = PlacedKeys(key, shared, federated_map(jax.random.fold_in, shared, client))
        no_memory = federated_value(memory, CLIENTS)
        state, _, result, measurements = aggregator.aggregate(keys, state, no_memory, value, weight)
        return Aggregated(state, result, measurements)

    state = jax.tree.map(jnp.asarray, state)
    return state, federated_computation(
        aggregate,
        FederatedType(inference.infer_type(state), SERVER),
        FederatedType(key_type, SERVER),
        FederatedType(member, CLIENTS),
        FederatedType(TensorType(np.float32), CLIENTS),
        FederatedType(TensorType(np.uint32), CLIENTS),
    )
