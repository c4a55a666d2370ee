"""An algorithm of federated learning: a pair of pure functions around one typed program.

    algorithm = client work x aggregator (with its codec) x server optimiser

`federated_learning` composes the three; the files in `algorithms/` say which three.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.aggregators.base import Aggregator
from fedjax_core.aggregators.contract import checked
from fedjax_core.compression.base import Codec
from fedjax_core.compression.downlinks import Downlink, plain
from fedjax_core.datasets.cohort import Cohort
from fedjax_core.datasets.federated import FederatedDataset
from fedjax_core.datasets.resident import DeviceDataset
from fedjax_core.errors import ArgumentError
from fedjax_core.execution.compiling import compiler_options, jit
from fedjax_core.execution.computation import Computation, federated_computation
from fedjax_core.execution.config import HOST_DRIVEN, Execution
from fedjax_core.language import inference, types
from fedjax_core.language.placements import CLIENTS, SERVER
from fedjax_core.language.tracing import Value
from fedjax_core.language.types import FederatedType, SequenceType, TensorType
from fedjax_core.language.values import Federated
from fedjax_core.learning.checks import (
    check_cohort,
    check_devices,
    check_key,
    check_lanes,
    check_state,
    select_features,
)
from fedjax_core.learning.client_work import ClientWork, injected_hyperparams
from fedjax_core.learning.communication import Communication, itemise
from fedjax_core.learning.evaluation import check_examples
from fedjax_core.learning.many_rounds import (
    Source,
    make_many,
    make_many_by_host,
    run_rounds,
    source_of,
)
from fedjax_core.learning.memory import (
    check_memory,
    check_remembered,
    has_memory,
    place_state,
    put_memory,
    stack_memory,
    take_memory,
)
from fedjax_core.learning.models import Model
from fedjax_core.learning.rounds import Memory, Parts, Round, State, strong, trace_round

if TYPE_CHECKING:
    import optax  # half of the time that importing the library would take


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
      init: `(key, num_clients=None) -> state`. The number of clients of the dataset is needed where
        clients remember something from round to round.
      update: `(state, cohort) -> (state, metrics)`, one round. Pure; it may be called inside `jit`,
        `vmap` over states and `scan`. Outside of JAX transformations it checks the cohort on the
        host first.
      computation: the round as a federated computation, for the model's own input types.
      run: `(state, dataset, sampler, *, num_rounds, rounds_per_dispatch=None) -> (state, metrics)`,
        many rounds, see `Run`.
      execution: how rounds run.
      with_execution: `(execution) -> algorithm`, the same that runs another way.
      compiled: `() -> descriptions` of the programs that were compiled so far, one for each shape
        of cohorts.
    """

    init: Callable[..., State]
    update: Callable[[State, Cohort], tuple[State, Metrics]]
    computation: Computation
    run: "Run"
    execution: Execution
    with_execution: Callable[[Execution], "Algorithm"]
    compiled: Callable[[], list[str]]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """Many rounds, several of them in each compiled program; `run` of an `Algorithm`.

    Attributes:
      prepare: `(state, dataset) -> (state, source)`: checks both, and makes a state to donate.
      many: the rounds of one dispatch, see `many_rounds`.
    """

    prepare: Callable[[State, Any], tuple[State, Source]]
    many: Callable[..., tuple[State, Metrics]]

    def __call__(
        self,
        state: State,
        dataset: FederatedDataset | DeviceDataset,
        sampler: Callable[[int], Any],
        *,
        num_rounds: int,
        rounds_per_dispatch: int | None = None,
    ) -> tuple[State, Metrics]:
        """Runs rounds ``state.round, state.round + 1, ...`` of clients that `sampler` draws.

        The same as as many calls of `update` with ``dataset.cohort(sampler(r))``: on CPU, bit for
        bit. Between dispatches the host only draws clients, while the device computes; it reads
        nothing back before the end. Ctrl-C ends the run after the dispatch in progress.

        Args:
          state: to begin with; it stays usable.
          dataset: a `DeviceDataset` (``dataset.on_device()``), from which rounds gather their
            examples on the device, or one in the memory of the host (or on disk, memory-mapped),
            of which each dispatch is sent the rows that it needs.
          sampler: from the number of a round to the ids of its clients; a pure function. Where it
            has a method `positions`, as those of `sampling` do, that is asked instead.
          num_rounds: how many.
          rounds_per_dispatch: how many rounds one compiled program runs at most. The result does
            not depend on it. By default 64, or fewer where their examples take more than 256 MiB.

        Returns:
          The state after the last round, and the metrics of all rounds: NumPy arrays with a leading
          axis of rounds. After Ctrl-C these are as many as ``state.round`` has gone on.

        Raises:
          FederatedTypeError: a state, a dataset or a sampler that is none.
          ArgumentError: a number of rounds below 0, or of rounds in a dispatch below 1; a state
            that was given away, or examples on devices that the round does not run on.
          DataError: examples that do not fit the model.
          DeviceMemoryError: the examples of a dispatch, or the copies of the model, do not fit.
        """
        state, source = self.prepare(state, dataset)
        return run_rounds(self.many, state, source, sampler, num_rounds, rounds_per_dispatch)


