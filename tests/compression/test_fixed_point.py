"""Fixed point: exact sums of integers, limits that follow the senders, and secure sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_core as fc
from fedjax_core import aggregators
from fedjax_core.compression import (
    Keys,
    Report,
    ans,
    chain,
    eden,
    fixed_point,
    hadamard_rotation,
    rand_k,
    top_k,
    uniform_quantize,
)
from fedjax_core.errors import CodecError

CLIENTS = 10


@functools.cache
def summed(codec, secure: bool):
    """``(rows, state=None) -> (state, sum)``: vectors of clients, summed through a codec."""
    aggregator = aggregators.sum(codec=codec, secure=secure)
    start, compute = aggregators.as_computation(aggregator, (np.float32, [100]))

    def call(rows, state=None):
        ones, ids = [1.0] * len(rows), list(range(len(rows)))
        state = start if state is None else state
        return compute(state, jax.random.key(0), list(rows), ones, ids)[:2]

    return call


def rows(scale: float = 1.0) -> np.ndarray:
    drawn = scale * np.random.default_rng(3).normal(size=(CLIENTS, 100))
    return drawn.astype(np.float32)


CODECS = [
    fixed_point(8, limit=4.0),
    fixed_point(4, limit=3.0, stochastic=False),
    chain(hadamard_rotation(min_size=0), fixed_point(8, limit=6.0)),
    chain(rand_k(0.3, min_size=0), fixed_point(8, limit=20.0)),
    fixed_point(8),
]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_secure_sums_are_those_in_clear(codec):
    """Reference case 34: bit for bit, for integers are added either way."""
    (_, clear), (_, secure) = (summed(codec, kind)(rows()) for kind in (False, True))
    np.testing.assert_array_equal(clear, secure)


def test_sum_is_the_step_times_the_sum_of_integers():
    codec, x = fixed_point(8, limit=4.0, stochastic=False), rows()
    expected = np.rint(x / np.float32(4 / 127)).sum(0) * np.float32(4 / 127)
    np.testing.assert_allclose(summed(codec, True)(x)[1], expected, rtol=1e-6)


def test_error_is_that_of_rounding():
    """Stochastic rounding of n numbers: n step^2 / 6 an element, on average over fractions."""
    x = rows()
    error = np.asarray(summed(fixed_point(8, limit=8.0), False)(x)[1], float) - x.sum(0)
    assert np.mean(error**2) == pytest.approx(CLIENTS * (8 / 127) ** 2 / 6, rel=0.4)


def test_limit_follows_the_largest_element():
    """To a quarter of an octave above it, from the second round on."""
    call = summed(fixed_point(8), False)
    for scale in (1e-4, 1.0, 300.0):
        x = rows(scale)
        state, _ = call(x)
        (limit,) = (float(leaf) for leaf in jax.tree.leaves(state))
        largest = np.abs(x).max()
        assert largest <= limit <= 1.26 * largest
        _, total = call(x, state)
        assert np.abs(np.asarray(total) - x.sum(0)).max() < CLIENTS * limit / 127


def test_limit_of_zeros_stays():
    state, total = summed(fixed_point(8), True)(np.zeros((CLIENTS, 100), np.float32))
    assert jax.tree.leaves(state)[0] == 1
    assert not np.any(total)


@pytest.mark.parametrize("element", [50.0, 1e38])
def test_elements_beyond_the_limit_are_clipped(element):
    x = np.full((CLIENTS, 100), element, np.float32)
    np.testing.assert_allclose(summed(fixed_point(8, limit=4.0), True)(x)[1], 40.0, rtol=1e-6)


@pytest.mark.parametrize("secure", [False, True])
def test_sum_with_a_value_that_is_not_finite_is_not(secure):
    x = rows()
    x[3, 5] = np.inf
    assert np.all(np.isnan(summed(fixed_point(8, limit=4.0), secure)(x)[1]))


@pytest.mark.parametrize(("num_clients", "bits"), [(1, 4), (2, 5), (10, 8), (37, 10)])
def test_width_of_a_secure_sum(num_clients, bits):
    """Reference case 34: ceil(log2(2 n m + 1)) with m = 7; and for each mark, of 0 or 1, n + 1."""
    codec = fixed_point(4, limit=1.0)
    algorithm = fc.algorithms.fed_avg(
        fc.models.linear(),
        client_optimizer=optax.sgd(0.1),
        batch_size=2,
        aggregator=aggregators.mean(codec=codec, secure=True),
    )
    report = fc.communication(algorithm.computation, num_clients=num_clients)
    (edge,) = [edge for edge in report if edge.name == "update"]
    assert edge.visibility == "blind"
    assert edge.bits_per_client == 7850 * bits + num_clients.bit_length()


@pytest.mark.parametrize(
    ("codec", "reason"),
    [
        (chain(fixed_point(8, limit=1.0), ans()), "a code of its own"),
        (uniform_quantize(8, min_size=0), "its messages carry what belongs to one sender"),
        (top_k(0.1, min_size=0), "its messages carry what belongs to one sender"),
        (eden(1, min_size=0), "its messages carry what belongs to one sender"),
        (rand_k(0.3, common=False, min_size=0), "its messages carry what belongs to one sender"),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_codecs_that_do_not_add_are_refused_under_secure_sums(codec, reason):
    with pytest.raises(CodecError, match=reason):
        aggregators.mean(codec=codec, secure=True)
    with pytest.raises(CodecError, match=reason):
        summed(codec, True)(rows())


def test_raw_tensors_are_refused_under_secure_sums():
    codec = chain(hadamard_rotation(min_size=1000), fixed_point(8, limit=1.0, min_size=1000))
    with pytest.raises(CodecError, match="expected nothing but symbols in a message"):
        summed(codec, True)(rows())


def test_secure_sums_need_a_codec():
    with pytest.raises(ValueError, match="Expected a codec that makes integers"):
        aggregators.mean(secure=True)


def test_clipping_bounds_what_is_summed():
    """After clipping to a norm no element is beyond it: with it as the limit nothing is lost."""
    aggregator = aggregators.chain(
        aggregators.clip_by_global_norm(0.5),
        aggregators.sum(codec=fixed_point(16, limit=0.5), secure=True),
    )
    state, compute = aggregators.as_computation(aggregator, (np.float32, [100]))
    x = rows()
    ones, ids = [1.0] * CLIENTS, list(range(CLIENTS))
    _, total, measured = compute(state, jax.random.key(0), list(x), ones, ids)
    expected = (0.5 * x / np.linalg.norm(x, axis=1, keepdims=True)).sum(0)
    np.testing.assert_allclose(total, expected, atol=CLIENTS * 0.5 / 2**15)
    assert measured


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"bits": 1}, "expected bits to be an integer from 2 to 24"),
        ({"bits": 25}, "expected bits"),
        ({"limit": 0}, "expected limit to be a number"),
        ({"limit": np.inf}, "expected limit"),
        ({"min_size": -1}, "expected min_size"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, expected):
    with pytest.raises(CodecError, match=expected):
        fixed_point(**arguments)


def test_a_single_sender_is_decoded_by_finish():
    codec, keys = fixed_point(8, limit=127.0), Keys(jax.random.key(0), jax.random.key(1))
    _, message = codec.encode(keys, (), (), jnp.array([3.0, -1.0]))
    total = codec.decode(keys, (), message)
    report = Report(jnp.int32(1), codec.bits(message), message.stats)
    assert codec.finish(keys.shared, (), total, report)[1].tolist() == [3.0, -1.0]
