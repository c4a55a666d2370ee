"""Exported computations: what comes out of a file computes what went in."""

import functools
import hashlib
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_core as fc
from fedjax_core.compression.edges import PlacedKeys, uplink
from fedjax_core.errors import (
    ArgumentError,
    FederatedTypeError,
    NotExportableError,
    StorageError,
)
from fedjax_core.execution import loading
from fedjax_core.execution.export import export
from fedjax_core.execution.loading import load_computation
from fedjax_core.language import feeding, inference
from fedjax_core.language.results import to_python
from fedjax_core.learning import checkpoints

F32 = np.float32
KEY = fc.infer_type(jax.random.key(0))
STACKED = fc.Execution(mode="stacked")


def at_clients(member: Any) -> fc.FederatedType:
    return fc.FederatedType(member, fc.CLIENTS)


def at_server(member: Any) -> fc.FederatedType:
    return fc.FederatedType(member, fc.SERVER)


FLOATS = at_clients(F32)
VECTORS = at_clients((F32, [3]))
ROWS = at_clients(fc.SequenceType({"x": (F32, [3]), "y": np.int32}))


def sum_rows(rows: fc.Sequence) -> jax.Array:
    return rows.reduce(jnp.zeros(3), lambda total, row: total + row["x"] * row["y"])


def two_trips(x, rows):
    """Deviations from the mean, whose mean is another round trip; and client-placed results."""
    x = fc.federated_map(jnp.add, x, fc.federated_map(sum_rows, rows))
    mean = fc.federated_broadcast(fc.federated_mean(x))
    deviation = fc.federated_map(jnp.subtract, x, mean)
    square = fc.federated_map(jnp.square, deviation)
    return {"deviation": deviation, "variance": fc.federated_mean(square), "mean": mean}


def aggregate(x, zero):
    return fc.federated_aggregate(
        x,
        zero,
        lambda state, x: {"n": state["n"] + 1, "max": jnp.maximum(state["max"], x)},
        lambda a, b: {"n": a["n"] + b["n"], "max": jnp.maximum(a["max"], b["max"])},
        lambda state: (state["max"], state["n"]),
    )


def encoded(x, uid, key):
    """A sum through a codec that draws random numbers, from keys folded with ids."""
    shared = fc.federated_broadcast(key, name="seed")
    keys = PlacedKeys(key, shared, fc.federated_map(jax.random.fold_in, shared, uid))
    codec = fc.compression.uniform_quantize(4, min_size=2)
    nothing = fc.federated_value((), fc.SERVER), fc.federated_value((), fc.CLIENTS)
    return uplink(codec, keys, *nothing, x)[2]


def select(keys, table):
    rows = fc.federated_select(keys, 5, table, lambda table, key: table[key])
    return rows, fc.federated_sum(fc.federated_map(lambda rows: rows.sum(), rows))


def placed(x, count, here):
    """Unplaced values, strings, structs, values that all clients share."""
    scaled = fc.federated_map(
        jnp.multiply, x, fc.federated_broadcast(fc.federated_value(count, fc.SERVER))
    )
    return {
        "total": fc.federated_sum(scaled),
        "count": count,
        "unit": "metres",
        "placed unit": fc.federated_value("metres", fc.SERVER),
        "here": here,
    }


PROGRAMS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "mean": (fc.federated_mean, (FLOATS,)),
    "weighted_mean": (lambda x, w: fc.federated_mean(x, w), (VECTORS, at_clients(np.int32))),
    "aggregate": (aggregate, (VECTORS, at_server({"max": (F32, [3]), "n": np.int32}))),
    "extremes": (lambda x: (fc.federated_min(x), fc.federated_max(x)), (VECTORS,)),
    "two_trips": (two_trips, (VECTORS, ROWS)),
    "keys": (
        lambda keys: fc.federated_map(lambda key: jax.random.fold_in(key, 1), keys),
        (at_clients(KEY),),
    ),
    "encoded": (encoded, (VECTORS, at_clients(np.uint32), at_server(KEY))),
    "secure_sum": (lambda x: fc.federated_secure_sum(x, 4), (at_clients(np.int32),)),
    "clipped": (
        lambda x: fc.federated_secure_sum(x, 2, report_clipped=True),
        (at_clients(np.int32),),
    ),
    "modular": (lambda x: fc.federated_secure_modular_sum(x, 3), (at_clients(np.int32),)),
    "collect": (
        lambda x: (
            fc.federated_collect(x),
            fc.federated_map(lambda rows: rows.sum(), fc.federated_collect(x)),
        ),
        (VECTORS,),
    ),
    "select": (select, (at_clients((np.int32, [2])), at_server((F32, [5, 3])))),
    "placed": (placed, (FLOATS, F32, fc.FederatedType((F32, [2]), fc.CLIENTS, True))),
    "structs": (
        lambda both: fc.federated_zip({"sum": fc.federated_sum(both["x"]), "s": both["a, b=c"]}),
        ({"x": FLOATS, "a, b=c": at_server(F32)},),
    ),
    "server_only": (lambda x: fc.federated_map(jnp.sqrt, x), (at_server(F32),)),
    "unplaced": (lambda x: fc.jax_computation(jnp.exp, F32)(x), (F32,)),
}


