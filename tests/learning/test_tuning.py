"""What `explain` says and what `tune` chooses."""

import json

import jax
import numpy as np
import optax
import pytest

import fedjax_core as fc
from fedjax_core import datasets, models
from fedjax_core.errors import ArgumentError, FederatedTypeError
from fedjax_core.learning.tuning import examples_executed


@pytest.fixture(scope="module")
def cohort():
    sizes = [9, 1, 4, 0]
    rows = {
        f"client {k}": {
            "image": np.zeros((size, 28, 28, 1), np.uint8),
            "label": np.zeros(size, np.int32),
        }
        for k, size in enumerate(sizes)
    }
    data = datasets.from_clients(rows)
    return data.cohort(data.client_ids)


def make(model, **kwargs):
    return fc.algorithms.fed_avg(
        model,
        client_optimizer=optax.sgd(0.1),
        batch_size=4,
        execution=fc.Execution(**kwargs),
    )


def test_explain_says_what_runs_and_why(cohort):
    text = fc.explain(make(models.linear(), lanes=2), cohort)
    assert "mode          streamed: one loop over waves" in text
    assert "(automatic)" in text
    assert "lanes         2: as given" in text
    assert "waves         2 on each device" in text
    assert "14 needed, 20 executed (padding x1.43)" in text  # 2 x 9 + 2 x 1
    assert "convolutions  none" in text
    assert "compiled      nothing yet" in text
    record = json.loads(text.splitlines()[-1].removeprefix("to repeat     "))
    assert fc.Execution.from_dict(record) == fc.Execution(mode="streamed", lanes=2)


def test_explain_counts_convolutions_and_programs(cohort):
    algorithm = make(models.emnist_cnn())
    assert "lanes         1: one after the other" in fc.explain(algorithm, cohort)
    assert "re-bound to NHWC x HWIO" in fc.explain(algorithm, cohort)


def test_programs_are_listed_once_compiled(cohort):
    algorithm = make(models.linear())
    state = algorithm.init(jax.random.key(0))
    for _ in range(3):
        state, _ = algorithm.update(state, cohort)
    assert algorithm.compiled() == ["4 clients of at most 16 examples out of 16 rows"]


def test_tune_returns_a_candidate_with_its_measurements(cohort):
    algorithm = make(models.linear())
    state = algorithm.init(jax.random.key(0))
    best = fc.tune(algorithm, state, cohort, num_repeats=1)
    assert best.tuning is not None
    tried = {(row.mode, row.lanes) for row in best.tuning.rows}
    assert tried == {("streamed", 1), ("streamed", 4), ("unrolled", 1), ("dispatched", 1)}
    fastest = min(best.tuning.rows, key=lambda row: row.seconds)
    assert (best.mode, best.lanes) == (fastest.mode, fastest.lanes)
    tuned = algorithm.with_execution(best)
    assert "measured by tune" in fc.explain(tuned, cohort)
    assert "ms a round" in fc.explain(tuned, cohort)
    # Written to a file and read again, in another process on another day: the same bits.
    chosen = fc.Execution.from_dict(json.loads(json.dumps(best.to_dict())))
    assert chosen == best
    same, _ = algorithm.with_execution(chosen).update(state, cohort)
    ours, _ = tuned.update(state, cohort)
    jax.tree.map(np.testing.assert_array_equal, ours.params, same.params)


def test_a_candidate_that_fails_is_left_out(cohort):
    algorithm = make(models.linear())
    state = algorithm.init(jax.random.key(0))

    def fail(*_):
        raise MemoryError("out of memory")

    def with_execution(execution):
        made = algorithm.with_execution(execution)
        return made._replace(update=fail) if execution.lanes == 4 else made

    candidates = [fc.Execution(lanes=4), fc.Execution(lanes=2)]
    failing = algorithm._replace(with_execution=with_execution)
    best = fc.tune(failing, state, cohort, candidates=candidates, num_repeats=1)
    assert best.lanes == 2
    assert best.tuning is not None
    assert best.tuning.rows[0].failure == "MemoryError: out of memory"
    assert "failed: MemoryError" in str(best.tuning)
    with pytest.raises(ArgumentError, match="expected a candidate that runs"):
        fc.tune(failing, state, cohort, candidates=candidates[:1])


def test_misuse_is_named(cohort):
    algorithm = make(models.linear())
    state = algorithm.init(jax.random.key(0))
    with pytest.raises(ArgumentError, match="num_repeats"):
        fc.tune(algorithm, state, cohort, num_repeats=0)
    with pytest.raises(ArgumentError, match="executions as candidates"):
        fc.tune(algorithm, state, cohort, candidates=[])
    with pytest.raises(ArgumentError, match="pass a list"):
        fc.tune(algorithm, state, cohort, candidates=fc.Execution())
    with pytest.raises(FederatedTypeError, match="Cohort"):
        fc.explain(algorithm, {"image": 1})


@pytest.mark.parametrize(
    ("lanes", "num_shards", "executed"), [(1, 1, 20), (2, 1, 22), (4, 1, 36), (2, 2, 34)]
)
def test_executed_examples(lanes, num_shards, executed):
    lengths = np.array([1, 9, 2, 8])
    assert examples_executed(lengths, lanes, num_shards) == (20, executed)


def test_log_normal_clients_step_through_little_padding():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.0, 1.2, 200), 1, 600).astype(int)
    needed, executed = examples_executed(lengths, lanes=8)
    assert executed <= 1.3 * needed
