"""From a recipe to a wrapped model: load the teacher, match it to the student, build the method, log the match."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER

from kd_yolo.config import Recipe
from kd_yolo.distill.base import build_method
from kd_yolo.distill.model import KDModel
from kd_yolo.distill.taps import common_strides, describe, head_strides
from kd_yolo.distill.teacher import load_teacher, map_classes, prepare_teacher
from kd_yolo.distill.teachers.detect import DetectTeacher
from kd_yolo.errors import TeacherError
from kd_yolo.files import sha256


def wrap_student(student: DetectionModel, recipe: Recipe, names: Mapping[int, str], seed: int = 0) -> KDModel:
    """Put a student beside its recipe's teacher.

    The global random streams are left as they were, so that a recipe whose weights are all zero repeats plain training.

    Args:
        student: The detector to train, on its device.
        recipe: What to distil and how.
        names: The data set's class names.
        seed: Seed of the method's adapters.

    Raises:
        CheckpointError: The teacher file is missing, truncated, foreign or of another task.
        TeacherError: It changed since the run began, shares no class or no level with the student.
    """
    path, expected = Path(recipe.teachers[0][0]), recipe.teachers[0][1]
    with torch.random.fork_rng(devices=[]):
        model, _ = load_teacher(path, trust=recipe.trust)
        if sha256(path) != expected:
            raise TeacherError(f"{path}: changed since this run began; restore it or start a new run")
        class_map = map_classes(names, model.names)
        known = None if not class_map.missing else torch.tensor([i >= 0 for i in class_map.index])
        teacher = DetectTeacher(prepare_teacher(model, class_map), known)
        strides = common_strides(head_strides(student), teacher.strides)
        method = build_method(
            recipe.method, recipe.args, describe(student, strides), teacher.describe(strides), seed=seed
        )
        teacher.check_reads(recipe.method, method.reads)
        wrapped = KDModel(teacher, student, method, balance=recipe.balance)
    LOGGER.info(f"KD: method {recipe.method}, teacher {path}; {class_map.describe()}; levels at strides {strides}")
    return wrapped
