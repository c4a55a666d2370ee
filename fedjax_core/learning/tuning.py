"""How an algorithm's rounds are run, why, and what other ways would cost.

explain(algorithm, cohort)        the choices, the reasons, and what they cost in padding
tune(algorithm, state, cohort)    measures candidates, and returns the fastest as an `Execution`
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fedjax_core.datasets.cohort import Cohort
from fedjax_core.errors import ArgumentError, FederatedTypeError
from fedjax_core.execution.config import Execution, Tuning, TuningRow
from fedjax_core.execution.convolutions import convolutions_of
from fedjax_core.language.program import Program
from fedjax_core.learning.algorithm import Algorithm
from fedjax_core.learning.checks import check_columns
from fedjax_core.learning.rounds import State

_LANES = (1, 4, 16, 64, 256)

# More waves than this in one program take minutes to compile.
_MOST_UNROLLED = 32

_MODES = {
    "reference": "an interpreter over Python lists: slow, and obviously right",
    "stacked": "all clients side by side: memory grows with the cohort",
    "streamed": "one loop over waves in one program: memory does not grow with the cohort",
    "unrolled": "one program without a loop over waves: compilation grows with the cohort",
    "dispatched": "one program for a wave, called by the host",
}


def tune(
    algorithm: Algorithm,
    state: State,
    cohort: Cohort,
    *,
    candidates: Sequence[Execution] | None = None,
    num_repeats: int = 3,
) -> Execution:
    """Measures ways to run an algorithm's rounds, and returns the fastest.

    What it returns is an ordinary value: a run that is given it computes the same bits again,
    whereas measuring again may choose something else.

    Args:
      algorithm: to be tuned; not changed.
      state: of it.
      cohort: a typical one. Times hold for cohorts like it.
      candidates: what to try; by default several numbers of lanes, and the forms of the loop.
      num_repeats: rounds measured with each candidate, after one that compiles.

    Returns:
      The fastest candidate with all measurements in `tuning`; give it to the algorithm as
      `execution`, or to ``algorithm.with_execution``.

    Raises:
      ArgumentError: without a candidate, or if none of them runs.

    Examples:
      >>> best = tune(algorithm, state, cohort)  # doctest: +SKIP
      >>> algorithm = algorithm.with_execution(best)  # doctest: +SKIP
    """
    _check(algorithm, cohort)
    if isinstance(num_repeats, bool) or not isinstance(num_repeats, int) or num_repeats < 1:
        raise ArgumentError(f"tune: expected num_repeats of at least 1, got {num_repeats!r}.")
    given = _candidates(algorithm.execution, cohort) if candidates is None else candidates
    is_list = isinstance(given, list | tuple) and len(given) > 0
    if not is_list or not all(isinstance(candidate, Execution) for candidate in given):
        raise ArgumentError(
            f"tune: expected executions as candidates, got {candidates!r}; pass a list of them."
        )
    trials = [_Trial(algorithm, candidate) for candidate in given]
    for trial in trials:
        trial.warm_up(state, cohort)
    for _ in range(num_repeats):
        for trial in trials:  # in turn, so that a busy machine is so for all of them
            trial.run(state, cohort)
    rows = tuple(trial.row() for trial in trials)
    running = [(row.seconds, k) for k, row in enumerate(rows) if row.seconds is not None]
    if not running:
        failures = "; ".join(f"{row.mode}, lanes {row.lanes}: {row.failure}" for row in rows)
        raise ArgumentError(f"tune: expected a candidate that runs, but {failures}.")
    device = algorithm.execution.device
    tuning = Tuning(device.platform, device.device_kind, jax.__version__, cohort.num_clients, rows)
    best = given[min(running)[1]]
    return dataclasses.replace(best, donate=algorithm.execution.donate, tuning=tuning)


class _Trial:
    """One candidate and what was measured of it."""

    def __init__(self, algorithm: Algorithm, execution: Execution) -> None:
        self._execution = dataclasses.replace(execution, donate=False, tuning=None)
        self._algorithm = algorithm.with_execution(self._execution)
        self._compile_seconds: float | None = None
        self._seconds: list[float] = []
        self._failure = ""

    def warm_up(self, state: State, cohort: Cohort) -> None:
        """The first round, which compiles; a failure takes the candidate out."""
        try:
            self._compile_seconds = self._timed(state, cohort)
        except Exception as error:  # whatever it is, the other candidates are to be measured
            self._failure = f"{type(error).__name__}: {error}".splitlines()[0]

    def run(self, state: State, cohort: Cohort) -> None:
        """One more round."""
        if not self._failure:
            self._seconds.append(self._timed(state, cohort))

    def _timed(self, state: State, cohort: Cohort) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(self._algorithm.update(state, cohort))
        return time.perf_counter() - begin

    def row(self) -> TuningRow:
        """What was measured."""
        seconds = statistics.median(self._seconds) if self._seconds else None
        mode, lanes = self._execution.mode, self._execution.lanes
        return TuningRow(mode, lanes, self._compile_seconds, seconds, self._failure)


def _candidates(execution: Execution, cohort: Cohort) -> list[Execution]:
    """Numbers of lanes up to all clients on a device, and the other forms of the loop."""
    on_device = max(-(-cohort.num_clients // execution.num_shards), 1)
    numbers = sorted({min(lanes, on_device) for lanes in _LANES})
    found: list[tuple[Any, int]] = [("streamed", lanes) for lanes in numbers]
    if on_device <= _MOST_UNROLLED:
        found.append(("unrolled", 1))
    if execution.mesh is None:
        found.append(("dispatched", 1))
    return [dataclasses.replace(execution, mode=mode, lanes=lanes) for mode, lanes in found]


def explain(algorithm: Algorithm, cohort: Cohort) -> str:
    """What the execution of an algorithm comes to for a cohort, and why, as text.

    Args:
      algorithm: any.
      cohort: a typical one.

    Raises:
      FederatedTypeError: for what is no algorithm or no cohort.
    """
    _check(algorithm, cohort)
    execution = algorithm.execution
    choice = execution.choose(cohort.num_clients)
    lengths = np.where(np.asarray(cohort.valid), np.asarray(cohort.length), 0)
    num_waves = -(-len(lengths) // (choice.lanes * execution.num_shards))
    needed, executed = examples_executed(lengths, choice.lanes, execution.num_shards)
    padding = executed / needed if needed else 1.0
    device = execution.device
    rows = [
        ("device", f"{execution.num_shards} x {device.platform} ({device.device_kind})"),
        ("jax", jax.__version__),
        ("mode", f"{choice.mode}: {_MODES[choice.mode]} ({choice.why_mode})"),
        ("lanes", f"{choice.lanes}: {choice.why_lanes}"),
        ("waves", f"{num_waves} on each device"),
        ("examples", f"{needed:,} needed, {executed:,} executed (padding x{padding:.2f})"),
        ("convolutions", _convolutions(algorithm.computation.program, device.platform)),
        ("compiled", "; ".join(algorithm.compiled()) or "nothing yet"),
        ("to repeat", json.dumps(execution.resolved(cohort.num_clients).to_dict(tuning=False))),
    ]
    lines = [f"{name:<13} {text}" for name, text in rows]
    return "\n".join([*lines, *([str(execution.tuning)] if execution.tuning else [])])


def examples_executed(lengths: np.ndarray, lanes: int, num_shards: int = 1) -> tuple[int, int]:
    """How many examples clients have, and how many places for examples their waves step through.

    Args:
      lengths: of each client, ``[clients]``.
      lanes: clients side by side; a wave takes as long as its longest client.
      num_shards: parts that the clients are spread over, in their order.

    Examples:
      >>> examples_executed(np.array([1, 9, 2, 8]), lanes=2)
      (20, 22)
    """
    lengths = np.asarray(lengths)
    on_device = -(-len(lengths) // num_shards)
    padded = np.zeros(on_device * num_shards, np.int64)
    padded[: len(lengths)] = lengths
    executed = 0
    for part in padded.reshape(num_shards, -1):
        ordered = np.sort(part)[::-1] if lanes > 1 else part
        waves = np.zeros(-(-len(part) // lanes) * lanes, np.int64)
        waves[: len(part)] = ordered
        executed += int(waves.reshape(-1, lanes).max(axis=1).sum()) * lanes
    return int(lengths.sum()), executed


def _convolutions(program: Program, platform: str) -> str:
    count = convolutions_of(program)
    if not count:
        return "none"
    if platform != "cpu":
        return f"{count}, as the model has them"
    return (
        f"{count}, re-bound to NHWC x HWIO: in other layouts XLA's CPU backend runs them as naive "
        "loops inside of a loop"
    )


def _check(algorithm: Any, cohort: Any) -> None:
    for value, kind in ((algorithm, Algorithm), (cohort, Cohort)):
        if not isinstance(value, kind):
            raise FederatedTypeError(
                f"expected an {Algorithm.__name__} and a {Cohort.__name__}, got {value!r} for a "
                f"{kind.__name__}."
            )
    check_columns(cohort)
    num_shards = algorithm.execution.num_shards
    if cohort.pools not in (1, num_shards):
        raise ArgumentError(
            f"expected a cohort for {num_shards} devices, got one that was spread over "
            f"{cohort.pools}; spread it for the execution that the algorithm has."
        )
