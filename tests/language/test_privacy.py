"""The proof that clients' values leave as aggregates only: what it accepts, refuses and reports."""

import dataclasses

import jax
import jax.custom_batching
import jax.extend
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify, io_callback
from jax.experimental.custom_partitioning import custom_partitioning

import fedjax_core as fc
from fedjax_core import aggregators, compression, models
from fedjax_core.errors import ArgumentError, FederatedTypeError, PrivacyError
from fedjax_core.language.placements import CLIENTS, SERVER
from fedjax_core.language.privacy import check_aggregated_only
from fedjax_core.language.program import Constant, Get, Map, Parameter, Program, Zip
from fedjax_core.language.types import FederatedType, FunctionType

FLOAT, INT, KEYS = (FederatedType(t, CLIENTS) for t in (np.float32, np.int32, (np.int32, [2])))
AT_SERVER = FederatedType(np.float32, SERVER)
SCALAR = jax.ShapeDtypeStruct((), jnp.float32)


def trace(body, *parameters):
    return fc.federated_computation(body, *(parameters or (FLOAT,)))


def refusal(computation, **kwargs):
    """The message with which a computation is refused."""
    with pytest.raises(PrivacyError) as caught:
        check_aggregated_only(computation, **kwargs)
    return str(caught.value)


# What is accepted.


def fed_avg(**kwargs):
    algorithm = fc.algorithms.fed_avg(
        models.linear(), client_optimizer=optax.sgd(0.1), batch_size=2, **kwargs
    )
    return algorithm.computation


QUANTIZE = compression.uniform_quantize(8, min_size=2)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"aggregator": aggregators.mean(codec=QUANTIZE)},
        {"aggregator": aggregators.mean(codec=compression.top_k(0.1)), "broadcast_codec": QUANTIZE},
        {"aggregator": aggregators.robust_aggregator()},
        {"aggregator": aggregators.compression_aggregator()},
    ],
    ids=["plain", "quantize", "top_k", "robust", "compression"],
)
def test_federated_averaging_is_accepted(parts):
    report = check_aggregated_only(fed_avg(**parts))
    names = [(x.operator, x.name) for x in report.crossings]
    assert ("sum", "update") in names
    assert ("sum", "weight") in names
    assert {operator for operator, _ in names} == {"sum", "count"}
    assert all(x.visibility == "clear" for x in report.crossings)
    assert report.client_results == ()
    assert report.outside_calls == ()


def test_values_that_stay_at_the_clients_are_no_leak():
    """A result at the clients is not the server's, and is reported."""
    report = check_aggregated_only(trace(lambda x: fc.federated_map(jnp.square, x)))
    assert [str(x.type) for x in report.client_results] == ["{float32}@CLIENTS"]
    assert report.crossings == ()


def test_what_is_made_of_aggregates_may_go_anywhere():
    def center(x):
        mean = fc.federated_broadcast(fc.federated_mean(x))
        spread = fc.federated_sum(fc.federated_map(jnp.subtract, x, mean))
        return fc.federated_map(lambda s: 2 * s, spread)

    assert len(check_aggregated_only(trace(center)).crossings) == 3


@pytest.mark.parametrize(
    "operator",
    [fc.federated_collect, fc.federated_max, lambda x: count_up(x)],
    ids=["collect", "max", "aggregate"],
)
def test_messages_without_client_data_pass(operator):
    """They reveal nothing, whatever aggregates them, and the report says so."""
    report = check_aggregated_only(trace(lambda s: operator(fc.federated_broadcast(s)), AT_SERVER))
    assert [x.is_client_data for x in report.crossings] == [False]
    assert "no client data" in str(report)


