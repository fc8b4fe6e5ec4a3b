"""Refuse bad input before anything is trained, each with one line that says what to do."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER

from kd_yolo.checkpoints import load_model
from kd_yolo.config import MethodFile, TrainConfig, validate, whole_number
from kd_yolo.data.validate import validate_for_training
from kd_yolo.distill.base import build_method, load_method, parse_args
from kd_yolo.distill.combine import combined_file, gives_weight, is_combination, merged_args, nested_args
from kd_yolo.distill.schedule import Schedule
from kd_yolo.distill.taps import common_strides, describe, head_strides
from kd_yolo.distill.teacher import map_classes
from kd_yolo.distill.teachers.base import Teacher
from kd_yolo.distill.teachers.build import open_teacher
from kd_yolo.distill.teachers.cache import check_repeating_views
from kd_yolo.distill.teachers.detect import DetectTeacher
from kd_yolo.distill.teachers.several import SeveralTeachers
from kd_yolo.distill.teachers.validation import validate_detector, validate_teacher
from kd_yolo.errors import ConfigError, TeacherError
from kd_yolo.images import dataset_names
from kd_yolo.nn.student import StudentSpec, student_spec
from kd_yolo.resources import find, load_yaml
from kd_yolo.tasks.canvas import check_canvas, check_file_canvas, check_teacher_canvas, on_canvas

WEAK_TEACHER_MAP50 = 0.05


def resolve_method(
    config: TrainConfig, groups: Mapping[str, Mapping[str, Any]], stock: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the method with file, then command-line arguments applied, all validated.

    Of a combination the arguments are nested by member. A method's default balance holds until a weight is given by
    hand: balancing would undo that weight.

    Raises:
        ConfigError: Unknown method, argument or schedule key.
    """
    if config.method == "none" or config.teacher == "none":
        useless = [f"kd.{k}" for k in groups["kd"]] + [f"schedule.{k}" for k in groups["schedule"]]
        if useless:
            raise ConfigError(f"{useless[0]} has no effect without a teacher; drop it or set teacher= and method=")
        if teacher_files(config):
            first = config.teacher.split(",")[0].strip()
            raise ConfigError(
                f"teacher={config.teacher} has no effect with method=none; drop it, or say pretrained={first} to start "
                "from it"
            )
        return {"name": "none", "args": {}, "schedule": {}, "balance": None}
    method = _method_file(config.method)
    load_method(method.name)
    given = groups["kd"]
    balance = None if gives_weight(given) else method.balance
    if is_combination(method.name):
        arguments = merged_args(nested_args(method.name, method.args), nested_args(method.name, given))
    else:
        arguments = {**method.args, **given}
    schedule = {**method.schedule, **groups["schedule"]}
    parse_args(method.name, arguments)
    epochs, tail = (whole_number(stock, key) for key in ("epochs", "close_mosaic"))
    validate(Schedule, schedule, where="schedule").active_epochs(max(epochs, 1), tail)
    balance = config.balance if config.balance is not None else balance
    return {"name": method.name, "args": arguments, "schedule": schedule, "balance": balance}


def resolve_student(config: TrainConfig, teacher: bool = False) -> StudentSpec:
    """Return what is trained: structure and warm start, of the student or of the self-distillation teacher.

    ``pretrained`` and ``reparam`` are the student's; a teacher of the same structure or one from a YAML has them too,
    but a checkpoint that is named as the teacher goes on from its own weights.

    Raises:
        ModelError: Unknown model or unusable file.
    """
    name = (config.teacher_model or config.model) if teacher else config.model
    if teacher and config.teacher_model is not None and name.endswith(".pt"):
        return student_spec(name, trust=config.trust)
    warm_start = None
    if isinstance(config.pretrained, str):
        load_model(Path(config.pretrained), trust=config.trust)
        warm_start = Path(config.pretrained).expanduser().resolve()
    return student_spec(name, config.reparam, warm_start, scratch=config.pretrained is False, trust=config.trust)


def teacher_files(config: TrainConfig) -> tuple[Path, ...]:
    """Return the teachers' files that ``teacher=A,B`` names; none for ``self`` and ``none``."""
    if config.teacher in {"self", "none"}:
        return ()
    return tuple(Path(word.strip()).expanduser().resolve() for word in config.teacher.split(",") if word.strip())


def check_training_inputs(
    config: TrainConfig, stock: Mapping[str, Any], data: Path, student: StudentSpec
) -> dict[str, Any]:
    """Check stock arguments, canvas, views and labels.

    Returns:
        The canvas that will be used (``imgsz``, pixels).

    Raises:
        ConfigError: A stock argument of the wrong type or range or that cannot work, a canvas that is no multiple of
            the stride, or a teacher cache that would never be read.
        DataError: The data set would not train.
    """
    imgsz = stock.get("imgsz", load_yaml(data).get("imgsz", 640))
    check_canvas(imgsz, student.max_stride)
    try:
        get_cfg(overrides={k: v for k, v in stock.items() if k != "imgsz"})
    except (TypeError, ValueError, SyntaxError) as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    if stock.get("epochs") is not None and int(stock["epochs"]) < 1:
        raise ConfigError(f"epochs={stock['epochs']}: at least 1 is needed")
    if stock.get("rect"):
        raise ConfigError("rect=true: training and validation use the square canvas of the deployed file; drop rect=")
    check_class_names_kept(config, stock)
    check_cache(config, stock)
    check_teacher_canvas(config, stock, imgsz)
    validate_for_training(data)
    return {"imgsz": imgsz}


