"""What simulation promises, each figure beside its limit.

    python benchmarks/simulation.py
    python benchmarks/simulation.py --parts unequal,overhead
    python benchmarks/simulation.py --quick

| part         | question                                                                          |
|--------------|-----------------------------------------------------------------------------------|
| unequal      | how many steps of local SGD do clients of unequal sizes cost, over those needed?  |
| speakers     | and how much faster is that than to pad every client to the largest?              |
| compilations | does a fresh cohort compile anything?                                             |
| memory       | how much do a large cohort and many rounds take?                                  |
| emnist       | does a dataset as large as federated EMNIST load, and do 100 rounds of it run?    |
| run          | what does `run` save over single calls of `update`, and are the bits the same?    |
| sweep        | what does a sweep in one program save over single runs?                           |
| overhead     | what does a round cost that has next to nothing to compute?                       |
| growth       | do ten times the clients take ten times the time?                                 |
| choice       | what does `explain` say, and what would another choice cost?                      |
| codecs       | what does compression add to a round, and how long does the host code a message?  |

Every part runs in a fresh process, so that peaks of memory are its own. What is compared takes
turns; ratios are medians of those within a repeat, so that a busy machine is the same for both.
Speakers need the environment variable FEDJAX_CORE_DATA, see `workloads`.

Prints a table and writes it as JSON, each part with the machine, the versions and the commit. A
part of the file that is not measured now stays as it is. The status is 1 if a figure misses its
limit or a part fails.
"""

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

# A part runs as a script: its neighbours import each other as a package.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import fedjax_core as fc
from benchmarks import workloads
from benchmarks.machine import describe_machine
from benchmarks.peers import jax_lstm
from fedjax_core import compression
from fedjax_core.datasets import DeviceDataset, FederatedDataset, partition, sampling
from fedjax_core.learning.algorithm import Algorithm, federated_learning
from fedjax_core.learning.batching import shuffle, take_batch
from fedjax_core.learning.client_work import ClientOutput, ClientWork

SEED = 0
BATCH_SIZE = 20
LEARNING_RATE = 0.1
MEAN_SIZE, SIGMA, LARGEST = 100, 1.0, 600  # log-normal: mu = log(mean) - sigma^2 / 2
CHARACTERS = 20  # of a speaker's sequence: the same steps as with all 80, in a quarter of the time
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


