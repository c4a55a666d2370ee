"""The MapReduce form: its pieces, and the host loop that drives them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_core as fc
from fedjax_core.compression.edges import PlacedKeys, downlink, uplink
from fedjax_core.errors import ArgumentError, FederatedTypeError
from fedjax_core.execution.loading import load_computation
from fedjax_core.execution.mapreduce import MapReduceForm, map_reduce_form
from fedjax_core.language import feeding
from fedjax_core.language.results import to_python

F32 = np.float32
KEY = fc.infer_type(jax.random.key(0))
STACKED = fc.Execution(mode="stacked")
VECTORS = fc.FederatedType((F32, [3]), fc.CLIENTS)
ROWS = fc.FederatedType(fc.SequenceType({"x": (F32, [3])}), fc.CLIENTS)
UID = fc.FederatedType(np.uint32, fc.CLIENTS)
COUNTS = fc.FederatedType(np.int32, fc.CLIENTS)
SERVER_KEY = fc.FederatedType(KEY, fc.SERVER)
SERVER = fc.FederatedType((F32, [3]), fc.SERVER)


def coded(x, uid, key, server):
    """A codec down and a codec up, with keys, in one round trip."""
    shared = fc.federated_broadcast(key, name="seed")
    keys = PlacedKeys(key, shared, fc.federated_map(jax.random.fold_in, shared, uid))
    codec = fc.compression.uniform_quantize(4, min_size=2)
    received = downlink(codec, keys.fold_in(1), server)
    nothing = fc.federated_value((), fc.SERVER), fc.federated_value((), fc.CLIENTS)
    moved = fc.federated_map(jnp.add, x, received)
    return uplink(codec, keys.fold_in(2), *nothing, moved)[2]


def three_trips(x, rows, server):
    """Means of what the means of the trips before have moved; and results of each client."""
    x = fc.federated_map(lambda x, rows: x + rows.map(lambda row: row["x"]).sum(), x, rows)
    for _ in range(2):
        mean = fc.federated_mean(x)
        server = fc.federated_map(lambda a, b: (a + b) / 2, server, mean)
        x = fc.federated_map(jnp.subtract, x, fc.federated_broadcast(server))
    largest = fc.federated_broadcast(fc.federated_max(x))
    return {
        "x": x,
        "server": server,
        "largest": largest,
        "x - max": fc.federated_map(jnp.subtract, x, largest),
    }


def fold(x, zero):
    return fc.federated_aggregate(
        x,
        zero,
        lambda state, x: jnp.maximum(state, x),
        jnp.maximum,
        lambda state: {"max": state},
    )


def collected(x, n):
    """A sequence at the server, reduced there, and used in another trip."""
    rows = fc.federated_collect(x)
    median = fc.federated_map(lambda rows: rows.sum(), rows)
    far = fc.federated_map(lambda x, m: jnp.abs(x - m), x, fc.federated_broadcast(median))
    return rows, fc.federated_sum(far), fc.federated_secure_sum(n, 5), n


def selected(keys, table, scale):
    rows = fc.federated_select(keys, 3, table, lambda table, key: table[key])
    total = fc.federated_sum(fc.federated_map(lambda rows: rows.sum(), rows))
    placed = fc.federated_value(scale, fc.SERVER)
    return rows, fc.federated_map(jnp.multiply, total, placed), scale, "metres"


PROGRAMS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "mean": (lambda x: fc.federated_mean(x), (VECTORS,)),
    "weighted": (lambda x, w: fc.federated_mean(x, w), (VECTORS, COUNTS)),
    "coded": (coded, (VECTORS, UID, SERVER_KEY, SERVER)),
    "three_trips": (three_trips, (VECTORS, ROWS, SERVER)),
    "fold": (fold, (VECTORS, SERVER)),
    "collected": (collected, (VECTORS, COUNTS)),
    "selected": (
        selected,
        (fc.FederatedType((np.int32, [2]), fc.CLIENTS), SERVER, F32),
    ),
    "shared": (
        lambda x, y: (fc.federated_sum(fc.federated_map(jnp.multiply, x, y)), y),
        (VECTORS, fc.FederatedType((F32, [3]), fc.CLIENTS, True)),
    ),
    "structs": (
        lambda both: fc.federated_zip({"sum": fc.federated_sum(both["a b"]), "s": both["s"]}),
        ({"a b": VECTORS, "s": SERVER},),
    ),
    "clients_only": (lambda x: fc.federated_map(jnp.square, x), (VECTORS,)),
    "server_only": (lambda x: fc.federated_map(jnp.square, x), (SERVER,)),
}


@functools.cache
def computation(name: str) -> fc.Computation:
    function, parameters = PROGRAMS[name]
    return fc.federated_computation(function, *parameters)


@functools.cache
def form(name: str) -> MapReduceForm:
    return map_reduce_form(computation(name))


def member(t: fc.Type, rng: np.random.Generator) -> Any:
    if isinstance(t, fc.SequenceType):
        return [{"x": member(fc.TensorType(F32, (3,)), rng)} for _ in range(rng.integers(0, 4))]
    if t == KEY:
        return jax.random.key(int(rng.integers(100)))
    numbers = rng.integers(0, 3, t.shape)
    return (numbers / 4 if t.dtype == np.float32 else numbers).astype(t.dtype)


def draw(t: Any, num_clients: int, rng: np.random.Generator) -> Any:
    if isinstance(t, dict):
        return {name: draw(child, num_clients, rng) for name, child in t.items()}
    if not isinstance(t, fc.FederatedType):
        return jnp.asarray(member(fc.to_type(t), rng))
    if t.placement is fc.SERVER or t.all_equal:
        return fc.Federated(member(t.member, rng), t.placement, t.all_equal)
    return feeding.to_placed([member(t.member, rng) for _ in range(num_clients)], t, "drawn")


def arguments(name: str, num_clients: int) -> list[Any]:
    rng = np.random.default_rng(num_clients)
    return [draw(t, num_clients, rng) for t in PROGRAMS[name][1]]


def is_federated(x: Any) -> bool:
    return isinstance(x, fc.Federated)


def plain(result: Any) -> list[Any]:
    def convert(x: Any) -> Any:
        return to_python(x) if is_federated(x) else x

    return jax.tree.leaves(jax.tree.map(convert, result, is_leaf=is_federated))


def assert_same(got: Any, expected: Any) -> None:
    for a, b in zip(plain(got), plain(expected), strict=True):
        if isinstance(b, str):
            assert a == b
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def ints(ledger: Any) -> list[int]:
    return list(map(int, ledger))


@pytest.mark.parametrize("num_clients", [pytest.param(0, marks=pytest.mark.slow), 5])
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_host_loop_equals_the_stacked_lowering(name, num_clients):
    """Values and bits; groups of two, so that accumulators are merged."""
    args = arguments(name, num_clients)
    got, bits = form(name).run_with_ledger(*args, group_size=2, num_clients=num_clients)
    leaves = jax.tree.leaves(args, is_leaf=is_federated)
    expected, expected_bits = computation(name).lower(STACKED)(*leaves, num_clients=num_clients)
    assert jax.tree.structure(got, is_leaf=is_federated) == jax.tree.structure(
        expected, is_leaf=is_federated
    )
    assert_same(got, expected)
    assert ints(bits) == ints(expected_bits)


@pytest.mark.parametrize("group_size", [1, 3, 8])
def test_the_size_of_groups_is_no_matter(group_size):
    args = arguments("three_trips", 5)
    got = form("three_trips").run(*args, group_size=group_size)
    assert_same(got, computation("three_trips").lower(STACKED)(*args)[0])


def test_lists_give_python_values():
    """C-53; and arguments by name."""
    assert form("mean").run([[1.0] * 3, [2.0] * 3, [3.0] * 3]).tolist() == [2.0] * 3
    assert form("mean").run(x=[[1.0] * 3]).tolist() == [1.0] * 3
    with pytest.raises(FederatedTypeError, match="argument 0 `x` of `lambda`, client 1"):
        form("mean").run([[1.0] * 3, [2.0]])


@pytest.mark.parametrize("group_size", [0, 1.5, "a", None, True])
def test_a_size_of_groups_that_is_none_is_refused(group_size):
    with pytest.raises(ArgumentError, match="Expected group_size to be a positive int, got"):
        form("mean").run([[1.0] * 3], group_size=group_size)


def test_a_driver_of_ones_own():
    """The pieces of the one round trip are plain functions of plain values: mean of [1, 3] is 2."""
    parts = form("mean")
    context = parts.prepare({})
    totals = []
    for x in (1.0, 3.0):
        output = parts.work(context, {"x": jnp.full(3, x)})
        totals.append(parts.accumulate(parts.zero({}), output.contribution))
    report = parts.report(parts.merge(*totals))
    (mean,) = parts.update({}, report).values()
    assert mean.tolist() == [2.0] * 3
    (bits,) = parts.ledger({}, np.uint32(2), report)
    assert int(bits) == 2 * 96


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"serve": 1.0},
            r"expected the names \['server'\], got \['serve'\]; add \['server'\] and ",
        ),
        ({"server": 1.0, "x": 2.0}, r"got \['server', 'x'\]; leave out \['x'\]\.$"),
        ({}, r"got \[\]; add \['server'\]\.$"),
        (1.0, "expected a dict with the names .* got float; put the values into one"),
    ],
)
def test_a_piece_names_what_is_missing_and_unknown(wrong, message):
    stage = form("three_trips").stages[0]
    for piece in (stage.zero, stage.prepare):
        with pytest.raises(ArgumentError, match=f"argument `server` of {piece.name}: .*{message}"):
            piece(wrong)


def test_every_argument_of_a_piece_is_checked():
    """Clients, accumulators and contributions too; and by `consume`, before memory is reused."""
    parts = form("mean")
    total, context = parts.zero({}), parts.prepare({})
    with pytest.raises(ArgumentError, match=r"`client` of work: .*add \['x'\] and leave out \['y'"):
        parts.work(context, {"y": jnp.zeros(3)})
    with pytest.raises(ArgumentError, match="`contribution` of accumulate: expected the names"):
        parts.accumulate.consume(total, {})
    assert not any(x.is_deleted() for x in jax.tree.leaves(total))
    with pytest.raises(ArgumentError, match="merge: expected 2 arguments, accumulator, other, got"):
        parts.merge(total)


def test_a_report_without_what_was_collected():
    first, second = form("collected").stages
    report, prepare = first.report(first.zero({})), second.prepare
    with pytest.raises(
        ArgumentError, match=r"`report_0` of prepare, `collected`: .* add \['value'"
    ):
        prepare({}, report)
    with pytest.raises(ArgumentError, match=r"fill it with report\._replace\(collected="):
        form("collected").update({}, report, report)
    with pytest.raises(ArgumentError, match="expected a Report, got dict"):
        prepare({}, report._asdict())
    with pytest.raises(ArgumentError, match="expected 2 arguments, server, report_0, got 1"):
        prepare({})
    rows = fc.Sequence.from_elements(jnp.ones((2, 3)))
    (total,) = prepare({}, report._replace(collected={"value": rows})).values()
    assert total.tolist() == [2.0] * 3


def test_pieces_can_be_traced():
    """Names are known while JAX traces, so the check costs nothing in compiled code."""
    parts = form("mean")

    @jax.jit
    def total(x):
        output = parts.work(parts.prepare({}), {"x": x})
        return parts.report(parts.accumulate(parts.zero({}), output.contribution)).values

    (value,) = [x for x in total(jnp.ones(3)).values() if x.shape]
    assert value.tolist() == [1.0] * 3


def test_pieces_have_types():
    """A stage's functions fit together: what one returns, the next one takes."""
    parts = form("coded")
    assert str(parts.prepare.type_signature.result) == str(dict(parts.work.parameters)["context"])
    zero = parts.zero.type_signature.result
    assert zero.is_equivalent_to(dict(parts.accumulate.parameters)["accumulator"])
    assert zero.is_equivalent_to(parts.merge.type_signature.result)
    assert str(dict(parts.work.parameters)["client"]) == "<uid=uint32,x=float32[3]>"
    assert "work: (<context=" in repr(parts)


