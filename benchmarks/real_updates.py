"""Rate and distortion of codecs on updates of the FedAvg CNN itself, from real bytes.

The set-up of mnist_fedavg.py with a client learning rate of 0.05, trained raw: the updates of three
clients in the rounds 0, 10 and 40. They are nothing like a Gaussian: a quarter of the elements are
zeros, and the largest matrix has nearly low rank.

    python benchmarks/real_updates.py --data-dir DIR    # DIR holds t10k-images-idx3-ubyte.gz and
    its labels

Rates are 8 times the bytes of a message over its elements. The distortion is that of the best
multiple of what is received, 1 - <Q(x), x>^2 / (|Q(x)|^2 |x|^2): codecs that stretch what they send
until it is unbiased, and those that do not, are then alike. The goals are rates of an independent
study on updates of its own, between whose points lies a line in logarithms of both.
"""

import argparse
import itertools
import json
import math
import pathlib
import statistics
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mnist_fedavg as setup
import numpy as np
import optax
from machine import describe_machine

import fedjax_core as fc
from fedjax_core.compression import (
    Codec,
    Keys,
    Report,
    chain,
    flagship,
    lossless,
    sparse_ternary,
    tff_8bit,
    to_bytes,
    top_k,
    uniform_quantize,
)

LEARNING_RATE = 0.05
ROUNDS, NUM_CLIENTS, GOAL_ROUND = (0, 10, 40), 3, 40
TOLERANCE = 1.1
OUTPUT = pathlib.Path(__file__).parent / "results" / "real_updates.json"

# Of the study, in round 40: bits an element and the distortion of one multiple of what is received.
DIRECT = ((3.224, 5.9e-4), (2.251, 3.5e-3), (1.007, 0.0439), (0.540, 0.1325), (0.211, 0.333))
LOW_RANK = ((0.350, 1.8e-3), (0.232, 7.6e-3), (0.103, 0.062), (0.0537, 0.169), (0.0211, 0.383))


class Row(NamedTuple):
    """A codec, and the points of the study that it is compared with; none where rates are reported.

    A single point is a rate to reach at any distortion.
    """

    codec: Codec
    study: tuple[tuple[float, float], ...] = ()


def rows() -> list[Row]:
    """The codecs of the study's table."""
    return [
        Row(lossless(), ((18.06, 0.0),)),
        Row(tff_8bit(), ((9.2328, 1.46e-3),)),
        *(Row(flagship(step, candidates="direct"), DIRECT) for step in (0.1, 0.25, 1.0, 2.0, 4.0)),
        Row(flagship(0.5, rank=48, candidates="low_rank"), LOW_RANK),
        *(Row(flagship(step, candidates="low_rank"), LOW_RANK) for step in (1.0, 4.0, 8.0, 16.0)),
        *(Row(flagship(step)) for step in (1.0, 4.0, 16.0)),
        Row(chain(top_k(0.01, min_size=0), uniform_quantize(8, min_size=0)), ((0.164, 0.596),)),
        Row(sparse_ternary(0.01, min_size=0), ((0.094, 0.671),)),
    ]


class Measured(NamedTuple):
    """What a codec does to one update: bits an element, and the distortion."""

    rate: float
    distortion: float


def updates(data_dir: pathlib.Path) -> dict[int, list[Any]]:
    """The updates of some clients, by round."""
    dataset, _ = setup.load_split(data_dir, 0)
    sampler = fc.datasets.sampling.uniform(dataset, setup.CLIENTS_PER_ROUND, seed=0)
    algorithm = fc.algorithms.fed_avg(
        fc.models.emnist_cnn(),
        client_optimizer=optax.sgd(LEARNING_RATE),
        batch_size=setup.BATCH_SIZE,
    )
    state, found = algorithm.init(jax.random.key(0)), {}
    for number in range(max(ROUNDS) + 1):
        if number in ROUNDS:
            alone = [
                algorithm.update(state, dataset.cohort([client]))[0].params
                for client in sampler(number)[:NUM_CLIENTS]
            ]
            found[number] = [jax.tree.map(jnp.subtract, state.params, x) for x in alone]
        state, _ = algorithm.update(state, dataset.cohort(sampler(number)))
    return found


