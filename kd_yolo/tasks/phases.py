"""Run one phase of a training run: start, resume or finish it, and record that it is done."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils import LOGGER
from ultralytics.utils.plotting import plot_results

from kd_yolo.checkpoints import load_model
from kd_yolo.config import Recipe, TrainConfig
from kd_yolo.distill.teachers.build import prepare_merge
from kd_yolo.errors import CheckpointError, ConfigError
from kd_yolo.files import sha256, write_json, write_text
from kd_yolo.images import dataset_names
from kd_yolo.nn.student import StudentSpec
from kd_yolo.resources import load_yaml
from kd_yolo.tasks.detect import KDTrainer, strip_checkpoints
from kd_yolo.tasks.exact_resume import load_state

DONE_FILE = "phase.json"


@dataclass(frozen=True)
class PhaseSpec:
    """One phase.

    Attributes:
        name: Folder name inside the run.
        student: What is trained.
        epochs: Epochs, or None for the run's.
        teachers: Files to distil from; none for labels only.
    """

    name: str
    student: StudentSpec
    epochs: int | None
    teachers: tuple[Path, ...] = ()


@dataclass(frozen=True)
class PhaseResult:
    """What a finished phase reached on the validation split, on the training canvas.

    Attributes:
        name: Phase name.
        fitness: Ultralytics' fitness of the best checkpoint (mAP50-95 for detection).
        metrics: Validation metrics by their Ultralytics names.
        best_sha256: Hash of the best checkpoint.
        seconds: Wall time of this process in the phase, seconds.
    """

    name: str
    fitness: float
    metrics: dict[str, float] = field(default_factory=dict)
    best_sha256: str = ""
    seconds: float = 0.0


def run_phase(run_dir: Path, spec: PhaseSpec, plan: Mapping[str, Any]) -> PhaseResult:
    """Run a phase, or take up where it was stopped, or return its recorded result."""
    folder = run_dir / spec.name
    done = folder / DONE_FILE
    if done.is_file():
        recorded = load_yaml(done)  # JSON is YAML
        LOGGER.info(f"{spec.name}: already done, {recorded['fitness']:.4f}")
        return PhaseResult(**recorded)
    started = time.time()
    last = folder / "weights" / "last.pt"
    arguments = _trainer_arguments(run_dir, spec, plan)
    stage = _stage(last, trust=bool(plan["config"]["trust"]))
    if stage == "trained":
        LOGGER.info(f"{spec.name}: trained, finishing its evaluation")
        metrics = _evaluate_finished(folder, arguments)
    else:
        if stage == "running":
            arguments = {k: arguments[k] for k in ("distill_model", "data", "device") if k in arguments}
            arguments = {**arguments, "resume": str(last), "save_dir": str(folder)}
        LOGGER.info(f"{spec.name}: {'resuming' if stage == 'running' else 'starting'} in {folder}")
        trainer = KDTrainer(overrides=arguments)
        trainer.train()
        metrics = _plain_metrics(trainer.metrics if not trainer.ddp else _metrics_of(trainer.best))
    best = folder / "weights" / "best.pt"
    if not best.is_file():
        raise CheckpointError(f"{best}: the phase ended without a checkpoint; see the messages above")
    result = PhaseResult(spec.name, _fitness(metrics), metrics, sha256(best), round(time.time() - started, 1))
    write_json(done, asdict(result))
    return result


def _trainer_arguments(run_dir: Path, spec: PhaseSpec, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Write the files a phase reads and return the stock arguments of its trainer.

    The files lie beside the phase folder, not in it: multi-GPU launch clears that folder.
    """
    student_file = run_dir / f"{spec.name}.model.yaml"
    write_text(student_file, yaml.safe_dump(spec.student.cfg, sort_keys=False))
    arguments: dict[str, Any] = {
        **plan["stock"],
        "task": "detect",
        "mode": "train",
        "model": str(student_file),
        "pretrained": str(spec.student.weights) if spec.student.weights else False,
        "data": plan["config"]["data"],
        "project": str(run_dir),
        "name": spec.name,
        "exist_ok": True,
    }
    if spec.epochs is not None:
        arguments["epochs"] = spec.epochs
    if spec.teachers and plan["method"]["name"] != "none":
        recipe_file = run_dir / f"{spec.name}.recipe.yaml"
        recipe = _recipe(run_dir, spec, plan)
        write_text(recipe_file, yaml.safe_dump(recipe.model_dump(), sort_keys=False))
        data = Path(plan["config"]["data"])
        prepare_merge(recipe, recipe_file, dict(enumerate(dataset_names(data))), data, int(plan["stock"]["imgsz"]))
        arguments["distill_model"] = str(recipe_file)
    return arguments


def _recipe(run_dir: Path, spec: PhaseSpec, plan: Mapping[str, Any]) -> Recipe:
    """Return everything of ours that a phase's trainer must know."""
    method, config = plan["method"], TrainConfig.model_validate(plan["config"])
    paths, hashes = [str(path) for path in spec.teachers], [sha256(path) for path in spec.teachers]
    several = len(paths) > 1
    # Beside the phase folder; each phase has another teacher, so each has another cache.
    cache_dir = config.cache_dir or str(run_dir / f"{spec.name}.teacher-cache")
    return Recipe(
        teacher=paths if several else paths[0],
        teacher_sha256=hashes if several else hashes[0],
        teacher_merge=config.teacher_merge,
        method=method["name"],
        args=method["args"],
        schedule=method["schedule"],
        balance=method["balance"],
        trust=config.trust,
        unlabeled=config.unlabeled,
        unlabeled_ratio=config.unlabeled_ratio,
        pseudo=config.pseudo,
        pseudo_conf=config.pseudo_conf,
        pseudo_weight=config.pseudo_weight,
        cache_teacher=config.cache_teacher,
        cache_gb=config.cache_gb,
        cache_dir=cache_dir if config.cache_teacher == "disk" else None,
    )


def _stage(last: Path, trust: bool) -> str:
    """Tell from the last checkpoint whether a phase has to start, resume or only be finished."""
    if not last.is_file():
        return "fresh"
    _, checkpoint = load_model(last, trust=trust)
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
    keep = ("data", "imgsz", "batch", "device", "plots", "single_cls", "max_det")
    chosen = {k: arguments[k] for k in keep if k in arguments}
    validator = DetectionValidator(
        save_dir=folder, args={**chosen, "model": str(best), "task": "detect", "mode": "val", "rect": False}
    )
    metrics = _plain_metrics(validator(model=str(best)))
    if chosen.get("plots", True) and (folder / "results.csv").is_file():
        plot_results(file=folder / "results.csv")
    return metrics


def _metrics_of(best: Path) -> dict[str, Any]:
    _, checkpoint = load_model(best)
    return dict(checkpoint.get("train_metrics") or {})


def _plain_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in metrics.items()
        if isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)
        if not key.startswith("val/")
    }


def _fitness(metrics: Mapping[str, float]) -> float:
    for key in ("fitness", "metrics/mAP50-95(B)"):
        if key in metrics:
            return float(metrics[key])
    raise ConfigError("validation returned no mAP50-95; is the validation split empty?")
