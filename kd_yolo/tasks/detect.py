"""The detection trainer: stock training, plus a student that may be re-parameterized and a teacher beside it."""

from __future__ import annotations

from copy import copy
from typing import Any

from torch import nn
from torch.nn.functional import interpolate
from ultralytics.data import build_yolo_dataset
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import DEFAULT_CFG, RANK
from ultralytics.utils.torch_utils import unwrap_model

from kd_yolo.config import Recipe
from kd_yolo.distill.model import KDModel
from kd_yolo.distill.probe import BatchProbe
from kd_yolo.distill.pseudo import PseudoLabels
from kd_yolo.distill.wrap import wrap_student
from kd_yolo.nn.student import build_student
from kd_yolo.tasks.distilling import DistillingTrainer
from kd_yolo.tasks.unlabeled import open_stream
from kd_yolo.tasks.unlabeled_stream import UnlabeledStream

PROBE_BOXES_PER_IMAGE = 16  # for AutoBatch; the stock estimate of the assigner's memory comes on top


class KDTrainer(DistillingTrainer, DetectionTrainer):
    """Train a detector, with a frozen teacher when the run has a recipe.

    Attributes:
        unlabeled: Images without labels that join every batch, or None.
    """

    wrapper = KDModel

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: Any = None) -> None:
        self.unlabeled: UnlabeledStream | None = None
        super().__init__(cfg, overrides, _callbacks)

    def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
        """Build the student; a YAML without our key is built exactly as stock Ultralytics does."""
        model = build_student(
            cfg,
            weights,
            nc=self.data["nc"],
            ch=self.data["channels"],
            names=self.data["names"] if getattr(self.args, "cls_remap", True) else None,
            verbose=verbose and RANK == -1,
        )
        return model if model is not None else super().get_model(cfg, weights, verbose)

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> Any:
        """Build a data set; validation uses the training canvas.

        Stock validation pads rectangular batches to one stride more, so that 224 is judged at 256 while an exported
        file runs at 224. Training views are drawn on the teacher's canvas when that is larger.
        """
        stride = max(int(unwrap_model(self.model).stride.max()), 32)
        args = self.args
        if mode == "train" and self._teacher_imgsz is not None:
            args = copy(args)
            args.imgsz = self._teacher_imgsz
        return build_yolo_dataset(args, img_path, batch, self.data, mode=mode, rect=False, stride=stride)

    def auto_batch(self) -> int:
        """Find the batch size with the teacher in the measured step."""
        model = self.model
        if not isinstance(model, KDModel):
            return super().auto_batch()
        ratio = self.recipe.unlabeled_ratio if self.recipe and self.recipe.unlabeled else 0.0
        self.model = BatchProbe(model, PROBE_BOXES_PER_IMAGE, ratio)
        try:
            return super().auto_batch()
        finally:
            self.model = model

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Count the batch, set the schedule, fit the student's canvas, add unlabeled images; otherwise as stock."""
        batch = super().preprocess_batch(batch)
        if self._teacher_imgsz is not None:
            batch["teacher_img"] = batch["img"]
            batch["img"] = interpolate(batch["img"], (self.args.imgsz, self.args.imgsz), mode="bilinear")
        if self.unlabeled is not None and unwrap_model(self.model).uses_unlabeled:
            batch["unlabeled"] = self.unlabeled.join(batch["img"])
        return batch

    def progress_string(self) -> str:
        """Return the header of the progress line; names that are too long lose ``_loss``."""
        names = [name if len(name) <= 10 else name.removesuffix("_loss")[:10] for name in self.loss_names]
        return ("\n" + "%11s" * (4 + len(names))) % ("Epoch", "GPU_mem", *names, "Instances", "Size")

    def final_eval(self) -> None:
        """Let go of the unlabeled images and finish as every run does."""
        if self.unlabeled is not None:
            self.unlabeled.close()
        super().final_eval()

    @property
    def _teacher_imgsz(self) -> int | None:
        """Canvas of the teacher when it is not the student's, pixels."""
        return self.recipe.teacher_imgsz if self.recipe is not None else None

    def _restored(self, student: nn.Module) -> nn.Module:
        return self.get_model(cfg=student.yaml, weights=student, verbose=RANK in {-1, 0})

    def _wrapped(self, student: Any, recipe: Recipe) -> KDModel:
        model = wrap_student(student, recipe, self.data["names"], self.args.seed, self.args.imgsz)
        if recipe.unlabeled is not None and recipe.pseudo:
            model.label_with_teacher(PseudoLabels(recipe.pseudo_conf, recipe.pseudo_weight))
        return model

    def _build_train_pipeline(self) -> None:
        super()._build_train_pipeline()
        self.unlabeled = open_stream(self)

    def _close_dataloader_mosaic(self) -> None:
        super()._close_dataloader_mosaic()
        if self.unlabeled is not None:
            self.unlabeled.close_mosaic(self.args)

    def _begin_epoch(self) -> None:
        if self.unlabeled is not None:
            self.unlabeled.begin_epoch(self.epoch)
        model = unwrap_model(self.model)
        if isinstance(model, KDModel) and self.schedule is not None and model.balance and not model.balance_factors:
            model.balance_due = self.epoch >= self.schedule.warmup_epochs(self.epochs, self.args.close_mosaic)
        super()._begin_epoch()
