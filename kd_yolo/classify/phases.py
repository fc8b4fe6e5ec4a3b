"""Run one phase of a classification run: start, resume or finish it, and record that it is done."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ultralytics.models.yolo.classify import ClassificationValidator
from ultralytics.utils import LOGGER

from kd_yolo.checkpoints import read_checkpoint
from kd_yolo.classify.student import ClassifierSpec
from kd_yolo.classify.trainer import KDClassifyTrainer
from kd_yolo.config import Recipe
from kd_yolo.files import sha256, write_json, write_text
from kd_yolo.tasks.phase_steps import (
    DONE_FILE,
    PhaseTask,
    plain_metrics,
    read_done,
    teacher_hashes,
    train_phase,
    trainer_arguments,
)
from kd_yolo.tasks.run_folder import recipe_path

TOP1, TOP5 = "metrics/accuracy_top1", "metrics/accuracy_top5"
CLASSIFY = PhaseTask(
    "classify",
    KDClassifyTrainer,
    ClassificationValidator,
    read_checkpoint,
    validation_keys=("data", "imgsz", "batch", "device", "plots"),
)


@dataclass(frozen=True)
class ClassifyPhase:
    """What a finished phase reached on the validation split.

    Attributes:
        name: Phase name, its folder inside the run.
        top1: Share of images whose class is the first answer, 0 to 1.
        top5: Share of images whose class is among the first five.
        metrics: Validation metrics by their Ultralytics names.
        best_sha256: Hash of the best checkpoint.
        teacher_sha256: Hash of the teacher's file, or empty.
        seconds: Wall time of this process in the phase, seconds.
    """

    name: str
    top1: float
    top5: float
    metrics: dict[str, float] = field(default_factory=dict)
    best_sha256: str = ""
    teacher_sha256: str = ""
    seconds: float = 0.0


def run_phase(
    run_dir: Path, name: str, spec: ClassifierSpec, teacher: Path | None, plan: Mapping[str, Any]
) -> ClassifyPhase:
    """Run a phase, or take up where it was stopped, or return its recorded result.

    Args:
        run_dir: The run's folder.
        name: The phase's folder in it.
        spec: What is trained.
        teacher: Checkpoint to distil from, or None for labels only.
        plan: The content of ``run.yaml``.

    Raises:
        CheckpointError: It ended without a checkpoint.
    """
    folder = run_dir / name
    if recorded := read_done(folder):
        LOGGER.info(f"{name}: already done, top-1 {recorded['top1']:.4f}")
        return ClassifyPhase(**recorded)
    started = time.time()
    arguments = _trainer_arguments(run_dir, name, spec, teacher, plan)
    metrics = train_phase(folder, arguments, CLASSIFY, trust=bool(plan["config"]["trust"]))
    best, taught = sha256(folder / "weights" / "best.pt"), sha256(teacher) if teacher else ""
    seconds = round(time.time() - started, 1)
    result = ClassifyPhase(name, metrics[TOP1], metrics[TOP5], metrics, best, taught, seconds)
    write_json(folder / DONE_FILE, asdict(result))
    return result


def validate_classifier(
    path: Path, data: Path, imgsz: int, split: str = "val", device: Any = "cpu"
) -> dict[str, float]:
    """Return the metrics of a checkpoint on a split, by Ultralytics' own classification validator.

    Args:
        path: A classifier whose classes are the data's.
        data: Classification folder.
        imgsz: Canvas, pixels.
        split: ``val``, ``test`` or ``train``.
        device: As Ultralytics takes it.
    """
    with tempfile.TemporaryDirectory(prefix="kd-yolo-val-") as folder:
        given = {"data": str(data), "split": split, "imgsz": imgsz, "batch": 32, "device": device, "workers": 0}
        quiet = {"plots": False, "verbose": False, "mode": "val", "task": "classify", "project": folder, "name": "val"}
        validator = ClassificationValidator(args={**given, **quiet, "model": str(path)})
        return plain_metrics(validator(model=str(path)))


def _trainer_arguments(
    run_dir: Path, name: str, spec: ClassifierSpec, teacher: Path | None, plan: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the files a phase reads and return the stock arguments of its trainer."""
    arguments = trainer_arguments(run_dir, name, "classify", spec.cfg, spec.weights, plan)
    if teacher is not None:
        method = plan["method"]
        recipe_file = recipe_path(run_dir, name)
        recipe = Recipe(
            teacher=str(teacher),
            teacher_sha256=teacher_hashes(run_dir, name, [teacher])[0],
            method=method["name"],
            args=method["args"],
            schedule=method["schedule"],
            trust=bool(plan["config"]["trust"]),
        )
        write_text(recipe_file, yaml.safe_dump(recipe.model_dump(), sort_keys=False))
        arguments["distill_model"] = str(recipe_file)
    return arguments
