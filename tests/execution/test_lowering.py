"""The lowered functions: accumulation, padding, edge sizes, compilations, threads, transforms."""

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fedjax_core as fc
from fedjax_core.compression.edges import PlacedKeys, downlink, uplink
from fedjax_core.errors import ArgumentError, FederatedTypeError
from fedjax_core.language.operators import broadcast_message

F32 = fc.FederatedType(np.float32, fc.CLIENTS)
BOOL = fc.FederatedType(np.bool_, fc.CLIENTS)
KEY = fc.infer_type(jax.random.key(0))
VECTOR = fc.FederatedType((np.float32, [3]), fc.CLIENTS)
MODES = [
    fc.Execution(mode="reference"),
    fc.Execution(mode="stacked"),
    *(fc.Execution(mode="streamed", lanes=lanes) for lanes in (1, 2, 5)),
]
each_mode = pytest.mark.parametrize("execution", MODES, ids=lambda e: f"{e.mode}-{e.lanes}")
compiled_mode = pytest.mark.parametrize("execution", MODES[1:], ids=lambda e: f"{e.mode}-{e.lanes}")


def clients(value):
    return fc.Federated(value, fc.CLIENTS)


def run(computation, execution, *args, **settings):
    result, ledger = computation.lower(execution)(*args, **settings)
    return result, [int(bits) for bits in ledger]


@fc.federated_computation(F32)
def mean(x):
    return fc.federated_mean(x)


@fc.federated_computation(F32, F32)
def weighted_mean(x, weight):
    return fc.federated_mean(x, weight)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("lanes", [1, 100, "auto"])
def test_half_precision_is_summed_in_float32(dtype, lanes):
    """1000 ones: bfloat16 alone would stop at 256."""
    add = fc.federated_computation(fc.federated_sum, fc.FederatedType(dtype, fc.CLIENTS))
    total, _ = run(add, fc.Execution(lanes=lanes), clients(np.ones(1000, dtype)))
    assert total.value.dtype == dtype
    assert float(total.value) == 1000


@each_mode
def test_sums_of_small_halves_do_not_vanish(execution):
    """1 + 300 x 2**-10 in float16: each term alone is below half an ulp of the running sum."""
    values = np.full(301, 2**-12, np.float16)
    values[0] = 2
    add = fc.federated_computation(fc.federated_sum, fc.FederatedType(np.float16, fc.CLIENTS))
    assert float(run(add, execution, clients(values))[0].value) == np.float16(2 + 300 / 4096)


@each_mode
def test_small_integers_wrap_only_at_the_end(execution):
    """int8: partial sums of 100 + 100 - 150 leave the range, the sum does not."""
    add = fc.federated_computation(fc.federated_sum, fc.FederatedType(np.int8, fc.CLIENTS))
    total, ledger = run(add, execution, clients(np.array([100, 100, -100, -50], np.int8)))
    assert (total.value.dtype, int(total.value)) == (np.int8, 50)
    assert ledger == [4 * 8]


@each_mode
def test_means_by_small_integer_weights(execution):
    """The sum of int8 weights 100 + 100 would wrap to -56 in the weights' own dtype."""
    weight = fc.FederatedType(np.int8, fc.CLIENTS)
    average = fc.federated_computation(fc.federated_mean, F32, weight)
    args = clients(np.float32([1, 2])), clients(np.array([100, 100], np.int8))
    result, ledger = run(average, execution, *args)
    assert float(result.value) == 1.5
    assert ledger == [64, 64]


@each_mode
def test_means_of_halves_by_many_examples(execution):
    """The weights of 50 clients sum to 120,000, which float16 does not hold."""
    values = fc.FederatedType(np.float16, fc.CLIENTS)
    average = fc.federated_computation(fc.federated_mean, values, F32)
    args = clients(np.full(50, 0.5, np.float16)), clients(np.full(50, 2400, np.float32))
    result, _ = run(average, execution, *args)
    assert (result.value.dtype, float(result.value)) == (np.float16, 0.5)


