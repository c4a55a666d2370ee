"""Ctrl-C that waits for a safe place."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C inside the block into an event; a second one interrupts at once.

    A line on the standard error says so.

    A round that is cut in the middle may already have given its state away (donated buffers), and
    leaves logs that end in half a line. So the loop looks at the event between rounds. Outside the
    main thread, or where the program handles Ctrl-C in a way of its own, nothing is changed.

    Yields:
      The event, set once Ctrl-C was pressed.

    Example:
      >>> with deferred_interrupt() as interrupted:
      ...     signal.raise_signal(signal.SIGINT)
      ...     interrupted.is_set()
      True
    """
    interrupted = threading.Event()
    previous = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()
        # Past Python's buffers, which the interrupted code may be writing to at this moment.
        with contextlib.suppress(OSError):
            os.write(2, b"\nfinishing what is in progress; Ctrl-C again stops at once\n")

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or previous is not signal.default_int_handler:
        yield interrupted
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
