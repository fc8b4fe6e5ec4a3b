"""The part of the Ray engine that runs in a worker process of the cluster."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from kd_yolo.compare.claims import CLAIM_FILE
from kd_yolo.compare.job import Job, JobResult, run_job

SEEN_S = 10.0  # a network file system may show a new file late
GUARD = f"""
import json, os, sys
print("watching", flush=True)
if not sys.stdin.read():
    try:
        claim = json.load(open(sys.argv[1]))
        if claim["pid"] == int(sys.argv[2]):
            os.killpg(claim["child"]["pid"], {int(signal.SIGKILL)})
    except (OSError, ValueError, KeyError):
        pass  # no training under way
"""


def run_on_worker(job: Job, mark: Path) -> JobResult:
    """Do one run.

    Args:
        job: The run.
        mark: A file that whoever sent the run out has left beside the runs' folders.

    Returns:
        The run's result; failed when this machine does not see ``mark``, before any folder is created.
    """
    end = time.monotonic() + SEEN_S
    while not mark.is_file():
        if time.monotonic() > end:
            reason = (
                f"{socket.gethostname()} does not see {mark.parent}; give project= in a folder that all machines share"
            )
            return JobResult(job.name, job.address, "failed", dict(job.labels), reason=reason)
        time.sleep(0.5)
    with guarded(job):
        return run_job(job)


@contextlib.contextmanager
def guarded(job: Job) -> Iterator[None]:
    """Have a small process end the training should this process be killed.

    The training has a session of its own and would go on without its worker, on processors that Ray gives to the next
    run. The guard notices the death by the end of its standard input.
    """
    command = [sys.executable, "-I", "-S", "-c", GUARD, str(job.folder / CLAIM_FILE), str(os.getpid())]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert guard.stdout is not None
    guard.stdout.readline()  # it watches from here on
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            guard.communicate(b"done")
