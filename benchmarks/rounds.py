"""Seconds a round of federated averaging, against what a user would pick instead.

    python benchmarks/rounds.py
    python benchmarks/rounds.py --workloads cnn,overhead --repeats 9 --threads 1,2
    python benchmarks/rounds.py --quick

On a GPU, with FedJAX, Haiku and PyTorch installed beside the library, which `make bench-gpu` runs:

    JAX_PLATFORMS=cuda python benchmarks/rounds.py --peers-here --peers fedjax,pytorch \
        --lanes 1,4,16,64,256 --no-check --output gpu.json

FedJAX, a bare PyTorch loop and pfl-research, each in a process and an environment of its own, which
this command makes where it is missing. A round includes making the batches of a fresh cohort from
data in memory. The peers take turns within each repeat; what is told is the median over the
repeats, and of ratios the median of those within a repeat, so that a busy machine is the same for
all. See `workloads` for what is trained.

Check: from the same parameters, a round whose result no shuffling changes (`workloads.order_free`)
has to give the same parameters everywhere; shuffling cannot be turned off in all of them. The loss
after the last round is that of the same examples, and of the same cohorts.

Prints a table and writes it as JSON with the machine, the versions and the commit.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

# All run on the CPU unless this says "cuda"; a worker started from here does what it says.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import workloads
from machine import describe_machine
from peers import environments
from peers.environments import Unavailable
from peers.report import Row, has_failed, table
from peers.worker import Worker, WorkerError
from workloads import WORKLOADS, Workload

OURS = "fedjax-core"
PEERS = ("fedjax", "pytorch", "pfl")
THREADED = ("pytorch", "pfl")
PEAK_SIZE = 1_024
PEAK_CALLS = 20


class Variant(NamedTuple):
    """A peer, with a number of threads if it takes one.

    Attributes:
      label: in tables.
      peer: "ours", "lanes" for ours with a number of them, or one of `PEERS`.
      command: starts its worker.
      threads: None leaves the choice to the peer.
    """

    label: str
    peer: str
    command: list[str]
    threads: int | None = None


def make_variants(
    peers: Iterable[str],
    *,
    python: str,
    threads: Sequence[int],
    ensure: Callable[[str], pathlib.Path],
    lanes: Sequence[int] = (),
) -> tuple[list[Variant], dict[str, Row]]:
    """What can be measured, ours first, and rows for the peers that cannot."""
    variants, skipped = [_variant(OURS, "ours", python, python)], {}
    for number in lanes:
        label = f"{OURS}, {number} lane{'s' if number > 1 else ''}"
        command = [*variants[0].command, str(number)]
        variants.append(Variant(label, "lanes", command))
    for peer in peers:
        try:
            own = str(ensure(peer))
        except Unavailable as error:
            print(f"skipped {peer}: {error}", file=sys.stderr, flush=True)
            skipped[peer] = {"peer": peer, "skipped": str(error)}
            continue
        if peer in THREADED:
            labels = {n: f"{peer}, {n} thread{'s' if n > 1 else ''}" for n in threads}
            variants += [_variant(label, peer, own, python, n) for n, label in labels.items()]
        else:
            variants.append(_variant(peer, peer, own, python))
    return variants, skipped


def _variant(label: str, peer: str, own: str, python: str, threads: int | None = None) -> Variant:
    # -E: a PYTHONPATH made for ours would put its packages before those of a peer elsewhere.
    flags = [] if own == python else ["-E"]
    command = [own, *flags, "-m", f"benchmarks.peers.{peer}_worker"]
    return Variant(label, peer, command, threads)


def measure(
    workload: Workload, variants: list[Variant], repeats: int
) -> tuple[dict[str, Row], list[dict[str, float]]]:
    """Measures one workload: all workers live side by side and take turns.

    Returns:
      The rows by label; and of each repeat the GFLOP/s of a matrix product and the load average.
    """
    rows: dict[str, Row] = {v.label: {"peer": v.peer, "threads": v.threads} for v in variants}
    runs: dict[str, list[dict[str, Any]]] = {}
    machine: list[dict[str, float]] = []
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for variant in variants:
            with _noting_errors(rows[variant.label]):
                worker = stack.enter_context(Worker(variant.command))
                rows[variant.label] |= worker.ask(
                    workload=dataclasses.asdict(workload), threads=variant.threads
                )
                workers[variant.label] = worker
        for _ in range(repeats):
            machine.append({"peak_gflops": peak_gflops(), "load": os.getloadavg()[0]})
            for label in [x for x in workers if "error" not in rows[x]]:
                with _noting_errors(rows[label]):
                    runs.setdefault(label, []).append(workers[label].ask(run=workload.num_rounds))
    finished = {label: x for label, x in runs.items() if "error" not in rows[label]}
    peaks = [x["peak_gflops"] for x in machine]
    for label, summary in summarise(finished, peaks).items():
        rows[label] |= summary
    return rows, machine


@contextlib.contextmanager
def _noting_errors(row: Row) -> Any:
    """Writes what goes wrong in a worker into its row."""
    try:
        yield
    except (WorkerError, OSError) as error:
        row["error"] = str(error)


def summarise(runs: dict[str, list[dict[str, Any]]], peaks: list[float]) -> dict[str, Row]:
    """Medians over the repeats, and ratios to ours within each.

    Args:
      runs: label -> the worker's answers, one a repeat.
      peaks: GFLOP/s of a matrix product, one a repeat.
    """
    seconds = {label: [x["seconds_per_round"] for x in answers] for label, answers in runs.items()}
    return {
        label: _summary(answers, seconds[label], seconds.get(OURS), peaks)
        for label, answers in runs.items()
    }


def _summary(
    answers: list[dict[str, Any]],
    seconds: list[float],
    ours: list[float] | None,
    peaks: list[float],
) -> Row:
    gflops = [x["flops"] / x["rounds"] / x["seconds_per_round"] / 1e9 for x in answers]
    steps, examples = (sum(x[name] for x in answers) for name in ("client_steps", "examples"))
    return {
        "seconds_per_round": statistics.median(seconds),
        "seconds": seconds,
        "ratio": None if ours is None else median_ratio(seconds, ours),
        "client_steps_per_second": statistics.median(
            x["client_steps"] / x["rounds"] / x["seconds_per_round"] for x in answers
        ),
        "gflops": statistics.median(gflops),
        "utilisation": median_ratio(gflops, peaks),
        "step_padding": _share(answers, "steps_executed", steps),
        "row_padding": _share(answers, "rows_executed", examples),
        "peak_rss_mb": max(x["peak_rss_mb"] for x in answers),
        "rss_mb": answers[-1].get("rss_mb"),
        "loss": answers[-1]["loss"],
    }


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median of the ratios within each repeat."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def _share(answers: list[dict[str, Any]], name: str, needed: int) -> float | None:
    executed = [x[name] for x in answers]
    return None if None in executed else sum(executed) / needed


def best_labels(rows: dict[str, Row]) -> dict[str, str]:
    """Of each peer the label of its fastest variant."""
    measured = [label for label, row in rows.items() if "seconds_per_round" in row]
    best: dict[str, str] = {}
    for label in sorted(measured, key=lambda label: rows[label]["seconds_per_round"]):
        best.setdefault(rows[label]["peer"], label)
    return best


def peak_gflops() -> float:
    """GFLOP/s of a float32 matrix product of 1,024 x 1,024 in JAX, the best of several calls."""
    multiply = jax.jit(jnp.matmul)
    x = jnp.ones((PEAK_SIZE, PEAK_SIZE), jnp.float32)
    jax.block_until_ready(multiply(x, x))
    seconds = []
    for _ in range(PEAK_CALLS):
        begin = time.perf_counter()
        jax.block_until_ready(multiply(x, x))
        seconds.append(time.perf_counter() - begin)
    return 2 * PEAK_SIZE**3 / min(seconds) / 1e9


def check(workload: Workload, variants: list[Variant]) -> dict[str, Row]:
    """The largest difference of a parameter to ours, after a round without randomness.

    Returns:
      Label -> kind of round -> difference, or the error.
    """
    found: dict[str, Row] = {variant.label: {} for variant in variants}
    ours: dict[str, dict[str, np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in variants:
            row = found[variant.label]
            with _noting_errors(row), Worker(variant.command) as worker:
                for kind, changed in workloads.order_free(workload).items():
                    path = pathlib.Path(folder) / "params.npz"
                    once = dataclasses.replace(changed, num_warmup=1)
                    worker.ask(
                        workload=dataclasses.asdict(once),
                        threads=variant.threads,
                        params_file=str(path),
                    )
                    with np.load(path) as params:
                        after = dict(params)
                    if variant.peer == "ours":
                        ours[kind] = after
                    elif kind in ours:
                        row[kind] = largest_difference(after, ours[kind])
    return found


def largest_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Of the numbers in two sets of arrays; infinite if one is not a number."""
    assert a.keys() == b.keys(), f"expected the parameters {sorted(b)}, got {sorted(a)}"
    differences = [float(np.max(np.abs(a[name] - b[name]))) for name in a]
    return max(x if x == x else float("inf") for x in differences)


