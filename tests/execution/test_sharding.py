"""Clients spread over a mesh: the same values and bits as on one device, and few collectives."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fedjax_core as fc
from fedjax_core.bits import BitCount
from fedjax_core.compression.edges import PlacedKeys, uplink
from fedjax_core.errors import ArgumentError, FederatedTypeError
from fedjax_core.execution import collectives
from fedjax_core.execution.sharding import replicate

SIZE = 3
F32 = fc.FederatedType(np.float32, fc.CLIENTS)
VECTOR = fc.FederatedType((np.float32, [SIZE]), fc.CLIENTS)
SERVER = fc.FederatedType(np.float32, fc.SERVER)
UID = fc.FederatedType(np.uint32, fc.CLIENTS)
KEY = fc.FederatedType(fc.infer_type(jax.random.key(0)), fc.SERVER)
ROWS = fc.FederatedType(fc.SequenceType((np.float32, [SIZE])), fc.CLIENTS)

MESHES = {
    "auto": jax.make_mesh((4,), ("clients",), axis_types=(AxisType.Auto,)),
    "explicit": jax.make_mesh((4,), ("clients",), axis_types=(AxisType.Explicit,)),
    "auto 2x2": jax.make_mesh((2, 2), ("clients", "data"), axis_types=(AxisType.Auto,) * 2),
    "explicit 2x2": jax.make_mesh((2, 2), ("clients", "data"), axis_types=(AxisType.Explicit,) * 2),
}
AUTO, EXPLICIT = MESHES["auto"], MESHES["explicit"]
any_mesh = pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES.keys())
auto_or_explicit = pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])


def on_mesh(mesh: jax.sharding.Mesh = AUTO, **options: Any) -> fc.Execution:
    return fc.Execution(mesh=mesh, **options)


def at_clients(value: Any) -> fc.Federated:
    return fc.Federated(value, fc.CLIENTS)


def at_server(value: Any) -> fc.Federated:
    return fc.Federated(value, fc.SERVER)


def values_of(result: Any, valid: np.ndarray) -> list[np.ndarray]:
    """All arrays of a result; of client values the rows of those who are valid."""
    arrays = []
    for leaf in jax.tree.leaves(result, is_leaf=is_federated):
        value = leaf.value
        if isinstance(value, fc.Sequence):  # the reference pads to another capacity
            value = [np.asarray(x)[: int(value.length)] for x in jax.tree.leaves(value.elements)]
        is_stacked = leaf.placement is fc.CLIENTS and not leaf.all_equal
        arrays += [np.asarray(x)[valid if is_stacked else ...] for x in jax.tree.leaves(value)]
    return arrays


def is_federated(x: Any) -> bool:
    return isinstance(x, fc.Federated)


def check_agreement(computation, execution, *args, valid=None, num_clients=None) -> None:
    """Integers and bits as the reference has them, floats to 1e-5."""
    num_clients = computation_size(args) if num_clients is None else num_clients
    keep = np.ones(num_clients, bool) if valid is None else valid
    options = {"valid": valid, "num_clients": num_clients}
    sharded, reference = (computation.lower(e) for e in (execution, fc.Execution(mode="reference")))
    got, bits = jax.jit(lambda *args: sharded(*args, **options))(*args)
    wanted, wanted_bits = reference(*args, **options)
    assert [int(b) for b in bits] == [int(b) for b in wanted_bits]
    for x, y in zip(values_of(got, keep), values_of(wanted, keep), strict=True):
        assert x.dtype == y.dtype
        is_float = np.issubdtype(x.dtype, np.floating)
        rtol, atol = (1e-5, 1e-6) if is_float else (0, 0)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def computation_size(args: tuple[Any, ...]) -> int:
    sizes = [jax.tree.leaves(x.value)[-1].shape[0] for x in args if x.placement is fc.CLIENTS]
    return sizes[0]


@fc.federated_computation(VECTOR, F32, fc.FederatedType(np.int32, fc.CLIENTS), SERVER)
def everything(x, weight, count, s):
    """Two round trips over all sums, extremes, folds and values at the clients."""
    average = fc.federated_mean(x, weight)
    shifted = fc.federated_map(
        lambda x, m, s: (x - m) * s, x, fc.federated_broadcast(average), fc.federated_broadcast(s)
    )
    spread = fc.federated_sum(fc.federated_map(jnp.square, shifted))
    fold = fc.federated_aggregate(
        count,
        (np.int32(0), np.int32(-(2**31))),
        lambda state, x: (state[0] + 1, jnp.maximum(state[1], x)),
        lambda a, b: (a[0] + b[0], jnp.maximum(a[1], b[1])),
        lambda state: state,
    )
    return {
        "average": average,
        "spread": spread,
        "shifted": shifted,
        "total": fc.federated_sum(count),
        "smallest": fc.federated_min(x),
        "largest": fc.federated_max(count),
        "num": fc.federated_count(),
        "fold": fold,
        "twice": fc.federated_map(lambda c: 2 * c, count),
        "constant": fc.federated_broadcast(fc.federated_value(np.float32(7), fc.SERVER)),
    }


def everything_args(num_clients: int) -> tuple[fc.Federated, ...]:
    rng = np.random.default_rng(num_clients)
    return (
        at_clients(rng.normal(size=(num_clients, SIZE)).astype(np.float32) + 3),
        at_clients(rng.uniform(1, 4, num_clients).astype(np.float32)),
        at_clients(rng.integers(-(2**30), 2**30, num_clients).astype(np.int32)),
        at_server(np.float32(1.5)),
    )


@pytest.mark.parametrize(
    ("name", "num_clients", "options"),
    [
        ("auto", 0, {}),
        ("explicit", 0, {"lanes": 2}),
        ("auto", 3, {}),
        ("explicit", 11, {"lanes": 2}),
        ("auto 2x2", 11, {"mode": "stacked"}),
    ],
)
def test_every_kind_of_aggregation_agrees(name, num_clients, options):
    """No clients, fewer than devices, and a number that they do not divide, in several lanes."""
    args = everything_args(num_clients)
    check_agreement(everything, on_mesh(MESHES[name], **options), *args, num_clients=num_clients)


@auto_or_explicit
def test_clients_that_are_not_valid_do_not_count(mesh):
    """They may hold NaN; 1 + 3 + 4 + 7 over four clients."""

    @fc.federated_computation(F32)
    def several(x):
        return fc.federated_sum(x), fc.federated_mean(x), fc.federated_max(x), fc.federated_count()

    valid = np.array([1, 0, 1, 1, 0, 0, 1], bool)
    x = at_clients(np.where(valid, np.arange(1, 8, dtype=np.float32), np.nan))
    result, ledger = several.lower(on_mesh(mesh))(x, valid=valid)
    assert [float(leaf.value) for leaf in result] == [15, 3.75, 7, 4]
    assert [int(bits) for bits in ledger] == [4 * 32] * 3


def test_a_known_total_and_its_bits():
    """1 + 2 + ... + 10 in float32: 10 clients send 32 bits each."""
    total = fc.federated_computation(fc.federated_sum, F32)
    result, ledger = total.lower(on_mesh())(at_clients(np.arange(1, 11, dtype=np.float32)))
    assert float(result.value) == 55
    assert [int(bits) for bits in ledger] == [320]


@auto_or_explicit
def test_sums_of_integers_saturate_as_on_one_device(mesh):
    """200 ones and minus ones as int8: 127 and -128; the sum of 8 largest int32 stays in range."""
    ints = fc.FederatedType((np.int8, [2]), fc.CLIENTS), fc.FederatedType(np.int32, fc.CLIENTS)
    total = fc.federated_computation(
        lambda a, b: (fc.federated_sum(a), fc.federated_sum(b)), *ints
    ).lower(on_mesh(mesh))
    signs = np.tile(np.int8([1, -1]), (200, 1))
    large = np.full(200, 2**31 - 1, np.int32)
    (small, wide), _ = jax.jit(total)(at_clients(signs), at_clients(large))
    assert small.value.tolist() == [127, -128]
    assert int(wide.value) == 2**31 - 1


def test_secure_sums():
    """C-61: [0,5,10,15,20] modulo 5 is 0, [1,2,10] is 3; C-65: [1,2,10] within 30 is 13."""
    integers = fc.FederatedType(np.int32, fc.CLIENTS)

    @fc.federated_computation(integers)
    def secure(x):
        return fc.federated_secure_modular_sum(x, 5), fc.federated_secure_sum(x, 30)

    for values, expected in (([0, 5, 10, 15, 20], (0, 50)), ([1, 2, 10], (3, 13))):
        result, _ = secure.lower(on_mesh(EXPLICIT))(at_clients(np.int32(values)))
        assert tuple(int(leaf.value) for leaf in result) == expected
    check_agreement(secure, on_mesh(EXPLICIT), at_clients(np.int32([1, 2, 10])))


def test_violations_of_secure_sums_are_counted():
    """C-81: bounds +-1 on [-2,-1,0,1,2,3]: the sum is 1; two are above, one is below."""

    @fc.federated_computation(fc.FederatedType(np.int32, fc.CLIENTS))
    def secure(x):
        return fc.federated_secure_sum(x, 1, min_input=-1, report_clipped=True)

    result, _ = secure.lower(on_mesh())(at_clients(np.int32([-2, -1, 0, 1, 2, 3])))
    assert tuple(map(int, result.value)) == (1, 1, 2)


@auto_or_explicit
@pytest.mark.parametrize("num_clients", [0, 5, pytest.param(8, marks=pytest.mark.slow)])
def test_collect_and_select(mesh, num_clients):
    """The server sees the clients' values in their order; clients get rows of its table."""
    keys = fc.FederatedType((np.int32, [2]), fc.CLIENTS)
    table = fc.FederatedType((np.float32, [4]), fc.SERVER)

    @fc.federated_computation(F32, keys, table)
    def both(x, wanted, table):
        collected = fc.federated_collect(x)
        weigh = lambda rows: rows.reduce(jnp.float32(0), lambda t, x: 10 * t + x)  # noqa: E731
        four = fc.federated_value(np.int32(4), fc.SERVER)
        chosen = fc.federated_select(wanted, four, table, lambda t, k: t[k])
        rows_sum = fc.federated_map(lambda rows: rows.sum(), chosen)
        return collected, fc.federated_map(weigh, collected), rows_sum

    x = np.arange(1, num_clients + 1, dtype=np.float32)
    wanted = np.stack([np.arange(num_clients) % 4, np.arange(num_clients) % 3], axis=1)
    args = at_clients(x), at_clients(wanted.astype(np.int32)), at_server(np.float32([1, 2, 4, 8]))
    check_agreement(both, on_mesh(mesh), *args)
    (collected, number, sums), _ = both.lower(on_mesh(mesh))(*args)
    assert int(collected.value.length) == num_clients
    assert float(number.value) == int("".join(str(int(v)) for v in x) or 0)
    assert sums.value.tolist() == [2.0 ** (i % 4) + 2.0 ** (i % 3) for i in range(num_clients)]


