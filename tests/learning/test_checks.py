"""States, cohorts and devices that do not fit: what was expected, what was got, what to do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fedjax_core as fc
from fedjax_core import datasets, memory, models
from fedjax_core.datasets import sampling, spread
from fedjax_core.errors import ArgumentError, DataError, DeviceMemoryError, FederatedTypeError


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    return datasets.from_clients(
        {
            f"client {k}": {
                "image": rng.integers(0, 255, (size, 3), dtype=np.uint8),
                "label": rng.integers(0, 2, size).astype(np.int32),
            }
            for k, size in enumerate((5, 3, 0, 7, 2))
        }
    )


def make(**options):
    model = models.linear(num_classes=2, input_shape=(3,))
    execution = fc.Execution(**options)
    optimizer = optax.sgd(0.1)
    return fc.algorithms.fed_avg(
        model, client_optimizer=optimizer, batch_size=4, execution=execution
    )


@pytest.fixture(scope="module")
def algorithm():
    return make()


@pytest.fixture(scope="module")
def state(algorithm):
    return algorithm.init(jax.random.key(0))


@pytest.fixture(scope="module")
def cohort(dataset):
    return dataset.cohort(dataset.client_ids)


def on(*numbers):
    devices = [jax.devices()[k] for k in numbers]
    return jax.make_mesh((len(numbers),), ("clients",), devices=devices)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"start": np.zeros(5, np.float32)},
            FederatedTypeError,
            r"`start`.*int32\[5\], got float32",
        ),
        ({"start": [0, 1]}, FederatedTypeError, r"`start`.*got \[0, 1\]"),
        ({"start": None}, FederatedTypeError, "`start`.*got None"),
        ({"length": np.zeros(3, np.int32)}, FederatedTypeError, r"`length`.*got int32\[3\]"),
        ({"uid": np.zeros((5, 1), np.uint32)}, FederatedTypeError, r"`uid`.*uint32\[5, 2\]"),
        ({"valid": np.zeros(5, np.int32)}, FederatedTypeError, r"`valid`.*bool\[5\], got int32"),
        ({"capacity": 0}, ArgumentError, "`capacity`.*got 0"),
        ({"capacity": "8"}, ArgumentError, "`capacity`.*got '8'"),
        ({"capacity": 10**12}, ArgumentError, "`capacity`.*31 bits"),
        ({"pools": 2}, ArgumentError, "expected a mesh of 2 devices"),
        ({"examples": [1]}, FederatedTypeError, "got Cohort of list"),
        ({"start": np.full(5, 1000, np.int32)}, DataError, "got rows 1000 to 1005 for client 0"),
        ({"start": np.full(5, -1, np.int32)}, DataError, "got rows -1 to 4"),
        ({"length": np.full(5, 31, np.int32)}, DataError, "clients of at most 8 examples"),
    ],
)
def test_cohorts_that_were_not_made_by_a_dataset(algorithm, state, cohort, change, error, words):
    with pytest.raises(error, match=words):
        algorithm.update(state, dataclasses.replace(cohort, **change))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"key": 0}, ArgumentError, "one key.*got 0"),
        ({"key": jax.random.PRNGKey(0)}, ArgumentError, "one key, as jax.random.key"),
        ({"key": jax.random.split(jax.random.key(0))}, ArgumentError, "one key"),
        ({"clients": jnp.zeros(3)}, FederatedTypeError, "remember nothing"),
    ],
)
def test_states_that_do_not_fit(algorithm, state, dataset, cohort, change, error, words):
    with pytest.raises(error, match=words):
        algorithm.update(state._replace(**change), cohort)
    with pytest.raises(error, match=words):
        algorithm.run(state._replace(**change), dataset, sampling.uniform(dataset, 2), num_rounds=1)


def test_a_state_that_was_given_away(state, dataset, cohort):
    algorithm = make(donate=True)
    given = jax.tree.map(jnp.copy, state)
    kept, _ = algorithm.update(given, cohort)
    for call in (
        lambda: algorithm.update(given, cohort),
        lambda: algorithm.run(given, dataset, sampling.uniform(dataset, 2), num_rounds=1),
        lambda: fc.tune(algorithm, given, cohort, candidates=[fc.Execution()]),
    ):
        with pytest.raises(ArgumentError, match=r"given away.*donate=True.*Go on from the state"):
            call()
    assert int(algorithm.update(kept, cohort)[0].round) == 2


def test_a_number_of_clients_that_is_none(algorithm):
    with pytest.raises(ArgumentError, match=r"number of clients.*got -5"):
        algorithm.init(jax.random.key(0), -5)


# Devices.


def test_arrays_on_other_devices_than_the_round(state, dataset, cohort):
    here, there = make(mesh=on(0, 1)), make(mesh=on(2, 3))
    words = r"mesh, cpu \[2, 3\], got 'image' on cpu \[0, 1\]; spread the cohort"
    with pytest.raises(ArgumentError, match=words):
        there.update(state, spread(cohort, here.execution))
    resident = dataset.on_device(NamedSharding(on(0, 1), P()))
    with pytest.raises(ArgumentError, match=words):
        there.run(state, resident, sampling.uniform(dataset, 2), num_rounds=1)
    with pytest.raises(ArgumentError, match=r"\[1, 0\], got 'image' on cpu \[0, 1\]"):
        make(mesh=on(1, 0)).update(state, spread(cohort, here.execution))
    with pytest.raises(ArgumentError, match=r"got 'image' on cpu \[3\]"):
        here.update(state, dataset.on_device(jax.devices()[3]).cohort(dataset.client_ids))
    with pytest.raises(ArgumentError, match=r"expected a cohort for 1 devices, got one.*over 2"):
        fc.explain(make(), spread(cohort, here.execution))


def test_a_state_on_one_device_and_a_dataset_on_another(algorithm, state, dataset):
    there = jax.device_put(state, jax.devices()[1])
    resident = dataset.on_device(jax.devices()[2])
    with pytest.raises(ArgumentError, match=r"state's params.*cpu \[1\], got 'image' on cpu \[2\]"):
        algorithm.run(there, resident, sampling.uniform(dataset, 2), num_rounds=1)


def test_a_sharding_that_does_not_divide_the_examples(dataset):
    with pytest.raises(ArgumentError, match=r"that divides uint8\[17, 3\].*datasets\.spread"):
        dataset.on_device(NamedSharding(on(0, 1), P("clients")))


def test_a_cohort_is_spread_outside_of_jit(cohort):
    execution = fc.Execution(mesh=on(0, 1))
    with pytest.raises(FederatedTypeError, match="outside of jit"):
        jax.jit(lambda cohort: spread(cohort, execution))(cohort)


# Memory.


def free(monkeypatch, num_bytes):
    monkeypatch.setattr(memory, "available_on_host", lambda: num_bytes)


def test_hostile_numbers_of_clients(dataset, monkeypatch):
    for source in (dataset, dataset.on_device()):
        with pytest.raises(
            ArgumentError, match="num_clients: expected at most 2\\*\\*31 - 1, got 10"
        ):
            source.cohort(dataset.client_ids, num_clients=10**12)
        with monkeypatch.context() as patch:
            free(patch, 1 << 30)
            with pytest.raises(
                DeviceMemoryError, match=r"tables of 2,000,000,000 .*50,000,000,000 b"
            ):
                source.cohort(dataset.client_ids, num_clients=2 * 10**9)


def test_a_dispatch_that_does_not_fit(algorithm, state, dataset, monkeypatch):
    free(monkeypatch, 1000)
    sampler = sampling.uniform(dataset, 5)
    words = (
        r"2,048 examples of a dispatch of 64 rounds take 14,336 bytes.*fewer rounds_per_dispatch"
    )
    with pytest.raises(DeviceMemoryError, match=words):
        algorithm.run(state, dataset, sampler, num_rounds=64)
    assert int(state.round) == 0


def test_a_host_cohort_that_does_not_fit(dataset, monkeypatch):
    free(monkeypatch, 200)
    with pytest.raises(DeviceMemoryError, match=r"the 17 examples of 5 clients .* take 224 bytes"):
        dataset.cohort(dataset.client_ids)


@pytest.mark.parametrize("options", [{"mode": "stacked"}, {"lanes": 10**7}])
def test_more_clients_side_by_side_than_there_is_memory_for(state, dataset, monkeypatch, options):
    """10 million copies of eight float32: 320 MB, told before any of them is made."""
    crowd = dataset.cohort(dataset.client_ids, num_clients=10**7)
    free(monkeypatch, 10**8)
    words = r"32 bytes each, of 10,000,000 clients side by side take 320,000,000 bytes.*lanes=16"
    with pytest.raises(DeviceMemoryError, match=words):
        make(**options).update(state, crowd)
