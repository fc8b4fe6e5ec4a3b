"""From files to one ready teacher: the only place that tells the kinds of teachers apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.nn.modules.head import RTDETRDecoder
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER

from kd_yolo.checkpoints import PLAIN_HEADS, model_in, read_checkpoint
from kd_yolo.config import Recipe
from kd_yolo.distill.teacher import ClassMap, map_classes, prepare_teacher
from kd_yolo.distill.teachers.base import Teacher
from kd_yolo.distill.teachers.cache import cached
from kd_yolo.distill.teachers.choice import best_teachers
from kd_yolo.distill.teachers.dense import known_classes
from kd_yolo.distill.teachers.detect import DetectTeacher
from kd_yolo.distill.teachers.mirrored import MirroredTeacher
from kd_yolo.distill.teachers.onnx_file import OnnxTeacher, check_dense
from kd_yolo.distill.teachers.rtdetr import RTDETRTeacher
from kd_yolo.distill.teachers.several import SeveralTeachers
from kd_yolo.distill.teachers.torchvision_adapter import TorchvisionTeacher
from kd_yolo.errors import TeacherError, nearest
from kd_yolo.files import sha256
from kd_yolo.runtimes import describe

TORCHVISION_MODELS = ("fcos_resnet50_fpn", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2")
TORCHVISION_KEYS: dict[str, type | tuple[type, ...]] = {
    "torchvision": str,
    "num_classes": int,
    "names": (dict, list),
    "state_dict": dict,
}


@dataclass(frozen=True)
class TeacherFile:
    """A teacher's file, read and understood.

    Attributes:
        path: Absolute path.
        names: Its class names by number.
        trained_at: Canvas it was trained at in pixels, or None when the file does not say.
        canvas: The only canvas it takes, height and width in pixels; None means any.
        make: Returns the ready teacher, once, for a class map.
    """

    path: Path
    names: dict[int, str]
    trained_at: int | None
    canvas: tuple[int, int] | None
    make: Callable[[ClassMap], Teacher]


def open_teacher(path: Path, trust: bool = False) -> TeacherFile:
    """Read a teacher's file: a detector or RT-DETR checkpoint, a torchvision detector, or an ONNX file.

    Raises:
        CheckpointError: A ``.pt`` file that is missing, truncated, foreign or of another task.
        ModelError: An ONNX file that is missing, damaged or no detector.
        TeacherError: A file that cannot teach as it is.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() == ".onnx":
        return _onnx_file(path.absolute())
    file, checkpoint = read_checkpoint(path, trust)
    if "torchvision" in checkpoint:
        return _torchvision_file(file, checkpoint)
    model = model_in(file, checkpoint, (*PLAIN_HEADS, RTDETRDecoder))
    trained_at = (checkpoint.get("train_args") or {}).get("imgsz")
    canvas = trained_at if isinstance(trained_at, int) else None
    make = _make_rtdetr if isinstance(model.model[-1], RTDETRDecoder) else _make_detect
    return TeacherFile(file, model.names, canvas, None, lambda class_map: make(model, class_map))


def build_teacher(recipe: Recipe, names: Mapping[int, str], student: DetectionModel) -> Teacher:
    """Return the teacher that a recipe describes: one or several files, merged, mirrored, with a cache before them.

    Args:
        recipe: What to distil from.
        names: The data set's class names.
        student: The detector to train. Its ``args``, which the trainer attaches, tell data, canvas and recipe file:
            ``teacher_merge=per_class`` needs them.

    Raises:
        CheckpointError: A file is missing, truncated, foreign or of another task.
        TeacherError: A file changed since the run began, or shares no class or level with the others.
    """
    members = _members(recipe, names)
    teacher = members[0] if len(members) == 1 else _merged(members, recipe, names, student)
    if recipe.teacher_views > 1:
        teacher = MirroredTeacher(teacher, recipe.teacher_views)
    return cached(teacher, recipe, names) if recipe.cache_teacher else teacher


