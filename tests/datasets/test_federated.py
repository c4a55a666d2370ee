import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_core import datasets
from fedjax_core.datasets.cohort import client_uid, gather_rows, next_power_of_two, slice_rows
from fedjax_core.datasets.federated import FederatedDataset
from fedjax_core.errors import ArgumentError, DataError, FederatedTypeError, UnknownClientError


def _sized(sizes):
    """Client `%04x` of i has the rows i * 1000 + 0..sizes[i]."""
    return datasets.from_clients(
        {
            f"{i:04x}": {
                "x": (i * 1000 + np.arange(n)).astype(np.int32),
                "image": np.full((n, 2, 3), i % 256, np.uint8),
            }
            for i, n in enumerate(sizes)
        },
        name="sized",
    )


def test_hundred_clients_have_their_own_rows():
    data = _sized(range(1, 101))
    assert data.client_ids == tuple(f"{i:04x}" for i in range(100))
    assert data.num_clients == len(data) == 100
    np.testing.assert_array_equal(data.num_examples, np.arange(1, 101))
    for i, client_id in enumerate(data.client_ids):
        np.testing.assert_array_equal(data.client(client_id)["x"], i * 1000 + np.arange(i + 1))


def test_cohort_packs_clients_in_the_order_asked_for():
    cohort = _sized([2, 0, 3]).cohort(["0002", "0000"])
    assert cohort.num_clients == 2
    assert cohort.examples["x"].tolist() == [2000, 2001, 2002, 0, 1, 0, 0, 0]
    assert cohort.examples["image"].shape == (8, 2, 3)
    assert cohort.examples["image"].dtype == np.uint8
    assert cohort.start.tolist() == [0, 3]
    assert cohort.length.tolist() == [3, 2]
    assert cohort.index.tolist() == [2, 0]
    assert cohort.valid.tolist() == [True, True]
    assert cohort.capacity == 4
    assert [x.dtype for x in (cohort.start, cohort.length, cohort.index)] == [np.int32] * 3
    assert cohort.uid.dtype == np.uint32
    assert cohort.valid.dtype == np.bool_


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_cohort_holds_exactly_the_clients_examples(data):
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))
    dataset = _sized(sizes)
    ids = data.draw(st.permutations(dataset.client_ids))
    ids = ids[: data.draw(st.integers(1, len(ids)))]
    cohort = dataset.cohort(ids)
    for i, client_id in enumerate(ids):
        rows = slice(cohort.start[i], cohort.start[i] + cohort.length[i])
        np.testing.assert_array_equal(cohort.examples["x"][rows], dataset.client(client_id)["x"])
        assert cohort.length[i] <= cohort.capacity
    num_rows = int(cohort.length.sum())
    assert cohort.examples["x"][num_rows:].tolist() == [0] * (
        next_power_of_two(num_rows) - num_rows
    )


def test_cohort_is_padded_with_clients_that_count_for_nothing():
    cohort = _sized([2, 1, 3]).cohort(["0001"], num_clients=3)
    assert cohort.num_clients == 3
    assert cohort.valid.tolist() == [True, False, False]
    assert cohort.length.tolist() == [1, 0, 0]
    # A scatter to index 3 of 3 clients is dropped, so padding never overwrites a client's memory.
    assert cohort.index.tolist() == [1, 3, 3]
    memory = jnp.zeros(3).at[cohort.index].set(jnp.ones(3))
    assert memory.tolist() == [0.0, 1.0, 0.0]


def test_cohort_of_empty_clients():
    cohort = _sized([0, 0, 1]).cohort(["0000", "0001"])
    assert cohort.length.tolist() == [0, 0]
    assert cohort.examples["x"].tolist() == [0]
    assert cohort.capacity == 1


