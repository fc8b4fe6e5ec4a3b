"""A detector with Ultralytics' Detect head as the teacher: every YOLO family and size, and LightNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.distill.base import DetectorSpec, Taps
from kd_yolo.distill.taps import describe, detect_head, head_strides, head_taps, teacher_taps
from kd_yolo.distill.teachers.base import Teacher


class DetectTeacher(Teacher):
    """A prepared detector, run layer by layer and only as far as is read."""

    provides = frozenset({"neck", "scores", "boxes", "scores_one2one", "head"})

    def __init__(self, model: DetectionModel, class_known: Tensor | None = None) -> None:
        """Take a detector that ``prepare_teacher`` returned.

        Args:
            model: Frozen, in eval mode, speaking the student's classes.
            class_known: (K,) booleans, False where it lacks the class; None means all known.

        Raises:
            TeacherError: It has no Detect head.
        """
        super().__init__()
        self.model = model
        self.strides = tuple(int(s) for s in detect_head(model).stride)
        self.register_buffer("class_known", class_known, persistent=False)

    def describe(self, strides: Sequence[int]) -> DetectorSpec:
        """Return levels, classes and box bins, see the base class."""
        return describe(self.model, strides)

    def taps(self, images: Tensor, reads: frozenset[str], strides: Sequence[int], hold: int = 1) -> Taps:
        """Run the detector up to what is read, see the base class."""
        return teacher_taps(self.model, images, reads, strides, hold)

    def with_head(
        self, taps: Taps, cls: Sequence[Tensor], box: Sequence[Tensor], strides: Sequence[int], hold: int
    ) -> Taps:
        """Return taps with the inside of the head from kept holds, see the base class."""
        head, own = detect_head(self.model), head_strides(self.model)
        levels = [own.index(s) for s in strides]
        held = {
            branches[level][hold - 1]: values
            for branches, kept in ((head.cv3, cls), (head.cv2, box))
            for level, values in zip(levels, kept, strict=True)
            if hold
        }
        return replace(taps, head=head_taps(head, taps.neck, held, hold, strides))

    @property
    def title(self) -> str:
        """Return what this teacher is, for messages."""
        return "a YOLO detector"
