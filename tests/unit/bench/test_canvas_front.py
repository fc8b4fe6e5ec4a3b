"""The picture of accuracy against latency: which runs it needs, and what it draws; trainings are stood in for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import pytest
from test_bench_scripts import load

from kd_yolo.compare.job import Job
from kd_yolo.config import split_train_keys


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("canvas_front", monkeypatch)


@pytest.fixture
def keys(front: ModuleType, tmp_path: Path) -> dict[str, Any]:
    for name in ("weights", "teacher"):
        (tmp_path / f"{name}.pt").write_bytes(name.encode())
    files = {name: str(tmp_path / f"{name}.pt") for name in ("weights", "teacher")}
    return {**front.KEYS, **files, "data": str(tmp_path / "neu" / "data.yaml")}


def test_teachers__the_given_one_at_its_canvas_others_trained_on(
    front: ModuleType, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Job] = []
    monkeypatch.setattr(front, "train", lambda jobs, workers: asked.extend(jobs))
    found = front.train_teachers([128, 224], keys, tmp_path)
    assert found[128] == Path(keys["teacher"])
    (job,) = asked
    assert found[224] == job.checkpoint
    assert (job.arguments["imgsz"], job.arguments["model"], job.arguments["teacher"]) == (224, keys["teacher"], "none")


def test_students__stock_from_the_weights_ours_under_the_teacher(
    front: ModuleType, keys: dict[str, Any], tmp_path: Path
) -> None:
    teacher = Path(keys["teacher"])
    jobs = [front.student_job(name, side, teacher, keys, tmp_path) for name in front.MODELS for side in (128, 224)]
    assert len({job.name for job in jobs}) == 6
    for job in jobs:
        split_train_keys(job.arguments)  # refuses what train does not know
        stock = job.name.startswith("yolo26n")
        wanted = (keys["weights"], "none", "none") if stock else (job.name.rsplit("-", 2)[0], str(teacher), None)
        assert tuple(job.arguments.get(key) for key in ("model", "teacher", "method")) == wanted


def test_draw__one_line_a_model(front: ModuleType, tmp_path: Path) -> None:
    points: Sequence[dict[str, Any]] = [
        {
            "model": name,
            "imgsz": side,
            "latency_ms_p50": side / 40,
            "total_ms_p50": side / 30,
            "map50_95": 0.3 + side / 3e3,
        }
        | {"map50": 0.6}
        for name in front.MODELS
        for side in (128, 224)
    ]
    front.draw(points, tmp_path / "front.png", "sets/neu/data.yaml")
    picture = cv2.imread(str(tmp_path / "front.png"))
    assert picture is not None
    assert len({tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()}) > 50
    lines = front.table(points).splitlines()
    assert len(lines) == 2 + len(points)
    assert lines[2].startswith("| stock yolo26n | 128 | 3.20 | 4.27 | 34.3 | 60.0 |")


def test_main__names_a_missing_file(front: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["canvas_front.py", f"weights={tmp_path / 'no.pt'}"])
    with pytest.raises(front.KDYoloError, match=r"weights=.*no\.pt: no such file"):
        front.main()
