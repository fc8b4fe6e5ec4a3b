"""What a detector computes: which head branch, on which canvas, its raw outputs and its detections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import scale_boxes, xywh2xyxy

from kd_yolo.errors import ConfigError
from kd_yolo.nn.merging import MergeReport, merge

CONFIDENCE = 0.25  # Ultralytics' default of predict
NMS_IOU = 0.7  # Ultralytics' default of predict and val
MAX_DETECTIONS = 300


@dataclass(frozen=True)
class RawOutputs:
    """Everything a head says before selection.

    Attributes:
        boxes: (B, A, 4), x1 y1 x2 y2 in pixels of the canvas.
        scores: (B, A, K), class probabilities.
    """

    boxes: Tensor
    scores: Tensor

    def difference(self, other: RawOutputs) -> Difference:
        """Return how far another model's outputs for the same images are."""
        boxes = (self.boxes.double() - other.boxes.double()).abs()
        scores = (self.scores.double() - other.scores.double()).abs()
        return Difference(float(boxes.max()), float(boxes.mean()), float(scores.max()))


@dataclass(frozen=True)
class Difference:
    """How far the outputs of two models are apart.

    Attributes:
        box: Largest difference of a box coordinate in pixels.
        box_mean: Mean difference of the box coordinates in pixels.
        score: Largest difference of a class score.
    """

    box: float
    box_mean: float
    score: float


def head_of(model: nn.Module) -> Any:
    """Return the detection head (the last layer) of a detector."""
    layers: Any = model.model
    return layers[-1]


def use_head(model: DetectionModel, nms: bool, name: str = "the model") -> None:
    """Choose the branch that a model predicts with, in place: one-to-many for NMS, one-to-one for NMS-free.

    Raises:
        ConfigError: The model does not have that branch.
    """
    head = head_of(model)
    if nms and head.cv2 is None:
        raise ConfigError(f"{name}: keeps only its NMS-free head; use nms=false or the trained checkpoint")
    if not nms and getattr(head, "one2one_cv2", None) is None:
        raise ConfigError(f"{name}: has no NMS-free (one-to-one) head; use nms=true")
    head.end2end = not nms


def uses_nms(model: nn.Module) -> bool:
    """Return whether the branch that a model predicts with needs NMS."""
    return not head_of(model).end2end


def deployed_form(
    model: DetectionModel, nms: bool = True, name: str = "the model"
) -> tuple[DetectionModel, MergeReport]:
    """Return a copy of a detector as it is deployed: branches merged and checked, one head branch, stock classes.

    Args:
        model: Detector in eval mode; left as it is.
        nms: Keep the one-to-many branch, whose output needs NMS; otherwise the one-to-one branch.
        name: What messages call the model, usually its file.

    Raises:
        ConfigError: The model does not have the wanted branch.
        ReparamError: The merged model does not compute what the model computes.
    """
    deployed, report = merge(model)
    use_head(deployed, nms, name)
    head_of(deployed).fuse()  # removes the branch that is not used, and only that
    if "end2end" in deployed.yaml:
        deployed.yaml = {**deployed.yaml, "end2end": not nms}
    deployed.criterion = None
    return deployed.eval().requires_grad_(False), report


