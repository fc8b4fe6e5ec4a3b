"""What a distillation method is: named losses from what was tapped of a teacher and a student.

Shape letters, used in every method file: B images, K classes, L levels (P3, P4, P5, ...), C_l channels of level l,
H_l x W_l cells of level l, A = sum of H_l * W_l anchors, R = ``reg_max`` bins per box side.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from kd_yolo.errors import ConfigError, TeacherError, nearest
from kd_yolo.nn.precision import at_least_float32 as at_least_float32


class MethodArgs(BaseModel):
    """Arguments of a method: strict, frozen, unknown keys and non-finite numbers refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    weight: float = Field(default=1.0, ge=0.0, description="factor on the whole method")


@dataclass(frozen=True)
class LevelSpec:
    """One feature level of a detector.

    Attributes:
        channels: Channels C_l of the neck map that enters the head.
        stride: Input pixels per cell.
        cls_channels: Channels of the head's class branch before block 1 (= ``channels``) and after each block; empty
            for a detector without such a branch.
        box_channels: The same of its box branch.
    """

    channels: int
    stride: int
    cls_channels: tuple[int, ...] = ()
    box_channels: tuple[int, ...] = ()


@dataclass(frozen=True)
class DetectorSpec:
    """What a method may know about a detector before the first batch.

    Attributes:
        levels: The matched feature levels, finest first.
        num_classes: K, after the class map was applied (the student's classes).
        reg_max: R, bins per box side; 1 means that the head regresses distances directly.
    """

    levels: tuple[LevelSpec, ...]
    num_classes: int
    reg_max: int


@dataclass(frozen=True)
class HeadTaps:
    """The inside of one detector's one-to-many head, for methods that cross from one head into another.

    Attributes:
        cls: Output of block k of the class branch before its activation, L maps of (B, C, H_l, W_l); k = 0: neck maps.
        box: The same of the box branch.
        activate: The activation after block k; the identity for k = 0.
        cls_tail: What follows: maps of activated holds, (B, C, H_l, W_l), to class logits, (B, K, H_l, W_l); L of them.
        box_tail: The same for boxes, (B, 4 R, H_l, W_l).
    """

    cls: tuple[Tensor, ...]
    box: tuple[Tensor, ...]
    activate: Callable[[Tensor], Tensor]
    cls_tail: tuple[Callable[[Tensor], Tensor], ...]
    box_tail: tuple[Callable[[Tensor], Tensor], ...]


@dataclass(frozen=True)
class Taps:
    """What was read from one detector in one forward pass, levels already matched by stride.

    Attributes:
        neck: L maps of shape (B, C_l, H_l, W_l).
        scores: Raw class logits, (B, K, A), of the one-to-many head; the teacher's are mapped to the student's classes.
        scores_one2one: Raw class logits of the one-to-one head, (B, K, A), or None.
        boxes: Raw box outputs, (B, 4 R, A), in units of the level's stride.
        strides: Stride of every anchor in pixels, (A,).
        anchors: Anchor centres in units of the stride, (A, 2), x before y.
        class_mask: (K,) booleans, True where the teacher knows the student's class; None means all.
        head: The inside of the head, when the method reads it and the detector has one.
    """

    neck: tuple[Tensor, ...]
    scores: Tensor
    boxes: Tensor
    strides: Tensor
    anchors: Tensor
    scores_one2one: Tensor | None = None
    class_mask: Tensor | None = None
    head: HeadTaps | None = None


