"""The operators on sequences: computed at once, and as parts of federated computations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core as fc
from fedjax_core.errors import FederatedTypeError, PlacementError
from fedjax_core.language.sequence_operators import sequence_map, sequence_reduce, sequence_sum

NAN = np.float32(np.nan)
FLOATS = fc.SequenceType(np.float32)


def floats(values):
    """A sequence of the values with NaN in its padding."""
    return fc.Sequence.from_elements(np.float32([*values, NAN, NAN]), length=len(values))


def padded(values, capacity):
    return np.pad(np.asarray(values, np.float32), (0, capacity - len(values)))


# Operators, computed at once


def test_operators_on_sequences_lists_and_arrays():
    """Sums and squares of 1, 2, 3; lists give lists."""
    for given_as in ([1.0, 2.0, 3.0], (1.0, 2.0, 3.0), np.float32([1, 2, 3]), floats([1, 2, 3])):
        assert float(sequence_sum(given_as)) == 6
        assert float(sequence_reduce(given_as, 0.0, lambda a, x: 10 * a + x)) == 123
        squares = sequence_map(jnp.square, given_as)
        if isinstance(given_as, list | tuple):
            assert squares == [1, 4, 9]
        else:
            assert squares.elements[:3].tolist() == [1, 4, 9]
    rows = [{"x": np.zeros(2), "y": 1}, {"x": np.ones(2), "y": 2}]
    assert int(sequence_sum(rows)["y"]) == 3
    assert sequence_map(lambda e: e["x"][0] + e["y"], rows) == [1, 3]
    assert float(jax.jit(lambda x: sequence_sum([x, 2 * x]))(3.0)) == 9


def test_typed_functions_take_elements_in_their_own_way():
    """One parameter for the element, or one for each of its fields; (<U,T> -> U) either way."""
    pair = fc.StructType([np.int32, np.int32])
    pairs = fc.Sequence.from_elements((np.arange(3, dtype=np.int32), np.full(3, 10, np.int32)))
    spread = fc.jax_computation(lambda a, b: a + b, np.int32, np.int32)
    packed = fc.jax_computation(lambda p: p[0] + p[1], pair)
    for add in (spread, packed):
        assert sequence_map(add, pairs).elements.tolist() == [10, 11, 12]
        assert int(sequence_reduce(np.arange(4), np.int64(5), add)) == 11


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sequence_map(jnp.sin, 3.0), r"sequence_map of `sin`: expected a sequence T\*"),
        (lambda: sequence_map(3, [1.0]), "expected a function, got 3"),
        (lambda: sequence_sum([]), r"got an empty list; Sequence.from_elements"),
        (lambda: sequence_sum([1, 2.5]), r"sequence_sum, element 1: expected int32, got 2.5"),
        (lambda: sequence_sum([True]), r"expected numbers, got bool"),
        (lambda: sequence_sum({"x": np.zeros(3)}), r"expected a sequence T\*"),
        (lambda: sequence_map(halve, [1, 2]), r"argument 0 of `halve` \(sequence_map"),
        (lambda: sequence_reduce([1.0], 0, add), r"argument 0 of `add` \(sequence_reduce with"),
        (lambda: sequence_reduce([1.0], 0.0, add3), r"expected 3 arguments for `add3`"),
        (lambda: sequence_reduce([1.0], 0.0, less), r"the result of `less`"),
    ],
    ids=["scalar", "function", "empty", "mixed", "bool", "dict", "map", "zero", "three", "result"],
)
def test_operators_refuse(call, message):
    with pytest.raises(FederatedTypeError, match=message):
        call()


@fc.jax_computation(np.float32)
def halve(x):
    return x / 2


@fc.jax_computation(np.float32, np.float32)
def add(total, x):
    return total + x


@fc.jax_computation(np.float32, np.float32, np.float32)
def add3(a, b, c):
    return a + b + c


@fc.jax_computation(np.float32, np.float32)
def less(a, b):
    return a < b


# Operators in computations

AT_CLIENTS = fc.FederatedType(FLOATS, fc.CLIENTS)
EXECUTIONS = [
    fc.Execution(mode="reference"),
    fc.Execution(mode="stacked"),
    *(fc.Execution(mode="streamed", lanes=lanes) for lanes in (1, 2, 4)),
]
each_execution = pytest.mark.parametrize(
    "execution", EXECUTIONS, ids=lambda e: f"{e.mode}-{e.lanes}"
)
CLIENTS = [[], [1, 2, 3, 4, 5], [7.5], [], [-1, 0.25]]


def cohort(layout):
    """The clients' sequences, NaN in the padding; packed, clients stand in another order."""
    lengths = jnp.array([len(client) for client in CLIENTS], jnp.int32)
    if layout == "padded":
        elements = np.full((5, 5), NAN)
        for row, client in zip(elements, CLIENTS, strict=True):
            row[: len(client)] = client
        value = fc.Sequence(jnp.asarray(elements), jnp.zeros(5, jnp.int32), lengths, 5)
    else:
        pool = jnp.array([NAN, 7.5, -1, 0.25, 1, 2, 3, 4, 5, NAN])
        starts = jnp.array([9, 4, 1, 0, 2], jnp.int32)
        value = fc.Sequence(pool, starts, lengths, 5, packed=True)
    return fc.Federated(value, fc.CLIENTS)


