"""The steps of a phase that every task takes alike: what its trainer is given, where it stopped, how it is finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from ultralytics.engine.validator import BaseValidator
from ultralytics.utils import LOGGER
from ultralytics.utils.plotting import plot_results

from kd_yolo.config import read_recipe
from kd_yolo.errors import CheckpointError
from kd_yolo.files import sha256, write_text
from kd_yolo.resources import load_yaml
from kd_yolo.tasks.distilling import DistillingTrainer, strip_checkpoints
from kd_yolo.tasks.exact_resume import load_state
from kd_yolo.tasks.run_folder import recipe_path

DONE_FILE = "phase.json"
RESUME_KEYS = ("distill_model", "data", "device")

Loader = Callable[..., tuple[Any, dict[str, Any]]]
"""Reads a checkpoint: ``load(path, trust=...)`` returns what it read of the model or file, and the dictionary."""


@dataclass(frozen=True)
class PhaseTask:
    """What the phases of a task are trained and judged with.

    Attributes:
        name: Ultralytics' name of the task.
        trainer: Trainer of a phase.
        validator: Ultralytics' validator of the task.
        load: Reads this task's checkpoints.
        validation_keys: Arguments of the training that its last validation takes over.
        validation: What that validation is given besides.
    """

    name: str
    trainer: type[DistillingTrainer]
    validator: type[BaseValidator]
    load: Loader
    validation_keys: tuple[str, ...]
    validation: Mapping[str, Any] = field(default_factory=dict)


def read_done(folder: Path) -> dict[str, Any] | None:
    """Return what a finished phase recorded, or None for one that is not finished."""
    done = folder / DONE_FILE
    return load_yaml(done) if done.is_file() else None  # JSON is YAML


def trainer_arguments(
    run_dir: Path, name: str, task: str, cfg: Mapping[str, Any], weights: Path | None, plan: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the student's model file and return the stock arguments of a phase's trainer, without a teacher.

    The file lies beside the phase folder, not in it: multi-GPU launch clears that folder.

    Args:
        run_dir: The run's folder.
        name: The phase's folder in it.
        task: Ultralytics' name of the task.
        cfg: The student's model description.
        weights: What it starts from, or None.
        plan: The content of ``run.yaml``.
    """
    student_file = run_dir / f"{name}.model.yaml"
    write_text(student_file, yaml.safe_dump(cfg, sort_keys=False))
    return {
        **plan["stock"],
        "task": task,
        "mode": "train",
        "model": str(student_file),
        "pretrained": str(weights) if weights else False,
        "data": plan["config"]["data"],
        "project": str(run_dir),
        "name": name,
        "exist_ok": True,
    }


def teacher_hashes(run_dir: Path, name: str, teachers: Sequence[Path]) -> list[str]:
    """Return the hash of each teacher's file as it was when the phase began.

    Once there is something to resume, the hashes are those of the recipe, so that a teacher that has changed since is
    found out when it is loaded.
    """
    begun = (run_dir / name / "weights" / "last.pt").is_file()
    known = read_recipe(recipe_path(run_dir, name)) if begun else None
    return [digest for _, digest in known.teachers] if known else [sha256(path) for path in teachers]


def train_phase(folder: Path, arguments: Mapping[str, Any], task: PhaseTask, trust: bool) -> dict[str, float]:
    """Train a phase, or take up where it was stopped, or do what is left after its last epoch.

    Args:
        folder: The phase's folder.
        arguments: Stock arguments of its trainer, as for a fresh start.
        task: What to train and judge it with.
        trust: Load foreign classes from its own checkpoint.

    Returns:
        Validation metrics by their Ultralytics names.

    Raises:
        CheckpointError: It ended without a checkpoint.
    """
    last, best = (folder / "weights" / f"{name}.pt" for name in ("last", "best"))
    stage = stage_of(last, task.load, trust)
    if stage == "trained":
        LOGGER.info(f"{folder.name}: trained, finishing its evaluation")
        metrics = _evaluate_finished(folder, arguments, task)
    else:
        if stage == "running":
            kept = {key: arguments[key] for key in RESUME_KEYS if key in arguments}
            arguments = {**kept, "resume": str(last), "save_dir": str(folder)}
        LOGGER.info(f"{folder.name}: {'resuming' if stage == 'running' else 'starting'} in {folder}")
        trainer = task.trainer(overrides=dict(arguments))
        trainer.train()
        metrics = plain_metrics(trainer.metrics if not trainer.ddp else _metrics_in(trainer.best, task.load))
    if not best.is_file():
        raise CheckpointError(f"{best}: the phase ended without a checkpoint; see the messages above")
    return metrics


def stage_of(last: Path, load: Loader, trust: bool) -> str:
    """Tell from the last checkpoint whether a phase has to start, resume or only be finished.

    Returns:
        ``fresh``, ``running`` or ``trained``.
    """
    if not last.is_file():
        return "fresh"
    _, checkpoint = load(last, trust=trust)
    epoch = int(checkpoint.get("epoch", -1))
    if epoch < 0:
        return "trained"
    state = load_state(last.parent, epoch)
    planned = int(checkpoint["train_args"]["epochs"])
    return "trained" if epoch + 1 >= planned or (state is not None and state["finished"]) else "running"


def plain_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that are single numbers, as floats, without the validation losses."""
    return {
        key: float(value)
        for key, value in metrics.items()
        if isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)
        if not key.startswith("val/")
    }


def _evaluate_finished(folder: Path, arguments: Mapping[str, Any], task: PhaseTask) -> dict[str, float]:
    """Do what is left of a phase whose last epoch is saved: strip, evaluate the best checkpoint, plot."""
    strip_checkpoints(folder / "weights")
    best = folder / "weights" / "best.pt"
    chosen = {key: arguments[key] for key in task.validation_keys if key in arguments}
    given = {**chosen, **task.validation, "model": str(best), "task": task.name, "mode": "val"}
    metrics = plain_metrics(task.validator(save_dir=folder, args=given)(model=str(best)))
    if chosen.get("plots", True) and (folder / "results.csv").is_file():
        plot_results(file=folder / "results.csv")
    return metrics


def _metrics_in(best: Path, load: Loader) -> dict[str, Any]:
    _, checkpoint = load(best)
    return dict(checkpoint.get("train_metrics") or {})
