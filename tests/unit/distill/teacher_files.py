"""Teachers' files of every kind, tiny and random, shared by the tests of teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from detector_factory import save_checkpoint
from torch import nn
from torchvision.models import detection
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel, RTDETRDetectionModel

from kd_yolo.config import Recipe
from kd_yolo.distill.model import KDModel
from kd_yolo.distill.wrap import wrap_student
from kd_yolo.files import sha256
from kd_yolo.nn.lightnet import build_model

DATA_NAMES = {0: "scratch", 1: "dent", 2: "stain"}


def yolo_file(folder: Path, model: str | dict[str, Any], names: list[str] | None = None, seed: int = 0) -> Path:
    """Save a random detector of a YOLO family or of ours."""
    torch.manual_seed(seed)
    kinds = names or list(DATA_NAMES.values())
    is_stock = isinstance(model, str) and model.endswith(".yaml")
    built = DetectionModel(model, nc=len(kinds), verbose=False) if is_stock else build_model(model, nc=len(kinds))
    built.names = dict(enumerate(kinds))
    for branch in ("cv3", "one2one_cv3"):
        for level in getattr(built.model[-1], branch, None) or ():  # a fresh head says the same everywhere
            nn.init.normal_(level[-1].weight, 0, 0.5)
            nn.init.constant_(level[-1].bias, -2.0)
    stem = model.removesuffix(".yaml") if isinstance(model, str) else "own"
    return save_checkpoint(built, folder / f"{stem}-{seed}.pt")


def rtdetr_file(folder: Path, names: list[str] | None = None) -> Path:
    """Save a random RT-DETR with a small backbone."""
    torch.manual_seed(0)
    kinds = names or list(DATA_NAMES.values())
    model = RTDETRDetectionModel("yolov8-rtdetr.yaml", nc=len(kinds), verbose=False)
    model.names = dict(enumerate(kinds))
    return save_checkpoint(model, folder / "rtdetr.pt")


def torchvision_file(folder: Path, name: str = "fcos_resnet50_fpn", names: Any = None, **changes: Any) -> Path:
    """Save a random torchvision detector as plain values."""
    torch.manual_seed(0)
    names = names or {1: "dent", 2: "scratch", 3: "stain"}
    model: nn.Module = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=4)
    content = {"torchvision": name, "num_classes": 4, "names": names, "state_dict": model.state_dict()} | changes
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pt"
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return path


def recipe_for(*paths: Path, method: str = "kd-lightnet", **keys: Any) -> Recipe:
    """Return the recipe of one or several files."""
    files, hashes = [str(path) for path in paths], [sha256(path) for path in paths]
    one = len(paths) == 1
    return Recipe(
        teacher=files[0] if one else files, teacher_sha256=hashes[0] if one else hashes, method=method, **keys
    )


def wrapped(recipe: Recipe, student: str | dict[str, Any] = "lightnet-n", **args: Any) -> KDModel:
    """Return a random student beside a recipe's teacher, ready for a training step."""
    torch.manual_seed(1)
    model = build_model(student, nc=len(DATA_NAMES))
    model.args = get_cfg(overrides=args)
    kd = wrap_student(model, recipe, DATA_NAMES)
    kd.train()
    return kd


def batch_of(images: int = 2, imgsz: int = 64) -> dict[str, Any]:
    """Return a training batch of noise with one box an image."""
    return {
        "img": torch.rand(images, 3, imgsz, imgsz, generator=torch.Generator().manual_seed(0)),
        "batch_idx": torch.arange(images, dtype=torch.float32),
        "cls": torch.zeros(images, 1),
        "bboxes": torch.full((images, 4), 0.5),
    }


def check_step(kd: KDModel, imgsz: int = 64) -> dict[str, float]:
    """Take one step; the losses are finite and all above 0, and reach the student (the model checks that too)."""
    loss, items = kd.loss(batch_of(imgsz=imgsz))
    torch.autograd.backward(loss.sum())
    terms = {name: float(items[name]) for name in kd.term_names}
    assert all(value > 1e-4 for value in terms.values()), terms
    assert bool(torch.isfinite(loss).all())
    grads = [p.grad for p in kd.student_model.parameters() if p.grad is not None]
    assert grads
    assert all(bool(torch.isfinite(g).all()) for g in grads)
    teacher = kd.teacher_model
    assert teacher is not None
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    return terms
