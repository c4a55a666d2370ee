"""What the parts of `simulation` share: sizes, figures, datasets, turns."""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax

import fedjax_core as fc
from benchmarks import workloads
from fedjax_core.datasets import FederatedDataset
from fedjax_core.learning.algorithm import Algorithm

SEED = 0
BATCH_SIZE = 20
LEARNING_RATE = 0.1
MEAN_SIZE, SIGMA, LARGEST = 100, 1.0, 600  # log-normal: mu = log(mean) - sigma^2 / 2
MB = 1e6


class Sizes(NamedTuple):
    """How much is measured: what the figures are of, but for a smoke run.

    Attributes:
      repeats: of what is compared.
      calls: of a round that has little to compute, in one measurement.
      examples: of each client, where all have as many.
      few, many, most: clients.
      speakers: from the one who says most to the one who says least.
      cohorts: different ones that may not compile anything.
      rounds: of one run.
      rates: of a sweep.
      emnist: clients, examples of all, clients a round, rounds.
    """

    repeats: int = 5
    calls: int = 200
    examples: int = 100
    few: int = 10
    many: int = 100
    most: int = 1_000
    speakers: int = 12
    cohorts: int = 30
    rounds: int = 200
    rates: int = 16
    emnist: tuple[int, int, int, int] = (3_400, 671_585, 100, 100)


FULL = Sizes()


QUICK = Sizes(
    repeats=1,
    calls=2,
    examples=3,
    few=2,
    many=4,
    most=6,
    speakers=2,
    cohorts=2,
    rounds=3,
    rates=2,
    emnist=(6, 40, 2, 2),
)


class Figure(NamedTuple):
    """A number and what it has to be.

    Attributes:
      name: of the number.
      value: of the number.
      limit: None for one that is told only.
      bound: whether the limit is the largest or the smallest number allowed.
      unit: "x" for ratios.
    """

    name: str
    value: float
    limit: float | None = None
    bound: Literal["at most", "at least"] = "at most"
    unit: str = "x"

    @property
    def is_met(self) -> bool:
        """Whether the number is within its limit; a number that is none is not."""
        if self.limit is None:
            return True
        return self.value <= self.limit if self.bound == "at most" else self.value >= self.limit


class Found(NamedTuple):
    """What a part found.

    Attributes:
      figures: of it.
      notes: what else a person wants to know.
    """

    figures: list[Figure]
    notes: dict[str, Any] = {}  # noqa: RUF012 - never changed


def fed_avg(model: fc.models.Model, **options: Any) -> Algorithm:
    """Federated averaging with local SGD, unless `options` say otherwise."""
    options = {"client_optimizer": optax.sgd(LEARNING_RATE), "batch_size": BATCH_SIZE, **options}
    return fc.algorithms.fed_avg(model, **options)


def images(lengths: np.ndarray) -> FederatedDataset:
    """Clients with so many random images of the size of MNIST's, uint8 as they are stored."""
    rng = np.random.default_rng(SEED)
    total = int(lengths.sum())
    examples = {
        "image": rng.integers(0, 256, (total, 28, 28, 1), dtype=np.uint8),
        "label": rng.integers(0, 10, total, dtype=np.int32),
    }
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return FederatedDataset(examples, offsets, tuple(f"client {i}" for i in range(len(lengths))))


def prototypes(sizes: Sizes) -> FederatedDataset:
    """Clients whose images have something to learn, as in the benchmark of rounds."""
    workload = workloads.WORKLOADS["cnn"]
    examples = (sizes.examples, sizes.examples)
    data = workloads.make(dataclasses.replace(workload, num_clients=sizes.few, examples=examples))
    ids = tuple(f"client {i}" for i in range(sizes.few))
    return FederatedDataset(data.features, data.offsets, ids)


def unequal_lengths(num_clients: int) -> np.ndarray:
    """Log-normal numbers of examples, int64 ``[num_clients]``."""
    rng = np.random.default_rng(SEED)
    draws = rng.lognormal(np.log(MEAN_SIZE) - SIGMA**2 / 2, SIGMA, num_clients)
    return np.clip(draws, 1, LARGEST).astype(np.int64)


def one_by_one(
    algorithm: Algorithm, state: Any, source: Any, sampler: Callable[[int], Any], num_rounds: int
) -> Any:
    """The plain loop of `update`: the state after so many rounds from that of `state`."""
    first = int(state.round)
    for r in range(first, first + num_rounds):
        state, _ = algorithm.update(state, source.cohort(sampler(r)))
    return jax.block_until_ready(state)


def warm_up(*ways: Callable[[], Any]) -> None:
    """Runs each way once, which compiles it."""
    for way in ways:
        way()


def alternate(repeats: int, *ways: Callable[[], Any]) -> list[list[float]]:
    """The seconds of each way, by repeat; they take turns."""
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats):
        for way, times in zip(ways, seconds, strict=True):
            begin = time.perf_counter()
            way()
            times.append(time.perf_counter() - begin)
    return seconds


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median of the ratios within each repeat."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def largest_difference(a: Any, b: Any) -> float:
    """Of the numbers in two trees; not a number if one of them is none."""
    differences = jax.tree.map(lambda x, y: np.max(np.abs(np.asarray(x) - np.asarray(y))), a, b)
    return float(np.max(jax.tree.leaves(differences)))


def same_bits(a: Any, b: Any) -> bool:
    """Whether the parameters of two states are equal bit by bit."""
    pairs = zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def memory() -> dict[str, float]:
    """Of this process in MB: resident now ("VmRSS"), and the most so far ("VmHWM")."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: 1024 * int(fields[name].split()[0]) / MB for name in ("VmRSS", "VmHWM")}
