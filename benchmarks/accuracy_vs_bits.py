"""Accuracy against all bits, up and down: the flagship codec beside others, and the way down.

The set-up of mnist_fedavg.py: 60 rounds, three seeds, the mean of the last five rounds, differences
paired by seed. Bits are those of the whole run, metrics, weights and seeds included; the ratio is
to the raw run.

    python benchmarks/accuracy_vs_bits.py --data-dir DIR      # DIR holds t10k-images-idx3-ubyte.gz
    and its labels

With --speakers it is a network of two LSTM layers on Shakespeare's plays instead (see speakers.py),
whose accuracy is the share of characters that it predicts.

Prints a table, and writes it as JSON with a picture beside it. A row of the file that is not
measured now stays as it is. Rows with a goal end with whether it was reached.
"""

import argparse
import functools
import json
import math
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import mnist_fedavg as setup
import optax
import speakers
from machine import describe_machine

import fedjax_core as fc
from fedjax_core import compression
from fedjax_core.compression import (
    Codec,
    Downlink,
    chain,
    error_feedback,
    flagship,
    preset,
    qsgd,
    sparse_ternary,
    zero_runs,
)

RAW = "raw"


class Way(NamedTuple):
    """How a run compresses, and what it should reach.

    Attributes:
      up: makes the codec of the updates.
      down: makes what sends the model.
      least: ratios to raw, up and down, that are to be reached.
      lost: at most so many points of accuracy.
    """

    up: Callable[[], Codec | None] = lambda: None
    down: Callable[[], Codec | Downlink | None] = lambda: None
    least: tuple[float, float] = (1, 1)
    lost: float | None = None


def anchored() -> Downlink:
    """The preset."""
    return compression.downlink_preset("anchored")


def stochastic(step: float) -> Codec:
    """The flagship with random rounding."""
    return flagship(step, rounding="stochastic")


WAYS = {
    RAW: Way(),
    "tff_8bit": Way(lambda: preset("tff_8bit")),
    "QSGD": Way(lambda: chain(qsgd(1267), zero_runs())),
    "EDEN, 1 bit": Way(lambda: preset("one_bit")),
    "sparse ternary 1 %, error feedback": Way(
        lambda: error_feedback(sparse_ternary(0.01, min_size=0))
    ),
    "flagship(2)": Way(lambda: flagship(2.0), least=(300, 1), lost=0.3),
    "flagship(5)": Way(lambda: flagship(5.0), least=(600, 1), lost=0.5),
    "flagship(12.8)": Way(lambda: flagship(12.8), least=(1500, 1), lost=1.0),
    "flagship(5), stochastic": Way(lambda: stochastic(5.0), least=(300, 1), lost=0.3),
    "flagship(12.8), stochastic": Way(lambda: stochastic(12.8), least=(600, 1), lost=0.5),
    "flagship(30), stochastic": Way(lambda: stochastic(30.0), least=(1500, 1), lost=1.0),
    "anchored": Way(down=anchored, least=(1, 32), lost=0.5),
    "replica": Way(down=lambda: compression.downlink_preset("replica")),
    "flagship(5), anchored": Way(lambda: flagship(5.0), anchored),
}


def main() -> int:
    """Runs the table."""
    parser = argparse.ArgumentParser(description="Accuracy against all bits of FedAvg on MNIST.")
    parser.add_argument(
        "--data-dir", type=pathlib.Path, default=None, help="folder of the IDX files"
    )
    parser.add_argument("--num-rounds", type=int, default=setup.NUM_ROUNDS)
    parser.add_argument("--num-seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument(
        "--output", type=pathlib.Path, default=None, help="JSON file, and .png of the same name"
    )
    parser.add_argument(
        "--speakers", action="store_true", help="Shakespeare's characters instead of digits"
    )
    args = parser.parse_args()
    try:
        task = speakers_task() if args.speakers else mnist_task(args.data_dir)
    except LookupError as error:
        print(f"skipped: {error.args[0]}")
        return 0
    report = setup.earlier(args.output, args.num_rounds)
    results = report["results"]
    for name in args.ways:
        algorithm = fc.algorithms.fed_avg(
            task.model,
            client_optimizer=optax.sgd(task.learning_rate),
            aggregator=fc.aggregators.mean(codec=WAYS[name].up()),
            broadcast_codec=WAYS[name].down(),
            batch_size=task.batch_size,
        )
        results[name] = []
        for seed in range(args.num_seeds):
            dataset, test = task.load(seed)
            result = setup.run(
                algorithm, task.model, dataset, test, seed=seed, num_rounds=args.num_rounds
            )
            results[name].append(result)
            print(f"{name}, seed {seed}: {result}", file=sys.stderr, flush=True)
        report["machines"][name] = describe_machine()
        if args.output:
            args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(table(results))
    if args.output:
        draw(results, args.output.with_suffix(".png"))
    return 0


