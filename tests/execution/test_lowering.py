"""The lowered functions: accumulation, padding, edge sizes, checks of arguments, keys, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core as fc
from fedjax_core.compression.edges import PlacedKeys, downlink, uplink
from fedjax_core.errors import ArgumentError, FederatedTypeError
from fedjax_core.language.messages import broadcast_message

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
        fold = fc.federated_aggregate(x, zero, jnp.maximum, jnp.maximum, lambda total: total)
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
    with pytest.raises(FederatedTypeError, match="expected 2 arguments"):
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