def test_keys_at_the_clients():
    """Random keys are spread, padded, collected and returned as other values are."""
    key_type = fc.infer_type(jax.random.key(0))

    @fc.federated_computation(fc.FederatedType(key_type, fc.CLIENTS), KEY)
    def folded(keys, key):
        own = fc.federated_map(lambda k: jax.random.fold_in(k, 3), fc.federated_broadcast(key))
        drawn = fc.federated_map(lambda a, b: jax.random.bits(a) ^ jax.random.bits(b), keys, own)
        return drawn, keys, fc.federated_collect(keys)

    keys, key = jax.random.split(jax.random.key(1), 5), jax.random.key(2)
    for size in (5, 0):
        args = at_clients(keys[:size]), at_server(key)
        (drawn, same, collected), _ = folded.lower(on_mesh())(*args)
        other = jax.random.bits(jax.random.fold_in(key, 3))
        expected = [int(jax.random.bits(k) ^ other) for k in keys[:size]]
        assert drawn.value.tolist() == expected
        assert (jax.random.key_data(same.value) == jax.random.key_data(keys[:size])).all()
        found = jax.random.key_data(collected.value.elements)[:size]
        assert (found == jax.random.key_data(keys[:size])).all()


@auto_or_explicit
def test_sums_of_encoded_messages(mesh):
    """A codec's hints, statistics and data-dependent bits, with who is present."""
    codec = fc.compression.chain(
        fc.compression.top_k(0.7, min_size=1), fc.compression.uniform_quantize(8, min_size=1)
    )

    @fc.federated_computation(VECTOR, fc.FederatedType(np.bool_, fc.CLIENTS), UID, KEY)
    def send(x, present, uid, key):
        shared = fc.federated_broadcast(key, name="seed")
        keys = PlacedKeys(key, shared, fc.federated_map(jax.random.fold_in, shared, uid))
        nothing = fc.federated_value((), fc.SERVER), fc.federated_value((), fc.CLIENTS)
        _, _, total = uplink(codec, keys, *nothing, x, present=present)
        return total, fc.federated_mean(fc.federated_map(jnp.sum, x), present=present)

    rng = np.random.default_rng(0)
    args = (
        at_clients(rng.normal(size=(9, SIZE)).astype(np.float32)),
        at_clients(rng.random(9) < 0.6),
        at_clients(np.arange(9, dtype=np.uint32)),
        at_server(jax.random.key(5)),
    )
    check_agreement(send, on_mesh(mesh), *args)


