"""A worker of the Ray engine: the shared folder, and the end of a training whose worker is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from kd_yolo.compare import ray_worker
from kd_yolo.compare.job import Job


def test_run_on_worker__folder_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_worker, "SEEN_S", 0.0)
    job = Job("run", "0" * 64, tmp_path / "runs" / "run", {})
    result = ray_worker.run_on_worker(job, tmp_path / "elsewhere" / ".shared")
    assert result.status == "failed"
    assert "does not see" in result.reason
    assert "all machines share" in result.reason
    assert not job.folder.exists()


WORKER = """
import json, os, subprocess, sys, time
from pathlib import Path
from kd_yolo.compare.job import Job
from kd_yolo.compare.ray_worker import guarded
folder, ending, whose = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
with guarded(Job("a", "b", folder, {})):
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    pid = os.getpid() if whose == "own" else os.getppid()
    (folder / "claim.json").write_text(json.dumps({"pid": pid, "child": {"pid": child.pid}}))
    print(child.pid, flush=True)
    if ending == "killed":
        time.sleep(60)
"""


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Callable[[str, str], psutil.Process]]:
    """Return a function that starts a guarded worker, has it end, and returns its training process."""
    started: list[psutil.Process] = []

    def start(ending: str, whose: str) -> psutil.Process:
        command = [sys.executable, "-c", WORKER, str(tmp_path), ending, whose]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            started.append(psutil.Process(int(worker.stdout.readline())))
            if ending == "killed":
                os.kill(worker.pid, signal.SIGKILL)
        return started[0]

    yield start
    for process in started:
        if process.is_running():
            process.kill()


def lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_guarded__training_ends_with_a_killed_worker(training: Callable[[str, str], psutil.Process]) -> None:
    process = training("killed", "own")
    end = time.monotonic() + 20
    while lives(process) and time.monotonic() < end:
        time.sleep(0.1)
    assert not lives(process)


@pytest.mark.parametrize(("ending", "whose"), [("returns", "own"), ("killed", "other")])
def test_guarded__otherwise_the_training_lives(
    training: Callable[[str, str], psutil.Process], tmp_path: Path, ending: str, whose: str
) -> None:
    process = training(ending, whose)
    time.sleep(2)
    assert lives(process)
    assert json.loads((tmp_path / "claim.json").read_text())["child"]["pid"] == process.pid
