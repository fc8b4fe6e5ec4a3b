"""Every kind of teacher through a whole training, the cache over two epochs, and what is refused."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models.detection import fcos_resnet50_fpn
from ultralytics.nn.tasks import DetectionModel, RTDETRDetectionModel

from kd_yolo.checkpoints import load_model
from kd_yolo.cli import main
from kd_yolo.config import read_recipe, split_train_keys
from kd_yolo.distill.teachers.cache import CachedTeacher
from kd_yolo.distill.teachers.cache_store import SUFFIX
from kd_yolo.resources import load_yaml
from kd_yolo.training import train

STILL = {"mosaic": 0.0, "hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0, "translate": 0.0, "scale": 0.0}


@pytest.fixture(scope="session")
def kinds(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes a random teacher of a kind for the tiny data's classes."""
    folder = tmp_path_factory.mktemp("kinds")
    names = list(load_yaml(tiny_data)["names"].values())
    made: dict[str, Path] = {}

    def checkpoint(name: str, model: DetectionModel, kinds: list[str]) -> Path:
        model.names = dict(enumerate(kinds))
        for level in getattr(model.model[-1], "cv3", ()):  # a fresh head says the same everywhere
            torch.nn.init.normal_(level[-1].weight, 0, 0.5)
            torch.nn.init.constant_(level[-1].bias, -2.0)
        path = folder / f"{name}.pt"
        torch.save({"epoch": -1, "model": model, "ema": None, "train_args": {"imgsz": 64}}, path)
        return path

    def make(kind: str) -> Path:
        torch.manual_seed(0)
        if kind == "yolo11n":
            return checkpoint(kind, DetectionModel("yolo11n.yaml", nc=len(names), verbose=False), names)
        if kind == "p2-other-classes":
            model = DetectionModel("yolov8-p2.yaml", nc=4, verbose=False)
            return checkpoint(kind, model, ["hole", names[2], names[0].upper(), "rust"])
        if kind == "rtdetr":
            return checkpoint(kind, RTDETRDetectionModel("yolov8-rtdetr.yaml", nc=len(names), verbose=False), names)
        if kind in {"onnx", "onnx-nms"}:
            pytest.importorskip("onnxruntime")
            from ultralytics import YOLO

            source = checkpoint(kind, DetectionModel("yolov8n.yaml", nc=len(names), verbose=False), names)
            return Path(YOLO(source).export(format="onnx", imgsz=64, verbose=False, nms=kind == "onnx-nms"))
        model = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=len(names) + 1)
        path = folder / "fcos.pt"
        content = {"num_classes": len(names) + 1, "names": dict(enumerate(names, 1)), "state_dict": model.state_dict()}
        torch.save({"torchvision": "fcos_resnet50_fpn", **content}, path)
        return path

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = make(kind)
        return made[kind]

    return get


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command which must be refused, and returns its line."""

    def run(keys: dict[str, Any]) -> str:
        capsys.readouterr()
        status = main(["train", *(f"{key}={value}" for key, value in keys.items())])
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("kd-yolo: ")]
        assert status == 2, captured
        assert len(lines) == 1, captured.err
        assert "Traceback" not in captured.err
        return lines[0]

    return run


def losses(run_dir: Path) -> dict[str, list[float]]:
    """Return the distillation columns of a run's results.csv."""
    with (run_dir / "student" / "results.csv").open() as stream:
        rows = [{key.strip(): value for key, value in row.items()} for row in csv.DictReader(stream)]
    names = [key for key in rows[0] if key.startswith("train/kd_")]
    return {name: [float(row[name]) for row in rows] for name in names}


