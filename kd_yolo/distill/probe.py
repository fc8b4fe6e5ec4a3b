"""The training step as AutoBatch measures it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from kd_yolo.distill.model import KDModel


class BatchProbe(nn.Module):
    """What AutoBatch measures: one whole training step's forward, teacher and unlabeled images included.

    Ultralytics profiles a model with a bare image tensor, which would leave the teacher out and overfill the memory.
    """

    def __init__(self, model: KDModel, boxes_per_image: int, unlabeled_ratio: float = 0.0) -> None:
        """Take the model to measure.

        Args:
            model: Wrapped student.
            boxes_per_image: Labels of a made-up image.
            unlabeled_ratio: Unlabeled images per labelled image.
        """
        super().__init__()
        self.model = model
        self.yaml = model.yaml
        self.names = model.names
        self.boxes_per_image = max(boxes_per_image, 1)
        self.unlabeled_ratio = unlabeled_ratio

    def forward(self, images: Tensor) -> Tensor:
        """Return the loss vector of a made-up batch; (B, 3, H, W) in."""
        count = images.shape[0] * self.boxes_per_image
        index = torch.arange(images.shape[0], device=images.device, dtype=torch.float32)
        batch = {
            "img": images,
            "batch_idx": index.repeat_interleave(self.boxes_per_image),
            "cls": torch.zeros(count, 1, device=images.device),
            "bboxes": torch.full((count, 4), 0.5, device=images.device),
        }
        if self.unlabeled_ratio > 0:
            more = max(round(self.unlabeled_ratio * images.shape[0]), 1)
            batch["unlabeled"] = images.new_zeros(more, *images.shape[1:])
        return self.model.loss(batch)[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchProbe:
        """Copy the student but share the teacher, which a plain copy of the model leaves out."""
        twin = BatchProbe(deepcopy(self.model, memo), self.boxes_per_image, self.unlabeled_ratio)
        twin.model._teacher, twin.model.pseudo = self.model._teacher, self.model.pseudo
        twin.model.criterion = None
        return twin
