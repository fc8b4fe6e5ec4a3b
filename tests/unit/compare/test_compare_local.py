"""The local engine: how many at once, in which order results come, what Ctrl-C leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from compare_factory import PROGRAM, make_job, starts, train_with

from kd_yolo.compare import local
from kd_yolo.compare.job import Job, JobResult, run_job
from kd_yolo.compare.local import execute, fitting_workers


def test_execute__one_failure_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_with(monkeypatch, "folder.name == 'b' and sys.exit(2)")
    seen: list[str] = []
    jobs = [make_job(tmp_path, name) for name in "abc"]
    results = execute(jobs, workers=2, on_done=lambda result: seen.append(result.name))
    assert [(one.name, one.status) for one in results] == [("a", "done"), ("b", "failed"), ("c", "done")]
    assert sorted(seen) == ["a", "b", "c"]


@pytest.mark.parametrize("workers", [1, 3])
def test_execute__never_more_at_once_than_asked(workers: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lock, running, most = threading.Lock(), [0], [0]

    def fake(job: Job, wait: bool, stop: threading.Event) -> JobResult:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.05)
        with lock:
            running[0] -= 1
        return JobResult(job.name, job.address, "done", {})

    monkeypatch.setattr(local, "run_job", fake)
    results = execute([make_job(tmp_path, str(i)) for i in range(7)], workers=workers)
    assert [one.name for one in results] == [str(i) for i in range(7)]
    assert most[0] == workers


def test_execute__one_run_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_with(monkeypatch, "time.sleep(0.5)")
    jobs = [make_job(tmp_path, name, gpus=1) for name in "abcd"]
    began = time.monotonic()
    execute(jobs, workers=8, devices=["3", "5"])
    devices = [starts(job)[0][2] for job in jobs]
    assert sorted(devices[:2]) == ["3", "5"]
    assert set(devices) == {"3", "5"}
    assert time.monotonic() - began > 1.0  # four runs of half a second on two GPUs


def test_execute__busy_runs_are_left_for_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "BUSY_S", 0.1)
    order: list[str] = []

    def fake(job: Job, wait: bool, stop: threading.Event) -> JobResult:
        order.append(job.name)
        busy = job.name == "a" and order.count("a") < 3
        return JobResult(job.name, job.address, "busy" if busy else "done", {})

    monkeypatch.setattr(local, "run_job", fake)
    seen: list[str] = []
    results = execute([make_job(tmp_path, n) for n in "abc"], workers=1, on_done=lambda one: seen.append(one.name))
    assert seen == ["b", "c", "a"]
    assert [one.status for one in results] == ["done"] * 3


def test_execute__two_comparisons_on_one_folder_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "BUSY_S", 0.1)
    train_with(monkeypatch, "time.sleep(0.3)")
    jobs = [make_job(tmp_path, name) for name in "abcd"]
    both: list[list[JobResult]] = []
    threads = [threading.Thread(target=lambda: both.append(execute(jobs, workers=2))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[one.status for one in results] for results in both] == [["done"] * 4] * 2
    assert [len(starts(job)) for job in jobs] == [1] * 4


MAIN = """
import sys
from pathlib import Path
from kd_yolo.compare import job as module
from kd_yolo.compare.local import execute
program = [sys.executable, "-c", Path(sys.argv[2]).read_text()]
module.train_command = lambda job: [*program, str(job.folder), "time.sleep(120)"]
execute([module.Job(n, n, Path(sys.argv[1]) / n, {"method": "none"}) for n in "ab"], workers=2)
"""


def test_execute__ctrl_c_ends_the_trainings_and_they_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-c", MAIN, str(tmp_path), str(tmp_path / "program.py")]
    main = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    jobs = [make_job(tmp_path, name) for name in "ab"]
    wait_until(lambda: all(starts(job) for job in jobs))
    os.kill(main.pid, signal.SIGINT)
    _, errors = main.communicate(timeout=30)
    assert main.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert not any(psutil.pid_exists(int(starts(job)[0][0])) for job in jobs)
    assert not list(tmp_path.glob("*/claim.json"))
    train_with(monkeypatch)
    assert [run_job(job).status for job in jobs] == ["done", "done"]


@pytest.mark.parametrize(
    ("jobs", "threads", "asked", "devices", "expected"),
    [
        (12, None, None, [], (4, 1)),
        (2, None, None, [], (2, 2)),
        (12, 2, None, [], (2, 2)),
        (12, None, 8, [], (8, 1)),
        (12, 3, 8, [], (8, 3)),
        (12, None, None, ["0", "1"], (2, 2)),
        (12, None, 1, ["0", "1"], (1, 4)),
        (1, None, 8, [], (1, 4)),
        (3, 9, None, [], (1, 9)),
    ],
)
def test_fitting_workers__four_cores(
    jobs: int, threads: int | None, asked: int | None, devices: list[str], expected: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(local, "physical_cores", lambda: [0, 1, 2, 3])
    assert fitting_workers(jobs, threads, asked, devices) == expected


def test_fitting_workers__little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "physical_cores", lambda: list(range(64)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 7e9})())
    assert fitting_workers(100, None, None, [])[0] == 3


def wait_until(condition: Callable[[], bool], patience_s: float = 60.0) -> None:
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