@each_mode
def test_nan_of_padded_clients_stays_out(execution):
    """An invalid client does not exist for sums, means, counts and the ledger."""

    @fc.federated_computation(F32)
    def everything(x):
        fold = fc.federated_aggregate(x, 0.0, jnp.add, jnp.add, lambda total: total)
        return fc.federated_sum(x), fc.federated_mean(x), fc.federated_count(), fold

    x = clients(np.float32([1, np.nan, 5, np.inf]))
    result, ledger = run(everything, execution, x, valid=np.array([True, False, True, False]))
    assert [float(r.value) for r in result] == [6.0, 3.0, 2.0, 6.0]
    assert ledger == [64, 64, 64]


@each_mode
def test_nan_of_absent_clients_stays_out(execution):
    """A client that is not present sends nothing, and its value may be anything."""

    @fc.federated_computation(F32, F32, BOOL)
    def everything(x, weight, present):
        average = fc.federated_mean(x, weight, present=present)
        return fc.federated_sum(x, present=present), average, fc.federated_count(present)

    x, weight = np.float32([1, np.nan, 5]), np.float32([3, np.nan, 1])
    args = clients(x), clients(weight), clients(np.array([True, False, True]))
    result, ledger = run(everything, execution, *args)
    assert [float(r.value) for r in result] == [6.0, 2.0, 2.0]
    assert ledger == [64, 64, 64]


@each_mode
def test_zero_weight_hides_a_value_that_is_not_finite(execution):
    args = clients(np.float32([1, np.nan, 5, np.inf])), clients(np.float32([1, 0, 1, 0]))
    result, ledger = run(weighted_mean, execution, *args)
    assert float(result.value) == 3.0
    assert ledger == [128, 128]


@each_mode
def test_zero_total_weight_gives_zero(execution):
    """C-69, J-03: we choose zero, not NaN."""
    args = clients(np.float32([1, 2, 3])), clients(np.zeros(3, np.float32))
    assert float(run(weighted_mean, execution, *args)[0].value) == 0.0


@each_mode
def test_zero_clients(execution):
    """Sums, means and counts of nobody are zero; client results are empty; nothing is sent."""

    @fc.federated_computation(VECTOR, fc.FederatedType(np.float32, fc.SERVER))
    def everything(x, scale):
        scaled = fc.federated_map(jnp.multiply, x, fc.federated_broadcast(scale))
        zero = np.full(3, 7, np.float32)
        fold = fc.federated_aggregate(x, zero, jnp.add, jnp.add, lambda total: total)
        return fc.federated_sum(x), fc.federated_mean(x), fc.federated_count(), fold, scaled

    nobody = clients(np.zeros((0, 3), np.float32))
    result, ledger = run(everything, execution, nobody, fc.Federated(np.float32(2), fc.SERVER))
    total, average, count, fold, scaled = (np.asarray(r.value) for r in result)
    assert total.tolist() == average.tolist() == [0, 0, 0]
    assert (int(count), fold.tolist(), scaled.shape) == (0, [7, 7, 7], (0, 3))
    assert ledger == [0] * len(everything.program.edges)


@each_mode
def test_client_results_may_also_be_used_in_a_later_round_trip(execution):
    """A returned client value is needed again, client by client, after the first aggregation."""

    @fc.federated_computation(F32)
    def centred(x):
        doubled = fc.federated_map(lambda x: 2 * x, x)
        average = fc.federated_broadcast(fc.federated_mean(doubled))
        moved = fc.federated_map(lambda d, m: d - m, doubled, average)
        return doubled, moved, fc.federated_sum(fc.federated_map(jnp.square, moved))

    result, ledger = run(centred, execution, clients(np.float32([1, 2, 6])))
    doubled, moved, total = (np.asarray(r.value).tolist() for r in result)
    assert (doubled, moved, total) == ([2, 4, 12], [-4, -2, 6], 56)
    assert ledger == [96, 96, 96]


def test_what_comes_from_the_server_alone_is_computed_once():
    """A map of a broadcast value is no work of the clients, whatever its type promises."""
    calls = []

    def expensive(x):
        jax.debug.callback(lambda: calls.append(1))
        return x * 2

    @fc.federated_computation(F32, fc.FederatedType(np.float32, fc.SERVER))
    def scaled(x, scale):
        at_clients = fc.federated_map(expensive, fc.federated_broadcast(scale))
        return fc.federated_map(jnp.multiply, x, at_clients), at_clients

    args = clients(np.float32([1, 2, 3])), fc.Federated(np.float32(2), fc.SERVER)
    (result, at_clients), _ = run(scaled, fc.Execution(lanes=1), *args)
    jax.effects_barrier()
    assert len(calls) == 1
    assert result.value.tolist() == [4, 8, 12]
    assert at_clients.value.tolist() == [4, 4, 4]


