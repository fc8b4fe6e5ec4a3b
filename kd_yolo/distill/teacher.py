"""Load a teacher, fit it to the student's data and make it cheap to run."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.nn.modules.conv import Conv, Conv2
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import fuse_conv_and_bn

from kd_yolo.checkpoints import load_model
from kd_yolo.distill.taps import detect_head
from kd_yolo.errors import TeacherError
from kd_yolo.nn.surgery import merge

# A logit that no class map can mistake for a detection; finite, so that masked terms stay finite too.
UNKNOWN_CLASS_LOGIT = -30.0


@dataclass(frozen=True)
class ClassMap:
    """How the student's classes are found in the teacher.

    Attributes:
        index: For every student class the teacher's class, or -1.
        known: Names of the classes both have.
        missing: Names of student classes that the teacher lacks.
        identical: True when both lists are the same in the same order.
    """

    index: tuple[int, ...]
    known: tuple[str, ...]
    missing: tuple[str, ...]
    identical: bool

    def describe(self) -> str:
        """Return one line for the log."""
        if self.identical:
            return f"classes: all {len(self.index)} equal"
        text = f"classes: {len(self.known)} of {len(self.index)} matched by name"
        return text + (f", not known to the teacher and masked: {', '.join(self.missing)}" if self.missing else "")


def load_teacher(path: Path, trust: bool = False) -> tuple[DetectionModel, dict[str, Any]]:
    """Load a teacher checkpoint as a float32 detector in eval mode.

    Raises:
        CheckpointError: Missing, truncated, foreign or another task.
        TeacherError: It has no Detect head.
    """
    model, checkpoint = load_model(path, trust=trust)
    detect_head(model)
    return model, checkpoint


def map_classes(student: Mapping[int, str], teacher: Mapping[int, str]) -> ClassMap:
    """Match classes by name, ignoring case and surrounding space.

    Raises:
        TeacherError: They share no name.
    """
    theirs = {str(name).strip().lower(): int(index) for index, name in teacher.items()}
    names = [str(student[k]).strip() for k in sorted(student)]
    index = tuple(theirs.get(name.lower(), -1) for name in names)
    known = tuple(name for name, i in zip(names, index, strict=True) if i >= 0)
    if not known:
        raise TeacherError(
            f"teacher and data share no class name: the data has {', '.join(names[:6])}; the teacher "
            f"{', '.join(str(name) for name in list(teacher.values())[:6])}. Train the teacher on this data "
            "or rename the classes"
        )
    missing = tuple(name for name, i in zip(names, index, strict=True) if i < 0)
    identical = index == tuple(range(len(teacher)))
    return ClassMap(index, known, missing, identical)


@torch.no_grad()
def prepare_teacher(model: DetectionModel, class_map: ClassMap) -> DetectionModel:
    """Return a frozen copy of a teacher that speaks the student's classes and has as few operations as possible.

    Branches are merged and every BatchNorm is folded, which a frozen network in eval mode allows exactly; both head
    branches stay, unlike in Ultralytics' ``fuse()``, because a method may read either. Classes the teacher lacks get a
    constant logit and are masked by the caller.
    """
    teacher = merge(model, check=False)[0] if _has_rep_blocks(model) else deepcopy(model)
    teacher.eval()
    head = detect_head(teacher)
    if not class_map.identical:
        for branch in (head.cv3, getattr(head, "one2one_cv3", None)):
            for level in branch or ():
                level[-1] = _map_rows(level[-1], class_map.index)
        head.nc = len(class_map.index)
        head.no = head.nc + 4 * head.reg_max
        teacher.nc = head.nc
    teacher.criterion = None
    # Lossless, and a quarter faster than NCHW on the CPU it was measured on (benchmarks/step_time.py).
    return fold_batchnorm(teacher).to(memory_format=torch.channels_last).requires_grad_(False)


@torch.no_grad()
def fold_batchnorm(model: DetectionModel) -> DetectionModel:
    """Fold every BatchNorm of a detector in eval mode into its convolution, in place, and return it."""
    for module in model.modules():
        if isinstance(module, Conv) and not isinstance(module, Conv2) and hasattr(module, "bn"):
            module.conv = fuse_conv_and_bn(module.conv, module.bn)
            del module.bn
            module.forward = module.forward_fuse
    return model


def _has_rep_blocks(model: DetectionModel) -> bool:
    from kd_yolo.nn.blocks import RepBlock

    return any(isinstance(module, RepBlock) for module in model.modules())


def _map_rows(conv: nn.Conv2d, index: tuple[int, ...]) -> nn.Conv2d:
    mapped = nn.Conv2d(conv.in_channels, len(index), 1).to(conv.weight)
    mapped.weight.zero_()
    assert mapped.bias is not None
    assert conv.bias is not None  # a head's last convolution always has one
    mapped.bias.fill_(UNKNOWN_CLASS_LOGIT)
    for row, source in enumerate(index):
        if source >= 0:
            mapped.weight[row] = conv.weight[source]
            mapped.bias[row] = conv.bias[source]
    return mapped
