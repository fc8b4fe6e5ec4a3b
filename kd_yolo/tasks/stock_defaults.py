"""Which of Ultralytics' training arguments are set when the command leaves them open: ``cfg/train/default.yaml``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultralytics.utils import LOGGER

from kd_yolo.data.datayaml import label_path, load_data_yaml
from kd_yolo.data.labels import read_labels
from kd_yolo.data.validate import keypoint_columns
from kd_yolo.nn.student import StudentSpec
from kd_yolo.nn.surgery import reparam_plan
from kd_yolo.resources import builtin_root, load_yaml


def narrowed_defaults() -> dict[str, Any]:
    """Return the stock arguments that a narrowed student is trained with unless others are given."""
    return dict(_recipes()["narrowed"])


def finetuned_defaults(
    student: StudentSpec, data: Path, is_teacher: bool = False, classes: Sequence[int] | int | None = None
) -> dict[str, Any]:
    """Return the stock arguments of a detector that goes on from its own checkpoint, for what the command leaves open.

    They are for the teacher that a run trains first, and for a detector that is given branches. One without branches is
    trained as Ultralytics does, whatever the method, and so is what starts from random weights or from those of another
    file (``pretrained=``), which may hold another network.

    Args:
        student: What will be trained; it was not narrowed.
        data: The data YAML. Mosaics stay where few training images hold an object: there they show four times as many.
        is_teacher: It is the run's own teacher.
        classes: Those that are trained, as in Ultralytics' ``classes=``; None means all.
    """
    if not student.goes_on or not (is_teacher or reparam_plan(student.cfg) is not None):
        return {}
    recipes = _recipes()
    values = dict(recipes["finetuned"])
    share = filled_share(data, classes)
    if share < recipes["filled_share"]:
        del values["mosaic"]
    said = " ".join(f"{key}={value}" for key, value in values.items())
    LOGGER.info(
        f"recipe of {Path(student.name).name}: {said}, unless given ({share:.0%} of training images hold an object)"
    )
    return values


def filled_share(data: Path, classes: Sequence[int] | int | None = None) -> float:
    """Return the share of training images with at least one box of the given classes; None means all."""
    found = load_data_yaml(data)
    images = found.images("train")
    columns = keypoint_columns(found)
    wanted = set(range(len(found.names))) if classes is None else {classes} if isinstance(classes, int) else {*classes}
    labels = (read_labels(label_path(image), len(found.names), columns) for image in images)
    return sum(any(box[0] in wanted for box in one.boxes) for one in labels) / max(len(images), 1)


def _recipes() -> dict[str, Any]:
    return load_yaml(builtin_root() / "train" / "default.yaml")