def test_the_context_is_what_travels():
    """The server's values go down as they were encoded: the client decodes."""
    program = computation("coded").program
    broadcasts = [op for _, op in program.edges if type(op).__name__ == "Broadcast"]
    messages = {str(program.message_type(op).member) for op in broadcasts}
    context = form("coded").prepare.type_signature.result
    assert {str(t) for t in context.children()} == messages


def test_several_round_trips_are_several_stages():
    parts = form("three_trips")
    assert len(parts.stages) == 4  # the results of the clients after the last aggregation
    with pytest.raises(ArgumentError, match=r"got 4; use form.stages\[number\].prepare"):
        _ = parts.prepare
    assert [len(stage.prepare.parameters) for stage in parts.stages] == [1, 2, 3, 4]
    assert len(form("server_only").stages) == 0


def test_what_the_caller_passed_is_still_there():
    """The accumulator is donated; a zero that the caller gave is not."""
    zero = jnp.zeros(3)
    args = [fc.Federated(jnp.ones((4, 3)), fc.CLIENTS), fc.Federated(zero, fc.SERVER)]
    form("fold").run(*args, group_size=2)
    assert zero.tolist() == [0.0] * 3
    assert not zero.is_deleted()


def test_bounds_of_secure_sums_are_checked():
    with pytest.raises(ArgumentError, match=r"values from \[0\] to \[5\] .* 1 below and 2 above"):
        form("collected").run(np.ones((4, 3), F32), [-1, 6, 2, 7])