def check_canvas(imgsz: int | Sequence[int], stride: int) -> tuple[int, int]:
    """Return a canvas as height and width.

    Raises:
        ConfigError: Not one or two positive whole multiples of the stride.
    """
    sides = [imgsz, imgsz] if isinstance(imgsz, int) else list(imgsz)
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
        raise ConfigError(f"imgsz={imgsz}: give one whole number of pixels, or height and width")
    height, width = int(sides[0]), int(sides[1])
    if min(height, width) <= 0 or height % stride or width % stride:
        up = [max(stride, -(-side // stride) * stride) for side in (height, width)]
        hint = str(up[0]) if up[0] == up[1] else f"[{up[0]}, {up[1]}]"
        raise ConfigError(f"imgsz={imgsz}: must be positive and a multiple of the stride {stride}, for example {hint}")
    return height, width


def max_stride(model: nn.Module) -> int:
    """Return the largest stride of a detector in pixels."""
    stride: Any = model.stride
    return int(stride.max())


def channels_of(model: nn.Module) -> int:
    """Return how many channels a detector's images have."""
    description: Any = model.yaml
    return int(description.get("channels", 3))


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_convolutions(model: nn.Module) -> int:
    """Return the number of convolutions that a forward pass of a deployed model runs."""
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())


@torch.no_grad()  # not inference_mode: the head caches its anchors, which must stay usable in training
def raw_outputs(model: DetectionModel, images: Tensor) -> RawOutputs:
    """Return what the chosen branch of a detector in eval mode says about images (B, C, H, W), before any selection."""
    head = head_of(model)
    predictions: Any = model(images)[1]
    if "one2one" in predictions:
        predictions = predictions["one2one" if head.end2end else "one2many"]
    decoded = head._inference(predictions).transpose(1, 2)  # (B, A, 4 + K), boxes as the branch's decoder gives them
    return split_raw(decoded, xyxy=bool(head.end2end))


def split_raw(decoded: Tensor, xyxy: bool) -> RawOutputs:
    """Split decoded outputs (B, A, 4 + K) whose boxes are either x1 y1 x2 y2 or centre, width, height."""
    boxes, scores = decoded[..., :4], decoded[..., 4:]
    return RawOutputs(boxes if xyxy else xywh2xyxy(boxes), scores)


def detections(raw: RawOutputs, nms: bool, confidence: float = CONFIDENCE, iou: float = NMS_IOU) -> list[Tensor]:
    """Select detections as Ultralytics' predictor does.

    Args:
        raw: Outputs for B images.
        nms: Apply NMS per class; otherwise take the best (anchor, class) pairs as the NMS-free head does.
        confidence: Lowest score.
        iou: Overlap above which NMS drops the weaker box.

    Returns:
        For every image (n, 6): x1, y1, x2, y2, score, class; best first.
    """
    if nms:
        _load_nms_kernel()
        centred = torch.cat((_to_centred(raw.boxes), raw.scores), -1).transpose(1, 2)
        # Ultralytics' NMS stops at a time limit; a check must not depend on how busy the machine is.
        found = non_max_suppression(
            centred, confidence, iou, nc=raw.scores.shape[-1], max_det=MAX_DETECTIONS, max_time_img=1e6
        )
        return list(found)
    return [_top_pairs(boxes, scores, confidence) for boxes, scores in zip(raw.boxes, raw.scores, strict=True)]


def postprocess(
    output: Tensor,
    shapes: Sequence[tuple[int, ...]],
    canvas: tuple[int, int],
    nms: bool,
    confidence: float = CONFIDENCE,
    iou: float = NMS_IOU,
) -> list[Tensor]:
    """Turn the output of a deployed graph into detections in pixels of the images, as Ultralytics' predictor does.

    Args:
        output: (B, 4 + K, A) of all anchors with centre-size boxes, or (B, n, 6) of rows that need no NMS.
        shapes: Height and width of each image before the letterbox.
        canvas: Height and width that the network saw.
        nms: Whether the output needs NMS.
        confidence: Lowest score.
        iou: Overlap above which NMS drops the weaker box.

    Returns:
        For every image (n, 6): x1, y1, x2, y2, score, class; best first.
    """
    _load_nms_kernel()
    # Ultralytics' NMS stops at a time limit; results must not depend on how busy the machine is.
    found = non_max_suppression(output, confidence, iou, max_det=MAX_DETECTIONS, end2end=not nms, max_time_img=1e6)
    for rows, shape in zip(found, shapes, strict=True):
        rows[:, :4] = scale_boxes(canvas, rows[:, :4], shape)
    return list(found)


def _top_pairs(boxes: Tensor, scores: Tensor, confidence: float) -> Tensor:
    """Return the best pairs of anchor and class among (A, 4) boxes and (A, K) scores as rows of six."""
    anchors = scores.amax(1).topk(min(MAX_DETECTIONS, scores.shape[0])).indices
    best, index = scores[anchors].flatten().topk(anchors.numel())
    row, label = index // scores.shape[1], index % scores.shape[1]
    rows = torch.cat((boxes[anchors[row]], best[:, None], label[:, None].to(best.dtype)), 1)
    return rows[best > confidence]


def _to_centred(boxes: Tensor) -> Tensor:
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), -1)


def _load_nms_kernel() -> None:
    """Load torchvision, whose kernel Ultralytics' NMS uses where it is loaded; not before: it takes seconds."""
    import torchvision  # noqa: F401
