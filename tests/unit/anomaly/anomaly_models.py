"""Tiny anomaly models and made-up images for the tests beside this file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kd_yolo.anomaly.backbones import build_backbone
from kd_yolo.anomaly.model import AnomalyModel
from kd_yolo.anomaly.spec import AnomalySpec


def tiny_model(seed: int = 0, **overrides: Any) -> AnomalyModel:
    """Return a model at 64 px whose teacher is a seeded random EfficientNet-Lite0, so that no weights are needed."""
    torch.manual_seed(seed)
    spec = AnomalySpec(**{"imgsz": 64, "teacher": "random:efficientnet-lite0", **overrides})
    teacher = build_backbone(spec.teacher, spec.teacher_strides, True, depth=spec.plus_depth if spec.plus else None)
    _see_images(teacher)
    return AnomalyModel(spec, teacher=teacher)


@torch.no_grad()
def _see_images(teacher: nn.Module) -> None:
    """Fit the statistics of a random network to images: its maps then depend on them, and folding proves something."""
    norms = [module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum, norm.training = 1.0, True
    teacher(textures(16, seed=99))
    for norm in norms:
        norm.momentum, norm.training = 0.1, False


@torch.no_grad()
def stir_norms(module: nn.Module, seed: int = 0) -> None:
    """Draw statistics and scales of every BatchNorm: folding fresh ones proves nothing."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            count = norm.num_features
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.copy_(torch.randn(count, generator=generator) * 0.1)
            norm.running_var.copy_(torch.rand(count, generator=generator) * 0.5 + 0.75)
            norm.weight.copy_(torch.rand(count, generator=generator) * 0.5 + 0.75)
            norm.bias.copy_(torch.randn(count, generator=generator) * 0.1)


def textures(count: int, side: int = 64, seed: int = 0) -> Tensor:
    """Return smooth random images (count, 3, side, side) in [0, 1], each another one."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, side // 8, side // 8, generator=generator)
    return nn.functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)


def train(model: AnomalyModel, images: Tensor, steps: int, lr: float = 4e-3) -> list[float]:
    """Train on one batch with kept targets; return the loss of every step."""
    model.train()
    for norm in (*model.student.modules(), *model.projectors.modules()):
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.3  # so that a few steps are enough for eval mode
    targets = model.targets(images)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-4)
    losses: list[float] = []
    for _ in range(steps):
        loss, _ = model.loss(images, targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses
