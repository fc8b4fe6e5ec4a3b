"""Single training runs of the benchmark scripts: kept by content, taken up where they were stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_yolo.compare.job import Job
from kd_yolo.compare.local import execute
from kd_yolo.errors import KDYoloError
from kd_yolo.files import sha256

# Of every run: nothing is drawn, exported or timed in between.
FIXED = {"cache": "ram", "plots": False, "verbose": False, "export": "none", "benchmark": False}


def run_of(name: str, arguments: Mapping[str, Any], out: Path, threads: int = 1) -> Job:
    """Return a run; its folder's name ends in the hash of all that determines it, files by their content.

    Args:
        name: How its folder begins.
        arguments: Keys of ``kd-yolo train``; ``FIXED`` is added.
        out: Where the folder ``runs`` lies.
        threads: CPU threads.
    """
    full = {**FIXED, **arguments}
    identity = {key: _content(value) for key, value in full.items() if key != "device"}
    address = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = f"{name}-{address[:10]}"
    return Job(folder, address, out / "runs" / folder, full, threads=threads)


def train(jobs: Sequence[Job], workers: int) -> None:
    """Do the runs that are not done, several at once.

    Raises:
        KDYoloError: One failed.
    """
    results = execute(jobs, workers=workers, on_done=lambda r: print(f"{r.name}: {r.status} {r.reason}", flush=True))
    for result in results:
        if result.status != "done":
            raise KDYoloError(f"{result.name}: {result.reason}; see {result.log}; the same command goes on")


def _content(value: Any) -> Any:
    """Return what a file's name stands for: the hash of its bytes; of a data YAML its name, as its paths may differ."""
    path = Path(str(value))
    if path.suffix == ".pt" and path.is_file():
        return sha256(path)
    return path.parent.name if path.name == "data.yaml" else value
