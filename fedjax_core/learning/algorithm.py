"""An algorithm of federated learning: a pair of pure functions around one typed program.

    algorithm = client work x aggregator (with its codec) x server optimiser

`federated_learning` composes the three; the files in `algorithms/` say which three.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_core.aggregators.base import Aggregator
from fedjax_core.compression.base import Codec
from fedjax_core.compression.edges import PlacedKeys, downlink
from fedjax_core.datasets.cohort import Cohort
from fedjax_core.errors import ArgumentError, DataError, FederatedTypeError
from fedjax_core.execution.computation import Computation, federated_computation
from fedjax_core.execution.config import Execution
from fedjax_core.language import types
from fedjax_core.language.operators import (
    federated_broadcast,
    federated_map,
    federated_mean,
    federated_sum,
    federated_value,
)
from fedjax_core.language.placements import CLIENTS, SERVER
from fedjax_core.language.tracing import Value
from fedjax_core.language.types import FederatedType, SequenceType, TensorType
from fedjax_core.language.values import Federated
from fedjax_core.learning.client_work import (
    ClientOutput,
    ClientWork,
    injected_hyperparams,
    with_hyperparams,
)
from fedjax_core.learning.communication import Communication, itemise
from fedjax_core.learning.evaluation import check_examples
from fedjax_core.learning.metrics import finish as finish_metrics
from fedjax_core.learning.models import Model

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
      hyperparams: what may be swept: `{"client": {...}, "server": {...}}`, from `optax.inject_hyperparams`.
      key: the key that every round's key is folded from.
    """

    params: Any
    round: jax.Array
    optimizer: Any
    aggregator: Any
    client_work: Any
    hyperparams: dict[str, Any]
    key: jax.Array


class Metrics(NamedTuple):
    """What only a person needs to know of a round.

    Attributes:
      train: over all examples of the clients that counted: loss, the model's metrics, num_examples, num_batches.
      clients: int32 counts: `num_clients` in the cohort, `num_participants` whose update counted, and those
        left out: `num_empty`, `num_non_finite`, `num_not_weighted` (weight zero or negative, or not finite).
        `update_rejected` is 1 if the aggregate was not finite and the state was kept.
      aggregator: measurements, by the part of the aggregator.
      communication: this round's bits, by row.
    """

    train: dict[str, jax.Array]
    clients: dict[str, jax.Array]
    aggregator: dict[str, Any]
    communication: Communication


class Algorithm(NamedTuple):
    """A federated algorithm.

    Attributes:
      init: `(key) -> state`.
      update: `(state, cohort) -> (state, metrics)`, one round. Pure; it may be called inside `jit`, `vmap` over
        states and `scan`. Outside of JAX transformations it checks the cohort on the host first.
      computation: the round as a federated computation, for the model's own input types.
    """

    init: Callable[[jax.Array], State]
    update: Callable[[State, Cohort], tuple[State, Metrics]]
    computation: Computation


class Screened(NamedTuple):
    """A client's output after the check of what counts."""

    output: ClientOutput
    counts: dict[str, jax.Array]


class _Round(NamedTuple):
    """The result of the typed program."""

    state: Any
    train: Any
    clients: Any
    aggregator: Any


def federated_learning(
    model: Model,
    client_work: ClientWork,
    aggregator: Aggregator,
    server_optimizer: optax.GradientTransformation,
    *,
    broadcast_codec: Codec | None = None,
    execution: Execution = Execution(),  # noqa: B008 - frozen
) -> Algorithm:
    """Composes client work, an aggregator and a server optimiser to an algorithm.

    A round: broadcast the model; each client works on it; a client whose update is not finite, or whose weight is
    not positive, counts for nothing; aggregate; one step of the server optimiser with the aggregate as its
    gradient. A round without a participant, or whose aggregate is not finite, leaves the state as it was but for
    `round`.

    Args:
      model: what is trained.
      client_work: what clients do.
      aggregator: how their updates become one.
      server_optimizer: any optax optimiser.
      broadcast_codec: encodes the model on its way down; None sends it raw.
      execution: how the program runs.

    Raises:
      ArgumentError: for parts that do not fit together.
    """
    _check_parts(model, aggregator, broadcast_codec)
    init = _initializer(model, client_work, aggregator, server_optimizer)
    parts = _Parts(model, client_work, aggregator, server_optimizer, broadcast_codec)
    state_type = types.infer_type(jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0))))
    computations = _ComputationCache(parts, FederatedType(state_type, SERVER))
    own = computations.for_element(types.to_type(dict(model.input_spec)))

    def run(state: State, cohort: Cohort) -> tuple[State, Metrics]:
        examples = cohort.sequence()
        computation = computations.for_element(types.infer_type(examples).element)
        lowered = computation.lower(execution)
        args = (
            Federated(state, SERVER),
            Federated(examples, CLIENTS),
            Federated(cohort.uid, CLIENTS),
        )
        result, ledger = lowered(*args, valid=cohort.valid)
        values = jax.tree.map(lambda x: x.value, result, is_leaf=lambda x: isinstance(x, Federated))
        communication = itemise(computation.program, ledger)
        return values.state, Metrics(values.train, values.clients, values.aggregator, communication)

    donated = (0,) if execution.donate else ()
    run_round = run if execution.mode == "reference" else jax.jit(run, donate_argnums=donated)

    @functools.wraps(run)
    def update(state: State, cohort: Cohort) -> tuple[State, Metrics]:
        cohort = _select_features(model, cohort)
        _check_cohort(model, cohort)
        return run_round(state, cohort)

    return Algorithm(init, update, own)


