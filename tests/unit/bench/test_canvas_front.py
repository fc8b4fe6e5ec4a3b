"""The picture of accuracy against latency: which runs it needs, and what it draws; trainings are stood in for."""

from __future__ import annotations

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
def keys(front: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for name in ("weights", "teacher"):
        (tmp_path / f"{name}.pt").write_bytes(name.encode())
    files = {name: str(tmp_path / f"{name}.pt") for name in ("weights", "teacher")}
    recipe = {"teacher": "none", "method": "none", "nbs": 32}
    monkeypatch.setattr(front, "teacher_keys", lambda file, data, epochs: {"model": file, "epochs": epochs, **recipe})
    return {**front.KEYS, **files, "data": str(tmp_path / "neu" / "data.yaml")}


def test_teachers__are_trained_on_at_every_canvas(front: ModuleType, keys: dict[str, Any], tmp_path: Path) -> None:
    places = [(128, 0), (224, 0), (224, 1)]
    jobs = [front.teacher_job(side, seed, keys, tmp_path) for side, seed in places]
    assert len({job.name for job in jobs}) == 3
    for job, (side, seed) in zip(jobs, places, strict=True):
        split_train_keys(job.arguments)  # refuses what train does not know
        wanted = (side, seed, keys["teacher"], "none", 32)
        assert tuple(job.arguments[key] for key in ("imgsz", "seed", "model", "teacher", "nbs")) == wanted


@pytest.mark.parametrize(
    ("spot", "wanted"),
    [
        (("yolo26n", 224), {"model": "weights.pt", "teacher": "none", "method": "none"}),
        (("lightnet-n", 224), {"model": "lightnet-n", "teacher": "224.pt"}),
        (("lightnet-s", 128), {"model": "lightnet-s", "teacher": "128.pt"}),
        (
            ("lightnet-s", 128, 224),
            {"model": "lightnet-s", "pretrained": "128.pt", "teacher": "224.pt", "teacher_imgsz": 224},
        ),
    ],
)
def test_students__stock_from_the_weights_ours_under_a_teacher(
    front: ModuleType, keys: dict[str, Any], tmp_path: Path, spot: tuple[Any, ...], wanted: dict[str, Any]
) -> None:
    files = {}
    for side in (128, 224):
        files[side, 3] = tmp_path / f"{side}.pt"
        files[side, 3].write_bytes(b"a teacher")
    job = front.student_job(front.Spot(*spot), 3, files, keys, tmp_path)
    split_train_keys(job.arguments)  # refuses what train does not know
    names = ("model", "pretrained", "teacher", "teacher_imgsz", "method")
    found = {key: job.arguments[key] for key in names if key in job.arguments}
    assert {key: Path(str(value)).name if key != "teacher_imgsz" else value for key, value in found.items()} == wanted
    assert (job.arguments["imgsz"], job.arguments["seed"]) == (spot[1], 3)
    assert job.name.startswith("-".join([*map(str, spot[:2]), *(f"under-{side}" for side in spot[2:])]))


def test_draw__one_line_a_model(front: ModuleType, tmp_path: Path) -> None:
    def point(name: str, side: int, taught_on: int | None = None) -> dict[str, Any]:
        times = {"latency_ms_p50": side / 40, "total_ms_p50": side / 30}
        accuracy = {"map50_95": [0.29 + side / 3e3, 0.31 + side / 3e3], "map50": [0.6]}
        return {"model": name, "imgsz": side, "taught_on": taught_on, **times, **accuracy}

    points = [point(name, side) for name in (*front.STUDENTS, "teacher") for side in (128, 224)]
    points.append(point("lightnet-s", 128, 224))
    front.draw(points, tmp_path / "front.png", "a title")
    front.draw(points[:2], tmp_path / "one.png", "a title")
    orange = (14, 127, 255)  # LightNet-s
    found = []
    for name in ("front.png", "one.png"):
        picture = cv2.imread(str(tmp_path / name))
        assert picture is not None
        found.append(any(tuple(pixel) == orange for pixel in picture.reshape(-1, 3).tolist()))
    assert found == [True, False]
    lines = front.table(points).splitlines()
    assert len(lines) == 2 + len(points)
    assert lines[2].startswith("| stock yolo26n | 128 | 3.20 | 4.27 | 34.3 ± 1.4 | 60.0 |")
    assert lines[-1].startswith("| LightNet-s, taught on 224 px | 128 |")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": "no.pt"}, r"weights=no\.pt: no such file"),
        ({"canvases": "abc"}, "canvases=abc: whole numbers are needed"),
        ({"seeds": "0,x"}, "seeds=0,x: whole numbers are needed"),
        ({"cross": "128"}, "cross=128: a canvas and a larger one are needed"),
        ({"cross": "224:128"}, "cross=224:128: a canvas and a larger one are needed"),
        ({"canvas": "128"}, "canvas"),
        ({"pages": "docs/nowhere.md"}, "docs/nowhere.md: no such page"),
    ],
)
def test_checked__names_what_is_wrong(
    front: ModuleType,
    keys: dict[str, Any],
    given: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {name: keys[name] for name in ("weights", "teacher")}
    with pytest.raises(front.KDYoloError, match=message):
        front.checked({**files, **given})


def test_checked__lists_are_lists(front: ModuleType, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "resolve_dataset", Path)
    found = front.checked({"weights": keys["weights"], "teacher": keys["teacher"], "cross": "128:224", "seeds": 1})
    assert (found["canvases"], found["cross"], found["seeds"]) == ([128, 160, 224, 320], [(128, 224)], [1])
