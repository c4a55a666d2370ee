import struct
import sys
import threading

import pytest

from fedjax_core.errors import ArgumentError, StorageError
from fedjax_core.learning import plots
from fedjax_core.learning.history import History, RoundRecord

RUNS = {
    name: History(
        tuple(
            RoundRecord(
                round=number,
                train={"loss": 2.0 / (number + 1), "accuracy": 0.1 * number},
                broadcasted_bits=(number + 1) << 22,
                aggregated_bits=(number + 1) << up,
                test={"loss": 1.0, "accuracy": 0.5} if number % 2 else {},
            )
            for number in range(4)
        )
    )
    for name, up in [("original", 22), ("compression", 20)]
}


def test_the_picture_is_a_png_of_some_size(tmp_path):
    path = plots.comparison(RUNS, tmp_path / "comparison.png")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1200, 840)
    # A panel without curves is a few kilobytes.
    assert len(data) > 20_000


def test_no_global_state_of_matplotlib_is_touched(tmp_path):
    sys.modules.pop("matplotlib.pyplot", None)
    thread = threading.Thread(target=plots.comparison, args=(RUNS, tmp_path / "a.png"))
    thread.start()
    thread.join()
    assert (tmp_path / "a.png").exists()
    assert "matplotlib.pyplot" not in sys.modules


def test_the_curves_are_the_records():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    plots.draw_metric(axes, RUNS, "loss", lambda record: record.aggregated_bits / 2**20, "Mibit")
    trained, tested, compressed, _ = axes.lines
    assert list(trained.get_xdata()) == [4, 8, 12, 16]
    assert list(trained.get_ydata()) == [2.0, 1.0, 2.0 / 3, 0.5]
    assert list(tested.get_xdata()) == [8, 16]
    assert list(compressed.get_xdata()) == [1, 2, 3, 4]


def test_runs_without_accuracy_are_drawn(tmp_path):
    records = [RoundRecord(0, {"loss": 1.0}, 1, 1)]
    assert plots.comparison({"only": records}, tmp_path / "a.png").exists()


@pytest.mark.parametrize("runs", [{}, {"empty": ()}])
def test_nothing_to_draw_is_refused(tmp_path, runs):
    with pytest.raises(ArgumentError, match="at least one round"):
        plots.comparison(runs, tmp_path / "a.png")


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(StorageError, match="missing"):
        plots.comparison(RUNS, tmp_path / "missing" / "a.png")