def test_cohort_is_a_pytree_and_gives_a_packed_sequence():
    cohort = _sized([2, 3]).cohort(["0001", "0000"])
    sums = jax.jit(lambda c: jnp.sum(c.length) + c.num_clients)(cohort)
    assert int(sums) == 7
    sequence = cohort.sequence()
    assert sequence.packed
    assert sequence.capacity == 4
    first = jax.tree.map(lambda x: x[0], (sequence.start, sequence.length))
    taken = jnp.take(sequence.elements["x"], first[0] + jnp.arange(3))
    assert taken.tolist() == [1000, 1001, 1002]
    assert "num_clients=2" in repr(cohort)
    assert "Cohort" in repr(jax.tree.structure(cohort).unflatten([None] * 7))


def test_rounds_of_similar_size_have_the_same_shapes():
    data = _sized([5, 6, 7, 8])
    shapes = [
        jax.tree.map(np.shape, data.cohort(ids).examples) for ids in (["0000"], ["0001"], ["0003"])
    ]
    assert shapes[0] == shapes[1] == shapes[2]


def test_uid_is_the_start_of_sha256():
    digest = hashlib.sha256(b"f0001_41").digest()
    words = [int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")]
    assert client_uid("f0001_41").tolist() == words
    assert client_uid("f0001_41").dtype == np.uint32
    data = datasets.from_clients({"f0001_41": {"x": [1]}, "b": {"x": [2]}})
    assert data.cohort(["b", "f0001_41"]).uid[1].tolist() == words
    assert client_uid("\udcff").shape == (2,)


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        ([], DataError, "at least one client id"),
        (["0000", "0001", "0000"], DataError, "'0000' 2 times"),
        (["000g"], UnknownClientError, "did you mean"),
        ([0], FederatedTypeError, "of type int"),
        ([None], FederatedTypeError, "NoneType"),
        ("0000", FederatedTypeError, "a list of client ids"),
        (b"0000", FederatedTypeError, "a list of client ids"),
        (7, FederatedTypeError, "a list of client ids"),
    ],
)
def test_bad_ids_are_refused(ids, error, words):
    data = _sized([1, 2])
    for use in (data.cohort, data.select):
        with pytest.raises(error, match=words):
            use(ids)


def test_unknown_client_suggests_close_ids_and_is_a_key_error():
    data = datasets.from_clients({"writer_07": {"x": [1]}, "other": {"x": [1]}}, name="pens")
    with pytest.raises(KeyError) as caught:
        data.client("writer_7")
    assert "'writer_7'" in str(caught.value)
    assert "writer_07" in str(caught.value)
    assert "'pens'" in str(caught.value)
    with pytest.raises(FederatedTypeError):
        data.client(3)


def test_padding_below_the_number_of_ids_is_refused():
    with pytest.raises(ArgumentError, match="num_clients=1"):
        _sized([1, 1]).cohort(["0000", "0001"], num_clients=1)


def test_select_keeps_clients_in_order():
    chosen = _sized([2, 3, 1]).select(iter(["0002", "0000"]))
    assert chosen.client_ids == ("0002", "0000")
    assert chosen.examples["x"].tolist() == [2000, 0, 1]
    assert chosen.offsets.tolist() == [0, 1, 3]


def test_examples_cannot_be_written_through_the_dataset():
    mine = np.arange(3, dtype=np.int32)
    data = FederatedDataset({"x": mine}, np.array([0, 3]), ("a",))
    with pytest.raises(ValueError, match="read-only"):
        data.client("a")["x"][0] = 9
    with pytest.raises(ValueError, match="read-only"):
        data.num_examples[0] = 9
    mine[0] = 5
    assert data.client("a")["x"][0] == 5


def test_memory_mapped_examples_stay_on_disk(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(12, dtype=np.float32).reshape(6, 2))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    data = FederatedDataset({"x": mapped}, np.array([0, 2, 6]), ("a", "b"))
    assert isinstance(data.examples["x"], np.memmap)
    cohort = data.cohort(["b"])
    assert type(cohort.examples["x"]) is np.ndarray
    np.testing.assert_array_equal(cohort.examples["x"], np.arange(4, 12).reshape(4, 2))


