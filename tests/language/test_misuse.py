"""Misuse: every mistake is named, with what was expected, what was got, and what to do."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_core as fc
from fedjax_core.errors import (
    ArgumentError,
    CodecError,
    ContextError,
    FederatedTypeError,
    FedjaxError,
    PlacementError,
)

FLOAT, INT, BOOL, COMPLEX = (
    fc.FederatedType(t, fc.CLIENTS) for t in (np.float32, np.int32, np.bool_, np.complex64)
)
SERVER_FLOAT, SERVER_INT, SERVER_BOOL = (
    fc.FederatedType(t, fc.SERVER) for t in (np.float32, np.int32, np.bool_)
)
PAIR = fc.FederatedType([("a", np.int32), ("b", np.float32)], fc.CLIENTS)
VECTOR = fc.FederatedType((np.float32, [2]), fc.CLIENTS)
KEYS = fc.FederatedType(fc.infer_type(jax.random.key(0)), fc.CLIENTS)
INDICES = fc.FederatedType((np.int32, [2]), fc.CLIENTS)
ROWS = fc.FederatedType(fc.SequenceType(np.float32), fc.CLIENTS)
SERVER_ROWS = fc.FederatedType(fc.SequenceType(np.float32), fc.SERVER)
FUNCTION = fc.FunctionType(np.float32, np.float32)
HERE = "test_misuse.py:"


def trace(body: Callable[..., Any], *parameters: Any) -> fc.Computation:
    return fc.federated_computation(body, *parameters)


def add(state, x):
    return state + x


def pick(table, key):
    return table[key]


total = trace(fc.federated_sum, INT)
two = trace(lambda x, y: (fc.federated_sum(x), fc.federated_sum(y)), INT, FLOAT)
fields = trace(lambda s: (fc.federated_sum(s["a"]), s["b"]), {"a": INT, "b": FLOAT})
echo = trace(lambda pair: pair, PAIR)
apply = trace(lambda f, x: fc.federated_map(f, x), FUNCTION, FLOAT)
rows = trace(lambda rows: fc.federated_map(lambda r: r.sum(), rows), ROWS)
bounded = trace(lambda x: fc.federated_secure_sum(x, 1, name="votes"), INT)


def value_of_another_computation():
    kept = []
    trace(lambda x: (kept.append(x), fc.federated_sum(x))[1], INT)
    return trace(lambda x: fc.federated_sum(kept[0]), INT)


def inside_jit(body: Callable[[Any], Callable[..., Any]]) -> Any:
    """A computation traced inside of a JAX transformation, one of whose tracers it uses."""
    return jax.jit(lambda scale: trace(body(scale), FLOAT)([1.0]))(2.0)


class Misuse(NamedTuple):
    """One mistake: what its error is, and what the message has to hold."""

    run: Callable[[], Any]
    error: type[Exception]
    expected: str
    got: str
    remedy: str


def in_body(body, *parameters):
    return lambda: trace(body, *parameters)


# Raised in a body: the message names the operator (or the value) and the user's line as well.
IN_BODIES = {
    "broadcast of a client value": Misuse(
        in_body(lambda x: fc.federated_broadcast(x), INT),
        PlacementError,
        "federated_broadcast: expected a value at SERVER",
        "got {int32}@CLIENTS",
        "aggregate it first",
    ),
    "sum of a server value": Misuse(
        in_body(lambda x: fc.federated_sum(x), SERVER_INT),
        PlacementError,
        "federated_sum: expected a value at CLIENTS",
        "got int32@SERVER",
        "broadcast it first",
    ),
    "sum of an unplaced value": Misuse(
        in_body(lambda x: fc.federated_sum(x), np.int32),
        PlacementError,
        "federated_sum: expected a placed value",
        "got one of type int32",
        "place it with federated_value",
    ),
    "sum of a constant": Misuse(
        in_body(lambda x: fc.federated_sum(1), INT),
        PlacementError,
        "federated_sum: expected placed values",
        "got 1",
        "place a constant with federated_value",
    ),
    "weight that is a string": Misuse(
        in_body(lambda x: fc.federated_mean(x, "weight"), FLOAT),
        PlacementError,
        "federated_mean: expected placed values",
        "got 'weight'",
        "federated_value",
    ),
    "placed weight that is a string": Misuse(
        in_body(lambda x: fc.federated_mean(x, fc.federated_value("w", fc.CLIENTS)), FLOAT),
        FederatedTypeError,
        "federated_mean: expected one scalar weight",
        "got str@CLIENTS",
        "compute one number a client",
    ),
    "weight of another structure": Misuse(
        in_body(lambda x: fc.federated_mean(x["b"], x), PAIR),
        FederatedTypeError,
        "federated_mean: expected one scalar weight",
        "got {<a=int32,b=float32>}@CLIENTS",
        "compute one number a client",
    ),
    "weight that is no scalar": Misuse(
        in_body(lambda x: fc.federated_mean(x, x), VECTOR),
        FederatedTypeError,
        "federated_mean: expected one scalar weight",
        "got {float32[2]}@CLIENTS",
        "compute one number a client",
    ),
    "mean of integers": Misuse(
        in_body(lambda x: fc.federated_mean(x), INT),
        FederatedTypeError,
        "federated_mean: expected floating-point numbers",
        "got {int32}@CLIENTS",
        "convert them, for example with astype",
    ),
    "sum of booleans": Misuse(
        in_body(lambda x: fc.federated_sum(x), BOOL),
        FederatedTypeError,
        "federated_sum: expected numbers",
        "got {bool}@CLIENTS",
        "astype",
    ),
    "sum of keys": Misuse(
        in_body(lambda x: fc.federated_sum(x), KEYS),
        FederatedTypeError,
        "federated_sum: expected numbers",
        "got {key<fry>}@CLIENTS",
        "convert them",
    ),
    "sum of sequences": Misuse(
        in_body(lambda x: fc.federated_sum(x), ROWS),
        FederatedTypeError,
        "federated_sum: expected numbers of fixed shape",
        "got {float32*}@CLIENTS",
        "in federated_map",
    ),
    "minimum of complex numbers": Misuse(
        in_body(lambda x: fc.federated_min(x), COMPLEX),
        FederatedTypeError,
        "federated_min: expected real numbers",
        "got {complex64}@CLIENTS",
        "convert them, for example with astype",
    ),
    "broadcast of a sequence": Misuse(
        in_body(lambda x: fc.federated_broadcast(x), SERVER_ROWS),
        FederatedTypeError,
        "Expected a type of fixed size",
        "got float32*",
        "reduce the sequence",
    ),
    "collection of sequences": Misuse(
        in_body(lambda x: fc.federated_collect(x), ROWS),
        FederatedTypeError,
        "Expected a type of fixed size",
        "got float32*",
        "reduce the sequence",
    ),
    "codec that is none": Misuse(
        in_body(lambda x: fc.federated_sum(x, codec=8), FLOAT),
        CodecError,
        "federated_sum: expected a codec",
        "got 8",
        "pass one of fc.compression",
    ),
    "presence that is no boolean": Misuse(
        in_body(lambda x: fc.federated_sum(x, present=x), INT),
        FederatedTypeError,
        "federated_sum: expected `present` of type {bool}@CLIENTS",
        "got {int32}@CLIENTS",
        "compare it",
    ),
    "zero of another type": Misuse(  # C-67
        in_body(
            lambda x: fc.federated_aggregate(
                x, 0.0, fc.jax_computation(add, np.int32, np.int32), add, lambda s: s
            ),
            INT,
        ),
        FederatedTypeError,
        "Expected `zero` to be assignable to type int32",
        "got type float32",
        "convert it",
    ),
    "merge that returns another structure": Misuse(
        in_body(lambda x: fc.federated_aggregate(x, 0, add, lambda a, b: (a, b), lambda s: s), INT),
        FederatedTypeError,
        "Expected the result of `merge` to be assignable to type int32",
        "got type <int32,int32>",
        "give it the same structure",
    ),
    "accumulate that returns another dtype": Misuse(
        in_body(lambda x: fc.federated_aggregate(x, 0, add, add, lambda s: s), FLOAT),
        FederatedTypeError,
        "Expected the result of `accumulate` to be assignable to type int32",
        "got type float32",
        "astype",
    ),
    "accumulate of one argument": Misuse(
        in_body(lambda x: fc.federated_aggregate(x, 0, lambda s: s, add, lambda s: s), INT),
        FederatedTypeError,
        "federated_aggregate: accumulate: expected a function of 2 arguments",
        "got one that takes (s)",
        "change its parameters",
    ),
    "keys that are floats": Misuse(
        in_body(lambda k, s: fc.federated_select(k, 3, s, pick), VECTOR, SERVER_FLOAT),
        FederatedTypeError,
        "federated_select: expected client_keys of type {int32[n]}@CLIENTS",
        "got {float32[2]}@CLIENTS",
        "astype",
    ),
    "a key that is a scalar": Misuse(
        in_body(lambda k, s: fc.federated_select(k, 3, s, pick), INT, SERVER_FLOAT),
        FederatedTypeError,
        "federated_select: expected client_keys of type {int32[n]}@CLIENTS",
        "got {int32}@CLIENTS",
        "convert them",
    ),
    "a number of keys that is no integer": Misuse(
        in_body(lambda k, s: fc.federated_select(k, 2.5, s, lambda s, k: s), INDICES, SERVER_FLOAT),
        FederatedTypeError,
        "federated_select: expected `max_key` to be int32",
        "got 2.5",
        "pass the number of keys",
    ),
    "secure sum of floats": Misuse(
        in_body(lambda x: fc.federated_secure_sum(x, 3), FLOAT),
        FederatedTypeError,
        "federated_secure_sum: expected integers",
        "got {float32}@CLIENTS",
        "quantise them",
    ),
    "bounds in the wrong order": Misuse(
        in_body(lambda x: fc.federated_secure_sum(x, -3), INT),
        ArgumentError,
        "federated_secure_sum: expected max_input to be at least min_input",
        "got -3 and 0",
        "exchange",
    ),
    "bound that is a float": Misuse(
        in_body(lambda x: fc.federated_secure_sum(x, 3.5), INT),
        FederatedTypeError,
        "federated_secure_sum: max_input: expected one constant int",
        "got 3.5",
        "pass Python ints",
    ),
    "bound that is a value": Misuse(
        in_body(lambda x: fc.federated_secure_sum(x, fc.federated_sum(x)), INT),
        FederatedTypeError,
        "federated_secure_sum: max_input: expected one constant int",
        "got Value(int32@SERVER)",
        "pass Python ints",
    ),
    "bitwidth out of range": Misuse(
        in_body(lambda x: fc.federated_secure_sum_bitwidth(x, 63), INT),
        ArgumentError,
        "federated_secure_sum_bitwidth: expected a bitwidth from 1 to 62",
        "got 63",
        "fewer bits",
    ),
    "modulus of zero": Misuse(
        in_body(lambda x: fc.federated_secure_modular_sum(x, 0), INT),
        ArgumentError,
        "federated_secure_modular_sum: expected a modulus from 1",
        "got 0",
        "pass a positive int",
    ),
    "evaluation of a function with a parameter": Misuse(
        in_body(lambda: fc.federated_eval(lambda x: x, fc.SERVER)),
        FederatedTypeError,
        "federated_eval of `lambda`: expected a function without parameters",
        "got 1",
        "use federated_map",
    ),
    "evaluation at an unknown placement": Misuse(
        in_body(lambda: fc.federated_eval(lambda: 1, "server")),
        PlacementError,
        "federated_eval of `lambda`: expected CLIENTS or SERVER",
        "got 'server'",
        "pass fc.CLIENTS or fc.SERVER",
    ),
    "value at an unknown placement": Misuse(
        in_body(lambda: fc.federated_value(1, "server")),
        PlacementError,
        "federated_value: expected CLIENTS or SERVER",
        "got 'server'",
        "pass fc.CLIENTS or fc.SERVER",
    ),
    "value of what is placed already": Misuse(
        in_body(lambda x: fc.federated_value(x, fc.SERVER), SERVER_INT),
        PlacementError,
        "federated_value: expected an unplaced value",
        "got one of type int32@SERVER",
        "federated_broadcast or an aggregation",
    ),
    "constant beyond int32": Misuse(
        in_body(lambda: fc.federated_value(2**31, fc.SERVER)),
        FederatedTypeError,
        "federated_value: expected values that int64, without jax_enable_x64 int32, holds",
        "got values from 2147483648",
        "scale them",
    ),
    "map of two placements": Misuse(
        in_body(lambda x, s: fc.federated_map(add, x, s), FLOAT, SERVER_FLOAT),
        PlacementError,
        "federated_map of `add`: expected all arguments at one placement",
        "got ['{float32}@CLIENTS', 'float32@SERVER']",
        "broadcast the server's",
    ),
    "map by no function": Misuse(
        in_body(lambda x: fc.federated_map(3, x), FLOAT),
        FederatedTypeError,
        "federated_map of `int`: expected a function or a jax_computation",
        "got 3",
        "a function or a jax_computation",
    ),
    "map by a function of three": Misuse(
        in_body(lambda x: fc.federated_map(lambda a, b, c: a, x), FLOAT),
        FederatedTypeError,
        "federated_map of `lambda`: expected a function of 1 argument",
        "got one that takes (a, b, c)",
        "change its parameters",
    ),
    "map by a computation of placed values": Misuse(
        in_body(lambda x: fc.federated_map(total, x), INT),
        FederatedTypeError,
        "federated_map of `federated_sum`: expected a function of one member's values",
        "got a computation of type ({int32}@CLIENTS -> int32@SERVER)",
        "call it with the placed values",
    ),
    "map that returns nothing": Misuse(
        in_body(lambda x: fc.federated_map(lambda x: None, x), FLOAT),
        FederatedTypeError,
        "expected a pytree of arrays",
        "`lambda` returned None",
        "add a return",
    ),
    "operator inside of a local function": Misuse(
        in_body(lambda x: fc.federated_map(lambda x: fc.federated_sum(x), x), FLOAT),
        PlacementError,
        "federated_sum: expected placed values",
        "Tracer",
        "outside of local functions",
    ),
    "value captured by a local function": Misuse(
        in_body(lambda x, y: fc.federated_map(lambda a: jnp.add(a, y), x), FLOAT, FLOAT),
        FederatedTypeError,
        "`lambda`: expected arrays in a JAX function",
        "got a value of the body",
        "as its argument",
    ),
    "zip of two placements": Misuse(
        in_body(lambda x, s: fc.federated_zip((x, s)), FLOAT, SERVER_FLOAT),
        PlacementError,
        "federated_zip: expected values at one placement",
        "got ['{float32}@CLIENTS', 'float32@SERVER']",
        "federated_broadcast",
    ),
    "zip of nothing": Misuse(
        in_body(lambda x: fc.federated_zip(()), FLOAT),
        FederatedTypeError,
        "federated_zip: expected at least one placed value",
        "got ()",
        "pass some",
    ),
    "argument of another type": Misuse(
        in_body(lambda x: total(x), FLOAT),
        FederatedTypeError,
        "Expected argument 0 `value` of `federated_sum` to be assignable to type {int32}@CLIENTS",
        "got type {float32}@CLIENTS",
        "convert it",
    ),
    "argument at another placement": Misuse(
        in_body(lambda x: total(x), SERVER_INT),
        PlacementError,
        "Expected argument 0 `value` of `federated_sum` to be assignable to type {int32}@CLIENTS",
        "got type int32@SERVER",
        "broadcast it first",
    ),
    "wrong argument of a function parameter": Misuse(
        in_body(lambda f, x: f(x), FUNCTION, np.int32),
        FederatedTypeError,
        "Expected argument 0 of a call of a function of type (float32 -> float32)",
        "got type int32",
        "convert it",
    ),
    "local computation called with a placed value": Misuse(
        in_body(lambda x: fc.jax_computation(jnp.sin, np.float32)(x), FLOAT),
        PlacementError,
        "`sin`: expected unplaced values",
        "got one of type {float32}@CLIENTS",
        "federated_map",
    ),
    "value of another computation": Misuse(
        value_of_another_computation,
        ContextError,
        "federated_sum: a value of type {int32}@CLIENTS",
        "belongs to another computation",
        "pass it as an argument",
    ),
    "operator outside of a body": Misuse(
        lambda: fc.federated_sum(1),
        ContextError,
        "federated_sum describes a step of a federated computation",
        "was called outside of one",
        "federated_computation",
    ),
    "local function that captures a tracer": Misuse(
        lambda: inside_jit(lambda c: lambda x: fc.federated_map(lambda x: x * c, x)),
        FederatedTypeError,
        "A federated computation outlives that trace",
        "captures",
        "pass the value as an argument",
    ),
    "constant that is a tracer": Misuse(
        lambda: inside_jit(lambda c: lambda x: fc.federated_value(c, fc.SERVER)),
        FederatedTypeError,
        "federated_value: expected a constant",
        "which JAX is tracing",
        "pass it as an argument",
    ),
    "result that is a tracer": Misuse(
        lambda: inside_jit(lambda c: lambda x: (x, c)),
        FederatedTypeError,
        "Expected `lambda` to return values of its body",
        "which JAX is tracing",
        "pass it as an argument",
    ),
    "result that is no value": Misuse(
        in_body(lambda x: (x, fc.SERVER), INT),
        FederatedTypeError,
        "Expected `lambda` to return values",
        "got SERVER of type Placement",
        "return what operators made",
    ),
}

OPAQUE = {
    "arithmetic": lambda v: v.a + 1,
    "arithmetic from the right": lambda v: 1 - v.a,
    "arithmetic with an array": lambda v: np.float32(2) * v.b,
    "division with rest": lambda v: divmod(v.a, 2),
    "truth": lambda v: 1 if v.a else 2,
    "comparison": lambda v: v.a < 1,
    "equality": lambda v: v.a == 1,
    "membership": lambda v: 1 in v,
    "rounding": lambda v: round(v.b),
    "a number": lambda v: float(v.b),
    "formatting": lambda v: f"{v.b:.2f}",
    "an array": lambda v: np.asarray(v.b),
    "a sum by NumPy": lambda v: np.sum(v.b),
    "a field set": lambda v: v.__setitem__("a", 1),
    "an unplaced value": lambda v: trace(lambda x: x + 1, np.int32),
}
for label, body in OPAQUE.items():
    IN_BODIES[f"{label} in the body"] = Misuse(
        in_body(body, PAIR),
        FederatedTypeError,
        "Expected an operator for a value of type",
        "got Python's own arithmetic, test or conversion",
        "apply that with federated_map",
    )

STRUCTURE = {
    "length of a scalar": (lambda v: len(v.a), FederatedTypeError, "a struct to take apart"),
    "iteration of a scalar": (lambda v: list(v.a), FederatedTypeError, "a struct to take apart"),
    "sum of a scalar": (lambda v: sum(v.a), FederatedTypeError, "a struct to take apart"),
    "field of a scalar": (lambda v: v.a.b, AttributeError, "a struct with a field 'b'"),
    "index of a scalar": (lambda v: v.a[0], IndexError, "a struct with a field 0"),
}
for label, (body, error, expected) in STRUCTURE.items():
    IN_BODIES[label] = Misuse(
        in_body(body, PAIR), error, expected, "got a value of type {int32}@CLIENTS", "federated_map"
    )

NO_FIELDS = {
    "attribute that there is not": (lambda v: v.c, AttributeError, "'c'"),
    "key that there is not": (lambda v: v["c"], AttributeError, "'c'"),
    "negative index": (lambda v: v[-1], IndexError, "-1"),  # C-47
    "index too large": (lambda v: v[2], IndexError, "2"),
    "index that is a float": (lambda v: v[0.5], IndexError, "0.5"),
    "slice": (lambda v: v[0:1], IndexError, "slice(0, 1, None)"),
}
for label, (body, error, got) in NO_FIELDS.items():
    IN_BODIES[label] = Misuse(
        in_body(body, PAIR),
        error,
        "Expected one of the fields ['a', 'b'], or an index from 0 to 1",
        f"got {got}",
        "take the field by its name or position",
    )

IN_BODIES["call of a value that is no function"] = Misuse(  # C-47
    in_body(lambda x: x(1), INT),
    SyntaxError,
    "Expected a function to call",
    "got a value of type {int32}@CLIENTS",
    "FunctionType",
)
IN_BODIES["JAX function of a value"] = Misuse(
    in_body(lambda x: jnp.sin(x), FLOAT),
    FederatedTypeError,
    "`lambda`: expected arrays in a JAX function",
    "got a value of the body",
    "put the function into federated_map",
)

# Raised where a computation is defined or called: the message names the argument.
AT_CALLS = {
    "one list for two parameters": Misuse(
        lambda: two([1]), FederatedTypeError, "expected 2 arguments", "got 1", "missing ['y']"
    ),
    "three lists for two parameters": Misuse(
        lambda: two([1], [1.0], [2.0]),
        FederatedTypeError,
        "`lambda` expected 2 arguments",
        "got 3",
        "pass 2",
    ),
    "ragged lists": Misuse(
        lambda: two([1, 2], [1.0]),
        ArgumentError,
        "`lambda` expected one number of clients",
        "got 2 for argument 0 `x` of `lambda`, 1 for argument 1 `y`",
        "pass values of the same clients",
    ),
    "ragged structs of lists": Misuse(
        lambda: fields({"a": [1, 2], "b": [1.0]}),
        ArgumentError,
        "`lambda` expected one number of clients",
        "got 2 for argument 0 `s` of `lambda`.a, 1 for argument 0 `s` of `lambda`.b",
        "pass values of the same clients",
    ),
    "another number of clients": Misuse(
        lambda: total([1, 2], num_clients=3),
        ArgumentError,
        "`federated_sum` expected one number of clients",
        "got 2 for argument 0 `value` of `federated_sum`, 3 for num_clients",
        "pass values of the same clients",
    ),
    "number of clients that is no number": Misuse(
        lambda: total([1, 2], num_clients="2"),
        ArgumentError,
        "`federated_sum` expected a number of clients of at least 0",
        "got num_clients='2'",
        "pass an int",
    ),
    "number of clients that is not known": Misuse(
        lambda: trace(lambda: fc.federated_sum(fc.federated_value(1, fc.CLIENTS)))(),
        ArgumentError,
        "`lambda` expected to know how many clients there are",
        "no argument says so",
        "pass num_clients=",
    ),
    "scalar for the clients": Misuse(  # C-49
        lambda: total(3),
        FederatedTypeError,
        "argument 0 `value` of `federated_sum`: expected a list with one entry a client",
        "got 3 of int",
        "wrap the values in a list",
    ),
    "generator for the clients": Misuse(  # C-49
        lambda: total(i for i in range(3)),
        FederatedTypeError,
        "argument 0 `value` of `federated_sum`: expected a list with one entry a client",
        "of generator",
        "wrap the values in a list",
    ),
    "float for an int": Misuse(
        lambda: total([1, 1.5]),
        FederatedTypeError,
        "argument 0 `value` of `federated_sum`, client 1: expected int32",
        "got 1.5 of float",
        "convert it",
    ),
    "array of another dtype": Misuse(
        lambda: total(np.ones(3, np.float32)),
        FederatedTypeError,
        "argument 0 `value` of `federated_sum`, with a leading clients axis: expected int32[?]",
        "got an array of float32",
        "astype",
    ),
    "number beyond int32": Misuse(
        lambda: total([2**31]),
        FederatedTypeError,
        "client 0: expected values that int32 holds",
        "got values from 2147483648",
        "declare a wider type",
    ),
    "vector of another length": Misuse(
        lambda: trace(fc.federated_sum, VECTOR)([[1.0, 2.0], [1.0]]),
        FederatedTypeError,
        "client 1: expected float32[2]",
        "got shape (1,)",
        "reshape or pad it",
    ),
    "ragged rows of an array": Misuse(
        lambda: trace(fc.federated_sum, VECTOR)([[[1.0], 2.0]]),
        FederatedTypeError,
        "client 0: expected float32[2]",
        "got [[1.0], 2.0]",
        "give all rows one shape",
    ),
    "dict without a key": Misuse(
        lambda: echo([{"a": 1}]),
        FederatedTypeError,
        "argument 0 `pair` of `lambda`, client 0: expected the fields ['a', 'b']",
        "got ['a']",
        "add ['b']",
    ),
    "dict with an unknown key": Misuse(
        lambda: echo([{"a": 1, "b": 2.0, "c": 3}]),
        FederatedTypeError,
        "client 0: expected the fields ['a', 'b']",
        "got ['a', 'b', 'c']",
        "leave out ['c']",
    ),
    "number for a client's sequence": Misuse(
        lambda: rows([3.0]),
        FederatedTypeError,
        "argument 0 `rows` of `lambda`, client 0: expected a list of examples of type float32",
        "got float",
        "wrap the examples in a list",
    ),
    "string for an example": Misuse(
        lambda: rows([[1.0, "2"]]),
        FederatedTypeError,
        "client 0, example 1: expected float32",
        "got '2' of str",
        "convert it",
    ),
    "unknown keyword": Misuse(
        lambda: two([1], z=[1.0]),
        FederatedTypeError,
        "`lambda` expected arguments out of ['x', 'y']",
        "got ['z']",
        "use these names",
    ),
    "argument given twice": Misuse(
        lambda: two([1], x=[1]),
        FederatedTypeError,
        "`lambda` expected each argument once",
        "got ['x'] by position and by name",
        "give it once",
    ),
    "missing argument": Misuse(
        lambda: two(x=[1]), FederatedTypeError, "expected 2 arguments", "got 1", "missing ['y']"
    ),
    "value at another placement": Misuse(
        lambda: total(fc.Federated(np.int32(1), fc.SERVER)),
        PlacementError,
        "Expected argument 0 `value` of `federated_sum` to be assignable to type {int32}@CLIENTS",
        "got type int32@SERVER",
        "pass a value at CLIENTS",
    ),
    "value of another dtype": Misuse(
        lambda: total(fc.Federated(np.ones(2, np.float32), fc.CLIENTS)),
        FederatedTypeError,
        "Expected argument 0 `value` of `federated_sum` to be assignable to type {int32}@CLIENTS",
        "got type {float32}@CLIENTS",
        "astype",
    ),
    "value without a clients axis": Misuse(
        lambda: total(fc.Federated(np.int32(1), fc.CLIENTS)),
        FederatedTypeError,
        "Expected arrays with a leading clients axis for argument 0 `value` of `federated_sum`",
        "without axes",
        "stack one row a client",
    ),
    "list where a lowered computation takes arrays": Misuse(
        lambda: total.lower()([1, 2]),
        FederatedTypeError,
        "argument 0 `value` of `federated_sum`: expected a Federated value",
        "got list",
        "wrap it in fc.Federated",
    ),
    "function of another type": Misuse(
        lambda: apply(fc.jax_computation(lambda x: x + 1, np.int32), [1.0]),
        FederatedTypeError,
        "Expected argument 0 `f` of `lambda` to be assignable to type (float32 -> float32)",
        "got type (int32 -> int32)",
        "pass a value of type (float32 -> float32)",
    ),
    "function of another result": Misuse(
        lambda: apply(lambda x: x > 1, [1.0]),
        FederatedTypeError,
        "to be assignable to type {float32}@CLIENTS",
        "got type {bool}@CLIENTS",
        "convert it",
    ),
    "no function for a function parameter": Misuse(
        lambda: apply(3, [1.0]),
        FederatedTypeError,
        "argument 0 `f` of `lambda`: expected a function of type (float32 -> float32)",
        "got 3",
        "pass a jax_computation",
    ),
    "function in a struct": Misuse(
        lambda: trace(lambda s: s["x"], [("f", FUNCTION), ("x", np.int32)]),
        FederatedTypeError,
        "Expected no function inside a struct",
        "got <f=(float32 -> float32),x=int32>",
        "make it a parameter of its own",
    ),
    "list for a computation without types": Misuse(
        lambda: fc.federated_computation(lambda x: fc.federated_sum(x))([1, 2]),
        FederatedTypeError,
        "Expected a Federated value, an array or a typed function",
        "got [1, 2]",
        "declare the types",
    ),
    "parameters without names": Misuse(
        lambda: fc.federated_computation(lambda *args: args),
        FederatedTypeError,
        "`lambda` expected named parameters",
        "got *args",
        "name each one",
    ),
    "parameters by keyword only": Misuse(
        lambda: fc.federated_computation(lambda *, x: x),
        FederatedTypeError,
        "`lambda` expected named parameters that can be given by position",
        "got x",
        "name each one",
    ),
    "fewer types than parameters": Misuse(
        lambda: trace(lambda x, y: x, INT),
        FederatedTypeError,
        "`lambda`: expected a function of 1 argument",
        "got one that takes (x, y)",
        "change its parameters",
    ),
    "more types than parameters": Misuse(
        lambda: fc.jax_computation(lambda x: x, np.int32, np.int32),
        FederatedTypeError,
        "jax_computation of `lambda`: expected a function of 2 arguments",
        "got one that takes (x)",
        "change its parameters",
    ),
    "local computation of placed values": Misuse(
        lambda: fc.jax_computation(lambda x: x, INT),
        FederatedTypeError,
        "jax_computation of `lambda`: expected types of one member's values",
        "got {int32}@CLIENTS",
        "use federated_computation",
    ),
    "body that returns nothing": Misuse(
        lambda: trace(lambda x: None, INT),
        FederatedTypeError,
        "Expected `lambda` to return a value",
        "got None",
        "add a return",
    ),
    "parameter of unknown shape": Misuse(
        lambda: trace(lambda x: x, fc.FederatedType((np.float32, [None]), fc.CLIENTS)),
        FederatedTypeError,
        "Expected a type with a fixed shape",
        "got float32[?]",
        "give every dimension",
    ),
    "parameter of an abstract type": Misuse(
        lambda: trace(lambda x: x, fc.AbstractType("T")),
        FederatedTypeError,
        "Expected the type of a value for a parameter",
        "got T",
        "leave the types out",
    ),
    "value beyond the bounds of a secure sum": Misuse(  # C-65
        lambda: bounded([2, 4]),
        ArgumentError,
        "expected values from [0] to [1] for the secure sum 'votes' (test_misuse.py:",
        "got 0 below and 2 above",
        "report_clipped=True",
    ),
}


def message_of(misuse: Misuse) -> str:
    """The message of the error that the misuse raises, once its class is found right."""
    with pytest.raises(misuse.error) as caught:
        misuse.run()
    assert isinstance(caught.value, FedjaxError)
    assert isinstance(caught.value, TypeError | ValueError | RuntimeError)
    return str(caught.value)


@pytest.mark.parametrize("name", IN_BODIES)
def test_mistakes_in_bodies_name_the_operator_and_the_line(name):
    misuse = IN_BODIES[name]
    message = message_of(misuse)
    for part in (misuse.expected, misuse.got, misuse.remedy, HERE):
        assert part in message
    assert message.count(HERE) == 1


@pytest.mark.parametrize("name", AT_CALLS)
def test_mistakes_in_calls_name_the_argument(name):
    misuse = AT_CALLS[name]
    message = message_of(misuse)
    for part in (misuse.expected, misuse.got, misuse.remedy):
        assert part in message


def test_there_are_many_mistakes():
    assert len(IN_BODIES) + len(AT_CALLS) >= 40


@pytest.mark.parametrize("given", [{"b": 0.5, "a": 1}, {"a": 1, "b": 0.5}, (1, 0.5), [1, 0.5]])
def test_dicts_in_another_order_are_no_mistake(given):
    assert echo([given]) == [{"a": 1, "b": 0.5}]


@pytest.mark.parametrize(
    "make",
    [
        lambda: fc.FederatedType(INT, fc.SERVER),
        lambda: fc.FederatedType(FUNCTION, fc.SERVER),
        lambda: fc.SequenceType(fc.SequenceType(np.int32)),
        lambda: fc.SequenceType(INT),
    ],
)
def test_nested_types(make):
    """Types where they may not stand are a TypeError, and a ValueError as in TFF (C-27)."""
    with pytest.raises(FederatedTypeError, match=r"Expected no .* inside .*, got") as caught:
        make()
    assert isinstance(caught.value, ValueError)


# The same mistake raises the same class in every operator.

AT_CLIENTS_ONLY = {
    "sum": lambda v: fc.federated_sum(v),
    "sum with a codec": lambda v: fc.federated_sum(v, codec=fc.compression.identity()),
    "mean": lambda v: fc.federated_mean(v),
    "weight": lambda v: fc.federated_mean(fc.federated_value(1.0, fc.CLIENTS), v),
    "min": lambda v: fc.federated_min(v),
    "max": lambda v: fc.federated_max(v),
    "collect": lambda v: fc.federated_collect(v),
    "aggregate": lambda v: fc.federated_aggregate(v, 0.0, add, add, lambda s: s),
    "select": lambda v: fc.federated_select(v, 2, fc.federated_value(1, fc.SERVER), pick),
    "secure sum": lambda v: fc.federated_secure_sum(v, 3),
    "secure sum of bits": lambda v: fc.federated_secure_sum_bitwidth(v, 3),
    "modular sum": lambda v: fc.federated_secure_modular_sum(v, 3),
    "count": lambda v: fc.federated_count(v),
    "presence": lambda v: fc.federated_sum(fc.federated_value(1.0, fc.CLIENTS), present=v),
    "presence of a minimum": lambda v: fc.federated_min(
        fc.federated_value(1.0, fc.CLIENTS), present=v
    ),
    "a computation": lambda v: total(v),
}
AT_SERVER_ONLY = {
    "broadcast": lambda v: fc.federated_broadcast(v),
    "broadcast with a codec": lambda v: fc.federated_broadcast(v, codec=fc.compression.identity()),
    "what is selected from": lambda v: fc.federated_select(
        fc.federated_value(np.int32([1]), fc.CLIENTS), 2, v, pick
    ),
    "number of keys": lambda v: fc.federated_select(
        fc.federated_value(np.int32([1]), fc.CLIENTS), v, fc.federated_value(1, fc.SERVER), pick
    ),
    "zero": lambda v: fc.federated_aggregate(
        fc.federated_value(1.0, fc.CLIENTS), v, add, add, lambda s: s
    ),
}
MISPLACED = [
    *((name, call, SERVER_FLOAT) for name, call in AT_CLIENTS_ONLY.items()),
    *((name, call, FLOAT) for name, call in AT_SERVER_ONLY.items()),
    *(
        (f"{name} of an unplaced value", call, np.float32)
        for name, call in (AT_CLIENTS_ONLY | AT_SERVER_ONLY).items()
        if name != "zero"  # which may be unplaced
    ),
    ("map", lambda v: fc.federated_map(jnp.sin, v), np.float32),
    ("zip", lambda v: fc.federated_zip((v, v)), np.float32),
    ("map of both", lambda v: fc.federated_map(add, v, at_server()), FLOAT),
    ("zip of both", lambda v: fc.federated_zip((v, at_server())), FLOAT),
    ("value", lambda v: fc.federated_value(v, fc.SERVER), FLOAT),
    ("a local computation", lambda v: fc.jax_computation(jnp.sin, np.float32)(v), FLOAT),
]


def at_server():
    return fc.federated_value(1.0, fc.SERVER)


@pytest.mark.parametrize(("name", "call", "t"), MISPLACED, ids=[name for name, _, _ in MISPLACED])
def test_a_wrong_placement_is_the_same_error_everywhere(name, call, t):
    with pytest.raises(PlacementError, match=HERE):
        trace(lambda v: call(v), t)


WRONG_DTYPES = {
    "sum": (AT_CLIENTS_ONLY["sum"], BOOL),
    "sum with a codec": (AT_CLIENTS_ONLY["sum with a codec"], BOOL),
    "mean": (AT_CLIENTS_ONLY["mean"], INT),
    "weight": (AT_CLIENTS_ONLY["weight"], COMPLEX),
    "min": (AT_CLIENTS_ONLY["min"], COMPLEX),
    "max": (AT_CLIENTS_ONLY["max"], BOOL),
    "collect": (AT_CLIENTS_ONLY["collect"], ROWS),
    "aggregate": (AT_CLIENTS_ONLY["aggregate"], ROWS),
    "fold of another dtype": (AT_CLIENTS_ONLY["aggregate"], COMPLEX),
    "select": (AT_CLIENTS_ONLY["select"], VECTOR),
    "number of keys": (AT_SERVER_ONLY["number of keys"], SERVER_FLOAT),
    "secure sum": (AT_CLIENTS_ONLY["secure sum"], FLOAT),
    "secure sum of bits": (AT_CLIENTS_ONLY["secure sum of bits"], FLOAT),
    "modular sum": (AT_CLIENTS_ONLY["modular sum"], FLOAT),
    "count": (AT_CLIENTS_ONLY["count"], INT),
    "presence": (AT_CLIENTS_ONLY["presence"], INT),
    "broadcast": (AT_SERVER_ONLY["broadcast"], SERVER_ROWS),
    "map": (lambda v: fc.federated_map(fc.jax_computation(jnp.sin, np.float32), v), INT),
    "a computation": (AT_CLIENTS_ONLY["a computation"], FLOAT),
    "sequence of numbers": (lambda v: fc.sequence_sum(v), FLOAT),
}


@pytest.mark.parametrize("name", WRONG_DTYPES)
def test_a_wrong_dtype_is_the_same_error_everywhere(name):
    call, t = WRONG_DTYPES[name]
    with pytest.raises(FederatedTypeError, match=HERE) as caught:
        trace(lambda v: call(v), t)
    assert not isinstance(caught.value, PlacementError)
