"""Run one phase of a training run: start, resume or finish it, and record that it is done."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils import LOGGER

from kd_yolo.checkpoints import load_model
from kd_yolo.config import Recipe, TrainConfig
from kd_yolo.distill.teachers.build import prepare_merge
from kd_yolo.errors import ConfigError
from kd_yolo.files import sha256, write_json, write_text
from kd_yolo.images import dataset_names
from kd_yolo.nn.student import StudentSpec
from kd_yolo.tasks.detect import KDTrainer
from kd_yolo.tasks.phase_steps import (
    DONE_FILE,
    PhaseTask,
    read_done,
    teacher_hashes,
    train_phase,
    trainer_arguments,
)
from kd_yolo.tasks.run_folder import recipe_path

DETECT = PhaseTask(
    "detect",
    KDTrainer,
    DetectionValidator,
    load_model,
    validation_keys=("data", "imgsz", "batch", "device", "plots", "single_cls", "max_det"),
    validation={"rect": False},
)


@dataclass(frozen=True)
class PhaseSpec:
    """One phase.

    Attributes:
        name: Folder name inside the run.
        student: What is trained.
        epochs: Epochs, or None for the run's.
        teachers: Files to distil from; none for labels only.
        defaults: Stock arguments for what the user did not give.
    """

    name: str
    student: StudentSpec
    epochs: int | None
    teachers: tuple[Path, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)


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
    """Run a phase, or take up where it was stopped, or return its recorded result.

    Raises:
        TeacherError: A teacher's file changed since the phase began.
        CheckpointError: It ended without a checkpoint.
    """
    folder = run_dir / spec.name
    if recorded := finished_phase(run_dir, spec.name):
        return recorded
    started = time.time()
    arguments = _trainer_arguments(run_dir, spec, plan)
    metrics = train_phase(folder, arguments, DETECT, trust=bool(plan["config"]["trust"]))
    digest, seconds = sha256(folder / "weights" / "best.pt"), round(time.time() - started, 1)
    result = PhaseResult(spec.name, _fitness(metrics), metrics, digest, seconds)
    write_json(folder / DONE_FILE, asdict(result))
    return result


def finished_phase(run_dir: Path, name: str) -> PhaseResult | None:
    """Return the recorded result of a phase that is done, or None."""
    recorded = read_done(run_dir / name)
    if not recorded:
        return None
    LOGGER.info(f"{name}: already done, {recorded['fitness']:.4f}")
    return PhaseResult(**recorded)


def _trainer_arguments(run_dir: Path, spec: PhaseSpec, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Write the files a phase reads and return the stock arguments of its trainer."""
    stock = {**spec.defaults, **plan["stock"]}
    arguments = trainer_arguments(
        run_dir, spec.name, "detect", spec.student.cfg, spec.student.weights, {**plan, "stock": stock}
    )
    if spec.epochs is not None:
        arguments["epochs"] = spec.epochs
    if spec.teachers and plan["method"]["name"] != "none":
        recipe_file = recipe_path(run_dir, spec.name)
        recipe = _recipe(run_dir, spec, plan)
        write_text(recipe_file, yaml.safe_dump(recipe.model_dump(), sort_keys=False))
        data = Path(plan["config"]["data"])
        prepare_merge(recipe, recipe_file, dict(enumerate(dataset_names(data))), data, int(plan["stock"]["imgsz"]))
        arguments["distill_model"] = str(recipe_file)
    return arguments


def _recipe(run_dir: Path, spec: PhaseSpec, plan: Mapping[str, Any]) -> Recipe:
    """Return everything of ours that a phase's trainer must know."""
    method, config = plan["method"], TrainConfig.model_validate(plan["config"])
    paths, hashes = [str(path) for path in spec.teachers], teacher_hashes(run_dir, spec.name, spec.teachers)
    several = len(paths) > 1
    # Beside the phase folder; each phase has another teacher, so each has another cache.
    cache_dir = config.cache_dir or str(run_dir / f"{spec.name}.teacher-cache")
    return Recipe(
        teacher=paths if several else paths[0],
        teacher_sha256=hashes if several else hashes[0],
        teacher_merge=config.teacher_merge,
        teacher_imgsz=None if config.teacher_imgsz == plan["stock"]["imgsz"] else config.teacher_imgsz,
        teacher_levels=config.teacher_levels,
        teacher_views=config.teacher_views,
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


def _fitness(metrics: Mapping[str, float]) -> float:
    for key in ("fitness", "metrics/mAP50-95(B)"):
        if key in metrics:
            return float(metrics[key])
    raise ConfigError("validation returned no mAP50-95; is the validation split empty?")
