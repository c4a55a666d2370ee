"""One round as a typed program, written with the operators of the language.

keys      = fold the round's key, broadcast it, fold in each client's id
output    = client work on the broadcast model and each client's own examples
screened  = output, but for clients that are empty, not finite or not weighted
update    = aggregate(screened)
state     = server optimiser's step along the update, if it is sound
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_core.aggregators.base import Aggregator, is_present
from fedjax_core.bits import BitCount
from fedjax_core.compression.downlinks import Downlink, Sent
from fedjax_core.compression.edges import PlacedKeys
from fedjax_core.errors import FederatedTypeError, noted
from fedjax_core.language import inference
from fedjax_core.language.messages import sum_messages
from fedjax_core.language.operators import (
    federated_broadcast,
    federated_map,
    federated_mean,
    federated_sum,
    federated_value,
)
from fedjax_core.language.placements import CLIENTS
from fedjax_core.language.tracing import Value
from fedjax_core.language.types import FederatedType
from fedjax_core.learning.client_work import ClientOutput, ClientWork, with_hyperparams
from fedjax_core.learning.metrics import finish as finish_metrics
from fedjax_core.learning.models import Model

if TYPE_CHECKING:
    import optax  # half of the time that importing the library would take

# How a client fared, and the name under which the metrics count it.
STATUSES = ("num_participants", "num_empty", "num_non_finite", "num_not_weighted")

# What a key is folded with for each use of a round's randomness.
_WORK, _AGGREGATION, _DOWNLINK = 0, 1, 2


class State(NamedTuple):
    """What the next round needs.

    Attributes:
      params: the model's variables.
      round: int32 scalar, the number of rounds so far.
      optimizer: the server optimiser's state.
      aggregator: the aggregator's state.
      client_work: the client work's state at the server.
      hyperparams: what may be swept: `{"client": {...}, "server": {...}}`, from
        `optax.inject_hyperparams`.
      key: the key that every round's key is folded from.
      clients: what each client of the dataset remembers, a `Memory` of arrays
        ``[num_clients, ...]`` in the order of its `client_ids`; () if nothing.
      downlink: the state of what sends the model.
    """

    params: Any
    round: jax.Array
    optimizer: Any
    aggregator: Any
    client_work: Any
    hyperparams: dict[str, Any]
    key: jax.Array
    clients: Any = ()
    downlink: Any = ()


class Memory(NamedTuple):
    """What a client remembers from the last round that it took part in.

    Attributes:
      client_work: of its work, such as a control variate.
      aggregator: of the aggregator and its codec, such as the error it has not sent yet.
      downlink: of the models that it was sent, such as which was the last.
    """

    client_work: Any
    aggregator: Any
    downlink: Any


class Parts(NamedTuple):
    """What a round is made of."""

    model: Model
    client_work: ClientWork
    aggregator: Aggregator
    server_optimizer: "optax.GradientTransformation"
    downlink: Downlink | None

    def initialize(self, key: jax.Array) -> Any:
        """The model that everyone makes from the same seed."""
        with noted("In the model's `init`."):
            params = self.model.init(key)
        return jax.tree.map(strong, params)


class Screened(NamedTuple):
    """A client's output after the check of what counts.

    Attributes:
      output: all zeros if the client does not count.
      status: uint8 scalar, a position in `STATUSES`.
      memory: what the client work remembers, as it was before if the client does not count.
    """

    output: ClientOutput
    status: jax.Array
    memory: Any


class Round(NamedTuple):
    """The result of the typed program."""

    state: Any
    train: Any
    clients: Any
    aggregator: Any
    memory: Any
    catch_up: Any


def trace_round(
    parts: Parts, state: Value, examples: Value, uid: Value, memory: Value | None = None
) -> Round:
    """One round, written with the operators.

    Args:
      parts: of the algorithm.
      state: at the server, without what clients remember.
      examples: at the clients.
      uid: at the clients, uint32 `[2]`.
      memory: a `Memory` at the clients, None if they remember nothing.
    """
    work_memory, aggregator_memory, downlink_memory = _memories(memory)
    keys = _round_keys(state, uid)
    sent = _send_params(parts, keys, state, downlink_memory)
    context = _send(
        federated_map(parts.client_work.prepare, state.client_work, state.params), "context"
    )
    hyperparams = _send(state.hyperparams["client"], "hyperparams")

    def work(
        key: jax.Array, memory: Any, context: Any, params: Any, hyperparams: Any, examples: Any
    ) -> tuple[Any, ClientOutput]:
        return parts.client_work.work(key, memory, context, params, hyperparams, examples)

    key = keys.fold_in(_WORK).client
    new_memory, output = federated_map(
        work, key, work_memory, context, sent.value, hyperparams, examples
    )
    screened = federated_map(screen, output, work_memory, new_memory)
    output = screened.output
    aggregator_state, aggregator_memory, update, measurements = parts.aggregator.aggregate(
        keys.fold_in(_AGGREGATION),
        state.aggregator,
        aggregator_memory,
        output.update,
        output.weight,
    )
    _check_update(state.params, update)
    stats = federated_sum(output.metrics, name="metrics")
    received = _count_statuses(screened.status)
    work_state = _finish_work(parts.client_work, state.client_work, output)
    new_state, counts = federated_map(
        _server_step(parts.server_optimizer),
        state,
        update,
        aggregator_state,
        work_state,
        sent.server,
        received.count,
        received.total,
    )
    remembered = ()
    if memory is not None:
        remembered = Memory(screened.memory, aggregator_memory, sent.memory)
    catch_up = () if sent.catch_up is None else sent.catch_up
    train = federated_map(finish_metrics, stats)
    return Round(new_state, train, counts, measurements, remembered, catch_up)


def _memories(memory: Value | None) -> tuple[Value, Value, Value]:
    """What the parts of a `Memory` hold, at the clients."""
    if memory is None:
        nothing = federated_value((), CLIENTS)
        return nothing, nothing, nothing
    return memory.client_work, memory.aggregator, memory.downlink


def _check_update(params: Value, update: Value) -> None:
    """Raises unless the aggregate fits the model that it is to change."""
    expected, got = (cast(FederatedType, x.type_signature).member for x in (params, update))
    inference.check_same(expected, got, "the aggregator's value, which has to fit the model")


def _round_keys(state: Value, uid: Value) -> PlacedKeys:
    """The round's key, and each client's, folded from its id: no position in the cohort matters."""
    round_key = federated_map(jax.random.fold_in, state.key, state.round)
    shared = federated_broadcast(round_key, name="seed")
    return PlacedKeys(round_key, shared, federated_map(client_key, shared, uid))


def client_key(key: jax.Array, uid: jax.Array) -> jax.Array:
    """A client's own key of a round: `key` folded with both words of its uid, uint32 `[2]`."""
    return jax.random.fold_in(jax.random.fold_in(key, uid[0]), uid[1])


