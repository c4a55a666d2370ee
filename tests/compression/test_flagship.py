"""The flagship codec: one step for all tensors, factors of large ones, exact sizes."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_core.bits import BitCount
from fedjax_core.compression import (
    Keys,
    Report,
    chain,
    error_feedback,
    flagship,
    from_bytes,
    scheduled,
    target_error,
    target_rate,
    to_bytes,
)
from fedjax_core.errors import CodecError

KEYS = Keys(jax.random.key(0), jax.random.key(1))


def update(seed: int = 0, names: tuple[str, ...] | None = None) -> dict:
    """Like that of a network: large matrices of low rank with empty rows, and a few vectors.

    Those of some names alone are compiled sooner.
    """
    rng = np.random.default_rng(seed)

    def matrix(m, n, rank):
        left = rng.normal(size=(m, rank)) * (rng.random((m, 1)) < 0.7) * rng.lognormal(size=(m, 1))
        return left @ rng.normal(size=(rank, n)) + 0.1 * rng.normal(size=(m, n))

    tensors = {
        "kernel": matrix(300, 120, 6),
        "conv": 0.3 * matrix(225, 24, 5).reshape(3, 3, 25, 24),
        "small": rng.normal(size=(9, 7)),
        "bias": 0.1 * rng.normal(size=120),
        "scale": rng.normal(),
    }
    return {name: jnp.asarray(tensors[name], jnp.float32) for name in names or tensors}


FEW = ("kernel", "bias")


@functools.cache
def sender(codec):
    """Encodes, counts and decodes."""

    def send(value):
        _, memory = codec.init(value)
        hints = codec.hints(codec.init(value)[0])
        _, message = codec.encode(KEYS, memory, hints, value)
        return message, codec.bits(message), codec.decode(KEYS, hints, message)

    return jax.jit(send)


def send(codec, value):
    return jax.device_get(sender(codec)(value))


def check_bytes(codec, message, bits) -> bytes:
    """Those of a message: as many as the device counted, and read as they were written."""
    data = to_bytes(codec, message)
    assert 8 * len(data) == int(bits)
    read = from_bytes(codec, data, like=jax.eval_shape(lambda: message))
    for a, b in zip(jax.tree.leaves(message), jax.tree.leaves(read), strict=True):
        np.testing.assert_array_equal(a, b)
    return data


def squares(tree) -> float:
    return float(sum(np.sum(np.square(np.float64(x))) for x in jax.tree.leaves(tree)))


def lost(value, received) -> float:
    """The error relative to the value, in squared norms."""
    difference = jax.tree.map(lambda x, y: np.float64(x) - np.float64(y), received, value)
    return squares(difference) / squares(value)


CODECS = {
    name: flagship(step, candidates=name)
    for step, name in ((2.0, "low_rank"), (1.0, "direct"), (1.5, "both"))
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "both" else [pytest.mark.slow]) for name in CODECS],
)
def test_the_device_counts_what_the_host_writes(name):
    codec, value = CODECS[name], update()
    message, bits, received = send(codec, value)
    data = check_bytes(codec, message, bits)
    assert jax.tree.structure(received) == jax.tree.structure(value)
    assert 8 * len(data) < 2 * sum(x.size for x in value.values())


@pytest.mark.parametrize(
    "name",
    [
        "low_rank",
        pytest.param("direct", marks=pytest.mark.slow),
        pytest.param("both", marks=pytest.mark.slow),
    ],
)
def test_what_is_received_is_as_long_as_the_value_in_its_direction(name):
    value = update()
    _, _, received = send(CODECS[name], value)
    aligned = sum(float(np.vdot(received[k], value[k])) for k in value)
    assert aligned == pytest.approx(squares(value), rel=1e-4)


@pytest.mark.slow
def test_small_steps_lose_little():
    value = update(names=FEW)
    for codec, limit in ((flagship(0.01, candidates="direct"), 1e-5), (flagship(0.1), 0.02)):
        assert lost(value, send(codec, value)[2]) < limit


def test_factors_take_less_at_the_same_error():
    value = {"kernel": update()["kernel"]}
    (_, direct, a), (_, factors, b) = (
        send(flagship(step, candidates=name), value)
        for step, name in ((1.0, "direct"), (2.0, "low_rank"))
    )
    assert lost(value, b) <= lost(value, a)
    assert int(factors) < 0.6 * int(direct)


def test_the_better_candidate_is_taken():
    rng = np.random.default_rng(0)
    value = {"low": update()["kernel"], "full": jnp.float32(10 * rng.normal(size=(300, 120)))}
    message, bits, _ = send(flagship(1.0, rank=8, candidates="both"), value)
    planes = message.payload.planes.planes
    assert len(planes) == 6  # of each the matrix itself, and its two factors
    # Of "full", which comes first, the matrix itself; of "low" the factors.
    is_used = [bool(np.any(plane.codes)) for plane in planes]
    assert is_used == [True, False, False, False, True, True]
    assert int(bits) > 0


def test_integers_and_empty_tensors_travel_as_they_are():
    value = update(names=FEW) | {
        "n": jnp.arange(5),
        "none": jnp.zeros((0, 3)),
        "yes": jnp.array(True),
    }
    _, _, received = send(CODECS["low_rank"], value)
    for name in ("n", "none", "yes"):
        assert received[name].dtype == value[name].dtype
        np.testing.assert_array_equal(received[name], value[name])


@pytest.mark.parametrize("value", [{}, {"n": jnp.arange(3)}, {"x": jnp.float32(2.5)}])
def test_values_with_hardly_anything_to_send(value):
    codec = CODECS["low_rank"]
    message, bits, received = send(codec, value)
    assert 8 * len(to_bytes(codec, message)) == int(bits)
    assert jax.tree.structure(received) == jax.tree.structure(value)
    for a, b in zip(jax.tree.leaves(received), jax.tree.leaves(value), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_something_is_sent_of_every_value():
    """No step is larger than the largest element."""
    value = {"x": jax.random.normal(jax.random.key(0), (400,))}
    received = send(flagship(1000.0), value)[2]
    largest = int(np.argmax(np.abs(value["x"])))
    assert np.count_nonzero(received["x"]) >= 1
    assert received["x"][largest] != 0


def test_zeros_stay_zeros():
    zeros = jax.tree.map(jnp.zeros_like, update())
    message, _, received = send(CODECS["both"], zeros)
    assert not any(np.any(x) for x in jax.tree.leaves(received))
    assert len(to_bytes(CODECS["both"], message)) < 200


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows(bad):
    value = update()
    value["conv"] = value["conv"].at[0, 0, 0, 0].set(bad)
    _, _, received = send(CODECS["low_rank"], value)
    assert all(np.all(np.isnan(x)) for x in jax.tree.leaves(received))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_does_not_matter(scale):
    value = jax.tree.map(lambda x: x * jnp.float32(scale), update())
    codec = CODECS["low_rank"]
    assert lost(value, send(codec, value)[2]) == pytest.approx(
        lost(update(), send(codec, update())[2]), rel=1e-2
    )


def test_the_largest_numbers_stay_finite():
    x = np.float32([3.4e38, *[1e38] * 7])
    _, _, received = send(flagship(4.0), {"x": jnp.asarray(x), "y": jnp.full((64, 32), x[0])})
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(received))


@pytest.mark.parametrize(("x", "expected"), [([0.0, 0.0], 0.0), ([1.0, np.nan], np.nan)])
def test_the_error_that_is_told(x, expected):
    message, _, _ = send(flagship(target_error(0.1)), jnp.float32(x))
    np.testing.assert_equal(float(message.stats[0]), expected)


def test_hints_of_another_value_are_refused():
    value = update(names=FEW)
    codec = flagship(1.0, candidates="ledger")
    server, _ = codec.init(value)
    with pytest.raises(CodecError, match=r"expected hints of flagship.*for this value"):
        codec.encode(KEYS, (), codec.hints(server), value | {"other": value["kernel"]})
    with pytest.raises(CodecError, match="expected hints of flagship"):
        codec.encode(KEYS, (), jnp.float32(1), value)
    with pytest.raises(CodecError, match="expected every leaf to be an array"):
        codec.init({"a": 1.0})


def test_half_precision_comes_back_in_its_dtype():
    value = jax.tree.map(lambda x: x.astype(jnp.bfloat16), update(names=FEW))
    _, _, received = send(CODECS["low_rank"], value)
    assert {x.dtype for x in jax.tree.leaves(received)} == {np.dtype(jnp.bfloat16)}


def rounds(codec, num_rounds: int):
    """Bits an element and errors of messages of ten senders in each round."""
    values = [update(seed, FEW) for seed in range(10)]
    size = sum(x.size for x in values[0].values())
    server, _ = codec.init(values[0])

    @jax.jit
    def encode(server, value):
        hints = codec.hints(server)
        _, message = codec.encode(KEYS, (), hints, value)
        return codec.bits(message), message.stats, codec.decode(KEYS, hints, message)

    history = []
    for _ in range(num_rounds):
        sent = [encode(server, value) for value in values]
        bits = [int(b) for b, _, _ in sent]
        errors = [lost(v, r) for v, (_, _, r) in zip(values, sent, strict=True)]
        stats = jax.tree.map(lambda *x: sum(x), *(s for _, s, _ in sent))
        report = Report(jnp.int32(10), BitCount.of(sum(bits)), stats)
        server, _ = codec.finish(KEYS.shared, server, values[0], report)
        history.append((np.mean(bits) / size, np.mean(errors)))
    return history


def test_random_rounding_averages_out():
    """The error of a mean falls to what is left out; that of rounding to the nearest stays."""
    value, errors = update(), {}
    for rounding in ("nearest", "stochastic"):
        codec = flagship(3.0, rounding=rounding)

        @jax.jit
        def send_all(keys, codec=codec):
            def one(own):
                _, message = codec.encode(Keys(jax.random.key(0), own), (), (), value)
                return codec.decode(Keys(jax.random.key(0), own), (), message)

            return jax.lax.map(one, keys)

        received = jax.device_get(send_all(jax.random.split(jax.random.key(1), 64)))
        mean = jax.tree.map(lambda x: np.mean(np.float64(x), axis=0), received)
        single = jax.tree.map(lambda x: x[0], received)
        errors[rounding] = lost(value, single), lost(value, mean)
    assert errors["nearest"][1] == pytest.approx(errors["nearest"][0], rel=1e-6)
    assert errors["nearest"][0] < errors["stochastic"][0]
    assert errors["stochastic"][1] < errors["nearest"][0] / 3


@pytest.mark.parametrize(
    "candidates",
    [
        "low_rank",
        pytest.param("ledger", marks=pytest.mark.slow),
        pytest.param("both", marks=pytest.mark.slow),
    ],
)
def test_random_symbols_are_counted_and_written(candidates):
    codec, value = flagship(2.0, candidates=candidates, rounding="stochastic"), update()
    message, bits, received = send(codec, value)
    check_bytes(codec, message, bits)
    assert lost(value, received) < 0.5


def layers(num: int) -> list[jax.Array]:
    return [update(seed, ("kernel",))["kernel"][:, :60] for seed in range(num)]


@pytest.mark.parametrize("candidates", ["both", pytest.param("ledger", marks=pytest.mark.slow)])
def test_layers_of_one_shape_are_sent_as_each_alone(monkeypatch, candidates):
    codec, value = flagship(0.5, candidates=candidates), layers(3)
    message, bits, received = send(codec, value)
    assert 8 * len(to_bytes(codec, message)) == int(bits)
    for own, found in zip(value, received, strict=True):
        assert lost(own, found) < 0.1

    def one_by_one(function, *arguments):
        return [function(*item) for item in zip(*arguments, strict=True)]

    for module in ("flagship", "planes"):
        module = importlib.import_module(f"fedjax_core.compression.{module}")
        monkeypatch.setattr(module, "map_alike", one_by_one)
    alone, _, expected = send(flagship(0.5, candidates=candidates), value)
    flipped = [
        np.mean(a.codes != b.codes)
        for a, b in zip(message.payload.planes.planes, alone.payload.planes.planes, strict=True)
    ]
    # Products of matrices may be added up in another order, and an element rounded otherwise.
    assert max(flipped) < 1e-3
    assert lost(expected, received) < 1e-4


def test_layers_of_one_shape_are_traced_once():
    def size(num):
        return len(str(jax.make_jaxpr(sender(flagship(0.5)))(layers(num))))

    assert size(12) - size(6) < 0.3 * size(6)


@pytest.mark.slow
def test_the_ledger_of_earlier_rounds_chooses():
    """Each way is tried once; then the one that costs less is taken, as `both` would find it."""
    rng = np.random.default_rng(0)
    value = {"low": update()["kernel"], "full": jnp.float32(10 * rng.normal(size=(300, 120)))}
    codec = flagship(1.0, rank=8, candidates="ledger")
    both = int(send(flagship(1.0, rank=8, candidates="both"), value)[1])
    server, _ = codec.init(value)

    @jax.jit
    def step(server):
        hints = codec.hints(server)
        _, message = codec.encode(KEYS, (), hints, value)
        bits, total = codec.bits(message), codec.decode(KEYS, hints, message)
        report = Report(jnp.int32(1), bits, message.stats)
        return hints[1], bits, codec.finish(KEYS.shared, server, total, report)[0], message

    taken, sizes = [], []
    for _ in range(17):
        chosen, bits, server, message = step(server)
        taken.append(chosen.tolist())
        sizes.append(int(bits))
    # Leaves in the order of their names: "full" first.
    assert taken[:3] == [[True, True], [False, False], [False, True]]
    assert taken[3:15] == [[False, True]] * 12
    assert taken[15:] == [[True, False], [False, True]]
    assert abs(sizes[2] - both) <= 2 * 32 + 64
    data = to_bytes(codec, jax.device_get(message))
    assert 8 * len(data) == sizes[-1]


@pytest.mark.parametrize("bits", [0.15, pytest.param(0.6, marks=pytest.mark.slow)])
def test_a_rate_is_held(bits):
    history = rounds(flagship(target_rate(bits, start=0.3)), 11)
    assert history[-1][0] == pytest.approx(bits, rel=0.1)
    assert abs(history[0][0] / bits - 1) > 0.1


@pytest.mark.slow
def test_an_error_is_held():
    history = rounds(flagship(target_error(0.2)), 11)
    assert history[-1][1] == pytest.approx(0.2, rel=0.1)


def test_a_schedule_makes_steps():
    control = scheduled(optax.linear_schedule(1.0, 4.0, transition_steps=3))
    history = rounds(flagship(control), 4)
    rates = [rate for rate, _ in history]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 1.5 * rates[-1]


@pytest.mark.parametrize("steps", [jnp.ones(2), None, "fine"])
def test_a_schedule_of_other_things_is_refused(steps):
    codec = flagship(scheduled(lambda round_number: steps))
    server, _ = codec.init(update())
    with pytest.raises(CodecError, match="expected one number from the schedule of steps"):
        codec.hints(server)


def test_a_round_without_messages_changes_nothing():
    codec = flagship(target_rate(0.1))
    server, _ = codec.init(update())
    report = Report(jnp.int32(0), BitCount.zero(), ((), ()))
    (step, _), _ = codec.finish(KEYS.shared, server, update(), report)
    assert float(step) == float(server[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: flagship(0), "expected step to be a number from 0.001"),
        (lambda: flagship(np.nan), "expected step to be a number"),
        (lambda: flagship("fine"), "expected step to be a number"),
        (lambda: flagship(rank=0), "expected rank to be an integer from 1 to 256"),
        (lambda: flagship(candidates="all"), 'expected candidates to be "low_rank", "direct"'),
        (lambda: flagship(rounding="dither"), 'expected rounding to be "nearest" or "stochastic"'),
        (lambda: target_rate(0), "expected bits to be a number"),
        (lambda: target_error(-1), "expected error to be a number"),
        (lambda: target_rate(0.1, start=np.inf), "expected start to be a number"),
        (lambda: scheduled(3), "expected a function from a round to a step"),
        (lambda: error_feedback(flagship()), "expected a contractive codec"),
        (lambda: chain(flagship(), 3), "expected a codec as argument 1"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(CodecError, match=message):
        make()
