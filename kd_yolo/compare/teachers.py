"""The given teachers: what they reach themselves, and whether every method can work with them, before any training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ultralytics.utils import LOGGER

from kd_yolo.bench.accuracy import judge
from kd_yolo.compare.outcome import finished, read_json
from kd_yolo.compare.plan import Plan, file_label
from kd_yolo.errors import KDYoloError
from kd_yolo.files import sha256, write_json
from kd_yolo.tasks.preflight import WEAK_TEACHER_MAP50, check_teacher

Figures = dict[str, dict[str, float]]


def measure_teachers(laid: Plan, home: Path) -> Figures:
    """Return mAP50-95 and mAP50 of each teacher by its label, on the validation split and canvas, in points.

    They are measured once and kept in ``home/teachers.json``. A teacher that only distillation can read is left out.
    """
    found: Figures = {}
    kept = read_json(home / "teachers.json")
    for file in laid.teacher_files:
        mark = f"{sha256(file)[:16]}-{laid.fingerprint[:16]}-{laid.imgsz}"
        if mark not in kept:
            try:
                accuracy = judge(file, str(laid.data), "val", laid.imgsz)
            except KDYoloError as error:  # other classes, or another architecture: the check of the pairs judges it
                LOGGER.info(f"teacher {file.name}: its own mAP is not known ({error})")
                continue
            kept[mark] = {"mAP50-95": 100 * accuracy.map50_95, "mAP50": 100 * accuracy.map50}
            write_json(home / "teachers.json", kept)
        found[file_label(file)] = {name: float(value) for name, value in kept[mark].items()}
    return found


def check_pairs(laid: Plan, figures: Mapping[str, Mapping[str, float]]) -> None:
    """Refuse a given teacher that does not fit a student or a method of which a run is still to be done.

    Raises:
        KDYoloError: As ``kd-yolo train`` would, but before the first run.
    """
    weakest = min((one["mAP50"] / 100 for one in figures.values()), default=0.0)
    known = len(figures) == len(laid.teacher_files) and weakest >= WEAK_TEACHER_MAP50
    for pair in laid.pairs:
        if all(finished(job.folder, job.address) for job in pair.jobs):
            continue
        metrics = {"metrics/mAP50(B)": weakest} if known else None
        check_teacher(pair.config, laid.data, laid.imgsz, pair.student, metrics=metrics, method=pair.method)