def sequences(num_clients: int, is_packed: bool) -> fc.Sequence:
    rng = np.random.default_rng(num_clients)
    length = rng.integers(0, 4, num_clients).astype(np.int32)
    capacity, pool = 4, 1 + 4 * num_clients
    shape = (pool, SIZE) if is_packed else (num_clients, capacity, SIZE)
    start = np.arange(num_clients, dtype=np.int32) * (capacity if is_packed else 0)
    rows = rng.normal(size=shape).astype(np.float32)
    return fc.Sequence(rows, start, length, capacity, packed=is_packed)


@auto_or_explicit
@pytest.mark.parametrize(("is_packed", "lanes"), [(False, 1), (True, 1), (True, 2)])
def test_sequences(mesh, is_packed, lanes):
    """A pool of all clients' examples is on every device; padded sequences are spread."""

    @fc.federated_computation(ROWS, F32)
    def totals(rows, x):
        own = fc.federated_map(
            lambda rows, x: rows.reduce(x + jnp.zeros(SIZE), lambda t, row: t + row), rows, x
        )
        return own, fc.federated_sum(own)

    args = at_clients(sequences(7, is_packed)), at_clients(np.arange(7, dtype=np.float32))
    check_agreement(totals, on_mesh(mesh, lanes=lanes), *args)


