"""Differences to an anchor and to replicas: what clients rebuild, and what is counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_core as fc
from fedjax_core.bits import BitCount
from fedjax_core.compression import (
    anchored,
    downlinks,
    error_feedback,
    flagship,
    from_bytes,
    identity,
    replica,
    top_k,
    uniform_quantize,
)
from fedjax_core.compression.downlinks import difference
from fedjax_core.errors import ArgumentError, CodecError

KEY = jax.random.key(0)
DIRECT = flagship(0.5, candidates="direct")
QUANTIZE = uniform_quantize(12, min_size=0, stochastic=False)


@functools.cache
def dataset(num_clients: int = 6) -> fc.datasets.FederatedDataset:
    rng = np.random.default_rng(0)
    return fc.datasets.from_clients(
        {
            str(i): {
                "image": rng.integers(0, 256, (4, 28, 28, 1), dtype=np.uint8),
                "label": rng.integers(0, 10, 4).astype(np.int32),
            }
            for i in range(num_clients)
        }
    )


def algorithm(broadcast_codec, model=None, **execution):
    return fc.algorithms.fed_avg(
        fc.models.linear() if model is None else model,
        client_optimizer=optax.sgd(0.1),
        batch_size=4,
        broadcast_codec=broadcast_codec,
        execution=fc.Execution(**execution),
    )


def rounds(broadcast_codec, cohorts, **execution):
    own = algorithm(broadcast_codec, **execution)
    state, metrics = own.init(KEY, dataset().num_clients), []
    for present in cohorts:
        state, measured = own.update(state, dataset().cohort(present))
        metrics.append({k: int(v) for k, v in measured.communication.broadcast.items()})
    return state, metrics


COHORTS = [["0", "1"], ["1", "2"], ["0", "3"], ["4", "2"], ["1", "0"]]


def initialize(seed):
    first, second = jax.random.split(seed)
    return {
        "n": jnp.arange(3),
        "w": jax.random.truncated_normal(first, -2.0, 2.0, (40, 30)),
        "b": 0.1 * jax.random.normal(second, (30,)),
    }


def sender(downlink):
    """`(server, memory, key, value) -> Sent` of one round, on lists of memories."""
    own, memory = downlink.init(initialize, KEY)
    types = [fc.infer_type(x) for x in (own, memory, KEY, initialize(KEY))]
    at_server = [fc.FederatedType(t, fc.SERVER) for t in (types[0], types[2], types[3])]

    def send(server, key, value, memory):
        shared = fc.federated_broadcast(key)
        keys = fc.compression.PlacedKeys(key, shared, shared)
        sent = downlink.send(keys, initialize, server, memory, value)
        return sent.server, sent.memory, sent.value, () if sent.catch_up is None else sent.catch_up

    def without_memory(server, key, value, anyone):
        del anyone
        return send(server, key, value, fc.federated_value((), fc.CLIENTS))

    anyone = fc.FederatedType(fc.to_type(np.int32), fc.CLIENTS)
    if not jax.tree.leaves(memory):
        return fc.federated_computation(without_memory, *at_server, anyone), own
    member = fc.FederatedType(types[1], fc.CLIENTS)
    return fc.federated_computation(send, *at_server, member), own


def moved(value, seed, size=0.1):
    """The value of a later round."""
    rng = np.random.default_rng(seed)
    return {
        name: x if x.dtype == jnp.int32 else x + jnp.float32(size * rng.normal(size=x.shape))
        for name, x in value.items()
    }


def check_same(a, b) -> None:
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "codec",
    [pytest.param(DIRECT, marks=pytest.mark.slow), uniform_quantize(8, min_size=0)],
    ids=lambda c: c.name,
)
def test_a_client_rebuilds_the_value_from_the_seed_and_the_bytes(codec):
    """Reference case 37: bit for bit what the clients of the round have."""
    sent = []

    def to_bytes(message):
        sent.append(codec.to_bytes(message))
        return codec.to_bytes(message)

    send, server = sender(anchored(codec._replace(to_bytes=to_bytes)))
    value, key = moved(initialize(KEY), 1), jax.random.fold_in(KEY, 7)
    args = [fc.Federated(x, fc.SERVER) for x in (server, key, value)]
    run = send.lower(fc.Execution(wire=True))
    (_, _, received, _), _ = run(*args, fc.Federated(jnp.arange(2), fc.CLIENTS))
    like = jax.eval_shape(lambda: downlinks.encoded(codec, key, value))
    client = jax.jit(lambda seed, m: downlinks.rebuilt(codec, initialize, key, seed, m))
    check_same(client(KEY, from_bytes(codec, sent[0], like=like)), received.value)


@pytest.mark.slow
def test_small_steps_of_an_anchored_codec_give_the_value():
    """Reference case 37."""
    value, errors = moved(initialize(KEY), 1), []
    for step in (1.0, 0.1, 0.01):
        send, server = sender(anchored(flagship(step, candidates="direct")))
        _, _, received, _ = send(server, KEY, value, [0])
        errors.append(float(jnp.max(jnp.abs(received["w"] - value["w"]))))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 1e-3


def test_replicas_follow_without_adding_up_errors():
    codec = flagship(1.0, candidates="direct")
    send, server = sender(replica(codec))
    value, memory = initialize(KEY), BitCount.zero()
    errors = []
    for number in range(12):
        value = moved(value, number)
        server, memory, received, _ = send(
            server, jax.random.fold_in(KEY, number), value, [memory] * 2
        )
        check_same(received, server[0])
        errors.append(float(jnp.mean((received["w"] - value["w"]) ** 2)))
    assert max(errors[6:]) < 2 * np.mean(errors[:3])


@pytest.mark.parametrize("wrap", [anchored, replica])
def test_a_round_that_is_not_finite_is_mended_by_the_next(wrap):
    send, server = sender(wrap(flagship(0.1, candidates="direct")))
    value, anyone = initialize(KEY), 0 if wrap is anchored else BitCount.zero()
    bad = value | {"w": value["w"].at[0].set(jnp.nan)}
    for number, sent in enumerate((value, bad, value, value)):
        key = jax.random.fold_in(KEY, number)
        server, _, received, _ = send(server, key, sent, [anyone] * 2)
    for name, x in value.items():
        np.testing.assert_allclose(received[name], x, atol=0.1 * float(jnp.max(jnp.abs(x))))


@pytest.mark.parametrize(
    "other", [{"w": jnp.ones((40, 1))}, {"w": jnp.ones((40, 30), jnp.float16)}, {"more": 1.0}]
)
def test_a_value_unlike_the_first_one_is_refused(other):
    with pytest.raises(CodecError, match="expected a value like the first one"):
        difference(initialize(KEY) | other, initialize(KEY))


def test_who_missed_rounds_is_sent_what_it_missed_or_everything():
    send, server = sender(replica(DIRECT))
    value = initialize(KEY)
    raw = 32 * (40 * 30 + 30 + 3)
    memory, sizes = [BitCount.zero()] * 3, []
    followed = [0, 0, 0]
    for number in range(10):
        value = moved(value, number)
        present = [0] if number % 4 else [0, 1, 2] if number == 8 else [0, 1]
        given = [memory[i] for i in present]
        before = sum(sizes)
        server, new, _, catch_up = send(server, jax.random.fold_in(KEY, number), value, given)
        expected = sum(min(before - followed[i] + (0 if followed[i] else 64), raw) for i in present)
        assert int(catch_up) == expected
        sizes.append(int(new) - before)
        for i in present:
            memory[i], followed[i] = new, int(new)
    assert before > raw > sizes[-1]


@functools.cache
def quantized():
    return rounds(replica(QUANTIZE), COHORTS)


def test_a_round_counts_both():
    _, metrics = quantized()
    assert [m["position"] for m in metrics] == [2 * 64] * 5
    assert metrics[0]["catch_up"] == 2 * 64
    size = [m["params"] // 2 for m in metrics]
    # Of the second round's clients one was in the first, the other begins.
    assert metrics[1]["catch_up"] == size[0] + 64
    # Client 1 was last in round 1, client 0 in round 2.
    assert metrics[4]["catch_up"] == sum(size[2:4]) + size[3]
    _, metrics = rounds(anchored(QUANTIZE), COHORTS[:2])
    assert [m["anchor"] for m in metrics] == [2 * 64] * 2
    assert all("catch_up" not in m for m in metrics)


@pytest.mark.slow
def test_with_the_identity_nothing_changes():
    plain, _ = rounds(None, COHORTS)
    for wrap in (anchored, replica):
        state, _ = rounds(wrap(identity()), COHORTS)
        for a, b in zip(*(jax.tree.leaves(x.params) for x in (state, plain)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    "execution",
    [
        {"wire": True},
        pytest.param({"mode": "stacked"}, marks=pytest.mark.slow),
        pytest.param({"lanes": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_ways_to_run_agree(execution):
    expected, counted = quantized()
    state, metrics = rounds(replica(QUANTIZE), COHORTS, **execution)
    for ours, theirs in zip(metrics, counted, strict=True):
        ours.pop("framing", None)
        assert ours == theirs
    for a, b in zip(*(jax.tree.leaves(x.params) for x in (state, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=0 if "wire" in execution else 1e-4)


@pytest.mark.parametrize("wrap", [pytest.param(anchored, marks=pytest.mark.slow), replica])
def test_many_rounds_in_one_program(wrap):
    own = algorithm(wrap(QUANTIZE))
    expected, _ = quantized() if wrap is replica else rounds(wrap(QUANTIZE), COHORTS)
    state = own.init(KEY, dataset().num_clients)
    state, metrics = own.run(state, dataset(), lambda r: COHORTS[r], num_rounds=5)
    for a, b in zip(*(jax.tree.leaves(x.params) for x in (state, expected)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert ("catch_up" in metrics.communication.broadcast) == (wrap is replica)


def test_replicas_of_which_three_in_ten_miss_each_round():
    """What all are sent is counted anew here; the error is that of one message, however many."""
    bits, num_clients = 6, 10
    own = algorithm(replica(uniform_quantize(bits, min_size=0, stochastic=False)))
    state = own.init(KEY, num_clients)
    raw = sum(32 * x.size for x in jax.tree.leaves(state.params))
    rng, followed, sizes = np.random.default_rng(0), np.full(num_clients, -1), []
    for _ in range(25):
        present = np.sort(rng.choice(num_clients, 7, replace=False))
        before = state
        state, metrics = own.update(before, dataset(num_clients).cohort([str(i) for i in present]))
        counted = {name: int(x) for name, x in metrics.communication.broadcast.items()}
        missed = [sum(sizes[i:]) if i >= 0 else sum(sizes) + 64 for i in followed[present]]
        assert counted["catch_up"] == sum(min(size, raw) for size in missed)
        sizes.append(counted["params"] // 7)
        assert counted["params"] == 7 * sizes[-1]
        followed[present] = len(sizes)
        for value, old, new in zip(
            *map(jax.tree.leaves, (before.params, before.downlink[0], state.downlink[0])),
            strict=True,
        ):
            step = np.ptp(np.asarray(value - old)) / (2**bits - 1)
            assert float(jnp.max(jnp.abs(value - new))) <= step + 1e-6
    # Some missed so much that the model itself was shorter, others a message or two.
    assert sum(sizes) > raw > 3 * max(sizes)


def test_a_sum_of_sizes_is_exact():
    counts = [BitCount.of(n) for n in (2**40 + 123, 2**32 - 1, 7, 2**63)]
    limbs = sum(downlinks._limbs(count) for count in counts)
    assert int(downlinks._from_limbs(limbs)) == sum(int(count) for count in counts)
    a, b = BitCount.of(2**33), BitCount.of(2**32 + 5)
    assert int(downlinks._subtract(a, b)) == 2**32 - 5


@pytest.mark.parametrize("wrap", [anchored, replica])
def test_codecs_with_memory_are_refused(wrap):
    own = wrap(error_feedback(top_k(0.1, min_size=0)))
    with pytest.raises(CodecError, match="without state or memory on the way down"):
        algorithm(own)
    with pytest.raises(CodecError, match="expected a codec on the way down, got 3"):
        wrap(3)


def test_what_is_no_downlink_is_refused():
    with pytest.raises(ArgumentError, match="to be of type Codec or Downlink, got 'anchored'"):
        algorithm("anchored")
