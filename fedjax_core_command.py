"""The program ``fedjax-core``: what runs before the library, and with it JAX, is imported."""

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Runs the command line; Ctrl-C while it is being imported ends it without a traceback."""
    previous = signal.getsignal(signal.SIGINT)
    if previous is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from fedjax_core.cli.main import main as run

    signal.signal(signal.SIGINT, previous)
    return run()


def _leave(number: int, frame: FrameType | None) -> None:
    # Not an exception, which an import may swallow; nothing is open or begun yet.
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
