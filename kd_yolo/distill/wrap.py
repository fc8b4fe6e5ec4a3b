"""From a recipe to a wrapped model: build the teacher, match it to the student, build the method, log the match."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER

from kd_yolo.config import Recipe
from kd_yolo.distill.base import build_method
from kd_yolo.distill.model import KDModel
from kd_yolo.distill.taps import common_strides, describe, head_strides
from kd_yolo.distill.teachers.build import build_teacher
from kd_yolo.distill.teachers.scaled import ScaledTeacher


def wrap_student(
    student: DetectionModel, recipe: Recipe, names: Mapping[int, str], seed: int = 0, imgsz: int | None = None
) -> KDModel:
    """Put a student beside its recipe's teacher or teachers.

    The global random streams are left as they were, so that a recipe whose weights are all zero repeats plain training.

    Args:
        student: The detector to train, on its device.
        recipe: What to distil and how.
        names: The data set's class names.
        seed: Seed of the method's adapters.
        imgsz: The student's canvas in pixels; needed when the teacher has another.

    Raises:
        CheckpointError: The teacher file is missing, truncated, foreign or of another task.
        TeacherError: It changed since the run began, shares no class or no level with the student, or lacks what the
            method reads.
    """
    with torch.random.fork_rng(devices=[]):
        teacher = build_teacher(recipe, names, student)
        if recipe.teacher_imgsz is not None and imgsz is not None:
            teacher = ScaledTeacher(teacher, recipe.teacher_imgsz, imgsz, recipe.teacher_levels)
        strides = common_strides(head_strides(student), teacher.strides)
        method = build_method(
            recipe.method, recipe.args, describe(student, strides), teacher.describe(strides), seed=seed
        )
        teacher.check_reads(recipe.method, method.reads)
        wrapped = KDModel(teacher, student, method, balance=recipe.balance)
    LOGGER.info(f"KD: method {recipe.method}; levels at strides {strides}")
    return wrapped
