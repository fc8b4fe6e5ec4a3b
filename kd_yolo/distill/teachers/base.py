"""What every teacher offers, whatever it is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from kd_yolo.distill.base import DetectorSpec, Taps
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
