"""The wrapped model: a trainable student beside a frozen teacher, with one method between them.

``KDModel`` is a ``DistillationModel`` so that Ultralytics' freezing, EMA, stripping, export and multi-GPU code treat it
as its own. It replaces what that class does inside: no hooks, no projector of its own, no dummy forward, and a teacher
that runs only up to what the method reads. The teacher is not a registered submodule: it is in no checkpoint, no
optimizer, no EMA and no gradient bucket.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import copy_attr

from kd_yolo.distill.assigned import AssignedTargets
from kd_yolo.distill.balance import balance_factors
from kd_yolo.distill.base import DistillMethod, Taps
from kd_yolo.distill.first_step import check_first_step
from kd_yolo.distill.joined import take_images, with_background, with_boxes
from kd_yolo.distill.pseudo import PseudoLabels, confident_boxes, pseudo_loss
from kd_yolo.distill.taps import (
    common_strides,
    detect_head,
    head_strides,
    head_taps,
    held_in_head,
    student_taps,
)
from kd_yolo.distill.teachers.base import Teacher
from kd_yolo.errors import DistillationError

BALANCE_TRIES = 20  # batches that may pass before a term without gradient ends the run
BALANCE_LARGE = 1000


class KDModel(DistillationModel):
    """Teacher, student and method as one trainable module.

    Attributes:
        student_model: The trainable detector; the only part that is kept.
        projector: The distillation method with its adapters (the attribute name is the one Ultralytics restores).
        pseudo: How the teacher's boxes become labels of unlabeled images, or None when they do not.
        factor: Schedule factor in 0..1 for the epoch under way.
        balance: Gradient ratio r to set once after warm-up, or None.
        balance_factors: Factors found by balancing, by term.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: DetectionModel,
        method: DistillMethod,
        balance: float | None = None,
    ) -> None:
        """Wrap prepared models.

        Args:
            teacher: Frozen teacher that already speaks the student's classes.
            student: Detector to train.
            method: Built for these two.
            balance: Gradient ratio, or None to use the method's own weights.

        Raises:
            TeacherError: They share no level.
        """
        nn.Module.__init__(self)  # not the parent's: its hooks, projector and dummy forward are what this class avoids
        device = next(student.parameters()).device
        copy_attr(self, student)
        self.student_model: DetectionModel = student
        self.projector: DistillMethod = method.to(device)
        self._teacher: tuple[Teacher, ...] = (teacher.eval().to(device),)  # a tuple hides it from nn.Module
        self.strides = common_strides(head_strides(student), teacher.strides)
        self.reads = method.reads
        self.term_names = tuple(f"{name}_loss" for name in method.terms)
        self.pseudo: PseudoLabels | None = None
        self._teacher_bins = 1
        self.factor = 1.0
        self.balance = balance
        self.balance_factors: dict[str, float] = {}
        self.balance_due = False
        self._balance_tries = 0
        self._checked = False
        self._assigned = AssignedTargets()
        self._held: dict[nn.Module, Tensor] = {}
        self.feats_idx = self.get_distill_layers(student)
        self.teacher_feats_idx: list[int] = []  # upstream's; a teacher here need not have layers

    @property
    def teacher_model(self) -> Teacher | None:
        """The frozen teacher, or None in copies (EMA, checkpoints)."""
        return self._teacher[0] if self._teacher else None

    @teacher_model.setter
    def teacher_model(self, value: Teacher | None) -> None:
        self._teacher = () if value is None else (value,)

    @property
    def uses_unlabeled(self) -> bool:
        """Whether the next step has a use for unlabeled images.

        Not while distillation is switched off; nor in the one step that measures the gradients for ``balance``, so that
        the factors are those of a run without such images.
        """
        return bool(self._teacher) and self.factor > 0 and not self.balance_due

    def label_with_teacher(self, pseudo: PseudoLabels) -> None:
        """Give unlabeled images the teacher's confident boxes as labels, from the next step on.

        Raises:
            TeacherError: This teacher gives no scores or no boxes.
        """
        for teacher in self._teacher:
            teacher.check_reads("pseudo=true", frozenset({"scores", "boxes"}))
            self._teacher_bins = teacher.describe(self.strides).reg_max
        self.pseudo = pseudo
        self.term_names = tuple(f"{name}_loss" for name in (*self.projector.terms, "pseudo"))

    def loss(self, batch: Mapping[str, Any], preds: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the detection loss and, in training, the named distillation losses.

        Args:
            batch: A training batch, ``img`` (B, 3, H, W) in 0..1; perhaps ``unlabeled``, (U, 3, H, W), which only the
                distillation terms see, or ``teacher_img``, the same views on the teacher's canvas.
            preds: The student's predictions in validation; None in training.

        Returns:
            The loss vector (stock terms, then ours), times B as stock losses are, and all terms by name, without it.

        Raises:
            DistillationError: The first step's self-check failed.
        """
        switched_off = self.factor == 0 and self._checked and not self.balance_due
        if not self.training or not self._teacher or switched_off:  # then the teacher need not run at all
            preds = self.student_model(batch["img"]) if preds is None else preds
            regular, items = self.student_model.loss(batch, preds)
            zero = torch.zeros(len(self.term_names), device=regular.device)
            return torch.cat([regular, zero]), {**items, **dict(zip(self.term_names, zero, strict=True))}

        images, more = batch["img"], batch.get("unlabeled")
        everything = images if more is None else torch.cat([images, more])
        reads = self.reads | {"scores", "boxes"} if more is not None and self.pseudo else self.reads
        self._assigned.watch(self.student_model)
        with torch.no_grad():  # before the student, so that the teacher's activations are gone when the student's peak
            teacher = self._teacher[0].taps(
                batch.get("teacher_img", everything), reads, self.strides, self.projector.hold
            )
        with held_in_head(detect_head(self.student_model), self.projector.hold if "head" in self.reads else 0) as held:
            preds = self.student_model(everything)
        self._held = held
        labelled = preds if more is None else take_images(preds, slice(len(images)))
        regular, items = self.student_model.loss(batch, labelled)
        pseudo = regular.new_zeros(())
        if more is not None:
            batch, pseudo = self._add_unlabeled(batch, everything, preds, teacher)
        terms = self.distill_terms(preds, batch, teacher)
        self._held = {}  # it holds on to the graph
        if self.balance_due:
            self._balance(terms, regular.sum() / images.shape[0], preds)
        terms = {name: value * self.balance_factors.get(name, 1.0) for name, value in terms.items()}
        if not self._checked:
            self._check_first_step(terms, preds)
        values = [*(terms[name] for name in self.projector.terms), *([pseudo] if self.pseudo else [])]
        # Means over all images, multiplied by the labelled ones alone: so distillation keeps its ratio to the labelled
        # loss however many unlabeled images there are.
        scaled = torch.stack([value.reshape(()) * self.factor for value in values])
        items = {**items, **dict(zip(self.term_names, scaled.detach(), strict=True))}
        return torch.cat([regular, scaled.to(regular.dtype) * images.shape[0]]), items

    def distill_terms(self, preds: Mapping[str, Any], batch: Mapping[str, Any], teacher: Taps) -> dict[str, Tensor]:
        """Return the method's named losses for training outputs of the student, in float32."""
        images = batch["img"]
        head = detect_head(self.student_model)
        teacher = _in_float32(teacher, self._known)
        student = student_taps(preds, head, self.strides)
        if "head" in self.reads:
            hold = self.projector.hold
            student = replace(student, head=head_taps(head, student.neck, self._held, hold, self.strides))
        student = _in_float32(student, None)
        for mine, theirs in zip(student.neck, teacher.neck, strict=True):
            if mine.shape[-2:] != theirs.shape[-2:]:
                raise DistillationError(
                    f"teacher and student see different canvases: feature maps {tuple(theirs.shape[-2:])} and "
                    f"{tuple(mine.shape[-2:])} for images {tuple(images.shape[-2:])}"
                )
        with torch.autocast(images.device.type, enabled=False):
            targets = self._assigned.at(self.strides, preds, self.student_model)
            return self.projector(student, teacher, {**batch, **targets})

    def _add_unlabeled(
        self, batch: Mapping[str, Any], everything: Tensor, preds: Any, teacher: Taps
    ) -> tuple[dict[str, Any], Tensor]:
        """Return the batch as the method sees it, and the weighted loss on pseudo labels.

        The assigner's targets of unlabeled images are background, apart from those with pseudo labels.
        """
        count = len(batch["img"])
        more = everything[count:]
        found: dict[str, Tensor] = {}
        value = everything.new_zeros((), dtype=torch.float32)
        targets = with_background(self._assigned.values, len(more))
        if self.pseudo is not None:
            taps = replace(teacher, scores=teacher.scores[count:], boxes=teacher.boxes[count:], class_mask=self._known)
            found = confident_boxes(taps, self._teacher_bins, self.pseudo.confidence, (more.shape[2], more.shape[3]))
            self._assigned.values = {}
            outputs = take_images(preds, slice(count, None))
            value = self.pseudo.weight * pseudo_loss(self.student_model, outputs, more, found)
            for name, own in self._assigned.values.items():
                targets[name][found["batch_idx"].long().unique() + count] = own
        self._assigned.values = targets
        return with_boxes(batch, found, everything), value

    def fuse(self, verbose: bool = True, imgsz: int | list[int] = 640) -> nn.Module:
        """Return the fused student; the wrapper is for training only."""
        return self.student_model.fuse(verbose=verbose, imgsz=imgsz)

    def _apply(self, fn: Any, recurse: bool = True) -> KDModel:
        super()._apply(fn, recurse)
        device = next(self.student_model.parameters()).device
        for teacher in self._teacher:
            teacher.to(device)  # device only: its precision is decided where it is prepared
        return self

    def _freeze_teacher(self) -> None:
        for teacher in self._teacher:
            teacher.eval().requires_grad_(False)

    def _remove_feature_hooks(self) -> None:
        """There are none; Ultralytics calls this before it unwraps the student."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave the teacher, and what only makes sense beside it, out of every copy and checkpoint."""
        return {**self.__dict__, "_teacher": (), "pseudo": None, "_assigned": None, "_held": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "_assigned": AssignedTargets()})

    @property
    def _known(self) -> Tensor | None:
        """Which of the student's classes the teacher knows, (K,); None means all."""
        return None if self.teacher_model is None else self.teacher_model.class_known

    def _balance(self, terms: Mapping[str, Tensor], task_loss: Tensor, preds: Mapping[str, Any]) -> None:
        """Measure the factors, or leave it to the next batch: one without objects may leave a term without gradient."""
        assert self.balance is not None
        neck = student_taps(preds, detect_head(self.student_model), self.strides).neck
        problem: DistillationError | None = None
        try:
            measured = [*balance_factors(terms, task_loss, neck, self.balance).values(), 1.0]
        except DistillationError as error:
            problem, measured = error, [0.0] * (len(terms) + 1)
        found = torch.tensor(measured)
        if dist.is_available() and dist.is_initialized():  # every rank measured its own batch
            found = found.to(task_loss.device)
            dist.all_reduce(found)
        if found[-1] == 0:
            self._balance_tries += 1
            if self._balance_tries >= BALANCE_TRIES:
                raise problem or DistillationError("balance: no rank could measure the gradients")
            return
        self.balance_factors = dict(zip(terms, (found[:-1] / found[-1]).tolist(), strict=True))
        self.balance_due = False
        listed = ", ".join(f"{name} x {value:.4g}" for name, value in self.balance_factors.items())
        LOGGER.info(f"KD: balanced to {self.balance:g} of the task loss's gradient on the neck: {listed}")
        if max(self.balance_factors.values()) > BALANCE_LARGE:
            LOGGER.warning(
                f"KD: a factor above {BALANCE_LARGE} means that teacher and student hardly differ there, or that the "
                "teacher is sure of nothing; what is amplified may be noise. kd.weight=1 leaves balancing out"
            )

    def _check_first_step(self, terms: Mapping[str, Tensor], preds: Mapping[str, Any]) -> None:
        self._checked = True
        head = detect_head(self.student_model)
        neck = student_taps(preds, head, self.strides).neck
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        check_first_step(terms, self.projector.args.weight, [*neck, *trained])


def _in_float32(taps: Taps, class_mask: Tensor | None) -> Taps:
    head, one2one = taps.head, taps.scores_one2one
    return replace(
        taps,
        neck=tuple(x.float() for x in taps.neck),
        scores=taps.scores.float(),
        boxes=taps.boxes.float(),
        scores_one2one=None if one2one is None else one2one.float(),
        class_mask=class_mask,
        head=head and replace(head, cls=tuple(x.float() for x in head.cls), box=tuple(x.float() for x in head.box)),
    )
