"""A calibrated tiny anomaly checkpoint, its exports, made once, and a small labelled data set."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from kd_yolo.export import export
from kd_yolo.export.anomaly_report import AnomalyExportReport
from torch import Tensor, nn

from kd_yolo.anomaly.backbones import build_backbone
from kd_yolo.anomaly.checkpoint import save_anomaly
from kd_yolo.anomaly.model import AnomalyModel
from kd_yolo.anomaly.spec import AnomalySpec
from kd_yolo.images import textured_images

FOLDER = tempfile.TemporaryDirectory(prefix="kd-yolo-anomaly-exported-")


def textures(count: int, side: tuple[int, int] = (64, 64), seed: int = 0) -> Tensor:
    """Return images (count, 3, height, width) in [0, 1]."""
    images = np.stack([image.transpose(2, 0, 1) for image in textured_images(count, side, seed)])
    return torch.from_numpy(images).float() / 255


@torch.no_grad()
def anomaly_model(**overrides: Any) -> AnomalyModel:
    """Return a calibrated model at 64 px with random weights, whose BatchNorms all do something."""
    torch.manual_seed(0)
    spec = AnomalySpec(**{"imgsz": 64, "teacher": "random:efficientnet-lite0", **overrides})
    teacher = build_backbone(spec.teacher, spec.teacher_strides, True, depth=spec.plus_depth if spec.plus else None)
    model = AnomalyModel(spec, teacher=teacher)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.1)
        norm.momentum, norm.training = 1.0, True
    model.teacher(textures(8, seed=9))
    model.student(textures(8, seed=9))
    for norm in norms:
        norm.momentum, norm.training = 0.1, False
    model.eval()
    model.fit_targets([textures(8, seed=1)])
    model.calibrate([textures(8, seed=2)])
    return model


def save_model(path: Path, model: AnomalyModel | None = None) -> Path:
    """Write a checkpoint as a training run does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_anomaly(path, anomaly_model() if model is None else model, {"imgsz": 64})
    return path


@cache
def source() -> Path:
    """Return the checkpoint that all share."""
    return save_model(Path(FOLDER.name) / "hkt.pt")


@cache
def exported(format: str, dynamic: bool = False, batch: int = 1) -> AnomalyExportReport:
    """Return the report of its export, made once."""
    suffix = {"onnx": ".onnx", "openvino": "_openvino_model", "bundle": "_bundle"}[format]
    out = Path(FOLDER.name) / f"hkt{'_dynamic' if dynamic else ''}_{batch}{suffix}"
    report = export(source(), format, out=out, dynamic=dynamic, batch=batch)
    assert isinstance(report, AnomalyExportReport)
    return report


def labelled_folder(root: Path) -> Path:
    """Write a category of 2 training images, 3 normal and 3 anomalous test images with masks."""
    pictures = textured_images(8, (70, 90), seed=5)
    for index, picture in enumerate(pictures):
        kind = "train/good" if index < 2 else "test/good" if index < 5 else "test/hole"
        if kind == "test/hole":
            picture = picture.copy()
            picture[20:50, 30:60] = 255
            mask = np.zeros((70, 90), np.uint8)
            mask[20:50, 30:60] = 255
            write(root / "ground_truth" / "hole" / f"{index:03}_mask.png", mask)
        write(root / kind / f"{index:03}.png", picture)
    return root


def write(path: Path, pixels: Any) -> Path:
    """Write an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)
    return path
