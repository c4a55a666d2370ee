"""Smallest and largest values, collections, selections and evaluations, in all modes."""

import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core as fc

FLOAT, INT, BOOL = (fc.FederatedType(t, fc.CLIENTS) for t in (np.float32, np.int32, np.bool_))
SERVER_INT = fc.FederatedType(np.int32, fc.SERVER)
INDICES = fc.FederatedType((np.int32, [2]), fc.CLIENTS)
TABLE = fc.FederatedType((np.float32, [4]), fc.SERVER)
MODES = {
    "reference": fc.Execution(mode="reference"),
    "stacked": fc.Execution(mode="stacked"),
    "streamed 1": fc.Execution(mode="streamed", lanes=1),
    "streamed 3": fc.Execution(mode="streamed", lanes=3),
}


def trace(body, *parameters):
    return fc.federated_computation(body, *parameters)


def clients(values, dtype=np.float32):
    return fc.Federated(np.asarray(values, dtype), fc.CLIENTS)


def server(value, dtype=np.float32):
    return fc.Federated(np.asarray(value, dtype), fc.SERVER)


extremes = trace(lambda x: (fc.federated_min(x), fc.federated_max(x)), FLOAT)
collect = trace(lambda x: fc.federated_collect(x), FLOAT)
select = trace(
    lambda keys, table: fc.federated_select(keys, 4, table, lambda t, k: t[k]), INDICES, TABLE
)


@pytest.mark.parametrize(
    ("values", "smallest", "largest"),
    [
        ([3.0, -1.0, 2.0], -1, 3),
        ([5.0], 5, 5),
        ([np.inf, -np.inf], -np.inf, np.inf),
        ([1.0, np.nan, 2.0], np.nan, np.nan),
        ([np.nan], np.nan, np.nan),
        ([], np.inf, -np.inf),
        ([0.5] * 8, 0.5, 0.5),
    ],
)
def test_smallest_and_largest_values(values, smallest, largest):
    """NaN wins over numbers; nobody gives the neutral element."""
    np.testing.assert_array_equal(extremes(values), [smallest, largest])


@pytest.mark.parametrize("mode", MODES)
def test_smallest_and_largest_values_in_all_modes(mode):
    run = extremes.lower(MODES[mode])
    for values, expected in (([3, -1, 2, 5], [-1, 5]), ([1, np.nan, 2], [np.nan] * 2)):
        got = [float(x.value) for x in run(clients(values))[0]]
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("mode", MODES)
def test_absent_clients_do_not_count(mode):
    """Neither those without presence, nor padding; their NaN is not seen, and costs nothing."""

    def body(x, here):
        return fc.federated_min(x, present=here), fc.federated_max(x, present=here)

    run = trace(body, FLOAT, BOOL).lower(MODES[mode])
    x, here = clients([np.nan, 4.0, -2.0, 9.0]), clients([0, 1, 1, 1], bool)
    (low, high), bits = run(x, here, valid=np.array([True, True, True, False]))
    assert (float(low.value), float(high.value)) == (-2, 4)
    assert list(map(int, bits)) == [64, 64]
    (low, high), bits = run(x, clients([0] * 4, bool))
    assert (float(low.value), float(high.value)) == (np.inf, -np.inf)
    assert list(map(int, bits)) == [0, 0]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.float16])
@pytest.mark.parametrize("mode", MODES)
def test_dtypes_are_kept(mode, dtype):
    """Element by element, over structs, with the numbers at the ends of a dtype."""
    limits = np.finfo(dtype) if np.dtype(dtype).kind == "f" else np.iinfo(dtype)
    values = np.array([[1, limits.max], [limits.min, 2], [3, 3]], dtype)
    t = fc.FederatedType({"x": (dtype, [2])}, fc.CLIENTS)
    run = trace(lambda x: (fc.federated_min(x), fc.federated_max(x)), t).lower(MODES[mode])
    low, high = run(fc.Federated({"x": values}, fc.CLIENTS))[0]
    assert low.value["x"].dtype == high.value["x"].dtype == dtype
    np.testing.assert_array_equal(low.value["x"], values.min(axis=0))
    np.testing.assert_array_equal(high.value["x"], values.max(axis=0))


def test_collections_are_lists_in_the_clients_order():
    assert str(collect.type_signature) == "({float32}@CLIENTS -> float32*@SERVER)"
    assert [float(x) for x in collect([3.0, 1.0, 2.0])] == [3, 1, 2]
    assert collect([]) == []
    structs = trace(
        fc.federated_collect, fc.FederatedType({"a": np.int32, "b": (np.float32, [2])}, fc.CLIENTS)
    )
    first, second = structs([{"a": 1, "b": [0, 1]}, {"a": 2, "b": [2, 3]}])
    assert (first["a"], second["a"], second["b"].tolist()) == (1, 2, [2, 3])


@pytest.mark.parametrize("mode", MODES)
def test_collections_leave_padding_out(mode):
    run = collect.lower(MODES[mode])
    valid = np.array([True, False, True, True, False])
    result, (bits,) = run(clients([5, np.nan, 6, 7, np.nan]), valid=valid)
    sequence = result.value
    assert result.placement is fc.SERVER
    assert int(sequence.length) == 3
    assert np.asarray(sequence.elements)[: int(sequence.length)].tolist() == [5, 6, 7]
    assert int(bits) == 3 * 32
    empty, (bits,) = run(clients([]))
    assert (int(empty.value.length), int(bits)) == (0, 0)


