"""Every method trains for real: two epochs on the tiny data, every term logged, a signal in both."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.config import Recipe
from kd_yolo.distill.base import list_methods, load_method
from kd_yolo.files import sha256
from kd_yolo.tasks.detect import KDTrainer


def with_bins(path: Path, names: dict[int, str]) -> Path:
    import torch

    torch.manual_seed(1)
    model = DetectionModel("yolov8n.yaml", nc=len(names), verbose=False)
    model.names = names
    torch.save({"epoch": -1, "model": model, "ema": None, "train_args": {"imgsz": 64}}, path)
    return path


@pytest.mark.parametrize("name", [*list_methods(), "cwd+bckd"])
def test_train__two_epochs_with_a_signal(
    name: str, tiny_data: Path, tiny_teacher: Path, tiny_layout: str, tmp_path: Path
) -> None:
    bins = "+" not in name and load_method(name).needs_bins
    names = yaml.safe_load(tiny_data.read_text())["names"]
    teacher = with_bins(tmp_path / "bins.pt", names) if bins else tiny_teacher
    recipe = Recipe(teacher=str(teacher), teacher_sha256=sha256(teacher), method=name, schedule={"warmup": 0.0})
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump()))
    keys: dict[str, Any] = {
        "model": "yolov8n.yaml" if bins else tiny_layout,
        "pretrained": False,
        "data": str(tiny_data),
    }
    keys |= {"imgsz": 64, "batch": 8, "epochs": 2, "plots": False, "device": "cpu", "close_mosaic": 0, "workers": 0}
    keys |= {"project": str(tmp_path), "name": "run", "exist_ok": True, "distill_model": str(file), "val": False}
    trainer = KDTrainer(overrides=keys)
    trainer.train()
    with (tmp_path / "run" / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    terms = [f"train/{term}" for term in trainer.model.term_names]
    assert len(rows) == 2
    assert terms
    for row in rows:
        values = [float(row[term]) for term in terms]
        assert all(math.isfinite(value) and value >= 0 for value in values)
    # the log has five decimals; a teacher of one epoch is sure of nothing
    assert sum(float(trainer.tloss[term]) for term in trainer.model.term_names) > 0