def test_functions_have_to_be_bound():
    function = fc.FunctionType(F32, F32)
    x = fc.FederatedType(F32, fc.CLIENTS)
    calls = fc.federated_computation(
        lambda f, x: fc.federated_sum(fc.federated_map(f, x)), function, x
    )
    with pytest.raises(ArgumentError, match="bind them first"):
        map_reduce_form(calls)
    assert map_reduce_form(calls.bind(lambda x: 2 * x)).run([1.0, 2.0]) == 6.0


def drive(pieces: Any, num_stages: int, server: Any, clients: list[Any]) -> Any:
    """A driver that knows nothing but the files: dicts and tuples in and out."""
    reports, kept = [], {}
    for number in range(num_stages):
        stage = {
            role: pieces(f"{number}_{role}")
            for role in ("prepare", "work", "zero", "accumulate", "merge", "report")
        }
        context = stage["prepare"](server, *reports)
        total = stage["zero"](server, *reports)
        for client in clients:
            output = stage["work"](context, client)
            one = stage["accumulate"](stage["zero"](server, *reports), output["contribution"])
            total = stage["merge"](total, one)
            for name, x in output["kept"].items() if output["kept"] else ():
                kept.setdefault(name, []).append(x)
        reports.append(stage["report"](total))
    return pieces("update")(server, *reports), kept


