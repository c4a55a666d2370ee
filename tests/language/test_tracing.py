"""Bodies of computations: opaque values, fields, composition, polymorphism, printing, analysis."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core as fc
from fedjax_core.compression.edges import PlacedKeys, uplink
from fedjax_core.errors import ArgumentError, ContextError, FederatedTypeError

INT, FLOAT = (fc.FederatedType(t, fc.CLIENTS) for t in (np.int32, np.float32))
STRUCT = fc.FederatedType([("a", np.int32), ("b", np.float32)], fc.CLIENTS)
SERVER_FLOAT = fc.FederatedType(np.float32, fc.SERVER)


def trace(body, *parameters):
    return fc.federated_computation(body, *parameters)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (lambda v: 1 if v else 2, TypeError),  # C-47
        (lambda v: v + 1, TypeError),  # C-47
        (lambda v: v[-1], IndexError),  # C-47
        (lambda v: v[2], IndexError),
        (lambda v: v(), SyntaxError),  # C-47
        (lambda v: 1 - v, TypeError),
        (lambda v: -v, TypeError),
        (lambda v: v == 0, TypeError),
        (lambda v: v != v, TypeError),
        (lambda v: v < 1, TypeError),
        (lambda v: 1 in v, TypeError),
        (lambda v: float(v), TypeError),
        (lambda v: jnp.sin(v), TypeError),
        (lambda v: v.c, AttributeError),
        (lambda v: v["c"], AttributeError),
        (lambda v: v.a.b, AttributeError),
        (lambda v: v.a[0], TypeError),
        (lambda v: list(v.a), TypeError),
        (lambda v: len(v.a), TypeError),
    ],
)
def test_values_are_opaque(body, error):
    """C-47: no arithmetic, no truth, no call, no field that is not there."""
    with pytest.raises(error):
        trace(body, STRUCT)


def test_refusals_name_the_type_and_the_remedy():
    with pytest.raises(FederatedTypeError, match=r"\{int32\}@CLIENTS.*federated_map"):
        trace(lambda v: v * 2, INT)
    with pytest.raises(AttributeError, match=r"\['a', 'b'\]"):
        trace(lambda v: v.c, STRUCT)


def test_fields_by_name_index_and_iteration():
    """Fields are values at the same placement; taking one twice makes one operation."""

    def body(v):
        a, b = v
        assert len(v) == 2
        assert str(a.type_signature) == "{int32}@CLIENTS"
        return v.a, v[0], v["b"], a, b

    computation = trace(body, STRUCT)
    assert computation([(1, 0.5)]) == ([1], [1], [0.5], [1], [0.5])
    assert str(computation.program).count("get[") == 2


def test_structs_of_federated_parameters():
    """A parameter may be a struct of placed values, and is passed as one."""
    both = fc.federated_computation(
        lambda arg: fc.federated_mean(arg["x"], arg["w"]), {"x": FLOAT, "w": INT}
    )
    assert str(both.type_signature) == "(<w={int32}@CLIENTS,x={float32}@CLIENTS> -> float32@SERVER)"
    assert both({"x": [1.0, 4.0], "w": [2, 1]}) == 2.0
    with pytest.raises(TypeError, match=r"\['w', 'x'\]"):
        both({"x": [1.0], "y": [1]})


def test_computations_compose():
    """A computation called in the body of another one becomes part of it, zipping what it must."""
    pair = fc.FederatedType((np.float32, np.float32), fc.CLIENTS)
    inner = trace(lambda p: fc.federated_mean(p[0], p[1]), pair)
    outer = trace(lambda x, w: fc.federated_map(lambda m: m * 2, inner((x, w))), FLOAT, FLOAT)
    assert outer([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(2 * 1.6666666)
    assert inner([(1.0, 1.0), (2.0, 3.0)]) == 1.75
    with pytest.raises(FederatedTypeError, match=r"int32.*|float32"):
        trace(lambda x, n: inner((x, n)), FLOAT, INT)
    with pytest.raises(FederatedTypeError, match="1 arguments"):
        trace(lambda x: inner(x, x), FLOAT)
    with pytest.raises(FederatedTypeError, match="federated_value"):
        trace(lambda x: inner((x, 1.0)), FLOAT)


def test_inlined_computations_take_what_is_equal_everywhere():
    total = trace(fc.federated_sum, FLOAT)
    spread = trace(lambda s, x: (total(fc.federated_broadcast(s)), total(x)), SERVER_FLOAT, FLOAT)
    assert spread(2.0, [1.0, 1.0, 1.0]) == (6.0, 3.0)


def test_values_of_another_computation_are_refused():
    kept = []
    trace(lambda x: (kept.append(x), fc.federated_sum(x))[1], INT)
    with pytest.raises(ContextError, match="another computation"):
        trace(lambda x: fc.federated_sum(kept[0]), INT)
    with pytest.raises(ContextError, match="outside of one"):
        _ = fc.federated_sum(kept[0])


def test_a_failed_body_leaves_nothing_behind():
    def fail(x):
        raise RuntimeError("in the body")

    with pytest.raises(RuntimeError, match="in the body"):
        trace(fail, INT)
    with pytest.raises(ContextError):
        fc.federated_count()
    assert trace(fc.federated_sum, INT)([1, 2]) == 3


def test_computations_may_be_defined_inside_a_body():
    def body(x):
        inner = trace(lambda y: fc.federated_map(lambda y: y * 10, y), INT)
        return fc.federated_sum(inner(x))

    assert trace(body, INT)([1, 2]) == 30


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda x: None, "add a return"),
        (lambda x: (), "add a return"),
        (lambda x: object(), "neither a value"),
        (lambda x: (x, fc.SERVER), "neither a value"),
    ],
)
def test_results_are_values(body, message):
    with pytest.raises(FederatedTypeError, match=message):
        trace(body, INT)


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (np.str_, "str"),
        ((np.float32, [None]), "every dimension"),
        (fc.AbstractType("T"), "polymorphic"),
        (fc.PlacementType(), "polymorphic"),
        ([("f", fc.FunctionType(np.int32, np.int32)), ("x", np.int32)], "parameter of its own"),
    ],
)
def test_parameters_have_values(t, message):
    with pytest.raises(FederatedTypeError, match=message):
        trace(lambda x: x, t)


@pytest.mark.parametrize("function", [lambda *xs: 1, lambda **xs: 1])
def test_untyped_functions_name_their_parameters(function):
    with pytest.raises(FederatedTypeError, match="name each one"):
        fc.federated_computation(function)


def test_functions_without_names_for_their_parameters():
    """*args, partial functions and jnp's own: the struct of parameters has no names, or theirs."""
    total = trace(lambda *xs: fc.federated_sum(xs), INT, INT)
    assert str(total.type_signature.parameter) == "<{int32}@CLIENTS,{int32}@CLIENTS>"
    assert total([1, 2], [3, 4]) == (3, 7)
    partial = trace(functools.partial(lambda s, x, y: fc.federated_sum((x, y)), 0), INT, INT)
    assert str(partial.type_signature.parameter) == "<x={int32}@CLIENTS,y={int32}@CLIENTS>"
    add = fc.jax_computation(jnp.add, np.int32, np.int32)
    assert int(add(1, 2)) == 3
    with_default = fc.jax_computation(lambda a, b, scale=2: (a + b) * scale, np.int32, np.int32)
    assert str(with_default.type_signature) == "(<a=int32,b=int32> -> int32)"
    assert int(with_default(1, 2)) == 6