@any_mesh
def test_inputs_from_anywhere(mesh):
    """NumPy arrays, arrays of one device, committed ones, and shards of the mesh; jit or not."""

    @fc.federated_computation(VECTOR)
    def centre(x):
        average = fc.federated_mean(x)
        shifted = fc.federated_map(lambda x, m: x - m, x, fc.federated_broadcast(average))
        return average, shifted

    x = np.arange(24, dtype=np.float32).reshape(8, SIZE)
    spread = NamedSharding(mesh, P("clients"))
    options = {
        "numpy": x,
        "array": jnp.asarray(x),
        "committed": jax.device_put(x, jax.devices()[2]),
        "spread": jax.device_put(x, spread),
        "whole": jax.device_put(x, NamedSharding(mesh, P())),
    }
    run = centre.lower(on_mesh(mesh))
    jitted = jax.jit(run)
    for name, value in options.items():
        for call in (run, jitted):
            if name == "committed" and call is not run:
                continue  # jax.jit refuses to mix devices before the library is asked
            (average, shifted), (up, down) = call(at_clients(value))
            assert (int(up), int(down)) == (8 * SIZE * 32, 8 * SIZE * 32)
            np.testing.assert_allclose(average.value, x.mean(axis=0), rtol=1e-6)
            np.testing.assert_allclose(shifted.value, x - x.mean(axis=0), rtol=1e-6)
            assert shifted.value.sharding.is_equivalent_to(spread, 2)
            assert average.value.sharding.is_fully_replicated