@each_mode
def test_a_broadcast_decoded_with_mapped_context_is_counted(execution):
    """Keys folded at the clients are no longer all-equal by type; the message is the same."""
    codec = fc.compression.uniform_quantize(8, min_size=2)
    key_type = fc.FederatedType(fc.infer_type(jax.random.key(0)), fc.SERVER)

    @fc.federated_computation(VECTOR, key_type, fc.FederatedType((np.float32, [3]), fc.SERVER))
    def receive(x, key, params):
        shared = fc.federated_broadcast(key, name="seed")
        received = downlink(codec, PlacedKeys(key, shared, shared).fold_in(7), params)
        return fc.federated_sum(fc.federated_map(jnp.add, x, received))

    args = (
        clients(np.zeros((4, 3), np.float32)),
        fc.Federated(jax.random.key(1), fc.SERVER),
        fc.Federated(np.float32([0, 1, 255]), fc.SERVER),
    )
    result, ledger = run(receive, execution, *args)
    np.testing.assert_allclose(result.value, [0, 4, 1020], rtol=1e-6)
    assert ledger == [4 * 64, 4 * (3 * 8 + 64), 4 * 96]


@each_mode
def test_messages_may_be_decoded_with_a_client_s_own_values(execution):
    """A broadcast whose decoding depends on the client still sends one message to each."""

    @fc.federated_computation(F32, fc.FederatedType(np.float32, fc.SERVER))
    def receive(x, server):
        return broadcast_message(
            server,
            codec="times x",
            receive=lambda x, message: x * message,
            bits=lambda message: fc.BitCount.of(5),
            context=(x,),
        )

    args = clients(np.float32([1, 2, 3])), fc.Federated(np.float32(10), fc.SERVER)
    result, ledger = run(receive, execution, *args)
    assert (result.value.tolist(), ledger) == ([10, 20, 30], [15])


@each_mode
def test_order_of_waves_does_not_reach_the_results(execution):
    """Clients are sorted by their number of examples inside; results come back in their order."""

    @fc.federated_computation(fc.FederatedType(fc.SequenceType(np.float32), fc.CLIENTS), F32)
    def add(rows, x):
        return fc.federated_map(lambda rows, x: rows.reduce(x, jnp.add), rows, x)

    lengths = np.array([1, 3, 0, 2, 3], np.int32)
    starts = np.array([0, 1, 4, 4, 6], np.int32)
    pool = fc.Sequence(np.arange(9, dtype=np.float32), starts, lengths, 4, packed=True)
    result, _ = run(add, execution, clients(pool), clients(np.float32([0, 10, 20, 30, 40])))
    assert result.value.tolist() == [0, 10 + 6, 20, 30 + 9, 40 + 21]


def test_folds_keep_the_containers_of_their_zero():
    """C-67's neighbour: an accumulator may come back as a list where the zero is a tuple."""

    @fc.federated_computation(F32)
    def count_and_sum(x):
        return fc.federated_aggregate(
            x,
            (0, 0.0),
            lambda state, x: [state[0] + 1, state[1] + x],
            lambda a, b: [a[0] + b[0], a[1] + b[1]],
            lambda state: state[1] / state[0],
        )

    assert float(count_and_sum([1.0, 2.0, 6.0])) == 3.0


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
        for execution in MODES:
            run(total, execution, clients(np.ones(num_clients, np.float32)))
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
        run(total, MODES[0], clients(np.ones(num_clients, np.float32)))

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


@compiled_mode
def test_grad_through_a_lowered_computation(execution):
    """J-55 with other numbers: d/ds of mean((s x)^2) = 2 s mean(x^2)."""

    @fc.federated_computation(F32, fc.FederatedType(np.float32, fc.SERVER))
    def loss(x, s):
        scaled = fc.federated_map(jnp.multiply, x, fc.federated_broadcast(s))
        return fc.federated_mean(fc.federated_map(jnp.square, scaled))

    lowered = loss.lower(execution)
    x = np.float32([1, 2, 4])

    def value(x, s):
        return lowered(clients(x), fc.Federated(s, fc.SERVER))[0].value

    by_x, by_s = jax.jit(jax.grad(value, argnums=(0, 1)))(x, jnp.float32(3))
    np.testing.assert_allclose(by_s, 2 * 3 * 7.0, rtol=1e-6)
    np.testing.assert_allclose(by_x, 2 * 9 * x / 3, rtol=1e-6)
    forward = jax.jacfwd(value, argnums=1)(x, jnp.float32(3))
    np.testing.assert_allclose(forward, by_s, rtol=1e-6)


