"""Reference cases that no other file has: sizes at 64 bits, strings, broken contracts."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core as fc
from fedjax_core.aggregators import contract as aggregators
from fedjax_core.compression import contract as codecs
from fedjax_core.errors import CodecError, FederatedTypeError, PlacementError

WITH_64_BITS = """
import numpy as np
import fedjax_core as fc

def trace(body, *parameters):
    return fc.federated_computation(body, *parameters)

pair = fc.FederatedType((fc.TensorType(np.float64, [10]), fc.TensorType(np.int32, [10])), fc.SERVER)
longs = fc.FederatedType((np.int64, [10]), fc.CLIENTS)
both = trace(lambda s, x: (fc.federated_broadcast(s), fc.federated_sum(x)), pair, longs)
report = fc.communication(both, num_clients=1)
args = (
    fc.Federated((np.zeros(10), np.zeros(10, np.int32)), fc.SERVER),
    fc.Federated(np.ones((1, 10), np.int64), fc.CLIENTS),
)
(sent, total), ledger = both.lower()(*args)
print(report.broadcast_bits, report.aggregate_bits, *map(int, ledger))
print(sent.value[0].dtype, total.value.dtype)

largest = 2**63 - 1
add = trace(fc.federated_sum, fc.FederatedType(np.int64, fc.CLIENTS))
print(int(add([largest, 1])), int(add([largest, 1, -3])), int(add([-largest, -largest])))
halve = trace(lambda: fc.federated_value(np.float64(1 / 3), fc.SERVER))
print(float(halve()) == 1 / 3, int(trace(lambda: fc.federated_value(2**40, fc.SERVER))()))
"""


def test_sizes_at_64_bits():
    """C-111: float64[10] and int32[10] down are 960 bits, int64[10] up are 640."""
    environment = {**os.environ, "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", WITH_64_BITS],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    sizes, dtypes, sums, constants = run.stdout.splitlines()
    assert sizes == "960 640 960 640"
    assert dtypes == "float64 int64"
    assert sums == f"{2**63 - 1} {2**63 - 3} {-(2**63)}"
    assert constants == f"True {2**40}"


def test_strings_stay_on_the_host():
    """C-111 counts strings that travel; here none does, and a constant one costs nothing."""
    words = ("hi", "bye", "tensor", "federated")
    constant = fc.federated_computation(lambda: fc.federated_value(words, fc.SERVER))
    assert str(constant.type_signature) == "( -> <str,str,str,str>@SERVER)"
    assert constant() == words
    assert list(fc.communication(constant, num_clients=3)) == []
    with pytest.raises(FederatedTypeError, match="got str; use numbers"):
        fc.federated_computation(
            lambda: fc.federated_broadcast(fc.federated_value("hi", fc.SERVER))
        )


def test_composed_means():
    """C-53 and C-57 in one program: a weighted mean of what another computation counted."""
    rows = fc.FederatedType(fc.SequenceType(np.int32), fc.CLIENTS)
    limit = fc.FederatedType(np.int32, fc.SERVER)

    def count_if(keep):
        def count(r, *rest):
            return r.reduce(0.0, lambda total, x: total + keep(x, *rest))

        return count

    above = fc.federated_computation(
        lambda r, t: fc.federated_map(
            count_if(lambda x, t: (x > t) * 1.0), r, fc.federated_broadcast(t)
        ),
        rows,
        limit,
    )
    size = fc.federated_computation(
        lambda r: fc.federated_map(count_if(lambda x: jnp.float32(1)), r), rows
    )
    mean = fc.federated_computation(
        lambda r, t: fc.federated_mean(above(r, t), size(r)), rows, limit
    )
    assert mean([list(range(10)), list(range(20)), list(range(30))], 10) == 12.5


# C-135 in this library's terms: aggregators and codecs that break their contract.

AVERAGE = fc.aggregators.mean()
IDENTITY = fc.compression.identity()


def returning(change):
    """The mean, whose results are changed before they are returned."""

    def aggregate(keys, server, memory, value, weight):
        results = AVERAGE.aggregate(keys, server, memory, value, weight)
        return change(*results, value)

    return AVERAGE._replace(aggregate=aggregate)


def at_server(x):
    return fc.federated_value(x, fc.SERVER)


BROKEN_AGGREGATORS = {
    "no aggregator": (3, FederatedTypeError, "Expected an aggregator, got 3"),
    "init without a parameter": (
        AVERAGE._replace(init=lambda: ((), ())),
        FederatedTypeError,
        r"`init`: expected a function of 1 argument, got one that takes \(\)",
    ),
    "init of two parameters": (
        AVERAGE._replace(init=lambda template, extra: ((), ())),
        FederatedTypeError,
        r"`init`: expected a function of 1 argument, got one that takes \(template, extra\)",
    ),
    "init of the state alone": (
        AVERAGE._replace(init=lambda template: ()),
        FederatedTypeError,
        r"`init` to return \(server, memory\), got 0 results",
    ),
    "init of nothing": (
        AVERAGE._replace(init=lambda template: None),
        FederatedTypeError,
        r"`init` to return \(server, memory\), got None",
    ),
    "aggregate of four arguments": (
        AVERAGE._replace(aggregate=lambda keys, server, memory, value: None),
        FederatedTypeError,
        "`aggregate`: expected a function of 5 arguments",
    ),
    "three results": (
        returning(lambda server, memory, total, measurements, value: (server, memory, total)),
        FederatedTypeError,
        r"\(server, memory, value, measurements\), got 3 results",
    ),
    "state of another type": (
        returning(lambda server, memory, *rest: (at_server(1.0), memory, *rest[:-1])),
        FederatedTypeError,
        "return server with the types that it was given, <>, got <float32>",
    ),
    "state at the clients": (
        returning(lambda server, memory, total, stats, value: (value, memory, total, stats)),
        PlacementError,
        r"return server at SERVER, got Value\(\{float32\}@CLIENTS\)",
    ),
    "values that are not aggregated": (
        returning(lambda server, memory, total, stats, value: (server, memory, value, stats)),
        PlacementError,
        r"return value at SERVER, got Value\(\{float32\}@CLIENTS\)",
    ),
    "measurements at the clients": (
        returning(
            lambda server, memory, total, stats, value: (server, memory, total, {"x": value})
        ),
        PlacementError,
        "return measurements at SERVER",
    ),
    "measurements without names": (
        returning(lambda server, memory, total, stats, value: (server, memory, total, total)),
        FederatedTypeError,
        "return measurements in a dict",
    ),
}


def use(aggregator):
    state, computation = fc.aggregators.as_computation(aggregators.checked(aggregator), np.float32)
    key = jax.random.key(0)
    return computation(state, key, [1.0, 3.0], [1.0, 1.0], [0, 1]).value


@pytest.mark.parametrize("name", BROKEN_AGGREGATORS)
def test_aggregators_that_break_their_contract(name):
    """C-135: a state function with a parameter, a state of another type, another result."""
    aggregator, error, message = BROKEN_AGGREGATORS[name]
    with pytest.raises(error, match=message):
        use(aggregator)


BROKEN_CODECS = {
    "init without a parameter": ({"init": lambda: ((), ())}, "expected a function of 1 argument"),
    "init of the state alone": ({"init": lambda t: ()}, r"return \(server, memory\), got \(\)"),
    "encode of two arguments": ({"encode": lambda k, v: v}, "expected a function of 4 arguments"),
    "no message": ({"encode": lambda k, m, h, v: v}, r"return \(memory, message\)"),
    "memory of another type": (
        {"encode": lambda k, m, h, v: (jnp.zeros(2), IDENTITY.encode(k, m, h, v)[1])},
        "return memory as it was given: expected nothing at the root, got float32",
    ),
    "finish without a state": (
        {"finish": lambda k, s, total, r: total},
        r"return \(server, value\)",
    ),
    "bits that are no count": ({"bits": lambda m: 3}, "return a BitCount, got 3"),
    "another value": (
        {"decode": lambda k, h, m: jnp.zeros(3)},
        r"expected float32\[\] at the root, got float32\[3\]",
    ),
    "no numbers": (
        {"decode": lambda k, h, m: IDENTITY.decode(k, h, m) > 0},
        "expected messages that decode to numbers, got bool",
    ),
}


@pytest.mark.parametrize("name", BROKEN_CODECS)
def test_codecs_that_break_their_contract(name):
    parts, message = BROKEN_CODECS[name]
    with pytest.raises((FederatedTypeError, CodecError), match=message):
        use(fc.aggregators.mean(codec=codecs.checked(IDENTITY._replace(**parts))))


def test_contracts_that_are_kept_change_nothing():
    assert use(fc.aggregators.mean(codec=codecs.checked(IDENTITY))) == 2
