"""The workers' side of the line protocol: one JSON object a line, a request in, an answer out.

    {"workload": {...}, "threads": 2, "params_file": null}
        -> {"ready": true, "load_s": ..., "compile_s": ..., "versions": {...}}
    {"run": 3}
        -> {"seconds_per_round": ..., "client_steps": ..., "peak_rss_mb": ..., "loss": ...}

Anything that goes wrong gives {"error": "..."}. With `params_file` the parameters after the first
round are saved there.
"""

import importlib.metadata
import json
import math
import os
import pathlib
import platform
import resource
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TextIO

import numpy as np

from benchmarks import workloads
from benchmarks.workloads import Data, Params, Workload


class Session(Protocol):
    """A peer that holds the data and a model."""

    def run(self, cohorts: list[np.ndarray]) -> None:
        """Runs a round for each cohort of client positions; returns when the result is there."""
        ...

    def params(self) -> Params:
        """The parameters now, in the layout of `workloads`."""
        ...

    def executed(self, sizes: np.ndarray) -> tuple[int | None, int | None]:
        """Steps, and rows of batches, that a round on clients of such sizes goes through.

        Those that only pad are counted in; None where it is not known.
        """
        ...


Build = Callable[[Workload, Data, Params], Session]


class Job(NamedTuple):
    """What a worker works on between requests."""

    workload: Workload
    data: Data
    session: Session


def serve(build: Build, packages: tuple[str, ...], set_threads: Callable[[int], None]) -> int:
    """Answers requests until standard input ends.

    Args:
      build: makes the session.
      packages: whose versions are told.
      set_threads: called with the number of threads, where one is asked for.
    """
    answers = _claim_stdout()
    job: Job | None = None
    next_round = 0
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if "workload" in request:
                if request.get("threads"):
                    set_threads(request["threads"])
                job, answer = _start(build, request)
                next_round = job.workload.num_warmup
                answer["versions"] = _versions(packages)
            else:
                assert job is not None, "expected a workload before the first run"
                answer = _run(job, range(next_round, next_round + request["run"]))
                next_round += request["run"]
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def _claim_stdout() -> TextIO:
    """Standard output for the answers alone: what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _start(build: Build, request: dict[str, Any]) -> tuple[Job, dict[str, Any]]:
    """Builds the session and warms it up."""
    workload = workloads.from_json(request["workload"])
    data = workloads.make(workload)
    params = workloads.initial_params(workload, data)
    begin = time.perf_counter()
    session = build(workload, data, params)
    built = time.perf_counter()
    session.run(_cohorts(workload, data, range(1)))
    compiled = time.perf_counter()
    if request.get("params_file"):
        np.savez(request["params_file"], **session.params())  # pyright: ignore[reportArgumentType] - names
    session.run(_cohorts(workload, data, range(1, workload.num_warmup)))
    answer = {"ready": True, "load_s": built - begin, "compile_s": compiled - built}
    return Job(workload, data, session), answer


def _run(job: Job, rounds: range) -> dict[str, Any]:
    workload, data, session = job
    cohorts = _cohorts(workload, data, rounds)
    begin = time.perf_counter()
    session.run(cohorts)
    seconds = time.perf_counter() - begin
    memory = _memory_mb()
    sizes = [data.sizes[cohort] for cohort in cohorts]
    executed = [session.executed(x) for x in sizes]
    examples = int(workload.num_epochs * sum(x.sum() for x in sizes))
    loss = workloads.loss(workload, session.params(), data)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the training has diverged: {loss=} after round {rounds[-1]}")
    return {
        "seconds_per_round": seconds / len(rounds),
        "rounds": len(rounds),
        "client_steps": int(sum(workloads.steps(workload, x).sum() for x in sizes)),
        "examples": examples,
        "flops": examples * workloads.flops_per_example(workload, data.num_classes),
        "steps_executed": _sum([steps for steps, _ in executed]),
        "rows_executed": _sum([rows for _, rows in executed]),
        "loss": loss,
        **memory,
    }


def _cohorts(workload: Workload, data: Data, rounds: range) -> list[np.ndarray]:
    return [workloads.cohort(workload, data, number) for number in rounds]


def _sum(numbers: list[int | None]) -> int | None:
    known = [n for n in numbers if n is not None]
    return sum(known) if len(known) == len(numbers) else None


def _memory_mb() -> dict[str, float]:
    """The largest resident memory so far and that of now, in MiB."""
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        unit = 2**20 if platform.system() == "Darwin" else 2**10
        return {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    # The peak of getrusage begins with that of the process which started this one.
    fields = dict(line.split(":", 1) for line in lines)
    names = {"peak_rss_mb": "VmHWM", "rss_mb": "VmRSS"}
    return {key: int(fields[name].split()[0]) / 2**10 for key, name in names.items()}


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}