def _send_params(parts: Parts, keys: PlacedKeys, state: Value, memory: Value) -> Sent:
    if parts.downlink is None:
        return Sent(state.downlink, memory, federated_broadcast(state.params, name="params"))
    keys = keys.fold_in(_DOWNLINK)
    return parts.downlink.send(keys, parts.initialize, state.downlink, memory, state.params)


def _send(value: Value, name: str) -> Value:
    """Broadcasts `value`, or nothing at all if there is nothing in it."""
    t = value.type_signature
    if isinstance(t, FederatedType) and inference.is_empty(t):
        return federated_value(inference.template(t.member), CLIENTS)
    return federated_broadcast(value, name=name)


def _finish_work(client_work: ClientWork, server: Value, output: Value) -> Value:
    """Gives the mean of what the clients sent beside their updates to the client work."""
    if inference.is_empty(output.extra.type_signature):
        return server
    mean = federated_mean(output.extra, present=is_present(output.weight), name="extra")
    return federated_map(client_work.finish, server, mean)


def screen(output: ClientOutput, old: Any, new: Any) -> Screened:
    """Takes a client out of the round if its update is not finite or its weight is not positive.

    A loss or metric that is not finite counts as an update that is not.

    Its weight and its stats become zero, its update zeros, and its status is the reason.

    Args:
      output: of its work.
      old: what it remembered before.
      new: what its work would remember.
    """
    _check_memory(old, new)
    is_finite = _all_finite((output.update, output.metrics))
    is_weighted = jnp.isfinite(output.weight) & (output.weight > 0)
    is_empty = output.metrics["num_examples"].total == 0
    counts_in = is_finite & is_weighted & ~is_empty
    keep = lambda x: lax.select(counts_in, x, lax.full_like(x, 0))  # noqa: E731
    reasons = jnp.stack([counts_in, is_empty, ~is_finite, ~is_weighted])
    memory = jax.tree.map(lambda a, b: lax.select(counts_in, a, b), new, old)
    return Screened(jax.tree.map(keep, output), jnp.argmax(reasons).astype(jnp.uint8), memory)


