"""Where the records of a run go: the screen, TensorBoard, a file of JSON lines.

A writer is a pair of functions. It gets each `RoundRecord` as soon as the round is done, and has
written it completely when `write` returns, so that a run that is cut off leaves valid files.
"""

import json
import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import IO, NamedTuple

from fedjax_core.errors import StorageError
from fedjax_core.files import unwritable
from fedjax_core.learning.history import RoundRecord

JSON_LINES_NAME = "rounds.jsonl"
EXECUTION_NAME = "execution.json"
_OWN_PATTERNS = ("events.out.tfevents.*", JSON_LINES_NAME, EXECUTION_NAME)


class Writer(NamedTuple):
    """Takes the records of one run.

    Attributes:
      write: called with each record.
      close: called once, after the last record.
    """

    write: Callable[[RoundRecord], None]
    close: Callable[[], object]


def log_folder(folder: str | pathlib.Path, *, overwrite: bool = False) -> pathlib.Path:
    """Makes the folder of one run's logs, or makes sure that it is free.

    Args:
      folder: where the logs go.
      overwrite: whether to remove the logs of an earlier run. Only files that `tensorboard` and
        `json_lines` wrote, and `execution.json`, are removed, never anything else.

    Returns:
      The folder, which exists now.

    Raises:
      StorageError: the folder holds something and `overwrite` is false, or it cannot be made or
        written.
    """
    folder = check_log_folder(folder, overwrite=overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in _own_files(folder) if overwrite else ():
            path.unlink()
    except (OSError, ValueError) as error:
        raise unwritable(folder, error) from error
    return folder


def check_log_folder(folder: str | pathlib.Path, *, overwrite: bool = False) -> pathlib.Path:
    """Raises as `log_folder` does for a folder in use; makes and removes nothing."""
    folder = pathlib.Path(folder)
    try:
        is_free = not folder.exists() or not any(folder.iterdir())
    except (OSError, ValueError) as error:
        raise unwritable(folder, error) from error
    if not (is_free or overwrite):
        raise StorageError(
            f"expected an empty or new log folder, got {folder} with files in it; "
            "choose another folder, or overwrite it (`overwrite=True`, `--overwrite`)."
        )
    return folder


def _own_files(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for pattern in _OWN_PATTERNS for path in folder.glob(pattern)]


def json_lines(path: str | pathlib.Path) -> Writer:
    """Writes one JSON object a round to a new file at `path`.

    Each object holds `round` and `RoundRecord.scalars`; counts of bits are exact integers, and a
    number that is not finite, which JSON does not know, is ``null``.

    Raises:
      StorageError: the file cannot be written.
    """
    path = pathlib.Path(path)
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise unwritable(path, error) from error

    def write(record: RoundRecord) -> None:
        numbers = {name: _finite(value) for name, value in record.scalars().items()}
        file.write(json.dumps({"round": record.round, **numbers}, allow_nan=False) + "\n")
        file.flush()

    return Writer(write, file.close)


def tensorboard(folder: str | pathlib.Path) -> Writer:
    """Writes TensorBoard event files into `folder`, each number as a scalar of its name.

    The scalars of an event file are float32, so a count of bits is rounded there to 24 binary
    digits; the exact one is in `json_lines`. Needs the extra ``fedjax-core[cli]``.
    """
    # Not its SummaryWriter, which writes from a thread: there `flush` does not wait for the queue.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import (
        Event,  # pyright: ignore[reportAttributeAccessIssue] - protobuf makes it at run time
    )
    from tensorboardX.summary import scalar

    events = EventsWriter(str(pathlib.Path(folder) / "events"))

    def write(record: RoundRecord) -> None:
        now = time.time()
        for name, value in record.scalars().items():
            summary = scalar(name, value)
            events.write_event(Event(wall_time=now, step=record.round, summary=summary))
        events.flush()

    return Writer(write, events.close)


def lines(file: IO[str] | None = None) -> Writer:
    """Prints the line of each record to `file`, the standard output by default.

    Example:
      >>> writer = lines()
      >>> writer.write(RoundRecord(3, {"loss": 0.5}, 64, 32))
      round  3, train_metrics=(loss=0.5000), broadcasted_bits=64.00bit, aggregated_bits=32.00bit
    """

    def write(record: RoundRecord) -> None:
        print(record.line(), file=file, flush=True)

    return Writer(write, lambda: None)


def progress(num_rounds: int, *, title: str = "", file: IO[str] | None = None) -> Writer:
    """A progress bar below the lines on a terminal, the lines alone elsewhere.

    Args:
      num_rounds: how many rounds there will be.
      title: what the bar is called.
      file: where to print, the standard output by default.
    """
    screen: IO[str] = sys.stdout if file is None else file
    if not screen.isatty():
        return lines(screen)
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(file=screen), transient=True)
    task = bar.add_task(title, total=num_rounds)
    bar.start()

    def write(record: RoundRecord) -> None:
        bar.console.print(record.line(), markup=False, highlight=False, soft_wrap=True)
        bar.advance(task)

    return Writer(write, bar.stop)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
