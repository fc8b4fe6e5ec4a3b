"""The wrapped classifier: a trainable student beside a frozen teacher, with one method between them.

``KDClassifier`` is a ``DistillationModel`` so that Ultralytics' freezing, EMA, stripping, export and multi-GPU code
treat it as its own. It replaces what that class does inside. The teacher is not a registered submodule: it is in no
checkpoint, no optimizer, no EMA and no gradient bucket.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.modules import Classify
from ultralytics.nn.tasks import ClassificationModel
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import copy_attr

from kd_yolo.classify.checkpoints import load_classifier
from kd_yolo.classify.methods import ClassifyMethod, ClassTaps, Tap, build_method, load_method, parse_args
from kd_yolo.config import Recipe
from kd_yolo.distill.first_step import check_first_step
from kd_yolo.distill.teacher import fold_batchnorm
from kd_yolo.errors import DistillationError, TeacherError
from kd_yolo.files import sha256
from kd_yolo.nn.blocks import RepBlock
from kd_yolo.nn.merging import merge


class KDClassifier(DistillationModel):
    """Teacher, student and method as one trainable module.

    Attributes:
        student_model: The trainable classifier; the only part that is kept.
        projector: The distillation method with its adapters (the attribute name is the one Ultralytics restores).
        factor: Schedule factor in 0..1 for the moment under way.
        term_names: Names of the method's losses, as the progress line and ``results.csv`` show them.
    """

    def __init__(self, teacher: ClassificationModel, student: ClassificationModel, method: ClassifyMethod) -> None:
        """Wrap prepared models.

        Args:
            teacher: Frozen teacher with the student's classes.
            student: Classifier to train.
            method: Built for these two.
        """
        nn.Module.__init__(self)  # not the parent's: its hooks, projector and dummy forward are what this class avoids
        device = next(student.parameters()).device
        self.student_model: ClassificationModel = student  # first: some copied names are properties that write to it
        copy_attr(self, student)
        self.projector: ClassifyMethod = method.to(device)
        self._teacher: tuple[ClassificationModel, ...] = (teacher.eval().to(device),)  # a tuple hides it from nn.Module
        self.term_names = method.terms
        self.factor = 1.0
        self.feats_idx: list[int] = []
        self.teacher_feats_idx: list[int] = []
        self._checked = False

    @property
    def teacher_model(self) -> ClassificationModel | None:
        """The frozen teacher, or None in copies (EMA, checkpoints)."""
        return self._teacher[0] if self._teacher else None

    @teacher_model.setter
    def teacher_model(self, value: ClassificationModel | None) -> None:
        self._teacher = () if value is None else (value,)

    def loss(self, batch: Mapping[str, Any], preds: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the cross entropy and, in training, the named distillation losses.

        Args:
            batch: ``img`` (B, 3, H, W) and ``cls`` (B,).
            preds: The student's predictions in validation; None in training.

        Returns:
            The loss, a scalar mean over the batch, and all its parts by name; ``loss`` is the cross entropy.

        Raises:
            DistillationError: The first step's self-check failed.
        """
        if not self.training or not self._teacher or (self.factor == 0 and self._checked):
            preds = self.student_model(batch["img"]) if preds is None else preds
            regular, items = self.student_model.loss(batch, preds)
            return regular, {**items, **{name: torch.zeros_like(regular.detach()) for name in self.term_names}}
        images, tap = batch["img"], self.projector.tap
        with torch.no_grad():  # before the student, so that the teacher's activations are gone when the student's peak
            theirs = tapped(self._teacher[0], images, tap)
        mine = tapped(self.student_model, images, tap)
        regular, items = self.student_model.loss(batch, mine.logits)
        with torch.autocast(images.device.type, enabled=False):
            found = self.projector(mine, theirs, batch["cls"])
        if not self._checked:
            self._checked = True
            head = [p for p in self.student_model.model[-1].parameters() if p.requires_grad]
            check_first_step(found.terms, self.projector.args.weight, [mine.feature, *head])
        scaled = {name: found.terms[name] * self.factor for name in self.term_names}
        task = regular if found.task_factor is None else regular * found.task_factor
        total = task + torch.stack([value.reshape(()) for value in scaled.values()]).sum().to(regular.dtype)
        return total, {**items, **{name: value.detach() for name, value in scaled.items()}}

    def fuse(self, verbose: bool = True, imgsz: int | list[int] = 224) -> nn.Module:
        """Return the fused student; the wrapper is for training only."""
        return self.student_model.fuse(verbose=verbose, imgsz=imgsz)

    def _apply(self, fn: Any, recurse: bool = True) -> KDClassifier:
        super()._apply(fn, recurse)
        for teacher in self._teacher:
            teacher.to(next(self.student_model.parameters()).device)
        return self

    def _freeze_teacher(self) -> None:
        for teacher in self._teacher:
            teacher.eval().requires_grad_(False)

    def _remove_feature_hooks(self) -> None:
        """There are none; Ultralytics calls this before it unwraps the student."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave the teacher out of every copy and checkpoint."""
        return {**self.__dict__, "_teacher": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def tapped(model: ClassificationModel, images: Tensor, tap: Tap) -> ClassTaps:
    """Run a classifier and return its logits with the map that enters its head, or the head's own last map.

    Args:
        model: In train mode, or in eval mode, where the head returns ``(softmax, logits)``.
        images: (B, 3, H, W).
        tap: ``head`` or ``backbone``.
    """
    with _held(classify_head(model), tap) as held:
        output = model(images)
    logits = output[1] if isinstance(output, (tuple, list)) else output
    return ClassTaps(held[0], logits)


def tap_channels(model: ClassificationModel, tap: Tap) -> int:
    """Return the channels of the map that ``tapped`` gives."""
    conv = classify_head(model).conv.conv
    return int(conv.out_channels if tap == "head" else conv.in_channels)


def classify_head(model: ClassificationModel) -> Any:
    """Return the Classify head of a classifier.

    Raises:
        TeacherError: Its last layer is another one.
    """
    head = model.model[-1]
    if not isinstance(head, Classify):
        raise TeacherError(f"a classifier with a Classify head is needed; this one ends in {type(head).__name__}")
    return head


def wrap_classifier(
    student: ClassificationModel, recipe: Recipe, names: Mapping[int, str], seed: int = 0
) -> KDClassifier:
    """Put a student beside its recipe's teacher.

    The global random streams are left as they were, so that a recipe whose weights are all zero repeats plain training.

    Raises:
        CheckpointError: The teacher's file is missing, truncated, foreign or of another task.
        TeacherError: It changed since the run began, or has other classes than the data, or in another order.
    """
    ((path, digest),) = recipe.teachers
    if sha256(Path(path)) != digest:
        raise TeacherError(f"{path}: the teacher's file changed since this run began; put it back, or start a new run")
    with torch.random.fork_rng(devices=[]):
        teacher, _ = load_classifier(path, trust=recipe.trust)
        check_same_order(teacher.names, names, path)
        tap = _tap_of(recipe)
        teacher = prepare_teacher(teacher)
        method = build_method(
            recipe.method, recipe.args, tap_channels(student, tap), tap_channels(teacher, tap), len(names), seed=seed
        )
        wrapped = KDClassifier(teacher, student, method)
    LOGGER.info(f"KD: method {recipe.method}; teacher {path}; {len(names)} classes in one order")
    return wrapped


def check_same_order(teacher: Mapping[int, str], names: Mapping[int, str], path: str | Path) -> None:
    """Refuse a teacher whose classes are not the data's, in the data's order.

    Raises:
        TeacherError: As said; the message names the first difference.
    """
    theirs, mine = ([str(known[key]) for key in sorted(known)] for known in (teacher, names))
    if theirs == mine:
        return
    if sorted(theirs) == sorted(mine):
        at = next(i for i, (a, b) in enumerate(zip(theirs, mine, strict=True)) if a != b)
        what = f"has the data's classes in another order (class {at}: {theirs[at]}, the data's {mine[at]})"
    else:
        other = sorted(set(mine) ^ set(theirs))[0]
        where = "is not among the teacher's" if other in mine else "is not among the data's"
        what = f"has {len(theirs)} classes, the data {len(mine)}; '{other}' {where}"
    raise TeacherError(f"{path}: {what}; train the teacher on this data")


def prepare_teacher(model: ClassificationModel) -> ClassificationModel:
    """Return a frozen copy with branches merged and every BatchNorm folded, which eval mode allows exactly."""
    has_blocks = any(isinstance(module, RepBlock) for module in model.modules())
    teacher = merge(model, check=False)[0] if has_blocks else deepcopy(model)
    teacher.eval()
    teacher.criterion = None
    return fold_batchnorm(teacher).to(memory_format=torch.channels_last).requires_grad_(False)


def _tap_of(recipe: Recipe) -> Tap:
    return getattr(parse_args(recipe.method, recipe.args), "tap", load_method(recipe.method).tap)


@contextlib.contextmanager
def _held(head: Any, tap: Tap) -> Iterator[list[Tensor]]:
    """Yield a list that gets the tapped map of the next forward pass.

    Raises:
        DistillationError: The head was not run.
    """
    held: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        held.append(output if tap == "head" else inputs[0])

    handle = head.conv.register_forward_hook(note)
    try:
        yield held
    finally:
        handle.remove()
    if len(held) != 1:
        raise DistillationError(f"the classifier's head ran {len(held)} times in one forward pass instead of once")
