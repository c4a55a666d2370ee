"""An algorithm of federated learning: a pair of pure functions around one typed program.

    algorithm = client work x aggregator (with its codec) x server optimiser

`federated_learning` composes the three; the files in `algorithms/` say which three.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from fedjax_core.aggregators.base import Aggregator
from fedjax_core.compression.base import Codec
from fedjax_core.datasets.cohort import Cohort
from fedjax_core.errors import ArgumentError, DataError, FederatedTypeError
from fedjax_core.execution.computation import Computation, federated_computation
from fedjax_core.execution.config import Execution
from fedjax_core.language import inference, types
from fedjax_core.language.placements import CLIENTS, SERVER
from fedjax_core.language.tracing import Value
from fedjax_core.language.types import FederatedType, SequenceType, TensorType
from fedjax_core.language.values import Federated
from fedjax_core.learning.client_work import ClientWork, injected_hyperparams
from fedjax_core.learning.communication import Communication, itemise
from fedjax_core.learning.evaluation import check_examples
from fedjax_core.learning.models import Model
from fedjax_core.learning.rounds import Parts, Round, State, trace_round


class Metrics(NamedTuple):
    """What only a person needs to know of a round.

    Attributes:
      train: over all examples of the clients that counted: loss, the model's metrics, num_examples,
        num_batches.
      clients: int32 counts: `num_clients` in the cohort, `num_participants` whose update counted,
        and those left out: `num_empty`, `num_non_finite`, `num_not_weighted` (weight zero or
        negative, or not finite). `update_rejected` is 1 if the aggregate was not finite and the
        state was kept.
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
      update: `(state, cohort) -> (state, metrics)`, one round. Pure; it may be called inside `jit`,
        `vmap` over states and `scan`. Outside of JAX transformations it checks the cohort on the
        host first.
      computation: the round as a federated computation, for the model's own input types.
    """

    init: Callable[[jax.Array], State]
    update: Callable[[State, Cohort], tuple[State, Metrics]]
    computation: Computation


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

    A round: broadcast the model; each client works on it; a client whose update is not finite, or
    whose weight is not positive, counts for nothing; aggregate; one step of the server optimiser
    with the aggregate as its gradient. A round without a participant, or whose aggregate is not
    finite, leaves the state as it was but for `round`.

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
    parts = Parts(model, client_work, aggregator, server_optimizer, broadcast_codec)
    some_key = jax.eval_shape(lambda: jax.random.key(0))
    state_type = inference.infer_type(jax.eval_shape(init, some_key))
    computations = _ComputationCache(parts, FederatedType(state_type, SERVER))
    own = computations.for_element(types.to_type(dict(model.input_spec)))

    def run(state: State, cohort: Cohort) -> tuple[State, Metrics]:
        examples = cohort.sequence()
        computation = computations.for_element(
            cast(SequenceType, inference.infer_type(examples)).element
        )
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


def _check_parts(model: Any, aggregator: Any, broadcast_codec: Any) -> None:
    for name, value, kind in (("model", model, Model), ("aggregator", aggregator, Aggregator)):
        if not isinstance(value, kind):
            raise ArgumentError(f"Expected {name} to be of type {kind.__name__}, got {value!r}.")
    if broadcast_codec is not None and not isinstance(broadcast_codec, Codec):
        raise ArgumentError(
            f"Expected broadcast_codec to be a codec or None, got {broadcast_codec!r}."
        )


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
            raise ArgumentError(
                "Expected client work and an aggregator without memory at the clients."
            )
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

    def __init__(self, parts: Parts, state_type: FederatedType) -> None:
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
        def federated_round(state: Value, examples: Value, uid: Value) -> Round:
            return trace_round(self._parts, state, examples, uid)

        return federated_computation(
            federated_round,
            self._state_type,
            FederatedType(SequenceType(element), CLIENTS),
            FederatedType(TensorType(np.uint32, (2,)), CLIENTS),
        )


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
        examples,
        cohort.start,
        cohort.length,
        cohort.uid,
        cohort.index,
        cohort.valid,
        cohort.capacity,
    )


def _check_cohort(model: Model, cohort: Cohort) -> None:
    """Checks names, shapes, dtypes and, where they are concrete, labels."""
    try:
        check_examples(model, cohort.examples, where="update: the cohort's examples")
    except DataError as error:
        raise _naming_client(error, model, cohort) from None


def _naming_client(error: DataError, model: Model, cohort: Cohort) -> DataError:
    labels = cohort.examples.get(model.label_key)
    if labels is None or model.num_classes is None or isinstance(labels, Tracer):
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
