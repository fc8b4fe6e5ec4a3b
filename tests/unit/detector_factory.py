"""Small detectors that answer like trained ones: random statistics everywhere, scores from near 0 to near 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.nn.lightnet import build_model

NAMES = {0: "scratch", 1: "dent", 2: "stain"}


def tiny_yaml(form: str | None = "repvgg", both_heads: bool = True) -> dict[str, Any]:
    """Return a model dictionary of five levels; ``form`` None leaves the blocks out."""
    content: dict[str, Any] = {
        "nc": 3,
        "end2end": both_heads,
        "reg_max": 1,
        "backbone": [
            [-1, 1, "Conv", [8, 3, 2]],
            [-1, 1, "Conv", [16, 3, 2]],
            [-1, 1, "Conv", [24, 3, 2]],
            [-1, 1, "Conv", [24, 3, 1]],
            [-1, 1, "Conv", [32, 3, 2]],
            [-1, 1, "Conv", [48, 3, 2]],
        ],
        "head": [[[3, 4, 5], 1, "Detect", ["nc"]]],
    }
    return content if form is None else content | {"kd_yolo": {"reparam": form}}


@torch.no_grad()
def tiny_detector(form: str | None = "repvgg", both_heads: bool = True, seed: int = 0) -> DetectionModel:
    """Return a detector in eval mode whose boxes and scores depend strongly on the image."""
    torch.manual_seed(seed)
    model = build_model(tiny_yaml(form, both_heads))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.get_buffer("running_mean"), 0, 0.2)
            nn.init.uniform_(module.get_buffer("running_var"), 0.3, 1.5)
            module.weight.uniform_(0.8, 1.6)
            module.bias.normal_(0, 0.2)
    head: Any = model.model[-1]
    for name in ("cv3", "one2one_cv3"):
        for level in getattr(head, name, None) or ():
            level[-1].weight.mul_(6.0)
            level[-1].bias.fill_(-2.0)
    model.names = dict(NAMES)
    return model.eval()


def save_checkpoint(model: nn.Module, path: Path, **keys: Any) -> Path:
    """Write a checkpoint as Ultralytics leaves it after training, with ``keys`` on top."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"epoch": -1, "model": model, "ema": None, "train_args": {"imgsz": 64, "data": "x.yaml"}} | keys
    torch.save(content, path)
    return path


def tiny_dataset(folder: Path, images: int = 4, names: tuple[str, ...] = ("scratch", "dent", "stain")) -> Path:
    """Write textured images with two boxes each; return the data YAML."""
    import cv2
    import yaml

    from kd_yolo.images import textured_images

    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for index, image in enumerate(textured_images(images, (64, 64), seed=7)):
        cv2.imwrite(str(folder / "images" / f"{index}.png"), image)
        lines = f"{index % 3} 0.3 0.4 0.3 0.2\n{(index + 1) % 3} 0.7 0.6 0.2 0.5\n"
        (folder / "labels" / f"{index}.txt").write_text(lines)
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump({"path": str(folder), "train": "images", "val": "images", "names": list(names)}))
    return path
