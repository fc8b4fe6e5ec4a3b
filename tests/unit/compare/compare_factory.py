"""Runs whose training is a small program of its own, and finished results made from numbers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from kd_yolo.compare import job as job_module
from kd_yolo.compare.cells import Cell
from kd_yolo.compare.job import Job, JobResult

# What a training leaves, written after {pause} seconds; the log of attempts tells how often it was started.
PROGRAM = """
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / "weights").mkdir(parents=True, exist_ok=True)
with (folder / "started.txt").open("a") as stream:
    stream.write(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
print("started", flush=True)
(folder / "run.yaml").write_text("stock: {seed: 0, epochs: 2, batch: 8, imgsz: 64}\\nmethod: {name: none}\\n")
for action in sys.argv[2].split(";"):
    exec(action)
(folder / "weights" / "best.pt").write_bytes(b"x")
(folder / "results.csv").write_text("epoch,time\\n1,10\\n2,14\\n3,18\\n")
metrics = {"metrics/mAP50(B)": 0.5, "metrics/mAP50-95(B)": 0.25}
phases = [{"name": "student", "metrics": metrics, "best_sha256": "ab", "seconds": 18.0}]
(folder / "report.json").write_text(json.dumps({"phases": phases}))
"""


def make_job(folder: Path, name: str = "a", **given: Any) -> Job:
    """Return a run of 32 images in batches of 8."""
    arguments = {"method": "none", "seed": 0, "epochs": 2, "batch": 8, "device": "cpu", "imgsz": 64}
    labels = {"student": "s", "method": "none", "seed": 0, "fold": None}
    return Job(name, f"address-{name}", folder / name, arguments, labels=labels, images=32, **given)


def train_with(monkeypatch: pytest.MonkeyPatch, actions: str = "pass") -> None:
    """Let a run's training be ``PROGRAM`` with these statements in it, separated by ``;``."""

    def command(job: Job) -> list[str]:
        return [sys.executable, "-c", PROGRAM, str(job.folder), actions]

    monkeypatch.setattr(job_module, "train_command", command)


def starts(job: Job) -> list[list[str]]:
    """Return process, threads and GPU of every start of a run's training."""
    file = job.folder / "started.txt"
    return [line.split() for line in file.read_text().splitlines()] if file.is_file() else []


def cell_and_result(
    method: str, seed: int, points: float, student: str = "s", fold: int | None = None, status: str = "done"
) -> tuple[Cell, JobResult]:
    """Return a cell and its result with so many points of mAP50-95."""
    name = f"{student}-{method}-s{seed}-f{fold}"
    job = Job(name, "ab" * 32, Path("runs") / name, {"imgsz": 64, "device": "cpu"})
    cost = {"wall_s": 60.0, "cpu_s": 50.0, "gpu_s": 0.0, "peak_rss_mb": 900.0, "step_ms": 12.0, "complete": True}
    metrics = {"mAP50-95": points / 100, "mAP50": points / 50}
    labels = {"student": student, "method": method, "seed": seed, "fold": fold}
    record = {"metrics": metrics, "cost": cost, "versions": {}, "machine": {}, "test": None, "name": name}
    result = JobResult(name, job.address, status, labels, record if status == "done" else {}, "broke", "x.log")  # type: ignore[arg-type]
    return Cell(student, method, seed, fold, job), result