@fc.federated_computation(AT_CLIENTS)
def everything(rows):
    squares = sequence_map(jnp.square, rows)
    sums = fc.federated_map(lambda s: s.scan(0.0, lambda c, x: (c + x, c + x))[1], rows)
    pairs = fc.federated_map(lambda s: s.batch(2), rows)
    means = sequence_map(lambda b: jnp.sum(b.examples) / jnp.sum(b.mask), pairs)
    count = sequence_reduce(rows, 0, lambda n, x: n + 1)
    return {
        "squares": squares,
        "sum": fc.federated_sum(sequence_sum(squares)),
        "sums": sums,
        "means": means,
        "count": fc.federated_sum(count),
        "digits": sequence_reduce(rows, np.float32(0), lambda a, x: 10 * a + x),
    }


@each_execution
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_clients_with_empty_and_unequal_sequences(execution, layout):
    results, _ = everything.lower(execution)(cohort(layout))
    assert float(results["sum"].value) == sum(x * x for client in CLIENTS for x in client)
    assert int(results["count"].value) == 8
    np.testing.assert_array_equal(results["digits"].value, [0, 12345, 7.5, 0, -9.75])
    wanted = {
        "squares": [[x * x for x in client] for client in CLIENTS],
        "sums": [list(np.cumsum(client)) for client in CLIENTS],
        "means": [[np.mean(c[i : i + 2]) for i in range(0, len(c), 2)] for c in CLIENTS],
    }
    for name, lists in wanted.items():
        rows = results[name].value
        for i, values in enumerate(lists):
            assert int(rows.length[i]) == len(values)
            np.testing.assert_array_equal(rows.elements[i], padded(values, rows.capacity))


def test_lists_in_lists_out():
    squares = fc.federated_computation(lambda rows: sequence_map(jnp.square, rows), AT_CLIENTS)
    assert str(squares.type_signature) == "({float32*}@CLIENTS -> {float32*}@CLIENTS)"
    assert squares(CLIENTS) == [[x * x for x in client] for client in CLIENTS]
    at_server = fc.federated_computation(sequence_sum, fc.FederatedType(FLOATS, fc.SERVER))
    assert str(at_server.type_signature) == "(float32*@SERVER -> float32@SERVER)"
    assert float(at_server([1, 2, 4])) == 7


@each_execution
def test_fraction_of_readings_above_a_threshold(execution):
    """C-57: clients range(10), range(20), range(30), a threshold of 10: 12.5."""

    @fc.federated_computation(AT_CLIENTS, fc.FederatedType(np.float32, fc.SERVER))
    def mean_count(readings, threshold):
        threshold = fc.federated_broadcast(threshold)
        above = fc.federated_map(
            lambda s, t: s.map(lambda x: (x > t) * 1.0).sum(), readings, threshold
        )
        count = sequence_sum(sequence_map(lambda x: jnp.float32(1), readings))
        return fc.federated_mean(above, count)

    elements = jnp.tile(jnp.arange(30.0), (3, 1))
    rows = fc.Sequence(elements, jnp.zeros(3, jnp.int32), jnp.array([10, 20, 30]), 30)
    threshold = fc.Federated(jnp.float32(10), fc.SERVER)
    result, _ = mean_count.lower(execution)(fc.Federated(rows, fc.CLIENTS), threshold)
    np.testing.assert_allclose(result.value, 12.5, rtol=1e-6)
    assert float(mean_count([list(range(n)) for n in (10, 20, 30)], 10)) == 12.5


def test_number_of_clients_from_sequences_in_structs():
    """C-51: A=[1,2,3], B.C=[[1,2],[3,4],[5,6]], B.D=[T,F,T] are those of 3 clients."""
    at_clients = [fc.FederatedType(t, fc.CLIENTS) for t in (np.int32, FLOATS, np.bool_)]
    t = fc.to_type({"A": at_clients[0], "B": {"C": at_clients[1], "D": at_clients[2]}})

    @fc.federated_computation(t)
    def count(arg):
        return fc.federated_count(), fc.federated_sum(sequence_sum(arg["B"]["C"]))

    given_as = {"A": [1, 2, 3], "B": {"C": [[1, 2], [3, 4], [5, 6]], "D": [True, False, True]}}
    assert count(given_as) == (3, 21)