@pytest.mark.parametrize("mode", MODES)
def test_collections_can_be_mapped(mode):
    """A function of the whole sequence, at the server: how far the values are above the least."""

    def spread(rows):
        low = rows.reduce(jnp.float32(np.inf), lambda a, x: jnp.minimum(a, x))
        return rows.reduce(0.0, lambda a, x: a + x) - rows.length * low

    run = trace(lambda x: fc.federated_map(spread, fc.federated_collect(x)), FLOAT)
    assert run([4.0, 1.0, 2.0]) == 4
    lowered = run.lower(MODES[mode])
    result = lowered(clients([4, 1, np.nan, 2]), valid=np.array([1, 1, 0, 1], bool))[0]
    assert float(result.value) == 4


def test_selections():
    assert str(select.type_signature) == (
        "(<keys={int32[2]}@CLIENTS,table=float32[4]@SERVER> -> {float32*}@CLIENTS)"
    )
    table = [10.0, 11.0, 12.0, 13.0]
    assert select([[0, 3], [2, 2]], table) == [[10, 13], [12, 12]]
    assert select([], table) == []


@pytest.mark.parametrize("mode", MODES)
def test_keys_out_of_range_are_taken_for_the_nearest(mode):
    lowest = -(2**31)
    keys = [[-1, 4], [100, lowest], [1, 2]]
    run = trace(
        lambda k, n, table: fc.federated_select(k, n, table, lambda t, k: t[k] + k),
        INDICES,
        SERVER_INT,
        TABLE,
    ).lower(MODES[mode])
    result, bits = run(clients(keys, np.int32), server(3, np.int32), server([10, 11, 12, 13]))
    rows = np.asarray(result.value.elements)
    assert rows.tolist() == [[10, 14], [14, 10], [12, 14]]
    assert np.asarray(result.value.length).tolist() == [2, 2, 2]
    assert list(map(int, bits)) == [3 * 2 * 32, 3 * 2 * 32]


def test_bits_of_selections():
    """Up go the keys, 32 bits each; down goes a part for each key, and not the whole value."""
    parts = fc.FederatedType({"w": (np.float32, [100, 3]), "b": (np.int8, [100])}, fc.SERVER)

    def body(keys, value):
        return fc.federated_select(
            keys, 100, value, lambda v, k: {"w": v["w"][k], "b": v["b"][k]}, name="rows"
        )

    computation = trace(body, fc.FederatedType((np.int32, [5]), fc.CLIENTS), parts)
    rows = [(e.direction, e.name, e.bits) for e in fc.communication(computation, num_clients=7)]
    assert rows == [("up", "rows", 7 * 5 * 32), ("down", "rows", 7 * 5 * (3 * 32 + 8))]


@pytest.mark.parametrize("mode", MODES)
def test_clients_compute_with_what_they_selected(mode):
    def body(keys, table):
        parts = fc.federated_select(keys, 4, table, lambda t, k: t[k])
        return fc.federated_sum(fc.federated_map(lambda rows: rows.reduce(0.0, jnp.add), parts))

    run = trace(body, INDICES, TABLE).lower(MODES[mode])
    keys = clients([[0, 1], [3, 3], [2, 0]], np.int32)
    result, _ = run(keys, server([1, 10, 100, 1000]), valid=np.array([True, True, False]))
    assert float(result.value) == 2011


@pytest.mark.parametrize("mode", MODES)
def test_evaluations(mode):
    def body(x):
        row = fc.federated_eval(lambda: jnp.arange(3.0), fc.CLIENTS)
        scale = fc.federated_eval(fc.jax_computation(lambda: jnp.float32(4)), fc.SERVER)
        return fc.federated_sum(fc.federated_map(lambda x, r: x * r, x, row)), row, scale

    computation = trace(body, FLOAT)
    assert str(computation.type_signature.result) == (
        "<float32[3]@SERVER,{float32[3]}@CLIENTS,float32@SERVER>"
    )
    total, rows, scale = computation.lower(MODES[mode])(clients([1, 2]))[0]
    assert np.asarray(total.value).tolist() == [0, 3, 6]
    assert np.asarray(rows.value).tolist() == [[0, 1, 2]] * 2
    assert float(scale.value) == 4


def test_evaluations_of_a_parameter():
    make = trace(
        lambda f: (fc.federated_eval(f, fc.SERVER), fc.federated_eval(f, fc.CLIENTS)),
        fc.FunctionType(None, np.float32),
    )
    assert make(lambda: jnp.float32(2), num_clients=2) == (2, 2)


def test_modes_give_the_same_bits():
    def body(x, keys, table):
        return (
            fc.federated_min(x, name="min"),
            fc.federated_collect(x, name="all"),
            fc.federated_select(keys, 4, table, lambda t, k: t[k], name="rows"),
        )

    computation = trace(body, FLOAT, INDICES, TABLE)
    args = clients([1, 2, 3]), clients([[0, 1]] * 3, np.int32), server([1, 2, 3, 4])
    for execution in MODES.values():
        bits = computation.lower(execution)(*args)[1]
        assert list(map(int, bits)) == [96, 96, 192, 192]
