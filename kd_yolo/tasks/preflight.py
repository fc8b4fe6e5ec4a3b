"""Refuse bad input before anything is trained, each with one line that says what to do."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ultralytics.cfg import get_cfg
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils import LOGGER

from kd_yolo.checkpoints import load_model
from kd_yolo.config import MethodFile, TrainConfig, stock_keys, validate
from kd_yolo.data.validate import validate_for_training
from kd_yolo.distill.base import load_method, parse_args
from kd_yolo.distill.schedule import Schedule
from kd_yolo.distill.taps import common_strides, head_strides
from kd_yolo.distill.teacher import load_teacher, map_classes, prepare_teacher
from kd_yolo.errors import ConfigError, TeacherError
from kd_yolo.nn.student import StudentSpec, student_spec
from kd_yolo.resources import find, load_yaml

WEAK_TEACHER_MAP50 = 0.05


def resolve_method(
    config: TrainConfig, groups: Mapping[str, Mapping[str, Any]], stock: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the method with file, then command-line arguments applied, all validated.

    Raises:
        ConfigError: Unknown method, argument or schedule key.
    """
    if config.method == "none" or config.teacher == "none":
        given = [f"kd.{k}" for k in groups["kd"]] + [f"schedule.{k}" for k in groups["schedule"]]
        if given:
            raise ConfigError(f"{given[0]} has no effect without a teacher; drop it or set teacher= and method=")
        return {"name": "none", "args": {}, "schedule": {}, "balance": None}
    if "." in config.method and not config.method.endswith((".yaml", ".yml")):
        method = MethodFile(name=config.method)  # a third party's module
    else:
        path = find("methods", config.method)
        method = validate(MethodFile, load_yaml(path), where=str(path))
    load_method(method.name)
    arguments = {**method.args, **groups["kd"]}
    schedule = {**method.schedule, **groups["schedule"]}
    parse_args(method.name, arguments)
    defaults = stock_keys()
    epochs, tail = (int(stock.get(key, defaults[key])) for key in ("epochs", "close_mosaic"))
    validate(Schedule, schedule, where="schedule").active_epochs(max(epochs, 1), tail)
    balance = config.balance if config.balance is not None else method.balance
    return {"name": method.name, "args": arguments, "schedule": schedule, "balance": balance}


def resolve_student(config: TrainConfig, teacher: bool = False) -> StudentSpec:
    """Return what is trained: structure and warm start, of the student or of the self-distillation teacher.

    Raises:
        ModelError: Unknown model or unusable file.
    """
    name = (config.teacher_model or config.model) if teacher else config.model
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
    """Check stock arguments, canvas and labels.

    Returns:
        The canvas that will be used (``imgsz``, pixels).

    Raises:
        ConfigError: A stock argument of the wrong type or range, or a canvas that is no multiple of the stride.
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
    validate_for_training(data)
    return {"imgsz": imgsz}


def check_canvas(imgsz: Any, stride: int) -> None:
    """Refuse a canvas that the network would silently change.

    Raises:
        ConfigError: Not a positive whole number, or not a multiple of the stride.
    """
    if isinstance(imgsz, bool) or not isinstance(imgsz, int) or imgsz <= 0:
        raise ConfigError(f"imgsz={imgsz}: a positive whole number of pixels is needed, for example imgsz=224")
    if imgsz % stride:
        lower = max(imgsz // stride, 1) * stride
        raise ConfigError(
            f"imgsz={imgsz} is not a multiple of the model's largest stride {stride}; use {lower} or {lower + stride}"
        )


def check_teacher(
    config: TrainConfig,
    data: Path,
    imgsz: int,
    student: StudentSpec,
    path: Path | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Refuse a teacher that cannot help: wrong task, classes, levels, canvas, or hardly better than chance.

    Args:
        config: The run's configuration.
        data: Ready data YAML.
        imgsz: Canvas, pixels.
        student: What will be trained.
        path: Teacher checkpoint; None takes ``config.teacher``.
        metrics: Its validation metrics on this canvas when they are known already.

    Raises:
        CheckpointError: Missing, truncated, foreign or another task.
        TeacherError: It does not fit, or is weak and ``allow_weak_teacher`` is not set.
    """
    path = path or Path(config.teacher).expanduser()
    model, checkpoint = load_teacher(path, trust=config.trust)
    names = load_yaml(data)["names"]
    names = dict(enumerate(names)) if isinstance(names, list) else {int(k): str(v) for k, v in names.items()}
    class_map = map_classes(names, model.names)
    common_strides(head_strides(student.build(nc=len(names))), head_strides(model))
    trained_at = (checkpoint.get("train_args") or {}).get("imgsz")
    if isinstance(trained_at, int) and trained_at != imgsz and not config.allow_other_canvas:
        raise TeacherError(
            f"{path}: trained at imgsz={trained_at}, this run is at {imgsz}; set imgsz={trained_at}, train a teacher "
            f"at {imgsz}, or pass allow_other_canvas=true"
        )
    if metrics is None:
        metrics = validate_model(prepare_teacher(model, class_map), names, data, imgsz)
    map50 = float(metrics["metrics/mAP50(B)"])
    LOGGER.info(f"teacher {path}: mAP50 {map50:.4f} on the validation data at imgsz {imgsz}")
    if map50 < WEAK_TEACHER_MAP50 and not config.allow_weak_teacher:
        raise TeacherError(
            f"{path}: mAP50 {map50:.4f} on the validation data is below {WEAK_TEACHER_MAP50}; so weak a teacher "
            "teaches noise. Train it longer, give another, or pass allow_weak_teacher=true"
        )


def validate_model(model: Any, names: Mapping[int, str], data: Path, imgsz: int) -> dict[str, float]:
    """Return validation metrics of a model in memory on the square training canvas."""
    model.names = dict(names)
    arguments = {"data": str(data), "imgsz": imgsz, "rect": False, "plots": False, "task": "detect", "mode": "val"}
    with tempfile.TemporaryDirectory(prefix="kd-yolo-val-") as folder:
        validator = DetectionValidator(save_dir=Path(folder), args=arguments)
        return {k: float(v) for k, v in validator(model=model).items()}
