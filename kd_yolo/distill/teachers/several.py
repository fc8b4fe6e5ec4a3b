"""Several teachers at once: averaged, or for each class the one that finds it best."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_yolo.distill.base import DetectorSpec, Taps
from kd_yolo.distill.ops.boxes import decode_boxes
from kd_yolo.distill.teacher import UNKNOWN_CLASS_LOGIT
from kd_yolo.distill.teachers.base import Teacher
from kd_yolo.distill.teachers.dense import confidence, dense_spec, dense_taps, distances, empty_maps
from kd_yolo.errors import TeacherError


class SeveralTeachers(Teacher):
    """Teachers that answer together, at the strides that all of them have.

    ``mean``: the probability of a class is the mean over the teachers that know it; a side of the box is the mean over
    all, weighted by each teacher's highest probability of a class at that anchor. ``per_class``: the logit of a class
    is that of its chosen teacher; the box is the one of the teacher whose class wins at that anchor.
    """

    known: Tensor
    choice: Tensor | None

    def __init__(self, members: Sequence[Teacher], num_classes: int, choice: Sequence[int] | None = None) -> None:
        """Take ready teachers of one class list.

        Args:
            members: Each speaks the student's classes.
            num_classes: K.
            choice: For every class the number of its teacher, for ``per_class``; None means ``mean``.

        Raises:
            TeacherError: They share no level, or nothing that all of them give.
        """
        super().__init__()
        self._registered = nn.ModuleList(members)
        self.members: tuple[Teacher, ...] = tuple(members)
        self.num_classes = num_classes
        shared = set.intersection(*(set(member.strides) for member in members))
        self.strides = tuple(sorted(shared))
        if not shared:
            listed = "; ".join(f"{member.title} {list(member.strides)}" for member in members)
            raise TeacherError(f"the teachers have no common feature level (strides: {listed}); leave one out")
        self.provides = frozenset.intersection(frozenset({"scores", "boxes"}), *(m.provides for m in members))
        known = torch.stack([known_of(member, num_classes).cpu() for member in members])
        self.register_buffer("known", known, persistent=False)
        self.register_buffer("class_known", None if bool(known.any(0).all()) else known.any(0), persistent=False)
        self.register_buffer("choice", None if choice is None else torch.tensor(list(choice)), persistent=False)

    def describe(self, strides: Sequence[int]) -> DetectorSpec:
        """Return levels, classes and box bins, see the base class."""
        return dense_spec(strides, self.num_classes)

    def taps(self, images: Tensor, reads: frozenset[str], strides: Sequence[int], hold: int = 1) -> Taps:
        """Ask every teacher and merge the answers, see the base class."""
        wanted = reads & self.provides
        maps = empty_maps(images, strides)
        if not wanted:
            return dense_taps(maps, strides, None, None)
        answers = [member.taps(images, wanted | {"scores"}, strides) for member in self.members]  # scores weight boxes
        scores = torch.stack([answer.scores.float() for answer in answers])
        merged = mean_logits(scores, self.known) if self.choice is None else pick_logits(scores, self.choice)
        if "boxes" not in wanted:
            return dense_taps(maps, strides, merged, None)
        sides = torch.stack([_distances(m, answer, strides) for m, answer in zip(self.members, answers, strict=True)])
        if self.choice is None:
            strength = torch.stack([confidence(s, k) for s, k in zip(scores, self.known, strict=True)])
            return dense_taps(maps, strides, merged, mean_boxes(sides, strength))
        return dense_taps(maps, strides, merged, pick_boxes(sides, merged, self.choice))

    @property
    def title(self) -> str:
        """Return what this teacher is, for messages."""
        return "several teachers (" + ", ".join(member.title for member in self.members) + ")"


def mean_logits(scores: Tensor, known: Tensor) -> Tensor:
    """Return the logit of the mean probability over the teachers that know a class, (B, K, A).

    From logarithms of both tails, so that nothing saturates: log sum p_t - log sum (1 - p_t); the number of teachers
    cancels.

    Args:
        scores: Logits, (T, B, K, A).
        known: (T, K) booleans. A class that none knows gets ``UNKNOWN_CLASS_LOGIT``.
    """
    mask = known.view(len(known), 1, -1, 1)
    tails = [F.logsigmoid(sign * scores).masked_fill(~mask, -torch.inf).logsumexp(0) for sign in (1, -1)]
    nobody = ~known.any(0).view(1, -1, 1)
    return (tails[0] - tails[1]).masked_fill(nobody, UNKNOWN_CLASS_LOGIT)


def mean_boxes(sides: Tensor, strength: Tensor) -> Tensor:
    """Return the mean distances, (B, 4, A), weighted by each teacher's highest probability at the anchor.

    Args:
        sides: Distances in units of the stride, (T, B, 4, A).
        strength: Highest logit of a class that the teacher knows, (T, B, A).
    """
    return (box_weights(strength).unsqueeze(2) * sides).sum(0)


def box_weights(strength: Tensor) -> Tensor:
    """Return each answer's share in a mean box, (T, B, A): p_t / sum p_t, also where all are close to 0."""
    return F.logsigmoid(strength).softmax(0)


def pick_logits(scores: Tensor, choice: Tensor) -> Tensor:
    """Return for every class the logits of its teacher, (B, K, A), from (T, B, K, A)."""
    return scores[choice, :, torch.arange(len(choice), device=choice.device)].transpose(0, 1)


def pick_boxes(sides: Tensor, merged: Tensor, choice: Tensor) -> Tensor:
    """Return the distances of the teacher whose class wins at the anchor, (B, 4, A).

    Args:
        sides: Distances, (T, B, 4, A).
        merged: Logits after the choice, (B, K, A).
        choice: (K,) numbers of teachers.
    """
    winner = choice[merged.argmax(1)]  # (B, A)
    return sides.gather(0, winner[None, :, None, :].expand(1, -1, 4, -1))[0]


def known_of(teacher: Teacher, num_classes: int) -> Tensor:
    """Return which classes a teacher knows, (K,) booleans; its ``class_known`` of None means all."""
    return torch.ones(num_classes, dtype=torch.bool) if teacher.class_known is None else teacher.class_known


def _distances(member: Teacher, answer: Taps, strides: Sequence[int]) -> Tensor:
    """Return a teacher's boxes as distances, (B, 4, A), whatever its number of bins."""
    bins = member.describe(strides).reg_max
    if bins == 1:
        return answer.boxes.float()
    return distances(decode_boxes(answer, bins), answer.anchors, answer.strides)
