"""PowerSGD, against an independent implementation in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_core as fc
from fedjax_core.aggregators import as_computation, power_sgd
from fedjax_core.errors import ArgumentError, CodecError

KEY = jax.random.key(0)
TEMPLATE = {
    "bias": jax.ShapeDtypeStruct((5,), jnp.float32),
    "conv": jax.ShapeDtypeStruct((3, 4, 16), jnp.float32),
    "kernel": jax.ShapeDtypeStruct((20, 30), jnp.float32),
}


def values(num_clients: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        {name: np.float32(rng.normal(size=x.shape)) for name, x in TEMPLATE.items()}
        for _ in range(num_clients)
    ]


def projected(xs, weights, basis):
    """One round of the paper's algorithm for one matrix: the mean, and the next basis."""
    total = sum(w * x for w, x in zip(weights, xs, strict=True)) / sum(weights)
    directions = np.linalg.qr(total @ basis)[0]
    right = total.T @ directions
    return directions @ right.T, right


def test_rounds_are_those_of_the_paper():
    """Without memory a round depends on the mean alone."""
    aggregator = power_sgd(2, error_feedback=False)
    state, compute = as_computation(aggregator, TEMPLATE)
    bases = [np.asarray(x, float) for x in state]
    weights = [1.0, 2.0, 3.0]
    for number in range(3):
        given = values(3, number)
        state, mean, measured = compute(state, KEY, given, weights, [0, 1, 2])
        for index, name in enumerate(("conv", "kernel")):
            xs = [np.float64(x[name]).reshape(-1, x[name].shape[-1]) for x in given]
            expected, bases[index] = projected(xs, weights, bases[index])
            found = np.asarray(mean[name]).reshape(expected.shape)
            np.testing.assert_allclose(found, expected, atol=1e-5)
        bias = sum(w * x["bias"] for w, x in zip(weights, given, strict=True)) / 6
        np.testing.assert_allclose(mean["bias"], bias, atol=1e-6)
        assert measured == {"power_sgd": {"num_clients": 3, "total_weight": 6.0}}


def test_a_mean_of_low_rank_is_exact():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(20, 2)), rng.normal(size=(30, 2))
    given = values(4)
    for number, value in enumerate(given):
        value["kernel"] = np.float32((number + 1) * left @ right.T)
    state, compute = as_computation(power_sgd(2, error_feedback=False), TEMPLATE)
    _, mean, _ = compute(state, KEY, given, [1.0] * 4, [0, 1, 2, 3])
    np.testing.assert_allclose(mean["kernel"], 2.5 * left @ right.T, atol=1e-4)


def regression(num_clients: int) -> fc.datasets.FederatedDataset:
    rng = np.random.default_rng(0)
    shape = (4, 28, 28, 1)
    return fc.datasets.from_clients(
        {
            str(i): {
                "image": rng.integers(0, 256, shape, dtype=np.uint8),
                "label": rng.integers(0, 10, 4).astype(np.int32),
            }
            for i in range(num_clients)
        }
    )


def algorithm(aggregator, **execution):
    return fc.algorithms.fed_avg(
        fc.models.linear(),
        client_optimizer=optax.sgd(0.1),
        batch_size=4,
        aggregator=aggregator,
        weighting="uniform",
        execution=fc.Execution(**execution),
    )


@pytest.mark.slow
def test_errors_telescope_and_absent_clients_keep_theirs():
    """With equal weights: the sum of all means is that of all values but for what is left."""
    data = regression(5)
    own = algorithm(power_sgd(1))
    state = own.init(KEY, 5)
    kernel = max(range(2), key=lambda i: jax.tree.leaves(state.params)[i].size)
    start = np.float64(jax.tree.leaves(state.params)[kernel])
    values = np.zeros_like(start)
    for number in range(6):
        present = [str((number + i) % 5) for i in range(3)]
        absent = [i for i in range(5) if str(i) not in present]
        raw = algorithm(fc.aggregators.mean())
        plain = raw.init(KEY)._replace(params=state.params)
        exact, _ = raw.update(plain, data.cohort(present))
        leaves = [jax.tree.leaves(x.params)[kernel] for x in (state, exact)]
        values += np.float64(leaves[0]) - np.float64(leaves[1])
        before = state.clients.aggregator[0]
        state, metrics = own.update(state, data.cohort(present))
        after = state.clients.aggregator[0]
        np.testing.assert_array_equal(after[np.array(absent)], before[np.array(absent)])
    moved = start - np.float64(jax.tree.leaves(state.params)[kernel])
    left = np.asarray(after, float).sum(axis=0) / 3
    assert np.linalg.norm(left) > 0.1 * np.linalg.norm(values)
    np.testing.assert_allclose(moved + left.reshape(moved.shape), values, atol=1e-5)
    up = {name: int(bits) for name, bits in metrics.communication.aggregate.items()}
    assert up["left"] == 3 * 32 * 784
    assert up["update"] == 3 * 32 * (10 + 10)


def test_the_ways_to_run_agree_and_nothing_but_sums_goes_up():
    data = regression(4)
    found = []
    for execution in ({"mode": "stacked"}, {"lanes": 2}, {"lanes": 3}):
        own = algorithm(power_sgd(2), **execution)
        state, _ = own.update(own.init(KEY, 4), data.cohort(data.client_ids))
        found.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.params)]))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5)
    fc.check_aggregated_only(own.computation)


def test_nobody_present_keeps_the_basis():
    state, compute = as_computation(power_sgd(2, error_feedback=False), TEMPLATE)
    new, mean, _ = compute(state, KEY, values(2), [0.0, 0.0], [0, 1])
    for a, b in zip(new, state, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not any(np.any(x) for x in jax.tree.leaves(mean))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: power_sgd(0), "expected rank to be an integer from 1 to 256"),
        (lambda: power_sgd(error_feedback=1), "error_feedback"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises((ArgumentError, CodecError), match=message):
        make()


def test_integers_are_refused():
    with pytest.raises(ArgumentError, match="floating-point numbers to average"):
        power_sgd().init(jax.ShapeDtypeStruct((4, 4), jnp.int32))