def test_fields_of_a_struct_are_told_apart():
    """What is zipped with a client's value is not a client's value."""

    def body(x, s):
        pair = fc.federated_zip((x, fc.federated_broadcast(s)))
        return fc.federated_collect(pair[1]), fc.federated_sum(pair[0])

    assert len(check_aggregated_only(trace(body, FLOAT, AT_SERVER)).crossings) == 2
    swapped = trace(lambda x, s: body(x, s)[0], FLOAT, AT_SERVER)
    ops = list(swapped.program.ops)
    position = next(i for i, op in enumerate(ops) if isinstance(op, Get))
    ops[position] = dataclasses.replace(ops[position], position=0)
    assert "collect" in refusal(Holder(dataclasses.replace(swapped.program, ops=tuple(ops))))


# What is refused.


def count_up(x, name="value"):
    return fc.federated_aggregate(
        x, np.float32(0), lambda s, v: s + v, lambda s, t: s + t, lambda s: s, name=name
    )


@pytest.mark.parametrize(
    ("operator", "word"),
    [
        (fc.federated_collect, "collect"),
        (fc.federated_min, "min"),
        (fc.federated_max, "max"),
        (count_up, "aggregate"),
    ],
    ids=["collect", "min", "max", "aggregate"],
)
def test_what_is_not_allowed_is_refused_with_its_path(operator, word):
    def leak(readings):
        squared = fc.federated_map(jnp.square, readings)
        return operator(squared, name="raw"), fc.federated_sum(squared, name="other")

    leak = trace(leak)
    message = refusal(leak)
    assert f"by {word}, which is not allowed (allowed: mean, secure_sum, sum)" in message
    path = message.splitlines()[1:]
    assert "{float32}@CLIENTS  # argument 0 `readings` of `leak`" in path[0]
    assert "map[square](%0)" in path[1]
    assert f"{word}[raw](" in path[2]
    assert all("test_privacy.py:" in line for line in path[1:])
    for allow in ((word, "sum"), (f"{word}:raw", "sum:other")):
        assert check_aggregated_only(leak, allow=allow).crossings[0].operator == word
    assert f"'{word}:raw'" in refusal(leak, allow=("sum", f"{word}:other"))


def test_a_selection_shows_its_keys():
    def look_up(keys, table):
        parts = fc.federated_select(keys, 5, table, lambda t, k: t[k], name="rows")
        return fc.federated_sum(fc.federated_map(lambda rows: rows.sum(), parts))

    look_up = trace(look_up, KEYS, FederatedType((np.float32, [5]), SERVER))
    assert "by select (keys)" in refusal(look_up)
    assert "'select:rows'" in refusal(look_up)
    report = check_aggregated_only(look_up, allow=("sum", "select"))
    assert [x.operator for x in report.crossings] == ["select (keys)", "sum"]
    assert [x.bits_per_client for x in report.crossings] == [64, 32]


@pytest.mark.parametrize("allow", [(), ("secure_sum",), ("max",)], ids=str)
def test_secure_sums_and_counts_are_always_allowed(allow):
    report = check_aggregated_only(
        trace(lambda x: (fc.federated_secure_sum(x, 100), fc.federated_count()), INT), allow=allow
    )
    assert [(x.operator, x.visibility) for x in report.crossings] == [
        ("secure_sum", "blind"),
        ("count", "clear"),
    ]
    assert "by sum, which" in refusal(trace(fc.federated_mean), allow=allow)


def test_a_mean_is_a_sum():
    for word in ("sum", "mean", "mean:value"):
        assert check_aggregated_only(trace(fc.federated_mean), allow=[word]).allowed == (word,)


def test_a_weighted_mean_is_allowed_by_its_name():
    """It sends two sums, of which only one has the name that was given."""

    def body(x, w):
        return fc.federated_mean(x, w, name="loss"), fc.federated_sum(w, name="examples")

    mean = trace(body, FLOAT, FLOAT)
    assert len(check_aggregated_only(mean, allow=("mean:loss", "sum:examples")).crossings) == 3
    assert "'sum:examples'" in refusal(mean, allow="mean:loss")
    assert "'sum:weight'" in refusal(mean, allow=("sum:loss", "sum:examples"))
    assert len(check_aggregated_only(mean, allow=("sum:loss", "sum:weight", "sum:examples")))


