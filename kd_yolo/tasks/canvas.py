"""Which canvases fit: the student's, and a teacher's that sees more pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kd_yolo.config import TrainConfig
from kd_yolo.distill.teachers.base import Teacher
from kd_yolo.distill.teachers.build import TeacherFile
from kd_yolo.distill.teachers.mirrored import MirroredTeacher
from kd_yolo.distill.teachers.scaled import ScaledTeacher
from kd_yolo.errors import ConfigError, TeacherError


def check_canvas(imgsz: Any, stride: int, key: str = "imgsz") -> None:
    """Refuse a canvas that the network would silently change.

    Args:
        imgsz: Side in pixels, as given.
        stride: The network's largest, pixels.
        key: Where it was given, for the message.

    Raises:
        ConfigError: Not a positive whole number, or not a multiple of the stride.
    """
    if isinstance(imgsz, bool) or not isinstance(imgsz, int) or imgsz <= 0:
        raise ConfigError(f"{key}={imgsz}: a positive whole number of pixels is needed, for example {key}=224")
    if imgsz % stride:
        lower = max(imgsz // stride, 1) * stride
        raise ConfigError(
            f"{key}={imgsz} is not a multiple of the model's largest stride {stride}; use {lower} or {lower + stride}"
        )


def check_teacher_canvas(config: TrainConfig, stock: Mapping[str, Any], imgsz: int) -> None:
    """Refuse a canvas or views of the teacher that would have no effect, or that another key does not go with.

    Raises:
        ConfigError: As said.
    """
    wanted = config.teacher_imgsz
    if config.teacher_views > 1 and (config.method == "none" or config.teacher == "none"):
        raise ConfigError(f"teacher_views={config.teacher_views} has no effect without a teacher; drop it")
    if wanted is None:
        return
    if config.method == "none" or config.teacher == "none":
        raise ConfigError(f"teacher_imgsz={wanted} has no effect without a teacher; drop it")
    if wanted < imgsz:
        raise ConfigError(f"teacher_imgsz={wanted} is smaller than the student's canvas {imgsz}; drop it")
    if wanted == imgsz:
        return
    for key, value in (
        ("unlabeled=", config.unlabeled),
        ("chain=", config.chain),
        ("multi_scale=", stock.get("multi_scale")),
        ("generations=", config.generations > 1),  # from the second on the teacher is a student of the small canvas
        ("teacher_merge=per_class and several teachers", config.teacher_merge == "per_class" and "," in config.teacher),
    ):
        if value:
            raise ConfigError(f"teacher_imgsz= and {key} do not go together; drop one of them")
    if float(stock.get("batch", 16)) < 1:
        raise ConfigError(
            f"batch={stock['batch']}: not with teacher_imgsz=; give a number of images, for example batch=16"
        )


def on_canvas(config: TrainConfig, teacher: Teacher, imgsz: int) -> Teacher:
    """Return a teacher as the student will see it.

    Args:
        config: The run's configuration.
        teacher: A ready teacher.
        imgsz: The student's canvas, pixels.

    Raises:
        ConfigError: The teacher's canvas is no multiple of its largest stride.
    """
    if config.teacher_views > 1:
        teacher = MirroredTeacher(teacher, config.teacher_views)
    canvas = config.teacher_imgsz
    if canvas is None or canvas == imgsz:
        return teacher
    check_canvas(canvas, max(teacher.strides), "teacher_imgsz")
    return ScaledTeacher(teacher, canvas, imgsz, config.teacher_levels)


def check_file_canvas(config: TrainConfig, found: TeacherFile, imgsz: int) -> None:
    """Refuse a teacher that takes another canvas, or was trained on another and is not allowed to.

    Args:
        config: The run's configuration.
        found: The teacher's file.
        imgsz: The student's canvas, pixels.

    Raises:
        TeacherError: As said.
    """
    canvas = config.teacher_imgsz or imgsz
    key = "imgsz" if config.teacher_imgsz is None else "teacher_imgsz"
    fixed, trained_at = found.canvas, found.trained_at
    if fixed is not None and fixed != (canvas, canvas):
        height, width = fixed
        hint = f"set {_ways(height, imgsz)}, or " if height == width else ""
        raise TeacherError(
            f"{found.path}: its canvas is fixed at {height}x{width}, this run has {key}={canvas}; {hint}export it "
            "again with dynamic=true"
        )
    if trained_at is not None and trained_at != canvas and not config.allow_other_canvas:
        raise TeacherError(
            f"{found.path}: trained at imgsz={trained_at}, this run has {key}={canvas}; set "
            f"{_ways(trained_at, imgsz)}, train a teacher at {canvas}, or pass allow_other_canvas=true"
        )


def _ways(canvas: int, imgsz: int) -> str:
    """Return the keys that bring a run to a teacher's canvas; a teacher's own is never smaller than the student's."""
    return f"teacher_imgsz={canvas} or imgsz={canvas}" if canvas > imgsz else f"imgsz={canvas}"
