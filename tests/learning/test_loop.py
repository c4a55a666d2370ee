import signal
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core import datasets
from fedjax_core.bits import BitCount
from fedjax_core.errors import ArgumentError, FederatedTypeError
from fedjax_core.learning.history import History, RoundRecord, flat_numbers
from fedjax_core.learning.interrupts import deferred_interrupt
from fedjax_core.learning.loop import train
from fedjax_core.learning.writers import Writer

DOWN, UP = 5_000_000_000, 7


class State(NamedTuple):
    params: jax.Array
    round: jax.Array


class Communication(NamedTuple):
    broadcast_bits: BitCount
    aggregate_bits: BitCount
    broadcast: dict
    aggregate: dict


class Metrics(NamedTuple):
    train: dict
    communication: Communication
    aggregator: dict
    clients: dict


@jax.jit
def update(state, cohort):
    """Adds the sum of the cohort to the params: simple enough to foretell every number."""
    rows = {"params": BitCount.of(DOWN)}, {"update": BitCount.of(UP)}
    metrics = Metrics(
        train={
            "accuracy": jnp.float32(0.5),
            "loss": state.params,
            "num_batches": jnp.int32(2),
            "num_examples": jnp.int32(3),
        },
        communication=Communication(BitCount.of(DOWN), BitCount.of(UP), *rows),
        aggregator={"clipping": {"norm": jnp.float32(1.5)}},
        clients={"num_clients": jnp.int32(cohort.shape[0])},
    )
    return State(state.params + cohort.sum(), state.round + 1), metrics


ALGORITHM = types.SimpleNamespace(
    init=lambda key, num_clients=None: State(jnp.float32(0), jnp.int32(0)), update=update
)
DATASET = types.SimpleNamespace(
    num_clients=5, cohort=lambda ids: jnp.asarray([float(name) for name in ids])
)


def sampler(number):
    return [str(number), "1"]


def run(**settings):
    settings = {"num_rounds": 3, "key": jax.random.key(0), **settings}
    return train(ALGORITHM, DATASET, sampler, **settings)


def test_rounds_follow_the_sampler_and_the_records_hold_plain_numbers():
    state, history = run()
    assert float(state.params) == (0 + 1) + (1 + 1) + (2 + 1)
    assert [record.round for record in history] == [0, 1, 2]
    assert [record.train["loss"] for record in history] == [0.0, 1.0, 3.0]
    assert not history.interrupted
    last = history[-1]
    assert (last.broadcasted_bits, last.aggregated_bits) == (3 * DOWN, 3 * UP)
    assert last.communication == {"broadcast/params": DOWN, "aggregate/update": UP}
    assert last.aggregator == {"clipping/norm": 1.5}
    assert last.clients == {"num_clients": 2}
    assert {type(value) for value in last.scalars().values()} <= {int, float}
    assert last.seconds > 0


def test_the_line_of_a_round_has_the_form_of_the_tutorial():
    record = RoundRecord(
        round=0,
        train={"accuracy": 0.092454836, "loss": 2.310193, "num_examples": 941, "num_batches": 51},
        broadcasted_bits=532_278_400,
        aggregated_bits=134_640_000,
    )
    assert record.line() == (
        "round  0, train_metrics=(accuracy=0.0925, loss=2.3102, num_examples=941, num_batches=51), "
        "broadcasted_bits=507.62Mibit, aggregated_bits=128.40Mibit"
    )
    tested = record._replace(round=12, test={"accuracy": 0.5})
    assert tested.line().startswith("round 12, train_metrics=(accuracy=0.0925")
    assert tested.line().endswith("aggregated_bits=128.40Mibit, test_metrics=(accuracy=0.5000)")


def test_counts_come_last_in_the_line_whatever_order_jax_gave_them():
    _, history = run(num_rounds=1)
    assert list(history[0].train) == ["accuracy", "loss", "num_examples", "num_batches"]


@pytest.mark.parametrize(("every", "tested"), [(0, [4]), (2, [1, 3, 4]), (1, [0, 1, 2, 3, 4])])
def test_evaluation_is_after_every_so_many_rounds_and_after_the_last(every, tested):
    _, history = run(
        num_rounds=5, evaluation=lambda params: {"score": params * 2}, evaluate_every=every
    )
    assert [record.round for record in history if record.test] == tested
    assert history.last_test() == {"score": 2.0 * (1 + 2 + 3 + 4 + 5)}