@pytest.mark.parametrize("word", ["collect:", "sum:", "sum:other", "count:x"])
def test_names_that_no_edge_has_are_refused(word):
    with pytest.raises(ArgumentError, match=r"one of the edges \['value'\]"):
        check_aggregated_only(trace(fc.federated_sum), allow=("sum", word))


@pytest.mark.parametrize("allow", [None, 3, [None], [("sum",)]], ids=str)
def test_what_is_no_list_of_names_is_refused(allow):
    with pytest.raises(ArgumentError, match="allow: expected names"):
        check_aggregated_only(trace(fc.federated_sum), allow=allow)


@pytest.mark.parametrize("word", ["summ", "broadcast", "", 3], ids=str)
def test_unknown_words_are_refused(word):
    with pytest.raises(ArgumentError, match="aggregate, collect, count, max"):
        check_aggregated_only(trace(fc.federated_sum), allow=("sum", word))


def test_a_single_word_is_taken_as_one():
    assert check_aggregated_only(trace(fc.federated_sum), allow="sum").allowed == ("sum",)


def test_functions_have_to_be_known():
    body = trace(
        lambda f, x: fc.federated_sum(fc.federated_map(f, x)),
        FunctionType(fc.to_type(np.float32), fc.to_type(np.float32)),
        FLOAT,
    )
    assert "argument 0 `f`" in refusal(body)
    assert "bind" in refusal(body)


def test_computations_without_types_are_refused():
    with pytest.raises(ArgumentError, match="for_types"):
        check_aggregated_only(fc.federated_computation(lambda x: fc.federated_sum(x)))


def test_a_client_value_that_changes_its_placement_is_refused():
    """By types: such a program cannot be traced, but can be built."""
    double = trace(lambda x: fc.federated_map(lambda v: 2 * v, x)).program
    local = double.ops[1].local
    for op in (
        Map(type=AT_SERVER, inputs=(0,), local=local),
        Map(type=fc.to_type(np.float32), inputs=(0,), local=local),
        Zip(type=AT_SERVER, inputs=(0,), tree=jax.tree.structure(0)),
        dataclasses.replace(trace(fc.federated_broadcast, AT_SERVER).program.ops[1], inputs=(0,)),
    ):
        program = dataclasses.replace(double, ops=(double.ops[0], op))
        assert "without an aggregation" in refusal(Holder(program))


@dataclasses.dataclass
class Holder:
    program: Program


# Calls out of JAX.


def debug_print(x):
    jax.debug.print("{x}", x=x)
    return x


def debug_callback(x):
    jax.debug.callback(lambda value: None, x)
    return x


def ordered_io(x):
    return io_callback(lambda value: value, SCALAR, x, ordered=True)


def pure(x):
    return jax.pure_callback(lambda value: value, SCALAR, x, vmap_method="sequential")


def foreign(x):
    return jax.ffi.ffi_call("nothing", SCALAR)(x)


def in_jit(f):
    return jax.jit(f)


def in_scan(f):
    return lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0]


def in_while(f):
    return lambda x: jax.lax.while_loop(lambda c: c < 3, lambda c: f(c) + 1, x)


def in_condition(f):
    return lambda x: jax.lax.while_loop(lambda c: f(c) < 3, lambda c: c + 1, x)


def in_cond(f):
    return lambda x: jax.lax.cond(x > 0, lambda y: y, lambda y: f(y), x)


def in_remat(f):
    return jax.checkpoint(f)


def in_custom_jvp(f):
    @jax.custom_jvp
    def function(x):
        return f(x)

    function.defjvp(lambda primals, tangents: (primals[0], tangents[0]))
    return function


