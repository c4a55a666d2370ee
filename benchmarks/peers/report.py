"""The results of the benchmark of rounds for a person."""

from typing import Any

TOLERANCE = 1e-4  # of parameters after a round of the check

# Numbers of one variant on one workload, or the reason for there being none.
Row = dict[str, Any]

_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("s a round", "seconds_per_round", ".4f"),
    ("times ours", "ratio", ".2f"),
    ("steps a s", "client_steps_per_second", ",.0f"),
    ("load s", "load_s", ".2f"),
    ("compile s", "compile_s", ".2f"),
    ("peak MiB", "peak_rss_mb", ",.0f"),
    ("MiB after", "rss_mb", ",.0f"),
    ("steps done / needed", "step_padding", ".2f"),
    ("rows done / needed", "row_padding", ".2f"),
    ("of matmul peak", "utilisation", ".1%"),
    ("loss", "loss", ".3f"),
)


def table(results: dict[str, Any]) -> str:
    """The results in Markdown; the fastest variant of each peer is in bold."""
    names = ["workload", "variant", *(name for name, _, _ in _COLUMNS), "check"]
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for name, workload in results["workloads"].items():
        if "skipped" in workload:
            lines.append(f"| {name} | skipped: {_cell(workload['skipped'])} |")
        best = workload.get("best", {}).values()
        lines += [_line(name, label, row, label in best) for label, row in workload["rows"].items()]
    return "\n".join(lines)


def short_table(results: dict[str, Any]) -> str:
    """A line a workload in Markdown: our seconds a round, and how many times that peers take."""
    peers = ("fedjax", "pytorch", "pfl")
    lines = ["| workload | s a round | FedJAX | PyTorch | pfl-research |", f"|{' --- |' * 5}"]
    for name, workload in results["workloads"].items():
        rows, best = workload["rows"], workload.get("best", {})
        if "ours" not in best:
            continue
        ours = format(rows[best["ours"]]["seconds_per_round"], ".4f")
        times = [f"{rows[best[peer]]['ratio']:.2f}x" if peer in best else "" for peer in peers]
        lines.append(f"| {' | '.join([name, ours, *times])} |")
    return "\n".join(lines)


def _line(workload: str, label: str, row: Row, is_best: bool) -> str:
    label = f"**{label}**" if is_best else label
    for reason in ("skipped", "error"):
        if reason in row:
            return f"| {workload} | {label} | {reason}: {_cell(row[reason])} |"
    numbers = [
        "" if row.get(key) is None else format(row[key], style) for _, key, style in _COLUMNS
    ]
    return f"| {' | '.join([workload, label, *numbers, _check_cell(row.get('check', {}))])} |"


def _check_cell(differences: Row) -> str:
    if "error" in differences:
        return _cell(f"error: {differences['error']}")
    worst = max(differences.values(), default=None)
    if worst is None:
        return ""
    return f"{worst:.0e}" + (" DIFFERS" if has_failed(differences) else "")


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def has_failed(row: Row) -> bool:
    """Whether a row of the check shows other arithmetic than ours."""
    return any(isinstance(x, float) and x > TOLERANCE for x in row.values())