def run_workload(
    workload: Workload,
    variants: list[Variant],
    skipped: dict[str, Row],
    repeats: int,
    *,
    with_check: bool,
) -> dict[str, Any]:
    """All that is told of one workload."""
    reason = workloads.missing(workload)
    if reason:
        print(f"skipped {workload.name}: {reason}", file=sys.stderr, flush=True)
        return {"skipped": reason, "rows": {}}
    wanted = [v for v in variants if v.peer in ("ours", "lanes", *workload.peers)]
    checks = check(workload, wanted) if with_check and len(wanted) > 1 else {}
    rows, machine = measure(workload, wanted, repeats)
    for label, differences in checks.items():
        rows[label]["check"] = differences
    rows |= {peer: row for peer, row in skipped.items() if peer in workload.peers}
    return {
        "settings": dataclasses.asdict(workload),
        "machine_by_repeat": machine,
        "best": best_labels(rows),
        "rows": rows,
    }


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = lambda known: lambda text: _names(text, known)  # noqa: E731
    add = parser.add_argument
    add("--workloads", type=names(WORKLOADS), help="some of them, a,b")
    add("--peers", type=names(PEERS), default=list(PEERS), help="some of them, or '' for ours only")
    add("--repeats", type=int, default=7)
    add("--threads", type=_integers, help="of PyTorch and pfl: 1 and the number of cores")
    add("--lanes", type=_integers, default=[], help="measures ours with these numbers too, 1,4,16")
    add(
        "--quick", action="store_true", help="a smoke run of tiny sizes, of linear_100 and 1 thread"
    )
    add("--no-check", action="store_true", help="leave out the comparison of parameters")
    add("--python", type=_program, default=sys.executable, help="runs our library")
    add("--peer-python", default=sys.executable, help="makes the environments of the peers")
    add("--peers-here", action="store_true", help="peers are installed where our library is")
    default = pathlib.Path("~/.cache/fedjax-core/peers").expanduser()
    add("--environments", type=pathlib.Path, default=default, help="folder of the environments")
    version = "{}{:02}".format(*jax.__version_info__[:2])
    default = pathlib.Path(__file__).parent / "results" / f"rounds_jax{version}.json"
    add("--output", type=pathlib.Path, help=f"JSON file to write: {default}, none if quick")
    args = parser.parse_args(arguments)
    args.workloads = args.workloads or (["linear_100"] if args.quick else list(WORKLOADS))
    args.threads = args.threads or ([1] if args.quick else sorted({1, os.cpu_count() or 1}))
    args.output = args.output or (None if args.quick else default)
    args.repeats = 1 if args.quick else args.repeats
    return args


