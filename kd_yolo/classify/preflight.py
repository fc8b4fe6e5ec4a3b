"""Refuse bad input of a classification run before anything is trained, each with one line that says what to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ultralytics.cfg import get_cfg
from ultralytics.utils import LOGGER

from kd_yolo.classify.checkpoints import load_classifier
from kd_yolo.classify.folder import ClassFolder, read_class_folder
from kd_yolo.classify.model import check_same_order
from kd_yolo.classify.phases import TOP1, validate_classifier
from kd_yolo.classify.settings import ClassifyConfig
from kd_yolo.config import stock_keys
from kd_yolo.errors import ConfigError, TeacherError
from kd_yolo.tasks.canvas import check_canvas

CANVAS = 224
STRIDE = 32
# A teacher has to know more than the commonest class; this much more, in shares of the images, is not noise.
MARGIN = 0.01


def check_stock(stock: Mapping[str, Any], data: ClassFolder) -> dict[str, Any]:
    """Check stock arguments; return them with the canvas filled in.

    Raises:
        ConfigError: A stock argument of the wrong type or range, or a canvas that is no multiple of 32.
    """
    imgsz = stock.get("imgsz", CANVAS)
    check_canvas(imgsz, STRIDE)
    for key in ("single_cls", "time"):
        if stock.get(key) not in {None, False}:
            raise ConfigError(f"{key}={stock[key]}: has no use for classifiers here; drop it")
    if stock.get("split") not in {None, "val"}:
        raise ConfigError(f"split={stock['split']}: the best checkpoint is chosen on val; test is judged at the end")
    try:
        get_cfg(overrides={k: v for k, v in stock.items() if k != "imgsz"})
    except (TypeError, ValueError, SyntaxError) as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    batch = stock.get("batch", stock_keys()["batch"])
    if isinstance(batch, int) and batch >= 1 and imgsz < 2 * STRIDE and data.count("train") % batch == 1:
        raise ConfigError(f"batch={batch}: leaves a last batch of one image, which BatchNorm cannot use; change batch")
    return {**stock, "imgsz": imgsz}


def device_of(stock: Mapping[str, Any]) -> Any:
    """Return ``device`` of stock arguments; nothing given is the CPU, 0 is the first GPU."""
    return "cpu" if stock.get("device") is None else stock["device"]


def check_teacher(
    config: ClassifyConfig, teacher: Path, data: Path, imgsz: int, top1: float | None = None, device: Any = "cpu"
) -> float:
    """Refuse a teacher that does not fit the data or knows no more than its commonest class.

    Args:
        config: The run's keys.
        teacher: Its checkpoint.
        data: Classification folder.
        imgsz: Canvas, pixels.
        top1: Its top-1 on validation when it is known already, else it is measured.
        device: Where to measure.

    Returns:
        Its top-1 on the validation split, 0 to 1.

    Raises:
        CheckpointError: It cannot be loaded, or is no classifier.
        TeacherError: Other classes, another class order, or too weak.
    """
    model, checkpoint = load_classifier(teacher, trust=config.trust)
    found = read_class_folder(data)
    check_same_order(model.names, found.names, teacher)
    trained_at = (checkpoint.get("train_args") or {}).get("imgsz")
    if trained_at not in {None, imgsz}:
        LOGGER.warning(f"teacher {teacher}: was trained at imgsz={trained_at}, this run is at {imgsz}")
    if top1 is None:
        top1 = validate_classifier(teacher, data, imgsz, device=device)[TOP1]
    LOGGER.info(f"teacher {teacher}: top-1 {top1:.4f} on the validation data")
    least = found.commonest_share("val") + MARGIN
    if top1 < least and not config.allow_weak_teacher:
        raise TeacherError(
            f"{teacher}: top-1 {top1:.4f} on the validation data is below {least:.4f}, little more than naming the "
            "commonest class reaches; train it longer, give another, or pass allow_weak_teacher=true"
        )
    return top1
