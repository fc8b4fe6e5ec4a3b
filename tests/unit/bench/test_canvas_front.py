"""The picture of accuracy against latency: which runs it needs, and what it draws; trainings are stood in for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import pytest
from test_bench_scripts import load

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


def test_teachers__are_trained_on_at_every_canvas(front: ModuleType, keys: dict[str, Any], tmp_path: Path) -> None:
    jobs = [front.teacher_job(side, keys, tmp_path) for side in (128, 224)]
    assert len({job.name for job in jobs}) == 2
    for job, side in zip(jobs, (128, 224), strict=True):
        split_train_keys(job.arguments)  # refuses what train does not know
        wanted = (side, keys["teacher"], "none")
        assert tuple(job.arguments[key] for key in ("imgsz", "model", "teacher")) == wanted


def test_students__stock_from_the_weights_ours_under_the_teacher(
    front: ModuleType, keys: dict[str, Any], tmp_path: Path
) -> None:
    teacher = Path(keys["teacher"])
    jobs = [front.student_job(name, side, teacher, keys, tmp_path) for name in front.STUDENTS for side in (128, 224)]
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
        for name in (*front.STUDENTS, "teacher")
        for side in (128, 224)
    ]
    front.draw(points, tmp_path / "front.png", "a title")
    front.draw(points[:2], tmp_path / "one.png", "a title")
    pictures = [cv2.imread(str(tmp_path / name)) for name in ("front.png", "one.png")]
    orange = (14, 127, 255)  # the second line's colour, which nothing else has
    found = [
        any(tuple(pixel) == orange for pixel in picture.reshape(-1, 3).tolist())
        for picture in pictures
        if picture is not None
    ]
    assert found == [True, False]
    lines = front.table(points).splitlines()
    assert len(lines) == 2 + len(points)
    assert lines[2].startswith("| stock yolo26n | 128 | 3.20 | 4.27 | 34.3 | 60.0 |")


def test_main__names_a_missing_file(front: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["canvas_front.py", f"weights={tmp_path / 'no.pt'}"])
    with pytest.raises(front.KDYoloError, match=r"weights=.*no\.pt: no such file"):
        front.main()
    assert front.numbers("128, 160") == front.numbers([128, 160]) == [128, 160]
    with pytest.raises(front.KDYoloError, match="canvases=abc: whole numbers are needed"):
        front.numbers("abc")