@functools.cache
def computation(name: str) -> fc.Computation:
    function, parameters = PROGRAMS[name]
    return fc.federated_computation(function, *parameters)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def exported(folder):
    """Exports a program once, and loads it."""

    @functools.cache
    def load(name: str) -> loading.LoadedComputation:
        export(computation(name), folder / name)
        return load_computation(folder / name)

    return load


def draw_member(t: fc.Type, rng: np.random.Generator) -> Any:
    """A value on a grid of quarters, on which sums are exact in any order."""
    if isinstance(t, fc.SequenceType):
        return [draw_member(t.element, rng) for _ in range(rng.integers(0, 4))]
    if isinstance(t, fc.StructType):
        fields = [draw_member(child, rng) for child in t.children()]
        return jax.tree.unflatten(t.container, fields)
    if t == KEY:
        return jax.random.key(int(rng.integers(100)))
    numbers = rng.integers(0, 5, t.shape)
    return (numbers / 4 if t.dtype == np.float32 else numbers).astype(t.dtype)


def draw(t: fc.Type, num_clients: int, rng: np.random.Generator) -> Any:
    if isinstance(t, fc.StructType):
        children = [draw(child, num_clients, rng) for child in t.children()]
        return jax.tree.unflatten(t.container, children)
    if not isinstance(t, fc.FederatedType):
        return jnp.asarray(draw_member(t, rng))
    if t.placement is fc.SERVER or t.all_equal:
        return fc.Federated(draw_member(t.member, rng), t.placement, t.all_equal)
    members = [draw_member(t.member, rng) for _ in range(num_clients)]
    return feeding.to_placed(members, t, "drawn")


def arguments(name: str, num_clients: int, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [draw(fc.to_type(t), num_clients, rng) for t in PROGRAMS[name][1]]


def is_federated(x: Any) -> bool:
    return isinstance(x, fc.Federated)


def leaves(args: list[Any]) -> list[Any]:
    return jax.tree.leaves(args, is_leaf=is_federated)


def plain(result: Any) -> list[Any]:
    """The arrays of a result as Python sees them, in order; keys as their data."""

    def convert(x: Any) -> Any:
        return to_python(x) if is_federated(x) else x

    arrays = jax.tree.leaves(jax.tree.map(convert, result, is_leaf=is_federated))
    is_key = lambda x: jnp.issubdtype(getattr(x, "dtype", bool), jax.dtypes.prng_key)  # noqa: E731
    return [jax.random.key_data(x) if is_key(x) else x for x in arrays]


def assert_same(got: Any, expected: Any) -> None:
    for a, b in zip(plain(got), plain(expected), strict=True):
        if isinstance(b, str):
            assert a == b
        else:
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
            assert np.asarray(a).dtype == np.asarray(b).dtype


@pytest.mark.parametrize("num_clients", [pytest.param(0, marks=pytest.mark.slow), 5])
@pytest.mark.parametrize("name", PROGRAMS)
def test_what_is_loaded_equals_the_stacked_lowering(name, num_clients, exported):
    """Values and bits, with a cohort size that was open when it was exported; and with nobody."""
    args = arguments(name, num_clients)
    loaded = exported(name)
    assert str(loaded.type_signature) == str(computation(name).type_signature)
    got, bits = loaded.call_with_ledger(*args, num_clients=num_clients)
    lowered = computation(name).lower(STACKED)
    expected, expected_bits = lowered(*leaves(args), num_clients=num_clients)
    assert_same(got, expected)
    assert list(map(int, bits)) == list(map(int, expected_bits))


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("mean", ([1.0, 2.0, 3.0],), 2.0),  # C-53
        ("secure_sum", ([1, 2, 4],), 7),
        ("modular", ([1, 2, 10],), 1),
    ],
)
def test_lists_give_python_values(name, args, expected, exported):
    """As with a computation: lists in, values out; arguments by name too."""
    assert exported(name)(*args) == pytest.approx(expected)
    parameter = computation(name).program.parameter_names[0]
    assert exported(name)(**{parameter: args[0]}) == pytest.approx(expected)