def test_element_spec_and_repr():
    data = _sized([1, 2])
    assert data.element_spec == {
        "x": jax.ShapeDtypeStruct((), np.int32),
        "image": jax.ShapeDtypeStruct((2, 3), np.uint8),
    }
    assert repr(data) == (
        "FederatedDataset('sized', num_clients=2, num_examples=3, "
        "features={'x': 'int32[]', 'image': 'uint8[2, 3]'})"
    )


@pytest.mark.parametrize(
    ("examples", "offsets", "ids", "words"),
    [
        ({}, [0, 0], ("a",), "at least one feature"),
        ({"x": np.zeros(3), "y": np.zeros(2)}, [0, 3], ("a",), "unequal length"),
        ({"x": np.zeros(3)}, [0, 2], ("a",), "rise from 0 to the 3 examples"),
        ({"x": np.zeros(3)}, [0, 4, 3], ("a", "b"), "rise from 0"),
        ({"x": np.zeros(3)}, [0, 3], ("a", "b"), r"shape \[3\]"),
        ({"x": np.zeros(3)}, [0, 1, 3], ("a", "a"), "'a' more than once"),
        ({"x": np.zeros(3)}, [0], (), "at least one client"),
        ({"x": np.float32(1)}, [0, 1], ("a",), "scalar"),
        ({"x": np.array(["p", "q"])}, [0, 2], ("a",), "encode text"),
        ({"x": np.array([{}, {}])}, [0, 2], ("a",), "dtype object"),
        ({"x": np.zeros(2, "datetime64[s]")}, [0, 2], ("a",), "datetime64"),
    ],
)
def test_inconsistent_datasets_are_refused(examples, offsets, ids, words):
    with pytest.raises(DataError, match=words):
        FederatedDataset(examples, np.array(offsets), ids)


def test_extended_floats_are_numbers():
    data = datasets.from_clients({"a": {"x": np.asarray(jnp.ones(2, jnp.bfloat16))}})
    assert data.element_spec["x"].dtype == jnp.bfloat16


def test_sixty_four_bits_become_thirty_two():
    data = datasets.from_clients(
        {"a": {"i": [1, 2], "f": [0.5, 1.5], "u": np.arange(2, dtype="u8")}}
    )
    assert {n: str(s.dtype) for n, s in data.element_spec.items()} == {
        "i": "int32",
        "f": "float32",
        "u": "uint32",
    }
    with pytest.raises(DataError, match=r"client 'a', feature 'i'.*do not fit into int32"):
        datasets.from_clients({"a": {"i": [1, 2**31]}})


@pytest.mark.parametrize(
    ("clients", "error", "words"),
    [
        ({}, DataError, "at least one client"),
        ([("a", {"x": [1]})], DataError, "dict of client id"),
        ({"a": [1, 2]}, DataError, "client 'a': expected a dict"),
        ({"a": {}}, DataError, "client 'a': expected at least one feature"),
        ({1: {"x": [1]}}, FederatedTypeError, "client ids are str"),
        ({"a": {"x": [1], "y": [1, 2]}}, DataError, "client 'a': features of unequal length"),
        ({"a": {"x": [1]}, "b": {"y": [1]}}, DataError, "client 'b' has the features"),
        ({"a": {"x": [1]}, "b": {"x": [1.5]}}, DataError, "feature 'x': client 'b' has float32"),
        ({"a": {"x": [[1]]}, "b": {"x": [1]}}, DataError, r"int32\[\] an example, client 'a'"),
        ({"a": {"x": 3}}, DataError, "client 'a', feature 'x'.*scalar"),
    ],
)
def test_clients_that_do_not_fit_are_refused(clients, error, words):
    with pytest.raises(error, match=words):
        datasets.from_clients(clients)


def test_clients_may_be_empty():
    data = datasets.from_clients(
        {"a": {"x": np.zeros((0, 2), "f4")}, "b": {"x": np.ones((1, 2), "f4")}}
    )
    assert data.num_examples.tolist() == [0, 1]
    assert data.client("a")["x"].shape == (0, 2)
    only = datasets.from_clients({"a": {"x": np.zeros((0, 2), "f4")}})
    assert only.cohort(["a"]).examples["x"].tolist() == [[0.0, 0.0]]