def test_gradients_of_a_mean_by_its_weights_are_finite():
    """J-03: no NaN in gradients where the weights are zero."""
    lowered = weighted_mean.lower()

    def value(x, w):
        return lowered(clients(x), clients(w))[0].value

    gradient = jax.grad(value, argnums=(0, 1))
    by_x, by_w = gradient(jnp.float32([1, 2]), jnp.zeros(2))
    assert np.isfinite(by_x).all()
    assert np.isfinite(by_w).all()
    by_x, by_w = gradient(jnp.float32([1, 2]), jnp.float32([1, 3]))
    np.testing.assert_allclose(by_x, [0.25, 0.75], rtol=1e-6)
    np.testing.assert_allclose(by_w, [(1 - 1.75) / 4, (2 - 1.75) / 4], rtol=1e-6)


def test_broadcast_to_many_clients_has_ones_as_jacobian():
    """J-53: broadcast 1.0 to 100 clients."""

    @fc.federated_computation(fc.FederatedType(np.float32, fc.SERVER))
    def spread(s):
        return fc.federated_map(lambda s: s + 0, fc.federated_broadcast(s))

    def value(s):
        return spread.lower()(fc.Federated(s, fc.SERVER), num_clients=100)[0].value

    assert value(jnp.float32(1)).tolist() == [1] * 100
    for jacobian in (jax.jacfwd, jax.jacrev):
        assert jacobian(value)(jnp.float32(1)).tolist() == [1] * 100


def test_one_step_of_fed_avg_differentiates_through_the_learning_rate():
    """J-59: w=0, data [1,2,3], lr .5, loss (w - x)^2 / 2 x 2: w -> 1.0, d/dlr 2.0, d/dw .5."""
    scalar = fc.FederatedType(np.float32, fc.SERVER)

    @fc.federated_computation(F32, scalar, scalar)
    def train(x, w, rate):
        def local(x, w, rate):
            return w - rate * jax.grad(lambda w: 0.5 * (w - x) ** 2)(w)

        at_clients = fc.federated_broadcast(w), fc.federated_broadcast(rate)
        return fc.federated_mean(fc.federated_map(local, x, *at_clients))

    def value(w, rate):
        placed = (fc.Federated(v, fc.SERVER) for v in (w, rate))
        return train.lower()(clients(np.float32([1, 2, 3])), *placed)[0].value

    new, (by_w, by_rate) = jax.value_and_grad(value, argnums=(0, 1))(
        jnp.float32(0), jnp.float32(0.5)
    )
    np.testing.assert_allclose([new, by_rate, by_w], [1.0, 2.0, 0.5], rtol=1e-6)


@compiled_mode
def test_vmap_over_whole_cohorts(execution):
    """Several cohorts of one size at once, and their bits."""
    lowered = mean.lower(execution)
    cohorts = np.arange(12, dtype=np.float32).reshape(4, 3)
    result, ledger = jax.vmap(lambda x: lowered(clients(x)))(cohorts)
    assert result.value.tolist() == cohorts.mean(axis=1).tolist()
    assert ledger[0].low.tolist() == [96] * 4


@compiled_mode
def test_scan_over_rounds(execution):
    """A whole training loop is one scan: w moves halfway to the mean each round."""

    @fc.federated_computation(F32, fc.FederatedType(np.float32, fc.SERVER))
    def round_of(x, w):
        average = fc.federated_mean(x)
        return fc.federated_map(lambda m, w: (m + w) / 2, average, w)

    lowered = round_of.lower(execution)

    def step(w, x):
        result, ledger = lowered(clients(x), fc.Federated(w, fc.SERVER))
        return result.value, ledger[0]

    cohorts = np.full((5, 3), 8, np.float32)
    w, bits = jax.jit(lambda w: lax.scan(step, w, cohorts))(jnp.float32(0))
    assert float(w) == 8 * (1 - 2**-5)
    assert int(bits.sum()) == 5 * 96


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


