"""Quantile norms, and the two ready-made chains."""

import math

import jax
import numpy as np
import pytest

import fedjax_core as fc
from fedjax_core import aggregators
from fedjax_core.aggregators import (
    as_computation,
    chain,
    clip_by_global_norm,
    default_clipping_norm,
    default_zeroing_norm,
    mean,
    quantile,
    robust_aggregator,
    zero_by_norm,
)
from fedjax_core.aggregators.robust import global_norm
from fedjax_core.errors import ArgumentError

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


@pytest.mark.parametrize(
    ("is_geometric", "expected"),
    [(True, 3.14159 * math.exp(2.71828 * 0.61803)), (False, 3.14159 + 2.71828 * 0.61803)],
)
def test_quantile_when_all_are_above(is_geometric, expected):
    """C-91."""
    norm = quantile(3.14159, 0.61803, 2.71828, is_geometric=is_geometric)
    aggregator = chain(zero_by_norm(norm), aggregators.sum())
    _, measured = rounds(aggregator, np.float32, [10.0, 20.0], num_rounds=2)
    norms = [m["zero_by_norm"]["norm"] for m in measured]
    np.testing.assert_allclose(norms, [3.14159, expected], rtol=1e-6)


def test_default_zeroing_norm():
    """C-93: four reports on [100, 1000], twice the estimate plus one."""
    aggregator = chain(zero_by_norm(default_zeroing_norm()), aggregators.sum())
    _, measured = rounds(aggregator, np.float32, [100.0, 1000.0], num_rounds=4)
    norms = [m["zero_by_norm"]["norm"] for m in measured]
    np.testing.assert_allclose(norms, [21, 191.99852, 1825.0217, 5509.458], rtol=1e-6)


def numpy_quantile(estimate, target, rate, values, num_rounds):
    """The geometric rule of Andrew et al. in float64."""
    for _ in range(num_rounds):
        yield estimate
        estimate *= np.exp(rate * (target - np.mean(np.asarray(values) <= estimate)))


