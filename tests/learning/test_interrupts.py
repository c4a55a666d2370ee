"""Ctrl-C: a run ends at a safe place, and what goes on from there has the bits of a whole one."""

import os
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import optax
import pytest

import fedjax_core as fc
from fedjax_core import datasets, models
from fedjax_core.datasets import sampling

NUM_ROUNDS = 9


def dataset():
    rng = np.random.default_rng(0)
    return datasets.from_clients(
        {
            f"client {k}": {
                "image": rng.integers(0, 255, (size, 3), dtype=np.uint8),
                "label": rng.integers(0, 2, size).astype(np.int32),
            }
            for k, size in enumerate((5, 3, 0, 7, 2))
        }
    )


def make():
    model = models.linear(num_classes=2, input_shape=(3,))
    algorithm = fc.algorithms.fed_avg(model, client_optimizer=optax.sgd(0.1), batch_size=4)
    return algorithm, algorithm.init(jax.random.key(0))


def pressing(sampler, at):
    """The sampler, during whose draw for round `at` Ctrl-C is pressed."""

    def draw(number):
        if number == at:
            signal.raise_signal(signal.SIGINT)
        return sampler(number)

    return draw


def check_same_params(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert int(found.round) == int(expected.round)


@pytest.fixture(scope="module")
def whole():
    """The algorithm, its first state, and all rounds without an interruption."""
    algorithm, state = make()
    data = dataset()
    expected = algorithm.run(state, data, sampling.uniform(data, 3), num_rounds=NUM_ROUNDS)
    return algorithm, state, expected


@pytest.mark.parametrize(
    ("at", "done"),
    [
        pytest.param(0, 3, marks=pytest.mark.slow),
        (4, 6),
        pytest.param(8, 9, marks=pytest.mark.slow),
    ],
)
def test_a_run_ends_after_the_dispatch_in_progress(whole, at, done):
    algorithm, state, (expected, metrics) = whole
    data = dataset()
    sampler = sampling.uniform(data, 3)
    handler = signal.getsignal(signal.SIGINT)
    part, rows = algorithm.run(
        state, data, pressing(sampler, at), num_rounds=NUM_ROUNDS, rounds_per_dispatch=3
    )
    assert signal.getsignal(signal.SIGINT) is handler
    assert int(part.round) == len(rows.train["loss"]) == done
    rest, more = algorithm.run(part, data, sampler, num_rounds=NUM_ROUNDS - done)
    check_same_params(rest, expected)
    losses = np.concatenate([rows.train["loss"], more.train["loss"]])
    np.testing.assert_array_equal(losses, metrics.train["loss"])


def test_nothing_is_lost_where_the_host_only_waits(whole):
    """All rounds in one dispatch: Ctrl-C comes while the device computes."""
    algorithm, state, _ = whole
    data = dataset().on_device()
    settings = {"num_rounds": 4096, "rounds_per_dispatch": 4096}
    algorithm.run(state, data, sampling.uniform(data.dataset, 3), **settings)  # compiles
    drawn = []

    def press():
        while len(drawn) < settings["num_rounds"]:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    def draw(number):
        drawn.append(number)
        return ["client 0", "client 1", "client 3"]

    thread = threading.Thread(target=press)
    thread.start()
    part, rows = algorithm.run(state, data, draw, **settings)
    thread.join()
    assert int(part.round) == len(rows.train["loss"]) == settings["num_rounds"]


def test_a_training_is_interrupted_and_goes_on(whole):
    algorithm, state, (expected, _) = whole
    data = dataset()
    sampler = sampling.uniform(data, 3)
    part, history = fc.train(
        algorithm, data, pressing(sampler, 4), num_rounds=NUM_ROUNDS, state=state
    )
    assert history.interrupted
    assert int(part.round) == len(history) == 5
    rest, more = fc.train(algorithm, data, sampler, num_rounds=NUM_ROUNDS - 5, state=part)
    assert not more.interrupted
    check_same_params(rest, expected)


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import jax
import test_interrupts as shared
import fedjax_core as fc
from fedjax_core.datasets import sampling

algorithm, state = shared.make()
data = shared.dataset()
sampler = sampling.uniform(data, 3)

def draw(number):
    print("round", number, flush=True)
    return sampler(number)

if sys.argv[2] == "run":
    state, _ = algorithm.run(state, data, draw, num_rounds=10**6, rounds_per_dispatch=4)
else:
    state, _ = fc.train(algorithm, data, draw, num_rounds=10**6, state=state)
fc.save(sys.argv[3], state)
"""


@pytest.mark.parametrize("how", [pytest.param("run", marks=pytest.mark.slow), "train"])
def test_control_c_at_a_real_process(whole, tmp_path, how):
    """SIGINT somewhere in the middle; the state that it saved is that of as many rounds."""
    algorithm, state, _ = whole
    here, path = os.path.dirname(__file__), tmp_path / "state"
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, here, how, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line == "round 10\n":
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "finishing what is in progress" in errors
    found = fc.load(path, state)
    num_rounds = int(found.round)
    assert num_rounds >= 10
    assert how == "train" or num_rounds % 4 == 0
    data = dataset()
    sampler = sampling.uniform(data, 3)
    check_same_params(found, algorithm.run(state, data, sampler, num_rounds=num_rounds)[0])
