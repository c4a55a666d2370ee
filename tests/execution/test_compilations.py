"""Tracing and compiling happen once, and threads do not disturb each other."""

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np

import fedjax_core as fc

F32 = fc.FederatedType(np.float32, fc.CLIENTS)


def clients(value):
    return fc.Federated(value, fc.CLIENTS)


@fc.federated_computation(F32)
def mean(x):
    return fc.federated_mean(x)


def test_a_local_function_runs_exactly_once():
    """At the definition of the program; no way to run it calls the Python function again."""
    calls = []

    def square(x):
        calls.append(x)
        return x * x

    @fc.federated_computation(F32)
    def total(x):
        again = fc.federated_map(square, x)
        return fc.federated_sum(fc.federated_map(square, x)), fc.federated_mean(again)

    assert len(calls) == 1
    for num_clients in (1, 3):
        for mode in ("reference", "stacked", "streamed"):
            total.lower(fc.Execution(mode=mode))(clients(np.ones(num_clients, np.float32)))
    total([1.0, 2.0])
    assert len(calls) == 1


def test_a_local_function_of_sequences_runs_once_for_each_capacity():
    calls = []

    def add(rows):
        calls.append(rows.capacity)
        return rows.reduce(0.0, jnp.add)

    rows = fc.FederatedType(fc.SequenceType(np.float32), fc.CLIENTS)
    total = fc.federated_computation(
        lambda rows: fc.federated_sum(fc.federated_map(add, rows)), rows
    )
    assert calls == [2]
    for cohort in ([[1.0, 2.0, 3.0]], [[1.0], [1.0, 2.0, 3.0, 4.0]], [[0.0] * 5], [[0.0] * 8]):
        assert float(total(cohort)) == np.sum(np.concatenate(cohort))
    assert calls == [2, 4, 8]


def count_compilations(function):
    """How many programs XLA compiled while `function` ran."""
    names = []
    listener = lambda name, _, **__: names.append(name)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        function()
    finally:
        jax.monitoring.clear_event_listeners()
    return sum("backend_compile" in name for name in names)


def test_cohorts_of_one_shape_compile_once():
    """Called with lists, other values of the same shapes use the compiled program."""
    rows = fc.FederatedType(fc.SequenceType(np.float32), fc.CLIENTS)

    @fc.federated_computation(rows, F32)
    def total(rows, x):
        sums = fc.federated_map(lambda rows, x: rows.reduce(x, jnp.add), rows, x)
        return fc.federated_sum(sums)

    def cohort(seed):
        values = np.random.default_rng(seed).random((3, 4)).astype(np.float32)
        lengths = [2 + seed % 3, 4, 1]  # all within the same bucket of capacities
        return float(total([list(v[:n]) for v, n in zip(values, lengths, strict=True)], [0.0] * 3))

    assert count_compilations(lambda: cohort(0)) > 0
    assert count_compilations(lambda: [cohort(seed) for seed in (1, 2, 3)]) == 0


def test_the_reference_compiles_a_local_function_once():
    """Client by client, but not a compilation for each of them."""

    @fc.federated_computation(F32)
    def total(x):
        return fc.federated_sum(fc.federated_map(lambda x: jnp.sin(x) * 3, x))

    def cohort(num_clients):
        total.lower(fc.Execution(mode="reference"))(clients(np.ones(num_clients, np.float32)))

    cohort(2)
    assert count_compilations(lambda: cohort(2)) == 0


def test_jax_computations_compile_once():
    double = fc.jax_computation(lambda x: x * 2, np.float32)
    double(1.0)
    assert count_compilations(lambda: [double(float(i)) for i in range(5)]) == 0


def test_threads_do_not_disturb_each_other():
    """J-57, J-63: four threads define and run programs of different sizes at once."""

    def work(seed):
        num_clients = 1 + seed % 5
        values = np.arange(num_clients, dtype=np.float32) + seed
        kept = fc.federated_computation(
            lambda x: fc.federated_mean(
                fc.federated_map(lambda x: (x > seed).astype(jnp.float32), x)
            ),
            F32,
        )
        lanes = fc.Execution(lanes=1 + seed % 3)
        streamed = jax.jit(kept.lower(lanes))(clients(values))[0].value
        expected = np.mean(values > seed)
        return float(kept(list(map(float, values)))) == float(streamed) == np.float32(expected)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(24)))


def test_threads_share_one_computation():
    """The same computation, called from four threads with other cohort sizes."""

    def work(num_clients):
        return float(mean([float(i) for i in range(num_clients)])) == (num_clients - 1) / 2

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, [1, 2, 3, 4, 2, 3] * 4))


def test_valid_may_be_traced():
    """One compiled program serves every mask, and other kinds of truth values."""
    traces = []

    @jax.jit
    def value(x, valid):
        traces.append(1)
        return mean.lower(fc.Execution(lanes=2))(clients(x), valid=valid)

    x = np.float32([1, 2, 3])
    for valid in ([1, 0, 1], [0, 1, 0]):
        result, ledger = value(x, np.array(valid))
        assert float(result.value) == 2
        assert int(ledger[0]) == 32 * sum(valid)
    assert len(traces) == 1
