"""Accuracy against bits: FedAvg on real MNIST images, with and without compression.

8,000 of MNIST's 10,000 test images train and 2,000 test; 80 clients of 100 images each, labels by
Dirichlet(1); 10 clients a round, batches of 20, one epoch, client learning rate 0.1, 60 rounds.
Accuracy is the mean after each of the last five rounds. Runs of a column share seeds, so that
differences are paired.

    python benchmarks/mnist_fedavg.py --data-dir DIR      # DIR holds t10k-images-idx3-ubyte.gz and
    its labels

Prints a table and writes it as JSON, each row with the machine, the versions and the commit. A row
of the file that is not measured now stays as it is.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from machine import describe_machine

import fedjax_core as fc
from fedjax_core.datasets.idx import read_idx

NUM_TRAIN = 8_000
NUM_CLIENTS = 80
ALPHA = 1.0
CLIENTS_PER_ROUND = 10
BATCH_SIZE = 20
LEARNING_RATE = 0.1
NUM_ROUNDS = 60

NUM_EVALUATED = 5

UPLINKS: dict[str, Callable[[], fc.compression.Codec | None]] = {
    "uncompressed": lambda: None,
    **{name: functools.partial(fc.compression.preset, name) for name in fc.compression.PRESETS},
    "top-k 10 %, 8 bit": lambda: fc.compression.chain(
        fc.compression.top_k(0.1), fc.compression.uniform_quantize(8)
    ),
}


def load_split(data_dir: pathlib.Path, seed: int) -> tuple[Any, dict[str, np.ndarray]]:
    """The federated training images and the central test images of one seed."""
    images = read_idx(data_dir / "t10k-images-idx3-ubyte.gz")[..., None]
    labels = read_idx(data_dir / "t10k-labels-idx1-ubyte.gz").astype(np.int32)
    order = np.random.default_rng(seed).permutation(len(labels))
    examples = {"image": images[order], "label": labels[order]}
    train = {name: x[:NUM_TRAIN] for name, x in examples.items()}
    test = {name: x[NUM_TRAIN:] for name, x in examples.items()}
    partition = fc.datasets.partition.dirichlet(NUM_CLIENTS, alpha=ALPHA)
    return fc.datasets.from_arrays(train, partition=partition, seed=seed), test


def run(
    algorithm: Any,
    model: fc.models.Model,
    dataset: fc.datasets.FederatedDataset,
    test: Any,
    *,
    seed: int,
    num_rounds: int,
) -> dict[str, float]:
    """One training run: accuracy on `test` after the last rounds, and bits."""
    sampler = fc.datasets.sampling.uniform(dataset, CLIENTS_PER_ROUND, seed=seed)
    begin = time.perf_counter()
    accuracies = []

    def evaluate_last(state: Any, _: Any) -> None:
        if int(state.round) > num_rounds - NUM_EVALUATED:
            accuracies.append(float(fc.evaluate(model, state.params, test)["accuracy"]))

    state, history = fc.train(
        algorithm,
        dataset,
        sampler,
        num_rounds=num_rounds,
        key=jax.random.key(seed),
        on_round=evaluate_last,
    )
    seconds = time.perf_counter() - begin
    update_bits = sum(int(record.communication["aggregate/update"]) for record in history)
    num_params = sum(x.size for x in jax.tree.leaves(state.params))
    return {
        "accuracy": statistics.mean(accuracies),
        "bits_per_param": update_bits / (num_rounds * CLIENTS_PER_ROUND * num_params),
        "uplink_bits": history[-1].aggregated_bits,
        "downlink_bits": history[-1].broadcasted_bits,
        "seconds": seconds,
        "seconds_per_round": statistics.median(record.seconds for record in history),
    }


def main() -> int:
    """Runs the table."""
    parser = argparse.ArgumentParser(description="Accuracy against bits of FedAvg on MNIST.")
    parser.add_argument(
        "--data-dir", type=pathlib.Path, default=None, help="folder of the IDX files"
    )
    parser.add_argument("--num-rounds", type=int, default=NUM_ROUNDS)
    parser.add_argument("--num-seeds", type=int, default=3)
    parser.add_argument("--uplinks", nargs="+", choices=list(UPLINKS), default=list(UPLINKS))
    parser.add_argument("--output", type=pathlib.Path, default=None, help="JSON file to write")
    args = parser.parse_args()
    data_dir = args.data_dir or default_data_dir()
    if data_dir is None:
        print("skipped: give --data-dir, or set FEDJAX_CORE_DATA to a folder with mnist/")
        return 0
    model = fc.models.emnist_cnn()
    report = earlier(args.output, args.num_rounds)
    results = report["results"]
    for name in args.uplinks:
        algorithm = fc.algorithms.fed_avg(
            model,
            client_optimizer=optax.sgd(LEARNING_RATE),
            aggregator=fc.aggregators.mean(codec=UPLINKS[name](), secure=name == "secure"),
            batch_size=BATCH_SIZE,
        )
        results[name] = []
        for seed in range(args.num_seeds):
            dataset, test = load_split(data_dir, seed)
            result = run(algorithm, model, dataset, test, seed=seed, num_rounds=args.num_rounds)
            results[name].append(result)
            print(f"{name}, seed {seed}: {result}", file=sys.stderr, flush=True)
        report["machines"][name] = describe_machine()
        if args.output:
            args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(table(results))
    return 0


def earlier(output: pathlib.Path | None, num_rounds: int) -> dict[str, Any]:
    """The report to add to: rows that are not measured now stay, each with its machine."""
    if output is None or not output.exists():
        return {"num_rounds": num_rounds, "machines": {}, "results": {}}
    report = json.loads(output.read_text())
    if report["num_rounds"] != num_rounds:
        raise SystemExit(
            f"{output} holds runs of {report['num_rounds']} rounds, not of {num_rounds}; "
            "name another file"
        )
    return report


def default_data_dir() -> pathlib.Path | None:
    """The folder of MNIST in that of all data."""
    folder = os.environ.get("FEDJAX_CORE_DATA")
    return pathlib.Path(folder) / "mnist" if folder else None


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """The table in Markdown: means over the seeds, and differences paired by seed."""
    baseline = [run["accuracy"] for run in results.get("uncompressed", [])]
    ordered = {name: results[name] for name in UPLINKS if name in results}
    lines = [
        "| uplink | test accuracy | by seed | points lost | bits a parameter | ratio | s a round |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in ordered.items():
        accuracy = [run["accuracy"] for run in runs]
        lost = [100 * (b - a) for a, b in zip(accuracy, baseline, strict=False)]
        gap = f"{statistics.mean(lost):.2f}" if lost else "-"
        bits = statistics.mean(run["bits_per_param"] for run in runs)
        seconds = statistics.median(run["seconds_per_round"] for run in runs)
        lines.append(
            f"| {name} | {statistics.mean(accuracy):.4f} "
            f"| {' '.join(f'{a:.4f}' for a in accuracy)} "
            f"| {gap} | {bits:.4f} | {32 / bits:.2f}x | {seconds:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
