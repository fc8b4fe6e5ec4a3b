"""Single training runs of the benchmark scripts: kept by content, taken up where they were stopped."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kd_yolo
from kd_yolo.compare.identity import data_fingerprint
from kd_yolo.compare.job import Job, JobResult
from kd_yolo.compare.local import execute
from kd_yolo.errors import KDYoloError
from kd_yolo.files import sha256
from kd_yolo.nn.student import student_spec
from kd_yolo.resources import builtin_root, load_yaml
from kd_yolo.tasks.stock_defaults import finetuned_defaults, narrowed_defaults

METRIC = "metrics/mAP50-95(B)"
# Of every run: nothing is drawn, exported or timed in between.
FIXED = {"cache": "ram", "plots": False, "verbose": False, "export": "none", "benchmark": False}


def run_of(name: str, arguments: Mapping[str, Any], out: Path, threads: int = 1) -> Job:
    """Return a run; its folder's name ends in the hash of all that determines it.

    That is its arguments, the content of its files and of its data set, the method's and the narrowed student's
    shipped defaults, and the versions of this package and of Ultralytics.

    Args:
        name: How its folder begins.
        arguments: Keys of ``kd-yolo train``; ``FIXED`` is added.
        out: Where the folder ``runs`` lies.
        threads: CPU threads.
    """
    full = {**FIXED, **arguments}
    identity = {key: _content(key, value) for key, value in full.items() if key != "device"}
    identity["versions"] = {"kd_yolo": kd_yolo.__version__, "ultralytics": version("ultralytics")}
    if full.get("method") != "none":
        file = builtin_root() / "methods" / f"{full.get('method', 'kd-lightnet')}.yaml"
        identity["shipped"] = [load_yaml(file), narrowed_defaults()]
    address = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = f"{name}-{address[:10]}"
    return Job(folder, address, out / "runs" / folder, full, threads=threads)


def teacher_keys(weights: str, data: str, epochs: int) -> dict[str, Any]:
    """Return the keys that train a teacher from a pretrained file as ``teacher=self`` does, mosaics off at the end."""
    recipe = finetuned_defaults(student_spec(weights), Path(data), is_teacher=True)
    tail = epochs // 4 if recipe.get("mosaic", 1.0) else 0
    plain = {"model": weights, "teacher": "none", "method": "none", "epochs": epochs}
    return {**plain, **recipe, "close_mosaic": tail}


def train(jobs: Sequence[Job], workers: int) -> list[JobResult]:
    """Do the runs that are not done, several at once, and return all results in order.

    Raises:
        KDYoloError: One failed.
    """
    results = execute(jobs, workers=workers, on_done=lambda r: print(f"{r.name}: {r.status} {r.reason}", flush=True))
    for result in results:
        if result.status != "done":
            raise KDYoloError(f"{result.name}: {result.reason}; see {result.log}; the same command goes on")
    return results


def best_so_far(job: Job) -> list[float]:
    """Return the highest mAP50-95 on validation up to each epoch that has ended, in points."""
    file = job.folder / "student" / "results.csv"
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        values = [100 * float(row[METRIC]) for row in csv.DictReader(stream) if row.get(METRIC)]
    return [max(values[: end + 1]) for end in range(len(values))]


def _content(key: str, value: Any) -> Any:
    """Return what a file's name stands for: a checkpoint's bytes, a data set's images and labels."""
    path = Path(str(value))
    if key == "data" and path.is_file():
        return data_fingerprint(path)
    return sha256(path) if path.suffix == ".pt" and path.is_file() else value
