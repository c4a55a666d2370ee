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
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

# A part runs as a script: its neighbours import each other as a package.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks.codec_parts import codecs, coding
from benchmarks.engine_parts import (
    choice,
    compilations,
    emnist,
    growth,
    memory_of_a_cohort,
    memory_of_rounds,
    overhead,
    run,
    speakers,
    sweep,
    unequal,
)
from benchmarks.machine import describe_machine
from benchmarks.measuring import FULL, QUICK, Figure, Found, Sizes

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