def federated_learning(
    model: Model,
    client_work: ClientWork,
    aggregator: Aggregator,
    server_optimizer: "optax.GradientTransformation",
    *,
    broadcast_codec: Codec | Downlink | None = None,
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
      broadcast_codec: encodes the model on its way down, a codec or what `anchored` and `replica`
        make of one; None sends it raw.
      execution: how the program runs.

    Raises:
      ArgumentError: for parts that do not fit together.
    """
    sender = plain(broadcast_codec) if isinstance(broadcast_codec, Codec) else broadcast_codec
    parts = Parts(model, client_work, aggregator, server_optimizer, sender)
    _check_parts(parts, execution)
    parts = parts._replace(aggregator=checked(parts.aggregator))
    make_state = jax.jit(_initializer(parts))
    expected, member = jax.eval_shape(make_state, jax.eval_shape(lambda: jax.random.key(0)))
    computations = _ComputationCache(parts)
    compiled: dict[str, None] = {}
    element = types.to_type(dict(model.input_spec))
    remembered = inference.infer_type(member)
    own = computations.for_types(inference.infer_type(expected), remembered, element)

    def init(key: jax.Array, num_clients: int | None = None) -> State:
        check_key(key)
        check_memory(member, num_clients, execution)
        state, memory = make_state(key)
        return state._replace(clients=stack_memory(memory, num_clients, execution))

    def run(state: State, cohort: Cohort) -> tuple[State, Metrics]:
        examples, memory = cohort.sequence(), take_memory(state.clients, cohort, execution)
        element = cast(SequenceType, inference.infer_type(examples)).element
        bare = state._replace(clients=())
        computation = computations.for_types(inference.infer_type(bare), remembered, element)
        at_clients = (
            (examples, cohort.uid, memory) if has_memory(member) else (examples, cohort.uid)
        )
        args = (Federated(bare, SERVER), *(Federated(x, CLIENTS) for x in at_clients))
        result, ledger = computation.lower(execution)(*args, valid=cohort.valid)
        values = jax.tree.map(lambda x: x.value, result, is_leaf=lambda x: isinstance(x, Federated))
        communication = itemise(computation.program_run_by(execution), ledger)
        if values.catch_up:
            communication.broadcast["catch_up"] = values.catch_up
        metrics = Metrics(values.train, values.clients, values.aggregator, communication)
        clients = put_memory(state.clients, cohort, values.memory, execution)
        compiled.setdefault(_describe_shapes(cohort))
        return values.state._replace(clients=clients), metrics

    is_host_driven = execution.mode in HOST_DRIVEN
    donated = (0,) if execution.donate else ()
    options = lambda: compiler_options(own.program, execution.platform)  # noqa: E731
    run_round = run if is_host_driven else jit(run, options, donate_argnums=donated)

    @functools.wraps(run)
    def update(state: State, cohort: Cohort) -> tuple[State, Metrics]:
        check_state(expected, state)
        cohort = select_features(model, cohort)
        check_cohort(model, cohort)
        check_remembered(member, state.clients, cohort)
        check_devices(state, cohort.examples, execution)
        check_lanes(expected.params, cohort.num_clients, execution)
        return run_round(place_state(state, execution), cohort)

    def run_one_of_many(state: State, cohort: Cohort) -> tuple[State, Metrics]:
        check_lanes(expected.params, cohort.num_clients, execution)
        return run(state, cohort)

    run_many = (
        make_many_by_host(run_one_of_many)
        if is_host_driven
        else make_many(run_one_of_many, options)
    )

    def prepare(state: State, dataset: Any) -> tuple[State, Source]:
        check_state(expected, state)
        source = source_of(dataset, model.input_spec)
        check_examples(model, source.dataset.examples, where="run: the dataset's examples")
        check_remembered(member, state.clients, source.dataset)
        check_devices(state, source.examples, execution)
        return jax.tree.map(jnp.copy, place_state(state, execution)), source

    def with_execution(execution: Execution) -> Algorithm:
        return federated_learning(*parts[:-1], broadcast_codec=broadcast_codec, execution=execution)

    many = Run(prepare, run_many)
    return Algorithm(init, update, own, many, execution, with_execution, lambda: list(compiled))


def _describe_shapes(cohort: Cohort) -> str:
    """What a program for cohorts of these shapes is for."""
    rows = jax.tree.leaves(cohort.examples)[0].shape[0]
    return (
        f"{cohort.num_clients} clients of at most {cohort.capacity} examples out of {rows:,} rows"
    )


def _check_parts(parts: Parts, execution: Execution) -> None:
    import optax

    wanted: list[tuple[str, Any, type | tuple[type, ...]]] = [
        ("model", parts.model, Model),
        ("aggregator", parts.aggregator, Aggregator),
        ("server_optimizer", parts.server_optimizer, optax.GradientTransformation),
        ("execution", execution, Execution),
    ]
    if parts.downlink is not None:
        wanted.append(("broadcast_codec", parts.downlink, (Codec, Downlink)))
    for name, value, kind in wanted:
        if not isinstance(value, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            expected = " or ".join(each.__name__ for each in kinds)
            by_name = "; `downlink_preset` and `preset` make those with a name"
            remedy = by_name if name == "broadcast_codec" else ""
            raise ArgumentError(f"Expected {name} to be of type {expected}, got {value!r}{remedy}.")


def _initializer(parts: Parts) -> Callable[[jax.Array], tuple[State, Memory]]:
    """The function from a key to the state, and to what one client remembers at first."""
    _, client_work, aggregator, server_optimizer, downlink = parts

    def init(key: jax.Array) -> tuple[State, Memory]:
        seed = jax.random.fold_in(key, 0)
        params = parts.initialize(seed)
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        aggregator_state, aggregator_memory = aggregator.init(template)
        work_state, work_memory = client_work.init(params)
        sender, receiver_memory = ((), ())
        if downlink is not None:
            sender, receiver_memory = downlink.init(parts.initialize, seed)
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
            downlink=sender,
        )
        memory = Memory(work_memory, aggregator_memory, receiver_memory)
        return jax.tree.map(strong, state), jax.tree.map(strong, memory)

    return init


class _ComputationCache:
    """The round's computation for each type of state and example that it meets."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._computations: dict[tuple[types.Type, ...], Computation] = {}
        self._lock = threading.Lock()

    def for_types(self, state: types.Type, memory: types.Type, element: types.Type) -> Computation:
        """The computation for a state, a client's memory and examples of these types."""
        key = state, memory, element
        with self._lock:
            if key not in self._computations:
                self._computations[key] = self._trace(*key)
            return self._computations[key]

    def _trace(self, state: types.Type, memory: types.Type, element: types.Type) -> Computation:
        def federated_round(state: Value, examples: Value, uid: Value) -> Round:
            return trace_round(self._parts, state, examples, uid)

        def remembering(state: Value, examples: Value, uid: Value, memory: Value) -> Round:
            return trace_round(self._parts, state, examples, uid, memory)

        parameters = (
            FederatedType(state, SERVER),
            FederatedType(SequenceType(element), CLIENTS),
            FederatedType(TensorType(np.uint32, (2,)), CLIENTS),
        )
        if inference.is_empty(memory):
            return federated_computation(federated_round, *parameters)
        remembering.__name__ = federated_round.__name__
        return federated_computation(remembering, *parameters, FederatedType(memory, CLIENTS))