def test_a_state_goes_on_where_it_stopped():
    halfway, _ = run(num_rounds=2)
    resumed, history = train(ALGORITHM, DATASET, sampler, num_rounds=1, state=halfway)
    whole, _ = run(num_rounds=3)
    assert history[0].round == 2
    assert float(resumed.params) == float(whole.params)


def test_no_rounds_leave_the_initial_state():
    state, history = run(num_rounds=0)
    assert float(state.params) == 0
    assert len(history) == 0
    assert history.last_test() == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"key": None}, "neither"),
        ({"state": State(jnp.float32(0), jnp.int32(0))}, "both"),
        ({"num_rounds": -1}, "num_rounds"),
        ({"num_rounds": 1.5}, "num_rounds"),
        ({"evaluate_every": -2}, "evaluate_every"),
    ],
)
def test_arguments_are_checked(settings, message):
    with pytest.raises(ArgumentError, match=message):
        run(**settings)


def collecting_writer(seen):
    return Writer(lambda record: seen.append(record.round), lambda: seen.append("closed"))


def test_writers_get_each_record_and_are_closed():
    seen, rounds = [], []
    run(writers=[collecting_writer(seen)], on_round=lambda state, record: rounds.append(record))
    assert seen == [0, 1, 2, "closed"]
    assert [record.round for record in rounds] == [0, 1, 2]


def test_control_c_ends_the_run_after_the_round_in_progress():
    seen = []

    def press(state, record):
        if record.round == 1:
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    state, history = run(num_rounds=9, writers=[collecting_writer(seen)], on_round=press)
    assert history.interrupted
    assert seen == [0, 1, "closed"]
    assert float(state.params) == 1 + 2
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_keyboard_interrupt_inside_a_round_drops_that_round_alone():
    def interrupted_sampler(number):
        if number == 2:
            raise KeyboardInterrupt
        return sampler(number)

    seen = []
    state, history = train(
        ALGORITHM,
        DATASET,
        interrupted_sampler,
        num_rounds=9,
        key=jax.random.key(0),
        writers=[collecting_writer(seen)],
    )
    assert history.interrupted
    assert seen == [0, 1, "closed"]
    assert int(state.round) == 2


def test_an_error_names_the_round_and_closes_the_writers():
    def failing_sampler(number):
        if number == 1:
            raise ArgumentError("no such cohort")
        return sampler(number)

    seen = []
    with pytest.raises(ArgumentError) as caught:
        train(
            ALGORITHM,
            DATASET,
            failing_sampler,
            num_rounds=3,
            key=jax.random.key(0),
            writers=[collecting_writer(seen)],
        )
    assert caught.value.__notes__ == ["This happened in round 1."]
    assert seen == [0, "closed"]


def test_the_second_control_c_does_not_wait():
    with deferred_interrupt() as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert interrupted.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_program_that_handles_control_c_itself_keeps_its_handler():
    pressed = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        with deferred_interrupt() as interrupted:
            signal.raise_signal(signal.SIGINT)
        assert pressed == [signal.SIGINT]
        assert not interrupted.is_set()
    finally:
        signal.signal(signal.SIGINT, previous)


def test_flat_numbers_joins_names_and_keeps_large_counts_exact():
    tree = {"a": {"b": jnp.float32(0.25)}, "bits": BitCount.of(2**63 + 1), "n": jnp.array([1, 2])}
    assert flat_numbers(tree) == {"a/b": 0.25, "bits": 2**63 + 1, "n/0": 1, "n/1": 2}


def test_a_history_is_a_sequence():
    records = tuple(RoundRecord(number, {}, 0, 0) for number in range(3))
    history = History(records)
    assert history[1:] == records[1:]
    assert list(reversed(history)) == list(reversed(records))


def test_rounds_may_be_counted_by_numpy():
    assert len(run(num_rounds=np.int64(2))[1]) == 2


def test_both_parts_of_a_dataset_are_not_one():
    whole = datasets.from_clients({"a": {"x": [1, 2, 3]}})
    splits = datasets.holdout(whole, 0.4)
    with pytest.raises(FederatedTypeError, match=r"got Splits; pass its `\.train`"):
        train(ALGORITHM, splits, sampler, num_rounds=1, key=jax.random.key(0))
    with pytest.raises(FederatedTypeError, match="got list"):
        train(ALGORITHM, whole, ["a"], num_rounds=1, key=jax.random.key(0))