class _Parts(NamedTuple):
    """What a round is made of."""

    model: Model
    client_work: ClientWork
    aggregator: Aggregator
    server_optimizer: optax.GradientTransformation
    broadcast_codec: Codec | None


def _check_parts(model: Any, aggregator: Any, broadcast_codec: Any) -> None:
    for name, value, kind in (("model", model, Model), ("aggregator", aggregator, Aggregator)):
        if not isinstance(value, kind):
            raise ArgumentError(f"Expected {name} to be of type {kind.__name__}, got {value!r}.")
    if broadcast_codec is not None and not isinstance(broadcast_codec, Codec):
        raise ArgumentError(f"Expected broadcast_codec to be a codec or None, got {broadcast_codec!r}.")


def _initializer(
    model: Model,
    client_work: ClientWork,
    aggregator: Aggregator,
    server_optimizer: optax.GradientTransformation,
) -> Callable[[jax.Array], State]:
    def init(key: jax.Array) -> State:
        params = jax.tree.map(jnp.asarray, model.init(jax.random.fold_in(key, 0)))
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        aggregator_state, aggregator_memory = aggregator.init(template)
        work_state, work_memory = client_work.init(params)
        if jax.tree.leaves((aggregator_memory, work_memory)):
            raise ArgumentError("Expected client work and an aggregator without memory at the clients.")
        optimizer = server_optimizer.init(params)
        hyperparams = {
            "client": client_work.hyperparams(params),
            "server": injected_hyperparams(optimizer),
        }
        state = State(
            params=params,
            round=jnp.int32(0),
            optimizer=optimizer,
            aggregator=aggregator_state,
            client_work=work_state,
            hyperparams=hyperparams,
            key=jax.random.fold_in(key, 1),
        )
        return jax.tree.map(jnp.asarray, state)

    return init


class _ComputationCache:
    """The round's computation for each type of example that it meets."""

    def __init__(self, parts: _Parts, state_type: FederatedType) -> None:
        self._parts = parts
        self._state_type = state_type
        self._computations: dict[types.Type, Computation] = {}
        self._lock = threading.Lock()

    def for_element(self, element: types.Type) -> Computation:
        """The computation for examples of type `element`."""
        with self._lock:
            if element not in self._computations:
                self._computations[element] = self._trace(element)
            return self._computations[element]

    def _trace(self, element: types.Type) -> Computation:
        def federated_round(state: Value, examples: Value, uid: Value) -> _Round:
            return _trace_round(self._parts, state, examples, uid)

        return federated_computation(
            federated_round,
            self._state_type,
            FederatedType(SequenceType(element), CLIENTS),
            FederatedType(TensorType(np.uint32, (2,)), CLIENTS),
        )


def _trace_round(parts: _Parts, state: Value, examples: Value, uid: Value) -> _Round:
    """One round, written with the operators."""
    keys = _round_keys(state, uid)
    params = _send_params(parts.broadcast_codec, keys, state.params)
    context = _send(federated_map(parts.client_work.prepare, state.client_work, state.params), "context")
    hyperparams = _send(state.hyperparams["client"], "hyperparams")

    def work(
        key: jax.Array, context: Any, params: Any, hyperparams: Any, examples: Any
    ) -> ClientOutput:
        return parts.client_work.work(key, (), context, params, hyperparams, examples)[1]

    output = federated_map(work, keys.fold_in(_WORK).client, context, params, hyperparams, examples)
    screened = federated_map(screen, output)
    output, counts = screened.output, screened.counts
    aggregator_state, _, update, measurements = parts.aggregator.aggregate(
        keys.fold_in(_AGGREGATION),
        state.aggregator,
        federated_value((), CLIENTS),
        output.update,
        output.weight,
    )
    stats, counts = federated_sum((output.metrics, counts), name="metrics")
    work_state = _finish_work(parts.client_work, state.client_work, output)
    new_state, rejected = federated_map(
        _server_step(parts.server_optimizer), state, update, aggregator_state, work_state, counts
    )
    counts = federated_map(lambda counts, rejected: counts | {"update_rejected": rejected}, counts, rejected)
    return _Round(new_state, federated_map(finish_metrics, stats), counts, measurements)


def _round_keys(state: Value, uid: Value) -> PlacedKeys:
    """The round's key, and each client's, folded from its id: no position in the cohort matters."""
    round_key = federated_map(jax.random.fold_in, state.key, state.round)
    shared = federated_broadcast(round_key, name="seed")
    return PlacedKeys(round_key, shared, federated_map(client_key, shared, uid))