@any_mesh
def test_valid_and_values_that_are_sharded_by_the_caller(mesh):
    spread = NamedSharding(mesh, P("clients"))
    total = fc.federated_computation(fc.federated_sum, F32).lower(on_mesh(mesh))
    x = jax.device_put(np.arange(8, dtype=np.float32), spread)
    valid = jax.device_put(np.arange(8) % 2 == 0, spread)
    result, (bits,) = jax.jit(lambda x, valid: total(at_clients(x), valid=valid))(x, valid)
    assert (float(result.value), int(bits)) == (12, 4 * 32)


@pytest.mark.parametrize("mesh", [AUTO, MESHES["auto 2x2"]], ids=["auto", "auto 2x2"])
def test_captured_arrays_that_live_on_the_mesh(mesh):
    """Arrays that functions capture, one of them in a `jax.jit` of its own, and constants."""
    whole = NamedSharding(mesh, P())
    factor = jax.device_put(np.float32([1, 2, 3]), whole)
    shift = jax.device_put(np.arange(4, dtype=np.float32), NamedSharding(mesh, P("clients")))
    key = jax.device_put(jax.random.key(3), whole)
    inner = jax.jit(lambda x: x * factor)

    @fc.federated_computation(VECTOR, ROWS)
    def captured(x, rows):
        noise = fc.federated_map(lambda x: inner(x) + shift.sum() + jax.random.normal(key), x)
        sums = fc.federated_map(lambda r: r.reduce(factor, lambda t, row: t + row), rows)
        constant = fc.federated_broadcast(fc.federated_value(factor, fc.SERVER))
        both = fc.federated_map(lambda a, b, c: a + b + c, noise, sums, constant)
        return fc.federated_sum(both), both

    x = at_clients(np.ones((6, SIZE), np.float32))
    rows = sequences(6, is_packed=True)
    run = captured.lower(on_mesh(mesh))
    inside = np.arange(rows.capacity)[:, None] < rows.length
    own = rows.elements[(rows.start + np.arange(rows.capacity)[:, None]).clip(max=24)]
    sums = np.where(inside[..., None], own, 0).sum(axis=0)
    expected = 3 * np.float32([1, 2, 3]) + 6 + np.asarray(jax.random.normal(key)) + sums
    for call in (run, jax.jit(run)):
        (total, both), _ = call(x, at_clients(rows))
        np.testing.assert_allclose(both.value, expected, rtol=1e-5)
        np.testing.assert_allclose(total.value, expected.sum(axis=0), rtol=1e-5)


def test_captured_arrays_on_a_mesh_with_explicit_axes():
    """As constants they are placed, in functions they are an error with a way out."""
    factor = jax.device_put(np.float32([1, 2, 3]), NamedSharding(EXPLICIT, P()))

    @fc.federated_computation(VECTOR)
    def placed(x):
        at_all = fc.federated_broadcast(fc.federated_value(factor, fc.SERVER))
        return fc.federated_sum(fc.federated_map(jnp.multiply, x, at_all))

    captured = fc.federated_computation(
        lambda x: fc.federated_sum(fc.federated_map(lambda x: x * factor, x)), VECTOR
    )
    x = at_clients(np.ones((6, SIZE), np.float32))
    assert placed.lower(on_mesh(EXPLICIT))(x)[0].value.tolist() == [6, 12, 18]
    with pytest.raises(FederatedTypeError, match=r"`lambda` captures .*np\.asarray of it"):
        captured.lower(on_mesh(EXPLICIT))(x)


