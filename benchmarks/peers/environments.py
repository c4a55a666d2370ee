"""The environments of the peers: one each, made when it is first needed."""

import pathlib
import shutil
import subprocess

REQUIREMENTS = pathlib.Path(__file__).parent


class Unavailable(Exception):
    """A peer cannot be measured here; the message says why."""


def ensure(peer: str, folder: pathlib.Path, python: str) -> pathlib.Path:
    """The Python of the environment of a peer.

    Args:
      peer: its pins are in ``requirements-<peer>.txt``, installed line by line.
      folder: of all environments; this one is in ``folder / peer``, and is reused if it is there.
      python: makes the environment.

    Raises:
      Unavailable: it cannot be made. Nothing is left of it then.
    """
    environment = folder / peer
    own = environment / "bin" / "python"
    if own.exists():
        return own
    requirements = REQUIREMENTS / f"requirements-{peer}.txt"
    try:
        _run([python, "-m", "venv", str(environment)])
        for requirement in _lines(requirements):
            _run([str(own), "-m", "pip", "install", "--quiet", requirement])
    except BaseException:
        # What is half made would be taken for whole by the next run.
        shutil.rmtree(environment, ignore_errors=True)
        raise
    return own


def _lines(requirements: pathlib.Path) -> list[str]:
    lines = (line.split("#")[0].strip() for line in requirements.read_text().splitlines())
    return [line for line in lines if line]


def _run(command: list[str]) -> None:
    try:
        process = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Unavailable(f"{command[0]}: {error}") from error
    if process.returncode:
        errors = [x for x in process.stderr.splitlines() if x.strip() and "notice" not in x]
        reason = next((x for x in reversed(errors) if "ERROR" in x), (errors or ["no message"])[-1])
        raise Unavailable(f"{' '.join(command[1:])}: {reason}")
