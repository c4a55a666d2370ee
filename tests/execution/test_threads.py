"""Threads: any number of them may trace, compile and run different programs at once."""

import concurrent.futures
import threading

import jax.numpy as jnp
import numpy as np

import fedjax_core as fc

NUM_THREADS = 8
NUM_CALLS = 200

FLOAT = fc.FederatedType(np.float32, fc.CLIENTS)
INT = fc.FederatedType(np.int32, fc.CLIENTS)
SERVER_FLOAT = fc.FederatedType(np.float32, fc.SERVER)


def sum_of_scaled(factor):
    """`{float32}@CLIENTS -> float32@SERVER`: the factor times the sum."""

    def body(x):
        return fc.federated_sum(fc.federated_map(lambda x: factor * x, x))

    return fc.federated_computation(body, FLOAT), lambda values: factor * sum(values)


def mean_above(factor):
    def body(x, threshold):
        limit = fc.federated_broadcast(threshold)
        return fc.federated_mean(
            fc.federated_map(lambda x, t: (x > t).astype(jnp.float32), x, limit)
        )

    computation = fc.federated_computation(body, FLOAT, SERVER_FLOAT)
    run = lambda values: computation(values, float(factor))  # noqa: E731
    return run, lambda values: np.float32(np.mean([x > factor for x in values]))


def extremes(factor):
    def body(x):
        spread = fc.federated_map(jnp.subtract, fc.federated_max(x), fc.federated_min(x))
        return fc.federated_map(lambda s: s + factor, spread)

    expected = lambda values: max(values) - min(values) + factor  # noqa: E731
    return fc.federated_computation(body, FLOAT), expected


def fold(factor):
    def body(x):
        def accumulate(state, x):
            return state + factor * x

        return fc.federated_aggregate(x, 0.0, accumulate, jnp.add, lambda s: s + 1)

    return fc.federated_computation(body, FLOAT), lambda values: factor * sum(values) + 1


PROGRAMS = (sum_of_scaled, mean_above, extremes, fold)


def wrong_answers(seed, start, num_calls):
    """Traces a program of its own, thrice, and runs it for changing cohorts; counts mistakes."""
    start.wait()
    factor = seed + 2
    make = PROGRAMS[seed % len(PROGRAMS)]
    run, expected = make(factor)
    mistakes = 0
    for call in range(num_calls):
        if call % 80 == 79:
            run, expected = make(factor)
        values = [float((seed * 7 + call * 3 + i) % 11) for i in range(1 + (call + seed) % 3)]
        mistakes += float(run(values)) != expected(values)
    return mistakes


def test_threads_trace_and_run_different_programs():
    """Eight threads, eight programs, 200 calls each: no wrong answer."""
    start = threading.Barrier(NUM_THREADS)
    with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        counts = pool.map(lambda seed: wrong_answers(seed, start, NUM_CALLS), range(NUM_THREADS))
        assert list(counts) == [0] * NUM_THREADS


def test_two_threads_define_programs_again_and_again():
    """J-63: two threads, two programs, each of them traced anew 30 times: 0 wrong of 60."""
    start = threading.Barrier(2)

    def work(seed):
        start.wait()
        mistakes = 0
        for _ in range(30):
            computation, expected = (sum_of_scaled, fold)[seed](seed + 2)
            text = str(computation.program)
            inner = ("sum[value]", "aggregate[value]")
            mistakes += inner[seed] not in text or inner[1 - seed] in text
        return mistakes + (float(computation([1.0, 2.0])) != expected([1.0, 2.0]))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(work, range(2))) == 0


def test_threads_inside_of_a_body():
    """The program under construction belongs to the thread that traces it, not to all of them."""
    errors = []

    def body(x):
        def elsewhere():
            try:
                fc.federated_sum(x)
            except fc.errors.ContextError as error:
                errors.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return fc.federated_sum(x)

    assert fc.federated_computation(body, INT)([1, 2, 3]) == 6
    assert len(errors) == 1


def test_a_polymorphic_computation_is_traced_once_for_all_threads():
    traced = []

    @fc.federated_computation
    def total(x):
        traced.append(str(x.type_signature))
        return fc.federated_sum(x)

    start = threading.Barrier(NUM_THREADS)

    def work(seed):
        start.wait()
        dtype = (np.float32, np.int32)[seed % 2]
        return float(total(fc.Federated(np.full(3, seed, dtype), fc.CLIENTS)).value) == 3 * seed

    with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        assert all(pool.map(work, range(NUM_THREADS)))
    assert sorted(traced) == ["{float32}@CLIENTS", "{int32}@CLIENTS"]
