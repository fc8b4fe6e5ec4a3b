"""Small classification data and classifiers, drawn or built in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn
from ultralytics.nn.tasks import ClassificationModel

from kd_yolo.classify.student import build_classifier

NAMES = {0: "dots", 1: "lines", 2: "plain"}
TINY_YAML: dict[str, Any] = {
    "nc": 3,
    "kd_yolo": {"reparam": "qarep", "scope": "body"},
    "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16, 3, 1]]],
    "head": [[-1, 1, "Classify", ["nc"]]],
}


def draw(name: str, seed: int, side: int = 64) -> np.ndarray:
    """Return an image (side, side, 3) of a class: dots, lines or neither, on noise."""
    rng = np.random.default_rng((seed, sum(map(ord, name))))
    image = rng.normal(120, 12, (side, side)).astype(np.float32)
    for _ in range(6):
        x, y = (int(v) for v in rng.integers(6, side - 6, 2))
        if name == "dots":
            cv2.circle(image, (x, y), 3, 230.0, -1)
        elif name == "lines":
            cv2.line(image, (x, 0), (x, side - 1), 30.0, 2)
    return np.repeat(image.clip(0, 255).astype(np.uint8)[..., None], 3, 2)


def class_folder(
    out: Path, counts: Mapping[str, int] | None = None, names: Sequence[str] = ("dots", "lines", "plain")
) -> Path:
    """Write SPLIT/CLASS/*.png with so many images a class and split."""
    for number, (split, count) in enumerate((counts or {"train": 8, "val": 4, "test": 2}).items()):
        for name in names:
            place = out / split / name
            place.mkdir(parents=True)
            for index in range(count):
                cv2.imwrite(str(place / f"{name}_{index}.png"), draw(name, 1000 * number + index))
    return out


def tiny_classifier(
    seed: int = 0, names: Mapping[int, str] = NAMES, cfg: Mapping[str, Any] = TINY_YAML
) -> ClassificationModel:
    """Return a small classifier with BatchNorm statistics of its own, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_classifier(cfg, len(names))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                nn.init.normal_(module.running_mean, 0, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.uniform_(module.weight, 0.7, 1.3)
                nn.init.normal_(module.bias, 0, 0.1)
    model.names = dict(names)
    model.args = {"imgsz": 64}
    return model.eval()


def save_classifier(model: ClassificationModel, path: Path) -> Path:
    """Write a checkpoint as the end of a training leaves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"epoch": -1, "ema": None, "model": model, "train_args": {"imgsz": 64, "task": "classify"}}
    torch.save(content, path)
    return path


def taps(batch: int = 4, channels: int = 16, size: int = 3, classes: int = 4, seed: int = 0) -> tuple[Any, ...]:
    """Return student taps with gradients, teacher taps without, and true classes."""
    from kd_yolo.classify.methods import ClassTaps

    rng = torch.Generator().manual_seed(seed)
    feature = torch.randn(batch, channels, size, size, generator=rng, requires_grad=True)
    head = torch.randn(channels, classes, generator=rng)
    student = ClassTaps(feature, feature.mean((2, 3)) @ head)  # the logits depend on the map, as a head's do
    other = torch.randn(batch, channels, size, size, generator=rng)
    teacher = ClassTaps(other, 3 * torch.randn(batch, classes, generator=rng))
    return student, teacher, torch.randint(classes, (batch,), generator=rng)
