"""The classification trainer: stock training, plus a student that may be re-parameterized and a teacher beside it.

Everything of ours reaches this class through two accepted stock arguments: ``model``, a YAML that describes itself, and
``distill_model``, the path of a recipe file. So multi-GPU workers, resume and Ultralytics' checks see nothing foreign.
"""

from __future__ import annotations

import os
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import DEFAULT_CFG, LOCAL_RANK, LOGGER, RANK, WORLD_SIZE
from ultralytics.utils.torch_utils import torch_distributed_zero_first, unwrap_model

from kd_yolo.classify.model import KDClassifier, wrap_classifier
from kd_yolo.classify.student import start_classifier
from kd_yolo.config import Recipe, read_recipe
from kd_yolo.distill.schedule import Schedule
from kd_yolo.errors import ConfigError, DistillationError
from kd_yolo.resources import load_yaml
from kd_yolo.tasks.detect import KDTrainer, strip_checkpoints, truncate_csv
from kd_yolo.tasks.exact_resume import (
    load_state,
    prune_states,
    replay_sampler,
    restore_gradients_and_random,
    restore_state,
    save_state,
)


class ClassifyProbe(nn.Module):
    """What AutoBatch measures: one whole training step's forward, the teacher included."""

    def __init__(self, model: KDClassifier) -> None:
        super().__init__()
        self.model = model
        self.yaml = model.yaml
        self.names = model.names

    def forward(self, images: Tensor) -> Tensor:
        """Return the loss of a made-up batch; (B, 3, H, W) in."""
        target = torch.zeros(images.shape[0], dtype=torch.long, device=images.device)
        return self.model.loss({"img": images, "cls": target})[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> ClassifyProbe:
        """Copy the student but share the teacher, which a plain copy of the model leaves out."""
        twin = ClassifyProbe(deepcopy(self.model, memo))
        twin.model.teacher_model = self.model.teacher_model
        return twin


class KDClassifyTrainer(ClassificationTrainer):
    """Train a classifier, with a frozen teacher when the run has a recipe.

    Attributes:
        recipe: The run's recipe, or None for training without a teacher.
        steps_since_update: Batches since the last optimizer step, the current one included.
    """

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: Any = None) -> None:
        self._accumulate = 1
        self.model: Any
        self.last: Path
        self.best: Path
        self._resume_state: dict[str, Any] | None = None
        self._position_unknown = False  # Ultralytics forgets the accumulation counter on resume
        self._batch_in_epoch = 0
        self.steps_since_update = 0
        self.unlabeled = None  # read by the exact-resume state, which detection shares
        super().__init__(cfg, overrides, _callbacks)
        self.recipe: Recipe | None = read_recipe(self.args.distill_model)
        if self.args.distill_model is not None and self.recipe is None:
            raise ConfigError(f"distill_model={self.args.distill_model}: not a kd-yolo recipe; give teacher=FILE.pt")
        self.schedule = Schedule.model_validate(self.recipe.schedule) if self.recipe else None
        if LOCAL_RANK != -1:  # Ultralytics counts the devices of this machine; a job may span several
            self.world_size = WORLD_SIZE

    @property
    def accumulate(self) -> float:
        """Batches per optimizer step; until the first step after a resume, as the stopped run's counter demands."""
        if not self._position_unknown:
            return self._accumulate
        return 0 if self.steps_since_update >= self._accumulate else float("inf")

    @accumulate.setter
    def accumulate(self, value: int) -> None:
        self._accumulate = value

    def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
        """Build the student from our model file; what no file stands for is stock Ultralytics' to build."""
        if isinstance(cfg, (str, Path)):
            if not Path(cfg).is_file():
                return super().get_model(cfg, weights, verbose)
            cfg = load_yaml(Path(cfg))
        model = start_classifier(cfg, weights, self.data["names"], verbose and RANK == -1)
        return self._made_trainable(model)

    def setup_model(self) -> Any:
        """Build the student; on resume take it out of the wrapper, which is put around it again later."""
        if not self.resume or isinstance(self.model, nn.Module):
            return super().setup_model()
        weights, checkpoint = load_checkpoint(self.model)
        student = weights.student_model if isinstance(weights, DistillationModel) else weights
        student.criterion = None
        self.model = self._made_trainable(deepcopy(student))  # resume_training reads the checkpoint's own
        return checkpoint

    def set_model_attributes(self) -> None:
        """Attach data attributes and wrap the student; runs before freezing, DDP, optimizer and EMA."""
        super().set_model_attributes()
        if self.recipe is not None and not isinstance(self.model, DistillationModel):
            self.model = wrap_classifier(self.model, self.recipe, self.data["names"], seed=self.args.seed)

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        """Build a loader as stock; the student, not its wrapper, keeps the transforms that prediction repeats."""
        loader = super().get_dataloader(dataset_path, batch_size, rank, mode)
        model = unwrap_model(self.model)
        if mode != "train" and isinstance(model, KDClassifier):
            model.student_model.transforms = model.transforms
        return loader

    def auto_batch(self, max_num_obj: int = 0, dataset_size: int = 0) -> int:
        """Find the batch size with the teacher in the measured step."""
        model = self.model
        if not isinstance(model, KDClassifier):
            return super().auto_batch(max_num_obj, dataset_size)
        self.model = ClassifyProbe(model)
        try:
            return super().auto_batch(max_num_obj, dataset_size)
        finally:
            self.model = model

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
        if isinstance(model, KDClassifier) and self.schedule is not None:
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
            save_state(self._as_detection)
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
            restore_state(self._as_detection, self._resume_state)
        truncate_csv(self.csv, self.start_epoch)

    def final_eval(self) -> None:
        """Strip the checkpoints atomically and validate the best one."""
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

    @property
    def _as_detection(self) -> KDTrainer:
        """This trainer, for the exact-resume functions: they use only what both trainers have."""
        return cast(KDTrainer, self)

    def _made_trainable(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.Dropout) and self.args.dropout:
                module.p = self.args.dropout
        return model.requires_grad_(True)

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
        self._batch_in_epoch = 0
        if self._resume_state is None or self.epoch != self.start_epoch:
            return
        replay_sampler(self._as_detection)
        restore_gradients_and_random(self._as_detection, self._resume_state)
        self.steps_since_update = int(self._resume_state["steps_since_update"])
        self._position_unknown = True

    def _refuse_broken_distillation(self) -> None:
        model = unwrap_model(self.model)
        if not isinstance(model, KDClassifier) or not self.tloss:
            return
        for name in model.term_names:
            if not bool(torch.isfinite(torch.as_tensor(self.tloss[name])).all()):
                raise DistillationError(
                    f"distillation loss '{name}' became {float(self.tloss[name])} in epoch {self.epoch + 1}; lower "
                    "lr0 or kd.weight, or train with amp=false, then continue with resume=true"
                )