class DistillMethod(nn.Module, ABC):
    """One distillation loss. It owns its adapters; it owns no model, no hook and no trainer."""

    Args: ClassVar[type[MethodArgs]]
    # Whether loss and gradient vanish when the student's taps equal the teacher's.
    zero_at_equality: ClassVar[bool] = True
    # Arguments under which no detached factor depends on the student: there a numeric gradient equals the analytic one.
    gradcheck_args: ClassVar[Mapping[str, Any]] = {}
    # Whether the loss uses statistics over the whole batch, so that repeating every image may change it.
    batch_statistics: ClassVar[bool] = False
    # Whether the loss compares box bins: both detectors then need one ``reg_max`` above 1; __init__ refuses others.
    needs_bins: ClassVar[bool] = False
    # Whether the loss compares the cells of one map, so that it is 0 for maps of a single cell.
    needs_cells: ClassVar[bool] = False

    # Set by a subclass's __init__ when it differs: the names that forward() returns, always all of them ...
    terms: tuple[str, ...]
    # ... and what it reads of the TEACHER; the rest of the teacher's head is then not computed at all and arrives as
    # an empty tensor. Of "neck", "scores", "boxes", "scores_one2one", "head". With "head" both detectors' are tapped.
    reads: frozenset[str] = frozenset({"neck", "scores", "boxes"})
    # The block k after which the heads are tapped, when "head" is read.
    hold: int = 1

    def __init__(self, args: MethodArgs, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Store the arguments; a subclass builds its adapters and refuses what it cannot work with."""
        super().__init__()
        self.args = args
        self.student_spec = student
        self.teacher_spec = teacher

    @abstractmethod
    def forward(self, student: Taps, teacher: Taps, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return named scalar losses, each a mean over the batch, in float32, already weighted.

        Args:
            student: Taps that carry gradients.
            teacher: Taps without gradients.
            batch: The training batch. Ground truth: ``bboxes`` (N, 4), centre x, centre y, width, height in 0..1 of the
                canvas; ``cls`` (N, 1); ``batch_idx`` (N,), the image of each box. From the student's assigner, when it
                ran: ``fg_mask`` (B, A) booleans, ``target_labels`` (B, A) class numbers, ``target_scores`` (B, A, K)
                alignment weights. Any of them may be missing: a method must then still give a finite loss.
        """


def list_methods() -> list[str]:
    """Return the names of the built-in methods without importing them."""
    package = importlib.import_module("kd_yolo.distill.methods")
    names = [module.name.replace("_", "-") for module in pkgutil.iter_modules(package.__path__)]
    return sorted(name for name in names if not name.startswith("-"))


def load_method(name: str) -> type[DistillMethod]:
    """Import the one method that a module defines.

    Args:
        name: A built-in name such as ``kd-lightnet``, a dotted module path of a third party, or a combination of such
            names, ``cwd+bckd``.

    Raises:
        ConfigError: There is no such module, or it does not define exactly one method.
    """
    if "+" in name:
        from kd_yolo.distill.combine import Combination, member_names

        member_names(name)
        return Combination
    path = name if "." in name else f"kd_yolo.distill.methods.{name.replace('-', '_')}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is not None and not path.startswith(error.name):
            raise  # the method's own import failed: that is its author's error, not a wrong name
        known = [*list_methods(), "none"]
        raise ConfigError(f"method '{name}' is unknown; known: {', '.join(known)}{nearest(name, known)}") from error
    found = [
        item
        for _, item in inspect.getmembers(module, inspect.isclass)
        if issubclass(item, DistillMethod) and item.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise ConfigError(f"method '{name}': {path} must define exactly one DistillMethod, found {len(found)}")
    return found[0]


def parse_args(name: str, args: Mapping[str, Any]) -> MethodArgs:
    """Validate a method's arguments.

    Raises:
        ConfigError: An unknown or ill-typed argument; the message names it and the nearest known one.
    """
    if "+" in name:
        from kd_yolo.distill.combine import parse_combination

        return parse_combination(name, args)
    return validate_args(name, load_method(name).Args, args)


def validate_args(name: str, schema: type[MethodArgs], args: Mapping[str, Any]) -> MethodArgs:
    """Validate the arguments of a method against its schema.

    Args:
        name: What messages call the method.
        schema: Its arguments.
        args: What was given.

    Raises:
        ConfigError: An unknown or ill-typed argument; the message names it and the nearest known one.
    """
    try:
        return schema.model_validate(dict(args))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "arguments"
        if first["type"] == "extra_forbidden":
            raise ConfigError(
                f"method '{name}' has no argument '{key}'{nearest(key, schema.model_fields)} "
                f"(known: {', '.join(schema.model_fields)})"
            ) from error
        raise ConfigError(f"method '{name}': {key}={first.get('input')!r}: {first['msg']}") from error


def build_method(
    name: str, args: Mapping[str, Any], student: DetectorSpec, teacher: DetectorSpec, seed: int = 0
) -> DistillMethod:
    """Build a method with adapters drawn from its own random stream.

    The global random state is left as it was, so that a run with all weights at zero repeats the plain run exactly.

    Raises:
        ConfigError: Unequal numbers of levels, wrong arguments, or detectors that the method cannot work with.
    """
    if len(student.levels) != len(teacher.levels):
        raise ConfigError(f"method '{name}': {len(student.levels)} student and {len(teacher.levels)} teacher levels")
    if "+" in name:
        from kd_yolo.distill.combine import build_combination

        return build_combination(name, args, student, teacher, seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
        return load_method(name)(parse_args(name, args), student, teacher)


def check_same_anchors(student: Tensor, teacher: Tensor) -> None:
    """Refuse class logits (B, K, A) of two detectors that do not belong together.

    Raises:
        TeacherError: Images, classes or anchors differ in number.
    """
    if student.shape != teacher.shape:
        raise TeacherError(
            f"class logits (images, classes, anchors) differ: student {tuple(student.shape)}, teacher "
            f"{tuple(teacher.shape)}; both need one canvas, one class list and the same levels"
        )


def level_sizes(neck: Sequence[Tensor]) -> list[int]:
    """Return the number of anchors of each level, H_l * W_l."""
    return [int(feature.shape[-2] * feature.shape[-1]) for feature in neck]
