"""The wrapped model: a trainable student beside a frozen teacher, with one method between them.

``KDModel`` is a ``DistillationModel`` so that Ultralytics' freezing, EMA, stripping, export and multi-GPU code treat it
as its own. It replaces what that class does inside: no hooks, no projector of its own, no dummy forward, and a teacher
that runs only up to what the method reads. The teacher is not a registered submodule: it is in no checkpoint, no
optimizer, no EMA and no gradient bucket.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import copy_attr

from kd_yolo.distill.balance import balance_factors
from kd_yolo.distill.base import DistillMethod, Taps
from kd_yolo.distill.taps import (
    common_strides,
    detect_head,
    head_strides,
    head_taps,
    held_in_head,
    select_anchors,
    student_taps,
)
from kd_yolo.distill.teachers.base import Teacher
from kd_yolo.errors import DistillationError


class KDModel(DistillationModel):
    """Teacher, student and method as one trainable module.

    Attributes:
        student_model: The trainable detector; the only part that is kept.
        projector: The distillation method with its adapters (the attribute name is the one Ultralytics restores).
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
        self.factor = 1.0
        self.balance = balance
        self.balance_factors: dict[str, float] = {}
        self.balance_due = False
        self._checked = False
        self._targets: dict[str, Tensor] = {}
        self._held: dict[nn.Module, Tensor] = {}
        self._watched: Any = None
        self.feats_idx = self.get_distill_layers(student)
        self.teacher_feats_idx: list[int] = []  # upstream's; a teacher here need not have layers

    @property
    def teacher_model(self) -> Teacher | None:
        """The frozen teacher, or None in copies (EMA, checkpoints)."""
        return self._teacher[0] if self._teacher else None

    @teacher_model.setter
    def teacher_model(self, value: Teacher | None) -> None:
        self._teacher = () if value is None else (value,)

    def loss(self, batch: Mapping[str, Any], preds: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the detection loss and, in training, the named distillation losses.

        Args:
            batch: A training batch, ``img`` (B, 3, H, W) in 0..1.
            preds: The student's predictions in validation; None in training.

        Returns:
            The loss vector (stock terms, then one per distillation term), multiplied by B as stock losses are, and all
            terms by name, not multiplied.

        Raises:
            DistillationError: The first step's self-check failed.
        """
        switched_off = self.factor == 0 and self._checked and not self.balance_due
        if not self.training or not self._teacher or switched_off:  # then the teacher need not run at all
            preds = self.student_model(batch["img"]) if preds is None else preds
            regular, items = self.student_model.loss(batch, preds)
            zero = torch.zeros(len(self.term_names), device=regular.device)
            return torch.cat([regular, zero]), {**items, **dict(zip(self.term_names, zero, strict=True))}

        images = batch["img"]
        self._watch_assigner()
        with torch.no_grad():  # before the student, so that the teacher's activations are gone when the student's peak
            teacher = self._teacher[0].taps(images, self.reads, self.strides, self.projector.hold)
        with held_in_head(detect_head(self.student_model), self.projector.hold if "head" in self.reads else 0) as held:
            preds = self.student_model(images)
        self._held = held
        regular, items = self.student_model.loss(batch, preds)
        terms = self.distill_terms(preds, batch, teacher)
        self._held = {}  # it holds on to the graph
        if self.balance_due:
            self._balance(terms, regular.sum() / images.shape[0], preds)
        terms = {name: value * self.balance_factors.get(name, 1.0) for name, value in terms.items()}
        if not self._checked:
            self._check_first_step(terms, preds)
        scaled = torch.stack([terms[name].reshape(()) * self.factor for name in self.projector.terms])
        items = {**items, **dict(zip(self.term_names, scaled.detach(), strict=True))}
        return torch.cat([regular, scaled.to(regular.dtype) * images.shape[0]]), items

    def distill_terms(self, preds: Mapping[str, Any], batch: Mapping[str, Any], teacher: Taps) -> dict[str, Tensor]:
        """Return the method's named losses for training outputs of the student, in float32."""
        images = batch["img"]
        head = detect_head(self.student_model)
        known = None if self.teacher_model is None else self.teacher_model.class_known
        teacher = self._float(teacher, known)
        student = student_taps(preds, head, self.strides)
        if "head" in self.reads:
            hold = self.projector.hold
            student = replace(student, head=head_taps(head, student.neck, self._held, hold, self.strides))
        student = self._float(student, None)
        for mine, theirs in zip(student.neck, teacher.neck, strict=True):
            if mine.shape[-2:] != theirs.shape[-2:]:
                raise DistillationError(
                    f"teacher and student see different canvases: feature maps {tuple(theirs.shape[-2:])} and "
                    f"{tuple(mine.shape[-2:])} for images {tuple(images.shape[-2:])}"
                )
        with torch.autocast(images.device.type, enabled=False):
            return self.projector(student, teacher, {**batch, **self._assigned(preds)})

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
        """Leave the teacher out of every copy and checkpoint."""
        state = self.__dict__.copy()
        state["_teacher"] = ()
        state["_targets"] = {}
        state["_held"] = {}
        state["_watched"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _float(self, taps: Taps, class_known: Tensor | None) -> Taps:
        head = taps.head
        if head is not None:
            head = replace(head, cls=tuple(x.float() for x in head.cls), box=tuple(x.float() for x in head.box))
        return Taps(
            head=head,
            neck=tuple(x.float() for x in taps.neck),
            scores=taps.scores.float(),
            boxes=taps.boxes.float(),
            strides=taps.strides,
            anchors=taps.anchors,
            scores_one2one=None if taps.scores_one2one is None else taps.scores_one2one.float(),
            class_mask=class_known,
        )

    def _watch_assigner(self) -> None:
        """Keep what the student's own loss assigns; assigning a second time would cost as much again."""
        if getattr(self.student_model, "criterion", None) is None:
            self.student_model.criterion = self.student_model.init_criterion()
        criterion = self.student_model.criterion
        if self._watched is criterion:
            return
        self._watched = criterion
        assigner = getattr(criterion, "one2many", criterion).assigner

        def keep_targets(module: nn.Module, inputs: Any, outputs: Any) -> None:
            labels, _, scores, foreground = (x.detach() for x in outputs[:4])
            self._targets = {
                "fg_mask": foreground.bool(),
                "target_labels": labels.long(),
                "target_scores": scores.float(),
            }

        assigner.register_forward_hook(keep_targets)

    def _assigned(self, preds: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the assigner's foreground, labels and scores at the matched strides, see ``DistillMethod.forward``."""
        feats, own = preds.get("one2many", preds)["feats"], head_strides(self.student_model)
        chosen = {}
        for name, values in self._targets.items():
            last = values.transpose(1, 2) if values.ndim == 3 else values
            kept = select_anchors(last, feats, own, self.strides)
            chosen[name] = kept.transpose(1, 2) if values.ndim == 3 else kept
        return chosen

    def _balance(self, terms: Mapping[str, Tensor], task_loss: Tensor, preds: Mapping[str, Any]) -> None:
        assert self.balance is not None
        neck = student_taps(preds, detect_head(self.student_model), self.strides).neck
        factors = torch.tensor(list(balance_factors(terms, task_loss, neck, self.balance).values()))
        if dist.is_available() and dist.is_initialized():  # every rank measured its own batch
            factors = factors.to(task_loss.device)
            dist.all_reduce(factors)
            factors /= dist.get_world_size()
        self.balance_factors = dict(zip(terms, factors.tolist(), strict=True))
        self.balance_due = False
        listed = ", ".join(f"{name} x {value:.4g}" for name, value in self.balance_factors.items())
        LOGGER.info(f"KD: balanced to {self.balance:g} of the task loss's gradient on the neck: {listed}")

    def _check_first_step(self, terms: Mapping[str, Tensor], preds: Mapping[str, Any]) -> None:
        self._checked = True
        listed = ", ".join(f"{name}={float(value.detach()):.4g}" for name, value in terms.items())
        for name, value in terms.items():
            if not bool(torch.isfinite(value)):
                raise DistillationError(f"distillation loss '{name}' is {float(value)} in the first step ({listed})")
        if self.projector.args.weight == 0:
            LOGGER.info("KD: all distillation weights are zero; this run is plain training")
            return
        total = torch.stack([value.reshape(()) for value in terms.values()]).sum()
        if float(total.detach()) <= 0:
            raise DistillationError(
                f"distillation loss is zero in the first step ({listed}): the teacher says nothing; check its classes"
            )
        neck = student_taps(preds, detect_head(self.student_model), self.strides).neck
        targets = [*neck, *(p for p in detect_head(self.student_model).parameters() if p.requires_grad)]
        grads = torch.autograd.grad(total, targets, retain_graph=True, allow_unused=True)
        norm = float(sum((g.detach().float() ** 2).sum() for g in grads if g is not None)) ** 0.5
        if not norm > 0:
            raise DistillationError(f"the distillation loss has no gradient on the student ({listed})")
        LOGGER.info(f"KD: first step checked: {listed}, gradient norm on neck and head {norm:.4g}")


class BatchProbe(nn.Module):
    """What AutoBatch measures: one whole training step's forward, teacher included.

    Ultralytics profiles a model with a bare image tensor, which would leave the teacher out and overfill the memory.
    """

    def __init__(self, model: KDModel, boxes_per_image: int) -> None:
        super().__init__()
        self.model = model
        self.yaml = model.yaml
        self.names = model.names
        self.boxes_per_image = max(boxes_per_image, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the loss vector of a made-up batch; (B, 3, H, W) in."""
        count = images.shape[0] * self.boxes_per_image
        index = torch.arange(images.shape[0], device=images.device, dtype=torch.float32)
        batch = {
            "img": images,
            "batch_idx": index.repeat_interleave(self.boxes_per_image),
            "cls": torch.zeros(count, 1, device=images.device),
            "bboxes": torch.full((count, 4), 0.5, device=images.device),
        }
        return self.model.loss(batch)[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchProbe:
        """Copy the student but share the teacher, which a plain copy of the model leaves out."""
        twin = BatchProbe(deepcopy(self.model, memo), self.boxes_per_image)
        twin.model._teacher = self.model._teacher
        twin.model.criterion = None
        return twin