def test_default_clipping_norm_follows_the_numpy_rule():
    """30 rounds near the 80 % quantile of ten clients' Euclidean norms, clipping as it goes."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=(10, 4)).astype(np.float32)
    norms = np.linalg.norm(values.astype(np.float64), axis=1)
    aggregator = chain(clip_by_global_norm(default_clipping_norm()), mean())
    t = (np.float32, [4])
    results, measured = rounds(aggregator, t, list(values), num_rounds=30)
    estimates = np.array(list(numpy_quantile(1.0, 0.8, 0.2, norms, 30)))
    got = [m["clip_by_global_norm"]["norm"] for m in measured]
    np.testing.assert_allclose(got, estimates, rtol=1e-5)
    scales = np.minimum(1, estimates[:, None] / norms)
    np.testing.assert_allclose(results, np.einsum("rc,ci->ri", scales, values) / 10, atol=1e-6)
    counts = [m["clip_by_global_norm"]["count"] for m in measured]
    assert counts == np.sum(norms > estimates[:, None], axis=1).tolist()


def test_quantiles_stay_without_clients():
    """A round of nobody leaves the estimate; only those present vote."""
    aggregator = chain(clip_by_global_norm(quantile(1.0, 0.5, 1.0)), mean())
    state, compute = as_computation(aggregator, np.float32)
    nobody = compute(state, KEY, [5.0, 5.0], [0.0, 0.0], [0, 1])
    assert nobody.state.norm == 1.0
    one = compute(state, KEY, [0.1, 5.0], [0.0, 1.0], [0, 1])
    assert one.state.norm == pytest.approx(math.exp(0.5), rel=1e-6)


def test_a_norm_at_the_estimate_is_below_it():
    aggregator = chain(clip_by_global_norm(quantile(1.0, 0.5, 1.0)), mean())
    _, measured = rounds(aggregator, np.float32, [1.0, 2.0, 1.0, 1.0], num_rounds=2)
    norm = measured[1]["clip_by_global_norm"]["norm"]
    assert norm == pytest.approx(math.exp(0.5 - 0.75), rel=1e-6)


def test_robust_aggregator_is_its_chain():
    """Zeroing at 2 q98 + 1 = 21, clipping at 1, then the weighted mean: three rounds in NumPy."""
    values, weights = np.float32([0.5, 2.0, 30.0]), np.float32([1, 2, 1])
    zeroing, clipping, expected = 10.0, 1.0, []
    for _ in range(3):
        kept = np.where(values <= 2 * zeroing + 1, values, 0)
        expected.append(np.average(np.minimum(kept, clipping), weights=weights))
        zeroing *= np.exp(np.log(10) * (0.98 - np.mean(values <= zeroing)))
        clipping *= np.exp(0.2 * (0.8 - np.mean(kept <= clipping)))
    results, measured = rounds(robust_aggregator(), np.float32, values, weights, num_rounds=3)
    np.testing.assert_allclose(results, expected, rtol=1e-5)
    assert set(measured[0]) == {"zero_by_norm", "clip_by_global_norm", "mean"}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, {"zero_by_norm", "clip_by_global_norm", "mean"}),
        ({"zeroing": False}, {"clip_by_global_norm", "mean"}),
        ({"clipping": False}, {"zero_by_norm", "mean"}),
        ({"zeroing": False, "clipping": False, "weighted": False}, {"unweighted_mean"}),
    ],
)
@pytest.mark.parametrize("make", [robust_aggregator, aggregators.compression_aggregator])
def test_parts_can_be_left_out(make, settings, names):
    _, measured = one_round(make(**settings), np.float32, [1.0, 2.0])
    assert set(measured) == names


def test_compression_aggregator_has_the_defaults_of_tff():
    """8 bits for tensors of more than 20,000 elements, all else raw; 32 for weights and votes."""
    t = {"large": (np.float32, [20_001]), "small": (np.float32, [20_000])}
    _, compute = as_computation(aggregators.compression_aggregator(), t)
    report = fc.communication(compute, num_clients=1)
    up = {(e.name, e.bits_per_client) for e in report if e.direction == "up"}
    assert ("update", 20_001 * 8 + 64 + 20_000 * 32) in up
    assert ("weight", 32) in up
    assert {bits for name, bits in up if name == "norm"} == {32}
    codecs = [edge.codec for edge in report if edge.name == "update"]
    assert codecs == ["uniform_quantize(bits=8)"]


def test_compression_aggregator_is_the_robust_one_within_a_step():
    """Quantised after clipping: each client's error is below one step of its own range."""
    rng = np.random.default_rng(0)
    values = list(rng.uniform(-0.1, 0.1, (3, 50)).astype(np.float32))
    t = (np.float32, [50])
    exact, _ = one_round(robust_aggregator(), t, values)
    compressed = aggregators.compression_aggregator(bits=6, min_size=10)
    coarse, _ = one_round(compressed, t, values)
    error = np.max(np.abs(coarse - exact))
    assert 0 < error <= 0.2 / (2**6 - 1)
    raw, _ = one_round(aggregators.compression_aggregator(min_size=50), t, values)
    np.testing.assert_array_equal(raw, exact)


def test_arithmetic_estimate_below_zero_clips_to_nothing():
    """A norm is never negative: the sign of what clients send is kept."""
    aggregator = chain(clip_by_global_norm(quantile(0.5, 0.1, 1.0, is_geometric=False)), mean())
    values, measured = rounds(aggregator, np.float32, [0.2, 0.3], num_rounds=3)
    np.testing.assert_allclose(values[0], 0.25, rtol=1e-6)
    assert all(float(value) == 0.0 for value in values[1:])
    assert float(measured[1]["clip_by_global_norm"]["norm"]) == 0.0


@pytest.mark.parametrize(
    "keywords",
    [
        {"initial_estimate": 0.0},
        {"initial_estimate": math.inf},
        {"initial_estimate": "1"},
        {"target_quantile": 1.5},
        {"learning_rate": math.nan},
        {"multiplier": -1.0},
        {"multiplier": math.nan},
        {"increment": -1.0},
    ],
    ids=str,
)
def test_quantile_refuses_what_is_no_norm(keywords):
    with pytest.raises(ArgumentError, match=next(iter(keywords))):
        quantile(**({"initial_estimate": 1.0, "target_quantile": 0.5} | keywords))


def test_norm_of_nothing_is_zero():
    assert float(global_norm({})) == 0.0
    assert float(global_norm({"empty": np.zeros((0, 3), np.float32)}, math.inf)) == 0.0