@auto_or_explicit
@pytest.mark.parametrize("num_clients", [3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("is_jitted", [False, True], ids=["eager", "jit"])
def test_gradients(mesh, num_clients, is_jitted):
    """J-55 with other numbers: d/ds of mean((s x)^2) = 2 s mean(x^2); no NaN from the padding."""

    @fc.federated_computation(F32, SERVER)
    def loss(x, s):
        root = lambda x, s: jnp.sqrt(jnp.square(x * s)) ** 2  # noqa: E731 - NaN gradient at 0
        return fc.federated_mean(fc.federated_map(root, x, fc.federated_broadcast(s)))

    lowered = loss.lower(on_mesh(mesh))

    def value(x, s):
        return lowered(at_clients(x), at_server(s))[0].value

    gradient = jax.grad(value, argnums=(0, 1))
    x = np.arange(1, num_clients + 1, dtype=np.float32)
    # Without the mesh JAX itself cannot make the cotangent of an array on an Explicit one.
    with jax.set_mesh(mesh):
        by_x, by_s = (jax.jit(gradient) if is_jitted else gradient)(x, jnp.float32(3))
    np.testing.assert_allclose(by_s, 2 * 3 * np.mean(x**2), rtol=1e-6)
    np.testing.assert_allclose(by_x, 2 * 9 * x / num_clients, rtol=1e-6)


def test_vmap_and_scan():
    """Several cohorts at once, and rounds one after the other: w moves halfway to the mean."""

    @fc.federated_computation(F32, SERVER)
    def step(x, w):
        return fc.federated_map(lambda m, w: w + (m - w) / 2, fc.federated_mean(x), w)

    lowered = step.lower(on_mesh())

    def value(x, w):
        return lowered(at_clients(x), at_server(w))[0].value

    cohorts = np.arange(12, dtype=np.float32).reshape(3, 4)
    batch = jax.jit(jax.vmap(value, (0, None)))(cohorts, jnp.float32(0))
    np.testing.assert_allclose(batch, cohorts.mean(axis=1) / 2, rtol=1e-6)
    last, _ = jax.jit(
        lambda x: jax.lax.scan(lambda w, _: (value(x, w), None), jnp.float32(0), length=3)
    )(np.full(5, 8, np.float32))
    assert float(last) == 7


@auto_or_explicit
def test_under_a_mesh_that_is_set(mesh):
    total = fc.federated_computation(lambda x: (fc.federated_sum(x), x), F32)
    x = at_clients(np.arange(1, 11, dtype=np.float32))
    with jax.set_mesh(mesh):
        for call in (total.lower(on_mesh(mesh)), jax.jit(total.lower(on_mesh(mesh)))):
            (result, same), _ = call(x)
            assert float(result.value) == 55
            assert (np.asarray(same.value) == x.value).all()


# Layouts of the results.


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "by data"])
def test_broadcast_to_a_mesh_of_clients_and_data(kind, sharded):
    """J-61: 100 clients x 10 on (2 clients, 2 data)."""
    mesh = jax.make_mesh((2, 2), ("clients", "data"), axis_types=(kind, kind))

    @fc.federated_computation(fc.FederatedType((np.float32, [10]), fc.SERVER))
    def spread(x):
        return fc.federated_map(lambda x: x + 0, fc.federated_broadcast(x))

    x = np.arange(10, dtype=np.float32)
    if sharded:
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
    result, _ = spread.lower(on_mesh(mesh))(at_server(x), num_clients=100)
    is_kept = sharded and kind is AxisType.Auto
    assert result.value.sharding.shard_shape((100, 10)) == ((50, 5) if is_kept else (50, 10))
    expected = P("clients", "data") if is_kept else P("clients")
    assert result.value.sharding.is_equivalent_to(NamedSharding(mesh, expected), 2)
    np.testing.assert_array_equal(result.value, np.tile(np.arange(10), (100, 1)))


def test_a_mesh_of_one_device_and_clients_over_two_axes():
    """J-61: on 1 x 1 everything is replicated; two axes of a mesh spread clients as one does."""

    @fc.federated_computation(VECTOR)
    def several(x):
        return fc.federated_sum(x), fc.federated_map(lambda x: 2 * x, x), fc.federated_collect(x)

    single = jax.make_mesh((1, 1), ("clients", "data"), axis_types=(AxisType.Auto,) * 2)
    both = on_mesh(MESHES["auto 2x2"], axis=("clients", "data"))
    assert both.num_shards == 4
    for size, execution, rows in ((5, on_mesh(single), 5), (7, both, None), (8, both, 2)):
        x = np.arange(size * SIZE, dtype=np.float32).reshape(size, SIZE)
        (total, twice, rows_of_all), _ = several.lower(execution)(at_clients(x))
        assert (np.asarray(total.value) == x.sum(axis=0)).all()
        assert (np.asarray(twice.value) == 2 * x).all()
        assert (np.asarray(rows_of_all.value.elements) == x).all()
        if rows:
            assert twice.value.sharding.shard_shape(x.shape) == (rows, SIZE)


