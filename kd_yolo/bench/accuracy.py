"""mAP of an artifact, on the canvas it is timed on."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kd_yolo.bench.runners import Runner, SessionRunner
from kd_yolo.bench.torch_runner import TorchRunner
from kd_yolo.checkpoints import load_model
from kd_yolo.errors import ModelError
from kd_yolo.images import dataset_files
from kd_yolo.runtimes import check_same_classes
from kd_yolo.runtimes.opening import is_foreign
from kd_yolo.runtimes.ultralytics_backend import CanvasValidator, ExportedDetector

BATCH = 16  # does not change the result; an exported file with a fixed batch is fed in portions


@dataclass(frozen=True)
class Accuracy:
    """Detection accuracy over a split.

    Attributes:
        map50: Mean average precision at IoU 0.5.
        map50_95: Mean over IoU 0.5 to 0.95.
        images: Number of images.
        split: Which split.
    """

    map50: float
    map50_95: float
    images: int
    split: str


def evaluate(path: Path, runner: Runner, data: str, split: str, device: str) -> Accuracy:
    """Validate an opened artifact: an exported file in the session that was timed, a checkpoint in the same form.

    Args:
        path: The artifact.
        runner: The same, opened.
        data: Resolved data YAML.
        split: Split to judge on.
        device: As for ``open_runner``.

    Raises:
        DataError: The artifact's classes are not the data set's.
    """
    if isinstance(runner, TorchRunner):
        model: nn.Module = copy.deepcopy(runner.deployed)
    elif isinstance(runner, SessionRunner):
        model = ExportedDetector(path)
        model.session = runner.session
    else:
        raise ModelError(f"{path}: a {type(runner).__name__} cannot be validated")
    check_same_classes(dict(enumerate(runner.names)), data, path)
    half = isinstance(runner, TorchRunner) and runner.precision == "fp16"
    return _validate(model, data, split, runner.canvas, device, quantize=16 if half else None)


def judge(
    path: Path, data: str, split: str, side: int | tuple[int, int], device: str = "cpu", name: str | None = None
) -> Accuracy:
    """Validate a checkpoint or exported file with Ultralytics' validator, without rectangular batches.

    Args:
        path: The file or folder.
        data: Resolved data YAML.
        split: Split to judge on.
        side: Side of the canvas in pixels, or height and width.
        device: As for ``open_runner``.
        name: What messages call the file.

    Raises:
        DataError: The file's classes are not the data set's.
        ConfigError: It cannot take that canvas.
        ModelError: It cannot be opened.
        BackendMissingError: Its runtime is missing.
    """
    canvas = (side, side) if isinstance(side, int) else side
    if path.suffix != ".pt" and not is_foreign(path):
        exported = ExportedDetector(path)
        check_same_classes(exported.names, data, name or path)
        exported.open(list(canvas), device)
        return _validate(exported, data, split, canvas, device)
    model, _ = load_model(path)
    check_same_classes(dict(model.names), data, name or path)
    return _validate(model, data, split, canvas, device)


def _validate(model: Any, data: str, split: str, canvas: tuple[int, int], device: str, **keys: Any) -> Accuracy:
    with tempfile.TemporaryDirectory(prefix="kd-yolo-val-") as folder:
        given = {"data": data, "split": split, "imgsz": max(canvas), "batch": BATCH, "device": device, **keys}
        quiet = {"rect": False, "workers": 0, "plots": False, "verbose": False, "mode": "val", "task": "detect"}
        validator = CanvasValidator(args={**given, **quiet, "project": folder, "name": "val"})
        validator.canvas = canvas
        validator(model=model)
        box: Any = validator.metrics.box
    return Accuracy(float(box.map50), float(box.map), len(dataset_files(data, split)), split)