def unequal(sizes: Sizes) -> Found:
    """Steps of local SGD that the waves execute, over those that the clients need.

    Counted where they are executed: by a call back from the loss, once for each client and step.
    """
    lengths = unequal_lengths(2 * sizes.many)
    dataset = images(lengths)
    needed = int((-(-lengths // BATCH_SIZE)).sum())
    figures, executed = [], {}
    for lanes, limit in ((8, 1.3), (16, None)):
        count = executed_steps(dataset, fc.Execution(lanes=lanes))
        executed[lanes] = count
        figures.append(Figure(f"steps executed / needed, {lanes} lanes", count / needed, limit))
    law = f"log-normal, mu {np.log(MEAN_SIZE) - SIGMA**2 / 2:.3f}, sigma {SIGMA}"
    notes = {"sizes": f"{law}, clipped to 1..{LARGEST}, mean {lengths.mean():.1f}"}
    return Found(figures, notes | {"needed": needed, "executed": executed})


def executed_steps(dataset: FederatedDataset, execution: fc.Execution) -> int:
    """The steps of one round of all clients, those whose result is thrown away included."""
    count = 0

    def note(_: Any) -> None:
        nonlocal count
        count += 1

    model = fc.models.linear()

    def loss(key: Any, variables: Any, batch: Any, mask: Any, train: bool) -> Any:
        jax.debug.callback(note, mask)
        return model.loss(key, variables, batch, mask, train)

    algorithm = fed_avg(model._replace(loss=loss), execution=execution)
    state = algorithm.init(jax.random.key(SEED))
    jax.block_until_ready(algorithm.update(state, dataset.cohort(dataset.client_ids)))
    jax.effects_barrier()
    return count


def speakers(sizes: Sizes) -> Found:
    """Our round on speakers, who say more or less, against one that pads all to the largest."""
    workload = workloads.WORKLOADS["shakespeare"]
    reason = workloads.missing(workload)
    if reason:
        raise LookupError(reason)
    data = workloads.make(workload)
    tokens = {"tokens": data.features["tokens"][:, : CHARACTERS + 1]}
    ids = tuple(f"speaker {i}" for i in range(len(data.sizes)))
    dataset = FederatedDataset(tokens, data.offsets, ids)
    order = np.argsort(-data.sizes, kind="stable")
    if sizes is QUICK:
        order = order[-20:]
    chosen = order[np.linspace(0, len(order) - 1, sizes.speakers).round().astype(int)]
    cohort = dataset.cohort_at(chosen)
    lengths = data.sizes[chosen]
    steps = -(-lengths // BATCH_SIZE)
    model = character_lstm(workloads.initial_params(workload, data))
    optimizer = optax.sgd(workload.learning_rate)
    ours = fed_avg(model, client_optimizer=optimizer)
    work = padded_training(model, optimizer, num_steps=int(steps.max()))
    padded = federated_learning(model, work, fc.aggregators.mean(), optax.sgd(1.0))
    state = ours.init(jax.random.key(SEED))
    # Compiled ahead of time, for a round of its own to warm up takes long.
    compiled = [jax.jit(x.update).lower(state, cohort).compile() for x in (ours, padded)]
    after: list[Any] = [None, None]

    def take(k: int) -> None:
        after[k] = jax.block_until_ready(compiled[k](state, cohort))[0]

    seconds = alternate(min(sizes.repeats, 3), functools.partial(take, 0), lambda: take(1))
    difference = largest_difference(after[0].params, after[1].params)
    return Found(
        [
            Figure("padded to the largest / ours", ratio(seconds[1], seconds[0]), 4, "at least"),
            Figure("steps of the padded round / needed", len(steps) * steps.max() / steps.sum()),
            Figure("largest difference of a parameter", difference, 1e-5, unit=""),
        ],
        {"sequences": lengths.tolist(), "characters": CHARACTERS, "seconds": seconds},
    )


def character_lstm(params: workloads.Params) -> fc.models.Model:
    """The LSTM of the benchmark of rounds, for sequences of `CHARACTERS`."""

    def init(key: jax.Array) -> dict[str, dict[str, jax.Array]]:
        tree: dict[str, dict[str, jax.Array]] = {}
        for path, x in params.items():
            layer, name = path.split("/")
            tree.setdefault(layer, {})[name] = jnp.asarray(x)
        return tree

    return fc.models.from_functions(
        init,
        lambda params, batch, key, train: jax_lstm.losses(params, batch["tokens"]),
        loss=lambda losses, batch: losses,
        input_spec={"tokens": jax.ShapeDtypeStruct((CHARACTERS + 1,), jnp.int32)},
    )


def padded_training(
    model: fc.models.Model, optimizer: optax.GradientTransformation, *, num_steps: int
) -> ClientWork:
    """One epoch of local training that takes as many steps at every client.

    The batches past a client's examples are masked altogether, and change nothing: what one gets
    who pads every client to the largest. Orders and batches are those of our own local training.
    """

    def work(
        key: Any, memory: Any, context: Any, params: Any, hyperparams: Any, examples: fc.Sequence
    ) -> tuple[Any, ClientOutput]:
        order = shuffle(jax.random.fold_in(jax.random.fold_in(key, 0), 0), examples)
        differentiate = jax.grad(model.loss, argnums=1, has_aux=True)

        def step(carry: Any, index: jax.Array) -> tuple[Any, Any]:
            variables, state = carry
            batch, mask = take_batch(examples, order, index, BATCH_SIZE)
            gradients, (stats, variables) = differentiate(key, variables, batch, mask, True)
            updates, state = optimizer.update(gradients, state, variables)
            return (optax.apply_updates(variables, updates), state), stats

        start = params, optimizer.init(params)
        (trained, _), rows = lax.scan(step, start, jnp.arange(num_steps, dtype=jnp.int32))
        stats = jax.tree.map(lambda x: x.sum(0), rows)
        update = jax.tree.map(jnp.subtract, params, trained)
        return memory, ClientOutput(update, jnp.float32(stats["num_examples"].total), stats)

    return ClientWork(
        init=lambda params: ((), ()),
        prepare=lambda server, params: (),
        work=work,
        finish=lambda server, extra: server,
        hyperparams=lambda params: (),
    )


def compilations(sizes: Sizes) -> Found:
    """What different cohorts of unequal clients compile, by JAX's own events; tracing counts."""
    dataset = images(unequal_lengths(2 * sizes.many))
    algorithm = fed_avg(fc.models.linear())
    sampler = sampling.uniform(dataset, sizes.few, seed=SEED)
    events: list[str] = []

    def note(event: str, duration_secs: float, **_: Any) -> None:
        if "compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)

    def count(source: FederatedDataset | DeviceDataset) -> int:
        state = algorithm.init(jax.random.key(SEED))
        state, _ = algorithm.update(state, source.cohort(sampler(0)))
        events.clear()
        for r in range(1, sizes.cohorts + 1):
            state, _ = algorithm.update(state, source.cohort(sampler(r)))
        jax.block_until_ready(state.params)
        return len(events)

    resident, on_host = count(dataset.on_device()), count(dataset)
    events.clear()
    jax.jit(lambda x: x + 1)(1.0)
    assert events, "JAX no longer tells of compilations under names that hold 'compile'"
    return Found(
        [
            Figure(f"of {sizes.cohorts} cohorts of a dataset on the device", resident, 0, unit=""),
            Figure(f"of {sizes.cohorts} cohorts packed on the host", on_host, unit=" events"),
        ],
        {"programs": algorithm.compiled()},
    )


def memory_of_a_cohort(sizes: Sizes) -> Found:
    """The peak of a round of many clients of the FedAvg CNN, above the dataset."""
    dataset = images(np.full(sizes.most, BATCH_SIZE))
    algorithm = fed_avg(fc.models.emnist_cnn())
    state = jax.block_until_ready(algorithm.init(jax.random.key(SEED)))
    before = memory()["VmRSS"]
    begin = time.perf_counter()
    jax.block_until_ready(algorithm.update(state, dataset.cohort(dataset.client_ids)))
    seconds = time.perf_counter() - begin
    above = memory()["VmHWM"] - before
    name = f"peak of {sizes.most:,} clients of the CNN above the dataset"
    return Found([Figure(name, above, 1_500, unit=" MB")], {"before": before, "seconds": seconds})


def memory_of_rounds(sizes: Sizes) -> Found:
    """What many rounds add, each with a cohort that the host packs."""
    dataset = images(unequal_lengths(2 * sizes.many))
    algorithm = fed_avg(fc.models.linear())
    sampler = sampling.uniform(dataset, sizes.few, seed=SEED)
    state = algorithm.init(jax.random.key(SEED))
    state = one_by_one(algorithm, state, dataset, sampler, sizes.rounds)  # meets every shape
    before = memory()["VmRSS"]
    one_by_one(algorithm, state, dataset, sampler, sizes.rounds)
    added = memory()["VmRSS"] - before
    return Found([Figure(f"added by {sizes.rounds} rounds", added, 20, unit=" MB")])


def emnist(sizes: Sizes) -> Found:
    """A dataset as large as federated EMNIST, from flat files with a column of writers."""
    _, _, clients_per_round, num_rounds = sizes.emnist
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        # Elsewhere, so that making the files leaves nothing in the memory of this process.
        writer = multiprocessing.get_context("spawn").Process(
            target=write_emnist, args=(folder, sizes)
        )
        writer.start()
        writer.join()
        begin = time.perf_counter()
        columns = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r")
            for name in ("image", "label", "writer")
        }
        dataset = fc.datasets.from_arrays(
            columns, partition=partition.by_key("writer"), features=["image", "label"]
        )
        del columns
    resident = dataset.on_device()
    jax.block_until_ready(resident.examples)
    load_seconds = time.perf_counter() - begin
    loaded = memory()
    algorithm = fed_avg(fc.models.two_nn())
    sampler = sampling.uniform(dataset, clients_per_round, seed=SEED)
    state = algorithm.init(jax.random.key(SEED))
    begin = time.perf_counter()
    state, metrics = algorithm.run(
        state, resident, sampler, num_rounds=num_rounds, rounds_per_dispatch=num_rounds
    )
    jax.block_until_ready(state)
    run_seconds = time.perf_counter() - begin
    what = f"{dataset.num_clients:,} clients, {int(dataset.offsets[-1]):,} images"
    rounds = f"{num_rounds} rounds of {clients_per_round} clients in one run"
    loss = metrics.train["loss"]
    return Found(
        [
            Figure(f"to load {what}", load_seconds, 20, unit=" s"),
            Figure("resident once loaded", loaded["VmRSS"], 1_200, unit=" MB"),
            Figure("peak while loading", loaded["VmHWM"], unit=" MB"),
            Figure(rounds, run_seconds, unit=" s"),
            Figure("rounds done", int(state.round), num_rounds, "at least", unit=""),
            Figure("peak of it all", memory()["VmHWM"], unit=" MB"),
        ],
        {"loss of the first and the last round": [float(loss[0]), float(loss[-1])]},
    )


def write_emnist(folder: pathlib.Path, sizes: Sizes) -> None:
    """Images, labels and writers as NumPy files."""
    num_clients, total, _, _ = sizes.emnist
    workload = workloads.WORKLOADS["emnist_scale"]
    data = workloads.make(dataclasses.replace(workload, num_clients=num_clients, total=total))
    writer = np.repeat(np.arange(num_clients, dtype=np.int32), data.sizes)
    for name, x in {**data.features, "writer": writer}.items():
        np.save(folder / f"{name}.npy", x)


def run(sizes: Sizes) -> Found:
    """Many rounds of `run` against single calls of `update`, the making of cohorts included."""
    figures, notes = [], {}
    cases = (
        (sizes.many, sizes.examples, 1.05, min(sizes.repeats, 3)),
        (sizes.few, 1, 1 / 1.15, 2 * sizes.repeats),
    )
    for num_clients, num_examples, limit, repeats in cases:
        name = f"{num_clients} clients x {num_examples}"
        seconds, has_same_bits = run_and_updates(num_clients, num_examples, sizes.rounds, repeats)
        figures += [
            Figure(f"run / updates, {name}", ratio(*seconds), limit),
            Figure(f"same bits, {name}", has_same_bits, 1, "at least", unit=""),
        ]
        notes[name] = seconds
    return Found(figures, notes)


def run_and_updates(
    num_clients: int, num_examples: int, num_rounds: int, repeats: int
) -> tuple[list[list[float]], bool]:
    """Seconds of both ways to run many rounds, and whether they end with the same bits."""
    dataset = images(np.full(2 * num_clients, num_examples))
    resident = dataset.on_device()
    sampler = sampling.uniform(dataset, num_clients, seed=SEED)
    algorithm = fed_avg(fc.models.linear())
    start = algorithm.init(jax.random.key(SEED))
    after: dict[str, Any] = {}

    def together() -> None:
        found, _ = algorithm.run(start, resident, sampler, num_rounds=num_rounds)
        after["run"] = jax.block_until_ready(found)

    def singly() -> None:
        after["updates"] = one_by_one(algorithm, start, resident, sampler, num_rounds)

    warm_up(together, singly)
    seconds = alternate(repeats, together, singly)
    return seconds, same_bits(after["run"], after["updates"])


def sweep(sizes: Sizes) -> Found:
    """One round with many learning rates in one program, against as many single rounds."""
    dataset = images(np.full(sizes.few, sizes.examples)).on_device()
    cohort = dataset.cohort(dataset.client_ids)
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=LEARNING_RATE)
    algorithm = fed_avg(fc.models.linear(), client_optimizer=optimizer)

    def start(rate: Any) -> Any:
        state = algorithm.init(jax.random.key(SEED))
        hyperparams = {**state.hyperparams, "client": {"learning_rate": rate}}
        return state._replace(hyperparams=hyperparams)

    rates = np.geomspace(0.01, 1, sizes.rates).astype(np.float32)
    update = jax.jit(jax.vmap(algorithm.update, in_axes=(0, None)))
    states = jax.vmap(start)(rates)
    single = [start(jnp.float32(rate)) for rate in rates]
    after: list[Any] = [None, None]

    def together() -> None:
        after[0] = jax.block_until_ready(update(states, cohort))[0]

    def singly() -> None:
        after[1] = [jax.block_until_ready(algorithm.update(x, cohort))[0] for x in single]

    warm_up(together, singly)
    seconds = alternate(3 * sizes.repeats, together, singly)
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *[x.params for x in after[1]])
    difference = largest_difference(after[0].params, stacked)
    name = f"{sizes.rates} learning rates in one program / one by one"
    return Found(
        [
            Figure(name, ratio(*seconds), 0.7),
            Figure("largest difference of a parameter", difference, 1e-4, unit=""),
        ],
        {"cohort": f"{sizes.few} clients x {sizes.examples}", "seconds": seconds},
    )


def overhead(sizes: Sizes) -> Found:
    """A round of few clients of one example each."""
    dataset = images(np.full(2 * sizes.few, 1))
    resident = dataset.on_device()
    sampler = sampling.uniform(dataset, sizes.few, seed=SEED)
    algorithm = fed_avg(fc.models.linear())
    state = algorithm.init(jax.random.key(SEED))
    cohort = resident.cohort(sampler(0))

    def update_only() -> None:
        after = state
        for _ in range(sizes.calls):
            after, _ = algorithm.update(after, cohort)
        jax.block_until_ready(after)

    def with_cohort(source: FederatedDataset | DeviceDataset) -> None:
        one_by_one(algorithm, state, source, sampler, sizes.calls)

    ways = (
        update_only,
        functools.partial(with_cohort, resident),
        functools.partial(with_cohort, dataset),
    )
    warm_up(*ways)
    seconds = alternate(3 * sizes.repeats, *ways)
    medians = [1e3 * statistics.median(x) / sizes.calls for x in seconds]
    return Found(
        [
            Figure(f"update of {sizes.few} clients x 1, on the device", medians[0], 1, unit=" ms"),
            Figure("with the making of the cohort", medians[1], unit=" ms"),
            Figure("with a cohort packed on the host", medians[2], unit=" ms"),
        ]
    )


def growth(sizes: Sizes) -> Found:
    """The time of ten times the clients."""
    algorithm = fed_avg(fc.models.linear())
    state = algorithm.init(jax.random.key(SEED))
    factor = sizes.most // sizes.many
    dataset = images(np.full(sizes.most, sizes.examples)).on_device()
    few, many = (dataset.cohort(dataset.client_ids[:n]) for n in (sizes.many, sizes.most))

    def take(cohort: Any, calls: int) -> None:
        for _ in range(calls):
            jax.block_until_ready(algorithm.update(state, cohort))

    ways = functools.partial(take, few, factor), functools.partial(take, many, 1)
    warm_up(*ways)
    seconds = alternate(2 * sizes.repeats, *ways)
    times = factor * ratio(seconds[1], seconds[0])
    name = f"time of {sizes.most:,} clients / of {sizes.many}"
    return Found(
        [
            Figure(name, times, 1.1 * factor),
            Figure(name, times, 0.9 * factor, "at least"),
        ],
        {"seconds": seconds},
    )


def choice(sizes: Sizes) -> Found:
    """What `explain` says of the choice made, and the time of another one."""
    figures, notes = [], {}
    cases = (
        ("CNN", fc.models.emnist_cnn(), sizes.few, min(sizes.repeats, 3)),
        ("linear model", fc.models.linear(), sizes.many, 4 * sizes.repeats),
    )
    for name, model, lanes, repeats in cases:
        dataset = images(np.full(lanes, sizes.examples)).on_device()
        cohort = dataset.cohort(dataset.client_ids)  # all of it side by side is the other choice
        algorithm = fed_avg(model)
        other = algorithm.with_execution(fc.Execution(lanes=lanes))
        state = algorithm.init(jax.random.key(SEED))

        def take(algorithm: Algorithm, state: Any = state, cohort: Any = cohort) -> None:
            jax.block_until_ready(algorithm.update(state, cohort))

        ways = functools.partial(take, algorithm), functools.partial(take, other)
        warm_up(*ways)
        seconds = alternate(repeats, *ways)
        figures.append(
            Figure(
                f"{name}: {lanes} lanes / as chosen", ratio(seconds[1], seconds[0]), 1, "at least"
            )
        )
        notes[name] = fc.explain(algorithm, cohort).splitlines()
        notes[f"{name}, seconds"] = seconds
    return Found(figures, notes)


def codecs(sizes: Sizes) -> Found:
    """A round of the FedAvg CNN with each codec, over one without."""
    dataset = prototypes(sizes).on_device()
    cohort = dataset.cohort(dataset.client_ids)
    nearest = compression.uniform_quantize(8, stochastic=False)
    low_rank, ledger = (compression.flagship(candidates=name) for name in ("low_rank", "ledger"))
    uplinks = {
        "dense_8bit, to the nearest": nearest,
        **PRESET_CODECS,
        "flagship, low rank alone": low_rank,
        "flagship, by the ledger": ledger,
    }
    limits = {
        "dense_8bit, to the nearest": 1.05,
        "dense_8bit": 1.2,
        "flagship": 1.35,
        "flagship, low rank alone": 1.2,
    }

    def way(codec: compression.Codec | None, secure: bool) -> Callable[[], None]:
        aggregator = fc.aggregators.mean(codec=codec, secure=secure)
        algorithm = fed_avg(fc.models.emnist_cnn(), aggregator=aggregator)
        state = algorithm.init(jax.random.key(SEED))

        def take() -> None:
            jax.block_until_ready(algorithm.update(state, cohort))

        return take

    ways = [way(None, False), *(way(codec, name == "secure") for name, codec in uplinks.items())]
    warm_up(*ways)
    raw, *others = alternate(2 * sizes.repeats, *ways)
    figures = [
        Figure(f"round with {name} / raw", ratio(seconds, raw), limits.get(name))
        for name, seconds in zip(uplinks, others, strict=True)
    ]
    return Found(figures, {"seconds": {"raw": raw, **dict(zip(uplinks, others, strict=True))}})


def coding(sizes: Sizes) -> Found:
    """The bytes of one client's update of the FedAvg CNN, there and back on the host."""
    dataset = prototypes(sizes)
    algorithm = fed_avg(fc.models.emnist_cnn())
    state = algorithm.init(jax.random.key(SEED))
    after, _ = algorithm.update(state, dataset.cohort(dataset.client_ids[:1]))
    update = jax.tree.map(jnp.subtract, state.params, after.params)
    keys = compression.Keys(jax.random.key(1), jax.random.key(2))
    figures, notes = [], {}
    for name, codec in PRESET_CODECS.items():
        server, memory_of_sender = codec.init(jax.eval_shape(lambda: update))
        hints = codec.hints(server)
        encode = jax.jit(functools.partial(codec.encode, keys, memory_of_sender, hints))
        message = jax.device_get(encode(update)[1])
        data = compression.to_bytes(codec, message)
        ways = (
            functools.partial(compression.to_bytes, codec, message),
            functools.partial(compression.from_bytes, codec, data, message),
        )
        seconds = alternate(4 * sizes.repeats, *ways)
        write, read = (1e3 * statistics.median(x) for x in seconds)
        figures.append(Figure(f"to write a message of {name}", write, 60, unit=" ms"))
        figures.append(Figure(f"to read it, {len(data):,} bytes", read, unit=" ms"))
        notes[name] = seconds
    return Found(figures, notes)


PRESET_CODECS = {name: compression.preset(name) for name in compression.PRESETS}

PARTS: dict[str, list[Callable[[Sizes], Found]]] = {
    "unequal": [unequal],
    "speakers": [speakers],
    "compilations": [compilations],
    "memory": [memory_of_a_cohort, memory_of_rounds],
    "emnist": [emnist],
    "run": [run],
    "sweep": [sweep],
    "overhead": [overhead],
    "growth": [growth],
    "choice": [choice],
    "codecs": [codecs, coding],
}
FUNCTIONS = {function.__name__: function for part in PARTS.values() for function in part}


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


def run_part(name: str, is_quick: bool) -> dict[str, Any]:
    """All that is told of one part, each of its functions in a process of its own."""
    figures, notes = [], {}
    for function in PARTS[name]:
        quick = ["--quick"] if is_quick else []
        command = [sys.executable, __file__, "--function", function.__name__, *quick]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
            return {"error": last[0], "figures": figures, "notes": notes}
        answer = json.loads(done.stdout.splitlines()[-1])
        figures += [describe(Figure(*figure), is_quick) for figure in answer["figures"]]
        notes |= answer["notes"]
    return {"figures": figures, "notes": notes, "load": os.getloadavg()}


def describe(figure: Figure, is_quick: bool) -> dict[str, Any]:
    """A figure for JSON; those of a smoke run are not judged."""
    return {**figure._asdict(), "is_met": None if is_quick else figure.is_met}


def table(results: dict[str, Any]) -> str:
    """The figures for a person."""
    lines = ["| part | figure | value | limit | |", "| --- | --- | --- | --- | --- |"]
    parts = results["parts"]
    ordered = {part: parts[part] for part in PARTS if part in parts} | parts
    for part, found in ordered.items():
        for x in found["figures"]:
            value = f"{x['value']:.4g}{x['unit']}"
            limit = "-" if x["limit"] is None else f"{x['bound']} {x['limit']:.4g}{x['unit']}"
            lines.append(f"| {part} | {x['name']} | {value} | {limit} | {_verdict(x)} |")
        if "error" in found:
            lines.append(f"| {part} | failed: {found['error']} | | | FAILED |")
    return "\n".join(lines)


def _verdict(figure: dict[str, Any]) -> str:
    if figure["limit"] is None or figure["is_met"] is None:
        return ""
    return "met" if figure["is_met"] else "MISSED"


def has_failed(results: dict[str, Any]) -> bool:
    """Whether a part failed, or a figure misses its limit."""
    parts = results["parts"].values()
    is_missed = any(x["is_met"] is False for found in parts for x in found["figures"])
    return is_missed or any("error" in found for found in parts)


def earlier(args: argparse.Namespace) -> dict[str, Any]:
    """The results to add to."""
    sizes = (QUICK if args.quick else FULL)._asdict()
    if args.output is None or args.quick or not args.output.exists():
        return {"quick": args.quick, "sizes": sizes, "parts": {}}
    results = json.loads(args.output.read_text())
    if results["sizes"] != json.loads(json.dumps(sizes)):
        raise SystemExit(f"{args.output} is of other sizes than {sizes}; name another file")
    return results


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--parts", type=_parts, default=list(PARTS), help="some of them, a,b")
    add(
        "--quick", action="store_true", help="a smoke run of tiny sizes, whose figures mean nothing"
    )
    default = pathlib.Path(__file__).parent / "results" / "simulation.json"
    add("--output", type=pathlib.Path, help=f"JSON file to write: {default}, none if quick")
    add("--function", choices=FUNCTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.output = args.output or (None if args.quick else default)
    return args


def _parts(text: str) -> list[str]:
    chosen = [name for name in text.split(",") if name]
    unknown = [name for name in chosen if name not in PARTS]
    if unknown or not chosen:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(PARTS)}; got {text!r}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes."""
    args = parse_args(arguments)
    if args.function:
        print(json.dumps(FUNCTIONS[args.function](QUICK if args.quick else FULL)._asdict()))
        return 0
    results = earlier(args)
    for name in args.parts:
        results["parts"][name] = {**run_part(name, args.quick), "machine": describe_machine()}
        print(f"{name}: done, load {os.getloadavg()}", file=sys.stderr, flush=True)
        if args.output:  # after each part: a long run that is stopped keeps what it has
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    return int(has_failed(results))


if __name__ == "__main__":
    raise SystemExit(main())
