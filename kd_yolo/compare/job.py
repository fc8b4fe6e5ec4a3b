"""One training run of a comparison: start it, take it up again or accept it, and record what it reached and cost.

A run lies in its own folder, whose name ends in the content address of everything that determines it. ``result.json``
in that folder says that it is finished. Any number of processes, also on several machines that share the folder, may be
told to do the same run: one does it, the others wait.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kd_yolo.compare.child import Usage, run_child
from kd_yolo.compare.claims import Claim, ClaimedElsewhere
from kd_yolo.compare.outcome import RESULT_FILE, finished, record_attempt, result_of_run, why_failed
from kd_yolo.errors import KDYoloError
from kd_yolo.files import write_json

Status = Literal["done", "failed", "busy", "stopped"]
POLL_S = 1.0
USER_ERROR = 2  # bad input: the same command would fail again


@dataclass(frozen=True)
class Job:
    """One run, complete enough to be sent to another machine that sees the same folders.

    Attributes:
        name: Name of the run's folder.
        address: SHA-256 of what determines the run, hexadecimal.
        folder: Absolute folder of the run.
        arguments: Keys of ``kd-yolo train`` without ``project``, ``name`` and ``exist_ok``.
        environment: Variables that the training process gets on top of the ones of its machine.
        labels: What the report calls it: ``student``, ``method``, ``seed`` and ``fold``.
        images: Training images, for the number of steps.
        threads: CPU threads it may use.
        gpus: GPUs it needs, 0 or 1; which one is the engine's business (``CUDA_VISIBLE_DEVICES``).
        retries: How often a run that crashed is taken up again; bad input is never tried twice.
    """

    name: str
    address: str
    folder: Path
    arguments: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, Any] = field(default_factory=dict)
    images: int = 0
    threads: int = 1
    gpus: int = 0
    retries: int = 1

    @property
    def log(self) -> Path:
        """Return the file that gets all output of the run, over all attempts."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def checkpoint(self) -> Path:
        """Return the best checkpoint that the finished run leaves."""
        return self.folder / "weights" / "best.pt"


@dataclass(frozen=True)
class JobResult:
    """What came of a run.

    Attributes:
        name: As in the job.
        address: As in the job.
        status: ``done``, ``failed``, ``stopped`` on request, or ``busy`` when another process does this run.
        labels: As in the job.
        record: Content of ``result.json`` when done: ``metrics``, ``cost``, ``versions``, ``machine`` and more.
        reason: One line when not done.
        log: The run's log file.
        fresh: Whether this call trained, rather than finding the run finished.
    """

    name: str
    address: str
    status: Status
    labels: Mapping[str, Any]
    record: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    log: str = ""
    fresh: bool = False


def run_job(job: Job, wait: bool = True, stop: threading.Event | None = None) -> JobResult:
    """Do a run unless it is done: start it or take it up where it was left, then write its ``result.json``.

    Nothing that goes wrong with the run is raised; it is the result's ``reason``.

    Args:
        job: The run.
        wait: When another living process does this run, wait for it; otherwise return ``busy`` at once.
        stop: When set, the training process is ended and ``stopped`` returned; the run can be taken up later.
    """
    stop = stop or threading.Event()
    try:
        while True:
            done = finished(job.folder, job.address)
            if done is not None:
                return _result(job, "done", record=done)
            try:
                with Claim(job.folder) as claim:
                    return _attempts(job, claim, stop)
            except ClaimedElsewhere as busy:
                if not wait:
                    return _result(job, "busy", reason=str(busy))
            if stop.wait(POLL_S):
                return _result(job, "stopped", reason="stopped while another process does it")
    except (OSError, KDYoloError) as error:
        return _result(job, "failed", reason=str(error).splitlines()[0])


def train_command(job: Job) -> list[str]:
    """Return the command that starts the run, or takes it up when it has begun."""
    program = [sys.executable, "-m", "kd_yolo", "train"]
    if (job.folder / "run.yaml").is_file():
        task = ["task=classify"] if job.arguments.get("task") == "classify" else []
        return [*program, *task, f"resume={job.folder}"]
    place = {"project": job.folder.parent, "name": job.folder.name, "exist_ok": True}
    return [*program, *(f"{key}={_word(value)}" for key, value in {**job.arguments, **place}.items())]


def _attempts(job: Job, claim: Claim, stop: threading.Event) -> JobResult:
    """Train until the run is done, with the claim held."""
    done = finished(job.folder, job.address)  # by the process that held the claim before
    if done is not None:
        return _result(job, "done", record=done)
    fresh = False
    for attempt in range(job.retries + 1):
        if (job.folder / "report.json").is_file():
            break
        fresh = True
        usage = _train_once(job, claim, stop)
        if usage.stopped:
            return _result(job, "stopped", reason="stopped; the same command takes it up again", fresh=True)
        if usage.exit_status == 0:
            break
        if usage.exit_status == USER_ERROR or attempt == job.retries:
            return _result(job, "failed", reason=why_failed(job.log, usage.exit_status), fresh=True)
    record = result_of_run(job)
    write_json(job.folder / RESULT_FILE, record)
    return _result(job, "done", record=record, fresh=fresh)


def _train_once(job: Job, claim: Claim, stop: threading.Event) -> Usage:
    began = time.time()
    record_attempt(job.folder, began, None)  # stays without an end if this process is killed
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), **job.environment}
    usage = run_child(train_command(job), environment, job.log, claim, stop)
    record_attempt(job.folder, began, usage)
    return usage


def _result(job: Job, status: Status, **more: Any) -> JobResult:
    return JobResult(job.name, job.address, status, dict(job.labels), log=str(job.log), **more)


def _word(value: Any) -> str:
    """Return a value as the command line reads it back."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_word(one) for one in value) + "]"
    return repr(value) if isinstance(value, float) else str(value)