def client_key(key: jax.Array, uid: jax.Array) -> jax.Array:
    """A client's own key of a round: `key` folded with both words of its uid, uint32 `[2]`."""
    return jax.random.fold_in(jax.random.fold_in(key, uid[0]), uid[1])


def _send_params(codec: Codec | None, keys: PlacedKeys, params: Value) -> Value:
    if codec is None:
        return federated_broadcast(params, name="params")
    return downlink(codec, keys.fold_in(_DOWNLINK), params)


def _send(value: Value, name: str) -> Value:
    """Broadcasts `value`, or nothing at all if there is nothing in it."""
    t = value.type_signature
    if isinstance(t, FederatedType) and types.is_empty(t):
        return federated_value(types.template(t.member), CLIENTS)
    return federated_broadcast(value, name=name)


def _finish_work(client_work: ClientWork, server: Value, output: Value) -> Value:
    """Gives the mean of what the clients sent beside their updates to the client work."""
    if types.is_empty(output.extra.type_signature):
        return server
    present = federated_map(lambda weight: weight > 0, output.weight)
    mean = federated_mean(output.extra, present=present, name="extra")
    return federated_map(client_work.finish, server, mean)


def screen(output: ClientOutput) -> Screened:
    """Takes a client out of the round if its update is not finite or its weight is not positive.

    Its weight and its stats become zero, its update zeros, and it is counted under the reason.
    """
    is_finite = _all_finite(output.update)
    is_weighted = jnp.isfinite(output.weight) & (output.weight > 0)
    is_empty = output.metrics["num_examples"].total == 0
    counts_in = is_finite & is_weighted & ~is_empty
    keep = lambda x: jnp.where(counts_in, x, jnp.zeros_like(x))  # noqa: E731
    counts = {
        "num_clients": jnp.bool_(True),
        "num_participants": counts_in,
        "num_empty": is_empty,
        "num_non_finite": ~is_empty & ~is_finite,
        "num_not_weighted": ~is_empty & is_finite & ~is_weighted,
    }
    return Screened(
        jax.tree.map(keep, output), {name: x.astype(jnp.int32) for name, x in counts.items()}
    )


def _all_finite(tree: Any) -> jax.Array:
    leaves = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.bool_(True)


def _server_step(optimizer: optax.GradientTransformation) -> Callable[..., tuple[State, jax.Array]]:
    def server_step(
        state: State, update: Any, aggregator: Any, client_work: Any, counts: dict[str, jax.Array]
    ) -> tuple[State, jax.Array]:
        """One step of the server optimiser, or none if there is nothing sound to step along."""
        old = with_hyperparams(state.optimizer, state.hyperparams["server"])
        step, new = optimizer.update(update, old, state.params)
        params = optax.apply_updates(state.params, step)
        is_finite = _all_finite((update, params))
        is_accepted = is_finite & (counts["num_participants"] > 0)
        stepped = state._replace(
            params=params, optimizer=new, aggregator=aggregator, client_work=client_work
        )
        kept = jax.tree.map(lambda a, b: jnp.where(is_accepted, a, b), stepped, state)
        return kept._replace(round=state.round + 1), (~is_finite).astype(jnp.int32)

    return server_step


def _select_features(model: Model, cohort: Cohort) -> Cohort:
    """The cohort with only the features that the model takes."""
    if not isinstance(cohort, Cohort):
        raise FederatedTypeError(
            f"Expected a Cohort, as dataset.cohort(ids) makes it, got {type(cohort).__name__}."
        )
    known = {name: x for name, x in cohort.examples.items() if name in model.input_spec}
    return cohort if len(known) == len(cohort.examples) else _replace_examples(cohort, known)


def _replace_examples(cohort: Cohort, examples: dict[str, Any]) -> Cohort:
    return Cohort(
        examples, cohort.start, cohort.length, cohort.uid, cohort.index, cohort.valid, cohort.capacity
    )


def _check_cohort(model: Model, cohort: Cohort) -> None:
    """Checks names, shapes, dtypes and, where they are concrete, labels."""
    try:
        check_examples(model, cohort.examples, where="update: the cohort's examples")
    except DataError as error:
        raise _naming_client(error, model, cohort) from None


def _naming_client(error: DataError, model: Model, cohort: Cohort) -> DataError:
    labels = cohort.examples.get(model.label_key)
    if labels is None or model.num_classes is None or isinstance(labels, jax.core.Tracer):
        return error
    labels = np.asarray(labels)
    bad = np.flatnonzero((labels < 0) | (labels >= model.num_classes))
    if not len(bad):
        return error
    start, length = np.asarray(cohort.start), np.asarray(cohort.length)
    client = int(np.argmax((start <= bad[0]) & (bad[0] < start + length)))
    return DataError(
        f"{error} The row belongs to client {client} of the cohort, number "
        f"{int(np.asarray(cohort.index)[client])} of the dataset."
    )
