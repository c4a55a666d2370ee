"""One property: all ways to run a program agree, in their values and exactly in the bits.

Programs are drawn at random. Their numbers stay on a grid of quarters, on which sums are exact in
any order, so that rounding in a codec cannot tell one order of summation from another.
"""

import os
import pathlib
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

import fedjax_core as fc
from fedjax_core.compression.edges import PlacedKeys, downlink, uplink
from fedjax_core.execution.config import HOST_DRIVEN

# How many programs are drawn, by two tests at a time.
NUM_PROGRAMS = int(os.environ.get("FEDJAX_CORE_NUM_PROGRAMS", "6"))
NUM_PARTS = 2
SIZE = 5
KEY = fc.infer_type(jax.random.key(0))
STACKED = fc.Execution(mode="stacked")
ONE, *MANY = (fc.Execution(mode="streamed", lanes=lanes) for lanes in (1, 2, 3, 5))
MESH = jax.make_mesh((4,), ("clients",), axis_types=(AxisType.Auto,))
OTHERS = [
    fc.Execution(mode="unrolled", lanes=2),
    fc.Execution(mode="dispatched", lanes=1),
    fc.Execution(mode="dispatched", lanes=3),
]
SHARDED = [fc.Execution(mesh=MESH, lanes=lanes) for lanes in (1, 2)]
CODECS = [
    fc.compression.identity(),
    fc.compression.uniform_quantize(8, min_size=2),
    fc.compression.uniform_quantize(3, min_size=2, stochastic=False),
    fc.compression.uniform_quantize(4, min_size=100),
    fc.compression.top_k(0.4, min_size=2),
    fc.compression.chain(
        fc.compression.top_k(0.6, min_size=2), fc.compression.uniform_quantize(2, min_size=2)
    ),
]

PARAMETERS = {
    "x": fc.FederatedType((np.float32, [SIZE]), fc.CLIENTS),
    "weight": fc.FederatedType(np.float32, fc.CLIENTS),
    "count": fc.FederatedType(np.int32, fc.CLIENTS),
    "present": fc.FederatedType(np.bool_, fc.CLIENTS),
    "uid": fc.FederatedType(np.uint32, fc.CLIENTS),
    "rows": fc.FederatedType(fc.SequenceType({"row": (np.float32, [SIZE])}), fc.CLIENTS),
    "server": fc.FederatedType((np.float32, [SIZE]), fc.SERVER),
    "key": fc.FederatedType(KEY, fc.SERVER),
    "scale": fc.TensorType(np.float32),
}


def to_grid(x: jax.Array) -> jax.Array:
    """Quarters within +-16; the offset keeps what is computed in another order off the ties."""
    return jnp.clip(jnp.round(4 * x + 0.137), -64, 64) / 4


class Arguments(NamedTuple):
    """The placed arguments of a program in the order of `PARAMETERS`."""

    x: Any
    weight: Any
    count: Any
    present: Any
    uid: Any
    rows: Any
    server: Any
    key: Any
    scale: Any


