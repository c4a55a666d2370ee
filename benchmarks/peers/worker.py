"""The orchestrator's side of the line protocol: a worker process that is asked and answers."""

import contextlib
import json
import pathlib
import subprocess
import threading
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]


class WorkerError(Exception):
    """A worker answered with an error, or not at all."""


class Worker:
    """A worker process; a context manager that ends it.

    Args:
      command: starts it; it runs in the root of the repository.
      limit_s: seconds after which an answer is waited for no longer.
    """

    def __init__(self, command: list[str], limit_s: float = 1_800.0) -> None:
        self._limit_s = limit_s
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._messages: list[str] = []
        # A pipe that nobody reads would stop the worker once it is full.
        self._reader = threading.Thread(target=self._read_messages, daemon=True)
        self._reader.start()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for the answer.

        Raises:
          WorkerError: the answer is an error, or the worker has ended or takes too long.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None, "opened as a pipe"
        assert stdout is not None, "opened as a pipe"
        timer = threading.Timer(self._limit_s, self._process.kill)
        timer.start()
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            raise WorkerError(self._why_it_ended())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):  # it has ended before it read everything
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout=10)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read_messages(self) -> None:
        stderr = self._process.stderr
        assert stderr is not None, "opened as a pipe"
        for line in stderr:
            self._messages = [*self._messages[-20:], line.rstrip()]

    def _why_it_ended(self) -> str:
        self._process.kill()
        code = self._process.wait()
        self._reader.join(timeout=10)
        said = [line for line in self._messages if line]
        return f"the worker ended with status {code}: {said[-1] if said else 'no message'}"
