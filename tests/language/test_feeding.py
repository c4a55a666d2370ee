"""What a computation is fed with (cardinality, structures, dtypes, sequences) and returns."""

from collections import OrderedDict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core as fc


class Pair(NamedTuple):
    b: object
    a: object


def echo(t, placement=fc.CLIENTS):
    """A computation that returns what it is fed with."""
    return fc.federated_computation(lambda x: x, fc.FederatedType(t, placement))


def echo_server(t):
    return echo(t, fc.SERVER)


@pytest.mark.parametrize("value", [3, (i for i in range(3)), np.int32(3), {1: 2}])
def test_client_values_come_as_lists(value):
    """C-49: an int or a generator is no list with one entry a client."""
    with pytest.raises(TypeError, match="one entry a client"):
        echo(np.int32)(value)


def test_tuples_serve_as_lists():
    assert echo(np.int32)((1, 2)) == [1, 2]


def test_cardinality_of_a_struct():
    """C-51: A=[1,2,3], B.C sequences, B.D booleans: three clients."""
    seen = []
    a = fc.FederatedType(np.int32, fc.CLIENTS)
    c = fc.FederatedType(fc.SequenceType(np.int32), fc.CLIENTS)
    d = fc.FederatedType(np.bool_, fc.CLIENTS)

    @fc.federated_computation(OrderedDict(A=a, B=OrderedDict(C=c, D=d)))
    def count(arg):
        seen.append(arg["B"]["C"])
        return fc.federated_count(), fc.federated_sum(arg["A"]), arg["B"]["C"]

    sequences = [[1, 2], [3, 4], [5, 6]]
    args = {"A": [1, 2, 3], "B": {"C": sequences, "D": [True, False, True]}}
    num_clients, total, back = count(args)
    assert (num_clients, total, back) == (3, 6, sequences)
    args["B"]["D"] = [True, False]
    with pytest.raises(ValueError, match="one number of clients"):
        count(args)
    assert len(seen) == 1


def test_clients_without_any_array_are_counted():
    count = fc.federated_computation(
        lambda x: fc.federated_count(), fc.FederatedType([], fc.CLIENTS)
    )
    assert count([[], (), None]) == 3


def test_structures_are_matched_by_name():
    """Q5 of TFF: dicts by key and not by order, wrong keys refused."""
    t = [("a", np.int32), ("b", np.float32)]
    for value in ({"b": 0.5, "a": 1}, OrderedDict(b=0.5, a=1), Pair(b=0.5, a=1), (1, 0.5)):
        result = echo_server(t)(value)
        assert (result["a"], result["b"]) == (1, 0.5)
        assert isinstance(result, OrderedDict)
    assert echo_server({"b": np.int32, "a": np.int32})({"b": 1, "a": 2}) == {"a": 2, "b": 1}
    assert echo_server(Pair(np.int32, np.int32))({"a": 2, "b": 1}) == Pair(b=1, a=2)
    with pytest.raises(TypeError, match=r"\['a', 'b'\].*\['a', 'c'\]"):
        echo_server(t)({"a": 1, "c": 0.5})
    with pytest.raises(TypeError, match="2 fields"):
        echo_server(t)([1])
    with pytest.raises(TypeError, match="2 fields"):
        echo_server((np.int32, np.int32))({"x": 1, "y": 2})


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (np.int32, 0.5),
        (np.int32, 2**31),
        (np.int8, 200),
        (np.uint8, -1),
        (np.bool_, 1),
        (np.float32, 1j),
        (np.float32, "1"),
        (np.float32, None),
        (np.float32, object()),
        (np.float32, [1.0]),
        (np.float32, np.float16(1)),
        (np.int32, np.int64(2**40)),
        (np.int32, np.array(-(2**40))),
        (np.int32, jnp.float32(1)),
    ],
)
def test_dtypes_are_checked(dtype, value):
    """Q4 of TFF: the error names the argument, the client and the type."""
    with pytest.raises(TypeError, match=rf"argument 0.*client 1: expected.*{np.dtype(dtype)}"):
        echo(dtype)([dtype(0), value])


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (np.float32, 1),
        (np.float32, True),
        (np.float32, np.float64(1)),
        (np.int32, np.int64(1)),
        (np.float64, 1.0),
        (np.float64, np.float32(1)),
        (jnp.bfloat16, 1),
        (np.int8, -128),
        (np.complex64, 1.0),
    ],
)
def test_values_that_fit(dtype, value):
    """Python numbers are widened; 64-bit arrays fit where they are what JAX holds in 32."""
    (result,) = echo(dtype)([value])
    assert result == value


def test_64_bit_types_accept_the_arrays_that_jax_has():
    """Pitfall 9: float64 in a type is float32 in the arrays unless x64 is on."""
    total = fc.federated_computation(
        fc.federated_sum, fc.FederatedType((np.float64, [2]), fc.CLIENTS)
    )
    assert total([[1.0, 2.0], np.array([3.0, 4.0])]).tolist() == [4, 6]
    result = total(fc.Federated(jnp.ones((3, 2)), fc.CLIENTS))
    assert result.value.tolist() == [3, 3]
    rows = fc.FederatedType(fc.SequenceType(np.int64), fc.CLIENTS)
    add = fc.federated_computation(
        lambda rows: fc.federated_map(lambda r: r.reduce(0, jnp.add), rows), rows
    )
    assert add([[1, 2, 3], [], [4] * 5]) == [6, 0, 20]