class Task(NamedTuple):
    """What is trained.

    Attributes:
      model: that is trained.
      load: from a seed to the federated examples and the held out ones.
      learning_rate: of the clients.
      batch_size: of the clients.
    """

    model: fc.models.Model
    load: Callable[[int], tuple[fc.datasets.FederatedDataset, Any]]
    learning_rate: float
    batch_size: int


def mnist_task(data_dir: pathlib.Path | None) -> Task:
    """The FedAvg CNN on digits.

    Raises:
      LookupError: there are none.
    """
    folder = data_dir or setup.default_data_dir()
    if folder is None:
        raise LookupError("give --data-dir, or set FEDJAX_CORE_DATA to a folder with mnist/")
    load = functools.partial(setup.load_split, folder)
    return Task(fc.models.emnist_cnn(), load, setup.LEARNING_RATE, setup.BATCH_SIZE)


def speakers_task() -> Task:
    """The LSTM on characters; the seed is of parameters and cohorts alone.

    Raises:
      LookupError: there is no text.
    """
    dataset, test, num_characters = speakers.load()
    model = speakers.character_lstm(num_characters)
    return Task(model, lambda seed: (dataset, test), speakers.LEARNING_RATE, speakers.BATCH_SIZE)


class Summary(NamedTuple):
    """A row: means over the seeds.

    Attributes:
      accuracy: of the last rounds.
      lost: points of accuracy against the raw run, paired by seed; NaN without one.
      ratios: of the raw run's bits to these, up and down.
      total_bits: of a run, both ways.
    """

    accuracy: float
    lost: float
    ratios: tuple[float, float]
    total_bits: float


def summarise(results: dict[str, list[dict[str, float]]], name: str) -> Summary:
    """The row of one way."""
    runs, raw = results[name], results.get(RAW, [])
    lost = [100 * (a["accuracy"] - b["accuracy"]) for a, b in zip(raw, runs, strict=False)]
    ratios = tuple(
        statistics.mean([a[kind] / b[kind] for a, b in zip(raw, runs, strict=False)] or [1.0])
        for kind in ("uplink_bits", "downlink_bits")
    )
    return Summary(
        statistics.mean(run["accuracy"] for run in runs),
        statistics.mean(lost) if lost else float("nan"),
        (ratios[0], ratios[1]),
        statistics.mean(run["uplink_bits"] + run["downlink_bits"] for run in runs),
    )


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """The table in Markdown."""
    lines = [
        "| way | test accuracy | by seed | points lost | up | down | Mbit in all | goal |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in (name for name in WAYS if name in results):
        row = summarise(results, name)
        up, down = row.ratios
        by_seed = " ".join(f"{run['accuracy']:.4f}" for run in results[name])
        lines.append(
            f"| {name} | {row.accuracy:.4f} | {by_seed} | {row.lost:.2f} | {up:,.1f}x "
            f"| {down:,.1f}x | {row.total_bits / 1e6:,.0f} | {_judge(WAYS[name], row)} |"
        )
    return "\n".join(lines)


def _judge(way: Way, row: Summary) -> str:
    if way.lost is None or math.isnan(row.lost):
        return "-"
    goals = [f"{x:g}x" for x in way.least if x > 1] + [f"{way.lost:g} points"]
    is_reached = row.lost <= way.lost and all(
        ratio >= least for ratio, least in zip(row.ratios, way.least, strict=True)
    )
    return f"{', '.join(goals)}: {'reached' if is_reached else 'missed'}"


def draw(results: dict[str, list[dict[str, Any]]], path: pathlib.Path) -> None:
    """Accuracy against the bits that went up, and against all bits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = ("sent up in the run (Mbit)", "sent up and down in the run (Mbit)")
    for panel, title, kinds in zip(
        panels, titles, (("uplink_bits",), ("uplink_bits", "downlink_bits")), strict=True
    ):
        for index, name in enumerate(name for name in WAYS if name in results):
            bits = [sum(run[kind] for kind in kinds) / 1e6 for run in results[name]]
            accuracy = [run["accuracy"] for run in results[name]]
            style = {"color": f"C{index % 10}", "marker": "oD"[index // 10 % 2]}
            panel.scatter(bits, accuracy, s=12, alpha=0.4, **style)
            center = statistics.mean(bits), statistics.mean(accuracy)
            panel.scatter(*center, s=50, label=name, **style)
        panel.set_xscale("log")
        panel.set_xlabel(title)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy, last five rounds")
    panels[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, format="png", dpi=120)


if __name__ == "__main__":
    sys.exit(main())
