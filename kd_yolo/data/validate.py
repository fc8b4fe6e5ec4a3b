"""The quick gate before training: the first fatal problem of a data set as one line."""

from __future__ import annotations

from pathlib import Path

from kd_yolo.data.datayaml import DataYaml, label_path, load_data_yaml
from kd_yolo.data.labels import read_labels
from kd_yolo.data.pixels import BadImageError, decode, in_threads
from kd_yolo.data.progress import silent, stderr_progress
from kd_yolo.errors import DataError

MANY_IMAGES = 5000
"""From this number on the check takes long enough to show progress."""


def validate_for_training(yaml: Path) -> None:
    """Read every label and decode every image of train and val.

    Args:
        yaml: A data YAML.

    Raises:
        ConfigError: The YAML is malformed.
        DataError: A split is empty or without boxes, a label file is wrong, or an image is corrupt. The line names the
            first such file, how many there are, and the command that lists them all.
    """
    data = load_data_yaml(yaml)
    problems: list[str] = []
    files: list[Path] = []
    for split in ("train", "val"):
        images = data.images(split)
        if not images:
            places = ", ".join(str(place) for place in data.splits[split])
            raise DataError(f"{yaml}: no image in the '{split}' split (looked in {places}); correct '{split}'")
        problems += _label_problems(data, yaml, split, images)
        files += images
    problems += _image_problems(files)
    if problems:
        many = f"{len(problems)} such problems in all" if len(problems) > 1 else "the only problem"
        raise DataError(f"{problems[0]} ({many}; kd-yolo data check data={yaml} lists everything)")


def keypoint_columns(data: DataYaml) -> int:
    """Return how many columns of keypoints follow each box: 0 for a detection data set."""
    shape = data.extra.get("kpt_shape")
    return int(shape[0] * shape[1]) if isinstance(shape, list) and len(shape) == 2 else 0


def _label_problems(data: DataYaml, yaml: Path, split: str, images: list[Path]) -> list[str]:
    problems: list[str] = []
    boxes = labelled = 0
    for image in images:
        file = label_path(image)
        labels = read_labels(file, len(data.names), keypoint_columns(data))
        boxes += len(labels.boxes)
        labelled += labels.exists
        problems += (
            f"{file}{f' line {fault.line}' if fault.line else ''}: {fault.detail}"
            for fault in labels.faults
            if fault.fatal
        )
    if not boxes and not problems:
        where = "has no box in it" if labelled else f"was not found (first: {label_path(images[0])})"
        problems.append(f"{yaml}: nothing to learn in '{split}': every label file of its {len(images)} images {where}")
    return problems


def _image_problems(files: list[Path]) -> list[str]:
    progress = stderr_progress("checking images") if len(files) >= MANY_IMAGES else silent
    problems = []
    for done, (file, result) in enumerate(in_threads(_decodes, files), 1):
        if isinstance(result, BadImageError):
            problems.append(f"{file}: {result}; replace the image or take it out of the data set")
        progress(done, len(files))
    return problems


def _decodes(file: Path) -> bool:
    """Decode and throw away: only the failure matters, and the pixels of a whole data set would not fit in memory."""
    decode(file)
    return True
