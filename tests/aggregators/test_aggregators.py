"""Sums, means, clipping, zeroing and quantiles, against cases and independent NumPy code."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core as fc
from fedjax_core import aggregators
from fedjax_core.aggregators import (
    NormEstimator,
    as_computation,
    chain,
    clip_by_global_norm,
    fixed,
    mean,
    quantile,
    robust_aggregator,
    unweighted_mean,
    zero_by_norm,
)
from fedjax_core.aggregators.robust import global_norm
from fedjax_core.errors import ArgumentError
from fedjax_core.language.operators import federated_map

KEY = jax.random.key(0)


def rounds(aggregator, value_type, values, weights=None, *, num_rounds=1):
    """The results of some rounds with the same values, as `(values, measurements)`."""
    state, compute = as_computation(aggregator, value_type)
    weights = [1.0] * len(values) if weights is None else list(weights)
    results, measured = [], []
    for number in range(num_rounds):
        key = jax.random.fold_in(KEY, number)
        state, value, measurements = compute(
            state, key, list(values), weights, list(range(len(values)))
        )
        results.append(value)
        measured.append(measurements)
    return results, measured


def one_round(aggregator, value_type, values, weights=None):
    results, measured = rounds(aggregator, value_type, values, weights)
    return results[0], measured[0]


def growing(start, step):
    """A norm that grows by `step` in each round, whatever the clients have."""
    return NormEstimator(
        init=lambda: jnp.float32(start),
        report=lambda norm: norm,
        update=lambda state, norms, present: federated_map(lambda norm: norm + step, state),
    )


def test_means():
    """C-53: [1, 2, 3], and with weights [3, 2, 1]."""
    values = [1.0, 2.0, 3.0]
    weighted, measured = one_round(mean(), np.float32, values, [3.0, 2.0, 1.0])
    assert weighted == pytest.approx(1.6666666, rel=1e-6)
    assert measured == {"mean": {"num_clients": 3, "total_weight": 6.0}}
    plain, measured = one_round(unweighted_mean(), np.float32, values, [3.0, 2.0, 1.0])
    assert plain == 2.0
    assert measured == {"unweighted_mean": {"num_clients": 3}}
    total, measured = one_round(aggregators.sum(), np.float32, values, [3.0, 2.0, 1.0])
    assert total == 6.0
    assert measured == {"sum": {"num_clients": 3}}


@pytest.mark.parametrize("make", [mean, unweighted_mean, aggregators.sum])
def test_clients_without_weight_are_absent(make):
    """C-69, J-03: weights [0, 0, 0] give zero; so does a cohort of nobody."""
    for values, weights in (([1.0, 2.0, 3.0], [0.0] * 3), ([], [])):
        result, measured = one_round(make(), np.float32, values, weights)
        assert result == 0.0
        assert next(iter(measured.values()))["num_clients"] == 0


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan])
@pytest.mark.parametrize("make", [mean, unweighted_mean, robust_aggregator])
def test_absent_clients_may_hold_anything(make, weight):
    """A weight that is not positive: value and norm of that client count for nothing."""
    results, measured = rounds(
        make(), np.float32, [0.5, math.nan, 0.5], [2.0, weight, 1.0], num_rounds=2
    )
    assert results == [0.5, 0.5]
    for measurements in measured:
        assert all(part.get("count", 0) == 0 for part in measurements.values())


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("num_clients", [1, 2, 9])
def test_means_of_structs_equal_numpy(size, num_clients):
    """Random structs and weights, in float64 outside."""
    rng = np.random.default_rng(size + 10 * num_clients)
    a = rng.normal(size=(num_clients, size, 2)).astype(np.float32)
    b = rng.normal(size=num_clients).astype(np.float32)
    w = rng.integers(1, 100, num_clients).astype(np.float32)
    t = {"a": (np.float32, [size, 2]), "b": [np.float32]}
    values = [{"a": a[i], "b": [b[i]]} for i in range(num_clients)]
    result, _ = one_round(mean(), t, values, list(w))
    expected_a = np.average(a.astype(np.float64), axis=0, weights=w)
    np.testing.assert_allclose(result["a"], expected_a, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result["b"][0], np.average(b, weights=w), rtol=1e-5, atol=1e-6)
    plain, _ = one_round(unweighted_mean(), t, values, list(w))
    np.testing.assert_allclose(plain["a"], a.mean(axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("inner", "weights", "expected", "name"),
    [(aggregators.sum, [1, 1, 1], 5.0, "sum"), (mean, [1, 2, 1], 7 / 4, "mean")],
)
def test_clipping(inner, weights, expected, name):
    """C-71: norm 2.0 on [1, 3, 5], as a sum and as a mean by [1, 2, 1]."""
    aggregator = chain(clip_by_global_norm(2.0), inner())
    result, measured = one_round(aggregator, np.float32, [1.0, 3.0, 5.0], weights)
    assert result == pytest.approx(expected, rel=1e-6)
    assert measured["clip_by_global_norm"] == {"norm": 2.0, "count": 2}
    assert set(measured) == {"clip_by_global_norm", name}


@pytest.mark.parametrize(
    ("inner", "weights", "expected"),
    [(aggregators.sum, [1, 1, 1], [3, 5, 7]), (mean, [1, 2, 1], [1, 7 / 4, 10 / 4])],
)
def test_clipping_by_a_norm_that_grows(inner, weights, expected):
    """C-73: norms 1, 2, 3 over the rounds on [1, 3, 5]."""
    aggregator = chain(clip_by_global_norm(growing(1.0, 1.0)), inner())
    results, measured = rounds(aggregator, np.float32, [1.0, 3.0, 5.0], weights, num_rounds=3)
    np.testing.assert_allclose(results, expected, rtol=1e-6)
    assert [m["clip_by_global_norm"]["count"] for m in measured] == [2, 2, 1]
    assert [m["clip_by_global_norm"]["norm"] for m in measured] == [1, 2, 3]


@pytest.mark.parametrize(
    ("inner", "weights", "expected"),
    [(aggregators.sum, [1, 1, 1], 3.0), (mean, [1, 2, 2], 1.0)],
)
def test_zeroing(inner, weights, expected):
    """C-75: norm 2 on [1, 2, 5]; the zeroed client keeps its weight."""
    aggregator = chain(zero_by_norm(2.0), inner())
    result, measured = one_round(aggregator, np.float32, [1.0, 2.0, 5.0], weights)
    assert result == pytest.approx(expected, rel=1e-6)
    assert measured["zero_by_norm"] == {"norm": 2.0, "count": 1}


def test_zeroing_around_clipping():
    """C-77: zero(1, +.75 a round) around clip(1, +.25 a round) on [1, 2, 3]."""
    aggregator = chain(
        zero_by_norm(growing(1.0, 0.75)), clip_by_global_norm(growing(1.0, 0.25)), aggregators.sum()
    )
    results, measured = rounds(aggregator, np.float32, [1.0, 2.0, 3.0], num_rounds=5)
    np.testing.assert_allclose(results, [1, 1, 2.5, 4.5, 5], rtol=1e-6)
    assert [m["zero_by_norm"]["count"] for m in measured] == [2, 2, 1, 0, 0]
    assert [m["clip_by_global_norm"]["count"] for m in measured] == [0, 0, 1, 2, 1]


@pytest.mark.parametrize("order", [1, 2, math.inf])
def test_norms_equal_numpy(order):
    """Over all leaves together, of several shapes and dtypes."""
    rng = np.random.default_rng(3)
    tree = {"a": rng.normal(size=(4, 3)), "b": [rng.normal(size=()), rng.normal(size=(0,))]}
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    value = jax.tree.map(jnp.float32, tree)
    np.testing.assert_allclose(global_norm(value, order), np.linalg.norm(flat, order), rtol=1e-5)


def test_euclidean_norms_neither_overflow_nor_vanish():
    for size in (1e30, 1e-30):
        value = jnp.full(4, size, jnp.float32)
        assert float(global_norm(value)) == pytest.approx(2 * size, rel=1e-6)
    assert float(global_norm(jnp.zeros(3))) == 0.0


def test_clipping_of_a_tree():
    """J-05, as the library of the case states it: factor 1/2 over all leaves."""
    value = {"x": [[[4.0, 5.0]], [[1.0, 1.0]]], "y": [[3.0], [1.0]]}
    t = {"x": (np.float32, [2, 1, 2]), "y": (np.float32, [2, 1])}
    result, _ = one_round(chain(clip_by_global_norm(3.640055), aggregators.sum()), t, [value])
    np.testing.assert_allclose(result["x"], [[[2, 2.5]], [[0.5, 0.5]]], rtol=1e-6)
    np.testing.assert_allclose(result["y"], [[1.5], [0.5]], rtol=1e-6)
    zeros = jax.tree.map(np.zeros_like, result)
    result, measured = one_round(chain(clip_by_global_norm(1.0), mean()), t, [zeros])
    assert not np.any(result["x"])
    assert measured["clip_by_global_norm"]["count"] == 0


def test_clipping_keeps_dtypes_and_small_scales():
    """Mixed precision, and float16 where the factor itself is below its smallest number."""
    t = {"h": (np.float16, [4]), "b": (jnp.bfloat16, [2]), "f": np.float32}
    value = {"h": [60000] * 4, "b": [0, 0], "f": 0}
    result, _ = one_round(chain(clip_by_global_norm(1e-3), aggregators.sum()), t, [value])
    assert [result[name].dtype for name in "hbf"] == [np.float16, jnp.bfloat16, np.float32]
    np.testing.assert_allclose(result["h"], [5e-4] * 4, rtol=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("wrapper", [zero_by_norm, clip_by_global_norm])
def test_values_that_are_not_finite_become_zero(wrapper, bad):
    """TFF lets NaN through both; here the client is counted, and its weight kept."""
    aggregator = chain(wrapper(5.0), mean())
    values = [[1.0, 2.0], [bad, 1.0], [3.0, 0.0]]
    result, measured = one_round(aggregator, (np.float32, [2]), values, [1.0, 2.0, 1.0])
    np.testing.assert_allclose(result, [1.0, 0.5], rtol=1e-6)
    assert measured[wrapper.__name__]["count"] == 1


@pytest.mark.parametrize("order", [1, 2, math.inf])
def test_zeroing_by_other_norms(order):
    """[3, 4] has norms 7, 5 and 4: kept at its own norm, zeroed just below."""
    size = {1: 7.0, 2: 5.0, math.inf: 4.0}[order]
    for norm, expected in ((size, [3, 4]), (size - 0.01, [0, 0])):
        aggregator = chain(zero_by_norm(norm, order=order), aggregators.sum())
        result, _ = one_round(aggregator, (np.float32, [2]), [[3.0, 4.0]])
        assert result.tolist() == expected


def test_the_same_wrapper_twice_keeps_both_measurements():
    aggregator = chain(clip_by_global_norm(4.0), clip_by_global_norm(2.0), aggregators.sum())
    result, measured = one_round(aggregator, np.float32, [1.0, 3.0, 5.0])
    assert result == 5.0
    assert measured["clip_by_global_norm"] == {"norm": 2.0, "count": 2}
    assert measured["clip_by_global_norm_2"] == {"norm": 4.0, "count": 1}


def test_wrappers_nest_like_their_chain():
    """chain(a, chain(b, c)) is chain(a, b, c); it is weighted where the innermost part is."""
    nested = chain(zero_by_norm(4.0), chain(clip_by_global_norm(2.0), mean()))
    flat = chain(zero_by_norm(4.0), clip_by_global_norm(2.0), mean())
    for aggregator in (nested, flat):
        result, _ = one_round(aggregator, np.float32, [1.0, 3.0, 9.0], [1.0, 1.0, 2.0])
        assert result == pytest.approx(3 / 4, rel=1e-6)
        assert aggregator.is_weighted
    assert not chain(zero_by_norm(4.0), unweighted_mean()).is_weighted
    assert chain(mean()).is_weighted


@pytest.mark.parametrize("make", [mean, unweighted_mean, aggregators.sum])
def test_codecs_on_the_way_up(make):
    """Values on the levels of the quantiser come through exactly; absent clients send no bits."""
    codec = fc.compression.uniform_quantize(8, min_size=2, stochastic=False)
    state, compute = as_computation(make(codec=codec), (np.float32, [4]))
    values = np.float32([[0, 1, 2, 255], [255, 0, 7, 9], [math.nan] * 4, [0, 255, 255, 0]])
    weights = np.float32([1, 2, 0, 1])
    result = compute(state, KEY, list(values), list(weights), [0, 1, 2, 3]).value
    present = weights > 0
    used = weights[present] if make is mean else np.ones(3)
    total = np.sum(values[present] * used[:, None], axis=0)
    expected = total if make is aggregators.sum else total / used.sum()
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    placed = [
        fc.Federated(x, p)
        for x, p in [
            *((state, fc.SERVER), (KEY, fc.SERVER), (values, fc.CLIENTS)),
            *((weights, fc.CLIENTS), (np.arange(4, dtype=np.uint32), fc.CLIENTS)),
        ]
    ]
    _, ledger = compute.lower()(*placed)
    edges = [edge.label for _, edge in compute.program.edges]
    assert int(ledger[edges.index("update")]) == 3 * (4 * 8 + 64)


@pytest.mark.parametrize(
    "codec",
    [
        fc.compression.chain(
            fc.compression.hadamard_rotation(min_size=2),
            fc.compression.uniform_quantize(16, min_size=2),
        ),
        fc.compression.bounded_support(4, min_size=2),
        fc.compression.rand_k(1.0, min_size=2),
        fc.compression.uniform_quantize(16, min_size=2, rounding="dither", range="common"),
        fc.compression.eden(4, min_size=2),
    ],
    ids=lambda codec: codec.name,
)
def test_codecs_that_rotate_or_need_keys_on_the_way_up(codec):
    """The server undoes with its own keys what clients did with theirs."""
    state, compute = as_computation(mean(codec=codec), (np.float32, [64]))
    values = [np.sin(np.arange(64, dtype=np.float32) + shift) for shift in range(8)]
    expected = np.mean(values, axis=0)
    result = compute(state, KEY, values, [1.0] * 8, list(range(8))).value
    energy = np.mean(np.square(values))
    assert np.mean((result - expected) ** 2) < 0.02 * energy


def test_clients_round_by_their_own_keys():
    """Stochastic rounding depends on a client's id and the round, not on its place in the list."""
    codec = fc.compression.uniform_quantize(1, min_size=1)
    state, compute = as_computation(aggregators.sum(codec=codec), (np.float32, [200]))
    value = np.linspace(0, 1, 200, dtype=np.float32)

    def send(clients, key=KEY):
        return compute(state, key, [value] * len(clients), [1.0] * len(clients), clients).value

    one, two = send([1]), send([2])
    assert np.any(one != two)
    np.testing.assert_array_equal(send([2, 1]), one + two)
    assert np.any(send([1], jax.random.key(7)) != one)