def test_temperatures(tmp_path):
    """C-57: 12.5, with sequences of any length."""

    def count_above(rows, limit):
        return rows.map(lambda x: jnp.float32(x > limit)).sum()

    def body(rows, limit):
        above = fc.federated_map(count_above, rows, fc.federated_broadcast(limit))
        return fc.federated_mean(above, fc.federated_map(lambda rows: rows.length, rows))

    temperatures = fc.federated_computation(body, at_clients(fc.SequenceType(F32)), at_server(F32))
    export(temperatures, tmp_path / "t")
    loaded = load_computation(tmp_path / "t")
    assert loaded.manifest["sequence_capacity"] is None
    clients = [[float(x) for x in range(n)] for n in (10, 20, 30)]
    assert loaded(clients, 10.0) == pytest.approx(12.5)
    # A longer one is no matter.
    clients.append([11.0] * 100)
    expected = (0 * 10 + 9 * 20 + 19 * 30 + 100 * 100) / 160
    assert loaded(clients, 10.0) == pytest.approx(expected)


def fixed(rows):
    """Needs to know its capacity: a Python loop over it."""

    def total(rows: fc.Sequence) -> jax.Array:
        taken, mask = rows.take(jnp.arange(min(rows.capacity, 9))), rows.positions()[1]
        return jnp.sum(jnp.where(mask, taken, 0.0))

    return fc.federated_sum(fc.federated_map(total, rows))


def test_sequences_of_a_fixed_capacity(tmp_path):
    """Shorter ones are padded, packed ones unpacked, longer ones refused by client's argument."""
    take = fc.federated_computation(fixed, at_clients(fc.SequenceType(F32)))
    with pytest.raises(ArgumentError, match="pass sequence_capacity="):
        export(take, tmp_path / "fixed")
    export(take, tmp_path / "fixed", sequence_capacity=3)
    loaded = load_computation(tmp_path / "fixed")
    assert loaded([[1.0, 2.0, 3.0], [], [4.0]]) == 10.0
    pool, start, length = jnp.arange(7.0), jnp.array([4, 0, 2]), jnp.array([2, 1, 2])
    packed = fc.Sequence(pool, start, length, capacity=2, packed=True)
    assert float(loaded(fc.Federated(packed, fc.CLIENTS)).value) == 4 + 5 + 0 + 2 + 3
    with pytest.raises(ArgumentError, match=r"`rows` of `fixed`: .* at most 3 .* one of 4"):
        loaded([[1.0], [1.0] * 4])
    eight = fc.Sequence(jnp.zeros((1, 8)), jnp.zeros(1, int), jnp.zeros(1, int), 8)
    with pytest.raises(ArgumentError, match="at most 3"):
        jax.jit(loaded)(fc.Federated(eight, fc.CLIENTS))


@pytest.mark.parametrize(
    "num_clients",
    [pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow), 6],
)
def test_waves_of_several_lanes(num_clients, tmp_path):
    """Cohorts that do not fill the last wave are padded with clients that do not exist."""
    export(computation("two_trips"), tmp_path / "lanes", lanes=4, platforms=("cpu",))
    args = arguments("two_trips", num_clients)
    got, bits = load_computation(tmp_path / "lanes").call_with_ledger(*args)
    expected, expected_bits = computation("two_trips").lower(STACKED)(*args)
    assert_same(got, expected)
    assert list(map(int, bits)) == list(map(int, expected_bits))


def test_clients_that_only_pad_do_not_count(exported):
    args = arguments("two_trips", 4)
    valid = np.array([True, False, True, True])
    got, bits = exported("two_trips").call_with_ledger(*args, valid=valid)
    expected, expected_bits = computation("two_trips").lower(STACKED)(*args, valid=valid)
    np.testing.assert_allclose(got["variance"].value, expected["variance"].value, rtol=1e-6)
    assert list(map(int, bits)) == list(map(int, expected_bits))


