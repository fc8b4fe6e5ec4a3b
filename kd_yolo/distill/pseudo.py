"""Confident boxes of the teacher as labels of images that have none.

STAC (Sohn et al., arXiv:2005.04757, Section 3.2): a frozen teacher's detections after NMS, kept above a confidence,
are the labels of an unlabeled image, and the student's own detection loss on them counts with a weight: L = L_s +
lambda_u L_u (Equation 1). Two things differ here. The teacher sees the view that the student sees, because both answer
for the same joined batch. And an image in which the teacher is sure of nothing is left out of L_u: stock detection
losses would take it for one without objects, which is more than the teacher said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.distill.base import Taps
from kd_yolo.distill.joined import take_images
from kd_yolo.distill.ops.boxes import decode_boxes

OVERLAP = 0.6
"""IoU above which the less confident of two boxes of one class goes."""
MOST_BOXES = 300
"""Boxes of one image, the most confident first; Ultralytics' ``max_det``."""
SMALLEST_SIDE_PX = 2.0
"""Ultralytics' augmentation drops labels with a shorter side too (``RandomPerspective.box_candidates``)."""


@dataclass(frozen=True)
class PseudoLabels:
    """How a teacher's boxes become labels.

    Attributes:
        confidence: Lowest class probability of such a box, in 0..1.
        weight: Weight of their detection loss against that of real labels.
    """

    confidence: float
    weight: float


@torch.no_grad()
def confident_boxes(taps: Taps, reg_max: int, confidence: float, canvas: tuple[int, int]) -> dict[str, Tensor]:
    """Return a teacher's confident boxes in the form of a training batch's labels.

    Args:
        taps: The teacher's, with ``scores`` (U, K, A) and ``boxes`` (U, 4 R, A).
        reg_max: R of the teacher.
        confidence: Lowest class probability, in 0..1.
        canvas: Height and width of the images, pixels.

    Returns:
        ``bboxes`` (N, 4), centre x, centre y, width, height in 0..1 of the canvas; ``cls`` (N, 1); ``batch_idx`` (N,),
        sorted, as Ultralytics' losses need it. N may be 0.
    """
    height, width = canvas
    scores = taps.scores.float().sigmoid()
    if taps.class_mask is not None:
        scores = scores.masked_fill(~taps.class_mask.to(scores.device).view(1, -1, 1), 0.0)
    best, label = scores.max(1)
    image, anchor = torch.nonzero(best >= confidence, as_tuple=True)
    limits = best.new_tensor([width, height, width, height])
    corners = decode_boxes(taps, reg_max).float()[image, anchor].clamp_(min=0).minimum(limits)
    # A side that is not a number fails the comparison too.
    sound = (corners[:, 2:] - corners[:, :2] >= SMALLEST_SIDE_PX).all(1)
    image, anchor, corners = image[sound], anchor[sound], corners[sound]
    sure, kind = best[image, anchor], label[image, anchor]
    from torchvision.ops import batched_nms  # here: it takes seconds to load

    kept = batched_nms(corners, sure, image * scores.shape[1] + kind, OVERLAP)  # the most confident first
    rank = torch.nn.functional.one_hot(image[kept], scores.shape[0]).cumsum(0).gather(1, image[kept].unsqueeze(1))
    kept = kept[rank.squeeze(1) <= MOST_BOXES]
    kept = kept[image[kept].argsort(stable=True)]
    corners = corners[kept] / limits
    centres, sizes = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    return {
        "bboxes": torch.cat([centres, sizes], 1),
        "cls": kind[kept].unsqueeze(1).float(),
        "batch_idx": image[kept].float(),
    }


def pseudo_loss(student: DetectionModel, outputs: Any, images: Tensor, found: Mapping[str, Tensor]) -> Tensor:
    """Return the student's own detection loss on images with pseudo labels, a mean over all unlabeled images.

    Images without a box count as zero.

    Args:
        student: Its criterion computes the loss.
        outputs: Its training outputs for the unlabeled images.
        images: Those images, (U, 3, H, W).
        found: Their labels, from ``confident_boxes``.
    """
    chosen, number = found["batch_idx"].long().unique(return_inverse=True)
    if not len(chosen):
        return images.new_zeros((), dtype=torch.float32)
    batch = {**found, "img": images[chosen], "batch_idx": number.float()}
    loss, _ = student.loss(batch, take_images(outputs, chosen))  # multiplied by the number of images, as stock losses
    return loss.sum() / images.shape[0]
