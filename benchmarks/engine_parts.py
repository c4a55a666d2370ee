"""The parts of `simulation` about rounds, cohorts, memory and choices."""

import dataclasses
import functools
import multiprocessing
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import fedjax_core as fc
from benchmarks import workloads
from benchmarks.measuring import (
    BATCH_SIZE,
    LARGEST,
    LEARNING_RATE,
    MEAN_SIZE,
    QUICK,
    SEED,
    SIGMA,
    Figure,
    Found,
    Sizes,
    alternate,
    fed_avg,
    images,
    largest_difference,
    memory,
    one_by_one,
    ratio,
    same_bits,
    unequal_lengths,
    warm_up,
)
from benchmarks.peers import jax_lstm
from fedjax_core.datasets import DeviceDataset, FederatedDataset, partition, sampling
from fedjax_core.learning.algorithm import Algorithm, federated_learning
from fedjax_core.learning.batching import shuffle, take_batch
from fedjax_core.learning.client_work import ClientOutput, ClientWork

CHARACTERS = 20  # of a speaker's sequence: the same steps as with all 80, in a quarter of the time


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
