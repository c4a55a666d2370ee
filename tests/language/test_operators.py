"""The operators: their types, their results, and what each refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core as fc
from fedjax_core.errors import ContextError, FederatedTypeError, PlacementError

INT, FLOAT, BOOL = (fc.FederatedType(t, fc.CLIENTS) for t in (np.int32, np.float32, np.bool_))
SERVER_INT, SERVER_FLOAT = (fc.FederatedType(t, fc.SERVER) for t in (np.int32, np.float32))


def signature(function, *parameters):
    return str(fc.federated_computation(function, *parameters).type_signature)


@pytest.mark.parametrize(
    ("function", "parameters", "expected"),
    [
        (fc.federated_broadcast, [SERVER_INT], "(int32@SERVER -> int32@CLIENTS)"),
        (fc.federated_sum, [INT], "({int32}@CLIENTS -> int32@SERVER)"),
        (fc.federated_mean, [FLOAT], "({float32}@CLIENTS -> float32@SERVER)"),
        (
            lambda x, w: fc.federated_mean(x, w),
            [FLOAT, INT],
            "(<x={float32}@CLIENTS,w={int32}@CLIENTS> -> float32@SERVER)",
        ),
        (
            lambda x: fc.federated_map(lambda x: x > 0.5, x),
            [FLOAT],
            "({float32}@CLIENTS -> {bool}@CLIENTS)",
        ),
        (
            lambda x: fc.federated_map(lambda x: (x, x), x),
            [SERVER_INT],
            "(int32@SERVER -> <int32,int32>@SERVER)",
        ),
        (
            lambda x: fc.federated_map(lambda x: x + 1, fc.federated_broadcast(x)),  # C-55
            [SERVER_INT],
            "(int32@SERVER -> {int32}@CLIENTS)",
        ),
        (
            lambda a, b: fc.federated_zip({"b": b, "a": (a, a)}),
            [INT, BOOL],
            "(<a={int32}@CLIENTS,b={bool}@CLIENTS> -> {<a=<int32,int32>,b=bool>}@CLIENTS)",
        ),
        (lambda: fc.federated_value([1, 0.5], fc.CLIENTS), [], "( -> <int32,float32>@CLIENTS)"),
        (lambda: fc.federated_value(1, fc.SERVER), [], "( -> int32@SERVER)"),
        (fc.federated_count, [BOOL], "({bool}@CLIENTS -> int32@SERVER)"),
        (
            lambda x: fc.federated_aggregate(x, (0, 0.0), fold, join, lambda s: s[1]),
            [FLOAT],
            "({float32}@CLIENTS -> float32@SERVER)",
        ),
        (
            lambda x: [fc.federated_sum(x), {"same": x}],
            [INT],
            "({int32}@CLIENTS -> <int32@SERVER,<same={int32}@CLIENTS>>)",
        ),
    ],
)
def test_type_signatures(function, parameters, expected):
    assert signature(function, *parameters) == expected


def fold(state, x):
    return state[0] + 1, state[1] + x


def join(a, b):
    return a[0] + b[0], a[1] + b[1]


def test_map():
    """C-55: map(inc, [1, 2])."""
    inc = fc.federated_computation(lambda x: fc.federated_map(lambda x: x + 1, x), INT)
    assert inc([1, 2]) == [2, 3]
    assert inc([]) == []


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (jnp.subtract, lambda a, b: (a, b)),
        (lambda a, b: a - b, lambda a, b: [a, b]),
        (lambda pair: pair[0] - pair[1], lambda a, b: (a, b)),
        (lambda pair: pair["a"] - pair["b"], lambda a, b: {"a": a, "b": b}),
        (lambda a, b: a - b, lambda a, b: fc.federated_zip((a, b))),
        (fc.jax_computation(lambda a, b: a - b, np.int32, np.int32), lambda a, b: (a, b)),
        (lambda a, b, scale=1: (a - b) * scale, lambda a, b: (a, b)),
    ],
)
def test_ways_to_pass_two_arguments(function, arguments):
    """A tuple or a struct is spread over two parameters, and zipped for one."""
    computation = fc.federated_computation(
        lambda a, b: fc.federated_map(function, arguments(a, b)), INT, INT
    )
    assert computation([5, 7], [1, 10]) == [4, -3]


def test_map_of_separate_arguments():
    computation = fc.federated_computation(
        lambda a, b: fc.federated_map(lambda x, pair: x * pair[0] + pair[1], a, (b, a)), INT, INT
    )
    assert computation([2, 3], [10, 20]) == [22, 63]


@pytest.mark.parametrize(
    ("values", "weights", "expected"),
    [
        ([1.0, 2.0, 3.0], None, 2.0),
        ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], 1.6666666),
        ([1.0, 2.0, 3.0], [3, 2, 1], 1.6666666),
        ([4.0], [0.0], 0.0),
        ([], [], 0.0),
    ],
)
def test_mean(values, weights, expected):
    """C-53, with float and with integer weights."""
    if weights is None:
        result = fc.federated_computation(fc.federated_mean, FLOAT)(values)
    else:
        kind = INT if weights and isinstance(weights[0], int) else FLOAT
        result = fc.federated_computation(fc.federated_mean, FLOAT, kind)(values, weights)
    assert result == pytest.approx(expected, rel=1e-6)


def test_mean_of_a_struct_by_one_weight():
    """J-01: the leaves keep their structure, and one weight serves all of them."""
    pair = fc.FederatedType((np.float32, np.float32), fc.CLIENTS)
    average = fc.federated_computation(fc.federated_mean, pair, FLOAT)
    result = average([(0.0, 1.0), (2.0, 3.0), (4.0, 5.0)], [6.0, 7.0, 8.0])
    np.testing.assert_allclose(result, (2.1904762, 3.1904762), rtol=1e-6)


def test_complex_means():
    t = fc.FederatedType(np.complex64, fc.CLIENTS)
    average = fc.federated_computation(fc.federated_mean, t, FLOAT)
    assert average([1 + 2j, 3j], [1.0, 3.0]) == 0.25 + 2.75j


def test_weighted_mean_of_counts_beyond_a_threshold():
    """C-57: the mean of count(x > t) weighted by count(x) is 12.5."""
    rows = fc.FederatedType(fc.SequenceType(np.int32), fc.CLIENTS)

    def count(rows, threshold):
        return rows.reduce(0.0, lambda total, x: total + (x > threshold))

    @fc.federated_computation(rows, SERVER_INT)
    def compute(rows, threshold):
        above = fc.federated_map(count, rows, fc.federated_broadcast(threshold))
        everything = fc.federated_map(lambda rows: rows.length, rows)
        return fc.federated_mean(above, everything)

    assert compute([list(range(n)) for n in (10, 20, 30)], 10) == 12.5


@pytest.mark.parametrize(("num_sensors", "threshold", "expected"), [(100, 24, 0.75), (20, 3, 0.8)])
def test_share_of_sensors_beyond_a_threshold(num_sensors, threshold, expected):
    """J-57."""

    @fc.federated_computation(FLOAT, SERVER_FLOAT)
    def share(x, threshold):
        above = fc.federated_map(
            lambda x, t: (x > t).astype(jnp.float32), x, fc.federated_broadcast(threshold)
        )
        return fc.federated_mean(above)

    assert share(list(range(num_sensors)), threshold) == pytest.approx(expected, rel=1e-6)


def test_sum_of_a_struct():
    t = fc.FederatedType({"a": (np.float32, [2]), "n": np.int32}, fc.CLIENTS)
    total = fc.federated_computation(fc.federated_sum, t)
    result = total([{"a": [1.0, 2.0], "n": 1}, {"a": [3.0, 4.0], "n": 5}])
    assert (result["a"].tolist(), result["n"]) == ([4, 6], 6)


def test_sums_of_what_is_equal_everywhere():
    """An all-equal value counts once for each client."""

    @fc.federated_computation(SERVER_INT, INT)
    def total(s, x):
        constant = fc.federated_value(10, fc.CLIENTS)
        return fc.federated_sum((fc.federated_broadcast(s), constant, x))

    assert total(3, [1, 1, 1, 1]) == (12, 40, 4)


def test_aggregate():
    """A fold of count and sum, reported as their ratio; the zero of nobody is reported too."""

    @fc.federated_computation(FLOAT)
    def average(x):
        return fc.federated_aggregate(
            x, (0, 0.0), fold, join, lambda s: (s[1] / jnp.maximum(s[0], 1), s[0])
        )

    assert average([1.0, 2.0, 6.0]) == (3.0, 3)
    assert average([]) == (0.0, 0)


def test_aggregate_of_an_empty_struct():
    """C-59."""
    empty = fc.FederatedType([], fc.CLIENTS)
    nothing = fc.federated_computation(
        lambda x: fc.federated_aggregate(x, (), lambda s, x: (), lambda a, b: (), lambda s: s),
        empty,
    )
    assert nothing([[], [], []]) == ()


def test_aggregate_checks_its_zero():
    """C-67: a float zero for an accumulator declared as int32."""
    accumulate = fc.jax_computation(lambda s, x: s + 1, np.int32, np.float32)
    merge = fc.jax_computation(jnp.add, np.int32, np.int32)
    report = fc.jax_computation(lambda s: s, np.int32)

    def make(zero):
        return fc.federated_computation(
            lambda x: fc.federated_aggregate(x, zero, accumulate, merge, report), FLOAT
        )

    with pytest.raises(TypeError, match="Expected `zero` to be assignable to type int32"):
        make(0.0)
    assert make(0)([0.5, 0.5]) == 2


@pytest.mark.parametrize(
    ("accumulate", "merge", "message"),
    [
        (lambda s, x: s + x, lambda a, b: a, "result of `accumulate`"),
        (lambda s, x: s, lambda a, b: a + 0.5, "result of `merge`"),
        (lambda s, x: (s, s), lambda a, b: a, "result of `accumulate`"),
    ],
)
def test_aggregate_checks_its_accumulator(accumulate, merge, message):
    with pytest.raises(FederatedTypeError, match=message):
        fc.federated_computation(
            lambda x: fc.federated_aggregate(x, 0, accumulate, merge, lambda s: s), FLOAT
        )


def test_presence():
    """Sums, means and counts over those present alone."""

    @fc.federated_computation(FLOAT, FLOAT, BOOL)
    def compute(x, w, here):
        return (
            fc.federated_sum(x, present=here),
            fc.federated_mean(x, present=here),
            fc.federated_mean(x, w, present=here),
            fc.federated_count(here),
            fc.federated_count(),
        )

    result = compute([1.0, 5.0, 9.0], [1.0, 100.0, 3.0], [True, False, True])
    assert list(map(float, result)) == [10, 5, 7, 2, 3]
    assert list(map(float, compute([1.0], [1.0], [False]))) == [0, 0, 0, 0, 1]


MISUSE = {
    "broadcast of a client value": (lambda x, s: fc.federated_broadcast(x), "at SERVER"),
    "sum of a server value": (lambda x, s: fc.federated_sum(s), "at CLIENTS"),
    "mean of a server value": (lambda x, s: fc.federated_mean(s), "at CLIENTS"),
    "weight at the server": (lambda x, s: fc.federated_mean(x, s), "at CLIENTS"),
    "aggregate of a server value": (
        lambda x, s: fc.federated_aggregate(s, 0.0, jnp.add, jnp.add, jnp.negative),
        "at CLIENTS",
    ),
    "map of two placements": (lambda x, s: fc.federated_map(jnp.add, x, s), "one placement"),
    "zip of two placements": (lambda x, s: fc.federated_zip((x, s)), "one placement"),
    "presence at the server": (
        lambda x, s: fc.federated_sum(x, present=fc.federated_map(lambda s: s > 0, s)),
        "at CLIENTS",
    ),
}


@pytest.mark.parametrize("name", MISUSE)
def test_placements_are_checked(name):
    body, message = MISUSE[name]
    with pytest.raises(PlacementError, match=message):
        fc.federated_computation(body, FLOAT, SERVER_FLOAT)


KEYS = fc.FederatedType(fc.infer_type(jax.random.key(0)), fc.CLIENTS)
ROWS = fc.FederatedType(fc.SequenceType(np.float32), fc.CLIENTS)
WRONG_TYPES = {
    "sum of booleans": (fc.federated_sum, [BOOL], "numbers of fixed shape"),
    "sum of keys": (fc.federated_sum, [KEYS], "numbers of fixed shape"),
    "sum of sequences": (fc.federated_sum, [ROWS], "numbers of fixed shape"),
    "mean of integers": (fc.federated_mean, [INT], "floating-point"),
    "mean of a struct with integers": (
        fc.federated_mean,
        [fc.FederatedType((np.float32, np.int32), fc.CLIENTS)],
        "floating-point",
    ),
    "vector of weights": (
        fc.federated_mean,
        [FLOAT, fc.FederatedType((np.float32, [2]), fc.CLIENTS)],
        "scalar weight",
    ),
    "weights of booleans": (fc.federated_mean, [FLOAT, BOOL], "scalar weight"),
    "complex weights": (
        fc.federated_mean,
        [FLOAT, fc.FederatedType(np.complex64, fc.CLIENTS)],
        "scalar weight",
    ),
    "presence of integers": (
        lambda x, n: fc.federated_sum(x, present=n),
        [FLOAT, INT],
        r"\{bool\}@CLIENTS",
    ),
    "broadcast of a sequence": (
        fc.federated_broadcast,
        [fc.FederatedType(fc.SequenceType(np.float32), fc.SERVER)],
        "fixed size",
    ),
    "aggregate of a sequence": (
        lambda x: fc.federated_aggregate(x, 0, lambda s, x: s, jnp.add, lambda s: s),
        [ROWS],
        "fixed size",
    ),
    "value of a value": (lambda x: fc.federated_value(x, fc.SERVER), [FLOAT], "unplaced"),
    "value of no array": (lambda x: fc.federated_value(object(), fc.SERVER), [FLOAT], "Expected"),
    "value at no placement": (lambda x: fc.federated_value(1, "server"), [FLOAT], "SERVER"),
    "map of a constant": (lambda x: fc.federated_map(jnp.sin, 1.0), [FLOAT], "federated_value"),
    "map by no function": (lambda x: fc.federated_map(3, x), [FLOAT], "a function"),
    "zip of nothing": (lambda x: fc.federated_zip(()), [FLOAT], "at least one"),
    "zip of a constant": (lambda x: fc.federated_zip((x, 1)), [FLOAT], "federated_value"),
    "map that returns nothing": (
        lambda x: fc.federated_map(lambda x: None, x),
        [FLOAT],
        "add a return",
    ),
    "declared for another type": (
        lambda x: fc.federated_map(fc.jax_computation(jnp.sin, np.float32), x),
        [INT],
        "float32.*int32",
    ),
    "declared for two": (
        lambda x: fc.federated_map(fc.jax_computation(jnp.add, np.int32, np.int32), x, x, x),
        [INT],
        "2 arguments",
    ),
}


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_types_are_checked(name):
    body, parameters, message = WRONG_TYPES[name]
    with pytest.raises(FederatedTypeError, match=message):
        fc.federated_computation(body, *parameters)


@pytest.mark.parametrize("function", [lambda: 1, lambda a, b, c: a])
def test_map_by_a_function_of_other_arguments(function):
    """Python's own error for a wrong number of arguments is a TypeError as well."""
    with pytest.raises(TypeError):
        fc.federated_computation(lambda x: fc.federated_map(function, (x, x)), FLOAT)


@pytest.mark.parametrize(
    "call",
    [
        lambda: fc.federated_value(1, fc.SERVER),
        lambda: fc.federated_count(),
        lambda: fc.federated_map(jnp.sin, 1.0),
    ],
)
def test_operators_outside_of_a_computation(call):
    with pytest.raises(ContextError, match="federated_computation"):
        call()
