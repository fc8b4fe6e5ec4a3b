"""What every trainer with a teacher beside its student does: exact resume, whole checkpoints, the schedule of a recipe.

A task's trainer inherits from ``DistillingTrainer`` first and then from Ultralytics' trainer of the task, so that every
``super()`` here ends in the stock method. Everything of ours reaches it through two accepted stock arguments:
``model``, a YAML that describes itself, and ``distill_model``, the path of a recipe file. So multi-GPU workers, resume
and Ultralytics' own checks see nothing foreign.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import DEFAULT_CFG, LOCAL_RANK, LOGGER, RANK, WORLD_SIZE
from ultralytics.utils.torch_utils import strip_optimizer, torch_distributed_zero_first, unwrap_model

from kd_yolo.config import Recipe, read_recipe
from kd_yolo.distill.schedule import Schedule
from kd_yolo.errors import ConfigError, DistillationError
from kd_yolo.files import written_aside
from kd_yolo.tasks.exact_resume import (
    load_state,
    prune_states,
    replay_sampler,
    restore_gradients_and_random,
    restore_state,
    save_state,
)


class DistillingTrainer(BaseTrainer, ABC):
    """The part of a trainer that does not depend on the task.

    Attributes:
        wrapper: Class of the student with its teacher; it has a schedule's ``factor`` and the ``term_names``.
        recipe: The run's recipe, or None for training without one.
        steps_since_update: Batches since the last optimizer step, the current one included.
    """

    wrapper: ClassVar[type[DistillationModel]]

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: Any = None) -> None:
        self._accumulate = 1
        self.model: Any
        self.last: Path
        self.best: Path
        self._resume_state: dict[str, Any] | None = None
        self._position_unknown = False  # Ultralytics forgets the accumulation counter on resume
        self._batch_in_epoch = 0
        self.steps_since_update = 0
        super().__init__(cfg, overrides, _callbacks)
        self.recipe: Recipe | None = read_recipe(self.args.distill_model)
        self.schedule = Schedule.model_validate(self.recipe.schedule) if self.recipe else None
        if LOCAL_RANK != -1:  # Ultralytics counts the devices of this machine; a job may span several
            self.world_size = WORLD_SIZE

    @property
    def accumulate(self) -> float:
        """Batches per optimizer step.

        The training loop steps when ``batches since the last step >= accumulate`` but restarts that count on resume.
        Until the first step after a resume this answers so that the loop steps exactly when the stopped run would have.
        """
        if not self._position_unknown:
            return self._accumulate
        return 0 if self.steps_since_update >= self._accumulate else float("inf")

    @accumulate.setter
    def accumulate(self, value: int) -> None:
        self._accumulate = value

    def setup_model(self) -> Any:
        """Build the student; on resume take it out of the wrapper, which is put around it again later."""
        if not self.resume or isinstance(self.model, nn.Module):
            return super().setup_model()
        weights, checkpoint = load_checkpoint(self.model)
        self.model = self._restored(weights.student_model if isinstance(weights, DistillationModel) else weights)
        return checkpoint

    def set_model_attributes(self) -> None:
        """Attach data attributes and wrap the student; runs before freezing, DDP, optimizer and EMA."""
        super().set_model_attributes()
        if self.recipe is not None and not isinstance(self.model, DistillationModel):
            self.model = self._wrapped(self.model, self.recipe)

    def run_callbacks(self, event: str) -> None:
        """Do our own part of an event before the callbacks."""
        if event == "on_train_epoch_start":
            self._begin_epoch()
        elif event == "on_train_epoch_end":
            self._refuse_broken_distillation()
        super().run_callbacks(event)

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Count the batch and set the schedule; otherwise as stock."""
        self.steps_since_update += 1
        model = unwrap_model(self.model)
        if isinstance(model, self.wrapper) and self.schedule is not None:
            moment = self.epoch + self._batch_in_epoch / len(self.train_loader)
            model.factor = self.schedule.factor(moment, self.epochs, self.args.close_mosaic)
        self._batch_in_epoch += 1
        return super().preprocess_batch(batch)

    def optimizer_step(self) -> None:
        """Step as stock and note that the accumulation counter is known again."""
        super().optimizer_step()
        self.steps_since_update = 0
        self._position_unknown = False

    def save_model(self) -> bool:
        """Write ``last.pt``, ``best.pt`` and the exact-resume state so that a kill at any moment leaves a whole set."""
        last, best = self.last, self.best
        self.last, self.best = (path.with_name(f".{path.stem}.part.pt") for path in (last, best))
        try:
            self.best.unlink(missing_ok=True)
            saved = bool(super().save_model())
            save_state(self)
            if self.best.exists():
                os.replace(self.best, best)
            os.replace(self.last, last)
        finally:
            self.last, self.best = last, best
        prune_states(self.wdir, self.epoch)
        return saved

    def resume_training(self, ckpt: Any) -> None:
        """Resume as stock, then put back what stock loses, and drop log lines of an epoch that was not completed."""
        super().resume_training(ckpt)
        if ckpt is None or not self.resume:
            return
        self._resume_state = load_state(self.wdir, self.start_epoch - 1)
        if self._resume_state is None:
            LOGGER.warning(f"{self.wdir}: no exact-resume state; continuing from the half-precision EMA weights")
        else:
            restore_state(self, self._resume_state)
        truncate_csv(self.csv, self.start_epoch)

    def final_eval(self) -> None:
        """Strip the checkpoints atomically and validate the best one on the training canvas."""
        with torch_distributed_zero_first(LOCAL_RANK):
            if RANK in {-1, 0}:
                strip_checkpoints(self.wdir)
        if not self.best.exists():
            return
        LOGGER.info(f"\nValidating {self.best}...")
        self.validator.args.plots = self.args.plots
        self.validator.args.compile = False
        self.metrics = self.validator(model=self.best)
        self.metrics.pop("fitness", None)
        self.epoch += 1  # log best metrics at step epochs + 1, not over the last epoch's
        self.run_callbacks("on_fit_epoch_end")
        self.epoch -= 1

    @abstractmethod
    def _restored(self, student: nn.Module) -> nn.Module:
        """Return a checkpoint's student, ready to be trained on; the checkpoint itself is still read afterwards."""

    @abstractmethod
    def _wrapped(self, student: nn.Module, recipe: Recipe) -> nn.Module:
        """Return the student beside the recipe's teacher, an instance of ``wrapper``."""

    def _setup_ddp(self) -> None:
        """Join the other processes.

        Raises:
            ConfigError: They are to run on CPUs, which Ultralytics' trainer cannot do.
        """
        if self.device.type in {"cpu", "mps"}:
            raise ConfigError(
                f"device={self.device.type}: {WORLD_SIZE} processes need a GPU each; give device=0,1,... or start one"
            )
        super()._setup_ddp()

    def _begin_epoch(self) -> None:
        """Start the epoch's count; in the first resumed one put back what the set-up of a run touches."""
        self._batch_in_epoch = 0
        if self._resume_state is None or self.epoch != self.start_epoch:
            return
        replay_sampler(self)
        restore_gradients_and_random(self, self._resume_state)
        self.steps_since_update = int(self._resume_state["steps_since_update"])
        self._position_unknown = True

    def _refuse_broken_distillation(self) -> None:
        model = unwrap_model(self.model)
        if not isinstance(model, self.wrapper) or not self.tloss:
            return
        for name in model.term_names:
            if not bool(torch.isfinite(torch.as_tensor(self.tloss[name])).all()):
                raise DistillationError(
                    f"distillation loss '{name}' became {float(self.tloss[name])} in epoch {self.epoch + 1}; lower "
                    "lr0 or kd.weight, or train with amp=false, then continue with resume=true"
                )


def strip_checkpoints(weights_folder: Path) -> None:
    """Reduce ``best.pt`` and ``last.pt`` to the student alone, each written aside and renamed; safe to repeat."""
    for name in ("best.pt", "last.pt"):
        path = weights_folder / name
        if path.exists():
            with written_aside(path) as aside:
                strip_optimizer(path, s=str(aside))
    for path in (*weights_folder.glob("resume-*.pt"), *weights_folder.glob(".*.part.pt")):
        path.unlink(missing_ok=True)


def truncate_csv(path: Path, epochs_done: int) -> None:
    """Keep the header and the rows of finished epochs; a kill between log and checkpoint leaves one row too many."""
    if not path.is_file():
        return
    header, *rows = path.read_text(encoding="utf-8").splitlines()
    kept = [row for row in rows if row.split(",")[0].strip().isdigit() and int(row.split(",")[0]) <= epochs_done]
    with written_aside(path) as aside:
        aside.write_text("\n".join([header, *kept]) + "\n", encoding="utf-8")