def test_slices_become_row_numbers():
    assert slice_rows(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert slice_rows(np.array([], int), np.array([], int)).tolist() == []
    assert gather_rows(np.arange(4), np.array([3, 1]), 3).tolist() == [3, 1, 0]
    assert [next_power_of_two(n) for n in (0, 1, 2, 3, 4, 5, 1024, 1025)] == [
        1, 1, 2, 4, 4, 8, 1024, 2048,
    ]  # fmt: skip


def test_cohort_of_many_clients_is_quick():
    import time

    sizes = np.full(20_000, 3)
    data = FederatedDataset(
        {"x": np.arange(60_000, dtype=np.int32)},
        np.concatenate([[0], np.cumsum(sizes)]),
        tuple(map(str, range(20_000))),
    )
    data.cohort(["0"])
    begin = time.perf_counter()
    cohort = data.cohort(data.client_ids[5_000:15_000])
    assert time.perf_counter() - begin < 1.0
    np.testing.assert_array_equal(cohort.examples["x"][:30_000], np.arange(15_000, 45_000))


@pytest.mark.parametrize("size", [2.5, "3", True])
def test_a_padded_size_is_an_integer(size):
    with pytest.raises(FederatedTypeError, match="num_clients: expected an integer"):
        _sized([1, 2]).cohort(["0000"], num_clients=size)


def test_a_padded_size_may_be_counted_by_numpy():
    assert _sized([1, 2]).cohort(["0000"], num_clients=np.int64(4)).num_clients == 4


@pytest.mark.parametrize("values", [[[1, 2], [3]], np.ma.array([1.0, 2.0], mask=[0, 1])])
def test_ragged_and_masked_features_are_named(values):
    with pytest.raises(DataError, match=r"client 'a', feature 'x': .*(ragged|fill)"):
        datasets.from_clients({"b": {"x": [1.0]}, "a": {"x": values}})
    with pytest.raises(DataError, match=r"arrays, feature 'x': .*(ragged|fill)"):
        datasets.from_arrays({"x": values}, partition=datasets.partition.iid(1))
    with pytest.raises(DataError, match=r"feature 'x': .*(ragged|fill)"):
        FederatedDataset({"x": values}, np.array([0, 2]), ("a",))


def _split_by(partition):
    return datasets.from_arrays({"x": np.arange(6)}, partition=partition)


@pytest.mark.parametrize(
    "rows",
    [
        np.arange(6) > 3,
        [0.0, 1.0],
        np.array([[0, 1], [2, 3]]),
        3,
        ["0"],
    ],
)
def test_rows_of_a_partition_are_integers_on_one_axis(rows):
    with pytest.raises(FederatedTypeError, match=r"client 'b' .*integer row numbers"):
        _split_by(lambda examples, rng: {"a": [0], "b": rows})


def test_a_partition_may_give_lists_and_no_rows():
    data = _split_by(lambda examples, rng: {"a": [4, 0], "b": [], "c": np.array([5], np.uint8)})
    assert data.num_examples.tolist() == [2, 0, 1]
    assert data.examples["x"].tolist() == [4, 0, 5]


@pytest.mark.parametrize("rows", [[-1], [6], np.array([2**64 - 1], np.uint64)])
def test_rows_of_a_partition_are_in_range(rows):
    with pytest.raises(DataError, match=r"client 'b' rows outside 0\.\.5"):
        _split_by(lambda examples, rng: {"a": [0], "b": rows})


def test_a_partition_gives_clients():
    with pytest.raises(FederatedTypeError, match="row numbers of the examples it got}; got list"):
        _split_by(lambda examples, rng: [[0], [1]])


@pytest.mark.parametrize("partition", [5, None, datasets.partition.iid, datasets.partition.by_key])
def test_a_partition_is_a_function(partition):
    with pytest.raises(FederatedTypeError, match=r"such as partition\.iid\(10\)"):
        _split_by(partition)
