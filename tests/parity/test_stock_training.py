"""Without distillation the trainer is the stock trainer, bit for bit; with zero weights too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import load_checkpoint

from kd_yolo.config import Recipe
from kd_yolo.files import sha256
from kd_yolo.tasks.detect import KDTrainer

TINY = {"imgsz": 64, "batch": 8, "epochs": 3, "plots": False, "device": "cpu", "close_mosaic": 1, "nbs": 16}


def run(trainer: type[DetectionTrainer], folder: Path, data: Path, **given: Any) -> tuple[list[list[str]], Any]:
    arguments = {**TINY, "model": "yolo26n.yaml", "pretrained": False, "data": str(data), "project": str(folder)}
    trainer(overrides={**arguments, "name": trainer.__name__ + str(len(given)), "exist_ok": True, **given}).train()
    save_dir = folder / (trainer.__name__ + str(len(given)))
    header, *rows = [line.split(",") for line in (save_dir / "results.csv").read_text().splitlines()]
    stock = [i for i, key in enumerate(header) if key.startswith(("train/", "lr/")) and "kd_" not in key]
    weights = load_checkpoint(save_dir / "weights" / "last.pt")[0].state_dict()
    return [[row[i] for i in stock] for row in rows], weights


def same(first: Any, second: Any) -> bool:
    return all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.fixture(scope="module")
def stock(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[str]], Any]:
    return run(DetectionTrainer, tmp_path_factory.mktemp("stock"), tiny_data)


def test_trainer__without_recipe_equals_stock(stock: Any, tiny_data: Path, tmp_path: Path) -> None:
    losses, weights = run(KDTrainer, tmp_path, tiny_data)
    assert losses == stock[0]
    assert same(stock[1], weights)


@pytest.mark.parametrize("method", ["kd-lightnet", "score-l2"])
def test_trainer__zero_weight_equals_stock(
    method: str, stock: Any, tiny_data: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    recipe = Recipe(teacher=str(tiny_teacher), teacher_sha256=sha256(tiny_teacher), method=method, args={"weight": 0.0})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump()))
    losses, weights = run(KDTrainer, tmp_path, tiny_data, distill_model=str(tmp_path / "recipe.yaml"))
    assert losses == stock[0]
    assert same(stock[1], weights)


def test_trainer__positive_weight_differs_from_stock(
    stock: Any, tiny_data: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    """The comparison above can fail: the same recipe with its own weight gives other weights."""
    recipe = Recipe(teacher=str(tiny_teacher), teacher_sha256=sha256(tiny_teacher), method="score-l2")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump()))
    _, weights = run(KDTrainer, tmp_path, tiny_data, distill_model=str(tmp_path / "recipe.yaml"))
    assert not same(stock[1], weights)