def in_custom_vjp(f):
    @jax.custom_vjp
    def function(x):
        return f(x)

    function.defvjp(lambda x: (x, None), lambda _, g: (g,))
    return function


def in_vmap(f):
    return lambda x: jax.vmap(f)(x[None])[0]


def in_shard_map(f):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()
    return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


def in_derivative(f):
    """The backward rule is part of the program where a client takes the derivative."""

    @jax.custom_vjp
    def function(x):
        return x

    function.defvjp(lambda x: (x, x), lambda residual, g: (f(residual) + g,))
    return jax.grad(lambda x: function(x) ** 2)


CALLS = {
    debug_print: "debug_print",
    debug_callback: "debug_callback",
    ordered_io: "io_callback",
    pure: "pure_callback",
    foreign: "ffi_call",
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_on_a_clients_value_are_refused(call):
    """A callback is another way out, even though the sum itself is allowed."""

    def work(v):
        return call(2 * v)

    leak = trace(lambda x: fc.federated_sum(fc.federated_map(work, x)))
    message = refusal(leak)
    assert f"lets `work` call out of the program ({CALLS[call]})" in message
    path = message.splitlines()[1:]
    assert "parameter" in path[0]
    assert "map[work](%0)" in path[1]


WRAPPERS = {
    in_jit: "jit",
    in_scan: "scan",
    in_while: "while",
    in_condition: "while",
    in_cond: "cond",
    in_custom_jvp: "custom_jvp_call",
    in_custom_vjp: "custom_vjp_call",
    in_vmap: "",
    in_remat: "remat",
    in_shard_map: "shard_map",
    in_derivative: "",
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("call", [debug_print, pure], ids=["debug_print", "pure"])
def test_nested_calls_are_found(wrapper, call):
    """Also where the jaxpr's effects do not tell, as for `pure_callback`."""
    if wrapper is in_derivative and call is debug_print:
        call = ordered_io
    wrapped = in_jit(wrapper(call))
    message = refusal(trace(lambda x: fc.federated_sum(fc.federated_map(wrapped, x))))
    inside = message[message.index("call out of the program (") :].split(")")[0]
    assert f"({CALLS[call]} in " in inside
    assert WRAPPERS[wrapper] in inside
    assert inside.endswith("jit")


def test_calls_of_other_parts_of_an_aggregation_are_refused():
    """The server runs `accumulate` and `merge` on what is still one client's."""

    def fold(accumulate=jnp.add, merge=jnp.add, report=jnp.sin):
        return trace(lambda x: fc.federated_aggregate(x, np.float32(0), accumulate, merge, report))

    def noisy(s, v):
        return s + debug_print(v)

    allow = ("aggregate",)
    assert "lets `noisy`" in refusal(fold(accumulate=noisy), allow=allow)
    assert "lets `noisy`" in refusal(fold(merge=noisy), allow=allow)
    report = check_aggregated_only(fold(report=debug_print), allow=allow)
    assert [(x.function, x.placement) for x in report.outside_calls] == [("debug_print", "server")]


def test_calls_in_decoders_are_refused():
    """The server decodes each client's message."""
    codec = compression.identity()
    leaky = codec._replace(
        decode=lambda keys, hints, message: jax.tree.map(
            debug_print, codec.decode(keys, hints, message)
        )
    )
    assert "debug_print" in refusal(trace(lambda x: fc.federated_sum(x, codec=leaky)))
    check_aggregated_only(trace(lambda x: fc.federated_sum(x, codec=codec)))
    # On the way down all that a client decodes is the server's.
    down = trace(lambda s: fc.federated_broadcast(s, codec=leaky), AT_SERVER)
    assert {x.placement for x in check_aggregated_only(down).outside_calls} == {"clients"}


def test_calls_on_aggregates_are_reported():
    def body(x, s):
        shared = fc.federated_map(debug_print, fc.federated_broadcast(s))
        total = fc.federated_sum(fc.federated_map(jnp.add, x, shared))
        return fc.federated_map(in_scan(pure), total)

    report = check_aggregated_only(trace(body, FLOAT, AT_SERVER))
    found = [(x.placement, x.call) for x in report.outside_calls]
    assert found == [("clients", "debug_print"), ("server", "pure_callback in scan")]
    assert "test_privacy.py:" in report.outside_calls[0].location


def test_what_a_call_brings_in_at_a_client_is_the_clients():
    """A sensor that is read by a callback holds client data as an argument does."""

    def read():
        return io_callback(lambda: np.float32(1), SCALAR)

    leak = trace(lambda s: (s, fc.federated_collect(fc.federated_eval(read, CLIENTS))), AT_SERVER)
    message = refusal(leak)
    assert "map[read]()" in message.splitlines()[1]
    total = trace(lambda s: (s, fc.federated_sum(fc.federated_eval(read, CLIENTS))), AT_SERVER)
    assert check_aggregated_only(total).crossings[0].is_client_data


def test_every_trace_is_searched():
    """A function of sequences is traced again for each capacity that it meets."""

    def work(rows):
        total = rows.sum()
        return total if rows.capacity <= 2 else debug_callback(total)

    rows = FederatedType(fc.SequenceType(fc.to_type(np.float32)), CLIENTS)
    compute = trace(lambda x: fc.federated_sum(fc.federated_map(work, x)), rows)
    check_aggregated_only(compute)
    assert compute([[1.0, 2.0, 3.0, 4.0, 5.0]]) == 15
    assert "debug_callback" in refusal(compute)


# Ways around the search.


def in_root(f):
    """What solves the tangent's equation is hidden in the primitive until JAX expands it."""

    def function(x):
        return jax.lax.custom_root(
            lambda y: y**2 - x, x, lambda _, start: start * 0.5, lambda g, y: f(y / g(1.0))
        )

    return lambda x: jax.jvp(jax.jit(function), (x,), (x,))[1]


def in_solution(f):
    return lambda x: jax.lax.custom_root(
        lambda y: y - x, x, lambda _, start: f(start), lambda g, y: y / g(1.0)
    )


def in_linear_solve(f):
    return lambda x: jax.lax.custom_linear_solve(
        lambda v: 2 * v, x, lambda _, b: f(b / 2), symmetric=True
    )


def in_reduction(f):
    return lambda x: jax.lax.reduce(x[None], np.float32(0), lambda a, b: f(a + b) + a * b, (0,))


def in_kernel(f):
    def kernel(source, target):
        target[...] = f(source[...])

    return lambda x: in_pallas(kernel, lambda i: (i,))(x)


def in_index_map(f):
    def index(i):
        f(i)
        return (i,)

    def kernel(source, target):
        target[...] = source[...]

    return lambda x: in_pallas(kernel, index)(x)


def in_pallas(kernel, index):
    pallas = pytest.importorskip("jax.experimental.pallas")
    call = pallas.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((2,), jnp.float32),
        grid=(2,),
        in_specs=[pallas.BlockSpec((1,), index)],
        out_specs=pallas.BlockSpec((1,), lambda i: (i,)),
        interpret=True,
    )
    return lambda x: call(jnp.stack([x, x])).sum()


@pytest.mark.parametrize(
    "wrapper", [in_root, in_solution, in_linear_solve, in_reduction, in_kernel, in_index_map]
)
def test_calls_hidden_in_parameters_are_found(wrapper):
    leak = trace(lambda x: fc.federated_sum(fc.federated_map(wrapper(debug_callback), x)))
    assert "(debug_callback in " in refusal(leak)


def test_what_jax_hides_without_a_call_is_accepted():
    """A root, and JAX's own functions of which no body can be seen."""

    def work(x):
        edges = jnp.arange(4.0)
        return (
            in_root(jnp.sin)(x) + jnp.searchsorted(edges, x) + jnp.nonzero(edges, size=2)[0].sum()
        )

    report = check_aggregated_only(trace(lambda x: fc.federated_sum(fc.federated_map(work, x))))
    assert report.outside_calls == ()


@pytest.mark.parametrize(
    "wrapper", [lambda f: f, in_jit, in_scan, in_cond], ids=["plain", "jit", "scan", "cond"]
)
def test_references_from_outside_are_refused(wrapper):
    """A function that writes elsewhere is not pure, and whoever holds the reference sees it."""
    stolen = jax.new_ref(jnp.float32(0))

    def work(x):
        stolen[...] = x
        return x

    with pytest.raises(FederatedTypeError, match=r"captures Ref.*can be written to.*argument"):
        trace(lambda x: fc.federated_sum(fc.federated_map(wrapper(work), x)))


def test_references_of_a_functions_own_are_allowed():
    def work(x):
        own = jax.new_ref(x)
        own[...] = 2 * own[...]
        return own[...]

    double = trace(lambda x: fc.federated_sum(fc.federated_map(work, x)))
    assert check_aggregated_only(double).outside_calls == ()
    assert double([1.0, 2.0]) == 6


def generator(name):
    """A generator of random numbers that may do anything with the seeds that it is given."""

    def zeros(shape):
        return jnp.zeros(shape, jnp.uint32)

    return jax.extend.random.define_prng_impl(
        key_shape=(2,),
        seed=lambda seed: zeros(2),
        split=lambda key, shape: zeros((*shape, 2)),
        random_bits=lambda key, width, shape: zeros(shape),
        fold_in=lambda key, data: key,
        name=name,
        tag="fry",
    )


@pytest.mark.parametrize("name", ["other", "threefry2x32"])
def test_random_keys_of_other_generators_are_refused(name):
    """Whatever they call themselves."""
    own = generator(name)

    def draw(x):
        return x + jax.random.uniform(jax.random.key(0, impl=own))

    message = refusal(trace(lambda x: fc.federated_sum(fc.federated_map(draw, x))))
    assert "(key<fry> in random_seed)" in message
    captured = jax.random.key(0, impl=own)
    late = trace(lambda x: fc.federated_sum(fc.federated_map(lambda v: v + taken(captured), x)))
    assert "key<fry>" in refusal(late)


def taken(key):
    return jax.random.uniform(key)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_random_keys_of_jax_are_accepted(impl):
    def draw(x):
        return x + taken(jax.random.split(jax.random.key(0, impl=impl))[0])

    check_aggregated_only(trace(lambda x: fc.federated_sum(fc.federated_map(draw, x))))


def checked(x):
    checkify.check(x > 0, "got {x}", x=x)
    return x


def batched_by_a_rule(x):
    call = jax.custom_batching.custom_vmap(jnp.sin)
    call.def_vmap(lambda size, batched, v: (jnp.sin(v), batched[0]))
    return call(x)


def partitioned_by_a_rule(x):
    call = custom_partitioning(jnp.sin)
    call.def_partition(partition=lambda *args: None, sharding_rule="->")
    return call(x)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (checked, "check"),
        (batched_by_a_rule, "custom_vmap_call"),
        (partitioned_by_a_rule, "custom_partitioning"),
    ],
)
def test_rules_and_messages_are_calls(call, name):
    """Python that runs later, and errors whose messages hold the values."""
    leak = trace(lambda x: fc.federated_sum(fc.federated_map(in_jit(call), x)))
    assert f"({name} in jit)" in refusal(leak)


