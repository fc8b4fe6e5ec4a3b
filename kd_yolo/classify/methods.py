"""Distillation of classifiers: what a method is, temperature KD and decoupled KD.

Shapes: B images, K classes; a feature map is (B, C, H, W). Every term is a mean over the batch, in float32, weighted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd_yolo.distill.base import MethodArgs, at_least_float32, validate_args
from kd_yolo.distill.ops.separation import separation_loss
from kd_yolo.distill.ops.standardize import standardize_logits
from kd_yolo.errors import ConfigError, nearest

Tap = Literal["head", "backbone"]


@dataclass(frozen=True)
class ClassTaps:
    """What was read from one classifier in one forward pass.

    Attributes:
        feature: The map that the method taps, (B, C, H, W), as it stands in the graph.
        logits: Class logits, (B, K).
    """

    feature: Tensor
    logits: Tensor


@dataclass(frozen=True)
class ClassTerms:
    """What a method returns.

    Attributes:
        terms: Named scalar losses.
        task_factor: Factor on the cross entropy, a scalar tensor, or None for 1.
    """

    terms: dict[str, Tensor]
    task_factor: Tensor | None = None


class ClassifyMethod(nn.Module, ABC):
    """One distillation loss of classifiers. It owns its adapters; it owns no model, no hook and no trainer."""

    Args: ClassVar[type[MethodArgs]]
    terms: tuple[str, ...]
    tap: Tap = "head"

    def __init__(self, args: MethodArgs, student_channels: int, teacher_channels: int, num_classes: int) -> None:
        """Store the arguments; a subclass builds its adapters."""
        super().__init__()
        self.args = args
        self.num_classes = num_classes

    @abstractmethod
    def forward(self, student: ClassTaps, teacher: ClassTaps, target: Tensor) -> ClassTerms:
        """Return the losses.

        Args:
            student: Taps that carry gradients.
            teacher: Taps without gradients.
            target: True classes, (B,).
        """


class KDArgs(MethodArgs):
    """Arguments of ``kd``."""

    tau: float = Field(default=4.0, gt=0.0, description="temperature")
    standardize: bool = Field(default=False, description="z-score the logits over the classes (arXiv:2403.01878)")


class KD(ClassifyMethod):
    """Temperature KD, ``kd_kl = tau^2 KL(softmax(t / tau) || softmax(s / tau))``.

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531, section 2; the factor
    tau^2 keeps the gradient's size when tau changes (end of that section).
    """

    Args = KDArgs
    args: KDArgs
    terms = ("kd_kl",)

    def forward(self, student: ClassTaps, teacher: ClassTaps, target: Tensor) -> ClassTerms:
        """Return the term, see the base class."""
        mine, theirs = _logits(student, teacher, self.args.standardize)
        tau = self.args.tau
        log_q, log_p = (mine / tau).log_softmax(1), (theirs / tau).log_softmax(1)
        loss = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        return ClassTerms({"kd_kl": self.args.weight * tau**2 * loss})


class DKDArgs(MethodArgs):
    """Arguments of ``dkd``."""

    alpha: float = Field(default=1.0, ge=0.0, description="factor on dkd_target, the true class against the rest")
    beta: float = Field(default=2.0, ge=0.0, description="factor on dkd_other, the other classes among themselves")
    tau: float = Field(default=4.0, gt=0.0, description="temperature")
    standardize: bool = Field(default=False, description="z-score the logits over the classes (arXiv:2403.01878)")


class DKD(ClassifyMethod):
    """Decoupled KD, ``alpha dkd_target + beta dkd_other`` (Zhao et al., CVPR 2022, arXiv:2203.08679, equation 7)."""

    Args = DKDArgs
    args: DKDArgs
    terms = ("dkd_target", "dkd_other")

    def forward(self, student: ClassTaps, teacher: ClassTaps, target: Tensor) -> ClassTerms:
        """Return the terms, see the base class."""
        args = self.args
        mine, theirs = _logits(student, teacher, args.standardize)
        relevant, other = separation_loss(mine, theirs, target, args.tau)
        values = (args.weight * args.alpha * relevant, args.weight * args.beta * other)
        return ClassTerms(dict(zip(self.terms, values, strict=True)))


def list_methods() -> list[str]:
    """Return the names of the methods, ``none`` left out."""
    return ["dkd", "hflkd", "kd"]


def load_method(name: str) -> type[ClassifyMethod]:
    """Return the class of a method.

    Raises:
        ConfigError: Unknown name.
    """
    if name == "kd":
        return KD
    if name == "dkd":
        return DKD
    if name == "hflkd":
        from kd_yolo.classify.hflkd import HFLKD

        return HFLKD
    known = [*list_methods(), "none"]
    raise ConfigError(f"method '{name}' of classifiers is unknown; known: {', '.join(known)}{nearest(name, known)}")


def parse_args(name: str, args: Mapping[str, Any]) -> MethodArgs:
    """Validate a method's arguments.

    Raises:
        ConfigError: An unknown or ill-typed argument; the message names it and the nearest known one.
    """
    return validate_args(name, load_method(name).Args, args)


def build_method(
    name: str, args: Mapping[str, Any], student_channels: int, teacher_channels: int, num_classes: int, seed: int = 0
) -> ClassifyMethod:
    """Build a method with adapters drawn from its own random stream; the global random state is left as it was.

    Args:
        name: ``kd``, ``dkd`` or ``hflkd``.
        args: Its arguments.
        student_channels: Channels of the map that it taps in the student.
        teacher_channels: The same of the teacher.
        num_classes: K.
        seed: Seed of the adapters.

    Raises:
        ConfigError: Unknown name or wrong arguments.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
        return load_method(name)(parse_args(name, args), student_channels, teacher_channels, num_classes)


def _logits(student: ClassTaps, teacher: ClassTaps, standardize: bool) -> tuple[Tensor, Tensor]:
    mine, theirs = at_least_float32(student.logits), at_least_float32(teacher.logits.detach())
    if standardize:  # it works on (B, K, A); a classifier has one place
        mine, theirs = (standardize_logits(x.unsqueeze(2)).squeeze(2) for x in (mine, theirs))
    return mine, theirs
