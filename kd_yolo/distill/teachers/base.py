"""What every teacher offers, whatever it is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from ultralytics.utils.ops import xyxy2xywh

from kd_yolo.distill.base import DetectorSpec, Taps
from kd_yolo.distill.ops.boxes import decode_boxes
from kd_yolo.errors import TeacherError


class Teacher(nn.Module, ABC):
    """A frozen model that answers with taps in the student's classes.

    Attributes:
        strides: Input pixels per cell of each of its levels, finest first.
        provides: What it can be asked for, of ``neck``, ``scores``, ``boxes``, ``scores_one2one``, ``head``. A missing
            ``scores_one2one`` is no error: methods take None for it.
        class_known: (K,) booleans, False where it lacks the student's class; None means all known.
    """

    strides: tuple[int, ...]
    provides: frozenset[str]
    class_known: Tensor | None

    @abstractmethod
    def describe(self, strides: Sequence[int]) -> DetectorSpec:
        """Return levels, classes and box bins at the given strides."""

    @abstractmethod
    def taps(self, images: Tensor, reads: frozenset[str], strides: Sequence[int], hold: int = 1) -> Taps:
        """Run up to what is read.

        Args:
            images: (B, 3, H, W) in 0..1.
            reads: What to compute, a part of ``provides``; the rest may come as an empty tensor.
            strides: The matched strides, finest first.
            hold: Block k after which the head is tapped when ``head`` is read.
        """

    def with_head(
        self, taps: Taps, cls: Sequence[Tensor], box: Sequence[Tensor], strides: Sequence[int], hold: int
    ) -> Taps:
        """Return taps with the inside of the head from kept holds; the layers that follow are this teacher's.

        Args:
            taps: Taps without a head.
            cls: Holds of the class branch, L maps.
            box: The same of the box branch.
            strides: The matched strides.
            hold: Block k after which they were held.

        Raises:
            TeacherError: It does not give ``head``.
        """
        raise TeacherError(f"{self.title} does not give the inside of its head; choose another method or teacher")

    def predict(self, images: Tensor) -> Tensor:
        """Return what it detects before NMS, (B, 4 + K, A): centre-size boxes in pixels, then class probabilities.

        Classes that it lacks have probability 0.

        Args:
            images: (B, 3, H, W) in 0..1.
        """
        taps = self.taps(images, frozenset({"scores", "boxes"}), self.strides)
        boxes = xyxy2xywh(decode_boxes(taps, self.describe(self.strides).reg_max)).transpose(1, 2)
        return torch.cat((boxes, self.masked(taps.scores.float().sigmoid())), 1)

    def masked(self, probabilities: Tensor) -> Tensor:
        """Return class probabilities (B, K, A) with 0 for the classes that it lacks."""
        return probabilities if self.class_known is None else probabilities * self.class_known.view(1, -1, 1)

    def check_reads(self, method: str, reads: frozenset[str]) -> None:
        """Refuse a method that needs what this teacher has not got.

        Raises:
            TeacherError: Names the method and what is missing.
        """
        missing = sorted(reads - self.provides - {"scores_one2one"})
        if missing:
            raise TeacherError(
                f"method '{method}' reads the teacher's {', '.join(missing)}, which {self.title} does not give; it "
                f"gives {', '.join(sorted(self.provides))}: choose another method (kd-yolo methods) or another teacher"
            )

    @property
    def title(self) -> str:
        """Return what this teacher is, for messages."""
        return type(self).__name__