def test_primitives_of_others_are_opaque():
    """A subclass may expand to anything."""

    class Mine(jax.extend.core.Primitive):
        pass

    mine = Mine("mine")
    mine.def_abstract_eval(lambda x: x)
    leak = trace(lambda x: fc.federated_sum(fc.federated_map(mine.bind, x)))
    assert "(opaque primitive mine)" in refusal(leak)


def test_bodies_of_others_are_opaque():
    """Code that JAX runs no sooner than it compiles."""
    hijax = pytest.importorskip("jax.experimental.hijax")
    base = getattr(hijax, "HiPrim", None) or hijax.VJPHiPrimitive

    class Mine(base):
        def __init__(self, aval):
            self.in_avals, self.out_aval, self.params = (aval,), aval, {}
            super().__init__()

        def expand(self, x):
            return debug_callback(x)

    Mine.__module__ = base.__module__
    leak = trace(lambda x: fc.federated_sum(fc.federated_map(lambda v: Mine(jax.typeof(v))(v), x)))
    assert "(opaque primitive " in refusal(leak)


# The report.


def test_constants_are_listed():
    weights, offset = np.arange(6, dtype=np.float32), jnp.arange(3.0)

    def inner(v):
        return jax.jit(lambda u: u + offset.sum())(v)

    def body(x):
        fixed = fc.federated_value(weights, CLIENTS)
        summed = fc.federated_sum(fc.federated_map(inner, x))
        return fc.federated_map(jnp.add, summed, fc.federated_sum(fixed, name="fixed"))

    rows = check_aggregated_only(trace(body)).constants
    found = {(x.holder, x.placement, x.shape, x.dtype, x.num_bytes) for x in rows}
    assert found == {
        ("constant", "clients", (6,), "float32", 24),
        ("inner", "clients", (3,), "float32", 12),
    }