def _check_memory(old: Any, new: Any) -> None:
    """Raises unless the next round can be given what the client work returned."""
    found = inference.difference(old, new)
    if found:
        raise FederatedTypeError(
            f"Expected `work` of the client work to return memory as it was given: {found}; keep "
            "what `init` returns in structure, dtype and shape."
        )


def _count_statuses(status: Value) -> Value:
    """How many clients there are, and how many fared in which way: one byte from each.

    Returns:
      `Received`, whose `total` maps `STATUSES` to int32 scalars.
    """

    def receive(status: jax.Array) -> tuple[dict[str, jax.Array], tuple[()]]:
        return {name: jnp.int32(status == i) for i, name in enumerate(STATUSES)}, ()

    return sum_messages(
        status,
        codec="status",
        receive=receive,
        bits=lambda status: BitCount.of(8),
        name="metrics",
    )


def _all_finite(tree: Any) -> jax.Array:
    finite = [_is_finite(x) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return functools.reduce(lax.bitwise_and, finite, jnp.bool_(True))


def _is_finite(x: jax.Array) -> jax.Array:
    is_real = jnp.issubdtype(x.dtype, jnp.floating)
    # The bare operations are traced in a fraction of the time of those of jax.numpy.
    every = lax.is_finite(x) if is_real else jnp.isfinite(x)
    if x.ndim > 1:  # by columns first: XLA's CPU backend has naive loops for all axes at once
        every = lax.optimization_barrier(lax.reduce_and(every, tuple(range(x.ndim - 1))))
    return lax.reduce_and(every, tuple(range(every.ndim)))


def strong(x: Any) -> jax.Array:
    """An array whose dtype is its own: a weak one would make the second round compile again."""
    x = jnp.asarray(x)
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return x if is_key else lax.convert_element_type(x, x.dtype)


# One function for each optimiser: JAX then knows it when a round is traced for other examples.
@functools.lru_cache(maxsize=64)
def _server_step(
    optimizer: "optax.GradientTransformation",
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    def server_step(
        state: State,
        update: Any,
        aggregator: Any,
        client_work: Any,
        downlink: Any,
        num_clients: jax.Array,
        statuses: dict[str, jax.Array],
    ) -> tuple[State, dict[str, jax.Array]]:
        """One step of the server optimiser, or none if there is nothing sound to step along."""
        import optax

        old = with_hyperparams(state.optimizer, state.hyperparams["server"])
        step, new = optimizer.update(update, old, state.params)
        params = optax.apply_updates(state.params, step)
        is_finite = _all_finite((update, params))
        is_accepted = is_finite & (statuses["num_participants"] > 0)
        stepped = state._replace(
            params=params, optimizer=new, aggregator=aggregator, client_work=client_work
        )
        kept = jax.tree.map(lambda a, b: lax.select(is_accepted, a, b), stepped, state)
        counts = {"num_clients": num_clients, **statuses, "update_rejected": jnp.int32(~is_finite)}
        # What was sent was sent, whatever came back.
        return kept._replace(round=state.round + 1, downlink=downlink), counts

    return server_step
