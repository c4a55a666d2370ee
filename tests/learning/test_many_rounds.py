"""Many rounds in one program: the same bits as round by round, and one compilation."""

import jax
import numpy as np
import optax
import pytest

import fedjax_core as fc
from fedjax_core import datasets, models
from fedjax_core.aggregators import mean
from fedjax_core.compression import uniform_quantize
from fedjax_core.datasets import sampling
from fedjax_core.errors import ArgumentError, DataError, FederatedTypeError

# All in one process, which makes what they share once.
pytestmark = pytest.mark.xdist_group("many_rounds")

NUM_ROUNDS = 7


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 30, 12)
    return datasets.from_clients(
        {
            f"client {k}": {
                "image": rng.integers(0, 255, (size, 28, 28, 1), dtype=np.uint8),
                "label": rng.integers(0, 10, size).astype(np.int32),
            }
            for k, size in enumerate(sizes)
        }
    )


def make(model=None, **kwargs):
    model = model or models.linear()
    return fc.algorithms.fed_avg(model, client_optimizer=optax.sgd(0.1), batch_size=8, **kwargs)


def one_by_one(algorithm, state, dataset, sampler, num_rounds=NUM_ROUNDS):
    rows = []
    for r in range(int(state.round), int(state.round) + num_rounds):
        state, metrics = algorithm.update(state, dataset.cohort(sampler(r)))
        rows.append(jax.device_get(metrics))
    return state, jax.tree.map(lambda *xs: np.stack(xs), *rows)


def check_same_bits(ours, theirs):
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def plain(dataset):
    """An algorithm, its first state, and what rounds one by one come to."""
    algorithm = make(aggregator=mean(codec=uniform_quantize(8)))
    state = algorithm.init(jax.random.key(1))
    sampler = sampling.uniform(dataset, 4, seed=3)
    return algorithm, state, one_by_one(algorithm, state, dataset, sampler)


@pytest.mark.parametrize("is_resident", [False, True])
@pytest.mark.parametrize("rounds_per_dispatch", [None, pytest.param(1, marks=pytest.mark.slow), 3])
def test_the_same_bits_as_round_by_round(dataset, plain, is_resident, rounds_per_dispatch):
    algorithm, state, expected = plain
    sampler = sampling.uniform(dataset, 4, seed=3)
    found = algorithm.run(
        state,
        dataset.on_device() if is_resident else dataset,
        sampler,
        num_rounds=NUM_ROUNDS,
        rounds_per_dispatch=rounds_per_dispatch,
    )
    check_same_bits(found, expected)


@pytest.mark.slow
def test_the_same_bits_with_convolutions(dataset):
    algorithm = make(models.emnist_cnn())
    sampler = sampling.uniform(dataset, 2, seed=3)
    state = algorithm.init(jax.random.key(1))
    expected = one_by_one(algorithm, state, dataset, sampler, 2)
    found = algorithm.run(state, dataset.on_device(), sampler, num_rounds=2)
    check_same_bits(found, expected)


def test_a_run_goes_on_where_the_state_is(dataset, plain):
    algorithm, state, (whole, metrics) = plain
    resident, sampler = dataset.on_device(), sampling.uniform(dataset, 4, seed=3)
    half, first = algorithm.run(state, resident, sampler, num_rounds=3, rounds_per_dispatch=4)
    again, second = algorithm.run(half, resident, sampler, num_rounds=4, rounds_per_dispatch=4)
    check_same_bits(again, whole)
    check_same_bits(jax.tree.map(lambda a, b: np.concatenate([a, b]), first, second), metrics)
    assert int(state.round) == 0  # still usable


@pytest.mark.parametrize(
    "kind",
    [
        jax.sharding.AxisType.Auto,
        pytest.param(jax.sharding.AxisType.Explicit, marks=pytest.mark.slow),
    ],
)
def test_many_rounds_on_a_mesh(dataset, plain, kind):
    """Four devices, cohorts of five: as on one, for a resident dataset and one of the host."""
    mesh = jax.make_mesh((4,), ("clients",), axis_types=(kind,))
    algorithm = make(execution=fc.Execution(mesh=mesh))
    sampler = sampling.uniform(dataset, 5, seed=3)
    state = plain[1]
    expected, theirs = make().run(state, dataset, sampler, num_rounds=3)
    for source in (dataset, dataset.on_device()):
        found, ours = algorithm.run(state, source, sampler, num_rounds=3, rounds_per_dispatch=2)
        for x, y in zip(*map(jax.tree.leaves, (found.params, expected.params)), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)
        np.testing.assert_array_equal(ours.train["num_examples"], theirs.train["num_examples"])
    # What comes from a mesh goes on without one.
    again, _ = make().run(found, dataset, sampler, num_rounds=2)
    assert int(again.round) == 5