def test_zero_may_be_a_value_where_the_sequence_is():
    @fc.federated_computation(AT_CLIENTS, fc.FederatedType(np.float32, fc.SERVER))
    def from_server(rows, start):
        zero = fc.federated_broadcast(start)
        pair = sequence_reduce(rows, (zero, zero), lambda a, x: (a[0] + x, a[1] * x))
        return sequence_reduce(rows, zero, add), pair[0], pair[1]

    results = from_server(CLIENTS, 2.0)
    assert results == ([2, 17, 9.5, 2, 1.25],) * 2 + ([2, 240, 15, 2, -0.5],)


def test_unplaced_sequences_give_unplaced_results():
    @fc.federated_computation(FLOATS)
    def statistics(rows):
        squares = sequence_map(jnp.square, rows)
        return sequence_sum(squares), sequence_reduce(rows, 1.0, jnp.maximum)

    assert str(statistics.type_signature) == "(float32* -> <float32,float32>)"
    assert statistics([1, 2, 4]) == (21, 4)
    assert statistics([]) == (0, 1)
    squares = fc.federated_computation(lambda rows: sequence_map(jnp.square, rows), FLOATS)
    assert str(squares.type_signature) == "(float32* -> float32*)"


def test_a_function_that_is_a_parameter_is_refused():
    t = fc.FunctionType(np.float32, np.float32)
    with pytest.raises(FederatedTypeError, match="known where the computation is defined"):
        fc.federated_computation(lambda f, rows: sequence_map(f, rows), t, AT_CLIENTS)


@pytest.mark.parametrize("execution", EXECUTIONS[1:], ids=lambda e: f"{e.mode}-{e.lanes}")
def test_gradients_through_computations(execution):
    """Mean over clients of sum(sqrt(w x)), w = 4: d/dw = sum(sqrt(x)) / 4 for each client."""

    @fc.federated_computation(AT_CLIENTS, fc.FederatedType(np.float32, fc.SERVER))
    def loss(rows, w):
        def local(rows, w):
            folded = rows.scan(0.0, lambda total, x: (total + jnp.sqrt(w * x), ()))[0]
            return folded + rows.map(lambda x: jnp.sqrt(w * x)).sum()

        return fc.federated_mean(fc.federated_map(local, rows, fc.federated_broadcast(w)))

    def value(w):
        return loss.lower(execution)(fc.Federated(rows, fc.CLIENTS), fc.Federated(w, fc.SERVER))[
            0
        ].value

    elements = np.full((3, 2), NAN)
    elements[0], elements[2, 0] = [4, 9], 1
    lengths = jnp.array([2, 0, 1], jnp.int32)
    rows = fc.Sequence(jnp.asarray(elements), jnp.zeros(3, jnp.int32), lengths, 2)
    np.testing.assert_allclose(jax.grad(value)(4.0), 2 * (2 + 3 + 1) / 4 / 3, rtol=1e-6)


def test_operators_in_a_body_refuse():
    server = fc.FederatedType(np.float32, fc.SERVER)

    def trace(body, *types):
        return fc.federated_computation(body, *(types or (AT_CLIENTS,)))

    with pytest.raises(FederatedTypeError, match=r"expected a sequence T\*, got .*float32@SERVER"):
        trace(lambda x: sequence_map(jnp.sin, x), server)
    with pytest.raises(FederatedTypeError, match=r"expected a sequence T\*, got .*float32@SERVER"):
        trace(sequence_sum, server)
    with pytest.raises(PlacementError, match="broadcast"):
        trace(lambda rows, zero: sequence_reduce(rows, zero, add), AT_CLIENTS, server)
    with pytest.raises(FederatedTypeError, match="expected a constant `zero`"):
        trace(lambda zero: sequence_reduce([1.0], zero, add), server)
    with pytest.raises(FederatedTypeError, match="argument 0 of `add`"):
        trace(lambda rows: sequence_reduce(rows, 0, add))
    with pytest.raises(FederatedTypeError, match=r"expected int32\[\], got float32"):
        trace(lambda rows: sequence_reduce(rows, 0, lambda n, x: n + x))
    with pytest.raises(FederatedTypeError, match=r"expected float32\[\], got float32\[2\]"):
        trace(lambda rows: sequence_reduce(rows, 0.0, lambda n, x: jnp.stack([n, x])))
    with pytest.raises(FederatedTypeError, match="expected numbers, got bool"):
        trace(lambda rows: sequence_sum(sequence_map(lambda x: x > 0, rows)))


def test_programs_name_the_operators_and_their_functions():
    program = str(everything.program)
    for name in ("map[sequence_map_square]", "map[sequence_sum]", "map[sequence_reduce_lambda]"):
        assert name in program