@pytest.mark.parametrize(
    ("teachers", "given"),
    [
        (["p2-other-classes"], {"method": "kd-lightnet+score-l2"}),
        (["rtdetr"], {"method": "kd-lightnet+score-l2"}),
        (["fcos"], {"method": "kd-lightnet+score-l2"}),
        (["onnx"], {"kd.box_weight": 0.0}),
        (["yolo11n", "rtdetr"], {}),
        (["yolo11n", "p2-other-classes"], {"teacher_merge": "per_class"}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_train__every_kind_of_teacher(
    teachers: list[str],
    given: dict[str, Any],
    kinds: Callable[[str], Path],
    train_keys: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    files = ",".join(str(kinds(kind)) for kind in teachers)
    keys = train_keys(teacher=files, epochs=1, allow_weak_teacher=True, **given)
    report = train(*split_train_keys(keys))
    found = losses(tmp_path / "run")
    assert found
    assert all(value[0] >= 0 for value in found.values())
    assert sum(value[0] for value in found.values()) > 0
    assert type(load_model(report.best)[0]) is DetectionModel
    recipe = read_recipe(tmp_path / "run" / "recipe.yaml")
    assert recipe is not None
    assert len(recipe.teachers) == len(teachers)
    if "teacher_merge" in given:
        choice = load_yaml(tmp_path / "run" / "student.recipe.classes.json")
        assert len(choice["choice"]) == 6
        assert choice["ap50_95"][1].count(None) == 4  # classes that the second teacher lacks


def test_train__cached_repeats_the_live_run_and_asks_once_a_view(
    kinds: Callable[[str], Path],
    train_keys: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[CachedTeacher] = []
    original = CachedTeacher.__init__

    def noted(self: CachedTeacher, *args: Any) -> None:
        original(self, *args)
        seen.append(self)

    monkeypatch.setattr(CachedTeacher, "__init__", noted)
    keys = {"teacher": str(kinds("yolo11n")), "allow_weak_teacher": True, "fliplr": 0.0, "epochs": 2, **STILL}
    for name, given in {"live": {}, "ram": {"cache_teacher": "ram"}, "disk": {"cache_teacher": "disk"}}.items():
        train(*split_train_keys(train_keys(name=name, **keys, **given)))
    assert [(cache.misses, cache.hits) for cache in seen] == [(24, 24), (24, 24)]  # 24 images, two epochs
    live = losses(tmp_path / "live")
    assert sum(values[-1] for values in live.values()) > 0
    for name in ("ram", "disk"):
        kept = losses(tmp_path / name)
        assert live.keys() == kept.keys()
        for term, values in live.items():
            assert kept[term] == pytest.approx(values, rel=1e-3, abs=1e-3)
        records = list((tmp_path / name / "student.teacher-cache").rglob(f"*{SUFFIX}"))
        assert len(records) == (24 if name == "disk" else 0)


# ---- refused ----


def test_refused__selected_boxes_of_an_onnx_file(
    kinds: Callable[[str], Path], train_keys: Callable[..., dict[str, Any]], refused: Callable[..., str], tmp_path: Path
) -> None:
    line = refused(train_keys(teacher=kinds("onnx-nms")))
    assert "onnx-nms.onnx" in line
    assert "no scores of all anchors" in line
    assert not (tmp_path / "run").exists()


def test_refused__onnx_file_of_another_canvas(
    kinds: Callable[[str], Path], train_keys: Callable[..., dict[str, Any]], refused: Callable[..., str]
) -> None:
    line = refused(train_keys(teacher=kinds("onnx"), imgsz=96))
    assert "canvas is fixed at 64x64" in line
    assert "set imgsz=64" in line


def test_refused__teacher_that_does_not_give_what_is_read(
    kinds: Callable[[str], Path], train_keys: Callable[..., dict[str, Any]], refused: Callable[..., str], tmp_path: Path
) -> None:
    line = refused(train_keys(teacher=kinds("onnx"), method="score-l2", allow_weak_teacher=True))
    assert "method 'score-l2' reads the teacher's neck" in line
    assert "an ONNX file does not give" in line
    assert not (tmp_path / "run").exists()


def test_refused__no_common_level_with_one_of_several(
    kinds: Callable[[str], Path], train_keys: Callable[..., dict[str, Any]], refused: Callable[..., str], tmp_path: Path
) -> None:
    shallow = DetectionModel(
        {"nc": 6, "backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": [[[0], 1, "Detect", ["nc"]]]}, verbose=False
    )
    shallow.names = load_model(kinds("yolo11n"))[0].names
    path = tmp_path / "p1.pt"
    torch.save({"epoch": -1, "model": shallow, "train_args": {"imgsz": 64}}, path)
    line = refused(train_keys(teacher=f"{kinds('yolo11n')},{path}"))
    assert "no common feature level" in line
    assert not (tmp_path / "run").exists()


def test_refused__cache_of_another_teacher(
    kinds: Callable[[str], Path], train_keys: Callable[..., dict[str, Any]], refused: Callable[..., str], tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "teacher-cache.json").write_text('{"version": "0", "teachers": ["another"]}')
    keys = train_keys(teacher=kinds("yolo11n"), allow_weak_teacher=True, cache_teacher="disk", cache_dir=folder)
    line = refused({**keys, **STILL})
    assert "a cache from another teacher" in line
    assert "cache_dir=FOLDER" in line


def test_refused__cache_of_views_that_never_repeat(
    kinds: Callable[[str], Path], train_keys: Callable[..., dict[str, Any]], refused: Callable[..., str], tmp_path: Path
) -> None:
    line = refused(train_keys(teacher=kinds("yolo11n"), cache_teacher="ram", mosaic=0.0))
    assert "set hsv_h=0 hsv_s=0 hsv_v=0 translate=0 scale=0" in line
    assert not (tmp_path / "run").exists()
