"""The training loop: sample a cohort, run a round, keep a record.

    for round in rounds:   ids = sampler(round);  cohort = dataset.cohort(ids)
                           state, metrics = algorithm.update(state, cohort)

The loop is the one place that reads numbers back to the host: once a round. It holds no randomness
of its own, so a run is a function of the initial state and the sampler.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fedjax_core.datasets.cohort import Cohort
from fedjax_core.datasets.federated import FederatedDataset
from fedjax_core.datasets.splits import Splits
from fedjax_core.errors import ArgumentError, FederatedTypeError, noted
from fedjax_core.learning.algorithm import Algorithm, State
from fedjax_core.learning.history import History, Numbers, RoundRecord, flat_numbers
from fedjax_core.learning.interrupts import deferred_interrupt
from fedjax_core.learning.writers import Writer

_LAST_NAMES = ("loss", "num_examples", "num_batches")


def train(
    algorithm: Algorithm,
    dataset: FederatedDataset,
    sampler: Callable[[int], Sequence[str]],
    *,
    num_rounds: int,
    key: jax.Array | None = None,
    state: State | None = None,
    evaluation: Callable[[Any], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
    writers: Iterable[Writer] = (),
    on_round: Callable[[State, RoundRecord], None] | None = None,
) -> tuple[State, History]:
    """Runs rounds of a federated algorithm.

    Round ``r`` trains on ``dataset.cohort(sampler(r))``; the first round is ``state.round``, so a
    state that was saved goes on where it stopped. Ctrl-C ends the run after the round in progress
    (a second one at once); either way the writers are closed, and the state and the history of the
    completed rounds are returned.

    Args:
      algorithm: the pair `init` and `update`, such as ``fed_avg(...)``.
      dataset: the clients' data.
      sampler: from the number of the round to the ids of its clients; a pure function.
      num_rounds: how many rounds to run, at least 0.
      key: a JAX key, from which `algorithm.init` makes the initial state. Give this or `state`.
      state: the state to begin with.
      evaluation: from ``state.params`` to a mapping of numbers, such as the test accuracy.
      evaluate_every: rounds between evaluations; with 0 there is only the one after the last round.
      writers: get each record, and are closed at the end, whatever happens.
      on_round: called with the state and the record after each round.

    Returns:
      The state after the last completed round, and the history.

    Raises:
      FederatedTypeError: `dataset` is no dataset (such as both parts of one), or `sampler` no
        function.
      ArgumentError: `key` and `state` are both given or both missing, or a number is negative.

    Example:
      >>> sampler = sampling.uniform(dataset, clients_per_round=10)  # doctest: +SKIP
      >>> state, history = train(  # doctest: +SKIP
      ...     algorithm, dataset, sampler, num_rounds=60, key=jax.random.key(0)
      ... )
    """
    _check_source(dataset, sampler)
    _check_count("num_rounds", num_rounds)
    _check_count("evaluate_every", evaluate_every)
    state = _initial_state(algorithm, dataset, key, state)
    first = int(jax.device_get(state.round))
    records: list[RoundRecord] = []
    writers = tuple(writers)
    with contextlib.ExitStack() as stack, contextlib.suppress(KeyboardInterrupt):
        stop = stack.enter_context(deferred_interrupt())
        for writer in writers:
            stack.callback(writer.close)
        while len(records) < num_rounds and not stop.is_set():
            number, done = first + len(records), len(records) + 1
            with noted(f"This happened in round {number}."):
                cohort = dataset.cohort(sampler(number))
                state, record = _run_round(algorithm, state, cohort, number, records)
                if evaluation and _is_due(done, num_rounds, evaluate_every):
                    record = record._replace(test=flat_numbers(dict(evaluation(state.params))))
            records.append(record)
            for writer in writers:
                writer.write(records[-1])
            if on_round:
                on_round(state, records[-1])
    return state, History(tuple(records), interrupted=len(records) < num_rounds)


def _initial_state(
    algorithm: Algorithm, dataset: FederatedDataset, key: jax.Array | None, state: State | None
) -> State:
    if key is not None and state is None:
        return algorithm.init(key, dataset.num_clients)
    if key is None and state is not None:
        return state
    got = "neither" if key is None else "both"
    raise ArgumentError(
        f"expected either `key` or `state`, got {got}: give `key` to begin, `state` to go on."
    )


def _check_source(dataset: Any, sampler: Any) -> None:
    if isinstance(dataset, Splits) or not hasattr(dataset, "cohort"):
        remedy = "pass its `.train`" if isinstance(dataset, Splits) else "see fedjax_core.datasets"
        raise FederatedTypeError(
            f"expected `dataset` to be a FederatedDataset, got {type(dataset).__name__}; {remedy}."
        )
    if not callable(sampler):
        raise FederatedTypeError(
            "expected `sampler` to be a function from the number of a round to client ids, such as "
            f"sampling.uniform(dataset, 10), got {type(sampler).__name__}."
        )


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise ArgumentError(f"expected `{name}` to be an integer of at least 0, got {value!r}.")


def _is_due(rounds_done: int, num_rounds: int, every: int) -> bool:
    return rounds_done == num_rounds or (every > 0 and rounds_done % every == 0)


def _run_round(
    algorithm: Algorithm, state: State, cohort: Cohort, number: int, records: Sequence[RoundRecord]
) -> tuple[State, RoundRecord]:
    """One round; its record counts the bits on from the last of `records`."""
    begin = time.perf_counter()
    state, metrics = algorithm.update(state, cohort)
    metrics = jax.device_get(metrics)
    seconds = time.perf_counter() - begin
    communication = metrics.communication
    broadcasted, aggregated = _bits_so_far(records)
    record = RoundRecord(
        round=number,
        train=_in_reading_order(flat_numbers(metrics.train)),
        broadcasted_bits=broadcasted + int(communication.broadcast_bits),
        aggregated_bits=aggregated + int(communication.aggregate_bits),
        communication=flat_numbers(
            {"broadcast": communication.broadcast, "aggregate": communication.aggregate}
        ),
        aggregator=flat_numbers(metrics.aggregator),
        clients=flat_numbers(metrics.clients),
        seconds=seconds,
    )
    return state, record


def _bits_so_far(records: Sequence[RoundRecord]) -> tuple[int, int]:
    return (records[-1].broadcasted_bits, records[-1].aggregated_bits) if records else (0, 0)


def _in_reading_order(numbers: Numbers) -> Numbers:
    """The user's metrics first, then loss and counts; a JAX dict comes back sorted by name."""
    own = {name: value for name, value in numbers.items() if name not in _LAST_NAMES}
    return own | {name: numbers[name] for name in _LAST_NAMES if name in numbers}
