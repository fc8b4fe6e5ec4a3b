"""Calibrated tiny checkpoints, a tiny labelled data set and a stand-in for an opened model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch
from anomaly_factory import write_pixels
from anomaly_models import textures, tiny_model
from numpy.typing import NDArray
from torch import Tensor

from kd_yolo.anomaly.calibration import Calibration
from kd_yolo.anomaly.checkpoint import save_anomaly
from kd_yolo.anomaly.model import AnomalyModel

LIMITS = Calibration([0.0], [1.0], threshold_image=0.5, threshold_pixel=0.3, score_min=0.1, score_max=0.5)
"""Of the stand-in: a peak of 0.5 has the confidence 0.5, one of 0.6 has 0.75, 0.7 and more have 1."""
NAMES = {0: "normal", 1: "anomaly"}


def calibrated_model(seed: int = 0) -> AnomalyModel:
    """Return a tiny model that knows only the statistics of textures; nothing is trained."""
    model = tiny_model(seed).eval()
    model.fit_targets([textures(8, seed=50)])
    model.calibrate([textures(8, seed=51)])
    return model


def checkpoint(path: Path, category: str | None = None, data: str = "widgets", calibrated: bool = True) -> Path:
    """Write a checkpoint as a training run does."""
    model = calibrated_model()
    if not calibrated:
        model.calibration = None
    path.parent.mkdir(parents=True, exist_ok=True)
    save_anomaly(path, model, {"imgsz": 64, "data": data}, {"category": category} if category else {})
    return path


def photo(seed: int, defect: bool = False, size: tuple[int, int] = (80, 96)) -> NDArray[np.uint8]:
    """Return a BGR texture, with a white square where defective."""
    rows = (textures(1, 96, seed)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    image = np.ascontiguousarray(rows[: size[0], : size[1]])
    if defect:
        image[20:44, 30:54] = 255
    return image


def widgets(root: Path, categories: tuple[str, ...] = ("bolt",), val: bool = False) -> Path:
    """Write an MVTec layout: 4 normal images to train on, 3 normal and 3 defective to test on, optionally as val."""
    mask = np.zeros((80, 96), np.uint8)
    mask[20:44, 30:54] = 255
    for number, category in enumerate(categories):
        home, seed = root / category, 1000 * (number + 1)
        parts = {"train/good": (4, False), "test/good": (3, False), "test/hole": (3, True)}
        parts |= {"val/good": (3, False), "val/hole": (3, True)} if val else {}
        for folder, (count, defect) in parts.items():
            for index in range(count):
                seed += 1
                write_pixels(home / folder / f"{index:03d}.png", photo(seed, defect))
                if folder == "test/hole":
                    write_pixels(home / "ground_truth/hole" / f"{index:03d}_mask.png", mask)
    return root


class StandIn:
    """An opened model whose map is given: the green channel of the image, stretched to the canvas, in [0, 1]."""

    def __init__(self, canvas: tuple[int, int] = (64, 64), limits: Calibration = LIMITS) -> None:
        self.canvas, self.thresholds = canvas, limits
        self.description = SimpleNamespace(names=NAMES, canvas=canvas)
        self.calls: list[int] = []

    def maps(self, images: Tensor) -> NDArray[np.float32]:
        self.calls.append(len(images))
        return images[:, 1:2].numpy()

    def scores(self, maps: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(torch.from_numpy(maps).flatten(1).amax(1).numpy(), dtype=np.float32)


def painted(blobs: dict[tuple[int, int, int, int], float], size: tuple[int, int] = (64, 64)) -> NDArray[np.uint8]:
    """Return a grey BGR image whose map on a canvas of the same size has these rectangles (x1, y1, x2, y2): value."""
    image = np.zeros((*size, 3), np.uint8)
    for (left, top, right, bottom), value in blobs.items():
        image[top:bottom, left:right] = round(value * 255)
    return image


def write_video(path: Path, images: list[NDArray[np.uint8]], fps: float = 10.0) -> Path:
    """Write a Motion JPEG video."""
    size = (images[0].shape[1], images[0].shape[0])
    writer: Any = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), fps, size)
    for image in images:
        writer.write(image)
    writer.release()
    return path
