import io
import json
import re

import pytest

from fedjax_core.errors import StorageError
from fedjax_core.learning import writers
from fedjax_core.learning.history import RoundRecord

RECORDS = [
    RoundRecord(
        round=number,
        train={"loss": 2.5 - number, "accuracy": 0.25 * number},
        broadcasted_bits=(number + 1) * (1 << 40) + 1,
        aggregated_bits=(number + 1) << 20,
        test={"accuracy": 0.75} if number == 1 else {},
    )
    for number in range(2)
]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def write_all(writer):
    for record in RECORDS:
        writer.write(record)
    writer.close()


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboards_own_reader_reads_the_scalars(tmp_path):
    write_all(writers.tensorboard(tmp_path))
    scalars = read_events(tmp_path)
    assert scalars["loss"] == [(0, 2.5), (1, 1.5)]
    assert scalars["accuracy"] == [(0, 0.0), (1, 0.25)]
    # Exact in float32, and the one above is not: 2**40 + 1 has 41 binary digits.
    assert scalars["aggregated_bits"] == [(0, 2.0**20), (1, 2.0**21)]
    assert scalars["broadcasted_bits"] == [(0, 2.0**40), (1, 2.0**41)]
    assert scalars["test_accuracy"] == [(1, 0.75)]


def test_events_can_be_read_while_the_run_goes_on(tmp_path):
    writer = writers.tensorboard(tmp_path)
    writer.write(RECORDS[0])
    assert read_events(tmp_path)["loss"] == [(0, 2.5)]
    writer.close()


def test_json_lines_are_exact_and_complete_after_each_round(tmp_path):
    path = tmp_path / "rounds.jsonl"
    writer = writers.json_lines(path)
    writer.write(RECORDS[0])
    (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert (row["round"], row["loss"], row["broadcasted_bits"]) == (0, 2.5, (1 << 40) + 1)
    writer.write(RECORDS[1]._replace(train={"loss": float("nan")}))
    writer.close()
    last = json.loads(path.read_text().splitlines()[-1])
    assert last["loss"] is None
    assert last["test_accuracy"] == 0.75


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"missing.rounds\.jsonl.*choose another"):
        writers.json_lines(tmp_path / "missing" / "rounds.jsonl")


def test_lines_are_plain_where_there_is_no_terminal():
    screen = io.StringIO()
    write_all(writers.progress(2, file=screen))
    assert screen.getvalue() == "".join(f"{record.line()}\n" for record in RECORDS)


def test_a_terminal_gets_a_bar_below_the_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    screen = Terminal()
    write_all(writers.progress(2, title="original", file=screen))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert all(record.line() in text for record in RECORDS)
    assert "original" in text
    assert "2/2" in text


def test_a_new_or_empty_folder_is_made_ready(tmp_path):
    folder = writers.log_folder(tmp_path / "logs" / "run")
    assert folder.is_dir()
    assert writers.log_folder(folder) == folder


def test_a_used_folder_is_refused_unless_overwritten(tmp_path):
    write_all(writers.tensorboard(tmp_path))
    write_all(writers.json_lines(tmp_path / writers.JSON_LINES_NAME))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="--overwrite"):
        writers.log_folder(tmp_path)
    writers.log_folder(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_that_is_a_file_is_named(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(StorageError, match="choose another"):
        writers.log_folder(path)
