"""Communication reports of every kind of edge, round trips, and what depends on what."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core as fc
from fedjax_core import compression
from fedjax_core.errors import ArgumentError, FederatedTypeError
from fedjax_core.language.dependence import (
    aggregations,
    check_aggregate_not_dependent_on_aggregate,
    check_broadcast_not_dependent_on_aggregate,
    check_round_trips,
    contains_secure_aggregation,
    contains_unsecured_aggregation,
)
from fedjax_core.language.placements import CLIENTS, SERVER
from fedjax_core.language.program import SecureSum
from fedjax_core.language.types import FederatedType, FunctionType

FLOAT, INT, KEYS, INTS = (
    FederatedType(t, CLIENTS) for t in (np.float32, np.int32, (np.int32, [4]), (np.int32, [10]))
)
AT_SERVER = FederatedType(np.float32, SERVER)


def trace(body, *parameters):
    return fc.federated_computation(body, *(parameters or (FLOAT,)))


def fold(x):
    return fc.federated_aggregate(
        x, np.float32(0), lambda s, v: s + v, lambda s, t: s + t, lambda s: s
    )


def rows(computation, num_clients):
    report = fc.communication(computation, num_clients=num_clients)
    return [(e.direction, e.operator, e.bits_per_client, e.visibility) for e in report]


@pytest.mark.parametrize(
    ("operator", "name"),
    [
        (fc.federated_sum, "sum"),
        (fc.federated_mean, "sum"),
        (fc.federated_min, "min"),
        (fc.federated_max, "max"),
        (fc.federated_collect, "collect"),
        (fold, "aggregate"),
    ],
    ids=["sum", "mean", "min", "max", "collect", "aggregate"],
)
def test_edges_in_clear(operator, name):
    """A float32 has 32 bits, and the server sees it unless the sum is secure."""
    assert rows(trace(operator), 5) == [("up", name, 32, "clear")]


def test_a_selection_has_an_edge_each_way():
    """4 keys of 32 bits go up, 4 parts of 3 x 16 bits come down, in one round trip."""
    select = trace(
        lambda keys, table: fc.federated_select(keys, 7, table, lambda t, k: t[k], name="rows"),
        KEYS,
        FederatedType((np.float16, [7, 3]), SERVER),
    )
    report = fc.communication(select, num_clients=2)
    assert [(e.direction, e.operator, e.name, e.bits_per_client, e.bits) for e in report] == [
        ("up", "select (keys)", "rows", 128, 256),
        ("down", "select", "rows", 192, 384),
    ]
    assert [e.round_trip for e in report] == [1, 1]
    assert (report.aggregate_bits, report.broadcast_bits) == (256, 384)
    assert report.num_round_trips == 1


@pytest.mark.parametrize(
    ("num_clients", "bits"), [(1, 10 * 7), (2, 10 * 8), (3, 10 * 9), (100, 10 * 14)]
)
def test_secure_sums_are_blind_and_have_room_for_all_clients(num_clients, bits):
    """A value in [-27, 100] takes 7 bits; a sum over n of them ceil(log2(n)) more."""
    secure = trace(lambda x: fc.federated_secure_sum(x, 100, min_input=-27), INTS)
    assert rows(secure, num_clients) == [("up", "secure_sum", bits, "blind")]


@pytest.mark.parametrize(
    ("bound", "num_clients", "width"),
    [(7, 10, 8), (1, 10, 5), (1, 1, 2), (127, 9, 12), (127, 8, 11), (2**30, 3, 33)],
)
def test_secure_sums_take_what_the_sum_needs(bound, num_clients, width):
    """Of symbols from -m to m: ceil(log2(2 n m + 1)) bits each, reference case 34 for m = 7."""
    secure = trace(lambda x: fc.federated_secure_sum(x, bound, min_input=-bound), INTS)
    assert rows(secure, num_clients) == [("up", "secure_sum", 10 * width, "blind")]
    values = fc.Federated(np.zeros((num_clients, 10), np.int32), fc.CLIENTS)
    assert int(secure.lower()(values)[1][0]) == num_clients * 10 * width


def test_kinds_of_secure_sums():
    """A modulus of 1000 takes 10 bits, and the number of clients does not matter."""
    modular = trace(lambda x: fc.federated_secure_modular_sum(x, 1000), INTS)
    assert rows(modular, 100) == [("up", "secure_modular_sum", 100, "blind")]
    width = trace(lambda x: fc.federated_secure_sum_bitwidth(x, 5), INTS)
    assert rows(width, 4) == [("up", "secure_sum", 10 * 7, "blind")]


def test_empty_messages_cost_nothing():
    """C-111: an empty struct has 0 bits."""
    empty = trace(fc.federated_sum, FederatedType([], CLIENTS))
    assert rows(empty, 3) == [("up", "sum", 0, "clear")]
    assert aggregations(empty) == ()


def test_round_trips_of_edges():
    """A sum of differences from the mean has to wait for the mean."""

    def spread(x, s):
        shifted = fc.federated_map(jnp.add, x, fc.federated_broadcast(s, name="first"))
        mean = fc.federated_broadcast(fc.federated_sum(shifted, name="second"), name="third")
        total = fc.federated_sum(fc.federated_map(jnp.subtract, x, mean), name="fourth")
        return fc.federated_broadcast(total, name="last"), fc.federated_sum(x, name="at once")

    report = fc.communication(trace(spread, FLOAT, AT_SERVER), num_clients=1)
    assert {e.name: e.round_trip for e in report} == {
        "first": 1,
        "second": 1,
        "third": 2,
        "fourth": 2,
        "last": 3,  # with no way back
        "at once": 1,
    }
    assert report.num_round_trips == 2
    assert str(report).splitlines()[-1] == "round trips: 2"


def test_the_table():
    def body(x, n, s):
        shared = fc.federated_broadcast(s, name="params")
        shifted = fc.federated_map(jnp.add, x, shared)
        return fc.federated_sum(shifted), fc.federated_secure_sum(n, 100, name="examples")

    table = str(fc.communication(trace(body, FLOAT, INT, AT_SERVER), num_clients=4))
    header, *lines, last = table.splitlines()
    assert header.split("  ")[0] == "direction"
    assert [line.split()[:9] for line in lines] == [
        ["down", "broadcast", "params", "-", "clear", "1", "32", "128.00bit", "float32@SERVER"],
        ["up", "sum", "value", "-", "clear", "1", "32", "128.00bit", "{float32}@CLIENTS"],
        ["up", "secure_sum", "examples", "-", "blind", "1", "9", "36.00bit", "{int32}@CLIENTS"],
    ]
    assert last == "round trips: 1"


def test_a_program_without_edges():
    report = fc.communication(trace(lambda s: s, AT_SERVER), num_clients=4)
    assert len(report) == 0
    assert str(report).splitlines()[-1] == "round trips: 0"


def test_encoded_edges_are_in_clear():
    """The server decodes each message before it adds them."""
    encoded = trace(lambda x: fc.federated_sum(x, codec=compression.identity()))
    assert rows(encoded, 1) == [("up", "sum", 32, "clear")]


# Types of arguments.


def test_polymorphic_computations_take_types_or_values():
    total = fc.federated_computation(lambda x: fc.federated_sum(x))
    values = fc.Federated(np.zeros((3, 5), np.float32), CLIENTS)
    for given in (FederatedType((np.float32, [5]), CLIENTS), values):
        assert fc.communication(total, given, num_clients=3).aggregate_bits == 3 * 5 * 32
    pair = fc.communication(total, {"a": values, "b": values}, num_clients=3)
    assert pair.aggregate_bits == 2 * 3 * 5 * 32
    with pytest.raises(ArgumentError, match="for_types"):
        fc.communication(total, num_clients=3)


def test_types_given_to_a_typed_computation_are_checked():
    total = trace(lambda x: fc.federated_sum(x))
    assert fc.communication(total, FLOAT, num_clients=2).aggregate_bits == 64
    with pytest.raises(FederatedTypeError, match="argument 0 `x`"):
        fc.communication(total, INT, num_clients=2)
    with pytest.raises(ArgumentError, match="1 arguments"):
        fc.communication(total, FLOAT, FLOAT, num_clients=2)


# What depends on what.


def center(x):
    mean = fc.federated_broadcast(fc.federated_sum(x, name="mean"))
    return fc.federated_map(jnp.subtract, x, mean)


@trace
def twice(x):
    return fc.federated_sum(center(x), name="spread")


@trace
def once(x):
    return fc.federated_sum(fc.federated_map(jnp.square, x)), fc.federated_mean(x)


def test_round_trips_are_checked():
    check_round_trips(once)
    check_round_trips(once, at_most=1)
    check_round_trips(twice, at_most=2)
    check_round_trips(trace(fc.federated_broadcast, AT_SERVER), at_most=0)
    with pytest.raises(ArgumentError, match="at most 1 round trips") as caught:
        check_round_trips(twice)
    described = [line.split("=")[1].split("(")[0] for line in str(caught.value).splitlines()[1:]]
    assert [text.strip() for text in described][1:] == [
        "sum[mean]",
        "broadcast[value]",
        "map[subtract]",
        "sum[spread]",
    ]
    assert "argument 0 `x` of `twice`" in str(caught.value)


def test_a_selection_is_a_round_trip():
    def look_up(keys, table):
        parts = fc.federated_select(keys, 7, table, lambda t, k: t[k])
        return fc.federated_sum(fc.federated_map(lambda rows: rows.sum(), parts))

    look_up = trace(look_up, KEYS, FederatedType((np.float32, [7]), SERVER))
    check_round_trips(look_up, at_most=2)
    with pytest.raises(ArgumentError, match="got 2") as caught:
        check_round_trips(look_up)
    assert "request[value]" in str(caught.value)
    check_broadcast_not_dependent_on_aggregate(look_up)
    check_aggregate_not_dependent_on_aggregate(look_up)


def test_broadcasts_of_aggregates_are_found():
    check_broadcast_not_dependent_on_aggregate(once)
    with pytest.raises(ArgumentError, match="no broadcast to depend") as caught:
        check_broadcast_not_dependent_on_aggregate(trace(center))
    first, last = str(caught.value).splitlines()[1:]
    assert "sum[mean](%0)" in first
    assert "broadcast[value]" in last
    assert "test_analysis.py:" in last


def test_selections_from_aggregates_are_found():
    def look_up(keys, table):
        return fc.federated_select(keys, 7, fc.federated_sum(table), lambda t, k: t[k])

    with pytest.raises(ArgumentError, match="no broadcast to depend"):
        check_broadcast_not_dependent_on_aggregate(
            trace(look_up, KEYS, FederatedType((np.float32, [7]), CLIENTS))
        )


def test_aggregates_of_aggregates_are_found():
    check_aggregate_not_dependent_on_aggregate(once)
    check_aggregate_not_dependent_on_aggregate(trace(center))
    with pytest.raises(ArgumentError, match="no aggregation to depend") as caught:
        check_aggregate_not_dependent_on_aggregate(twice)
    path = str(caught.value).splitlines()[1:]
    assert len(path) == 4
    assert "sum[mean]" in path[0]
    assert "sum[spread]" in path[-1]


def test_what_is_zipped_with_an_aggregate_does_not_depend_on_it():
    def body(x, s):
        pair = fc.federated_zip((fc.federated_sum(x), s))
        return fc.federated_broadcast(pair[1]), pair

    body = trace(body, FLOAT, AT_SERVER)
    check_broadcast_not_dependent_on_aggregate(body)
    assert [e.round_trip for e in fc.communication(body, num_clients=1)] == [1, 1]


@pytest.mark.parametrize(
    "check",
    [
        check_round_trips,
        check_broadcast_not_dependent_on_aggregate,
        check_aggregate_not_dependent_on_aggregate,
        aggregations,
        contains_secure_aggregation,
        contains_unsecured_aggregation,
    ],
)
def test_checks_need_known_functions_and_a_program(check):
    number = fc.to_type(np.float32)
    unknown = trace(
        lambda f, x: fc.federated_sum(fc.federated_map(f, x)), FunctionType(number, number), FLOAT
    )
    with pytest.raises(ArgumentError, match=r"argument 0 `f`.*bind"):
        check(unknown)
    with pytest.raises(ArgumentError, match="with a program"):
        check(jax.jit(lambda x: x))


def test_aggregations_by_kind():
    both = trace(lambda x, n: (fc.federated_sum(x), fc.federated_secure_sum(n, 9)), FLOAT, INT)
    secure = trace(lambda n: fc.federated_secure_sum(n, 9), INT)
    neither = trace(lambda s: (fc.federated_broadcast(s), fc.federated_count()), AT_SERVER)
    found = [
        (contains_secure_aggregation(c), contains_unsecured_aggregation(c))
        for c in (both, secure, once, neither)
    ]
    assert found == [(True, True), (True, False), (False, True), (False, False)]
    assert isinstance(aggregations(secure)[0], SecureSum)


def test_unlabelled_places_are_called_unknown():
    program = trace(center).program
    ops = tuple(dataclasses.replace(op, location="") for op in program.ops)

    @dataclasses.dataclass
    class Holder:
        program: object

    with pytest.raises(ArgumentError, match="an unknown place"):
        check_broadcast_not_dependent_on_aggregate(Holder(dataclasses.replace(program, ops=ops)))
