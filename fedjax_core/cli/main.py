"""Entry of the command line: reads the arguments, runs the command, shows errors as one line."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from fedjax_core.cli import options
from fedjax_core.errors import FedjaxError

_FAILED = 2
_INTERRUPTED = 130
_DESCRIPTION = "Federated learning with exact communication costs."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``fedjax-core``.

    Args:
      arguments: the words after the program's name, by default those of the process.

    Returns:
      The exit code: 0, 2 after an error, 130 after Ctrl-C.
    """
    command = None
    try:
        command = _parse(arguments)
        return _INTERRUPTED if _run(command) else 0
    except FedjaxError as error:
        return _fail(error)
    except ModuleNotFoundError as error:
        if error.name not in {"matplotlib", "rich", "tensorboardX", "tyro"}:
            raise
        return _fail(f"{error.name} is missing; pip install 'fedjax-core[cli]'")
    except KeyboardInterrupt:
        # Between rounds the training loop sees to Ctrl-C; this one came before, after, or twice.
        folder = getattr(command, "log_dir", None)
        print(f"interrupted; logs, if any, are in {folder}" if folder else "interrupted")
        return _INTERRUPTED


def run() -> NoReturn:
    """The console script: `main`, and out."""
    code = main()
    if code == _INTERRUPTED:
        # Python's own way out may crash where Ctrl-C cut JAX short in the middle of a compilation.
        # All files are closed by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _parse(arguments: Sequence[str] | None) -> options.Command:
    import tyro

    return tyro.cli(options.Command, prog="fedjax-core", description=_DESCRIPTION, args=arguments)


def _run(command: options.Command) -> bool:
    """Runs one command, importing what it needs; whether Ctrl-C ended it."""
    match command:
        case options.Demo():
            from fedjax_core.cli import demo

            return demo.run(command)
        case options.Train():
            from fedjax_core.cli import training

            return training.run(command)
        case options.Datasets():
            from fedjax_core.cli import listing

            return listing.run()


def _fail(error: FedjaxError | str) -> int:
    message = " ".join([str(error), *getattr(error, "__notes__", ())])
    print(f"fedjax-core: error: {message}", file=sys.stderr)
    return _FAILED