@pytest.mark.parametrize("name", ["coded", pytest.param("three_trips", marks=pytest.mark.slow)])
def test_pieces_are_exported_one_by_one(name, tmp_path):
    """Driven from files, they compute the same; for three platforms, sequences of any length."""
    form(name).export(tmp_path)
    pieces = functools.cache(lambda file: load_computation(tmp_path / file))
    assert pieces("0_work").manifest["platforms"] == ["cpu", "cuda", "tpu"]
    work = form(name).stages[0].work
    assert str(pieces("0_work").type_signature) == str(work.type_signature)
    args = arguments(name, 3)
    named = dict(zip(computation(name).program.parameter_names, args, strict=True))
    server = {k: x.value for k, x in named.items() if x.placement is fc.SERVER}
    rows = {k: to_python(x) for k, x in named.items() if x.placement is fc.CLIENTS}
    clients = [{k: x[i] for k, x in rows.items()} for i in range(3)]
    num_stages = len(form(name).stages)
    results, kept = drive(pieces, num_stages, server, clients)
    expected, _ = computation(name).lower(STACKED)(*args)
    if name == "coded":
        (total,) = results.values()
        np.testing.assert_allclose(total, expected.value, rtol=1e-5)
        return
    found = [*results.values(), *(np.stack(x) for x in kept.values())]
    assert len(found) == len(expected)
    for x in expected.values():
        assert any(
            np.shape(y) == x.value.shape and np.allclose(y, x.value, rtol=1e-5, atol=1e-6)
            for y in found
        )