def test_it_can_be_traced(exported):
    """Inside jit, among other JAX code; the result is `Federated` as the argument was."""

    @jax.jit
    def twice(x):
        return exported("mean")(fc.Federated(2 * x, fc.CLIENTS))

    result = twice(jnp.array([1.0, 2.0, 6.0]))
    assert is_federated(result)
    assert float(result.value) == 6.0


def test_containers_come_back_by_name(exported):
    """Ordered dicts for named structs, tuples for others; arguments are matched by name."""
    result = exported("structs")({"a, b=c": 3.0, "x": [1.0, 2.0]})
    assert dict(result) == {"s": 3.0, "sum": 3.0}
    assert isinstance(exported("extremes")(np.ones((2, 3), np.float32)), tuple)
    unit = exported("placed")([1.0], 2.0, [0.0, 1.0])
    assert (unit["unit"], unit["placed unit"], unit["total"]) == ("metres", "metres", 2.0)


def test_values_out_of_the_bounds_of_a_secure_sum_are_an_error(exported):
    """C-65, and the same inside jit only clips."""
    with pytest.raises(ArgumentError, match=r"values from \[0\] to \[4\] .* 0 below and 2 above"):
        exported("secure_sum")([5, 4, 6])
    result = jax.jit(exported("secure_sum"))(fc.Federated(jnp.array([5, 4]), fc.CLIENTS))
    assert int(result.value) == 8


def test_manifest_describes_types_edges_and_arrays(exported):
    manifest = exported("two_trips").manifest
    assert manifest["type"] == str(computation("two_trips").type_signature)
    assert manifest["parameter_names"] == ["x", "rows"]
    assert manifest["platforms"] == ["cpu", "cuda", "tpu"]
    assert manifest["versions"]["jax"] == jax.__version__
    assert [(edge["operator"], edge["bits_of_one_client"]) for edge in manifest["edges"]] == [
        ("sum", 96),
        ("broadcast", 96),
        ("sum", 96),
    ]
    assert manifest["arguments"][:2] == [
        {"name": "x", "dtype": "float32", "shape": ["c", 3]},
        {"name": "rows.elements['x']", "dtype": "float32", "shape": ["c", "cap", 3]},
    ]
    assert manifest["arguments"][-1] == {"name": "valid", "dtype": "bool", "shape": ["c"]}
    assert len(exported("two_trips").stablehlo) > 100


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((["a"],), "argument 0 `value` of `federated_mean`, client 0: expected float32"),
        ((1.0,), "expected a list with one entry a client"),
        ((), "expected 1 arguments, got 0"),
        (([1.0], [2.0]), "expected 1 arguments, got 2"),
    ],
)
def test_arguments_that_do_not_fit_are_named(args, message, exported):
    with pytest.raises(FederatedTypeError, match=message):
        exported("mean")(*args)


def test_numbers_of_clients_have_to_agree(exported, tmp_path):
    with pytest.raises(ArgumentError, match=r"got 3 for argument 0 `x` of `lambda`, 2 for"):
        exported("weighted_mean")(np.ones((3, 3), np.float32), [1, 2])
    ones = fc.federated_computation(lambda: fc.federated_sum(fc.federated_value(1, fc.CLIENTS)))
    export(ones, tmp_path / "ones", platforms=("cpu",))
    loaded = load_computation(tmp_path / "ones")
    assert (loaded(num_clients=3), loaded(num_clients=0)) == (3, 0)
    with pytest.raises(ArgumentError, match="pass num_clients="):
        loaded()


def test_an_imported_artifact_is_no_building_block(exported):
    with pytest.raises(FederatedTypeError, match="cannot become part of another computation"):
        fc.federated_computation(lambda x: exported("mean")(x), FLOATS)


def test_what_cannot_be_exported_is_refused(tmp_path):
    path = tmp_path / "x"

    def printing(x):
        jax.debug.print("{}", x)
        return x

    prints = fc.federated_computation(lambda x: fc.federated_map(printing, x), FLOATS)
    with pytest.raises(ArgumentError, match="which calls Python"):
        export(prints, path)
    function = fc.FunctionType(F32, F32)
    calls = fc.federated_computation(lambda f, x: fc.federated_map(f, x), function, FLOATS)
    with pytest.raises(ArgumentError, match=r"argument 0 `f`.* bind them first"):
        export(calls, path)
    with pytest.raises(ArgumentError, match="declared types"):
        export(fc.federated_computation(fc.federated_mean), path)
    for platforms in [(), ("cpu", "abacus"), "cpu"]:
        with pytest.raises(ArgumentError, match="tuple of platforms"):
            export(computation("mean"), path, platforms=platforms)
    with pytest.raises(ArgumentError, match="sequence_capacity to be a positive int"):
        export(computation("two_trips"), path, sequence_capacity=0)
    assert not path.exists()


