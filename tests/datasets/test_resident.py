"""Datasets on a device: cohorts of them are slices of one pool, and memory is asked for first."""

import jax
import numpy as np
import pytest

from fedjax_core import datasets, memory
from fedjax_core.errors import (
    DataError,
    DeviceMemoryError,
    FederatedTypeError,
    UnknownClientError,
)


@pytest.fixture
def dataset():
    rows = {"x": np.arange(6, dtype=np.uint8), "y": np.arange(6, dtype=np.float32)}
    parts = {"a": slice(0, 3), "b": slice(3, 3), "c": slice(3, 6)}
    return datasets.from_clients({k: {n: x[s] for n, x in rows.items()} for k, s in parts.items()})


def rows_of(cohort, client):
    sequence = cohort.sequence()
    rows = slice(int(sequence.start[client]), int(sequence.start[client] + sequence.length[client]))
    return {name: np.asarray(x)[rows] for name, x in sequence.elements.items()}


def test_examples_stay_as_they_are_stored(dataset):
    resident = dataset.on_device()
    assert resident.examples["x"].dtype == np.uint8
    assert resident.num_bytes == 6 * (1 + 4)
    assert all(isinstance(x, jax.Array) for x in resident.examples.values())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices have their own memory")
@pytest.mark.parametrize("make", ["clients", "arrays", "select"])
def test_on_a_cpu_no_example_is_held_twice(dataset, make):
    rows = {"x": np.arange(6, dtype=np.uint8), "y": np.arange(6, dtype=np.float32)}
    by_arrays = datasets.from_arrays(rows, partition=datasets.partition.iid(2))
    dataset = {"clients": dataset, "arrays": by_arrays, "select": dataset.select(["c", "a"])}[make]
    resident = dataset.on_device()
    for name, x in dataset.examples.items():
        assert np.shares_memory(np.asarray(resident.examples[name]), x)


def test_a_cohort_has_the_same_clients_as_one_of_the_host(dataset):
    ids = ["c", "b", "a"]
    ours, theirs = dataset.on_device().cohort(ids, 4), dataset.cohort(ids, 4)
    for k in range(3):
        jax.tree.map(np.testing.assert_array_equal, rows_of(ours, k), rows_of(theirs, k))
    for name in ("length", "uid", "index", "valid"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_cohorts_share_the_pool_and_their_shapes(dataset):
    resident = dataset.on_device()
    first, second = resident.cohort(["a"]), resident.cohort(["b"])
    assert first.examples["x"] is second.examples["x"]
    assert jax.tree.structure(first) == jax.tree.structure(second)


@pytest.mark.parametrize(
    ("positions", "error", "words"),
    [
        ([0, 0], DataError, "'a' 2 times"),
        ([3], UnknownClientError, "from 0 to 2"),
        ([-1], UnknownClientError, "got -1"),
        ([], DataError, "at least one"),
        ([0.5], FederatedTypeError, "as integers"),
    ],
)
def test_wrong_positions_are_named(dataset, positions, error, words):
    with pytest.raises(error, match=words):
        dataset.on_device().cohort_at(np.array(positions))


def test_what_does_not_fit_is_refused_before_it_is_taken(dataset, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device=None: 29)
    monkeypatch.setattr(memory, "available_on_host", lambda: 29)
    with pytest.raises(DeviceMemoryError, match=r"6 examples of 'clients' take 30 bytes.*29 bytes"):
        dataset.on_device()
    with pytest.raises(MemoryError, match=r"take 40 bytes .*take fewer clients a round"):
        dataset.cohort(["a", "c"])


def test_the_host_says_how_much_memory_it_has():
    found = memory.available_bytes(jax.devices("cpu")[0])
    assert found is None or found > 2**20
