"""Validate any teacher as a detector: what it says at anchors, decoded and put through NMS."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.models.yolo.detect import DetectionValidator

from kd_yolo.distill.teachers.base import Teacher


@dataclass(frozen=True)
class TeacherScore:
    """What a teacher reaches on the validation split.

    Attributes:
        metrics: Validation metrics by their Ultralytics names.
        class_ap: AP50-95 by class number; classes without objects there are missing.
    """

    metrics: dict[str, float]
    class_ap: dict[int, float]


class DenseDetector(nn.Module):
    """A teacher in the form that Ultralytics' validator takes: images to (B, 4 + K, A)."""

    def __init__(self, teacher: Teacher, names: Mapping[int, str]) -> None:
        """Wrap a ready teacher."""
        super().__init__()
        self.teacher = teacher
        self.names = dict(names)
        self.stride = torch.tensor([float(s) for s in teacher.strides])

    def forward(self, images: Tensor) -> Tensor:
        """Return ``Teacher.predict``."""
        return self.teacher.predict(images)


def validate_teacher(teacher: Teacher, names: Mapping[int, str], data: Path, imgsz: int) -> TeacherScore:
    """Return how well a teacher detects on the square training canvas.

    Args:
        teacher: Of the data set's classes.
        names: The data set's class names.
        data: Ready data YAML.
        imgsz: Canvas, pixels.
    """
    return validate_detector(DenseDetector(teacher.eval(), names), names, data, imgsz)


def validate_detector(model: Any, names: Mapping[int, str], data: Path, imgsz: int) -> TeacherScore:
    """Return how well a model in memory detects on the square training canvas."""
    model.names = dict(names)
    arguments = {"data": str(data), "imgsz": imgsz, "rect": False, "plots": False, "task": "detect", "mode": "val"}
    with tempfile.TemporaryDirectory(prefix="kd-yolo-val-") as folder:
        validator = DetectionValidator(save_dir=Path(folder), args=arguments)
        metrics = {key: float(value) for key, value in validator(model=model).items()}
        box = validator.metrics.box
        return TeacherScore(metrics, {int(k): float(ap) for k, ap in zip(box.ap_class_index, box.ap, strict=True)})
