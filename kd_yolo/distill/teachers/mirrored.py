"""A teacher that looks at a view and at its mirror images, and answers with the mean.

Averaging a detector over mirrored images is common at test time; as a teacher's answer for unlabeled images it is data
distillation (Radosavovic et al., CVPR 2018, arXiv:1712.04440, section 3). Merging raw answers anchor by anchor instead
of final boxes is decided here: a grid of cells is mirrored onto itself, so no box has to be matched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kd_yolo.distill.base import DetectorSpec, Taps
from kd_yolo.distill.teachers.base import Teacher
from kd_yolo.distill.teachers.dense import confidence, empty_maps
from kd_yolo.distill.teachers.several import box_weights, known_of, mean_logits
from kd_yolo.errors import TeacherError

# For each number of views the axes of (B, C, H, W) along which those beside the image itself are mirrored.
MIRRORS: dict[int, tuple[tuple[int, ...], ...]] = {2: ((-1,),), 4: ((-1,), (-2,), (-2, -1))}
# Where the distances left, top, right, bottom are found after a mirroring along an axis.
SIDES = {-1: (2, 1, 0, 3), -2: (0, 3, 2, 1)}


class MirroredTeacher(Teacher):
    """Any teacher, with class logits and boxes averaged over mirror images.

    The probability of a class is the mean over the views; a side of the box, or the probabilities of its bins, is the
    mean weighted by each view's highest class probability at the anchor. Neck maps, the inside of the head and the
    one-to-one logits, which choose one anchor an object and another one in each view, are those of the image itself.
    """

    def __init__(self, inner: Teacher, views: int) -> None:
        """Wrap a ready teacher.

        Args:
            inner: Of the student's classes.
            views: 2 with the image mirrored left to right, 4 with the two of these upside down as well.
        """
        super().__init__()
        self.inner, self.views = inner, views
        self.strides, self.provides = inner.strides, inner.provides
        self.register_buffer("class_known", inner.class_known, persistent=False)

    def describe(self, strides: Sequence[int]) -> DetectorSpec:
        """Return levels, classes and box bins, see the base class."""
        return self.inner.describe(strides)

    def taps(self, images: Tensor, reads: frozenset[str], strides: Sequence[int], hold: int = 1) -> Taps:
        """Ask once a view and average what is read of scores and boxes, see the base class."""
        wanted = reads & {"scores", "boxes"}
        if not wanted:
            return self.inner.taps(images, reads, strides, hold)
        wanted |= {"scores"}  # they weight the boxes
        upright = self.inner.taps(images, reads | wanted, strides, hold)
        sizes = [tuple(x.shape[-2:]) for x in empty_maps(images, strides)]
        answers = [(upright.scores.float(), upright.boxes.float())]
        for axes in MIRRORS[self.views]:
            found = self.inner.taps(images.flip(axes), wanted, strides)
            answers.append((_mirrored(found.scores.float(), sizes, axes), _sides(found.boxes.float(), sizes, axes)))
        scores = torch.stack([answer[0] for answer in answers])
        known = known_of(self, scores.shape[2]).to(scores.device)
        merged = mean_logits(scores, known.expand(len(scores), -1))
        if "boxes" not in wanted:
            return replace(upright, scores=merged)
        weights = box_weights(torch.stack([confidence(one, known) for one in scores]))
        boxes = _mean_sides(torch.stack([answer[1] for answer in answers]), weights)
        return replace(upright, scores=merged, boxes=boxes)

    def check_reads(self, method: str, reads: frozenset[str]) -> None:
        """Refuse a method that reads nothing that is averaged, or that the teacher has not got.

        Raises:
            TeacherError: As said.
        """
        if reads and not reads & {"scores", "boxes"}:
            raise TeacherError(
                f"teacher_views={self.views} has no effect: method '{method}' reads the teacher's "
                f"{', '.join(sorted(reads))}, and only scores and boxes are averaged; drop it"
            )
        self.inner.check_reads(method, reads)

    def with_head(
        self, taps: Taps, cls: Sequence[Tensor], box: Sequence[Tensor], strides: Sequence[int], hold: int
    ) -> Taps:
        """Return taps with the inside of the head from kept holds, see the base class."""
        return self.inner.with_head(taps, cls, box, strides, hold)

    @property
    def title(self) -> str:
        """Return what this teacher is, for messages."""
        return f"{self.inner.title}, averaged over {self.views} views"


def _mirrored(values: Tensor, sizes: Sequence[tuple[int, ...]], axes: Sequence[int]) -> Tensor:
    """Return values at the anchors of mirrored images, (B, C, A), at the anchors of the images themselves."""
    levels = values.split([height * width for height, width in sizes], -1)
    maps = [level.unflatten(-1, size).flip(axes).flatten(-2) for level, size in zip(levels, sizes, strict=True)]
    return torch.cat(maps, -1)


def _sides(boxes: Tensor, sizes: Sequence[tuple[int, ...]], axes: Sequence[int]) -> Tensor:
    """The same for raw boxes, (B, 4 R, A): left and right, or top and bottom, change places."""
    if not boxes.shape[1]:
        return boxes
    boxes = _mirrored(boxes, sizes, axes).unflatten(1, (4, -1))
    for axis in axes:
        boxes = boxes[:, list(SIDES[axis])]
    return boxes.flatten(1, 2)


def _mean_sides(boxes: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of raw boxes, (B, 4 R, A), from (V, B, 4 R, A) and weights (V, B, A).

    With bins (R > 1) of their probabilities, as logits again.
    """
    if boxes.shape[2] == 4:
        return (weights.unsqueeze(2) * boxes).sum(0)
    bins = boxes.unflatten(2, (4, -1)).log_softmax(3)
    return (bins + weights.log()[:, :, None, None]).logsumexp(0).flatten(1, 2)
