"""What a run left: its metrics, its cost over all attempts, where it ran; or the line that says why it failed."""

from __future__ import annotations

import csv
import itertools
import json
import math
import platform
import re
import socket
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_yolo.bench.affinity import physical_cores
from kd_yolo.compare.task import task_of_arguments
from kd_yolo.errors import CheckpointError
from kd_yolo.files import write_json
from kd_yolo.resources import load_yaml

if TYPE_CHECKING:
    from kd_yolo.compare.child import Usage
    from kd_yolo.compare.job import Job

RESULT_FILE = "result.json"
ATTEMPTS_FILE = "attempts.json"
PLAIN_KEYS = ("seed", "epochs", "imgsz", "batch", "optimizer", "lr0", "close_mosaic")
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def finished(folder: Path, address: str) -> dict[str, Any] | None:
    """Return the record of a finished run, or None when there is no usable one for this address."""
    record = read_json(folder / RESULT_FILE)
    if record.get("address") != address or not isinstance(record.get("metrics"), dict):
        return None
    return record if (folder / "weights" / "best.pt").is_file() else None


def result_of_run(job: Job) -> dict[str, Any]:
    """Return the record of a run that has its ``report.json``.

    What only this package's own start of a run measures (CPU seconds, memory) is None for a run that was trained by
    ``kd-yolo train`` and put into place; its wall time comes from the run's own phases.

    Raises:
        CheckpointError: The run's files are damaged, or belong to another run.
    """
    report = read_json(job.folder / "report.json")
    phases = report.get("phases") or []
    if not phases or not job.checkpoint.is_file():
        raise CheckpointError(f"{job.folder}: the run ended without a result; see {job.log}, or delete the folder")
    refuse_other_run(job)
    values, task = phases[-1]["metrics"], task_of_arguments(job.arguments)
    metrics = {name: float(values[key]) for name, key in task.figures.items() if key in values}
    if task.shown[0] not in metrics or not all(math.isfinite(value) for value in metrics.values()):
        raise CheckpointError(f"{job.folder / 'report.json'}: holds no finite {task.shown[0]}; delete the folder")
    attempts = _attempts(job.folder)
    return {
        "address": job.address,
        "name": job.name,
        **job.labels,
        "metrics": metrics,
        "best_sha256": phases[-1].get("best_sha256", ""),
        "cost": _cost(job, attempts, [float(phase.get("seconds", 0.0)) for phase in phases]),
        "versions": _versions(job),
        "machine": _machine(job.threads) if attempts else {},
        "test": None,
    }


def refuse_other_run(job: Job) -> None:
    """Refuse a folder that was trained with other settings than its name says.

    Raises:
        CheckpointError: One of the plain settings differs; the message names it.
    """
    plan = load_yaml(job.folder / "run.yaml")
    stock, method = plan.get("stock") or {}, (plan.get("method") or {}).get("name")
    wanted = job.arguments.get("method")
    if (wanted == "none") != (method == "none"):
        raise CheckpointError(f"{job.folder}: was trained with method={method}, not {wanted}; delete this folder")
    for key in PLAIN_KEYS:
        if key in job.arguments and stock.get(key) != job.arguments[key]:
            raise CheckpointError(
                f"{job.folder}: was trained with {key}={stock.get(key)}, not {job.arguments[key]}; delete this folder"
            )


def record_attempt(folder: Path, began: float, usage: Usage | None) -> None:
    """Write down an attempt: its start, and its cost once it has ended."""
    attempts = [one for one in _attempts(folder) if one["began"] != began]
    entry: dict[str, Any] = {"began": began, "host": socket.gethostname()}
    if usage is not None:
        entry |= {"wall_s": usage.wall_s, "cpu_s": usage.cpu_s, "peak_rss_mb": usage.peak_rss_mb}
        entry["exit_status"] = usage.exit_status
    write_json(folder / ATTEMPTS_FILE, [*attempts, entry])


def why_failed(log: Path, exit_status: int) -> str:
    """Return one line: the program's own last word, or how it ended."""
    if exit_status < 0:
        hint = ", as for want of memory" if exit_status == -9 else ""
        return f"ended by signal {-exit_status}{hint}"
    ended = f"exit status {exit_status}"
    try:
        with log.open("rb") as stream:
            stream.seek(max(log.stat().st_size - 20_000, 0))
            text = stream.read().decode("utf-8", errors="replace")
    except OSError:
        return ended
    text = text.rpartition("\n$ ")[2]  # this attempt's part of the log
    lines = [line.strip() for line in ANSI.sub("", text).replace("\r", "\n").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("kd-yolo: ") or re.match(r"[\w.]*(Error|Exception)\b", line)]
    last = told[-1].removeprefix("kd-yolo: ") if told else ""
    return f"{last} ({ended})" if last else ended


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON mapping; empty when the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _attempts(folder: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads((folder / ATTEMPTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [one for one in content if isinstance(one, dict) and "began" in one] if isinstance(content, list) else []


def _cost(job: Job, attempts: list[dict[str, Any]], phase_seconds: list[float]) -> dict[str, Any]:
    ended = [one for one in attempts if "wall_s" in one]
    wall = sum(one["wall_s"] for one in ended) if ended else sum(phase_seconds)
    cpu = [one["cpu_s"] for one in ended]
    memory = [one["peak_rss_mb"] for one in ended if one["peak_rss_mb"] is not None]
    on_gpu = str(job.arguments.get("device", "cpu")) not in {"cpu", "mps"}
    batch = job.arguments.get("batch", 16)
    images = job.images * job.arguments.get("fraction", 1.0)
    countable = isinstance(batch, int) and batch > 0 and images and not job.arguments.get("unlabeled")
    steps = math.ceil(images / batch) if countable else None
    epoch_s = _epoch_seconds(job.folder / "results.csv")
    return {
        "wall_s": round(wall, 1),
        "cpu_s": round(sum(cpu), 1) if cpu and None not in cpu else None,
        "gpu_s": round(wall, 1) if on_gpu else 0.0,
        "peak_rss_mb": round(max(memory), 1) if memory else None,
        "step_ms": round(1000 * statistics.median(epoch_s) / steps, 2) if epoch_s and steps else None,
        "steps_per_epoch": steps,
        "attempts": max(len(attempts), 1),
        "complete": len(ended) == len(attempts),  # an attempt that was killed with its watcher left no figures
    }


def _epoch_seconds(results: Path) -> list[float]:
    """Return the seconds of every epoch but the first after each start, which builds and caches.

    The column ``time`` counts from the start of the process, so it falls where a run was taken up again.
    """
    try:
        with results.open(encoding="utf-8") as stream:
            times = [
                float({key.strip(): value for key, value in row.items()}["time"]) for row in csv.DictReader(stream)
            ]
    except (OSError, KeyError, ValueError, AttributeError, TypeError):
        return []
    later = [now - before for before, now in itertools.pairwise(times) if now > before]
    return later or times[:1]


def _versions(job: Job) -> dict[str, str]:
    """Return the versions that the run wrote down when it merged its student."""
    found = read_json(job.checkpoint.with_name("best-deploy.json")).get("versions")
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _machine(threads: int) -> Mapping[str, Any]:
    """Return what a run's times depend on; no host name."""
    return {
        "cpu": _cpu_name(),
        "cores": len(physical_cores()),
        "threads": threads,
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
