"""Several devices and several processes: the same round as on one device."""

import functools
import os
import pathlib
import socket
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fedjax_core as fc
from fedjax_core import datasets, models
from fedjax_core.aggregators import mean
from fedjax_core.compression import Keys, Symbols, uniform_quantize
from fedjax_core.datasets import spread
from fedjax_core.errors import ArgumentError, FederatedTypeError

# All in one process, which makes what they share once.
pytestmark = pytest.mark.xdist_group("processes")

SIZES = (17, 3, 0, 28, 9, 5, 14)  # seven clients: not divisible by four devices
CLIENTS = [f"client {k}" for k in range(len(SIZES))]


def make_dataset():
    rng = np.random.default_rng(0)
    return datasets.from_clients(
        {
            name: {
                "image": rng.integers(0, 255, (size, 28, 28, 1), dtype=np.uint8),
                "label": rng.integers(0, 10, size).astype(np.int32),
            }
            for name, size in zip(CLIENTS, SIZES, strict=True)
        }
    )


def make_algorithm(execution=fc.Execution(), codec=None, model=None):  # noqa: B008 - frozen
    return fc.algorithms.fed_avg(
        model or models.linear(),
        client_optimizer=optax.sgd(0.1),
        batch_size=4,
        aggregator=mean(codec=codec),
        execution=execution,
    )


def flat(params):
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(params)])


def one_round(execution=fc.Execution(), cohort=None, **parts):  # noqa: B008 - frozen
    algorithm = make_algorithm(execution, **parts)
    state = algorithm.init(jax.random.key(0), len(CLIENTS))
    return algorithm.update(state, cohort or make_dataset().cohort(CLIENTS))


@functools.cache
def plain_round(size=7):
    """The round of the first clients on one device."""
    return one_round(cohort=make_dataset().cohort(CLIENTS[:size]))


# What the clients send, symbol by symbol.


class Sent(NamedTuple):
    """What a quantised round sent, and what it made of that: NumPy arrays by tensor.

    Attributes:
      codes: of each tensor, ``[clients, ...]``; symbols, zeros of a client that sent none.
      step: the distance of two levels of each tensor, ``[clients]``.
      params: after the round.
    """

    codes: list[np.ndarray]
    step: list[np.ndarray]
    params: list[np.ndarray]


def remembering(codec):
    """The codec, whose senders remember the message that they sent: so the state shows it."""

    def message(value):
        keys = Keys(jax.random.key(0), jax.random.key(0))
        return codec.encode(keys, (), (), value)[1]

    def init(template):
        return (), jax.tree.map(jnp.zeros_like, jax.eval_shape(message, template))

    def encode(keys, memory, hints, value):
        sent = codec.encode(keys, (), hints, value)[1]
        return sent, sent

    return codec._replace(init=init, encode=encode)


def quantised_round(execution=fc.Execution(), cohort=None, model=None):  # noqa: B008 - frozen
    codec = remembering(uniform_quantize(8, min_size=1000))
    state, metrics = one_round(execution, cohort, codec=codec, model=model)
    assert int(metrics.clients["num_participants"]) == 6
    sent = state.clients.aggregator
    if execution.mesh is not None:  # each process has its own rows only
        everywhere = NamedSharding(execution.mesh, P())
        sent = jax.jit(lambda x: x, out_shardings=everywhere)(sent)
    rows = jax.tree.map(lambda x: np.asarray(x)[: len(CLIENTS)], sent)
    is_symbols = lambda x: isinstance(x, Symbols)  # noqa: E731
    pairs = zip(jax.tree.leaves(rows.payload, is_leaf=is_symbols), rows.side, strict=True)
    quantised = [(x.codes, (side[:, 1] - side[:, 0]) / 255) for x, side in pairs if is_symbols(x)]
    codes, step = map(list, zip(*quantised, strict=True))
    return Sent(codes, step, list(map(np.asarray, jax.tree.leaves(state.params))))


def check_sent(found, expected):
    """At most 1e-4 of the symbols differ, and a parameter by no more than its symbols make it."""
    pairs = list(zip(found.codes, expected.codes, strict=True))
    flipped = sum(int((x != y).sum()) for x, y in pairs)
    assert flipped <= 1e-4 * sum(x.size for x in found.codes)
    levels = [np.abs(x.astype(np.int64) - y) for x, y in pairs]
    # The value was multiplied by its weight before it was quantised: a level of a client moves the
    # mean by its step divided by the weight of all.
    bounds = [
        np.tensordot(step, level, axes=1) / sum(SIZES)
        for step, level in zip(expected.step, levels, strict=True)
    ]
    by_shape = {bound.shape: bound for bound in bounds}  # that of a tensor that went raw is zero
    for x, y in zip(found.params, expected.params, strict=True):
        assert np.all(np.abs(x - y) <= by_shape.get(x.shape, 0) + 1e-5)


@pytest.fixture(scope="module")
def on_one_device():
    return quantised_round()


def test_what_is_compared_are_the_symbols(on_one_device):
    """All that six clients send, one not at all; what the bound forgives, and what it does not."""
    (codes,), (step,), params = on_one_device
    assert codes.shape == (7, 784, 10)
    assert [int(np.ptp(row)) for row in codes] == [255, 255, 0, 255, 255, 255, 255]
    kernel = [x.shape for x in params].index(codes.shape[1:])
    at = tuple(np.argwhere(codes[3] < 255)[0])
    others, moved = codes.copy(), [x.copy() for x in params]
    others[(3, *at)] += 1
    moved[kernel][at] += step[3] / sum(SIZES)
    check_sent(Sent([others], [step], moved), on_one_device)
    with pytest.raises(AssertionError):  # no symbol of this parameter differs
        check_sent(Sent([codes], [step], moved), on_one_device)
    moved[kernel][at] += step[3] / sum(SIZES)
    with pytest.raises(AssertionError):
        check_sent(Sent([others], [step], moved), on_one_device)
    others.reshape(-1)[::5_000] ^= 1
    with pytest.raises(AssertionError):  # 2e-4 of the symbols
        check_sent(Sent([others], [step], params), on_one_device)


