"""Does the student still tell images apart? A collapsed one gives the same answer to every image, at a low loss."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_yolo.anomaly.model import AnomalyModel
from kd_yolo.errors import ConfigError

LEAST_RATIO = 0.05  # below it the student has collapsed


@torch.no_grad()
def collapse_ratio(model: AnomalyModel, images: Tensor) -> float:
    """Return how much the student's answers vary over images, relative to the teacher's targets.

    Both are taken as unit vectors, because the loss does not see lengths; the variation is the standard deviation over
    the images at each position and channel, averaged. The worst level counts. Near 0 means that one constant direction
    answers everything, which a trained projector on the teacher's side makes a perfect solution; a healthy student is
    well above ``LEAST_RATIO``.

    Args:
        model: A trained model with a cross-layer loss; left as it is.
        images: Two or more images (B, 3, H, W) in [0, 1].

    Raises:
        ConfigError: Fewer than two images, or a model without a cross-layer loss.
    """
    if images.shape[0] < 2 or model.spec.cross == 0:
        raise ConfigError("the collapse check needs two or more images and a model with cross > 0")
    was_training = model.training
    model.eval()
    goals = model.targets(images)
    features = model.student(images)
    ratios: list[float] = []
    for stride in model.levels:
        own, _ = model.cross_pair(stride, features[stride], goals)
        ratios.append(_variation(own) / max(_variation(goals[f"s{model.spec.target_stride(stride)}"]), 1e-12))
    model.train(was_training)
    return min(ratios)


def _variation(maps: Tensor) -> float:
    unit = torch.nn.functional.normalize(maps.float(), dim=1)
    return float((unit.std(0) * unit.shape[1] ** 0.5).mean())