MISUSE = {
    "nothing": (lambda: chain(), "last part"),
    "no aggregator": (lambda: chain(clip_by_global_norm(1.0)), "last part"),
    "a wrapper last": (lambda: chain(mean(), clip_by_global_norm(1.0)), "last part"),
    "two aggregators": (lambda: chain(mean(), mean()), "before the last"),
    "no wrapper": (lambda: chain(1.0, mean()), "before the last"),
    "a wrapper not made yet": (lambda: chain(clip_by_global_norm, mean()), "positive number"),
    "negative norm": (lambda: clip_by_global_norm(-1.0), "positive number"),
    "zero norm": (lambda: zero_by_norm(0), "positive number"),
    "NaN norm": (lambda: fixed(math.nan), "positive number"),
    "infinite norm": (lambda: fixed(math.inf), "positive number"),
    "a truth value": (lambda: fixed(True), "positive number"),
    "order": (lambda: zero_by_norm(1.0, order=3), "order"),
    "initial estimate": (lambda: quantile(0.0, 0.5), "initial_estimate"),
    "target": (lambda: quantile(1.0, 1.5), "target_quantile"),
    "no codec": (lambda: mean(codec=8), "expected a codec of the updates, or None, got 8"),
    "mean of integers": (lambda: as_computation(mean(), np.int32), "floating-point"),
    "plain mean of integers": (
        lambda: as_computation(unweighted_mean(), {"n": np.int32}),
        r"floating-point.*int32 at \['n'\]",
    ),
    "sum of booleans": (lambda: as_computation(aggregators.sum(), np.bool_), "numbers to sum"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse(name):
    make, message = MISUSE[name]
    with pytest.raises(ArgumentError, match=message):
        make()


def test_integers_can_be_summed():
    assert one_round(aggregators.sum(), np.int32, [1, 2, 3])[0] == 6


def test_aggregators_with_memory_need_an_algorithm():
    codec = fc.compression.identity()._replace(init=lambda template: ((), jnp.float32(0)))
    with pytest.raises(ArgumentError, match="without memory"):
        as_computation(mean(codec=codec), np.float32)