# What the devices exchange.


def collectives_of(computation: Any, *args: Any, mesh: jax.sharding.Mesh = AUTO) -> dict[str, int]:
    return kinds_of(jax.jit(computation.lower(on_mesh(mesh))).lower(*args).compile())


def kinds_of(compiled: jax.stages.Compiled) -> dict[str, int]:
    """How many collectives of each kind a function takes."""
    kind = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    kinds = re.findall(rf" = .*? ({kind})(?:-start)?\(", str(compiled.as_text()))
    return {kind: kinds.count(kind) for kind in kinds}


@any_mesh
def test_one_all_reduce_for_each_round_trip(mesh):
    """Sums, counts, means, their weights and exact bits of two round trips: two all-reduces."""

    @fc.federated_computation(VECTOR, F32, fc.FederatedType(np.int32, fc.CLIENTS), SERVER)
    def rounds(x, weight, count, s):
        shifted = fc.federated_map(lambda x, s: x * s, x, fc.federated_broadcast(s))
        average = fc.federated_mean(shifted, weight)
        large = fc.federated_map(lambda x, m: x[0] > m[0], x, fc.federated_broadcast(average))
        total = fc.federated_sum(count, present=large)
        return average, total, fc.federated_mean(x, present=large), fc.federated_count(large)

    assert collectives_of(rounds, *everything_args(8), mesh=mesh) == {"all-reduce": 2}


def test_one_gather_for_all_extremes():
    """Who answers is counted in an all-reduce."""

    @fc.federated_computation(VECTOR)
    def extremes(x):
        return fc.federated_min(x), fc.federated_max(x)

    x = at_clients(np.ones((8, SIZE), np.float32))
    assert collectives_of(extremes, x) == {"all-reduce": 1, "all-gather": 1}
    smallest, largest = extremes.lower(on_mesh())(x)[0]
    assert smallest.value.tolist() == largest.value.tolist() == [1] * SIZE


def test_integers_ride_along_exactly():
    """Words of 32 bits modulo 2**32, counts of 64 bits exactly, beside sums of float32."""
    rng = np.random.default_rng(0)
    signed = rng.integers(-(2**31), 2**31, (4, 5)).astype(np.int32)
    unsigned = rng.integers(0, 2**32, (4, 2, 3), dtype=np.uint32)
    high, low = rng.integers(0, 2**28, 4), np.full(4, 2**32 - 1)
    counts = BitCount(np.uint32(high), np.uint32(low))
    for others in ((), (np.ones((4, 3), np.float32),), (np.ones(4, np.float16),)):
        add = lambda tree: collectives.add_up(jax.tree.map(lambda x: x[0], tree), "clients")  # noqa: E731
        run = jax.shard_map(add, mesh=AUTO, in_specs=P("clients"), out_specs=P(), check_vma=False)
        a, b, bits, sums = jax.jit(run)((signed, unsigned, counts, others))
        assert (np.asarray(a) == signed.sum(axis=0, dtype=np.int32)).all()
        assert (np.asarray(b) == unsigned.sum(axis=0, dtype=np.uint32)).all()
        assert int(bits) == sum((int(h) << 32) + int(w) for h, w in zip(high, low, strict=True))
        assert jax.tree.map(lambda x: x.tolist(), sums) == jax.tree.map(
            lambda x: x.sum(axis=0).tolist(), others
        )


# Algorithms.


def image_like(num_clients: int) -> fc.datasets.FederatedDataset:
    rng = np.random.default_rng(0)
    sizes = 1 + np.arange(num_clients) % 5
    return fc.datasets.from_clients(
        {
            f"client {i}": {
                "image": rng.integers(0, 256, (size, 28, 28, 1), dtype=np.uint8),
                "label": rng.integers(0, 10, size).astype(np.int32),
            }
            for i, size in enumerate(sizes)
        }
    )