def test_keys_and_strings_are_constants_too():
    at = FederatedType(np.float32, SERVER)
    ops = (
        Parameter(type=at),
        Constant(type=at, value=(jax.random.key(0), "text", 1.5)),
    )
    program = dataclasses.replace(trace(lambda s: s, AT_SERVER).program, ops=ops)
    rows = check_aggregated_only(Holder(program)).constants
    assert [(x.dtype, x.num_bytes) for x in rows] == [
        ("key<fry>", 8),
        ("str", 4),
        ("float64", 8),
    ]


def test_presence_is_reported():
    """Where a client's value decides whether it sends, the server learns that."""

    def body(x):
        present = fc.federated_map(lambda v: v > 0, x)
        return fc.federated_mean(x, present=present)

    report = check_aggregated_only(trace(body))
    assert [x.reveals_presence for x in report.crossings] == [True, True]
    assert not any(
        x.reveals_presence for x in check_aggregated_only(trace(fc.federated_mean)).crossings
    )


def test_the_report_as_text():
    table = jnp.arange(4.0)

    def round(x, n, s):
        shifted = fc.federated_map(lambda v, b: v + b + table.sum(), x, fc.federated_broadcast(s))
        total = fc.federated_map(debug_print, fc.federated_sum(shifted, name="update"))
        return total, fc.federated_secure_sum(n, 100, name="examples"), shifted

    text = str(check_aggregated_only(trace(round, FLOAT, INT, AT_SERVER))).splitlines()
    assert text[0] == "round: clients' values leave through allowed aggregations only"
    assert text[1] == "allowed: mean, secure_sum, sum"
    rows = [line.split() for line in text]
    assert rows[3][1:] == ["sum", "update", "clear", "32", "bits", "-", "{float32}@CLIENTS"]
    assert rows[4][1:] == ["secure_sum", "examples", "blind", "7", "bits", "-", "{int32}@CLIENTS"]
    assert rows[6][1:4] == ["debug_print", "server", "debug_print"]
    assert rows[8][1:] == ["lambda", "clients", "float32[4]", "16", "bytes"]
    assert rows[10][1:] == ["{float32}@CLIENTS"]
    assert [line for line in text if not line.startswith(" ")][2:] == [
        "up to the server:",
        "calls out of the program, on aggregates or no client data:",
        "constants in the program:",
        "results at the clients:",
    ]


def test_an_empty_report_says_none():
    text = str(check_aggregated_only(trace(lambda s: s, AT_SERVER)))
    assert text.count("  none") == 4