def _names(text: str, known: Iterable[str]) -> list[str]:
    chosen = [name for name in text.split(",") if name]
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}; got {unknown[0]}")
    return chosen


def _integers(text: str) -> list[int]:
    return sorted({int(number) for number in text.split(",")})


def _program(text: str) -> str:
    """A path from the folder that this was started in, for workers start in another one."""
    return str(pathlib.Path(text).absolute()) if os.sep in text else text


def main() -> int:
    """Measures, prints and writes; the status is 1 if a peer does other arithmetic than ours."""
    args = parse_args()
    chosen = [WORKLOADS[name] for name in args.workloads]
    chosen = [workloads.quick(x) for x in chosen] if args.quick else chosen
    wanted = [peer for peer in args.peers if any(peer in x.peers for x in chosen)]

    def ensure(peer: str) -> pathlib.Path:
        if args.peers_here:
            return pathlib.Path(args.python)
        return environments.ensure(peer, args.environments.absolute(), args.peer_python)

    variants, skipped = make_variants(
        wanted, python=args.python, threads=args.threads, ensure=ensure, lanes=args.lanes
    )
    results: dict[str, Any] = {
        "machine": describe_machine(),
        "quick": args.quick,
        "repeats": args.repeats,
        "workloads": {},
    }
    for workload in chosen:
        found = run_workload(
            workload, variants, skipped, args.repeats, with_check=not args.no_check
        )
        results["workloads"][workload.name] = found
        print(f"{workload.name}: done, load {os.getloadavg()}", file=sys.stderr, flush=True)
        if args.output:  # after each workload: a long run that is stopped keeps what it has
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    rows = [row for x in results["workloads"].values() for row in x["rows"].values()]
    return int(any(has_failed(row.get("check", {})) for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