class Drawn:
    """A body of a federated computation that applies operators at random."""

    def __init__(self, draw: Any, args: Arguments) -> None:
        self.draw = draw
        self.args = args
        self.clients = [args.x]
        self.server = [args.server]
        self.results = []
        self.number = 0

    def pick(self, options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def presence(self) -> Any:
        large = fc.federated_map(lambda x: x[0] > 0, self.pick(self.clients))
        return self.pick([None, self.args.present, large])

    def keys(self) -> PlacedKeys:
        shared = fc.federated_broadcast(self.args.key, name="seed")
        own = fc.federated_map(jax.random.fold_in, shared, self.args.uid)
        self.number += 1
        return PlacedKeys(self.args.key, shared, own).fold_in(self.number)

    def keep(self, value: Any) -> None:
        """Makes a server value a result, and what it is on the grid a value to go on with."""
        self.results.append(value)
        self.server.append(fc.federated_map(to_grid, value))

    def map_clients(self) -> None:
        function = self.pick([lambda x: to_grid(-x), lambda x: to_grid(x / 2), jnp.flip])
        self.clients.append(fc.federated_map(function, self.pick(self.clients)))

    def map_two(self) -> None:
        pair = self.pick(self.clients), self.pick(self.clients)
        function = self.pick([jnp.maximum, lambda a, b: to_grid(a - b)])
        self.clients.append(fc.federated_map(function, pair))

    def map_server(self) -> None:
        pair = self.pick(self.server), self.pick(self.server)
        self.server.append(fc.federated_map(lambda a, b: to_grid(a + b), *pair))

    def broadcast(self) -> None:
        self.clients.append(fc.federated_broadcast(self.pick(self.server)))

    def constant(self) -> None:
        value = np.arange(SIZE, dtype=np.float32)
        self.clients.append(fc.federated_value(value, fc.CLIENTS))
        self.clients.append(fc.federated_broadcast(fc.federated_value(value, fc.SERVER)))

    def zip_and_get(self) -> None:
        pair = {"a": self.pick(self.clients), "b": (self.args.count, self.pick(self.clients))}
        zipped = fc.federated_zip(pair)
        self.clients.append(zipped.b[1])
        self.clients.append(fc.federated_map(lambda p: to_grid(p["a"] * p["b"][0]), zipped))

    def reduce_rows(self) -> None:
        def reduce(start: jax.Array, rows: fc.Sequence) -> jax.Array:
            return to_grid(rows.reduce(start, lambda total, row: total + row["row"]))

        self.clients.append(fc.federated_map(reduce, self.pick(self.clients), self.args.rows))

    def sum(self) -> None:
        self.keep(fc.federated_sum(self.pick(self.clients), present=self.presence()))

    def sum_struct(self) -> None:
        value = (self.args.count, self.pick(self.clients))
        total = fc.federated_sum(value, present=self.presence())
        self.results.append(total[0])
        self.keep(total[1])

    def mean(self) -> None:
        weight = self.pick([None, self.args.weight, self.args.count])
        self.keep(fc.federated_mean(self.pick(self.clients), weight, present=self.presence()))

    def centre(self) -> None:
        """A whole round trip: what a client had before meets what came back."""
        x = self.pick(self.clients)
        self.keep(fc.federated_mean(x, present=self.presence()))
        average = fc.federated_broadcast(self.server[-1])
        self.clients.append(fc.federated_map(lambda x, m: to_grid(x - m), x, average))

    def extremes(self) -> None:
        extreme = self.pick([fc.federated_min, fc.federated_max])
        self.keep(extreme(self.pick(self.clients), present=self.presence()))
        self.results.append(extreme(self.args.count))

    def secure_sums(self) -> None:
        count = self.args.count
        self.results.append(fc.federated_secure_sum(count, 2, min_input=1, report_clipped=True))
        self.results.append(fc.federated_secure_modular_sum({"n": count}, {"n": 5}))
        self.results.append(fc.federated_secure_sum_bitwidth(count, 4))

    def collect(self) -> None:
        """A fold that depends on the order of the clients."""
        rows = fc.federated_collect(self.pick(self.clients))
        zero = np.zeros(SIZE, np.float32)
        self.keep(fc.sequence_reduce(rows, zero, lambda total, x: to_grid(total / 2 + x)))

    def select(self) -> None:
        source, count = self.pick(self.server), self.args.count
        keys = fc.federated_map(lambda n: jnp.stack([n, 2 * n - 1]), count)  # some out of range
        parts = fc.federated_select(keys, SIZE, source, lambda x, i: jnp.roll(x, i))
        self.clients.append(fc.federated_map(to_grid, fc.sequence_sum(parts)))

    def evaluate(self) -> None:
        row = fc.federated_eval(lambda: jnp.arange(SIZE, dtype=jnp.float32) / 4, fc.CLIENTS)
        self.clients.append(row)

    def place(self) -> None:
        placement = self.pick([fc.CLIENTS, fc.SERVER])
        scale = fc.federated_value(self.args.scale, placement)
        values = self.clients if placement is fc.CLIENTS else self.server
        values.append(fc.federated_map(lambda x, s: to_grid(s * x), self.pick(values), scale))
        self.results.append(self.args.scale)

    def sequences(self) -> None:
        rows = fc.sequence_map(lambda row: to_grid(row["row"] / 2), self.args.rows)
        self.clients.append(fc.federated_map(to_grid, fc.sequence_sum(rows)))

        def scan(rows: fc.Sequence) -> jax.Array:
            last, outputs = rows.batch(2).scan(
                jnp.zeros(SIZE), lambda c, b: (to_grid(c / 2 + b.examples.sum(0)), b.mask.sum())
            )
            return last + outputs.sum()

        self.clients.append(fc.federated_map(lambda rows: to_grid(scan(rows)), rows))

    def count(self) -> None:
        self.results.append(fc.federated_count(self.presence()))

    def aggregate(self) -> None:
        def accumulate(state: Any, x: jax.Array) -> Any:
            return [state[0] + 1, jnp.maximum(state[1], x)]

        def merge(a: Any, b: Any) -> Any:
            return a[0] + b[0], jnp.maximum(a[1], b[1])

        zero = (np.int32(0), np.full(SIZE, -16, np.float32))
        value = self.pick(self.clients)
        result = fc.federated_aggregate(value, zero, accumulate, merge, lambda s: (s[1], s[0]))
        self.results.append(result[1])
        self.keep(result[0])

    def send_up(self) -> None:
        nothing = fc.federated_value((), fc.SERVER), fc.federated_value((), fc.CLIENTS)
        value, codec = self.pick(self.clients), self.pick(CODECS)
        _, _, total = uplink(codec, self.keys(), *nothing, value, present=self.presence())
        self.keep(total)

    def send_down(self) -> None:
        received = downlink(self.pick(CODECS), self.keys(), self.pick(self.server))
        self.results.append(received)
        self.clients.append(fc.federated_map(to_grid, received))

    def run(self) -> Any:
        steps = [
            self.map_clients,
            self.map_two,
            self.map_server,
            self.broadcast,
            self.constant,
            self.zip_and_get,
            self.reduce_rows,
            self.sum,
            self.sum_struct,
            self.mean,
            self.centre,
            self.count,
            self.aggregate,
            self.extremes,
            self.secure_sums,
            self.collect,
            self.select,
            self.evaluate,
            self.place,
            self.sequences,
            self.send_up,
            self.send_down,
        ]
        for step in self.draw(st.lists(st.sampled_from(steps), min_size=3, max_size=6)):
            step()
        return [*self.results, self.server[-1], *self.clients]


def draw_program(draw: Any) -> fc.Computation:
    def body(x, weight, count, present, uid, rows, server, key, scale):
        return Drawn(
            draw, Arguments(x, weight, count, present, uid, rows, server, key, scale)
        ).run()

    return fc.federated_computation(body, *PARAMETERS.values())


def draw_rows(rng: np.random.Generator, num_clients: int, is_packed: bool) -> fc.Sequence:
    """Sequences of 0 to 3 examples, with garbage wherever no client looks."""
    capacity = 4
    length = rng.integers(0, 4, num_clients).astype(np.int32)
    rows = (1 + num_clients * capacity) if is_packed else capacity
    shape = (rows, SIZE) if is_packed else (num_clients, rows, SIZE)
    row = rng.integers(-8, 9, shape).astype(np.float32) / 4
    if is_packed:
        start = np.arange(num_clients, dtype=np.int32) * capacity
    else:
        start = np.zeros(num_clients, np.int32)
        row[np.arange(capacity) >= length[:, None]] = np.nan
    return fc.Sequence({"row": row}, start, length, capacity, packed=is_packed)


def draw_arguments(draw: Any, num_clients: int, valid: np.ndarray) -> list[Any]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.integers(-8, 9, (num_clients, SIZE)).astype(np.float32) / 4
    x[~valid] = np.nan
    clients = Arguments(
        x=x,
        weight=rng.integers(0, 4, num_clients).astype(np.float32),
        count=rng.integers(0, 4, num_clients).astype(np.int32),
        present=rng.random(num_clients) < 0.7,
        uid=rng.permutation(num_clients).astype(np.uint32),
        rows=draw_rows(rng, num_clients, draw(st.booleans())),
        server=rng.integers(-8, 9, SIZE).astype(np.float32) / 4,
        key=jax.random.key(3),
        scale=np.float32(rng.integers(-4, 5) / 4),
    )
    return [
        fc.Federated(value, t.placement) if isinstance(t, fc.FederatedType) else value
        for value, t in zip(clients, PARAMETERS.values(), strict=True)
    ]


def rows_of(result: Any, valid: np.ndarray) -> list[np.ndarray]:
    """The leaves of a result; of client values the rows of those who are valid."""
    leaves = jax.tree.leaves(result, is_leaf=lambda x: isinstance(x, fc.Federated))
    return [
        np.asarray(x)[valid if has_clients_axis(leaf) else ...]
        for leaf in leaves
        for x in jax.tree.leaves(leaf)
    ]


def has_clients_axis(value: Any) -> bool:
    is_federated = isinstance(value, fc.Federated)
    return is_federated and value.placement is fc.CLIENTS and not value.all_equal


def only_valid(value: Any, valid: np.ndarray) -> Any:
    """An argument with the rows of the clients that are valid; a pool is shared by all."""
    if not has_clients_axis(value):
        return value
    rows = value.value
    if isinstance(rows, fc.Sequence) and rows.packed:
        start, length = (np.asarray(x)[valid] for x in (rows.start, rows.length))
        return fc.Federated(
            fc.Sequence(rows.elements, start, length, rows.capacity, packed=True), fc.CLIENTS
        )
    return fc.Federated(jax.tree.map(lambda x: np.asarray(x)[valid], rows), fc.CLIENTS)


class Outcome(NamedTuple):
    """What one way to run a program gives; `rows` are those of clients that count."""

    result: Any
    bits: Any
    rows: np.ndarray


def lowered(computation: fc.Computation, args: list[Any], valid: np.ndarray, execution: Any) -> Any:
    run = computation.lower(execution)
    run = run if execution.mode in HOST_DRIVEN else jax.jit(run)
    return Outcome(*run(*args, valid=valid), valid)


def map_reduced(computation: fc.Computation, args: list[Any], valid: np.ndarray) -> Outcome:
    """The host loop, which knows nothing of padding."""
    args = [only_valid(arg, valid) for arg in args]
    form = fc.map_reduce_form(computation)
    result, bits = form.run_with_ledger(*args, num_clients=int(valid.sum()), group_size=2)
    return Outcome(result, bits, np.ones(valid.sum(), bool))


def exported(computation: fc.Computation, args: list[Any], valid: np.ndarray) -> Outcome:
    """Written to a file and read again; an empty cohort is one invalid client there."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "program"
        fc.export(computation, path, platforms=("cpu",))
        loaded = fc.load(path)
    result, bits = loaded.call_with_ledger(*args, valid=valid, num_clients=len(valid))
    return Outcome(result, bits, valid)


# Without shrinking, which would compile programs for minutes: a failing program is printed whole.
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(NUM_PARTS))
@settings(
    max_examples=NUM_PROGRAMS // NUM_PARTS,
    deadline=None,
    derandomize=False,  # or all parts would draw the same programs
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_all_ways_to_run_a_program_agree(part, data):
    """Each equals the reference interpreter, with any number of clients and any of them valid."""
    del part
    num_clients = data.draw(st.integers(0, 7))
    mask = data.draw(st.lists(st.booleans(), min_size=num_clients, max_size=num_clients))
    valid = np.array(mask, bool) | data.draw(st.booleans())
    computation = draw_program(data.draw)
    note(str(computation.program))
    args = draw_arguments(data.draw, num_clients, valid)
    many = data.draw(st.sampled_from([*MANY, *OTHERS]))
    sharded = data.draw(st.sampled_from(SHARDED))
    expected = lowered(computation, args, valid, fc.Execution(mode="reference"))
    outcomes = {
        str(execution): lowered(computation, args, valid, execution)
        for execution in (STACKED, ONE, many, sharded)
    }
    outcomes["MapReduce"] = map_reduced(computation, args, valid)
    outcomes["export"] = exported(computation, args, valid)
    for name, outcome in outcomes.items():
        check_same(name, outcome, expected)


def check_same(name: str, outcome: Outcome, expected: Outcome) -> None:
    """Exact in the bits, to rounding in the values."""
    assert [int(b) for b in outcome.bits] == [int(b) for b in expected.bits], name
    got, wanted = (rows_of(x.result, x.rows) for x in (outcome, expected))
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, err_msg=name)