@pytest.mark.parametrize(
    ("lanes", "is_spread"), [pytest.param(1, False, marks=pytest.mark.slow), (2, True)]
)
def test_symbols_on_four_devices(on_one_device, lanes, is_spread):
    execution = fc.Execution(mesh=jax.make_mesh((4,), ("clients",)), lanes=lanes)
    cohort = make_dataset().cohort(CLIENTS)
    found = quantised_round(execution, spread(cohort, execution) if is_spread else cohort)
    check_sent(found, on_one_device)


@pytest.mark.slow
def test_symbols_of_a_network_on_four_devices():
    """196,800 symbols of each client, where the order of a summation may flip some."""
    execution = fc.Execution(mesh=jax.make_mesh((4,), ("clients",)), lanes=2)
    found, expected = (
        quantised_round(e, model=models.two_nn()) for e in (execution, fc.Execution())
    )
    assert sum(x.size for x in found.codes) == 7 * (196_800 + 2_000)
    check_sent(found, expected)


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_fewer_clients_than_devices_and_a_number_they_do_not_divide(size):
    cohort = make_dataset().cohort(CLIENTS[:size])
    expected, _ = plain_round(size)
    found, metrics = one_round(fc.Execution(mesh=jax.make_mesh((4,), ("clients",))), cohort)
    assert int(metrics.clients["num_clients"]) == size
    np.testing.assert_allclose(flat(found.params), flat(expected.params), atol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [
        jax.sharding.AxisType.Auto,
        pytest.param(jax.sharding.AxisType.Explicit, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("lanes", [1, 2])
def test_a_cohort_that_is_spread(kind, lanes):
    mesh = jax.make_mesh((4,), ("clients",), axis_types=(kind,))
    execution = fc.Execution(mesh=mesh, lanes=lanes)
    cohort = spread(make_dataset().cohort(CLIENTS), execution)
    assert cohort.num_clients == 8
    assert cohort.pools == 4
    assert len(cohort.examples["image"].sharding.device_set) == 4
    expected, theirs = plain_round()
    found, ours = one_round(execution, cohort=cohort)
    np.testing.assert_allclose(flat(found.params), flat(expected.params), atol=1e-5)
    assert int(ours.clients["num_clients"]) == int(theirs.clients["num_clients"]) == 7
    for row in ("params", "seed"):
        bits = (x.communication.broadcast[row] for x in (ours, theirs))
        assert len({int(x) for x in bits}) == 1


def test_each_device_has_the_examples_of_its_own_clients():
    mesh = jax.make_mesh((4,), ("clients",))
    cohort = spread(make_dataset().cohort(CLIENTS), fc.Execution(mesh=mesh))
    # The longest clients first, there and back: 28 and 3, 17 and 5, 14 and 9, then two without.
    rows = sorted(sum(np.asarray(x.data)) for x in cohort.length.addressable_shards)
    assert rows == sorted([28, 17 + 0, 14 + 3, 9 + 5])
    assert cohort.examples["label"].shape == (4 * 32,)


def test_a_spread_cohort_needs_its_mesh():
    mesh = jax.make_mesh((4,), ("clients",))
    cohort = spread(make_dataset().cohort(CLIENTS), fc.Execution(mesh=mesh))
    with pytest.raises(ArgumentError, match="expected a mesh of 4 devices"):
        one_round(cohort=cohort)
    with pytest.raises(ArgumentError, match="with a mesh"):
        spread(make_dataset().cohort(CLIENTS), fc.Execution())
    with pytest.raises(FederatedTypeError, match=r"as dataset\.cohort"):
        spread(cohort, fc.Execution(mesh=mesh))


WORKER = """
import sys
import jax
import numpy as np

rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
sys.path.insert(0, sys.argv[4])
import test_processes as shared

import fedjax_core as fc
from fedjax_core.datasets import spread

mesh = jax.make_mesh((4,), ("clients",))
execution = fc.Execution(mesh=mesh)
dataset = shared.make_dataset()
cohort = spread(dataset.cohort(shared.CLIENTS[:5] if rank == 0 else shared.CLIENTS[5:]), execution)
state, metrics = shared.one_round(execution, cohort)
assert int(metrics.clients["num_clients"]) == 7, metrics.clients
np.savez(f"{folder}/raw_{rank}.npz", shared.flat(state.params))
sent = shared.quantised_round(execution, cohort)
for name, arrays in sent._asdict().items():
    np.savez(f"{folder}/{name}_{rank}.npz", *arrays)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_of_two_devices(tmp_path, on_one_device):
    """As one device with the data of all, each process with the data of its own clients."""
    here = pathlib.Path(__file__).parent
    flags = "--xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    arguments = [str(free_port()), str(tmp_path), str(here)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    expected, _ = plain_round()
    for rank in (0, 1):
        (params,) = arrays_in(tmp_path / f"raw_{rank}.npz")
        np.testing.assert_allclose(params, flat(expected.params), atol=1e-5)
        sent = Sent(*(arrays_in(tmp_path / f"{name}_{rank}.npz") for name in Sent._fields))
        check_sent(sent, on_one_device)


def arrays_in(path):
    with np.load(path) as file:
        return [file[name] for name in file.files]
