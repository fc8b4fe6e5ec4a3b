"""A teacher on a larger canvas than its student's: the whole command, its resume, and every bad input."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.checkpoints import load_model, read_checkpoint
from kd_yolo.cli import main
from kd_yolo.config import split_train_keys
from kd_yolo.distill.teachers.scaled import ScaledTeacher
from kd_yolo.resources import load_yaml
from kd_yolo.tasks.detect import KDTrainer
from kd_yolo.training import train


class PowerCutError(Exception):
    """Stands for a machine that stops."""


def start(keys: dict[str, Any]) -> Path:
    return train(*split_train_keys(keys)).run_dir


def losses(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "student" / "results.csv").open() as stream:
        rows = [{key.strip(): value.strip() for key, value in row.items()} for row in csv.DictReader(stream)]
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]


@pytest.fixture(scope="module")
def teacher_at_128(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random detector of the data's classes whose file says that it was trained at 128."""
    torch.manual_seed(0)
    model = DetectionModel("yolo26n.yaml", nc=6, verbose=False)
    model.names = dict(load_yaml(tiny_data)["names"])
    path = tmp_path_factory.mktemp("canvas") / "at-128.pt"
    torch.save({"epoch": -1, "model": model, "ema": None, "train_args": {"imgsz": 128}}, path)
    return path


@pytest.fixture
def refused(
    train_keys: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return a function that starts a training which must be refused before anything is written."""

    def run(**given: Any) -> str:
        keys = train_keys(**{"teacher": "self", "teacher_imgsz": 128, "epochs": 1, "pretrained": False, **given})
        capsys.readouterr()
        status = main(["train", *(f"{key}={value}" for key, value in keys.items())])
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("kd-yolo: ")]
        assert status == 2, captured
        assert len(lines) == 1, captured.err
        assert not (tmp_path / "run").exists()
        return lines[0]

    return run


def test_train__teacher_on_a_larger_canvas(
    train_keys: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is trained and asked at 128, the student at 64; both see the same views."""
    seen: set[tuple[int, int]] = set()
    original = KDTrainer.preprocess_batch

    def watch(self: KDTrainer, batch: dict[str, Any]) -> dict[str, Any]:
        result = original(self, batch)
        if "teacher_img" in result:
            seen.add((result["img"].shape[-1], result["teacher_img"].shape[-1]))
            halved = torch.nn.functional.avg_pool2d(result["teacher_img"].float(), 2)
            assert torch.allclose(halved, result["img"].float(), atol=1e-5)  # bilinear at exactly half the size
        return result

    monkeypatch.setattr(KDTrainer, "preprocess_batch", watch)
    run_dir = start(
        train_keys(
            teacher="self",
            teacher_imgsz=128,
            epochs=1,
            pretrained=False,
            allow_weak_teacher=True,
        )
    )
    assert seen == {(64, 128)}
    trained = {
        phase: read_checkpoint(run_dir / phase / "weights" / "best.pt")[1]["train_args"]["imgsz"]
        for phase in ("teacher", "student")
    }
    assert trained == {"teacher": 128, "student": 64}
    (row,) = losses(run_dir)
    ours = {key: float(value) for key, value in row.items() if key.startswith("train/") and "kd" in key.lower()}
    assert ours
    assert sum(ours.values()) > 0
    deployed = json.loads((run_dir / "report.json").read_text())["artifacts"]["deployed"]
    assert load_model(deployed)[0].args["imgsz"] == 64


def test_train__resumed_with_a_larger_canvas(
    train_keys: Callable[..., dict[str, Any]],
    teacher_at_128: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file trained at the teacher's canvas is taken as it is; a run cut in its second epoch ends as a whole one."""
    keys = train_keys(
        teacher=str(teacher_at_128),
        teacher_imgsz=128,
        teacher_levels="position",
        epochs=2,
        pretrained=False,
        allow_weak_teacher=True,
        seed=5,
    )
    asked: list[int] = []
    taps = ScaledTeacher.taps

    def watch(self: ScaledTeacher, images: torch.Tensor, *given: Any, **named: Any) -> Any:
        asked.append(images.shape[-1])
        return taps(self, images, *given, **named)

    monkeypatch.setattr(ScaledTeacher, "taps", watch)
    whole = start({**keys, "name": "whole"})
    assert set(asked) == {128}
    asked.clear()
    original = KDTrainer.preprocess_batch

    def cut(self: KDTrainer, batch: dict[str, Any]) -> dict[str, Any]:
        if self.epoch == 1 and self._batch_in_epoch == 1:
            raise PowerCutError
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(KDTrainer, "preprocess_batch", cut)
        with pytest.raises(PowerCutError):
            start({**keys, "name": "cut"})
    resumed = start({"data": "resumed", "resume": str(tmp_path / "cut")})
    assert set(asked) == {128}
    assert losses(resumed) == losses(whole)


def test_teacher_imgsz__bad_values(refused: Callable[..., str]) -> None:
    line = refused(teacher_imgsz=32)
    assert "teacher_imgsz=32 is smaller than the student's canvas 64" in line
    assert "teacher_imgsz=100 is not a multiple of the model's largest stride 32; use 96 or 128" in refused(
        teacher_imgsz=100
    )
    assert "teacher_imgsz='big' is not valid" in refused(teacher_imgsz="big")
    assert "teacher_levels='nearest' is not valid" in refused(teacher_levels="nearest")


def test_teacher_imgsz__other_keys(refused: Callable[..., str], tiny_data: Path) -> None:
    photos = tiny_data.parent / "images" / "val"
    assert "teacher_imgsz= and unlabeled= do not go together" in refused(unlabeled=photos)
    assert "teacher_imgsz= and multi_scale= do not go together" in refused(multi_scale=0.5)
    assert "teacher_imgsz= and generations= do not go together" in refused(generations=2)
    assert "has no effect without a teacher" in refused(teacher="none")
    assert "has no effect without a teacher" in refused(method="none")


def test_teacher_imgsz__a_file_of_another_canvas(refused: Callable[..., str], teacher_at_128: Path) -> None:
    line = refused(teacher=teacher_at_128, teacher_imgsz=96)
    assert "trained at imgsz=128, this run has teacher_imgsz=96" in line
    assert "set teacher_imgsz=128 or imgsz=128" in line
    line = refused(teacher=teacher_at_128, teacher_imgsz=160, imgsz=160)
    assert "set imgsz=128, train a teacher at 160" in line  # a teacher's canvas is never the smaller one
