"""The test split, judged once: after every choice was made on validation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_yolo.bench.accuracy import judge
from kd_yolo.compare.cells import TEACHER, Cell
from kd_yolo.compare.claims import Claim
from kd_yolo.compare.job import JobResult
from kd_yolo.compare.outcome import RESULT_FILE, finished
from kd_yolo.compare.report import Row
from kd_yolo.compare.settings import CompareKeys, words
from kd_yolo.errors import ConfigError, nearest
from kd_yolo.files import write_json

WINNER = "winner"


def tested_methods(keys: CompareKeys, labels: Sequence[str]) -> list[str]:
    """Return the methods whose runs are judged on the test split, ``winner`` when none is named.

    Raises:
        ConfigError: One of them is not in the comparison.
    """
    if not keys.test:
        return []
    named = words(keys.test_methods) or [WINNER]
    for name in named:
        if name not in (*labels, WINNER):
            raise ConfigError(f"test_methods={name}: is not compared here{nearest(name, [*labels, WINNER])}")
    return named


def winners(rows: Sequence[Row], metric: str, baseline: str) -> dict[str, str]:
    """Return the method with the best validation mean of each student, the baseline left out."""
    best: dict[str, Row] = {}
    for row in rows:
        if row.method != baseline and (
            row.student not in best or _mean(row, metric) > _mean(best[row.student], metric)
        ):
            best[row.student] = row
    return {student: row.method for student, row in best.items()}


def judge_on_test(
    cells: Sequence[Cell],
    results: Mapping[str, JobResult],
    rows: Sequence[Row],
    named: Sequence[str],
    keys: CompareKeys,
) -> dict[str, JobResult]:
    """Return all results, those of the named methods with their figures on the test split, which are kept for good.

    Raises:
        KDYoloError: A checkpoint cannot be judged.
    """
    winning = winners(rows, keys.metric, keys.baseline)
    wanted = {(student, name) for student in {cell.student for cell in cells} for name in named}
    wanted |= set(winning.items()) if WINNER in named else set()
    found = dict(results)
    for cell in cells:
        result = results[cell.job.name]
        if cell.method != TEACHER and (cell.student, cell.method) in wanted and result.status == "done":
            record = _judged(cell, result.record)
            found[cell.job.name] = JobResult(**{**result.__dict__, "record": record})
    return found


def _judged(cell: Cell, record: Mapping[str, Any]) -> Mapping[str, Any]:
    if record.get("test"):
        return record
    job = cell.job
    with Claim(job.folder):
        current = finished(job.folder, job.address) or dict(record)
        if not current.get("test"):
            side = int(job.arguments["imgsz"])
            device = "cpu" if str(job.arguments["device"]) in {"cpu", "mps"} else "0"
            if job.arguments.get("task") == "classify":
                from kd_yolo.compare.classify import judge_classifier

                test = judge_classifier(job.checkpoint, Path(str(job.arguments["data"])), "test", side, device)
            else:
                accuracy = judge(job.checkpoint, str(Path(str(job.arguments["data"]))), "test", side, device)
                test = {"mAP50-95": accuracy.map50_95, "mAP50": accuracy.map50, "images": accuracy.images}
            current["test"] = {**test, "date": time.strftime("%Y-%m-%d")}
            write_json(job.folder / RESULT_FILE, current)
    return current


def _mean(row: Row, metric: str) -> float:
    return sum(row.values[metric]) / len(row.values[metric])
