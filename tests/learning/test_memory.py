"""What clients remember: rows of the state, read and written by the rounds they take part in."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_core as fc
from fedjax_core import aggregators, datasets, memory, models
from fedjax_core.datasets import sampling
from fedjax_core.errors import ArgumentError, DeviceMemoryError, FederatedTypeError
from fedjax_core.learning.algorithm import federated_learning
from fedjax_core.learning.client_work import local_training

# All in one process, which makes what they share once.
pytestmark = pytest.mark.xdist_group("memory")

SIZES = (5, 3, 0, 7, 2, 9)


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    return datasets.from_clients(
        {
            f"client {k}": {
                "image": rng.integers(0, 255, (size, 28, 28, 1), dtype=np.uint8),
                "label": rng.integers(0, 10, size).astype(np.int32),
            }
            for k, size in enumerate(SIZES)
        }
    )


def remembering_work(poisoned=None):
    """Local training that counts its rounds; with an update that is not finite in one of them."""
    inner = local_training(models.linear(), optax.sgd(0.1), batch_size=4)

    def work(key, memory, context, params, hyperparams, examples):
        _, output = inner.work(key, (), context, params, hyperparams, examples)
        if poisoned is not None:
            bad = jnp.where(memory["rounds"] == poisoned, jnp.nan, 0.0)
            output = output._replace(update=jax.tree.map(lambda x: x + bad, output.update))
        return {"rounds": memory["rounds"] + 1}, output

    return inner._replace(init=lambda params: ((), {"rounds": jnp.int32(0)}), work=work)


def make(work, aggregator=None, execution=fc.Execution()):  # noqa: B008 - frozen
    aggregator = aggregator or aggregators.mean()
    model, server = models.linear(), optax.sgd(1.0)
    return federated_learning(model, work, aggregator, server, execution=execution)


def expected_rounds(sampler, num_rounds):
    """How often each client counted; one without examples never does."""
    drawn = np.concatenate([sampler.positions(r) for r in range(num_rounds)])
    return np.bincount(drawn, minlength=len(SIZES)) * (np.array(SIZES) > 0)


@pytest.mark.parametrize("lanes", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_rounds_read_and_write_the_rows_of_their_clients(dataset, lanes):
    algorithm = make(remembering_work(), execution=fc.Execution(lanes=lanes))
    sampler = sampling.uniform(dataset, 3, seed=1)
    state = first = algorithm.init(jax.random.key(0), dataset.num_clients)
    for r in range(5):
        state, _ = algorithm.update(state, dataset.cohort(sampler(r), num_clients=4))
    rounds = state.clients.client_work["rounds"]
    np.testing.assert_array_equal(rounds, expected_rounds(sampler, 5))
    again, _ = algorithm.run(first, dataset.on_device(), sampler, num_rounds=5)
    np.testing.assert_array_equal(again.clients.client_work["rounds"], rounds)


def test_a_client_that_does_not_count_keeps_its_memory(dataset):
    algorithm = make(remembering_work(poisoned=2))
    state = algorithm.init(jax.random.key(0), dataset.num_clients)
    for _ in range(4):
        state, metrics = algorithm.update(state, dataset.cohort(["client 0", "client 1"]))
    assert state.clients.client_work["rounds"].tolist() == [2, 2, 0, 0, 0, 0]
    assert int(metrics.clients["num_non_finite"]) == 2


def test_an_aggregator_may_remember_too(dataset):
    mean = aggregators.mean()

    def aggregate(keys, server, memory, value, weight):
        server, _, total, measured = mean.aggregate(
            keys, server, fc.federated_value((), fc.CLIENTS), value, weight
        )
        memory = fc.federated_map(lambda m, w: m + w, memory, weight)
        return server, memory, total, measured

    remembering = mean._replace(init=lambda template: ((), jnp.float32(0.0)), aggregate=aggregate)
    algorithm = make(local_training(models.linear(), optax.sgd(0.1), batch_size=4), remembering)
    state = algorithm.init(jax.random.key(0), dataset.num_clients)
    state, _ = algorithm.update(state, dataset.cohort(["client 3", "client 5"]))
    assert state.clients.aggregator.tolist() == [0.0, 0.0, 0.0, 7.0, 0.0, 9.0]


@pytest.mark.parametrize(
    "kind",
    [
        jax.sharding.AxisType.Auto,
        pytest.param(jax.sharding.AxisType.Explicit, marks=pytest.mark.slow),
    ],
)
def test_memory_is_spread_over_a_mesh_like_the_clients(dataset, kind):
    mesh = jax.make_mesh((4,), ("clients",), axis_types=(kind,))
    algorithm = make(remembering_work(), execution=fc.Execution(mesh=mesh))
    sampler = sampling.uniform(dataset, 3, seed=1)
    state = algorithm.init(jax.random.key(0), dataset.num_clients)
    assert len(state.clients.client_work["rounds"].sharding.device_set) == 4
    for r in range(3):
        state, _ = algorithm.update(state, dataset.cohort(sampler(r)))
    rounds = np.asarray(state.clients.client_work["rounds"])
    np.testing.assert_array_equal(rounds[: len(SIZES)], expected_rounds(sampler, 3))


def test_a_state_with_memory_is_saved_and_read_again(dataset, tmp_path):
    algorithm = make(remembering_work())
    state = algorithm.init(jax.random.key(0), dataset.num_clients)
    state, _ = algorithm.update(state, dataset.cohort(["client 0"]))
    fc.save(tmp_path / "state", state)
    found = fc.load(tmp_path / "state", algorithm.init(jax.random.key(1), dataset.num_clients))
    np.testing.assert_array_equal(
        found.clients.client_work["rounds"], state.clients.client_work["rounds"]
    )


def test_the_number_of_clients_has_to_be_known():
    with pytest.raises(ArgumentError, match=r"init\(key, dataset.num_clients\)"):
        make(remembering_work()).init(jax.random.key(0))


def test_memory_that_does_not_fit_is_refused_with_its_size(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device=None: 1000)
    with pytest.raises(DeviceMemoryError, match=r"1,000 clients remember, 4 bytes each.*4,000"):
        make(remembering_work()).init(jax.random.key(0), 1000)


def test_a_state_of_fewer_clients_is_refused(dataset):
    algorithm = make(remembering_work())
    state = algorithm.init(jax.random.key(0), 3)
    with pytest.raises(ArgumentError, match=r"below number 3.*got number 5"):
        algorithm.update(state, dataset.cohort(["client 5"]))
    with pytest.raises(ArgumentError, match="below number 3"):
        algorithm.run(state, dataset, sampling.uniform(dataset, 2), num_rounds=1)


def test_memory_of_another_kind_is_refused(dataset):
    algorithm = make(remembering_work())
    state = algorithm.init(jax.random.key(0), dataset.num_clients)
    with pytest.raises(FederatedTypeError, match="What the clients remember does not fit"):
        algorithm.update(state._replace(clients=()), dataset.cohort(["client 0"]))


def test_work_has_to_return_what_it_was_given():
    work = remembering_work()
    changed = work._replace(work=lambda *args: ({"rounds": jnp.float32(0)}, work.work(*args)[1]))
    with pytest.raises(FederatedTypeError, match="return memory as it was given"):
        make(changed)