def test_decorators_with_and_without_types():
    @fc.jax_computation(np.float32)
    def half(x):
        return x / 2

    @fc.jax_computation
    def double(x):
        return x * 2

    @fc.federated_computation(FLOAT)
    def compute(x):
        return fc.federated_map(half, x), fc.federated_map(double, x)

    assert compute([1.0]) == ([0.5], [2.0])
    assert repr(half) == "half: (float32 -> float32)"
    assert repr(compute) == (
        "compute: ({float32}@CLIENTS -> <{float32}@CLIENTS,{float32}@CLIENTS>)"
    )


def test_polymorphic_computations_are_traced_once_a_type():
    calls = []

    @fc.federated_computation
    def total(x):
        calls.append(str(x.type_signature))
        return fc.federated_sum(x)

    for value in (np.ones(3, np.float32), np.ones(5, np.float32), np.ones((3, 2), np.int32)):
        assert np.all(total(fc.Federated(value, fc.CLIENTS)).value == len(value))
    assert trace(lambda x: total(x), FLOAT)([1.0, 2.0]) == 3.0
    assert calls == ["{float32}@CLIENTS", "{int32[2]}@CLIENTS"]
    with pytest.raises(FederatedTypeError, match=r"fc\.Federated"):
        total([1.0])


def test_polymorphic_computations_take_structs_and_call_themselves():
    @fc.federated_computation
    def total(x):
        if isinstance(x, tuple):
            return tuple(total(part) for part in x)
        return fc.federated_sum(x)

    one, two = (fc.Federated(np.ones(3, t), fc.CLIENTS) for t in (np.float32, np.int32))
    result = total((one, (two, one)))
    assert [result[0].value, result[1][0].value, result[1][1].value] == [3, 3, 3]