def test_another_platform_is_named(tmp_path):
    export(computation("mean"), tmp_path / "tpu", platforms=("tpu",))
    loaded = load_computation(tmp_path / "tpu")
    if jax.default_backend() != "tpu":
        with pytest.raises(ArgumentError, match=r"one of \['tpu'\].* got"):
            loaded([1.0])


def test_bound_functions_are_exported(tmp_path):
    function = fc.FunctionType(F32, F32)
    calls = fc.federated_computation(
        lambda f, x: fc.federated_sum(fc.federated_map(f, x)), function, FLOATS
    )
    export(calls.bind(lambda x: 3 * x), tmp_path / "bound", platforms=("cpu",))
    assert load_computation(tmp_path / "bound")([1.0, 2.0]) == 9.0


# A process that has neither the code of the model nor that of the algorithm.
CONSUMER = """
import sys
import numpy as np
import jax
import fedjax_core as fc

folder = sys.argv[1]
init, update = (fc.load(f"{folder}/{name}") for name in ("init", "round"))
data = np.load(f"{folder}/data.npz")
state = init(jax.random.key(5))
out = {}
for size in (1, 7, 64):
    examples = [
        {name: data[name][i, : data["length"][i]] for name in ("x", "y")} for i in range(size)
    ]
    round = update(state, examples, data["uid"][:size])
    state = round["state"]
    out[f"W{size}"], out[f"b{size}"] = state["params"]["W"], state["params"]["b"]
    out[f"loss{size}"] = round["train"]["loss"]
np.savez(f"{folder}/out.npz", **out)
"""


def linear_regression() -> fc.models.Model:
    def init(key):
        return {"W": jax.random.normal(key, (2, 1)), "b": jnp.zeros(())}

    def apply(variables, batch, key, train):
        return batch["x"] @ variables["W"] + variables["b"]

    def loss(predictions, batch):
        return 0.5 * (predictions - batch["y"])[:, 0] ** 2

    spec = {"x": jax.ShapeDtypeStruct((2,), F32), "y": jax.ShapeDtypeStruct((1,), F32)}
    return fc.models.from_functions(init, apply, loss=loss, input_spec=spec)


