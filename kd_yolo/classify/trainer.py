"""The classification trainer: stock training, plus a student that may be re-parameterized and a teacher beside it."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.utils import DEFAULT_CFG, RANK
from ultralytics.utils.torch_utils import unwrap_model

from kd_yolo.classify.model import KDClassifier, wrap_classifier
from kd_yolo.classify.student import start_classifier
from kd_yolo.config import Recipe
from kd_yolo.errors import ConfigError
from kd_yolo.resources import load_yaml
from kd_yolo.tasks.distilling import DistillingTrainer


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


class KDClassifyTrainer(DistillingTrainer, ClassificationTrainer):
    """Train a classifier, with a frozen teacher when the run has a recipe.

    Raises:
        ConfigError: ``distill_model`` is not a recipe; stock Ultralytics cannot distil classifiers.
    """

    wrapper = KDClassifier

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: Any = None) -> None:
        super().__init__(cfg, overrides, _callbacks)
        if self.args.distill_model is not None and self.recipe is None:
            raise ConfigError(f"distill_model={self.args.distill_model}: not a kd-yolo recipe; give teacher=FILE.pt")

    def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
        """Build the student from our model file; what no file stands for is stock Ultralytics' to build."""
        if isinstance(cfg, (str, Path)):
            if not Path(cfg).is_file():
                return super().get_model(cfg, weights, verbose)
            cfg = load_yaml(Path(cfg))
        model = start_classifier(cfg, weights, self.data["names"], verbose and RANK == -1)
        return self._made_trainable(model)

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

    def _restored(self, student: nn.Module) -> nn.Module:
        student.criterion = None  # type: ignore[assignment]
        return self._made_trainable(deepcopy(student))  # resume_training reads the checkpoint's own

    def _wrapped(self, student: Any, recipe: Recipe) -> KDClassifier:
        return wrap_classifier(student, recipe, self.data["names"], seed=self.args.seed)

    def _made_trainable(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.Dropout) and self.args.dropout:
                module.p = self.args.dropout
        return model.requires_grad_(True)