def fed_avg(**options: Any) -> fc.algorithms.Algorithm:
    return fc.algorithms.fed_avg(
        fc.models.linear(), client_optimizer=optax.sgd(0.1), batch_size=2, **options
    )


@functools.cache
def rounds_on_one_device() -> list[tuple[Any, Any]]:
    """The states and metrics of two rounds with six clients."""
    data, algorithm = image_like(6), fed_avg()
    rounds = [(algorithm.init(jax.random.key(0)), None)]
    for _ in range(2):
        rounds.append(algorithm.update(rounds[-1][0], data.cohort(data.client_ids)))
    return rounds


@auto_or_explicit
def test_rounds_of_fed_avg(mesh):
    """Two rounds, in one all-reduce each: parameters, metrics and bits of one device.

    A compiled function takes arguments of one sharding only, so the second round shows that the
    state comes out of a round as `replicate` puts it in.
    """
    (start, _), *rounds = rounds_on_one_device()
    data = image_like(6)
    cohort, state = data.cohort(data.client_ids), replicate(start, on_mesh(mesh))
    update = jax.jit(fed_avg(execution=on_mesh(mesh)).update).lower(state, cohort).compile()
    assert kinds_of(update) == {"all-reduce": 1}
    for expected, wanted in rounds:
        state, metrics = update(state, cohort)
        pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True)
        for x, y in pairs:
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
        assert jax.tree.map(int, metrics.clients) == jax.tree.map(int, wanted.clients)
        np.testing.assert_allclose(metrics.train["loss"], wanted.train["loss"], rtol=1e-5)
        bits = [jax.tree.map(int, m.communication, is_leaf=is_bits) for m in (metrics, wanted)]
        assert bits[0] == bits[1]


@pytest.mark.parametrize(
    "mesh", [AUTO, pytest.param(EXPLICIT, marks=pytest.mark.slow)], ids=["auto", "explicit"]
)
@pytest.mark.parametrize("bits", [None, 8], ids=["raw", "8 bit"])
@pytest.mark.parametrize("is_spread", [False, True], ids=["whole", "spread"])
def test_a_round_trip_of_fed_avg_is_one_all_reduce(mesh, bits, is_spread):
    """Whatever travels and wherever the examples are."""
    data, execution = image_like(6), on_mesh(mesh)
    codec = None if bits is None else fc.compression.uniform_quantize(bits, min_size=0)
    algorithm = fed_avg(execution=execution, aggregator=fc.aggregators.mean(codec=codec))
    cohort = data.cohort(data.client_ids)
    if is_spread:
        cohort = fc.datasets.spread(cohort, execution)
    state = replicate(algorithm.init(jax.random.key(0)), execution)
    compiled = jax.jit(algorithm.update).lower(state, cohort).compile()
    assert kinds_of(compiled) == {"all-reduce": 1}


def is_bits(x: Any) -> bool:
    return isinstance(x, BitCount)


# Settings.


def test_execution_with_a_mesh():
    execution = on_mesh(lanes=3)
    assert hash(execution) == hash(on_mesh(lanes=3))
    assert execution == on_mesh(lanes=3) != on_mesh(EXPLICIT, lanes=3)
    assert [execution.num_lanes(n) for n in (0, 1, 4, 5, 9, 100)] == [1, 1, 1, 2, 3, 3]
    assert on_mesh(mode="stacked").num_lanes(10) == 3
    assert fc.Execution(mode="stacked").num_lanes(10) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": AUTO, "axis": "devices"}, r"which are \('clients',\), got 'devices'"),
        ({"mesh": AUTO, "axis": ("clients", "data")}, "got 'data'"),
        ({"mesh": AUTO, "axis": ()}, "name of a mesh axis"),
        ({"mesh": AUTO, "axis": ["clients"]}, "name of a mesh axis"),
        ({"mesh": AUTO, "axis": ("clients", "clients")}, "name of a mesh axis"),
        ({"mesh": AUTO, "mode": "reference"}, "no mesh in the reference mode"),
        ({"mesh": 4}, r"jax\.sharding\.Mesh, got 4"),
    ],
)
def test_settings_that_do_not_fit(options, message):
    with pytest.raises(ArgumentError, match=message):
        fc.Execution(**options)
