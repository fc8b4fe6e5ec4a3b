"""Load classifiers: known classes only, no code of the file run, no download; as ``kd_yolo.checkpoints`` does."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.nn.modules import Classify
from ultralytics.nn.tasks import ClassificationModel, DetectionModel, guess_model_task
from ultralytics.utils import DEFAULT_CFG_DICT, DEFAULT_CFG_KEYS

from kd_yolo.checkpoints import read_checkpoint
from kd_yolo.errors import CheckpointError


def load_classifier(path: str | Path, trust: bool = False) -> tuple[ClassificationModel, dict[str, Any]]:
    """Load a classifier from an Ultralytics checkpoint; of a mid-run ``last.pt`` the student.

    Args:
        path: A local ``.pt`` file. Names are never completed, looked up elsewhere or downloaded.
        trust: Also rebuild foreign classes, which runs code contained in the file.

    Returns:
        The model in float32, in eval mode, on the CPU, with ``args`` as a dictionary of stock keys; and the checkpoint
        dictionary.

    Raises:
        CheckpointError: The file is missing, empty, truncated, no checkpoint, holds foreign classes and is not trusted,
            holds no classifier with a Classify head, or has weights that are not finite.
    """
    file, checkpoint = read_checkpoint(path, trust)
    model = _module_of(file, checkpoint)
    if not isinstance(model, ClassificationModel) or not isinstance(model.model[-1], Classify):
        raise CheckpointError(
            f"{file}: is a {type(model).__name__} (task {guess_model_task(model)}); a classifier with a Classify head "
            "is needed, as task=classify trains it"
        )
    saved = checkpoint.get("train_args") or {}
    model.args = {**DEFAULT_CFG_DICT, **{key: value for key, value in saved.items() if key in DEFAULT_CFG_KEYS}}
    model.pt_path = str(file)
    model.task = "classify"
    return _ready(file, model), checkpoint


def load_source(path: str | Path, trust: bool = False) -> nn.Module:
    """Load what a classifier can start from: a classifier or a detector, in float32, in eval mode, on the CPU.

    Raises:
        CheckpointError: As ``load_classifier``, but detectors are welcome too.
    """
    file, checkpoint = read_checkpoint(path, trust)
    model = _module_of(file, checkpoint)
    if not isinstance(model, (ClassificationModel, DetectionModel)):
        raise CheckpointError(
            f"{file}: is a {type(model).__name__}; a classifier or a detector is needed to start from"
        )
    return _ready(file, model)


def is_classifier(path: str | Path) -> bool:
    """Return whether a file is a classifier's checkpoint, by a look at its index only; never raises."""
    try:
        with zipfile.ZipFile(Path(path).expanduser()) as archive:
            index = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError):
        return False
    return b"ClassificationModel" in index and b"DetectionModel" not in index


def _module_of(file: Path, checkpoint: dict[str, Any]) -> nn.Module:
    """Return the EMA model of a checkpoint, or the model; unwrapped from a distillation."""
    found = checkpoint.get("ema") or checkpoint.get("model")
    if not isinstance(found, nn.Module):
        raise CheckpointError(f"{file}: has no model in it; give a best.pt or last.pt that Ultralytics wrote")
    student = getattr(found, "student_model", None)
    return student if isinstance(student, nn.Module) else found


def _ready(file: Path, model: nn.Module) -> Any:
    model = model.float()
    model.criterion = None  # type: ignore[assignment]
    if not all(bool(torch.isfinite(value).all()) for value in model.state_dict().values()):
        raise CheckpointError(f"{file}: has weights that are not finite; its training diverged; take another one")
    return model.eval().requires_grad_(False)
