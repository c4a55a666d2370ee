"""``fedjax-core demo``: the same training twice, with raw and with quantised updates.

What TensorFlow Federated's tutorial "TFF for Federated Learning Research: Model and Update
Compression" shows, on data that comes with the dependencies.
"""

import pathlib
import statistics
from collections.abc import Callable, Mapping

from fedjax_core.bits import format_bits
from fedjax_core.cli import options, training
from fedjax_core.compression import uniform_quantize
from fedjax_core.learning import plots, writers
from fedjax_core.learning.history import History

PICTURE_NAME = "comparison.png"


def run(settings: options.Demo) -> bool:
    """Trains both runs and compares them; returns whether Ctrl-C ended one."""
    options.check(settings)
    codecs = {
        "original": None,
        "compression": uniform_quantize(settings.bits),
    }
    for name in codecs:
        writers.check_log_folder(settings.log_dir / name, overwrite=settings.overwrite)
    splits = training.load_splits("digits", settings, num_clients=settings.num_clients)
    model = training.make_model("cnn")
    print(training.describe(splits))
    experiments = {
        name: training.make_experiment(model, splits, codec, settings)
        for name, codec in codecs.items()
    }
    # Both are made before the first run starts: none shows the logs of an earlier one.
    folders = {
        name: writers.log_folder(settings.log_dir / name, overwrite=settings.overwrite)
        for name in codecs
    }
    runs: dict[str, History] = {}
    for name, experiment in experiments.items():
        print(f"\n{name}:", flush=True)
        _, runs[name] = training.train_once(experiment, settings, folder=folders[name], title=name)
        if runs[name].interrupted:
            break
    return _conclude(settings.log_dir, runs)


def comparison_table(runs: Mapping[str, History]) -> str:
    """The last numbers of each run side by side, one column a run, each of at least one round."""
    rows = [["", *runs]]
    rows += [[title, *map(summary, runs.values())] for title, summary in _SUMMARIES.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_aligned(row, widths) for row in rows)


def _aligned(row: list[str], widths: list[int]) -> str:
    cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "  ".join([f"{row[0]:<{widths[0]}}", *cells])


def _conclude(folder: pathlib.Path, runs: Mapping[str, History]) -> bool:
    """Prints the table and where the files are."""
    finished = {name: history for name, history in runs.items() if len(history)}
    if finished:
        print(f"\n{comparison_table(finished)}\n")
        plots.comparison(finished, folder / PICTURE_NAME)
        print(f"picture: {folder / PICTURE_NAME}")
    print(f"curves: tensorboard --logdir {folder}")
    interrupted = any(history.interrupted for history in runs.values())
    print(
        f"{'interrupted; ' if interrupted else ''}logs: {', '.join(str(folder / n) for n in runs)}"
    )
    return interrupted


def _last_test(name: str) -> Callable[[History], str]:
    def summary(history: History) -> str:
        value = history.last_test().get(name)
        return "-" if value is None else f"{value:.4f}"

    return summary


_SUMMARIES: dict[str, Callable[[History], str]] = {
    "rounds": lambda history: str(len(history)),
    "train loss": lambda history: f"{history[-1].train['loss']:.4f}",
    "test loss": _last_test("loss"),
    "test accuracy": _last_test("accuracy"),
    "sent down": lambda history: format_bits(history[-1].broadcasted_bits),
    "sent up": lambda history: format_bits(history[-1].aggregated_bits),
    "seconds a round": lambda history: f"{statistics.median(r.seconds for r in history):.2f}",
}