def prepare_merge(recipe: Recipe, recipe_file: Path, names: Mapping[int, str], data: Path, imgsz: int) -> None:
    """Measure what ``teacher_merge=per_class`` chooses by, in the process that starts a run; otherwise do nothing.

    The processes of a multi-GPU run cannot validate on their own; they read what this leaves beside the recipe.

    Args:
        recipe: What to distil from.
        recipe_file: Where it lies.
        names: The data set's class names.
        data: Ready data YAML.
        imgsz: Canvas, pixels.

    Raises:
        KDYoloError: As ``build_teacher``.
    """
    if recipe.teacher_merge == "per_class" and len(recipe.teachers) > 1:
        arguments = {"data": str(data), "imgsz": imgsz, "distill_model": str(recipe_file)}
        best_teachers(_members(recipe, names), recipe, names, arguments)


def _members(recipe: Recipe, names: Mapping[int, str]) -> list[Teacher]:
    members = []
    for path, expected in recipe.teachers:
        found = open_teacher(Path(path), recipe.trust)
        if sha256(found.path) != expected:
            raise TeacherError(f"{path}: changed since this run began; restore it or start a new run")
        class_map = map_classes(names, found.names)
        members.append(found.make(class_map))
        LOGGER.info(f"KD: teacher {path}, {members[-1].title}; {class_map.describe()}")
    return members


def _merged(members: list[Teacher], recipe: Recipe, names: Mapping[int, str], student: DetectionModel) -> Teacher:
    choice: Sequence[int] | None = None
    if recipe.teacher_merge == "per_class":
        arguments = getattr(student, "args", None) or {}
        arguments = arguments if isinstance(arguments, Mapping) else vars(arguments)
        choice = best_teachers(members, recipe, names, arguments)
    return SeveralTeachers(members, len(names), choice)


def _make_detect(model: DetectionModel, class_map: ClassMap) -> Teacher:
    return DetectTeacher(prepare_teacher(model, class_map), known_classes(class_map))


def _make_rtdetr(model: DetectionModel, class_map: ClassMap) -> Teacher:
    return RTDETRTeacher(model, class_map)


def _onnx_file(path: Path) -> TeacherFile:
    description = describe(path)
    check_dense(path, description)
    canvas = None if description.dynamic else description.canvas
    return TeacherFile(
        path, description.names, None, canvas, lambda class_map: OnnxTeacher(path, description, class_map)
    )


def _torchvision_file(file: Path, content: dict[str, Any]) -> TeacherFile:
    """Build a torchvision detector from plain values.

    Raises:
        TeacherError: A key is missing or ill-typed, the model is unknown, or the weights do not fit it.
    """
    for key, kind in TORCHVISION_KEYS.items():
        if not isinstance(content.get(key), kind):
            known = ", ".join(TORCHVISION_KEYS)
            raise TeacherError(f"{file}: a torchvision teacher holds {known}; '{key}' is missing or of another type")
    name, names = content["torchvision"], content["names"]
    if name not in TORCHVISION_MODELS:
        hint = nearest(name, TORCHVISION_MODELS)
        raise TeacherError(
            f"{file}: torchvision model '{name}' is not known here{hint} ({', '.join(TORCHVISION_MODELS)})"
        )
    names = dict(enumerate(names)) if isinstance(names, list) else {int(k): str(v) for k, v in names.items()}
    if any(not 0 <= number < content["num_classes"] for number in names):
        raise TeacherError(f"{file}: names classes outside 0 to {content['num_classes'] - 1}; correct its names")
    from torchvision.models import detection  # here: it takes seconds to load

    build: Callable[..., nn.Module] = getattr(detection, name)
    model = build(weights=None, weights_backbone=None, num_classes=content["num_classes"])
    try:
        model.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        raise TeacherError(f"{file}: its weights do not fit {name} with {content['num_classes']} classes") from error
    if not all(bool(torch.isfinite(value).all()) for value in model.state_dict().values()):
        raise TeacherError(f"{file}: has weights that are not finite; take another checkpoint")
    trained_at = content.get("imgsz")
    return TeacherFile(
        file,
        names,
        trained_at if isinstance(trained_at, int) else None,
        None,
        lambda class_map: TorchvisionTeacher(model, class_map),
    )