def test_shapes_are_checked():
    with pytest.raises(TypeError, match=r"client 0: expected float32\[2\], got shape \(3,\)"):
        echo((np.float32, [2]))([[1.0, 2.0, 3.0]])


def test_errors_name_the_leaf():
    t = {"layer": [np.float32, {"bias": np.float32}]}
    with pytest.raises(TypeError, match=r"client 0\.layer\[1\]\.bias: expected float32"):
        echo(t)([{"layer": [1.0, {"bias": "x"}]}])
    with pytest.raises(TypeError, match=r"client 1, example 2: expected float32"):
        echo(fc.SequenceType(np.float32))([[], [1.0, 2.0, 1j]])


def test_sequences_come_back_as_lists():
    """Lists of lists, empty ones and structured ones; packed and padded sequences alike."""
    data = [[1.0, 2.0, 3.0], [], [4.0]]
    assert echo(fc.SequenceType(np.float32))(data) == data
    rows = [[{"x": [1.0, 2.0], "y": 3}], []]
    ((row,), nothing) = echo(fc.SequenceType({"x": (np.float32, [2]), "y": np.int32}))(rows)
    assert (row["x"].tolist(), row["y"], nothing) == ([1, 2], 3, [])
    with pytest.raises(TypeError, match="list of examples"):
        echo(fc.SequenceType(np.float32))([1.0, 2.0])


def test_sequences_of_their_own_capacity_pass_in_every_mode():
    """A pool with more rows than the capacity of any client's slice."""
    pool = fc.Sequence(
        np.arange(10, dtype=np.float32), np.int32([0, 7]), np.int32([2, 3]), 4, packed=True
    )
    same = echo(fc.SequenceType(np.float32))
    for mode in ("reference", "stacked", "streamed"):
        result, _ = same.lower(fc.Execution(mode=mode))(fc.Federated(pool, fc.CLIENTS))
        back = result.value
        slices = [
            back.elements[i, s : s + n]
            for i, (s, n) in enumerate(zip(back.start, back.length, strict=True))
        ]
        assert [x.tolist() for x in slices] == [[0, 1], [7, 8, 9]]


def test_zero_clients():
    assert echo(np.float32)([]) == []
    assert echo(fc.SequenceType(np.float32))([]) == []
    total = fc.federated_computation(fc.federated_sum, fc.FederatedType(np.int32, fc.CLIENTS))
    assert total([]) == 0


def test_results_are_of_the_kind_of_the_arguments():
    """Lists give Python values, `Federated` gives `Federated`, containers are the type's."""
    double = fc.federated_computation(
        lambda x: fc.federated_map(lambda x: {"y": (2 * x, x)}, x),
        fc.FederatedType((np.float32, [2]), fc.CLIENTS),
    )
    (result,) = double([[1.0, 2.0]])
    assert isinstance(result["y"], tuple)
    assert isinstance(result["y"][0], np.ndarray)
    lazy = double(fc.Federated(np.ones((3, 2), np.float32), fc.CLIENTS))
    assert isinstance(lazy, fc.Federated)
    assert lazy.value["y"][0].shape == (3, 2)


def test_federated_arguments_are_checked():
    total = fc.federated_computation(fc.federated_sum, fc.FederatedType(np.float32, fc.CLIENTS))
    for value in (
        fc.Federated(np.ones(3, np.int32), fc.CLIENTS),
        fc.Federated(np.ones((3, 2), np.float32), fc.CLIENTS),
        fc.Federated(np.float32(1), fc.SERVER),
        fc.Federated(np.float32(1), fc.CLIENTS),
    ):
        with pytest.raises(TypeError, match=r"Expected"):
            total(value)


def test_the_number_of_arguments_is_checked():
    total = fc.federated_computation(fc.federated_sum, fc.FederatedType(np.float32, fc.CLIENTS))
    with pytest.raises(TypeError, match="expected 1 arguments"):
        total([1.0], [2.0])
    with pytest.raises(TypeError, match="expected 1 arguments"):
        total()


def test_prng_keys_are_fed_like_arrays():
    keys = list(jax.random.split(jax.random.key(0), 3))
    back = echo(fc.infer_type(keys[0]))(keys)
    assert all(
        (jax.random.key_data(a) == jax.random.key_data(b)).all()
        for a, b in zip(back, keys, strict=True)
    )


def test_jax_computations_are_called_with_python_values():
    add = fc.jax_computation(
        lambda rows, x: rows.reduce(x, jnp.add), fc.SequenceType(np.float32), np.float32
    )
    assert str(add.type_signature) == "(<rows=float32*,x=float32> -> float32)"
    assert float(add([1.0, 2.0], 3)) == 6.0
    with pytest.raises(TypeError, match="2 arguments"):
        add([1.0])
    with pytest.raises(TypeError, match="argument 1"):
        add([1.0], "x")