def check_class_names_kept(config: TrainConfig, stock: Mapping[str, Any]) -> None:
    """Refuse a teacher beside ``single_cls``.

    Raises:
        ConfigError: The classes would be renamed, so that no teacher knows them.
    """
    if stock.get("single_cls") and config.teacher != "none" and config.method != "none":
        raise ConfigError(
            "single_cls=true: renames the classes, so that no teacher knows them; give the labels one class, or "
            "teacher=none"
        )


def check_teacher(
    config: TrainConfig,
    data: Path,
    imgsz: int,
    student: StudentSpec,
    path: Path | None = None,
    metrics: Mapping[str, float] | None = None,
    method: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a teacher that cannot help: wrong task, classes, levels, canvas, or hardly better than chance.

    Args:
        config: The run's configuration.
        data: Ready data YAML.
        imgsz: Canvas, pixels.
        student: What will be trained.
        path: Teacher's file; None takes all of ``config.teacher``, each judged on its own.
        metrics: Its validation metrics on this canvas when they are known already.
        method: What ``resolve_method`` returned, to check too that the teachers give what it reads.

    Raises:
        CheckpointError: Missing, truncated, foreign or another task.
        ModelError: An ONNX file that is missing, damaged or no detector.
        TeacherError: It does not fit, or is weak and ``allow_weak_teacher`` is not set.
    """
    names = dict(enumerate(dataset_names(data)))
    network = student.build(nc=len(names))
    members = []
    for file in (path,) if path else teacher_files(config):
        found = open_teacher(file, trust=config.trust)
        members.append((found, found.make(map_classes(names, found.names))))
        if config.teacher_imgsz is not None:
            check_canvas(config.teacher_imgsz, max(members[-1][1].strides), "teacher_imgsz")
        common_strides(head_strides(network), members[-1][1].strides)
        check_file_canvas(config, found, imgsz)
    teachers = [teacher for _, teacher in members]
    merged = teachers[0] if len(teachers) == 1 else SeveralTeachers(teachers, len(names))
    if method is not None:
        check_method(method, on_canvas(config, merged, imgsz), network)
    canvas = config.teacher_imgsz or imgsz
    for found, teacher in members:  # last, for it takes a pass over the validation data
        _check_strength(config, found.path, metrics or _teacher_metrics(teacher, names, data, canvas))


def check_method(method: Mapping[str, Any], teacher: Teacher, student: DetectionModel) -> None:
    """Refuse a teacher that does not give what the method reads.

    Args:
        method: What ``resolve_method`` returned.
        teacher: Of the data set's classes.
        student: A detector of the student's structure, with the data set's classes.

    Raises:
        TeacherError: As said, or the two share no level.
        ConfigError: The method cannot work with these two.
    """
    strides = common_strides(head_strides(student), teacher.strides)
    built = build_method(method["name"], method["args"], describe(student, strides), teacher.describe(strides))
    teacher.check_reads(method["name"], built.reads)


def check_own_teacher(
    method: Mapping[str, Any],
    student: StudentSpec,
    teacher: StudentSpec,
    data: Path,
    config: TrainConfig | None = None,
    imgsz: int = 0,
) -> None:
    """Refuse a method that cannot work with a teacher that the run trains itself, before it is trained.

    Args:
        method: What ``resolve_method`` returned.
        student: What will be trained.
        teacher: What is trained before it.
        data: Ready data YAML.
        config: The run's configuration, for a teacher on another canvas.
        imgsz: The student's canvas, pixels.

    Raises:
        TeacherError: The two share no level.
        ConfigError: The method cannot work with these two.
    """
    classes = len(dataset_names(data))
    ready: Teacher = DetectTeacher(teacher.build(nc=classes))
    check_method(method, on_canvas(config, ready, imgsz) if config else ready, student.build(nc=classes))


def check_cache(config: TrainConfig, stock: Mapping[str, Any]) -> None:
    """Refuse a teacher cache that could never be read from.

    Raises:
        ConfigError: There is no teacher, or the training makes a new view of an image every time.
    """
    if config.cache_teacher is None:
        return
    if config.method == "none" or config.teacher == "none":
        raise ConfigError(f"cache_teacher={config.cache_teacher} has no effect without a teacher; drop it")
    check_repeating_views(stock)


def _teacher_metrics(teacher: Teacher, names: Mapping[int, str], data: Path, imgsz: int) -> dict[str, float]:
    """Return validation metrics on the square training canvas; a YOLO teacher is judged by its own predictions."""
    if isinstance(teacher, DetectTeacher):
        # A copy: Ultralytics' validator removes the branch that it does not predict with.
        return validate_detector(deepcopy(teacher.model), names, data, imgsz).metrics
    return validate_teacher(teacher, names, data, imgsz).metrics


def _check_strength(config: TrainConfig, path: Path, metrics: Mapping[str, float]) -> None:
    map50 = float(metrics["metrics/mAP50(B)"])
    LOGGER.info(f"teacher {path}: mAP50 {map50:.4f} on the validation data")
    if map50 < WEAK_TEACHER_MAP50 and not config.allow_weak_teacher:
        raise TeacherError(
            f"{path}: mAP50 {map50:.4f} on the validation data is below {WEAK_TEACHER_MAP50}; so weak a teacher "
            "teaches noise. Train it longer, give another, or pass allow_weak_teacher=true"
        )


def _method_file(name: str) -> MethodFile:
    """Return the file that a method's name stands for, or what one would hold."""
    if is_combination(name):
        return combined_file(name)
    if "." in name and not name.endswith((".yaml", ".yml")):
        return MethodFile(name=name)  # a third party's module
    path = find("methods", name)
    return validate(MethodFile, load_yaml(path), where=str(path))
