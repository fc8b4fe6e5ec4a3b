"""Run one phase of a classification run: start, resume or finish it, and record that it is done."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from ultralytics.models.yolo.classify import ClassificationValidator
from ultralytics.utils import LOGGER
from ultralytics.utils.plotting import plot_results

from kd_yolo.checkpoints import read_checkpoint
from kd_yolo.classify.student import ClassifierSpec
from kd_yolo.classify.trainer import KDClassifyTrainer
from kd_yolo.config import Recipe, read_recipe
from kd_yolo.errors import CheckpointError
from kd_yolo.files import sha256, write_json, write_text
from kd_yolo.resources import load_yaml
from kd_yolo.tasks.detect import strip_checkpoints
from kd_yolo.tasks.exact_resume import load_state
from kd_yolo.tasks.phases import DONE_FILE

TOP1, TOP5 = "metrics/accuracy_top1", "metrics/accuracy_top5"
VALIDATION_KEYS = ("data", "imgsz", "batch", "device", "plots")


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
    done = folder / DONE_FILE
    if done.is_file():
        recorded = ClassifyPhase(**load_yaml(done))  # JSON is YAML
        LOGGER.info(f"{name}: already done, top-1 {recorded.top1:.4f}")
        return recorded
    started = time.time()
    last = folder / "weights" / "last.pt"
    arguments = _trainer_arguments(run_dir, name, spec, teacher, plan)
    stage = _stage(last, trust=bool(plan["config"]["trust"]))
    if stage == "trained":
        LOGGER.info(f"{name}: trained, finishing its evaluation")
        metrics = _evaluate_finished(folder, arguments)
    else:
        if stage == "running":
            arguments = {k: arguments[k] for k in ("distill_model", "data", "device") if k in arguments}
            arguments = {**arguments, "resume": str(last), "save_dir": str(folder)}
        LOGGER.info(f"{name}: {'resuming' if stage == 'running' else 'starting'} in {folder}")
        trainer = KDClassifyTrainer(overrides=arguments)
        trainer.train()
        metrics = _plain_metrics(trainer.metrics if not trainer.ddp else _metrics_of(trainer.best))
    best = folder / "weights" / "best.pt"
    if not best.is_file():
        raise CheckpointError(f"{best}: the phase ended without a checkpoint; see the messages above")
    taught = sha256(teacher) if teacher else ""
    seconds = round(time.time() - started, 1)
    result = ClassifyPhase(name, metrics[TOP1], metrics[TOP5], metrics, sha256(best), taught, seconds)
    write_json(done, asdict(result))
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
        return _plain_metrics(validator(model=str(path)))


def _trainer_arguments(
    run_dir: Path, name: str, spec: ClassifierSpec, teacher: Path | None, plan: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the files a phase reads and return the stock arguments of its trainer.

    The files lie beside the phase folder, not in it: multi-GPU launch clears that folder.
    """
    student_file = run_dir / f"{name}.model.yaml"
    write_text(student_file, yaml.safe_dump(spec.cfg, sort_keys=False))
    arguments: dict[str, Any] = {
        **plan["stock"],
        "task": "classify",
        "mode": "train",
        "model": str(student_file),
        "pretrained": str(spec.weights) if spec.weights else False,
        "data": plan["config"]["data"],
        "project": str(run_dir),
        "name": name,
        "exist_ok": True,
    }
    if teacher is not None:
        method = plan["method"]
        recipe_file = run_dir / f"{name}.recipe.yaml"
        begun = (run_dir / name / "weights" / "last.pt").is_file()
        known = read_recipe(recipe_file) if begun and recipe_file.is_file() else None
        recipe = Recipe(
            teacher=str(teacher),
            # of the run's beginning, so that a teacher that has changed since is found out
            teacher_sha256=known.teacher_sha256 if known else sha256(teacher),
            method=method["name"],
            args=method["args"],
            schedule=method["schedule"],
            trust=bool(plan["config"]["trust"]),
        )
        write_text(recipe_file, yaml.safe_dump(recipe.model_dump(), sort_keys=False))
        arguments["distill_model"] = str(recipe_file)
    return arguments


def _stage(last: Path, trust: bool) -> str:
    """Tell from the last checkpoint whether a phase has to start, resume or only be finished."""
    if not last.is_file():
        return "fresh"
    _, checkpoint = read_checkpoint(last, trust=trust)
    epoch = int(checkpoint.get("epoch", -1))
    if epoch < 0:
        return "trained"
    state = load_state(last.parent, epoch)
    planned = int(checkpoint["train_args"]["epochs"])
    return "trained" if epoch + 1 >= planned or (state is not None and state["finished"]) else "running"


def _evaluate_finished(folder: Path, arguments: Mapping[str, Any]) -> dict[str, float]:
    """Do what is left of a phase whose last epoch is saved: strip, evaluate the best checkpoint, plot."""
    strip_checkpoints(folder / "weights")
    best = folder / "weights" / "best.pt"
    chosen = {k: arguments[k] for k in VALIDATION_KEYS if k in arguments}
    validator = ClassificationValidator(
        save_dir=folder, args={**chosen, "model": str(best), "task": "classify", "mode": "val"}
    )
    metrics = _plain_metrics(validator(model=str(best)))
    if chosen.get("plots", True) and (folder / "results.csv").is_file():
        plot_results(file=folder / "results.csv")
    return metrics


def _metrics_of(best: Path) -> dict[str, Any]:
    _, checkpoint = read_checkpoint(best)
    return dict(checkpoint.get("train_metrics") or {})


def _plain_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in metrics.items()
        if isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)
        if not key.startswith("val/")
    }
