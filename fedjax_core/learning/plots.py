"""One picture that compares runs: loss and accuracy, by rounds and by what went up."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from fedjax_core.errors import ArgumentError
from fedjax_core.files import unwritable
from fedjax_core.learning.history import RoundRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MEBI = 2.0**20
_SIZE_INCHES = (10.0, 7.0)


def comparison(runs: Mapping[str, Sequence[RoundRecord]], path: str | pathlib.Path) -> pathlib.Path:
    """Draws loss and accuracy of several runs against rounds and against uplink bits.

    Thin lines are the training metrics of each round, lines with dots the evaluations. Needs the
    extra ``fedjax-core[cli]``; neither a display nor matplotlib's global state is touched.

    Args:
      runs: records of each run by its name.
      path: the PNG file to write.

    Returns:
      `path`.

    Raises:
      ArgumentError: there is no run, or one without a round.
      StorageError: the file cannot be written.
    """
    lengths = {name: len(records) for name, records in runs.items()}
    if not lengths or 0 in lengths.values():
        raise ArgumentError(
            f"expected runs of at least one round each, got {lengths}; plot after the first."
        )
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    metrics = [name for name in ("loss", "accuracy") if _has(runs, name)]
    panels = figure.subplots(len(metrics), 2, squeeze=False, sharey="row")
    for metric, (against_rounds, against_bits) in zip(metrics, panels, strict=True):
        draw_metric(against_rounds, runs, metric, _rounds_done, "round")
        draw_metric(against_bits, runs, metric, _mebibits_up, "sent up by all clients (Mibit)")
    panels[0, 0].legend()
    path = pathlib.Path(path)
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def _has(runs: Mapping[str, Sequence[RoundRecord]], metric: str) -> bool:
    return any(metric in record.train for records in runs.values() for record in records)


def _rounds_done(record: RoundRecord) -> float:
    return record.round + 1


def _mebibits_up(record: RoundRecord) -> float:
    return record.aggregated_bits / _MEBI


def draw_metric(
    axes: "Axes",
    runs: Mapping[str, Sequence[RoundRecord]],
    metric: str,
    position: Callable[[RoundRecord], float],
    label: str,
) -> None:
    """One panel: `metric` of every run against `position` of its records."""
    for number, (name, records) in enumerate(runs.items()):
        color = f"C{number}"
        trained = [(position(record), record.train[metric]) for record in records]
        tested = [(position(record), record.test[metric]) for record in records if record.test]
        axes.plot(*zip(*trained, strict=True), color=color, linewidth=1, label=f"{name}, train")
        if tested:
            axes.plot(*zip(*tested, strict=True), "o-", color=color, label=f"{name}, test")
    axes.set(xlabel=label, ylabel=metric)
    axes.grid(alpha=0.3)