@each_mode
def test_lowered_functions_check_their_arguments(execution):
    """Types, placements, and one number of clients, whichever way it runs."""
    lowered = weighted_mean.lower(execution)
    x = clients(np.ones(3, np.float32))
    with pytest.raises(FederatedTypeError, match=r"float32.*int32"):
        lowered(x, clients(np.ones(3, np.int32)))
    with pytest.raises(FederatedTypeError, match=r"CLIENTS.*SERVER"):
        lowered(x, fc.Federated(np.float32(1), fc.SERVER))
    with pytest.raises(FederatedTypeError, match=r"fc\.Federated"):
        lowered(x, np.ones(3, np.float32))
    with pytest.raises(FederatedTypeError, match="2 federated arguments"):
        lowered(x)
    with pytest.raises(ArgumentError, match="one number of clients"):
        lowered(x, clients(np.ones(4, np.float32)))
    with pytest.raises(ArgumentError, match="one number of clients"):
        lowered(x, x, valid=np.ones(2, bool))


def test_leaves_of_one_value_agree_on_the_number_of_clients():
    total = fc.federated_computation(
        fc.federated_sum, fc.FederatedType({"a": np.float32, "b": np.float32}, fc.CLIENTS)
    )
    value = clients({"a": np.ones(3, np.float32), "b": np.ones(2, np.float32)})
    with pytest.raises(ArgumentError, match=r"\[2, 3\]"):
        total(value)


def test_a_number_of_clients_is_needed_and_checked():
    spread = fc.federated_computation(fc.federated_broadcast, fc.FederatedType(np.int32, fc.SERVER))
    counted = fc.federated_computation(lambda: fc.federated_count())
    assert int(counted(num_clients=3)) == 3
    assert int(spread(5, num_clients=2)) == 5
    with pytest.raises(ArgumentError, match="num_clients"):
        spread(5)
    with pytest.raises(ArgumentError, match="at least 0"):
        counted(num_clients=-1)


def test_a_captured_tracer_is_refused():
    """Pitfall 3: a computation defined inside jit must not outlive the value it captures."""

    @jax.jit
    def outer(y):
        total = fc.federated_computation(
            lambda x: fc.federated_sum(fc.federated_map(lambda x: x * y, x)), F32
        )
        return total(clients(jnp.ones(2))).value

    with pytest.raises(FederatedTypeError, match="argument instead"):
        outer(2.0)


def test_keys_travel_like_other_values():
    """Clients' own PRNG keys: mapped, returned, and none at all."""
    key = fc.FederatedType(fc.infer_type(jax.random.key(0)), fc.CLIENTS)
    fold = fc.federated_computation(
        lambda k: fc.federated_map(lambda k: jax.random.fold_in(k, 1), k), key
    )
    keys = jax.random.split(jax.random.key(0), 3)
    expected = jax.vmap(lambda k: jax.random.fold_in(k, 1))(keys)
    for execution in MODES:
        result, _ = run(fold, execution, clients(keys))
        assert (jax.random.key_data(result.value) == jax.random.key_data(expected)).all()
    assert len(fold(list(keys))) == 3
    assert fold([]) == []


def test_uplinks_keep_the_memory_of_those_who_send_nothing():
    """Only who is present moves its memory; the others' stays bit for bit."""
    codec = fc.compression.identity()._replace(
        init=lambda template: ((), jnp.float32(0)),
        encode=lambda keys, memory, hints, value: (
            memory + 1,
            fc.compression.Message(value),
        ),
    )

    @fc.federated_computation(VECTOR, F32, BOOL, fc.FederatedType(KEY, fc.SERVER))
    def send(x, memory, present, key):
        shared = fc.federated_broadcast(key)
        keys = PlacedKeys(key, shared, shared)
        server = fc.federated_value((), fc.SERVER)
        return uplink(codec, keys, server, memory, x, present=present)[1:]

    args = [[1.0, 2.0, 3.0]] * 2, [0.0, 5.0], [True, False], jax.random.key(0)
    memory, total = send(*args)
    assert list(map(float, memory)) == [1.0, 5.0]
    assert total.tolist() == [1, 2, 3]
