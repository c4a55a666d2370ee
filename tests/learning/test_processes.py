"""Several devices and several processes: the same round as on one device."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

import fedjax_core as fc
from fedjax_core import datasets, models
from fedjax_core.aggregators import mean
from fedjax_core.compression import uniform_quantize
from fedjax_core.datasets import spread
from fedjax_core.errors import ArgumentError, FederatedTypeError

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


def make_algorithm(execution=fc.Execution(), codec=None):  # noqa: B008 - frozen
    model = models.linear()
    return fc.algorithms.fed_avg(
        model,
        client_optimizer=optax.sgd(0.1),
        batch_size=4,
        aggregator=mean(codec=codec),
        execution=execution,
    )


def flat(params):
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(params)])


def one_round(execution=fc.Execution(), codec=None, cohort=None):  # noqa: B008 - frozen
    algorithm = make_algorithm(execution, codec)
    state = algorithm.init(jax.random.key(0))
    return algorithm.update(state, cohort or make_dataset().cohort(CLIENTS))


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
@pytest.mark.parametrize("lanes", [1, 2])
def test_a_cohort_that_is_spread(kind, lanes):
    mesh = jax.make_mesh((4,), ("clients",), axis_types=(kind,))
    execution = fc.Execution(mesh=mesh, lanes=lanes)
    cohort = spread(make_dataset().cohort(CLIENTS), execution)
    assert cohort.num_clients == 8
    assert cohort.pools == 4
    assert len(cohort.examples["image"].sharding.device_set) == 4
    expected, theirs = one_round()
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
from fedjax_core.compression import uniform_quantize

mesh = jax.make_mesh((4,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))
execution = fc.Execution(mesh=mesh)
dataset = shared.make_dataset()
own = shared.CLIENTS[:5] if rank == 0 else shared.CLIENTS[5:]
for name, codec in (("raw", None), ("quantised", uniform_quantize(8))):
    cohort = spread(dataset.cohort(own), execution)
    state, metrics = shared.one_round(execution, codec, cohort)
    assert int(metrics.clients["num_clients"]) == 7, metrics.clients
    np.save(f"{folder}/{name}_{rank}.npy", shared.flat(state.params))
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_of_two_devices(tmp_path):
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
    expected, _ = one_round()
    for params in (np.load(tmp_path / f"raw_{rank}.npy") for rank in (0, 1)):
        np.testing.assert_allclose(params, flat(expected.params), atol=1e-5)
    # Flipped symbols: few parameters differ, and by no more than the step of the quantiser.
    expected, _ = one_round(codec=uniform_quantize(8))
    for params in (np.load(tmp_path / f"quantised_{rank}.npy") for rank in (0, 1)):
        difference = np.abs(params - flat(expected.params))
        assert (difference > 1e-5).mean() <= 1e-3
        assert difference.max() < 0.1
