"""Start and talk to the processes that hold the artifacts."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kd_yolo import errors
from kd_yolo.errors import KDYoloError, ModelError

if TYPE_CHECKING:
    from kd_yolo.bench.runners import Choice

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class WorkerProcess:
    """One artifact in a process of its own."""

    def __init__(self, choice: Choice, threads: int) -> None:
        """Start the process; nothing is loaded yet."""
        self.choice = choice
        quiet = {"YOLO_VERBOSE": "false", "YOLO_AUTOINSTALL": "false"}
        env = {**os.environ, **quiet, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kd_yolo.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=env,
            start_new_session=True,  # Ctrl-C reaches this process only, which then ends the others in order
        )
        if self.process.stdin is None or self.process.stdout is None:
            raise OSError("the worker's pipes could not be opened")
        self._stdin, self._stdout = self.process.stdin, self.process.stdout

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send one command and return its answer.

        Raises:
            KDYoloError: What the process reported, of the class it was there; or the process ended.
        """
        try:
            self._stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._stdin.flush()
            line = self._stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self.process.wait()
            raise ModelError(f"{self.choice}: its process ended with status {status} ({do}); is there enough memory?")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind = getattr(errors, answer["kind"], KDYoloError)
            text = answer["error"]
            raise kind(text if str(self.choice.path) in text else f"{self.choice}: {text}")
        return answer

    def close(self) -> None:
        """End the process."""
        for stream in (self._stdin, self._stdout):
            with contextlib.suppress(OSError):
                stream.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def worker_pool(choices: Sequence[Choice], threads: int) -> Iterator[list[WorkerProcess]]:
    """Start one process an artifact and end all of them, whatever happens."""
    workers: list[WorkerProcess] = []
    try:
        workers.extend(WorkerProcess(choice, threads) for choice in choices)
        yield workers
    finally:
        for worker in workers:
            worker.close()
