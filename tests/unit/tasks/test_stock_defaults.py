"""Which training arguments are set for whom when the command leaves them open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.config import TrainConfig, stock_keys
from kd_yolo.data.datayaml import label_path, load_data_yaml
from kd_yolo.data.synthetic import make_steel_synth
from kd_yolo.tasks.preflight import resolve_student
from kd_yolo.tasks.start import own_teacher
from kd_yolo.tasks.stock_defaults import filled_share, finetuned_defaults, narrowed_defaults

FINETUNED = {"mosaic": 0.0, "warmup_epochs": 1.0, "nbs": 32}


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model = DetectionModel("yolo26n.yaml", nc=80, verbose=False)
    torch.save({"epoch": -1, "model": model.half(), "ema": None, "train_args": {}}, tmp_path / "yolo26n.pt")
    return tmp_path / "yolo26n.pt"


def empty(data: Path, share: float) -> None:
    """Take the boxes out of a share of the training images."""
    images = load_data_yaml(data).images("train")
    for image in images[: round(share * len(images))]:
        label_path(image).write_text("")


def test_narrowed_defaults__are_stock_arguments() -> None:
    assert narrowed_defaults() == {"mosaic": 0.0, "warmup_epochs": 1.0, "nbs": 32}
    assert set(narrowed_defaults()) | set(FINETUNED) <= set(stock_keys())


@pytest.mark.parametrize(
    ("given", "own"),
    [
        ({"model": "yolo26n.pt", "reparam": "qarep"}, True),
        ({"model": "yolo26n.pt"}, False),  # what Ultralytics trains, Ultralytics' way
        ({"model": "yolo26n.yaml", "reparam": "qarep"}, False),
        ({"model": "yolo26n.pt", "reparam": "qarep", "pretrained": False}, False),
        ({"model": "yolov8n.yaml", "reparam": "qarep", "pretrained": "yolo26n.pt"}, False),
        ({"model": "./yolo26n.pt", "reparam": "qarep", "pretrained": "yolo26n.pt"}, True),
    ],
)
def test_finetuned_defaults__for_a_detector_that_goes_on_with_branches(
    weights: Path, tiny_data: Path, given: dict[str, Any], own: bool
) -> None:
    student = resolve_student(TrainConfig(data=str(tiny_data), **given))
    assert finetuned_defaults(student, tiny_data) == (FINETUNED if own else {})


def test_finetuned_defaults__for_an_own_teacher_that_is_pretrained(weights: Path, tiny_data: Path) -> None:
    config = TrainConfig(data=str(tiny_data), model="lightnet-n")
    assert finetuned_defaults(own_teacher(config, weights), tiny_data, is_teacher=True) == FINETUNED
    assert finetuned_defaults(own_teacher(config, None), tiny_data, is_teacher=True) == {}
    foreign = config.model_copy(update={"teacher_model": "yolov8n.yaml", "pretrained": str(weights)})
    teacher = own_teacher(foreign, weights)
    assert teacher.weights == weights.resolve()
    assert finetuned_defaults(teacher, tiny_data, is_teacher=True) == {}  # most of its weights are random


def test_finetuned_defaults__mosaics_stay_where_few_images_hold_an_object(weights: Path, tmp_path: Path) -> None:
    data = make_steel_synth(tmp_path / "few", train=20, val=2, test=2, seed=3)
    teacher = own_teacher(TrainConfig(data=str(data), model="lightnet-n"), weights)
    empty(data, 0.4)
    assert 0.5 <= filled_share(data) <= 0.6
    assert finetuned_defaults(teacher, data, is_teacher=True) == FINETUNED
    empty(data, 0.7)
    assert filled_share(data) <= 0.3
    without = {key: value for key, value in FINETUNED.items() if key != "mosaic"}
    assert finetuned_defaults(teacher, data, is_teacher=True) == without


def test_filled_share__counts_the_trained_classes_alone(tmp_path: Path) -> None:
    data = make_steel_synth(tmp_path / "one", train=12, val=2, test=2, seed=3)
    images = load_data_yaml(data).images("train")
    for number, image in enumerate(images):
        label_path(image).write_text(f"{0 if number < 3 else 1} 0.5 0.5 0.2 0.2\n")
    assert filled_share(data) == 1
    assert filled_share(data, [0]) == filled_share(data, 0) == 0.25
    assert filled_share(data, [0, 1]) == 1
    assert filled_share(data, [2]) == 0