def test_a_collected_sequence_goes_through_files(tmp_path):
    """A report's sequences have their own capacity: as many rows as there are clients."""
    form("collected").export(tmp_path, platforms=("cpu",), sequence_capacity=2)
    update = load_computation(tmp_path / "update")
    names = dict(form("collected").update.parameters)
    values = {"value_2": [1.0], "value": [0.0] * 3}
    assert set(names) == {"server", "report_0", "report_1"}
    rows = [np.full(3, x, F32) for x in (1.0, 2.0, 3.0)]
    (collected_name,) = names["report_0"].elements[2][1].names()
    first = {
        "values": {
            name: {"total": 4, "num_below": 0, "num_above": 0}
            for name in names["report_0"].elements[0][1].names()
        },
        "bits": {name: {"high": 0, "low": 0} for name in names["report_0"].elements[1][1].names()},
        "collected": {collected_name: rows},
    }
    (sum_name,) = names["report_1"].elements[0][1].names()
    second = {
        "values": {sum_name: values["value"]},
        "bits": {sum_name: {"high": 0, "low": 0}},
        "collected": {},
    }
    results = update({}, first, second)
    np.testing.assert_array_equal(results[collected_name], rows)


def test_fed_avg_in_the_form():
    """A round of federated averaging, client by client, is that of the algorithm."""

    def apply(variables, batch, key, train):
        return batch["x"] @ variables["W"]

    model = fc.models.from_functions(
        lambda key: {"W": jax.random.normal(key, (2, 1))},
        apply,
        loss=lambda predictions, batch: (predictions - batch["y"])[:, 0] ** 2,
        input_spec={
            "x": jax.ShapeDtypeStruct((2,), F32),
            "y": jax.ShapeDtypeStruct((1,), F32),
        },
    )
    algorithm = fc.algorithms.fed_avg(model, client_optimizer=optax.sgd(0.1), batch_size=2)
    rng = np.random.default_rng(0)
    data = fc.datasets.from_clients(
        {
            str(i): {
                "x": rng.normal(size=(n, 2)).astype(F32),
                "y": rng.normal(size=(n, 1)).astype(F32),
            }
            for i, n in enumerate((3, 1, 4, 2, 2))
        }
    )
    cohort = data.cohort(data.client_ids)
    state = algorithm.init(jax.random.key(0))
    args = (
        fc.Federated(state, fc.SERVER),
        fc.Federated(cohort.sequence(), fc.CLIENTS),
        fc.Federated(cohort.uid, fc.CLIENTS),
    )
    parts = map_reduce_form(algorithm.computation)
    assert len(parts.stages) == 1
    result = parts.run(*args, group_size=2)
    expected, _ = algorithm.update(state, cohort)
    np.testing.assert_allclose(
        result.state.value.params["W"], expected.params["W"], rtol=1e-5, atol=1e-6
    )