def measurer(codec: Codec) -> Any:
    """From an update to what the codec does to it."""

    @jax.jit
    def send(keys: Keys, value: Any) -> tuple[Any, Any]:
        server, memory = codec.init(value)
        hints = codec.hints(server)
        _, message = codec.encode(keys, memory, hints, value)
        total = codec.decode(keys, hints, message)
        report = Report(jnp.int32(1), codec.bits(message), message.stats)
        return message, codec.finish(keys.shared, server, total, report)[1]

    def measure(seed: int, value: Any) -> Measured:
        keys = Keys(jax.random.key(seed), jax.random.key(1000 + seed))
        message, received = send(keys, value)
        num_bits = 8 * len(to_bytes(codec, jax.device_get(message)))
        x, y = (
            np.concatenate([np.ravel(a) for a in jax.tree.leaves(t)]) for t in (value, received)
        )
        x, y = x.astype(float), y.astype(float)
        aligned = np.dot(x, y) ** 2 / max(np.dot(x, x) * np.dot(y, y), 1e-300)
        return Measured(num_bits / x.size, max(1 - aligned, 0.0))

    return measure


def goal(study: tuple[tuple[float, float], ...], distortion: float) -> float | None:
    """The study's rate at a distortion, at most that of its best point; None above all of them."""
    if len(study) == 1:
        return study[0][0] if distortion <= study[0][1] * 1.05 + 1e-9 else None
    points = sorted((math.log(d), math.log(r)) for r, d in study)
    at = math.log(max(distortion, 1e-12))
    if at < points[0][0]:  # who is better has to get by with the rate of the best
        return math.exp(points[0][1])
    for (d0, r0), (d1, r1) in itertools.pairwise(points):
        if d0 <= at <= d1:
            return math.exp(r0 + (r1 - r0) * (at - d0) / (d1 - d0))
    return None


def measure_all(found: dict[int, list[Any]], row: Row) -> dict[str, Any]:
    """One row: by round, the means over clients, and the study's rate in its round."""
    measure = measurer(row.codec)
    by_round = {}
    for number, values in found.items():
        measured = [measure(10 * number + k, value) for k, value in enumerate(values)]
        by_round[number] = [statistics.mean(x) for x in zip(*measured, strict=True)]
    rate, distortion = by_round[GOAL_ROUND]
    aim = goal(row.study, distortion) if row.study else None
    reached = None if aim is None else rate <= TOLERANCE * aim
    return {"codec": row.codec.name, "by_round": by_round, "goal": aim, "is_reached": reached}


def table(results: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    lines = [
        "| codec | bits, round 40 | distortion | study's bits at it | | bits, rounds 0 and 10 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        by_round = {int(number): x for number, x in result["by_round"].items()}
        rate, distortion = by_round[GOAL_ROUND]
        others = ", ".join(f"{by_round[n][0]:.4f}" for n in ROUNDS if n != GOAL_ROUND)
        aim = "-" if result["goal"] is None else f"{result['goal']:.4f}"
        verdict = {None: "-", True: "ok", False: "MISSED"}[result["is_reached"]]
        cells = (f"`{result['codec']}`", f"{rate:.4f}", f"{distortion:.3g}", aim, verdict, others)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Runs the table."""
    parser = argparse.ArgumentParser(
        description="Rate and distortion on updates of the FedAvg CNN."
    )
    parser.add_argument("--data-dir", type=pathlib.Path, default=None, help="folder of IDX files")
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT, help="JSON file to write")
    args = parser.parse_args()
    data_dir = args.data_dir or setup.default_data_dir()
    if data_dir is None:
        print("skipped: give --data-dir, or set FEDJAX_CORE_DATA to a folder with mnist/")
        return 0
    found, results = updates(data_dir), []
    for row in rows():
        results.append(measure_all(found, row))
        print(results[-1], file=sys.stderr, flush=True)
    print(table(results))
    report = {"machine": describe_machine(), "results": results}
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