def test_fed_avg_runs_in_another_process(tmp_path):
    """Three rounds with 1, 7 and 64 clients of one file equal those of the algorithm itself."""
    rng = np.random.default_rng(0)
    data = {
        "x": rng.normal(size=(64, 4, 2)).astype(F32),
        "y": rng.normal(size=(64, 4, 1)).astype(F32),
        "length": rng.integers(1, 5, 64),
    }
    clients = {
        f"{i:02}": {name: data[name][i, : data["length"][i]] for name in ("x", "y")}
        for i in range(64)
    }
    dataset = fc.datasets.from_clients(clients)
    algorithm = fc.algorithms.fed_avg(
        linear_regression(), client_optimizer=optax.sgd(0.1), batch_size=2, num_epochs=2
    )
    init = fc.federated_computation(
        lambda key: fc.federated_map(algorithm.init, key), at_server(KEY)
    )
    export(init, tmp_path / "init", platforms=("cpu", "cuda"))
    export(algorithm.computation, tmp_path / "round", sequence_capacity=4)
    uid = dataset.cohort(list(clients)).uid
    np.savez(tmp_path / "data.npz", uid=uid, **data)
    command = [sys.executable, "-c", CONSUMER, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    got = np.load(tmp_path / "out.npz")
    state = algorithm.init(jax.random.key(5))
    for size in (1, 7, 64):
        state, metrics = algorithm.update(state, dataset.cohort(list(clients)[:size]))
        np.testing.assert_allclose(got[f"W{size}"], state.params["W"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[f"b{size}"], state.params["b"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[f"loss{size}"], metrics.train["loss"], rtol=1e-5)


def corrupted(data: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with a bit flipped, cut short, something inserted, or two blocks exchanged."""
    at, size = int(rng.integers(len(data))), int(rng.integers(1, 200))
    match int(rng.integers(4)):
        case 0:
            flipped = bytearray(data)
            flipped[at] ^= 1 << int(rng.integers(8))
            return bytes(flipped)
        case 1:
            return data[:at]
        case 2:
            return data[:at] + rng.bytes(size) + data[at:]
    other = int(rng.integers(len(data)))
    first, second = sorted((at, other))
    blocks = data[first : first + size], data[second : second + size]
    return (
        data[:first] + blocks[1] + data[first + size : second] + blocks[0] + data[second + size :]
    )


def test_100_corrupted_copies_are_refused(folder, exported, tmp_path):
    exported("two_trips")
    data = (folder / "two_trips").read_bytes()
    rng = np.random.default_rng(7)
    starts = [data[:150], data]  # the first line and the manifest are hit as often as the rest
    for number in range(100):
        part = starts[number % 2]
        bad = corrupted(part, rng) + data[len(part) :]
        if bad == data:
            continue
        path = tmp_path / str(number)
        path.write_bytes(bad)
        for read in (load_computation, checkpoints.load):
            with pytest.raises(StorageError, match="expected"):
                read(path)


def sealed(path, body: bytes) -> Any:
    digest = hashlib.sha256(body).hexdigest()
    path.write_bytes(f"fedjax-core-computation 1 {digest}\n".encode() + body)
    return path


def manifest_of(folder, exported) -> tuple[dict[str, Any], bytes]:
    exported("mean")
    _, _, body = (folder / "mean").read_bytes().partition(b"\n")
    line, _, artifact = body.partition(b"\n")
    return json.loads(line), artifact


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": ["{float33}@CLIENTS"]},
        {"parameters": 3},
        {"parameters": ["{<float32,float32>}@CLIENTS"]},
        {"result": "<" * 5000},
        {"versions": None},
        {"lanes": "many"},
        {"artifact_sha256": "0"},
        {"name": None, "edges": None},
        {"lanes": 0},
        {"lanes": -1},
        {"lanes": 10**7},
        {"lanes": True},
        {"strings": None},
        {"strings": ["metres"]},
        {"edges": [3]},
        {"edges": [{"direction": "up"}]},
        {"edges": []},
        {"platforms": ["tpu"]},
        {"platforms": "cpu"},
        {"secure_sums": [{}]},
        {"secure_sums": {"name": "x"}},
        {"parameters": ["{int32}@CLIENTS"]},
        {"parameter_names": ["x", "y"]},
        {"arguments": []},
        {"kind": "piece"},
        {"enable_x64": "no"},
        {"versions": {"jax": 3}},
    ],
)
def test_a_forged_manifest_is_an_error_of_storage(change, folder, exported, tmp_path):
    """A checksum is no proof of who wrote a file."""
    manifest, artifact = manifest_of(folder, exported)
    forged = json.dumps(manifest | change).encode() + b"\n" + artifact
    with pytest.raises(StorageError, match="whose content is something else"):
        load_computation(sealed(tmp_path / "forged", forged))


@pytest.mark.parametrize("body", [b"", b"\n", b"[]\n", b"{}\n", b"[" * 100_000, b"\xff\xfe"])
def test_another_content_is_an_error_of_storage(body, tmp_path):
    with pytest.raises(StorageError, match="whose content is something else"):
        load_computation(sealed(tmp_path / "x", body))


def with_artifact(manifest: dict[str, Any], artifact: bytes) -> bytes:
    digest = hashlib.sha256(artifact).hexdigest()
    return json.dumps(manifest | {"artifact_sha256": digest}).encode() + b"\n" + artifact


def test_an_artifact_of_a_newer_jax_is_explained(folder, exported, tmp_path):
    manifest, artifact = manifest_of(folder, exported)
    newer = manifest | {"versions": manifest["versions"] | {"jax": "99.1.0"}}
    damaged = artifact[:-1000]
    with pytest.raises(StorageError, match=r"exported by jax 99\.1\.0: JAX reads what older"):
        load_computation(sealed(tmp_path / "newer", with_artifact(newer, damaged)))
    with pytest.raises(StorageError, match="whose content is something else"):
        load_computation(sealed(tmp_path / "garbage", with_artifact(manifest, b"garbage")))
    # A newer one that is understood all the same runs.
    loaded = load_computation(sealed(tmp_path / "fine", with_artifact(newer, artifact)))
    assert loaded([1.0, 3.0]) == 2.0


def test_a_damaged_artifact_is_explained_at_the_first_call(folder, exported, tmp_path):
    manifest, artifact = manifest_of(folder, exported)
    start = artifact.index(b"ML\xefR")  # the magic number of MLIR's bytecode
    damaged = artifact[: start + 100] + bytes(200) + artifact[start + 300 :]
    path = sealed(tmp_path / "damaged", with_artifact(manifest, damaged))
    with pytest.raises(
        StorageError, match=r"expected a computation that JAX .*the file is damaged"
    ):
        load_computation(path)([1.0, 3.0])


@pytest.mark.parametrize(
    "options",
    [
        {"platforms": None},
        {"platforms": 3},
        {"platforms": ()},
        {"platforms": "cpu"},
        {"platforms": [None]},
        {"lanes": None},
        {"lanes": 1.5},
        {"lanes": 0},
        {"lanes": np.array([1, 2])},
        {"sequence_capacity": "a"},
        {"sequence_capacity": True},
        {"sequence_capacity": 2**40},
        {"sequence_capacity": np.array([1, 2])},
    ],
    ids=lambda options: "-".join(map(str, (*options, *options.values()))),
)
def test_options_that_are_none_are_refused(options, tmp_path):
    with pytest.raises(ArgumentError, match=f"Expected (a tuple of )?{next(iter(options))}"):
        export(computation("mean"), tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("path", [None, 3, b"x"], ids=repr)
def test_a_path_that_is_none_is_a_type_error(path):
    with pytest.raises(FederatedTypeError, match=r"Expected a path, as a str or a pathlib.Path"):
        export(computation("mean"), path)
    with pytest.raises(FederatedTypeError, match=r"Expected a path, as a str or a pathlib.Path"):
        load_computation(path)


def test_types_that_no_file_can_name_are_refused(tmp_path):
    """As deep as types may be; with what is around them that is too deep for the notation."""
    member = functools.reduce(lambda t, _: [t], range(100), F32)
    deep = fc.federated_computation(lambda x: x, at_server(member))
    with pytest.raises(NotExportableError, match=r"that can be read from a file.* 100 deep"):
        export(deep, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def identity_of(dtype: str) -> fc.Computation:
    t = at_server(getattr(jnp, dtype))
    return fc.federated_computation(lambda x: fc.federated_map(lambda y: y, x), t)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "bfloat16", "float8_e4m3fn"])
def test_small_dtypes_are_exported(dtype, tmp_path):
    export(identity_of(dtype), tmp_path / "x", platforms=("cpu",))
    assert load_computation(tmp_path / "x")(jnp.ones((), getattr(jnp, dtype))) == 1


@pytest.mark.parametrize("dtype", ["int2", "uint2"])
def test_dtypes_that_jax_does_not_write_to_files_are_refused(dtype, tmp_path):
    with pytest.raises(NotExportableError, match=f"{dtype}.*; use another dtype"):
        export(identity_of(dtype), tmp_path / "x", platforms=("cpu",))


def test_one_load_for_states_and_computations(folder, exported, tmp_path):
    exported("mean")
    assert checkpoints.load(folder / "mean")([1.0, 3.0]) == 2.0
    checkpoints.save(tmp_path / "state", {"w": 1})
    assert checkpoints.load(tmp_path / "state", {"w": 0}) == {"w": 1}
    with pytest.raises(ArgumentError, match="leave `like` out"):
        checkpoints.load(folder / "mean", {"w": 0})
    with pytest.raises(ArgumentError, match=r"load\(path, like\)"):
        checkpoints.load(tmp_path / "state")
    with pytest.raises(StorageError, match="`export` wrote"):
        load_computation(tmp_path / "state")
    (tmp_path / "empty").touch()
    for name in ("empty", "nowhere", "."):
        with pytest.raises(StorageError, match="check the path"):
            checkpoints.load(tmp_path / name)


def test_specs_of_types_have_the_order_of_leaves():
    """The calling convention: the arrays of a sequence's elements, then start and length."""
    spec = inference.template(fc.SequenceType({"b": F32, "a": np.int32}), 4)
    assert [x.shape for x in jax.tree.leaves(spec)] == [(4,), (4,), (), ()]
    assert [str(x.dtype) for x in jax.tree.leaves(spec)][:2] == ["int32", "float32"]