def test_printing_shows_one_operation_a_line():
    @fc.federated_computation(INT, SERVER_FLOAT)
    def scaled(x, scale):
        at_clients = fc.federated_broadcast(scale, name="scale")
        return {"total": fc.federated_sum(fc.federated_map(jnp.multiply, x, at_clients))}

    header, *lines, last = str(scaled.program).splitlines()
    assert header == f"scaled: {scaled.type_signature}"
    assert [line.split(" #")[0].split() for line in lines] == [
        ["%0", "=", "parameter", ":", "{int32}@CLIENTS"],
        ["%1", "=", "parameter", ":", "float32@SERVER"],
        ["%2", "=", "broadcast[scale](%1)", ":", "float32@CLIENTS"],
        ["%3", "=", "map[multiply](%0,", "%2)", ":", "{float32}@CLIENTS"],
        ["%4", "=", "sum[value](%3)", ":", "float32@SERVER"],
    ]
    assert last == "return {'total': '%4'}"
    assert "test_tracing.py:" in lines[2]


def test_communication_reports_every_edge():
    """C-111: int32[10] down and up at each of 3 clients; weights and codecs have their own rows."""

    @fc.federated_computation(
        fc.FederatedType((np.int32, [10]), fc.SERVER),
        fc.FederatedType((np.float32, [100]), fc.CLIENTS),
        FLOAT,
        fc.FederatedType(fc.infer_type(np.uint32(0)), fc.SERVER),
    )
    def compute(s, x, w, key):
        down = fc.federated_broadcast(s, name="params")
        up = fc.federated_sum(fc.federated_map(lambda d: d + 1, down), name="back")
        return up, fc.federated_mean(x, w, name="average"), key

    report = fc.communication(compute, num_clients=3)
    rows = [(e.direction, e.operator, e.name, e.bits_per_client, e.bits) for e in report]
    assert rows == [
        ("down", "broadcast", "params", 320, 960),
        ("up", "sum", "back", 320, 960),
        ("up", "sum", "average", 3200, 9600),
        ("up", "sum", "weight", 32, 96),
    ]
    assert (report.broadcast_bits, report.aggregate_bits) == (960, 10656)
    assert str(report[0].type) == "int32[10]@SERVER"
    assert "test_tracing.py:" in report[0].location
    table = str(report).splitlines()
    assert len(table) == 6  # the header, four edges, and the round trips
    assert table[1].split()[:4] == ["down", "broadcast", "params", "-"]


@pytest.mark.parametrize(
    ("t", "bits"),
    [
        ((np.int32, [10]), 320),  # C-111
        ([], 0),  # C-111
        (((np.float64, [10]), (np.int32, [10])), 640),  # C-111: float64 travels as float32 here
        (np.bool_, 8),
        (jnp.bfloat16, 16),
        ({"a": (np.uint8, [3, 2]), "b": (np.float32, [0])}, 48),
    ],
)
def test_sizes_of_messages(t, bits):
    """C-111, at the width that arrays have without 64 bits."""
    send = trace(fc.federated_broadcast, fc.FederatedType(t, fc.SERVER))
    assert fc.communication(send, num_clients=2).broadcast_bits == 2 * bits


def test_communication_of_codecs_and_constants():
    """A codec's row has its own size, one that depends on values none; constants cost nothing."""
    quantize = fc.compression.uniform_quantize(4, min_size=2)
    by_value = fc.compression.identity()._replace(
        bits=lambda message: fc.BitCount.of(1).times(message.payload[0].astype(jnp.uint32))
    )

    def compute(x):
        constant = fc.federated_broadcast(fc.federated_value(np.zeros(9), fc.SERVER))
        state, memory = (fc.federated_value((), p) for p in (fc.SERVER, fc.CLIENTS))
        key = fc.federated_value(np.zeros(2, np.uint32), fc.SERVER)
        shared = fc.federated_broadcast(key)
        keys = PlacedKeys(key, shared, fc.federated_map(wrap_key, shared))
        totals = [uplink(c, keys, state, memory, x)[2] for c in (quantize, by_value)]
        return constant, totals

    report = fc.communication(
        trace(compute, fc.FederatedType((np.float32, [5]), fc.CLIENTS)), num_clients=10
    )
    assert [(e.bits_per_client, e.bits) for e in report] == [
        (0, 0),
        (0, 0),
        (8 * 3 + 64, 880),  # 5 x 4 bits are 3 bytes, and two bounds
        (None, None),
    ]
    assert report[2].codec == "uniform_quantize(bits=4)"
    assert report.aggregate_bits is None
    assert report.broadcast_bits == 0
    assert "by value" in str(report)


def wrap_key(data):
    return jax.random.wrap_key_data(data)


@pytest.mark.parametrize("num_clients", [-1, 1.5, True, None])
def test_communication_checks_the_number_of_clients(num_clients):
    with pytest.raises(ArgumentError, match="num_clients"):
        fc.communication(trace(fc.federated_sum, INT), num_clients=num_clients)


def test_communication_needs_a_program():
    with pytest.raises(ArgumentError, match="with a program"):
        fc.communication(lambda x: x, num_clients=1)