def test_a_sampler_of_another_dataset_is_asked_for_ids(dataset, plain):
    """Positions there are other clients here."""
    algorithm, state, _ = plain
    turned = dataset.select(dataset.client_ids[::-1])
    sampler = sampling.uniform(turned, 4, seed=3)
    expected = one_by_one(algorithm, state, dataset, sampler, 2)
    check_same_bits(algorithm.run(state, dataset, sampler, num_rounds=2), expected)
    foreign = datasets.from_clients({"x": dataset.client("client 0")})
    with pytest.raises(DataError, match="no client 'x'"):
        algorithm.run(state, dataset, sampling.uniform(foreign, 1), num_rounds=1)


def test_rounds_that_the_state_cannot_count(dataset, plain):
    algorithm, state, _ = plain
    late = state._replace(round=jax.numpy.int32(2**31 - 2))
    with pytest.raises(ArgumentError, match=r"below number 2,147,483,647.*from round 2147483646"):
        algorithm.run(late, dataset, sampling.uniform(dataset, 2), num_rounds=2)


@pytest.mark.slow
def test_cohorts_of_different_sizes(dataset):
    algorithm = make()
    sampler = lambda r: [f"client {k}" for k in range(1 + r % 3)]  # noqa: E731
    state = algorithm.init(jax.random.key(1))
    expected, _ = one_by_one(algorithm, state, dataset, sampler)
    found, metrics = algorithm.run(
        state, dataset, sampler, num_rounds=NUM_ROUNDS, rounds_per_dispatch=2
    )
    assert metrics.clients["num_clients"].tolist() == [1, 2, 3, 1, 2, 3, 1]
    for x, y in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_thirty_cohorts_are_one_program(dataset):
    algorithm, resident = make(), dataset.on_device()
    sampler = sampling.uniform(dataset, 4, seed=3)
    state = algorithm.init(jax.random.key(1))
    state, _ = algorithm.update(state, resident.cohort(sampler(0)))
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    for r in range(1, 31):
        state, _ = algorithm.update(state, resident.cohort(sampler(r)))
    assert not [name for name in events if "compile" in name]
    jax.jit(lambda x: x + len(events))(1.0)  # is noticed
    assert [name for name in events if "compile" in name]
    assert len(algorithm.compiled()) == 1


def test_no_round_gives_no_metrics(dataset):
    algorithm = make()
    state = algorithm.init(jax.random.key(1))
    found, metrics = algorithm.run(state, dataset, sampling.uniform(dataset, 2), num_rounds=0)
    check_same_bits(found, state)
    assert metrics.train["loss"].shape == (0,)


@pytest.mark.parametrize("mode", ["reference", "dispatched"])
def test_modes_that_the_host_drives(dataset, mode):
    algorithm = make(execution=fc.Execution(mode=mode))
    sampler = sampling.uniform(dataset, 2, seed=3)
    state = algorithm.init(jax.random.key(1))
    expected = one_by_one(algorithm, state, dataset, sampler, 2)
    check_same_bits(algorithm.run(state, dataset, sampler, num_rounds=2), expected)


def test_bits_are_counted_round_by_round(dataset):
    algorithm = make()
    state = algorithm.init(jax.random.key(1))
    _, metrics = algorithm.run(state, dataset, sampling.uniform(dataset, 3), num_rounds=4)
    assert metrics.communication.broadcast["params"].low.tolist() == [3 * 7850 * 32] * 4


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_rounds": -1}, ArgumentError, "num_rounds"),
        ({"num_rounds": 1.5}, ArgumentError, "num_rounds"),
        ({"rounds_per_dispatch": 0}, ArgumentError, "rounds_per_dispatch"),
        ({"sampler": [1]}, FederatedTypeError, "sampler"),
        ({"dataset": {}}, FederatedTypeError, "FederatedDataset"),
        ({"state": 3}, FederatedTypeError, "state that init returned"),
        ({"sampler": lambda r: ["nobody"]}, DataError, "no client 'nobody'"),
    ],
)
def test_misuse_is_named(dataset, plain, change, error, words):
    algorithm, state, _ = plain
    given = {
        "state": state,
        "dataset": dataset,
        "sampler": sampling.uniform(dataset, 2),
        "num_rounds": 1,
    } | change
    args = [given.pop(name) for name in ("state", "dataset", "sampler")]
    with pytest.raises(error, match=words):
        algorithm.run(*args, **given)


def test_labels_are_checked_before_anything_runs(plain):
    rows = {"image": np.zeros((2, 28, 28, 1), np.uint8), "label": np.array([3, 12], np.int32)}
    bad = datasets.from_clients({"a": rows})
    algorithm, state, _ = plain
    with pytest.raises(DataError, match="got 12"):
        algorithm.run(state, bad, lambda r: ["a"], num_rounds=1)
